"""Filters of next-token logits and the categorical draw. Filters act on the last axis, [..., V + 1]."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

_FLOOR = -1000.0  # of a filtered logit: no probability left in float32, and still finite


class Filters(NamedTuple):
    """Which tokens of one kind may be drawn, as `filter_logits` applies it; by default all."""

    cdf: float = 0.0  # in [0, 1], see `filter_cdf`; 0: off
    top_k: int = 0  # see `filter_top_k`; 0: off
    central: float = 1.0  # in [0, 1], see `filter_central`; 1: off


def filter_logits(logits: chex.Array, filters: Filters) -> chex.Array:
    """Apply the filters that are on to logits [..., V + 1] in turn, the first two in the order of the reference."""
    if filters.cdf:
        logits = filter_cdf(logits, filters.cdf)
    if filters.top_k:
        logits = filter_top_k(logits, filters.top_k)
    return filter_central(logits, filters.central) if filters.central < 1 else logits


def filter_cdf(logits: chex.Array, threshold: float) -> chex.Array:
    """Floor the least likely tokens at -1000: in ascending order, while their joint mass is below `threshold`.

    Takes and returns logits [..., V + 1] of one dtype; the threshold is in [0, 1].
    As in the PyTorch reference the least likely token always goes and so do ties with the last token that goes; what
    is kept has more than 1 - threshold of the mass. One mend: the most likely tokens stay when all are tied.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    ordered = jnp.sort(probs, axis=-1)
    below = jnp.sum(jnp.cumsum(ordered, axis=-1) < threshold, axis=-1, keepdims=True)
    cut = jnp.take_along_axis(ordered, jnp.maximum(below - 1, 0), axis=-1)
    keep = (probs > cut) | (probs == ordered[..., -1:])
    return jnp.where(keep, logits, jnp.asarray(_FLOOR, logits.dtype))


def filter_central(logits: chex.Array, share: float) -> chex.Array:
    """Keep the central `share` of the mass of ordered tokens and return its logarithm: 1 keeps all, 0 the median alone.

    Takes logits [..., V + 1] of any offset and returns normalised ones of the same dtype; the share is in [0, 1].
    A token at an edge keeps the part of its mass that lies inside; minus infinity is outside. Unlike the likeliest
    token, which in bins of equal counts is the value that is unusually likely, the median does not depend on the bins.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    upper = jnp.cumsum(probs, axis=-1)
    lower = upper - probs
    low, high = ((1 - share) / 2 * upper[..., -1:], (1 + share) / 2 * upper[..., -1:])
    inside = jnp.minimum(upper, high) - jnp.maximum(lower, low) if share else (lower <= low) & (low < upper)
    return jnp.log(jnp.maximum(inside, 0.0)).astype(logits.dtype)


def filter_top_k(logits: chex.Array, k: int) -> chex.Array:
    """Set all logits [..., V + 1] below the k-th largest to minus infinity; ties with it stay. 1 <= k <= V + 1."""
    kth = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def categorical(logits: chex.Array, uniform: chex.Array) -> chex.Array:
    """Draw int32 tokens [...] from `logits` [..., V + 1] by inverting the cdf at `uniform` [...] in [0, 1).

    One random number per row instead of one per token; a token without probability is never drawn.
    """
    mass = jnp.cumsum(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
    return jnp.sum(mass <= jnp.expand_dims(uniform, -1) * mass[..., -1:], axis=-1, dtype=jnp.int32)
