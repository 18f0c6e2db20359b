"""Train a Trajectory Transformer on a Minari dataset; the same command resumes.

python -m experiments.train_tt --dataset=ID --workdir=DIR [--config=experiments/configs/maze.py --config.seed=0 ...]
    [--minutes=8]  # train for that long on this machine, with the schedule fitted to it

Writes configuration, metrics and checkpoints to the workdir, see docs/training.md; `python -m experiments.plan
--workdir=DIR` plays the result.
"""

from experiments.common import entry, run_flags, settings, signals, transformer_run

CONFIG, DATASET = run_flags.config("dataset"), run_flags.dataset()
WORKDIR, DOWNLOAD, MINUTES = run_flags.workdir(), run_flags.download(), run_flags.minutes()


def main(_):
    preemption = signals.Preemption()
    config = entry.resolve_config(settings.checked(CONFIG.value), dataset=DATASET.value, workdir=WORKDIR.value)
    choice = {"download": DOWNLOAD.value, "minutes": MINUTES.value}
    transformer_run.train(config, WORKDIR.value, preemption=preemption, **choice)


if __name__ == "__main__":
    entry.run(main)
