"""The Trajectory Transformer and its tokenizer as the model that `planning.likelihood_search` searches.

Imitation: the most likely continuation of what happened; with a goal-conditioned model, the most likely one that ends
in the goal. `window` reads the tokens; here their logits are filtered.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import planning, sampling, sequence_planner, tokenization, transformer, types, window


class _State(NamedTuple):
    window: window.Window
    logits: chex.Array  # [B, W, V + 1] float32, of the next token


def make_likelihood_plan_fn(
    *, config: transformer.TransformerConfig, plan_config: sequence_planner.PlanConfig, keep_beams: bool = False
) -> Callable[[sequence_planner.PlannerParams, chex.PRNGKey, types.Context, chex.Array], types.PlanOutput]:
    """Return plan_fn(params: PlannerParams, rng_key [B], context, observation [B, N] float32) -> PlanOutput.

    The plan is the most likely sequence of `plan_config.horizon` transitions that begins with the observation, as
    `make_search_fn` finds it; scores are log-likelihoods. Nothing is drawn: `rng_key` is there because every plan_fn
    has one. `keep_beams` asks for the tokens of all final beams; those scored -inf stand for nothing.
    """
    spec, horizon = config.spec, plan_config.horizon
    num_tokens = horizon * spec.transition_dim - spec.observation_dim
    search_fn = make_search_fn(config=config, plan_config=plan_config, num_tokens=num_tokens)

    def plan_fn(params, rng_key, context, observation):
        del rng_key
        tokens, scores = search_fn(params, context, observation)
        tokens = tokens if keep_beams else tokens[:, :1]
        observed = sequence_planner.encode_observation(params, observation, spec=spec)[:, None]
        observed = jnp.broadcast_to(observed, (*tokens.shape[:2], spec.observation_dim))
        beams = jnp.concatenate([observed, tokens], axis=-1).reshape(*tokens.shape[:2], horizon, spec.transition_dim)
        dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)
        actions = tokenization.decode(params.discretizer, beams[:, 0, :, dims], dims=dims)
        return types.PlanOutput(
            action=actions[:, 0],
            actions=actions,
            tokens=beams[:, 0],
            scores=scores,
            beams=beams if keep_beams else None,
        )

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
    spec, plan = config.spec, plan_config
    num_transitions = -(-(spec.observation_dim + num_tokens) // spec.transition_dim)
    window_config = sequence_planner.make_window_config(config, plan, num_transitions=num_transitions)
    kinds = np.repeat([0, 1, 2], [spec.observation_dim, spec.action_dim, 2])
    branches = [
        functools.partial(sampling.filter_logits, filters=filters)
        for filters in (plan.observation_filters, plan.action_filters, plan.reward_filters)
    ]

    def next_logits_fn(params, state, step):
        del params
        logits = state.logits / plan.temperature
        if not plan.stop_within_transition:
            logits = window.forbid_stop(logits, state.window, config=window_config)
        dim = (spec.observation_dim + step) % spec.transition_dim
        return jax.lax.switch(jnp.asarray(kinds)[dim], branches, logits)

    def extend_fn(params, state, beam, token, step):
        del step
        return _State(*window.append(params.transformer, state.window, token, beam=beam, config=window_config))

    def search_fn(params, context, observation):
        observed = sequence_planner.encode_observation(params, observation, spec=spec)
        goal = _encode_goal(params, len(observed), config)
        root = window.root(params.transformer, context, observed, goal=goal, config=window_config)
        return planning.likelihood_search(
            params,
            _State(*root),
            next_logits_fn=next_logits_fn,
            extend_fn=extend_fn,
            num_tokens=num_tokens,
            beam_width=plan.beam_width,
        )

    return search_fn


def _encode_goal(params, num_envs, config):
    """Return the tokens [B, N] of the goals, or None for a model without."""
    size = config.spec.observation_dim
    if not config.goal_conditioned:
        if params.goal is not None:
            raise ValueError("this model was trained without goals; leave PlannerParams.goal unset.")
        return None
    if params.goal is None:
        raise ValueError("a goal-conditioned model needs a goal; set PlannerParams.goal to an observation.")
    if jnp.shape(params.goal) not in ((size,), (num_envs, size)):
        raise ValueError(f"goal has shape {jnp.shape(params.goal)}, expected ({size},) or ({num_envs}, {size}).")
    tokens = sequence_planner.encode_observation(params, params.goal, spec=config.spec)
    return jnp.broadcast_to(tokens, (num_envs, size))
