"""The held-out episodes of a training run, as windows of tokens, for commands that look at its model."""

import dataclasses

import jax
import ml_collections
import numpy as np

from experiments.common import control, datasets, entry
from tt_jax import checkpoints, trajectories, transformer, types

KINDS = ("observation", "action", "reward", "value")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained transformer and the data that it was trained on, split as then."""

    checkpoint: checkpoints.Checkpoint
    data: datasets.Dataset  # its `held_out` is not None


def load(workdir: str) -> Run:
    """Read the newest checkpoint in `workdir` and its data, split as in training.

    Raises ValueError if they do not fit together or nothing is held out.
    """
    checkpoint = control.restore(workdir, transformer.TransformerConfig, program="train_tt")
    data = datasets.prepare(ml_collections.ConfigDict(checkpoint.run))
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, checkpoint.tokenizer, data.tokenizer))):
        raise entry.UsageError(f"{checkpoint.run['dataset']} has changed since {workdir} was made; train anew.")
    if data.held_out is None:
        raise entry.UsageError(
            f"the run in {workdir} held out none of the {len(data.train.terminated)} episodes of "
            f"{checkpoint.run['dataset']}; train with a larger --config.data.eval_fraction or with more episodes."
        )
    return Run(checkpoint, data)


def window_ids(store: trajectories.TokenStore, *, count: int, max_transitions: int = 1) -> np.ndarray:
    """Choose at most `count` windows, evenly spaced, that hold `max_transitions` transitions of their episodes."""
    lengths = np.diff(store.offsets.astype(np.int64))
    first_ids = store.offsets[:-1] - np.arange(len(lengths))
    fitting = np.minimum(lengths - 1, lengths - max_transitions + 1)  # the last transition begins no window
    ids = np.concatenate([first + np.arange(max(fit, 0)) for first, fit in zip(first_ids, fitting, strict=True)])
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)].astype(np.int32)


def episodes_of(store: trajectories.TokenStore, ids: np.ndarray) -> np.ndarray:
    """Return the episode of each window."""
    return np.searchsorted(store.offsets - np.arange(len(store.offsets)), ids, side="right") - 1


def rows_at_once(config: transformer.TransformerConfig) -> int:
    """Return how many windows to read together, so that a layer's attention stays below some 100 MB."""
    return int(np.clip(2**25 // (config.num_heads * config.block_size**2), 1, 64))


def dimension_names(spec: types.TransitionSpec) -> list[str]:
    """Name the D dimensions of a transition."""
    names = [f"observation[{i}]" for i in range(spec.observation_dim)]
    return [*names, *(f"action[{i}]" for i in range(spec.action_dim)), "reward", "value"]


def kinds_of_dimensions(spec: types.TransitionSpec) -> np.ndarray:
    """Return the kind [D] of each dimension of a transition."""
    return np.repeat(KINDS, [spec.observation_dim, spec.action_dim, 1, 1])


def mean_and_error(values: np.ndarray, episodes: np.ndarray) -> dict[str, float | None]:
    """Return the mean of `values` [n] and its standard error, by whole episodes since values of one are alike."""
    mean = float(values.mean())
    sums = np.bincount(episodes, weights=values - mean)
    num_episodes = len(np.unique(episodes))
    error = float(np.sqrt(np.sum(sums**2) * num_episodes / max(num_episodes - 1, 1)) / len(values))
    return {"mean": mean, "standard_error": error if num_episodes > 1 else None}
