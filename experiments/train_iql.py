"""Train Implicit Q-Learning on a Minari dataset, several seeds in one program; the same command resumes.

python -m experiments.train_iql --config=experiments/configs/antmaze.py --workdir=DIR [--num_seeds=8 ...]

Writes configuration, metrics and checkpoints to the workdir. `python -m experiments.play --workdir=DIR` plays the
policy, `experiments.plan --iql_workdir=DIR` lets Q guide a transformer. Learner i has the seed config.seed + i. A
checkpoint holds the learners' parameters with a leading axis of the seeds, or without one where there is one seed. With
`--config.iql.temperature=0` the policy is behaviour cloning.
"""

from experiments.common import entry, iql_run, run_flags, settings, signals

CONFIG, DATASET = run_flags.config("dataset"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(), run_flags.download()
NUM_SEEDS = run_flags.num_seeds(default=None)


def main(_):
    preemption = signals.Preemption()
    config = settings.checked(CONFIG.value)
    if config and NUM_SEEDS.value:
        config.iql_train.num_seeds = NUM_SEEDS.value
    config = entry.resolve_config(config, dataset=DATASET.value, workdir=WORKDIR.value, method="iql")
    iql_run.train(config, WORKDIR.value, preemption=preemption, download=DOWNLOAD.value)


if __name__ == "__main__":
    entry.run(main)
