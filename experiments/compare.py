"""Compare baselines, IQL and the Trajectory Transformer on one dataset: train, play and print one table.

python -m experiments.compare --config=experiments/configs/antmaze.py:medium-diverse-cpu --workdir=runs/antmaze
    [--dataset=ID --methods=bc,bc10,dt,cql,iql,tt,tt_imitation,tt_q --num_seeds=3 --num_episodes=50 --seed=0]

bc, bc10: behaviour cloning, of all episodes and of the best 10%; dt: Decision Transformer; cql, iql: Q-learning; tt:
search by predicted reward; tt_imitation: by likelihood; tt_q: guided by IQL's Q. Trains what is not trained yet, lets
every method play the same reset seeds, and writes results.json with every episode, and figures: bars, learning curves,
and in a maze the paths of each method over V. The same command goes on where it was interrupted.
"""

from absl import flags

from experiments.common import comparison, entry, run_flags, stages

CONFIG, DATASET = run_flags.config("dataset"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(), run_flags.download()
METHODS = flags.DEFINE_list("methods", None, "Methods, by default all.")
SEED = run_flags.seed(help="Seed of the first training and of the first episode.")
NUM_SEEDS = run_flags.num_seeds(default=None)
NUM_EPISODES = run_flags.num_episodes(default=50, help="Episodes that each trained model plays.")
NUM_ENVS = run_flags.num_envs(default=25)


def main(_):
    if not WORKDIR.value:
        raise entry.UsageError("--workdir is missing.")
    experiment = stages.begin(CONFIG.value, WORKDIR.value, seed=SEED.value, dataset=DATASET.value)
    if not experiment.config.dataset:
        raise entry.UsageError("--dataset is missing: the id of a Minari dataset, such as mujoco/hopper/medium-v0.")
    sizes = {flag.name: flag.value for flag in (METHODS, NUM_SEEDS, NUM_EPISODES, NUM_ENVS)}
    comparison.compare(experiment, **sizes, download=DOWNLOAD.value)


if __name__ == "__main__":
    entry.run(main)
