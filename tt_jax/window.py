"""The sliding window of the Trajectory Transformer: what a search has read so far, and how it reads on.

Each of B environments has its goal, if any, its past, and W beams of planned tokens that follow it. Keys and values are
kept once for whoever shares them: those of goal and past per environment, those of planned tokens per beam. Positions
are absolute, so when the window slides all keys are computed anew for the window that is left, and the result equals
the uncached pass over it. To run W sequences of given actions through the model for as many steps as you like:

    config = WindowConfig(config=transformer_config, limits=(5, 4), num_beams=W, num_slots=5)
    state, logits = root(params, context, observed, config=config)  # observed [B, N] tokens; logits of the next token
    for token in tokens:  # [B, W] each: given, or chosen from logits [B, W, V + 1]; a `lax.scan` where there are many
        state, logits = append(params, state, token, config=config)

`append(..., beam=beam)` goes on from the picked beams [B, W], as a search over tokens does. A search over whole
transitions tries K candidates for each beam by `branch`, which leaves the window as it is, goes on from the picked ones
by `adopt`, and reads on from their value token by `run`. A state is a pytree of fixed shapes; the tokens in it are
enough to make it again by `root`.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import decoding, planning, transformer, types

_ROWS_AT_ONCE = 32  # beams whose windows are read together when the window slides


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """Static settings of a window."""

    config: transformer.TransformerConfig
    limits: tuple[int, int]  # (max, keep): when max transitions are whole, the oldest go until keep are left
    num_beams: int  # W
    num_slots: int  # P, planned transitions that there is room for; max is always enough
    share_ancestors: bool = True  # as it slides, read once what beams share: fewer products, in smaller steps

    def __post_init__(self):
        if self.limits[0] > self.config.max_transitions:
            raise ValueError(
                f"window={self.limits} exceeds the model's max_transitions={self.config.max_transitions}; "
                f"use at most ({self.config.max_transitions}, {self.config.max_transitions - 1})."
            )

    @property
    def key_dims(self) -> np.ndarray:
        """The dimensions [D - 1] of a transition that have keys; the hidden one is only run as a query."""
        return np.delete(np.arange(self.config.spec.transition_dim), self.config.hidden_dim)

    @property
    def num_places(self) -> int:
        """Places for the keys of planned tokens: one more than keys, since a hidden token's are written, too."""
        return self.num_slots * len(self.key_dims) + 1

    def place(self, num_tokens: chex.Array) -> chex.Array:
        """Return where the key of a planned token stands that has `num_tokens` before it."""
        slot, dim = num_tokens // self.config.spec.transition_dim, num_tokens % self.config.spec.transition_dim
        keys_before = np.searchsorted(self.key_dims, np.arange(self.config.spec.transition_dim))
        return slot * len(self.key_dims) + jnp.asarray(keys_before)[dim]


@chex.dataclass(frozen=True)
class Window:
    """W beams after the last token that they have read."""

    goal_cache: decoding.Cache  # [B], of the goal's tokens, if any
    context: types.Context  # the real past in the window, C <= keep transitions
    context_cache: decoding.Cache  # [B], of C transitions
    context_slots: chex.Array  # [] int32, places of the window that the context takes up, filled or not
    tokens: chex.Array  # [B, W, P, D] int32, planned: the transitions after the context; the last may be incomplete
    cache: decoding.Cache  # [B * W], of the planned tokens
    num_tokens: chex.Array  # [] int32, planned tokens in the window; the next one has dimension num_tokens % D


def root(
    params: types.Params,
    context: types.Context,
    observed: chex.Array,
    *,
    config: WindowConfig,
    goal: chex.Array | None = None,
) -> tuple[Window, chex.Array]:
    """Read the goal [B, N] int32, the past and the current observation's tokens [B, N] int32, once per environment.

    Returns all beams at the same tokens, and the logits [B, W, V + 1] float32 of the next one. Raises ValueError if a
    goal is given to a model without goals, or none to one with.
    """
    model, num_envs = config.config, len(observed)
    if (goal is not None) != model.goal_conditioned:
        raise ValueError(
            "a goal-conditioned model needs a goal." if goal is None else "this model was trained without goals."
        )
    window_max, window_keep = config.limits
    slots = context.tokens.shape[1]
    if slots >= window_max:  # the window slides before anything is planned
        context, slots = keep_newest(context, window_keep), window_keep
        context = context.replace(tokens=context.tokens[:, :slots])
    goal_cache = decoding.empty_cache((num_envs,), 0, config=model)
    if goal is not None:
        goal_cache = decoding.decode_goal(params, goal, config=model)
    tokens = jnp.zeros([num_envs, config.num_beams, config.num_slots, model.spec.transition_dim], jnp.int32)
    state = Window(
        goal_cache=goal_cache,
        context=context,
        context_cache=_read_context(params, context, goal_cache, config),
        context_slots=jnp.int32(slots),
        tokens=tokens.at[:, :, 0, : observed.shape[1]].set(observed[:, None]),
        cache=decoding.empty_cache((num_envs * config.num_beams,), config.num_places, config=model),
        num_tokens=jnp.int32(observed.shape[1]),
    )
    dims = np.arange(observed.shape[1])
    x, own = decoding.decode(
        params,
        observed[:, None, None],
        dims,
        _positions(context, dims, config),
        _past(state, config),
        config=model,
        visible=(np.tri(len(dims), dtype=bool) & (dims != model.hidden_dim)[None])[None],
    )
    seen = np.flatnonzero(dims != model.hidden_dim)
    own = tuple(layer.replace(keys=layer.keys[..., seen], values=layer.values[..., seen, :]) for layer in own)
    own = _flat(jax.tree.map(lambda leaf: jnp.repeat(leaf[:, 0], config.num_beams, axis=1), own))
    logits = decoding.next_logits(params, x[:, 0, :, -1], dims[-1], config=model)
    logits = jnp.broadcast_to(logits, (num_envs, config.num_beams, logits.shape[-1]))
    return state.replace(cache=decoding.write_cache(state.cache, own, 0)), logits


def run(params: types.Params, state: Window, token: chex.Array, *, config: WindowConfig) -> tuple[Window, chex.Array]:
    """Read one more token [B, W] int32 of each beam; return the window and the logits [B, W, V + 1] after it.

    The window must have room for it: as `append`, without the check whether it slides.
    """
    place, dim = config.place(state.num_tokens), state.num_tokens % config.config.spec.transition_dim
    num_visible = place + (dim != config.config.hidden_dim)  # itself included, unless it is hidden
    x, cache = decoding.decode(
        params,
        token[..., None, None],
        dim[None],
        _positions(state.context, state.num_tokens[None], config),
        _past(state, config),
        config=config.config,
        visible=(jnp.arange(config.num_places) < num_visible)[None, None],
        own=state.cache,
        start=place,
    )
    slot = state.num_tokens // config.config.spec.transition_dim
    state = state.replace(
        tokens=state.tokens.at[:, :, slot, dim].set(token), cache=cache, num_tokens=state.num_tokens + 1
    )
    return state, decoding.next_logits(params, x[:, :, 0, 0], dim, config=config.config)


def append(
    params: types.Params, state: Window, token: chex.Array, *, config: WindowConfig, beam: chex.Array | None = None
) -> tuple[Window, chex.Array]:
    """Read one more token [B, W] int32 after the picked beams [B, W], by default each its own; slide before if full.

    Returns the window and the float32 logits [B, W, V + 1] of the next token.
    """
    kept = state if beam is None else state.replace(tokens=planning.take_beams(state.tokens, beam))

    def keep():
        return kept if beam is None else kept.replace(cache=_take_beams(state.cache, beam))

    return run(params, _slide_if_full(params, kept, keep, config), token, config=config)


def branch(
    params: types.Params,
    state: Window,
    token: chex.Array,
    own: decoding.Cache,
    index: chex.Array,
    *,
    config: WindowConfig,
) -> tuple[chex.Array, decoding.Cache]:
    """Read the token [B, W, K] int32 of K candidates per beam that is `index` tokens after what the beam has read.

    `own` [B * W * K] holds the keys of the candidates' earlier tokens, `decoding.empty_cache` at first; no token may be
    hidden. Returns the logits [B, W, K, V + 1] after the token, and `own` with its keys.
    """
    dim = (state.num_tokens + index) % config.config.spec.transition_dim
    planned = _by_beam(state.cache, config)
    x, own = decoding.decode(
        params,
        token[..., None],
        dim[None],
        _positions(state.context, (state.num_tokens + index)[None], config),
        [*_past(state, config), (planned, config.place(state.num_tokens))],
        config=config.config,
        visible=(jnp.arange(own[0].values.shape[-2]) <= index)[None, None],
        own=own,
        start=index,
    )
    return decoding.next_logits(params, x[..., 0, :], dim, config=config.config), own


def adopt(
    params: types.Params,
    state: Window,
    beam: chex.Array,
    expansion: chex.Array,
    tokens: chex.Array,
    own: decoding.Cache,
    *,
    config: WindowConfig,
) -> Window:
    """Go on from the candidates `expansion` of the beams `beam`, [B, W] each: as if they had been read; slide if full.

    `tokens` [B, W, K, D] are their whole transitions and `own` [B * W * K] the keys, as `branch` made them, of all
    tokens but the value. That one is the next to be read.
    """
    slot, size = state.num_tokens // tokens.shape[-1], tokens.shape[:3]
    picked = planning.take_candidates(tokens, beam, expansion)  # [B, W, D]
    before = planning.take_beams(state.tokens, beam)
    grown = state.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(before, picked[:, :, None], slot, axis=2),
        num_tokens=(slot + 1) * tokens.shape[-1] - 1,
    )

    def keep():
        candidates = jax.tree.map(lambda leaf: leaf.reshape(*size, *leaf.shape[1:]), own)
        candidates = jax.tree.map(lambda leaf: planning.take_candidates(leaf, beam, expansion), candidates)
        cache = _take_beams(state.cache, beam)
        return grown.replace(cache=decoding.write_cache(cache, _flat(candidates), config.place(state.num_tokens)))

    return _slide_if_full(params, grown, keep, config)


def forbid_stop(logits: chex.Array, state: Window, *, config: WindowConfig) -> chex.Array:
    """Take the stop token from logits [B, W(, K), V + 1], unless a transition begins or has begun with it.

    In the data an episode ends with whole transitions of stop tokens.
    """
    spec = config.config.spec
    slot, dim = state.num_tokens // spec.transition_dim, state.num_tokens % spec.transition_dim
    first = jax.lax.dynamic_index_in_dim(state.tokens, slot, axis=2, keepdims=False)[..., 0]  # [B, W]
    is_allowed = (dim == 0) | (first == spec.stop_token)
    is_allowed = is_allowed.reshape(*first.shape, *[1] * (logits.ndim - 2))
    is_stop = (jnp.arange(logits.shape[-1]) == spec.stop_token).reshape(*[1] * (logits.ndim - 1), -1)
    return jnp.where(is_stop & ~is_allowed, -jnp.inf, logits)


def keep_newest(context: types.Context, limit: chex.Numeric) -> types.Context:
    """Shorten each context to at most `limit` transitions and move what stays to the front."""
    length = jnp.minimum(context.length, limit)
    shift = context.length - length
    rows = jax.vmap(lambda tokens, by: jnp.roll(tokens, -by, axis=0))(context.tokens, shift)
    return types.Context(tokens=rows, length=length)


# Sliding


def _slide_if_full(params, state, keep_fn, config):
    """Return `keep_fn()`, or `state` slid if its last transition is whole but for the value, and so is the window."""
    dim = config.config.spec.transition_dim
    is_full = state.context_slots * dim + state.num_tokens == config.limits[0] * dim - 1
    return jax.lax.cond(is_full, lambda: _slide(params, state, config), keep_fn)


def _slide(params, state, config):
    """Drop the oldest transitions from a full window and compute the keys of what is left."""
    dim, (window_max, window_keep) = config.config.spec.transition_dim, config.limits
    context_slots = jnp.maximum(state.context_slots - (window_max - window_keep), 0)
    num_left, num_planned = window_keep - context_slots, state.num_tokens // dim + 1
    context = keep_newest(state.context, context_slots)
    state = state.replace(
        context=context,
        context_cache=_read_context(params, context, state.goal_cache, config),
        context_slots=context_slots,
        tokens=jnp.roll(state.tokens, num_left - num_planned, axis=2),
        num_tokens=num_left * dim - 1,
    )
    return state.replace(cache=_read_planned(params, state, num_left, config))


def _read_planned(params, state, num_left, config):
    """Compute the keys of the planned transitions, once for all beams that are equal up to the end of each.

    Goes from transition to transition, and for each over blocks of the distinct beams, as many as there are.
    """
    tokens = state.tokens[:, :, : min(config.limits[1], config.num_slots)]
    width, block = config.num_beams, min(_ROWS_AT_ONCE, config.num_beams)
    num_keys, past = len(config.key_dims), _past(state, config)
    if not tokens.shape[2]:
        return state.cache
    if not config.share_ancestors:  # what is not planned yet is read too, but hidden
        return decoding.write_cache(state.cache, _flat(_read(params, tokens, state.context, 0, past, config)), 0)

    is_same = (tokens[:, :, None] == tokens[:, None])[..., config.key_dims].all(-1)  # [B, W, W, P]
    equal = jnp.argmax(jnp.cumprod(is_same, axis=-1), axis=2)  # [B, W, P], the first beam that is the same so far
    is_first = equal == jnp.arange(width)[None, :, None]
    num_blocks = -(-jnp.max(jnp.sum(is_first, axis=1), axis=0) // block)  # [P]
    places = jnp.take_along_axis(jnp.cumsum(is_first, axis=1) - 1, equal, axis=1)  # [B, W, P], among the distinct

    def read_transition(slot, cache):
        distinct = jnp.argsort(~is_first[..., slot], axis=1)  # [B, W], those first

        def read_block(index, new):
            rows = jax.lax.dynamic_slice_in_dim(distinct, index * block, block, axis=1)
            history = jax.tree.map(lambda leaf: planning.take_beams(leaf, rows), cache)
            transition = planning.take_beams(tokens[:, :, slot], rows)[:, :, None]
            part = _read(params, transition, state.context, slot, [*past, (history, slot * num_keys)], config)
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * block, axis=1)
            return jax.tree.map(write, new, part)

        new = decoding.empty_cache(tokens.shape[:2], num_keys, config=config.config)
        new = jax.lax.fori_loop(0, num_blocks[slot], read_block, new)
        own = jax.tree.map(lambda leaf: planning.take_beams(leaf, places[..., slot]), new)
        return decoding.write_cache(cache, own, slot * num_keys)

    return _flat(jax.lax.fori_loop(0, num_left, read_transition, _by_beam(state.cache, config)))


def _read_context(params, context, goal_cache, config):
    """Compute the keys and values [B, ...] of the past's tokens."""
    nothing = context.replace(length=jnp.zeros_like(context.length))
    past = [(goal_cache, config.config.spec.observation_dim)]
    cache = _read(params, context.tokens[:, None], nothing, 0, past, config)
    return jax.tree.map(lambda leaf: leaf[:, 0], cache)


def _read(params, tokens, context, slot, past, config):
    """Compute the keys and values [B, W, ...] of whole transitions [B, W, S, D], `slot` ones after the context."""
    num_slots, dim = tokens.shape[2], config.config.spec.transition_dim
    if not num_slots:
        return decoding.empty_cache(tokens.shape[:2], 0, config=config.config)
    offsets = (dim * np.arange(num_slots)[:, None] + config.key_dims[None]).reshape(-1)
    _, cache = decoding.decode(
        params,
        tokens[..., config.key_dims].reshape(*tokens.shape[:2], 1, -1),
        np.tile(config.key_dims, num_slots),
        _positions(context, slot * dim + offsets, config),
        past,
        config=config.config,
        visible=np.tri(len(offsets), dtype=bool)[None],
    )
    return jax.tree.map(lambda leaf: leaf[:, :, 0], cache)


# Places and shapes


def _positions(context, offsets, config):
    """Return the positions [B, 1, 1, T] of tokens `offsets` [T] after the context."""
    start = context.length * config.config.spec.transition_dim
    return start[:, None, None, None] + jnp.asarray(offsets)[None, None, None]


def _past(state, config):
    """List what all beams of an environment share, with the number of keys that count."""
    return [
        (state.goal_cache, config.config.spec.observation_dim),
        (state.context_cache, state.context.length * len(config.key_dims)),
    ]


def _flat(cache):
    """Join the axes of environments and beams, as a loop wants what it writes."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cache)


def _by_beam(cache, config):
    """Invert `_flat`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, config.num_beams, *leaf.shape[1:]), cache)


def _take_beams(cache, beam):
    """Gather a flat cache at the beams [B, W] of each environment."""
    rows = (jnp.arange(len(beam))[:, None] * beam.shape[1] + beam).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows], cache)
