"""Discretise every dimension of a transition into bins of its own (Trajectory Transformer, section 3.1).

Bins are fitted on the host in float64 and used there in float64 (numpy in, numpy out); inside a compiled function the
same bins are float32.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import chex
import jax.numpy as jnp
import numpy as np


@chex.dataclass(frozen=True)
class Discretizer:
    """Bins of D dimensions; a value's token is the last threshold that it reaches, clipped to [0, V)."""

    thresholds: chex.Array  # [D, V + 1] float64, non-decreasing
    centers: chex.Array  # [D, V] float64, the value that a token decodes to


def fit(
    values: np.ndarray,
    *,
    num_bins: int,
    method: Literal["quantile", "uniform"] = "quantile",
    distinct_values: bool = False,
    known_values: Mapping[int, np.ndarray] | None = None,
) -> Discretizer:
    """Fit bins to the columns of `values` [n, D].

    "quantile" places the thresholds at every ceil(n / num_bins)-th sorted value, as the PyTorch reference does to the
    last bit; rows too few to fill all bins repeat the maximum. "uniform" spaces them evenly. With `distinct_values` a
    column of at most `num_bins` distinct values gets one bin per value, which decodes to that value (a rare reward
    vanishes in a quantile bin). `known_values` maps a column to all values that it can take, ascending: it gets one bin
    per value, whether `values` hold it or not.

    Raises ValueError for an unknown method, no rows, more known values than bins, and values that are not finite
    (naming the columns).
    """
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[0] == 0:
        raise ValueError(f"values must have shape [n, D] with n >= 1, got {values.shape}.")
    settings = {"method": method, "distinct_values": distinct_values, "known_values": known_values}
    return fit_columns(values.T, num_bins=num_bins, **settings)


def fit_columns(
    columns: Iterable[np.ndarray],
    *,
    num_bins: int,
    method: Literal["quantile", "uniform"] = "quantile",
    distinct_values: bool = False,
    known_values: Mapping[int, np.ndarray] | None = None,
) -> Discretizer:
    """Fit bins as `fit` does to D `columns` [n], which are looked at one by one: all may not fit in float64."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    if method not in ("quantile", "uniform"):
        raise ValueError(f'method must be "quantile" or "uniform", got "{method}".')
    bins, broken = [], []
    for dim, column in enumerate(columns):
        column, known = np.asarray(column, np.float64), (known_values or {}).get(dim)
        if not np.isfinite(column).all():
            broken.append(dim)
        elif known is not None:
            if len(known) > num_bins:
                raise ValueError(
                    f"column {dim} takes {len(known)} values, more than num_bins={num_bins}; set that many bins."
                )
            bins.append(_bins_of_distinct_values(np.asarray(known, np.float64), num_bins))
        elif distinct_values and len(distinct := np.unique(column)) <= num_bins:
            bins.append(_bins_of_distinct_values(distinct, num_bins))
        else:
            if method == "quantile":
                edges = _quantile_thresholds(column, num_bins)
            else:
                edges = np.linspace(column.min(), column.max(), num_bins + 1)
            bins.append((edges, (edges[:-1] + edges[1:]) / 2))
    if broken:
        raise ValueError(f"columns {broken} hold values that are not finite (NaN or infinity); clean the data.")
    thresholds, centers = map(np.stack, zip(*bins, strict=True))
    return Discretizer(thresholds=thresholds, centers=centers)


def _quantile_thresholds(column: np.ndarray, num_bins: int) -> np.ndarray:
    ordered = np.sort(column)
    kept = ordered[:: -(-len(column) // num_bins)]
    # At least one is added: the maximum always closes the last bin.
    return np.concatenate([kept, np.full(num_bins + 1 - len(kept), ordered[-1])])


def _bins_of_distinct_values(distinct: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Separate neighbours half-way; the bins that are left over all belong to the largest value."""
    edges = np.concatenate([distinct[:1], (distinct[:-1] + distinct[1:]) / 2])
    thresholds = np.full(num_bins + 1, distinct[-1])
    thresholds[: len(edges)] = edges
    centers = np.full(num_bins, distinct[-1])
    centers[: len(distinct)] = distinct
    return thresholds, centers


def merged_columns(tokens: np.ndarray, values: np.ndarray) -> list[int]:
    """List the columns of `values` [n, D] that vary while all of their `tokens` [n, D] are equal."""
    return np.flatnonzero((np.ptp(tokens, axis=0) == 0) & (np.ptp(values, axis=0) > 0)).tolist()


def encode(discretizer: Discretizer, values: chex.Array, *, dims: slice = slice(None)) -> chex.Array:
    """Turn `values` [..., d] of the d dimensions `dims` into int32 tokens [..., d] in [0, V).

    Values outside of the fitted range get the first or last token. numpy values are compared in float64, others in
    float32. Raises ValueError if the last axis is not d.
    """
    num_bins = discretizer.centers.shape[1]
    if isinstance(values, np.ndarray):
        thresholds = np.asarray(discretizer.thresholds)[dims]
        _check_columns(values.shape, thresholds.shape[0])
        tokens = np.empty(values.shape, np.int32)
        for dim, edges in enumerate(thresholds):
            tokens[..., dim] = np.clip(np.searchsorted(edges, values[..., dim], side="right") - 1, 0, num_bins - 1)
        return tokens
    thresholds = jnp.asarray(discretizer.thresholds, jnp.float32)[dims]
    _check_columns(values.shape, thresholds.shape[0])
    reached = jnp.sum(jnp.expand_dims(values, -1) >= _align(thresholds, values.ndim + 1), axis=-1, dtype=jnp.int32)
    return jnp.clip(reached - 1, 0, num_bins - 1)


def decode(discretizer: Discretizer, tokens: chex.Array, *, dims: slice = slice(None)) -> chex.Array:
    """Turn `tokens` [..., d] of the d dimensions `dims` into the values [..., d] of their bins.

    Tokens are clipped to [0, V) first, so a stop token decodes as the last bin. float64 for numpy tokens, else float32.
    """
    if isinstance(tokens, np.ndarray):
        centers = np.asarray(discretizer.centers)[dims]
        return centers[np.arange(centers.shape[0]), np.clip(tokens, 0, centers.shape[1] - 1)]
    centers = jnp.asarray(discretizer.centers, jnp.float32)[dims]
    return centers[_align(jnp.arange(centers.shape[0]), tokens.ndim), jnp.clip(tokens, 0, centers.shape[1] - 1)]


def expectation(discretizer: Discretizer, probs: chex.Array, *, dim: int) -> chex.Array:
    """Average the bin values of dimension `dim` under `probs` [..., V], which need not sum to one, into [...].

    The mass of the stop token has been removed by the caller and is not made up for: stop counts as the value 0.
    """
    if isinstance(probs, np.ndarray):
        return probs @ np.asarray(discretizer.centers)[dim]
    centers = _align(jnp.asarray(discretizer.centers, jnp.float32)[dim], probs.ndim)
    return jnp.sum(probs * centers, axis=-1)


def percentile(discretizer: Discretizer, probs: chex.Array, q: float, *, dim: int) -> chex.Array:
    """Return the value [...] of the first bin of `dim` up to which `probs` [..., V] exceed the share `q` of their sum.

    `q` is in [0, 1); the probabilities need not sum to one.
    """
    xp = np if isinstance(probs, np.ndarray) else jnp
    centers = xp.asarray(discretizer.centers)[dim]
    mass = xp.cumsum(probs, axis=-1)
    return centers[xp.argmax(mass > q * mass[..., -1:], axis=-1)]


def _check_columns(shape: tuple[int, ...], expected: int) -> None:
    if shape[-1] != expected:
        raise ValueError(f"values must have {expected} columns, got {shape[-1]}; name a part of them with dims.")


def _align(x: chex.Array, ndim: int) -> chex.Array:
    """Give `x` leading axes of size 1, since implicit rank promotion may be switched off."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
