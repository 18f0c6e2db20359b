"""Predict far ahead without a look at what happens: the transformer against single-step models, on held-out episodes.

python -m experiments.horizons --dataset=ID --workdir=DIR [--config=experiments/configs/dataset.py
    --horizon=100 --num_starts=64 --num_samples=1000 --hidden_dims=half]

Trains what is compared on the same episodes: the transformer in DIR itself, which may be a run of train_tt, and below
it one with a window of one transition, an ensemble of probabilistic networks as PETS has it, and a deterministic one.
Writes horizons.json, horizons.png and, where bodies can be drawn, bodies.png. The same command goes on where it was
interrupted.
"""

import pathlib

import jax
import numpy as np
from absl import flags

from experiments.common import (
    bodies,
    datasets,
    dynamics_run,
    entry,
    files,
    open_loop_report,
    open_loop_run,
    run_flags,
    settings,
    signals,
    stages,
)
from tt_jax import densities, trajectories

CONFIG, DATASET = run_flags.config("dataset"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(), run_flags.download()
HORIZON = flags.DEFINE_integer("horizon", 100, "Steps to predict.", lower_bound=1)
NUM_STARTS = flags.DEFINE_integer("num_starts", 64, "Held-out states to predict from.", lower_bound=3)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1000, "Sampled futures of each start.", lower_bound=1)
HIDDEN_DIMS = flags.DEFINE_list(
    "hidden_dims", [], "Observed dimensions that no model sees, counted from 0, or half: the second half of them."
)


def main(_):
    preemption, workdir = signals.Preemption(), WORKDIR.value
    config = settings.checked(CONFIG.value)
    if config and HIDDEN_DIMS.value:
        config.data.hidden_dims = _hidden_dims(config, DATASET.value)
    config = entry.resolve_config(config, dataset=DATASET.value, workdir=workdir)
    open_loop_run.check(config, num_samples=NUM_SAMPLES.value)
    data = datasets.prepare(config, download=DOWNLOAD.value)
    if data.held_out is None:
        raise entry.UsageError("no episode is held out; set a larger --config.data.eval_fraction.")
    loaded = trajectories.load(config.dataset, config=data.config)
    train, held_out = (
        trajectories.select(loaded, episodes)
        for episodes in datasets.split(loaded, config.data.eval_fraction, config.seed)
    )
    trajectories.action_bounds(train)  # before the long work: single-step models take no discrete actions
    transitions = trajectories.transitions(train)
    trained = dynamics_run.train_all(config, pathlib.Path(workdir), transitions, run=data.run, preemption=preemption)

    counts = {"horizon": HORIZON.value, "count": NUM_STARTS.value, "seed": config.seed}
    starts = open_loop_run.choose_starts(held_out, **counts)
    scale = np.maximum(train.observations.std(axis=0), 1e-6).astype(np.float32)
    models = open_loop_run.models(trained, data.held_out, starts, num_samples=NUM_SAMPLES.value, data=train)
    steps = "_".join(str(checkpoint.step) for checkpoint in trained.values())
    folder = pathlib.Path(workdir) / "open_loop" / f"{HORIZON.value}_{NUM_STARTS.value}_{NUM_SAMPLES.value}_{steps}"
    measured = {}
    for name, model in models.items():
        preemption.check(name)
        measured[name] = stages.once(
            folder / f"{name}.npz",
            lambda name=name, model=model: open_loop_run.measure(
                model, starts, scale=scale, seed=config.seed, title=name
            ),
            title=name,
        )
    columns = densities.column_kinds(data.tokenizer)[: data.spec.observation_dim]
    found = {
        "dataset": config.dataset,
        "dimensions": open_loop_report.names_of_states(data.spec),
        "scale": scale.tolist(),
        "num_starts": starts.is_real.sum(axis=0).tolist(),
        "columns": columns,
        "models": {name: open_loop_report.summarize(each, starts, scale, columns) for name, each in measured.items()},
        "reference": open_loop_report.reference(data.train, data.tokenizer, starts, scale, columns),
        "starts": [[int(e), int(t)] for e, t in zip(starts.episodes, starts.steps, strict=True)],
        "trained_steps": {name: checkpoint.step for name, checkpoint in trained.items()},
        "settings": {flag.name: flag.value for flag in (HORIZON, NUM_STARTS, NUM_SAMPLES, HIDDEN_DIMS)},
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "run": data.run,
    }
    path = pathlib.Path(workdir) / "horizons.json"
    files.write_json(path, found)
    open_loop_report.draw(found, path.with_suffix(".png"))
    bodies.draw_strip(starts, measured, data, path.with_name("bodies.png"))
    print(*open_loop_report.table(found), f"numbers: {path}", f"figure: {path.with_suffix('.png')}", sep="\n")


def _hidden_dims(config, dataset):
    """Return the columns that --hidden_dims names."""
    if HIDDEN_DIMS.value != ["half"]:
        try:
            return tuple(int(dim) for dim in HIDDEN_DIMS.value)
        except ValueError as error:
            raise entry.UsageError(f"--hidden_dims={','.join(HIDDEN_DIMS.value)} must be numbers, or half.") from error
    dataset = dataset or config.dataset
    settings = datasets.with_keys(dataset, datasets.data_config(config.data), download=DOWNLOAD.value)
    size = trajectories.load(dataset, config=settings, download=DOWNLOAD.value).observations.shape[1]
    return tuple(range(size // 2, size))


if __name__ == "__main__":
    entry.run(main)
