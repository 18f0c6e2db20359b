"""Cached decoding: the Trajectory Transformer on a few tokens after a past whose keys and values are kept.

Tokens stand in a tree: [B, W, K, T] are T tokens that follow each other in each of K candidates of each of W beams of B
environments, and what they attend to is held once where it is shared. The result equals `transformer.apply` on each
branch. `window` says where the tokens of a search stand; only it needs to know about caches.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tt_jax import transformer, types


@chex.dataclass(frozen=True)
class KeysValues:
    """Keys and values of S tokens in one layer; `[...]` is [B], [B, W] or [B, W, K], whoever shares them."""

    keys: chex.Array  # [..., H, E / H, S]
    values: chex.Array  # [..., H, S, E / H]


Cache = tuple[KeysValues, ...]  # one per layer


def empty_cache(shape: tuple[int, ...], length: int, *, config: transformer.TransformerConfig) -> Cache:
    """Make room, zeros of the model's dtype, for `length` tokens in each of `shape`, (B,), (B, W) or (B, W, K)."""
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    layer = KeysValues(
        keys=jnp.zeros([*shape, heads, width, length], config.dtype),
        values=jnp.zeros([*shape, heads, length, width], config.dtype),
    )
    return (layer,) * config.num_layers


def write_cache(cache: Cache, new: Cache, start: chex.Numeric) -> Cache:
    """Overwrite the keys and values of a cache from place `start` on by those in `new`, with the same leading axes."""
    return tuple(_write_layer(old, layer, start) for old, layer in zip(cache, new, strict=True))


def _write_layer(old, new, start):
    update = jax.lax.dynamic_update_slice_in_dim
    return KeysValues(
        keys=update(old.keys, new.keys, start, axis=-1), values=update(old.values, new.values, start, axis=-2)
    )


def decode(
    params: types.Params,
    tokens: chex.Array,
    dims: chex.Array,
    positions: chex.Array,
    past: list[tuple[Cache, chex.Array]],
    *,
    config: transformer.TransformerConfig,
    visible: chex.Array,
    own: Cache | None = None,
    start: chex.Numeric = 0,
) -> tuple[chex.Array, Cache]:
    """Run `tokens` [B, W, K, T] after a past that is cached; return their output [B, W, K, T, E] and keys and values.

    `dims` [T] are their dimensions within a transition, `positions` [B, 1, 1, T] their places in the window. `past`
    lists segments of the past, each with the number of its tokens that count, [] or [B]. The keys and values are
    written into those of `own` [B * W * K] from place `start` on, if it is given, and returned with it; `visible`
    [B or 1, T, S] tells which of the S places there (columns) each of the tokens (rows) sees. The output is before the
    final norm, for `next_logits`; where it is not used, the compiler drops the last layer but for its keys and values.
    """

    def run(model):
        x = model.embed(tokens, dims, positions)
        return _run_blocks(model, x, past, visible=visible, own=own, start=start)

    return _apply(run, params, config)


def decode_goal(params: types.Params, goal: chex.Array, *, config: transformer.TransformerConfig) -> Cache:
    """Compute the keys and values [B, ...] of the tokens [B, N] of goals, which stand in front of everything."""

    def run(model):
        visible = np.tri(goal.shape[-1], dtype=bool)[None]
        return _run_blocks(model, model.embed_goal(goal[:, None, None]), [], visible=visible)[1]

    return jax.tree.map(lambda leaf: leaf[:, 0, 0], _apply(run, params, config))


def next_logits(
    params: types.Params, x: chex.Array, dim: chex.Array, *, config: transformer.TransformerConfig
) -> chex.Array:
    """Turn the output [..., E] of tokens of dimension `dim` into float32 logits [..., V + 1] of the next token."""
    return _apply(lambda model: model.next_logits(x, dim), params, config)


def _apply(fn, params, config):
    """Call `fn(model)` with the model bound to its parameters."""
    return nn.apply(fn, transformer.Transformer(config))({"params": params})


def _run_blocks(model, x, past, *, visible, own=None, start=0):
    """Run embedded tokens [B, W, K, T, E] after the past; return their output and the cache with their own."""
    config = model.config
    past = [(cache, count) for cache, count in past if cache[0].values.shape[-2]]
    masks = [visible[:, None, None, None]]  # [B, 1, 1, 1, T, S], aligned with the scores [B, W, K, H, T, S]
    for cache, count in past:
        mask = jnp.arange(cache[0].values.shape[-2])[None] < jnp.reshape(count, [-1, 1])
        masks.append(mask[:, None, None, None, None])
    attend_fns = [
        functools.partial(
            _attend,
            masks=masks,
            past=[cache[layer] for cache, _ in past],
            own=own and own[layer],
            start=start,
            config=config,
        )
        for layer in range(config.num_layers)
    ]
    x, cache = model.run_blocks(x, attend_fns)
    return x, tuple(cache)


def _attend(query, key, value, *, masks, past, own, start, config):
    """Attend from [B, W, K, H, T, E / H] to themselves and the past; return the mixed values and the new KeysValues."""
    new = KeysValues(keys=key.swapaxes(-1, -2), values=value)
    if own is not None:  # written as the product reads it, or else a loop copies the whole at every token
        new = _write_layer(own, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), new), start)
    segments = [new, *past]
    scores = [
        jnp.where(mask, _tree_product(query, segment.keys, config).astype(jnp.float32), -jnp.inf)
        for mask, segment in zip(masks, segments, strict=True)
    ]
    largest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
    parts = [jnp.exp(score - largest) for score in scores]  # one softmax over all segments, normalised at the end
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in parts)
    mixed = sum(
        _tree_product(part.astype(query.dtype), segment.values, config)
        for part, segment in zip(parts, segments, strict=True)
    )
    return mixed / total.astype(query.dtype), new


def _tree_product(a, b, config):
    """Multiply a [B, W, K, H, T, m] by b [B(, W(, K)), H, m, n] into [B, W, K, H, T, n], reading shared parts once.

    If nothing is shared, b may also be [B * W * K, H, m, n].
    """
    if b.ndim == 4 and len(b) == math.prod(a.shape[:3]):
        return transformer.matmul(a.reshape(-1, *a.shape[3:]), b, config).reshape(*a.shape[:-1], -1)
    num_own = a.ndim - b.ndim  # tree axes of `a` that `b` lacks: they become rows of one product
    if num_own:
        own = tuple(range(3 - num_own, 3))
        grouped = jnp.moveaxis(a, own, tuple(range(4 - num_own, 4)))  # [B(, W), H, (W,) K, T, m]
        rows = grouped.reshape(*grouped.shape[: 4 - num_own], -1, a.shape[-1])
        product = transformer.matmul(rows, b, config).reshape(*grouped.shape[:-1], -1)
        return jnp.moveaxis(product, tuple(range(4 - num_own, 4)), own)
    return transformer.matmul(a, b, config)
