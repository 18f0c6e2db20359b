"""The tree of the transformer's proposals holds what uncached passes predict."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sequence_planner import ONE_LAYER, SPEC, random_params, random_roots

from experiments.common import plain_search
from tt_jax import iql, planning, sequence_planner

pytest.importorskip("mctx")
from tt_jax import tree_planner  # noqa: E402

PLAN_CONFIG = sequence_planner.PlanConfig(horizon=4, beam_width=4, num_expand=1, window=(3, 2), discount=0.9)
GREEDY = {"action_cdf": 0.0, "action_top_k": 1}


def least_q(params, observation, action):
    return jnp.min(jax.vmap(iql.q_values, (0, None, None))(params.extra, observation, action), axis=(0, 1))


@pytest.mark.parametrize("guided", [False, True])
def test_a_tree_that_cannot_branch_averages_the_scores_of_uncached_plans_of_all_lengths(guided):
    # With one greedy proposal per node, simulation i reaches depth i, and the root's estimate is the mean of what the
    # simulations found: the rewards up to there and the value after. The window slides; one past is longer than it.
    plan_config = dataclasses.replace(PLAN_CONFIG, **GREEDY)
    guidance, plain = {}, {}
    num_stopped = 0
    if guided:
        iql_config = iql.IQLConfig(observation_dim=SPEC.observation_dim, action_dim=SPEC.action_dim, hidden_dims=(8, 8))
        learners = jax.vmap(functools.partial(iql.init, config=iql_config))(jax.random.split(jax.random.key(1), 2))
        guidance = sequence_planner.guide_by_q(discount=plan_config.discount)
        plain = {"score_fn": planning.score_by_q(least_q, discount=plan_config.discount)}
    plan_fn = jax.jit(tree_planner.make_tree_plan_fn(config=ONE_LAYER, plan_config=plan_config, **guidance))
    for seed, stop_logit in enumerate([-8.0] if guided else [-8.0, -1.0]):
        params = random_params(config=ONE_LAYER, seed=seed, stop_logit=stop_logit)
        if guided:
            params = params.replace(extra=learners.params)
        roots = random_roots(size=3, lengths=[0, 1, 3], seed=seed)
        plans = plan_fn(params, *roots)
        scores = []
        for length in range(1, plan_config.horizon + 1):
            shorter = dataclasses.replace(plan_config, horizon=length, beam_width=1)
            shorter_fn = plain_search.make_plan_fn(config=ONE_LAYER, plan_config=shorter, **plain)
            expected = shorter_fn(params, *roots)
            scores.append(expected.scores[:, 0])
        np.testing.assert_array_equal(plans.tokens[:, 0], expected.tokens[:, 0])
        np.testing.assert_allclose(plans.scores[:, 0], np.mean(scores, axis=0), rtol=1e-5, atol=2e-4)
        num_stopped += int((expected.tokens == SPEC.stop_token).any())
    assert num_stopped == (not guided)  # Q of a step that ends the episode counts in a beam search alone


def test_sampled_trees_of_environments_are_searched_each_on_its_own_in_one_program():
    plan_config = dataclasses.replace(PLAN_CONFIG, horizon=3, beam_width=12, num_expand=3)
    plan_fn = tree_planner.make_tree_plan_fn(config=ONE_LAYER, plan_config=plan_config)
    chex.clear_trace_counter()
    plan_fn = jax.jit(chex.assert_max_traces(plan_fn, n=1))
    params = random_params(config=ONE_LAYER)
    keys, context, observation = random_roots(size=2, lengths=[1, 2])
    plans = plan_fn(params, keys, context, observation)
    chex.assert_shape(plans.actions, (2, 1, SPEC.action_dim))
    assert np.isfinite(plans.scores).all()
    other = plan_fn(params, keys, context, observation.at[0].add(1.0))
    chex.assert_trees_all_close(*(jax.tree.map(lambda leaf: leaf[1], each) for each in (other, plans)), rtol=1e-5)
    assert (other.scores[0] != plans.scores[0]).any()
    swapped = plan_fn(params, *jax.tree.map(lambda leaf: leaf[::-1], (keys, context, observation)))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[::-1], swapped), plans, rtol=1e-5, atol=1e-5)


def test_what_does_not_suit_the_tree_is_refused():
    one_step = dataclasses.replace(PLAN_CONFIG, horizon=1, window=(1, 0))
    with pytest.raises(ValueError, match=r"window=\(1, 0\) must have a max of at least 2 for a tree search"):
        tree_planner.make_tree_plan_fn(config=ONE_LAYER, plan_config=one_step)
    with pytest.raises(ValueError, match="a tree search cannot leave out candidates; set unlikely_share to 0"):
        shared = dataclasses.replace(PLAN_CONFIG, unlikely_share=0.5)
        tree_planner.make_tree_plan_fn(config=ONE_LAYER, plan_config=shared)
    with pytest.raises(ValueError, match="goal-conditioned"):
        with_goals = dataclasses.replace(ONE_LAYER, goal_conditioned=True)
        tree_planner.make_tree_plan_fn(config=with_goals, plan_config=PLAN_CONFIG)
