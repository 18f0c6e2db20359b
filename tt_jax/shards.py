"""Data in parts that take turns on the devices, for stores that do not fit them at once.

Which part a step trains on, and on which of its windows, follows from the seed, the step, and the number and sizes of
the parts; never from devices or processes.
"""

import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from tt_jax import trajectories, types


@chex.dataclass(frozen=True)
class Shard:
    """A part of the data during its turn; all parts of a run have one shape, so that they share a program."""

    data: Any  # a TokenStore or Transitions
    size: chex.Array  # [] int32, windows or transitions to draw from; what comes after them is padding
    first_step: chex.Array  # [] int32, the steps before it were not made on this shard, see `turn`


def turn(step: int, *, sizes: Sequence[int], batch_size: int, seed: int) -> tuple[int, int, int]:
    """Return which shard a step trains on, the shard's `first_step`, and the step at which its turn ends.

    A turn has ceil(size / batch_size) steps; every round gives each shard one, in an order of its own. A shard goes on
    where its last turn ended: `step - first_step` counts the steps that were made on it.
    """
    lengths = [math.ceil(size / batch_size) for size in sizes]
    finished_rounds = step // sum(lengths)
    begin = finished_rounds * sum(lengths)
    for index in np.random.default_rng((seed, finished_rounds)).permutation(len(sizes)).tolist():
        if step < begin + lengths[index]:
            break
        begin += lengths[index]
    return index, begin - finished_rounds * lengths[index], begin + lengths[index]


def split_store(store: trajectories.TokenStore, num_shards: int) -> list[trajectories.TokenStore]:
    """Cut a store between episodes into parts of about as many transitions, padded to one shape.

    Padding adds no windows, see `trajectories.num_windows`. Raises ValueError if a part would have none.
    """
    check_count(num_shards)
    if num_shards == 1:
        return [store]
    offsets = store.offsets.astype(np.int64)
    cuts = np.searchsorted(offsets, offsets[-1] * np.arange(num_shards + 1) / num_shards).tolist()
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))  # of episodes
    for begin, end in spans:
        if begin == end or trajectories.num_windows(offsets[begin : end + 1] - offsets[begin]) < 1:
            raise ValueError(
                f"data.num_shards={num_shards} leaves a part without a window, of {len(store.terminated)} episodes; "
                "set fewer."
            )
    num_rows = max(offsets[end] - offsets[begin] for begin, end in spans)
    num_episodes = max(end - begin for begin, end in spans)
    parts = []
    for begin, end in spans:
        own = offsets[begin : end + 1] - offsets[begin]
        padding = own[-1] + 1 + np.arange(num_episodes - (end - begin))  # episodes of one step have no windows
        parts.append(
            trajectories.TokenStore(
                tokens=_pad(store.tokens[offsets[begin] : offsets[end]], num_rows),
                offsets=np.concatenate([own, padding]).astype(np.int32),
                terminated=_pad(store.terminated[begin:end], num_episodes),
            )
        )
    return parts


def split_transitions(transitions: types.Transitions, num_shards: int) -> tuple[list[types.Transitions], list[int]]:
    """Cut transitions into parts that differ by one row at most, padded to one shape; also return their sizes."""
    check_count(num_shards)
    num_rows = len(transitions.rewards)
    if num_shards > num_rows:
        raise ValueError(f"data.num_shards={num_shards} must be at most the number of transitions, {num_rows}.")
    cuts = np.linspace(0, num_rows, num_shards + 1).astype(int).tolist()
    spans = [slice(*span) for span in zip(cuts[:-1], cuts[1:], strict=True)]
    sizes = np.diff(cuts).tolist()

    def part(span):
        return jax.tree.map(lambda rows: _pad(rows[span], max(sizes)), transitions)

    return [part(span) for span in spans], sizes


def check_count(num_shards: int) -> None:
    """Raise ValueError for a number of shards that no data can have."""
    if num_shards < 1:
        raise ValueError(f"data.num_shards={num_shards} must be at least 1.")


def _pad(rows, num_rows):
    return rows if len(rows) == num_rows else np.pad(rows, [(0, num_rows - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
