"""Planners over whole sequences of actions score them with the transformer as uncached passes do."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sequence_planner import ONE_LAYER, SPEC, draw_from, random_params, random_roots, random_table

from experiments.common import plain_search
from tt_jax import action_planner, action_search, iql, planning, sequence_planner, tokenization, transformer, types

# Observations and rewards are the likeliest ones, so that actions alone tell what follows; and the window slides.
PLAN_CONFIG = sequence_planner.PlanConfig(horizon=4, beam_width=6, num_expand=2, window=(3, 2), action_cdf=0.0)
SEARCH_CONFIG = action_planner.SearchConfig(num_iterations=2, elite_share=0.5)
ACTION_DIMS = slice(SPEC.observation_dim, SPEC.observation_dim + SPEC.action_dim)
MAKERS = {"mppi": action_planner.make_mppi_plan_fn, "cem": action_planner.make_cem_plan_fn}


def plain_scores(tokens, params, roots, **settings):
    """Return what uncached passes say of plans with the actions in `tokens` [B, H, D]: their tokens and scores [B]."""
    given = np.asarray(tokens)[..., ACTION_DIMS].reshape(len(tokens), -1)  # [B, H * A]

    def draw_fn(rng_key, logits, call_index):
        step, index = divmod(call_index, SPEC.transition_dim)
        if index < SPEC.action_dim:
            return np.broadcast_to(given[:, step * SPEC.action_dim + index, None, None], logits.shape[:-1])
        return np.argmax(logits, axis=-1)

    plan_config = dataclasses.replace(PLAN_CONFIG, beam_width=1, num_expand=1)
    settings = {"config": ONE_LAYER, "plan_config": plan_config, "draw_fn": draw_fn} | settings
    plans = plain_search.make_plan_fn(**settings)(params, *roots)
    return plans.tokens, plans.scores[:, 0]


def test_shooting_finds_the_best_of_the_plans_that_uncached_passes_sample_one_by_one():
    params, roots = random_params(config=ONE_LAYER, stop_logit=-1.0), random_roots(size=2, lengths=[0, 2])
    plan_config = dataclasses.replace(PLAN_CONFIG, observation_top_k=0, reward_top_k=0)
    table = random_table(plan_config, 2, seed=3)  # [calls, B, W, K]

    def shoot(table, *arguments):
        settings = {"config": ONE_LAYER, "plan_config": plan_config, "draw_fn": draw_from(table)}
        return action_planner.make_shoot_plan_fn(**settings)(*arguments)

    got = jax.jit(shoot)(table[..., :1], params, *roots)
    one = dataclasses.replace(plan_config, beam_width=1, num_expand=1)
    alone = []
    for beam in range(plan_config.beam_width):
        draw_fn = draw_from(np.asarray(table)[:, :, beam : beam + 1, :1])
        plan_fn = plain_search.make_plan_fn(config=ONE_LAYER, plan_config=one, draw_fn=draw_fn)
        alone.append(plan_fn(params, *roots))
    scores = np.stack([plan.scores[:, 0] for plan in alone], axis=1)
    np.testing.assert_allclose(got.scores, -np.sort(-scores, axis=1), rtol=1e-5, atol=2e-4)
    for env, best in enumerate(np.argmax(scores, axis=1)):
        np.testing.assert_array_equal(got.tokens[env], alone[best].tokens[env])
        np.testing.assert_allclose(got.actions[env], alone[best].actions[env], rtol=1e-6)


def least_q(params, observation, action):
    return jnp.min(jax.vmap(iql.q_values, (0, None, None))(params.extra, observation, action), axis=(0, 1))


@pytest.mark.parametrize("name, guided", [("mppi", False), ("cem", True)])
def test_the_scores_of_given_actions_are_those_of_uncached_passes(name, guided):
    params, roots = random_params(config=ONE_LAYER, stop_logit=-1.0), random_roots(size=2, lengths=[2, 0])
    guidance, plain = {}, {}
    if guided:
        iql_config = iql.IQLConfig(observation_dim=SPEC.observation_dim, action_dim=SPEC.action_dim, hidden_dims=(8, 8))
        learners = jax.vmap(functools.partial(iql.init, config=iql_config))(jax.random.split(jax.random.key(1), 2))
        params = params.replace(extra=learners.params)
        guidance = sequence_planner.guide_by_q(discount=PLAN_CONFIG.discount)
        plain = {"score_fn": planning.score_by_q(least_q, discount=PLAN_CONFIG.discount)}
    plan_fn = MAKERS[name](search_config=SEARCH_CONFIG, config=ONE_LAYER, plan_config=PLAN_CONFIG, **guidance)
    plans = jax.jit(plan_fn)(params, *roots)
    tokens, scores = plain_scores(plans.tokens, params, roots, **plain)
    np.testing.assert_array_equal(plans.tokens, tokens)
    np.testing.assert_allclose(plans.scores[:, 0], scores, rtol=1e-5, atol=2e-4)
    assert np.isfinite(plans.scores).all() and (np.diff(plans.scores, axis=1) <= 0).all()
    actions = tokenization.encode(params.discretizer, plans.actions, dims=ACTION_DIMS)
    np.testing.assert_array_equal(plans.actions, tokenization.decode(params.discretizer, actions, dims=ACTION_DIMS))
    if name == "cem":  # the plan is the best candidate
        np.testing.assert_array_equal(actions, plans.tokens[..., ACTION_DIMS])


@pytest.fixture(scope="module")
def cem_plans():
    """Return the jitted function of plans by CEM and that of shooting; they count their traces."""
    settings = {"config": ONE_LAYER, "plan_config": PLAN_CONFIG}
    cem_fn = action_planner.make_cem_plan_fn(search_config=SEARCH_CONFIG, **settings)
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(cem_fn, n=1))


def test_cem_starts_from_the_given_plan_and_never_predicts_less(cem_plans):
    params, roots = random_params(config=ONE_LAYER), random_roots(size=2, lengths=[1, 2])
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(SPEC.num_bins, size=(2, PLAN_CONFIG.horizon, SPEC.action_dim)))
    for _ in range(2):
        initial = tokenization.decode(params.discretizer, tokens, dims=ACTION_DIMS)
        padded = jnp.pad(tokens, [(0, 0), (0, 0), (SPEC.observation_dim, 2)])
        plans = cem_plans(params, *roots, initial)
        before = plain_scores(padded, params, roots)[1]
        assert (plans.scores[:, 0] >= before - 1e-4).all() and (plans.scores[:, 0] > before + 1e-3).any()
        tokens = tokenization.encode(params.discretizer, action_search.shift(plans.actions), dims=ACTION_DIMS)


def test_an_environment_without_a_last_plan_starts_from_shooting_beside_one_that_has_one(cem_plans):
    params, (keys, context, observation) = random_params(config=ONE_LAYER), random_roots(size=2, lengths=[1, 2])
    settings = {"config": ONE_LAYER, "plan_config": PLAN_CONFIG}
    start_keys = jax.vmap(jax.random.split)(keys)[:, 0]
    shot = jax.jit(action_planner.make_shoot_plan_fn(**settings))(params, start_keys, context, observation).actions
    last = jnp.zeros_like(shot)
    plans = cem_plans(params, keys, context, observation, last.at[0].set(jnp.nan))
    expected = cem_plans(params, keys, context, observation, jnp.stack([shot[0], last[1]]))
    chex.assert_trees_all_equal(plans, expected)
    from_last = cem_plans(params, keys, context, observation, last)
    assert (from_last.scores[0] != plans.scores[0]).any()


def test_predictions_of_given_plans_are_those_of_uncached_passes(cem_plans):
    params, roots = random_params(config=ONE_LAYER), random_roots(size=2, lengths=[1, 2])
    plans = cem_plans(params, *roots, jnp.zeros([2, 4, SPEC.action_dim]))
    steps = jax.jit(action_planner.make_predict_fn(config=ONE_LAYER, plan_config=PLAN_CONFIG))(
        params, *roots, plans.actions
    )
    tokens, scores = plain_scores(plans.tokens, params, roots)
    np.testing.assert_array_equal(steps.tokens, tokens)
    powers = PLAN_CONFIG.discount ** np.arange(PLAN_CONFIG.horizon)
    rewards, values = np.asarray(steps.reward), np.asarray(steps.value)
    got = np.sum(powers * rewards, axis=1) + PLAN_CONFIG.discount * powers[-1] * values[:, -1]
    np.testing.assert_allclose(got, scores, rtol=1e-5, atol=2e-4)
    observations = tokenization.decode(params.discretizer, tokens[..., : SPEC.observation_dim], dims=slice(3))
    np.testing.assert_allclose(steps.observation, observations, rtol=1e-6)


def test_the_plan_of_an_environment_does_not_depend_on_its_neighbours(cem_plans):
    params = random_params(config=ONE_LAYER)
    (keys, context, observation), initial = random_roots(size=2, lengths=[1, 2]), jnp.zeros([2, 4, SPEC.action_dim])
    plans = cem_plans(params, keys, context, observation, initial)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], (keys, context, observation, initial))
    again = cem_plans(params, *swapped)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[::-1], again), plans, rtol=1e-5, atol=1e-5)
    other = cem_plans(params, keys, context, observation.at[0].add(1.0), initial)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf: leaf[1], each) for each in (other, plans)))
    assert (other.actions[0] != plans.actions[0]).any()


def test_policies_without_search_take_the_likeliest_the_median_or_any_action():
    size = 2000
    params = random_params(config=ONE_LAYER)
    observation = jnp.broadcast_to(jnp.asarray([[0.3, -1.0, 0.2]]), (size, SPEC.observation_dim))
    context = types.Context(tokens=jnp.zeros([size, 0, SPEC.transition_dim], jnp.int32), length=jnp.zeros(size, int))
    keys = jax.random.split(jax.random.key(0), size)

    observed = tokenization.encode(params.discretizer, observation, dims=slice(SPEC.observation_dim))[:1]
    probs = []
    for first in range(SPEC.num_bins + 1):  # of the second action dimension, after each first one
        tokens = jnp.concatenate([observed, jnp.full([1, 1], first)], axis=1)
        logits = transformer.apply(params.transformer, tokens, config=ONE_LAYER)[0, -2:]
        probs.append(np.asarray(jax.nn.softmax(logits, axis=-1)))
    first_probs, second_probs = probs[0][0], np.stack(probs)[:, 1]

    def act(policy):
        plan_config = sequence_planner.policy_config(sequence_planner.PlanConfig(), policy)
        plan_fn = sequence_planner.make_plan_fn(config=ONE_LAYER, plan_config=plan_config)
        plans = jax.jit(plan_fn)(params, keys, context, observation)
        chex.assert_shape(plans.actions, (size, 1, SPEC.action_dim))
        return np.asarray(plans.tokens)[:, 0, ACTION_DIMS]

    likeliest = np.argmax(first_probs)
    np.testing.assert_array_equal(act("greedy"), np.tile([likeliest, np.argmax(second_probs[likeliest])], (size, 1)))
    median = np.argmax(np.cumsum(first_probs) >= 0.5)
    after = np.argmax(np.cumsum(second_probs[median]) >= 0.5)
    np.testing.assert_array_equal(act("median"), np.tile([median, after], (size, 1)))
    counts = np.zeros([SPEC.num_bins + 1] * 2)
    np.add.at(counts, tuple(act("sample").T), 1)
    expected = first_probs[:, None] * second_probs
    assert (np.abs(counts - size * expected) <= 4 * np.sqrt(size * expected) + 1).all()
    with pytest.raises(ValueError, match='policy="best" must be one of sample, median, greedy'):
        sequence_planner.policy_config(PLAN_CONFIG, "best")


def test_what_does_not_suit_the_model_is_refused():
    with_goals = dataclasses.replace(ONE_LAYER, goal_conditioned=True)
    for make in (action_planner.make_shoot_plan_fn, *MAKERS.values()):
        with pytest.raises(ValueError, match="goal-conditioned"):
            make(config=with_goals, plan_config=PLAN_CONFIG)
    plan_fn = action_planner.make_cem_plan_fn(config=ONE_LAYER, plan_config=PLAN_CONFIG)
    with pytest.raises(ValueError, match=r"initial has shape \(1, 3, 2\), expected \(1, 4, 2\)"):
        short = jnp.zeros([1, 3, SPEC.action_dim])
        jax.eval_shape(plan_fn, random_params(config=ONE_LAYER), *random_roots(size=1, lengths=[1]), short)
