"""Tree search finds the best first action of models whose tree is known."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_planning import DISCOUNT, every_action, follow, make_proposal
from transform_checks import check_transforms

from tt_jax import planning

pytest.importorskip("mctx")
from tt_jax import tree_search  # noqa: E402

NUM_STATES, NUM_ACTIONS = 6, 3


def search(propose_fn, root, *, params=None, seed=0, **settings):
    """Plan for environments whose states are `root`, of leaves [B, 1]."""
    num_envs = len(jax.tree.leaves(root)[0])
    settings = {"advance_fn": follow, "discount": DISCOUNT, "horizon": 4, "num_simulations": 100} | settings

    def plan(params, keys, root):
        return tree_search.tree_search(params, keys, root, propose_fn=propose_fn, **settings)

    return jax.jit(plan)(params, jax.random.split(jax.random.key(seed), num_envs), root)


def test_the_treasure_is_found_that_greedy_misses():
    # Action a gives 3 - a at once; only after action 1, a treasure is behind action 0.
    def propose(params, rng_key, state, step):
        action = every_action(state, 2)
        treasure = (state == 1)[..., None] & (action == 0)
        reward = jnp.where((state == 8)[..., None], 3.0 - action, 10.0 * treasure)
        return make_proposal(action, reward), jnp.where((state == 8)[..., None], action, 9)

    shallow, deep = (search(propose, jnp.full([1, 1], 8), horizon=horizon) for horizon in (1, 3))
    np.testing.assert_array_equal(shallow.action, [[0.0]])
    np.testing.assert_allclose(shallow.scores, [[3.0, 2.0]], rtol=1e-6)
    np.testing.assert_array_equal(deep.action, [[1.0]])
    np.testing.assert_array_equal(deep.tokens, [[[1]]])
    assert 3.0 < deep.scores[0, 0] <= 2.0 + DISCOUNT * 10.0


def tables(num_envs=3):
    """Return a random chain for each environment: rewards [B, S, A], values [B, S], successors [S, A]."""
    generator = np.random.default_rng(0)
    arrays = {
        "rewards": generator.normal(size=(num_envs, NUM_STATES, NUM_ACTIONS)).astype(np.float32),
        "values": generator.normal(size=(num_envs, NUM_STATES)).astype(np.float32),
        "successor": generator.integers(NUM_STATES, size=(NUM_STATES, NUM_ACTIONS)),
    }
    return jax.tree.map(jnp.asarray, arrays)


def propose_in_chain(params, rng_key, state, step):
    """Propose all actions; the state holds the environment and the place."""
    env, place = state["env"][..., None], state["place"][..., None]
    action = every_action(state["place"], NUM_ACTIONS)
    after = params["successor"][place, action]
    proposal = make_proposal(action, params["rewards"][env, place, action], params["values"][env, after])
    return proposal, {"env": jnp.broadcast_to(env, after.shape), "place": after}


def advance_in_chain(params, rng_key, state, pending, beam, expansion, step):
    return jax.tree.map(lambda leaf: planning.take_candidates(leaf, beam, expansion), pending)


def chain_roots(num_envs=3):
    return {"env": jnp.arange(num_envs)[:, None], "place": jnp.zeros([num_envs, 1], jnp.int32)}


def test_with_many_simulations_the_brute_force_optimum_is_found():
    arrays = tables()
    horizon = 3
    totals = np.full((3, NUM_ACTIONS), -np.inf)
    for env, actions in itertools.product(range(3), itertools.product(range(NUM_ACTIONS), repeat=horizon)):
        place, total = 0, 0.0
        for step, action in enumerate(actions):
            total += DISCOUNT**step * arrays["rewards"][env, place, action]
            place = arrays["successor"][place, action]
        total += DISCOUNT**horizon * arrays["values"][env, place]
        totals[env, actions[0]] = max(totals[env, actions[0]], total)

    settings = {"advance_fn": advance_in_chain, "horizon": horizon, "num_simulations": 400}
    plans = search(propose_in_chain, chain_roots(), params=arrays, **settings)
    np.testing.assert_array_equal(plans.action[:, 0], np.argmax(totals, axis=1))
    assert (plans.scores <= np.sort(totals, axis=1)[:, ::-1] + 1e-5).all()


def test_simulations_spread_over_the_candidates_and_those_never_tried_have_no_score():
    def propose(params, rng_key, state, step):
        action = every_action(state, 4)
        return make_proposal(action, 1.0 + action, value=10.0 * action), action

    plans = search(propose, jnp.zeros([1, 1], jnp.int32), horizon=1, num_simulations=2)
    assert np.isneginf(plans.scores[0]).sum() == 2
    plans = search(propose, jnp.zeros([1, 1], jnp.int32), horizon=1, num_simulations=4)
    np.testing.assert_allclose(plans.scores[0], [4 + 27, 3 + 18, 2 + 9, 1], rtol=1e-6)
    np.testing.assert_array_equal(plans.action, [[3.0]])


def test_nothing_is_won_after_the_end_of_an_episode():
    def propose(params, rng_key, state, step):  # action 0 gives 2 and ends, action 1 gives 1, each time
        action = every_action(state, 2)
        over = action == 0
        reward = jnp.where((state == 1)[..., None], 100.0, jnp.where(over, 2.0, 1.0))
        return make_proposal(action, reward, value=100.0 * over, terminal=over), over.astype(jnp.int32)

    short, long = (search(propose, jnp.zeros([1, 1], jnp.int32), horizon=horizon, discount=1.0) for horizon in (1, 4))
    np.testing.assert_array_equal([short.action[0, 0], long.action[0, 0]], [0, 1])
    assert long.scores.max() <= 5.0


def test_a_q_function_stands_for_what_follows():
    # By rewards and values action 0 is best, by Q action 2; the value of a candidate is what Q holds beyond its reward.
    def propose(params, rng_key, state, step):
        action = every_action(state, 3)
        return make_proposal(action, 2.0 - action, value=2.0 - action), action

    def q_fn(params, observation, action):
        return 7.0 * action[..., 0]

    settings = {"horizon": 1, "score_fn": planning.score_by_q(q_fn, discount=DISCOUNT)}
    plans = search(propose, jnp.zeros([1, 1], jnp.int32), **settings)
    np.testing.assert_array_equal(plans.action, [[2.0]])
    np.testing.assert_allclose(plans.scores, [[14.0, 7.0, 0.0]], rtol=1e-5, atol=1e-5)


def test_a_smaller_embedding_gives_the_same_plans():
    def propose(params, rng_key, state, step):
        return propose_in_chain(params, rng_key, state["small"], step)

    def advance(params, rng_key, state, pending, beam, expansion, step):
        assert set(state) == {"small"}
        small = advance_in_chain(params, rng_key, state["small"], pending, beam, expansion, step)
        return {"small": small, "large": jnp.zeros([1, 1000])}

    settings = {"params": tables(), "horizon": 3, "num_simulations": 20}
    plain = search(propose_in_chain, chain_roots(), advance_fn=advance_in_chain, **settings)
    root = {"small": chain_roots(), "large": jnp.zeros([3, 1, 1000])}
    settings |= {"embed_fn": lambda state: {"small": state["small"]}}
    chex.assert_trees_all_equal(search(propose, root, advance_fn=advance, **settings), plain)


def test_a_plan_depends_on_its_own_root_and_key_alone_and_runs_under_transformations():
    def propose(params, rng_key, state, step):
        action = jax.vmap(lambda key: jax.random.randint(key, [1, 4], 0, 1000))(rng_key)
        reward = jnp.sin(action.astype(jnp.float32) + state[..., None] + params)
        return make_proposal(action, reward), state[..., None] + action

    settings = {"propose_fn": propose, "advance_fn": follow, "horizon": 3, "num_simulations": 12, "discount": DISCOUNT}

    def plan(params, key, root):
        return tree_search.tree_search(params, key[None], root[None], **settings)

    keys, roots = jax.random.split(jax.random.key(0), 3), jnp.arange(3)[:, None]
    alone = check_transforms(plan, jnp.zeros(3), keys, roots)
    together = tree_search.tree_search(0.0, keys, roots, **settings)
    chex.assert_trees_all_close(together, jax.tree.map(lambda leaf: leaf[:, 0], alone), rtol=1e-5, atol=1e-6)
    assert len(set(np.asarray(together.action).reshape(-1).tolist())) == 3


def test_impossible_settings_are_refused():
    root = jnp.zeros([1, 1], jnp.int32)
    with pytest.raises(ValueError, match="horizon=0 and num_simulations=100 must both be at least 1"):
        search(propose_in_chain, root, horizon=0)
    with pytest.raises(ValueError, match=r"discount=0.0 must be in \(0, 1\]"):
        search(propose_in_chain, root, discount=0.0)
