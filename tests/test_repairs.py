"""Repairs of the score keep a search to actions that the model finds likely."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_planning import DISCOUNT, every_action, follow, make_proposal
from test_sequence_planner import ONE_LAYER, SPEC, random_params, random_roots
from transform_checks import check_transforms

from tt_jax import action_planner, planning, sequence_planner, transformer

LOG_PROBS = jnp.log(jnp.asarray([[0.9, 0.1], [0.2, 0.8]]))  # by step and action
REWARDS = jnp.asarray([[0.0, 1.0], [2.0, 0.0]])


def propose_both(params, rng_key, state, step):
    """Propose two actions in each beam."""
    action = every_action(state, 2)
    proposal = make_proposal(action, REWARDS[step][action], value=jnp.full(action.shape, 5.0))
    return proposal.replace(log_prob=LOG_PROBS[step][action]), action


def best_by_hand(weight, q=None):
    """Return the best of the four plans, and its score."""
    scores = {}
    for first in range(2):
        for second in range(2):
            last = q[second] if q else float(REWARDS[1, second]) + DISCOUNT * 5.0
            bonus = float(LOG_PROBS[0, first]) + DISCOUNT * float(LOG_PROBS[1, second])
            scores[first, second] = float(REWARDS[0, first]) + DISCOUNT * last + weight * bonus
    best = max(scores, key=scores.get)
    return best, scores[best]


@pytest.mark.parametrize("weight, plan", [(0.0, (1, 0)), (0.3, (1, 0)), (0.6, (0, 0)), (2.0, (0, 1))])
def test_the_likelier_the_actions_are_to_be_the_less_reward_is_searched(weight, plan):
    score_fn = planning.score_by_value(DISCOUNT)
    propose, score = planning.favour_likely(propose_both, score_fn, weight=weight, discount=DISCOUNT)
    settings = {"horizon": 2, "beam_width": 4, "num_expand": 2, "discount": DISCOUNT, "advance_fn": follow}
    root, keys = jnp.zeros([1, 4], jnp.int32), jax.random.split(jax.random.key(0), 1)
    plans = planning.beam_plan(None, keys, root, propose_fn=propose, score_fn=score, **settings)
    best, expected = best_by_hand(weight)
    assert best == plan
    np.testing.assert_array_equal(plans.actions[0, :, 0], best)
    np.testing.assert_allclose(plans.scores[0, 0], expected, rtol=1e-5)


def test_the_last_action_counts_too_where_q_replaces_its_reward():
    q = [6.0, 5.5]
    score_fn = planning.score_by_q(
        lambda params, observation, action: jnp.asarray(q)[action[..., 0].astype(int)], discount=DISCOUNT
    )
    propose, score = planning.favour_likely(propose_both, score_fn, weight=0.7, discount=DISCOUNT)
    settings = {"horizon": 2, "beam_width": 4, "num_expand": 2, "discount": DISCOUNT, "advance_fn": follow}
    root, keys = jnp.zeros([1, 4], jnp.int32), jax.random.split(jax.random.key(0), 1)
    plans = planning.beam_plan(None, keys, root, propose_fn=propose, score_fn=score, **settings)
    best, expected = best_by_hand(0.7, q)
    assert best == (0, 1)
    np.testing.assert_array_equal(plans.actions[0, :, 0], best)
    np.testing.assert_allclose(plans.scores[0, 0], expected, rtol=1e-5)


def test_the_least_likely_share_of_an_environments_candidates_is_left_out():
    log_prob = jnp.asarray([[[-1.0, -4.0], [-2.0, -3.0]], [[-5.0, -5.0], [-5.0, -9.0]]])  # [B, W, K]
    returns = jnp.asarray([[0.0, 0.0], [0.0, -jnp.inf]])  # a beam that does not exist is not counted
    proposal = make_proposal(jnp.zeros([2, 2, 2], int), jnp.ones([2, 2, 2])).replace(log_prob=log_prob)

    def kept(share):
        score_fn = planning.drop_unlikely(planning.score_by_value(1.0), share=share)
        return np.isfinite(score_fn(None, returns, proposal, 0)).astype(int)

    np.testing.assert_array_equal(kept(0.0)[0], [[1, 1], [1, 1]])
    np.testing.assert_array_equal(kept(0.5)[0], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(kept(0.99)[0], [[1, 0], [0, 0]])
    for share in (0.0, 0.99):
        np.testing.assert_array_equal(kept(share)[1, 0], [1, 1])  # ties all stay
    score_fn = planning.drop_unlikely(planning.score_by_value(1.0), share=0.5)
    check_transforms(
        lambda returns, proposal: score_fn(None, returns[None], jax.tree.map(lambda leaf: leaf[None], proposal), 0),
        returns,
        proposal,
    )


@functools.cache
def shoot_fn(weight):
    """Return the compiled plan(ends, params, *roots) of two steps, which fit the window, with the likelihood's weight.

    If it `ends`, the last token of the second observation says that all is over.
    """
    plan_config = sequence_planner.PlanConfig(
        horizon=2, beam_width=1, num_expand=1, window=(3, 2), discount=0.9, action_cdf=0.0, likelihood_weight=weight
    )

    def plan(ends, *arguments):
        def draw_fn(rng_key, logits, call_index):
            is_last = call_index == SPEC.transition_dim - 1
            return jnp.full(logits.shape[:-1], jnp.where(ends & is_last, SPEC.stop_token, 3))

        settings = {"config": ONE_LAYER, "plan_config": plan_config, "draw_fn": draw_fn}
        return action_planner.make_shoot_plan_fn(**settings)(*arguments)

    return jax.jit(plan)


@pytest.mark.parametrize("ends", [False, True])
def test_the_transformers_own_probabilities_are_added_to_the_score_until_the_episode_ends(ends):
    # One pass over all tokens gives the probabilities.
    params, roots = random_params(config=ONE_LAYER), random_roots(size=0, lengths=[0, 0])
    plain, plans = (shoot_fn(weight)(ends, params, *roots) for weight in (0.0, 0.5))
    np.testing.assert_array_equal(plain.tokens, plans.tokens)
    assert (plans.tokens == SPEC.stop_token).any() == ends
    tokens = plans.tokens.reshape(2, -1)
    logits = transformer.apply(params.transformer, tokens, config=ONE_LAYER)
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    bonus = 0.0
    for step in range(1 if ends else 2):
        for dim in range(SPEC.observation_dim, SPEC.observation_dim + SPEC.action_dim):
            place = step * SPEC.transition_dim + dim
            bonus += 0.9**step * log_probs[np.arange(2), place - 1, tokens[:, place]]
    np.testing.assert_allclose(plans.scores[:, 0] - plain.scores[:, 0], 0.5 * bonus, rtol=1e-4, atol=1e-4)


def test_the_share_that_is_left_out_is_checked():
    with pytest.raises(ValueError, match=r"unlikely_share=1.0 must be in \[0, 1\)"):
        sequence_planner.PlanConfig(unlikely_share=1.0)
