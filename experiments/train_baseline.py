"""Train a baseline on a Minari dataset, several seeds in one program; the same command resumes.

python -m experiments.train_baseline --method=bc|bc10|dt|cql --dataset=ID --workdir=DIR [--num_seeds=3 --config=...]

bc: behaviour cloning; bc10: of the best 10% of the episodes; dt: Decision Transformer; cql: Conservative Q-Learning.
Settings are --config.baselines.METHOD.FIELD. `python -m experiments.play --workdir=DIR` plays the policy.
"""

from absl import flags

from experiments.common import baselines, entry, run_flags, settings, signals

CONFIG, DATASET = run_flags.config("dataset"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(), run_flags.download()
NUM_SEEDS = run_flags.num_seeds(default=None)
METHOD = flags.DEFINE_enum("method", None, list(baselines.BASELINES), "What to train.", required=True)


def main(_):
    preemption = signals.Preemption()
    config = CONFIG.value
    if config and NUM_SEEDS.value:
        config.baselines[METHOD.value].train.num_seeds = NUM_SEEDS.value
    where = {"dataset": DATASET.value, "workdir": WORKDIR.value}
    config = entry.resolve_config(settings.checked(config), **where, method=METHOD.value)
    baselines.train(config, WORKDIR.value, method=METHOD.value, preemption=preemption, download=DOWNLOAD.value)


if __name__ == "__main__":
    entry.run(main)
