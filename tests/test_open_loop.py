"""Open-loop predictions and their measures, where the answer is known."""

import functools
import math

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tt_jax import densities, ensemble, open_loop, sampling, tokenization, transformer, types, window

# A linear system with known noise: x' = x A' + a B' + noise, reward = 2 a.
A, B, NOISE = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([[0.5], [0.3]]), np.array([0.1, 0.3])
HORIZON, NUM_STARTS = 6, 3
RNG = np.random.default_rng(0)
START = RNG.normal(size=(NUM_STARTS, 2))
SCALE = np.array([0.5, 2.0])


def real_future():
    actions, states, state = RNG.normal(size=(NUM_STARTS, HORIZON, 1)), [], START
    for step in range(HORIZON):
        state = state @ A.T + actions[:, step] @ B.T + NOISE * RNG.normal(size=state.shape)
        states.append(state)
    future = open_loop.Future(actions=actions, rewards=2 * actions[..., 0], states=np.stack(states, axis=1))
    return jax.tree.map(np.float32, future)


FUTURE = real_future()


def closed_form():
    """Return the mean [B, H, 2] and the deviation [H, 2] of the states given start and actions."""
    means, deviations, mean, covariance = [], [], START, np.zeros([2, 2])
    for step in range(HORIZON):
        mean = mean @ A.T + FUTURE.actions[:, step] @ B.T
        covariance = A @ covariance @ A.T + np.diag(NOISE**2)
        means.append(mean)
        deviations.append(np.sqrt(np.diag(covariance)))
    return np.stack(means, axis=1), np.stack(deviations)


def linear_ensemble(*, shifts=(0.0, 0.0), noise=NOISE):
    """Make networks without hidden layers that are the system, their changes shifted by what tells members apart."""
    config = ensemble.EnsembleConfig(observation_dim=2, action_dim=1, num_members=len(shifts), hidden_dims=())
    unit = {"input": (np.zeros(3), np.ones(3)), "output": (np.zeros(3), np.ones(3))}
    unit = {name: dict(zip(("center", "scale"), map(np.float32, pair), strict=True)) for name, pair in unit.items()}
    params = ensemble.init(jax.random.key(0), config=config, units=unit, num_steps=1).params
    members = jax.tree.map(np.array, params["members"])
    change = np.concatenate([(A - np.eye(2)).T, B.T])  # [3, 2]
    layer = members["MLP_0"]["Dense_0"]
    layer["kernel"][:] = np.concatenate([change, [[0], [0], [2]], np.zeros([3, 3])], axis=1)
    layer["bias"][:, :2] = np.array(shifts)[:, None]
    # Far between its bounds a variance is what the network says.
    members["max_log_var"][:], members["min_log_var"][:] = 50.0, -50.0
    layer["bias"][:, 3:] = 2 * np.log([*noise, 0.01])
    return params | {"members": members}, config


def roll_out_ensemble(params, config, *, num_samples, **settings):
    step = functools.partial(ensemble.step, config=config, **settings)

    @jax.jit
    def run(params, keys):
        root = ensemble.root(jnp.float32(START), num_samples=num_samples, config=config)
        return open_loop.roll_out(params, keys, root, FUTURE, step_fn=step, scale=SCALE, num_kept=num_samples)

    return run(params, jax.random.split(jax.random.key(1), NUM_STARTS))


@pytest.mark.parametrize("resample", [False, True])
def test_the_true_linear_system_has_the_likelihood_and_the_errors_of_its_closed_form(resample):
    found = roll_out_ensemble(*linear_ensemble(), num_samples=20_000, resample=resample)
    mean, deviation = closed_form()
    np.testing.assert_allclose(found.mean, mean, atol=0.02)
    np.testing.assert_allclose(np.std(found.samples, axis=2), np.broadcast_to(deviation, mean.shape), rtol=0.03)
    distance = (FUTURE.states - mean) / deviation
    expected = -0.5 * (distance**2 + np.log(2 * np.pi)) - np.log(deviation)
    np.testing.assert_allclose(found.log_density, expected, atol=0.05)
    np.testing.assert_allclose(found.log_density[:, 0], expected[:, 0], atol=1e-4)  # one step ahead it is exact
    # E|x - real| of a normal x, by its folded normal.
    erf = np.vectorize(math.erf)(distance / np.sqrt(2))
    error = deviation * (np.sqrt(2 / np.pi) * np.exp(-(distance**2) / 2) + distance * erf)
    np.testing.assert_allclose(found.error, error / SCALE, rtol=0.04)
    np.testing.assert_allclose(found.rewards, FUTURE.rewards, atol=1e-3)


def test_a_member_for_good_drifts_linearly_and_one_for_a_step_diffuses():
    # Members whose shifts are +-0.2 along an identity: variances h^2 0.2^2 and h 0.2^2, beside h noise^2.
    params, config = linear_ensemble(shifts=(0.2, -0.2), noise=(0.05, 0.05))
    kernel = params["members"]["MLP_0"]["Dense_0"]["kernel"]
    kernel[:, :2] = 0
    steps = np.arange(1, HORIZON + 1)
    for resample, drift in ((False, steps**2), (True, steps)):
        found = roll_out_ensemble(params, config, num_samples=20_000, resample=resample)
        variance = np.var(found.samples, axis=2)
        expected = np.broadcast_to((0.04 * drift + 0.0025 * steps)[None, :, None], variance.shape)
        np.testing.assert_allclose(variance, expected, rtol=0.05)


def test_bounds_hold_the_states_and_leave_the_density():
    params, config = linear_ensemble(shifts=(5.0, 5.0))
    bounds = np.float32([-1, -1]), np.float32([1, 2])
    found = roll_out_ensemble(params, config, num_samples=10, resample=True, bounds=bounds)
    samples = np.asarray(found.samples)
    assert (samples <= bounds[1]).all() and (samples >= bounds[0]).all()
    free = roll_out_ensemble(params, config, num_samples=10, resample=True)
    np.testing.assert_allclose(found.log_density[:, 0], free.log_density[:, 0], rtol=1e-5)


def test_the_density_of_an_ensemble_integrates_to_one():
    params, config = linear_ensemble(shifts=(1.0, -2.0))
    grid = np.linspace(-8, 8, 3001)
    state = ensemble.root(jnp.zeros([len(grid), 2]), num_samples=2, config=config)
    keys = jax.random.split(jax.random.key(0), len(grid))
    real, actions = np.stack([grid, grid], axis=1), np.zeros([len(grid), 1])
    _, found = jax.jit(functools.partial(ensemble.step, config=config, resample=False))(
        params, keys, state, jnp.float32(actions), jnp.float32(real)
    )
    integral = np.exp(found.log_density).sum(axis=0) * (grid[1] - grid[0])
    np.testing.assert_allclose(integral, 1, rtol=1e-4)


# The transformer

SPEC, CONFIG, DIM = golden.SPEC, golden.CONFIG, golden.SPEC.transition_dim
MAX, KEEP = LIMITS = (4, 2)


@pytest.fixture(scope="module")
def token_model():
    discretizer = tokenization.fit(RNG.normal(size=(500, DIM)), num_bins=SPEC.num_bins)
    params = golden.params_from(golden.load("gpt"), "state/")
    return open_loop.TokenModel(
        transformer=jax.tree.map(jnp.asarray, params), discretizer=discretizer, cells=densities.cells(discretizer)
    )


def token_settings(num_samples=1):
    return window.WindowConfig(
        config=CONFIG, limits=LIMITS, num_beams=num_samples, num_slots=MAX, share_ancestors=False
    )


def token_data(horizon):
    rng = np.random.default_rng(1)
    past = rng.integers(SPEC.num_bins, size=(2, KEEP, DIM)).astype(np.int32)
    observed = rng.integers(SPEC.num_bins, size=(2, 3)).astype(np.int32)
    actions, states = rng.normal(size=(2, horizon, 2)), rng.normal(size=(2, horizon, 3))
    future = open_loop.Future(actions=actions, rewards=np.zeros([2, horizon]), states=states)
    return types.Context(tokens=past, length=np.full(2, KEEP, np.int32)), observed, jax.tree.map(np.float32, future)


def roll_out_tokens(model, context, observed, future, *, num_samples=1, **settings):
    config = token_settings(num_samples)
    step = functools.partial(open_loop.transformer_step, config=config, **settings)

    @jax.jit
    def run(model, keys, future):
        root = open_loop.transformer_root(model, context, observed, config=config)
        return open_loop.roll_out(model, keys, root, future, step_fn=step, scale=np.ones(3), num_kept=num_samples)

    return run(model, jax.random.split(jax.random.key(3), len(observed)), future)


@pytest.mark.parametrize("own_actions", [False, True])
def test_greedy_predictions_are_those_of_whole_passes_over_the_sliding_window(token_model, own_actions):
    context, observed, future = token_data(horizon=7)
    settings = {"filters": sampling.Filters(top_k=1), "own_actions": own_actions}
    found = roll_out_tokens(token_model, context, observed, future, **settings)
    apply = jax.jit(lambda tokens: transformer.apply(token_model.transformer, tokens, config=CONFIG))
    given = tokenization.encode(token_model.discretizer, np.float64(future.actions), dims=slice(3, 5))
    real = tokenization.encode(token_model.discretizer, np.float64(future.states), dims=slice(3))
    widths = np.diff(token_model.discretizer.thresholds, axis=1)

    read = np.concatenate([context.tokens.reshape(2, -1), observed], axis=1)
    for step in range(7):
        predicted, log_density = [], []
        for place in range(DIM):
            padded = np.pad(read, [(0, 0), (0, CONFIG.block_size - read.shape[1])])
            logits = np.array(apply(padded)[:, read.shape[1] - 1, : SPEC.num_bins], np.float64)  # without stop
            token = logits.argmax(axis=1)
            if place < 2 and not own_actions:
                token = given[:, step, place]
            if place > 3:
                log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                target = real[:, step, place - 4]
                log_density.append(log_probs[[0, 1], target] - np.log(widths[place - 4][target]))
            predicted.append(token)
            if read.shape[1] == MAX * DIM - 1:
                read = read[:, (MAX - KEEP) * DIM :]
            read = np.concatenate([read, token[:, None]], axis=1).astype(np.int32)
        states = tokenization.decode(token_model.discretizer, np.stack(predicted[4:], axis=1), dims=slice(3))
        np.testing.assert_allclose(found.samples[:, step, 0], states, rtol=1e-5)
        np.testing.assert_allclose(found.log_density[:, step], np.stack(log_density, axis=1), rtol=1e-4, atol=1e-4)


def test_one_step_ahead_samples_are_as_frequent_as_their_density_says(token_model):
    context, observed, future = token_data(horizon=1)
    found = roll_out_tokens(token_model, context, observed, future, num_samples=4000, filters=sampling.Filters())
    real = tokenization.encode(token_model.discretizer, np.float64(future.states[:, 0]), dims=slice(3))
    tokens = tokenization.encode(token_model.discretizer, np.float64(found.samples[:, 0]), dims=slice(3))
    widths = np.diff(token_model.discretizer.thresholds, axis=1)[np.arange(3), real]
    frequency = (tokens == real[:, None]).mean(axis=1)
    np.testing.assert_allclose(frequency, np.exp(found.log_density[:, 0]) * widths, atol=0.025)


@pytest.mark.slow
def test_one_program_predicts_as_far_as_one_likes_and_is_cut_short_alike(token_model):
    context, observed, future = token_data(horizon=40)
    far = roll_out_tokens(token_model, context, observed, future, filters=sampling.Filters())
    near = jax.tree.map(lambda leaf: leaf[:, :3], future)
    near = roll_out_tokens(token_model, context, observed, near, filters=sampling.Filters())
    chex.assert_trees_all_close(near, jax.tree.map(lambda leaf: leaf[:, :3], far), rtol=1e-4, atol=1e-5)


# Energy distance


def test_the_energy_distance_of_two_points_is_twice_theirs():
    predicted, real = np.full([5, 2, 1], 3.0), np.full([5, 1], 1.0)
    assert open_loop.energy_distance(predicted, real) == pytest.approx((4.0, 0.0))


def test_the_energy_distance_of_the_truth_is_zero_in_the_mean_and_its_error_no_less_than_the_spread():
    rng = np.random.default_rng(5)
    truth = [open_loop.energy_distance(rng.normal(size=(20, 2, 3)), rng.normal(size=(20, 3))) for _ in range(200)]
    values, errors = np.array(truth).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), 2**0.5 * values.std(), rtol=0.15)  # as the jackknife does
    shifted, error = open_loop.energy_distance(rng.normal(size=(20, 2, 3)) + 2, rng.normal(size=(20, 3)))
    assert shifted > 3 * error > 0
