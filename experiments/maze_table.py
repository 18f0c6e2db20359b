"""Compare behaviour cloning, IQL's policy and the Trajectory Transformer, alone and guided by IQL's Q, in a maze.

python -m experiments.maze_table --config=experiments/configs/antmaze.py:medium-diverse-cpu --workdir=runs/antmaze
    [--dataset=ID --config.eval.goal="(10.0, -10.0)" --seed=0 --num_seeds=3 --num_episodes=50]

Trains what is not trained yet, lets every method play the same reset seeds, and writes results.json with every episode
and figures: the paths of each method in the maze, with V as a heat map beneath, and success while IQL was trained. The
same command goes on where it was interrupted.
"""

from experiments.common import comparison, entry, run_flags, stages

CONFIG, DATASET = run_flags.config(), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(), run_flags.download()
SEED = run_flags.seed(help="Seed of the first training and of the first episode.")
NUM_SEEDS = run_flags.num_seeds(default=None)
NUM_EPISODES = run_flags.num_episodes(default=50, help="Episodes that each trained model plays.")
NUM_ENVS = run_flags.num_envs(default=25)


def main(_):
    if not CONFIG.value or not WORKDIR.value:
        raise entry.UsageError("--config and --workdir are needed.")
    experiment = stages.begin(CONFIG.value, WORKDIR.value, seed=SEED.value, dataset=DATASET.value)
    sizes = {flag.name: flag.value for flag in (NUM_SEEDS, NUM_EPISODES, NUM_ENVS)}
    comparison.compare(experiment, **sizes, download=DOWNLOAD.value)


if __name__ == "__main__":
    entry.run(main)
