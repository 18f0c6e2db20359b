"""Single-step models learn the noise of a system, and keep what is best on transitions held out."""

import dataclasses

import jax
import numpy as np
import pytest

from tt_jax import data_parallel, ensemble, types

NOISE = np.array([0.1, 0.4])


def transitions(count, seed=0, noise=NOISE):
    """Draw transitions whose changes are 0.5 a - 0.1 x and whose reward is the first observation, all on odd scales."""
    rng = np.random.default_rng(seed)
    observations, actions = 5 + 3 * rng.normal(size=(count, 2)), rng.uniform(-1, 1, (count, 1))
    change = 0.5 * actions - 0.1 * observations + noise * rng.normal(size=(count, 2))
    arrays = types.Transitions(
        observations=observations,
        actions=actions,
        rewards=100 * observations[:, 0],
        not_terminal=np.ones(count),
        next_observations=observations + change,
    )
    return jax.tree.map(np.float32, arrays)


def train(data, *, num_steps, **changes):
    settings = {"num_members": 2, "hidden_dims": (16, 16), "learning_rate": 3e-3, "validate_every": 20} | changes
    config = ensemble.EnsembleConfig(observation_dim=2, action_dim=1, **settings)
    train_config = ensemble.EnsembleTrainConfig(num_steps=num_steps, batch_size=32, steps_per_call=num_steps)
    units = ensemble.units(data.train)
    state = ensemble.init(jax.random.key(0), config=config, units=units, num_steps=num_steps)
    train_fn = ensemble.make_train_fn(config=config, train_config=train_config, num_transitions=len(data.train.rewards))
    place = data_parallel.replicate
    state, metrics = train_fn(place(state), place(data), place(np.uint32(0)), place(np.int32(num_steps)))
    return data_parallel.unreplicate(state), config, data_parallel.unreplicate(metrics)


@pytest.mark.parametrize("probabilistic", [True, False])
def test_mean_and_noise_of_a_system_are_learned(probabilistic):
    data = ensemble.EnsembleData(train=transitions(2000), validation=transitions(200, seed=1))
    state, config, metrics = train(data, num_steps=1500, probabilistic=probabilistic)
    new = transitions(500, seed=2, noise=0)
    every = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), new)
    mean, std = jax.jit(lambda *x: ensemble.predict(*x, config=config))(state.best, every.observations, every.actions)
    error = np.abs(mean[..., :2] - every.next_observations).mean(axis=(0, 1))
    assert (error < 0.25 * NOISE).all(), error
    np.testing.assert_allclose(std[..., :2].mean(axis=(0, 1)), NOISE, rtol=0.15)
    assert np.abs(mean[..., 2] - every.rewards).mean() < 0.05 * every.rewards.std()
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.3


def test_the_best_weights_on_validation_are_kept_when_what_is_learned_is_noise():
    data = ensemble.EnsembleData(train=transitions(24, noise=5.0), validation=transitions(200, seed=1, noise=5.0))
    state, config, _ = train(data, num_steps=400, hidden_dims=(64, 64), weight_decay=0.0)
    every = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), data.validation)
    _, last, _ = ensemble.losses(state.params, every, config=config)
    _, best, _ = ensemble.losses(state.best, every, config=config)
    np.testing.assert_allclose(best, state.best_loss, rtol=1e-4)
    assert (best < last - 0.1).all()


def test_members_learn_from_samples_of_their_own_that_stay_the_same():
    data = ensemble.EnsembleData(train=transitions(50), validation=transitions(20, seed=1))
    first, *_ = train(data, num_steps=20)
    again, *_ = train(data, num_steps=20)
    for one, other in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = np.asarray(ensemble._draw_rows(np.uint32(0), 3, 2, 4000, 50))
    counts = np.stack([np.bincount(row, minlength=50) for row in rows])
    left_out = (counts == 0).mean(axis=1)  # a bootstrap sample leaves out 1 / e of the rows
    assert ((left_out > 0.2) & (left_out < 0.55)).all() and ((counts[0] == 0) != (counts[1] == 0)).any()


def test_samples_that_the_members_cannot_share_are_refused():
    config = ensemble.EnsembleConfig(observation_dim=2, action_dim=1)
    with pytest.raises(ValueError, match="12 samples must be a multiple of the 5 members"):
        ensemble.root(np.zeros([1, 2]), num_samples=12, config=config)
    with pytest.raises(ValueError, match="ensemble_train.num_steps=0 must be at least 1"):
        dataclasses.replace(ensemble.EnsembleTrainConfig(), num_steps=0)
