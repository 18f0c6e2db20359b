"""Train a Trajectory Transformer on a Minari dataset; the same command resumes.

python -m experiments.train_tt --dataset=ID --workdir=DIR [--config=experiments/configs/maze.py --config.seed=0 ...]
"""

from experiments.common import entry, run_flags, settings, transformer_run

CONFIG, DATASET = run_flags.config("dataset"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(), run_flags.download()


def main(_):
    preemption = entry.Preemption()
    config = entry.resolve_config(settings.checked(CONFIG.value), dataset=DATASET.value, workdir=WORKDIR.value)
    transformer_run.train(config, WORKDIR.value, preemption=preemption, download=DOWNLOAD.value)


if __name__ == "__main__":
    entry.run(main)
