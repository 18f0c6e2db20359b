"""Beam search finds the best plan of models of a few lines."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transform_checks import check_transforms

from tt_jax import planning, types

DISCOUNT = 0.9


def make_proposal(action, reward, value=None, terminal=None):
    """Return a Proposal from actions and rewards [B, W, K], with value 0 and nobody terminal by default."""
    zeros = jnp.zeros_like(reward)
    return types.Proposal(
        observation=jnp.zeros([*reward.shape[:2], 1]),
        action=action[..., None].astype(jnp.float32),
        reward=reward,
        value=zeros if value is None else value,
        log_prob=zeros,
        terminal=zeros.astype(bool) if terminal is None else terminal,
        tokens=action[..., None].astype(jnp.int32),
    )


def every_action(state, num_actions):
    """Propose all actions in each beam [B, W] of `state`."""
    return jnp.broadcast_to(jnp.arange(num_actions)[None, None], (*state.shape, num_actions))


def follow(params, rng_key, state, pending, beam, expansion, step):
    """Go on in the states [B, W, K] that `pending` holds."""
    return planning.take_candidates(pending, beam, expansion)


def search(propose_fn, root, *, params=None, seed=0, **settings):
    """Plan for the roots [B, W]; `root` is the model's state."""
    num_envs, width = jax.tree.leaves(root)[0].shape[:2]
    settings = {"advance_fn": follow, "discount": DISCOUNT, "beam_width": width} | settings

    def plan(params, keys, root):
        return planning.beam_plan(params, keys, root, propose_fn=propose_fn, **settings)

    return jax.jit(plan)(params, jax.random.split(jax.random.key(seed), num_envs), root)


def test_beam_plan_finds_the_reward_that_greedy_misses():
    # At the fork, action a gives the reward 3 - a; only the path of action 1 holds a treasure, behind action 0.
    def propose(params, rng_key, state, step):
        action = every_action(state["place"], 2) + 2 * state["first"][..., None] * (step == 0)
        treasure = (state["place"][..., None] == 1) & (action == 0) & (step == 1)
        reward = jnp.where(step == 0, 3.0 - action, 10.0 * treasure)
        place = jnp.where(step == 0, action, 9)
        return make_proposal(action, reward), place

    def advance(params, rng_key, state, pending, beam, expansion, step):
        return {"place": follow(params, rng_key, state, pending, beam, expansion, step), "first": state["first"]}

    def solve(width):
        root = {"place": jnp.full([1, width], 8), "first": jnp.arange(width)[None]}  # beam w tries actions 2w, 2w + 1
        return search(propose, root, advance_fn=advance, num_expand=2, horizon=3)

    greedy, plans = solve(1), solve(2)
    np.testing.assert_allclose(greedy.scores, [[3.0]])
    np.testing.assert_array_equal(plans.actions[0, :2, 0], [1, 0])
    np.testing.assert_allclose(plans.scores[0, 0], 2.0 + DISCOUNT * 10.0)
    np.testing.assert_array_equal(plans.action, [[1.0]])
    np.testing.assert_array_equal(plans.tokens, plans.actions.astype(int))


def test_a_value_shows_the_way_where_rewards_come_too_late():
    # A line on which moving right pays 1 per place, but only after the horizon; the value knows.
    def propose(params, rng_key, state, step):
        action = every_action(state, 3)
        place = state[..., None] + action - 1
        return make_proposal(action, jnp.where(place < 0, 0.5, 0.0), value=place.astype(jnp.float32)), place

    plans = search(propose, jnp.zeros([1, 1], jnp.int32), num_expand=3, horizon=4)
    np.testing.assert_array_equal(plans.actions[0, :, 0], [2, 2, 2, 2])
    np.testing.assert_allclose(plans.scores, [[DISCOUNT**4 * 4]], rtol=1e-6)


def test_a_q_function_counts_once_and_from_its_own_step_on():
    # By hand: rewards 1, 2, 3 so far are worth 1 + 0.9 * 2 + 0.81 * 3, and Q stands for the fourth step and after.
    def q_fn(params, observation, action):
        return params * observation[..., 0] + action[..., 0]

    returns = jnp.asarray([[1 + 0.9 * 2 + 0.81 * 3]])
    proposal = make_proposal(jnp.asarray([[[0, 5]]]), jnp.full([1, 1, 2], 100.0))
    proposal = proposal.replace(observation=jnp.full([1, 1, 1], 7.0))
    score_fn = planning.score_by_q(q_fn, discount=0.9)
    scores = score_fn(2.0, returns, proposal, 3)
    np.testing.assert_allclose(scores, [[[5.23 + 0.729 * 14, 5.23 + 0.729 * 19]]], rtol=1e-6)


def test_the_q_function_of_a_chain_leads_to_a_reward_beyond_the_horizon():
    # A ring of 10 places; the reward is 1 for stepping onto place 0, 6 steps ahead to the right, 4 to the left.
    num_places, horizon = 10, 2
    value = np.zeros(num_places)
    for _ in range(100):
        after = {move: [(place + move) % num_places for place in range(num_places)] for move in (-1, 1)}
        q = {move: np.array([(p == 0) + DISCOUNT * value[p] * (p != 0) for p in after[move]]) for move in (-1, 1)}
        value = np.maximum(q[-1], q[1])
    table = jnp.asarray(np.stack([q[-1], q[1]], axis=-1), jnp.float32)

    def propose(params, rng_key, state, step):
        action = every_action(state, 2)
        proposal = make_proposal(action, jnp.zeros(action.shape))
        after = (state[..., None] + 2 * action - 1) % num_places
        return proposal.replace(observation=state[..., None].astype(jnp.float32)), after

    def q_fn(params, observation, action):
        return params[observation[..., 0].astype(int), action[..., 0].astype(int)]

    score_fn = planning.score_by_q(q_fn, discount=DISCOUNT)
    plans = search(propose, jnp.full([1, 4], 4), params=table, num_expand=2, horizon=horizon, score_fn=score_fn)
    np.testing.assert_array_equal(plans.actions[0, :, 0], [0, 0])
    np.testing.assert_allclose(plans.scores[0, 0], DISCOUNT**3, rtol=1e-6)


def test_the_mean_of_the_elites_is_returned_step_by_step_without_plans_that_do_not_exist():
    def propose(params, rng_key, state, step):  # beam w starts with action w, and goes on with its square
        action = jnp.where(step == 0, state, state**2)[..., None]
        return make_proposal(action, jnp.where(step == 0, action, 0).astype(jnp.float32)), state[..., None]

    def score(params, returns, proposal, step):  # beam 0 drops out
        return jnp.where(proposal.action[..., 0] == 0, -jnp.inf, returns[..., None] + proposal.reward)

    root = jnp.arange(5)[None]
    for num_elites, expected in [(1, [4, 16]), (2, [3.5, 12.5]), (4, [2.5, 7.5]), (5, [2.5, 7.5])]:
        plans = search(propose, root, num_expand=1, horizon=2, score_fn=score, num_elites=num_elites)
        np.testing.assert_allclose(plans.actions[0, :, 0], expected)
        np.testing.assert_allclose(plans.action[0, 0], expected[0])
        np.testing.assert_array_equal(plans.tokens[0, :, 0], [4, 16])  # of the best alone
    with pytest.raises(ValueError, match="num_elites=6 must be between 1 and beam_width=5"):
        search(propose, root, num_expand=1, horizon=2, num_elites=6)


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_with_a_beam_for_every_plan_the_brute_force_optimum_is_found(discount):
    # Beam w follows plan w: its digits are the actions.
    num_envs, num_states, num_actions, horizon = 3, 5, 3, 4
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(num_envs, horizon, num_states, num_actions)).astype(np.float32)
    values = generator.normal(size=(num_envs, num_states)).astype(np.float32)
    successor = generator.integers(num_states, size=(num_states, num_actions))
    all_plans = np.array(list(itertools.product(range(num_actions), repeat=horizon)))

    def propose(params, rng_key, state, step):
        action = params["plans"][state["plan"], step][..., None]
        env, place = jnp.arange(num_envs)[:, None, None], state["place"][..., None]
        after = params["successor"][place, action]
        return make_proposal(action, params["rewards"][env, step, place, action], params["values"][env, after]), after

    def advance(params, rng_key, state, pending, beam, expansion, step):
        place = follow(params, rng_key, state, pending, beam, expansion, step)
        return {"plan": planning.take_beams(state["plan"], beam), "place": place}

    params = jax.tree.map(
        jnp.asarray, {"plans": all_plans, "successor": successor, "rewards": rewards, "values": values}
    )
    root = {"plan": jnp.broadcast_to(jnp.arange(len(all_plans))[None], (num_envs, len(all_plans)))}
    root["place"] = jnp.zeros_like(root["plan"])
    settings = {"advance_fn": advance, "num_expand": 1, "horizon": horizon, "discount": discount}
    plans = search(propose, root, params=params, **settings)
    with_beams = search(propose, root, params=params, **settings, keep_beams=True)
    assert plans.beams is None
    chex.assert_trees_all_equal(with_beams.replace(beams=None), plans)
    np.testing.assert_array_equal(with_beams.beams[:, 0], plans.tokens)

    for env in range(num_envs):
        totals = []
        for actions in all_plans:
            place, total = 0, 0.0
            for step, action in enumerate(actions):
                total += discount**step * rewards[env, step, place, action]
                place = successor[place, action]
            totals.append(total + discount**horizon * values[env, place])
        np.testing.assert_array_equal(plans.actions[env, :, 0], all_plans[np.argmax(totals)])
        np.testing.assert_allclose(plans.scores[env], np.sort(totals)[::-1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(with_beams.beams[env, ..., 0], all_plans[np.argsort(totals)[::-1]])


def test_among_equals_the_lower_index_goes_on_so_that_beams_fan_out_over_all_plans():
    # Nothing is scored before the last step, so 2^3 beams hold each prefix once or more, and every plan is a candidate.
    horizon, num_actions = 4, 2
    payoff = np.random.default_rng(1).permutation(num_actions**horizon).astype(np.float32)

    def propose(params, rng_key, state, step):
        action = every_action(state, num_actions)
        code = state[..., None] * num_actions + action
        last = step == horizon - 1
        return make_proposal(action, jnp.where(last, params[jnp.minimum(code, len(payoff) - 1)], 0.0)), code

    root = jnp.zeros([1, num_actions ** (horizon - 1)], jnp.int32)
    plans = search(propose, root, params=jnp.asarray(payoff), num_expand=num_actions, horizon=horizon, discount=1.0)
    digits = np.array(list(itertools.product(range(num_actions), repeat=horizon)))
    np.testing.assert_array_equal(plans.actions[0, :, 0], digits[np.argmax(payoff)])
    np.testing.assert_array_equal(plans.scores[0], np.sort(payoff)[::-1][:8])


def ending(params, rng_key, state, step):
    """Action 0 gives 5 and ends the episode, action 1 gives 1; whoever is over is still proposed rewards of 100."""
    action = every_action(state, 2)
    over = (state == 1)[..., None] | (action == 0)
    reward = jnp.where((state == 1)[..., None], 100.0, jnp.where(action == 0, 5.0, 1.0))
    return make_proposal(action, reward, value=jnp.full_like(reward, 0.0), terminal=over), over.astype(jnp.int32)


def test_an_ended_beam_contributes_one_candidate_and_gets_no_further_reward():
    plans = search(ending, jnp.zeros([1, 3], jnp.int32), num_expand=2, horizon=1, discount=1.0)
    np.testing.assert_allclose(plans.scores, [[5.0, 5.0, 5.0]])
    # All three have ended, each has one candidate and keeps its 5.
    plans = search(ending, jnp.zeros([1, 3], jnp.int32), num_expand=2, horizon=4, discount=1.0)
    np.testing.assert_allclose(plans.scores, [[5.0, 5.0, 5.0]])

    def late(params, rng_key, state, step):  # the end is worth less than two steps, so both kinds are in the beam
        proposal, pending = ending(params, rng_key, state, step)
        fork = jnp.where(jnp.arange(2)[None, :, None] == 0, proposal.reward, jnp.where(proposal.terminal, 0.0, 4.0))
        return proposal.replace(reward=jnp.where(step == 0, fork, proposal.reward)), pending

    # Step 0: 5 (ends) and 4 go on. Step 1: the ended one stays 5 and is one candidate, the other becomes 9 or 5.
    plans = search(late, jnp.zeros([1, 2], jnp.int32), num_expand=2, horizon=2, discount=1.0)
    np.testing.assert_allclose(plans.scores, [[9.0, 5.0]])
    np.testing.assert_array_equal(plans.actions[0, :, 0], [1, 0])


def test_the_copies_of_an_ended_beam_do_not_push_a_live_one_out():
    def propose(params, rng_key, state, step):  # beam 0 ends at once with 0, beam 1 loses 1 per step
        action = every_action(state, 2)
        dead = (state == 1)[..., None] | (jnp.arange(2)[None, :, None] == 0) & (step == 0)
        dead = jnp.broadcast_to(dead, action.shape)
        reward = jnp.where(dead, 0.0, -1.0) - 10.0 * ((action == 1) & (step == 0))
        return make_proposal(action, reward, terminal=dead), dead.astype(jnp.int32)

    plans = search(propose, jnp.zeros([1, 2], jnp.int32), num_expand=2, horizon=3, discount=1.0)
    np.testing.assert_allclose(plans.scores, [[0.0, -3.0]])


def test_a_candidate_scored_minus_infinity_is_never_revived():
    def propose(params, rng_key, state, step):
        action = every_action(state, 2)
        return make_proposal(action, 1.0 + action), jnp.zeros_like(action)

    def score_fn(params, returns, proposal, step):  # action 1 is forbidden at step 0, action 0 at step 1
        scores = planning.score_by_value(1.0)(params, returns, proposal, step)
        forbidden = jnp.where(step == 0, proposal.tokens[..., 0] == 1, (proposal.tokens[..., 0] == 0) & (step == 1))
        only_first = jnp.arange(3).reshape(1, 3, 1) > 0
        return jnp.where(forbidden | (only_first & (step == 0)), -jnp.inf, scores)

    plans = search(propose, jnp.zeros([1, 3], jnp.int32), num_expand=2, horizon=2, discount=1.0, score_fn=score_fn)
    np.testing.assert_array_equal(plans.actions[0, :, 0], [0, 1])
    np.testing.assert_array_equal(plans.scores, [[3.0, -np.inf, -np.inf]])
    plans = search(propose, jnp.zeros([1, 3], jnp.int32), num_expand=2, horizon=3, discount=1.0, score_fn=score_fn)
    np.testing.assert_array_equal(plans.scores, [[5.0, 4.0, -np.inf]])


def test_one_step_of_one_candidate_is_a_plan():
    def propose(params, rng_key, state, step):
        action = every_action(state, 1)
        return make_proposal(action + 7, 2.0 + 0.0 * action, 3.0 + 0.0 * action), action

    plans = search(propose, jnp.zeros([2, 1], jnp.int32), num_expand=1, horizon=1)
    chex.assert_shape([plans.actions, plans.tokens], (2, 1, 1))
    np.testing.assert_allclose(plans.action, [[7.0], [7.0]])
    np.testing.assert_allclose(plans.scores, np.full((2, 1), 2.0 + DISCOUNT * 3.0))


def drawn(params, rng_key, state, step):
    """Propose random actions, rewarded by a hidden function of the state and the action."""
    action = jax.vmap(lambda key: jax.random.randint(key, [*state.shape[1:], 3], 0, 50))(rng_key)
    place = state[..., None] * 31 % 97 + action
    return make_proposal(action, jnp.sin(place.astype(jnp.float32)) + params), place


def test_a_plan_depends_on_its_own_root_and_key_alone():
    def plan(keys, roots):
        return planning.beam_plan(
            0.0,
            keys,
            roots,
            propose_fn=drawn,
            advance_fn=follow,
            horizon=5,
            beam_width=4,
            num_expand=3,
            discount=DISCOUNT,
        )

    plan = jax.jit(plan)
    roots = jnp.broadcast_to(jnp.arange(3)[:, None] * 5, (3, 4))
    keys, others = (jax.random.split(jax.random.key(seed), 3) for seed in (0, 1))
    plans = plan(keys, roots)
    moved = plan(jnp.stack([keys[0], others[1], keys[2]]), roots.at[1].set(44))
    for env in (0, 2):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf, e=env: leaf[e], x) for x in (moved, plans)))
    assert (moved.actions[1] != plans.actions[1]).any()
    order = jnp.array([2, 0, 1])
    chex.assert_trees_all_equal(plan(keys[order], roots[order]), jax.tree.map(lambda leaf: leaf[order], plans))


def test_every_step_and_environment_draws_anew():
    def propose(params, rng_key, state, step):
        action = jax.vmap(lambda key: jax.random.randint(key, [1, 1], 0, 10**6))(rng_key)
        return make_proposal(action, 0.0 * action), action

    plans = search(propose, jnp.zeros([2, 1], jnp.int32), num_expand=1, horizon=8)
    assert len(set(np.asarray(plans.tokens).reshape(-1).tolist())) == 16


def test_beam_plan_runs_under_transformations():
    def plan(params, key, root):
        settings = {"horizon": 3, "beam_width": 4, "num_expand": 3, "discount": DISCOUNT}
        return planning.beam_plan(params, key[None], root[None], propose_fn=drawn, advance_fn=follow, **settings)

    keys = jax.random.split(jax.random.key(0), 2)
    check_transforms(plan, jnp.arange(2.0), keys, jnp.zeros([2, 4], jnp.int32))


def test_shapes_and_sizes_are_checked():
    def wrong(params, rng_key, state, step):
        proposal, pending = drawn(params, rng_key, state, step)
        return proposal.replace(reward=proposal.reward[:, :, :2]), pending

    root = jnp.zeros([1, 4], jnp.int32)
    with pytest.raises(AssertionError, match=r"\(1, 4, 2\)"):
        search(wrong, root, params=0.0, num_expand=3, horizon=2)
    with pytest.raises(AssertionError, match=r"\(1, 4, 3\)"):
        search(drawn, root, params=0.0, num_expand=2, horizon=2)
    with pytest.raises(AssertionError, match=r"\(1, 4\)"):
        search(
            drawn, root, params=0.0, num_expand=3, horizon=2, score_fn=lambda params, returns, proposal, step: returns
        )
    with pytest.raises(ValueError, match="horizon=0, beam_width=4 and num_expand=3 must all be at least 1"):
        search(drawn, root, params=0.0, num_expand=3, horizon=0)
