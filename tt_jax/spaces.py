"""Gymnasium spaces of numbers as flat columns: their bounds, and which of them take whole numbers alone.

Boxes, Discrete, MultiDiscrete and MultiBinary spaces and Dicts of these are spaces of numbers. Entries of a Dict stand
in the order of their names, and an entry of an entry is named with a slash: `desired_goal/kettle`.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Columns:
    """The n numbers of an element of a space, flattened."""

    low: np.ndarray  # [n] float64, -inf without a bound
    high: np.ndarray  # [n] float64
    is_discrete: np.ndarray  # [n] bool, 1 where the values are the whole numbers from low to high

    @property
    def size(self) -> int:
        return len(self.low)

    def values(self, column: int) -> np.ndarray:
        """Return all values of a discrete column, ascending float64."""
        return np.arange(self.low[column], self.high[column] + 1)


def columns(space) -> Columns:
    """Return the columns of a gymnasium space; raises ValueError if it does not consist of numbers."""
    from gymnasium import spaces  # here, because training uses this module and must not need gymnasium

    if isinstance(space, spaces.Dict):
        return join([columns(space[name]) for name in sorted(space.spaces)])
    if isinstance(space, spaces.Box):
        low, high, is_discrete = space.low, space.high, False
    elif isinstance(space, spaces.Discrete):
        low, high, is_discrete = space.start, space.start + space.n - 1, True
    elif isinstance(space, spaces.MultiDiscrete):
        low, high, is_discrete = space.start, space.start + space.nvec - 1, True
    elif isinstance(space, spaces.MultiBinary):
        low, high, is_discrete = np.zeros(space.shape), np.ones(space.shape), True
    else:
        raise ValueError(f"{space} does not consist of numbers; Box, Discrete, MultiDiscrete and MultiBinary do.")
    low, high = (np.ravel(bound).astype(np.float64) for bound in (low, high))
    return Columns(low=low, high=high, is_discrete=np.full(len(low), is_discrete))


def join(parts: list[Columns]) -> Columns:
    """Put columns one after the other."""
    empty = Columns(low=np.zeros(0), high=np.zeros(0), is_discrete=np.zeros(0, bool))
    names = [field.name for field in dataclasses.fields(Columns)]
    return Columns(**{name: np.concatenate([getattr(part, name) for part in [empty, *parts]]) for name in names})


def take(of: Columns, index: np.ndarray) -> Columns:
    """Keep the columns `index` in their order."""
    return Columns(low=of.low[index], high=of.high[index], is_discrete=of.is_discrete[index])


def keys(space, prefix: str = "") -> list[str]:
    """List the names of the entries of a Dict that consist of numbers, those of nested Dicts with slashes."""
    from gymnasium import spaces

    found = []
    for name in sorted(space.spaces):
        if isinstance(space[name], spaces.Dict):
            found += keys(space[name], f"{prefix}{name}/")
        else:
            try:
                columns(space[name])
            except ValueError:
                continue
            found.append(prefix + name)
    return found


def entry(tree, key: str):
    """Return what `key`, with slashes, names in a Dict or in a dict of arrays; KeyError if it is not there."""
    inside = getattr(tree, "spaces", tree)
    if not isinstance(inside, dict):
        raise KeyError(key)
    if key in inside:
        return inside[key]
    name, slash, rest = key.partition("/")
    if not slash or name not in inside:
        raise KeyError(key)
    return entry(inside[name], rest)


def flatten(values) -> np.ndarray:
    """Turn T elements of a space, an array [T, ...] or a dict of these, into their columns [T, n]."""
    if isinstance(values, dict):
        return np.concatenate([flatten(values[name]) for name in sorted(values)], axis=1)
    return np.reshape(values, (len(values), -1))


def unflatten(values: np.ndarray, space) -> np.ndarray:
    """Turn columns [T, n] into T elements of a space that is no Dict; whole numbers are rounded to."""
    if columns(space).is_discrete.any():
        values = np.rint(values)
    return values.astype(space.dtype).reshape(len(values), *space.shape)
