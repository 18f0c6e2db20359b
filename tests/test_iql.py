"""IQL: every update against the JAX reference's arrays, and a chain whose Q is known.

tests/data/iql.npz was computed by running the public JAX reference (commit 09d70024) on made-up data: hidden layers
(32, 32), 5 observation and 2 action dimensions, batches of 16; names are those of its parameters.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from transform_checks import check_transforms

from tt_jax import iql, types

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "iql.npz")
CONFIG = iql.IQLConfig(observation_dim=5, action_dim=2, hidden_dims=(32, 32), reward_units="raw")
init = jax.jit(iql.init, static_argnames="config")
update = jax.jit(iql.update, static_argnames=("config", "axis_name"))
RUNS = [f"e{pair}_{schedule}" for pair in ("7_t3", "9_t10") for schedule in ("cosine", "constant")]
RUNS.append("edge_logstd_clipped")


def golden_network(prefix, num_layers, *, actor=False):
    def dense(path):
        return {name: GOLDEN[f"{prefix}/{path}/{name}"] for name in ("kernel", "bias")}

    mlp = {f"Dense_{i}": dense(f"MLP_0/Dense_{i}") for i in range(num_layers - actor)}
    if not actor:
        return mlp
    return {"mlp": mlp | {f"Dense_{num_layers - 1}": dense("Dense_0")}, "log_std": GOLDEN[f"{prefix}/log_stds"]}


def golden_params(prefix):
    def critics(name):
        twins = [golden_network(f"{prefix}/{name}/Critic_{i}", 3) for i in (0, 1)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *twins)

    return {
        "actor": golden_network(f"{prefix}/actor", 3, actor=True),
        "critic": critics("critic"),
        "value": golden_network(f"{prefix}/value", 3),
        "target_critic": critics("target_critic"),
    }


def golden_state():
    state = init(jax.random.key(0), config=CONFIG)
    return state.replace(params=jax.tree.map(jnp.asarray, state.params | golden_params("init")))


def golden_batch(i):
    fields = ("observations", "actions", "rewards", "masks", "next_observations")
    observations, actions, rewards, masks, next_observations = (GOLDEN[f"batch{i}/{field}"] for field in fields)
    return transitions(observations, actions, rewards, masks, next_observations)


def transitions(observations, actions, rewards, not_terminal, next_observations):
    return types.Transitions(
        observations=observations,
        actions=actions,
        rewards=rewards,
        not_terminal=not_terminal,
        next_observations=next_observations,
    )


def golden_dataset(name):
    data = {field: GOLDEN[f"data/{name}/in_{field}"] for field in ("observations", "actions", "next_observations")}
    rewards, not_terminal = GOLDEN[f"data/{name}/in_rewards"], GOLDEN[f"data/{name}/masks"]
    return types.Transitions(rewards=rewards, not_terminal=not_terminal, **data)


def data_config(dataset, **settings):
    return iql.IQLConfig(observation_dim=dataset.observations.shape[1], action_dim=dataset.actions.shape[1], **settings)


def assert_networks_close(params, expected, **tolerances):
    params = {name: params[name] for name in expected}
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, got), want in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, err_msg=jax.tree_util.keystr(path), **tolerances)


@pytest.mark.parametrize("run", RUNS)
def test_updates_agree_with_the_reference_one_by_one(run):
    settings = {name: GOLDEN[f"{run}/{name}"].item() for name in ("expectile", "temperature", "max_steps", "cosine")}
    config = dataclasses.replace(
        CONFIG,
        expectile=settings["expectile"],
        temperature=settings["temperature"],
        actor_cosine_steps=settings["max_steps"] if settings["cosine"] else 0,
    )
    state = golden_state()
    if run == "edge_logstd_clipped":
        state.params["actor"]["log_std"] = jnp.asarray(GOLDEN[f"{run}/log_stds"])
    for i in range(3):
        old, batch = state.params, golden_batch(i)
        state, metrics = update(state, batch, config=config)
        for name in ("value_loss", "actor_loss", "critic_loss", "v", "q1", "q2"):
            np.testing.assert_allclose(metrics[name], GOLDEN[f"{run}/info{i}/{name}"], rtol=1e-5, atol=1e-6)
        target_q = iql.q_values(old | {"critic": old["target_critic"]}, batch.observations, batch.actions).min(axis=0)
        advantage = target_q - iql.values(state.params, batch.observations)
        np.testing.assert_allclose(advantage, GOLDEN[f"{run}/info{i}/adv"], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(metrics["advantage"], GOLDEN[f"{run}/info{i}/adv"].mean(), rtol=1e-5, atol=2e-6)
        if i in (0, 2):
            assert_networks_close(state.params, golden_params(f"{run}/after{i + 1}"), rtol=0, atol=2e-6)
    if run == "edge_logstd_clipped":
        assert state.params["actor"]["log_std"][0] == -6  # outside the bounds: no gradient
    assert state.step == 3


def test_networks_agree_with_the_reference():
    params, batch = golden_state().params, golden_batch(0)
    q = iql.q_values(params, batch.observations, batch.actions)
    target_q = iql.q_values(params | {"critic": params["target_critic"]}, batch.observations, batch.actions)
    mean, std = iql.policy(params, batch.observations)
    got = {
        "q1": q[0],
        "q2": q[1],
        "target_q1": target_q[0],
        "target_q2": target_q[1],
        "v": iql.values(params, batch.observations),
        "next_v": iql.values(params, batch.next_observations),
        "policy_mean": mean,
        "policy_std": std,
    }
    for name, value in got.items():
        np.testing.assert_allclose(value, GOLDEN[f"forward/{name}"], rtol=1e-5, atol=1e-6, err_msg=name)
    for scale, suffix in ((1.0, ""), (0.5, "_temperature_half")):
        deviation = scale * np.asarray(std)
        normalised = (batch.actions - np.asarray(mean)) / deviation
        log_prob = -np.sum(normalised**2 / 2 + np.log(deviation) + np.log(2 * np.pi) / 2, axis=1)
        np.testing.assert_allclose(log_prob, GOLDEN[f"forward/log_prob{suffix}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_std, name", [(-7.0, "m7"), (3.0, "p3")])
def test_the_deviation_is_clipped(log_std, name):
    params = golden_state().params
    params["actor"]["log_std"] = jnp.full(2, log_std)
    std = iql.policy(params, golden_batch(0).observations)[1]
    np.testing.assert_allclose(std, GOLDEN[f"forward/std_for_log_std_{name}"], rtol=1e-6)


@pytest.mark.parametrize("expectile, name", [(0.5, "0p5"), (0.7, "0p7"), (0.9, "0p9")])
def test_expectile_loss_agrees_with_the_reference(expectile, name):
    losses = iql.expectile_loss(GOLDEN["expectile/diff"], expectile=expectile)
    np.testing.assert_allclose(losses, GOLDEN[f"expectile/loss_{name}"], rtol=1e-6)


@pytest.mark.parametrize("max_steps", [5, 1000])
def test_the_actor_rate_is_a_cosine_that_ends_at_0(max_steps):
    config = dataclasses.replace(CONFIG, actor_cosine_steps=max_steps)
    counts = jnp.asarray(GOLDEN[f"cosine/max_steps_{max_steps}/counts"], jnp.int32)
    rates = jax.vmap(functools.partial(iql.actor_learning_rate, config=config))(counts)
    np.testing.assert_allclose(rates, -GOLDEN[f"cosine/max_steps_{max_steps}/scale"], rtol=1e-5, atol=3e-11)
    assert iql.actor_learning_rate(10**6, config=CONFIG) == np.float32(3e-4)


def test_initial_matrices_are_orthogonal_with_gain_sqrt_2_and_the_target_is_a_copy():
    state = init(jax.random.key(3), config=CONFIG)
    critic = state.params["critic"]
    for leaf in jax.tree.leaves([state.params["actor"], state.params["value"]]):
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, 0)  # biases and log_std
            continue
        short = leaf if leaf.shape[0] >= leaf.shape[1] else leaf.T
        np.testing.assert_allclose(short.T @ short, 2 * np.eye(short.shape[1]), atol=1e-5)
    last = critic["Dense_2"]["kernel"]
    np.testing.assert_allclose(np.sum(last**2, axis=(1, 2)), [2, 2], rtol=1e-5)
    assert np.abs(last[0] - last[1]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, critic, state.params["target_critic"])


# Evaluation


def test_evaluation_takes_the_mean_action_clipped():
    params = golden_state().params
    action = iql.sample_action(params, jax.random.key(0), golden_batch(0).observations, temperature=0.0)
    np.testing.assert_allclose(action, GOLDEN["eval/action_temperature_0"], rtol=1e-5, atol=1e-6)


def test_sampled_actions_have_the_policy_s_moments_and_stay_in_the_box():
    params = golden_state().params
    params["actor"]["log_std"] = jnp.log(jnp.array([0.02, 0.4]))
    params["actor"]["mlp"]["Dense_2"]["kernel"] *= 0.1  # keeps the mean away from the bounds
    observation = golden_batch(0).observations[:1]
    mean, std = iql.policy(params, observation)
    draws = iql.sample_action(params, jax.random.key(1), jnp.repeat(observation, 20_000, axis=0), temperature=0.5)
    assert np.abs(draws).max() <= 1
    noise = (np.asarray(draws) - np.asarray(mean)) / (0.5 * np.asarray(std))
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.03)


def test_an_action_drawn_with_its_own_key_does_not_depend_on_its_neighbours():
    params, observations = golden_state().params, golden_batch(0).observations
    keys = jax.random.split(jax.random.key(2), 16)
    together = iql.sample_action(params, keys, observations)
    alone = check_transforms(lambda key, row: iql.sample_action(params, key, row), keys, observations)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_queries_run_plain_jitted_and_mapped():
    params, batch = golden_state().params, golden_batch(0)
    q = check_transforms(lambda row, action: iql.q_values(params, row, action), batch.observations, batch.actions)
    np.testing.assert_allclose(q[:, 0], GOLDEN["forward/q1"], rtol=1e-5, atol=1e-6)
    v = check_transforms(lambda row: iql.values(params, row), batch.observations)
    np.testing.assert_allclose(v, GOLDEN["forward/v"], rtol=1e-5, atol=1e-6)


def test_q_values_broadcast_one_observation_over_several_actions():
    params, batch = golden_state().params, golden_batch(0)
    q = iql.q_values(params, batch.observations[:4, None], batch.actions.reshape(4, 4, 2))
    expected = iql.q_values(params, jnp.repeat(batch.observations[:4], 4, axis=0), batch.actions)
    np.testing.assert_allclose(q.reshape(2, 16), expected, rtol=1e-6, atol=1e-6)


# Units


@pytest.mark.parametrize("name", ["small", "unfinished"])
def test_rewards_are_transformed_as_in_the_reference(name):
    dataset = golden_dataset(name)
    np.testing.assert_array_equal(iql.episode_ends(dataset), GOLDEN[f"data/{name}/dones_float"] == 1)
    np.testing.assert_allclose(iql.episode_returns(dataset), GOLDEN[f"data/{name}/trajectory_returns"], rtol=1e-6)
    lengths = np.diff(np.flatnonzero(np.append(True, iql.episode_ends(dataset))))
    np.testing.assert_array_equal(lengths, GOLDEN[f"data/{name}/trajectory_lengths"])
    for reward_units, stored in (("return_range", "locomotion"), ("minus_one", "antmaze")):
        units = iql.fit_units(dataset, config=data_config(dataset, reward_units=reward_units))
        rewards = iql.transform_rewards({"units": units}, dataset.rewards)
        np.testing.assert_allclose(rewards, GOLDEN[f"data/{name}/rewards_{stored}"], rtol=2e-6, atol=1e-6)
    raw = iql.fit_units(dataset, config=data_config(dataset, reward_units="raw"))
    np.testing.assert_array_equal(iql.transform_rewards({"units": raw}, dataset.rewards), dataset.rewards)


def test_equal_returns_have_no_scale():
    dataset = golden_dataset("small").replace(rewards=np.zeros(18, np.float32))
    with pytest.raises(ValueError, match="all 4 returns are 0.0.*minus_one"):
        iql.fit_units(dataset, config=data_config(dataset))


def test_normalisation_is_the_same_as_training_on_data_normalised_by_hand():
    dataset = golden_batch(0)
    stretch, shift = np.float32([1, 10, 0.1, 3, 0.0]), np.float32([0, 5, -2, 1, 7])  # the last column is constant
    dataset = dataset.replace(
        observations=dataset.observations * stretch + shift,
        next_observations=dataset.next_observations * stretch + shift,
    )
    config = dataclasses.replace(CONFIG, normalize_observations=True, reward_units="minus_one")
    units = iql.fit_units(dataset, config=config)
    assert units["observation_std"][-1] == np.float32(1e-3)
    by_hand = dataset.replace(
        observations=(dataset.observations - units["observation_mean"]) / units["observation_std"],
        next_observations=(dataset.next_observations - units["observation_mean"]) / units["observation_std"],
        rewards=dataset.rewards - 1,
    )
    np.testing.assert_allclose(by_hand.observations[:, :4].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(by_hand.observations[:, :4].std(axis=0), 1, rtol=1e-5)

    state, metrics = update(init(jax.random.key(5), config=config, units=units), dataset, config=config)
    plain, expected = update(init(jax.random.key(5), config=config), by_hand, config=config)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), metrics, expected)
    got = iql.q_values(state.params, dataset.observations, dataset.actions)
    want = iql.q_values(plain.params, by_hand.observations, dataset.actions)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    actions = [
        iql.sample_action(one.params, jax.random.key(6), data.observations)
        for one, data in ((state, dataset), (plain, by_hand))
    ]
    np.testing.assert_allclose(*actions, rtol=1e-4, atol=1e-5)


# Learning


def test_actions_of_any_bounds_are_learned_as_those_of_plus_minus_1():
    """Two updates, Q, the policy and its samples, against actions that were scaled by hand."""
    dataset = golden_dataset("small")
    low, high = np.float32([-2, 10]), np.float32([2, 11])
    center, scale = np.float32([0, 10.5]), np.float32([2, 0.5])
    wide = dataset.replace(actions=center + scale * dataset.actions)
    config = data_config(dataset, reward_units="raw", hidden_dims=(16, 16))
    key, observations = jax.random.key(3), dataset.observations[:8]
    got, expected = (
        iql.init(key, config=config, units=iql.fit_units(each, config=config, action_bounds=bounds))
        for each, bounds in ((wide, (low, high)), (dataset, None))
    )
    for _ in range(2):
        got, metrics = update(got, wide, config=config)
        expected, expected_metrics = update(expected, dataset, config=config)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), metrics, expected_metrics)
    q = iql.q_values(got.params, observations, wide.actions[:8])
    plain_q = iql.q_values(expected.params, observations, dataset.actions[:8])
    np.testing.assert_allclose(q, plain_q, rtol=1e-4, atol=1e-5)
    (mean, std), (plain_mean, plain_std) = (iql.policy(each.params, observations) for each in (got, expected))
    np.testing.assert_allclose(mean, center + scale * np.asarray(plain_mean), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(std, scale * np.asarray(plain_std), rtol=1e-4)
    drawn = np.asarray(iql.sample_action(got.params, key, observations, temperature=3.0))
    plain = np.asarray(iql.sample_action(expected.params, key, observations, temperature=3.0))
    np.testing.assert_allclose(drawn, center + scale * np.asarray(plain), rtol=1e-4, atol=1e-4)
    assert (drawn >= low).all() and (drawn <= high).all() and (np.abs(plain) == 1).any()


CHAIN_CONFIG = iql.IQLConfig(
    observation_dim=6,
    action_dim=1,
    hidden_dims=(32, 32),
    expectile=0.99,
    temperature=20.0,
    discount=0.8,
    tau=0.05,
    learning_rate=2e-3,
    reward_units="raw",
)


def chain():
    """Five cells, actions -1 and +1; entering the cell beyond the right end gives 1 and ends the episode."""
    cell, direction = (grid.ravel() for grid in np.meshgrid(np.arange(5), [-1, 1], indexing="ij"))
    next_cell = np.clip(cell + direction, 0, 5)
    at_goal = next_cell == 5
    one_hot = np.eye(6, dtype=np.float32)
    batch = transitions(
        one_hot[cell], direction[:, None].astype(np.float32), at_goal * 1.0, 1.0 - at_goal, one_hot[next_cell]
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


def chain_q(*, expectile, discount):
    """Iterate Q = r + discount V', where V, the expectile of two equally frequent actions, lies between their Qs."""
    q = np.zeros([5, 2])
    for _ in range(1000):
        v = np.append(expectile * q.max(axis=1) + (1 - expectile) * q.min(axis=1), 0)
        q = np.stack([discount * v[[0, 0, 1, 2, 3]], discount * v[1:]], axis=1)
        q[4, 1] = 1.0
    return q


def test_q_of_a_chain_is_that_of_dynamic_programming_and_near_the_optimum():
    config, batch = CHAIN_CONFIG, chain()
    state = iql.init(jax.random.key(0), config=config)
    train = jax.jit(lambda s: jax.lax.scan(lambda s, _: iql.update(s, batch, config=config), s, length=6000))
    state, _ = train(state)
    q = iql.q_values(state.params, batch.observations, batch.actions).reshape(2, 5, 2)
    expected = chain_q(expectile=0.99, discount=0.8)
    np.testing.assert_allclose(q, np.stack([expected, expected]), atol=0.01)
    steps_to_goal = np.stack([[6, 6, 5, 4, 3], [5, 4, 3, 2, 1]], axis=1)  # going left costs a step back, too
    optimal = 0.8 ** (steps_to_goal - 1)
    np.testing.assert_allclose(q.min(axis=0), optimal, atol=0.03)
    action = iql.sample_action(state.params, jax.random.key(0), batch.observations, temperature=0.0)
    assert np.all(action > 0.4), "the policy goes right in every cell"


VALUES = np.float32([[0, 1, 2], [5, 6, np.inf]])  # of two discrete dimensions
GRID_CONFIG = dataclasses.replace(CHAIN_CONFIG, observation_dim=9, action_dim=2)


def grid():
    """Nine cells; a step goes by 0, 1 or 2 less 1 in x and by 5 or 6 less 5 in y; entering the corner gives 1, ends."""
    x, y, a, b = (each.ravel() for each in np.meshgrid(np.arange(3), np.arange(3), VALUES[0], VALUES[1, :2]))
    after = np.clip(x + a - 1, 0, 2) + 3 * np.clip(y + b - 5, 0, 2)
    cell, after, cells = x + 3 * y, after.astype(int), np.eye(9)
    order = np.argsort(cell, kind="stable")  # [9 cells * 6 actions]
    actions, at_goal = np.stack([a, b], axis=1), after == 8
    batch = transitions(cells[cell], actions, at_goal * 1.0, 1.0 - at_goal, cells[after])
    return jax.tree.map(lambda x: jnp.asarray(x[order], jnp.float32), batch), after[order].reshape(9, 6)


def expectile(values, tau):
    """Return the value v at which tau sum (values - v)+ = (1 - tau) sum (v - values)+, by bisection."""
    low, high = values.min(), values.max()
    for _ in range(60):
        v = (low + high) / 2
        excess = np.where(values > v, tau, 1 - tau) @ (values - v)
        low, high = (v, high) if excess > 0 else (low, v)
    return v


def grid_q(after, *, tau, discount):
    """Iterate Q [9, 6] = 1 at the goal, else discount * V, where V is the expectile over the six actions."""
    q = np.zeros([9, 6])
    for _ in range(60):
        v = np.array([q_of_cell.max() if tau == 1 else expectile(q_of_cell, tau) for q_of_cell in q])
        q = np.where(after == 8, 1.0, discount * v[after])
    return q


def test_q_of_discrete_actions_is_that_of_value_iteration_and_the_policy_is_the_best():
    batch, after = grid()
    units = iql.fit_units(batch, config=GRID_CONFIG, action_values=VALUES)
    state = iql.init(jax.random.key(0), config=GRID_CONFIG, units=units)
    train = jax.jit(lambda s: jax.lax.scan(lambda s, _: iql.update(s, batch, config=GRID_CONFIG), s, length=4000))
    params = train(state)[0].params
    q = iql.q_values(params, batch.observations, batch.actions).reshape(2, 9, 6)
    np.testing.assert_allclose(q, np.stack([grid_q(after, tau=0.99, discount=0.8)] * 2), atol=0.02)
    optimal = grid_q(after, tau=1, discount=0.8)
    np.testing.assert_allclose(q.min(axis=0), optimal, atol=0.05)
    cells = jnp.eye(9, dtype=jnp.float32)
    action = np.asarray(iql.mean_action(params, cells))
    chosen = (action[:, 0] * 2 + action[:, 1] - 5).astype(int)  # in the order of the batch
    np.testing.assert_array_equal(optimal[np.arange(9), chosen], optimal.max(axis=1))
    np.testing.assert_array_equal(iql.sample_action(params, jax.random.key(0), cells, temperature=0.0), action)


def test_discrete_actions_are_drawn_as_likely_as_they_are():
    """Frequencies against exp(log_prob), whose sum over all actions is 1; a key per row draws alone as among others."""
    batch, _ = grid()
    units = iql.fit_units(batch, config=GRID_CONFIG, action_values=VALUES)
    params = iql.init(jax.random.key(5), config=GRID_CONFIG, units=units).params
    observed, actions = batch.observations[:6], batch.actions[:6]  # one cell, all actions
    log_probs = iql.log_prob(params, observed, iql.normalize_actions(params, actions))
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1, rtol=1e-5)
    assert np.ptp(np.exp(log_probs)) > 0.05
    drawn = iql.sample_action(params, jax.random.key(1), jnp.repeat(observed[:1], 20_000, axis=0))
    frequencies = np.mean(np.all(drawn[:, None] == np.asarray(actions)[None], axis=-1), axis=0)
    np.testing.assert_allclose(frequencies, np.exp(log_probs), atol=0.015)
    keys = jax.random.split(jax.random.key(2), 6)
    together = iql.sample_action(params, keys, observed)
    alone = check_transforms(lambda key, row: iql.sample_action(params, key, row), keys, observed)
    np.testing.assert_array_equal(together, alone)


# One program for many seeds and many devices


def random_batch(key, size):
    keys = jax.random.split(key, 4)
    return transitions(
        jax.random.normal(keys[0], [size, 5]),
        jnp.tanh(jax.random.normal(keys[1], [size, 2])),
        jax.random.normal(keys[2], [size]),
        (jnp.arange(size) % 5 > 0).astype(jnp.float32),
        jax.random.normal(keys[3], [size, 5]),
    )


def assert_trees_close(got, expected, **tolerances):
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, err_msg=jax.tree_util.keystr(path), **tolerances)


def test_eight_seeds_in_one_program_equal_single_runs():
    config = dataclasses.replace(CONFIG, actor_cosine_steps=20, actor_dropout=0.3)

    def train(state, data_key):
        def step(state, _):
            batch = random_batch(jax.random.fold_in(data_key, state.step), 16)
            return iql.update(state, batch, config=config)

        return jax.lax.scan(step, state, length=5)

    keys, train_one = jax.random.split(jax.random.key(8), 8), jax.jit(train)
    states = jax.jit(jax.vmap(functools.partial(iql.init, config=CONFIG)))(keys)
    together = jax.jit(jax.vmap(train))(states, keys)
    for i, key in enumerate(keys):
        alone = init(key, config=CONFIG)
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], states), alone, rtol=1e-6, atol=1e-6)
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], together), train_one(alone, key), rtol=1e-4, atol=5e-6)


def test_one_update_runs_plain_jitted_and_mapped():
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[init(jax.random.key(i), config=CONFIG) for i in (0, 1)])
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[random_batch(jax.random.key(i), 4) for i in (2, 3)])
    check_transforms(lambda state, batch: iql.update(state, batch, config=CONFIG), states, batches, rtol=1e-4)


def over_devices(update, *, wrapper):
    """Wrap update(state, share) so that it runs over four devices from one state and shares [4, ...]."""
    if wrapper == "pmap":
        return jax.pmap(update, axis_name="devices", in_axes=(None, 0), out_axes=None)
    if wrapper == "vmap":
        return jax.jit(jax.vmap(update, axis_name="devices", in_axes=(None, 0), out_axes=None))
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, split = PartitionSpec(), PartitionSpec("devices")
    return jax.jit(
        jax.shard_map(
            lambda state, share: update(state, jax.tree.map(lambda x: x[0], share)),
            mesh=mesh,
            in_specs=(everywhere, split),
            out_specs=everywhere,
        )
    )


@pytest.mark.parametrize("wrapper, dropout", [("pmap", 0.3), ("shard_map", 0.3), ("vmap", 0.0)])
def test_four_devices_equal_one_with_the_whole_batch(wrapper, dropout):
    config = dataclasses.replace(CONFIG, actor_dropout=dropout)
    single = state = init(jax.random.key(1), config=CONFIG)
    update_all = over_devices(functools.partial(iql.update, config=config, axis_name="devices"), wrapper=wrapper)
    for i in range(2):
        batch = random_batch(jax.random.key(i), 32)
        single, expected = update(single, batch, config=config)
        state, metrics = update_all(state, jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), batch))
        assert_trees_close(metrics, expected, rtol=1e-5, atol=1e-6)
    assert_trees_close(state, single, rtol=1e-4, atol=2e-6)  # Adam's moments are not blind to a gradient's scale


def test_dropout_changes_the_actor_s_update_alone():
    batch, states = random_batch(jax.random.key(0), 16), {}
    for rate in (0.0, 0.5):
        config = dataclasses.replace(CONFIG, actor_dropout=rate)
        states[rate] = update(init(jax.random.key(1), config=CONFIG), batch, config=config)[0].params
    for name in ("critic", "value", "target_critic"):
        jax.tree.map(np.testing.assert_array_equal, states[0.0][name], states[0.5][name])
    kernels = [params["actor"]["mlp"]["Dense_1"]["kernel"] for params in states.values()]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


# Mistakes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_dims": ()}, "there must be a layer"),
        ({"expectile": 1.5}, "expectile=1.5"),
        ({"action_dim": 0}, "action_dim=0"),
        ({"reward_units": "percent"}, "minus_one"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


@pytest.mark.parametrize(
    "field, shape",
    [("observations", (16, 4)), ("actions", (16, 3)), ("rewards", (16, 1)), ("next_observations", (15, 5))],
)
def test_a_batch_of_wrong_shape_is_refused(field, shape):
    batch = golden_batch(0).replace(**{field: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=f"^{field} must have shape"):
        iql.update(golden_state(), batch, config=CONFIG)


def test_queries_with_another_layout_are_refused():
    params, batch = golden_state().params, golden_batch(0)
    with pytest.raises(ValueError, match=r"observation must be \[\.\.\., 5\].*\(16, 4\)"):
        iql.q_values(params, batch.observations[:, :4], batch.actions)
    with pytest.raises(ValueError, match=r"action must be \[\.\.\., 2\]"):
        iql.q_values(params, batch.observations, batch.observations)
    with pytest.raises(ValueError, match="observation must be"):
        iql.values(params, batch.actions)
    with pytest.raises(ValueError, match="observation must be"):
        iql.sample_action(params, jax.random.key(0), batch.actions)
    units = iql.fit_units(golden_dataset("small"), config=data_config(golden_dataset("small")))
    with pytest.raises(ValueError, match="observation_dim=5; fit them on the same layout"):
        iql.init(jax.random.key(0), config=CONFIG, units=units)
