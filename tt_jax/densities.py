"""Predicted tokens as densities of real values, uniform within bins, so that other bins and models can be compared.

The bins of a column become cells, which share out its range:

    continuous   from one distinct threshold to the next; a bin of width zero belongs to the cell that begins where it
                 stands, or ends there if none begins. Densities are per unit of the value.
    discrete     one cell per value that bins decode to, where these are no midpoints. Probabilities, as of width 1.
    constant     one cell for all, of width 1: its log-density is 0 whatever the model predicts.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import tokenization

Kind = Literal["continuous", "discrete", "constant"]


@chex.dataclass(frozen=True)
class Cells:
    """The cell of each token in [0, V) of D columns."""

    first: chex.Array  # [D, V] int32, first token of the token's cell
    last: chex.Array  # [D, V] int32, last token
    log_width: chex.Array  # [D, V] float32


def column_kinds(discretizer: tokenization.Discretizer) -> list[Kind]:
    """Tell what each of the D columns of a host's discretizer is."""
    thresholds, centers = np.asarray(discretizer.thresholds), np.asarray(discretizer.centers)
    spread = np.ptp(thresholds, axis=1)
    distance = np.abs(centers - (thresholds[:, :-1] + thresholds[:, 1:]) / 2).max(axis=1)
    kinds = np.where(distance > 1e-9 * spread, "discrete", "continuous")
    return np.where(spread == 0, "constant", kinds).tolist()


def cells(discretizer: tokenization.Discretizer) -> Cells:
    """Group the bins of a host's discretizer into cells."""
    thresholds, centers = np.asarray(discretizer.thresholds), np.asarray(discretizer.centers)
    num_bins = centers.shape[1]
    cell, log_width = np.zeros(centers.shape, int), np.zeros(centers.shape, np.float32)
    for dim, kind in enumerate(column_kinds(discretizer)):
        if kind == "discrete":
            cell[dim] = np.unique(centers[dim], return_inverse=True)[1]
        elif kind == "continuous":
            edges, begins = np.unique(thresholds[dim], return_inverse=True)
            cell[dim] = np.minimum(begins[:num_bins], len(edges) - 2)
            log_width[dim] = np.log(np.diff(edges))[cell[dim]]
    return Cells(
        first=np.stack([np.searchsorted(row, row, side="left") for row in cell]).astype(np.int32),
        last=np.stack([np.searchsorted(row, row, side="right") - 1 for row in cell]).astype(np.int32),
        log_width=log_width,
    )


def log_density(cells: Cells, log_probs: chex.Array, tokens: chex.Array, *, dims: chex.Array) -> chex.Array:
    """Return the log-density [...] that `log_probs` [..., V or V + 1] of a token give a value with the token `tokens`.

    `tokens` [...] in [0, V) and the columns `dims` [...] have equal shapes; the result is float32. The density
    integrates to the mass of the V tokens: to one, or to one less the mass of the stop token.
    """
    first, last, log_width = (jnp.asarray(leaf)[dims, tokens] for leaf in (cells.first, cells.last, cells.log_width))
    index = jnp.arange(log_probs.shape[-1]).reshape((1,) * tokens.ndim + (-1,))
    is_in_cell = (first[..., None] <= index) & (index <= last[..., None])
    return jax.nn.logsumexp(jnp.where(is_in_cell, log_probs, -jnp.inf), axis=-1) - log_width


def coverage(
    cells: Cells, probs: chex.Array, tokens: chex.Array, levels: chex.Array, *, dims: chex.Array
) -> chex.Array:
    """Return the share [..., C] of the values with a token that lies within central intervals of the masses `levels`.

    `probs` [..., V] need not sum to one; `tokens`, `dims` [...]; `levels` [C] in (0, 1). The values are uniform within
    their cell, so a cell that an interval cuts counts in part. Where the predictions are right, the mean is the level.
    """
    first, last = (jnp.asarray(leaf)[dims, tokens] for leaf in (cells.first, cells.last))
    mass = jnp.cumsum(probs, axis=-1)
    mass = mass / mass[..., -1:]
    mass = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass], axis=-1)  # [..., V + 1], below each token
    below = jnp.take_along_axis(mass, first[..., None], axis=-1)
    above = jnp.take_along_axis(mass, last[..., None] + 1, axis=-1)
    levels = jnp.asarray(levels).reshape((1,) * tokens.ndim + (-1,))
    low, high = (1 - levels) / 2, (1 + levels) / 2
    inside = jnp.clip(jnp.minimum(above, high) - jnp.maximum(below, low), 0.0)
    is_thin = above - below < 1e-6  # to rounding a point
    is_inside = (low <= below) & (below <= high)
    return jnp.where(is_thin, is_inside, inside / jnp.where(is_thin, 1.0, above - below))
