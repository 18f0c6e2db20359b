"""The GPT over transition tokens (Trajectory Transformer, section 3.1 and appendix A).

`Transformer` and its `Block` are Flax modules; the functions apply them to parameters, a nested dict of arrays. Exactly
the PyTorch reference: pre-norm blocks, exact GELU, learned absolute positions, a token table per dimension with one
shared stop token, an output matrix per dimension without bias. Value tokens are hidden from attention, their own
position included: they enter only the residual stream at their own position, so they influence nothing but the first
token of the next observation.

What a block attends to is handed to it as a function: the sequence itself here, what is cached in `decoding`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tt_jax import dropout, fused_attention, types

_QUERY_BLOCKS = 4  # of causal attention: each reads only the keys up to its end, 5/8 of all pairs
_ATTENTION = ("auto", "plain", "fused")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Static settings of the model; the defaults are the reference's."""

    spec: types.TransitionSpec
    num_layers: int = 4  # L, blocks of attention and feed-forward
    num_heads: int = 4  # H, of attention; they share embed_dim
    embed_dim: int = 128  # E, width of a token
    max_transitions: int = 10  # of a window; one token less than that many transitions can be read
    embedding_dropout: float = 0.1  # share of the embedded tokens' entries
    attention_dropout: float = 0.1  # share of the attention weights
    residual_dropout: float = 0.1  # share of what each block adds
    action_weight: float = 5.0  # of the loss of action tokens; observations have weight 1
    reward_weight: float = 1.0  # of the loss of reward tokens
    value_weight: float = 1.0  # of the loss of value tokens
    smooth_embedding: bool = False  # start with like embeddings for neighbouring bins, which learns faster
    dtype: str = "float32"  # of the matrix products but the last; softmax, norms and logits are float32 in any case
    attention: str = "auto"  # of whole sequences: "plain", "fused" (one kernel on a GPU), or fused where that pays
    goal_conditioned: bool = False  # put one more observation, the goal, in front of the sequence
    remat: bool = False  # compute each block again for its gradient instead of keeping what is inside: less memory
    reference_goal_mask: bool = False  # hide the columns that the reference hides, which misses the value tokens

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "embed_dim", "max_transitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        for name in ("action_weight", "reward_weight", "value_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype must be "float32" or "bfloat16", got "{self.dtype}".')
        if self.attention not in _ATTENTION:
            raise ValueError(f'attention="{self.attention}" must be one of {", ".join(_ATTENTION)}.')
        if self.attention == "fused" and (self.dtype != "bfloat16" or self.attention_dropout):
            raise ValueError(
                f'attention="fused" needs dtype="bfloat16" and attention_dropout=0, got "{self.dtype}" and '
                f'{self.attention_dropout}; "auto" takes it where it can.'
            )

    @property
    def block_size(self) -> int:
        """The longest input in tokens."""
        return self.max_transitions * self.spec.transition_dim - 1

    @property
    def hidden_dim(self) -> int:
        """The dimension of a transition whose tokens nobody sees: the value, or what the reference's columns hit."""
        is_shifted = self.goal_conditioned and self.reference_goal_mask  # by the goal in front
        return self.spec.action_dim + 1 if is_shifted else self.spec.transition_dim - 1

    @property
    def precision(self) -> jax.lax.Precision:
        """float32 products are computed in float32 on every backend."""
        return jax.lax.Precision.HIGHEST if self.dtype == "float32" else jax.lax.Precision.DEFAULT

    @property
    def fuses_attention(self) -> bool:
        """Whether attention is one kernel here, which has no dropout and computes in bfloat16."""
        can = self.dtype == "bfloat16" and not self.attention_dropout and jax.default_backend() == "gpu"
        return self.attention == "fused" or (self.attention == "auto" and can)


AttendFn = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]


class Norm(nn.Module):
    """Layer normalisation as `nn.LayerNorm` does it; in this order a train step takes 7% less on one CPU core."""

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Normalise the last axis in float32; the dtype stays."""
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).reshape(shape)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).reshape(shape)
        centered = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        return (centered * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention, then an MLP, each with a norm before it and a residual connection around it."""

    config: TransformerConfig

    def setup(self):
        embed = self.config.embed_dim
        self.norm_1, self.norm_2 = Norm(), Norm()
        self.qkv, self.projection = _dense(self.config, 3 * embed), _dense(self.config, embed)
        self.mlp_in, self.mlp_out = _dense(self.config, 4 * embed), _dense(self.config, embed)

    def __call__(self, x: chex.Array, attend_fn: AttendFn, dropout_fn: dropout.DropoutFn) -> tuple[chex.Array, Any]:
        """Map x [..., T, E] to the same shape; return it and what `attend_fn` returned second.

        `attend_fn(query, key, value)` of [..., H, T, E / H] each, the query scaled, returns the mixed values.
        """
        heads = _by_rows(self.qkv, self.norm_1(x)).reshape(*x.shape[:-1], 3, self.config.num_heads, -1)
        query, key, value = jnp.moveaxis(heads, (-3, -2), (0, -3))  # [..., H, T, E / H]
        mixed, extra = attend_fn(query * query.shape[-1] ** -0.5, key, value)
        mixed = _by_rows(self.projection, jnp.moveaxis(mixed, -3, -2).reshape(x.shape))
        x = x + dropout_fn(mixed, self.config.residual_dropout)
        hidden = _gelu(_by_rows(self.mlp_in, self.norm_2(x)))
        return x + dropout_fn(_by_rows(self.mlp_out, hidden), self.config.residual_dropout), extra


class Head(nn.Module):
    """An output matrix for each dimension of a transition, uniform in +-1/sqrt(E) at first."""

    config: TransformerConfig

    def setup(self):
        spec, embed = self.config.spec, self.config.embed_dim
        shape = (spec.transition_dim, embed, spec.num_bins + 1)
        self.kernel = self.param("kernel", _uniform(embed**-0.5), shape)

    def __call__(self, x: chex.Array) -> chex.Array:
        """Map x [B, T, E] of whole sequences to logits [B, T, V + 1]."""
        dim, length = self.config.spec.transition_dim, x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, -length % dim), (0, 0)]).reshape(len(x), -1, dim, x.shape[-1])
        logits = jnp.einsum("bkde,dev->bkdv", x, self.kernel, precision=self.config.precision)
        return logits.reshape(len(x), -1, logits.shape[-1])[:, :length]

    def at(self, x: chex.Array, dim: chex.Array) -> chex.Array:
        """Map x [..., E] of tokens of one dimension to logits [..., V + 1]."""
        kernel = jax.lax.dynamic_index_in_dim(jnp.asarray(self.kernel), dim, keepdims=False)
        return jnp.matmul(x, kernel, precision=self.config.precision)


class Transformer(nn.Module):
    """The whole model."""

    config: TransformerConfig

    def setup(self):
        config, spec = self.config, self.config.spec
        num_tokens = spec.num_bins * spec.transition_dim + 1
        token_init = _smooth_table(spec) if config.smooth_embedding else _normal()
        self.token_embedding = nn.Embed(num_tokens, config.embed_dim, embedding_init=token_init)
        self.position_embedding = nn.Embed(config.block_size, config.embed_dim, embedding_init=nn.initializers.zeros)
        if config.goal_conditioned:
            num_goals = spec.num_bins * spec.observation_dim
            self.goal_embedding = nn.Embed(num_goals, config.embed_dim, embedding_init=_normal())
        block_class = nn.remat(Block, static_argnums=(2, 3)) if config.remat else Block
        self.blocks = [block_class(config) for _ in range(config.num_layers)]
        self.norm = Norm()
        self.head = Head(config)

    def __call__(self, tokens, goal=None, dropout_key=None, visible=None):
        """Return the logits [B, T, V + 1], and of each layer the attention weights [B, H, G + T, G + T] or None."""
        length, config = tokens.shape[1], self.config
        dropout_fn = dropout.make(dropout_key, len(tokens))
        x = self.embed(tokens, np.arange(length) % config.spec.transition_dim, np.arange(length))
        if goal is not None:
            x = jnp.concatenate([self.embed_goal(goal), x], axis=1)
        x = dropout_fn(x, config.embedding_dropout)
        if config.fuses_attention and visible is None:
            attend_fn = functools.partial(fused_attention.attend, hidden=_hidden_keys(config, length))
        else:
            visible = visible_keys(config, length) if visible is None else visible
            attend_fn = functools.partial(attend_causally, visible=visible, dropout_fn=dropout_fn, config=config)
        x, weights = self.run_blocks(x, [attend_fn] * config.num_layers, dropout_fn)
        return self.head(self.norm(x[:, x.shape[1] - length :].astype(jnp.float32))), weights

    def run_blocks(self, x, attend_fns, dropout_fn=lambda x, rate: x):
        """Map embedded tokens x [..., T, E] through all blocks; return it and what each of the `attend_fns` returns."""
        extras = []
        for block, attend_fn in zip(self.blocks, attend_fns, strict=True):
            x, extra = block(x, attend_fn, dropout_fn)
            extras.append(extra)
        return x, extras

    def embed(self, tokens, dims, positions):
        """Embed `tokens` [..., T] of the dimensions `dims` of their transitions at `positions` into [..., T, E]."""
        spec = self.config.spec
        offsets = jnp.broadcast_to(jnp.asarray(dims) * spec.num_bins, tokens.shape)
        rows = jnp.where(tokens == spec.stop_token, spec.num_bins * spec.transition_dim, tokens + offsets)
        position = _look_up(self.position_embedding, jnp.asarray(positions))
        position = position.reshape((1,) * (tokens.ndim + 1 - position.ndim) + position.shape)
        return (_look_up(self.token_embedding, rows) + position).astype(self.config.dtype)

    def embed_goal(self, goal):
        """Embed the tokens [..., N] of a goal, which have a table of their own and no positions, into [..., N, E]."""
        offsets = self.config.spec.num_bins * np.arange(self.config.spec.observation_dim)
        return _look_up(self.goal_embedding, goal + jnp.broadcast_to(offsets, goal.shape)).astype(self.config.dtype)

    def next_logits(self, x, dim):
        """Map the output x [..., E] of tokens of dimension `dim` to logits [..., V + 1] of the next token."""
        return self.head.at(self.norm(x.astype(jnp.float32)), dim)


def _dense(config, features):
    return nn.Dense(features, dtype=config.dtype, precision=config.precision, kernel_init=_normal())


def _by_rows(dense, x):
    """Apply a dense layer to [..., in] as to one matrix; with [B, T, in] a train step on CPU takes 17% longer."""
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _gelu(x):
    """Exact GELU by erf; `nn.gelu` takes erfc, with which a plan takes 3% longer on CPU, a train step 2%."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype)))


def _look_up(embed, index):
    """Index the table of an `nn.Embed`; its own call also looks for indices out of range, 6% of a train step on CPU."""
    return jnp.asarray(embed.embedding)[index]


def _normal():
    return nn.initializers.normal(0.02)


def _uniform(bound):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _smooth_table(spec):
    """Return an initialiser that draws the token table as random sums of slow cosines over each dimension's bins."""

    def init(key, shape, dtype=jnp.float32):
        frequencies = np.arange(8)  # half periods over all bins
        centers = (np.arange(spec.num_bins) + 0.5) / spec.num_bins
        waves = np.cos(np.pi * frequencies * centers[:, None]) * np.where(frequencies, 2.0, 1.0) ** 0.5
        waves /= (1 + frequencies) ** 0.5 * np.sum(1 / (1 + frequencies)) ** 0.5  # [V, 8], the slow ones larger
        coefficients = jax.random.normal(key, (spec.transition_dim, len(frequencies), shape[1]), dtype)
        table = 0.1 * jnp.einsum("vf,dfe->dve", waves, coefficients).reshape(-1, shape[1])  # normal(0.1)
        return jnp.concatenate([table, jnp.zeros([1, shape[1]])])  # the stop token is no number

    return init


def matmul(a: chex.Array, b: chex.Array, config: TransformerConfig) -> chex.Array:
    """Multiply [..., n, m] by [..., m, k] in the dtype of the first and the precision of the configuration."""
    return jnp.matmul(a, b.astype(a.dtype), precision=config.precision)


def init(rng_key: chex.PRNGKey, *, config: TransformerConfig) -> types.Params:
    """Draw float32 parameters as the reference does: normal(0.02), but the head uniform in +-1/sqrt(E).

    With `smooth_embedding` tokens of neighbouring bins start out alike, as numbers that are close should.
    """
    goal = jnp.zeros([1, config.spec.observation_dim], jnp.int32) if config.goal_conditioned else None
    return Transformer(config).init(rng_key, jnp.zeros([1, 1], jnp.int32), goal)["params"]


def apply(
    params: types.Params,
    tokens: chex.Array,
    *,
    config: TransformerConfig,
    goal: chex.Array | None = None,
    dropout_key: chex.PRNGKey | None = None,
    visible: chex.Array | None = None,
) -> chex.Array:
    """Predict the token after each of `tokens` [B, T] from those up to it: float32 logits [B, T, V + 1].

    T is at most `config.block_size` and the first token is the first of a transition. `goal` [B, N] are observation
    tokens for a goal-conditioned model. With a `dropout_key`, one key or one per row, dropout is applied. `visible`
    [G + T, G + T] takes the place of `visible_keys` in every layer, to hide more; each query must see a key, and none
    a later one. Raises ValueError if T is too long or the goal does not suit the configuration.
    """
    _check_input(tokens, goal, config)
    return Transformer(config).apply({"params": params}, tokens, goal, dropout_key, visible)[0]


def attention(
    params: types.Params,
    tokens: chex.Array,
    *,
    config: TransformerConfig,
    goal: chex.Array | None = None,
    layer: int | None = None,
) -> chex.Array:
    """Return the attention weights [num_layers, B, num_heads, T, T] of a pass over `tokens` [B, T], query by key.

    float32, each row sums to 1. With a goal T includes its N tokens, in front. With a `layer` in [0, num_layers) only
    its weights [B, num_heads, T, T], and under `jit` only these take memory: long windows are read layer by layer.
    Raises ValueError as `apply`.
    """
    _check_input(tokens, goal, config)
    config = dataclasses.replace(config, attention="plain")
    weights = Transformer(config).apply({"params": params}, tokens, goal)[1]
    return jnp.stack(weights) if layer is None else weights[layer]


def loss(
    params: types.Params,
    batch: types.Batch,
    *,
    config: TransformerConfig,
    goal: chex.Array | None = None,
    dropout_key: chex.PRNGKey | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Average the weighted cross entropy over all B * T positions, masked ones included (as the reference does).

    Returns a float32 scalar in nats and metrics. `batch` [B, T], `goal` and `dropout_key` as for `apply`, which says
    what raises ValueError. The metrics are plain means in nats over the tokens of weight 1: "loss", and by kind
    "loss_observation", "loss_action", "loss_reward", "loss_value".
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

    Arguments as for `loss`; results are float32, in nats. Sums of parts of a batch add up to those of the whole.
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
    """Name the means per token of sums and counts [4] of `loss_sums`, in all and by kind; 0 where there is none."""
    means = {"loss": jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)}
    for index, kind in enumerate(("observation", "action", "reward", "value")):
        means[f"loss_{kind}"] = sums[index] / jnp.maximum(counts[index], 1)
    return means


def visible_keys(config: TransformerConfig, length: int) -> np.ndarray:
    """Return which key (column) a query (row) sees in a pass over T = `length` tokens, with the goal [G + T, G + T].

    bool, for G = N goal tokens in front if the model is goal-conditioned, else 0.
    """
    hidden = _hidden_keys(config, length)
    return np.tri(len(hidden), dtype=bool) & ~hidden


def _hidden_keys(config, length):
    """Return which keys [G + T] no query sees."""
    goal_length = config.spec.observation_dim if config.goal_conditioned else 0
    index = np.arange(-goal_length, length)
    return (index % config.spec.transition_dim == config.hidden_dim) & (index >= 0)


def _check_input(tokens, goal, config):
    length = tokens.shape[1]
    if length > config.block_size:
        raise ValueError(
            f"{length} tokens are too long: max_transitions={config.max_transitions} allows {config.block_size}."
        )
    if (goal is not None) != config.goal_conditioned:
        raise ValueError(
            f"goal_conditioned={config.goal_conditioned}, but goal {'given' if goal is not None else 'missing'}."
        )


def attend_causally(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    *,
    visible: np.ndarray,
    dropout_fn: dropout.DropoutFn,
    config: TransformerConfig,
) -> tuple[chex.Array, chex.Array]:
    """Attend within sequences, [B, H, T, E / H] each; return the mixed values and the weights [B, H, T, T].

    `visible` [T, T] bool says which key (column) a query (row) sees; none sees a later one.
    """
    mixed, weights = [], []
    for rows in np.array_split(np.arange(query.shape[2]), _QUERY_BLOCKS):
        if not rows.size:
            continue
        start, stop = rows[0], rows[-1] + 1  # later keys are hidden from these queries
        scores = matmul(query[:, :, start:stop], key[:, :, :stop].swapaxes(-1, -2), config)
        scores = jnp.where(visible[None, None, start:stop, :stop], scores.astype(jnp.float32), -jnp.inf)
        part = jax.nn.softmax(scores, axis=-1)  # [B, H, T / 4, up to T]
        weights.append(jnp.pad(part, [(0, 0), (0, 0), (0, 0), (0, query.shape[2] - stop)]))
        part = dropout_fn(part.astype(query.dtype), config.attention_dropout)
        mixed.append(matmul(part, value[:, :, :stop], config))
    return jnp.concatenate(mixed, axis=2), jnp.concatenate(weights, axis=2)
