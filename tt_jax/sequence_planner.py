"""The Trajectory Transformer and its tokenizer as the model that `planning.beam_plan` searches: plans by reward.

`window` reads the tokens; here they are drawn, decoded and scored. `Model` is for the other planners, too.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from tt_jax import decoding, iql, planning, sampling, tokenization, transformer, types, window


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Static settings of planning; the defaults are the reference's."""

    horizon: int = 15  # planned transitions
    beam_width: int = 128  # W, plans that are kept at each step
    num_expand: int = 2  # K, candidates per beam
    num_elites: int = 1  # best plans whose mean actions are executed, of a search by score
    replan_every: int = 1  # environment steps to execute from a plan
    context_transitions: int = 5  # C, past transitions to remember
    window: tuple[int, int] = (5, 4)  # (max, keep): with max whole transitions the oldest go until keep are left
    discount: float = 0.99  # of rewards, per planned step
    temperature: float = 1.0  # divides the logits: above 1 samples spread further
    action_cdf: float = 0.6  # drop the least likely actions up to this mass, see `sampling.filter_cdf`; 0: off
    action_top_k: int = 0  # draw from the k likeliest; 0: off
    action_central: float = 1.0  # draw from this share of the mass around the median; 0: the median, 1: off
    observation_cdf: float = 0.0  # as action_cdf
    observation_top_k: int = 1  # as action_top_k; 1: the likeliest
    reward_cdf: float = 0.0  # as action_cdf, of rewards and values
    reward_top_k: int = 1  # as action_top_k, of rewards and values
    percentile: float = -1.0  # of predicted rewards and values to score by, in [0, 1); -1: their mean
    likelihood_weight: float = 0.0  # of an action's log-probability beside its reward, see `planning.favour_likely`
    unlikely_share: float = 0.0  # of candidates to leave out at each step, see `planning.drop_unlikely`
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
        if not 0 <= self.unlikely_share < 1:
            raise ValueError(f"unlikely_share={self.unlikely_share} must be in [0, 1).")

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


def policy_config(plan_config: PlanConfig, policy: str) -> PlanConfig:
    """Return settings with which `make_plan_fn` acts without search: one step ahead, one candidate.

    Each dimension of the action, given those before it, is the model's "sample" (at the temperature, unfiltered),
    "median" or "greedy" (the likeliest bin). Raises ValueError for another policy.
    """
    filters = {
        "sample": sampling.Filters(),
        "median": sampling.Filters(central=0.0),
        "greedy": sampling.Filters(top_k=1),
    }
    if policy not in filters:
        raise ValueError(f'policy="{policy}" must be one of {", ".join(filters)}.')
    chosen = filters[policy]
    return dataclasses.replace(
        plan_config,
        horizon=1,
        beam_width=1,
        num_expand=1,
        num_elites=1,
        replan_every=1,
        action_cdf=chosen.cdf,
        action_top_k=chosen.top_k,
        action_central=chosen.central,
    )


@chex.dataclass(frozen=True)
class PlannerParams:
    """What a plan depends on beside its observations; `extra` is for an injected score_fn, a Q-function's say."""

    transformer: types.Params
    discretizer: tokenization.Discretizer
    extra: Any = None
    goal: chex.Array | None = None  # [N] or [B, N] float32, an observation; for a goal-conditioned model


class _State(NamedTuple):
    """Beams that have read an observation, before their next action."""

    window: window.Window
    logits: chex.Array  # [B, W, V + 1] float32, of the first action token
    ended: chex.Array  # [B, W] bool, the observation says that the episode is over


class _Pending(NamedTuple):
    tokens: chex.Array  # [B, W, K, D] int32, the candidates
    cache: decoding.Cache  # [B * W * K], of their action and reward tokens


def make_window_config(
    config: transformer.TransformerConfig, plan_config: PlanConfig, *, num_transitions: int
) -> window.WindowConfig:
    """Return the window of a search that plans so many transitions.

    Raises ValueError if the model cannot read it or has fewer tokens per dimension than a top_k.
    """
    top_k = max(plan_config.action_top_k, plan_config.observation_top_k, plan_config.reward_top_k)
    if top_k > config.spec.num_bins + 1:
        raise ValueError(f"a top_k of {top_k} exceeds the {config.spec.num_bins + 1} tokens of a dimension.")
    return window.WindowConfig(
        config=config,
        limits=plan_config.window,
        num_beams=plan_config.beam_width,
        num_slots=min(plan_config.window[0], num_transitions),
        share_ancestors=plan_config.share_ancestors,
    )


def encode_observation(params: PlannerParams, observation: chex.Array, *, spec: types.TransitionSpec) -> chex.Array:
    """Turn observations [..., N] float32 into int32 tokens; raises ValueError if they are of another size."""
    if observation.shape[-1] != spec.observation_dim:
        raise ValueError(f"observation has {observation.shape[-1]} dimensions, the model {spec.observation_dim}.")
    dims = slice(spec.observation_dim)
    return tokenization.encode(params.discretizer, jnp.asarray(observation, jnp.float32), dims=dims)


def make_plan_fn(
    *,
    config: transformer.TransformerConfig,
    plan_config: PlanConfig,
    score_fn: Callable[..., chex.Array] | None = None,
    reward_fn: Callable[..., chex.Array] | None = None,
    draw_fn: Callable[..., chex.Array] | None = None,
    keep_beams: bool = False,
) -> Callable[[PlannerParams, chex.PRNGKey, types.Context, chex.Array], types.PlanOutput]:
    """Return plan_fn(params: PlannerParams, rng_key [B], context, observation [B, N] float32) -> PlanOutput.

    The context's `length` is traced: episodes of any age share one program. `score_fn(params, returns, proposal, step)`
    replaces the score by predicted returns, and `reward_fn(params, reward)` brings predicted rewards to the score's
    units; `guide_by_q` makes both for a Q-function. `draw_fn(rng_key [B], logits [B, W(, K), V + 1], call_index)`
    replaces sampling from the filtered logits; calls are counted over the plan, one per token of a transition.
    `keep_beams` asks for the tokens of all final beams.

    Raises ValueError if the window is longer than the model can read.
    """
    window_config = make_window_config(config, plan_config, num_transitions=plan_config.horizon)
    model = Model(window_config, plan_config, score_fn=score_fn, reward_fn=reward_fn, draw_fn=draw_fn)

    def plan_fn(params, rng_key, context, observation):
        return planning.beam_plan(
            params,
            rng_key,
            model.root(params, context, observation),
            **model.functions(),
            horizon=plan_config.horizon,
            beam_width=plan_config.beam_width,
            num_expand=plan_config.num_expand,
            num_elites=plan_config.num_elites,
            discount=plan_config.discount,
            keep_beams=keep_beams,
        )

    return plan_fn


def guide_by_q(*, discount: float) -> dict[str, Callable[..., chex.Array]]:
    """Return the `score_fn` and `reward_fn` of `make_plan_fn` with which IQL's Q-function guides the search.

    `PlannerParams.extra` holds the IQL parameters of one or more learners, stacked, of the observations that the model
    reads; the least Q of all their critics counts. `discount` is the one that they were trained with.
    """

    def q_fn(params, observation, action):
        return least_q(params.extra, observation, action)

    def reward_fn(params, reward):
        return rewards_of_q(params.extra, reward)

    return {"score_fn": planning.score_by_q(q_fn, discount=discount), "reward_fn": reward_fn}


def least_q(learners: types.Params, observation: chex.Array, action: chex.Array) -> chex.Array:
    """Return the least Q [...] of all critics of stacked `learners` at observation [..., N] and action [..., A]."""
    return jnp.min(jax.vmap(iql.q_values, (0, None, None))(learners, observation, action), axis=(0, 1))


def rewards_of_q(learners: types.Params, rewards: chex.Array) -> chex.Array:
    """Bring rewards [...] of the environment to the units of Q, which stacked `learners` share."""
    return iql.transform_rewards(jax.tree.map(lambda leaf: leaf[0], learners), rewards)


class Model:
    """The functions that planners want, of the transformer over its static settings; holds no arrays.

    `score_fn`, `reward_fn` and `draw_fn` are those of `make_plan_fn`. Raises ValueError for a model with goals.
    """

    def __init__(self, window_config, plan_config, *, score_fn=None, reward_fn=None, draw_fn=None):
        if window_config.config.goal_conditioned:
            raise ValueError("a goal-conditioned model is planned with by likelihood, not by reward.")
        self.window, self.plan, self.spec = window_config, plan_config, window_config.config.spec
        self.score_fn = score_fn or planning.score_by_value(plan_config.discount)
        self.reward_fn = reward_fn or (lambda params, reward: reward)
        self.draw_fn = draw_fn or _draw

    def functions(self, *, score_fn=None):
        """Return the propose_fn, advance_fn and score_fn of `planning`, with the repairs that the settings ask for.

        `score_fn` replaces `score`, which is the model's own with ended beams as one candidate.
        """
        propose, score, plan = self.propose, score_fn or self.score, self.plan
        if plan.unlikely_share:
            score = planning.drop_unlikely(score, share=plan.unlikely_share)
        if plan.likelihood_weight:
            weight = plan.likelihood_weight
            propose, score = planning.favour_likely(propose, score, weight=weight, discount=plan.discount)
        return {"propose_fn": propose, "advance_fn": self.advance, "score_fn": score}

    def root(self, params, context, observation):
        """Read the past and the current observation."""
        return self.read(params, context, encode_observation(params, observation, spec=self.spec))

    def read(self, params, context, observed):
        """Read the past and the tokens [B, N] of an observation."""
        state, logits = window.root(params.transformer, context, observed, config=self.window)
        return _State(window=state, logits=logits, ended=jnp.zeros(logits.shape[:2], bool))

    def propose(self, params, rng_key, state, step, *, action=None):
        """Sample the action and reward tokens of K candidates per beam and predict rewards and values.

        The tokens [B, W, A] of an `action` replace the sampled ones.
        """
        spec, plan = self.spec, self.plan
        size = (*state.ended.shape, plan.num_expand)

        def sample(carry, index):  # the action tokens, then the reward token
            logits, cache = carry
            if action is None:
                chosen = self._draw(rng_key, logits, state.window, step, index, plan.action_filters)
            else:
                chosen = jax.lax.dynamic_index_in_dim(action, index, axis=-1)  # [B, W, 1]; beyond the last, the last
            reward = self._draw(rng_key, logits, state.window, step, index, plan.reward_filters)
            token = jnp.where(index < spec.action_dim, chosen, reward)
            read = window.branch(params.transformer, state.window, token, cache, index, config=self.window)
            return read, (token, logits)

        logits = jnp.broadcast_to(state.logits[:, :, None], (*size, spec.num_bins + 1))
        empty = decoding.empty_cache((math.prod(size),), spec.action_dim + 1, config=self.window.config)
        (value_logits, cache), (sampled, sampled_logits) = jax.lax.scan(
            sample, (logits, empty), jnp.arange(spec.action_dim + 1)
        )
        value_token = self._draw(rng_key, value_logits, state.window, step, spec.action_dim + 1, plan.reward_filters)
        sampled = jnp.moveaxis(sampled, 0, -1)  # [B, W, K, A + 1]
        slot = state.window.num_tokens // spec.transition_dim
        observed = jax.lax.dynamic_index_in_dim(state.window.tokens, slot, axis=2, keepdims=False)
        observed = observed[..., : spec.observation_dim]  # [B, W, N]
        before = jnp.broadcast_to(observed[:, :, None], (*size, spec.observation_dim))
        tokens = jnp.concatenate([before, sampled, value_token[..., None]], axis=-1)

        acted = sampled[..., : spec.action_dim]
        log_probs = jax.nn.log_softmax(jnp.moveaxis(sampled_logits[:-1], 0, -2) / plan.temperature, axis=-1)
        log_probs = jnp.take_along_axis(log_probs, acted[..., None], axis=-1)[..., 0]  # [B, W, K, A]
        is_stop = (tokens == spec.stop_token) & plan.stop_ends_episode
        over_before = state.ended[..., None] | is_stop[..., :-1].any(-1)
        over = over_before | is_stop[..., -1]
        action_dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)
        reward = self.reward_fn(params, self._estimate(params, sampled_logits[-1], dim=-2))
        proposal = types.Proposal(
            observation=tokenization.decode(params.discretizer, observed, dims=slice(spec.observation_dim)),
            action=tokenization.decode(params.discretizer, acted, dims=action_dims),
            reward=jnp.where(over_before, 0.0, reward),
            value=jnp.where(over, 0.0, self._estimate(params, value_logits, dim=-1)),
            log_prob=jnp.where(state.ended[..., None], 0.0, jnp.sum(log_probs, axis=-1)),
            terminal=over,
            tokens=tokens,
        )
        return proposal, _Pending(tokens=tokens, cache=cache)

    def advance(self, params, rng_key, state, pending, beam, expansion, step):
        """Keep the picked candidates, read their value tokens and sample the next observations."""
        grown = window.adopt(
            params.transformer, state.window, beam, expansion, pending.tokens, pending.cache, config=self.window
        )
        value_token = planning.take_candidates(pending.tokens, beam, expansion)[..., -1]
        return self.observe(params, rng_key, grown, value_token, step)

    def observe(self, params, rng_key, grown, value_token, step):
        """Read the value tokens [B, W], with which a window's last transitions end; sample the next observations."""
        spec, plan = self.spec, self.plan

        def sample(carry, index):  # at index 0 the value token is read, at index i dimension i - 1 of the observation
            state, logits = carry
            call = spec.action_dim + 1 + index
            drawn = self._draw(rng_key, logits, state, step, call, plan.observation_filters)
            token = jnp.where(index == 0, value_token, drawn)
            return window.run(params.transformer, state, token, config=self.window), token

        size = (*value_token.shape, spec.num_bins + 1)
        carry = (grown, jnp.zeros(size, jnp.float32))
        (grown, logits), read = jax.lax.scan(sample, carry, jnp.arange(spec.observation_dim + 1))
        ended = (read[1:] == spec.stop_token).any(axis=0) & plan.stop_ends_episode
        return _State(window=grown, logits=logits, ended=ended)

    def score(self, params, returns, proposal, step):
        """Score candidates, but let a beam whose observation says that the episode is over go on as one, unscored."""
        scores = self.score_fn(params, returns, proposal, step)
        observed = proposal.tokens[..., : self.spec.observation_dim]
        ended = (observed == self.spec.stop_token).any(-1) & self.plan.stop_ends_episode
        is_first = jnp.arange(scores.shape[-1])[None, None] == 0
        return jnp.where(ended, jnp.where(is_first, returns[..., None], -jnp.inf), scores)

    def _draw(self, rng_key, logits, state, step, index, filters):
        """Draw tokens from what the filters leave of `logits` [..., V + 1]."""
        logits = logits / self.plan.temperature
        if not self.plan.stop_within_transition:
            logits = window.forbid_stop(logits, state, config=self.window)
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
