"""The Trajectory Transformer and its tokenizer as the model that `planning.likelihood_search` searches.

Imitation: the most likely continuation of what happened; with a goal-conditioned model, the most likely one that ends
in the goal. Keys and values of the goal and of the real past are kept once per environment, those of the tokens that a
beam has found once per beam. As in `sequence_planner`, positions are absolute: when the window slides, all keys are
computed anew for the window that is left, and the cached result equals the uncached one.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import planning, sampling, sequence_planner, tokenization, transformer, types


@chex.dataclass(frozen=True)
class _State:
    """Beams before their next token. P transitions fit into the window beside the past; the begun one is the last."""

    goal_cache: transformer.KeysValues  # [B], of the goal's tokens, if any
    context: types.Context  # the real past in the window, C <= keep transitions
    context_cache: transformer.KeysValues  # [B], of C transitions
    context_slots: chex.Array  # [] int32, places of the window that the context takes up, filled or not
    tokens: chex.Array  # [B, W, P, D] int32, the transitions after the context
    cache: transformer.KeysValues  # [B, W], of these tokens
    num_planned: chex.Array  # [] int32, whole transitions before the begun one
    logits: chex.Array  # [B, W, V + 1] float32, of the next token


def make_likelihood_plan_fn(
    *, config: transformer.TransformerConfig, plan_config: sequence_planner.PlanConfig
) -> Callable[[sequence_planner.PlannerParams, chex.PRNGKey, types.Context, chex.Array], types.PlanOutput]:
    """Return plan_fn(params: PlannerParams, rng_key [B], context, observation [B, N] float32) -> PlanOutput.

    The plan is the most likely sequence of `plan_config.horizon` transitions that begins with the observation, as
    `make_search_fn` finds it; scores are log-likelihoods. Nothing is drawn: `rng_key` is there because every plan_fn
    has one.
    """
    spec, horizon = config.spec, plan_config.horizon
    num_tokens = horizon * spec.transition_dim - spec.observation_dim
    search_fn = make_search_fn(config=config, plan_config=plan_config, num_tokens=num_tokens)

    def plan_fn(params, rng_key, context, observation):
        del rng_key
        tokens, scores = search_fn(params, context, observation)
        observed = _encode(params, observation)
        tokens = jnp.concatenate([observed, tokens[:, 0]], axis=-1).reshape(-1, horizon, spec.transition_dim)
        dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)
        actions = tokenization.decode(params.discretizer, tokens[..., dims], dims=dims)
        return types.PlanOutput(action=actions[:, 0], actions=actions, tokens=tokens, scores=scores)

    return plan_fn


def make_search_fn(
    *, config: transformer.TransformerConfig, plan_config: sequence_planner.PlanConfig, num_tokens: int
) -> Callable[[sequence_planner.PlannerParams, types.Context, chex.Array], tuple[chex.Array, chex.Array]]:
    """Return search_fn(params, context, observation [B, N]) -> (tokens [B, W, num_tokens], log-likelihoods [B, W]).

    The tokens follow the observation. Of `plan_config` the beam width, the window, the temperature, the filters and
    `stop_within_transition` count: with 0 for all filters this is the reference's search over all tokens; with
    `observation_top_k=1` and `reward_top_k=1` only actions are searched, and observations and rewards follow greedily
    at no cost. A goal-conditioned model needs `params.goal`.

    Raises ValueError if the window is longer than the model can read, or a goal is missing, unexpected or misshapen.
    """
    sequence_planner.check_settings(config, plan_config)
    model = _Model(config, plan_config, num_tokens)

    def search_fn(params, context, observation):
        if observation.shape[-1] != config.spec.observation_dim:
            raise ValueError(
                f"observation has {observation.shape[-1]} dimensions, the model {config.spec.observation_dim}."
            )
        return planning.likelihood_search(
            params,
            model.root(params, context, _encode(params, observation)),
            next_logits_fn=model.next_logits,
            extend_fn=model.extend,
            num_tokens=num_tokens,
            beam_width=plan_config.beam_width,
        )

    return search_fn


class _Model:
    """The functions of the model over their static settings; holds no arrays."""

    def __init__(self, config, plan_config, num_tokens):
        self.config, self.plan, self.spec = config, plan_config, config.spec
        dim = self.spec.transition_dim
        self.slots = min(plan_config.window[0], -(-(self.spec.observation_dim + num_tokens) // dim))  # P
        # Nobody sees one token of each transition, its value; the goal in front shifts the reference's columns.
        is_shifted = config.goal_conditioned and config.reference_goal_mask
        self.hidden_dim = self.spec.action_dim + 1 if is_shifted else dim - 1
        self.key_dims = np.delete(np.arange(dim), self.hidden_dim)

    def root(self, params, context, observed):
        """Read the goal, the past and the current observation's tokens `observed` [B, N], once per environment."""
        spec, width = self.spec, self.plan.beam_width
        window_max, window_keep = self.plan.window
        num_envs, slots = context.tokens.shape[:2]
        if slots >= window_max:  # the window slides before anything is planned
            context, slots = sequence_planner.keep_newest(context, window_keep), window_keep
            context = context.replace(tokens=context.tokens[:, :slots])
        goal_cache = self._read_goal(params, num_envs)
        context_cache = self._read_context(params, context, goal_cache)
        dims = np.arange(spec.observation_dim)
        x, own = transformer.decode(
            params.transformer,
            observed[:, None, None],
            dims,
            sequence_planner.positions(context.length, dims, spec),
            [(goal_cache, spec.observation_dim), (context_cache, context.length * len(self.key_dims))],
            config=self.config,
            visible=(np.tri(len(dims), dtype=bool) & (dims != self.hidden_dim)[None])[None],
        )
        logits = transformer.next_logits(params.transformer, x[:, 0, :, -1], dims[-1], config=self.config)
        seen = np.flatnonzero(dims != self.hidden_dim)
        own = transformer.KeysValues(
            keys=tuple(leaf[..., seen] for leaf in own.keys), values=tuple(leaf[..., seen, :] for leaf in own.values)
        )
        own = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:, 0], (num_envs, width, *leaf.shape[3:])), own)
        # One place more than there are keys, since a hidden token's are written, too, until the next ones replace them.
        num_places = self.slots * len(self.key_dims) + 1
        cache = transformer.empty_cache((num_envs, width), num_places, config=self.config)
        tokens = jnp.zeros([num_envs, width, self.slots, spec.transition_dim], jnp.int32)
        return _State(
            goal_cache=goal_cache,
            context=context,
            context_cache=context_cache,
            context_slots=jnp.int32(slots),
            tokens=tokens.at[:, :, 0, : spec.observation_dim].set(observed[:, None]),
            cache=transformer.write_cache(cache, own, 0),
            num_planned=jnp.int32(0),
            logits=jnp.broadcast_to(logits, (num_envs, width, logits.shape[-1])),
        )

    def next_logits(self, params, state, step):
        """Return the logits of the next token after temperature and the filters of its kind."""
        del params
        plan, spec = self.plan, self.spec
        dim = self._dim(step)
        logits = state.logits / plan.temperature
        if not plan.stop_within_transition:
            transition = jax.lax.dynamic_index_in_dim(state.tokens, state.num_planned, axis=2, keepdims=False)
            is_allowed = (dim == 0) | (transition[..., :1] == spec.stop_token)  # an ended episode stays so
            is_stop = jnp.arange(spec.num_bins + 1) == spec.stop_token
            logits = jnp.where(is_stop[None, None] & ~is_allowed, -jnp.inf, logits)
        kinds = np.repeat([0, 1, 2], [spec.observation_dim, spec.action_dim, 2])
        branches = [
            functools.partial(sampling.filter_logits, filters=filters)
            for filters in (plan.observation_filters, plan.action_filters, plan.reward_filters)
        ]
        return jax.lax.switch(jnp.asarray(kinds)[dim], branches, logits)

    def extend(self, params, state, beam, token, step):
        """Append a token to the picked beams; slide the window when that fills it; predict the token after it."""
        spec, num_keys = self.spec, len(self.key_dims)
        dim = self._dim(step)
        tokens = planning.take_beams(state.tokens, beam)
        is_last = dim == spec.transition_dim - 1
        state = state.replace(
            tokens=tokens.at[:, :, state.num_planned, dim].set(token),
            cache=jax.tree.map(lambda leaf: planning.take_beams(leaf, beam), state.cache),
        )
        is_full = is_last & (state.context_slots + state.num_planned + 1 == self.plan.window[0])
        state = jax.lax.cond(is_full, lambda: self._slide(params, state), lambda: state)

        place = state.num_planned * num_keys + jnp.asarray(np.searchsorted(self.key_dims, np.arange(num_keys + 1)))[dim]
        x, own = transformer.decode(
            params.transformer,
            token[..., None, None],
            dim[None],
            sequence_planner.positions(state.context.length + state.num_planned, dim[None], spec),
            [*self._past(state), (state.cache, place)],
            config=self.config,
            visible=jnp.reshape(dim != self.hidden_dim, (1, 1, 1)),
        )
        own = jax.tree.map(lambda leaf: leaf[:, :, 0], own)
        return state.replace(
            cache=transformer.write_cache(state.cache, own, place),
            num_planned=state.num_planned + is_last,
            logits=transformer.next_logits(params.transformer, x[:, :, 0, 0], dim, config=self.config),
        )

    def _dim(self, step):
        """Return which dimension of its transition the token of a step of the search is."""
        return (self.spec.observation_dim + step) % self.spec.transition_dim

    def _past(self, state):
        """List what all beams share, with the number of keys that count."""
        count = state.context.length * len(self.key_dims)
        return [(state.goal_cache, self.spec.observation_dim), (state.context_cache, count)]

    def _slide(self, params, state):
        """Drop the oldest transitions from a full window, whose last is complete, and compute the keys of the rest."""
        window_max, window_keep = self.plan.window
        context_slots = jnp.maximum(state.context_slots - (window_max - window_keep), 0)
        num_planned = window_keep - context_slots - 1
        tokens = jnp.roll(state.tokens, num_planned - state.num_planned, axis=2)
        state = state.replace(
            context=sequence_planner.keep_newest(state.context, context_slots),
            context_slots=context_slots,
            tokens=tokens,
            num_planned=num_planned,
        )
        state = state.replace(context_cache=self._read_context(params, state.context, state.goal_cache))
        read = tokens[:, :, : min(window_keep, self.slots)]  # those not yet planned are masked when they are used
        own = self._read(params, read, state.context.length, self._past(state))
        return state.replace(cache=transformer.write_cache(state.cache, own, 0))

    def _read_goal(self, params, num_envs):
        """Compute the keys and values [B, ...] of the goal, whose tokens have a table of their own and no positions."""
        num_dims = self.spec.observation_dim
        if not self.config.goal_conditioned:
            if params.goal is not None:
                raise ValueError("this model was trained without goals; leave PlannerParams.goal unset.")
            return transformer.empty_cache((num_envs,), 0, config=self.config)
        if params.goal is None:
            raise ValueError("a goal-conditioned model needs a goal; set PlannerParams.goal to an observation.")
        if jnp.shape(params.goal) not in ((num_dims,), (num_envs, num_dims)):
            raise ValueError(
                f"goal has shape {jnp.shape(params.goal)}, expected ({num_dims},) or ({num_envs}, {num_dims})."
            )
        goal = jnp.broadcast_to(_encode(params, params.goal), (num_envs, num_dims))
        embedding = params.transformer["goal_embedding"]
        tables = {"token_embedding": embedding, "position_embedding": jnp.zeros([1, embedding.shape[-1]])}
        _, cache = transformer.decode(
            params.transformer | tables,
            goal[:, None, None],
            np.arange(num_dims),
            np.zeros([1, 1, 1, num_dims], np.int32),
            [],
            config=self.config,
            visible=np.tri(num_dims, dtype=bool)[None],
        )
        return jax.tree.map(lambda leaf: leaf[:, 0, 0], cache)

    def _read_context(self, params, context, goal_cache):
        """Compute the keys and values [B, ...] of the past's tokens."""
        past = [(goal_cache, self.spec.observation_dim)]
        cache = self._read(params, context.tokens[:, None], jnp.zeros_like(context.length), past)
        return jax.tree.map(lambda leaf: leaf[:, 0], cache)

    def _read(self, params, tokens, before, past):
        """Compute the keys and values [B, W, ...] of whole transitions [B, W, S, D] after `before` [B] ones."""
        num_slots = tokens.shape[2]
        if not num_slots:
            return transformer.empty_cache(tokens.shape[:2], 0, config=self.config)
        offsets = self.spec.transition_dim * np.arange(num_slots)[:, None] + self.key_dims[None]
        read = tokens[..., self.key_dims].reshape(*tokens.shape[:2], 1, -1)
        _, cache = transformer.decode(
            params.transformer,
            read,
            np.tile(self.key_dims, num_slots),
            sequence_planner.positions(before, offsets.reshape(-1), self.spec),
            past,
            config=self.config,
            visible=np.tri(read.shape[-1], dtype=bool)[None],
        )
        return jax.tree.map(lambda leaf: leaf[:, :, 0], cache)


def _encode(params, observation):
    """Turn observations [..., N] into tokens."""
    dims = slice(observation.shape[-1])
    return tokenization.encode(params.discretizer, jnp.asarray(observation, jnp.float32), dims=dims)
