"""Behaviour cloning, Decision Transformer and CQL against plain numpy, and on four devices against one."""

import dataclasses
import functools
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_points import ROOT
from scipy import stats
from transform_checks import check_transforms

from tt_jax import bc, cql, data_parallel, decision_transformer, learners, rollouts, spaces, trajectories

DT = decision_transformer
LENGTHS = [3, 5, 1]
REWARDS = np.array([1.0, 2.0, 3.0, 10.0, 0.0, -1.0, 0.0, 5.0, 20.0])
SETTINGS = {
    bc: {"hidden_dims": (8, 8)},
    cql: {"hidden_dims": (8, 8), "num_samples": 3, "lagrange_gap": 1.0},
    DT: {"window": 4, "num_layers": 1, "embed_dim": 8, "return_scale": 10.0, "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    num_steps = sum(LENGTHS)
    return trajectories.Trajectories(
        observations=rng.normal(2.0, 3.0, size=(num_steps, 3)).astype(np.float32),
        final_observations=rng.normal(size=(len(LENGTHS), 3)).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(num_steps, 2)).astype(np.float32),
        rewards=REWARDS,
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]),
        terminated=np.array([True, False, True]),
        max_path_length=7,
    )


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda module: module.__name__.split(".")[1])
def learner(request, data):
    """A method, its configuration, what it learns from, and a state before the first update."""
    return make_learner(request.param, data)


def make_learner(module, data, **settings):
    config, units, store = module.prepare(data, SETTINGS[module] | settings)
    return module, config, store, module.init(jax.random.key(3), config=config, units=units)


def numpy_mlp(params, x):
    for i in range(len(params)):
        kernel, bias = (np.asarray(params[f"Dense_{i}"][name], np.float64) for name in ("kernel", "bias"))
        x = x @ kernel + bias
        x = np.maximum(x, 0) if i < len(params) - 1 else x
    return x


# Any method


@pytest.mark.parametrize("module", [bc, *(pytest.param(each, marks=pytest.mark.slow) for each in (cql, DT))])
def test_every_learner_on_four_devices_takes_the_steps_of_one_that_is_alone(data, module):
    _, config, store, state = make_learner(module, data)
    num_rows, size, seed = len(store.actions), 8, 5
    train_config = learners.TrainConfig(batch_size=size, num_seeds=2, steps_per_call=3)
    init_fn = functools.partial(module.init, config=config, units=state.params["units"])
    train_fn = learners.make_train_fn(
        config=train_config,
        update_fn=functools.partial(module.update, config=config),
        batch_fn=functools.partial(module.batch, config=config),
        num_rows=num_rows,
    )
    start = learners.init(seed, num_seeds=2, init_fn=init_fn)
    arguments = map(data_parallel.replicate, (start, store, np.uint32(seed), np.int32(3)))
    together, metrics = data_parallel.unreplicate(train_fn(*arguments))

    update = jax.jit(functools.partial(module.update, config=config))
    for learner_index in range(2):
        alone = init_fn(jax.random.key(seed + learner_index))
        for step in range(3):
            root = jax.random.key(seed + learner_index)
            key, noise = (jax.random.fold_in(jax.random.fold_in(root, use), step) for use in (1, 2))
            rows = jax.random.randint(key, [size], 0, num_rows)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(noise, jnp.arange(size))
            stored = jax.tree.map(jnp.asarray, store)
            alone, expected = update(alone, module.batch(stored, rows, config=config), keys)
            got = {name: values[step, learner_index] for name, values in metrics.items()}
            chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-4)
        got = jax.tree.map(lambda x, i=learner_index: x[i], together)
        chex.assert_trees_all_close(got.params, alone.params, rtol=1e-3, atol=1e-4)


def test_policies_act_within_bounds_and_as_alone(learner, data):
    module, config, _, state = learner
    low, high = np.array([-3.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32)
    units = state.params["units"] | {"action_center": (low + high) / 2, "action_scale": (high - low) / 2}
    params = state.params | {"units": units}
    episodes = [play(data, length) for length in (0, 2, 6)]
    inputs = jax.tree.map(lambda leaf: leaf[:, None], module.encode(episodes, config=config))
    found = check_transforms(lambda x: module.act(params, x, config=config), inputs, rtol=1e-4)
    actions = np.asarray(found)[:, 0]
    assert actions.shape == (3, 2) and (low < actions).all() and (actions < high).all()
    assert len(np.unique(actions)) == 6


def play(data, length):
    """Return a running episode that repeats the data's first steps."""
    return rollouts.Episode(
        seed=0,
        observations=list(data.observations[: length + 1]),
        actions=list(data.actions[:length]),
        rewards=REWARDS[:length].tolist(),
    )


def test_the_worked_example_of_the_docs_learns(data):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "baselines.md").read_text(), re.DOTALL)[1]
    module = types.ModuleType("least_squares")
    exec(code, module.__dict__)
    config, units, store = module.prepare(data, SETTINGS[bc] | {"learning_rate": 1e-2})
    state = module.init(jax.random.key(0), config=config, units=units)
    update = jax.jit(functools.partial(module.update, config=config))
    for _ in range(300):
        before, (state, metrics) = state, update(state, module.batch(store, np.arange(9)))
    error = module.act(before.params, data.observations, config=config) - data.actions
    np.testing.assert_allclose(metrics["actor_loss"], np.mean(np.square(error)), rtol=1e-4)
    assert metrics["actor_loss"] < 0.1 * np.mean(np.square(data.actions))


# Behaviour cloning


def test_the_loss_of_behaviour_cloning_is_the_mean_log_likelihood_of_a_gaussian(data):
    module, config, store, state = make_learner(bc, data)
    _, metrics = module.update(state, store, config=config)
    observations = data.observations.astype(np.float64)
    standard = (observations - observations.mean(axis=0)) / observations.std(axis=0)
    mean = np.tanh(numpy_mlp(state.params["actor"]["mlp"], standard))
    expected = -stats.norm.logpdf(data.actions, mean, 1.0).sum(axis=1).mean()  # log_std is 0 at first
    np.testing.assert_allclose(metrics["actor_loss"], expected, rtol=1e-5)


def test_updates_of_behaviour_cloning_bring_the_policy_to_the_data(data):
    module, config, store, state = make_learner(bc, data, learning_rate=1e-2)
    update = jax.jit(functools.partial(module.update, config=config))
    for _ in range(400):
        state, _ = update(state, store)
    np.testing.assert_allclose(module.act(state.params, data.observations, config=config), data.actions, atol=0.05)


def test_behaviour_cloning_of_discrete_actions_learns_their_frequencies(data):
    """Where all observations are equal, the least loss is the entropy, summed over the dimensions."""
    actions = np.float32([[0, 5]] * 5 + [[1, 5]] * 3 + [[2, 6]])
    columns = spaces.Columns(low=np.array([0, 5]), high=np.array([2, 6]), is_discrete=np.ones(2, bool))
    alike = dataclasses.replace(
        data, observations=np.zeros_like(data.observations), actions=actions, action_columns=columns
    )
    module, config, store, state = make_learner(bc, alike, learning_rate=1e-2)
    update = jax.jit(functools.partial(module.update, config=config))
    for _ in range(400):
        state, metrics = update(state, store)
    entropy = stats.entropy([5 / 9, 3 / 9, 1 / 9]) + stats.entropy([8 / 9, 1 / 9])
    np.testing.assert_allclose(metrics["actor_loss"], entropy, rtol=1e-3)
    np.testing.assert_array_equal(module.act(state.params, alike.observations[:2], config=config), [[0, 5]] * 2)
    for other in (cql, DT):
        with pytest.raises(ValueError, match="are discrete, this method needs a Box"):
            other.prepare(alike, SETTINGS[other])


def test_the_best_episodes_are_those_of_the_largest_returns_in_their_order(data):
    assert trajectories.returns(data).tolist() == [6.0, 14.0, 20.0]
    np.testing.assert_array_equal(bc.best_episodes(data, share=0.67).rewards, REWARDS[3:])
    np.testing.assert_array_equal(bc.best_episodes(data, share=0.01).rewards, [20.0])
    np.testing.assert_array_equal(bc.best_episodes(data, share=1.0).rewards, REWARDS)
    with pytest.raises(ValueError, match=r"best_share=0.0 must be in \(0, 1\]"):
        bc.Config(observation_dim=1, action_dim=1, best_share=0.0)


# Decision Transformer


def test_windows_hold_returns_to_go_and_end_with_their_episode(data):
    _, config, store, _ = make_learner(DT, data)
    assert config.targets == (20.0, 10.0) and config.max_timesteps == 7
    windows = DT.batch(jax.tree.map(jnp.asarray, store), np.array([0, 4, 8]), config=config)
    np.testing.assert_array_equal(windows.returns_to_go, [[6, 5, 3, 0], [4, 4, 5, 5], [20, 0, 0, 0]])
    np.testing.assert_array_equal(windows.timesteps, [[0, 1, 2, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
    np.testing.assert_array_equal(windows.left, [[3, 2, 1, 0], [4, 3, 2, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(windows.actions[0, :3], data.actions[:3])
    np.testing.assert_array_equal(windows.actions[0, 3], [0, 0])
    np.testing.assert_array_equal(windows.observations[1], data.observations[4:8])


def test_the_loss_of_the_decision_transformer_counts_real_steps_alone(data):
    module, config, store, state = make_learner(DT, data)
    windows = module.batch(jax.tree.map(jnp.asarray, store), np.array([0, 4, 8]), config=config)
    update = jax.jit(functools.partial(module.update, config=config))
    _, metrics = update(state, windows)
    predicted = np.asarray(module.predict(state.params, windows, config=config))
    errors = [(predicted[i, k] - windows.actions[i, k]) ** 2 for i, n in enumerate((3, 4, 1)) for k in range(n)]
    np.testing.assert_allclose(metrics["loss"], np.mean(errors), rtol=1e-5)
    junk = jnp.where(windows.left == 0, 7.0, 0.0)
    filled = windows.replace(
        actions=windows.actions + junk[..., None],
        observations=windows.observations + junk[..., None],
        returns_to_go=windows.returns_to_go + junk,
    )
    np.testing.assert_array_equal(update(state, filled)[1]["loss"], metrics["loss"])


def test_an_action_is_predicted_from_what_is_before_it_alone(data):
    module, config, store, state = make_learner(DT, data)
    windows = module.batch(jax.tree.map(jnp.asarray, store), np.array([3]), config=config)
    model = state.params["model"]
    block = {name: jax.tree.map(lambda leaf: 8 * leaf, model["blocks_0"][name]) for name in ("qkv", "projection")}
    model = model | {"blocks_0": model["blocks_0"] | block}  # attention that does something
    predict = jax.jit(functools.partial(module.predict, state.params | {"model": model}, config=config))
    base = predict(windows)
    changed = {  # the first step whose prediction sees a change in step 1
        "returns_to_go": 1,
        "observations": 1,
        "timesteps": 1,
        "actions": 2,
    }
    for name, first in changed.items():
        leaf = getattr(windows, name)
        moved = predict(windows.replace(**{name: leaf.at[:, 1].add(1 if name == "timesteps" else 50)}))
        np.testing.assert_array_equal(moved[:, :first], base[:, :first])
        assert (np.abs(moved[:, first] - base[:, first]) > 1e-4).any(), name


def test_returns_to_go_are_counted_down_while_an_episode_runs(data):
    _, config, store, _ = make_learner(DT, data, targets=(100.0, 50.0))
    steps = DT.encode([play(data, 0), play(data, 2), play(data, 5)], config=config)
    np.testing.assert_array_equal(steps.returns_to_go, [[100, 0, 0, 0], [100, 99, 97, 0], [97, 94, 84, 84]])
    np.testing.assert_array_equal(steps.timesteps, [[0, 0, 0, 0], [0, 1, 2, 0], [2, 3, 4, 5]])
    np.testing.assert_array_equal(steps.left > 0, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(steps.observations[2], data.observations[2:6])
    np.testing.assert_array_equal(steps.actions[2, :3], data.actions[2:5])
    np.testing.assert_array_equal(steps.actions[2, 3], [0, 0])
    late = rollouts.Episode(seed=0, observations=[np.zeros(3)] * 10, actions=[np.zeros(2)] * 9, rewards=[0.0] * 9)
    np.testing.assert_array_equal(DT.encode([late], config=config).timesteps, [[6, 6, 6, 6]])


# CQL


def test_the_penalty_estimates_the_integral_over_the_actions_by_importance_sampling():
    slope, count, rng = 3.0, 40_000, np.random.default_rng(0)
    uniform = rng.uniform(-1, 1, count)
    raw = rng.normal(0.3, 0.8, count)  # a squashed Gaussian
    log_policy = stats.norm.logpdf(raw, 0.3, 0.8) - np.log(1 - np.tanh(raw) ** 2)
    samples = slope * np.concatenate([uniform, np.tanh(raw)])[None, :, None]  # Q(a) = slope a, of one critic
    log_density = np.concatenate([np.full(count, -np.log(2)), log_policy])[:, None]
    found = cql.penalty(jnp.asarray(samples, jnp.float32), jnp.asarray(log_density, jnp.float32), jnp.full([1, 1], 0.5))
    log_integral = np.log((np.exp(slope) - np.exp(-slope)) / slope)
    np.testing.assert_allclose(found[0, 0], np.log(2 * count) + log_integral - 0.5, atol=0.02)


def test_densities_of_squashed_actions_follow_from_the_change_of_variables(data):
    _, config, _, state = make_learner(cql, data)
    actor = jax.tree.map(lambda leaf: 3 * leaf, state.params["actor"])
    observations = jnp.asarray(data.observations[:4])
    noise = np.random.default_rng(0).normal(size=(5, 4, 2)).astype(np.float32)
    actions, log_prob = jax.jit(cql.sample)(actor, observations, noise)
    mean, log_std = np.split(numpy_mlp(actor, np.asarray(observations, np.float64)), 2, axis=-1)
    raw = np.arctanh(np.asarray(actions, np.float64))
    expected = stats.norm.logpdf(raw, mean, np.exp(log_std - 1)) - np.log1p(-(np.asarray(actions, np.float64) ** 2))
    np.testing.assert_allclose(log_prob, expected.sum(axis=-1), rtol=1e-2)
    np.testing.assert_allclose(actions, np.tanh(mean + np.exp(log_std - 1) * noise), atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"lagrange_gap": 0.0}, {"lagrange_gap": 2.0, "max_backup": True, "reward_scale": 3.0}], ids=str
)
def test_the_losses_of_cql_are_those_of_its_equations(data, settings):
    _, config, store, state = make_learner(cql, data, discount=0.9, **settings)
    weight = 1.7 if config.lagrange_gap else 1.0
    scalars = {"log_alpha": jnp.log(0.5), "log_weight": jnp.log(1.7)}
    state = state.replace(params=state.params | jax.tree.map(jnp.float32, scalars))
    params, keys = state.params, jax.random.split(jax.random.key(1), len(store.actions))
    new, metrics = jax.jit(functools.partial(cql.update, config=config))(state, store, keys)

    noise, uniform = jax.tree.map(np.asarray, cql._draw(keys, config))
    m, rows = config.num_samples, len(store.actions)
    mean, std = data.observations.astype(np.float64).mean(axis=0), data.observations.astype(np.float64).std(axis=0)
    here, after = ((each - mean) / std for each in (store.observations, store.next_observations))

    def policy(observation, noise):
        mean, log_std = np.split(numpy_mlp(params["actor"], observation), 2, axis=-1)
        action = np.tanh(mean + np.exp(log_std - 1) * noise)
        density = stats.norm.logpdf(noise) - (log_std - 1) - np.log(1 - action**2)
        return action, density.sum(axis=-1)

    def q(name, observation, action):
        stack = [jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in (0, 1)]
        return np.stack([numpy_mlp(each, np.concatenate([observation, action], axis=-1))[..., 0] for each in stack])

    gap, error = np.zeros(2), np.zeros(2)
    for i in range(rows):  # one transition after the other
        next_actions = [policy(after[i], noise[1 + m + j, i]) for j in range(m)]
        backups = [q("target_critic", after[i], action).min() for action, _ in next_actions]
        backup = max(backups) if config.max_backup else backups[0]
        target = config.reward_scale * store.rewards[i] + 0.9 * store.not_terminal[i] * backup
        here_actions = [policy(here[i], noise[1 + j, i]) for j in range(m)]
        candidates = [(uniform[j, i], -2 * np.log(2)) for j in range(m)] + here_actions + next_actions
        total = sum(np.exp(q("critic", here[i], action)) / np.exp(density) for action, density in candidates)
        gap += (np.log(total) - q("critic", here[i], store.actions[i])) / rows
        error += (q("critic", here[i], store.actions[i]) - target) ** 2 / rows
    drawn = [policy(here[i], noise[0, i]) for i in range(rows)]
    entropy = -np.mean([density for _, density in drawn])
    values = [q("critic", here[i], action).min() for i, (action, _) in enumerate(drawn)]

    expected = {
        "gap": gap.mean(),
        "bellman_error": error.mean(),
        "critic_loss": error.sum() + 5.0 * weight * (gap - config.lagrange_gap).sum(),
        "entropy": entropy,
        "actor_loss": -0.5 * entropy - np.mean(values),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    # The first step of Adam has the size of the rate and the sign of the gradient.
    step = -config.actor_learning_rate * np.sign(entropy + 2)
    np.testing.assert_allclose(new.params["log_alpha"] - params["log_alpha"], step, rtol=1e-2)
    step = config.critic_learning_rate * np.sign(gap.mean() - config.lagrange_gap) if config.lagrange_gap else 0.0
    np.testing.assert_allclose(new.params["log_weight"] - params["log_weight"], step, rtol=1e-2)
    old, moved, now = (
        jax.tree.leaves(each)[1]
        for each in (params["target_critic"], new.params["target_critic"], new.params["critic"])
    )
    np.testing.assert_allclose(moved, old + config.tau * (now - old), rtol=1e-4, atol=1e-6)


def test_cql_prefers_the_actions_of_the_data(data):
    _, config, store, state = make_learner(cql, data, critic_learning_rate=3e-3)
    update = jax.jit(functools.partial(cql.update, config=config))
    gaps = []
    for step in range(200):
        state, metrics = update(state, store, jax.random.split(jax.random.key(step), len(store.actions)))
        gaps.append(float(metrics["gap"]))
    assert np.mean(gaps[-20:]) < np.mean(gaps[:20]) - 1.0
