"""Neither devices, nor calls, nor the other learners change what a learner of IQL learns."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tt_jax import data_parallel, iql, iql_training, types

NUM_DEVICES = 4  # set in conftest.py
SEED, NUM_TRANSITIONS = 7, 50
IQL_CONFIG = iql.IQLConfig(observation_dim=3, action_dim=2, hidden_dims=(8, 8), reward_units="raw", actor_dropout=0.2)
CONFIG = iql_training.IQLTrainConfig(num_steps=100, batch_size=8, num_seeds=3, steps_per_call=4)


@pytest.fixture(scope="module")
def transitions():
    rng = np.random.default_rng(0)
    return types.Transitions(
        observations=rng.normal(size=(NUM_TRANSITIONS, 3)).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(NUM_TRANSITIONS, 2)).astype(np.float32),
        rewards=rng.normal(size=NUM_TRANSITIONS).astype(np.float32),
        not_terminal=rng.integers(0, 2, NUM_TRANSITIONS).astype(np.float32),
        next_observations=rng.normal(size=(NUM_TRANSITIONS, 3)).astype(np.float32),
    )


def init(config=CONFIG, *, seed=SEED, transitions):
    units = iql.fit_units(transitions, config=IQL_CONFIG)
    return iql_training.init(seed, config=config, iql_config=IQL_CONFIG, units=units)


def make_train(transitions, config=CONFIG, *, seed=SEED):
    """Return train(state, num_steps) of the compiled steps on four devices."""
    assert jax.device_count() == NUM_DEVICES
    train_fn = iql_training.make_train_fn(config=config, iql_config=IQL_CONFIG, num_transitions=NUM_TRANSITIONS)
    store, seed = data_parallel.replicate(transitions), data_parallel.replicate(np.uint32(seed))
    return lambda state, num_steps: train_fn(state, store, seed, data_parallel.replicate(np.int32(num_steps)))


@pytest.fixture(scope="module")
def train(transitions):
    return make_train(transitions)


def test_every_learner_on_four_devices_takes_the_steps_of_one_that_is_alone(transitions, train):
    state = init(transitions=transitions)
    replicas, metrics = train(data_parallel.replicate(state), 4)
    for leaf in jax.tree.leaves((replicas, metrics)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))  # all devices agree
    together, metrics = data_parallel.unreplicate((replicas, metrics))
    assert metrics["v"].shape == (CONFIG.steps_per_call, CONFIG.num_seeds)

    update = jax.jit(iql.update, static_argnames="config")
    for learner in range(CONFIG.num_seeds):
        seed = SEED + learner
        alone = iql.init(jax.random.key(seed), config=IQL_CONFIG)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=learner: x[i], state), alone, rtol=1e-6, atol=1e-6)
        for step in range(4):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
            rows = np.asarray(jax.random.randint(key, [CONFIG.batch_size], 0, NUM_TRANSITIONS))
            batch = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), transitions)
            alone, expected = update(alone, batch, config=IQL_CONFIG)
            got = {name: values[step, learner] for name, values in metrics.items()}
            chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
        got = jax.tree.map(lambda x, i=learner: x[i], together)
        chex.assert_trees_all_close(got, alone, rtol=1e-4, atol=5e-6)


def test_splitting_the_steps_into_calls_changes_nothing(transitions, train):
    start = init(transitions=transitions)
    whole, metrics = train(data_parallel.replicate(start), 4)
    state = data_parallel.replicate(start)
    for num_steps in (1, 3):
        state, part = train(state, num_steps)
    np.testing.assert_array_equal(part["v"][0, :3], metrics["v"][0, 1:4])
    chex.assert_trees_all_equal(data_parallel.unreplicate(state), data_parallel.unreplicate(whole))


def test_batches_and_counts_of_impossible_size_are_refused():
    odd = dataclasses.replace(CONFIG, batch_size=6)
    message = "batch_size=6 must be a multiple of the 4 devices; set --config.iql_train.batch_size"
    with pytest.raises(ValueError, match=message):
        iql_training.make_train_fn(config=odd, iql_config=IQL_CONFIG, num_transitions=NUM_TRANSITIONS)
    with pytest.raises(ValueError, match="iql_train.num_seeds=0 must be at least 1"):
        dataclasses.replace(CONFIG, num_seeds=0)
