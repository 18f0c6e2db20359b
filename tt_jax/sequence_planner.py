"""The Trajectory Transformer and its tokenizer as the model that `planning.beam_plan` searches.

What has been computed is kept as a tree: keys and values of the real past once per environment, those of a beam's
planned transitions once per beam, and only the action and reward tokens of a candidate are its own. Positions are
absolute, so whenever the window slides all keys are computed anew for the window that is left.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import iql, planning, sampling, tokenization, transformer, types

_ROWS_AT_ONCE = 32  # beams whose windows are read together when the window slides


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Static settings of planning; the defaults are the reference's."""

    horizon: int = 15  # planned transitions
    beam_width: int = 128  # W
    num_expand: int = 2  # K, candidates per beam
    num_elites: int = 1  # best plans whose mean actions are executed, of a search by score
    replan_every: int = 1  # environment steps to execute from a plan
    context_transitions: int = 5  # C, past transitions to remember
    window: tuple[int, int] = (5, 4)  # (max, keep): with max whole transitions the oldest go until keep are left
    discount: float = 0.99
    temperature: float = 1.0
    action_cdf: float = 0.6  # thresholds of `sampling.filter_cdf`, 0: no filter
    action_top_k: int = 0  # of `sampling.filter_top_k`, 0: no filter
    action_central: float = 1.0  # of `sampling.filter_central`, 1: no filter
    observation_cdf: float = 0.0
    observation_top_k: int = 1
    reward_cdf: float = 0.0  # of reward and value tokens
    reward_top_k: int = 1
    percentile: float = -1.0  # of predicted rewards and values to score by, in [0, 1); -1: their mean
    stop_ends_episode: bool = True  # a predicted stop token ends the plan's rewards; the reference goes on
    stop_within_transition: bool = True  # draw it inside of a transition, too, where no data has it, as the reference
    share_ancestors: bool = True  # as the window slides, read once what beams share: fewer products, in smaller steps

    def __post_init__(self):
        window_max, window_keep = self.window
        least = 0 if self.horizon == 1 else 1  # what is imagined needs a past
        if not least <= window_keep < window_max:
            raise ValueError(
                f"window={self.window} must be (max, keep) with {least} <= keep < max for horizon={self.horizon}."
            )
        for name in ("horizon", "beam_width", "num_expand", "num_elites", "replan_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.replan_every > self.horizon:
            raise ValueError(f"replan_every={self.replan_every} must not exceed horizon={self.horizon}.")
        if self.num_elites > self.beam_width:
            raise ValueError(f"num_elites={self.num_elites} must not exceed beam_width={self.beam_width}.")
        for name in ("context_transitions", "action_top_k", "observation_top_k", "reward_top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("discount", "action_cdf", "action_central", "observation_cdf", "reward_cdf"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1].")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.percentile != -1 and not 0 <= self.percentile < 1:
            raise ValueError(f"percentile={self.percentile} must be in [0, 1), or -1 for the mean.")

    @property
    def observation_filters(self) -> sampling.Filters:
        """What is left of the predictions of observation tokens."""
        return sampling.Filters(self.observation_cdf, self.observation_top_k)

    @property
    def action_filters(self) -> sampling.Filters:
        """What is left of the predictions of action tokens."""
        return sampling.Filters(self.action_cdf, self.action_top_k, self.action_central)

    @property
    def reward_filters(self) -> sampling.Filters:
        """What is left of the predictions of reward and value tokens."""
        return sampling.Filters(self.reward_cdf, self.reward_top_k)


@chex.dataclass(frozen=True)
class PlannerParams:
    """What a plan depends on beside its observations; `extra` is for an injected score_fn, a Q-function's say."""

    transformer: types.Params
    discretizer: tokenization.Discretizer
    extra: Any = None
    goal: chex.Array | None = None  # [N] or [B, N] float32, an observation; for a goal-conditioned model


@chex.dataclass(frozen=True)
class _State:
    """Beams before their next action. P planned transitions fit into the window; those there are stand first."""

    context: types.Context  # the real past in the window, C <= keep transitions
    context_cache: transformer.KeysValues  # [B], of context tokens without values, D - 1 per transition
    context_slots: chex.Array  # [] int32, places of the window that the context takes up, filled or not
    tokens: chex.Array  # [B, W, P, D] int32, planned; the row after `num_planned` begins with the current observation
    cache: transformer.KeysValues  # [B, W], of P - 1 whole planned transitions without values
    current: transformer.KeysValues  # [B, W], of the current observation
    num_planned: chex.Array  # [] int32, whole planned transitions in the window
    logits: chex.Array  # [B, W, V + 1] float32, of the first action token
    ended: chex.Array  # [B, W] bool, the observation says that the episode is over


class _Pending(NamedTuple):
    tokens: chex.Array  # [B, W, K, D] int32, the candidates
    cache: transformer.KeysValues  # [B, W, K], of their action and reward tokens


def check_settings(config: transformer.TransformerConfig, plan_config: PlanConfig) -> None:
    """Raise ValueError if the model cannot read the window or does not have as many tokens as a top_k."""
    if plan_config.window[0] > config.max_transitions:
        raise ValueError(
            f"window={plan_config.window} exceeds the model's max_transitions={config.max_transitions}; "
            f"use at most ({config.max_transitions}, {config.max_transitions - 1})."
        )
    top_k = max(plan_config.action_top_k, plan_config.observation_top_k, plan_config.reward_top_k)
    if top_k > config.spec.num_bins + 1:
        raise ValueError(f"a top_k of {top_k} exceeds the {config.spec.num_bins + 1} tokens of a dimension.")


def make_plan_fn(
    *,
    config: transformer.TransformerConfig,
    plan_config: PlanConfig,
    score_fn: Callable[..., chex.Array] | None = None,
    reward_fn: Callable[..., chex.Array] | None = None,
    draw_fn: Callable[..., chex.Array] | None = None,
) -> Callable[[PlannerParams, chex.PRNGKey, types.Context, chex.Array], types.PlanOutput]:
    """Return plan_fn(params: PlannerParams, rng_key [B], context, observation [B, N] float32) -> PlanOutput.

    The context's `length` is traced: episodes of any age share one program. `score_fn(params, returns, proposal, step)`
    replaces the score by predicted returns, and `reward_fn(params, reward)` brings predicted rewards to the score's
    units; `guide_by_q` makes both for a Q-function. `draw_fn(rng_key [B], logits [B, W(, K), V + 1], call_index)`
    replaces sampling from the filtered logits; calls are counted over the plan, one per token of a transition.

    Raises ValueError if the window is longer than the model can read.
    """
    check_settings(config, plan_config)
    if config.goal_conditioned:
        raise ValueError("a goal-conditioned model is planned with by likelihood, not by reward.")
    model = _Model(config, plan_config, draw_fn, reward_fn)
    score_fn = score_fn or planning.score_by_value(plan_config.discount)

    def score_once(params, returns, proposal, step):
        """Let a beam whose observation says that the episode is over go on as one candidate, as ended ones do."""
        scores = score_fn(params, returns, proposal, step)
        observed = proposal.tokens[..., : config.spec.observation_dim]
        ended = (observed == config.spec.stop_token).any(-1) & plan_config.stop_ends_episode
        is_first = jnp.arange(plan_config.num_expand)[None, None] == 0
        return jnp.where(ended, jnp.where(is_first, returns[..., None], -jnp.inf), scores)

    def plan_fn(params, rng_key, context, observation):
        if observation.shape[-1] != config.spec.observation_dim:
            raise ValueError(
                f"observation has {observation.shape[-1]} dimensions, the model {config.spec.observation_dim}."
            )
        return planning.beam_plan(
            params,
            rng_key,
            model.root(params, context, observation),
            propose_fn=model.propose,
            advance_fn=model.advance,
            score_fn=score_once,
            horizon=plan_config.horizon,
            beam_width=plan_config.beam_width,
            num_expand=plan_config.num_expand,
            num_elites=plan_config.num_elites,
            discount=plan_config.discount,
        )

    return plan_fn


def guide_by_q(*, discount: float) -> dict[str, Callable[..., chex.Array]]:
    """Return the `score_fn` and `reward_fn` of `make_plan_fn` with which IQL's Q-function guides the search.

    `PlannerParams.extra` holds the IQL parameters of one or more learners, stacked, of the observations that the model
    reads; the least Q of all their critics counts. `discount` is the one that they were trained with.
    """

    def q_fn(params, observation, action):
        return jnp.min(jax.vmap(iql.q_values, (0, None, None))(params.extra, observation, action), axis=(0, 1))

    def reward_fn(params, reward):
        return iql.transform_rewards(jax.tree.map(lambda leaf: leaf[0], params.extra), reward)

    return {"score_fn": planning.score_by_q(q_fn, discount=discount), "reward_fn": reward_fn}


class _Model:
    """The functions of the model over their static settings; holds no arrays."""

    def __init__(self, config, plan_config, draw_fn, reward_fn):
        self.config, self.plan, self.spec = config, plan_config, config.spec
        self.draw_fn = draw_fn or _draw
        self.reward_fn = reward_fn or (lambda params, reward: reward)
        self.num_keys = self.spec.transition_dim - 1  # of a transition: its value token has none
        self.slots = min(plan_config.window[0], plan_config.horizon)  # P
        self.cached_slots = max(self.slots - 1, 1)  # with P whole transitions the window slides or the plan is done

    def root(self, params, context, observation):
        """Read the past and the current observation, once per environment."""
        spec, width = self.spec, self.plan.beam_width
        window_max, window_keep = self.plan.window
        slots = context.tokens.shape[1]
        if slots >= window_max:  # the window slides before anything is planned
            context, slots = keep_newest(context, window_keep), window_keep
            context = context.replace(tokens=context.tokens[:, :slots])
        context_cache = self._read_context(params, context)
        dims = slice(spec.observation_dim)
        tokens = tokenization.encode(params.discretizer, jnp.asarray(observation, jnp.float32), dims=dims)
        dims = np.arange(spec.observation_dim)
        x, own = transformer.decode(
            params.transformer,
            tokens[:, None, None],
            dims,
            positions(context.length, dims, spec),
            [(context_cache, context.length * self.num_keys)],
            config=self.config,
            visible=np.tri(spec.observation_dim, dtype=bool)[None],
        )
        logits = transformer.next_logits(params.transformer, x[:, 0, :, -1], dims[-1], config=self.config)
        num_envs = tokens.shape[0]
        own = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:, 0], (num_envs, width, *leaf.shape[3:])), own)
        all_tokens = jnp.zeros([num_envs, width, self.slots, spec.transition_dim], jnp.int32)
        return _State(
            context=context,
            context_cache=context_cache,
            context_slots=jnp.int32(slots),
            tokens=all_tokens.at[:, :, 0, : spec.observation_dim].set(tokens[:, None]),
            cache=transformer.empty_cache((num_envs, width), self.cached_slots * self.num_keys, config=self.config),
            current=own,
            num_planned=jnp.int32(0),
            logits=jnp.broadcast_to(logits, (num_envs, width, logits.shape[-1])),
            ended=jnp.zeros(all_tokens.shape[:2], bool),
        )

    def propose(self, params, rng_key, state, step):
        """Sample the action and reward tokens of K candidates per beam and predict rewards and values."""
        spec, plan = self.spec, self.plan
        size = (*state.ended.shape, plan.num_expand)
        observation = jax.lax.dynamic_index_in_dim(state.tokens, state.num_planned, axis=2, keepdims=False)
        observation = observation[..., : spec.observation_dim]
        past = [(state.cache, state.num_planned * self.num_keys), (state.current, spec.observation_dim)]

        def sample(carry, index):  # the action tokens, then the reward token
            logits, cache = carry
            action = self._draw(rng_key, logits, step, index, plan.action_filters)
            reward = self._draw(rng_key, logits, step, index, plan.reward_filters)
            token = jnp.where(index < spec.action_dim, action, reward)
            offset = spec.observation_dim + index
            return self._read_token(params, state, token, offset, past, cache, index), (token, logits)

        logits = jnp.broadcast_to(state.logits[:, :, None], (*size, spec.num_bins + 1))
        empty = transformer.empty_cache((math.prod(size),), spec.action_dim + 1, config=self.config)
        (value_logits, cache), (sampled, sampled_logits) = jax.lax.scan(
            sample, (logits, empty), jnp.arange(spec.action_dim + 1)
        )
        value_token = self._draw(rng_key, value_logits, step, spec.action_dim + 1, plan.reward_filters)
        sampled = jnp.moveaxis(sampled, 0, -1)  # [B, W, K, A + 1]
        before = jnp.broadcast_to(observation[:, :, None], (*size, spec.observation_dim))
        tokens = jnp.concatenate([before, sampled, value_token[..., None]], axis=-1)

        action = sampled[..., : spec.action_dim]
        log_probs = jax.nn.log_softmax(jnp.moveaxis(sampled_logits[:-1], 0, -2) / plan.temperature, axis=-1)
        log_probs = jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]  # [B, W, K, A]
        is_stop = (tokens == spec.stop_token) & plan.stop_ends_episode
        over_before = state.ended[..., None] | is_stop[..., :-1].any(-1)
        over = over_before | is_stop[..., -1]
        action_dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)
        reward = self.reward_fn(params, self._estimate(params, sampled_logits[-1], dim=-2))
        proposal = types.Proposal(
            observation=tokenization.decode(params.discretizer, observation, dims=slice(spec.observation_dim)),
            action=tokenization.decode(params.discretizer, action, dims=action_dims),
            reward=jnp.where(over_before, 0.0, reward),
            value=jnp.where(over, 0.0, self._estimate(params, value_logits, dim=-1)),
            log_prob=jnp.sum(log_probs, axis=-1),
            terminal=over,
            tokens=tokens,
        )
        return proposal, _Pending(
            tokens=tokens, cache=jax.tree.map(lambda leaf: leaf.reshape(*size, *leaf.shape[1:]), cache)
        )

    def advance(self, params, rng_key, state, pending, beam, expansion, step):
        """Keep the picked candidates, slide the window if it is full, and sample the next observations."""
        picked = planning.take_candidates(pending.tokens, beam, expansion)  # [B, W, D]
        tokens = planning.take_beams(state.tokens, beam)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, picked[:, :, None], state.num_planned, axis=2)
        grown = state.replace(tokens=tokens, num_planned=state.num_planned + 1)

        def keep_window():
            cache, current = jax.tree.map(lambda leaf: planning.take_beams(leaf, beam), (state.cache, state.current))
            own = jax.tree.map(lambda leaf: planning.take_candidates(leaf, beam, expansion), pending.cache)
            start = state.num_planned * self.num_keys
            cache = transformer.write_cache(cache, current, start)
            return grown.replace(cache=transformer.write_cache(cache, own, start + self.spec.observation_dim))

        is_full = grown.context_slots + grown.num_planned == self.plan.window[0]
        state = jax.lax.cond(is_full, lambda: self._slide(params, grown), keep_window)
        return self._observe(params, rng_key, state, picked[..., -1], step)

    def _slide(self, params, state):
        """Drop the oldest transitions from a full window and compute the keys of what is left."""
        window_max, window_keep = self.plan.window
        context_slots = jnp.maximum(state.context_slots - (window_max - window_keep), 0)
        num_planned = window_keep - context_slots
        context = keep_newest(state.context, context_slots)
        context_cache = self._read_context(params, context)
        planned = jnp.roll(state.tokens, num_planned - state.num_planned, axis=2)
        segment = (context_cache, context.length * self.num_keys)
        return state.replace(
            context=context,
            context_cache=context_cache,
            context_slots=context_slots,
            tokens=planned,
            cache=self._read_planned(params, context, segment, planned, num_planned, state.cache),
            num_planned=num_planned,
        )

    def _read_planned(self, params, context, segment, planned, num_planned, cache):
        """Compute the keys of the planned transitions, once for all beams that are equal up to the end of each.

        Goes from transition to transition, and for each over blocks of the distinct beams, as many as there are.
        """
        width, block = planned.shape[1], min(_ROWS_AT_ONCE, planned.shape[1])
        tokens = planned[:, :, : min(self.plan.window[1], self.cached_slots), :-1]

        def read(tokens, slot, past):  # tokens [B, rows, slots, D - 1], those from `slot` on
            num_slots, num_tokens = tokens.shape[2], tokens.shape[2] * self.num_keys
            _, own = transformer.decode(
                params.transformer,
                tokens.reshape(*tokens.shape[:2], 1, num_tokens),
                np.tile(np.arange(self.num_keys), num_slots),
                positions(context.length + slot, _key_offsets(num_slots, self.spec), self.spec),
                [segment, *past],
                config=self.config,
                visible=np.tri(num_tokens, dtype=bool)[None],
            )
            return jax.tree.map(lambda leaf: leaf[:, :, 0], own)

        if not self.plan.share_ancestors:  # what is not planned yet is read too, but hidden
            return transformer.write_cache(cache, read(tokens, 0, []), 0)

        is_same = (tokens[:, :, None] == tokens[:, None]).all(-1)  # [B, W, W, P]
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
                part = read(transition, slot, [(history, slot * self.num_keys)])
                write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * block, axis=1)
                return jax.tree.map(write, new, part)

            new = transformer.empty_cache(tokens.shape[:2], self.num_keys, config=self.config)
            new = jax.lax.fori_loop(0, num_blocks[slot], read_block, new)
            own = jax.tree.map(lambda leaf: planning.take_beams(leaf, places[..., slot]), new)
            return transformer.write_cache(cache, own, slot * self.num_keys)

        return jax.lax.fori_loop(0, num_planned, read_transition, cache)

    def _observe(self, params, rng_key, state, value_token, step):
        """Read the last value token and sample the next observation after it, one token at a time."""
        spec, plan = self.spec, self.plan
        past = [(state.cache, state.num_planned * self.num_keys)]

        def sample(carry, index):  # at index 0 the value token, at index i the observation's dimension i - 1
            logits, current = carry
            call = spec.action_dim + 1 + index
            drawn = self._draw(rng_key, logits, step, call, plan.observation_filters)
            token = jnp.where(index == 0, value_token, drawn)[..., None]
            place = jnp.maximum(index - 1, 0)  # what is written at index 0 is not visible and overwritten
            logits, current = self._read_token(params, state, token, index - 1, past, current, place)
            return (logits[:, :, 0], current), drawn

        size = state.ended.shape
        current = transformer.empty_cache((math.prod(size),), spec.observation_dim, config=self.config)
        indices = jnp.arange(spec.observation_dim + 1)
        (logits, current), drawn = jax.lax.scan(sample, (jnp.zeros_like(state.logits), current), indices)
        observation = jnp.moveaxis(drawn[1:], 0, -1)  # [B, W, N]
        row = jnp.pad(observation, [(0, 0), (0, 0), (0, spec.transition_dim - spec.observation_dim)])
        return state.replace(
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, row[:, :, None], state.num_planned, axis=2),
            current=jax.tree.map(lambda leaf: leaf.reshape(*size, *leaf.shape[1:]), current),
            logits=logits,
            ended=(observation == spec.stop_token).any(-1) & plan.stop_ends_episode,
        )

    def _read_token(self, params, state, token, offset, past, own, place):
        """Read one token [B, W, K] at `offset` from the current transition's start; -1 is the last one's value.

        Returns the logits [B, W, K, V + 1] after it, and `own` with its keys and values written at `place`; it sees
        what stands there up to itself. A value token is not seen.
        """
        spec = self.spec
        dim = offset % spec.transition_dim
        position = positions(state.context.length + state.num_planned, offset[None], spec)
        context = (state.context_cache, state.context.length * self.num_keys)
        num_visible = place + (dim != spec.transition_dim - 1)
        x, own = transformer.decode(
            params.transformer,
            token[..., None],
            dim[None],
            position,
            [context, *past],
            config=self.config,
            visible=(jnp.arange(own.values[0].shape[-2]) < num_visible)[None, None],
            own=own,
            start=place,
        )
        return transformer.next_logits(params.transformer, x[..., 0, :], dim, config=self.config), own

    def _read_context(self, params, context):
        """Compute the keys and values [B, ...] of the context's tokens, but for value tokens, which nobody sees."""
        num_envs, num_slots, _ = context.tokens.shape
        if num_slots == 0:
            return transformer.empty_cache((num_envs,), 0, config=self.config)
        tokens = context.tokens[:, :, :-1].reshape(num_envs, 1, 1, -1)
        _, cache = transformer.decode(
            params.transformer,
            tokens,
            np.tile(np.arange(self.num_keys), num_slots),
            _key_offsets(num_slots, self.spec)[None, None, None],
            [],
            config=self.config,
            visible=np.tri(tokens.shape[-1], dtype=bool)[None],
        )
        return jax.tree.map(lambda leaf: leaf[:, 0, 0], cache)

    def _draw(self, rng_key, logits, step, index, filters):
        """Draw tokens from what the filters leave of `logits` [..., V + 1]."""
        logits = logits / self.plan.temperature
        if not self.plan.stop_within_transition:
            begins = index == self.spec.action_dim + 2  # the first dimension of the next observation
            is_stop = jnp.arange(logits.shape[-1]) == self.spec.stop_token
            logits = jnp.where(is_stop & ~begins, -jnp.inf, logits)
        if filters.top_k == 1 and self.draw_fn is _draw:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = sampling.filter_logits(logits, filters)
        return self.draw_fn(rng_key, logits, step * self.spec.transition_dim + index).astype(jnp.int32)

    def _estimate(self, params, logits, *, dim):
        probs = jax.nn.softmax(logits / self.plan.temperature, axis=-1)[..., :-1]
        if self.plan.percentile < 0:
            return tokenization.expectation(params.discretizer, probs, dim=dim)
        return tokenization.percentile(params.discretizer, probs, self.plan.percentile, dim=dim)


def _draw(rng_key, logits, call_index):
    def uniform(key):
        return jax.random.uniform(jax.random.fold_in(key, call_index), logits.shape[1:-1])

    return sampling.categorical(logits, jax.vmap(uniform)(rng_key))


def keep_newest(context: types.Context, limit: chex.Numeric) -> types.Context:
    """Shorten each context to at most `limit` transitions and move what stays to the front."""
    length = jnp.minimum(context.length, limit)
    shift = context.length - length
    rows = jax.vmap(lambda tokens, by: jnp.roll(tokens, -by, axis=0))(context.tokens, shift)
    return types.Context(tokens=rows, length=length)


def _key_offsets(num_slots, spec):
    """Positions of all tokens but the values in `num_slots` transitions."""
    return np.arange(num_slots * spec.transition_dim).reshape(num_slots, -1)[:, :-1].reshape(-1)


def positions(transitions: chex.Array, offsets: chex.Array, spec: types.TransitionSpec) -> chex.Array:
    """Return the positions [B, 1, 1, T] at `offsets` [T] after `transitions` [B] whole ones."""
    return (transitions * spec.transition_dim)[:, None, None, None] + jnp.asarray(offsets)[None, None, None]
