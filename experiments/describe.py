"""Tell what a Minari dataset holds and which settings suit it; makes no environment.

python -m experiments.describe --dataset=ID [--out=DIR]

Prints episodes, spaces, rewards, returns and columns, and suggests settings with their reasons. With --out it also
writes description.json and dataset.png: returns, lengths and, where there are positions, paths.
"""

import itertools
import pathlib

import numpy as np
from absl import flags

from experiments.common import datasets, entry, files, run_flags
from experiments.configs import dataset as default_config
from tt_jax import minari_files, spaces, tokenization, trajectories

DATASET = flags.DEFINE_string("dataset", None, "Minari dataset id.", required=True)
DOWNLOAD = run_flags.download()
OUT = flags.DEFINE_string("out", None, "Folder for description.json and dataset.png.")

FEW_VALUES = 10
SHOWN_PATHS = 100


def main(_):
    if OUT.value:
        files.make_folder(OUT.value, flag="out")
    settings = datasets.with_keys(DATASET.value, trajectories.DataConfig(), download=DOWNLOAD.value)
    loaded = trajectories.load(DATASET.value, config=settings)
    storage = minari_files.open_storage(DATASET.value)
    found = describe(loaded, settings, num_bins=default_config.get_config().data.num_bins)
    found = {"dataset": DATASET.value, "observation_space": str(storage.observation_space)} | found
    found |= {"action_space": str(storage.action_space), "environment": loaded.env_id}
    for name, value in found.items():
        if name != "suggestions":
            print(f"{name:<25}{_as_text(value)}")
    for setting, reason in found["suggestions"].items():
        print(f"suggested: --config.{setting}  # {reason}")
    if OUT.value:
        folder = pathlib.Path(OUT.value)
        files.write_json(folder / "description.json", found)
        _draw(loaded, settings, folder / "dataset.png")
        print(f"files in {folder}")


def describe(loaded: trajectories.Trajectories, settings: trajectories.DataConfig, *, num_bins: int) -> dict:
    """Return counts, distributions, columns by kind, and suggested settings with their reasons, as JSON values."""
    lengths = np.diff(loaded.offsets)
    returns = np.add.reduceat(loaded.rewards.astype(np.float64), loaded.offsets[:-1])
    values = trajectories.segment(loaded, discount=settings.discount)
    names = [f"observation[{i}]" for i in range(loaded.observations.shape[1])]
    names += [*(f"action[{i}]" for i in range(loaded.actions.shape[1])), "reward", "value"]
    counts = [len(np.unique(column)) for column in values.T]
    tokens = tokenization.encode(tokenization.fit(values, num_bins=num_bins), values)
    columns = spaces.join([loaded.observation_columns, loaded.action_columns])
    has_bins = np.append(columns.is_discrete, [False, False])  # one per value, whatever the settings
    merged = [names[column] for column in tokenization.merged_columns(tokens, values) if not has_bins[column]]
    few = {names[column]: counts[column] for column in np.flatnonzero(~has_bins) if 1 < counts[column] <= FEW_VALUES}
    known = [columns.values(column) for column in np.flatnonzero(columns.is_discrete)]

    suggestions = {}
    if settings.observation_keys:
        suggestions[f'data.observation_keys="{settings.observation_keys}"'] = "all entries of numbers, none twice"
    if merged or few:
        suggestions["data.distinct_values=True"] = "columns of few values keep each of them"
    if not loaded.terminated.any():
        suggestions["data.stop_after_truncation=False"] = "no episode really ends, so a plan should not"
    if (most := max(map(len, known), default=0)) > num_bins:
        suggestions[f"data.num_bins={most}"] = "a discrete dimension has that many values"
    if returns.max() == returns.min():
        suggestions["iql.reward_units=raw"] = "all returns are equal, so their range has no scale"
    return {
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "terminated": int(loaded.terminated.sum()),
        "truncated": int((~loaded.terminated).sum()),
        "without_last_observation": int((~loaded.final_known).sum()),
        "time_limit": int(loaded.max_path_length),
        "length": _distribution(lengths),
        "return": _distribution(returns),
        "reward": _distribution(loaded.rewards),
        "observation_keys": list(settings.observation_keys),
        "tokens_per_transition": values.shape[1],
        "constant_columns": [name for name, count in zip(names, counts, strict=True) if count == 1],
        "columns_of_few_values": few,
        "merged_by_quantiles": merged,
        "suggestions": suggestions,
    }


def _distribution(values) -> dict:
    quantiles = dict(zip(("min", "median", "max"), np.quantile(values, [0, 0.5, 1]).tolist(), strict=True))
    return quantiles | {"mean": float(np.mean(values)), "std": float(np.std(values))}


def _as_text(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {each:.6g}" for name, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value


def _draw(loaded, settings, path):
    try:
        from matplotlib.figure import Figure

        from experiments.common import figures
    except ImportError as error:
        raise ValueError(f"--out={OUT.value} needs the plots extra for its picture: {error}.") from error
    has_positions = "achieved_goal" in settings.observation_keys or "desired_goal" in settings.observation_keys
    figure = Figure(figsize=(15 if has_positions else 10, 4.5), layout="constrained")
    returns, lengths, *paths = figure.subplots(1, 3 if has_positions else 2)
    returns.hist(np.add.reduceat(loaded.rewards.astype(np.float64), loaded.offsets[:-1]), bins=50)
    returns.set(xlabel="return", ylabel="episodes")
    lengths.hist(np.diff(loaded.offsets), bins=50)
    lengths.set(xlabel="length", ylabel="episodes")
    for axes in paths:  # goal mazes: the position stands first
        for start, stop in itertools.islice(itertools.pairwise(loaded.offsets), SHOWN_PATHS):
            axes.plot(*loaded.observations[start:stop, :2].T, linewidth=0.8, alpha=0.6)
        axes.set(xlabel="observation[0]", ylabel="observation[1]", aspect="equal")
    figures.save(figure, path)


if __name__ == "__main__":
    entry.run(main)
