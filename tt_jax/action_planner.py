"""The Trajectory Transformer as the model of planners over whole sequences of actions: shooting, MPPI, and CEM.

Each maker returns plan_fn(params: PlannerParams, rng_key [B], context, observation [B, N]) -> PlanOutput, as
`sequence_planner.make_plan_fn` does, with the same `score_fn` and `reward_fn`, so that Q guides these planners, too.
`plan_config` means the same to all of them: W = `beam_width` plans of `horizon` transitions are compared at a time.
Sampled and given actions go through the same functions of the model; given ones are read as the tokens of their bins.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tt_jax import action_search, planning, sequence_planner, tokenization, transformer, types


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Static settings of MPPI and CEM."""

    num_iterations: int = 4  # of drawing beam_width candidates
    elite_share: float = 0.125  # of the candidates, the best, to which CEM fits the next ones; at least one
    temperature: float = 1.0  # of MPPI's weights, in units of the score
    noise_scale: float = 0.5  # of the first candidates, in standard deviations of the bins
    noise_exponent: float = 1.0  # 0: white noise; the higher, the longer an action stays on one side


_DEFAULTS = SearchConfig()


def make_shoot_plan_fn(
    *, config: transformer.TransformerConfig, plan_config: sequence_planner.PlanConfig, **functions
) -> Callable[..., types.PlanOutput]:
    """Return the plan_fn of `planning.shoot`: the best of W sampled plans, or the mean of the `num_elites` best.

    `functions` are the `score_fn`, `reward_fn` and `draw_fn` of `sequence_planner.make_plan_fn`, which tells what
    raises ValueError.
    """
    model = _make_model(config, plan_config, **functions)

    def plan_fn(params, rng_key, context, observation):
        return _shoot(params, rng_key, model.root(params, context, observation), model)

    return plan_fn


def make_mppi_plan_fn(*, search_config: SearchConfig = _DEFAULTS, **settings) -> Callable[..., types.PlanOutput]:
    """Return the plan_fn of `action_search.mppi`; `settings` are `make_shoot_plan_fn`'s.

    The plan_fn takes one argument more, `initial` [B, H, A]: actions around which the first candidates are drawn, such
    as the last plan after `action_search.shift`. By default, and for an environment whose actions there are NaN, it is
    the plan that `make_shoot_plan_fn` finds; that costs nothing where no environment needs it. Noise is measured in
    standard deviations of the bins of each dimension, and the plan's actions are values of bins.
    Raises ValueError for an `initial` of another shape, and for what the planner refuses.
    """
    planner = functools.partial(action_search.mppi, temperature=search_config.temperature)
    return _make_search_plan_fn(planner, search_config, **settings)


def make_cem_plan_fn(*, search_config: SearchConfig = _DEFAULTS, **settings) -> Callable[..., types.PlanOutput]:
    """Return the plan_fn of `action_search.cem`; `settings` and `initial` are those of `make_mppi_plan_fn`."""
    num_elites = max(1, round(search_config.elite_share * settings["plan_config"].beam_width))
    planner = functools.partial(action_search.cem, num_elites=num_elites)
    return _make_search_plan_fn(planner, search_config, **settings)


def make_predict_fn(
    *, config: transformer.TransformerConfig, plan_config: sequence_planner.PlanConfig
) -> Callable[..., types.Proposal]:
    """Return predict_fn(params, rng_key [B], context, observation [B, N], actions [B, H, A]) -> what the model expects.

    The Proposal has a leaf for each step of the given plans, [B, H, ...] in place of [B, W, K, ...]: the observation
    before the action, reward and value as the settings estimate them, the log-probability of the action, and whether
    the episode ends; what follows an end means nothing. Observations are drawn as `plan_config` says.
    """
    model = _make_model(config, dataclasses.replace(plan_config, beam_width=1, num_elites=1))

    def predict_fn(params, rng_key, context, observation, actions):
        given = _encode_actions(params, actions, config.spec)[:, None]  # [B, 1, H, A]
        itself = jnp.zeros([len(actions), 1], jnp.int32)

        def predict(state, step):
            action = jax.lax.dynamic_index_in_dim(given, step, axis=2, keepdims=False)
            proposal, pending = model.propose(params, rng_key, state, step, action=action)
            observed = proposal.replace(observation=proposal.observation[:, :, None])
            state = model.advance(params, rng_key, state, pending, itself, itself, step)
            return state, jax.tree.map(lambda leaf: leaf[:, 0, 0], observed)

        _, steps = jax.lax.scan(predict, model.root(params, context, observation), jnp.arange(plan_config.horizon))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), steps)

    return predict_fn


def _encode_actions(params, actions, spec):
    dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)
    return tokenization.encode(params.discretizer, actions, dims=dims)


def _make_model(config, plan_config, **functions):
    """Make the model with one candidate per beam."""
    plan_config = dataclasses.replace(plan_config, num_expand=1)
    window_config = sequence_planner.make_window_config(config, plan_config, num_transitions=plan_config.horizon)
    return sequence_planner.Model(window_config, plan_config, **functions)


def _shoot(params, rng_key, root, model):
    return planning.shoot(
        params,
        rng_key,
        root,
        **model.functions(),
        horizon=model.plan.horizon,
        num_plans=model.plan.beam_width,
        discount=model.plan.discount,
        num_elites=model.plan.num_elites,
    )


def _make_search_plan_fn(planner, search_config, *, config, plan_config, **functions):
    model = _make_model(config, plan_config, **functions)
    spec = config.spec
    dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)

    def evaluate_fn(params, rng_key, root, actions):
        of_model = model.functions()
        given = _encode_actions(params, actions, spec)  # [B, W, H, A]

        def propose(params, rng_key, state, step):
            action = jax.lax.dynamic_index_in_dim(given, step, axis=2, keepdims=False)
            return of_model["propose_fn"](params, rng_key, state, step, action=action)

        scores, _, tokens = planning.sample_plans(
            params,
            rng_key,
            root,
            **of_model | {"propose_fn": propose},
            horizon=plan_config.horizon,
            num_plans=plan_config.beam_width,
            discount=plan_config.discount,
        )
        return scores, tokens

    def plan_fn(params, rng_key, context, observation, initial=None):
        root = model.root(params, context, observation)
        start_key, search_key = jnp.moveaxis(jax.vmap(jax.random.split)(rng_key), 1, 0)
        expected = (len(rng_key), plan_config.horizon, spec.action_dim)
        if initial is None:
            initial = jnp.full(expected, jnp.nan, jnp.float32)
        if initial.shape != expected:
            raise ValueError(f"initial has shape {initial.shape}, expected {expected}: a plan for each environment.")
        is_missing = jnp.isnan(initial)
        initial = jax.lax.cond(
            jnp.any(is_missing),
            lambda: jnp.where(is_missing, _shoot(params, start_key, root, model).actions, initial),
            lambda: initial,
        )
        centers = jnp.asarray(params.discretizer.centers, jnp.float32)[dims]  # [A, V]
        is_distinct = jnp.diff(centers, axis=1, prepend=-jnp.inf) > 0  # bins left over repeat the last one
        std = search_config.noise_scale * jnp.std(centers, axis=1, where=is_distinct)
        plan = planner(
            params,
            search_key,
            root,
            initial,
            jnp.broadcast_to(std, initial.shape),
            (centers[:, 0], centers[:, -1]),
            evaluate_fn=evaluate_fn,
            num_candidates=plan_config.beam_width,
            num_iterations=search_config.num_iterations,
            noise_exponent=search_config.noise_exponent,
        )
        tokens = _encode_actions(params, plan.actions, spec)
        actions = tokenization.decode(params.discretizer, tokens, dims=dims)  # as the model has read them
        return plan.replace(action=actions[:, 0], actions=actions)

    return plan_fn
