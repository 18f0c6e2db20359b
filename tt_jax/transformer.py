"""The GPT over transition tokens (Trajectory Transformer, section 3.1 and appendix A) as pure functions.

Parameters are a nested dict of arrays; those of the blocks are stacked over the layers. Exactly the PyTorch reference:
pre-norm blocks, exact GELU, learned absolute positions, a token table per dimension with one shared stop token, an
output matrix per dimension without bias. Value tokens are hidden from attention, their own position included: they
enter only the residual stream at their own position, so they influence nothing but the first token of the next
observation.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import types

_LAYER_NORM_EPS = 1e-5
_QUERY_BLOCKS = 4  # of causal attention: each reads only the keys up to its end, 5/8 of all pairs


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Static settings of the model; the defaults are the reference's."""

    spec: types.TransitionSpec
    num_layers: int = 4  # L
    num_heads: int = 4  # H
    embed_dim: int = 128  # E
    max_transitions: int = 10  # of a window; one token less than that many transitions can be read
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    action_weight: float = 5.0  # of the loss per kind of target token; observations have weight 1
    reward_weight: float = 1.0
    value_weight: float = 1.0
    smooth_embedding: bool = False  # start with like embeddings for neighbouring bins, which learns faster
    dtype: str = "float32"  # of the matrix products but the last; softmax, norms and logits are float32 in any case
    goal_conditioned: bool = False  # put one more observation, the goal, in front of the sequence
    reference_goal_mask: bool = False  # hide the columns that the reference hides, which misses the value tokens

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "embed_dim", "max_transitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype must be "float32" or "bfloat16", got "{self.dtype}".')

    @property
    def block_size(self) -> int:
        """The longest input in tokens."""
        return self.max_transitions * self.spec.transition_dim - 1

    @property
    def precision(self) -> jax.lax.Precision:
        """float32 products are computed in float32 on every backend."""
        return jax.lax.Precision.HIGHEST if self.dtype == "float32" else jax.lax.Precision.DEFAULT


def init(rng_key: chex.PRNGKey, *, config: TransformerConfig) -> types.Params:
    """Draw float32 parameters as the reference does: normal(0.02), but the head uniform in +-1/sqrt(E).

    With `smooth_embedding` tokens of neighbouring bins start out alike, as numbers that are close should.
    """
    layers, embed, spec = config.num_layers, config.embed_dim, config.spec
    tokens_key, head_key, goal_key, *block_keys = jax.random.split(rng_key, 7)

    def normal(key, *shape):
        return 0.02 * jax.random.normal(key, shape, jnp.float32)

    def linear(key, fan_in, fan_out):
        return {"kernel": normal(key, layers, fan_in, fan_out), "bias": jnp.zeros([layers, fan_out])}

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    bound = embed**-0.5
    params = {
        "token_embedding": (
            _smooth_embedding(tokens_key, spec, embed)
            if config.smooth_embedding
            else normal(tokens_key, spec.num_bins * spec.transition_dim + 1, embed)
        ),
        "position_embedding": jnp.zeros([config.block_size, embed]),
        "blocks": {
            "norm_1": norm(layers, embed),
            "qkv": linear(block_keys[0], embed, 3 * embed),
            "projection": linear(block_keys[1], embed, embed),
            "norm_2": norm(layers, embed),
            "mlp_in": linear(block_keys[2], embed, 4 * embed),
            "mlp_out": linear(block_keys[3], 4 * embed, embed),
        },
        "norm": norm(embed),
        "head": jax.random.uniform(
            head_key, [spec.transition_dim, embed, spec.num_bins + 1], jnp.float32, -bound, bound
        ),
    }
    if config.goal_conditioned:
        params["goal_embedding"] = normal(goal_key, spec.num_bins * spec.observation_dim, embed)
    return params


def _smooth_embedding(key, spec, embed):
    """Draw the token table [N * D + 1, E] as random sums of slow cosines over each dimension's bins, normal(0.1)."""
    frequencies = np.arange(8)  # half periods over all bins
    centers = (np.arange(spec.num_bins) + 0.5) / spec.num_bins
    waves = np.cos(np.pi * frequencies * centers[:, None]) * np.where(frequencies, 2.0, 1.0) ** 0.5
    waves /= (1 + frequencies) ** 0.5 * np.sum(1 / (1 + frequencies)) ** 0.5  # [N, 8], the slow ones larger
    coefficients = jax.random.normal(key, (spec.transition_dim, len(frequencies), embed))
    table = 0.1 * jnp.einsum("nf,dfe->dne", waves, coefficients).reshape(-1, embed)
    return jnp.concatenate([table, jnp.zeros([1, embed])])  # the stop token is no number


def apply(
    params: types.Params,
    tokens: chex.Array,
    *,
    config: TransformerConfig,
    goal: chex.Array | None = None,
    dropout_key: chex.PRNGKey | None = None,
) -> chex.Array:
    """Predict the token after each of `tokens` [B, T] from those up to it: float32 logits [B, T, V + 1].

    T is at most `config.block_size` and the first token is the first of a transition. `goal` [B, N] are observation
    tokens for a goal-conditioned model. With a `dropout_key`, one key or one per row, dropout is applied. Raises
    ValueError if T is too long or the goal does not suit the configuration.
    """
    return _forward(params, tokens, config, goal, dropout_key)[0]


def attention(
    params: types.Params, tokens: chex.Array, *, config: TransformerConfig, goal: chex.Array | None = None
) -> chex.Array:
    """Return the attention weights [num_layers, B, num_heads, T, T] of a pass over `tokens` [B, T], query by key.

    With a goal T includes its N tokens, in front.
    """
    return _forward(params, tokens, config, goal, None)[1]


def loss(
    params: types.Params,
    batch: types.Batch,
    *,
    config: TransformerConfig,
    goal: chex.Array | None = None,
    dropout_key: chex.PRNGKey | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Average the weighted cross entropy over all B * T positions, masked ones included (as the reference does).

    The metrics are plain means in nats over the tokens of weight 1: "loss", and "loss_observation" and so on by kind.
    """
    total, sums, counts = loss_sums(params, batch, config=config, goal=goal, dropout_key=dropout_key)
    return total / batch.targets.size, mean_losses(sums, counts)


def loss_sums(
    params: types.Params,
    batch: types.Batch,
    *,
    config: TransformerConfig,
    goal: chex.Array | None = None,
    dropout_key: chex.PRNGKey | None = None,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Sum the cross entropy: weighted [], and sums and counts [4] by kind (observation, action, reward, value).

    Sums of parts of a batch add up to those of the whole.
    """
    logits = apply(params, batch.inputs, config=config, goal=goal, dropout_key=dropout_key)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    losses = (log_normalizer - target_logits) * batch.weights  # [B, T]
    spec = config.spec
    kind_of_dim = np.repeat(np.arange(4), [spec.observation_dim, spec.action_dim, 1, 1])
    kinds = np.eye(4, dtype=np.float32)[kind_of_dim[np.arange(1, losses.shape[1] + 1) % spec.transition_dim]]  # [T, 4]
    sums = jnp.sum(losses, axis=0) @ kinds
    counts = jnp.sum(batch.weights, axis=0) @ kinds
    kind_weights = np.array([1.0, config.action_weight, config.reward_weight, config.value_weight], np.float32)
    return jnp.sum(sums * kind_weights), sums, counts


def mean_losses(sums: chex.Array, counts: chex.Array) -> dict[str, chex.Array]:
    """Name the means per token of `loss_sums`, all together and by kind; a kind that does not occur has mean 0."""
    means = {"loss": jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)}
    for index, kind in enumerate(("observation", "action", "reward", "value")):
        means[f"loss_{kind}"] = sums[index] / jnp.maximum(counts[index], 1)
    return means


def visible_keys(config: TransformerConfig, length: int) -> np.ndarray:
    """Return which key (column) a query (row) may see in a pass over `length` tokens, with the goal [G + T, G + T]."""
    goal_length = config.spec.observation_dim if config.goal_conditioned else 0
    index = np.arange(goal_length + length) - (0 if config.reference_goal_mask else goal_length)
    is_value = (index % config.spec.transition_dim == config.spec.transition_dim - 1) & (index >= 0)
    return np.tri(goal_length + length, dtype=bool) & ~is_value


def _forward(params, tokens, config, goal, dropout_key):
    length = tokens.shape[1]
    if length > config.block_size:
        raise ValueError(
            f"{length} tokens are too long: max_transitions={config.max_transitions} allows {config.block_size}."
        )
    if (goal is not None) != config.goal_conditioned:
        raise ValueError(
            f"goal_conditioned={config.goal_conditioned}, but goal {'given' if goal is not None else 'missing'}."
        )
    dropout = _make_dropout(dropout_key, tokens.shape[0])
    x = embed(params, tokens, np.arange(length) % config.spec.transition_dim, np.arange(length), config=config)
    if goal is not None:
        rows = goal + config.spec.num_bins * np.arange(config.spec.observation_dim)[None]
        x = jnp.concatenate([jnp.asarray(params["goal_embedding"])[rows].astype(x.dtype), x], axis=1)
    x = dropout(x, config.embedding_dropout, 0)
    visible = visible_keys(config, length)[None, None]

    def block(carry, layer):
        x, index = carry
        site = (_QUERY_BLOCKS + 2) * index + 1  # of dropout
        query, key, value = qkv_heads(layer, x, config=config)  # [B, H, T, E / H]
        mixed, weights = [], []
        for number, rows in enumerate(np.array_split(np.arange(x.shape[1]), _QUERY_BLOCKS)):
            if not rows.size:
                continue
            start, stop = rows[0], rows[-1] + 1  # later keys are hidden from these queries
            scores = matmul(query[:, :, start:stop], key[:, :, :stop].swapaxes(-1, -2), config=config)
            scores = jnp.where(visible[:, :, start:stop, :stop], scores.astype(jnp.float32), -jnp.inf)
            part = jax.nn.softmax(scores, axis=-1)  # [B, H, T / 4, up to T]
            weights.append(jnp.pad(part, [(0, 0), (0, 0), (0, 0), (0, x.shape[1] - stop)]))
            part = dropout(part.astype(x.dtype), config.attention_dropout, site + number)
            mixed.append(matmul(part, value[:, :, :stop], config=config))
        mixed = project_heads(layer, jnp.concatenate(mixed, axis=2), config=config)
        x = x + dropout(mixed, config.residual_dropout, site + _QUERY_BLOCKS)
        x = x + dropout(mlp(layer, x, config=config), config.residual_dropout, site + _QUERY_BLOCKS + 1)
        return (x, index + 1), jnp.concatenate(weights, axis=2)

    # Unrolled, since a loop would copy what the backward pass needs into stacked arrays and back.
    (x, _), weights = jax.lax.scan(block, (x, 0), params["blocks"], unroll=True)
    return _all_logits(params, x[:, x.shape[1] - length :], config), weights


def _all_logits(params, x, config):
    dim, length = config.spec.transition_dim, x.shape[1]
    x = jnp.pad(layer_norm(params["norm"], x.astype(jnp.float32)), [(0, 0), (0, -length % dim), (0, 0)])
    x = x.reshape(x.shape[0], -1, dim, x.shape[-1])
    logits = jnp.einsum("bkde,dev->bkdv", x, params["head"], precision=config.precision)
    return logits.reshape(x.shape[0], -1, logits.shape[-1])[:, :length]


# The parts of a block, shared by the pass over whole sequences above and by cached decoding. Activations are [..., E].


def embed(
    params: types.Params, tokens: chex.Array, dims: chex.Array, positions: chex.Array, *, config: TransformerConfig
) -> chex.Array:
    """Embed `tokens` [..., T] of the dimensions `dims` of their transitions at `positions` into [..., T, E]."""
    spec = config.spec
    offsets = jnp.broadcast_to(jnp.asarray(dims) * spec.num_bins, tokens.shape)
    rows = jnp.where(tokens == spec.stop_token, spec.num_bins * spec.transition_dim, tokens + offsets)
    position = jnp.asarray(params["position_embedding"])[positions]
    position = position.reshape((1,) * (tokens.ndim + 1 - position.ndim) + position.shape)
    return (jnp.asarray(params["token_embedding"])[rows] + position).astype(config.dtype)


def matmul(a: chex.Array, b: chex.Array, *, config: TransformerConfig) -> chex.Array:
    """Multiply matrices in the precision of the configuration."""
    return jnp.matmul(a, b.astype(a.dtype), precision=config.precision)


def linear(layer: types.Params, x: chex.Array, *, config: TransformerConfig) -> chex.Array:
    """Apply an affine map to the last axis."""
    flat = matmul(x.reshape(-1, x.shape[-1]), layer["kernel"], config=config) + layer["bias"].astype(x.dtype)[None]
    return flat.reshape(*x.shape[:-1], -1)


def layer_norm(layer: types.Params, x: chex.Array) -> chex.Array:
    """Normalise the last axis in float32."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    scaled = centered * jax.lax.rsqrt(variance + _LAYER_NORM_EPS) * layer["scale"].reshape(shape)
    return (scaled + layer["bias"].reshape(shape)).astype(x.dtype)


def qkv_heads(layer: types.Params, x: chex.Array, *, config: TransformerConfig) -> tuple[chex.Array, ...]:
    """Return query (scaled by 1/sqrt(E/H)), key and value of [..., T, E], each [..., H, T, E / H]."""
    heads = linear(layer["qkv"], layer_norm(layer["norm_1"], x), config=config)
    heads = heads.reshape(*x.shape[:-1], 3, config.num_heads, -1)
    query, key, value = jnp.moveaxis(heads, (-3, -2), (0, -3))
    return query * query.shape[-1] ** -0.5, key, value


def project_heads(layer: types.Params, mixed: chex.Array, *, config: TransformerConfig) -> chex.Array:
    """Join the heads [..., H, T, E / H] of an attention's output and project them to [..., T, E]."""
    mixed = jnp.moveaxis(mixed, -3, -2)
    return linear(layer["projection"], mixed.reshape(*mixed.shape[:-2], -1), config=config)


def mlp(layer: types.Params, x: chex.Array, *, config: TransformerConfig) -> chex.Array:
    """Apply the second half of a block without its residual connection."""
    hidden = linear(layer["mlp_in"], layer_norm(layer["norm_2"], x), config=config)
    return linear(layer["mlp_out"], _gelu(hidden), config=config)


def _gelu(x):
    """Exact GELU by erf, as PyTorch computes it; `jax.nn.gelu` takes erfc, which costs several times as much on CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5**0.5).astype(x.dtype)))


def _make_dropout(rng_key: Any, num_rows: int):
    """Return dropout(x [B, ...], rate, site); without a key it is the identity.

    Every row's bits come from that row's key, so they do not depend on how rows are spread over devices. They are
    drawn packed, one byte each: the rate is rounded to a multiple of 1/256 and the scale follows the rounded rate.
    """
    if rng_key is None:
        return lambda x, rate, site: x
    row_keys = rng_key if rng_key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(num_rows))

    def dropout(x, rate, site):
        dropped = round(256 * rate)
        if dropped == 0:
            return x
        size = x[0].size
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, site)
        words = jax.vmap(lambda key: jax.random.bits(key, [-(-size // 4)], jnp.uint32))(keys)
        octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(num_rows, -1)[:, :size].reshape(x.shape)
        return jnp.where(octets >= dropped, x * jnp.asarray(256 / (256 - dropped), x.dtype), 0)

    return dropout


# Cached decoding. Tokens stand in a tree: [B, W, K, T] are T tokens that follow each other in each of K candidates of
# each of W beams of B environments, and what they attend to is held once where it is shared.


@chex.dataclass(frozen=True)
class KeysValues:
    """Keys and values of S tokens in every layer; `[...]` is [B], [B, W] or [B, W, K], whoever shares them."""

    keys: tuple[chex.Array, ...]  # per layer [..., H, E / H, S]
    values: tuple[chex.Array, ...]  # per layer [..., H, S, E / H]


def empty_cache(shape: tuple[int, ...], length: int, *, config: TransformerConfig) -> KeysValues:
    """Make room for `length` tokens in each of `shape`, [B], [B, W] or [B, W, K]."""
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    return KeysValues(
        keys=(jnp.zeros([*shape, heads, width, length], config.dtype),) * config.num_layers,
        values=(jnp.zeros([*shape, heads, length, width], config.dtype),) * config.num_layers,
    )


def write_cache(cache: KeysValues, new: KeysValues, start: chex.Array) -> KeysValues:
    """Overwrite the keys and values from place `start` on."""
    update = jax.lax.dynamic_update_slice_in_dim
    return KeysValues(
        keys=tuple(update(old, key, start, axis=-1) for old, key in zip(cache.keys, new.keys, strict=True)),
        values=tuple(update(old, value, start, axis=-2) for old, value in zip(cache.values, new.values, strict=True)),
    )


def decode(
    params: types.Params,
    tokens: chex.Array,
    dims: chex.Array,
    positions: chex.Array,
    past: list[tuple[KeysValues, chex.Array]],
    *,
    config: TransformerConfig,
    visible: chex.Array,
    own: KeysValues | None = None,
    start: chex.Numeric = 0,
) -> tuple[chex.Array, KeysValues]:
    """Run `tokens` [B, W, K, T] after a past that is cached; return their output [B, W, K, T, E] and keys and values.

    `dims` [T] are their dimensions within a transition, `positions` [B, 1, 1, T] their places in the window. `past`
    lists segments of the past, each with the number of its tokens that count, [] or [B]. The keys and values are
    written into those of `own` [B * W * K] from place `start` on, if it is given, and returned with it; `visible`
    [B or 1, T, S] tells which of the S places there (columns) each of the tokens (rows) sees. The output is before the
    final norm, for `next_logits`; where it is not used, the compiler drops the last layer but for its keys and values.
    """
    x = embed(params, tokens, dims, positions, config=config)
    past = [(segment, count) for segment, count in past if segment.values[0].shape[-2]]
    masks = [visible[:, None, None, None]]  # [B, 1, 1, 1, T, S], aligned with the scores [B, W, K, H, T, S]
    for segment, count in past:
        mask = jnp.arange(segment.values[0].shape[-2])[None] < jnp.reshape(count, [-1, 1])
        masks.append(mask[:, None, None, None, None])
    keys, values = [], []
    for index in range(config.num_layers):
        layer = jax.tree.map(operator.itemgetter(index), params["blocks"])
        query, key, value = qkv_heads(layer, x, config=config)  # [B, W, K, H, T, E / H]
        new = KeysValues(keys=(key.swapaxes(-1, -2),), values=(value,))
        if own is not None:  # written as the product reads it, or else a loop copies the whole at every token
            new = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), new)
            new = write_cache(KeysValues(keys=(own.keys[index],), values=(own.values[index],)), new, start)
        keys += new.keys
        values += new.values
        shared = [(keys[-1], values[-1])] + [(segment.keys[index], segment.values[index]) for segment, _ in past]
        scores = [
            jnp.where(mask, _tree_matmul(query, key, config).astype(jnp.float32), -jnp.inf)
            for mask, (key, _) in zip(masks, shared, strict=True)
        ]
        largest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
        parts = [jnp.exp(score - largest) for score in scores]  # one softmax over all segments, normalised at the end
        total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in parts)
        mixed = sum(
            _tree_matmul(part.astype(x.dtype), value, config) for part, (_, value) in zip(parts, shared, strict=True)
        )
        x = x + project_heads(layer, mixed / total.astype(x.dtype), config=config)
        x = x + mlp(layer, x, config=config)
    return x, KeysValues(keys=tuple(keys), values=tuple(values))


def next_logits(params: types.Params, x: chex.Array, dim: chex.Array, *, config: TransformerConfig) -> chex.Array:
    """Turn the output [..., E] of tokens of dimension `dim` into float32 logits [..., V + 1] of the next token."""
    head = jax.lax.dynamic_index_in_dim(params["head"], dim, keepdims=False)
    return matmul(layer_norm(params["norm"], x.astype(jnp.float32)), head, config=config)


def _tree_matmul(a: chex.Array, b: chex.Array, config: TransformerConfig) -> chex.Array:
    """Multiply a [B, W, K, H, T, m] by b [B(, W(, K)), H, m, n] into [B, W, K, H, T, n], reading shared parts once.

    If nothing is shared, b may also be [B * W * K, H, m, n].
    """
    if b.ndim == 4 and len(b) == math.prod(a.shape[:3]):
        return matmul(a.reshape(-1, *a.shape[3:]), b, config=config).reshape(*a.shape[:-1], -1)
    num_own = a.ndim - b.ndim  # tree axes of `a` that `b` lacks: they become rows of one product
    if num_own:
        own = tuple(range(3 - num_own, 3))
        grouped = jnp.moveaxis(a, own, tuple(range(4 - num_own, 4)))  # [B(, W), H, (W,) K, T, m]
        rows = grouped.reshape(*grouped.shape[: 4 - num_own], -1, a.shape[-1])
        product = matmul(rows, b, config=config).reshape(*grouped.shape[:-1], -1)
        return jnp.moveaxis(product, tuple(range(4 - num_own, 4)), own)
    return matmul(a, b, config=config)
