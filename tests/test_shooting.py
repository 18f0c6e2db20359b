"""Shooting finds the best of the plans that a model samples, and prunes none on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_planning import DISCOUNT, drawn, follow, make_proposal
from transform_checks import check_transforms

from tt_jax import planning


def plan_of_digits(params, rng_key, state, step):
    """Propose the next digit of each beam's plan; the reward is looked up in `params` [H, 3]."""
    action = (state // 3**step % 3)[..., None]
    return make_proposal(action, params[step][action]), state[..., None]


def shoot(propose_fn, root, *, params=None, seed=0, **settings):
    """Plan for the roots [B, W]."""
    settings = {"advance_fn": follow, "discount": DISCOUNT, "num_plans": root.shape[1], "horizon": 4} | settings

    def plan(params, keys, root):
        return planning.shoot(params, keys, root, propose_fn=propose_fn, **settings)

    return jax.jit(plan)(params, jax.random.split(jax.random.key(seed), len(root)), root)


def test_shoot_returns_the_best_of_all_plans_and_the_mean_of_the_best():
    payoff = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    plans = np.arange(81)[:, None] // 3 ** np.arange(4)[None] % 3  # [W, H]
    totals = (payoff[np.arange(4)[None], plans] * DISCOUNT ** np.arange(4)[None]).sum(axis=1)
    best_first = np.argsort(-totals)
    for num_elites in (1, 5):
        got = shoot(plan_of_digits, jnp.arange(81)[None], params=jnp.asarray(payoff), num_elites=num_elites)
        np.testing.assert_allclose(got.scores[0], totals[best_first], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got.tokens[0, :, 0], plans[best_first[0]])
        np.testing.assert_allclose(got.actions[0, :, 0], plans[best_first[:num_elites]].mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(got.action, got.actions[:, 0])


def test_shoot_keeps_the_plan_that_begins_badly_and_a_narrow_beam_drops_it():
    # Whoever begins with action 0 gets 1 at once, whoever begins with action 1 gets 9 in the end; nobody can turn.
    payoff = jnp.asarray([[1.0, 0.0], [0.0, 0.0], [0.0, 9.0]])

    def propose(params, rng_key, state, step):  # places: action 0 or 1 was taken, or 2: both can be
        offered = jnp.broadcast_to(jnp.arange(params)[None, None], (*state.shape, params))
        action = jnp.where(state[..., None] == 2, offered, state[..., None])
        return make_proposal(action, payoff[step][action]), action

    settings = {"propose_fn": propose, "advance_fn": follow, "horizon": 3, "discount": 1.0}
    keys = jax.random.split(jax.random.key(0), 1)
    narrow = planning.beam_plan(2, keys, jnp.full([1, 1], 2), beam_width=1, num_expand=2, **settings)
    np.testing.assert_array_equal(narrow.scores, [[1.0]])
    got = planning.shoot(1, keys, jnp.arange(2)[None], num_plans=2, **settings)
    np.testing.assert_array_equal(got.scores, [[9.0, 1.0]])
    np.testing.assert_array_equal(got.actions[0, :, 0], [1, 1, 1])


def test_a_plan_whose_episode_ends_keeps_its_return_and_a_forbidden_one_never_comes_back():
    def propose(params, rng_key, state, step):  # plan 1 ends after its second reward of 3, the others get 1 per step
        reward = jnp.where(state == 1, 3.0, 1.0)[..., None]
        terminal = (state == 1)[..., None] & (step == 1)
        return make_proposal(state[..., None], reward, value=reward, terminal=terminal), state[..., None]

    def score(params, returns, proposal, step):
        scores = planning.score_by_value(1.0)(params, returns, proposal, step)
        return jnp.where((proposal.tokens[..., 0] == 2) & (step == 0), -jnp.inf, scores)

    got = shoot(propose, jnp.arange(3)[None], discount=1.0, score_fn=score, num_elites=3)
    np.testing.assert_array_equal(got.scores, [[6.0, 5.0, -np.inf]])
    np.testing.assert_array_equal(got.actions[0, :, 0], [0.5] * 4)  # of the two that exist


def test_sample_plans_tells_what_given_actions_are_worth_in_their_order():
    given = jnp.asarray([[[2, 0, 1, 1], [0, 1, 2, 0]]])  # [B, W, H]
    payoff = np.arange(12, dtype=np.float32).reshape(4, 3)

    def propose(params, rng_key, state, step):
        action = given[:, :, step, None]
        return make_proposal(action, params[step][action], value=jnp.full(action.shape, 10.0)), state[..., None]

    keys = jax.random.split(jax.random.key(0), 1)
    settings = {"propose_fn": propose, "advance_fn": follow, "horizon": 4, "num_plans": 2, "discount": 0.5}
    scores, actions, tokens = planning.sample_plans(jnp.asarray(payoff), keys, jnp.zeros([1, 2]), **settings)
    end = 0.5**4 * 10
    np.testing.assert_allclose(scores, [[2 + 3 / 2 + 7 / 4 + 10 / 8 + end, 0 + 4 / 2 + 8 / 4 + 9 / 8 + end]])
    np.testing.assert_array_equal(actions[..., 0], given)
    np.testing.assert_array_equal(tokens[..., 0], given)


def test_shoot_depends_on_its_own_root_and_key_alone_and_runs_under_transformations():
    def plan(params, key, root):
        settings = {"horizon": 3, "num_plans": 4, "discount": DISCOUNT, "num_elites": 2}
        return planning.shoot(params, key[None], root[None], propose_fn=one_of_drawn, advance_fn=follow, **settings)

    def one_of_drawn(params, rng_key, state, step):
        proposal, place = drawn(params, rng_key, state, step)
        return make_proposal(proposal.action[..., :1, 0], proposal.reward[..., :1]), place[..., :1]

    keys, roots = jax.random.split(jax.random.key(0), 3), jnp.arange(12).reshape(3, 4)
    alone = check_transforms(plan, jnp.zeros(3), keys, roots)
    settings = {"horizon": 3, "num_elites": 2, "params": 0.0}
    together = shoot(one_of_drawn, roots, **settings)
    np.testing.assert_array_equal(together.tokens, alone.tokens[:, 0])
    np.testing.assert_allclose(together.scores, alone.scores[:, 0], rtol=1e-5, atol=1e-6)


def test_impossible_sizes_are_refused():
    root = jnp.zeros([1, 4], jnp.int32)
    with pytest.raises(ValueError, match="num_elites=5 must be between 1 and num_plans=4"):
        shoot(drawn, root, num_elites=5)
    with pytest.raises(ValueError, match="horizon=0 and num_plans=4 must both be at least 1"):
        shoot(drawn, root, horizon=0)
    with pytest.raises(AssertionError, match=r"\(1, 4, 3\)"):  # one candidate per plan
        shoot(drawn, root, params=0.0)
