"""Train for some minutes, play the paper's search and what it has to beat, and write table, curves and checkpoint.

python -m experiments.reproduce --dataset=ID --config=experiments/configs/locomotion.py:hopper-medium-fast
    --workdir=DIR [--minutes=8 --total_minutes=14 --num_episodes=32]

For mazes IQL is trained in the same run, and its Q guides the search. The same command goes on where it stopped, and
plays again what the clock cut off. In the workdir: results.json, figures/curves.png, tt/ and iql/ with the runs, and
small/ with their last parameters alone, for `python -m experiments.plan --workdir=DIR/small/tt`.
"""

from absl import flags

from experiments.common import entry, reproduction, run_flags, stages

CONFIG, DATASET = run_flags.config(), run_flags.dataset()
WORKDIR, DOWNLOAD, MINUTES = run_flags.workdir(), run_flags.download(), run_flags.minutes()
TOTAL_MINUTES = flags.DEFINE_float(
    "total_minutes", None, "Training and playing end after so long; by default 6 minutes after the training.", 0.001
)
NUM_EPISODES = run_flags.num_episodes(default=32, help="Episodes of each policy, in one batch of environments.")
SEED = run_flags.seed(help="Seed of the training and of the first episode.")
GUIDED = flags.DEFINE_bool(
    "guided", None, "Train IQL, whose Q guides plans; by default where rewards are goals (iql.reward_units=minus_one)."
)


def main(_):
    config = CONFIG.value
    for flag in (CONFIG, WORKDIR, MINUTES):
        if not flag.value:
            raise entry.UsageError(f"--{flag.name} is missing.")
    total_minutes = TOTAL_MINUTES.value or MINUTES.value + 6
    if total_minutes < MINUTES.value:
        raise entry.UsageError(f"--total_minutes={total_minutes:g} must be at least --minutes={MINUTES.value:g}.")
    experiment = stages.begin(config, WORKDIR.value, seed=SEED.value, dataset=DATASET.value)
    guided = config.iql.reward_units == "minus_one" if GUIDED.value is None else GUIDED.value
    reproduction.reproduce(
        experiment,
        minutes=MINUTES.value,
        total_minutes=total_minutes,
        num_episodes=NUM_EPISODES.value,
        guided=guided,
        download=DOWNLOAD.value,
    )


if __name__ == "__main__":
    entry.run(main)
