"""MPPI and the cross-entropy method find the best actions of problems whose solution is known."""

import functools
import statistics

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_planning import make_proposal
from transform_checks import check_transforms

from tt_jax import action_search, planning

FREE = (-100.0, 100.0)
CEM = functools.partial(action_search.cem, num_candidates=64, num_iterations=8, num_elites=8)
MPPI = functools.partial(action_search.mppi, num_candidates=64, num_iterations=8, temperature=0.1)
BOTH = pytest.mark.parametrize("method_fn", [CEM, MPPI], ids=["cem", "mppi"])
NORMAL = statistics.NormalDist()


def scored(score_fn):
    """Return an evaluate_fn of scores [B, W] of actions [B, W, H, A] alone; the tokens are the actions, rounded."""

    def evaluate(params, rng_key, root, actions):
        return score_fn(actions), jnp.round(actions).astype(jnp.int32)

    return evaluate


def search(method_fn, evaluate_fn, *, mean, std, root=None, bounds=(-1.0, 1.0), params=None, seed=0, **settings):
    """Plan for environments that start at `mean` [B, H, A], with `std` everywhere."""

    def plan(params, keys, root, mean):
        stds = jnp.full(mean.shape, std)
        return method_fn(params, keys, root, mean, stds, bounds, evaluate_fn=evaluate_fn, **settings)

    return jax.jit(plan)(params, jax.random.split(jax.random.key(seed), len(mean)), root, mean)


def test_the_mean_of_mppi_moves_by_the_gradient_of_a_linear_score():
    # A normal density times exp(g a / temperature) is normal, with its mean moved by std^2 g / temperature.
    gradient = jnp.asarray([[[[1.0, -2.0], [0.5, 0.0]]]])  # [1, 1, H, A]
    evaluate = scored(lambda actions: jnp.sum(actions * gradient, axis=(2, 3)))
    settings = {"num_candidates": 50_000, "temperature": 4.0, "bounds": FREE, "std": 2.0}
    start = jnp.asarray([[[3.0, 0.0], [0.0, -1.0]]])
    for num_iterations in (1, 3):
        plans = search(MPPI, evaluate, mean=start, num_iterations=num_iterations, **settings)
        np.testing.assert_allclose(plans.actions, start + num_iterations * gradient[0], rtol=0, atol=0.15)


def test_cem_takes_mean_and_width_from_its_elites():
    # Of a linear score the elites are a normal distribution cut at the quantile q: its mean and variance are known.
    # The plan is the best candidate; made that by a bonus, the first one shows the mean of each iteration.
    share, std = 0.1, 2.0
    cut = NORMAL.inv_cdf(1 - share)
    rise = NORMAL.pdf(cut) / share
    width = np.sqrt(1 + cut * rise - rise**2)

    def show_mean(params, rng_key, root, actions):
        scores = actions[..., 0, 0].at[:, 0].add(1000.0)
        return scores, actions.astype(jnp.int32)

    settings = {"num_candidates": 50_000, "num_elites": 5_000, "bounds": FREE, "std": std}
    for num_iterations, expected in [(1, 0.0), (2, std * rise), (3, std * rise * (1 + width))]:
        plans = search(CEM, show_mean, mean=jnp.zeros([1, 1, 1]), num_iterations=num_iterations, **settings)
        np.testing.assert_allclose(plans.action, [[expected]], rtol=0, atol=0.05)


def linear_system():
    """Return matrices of s' = F s + G a with costs |s'|^2 + 0.1 |a|^2, a start, and the best 5 actions from it."""
    transition, control = np.array([[1.0, 0.5], [0.0, 1.0]]), np.array([[0.0], [0.5]])
    start, horizon = np.array([1.0, 0.5]), 5
    free, forced = [], np.zeros((2 * horizon, horizon))  # all states are free + forced @ actions
    for step in range(horizon):
        free.append(np.linalg.matrix_power(transition, step + 1) @ start)
        for earlier in range(step + 1):
            response = np.linalg.matrix_power(transition, step - earlier) @ control
            forced[2 * step : 2 * step + 2, earlier] = response[:, 0]
    rows = np.concatenate([forced, np.sqrt(0.1) * np.eye(horizon)])
    best = np.linalg.lstsq(rows, np.concatenate([-np.concatenate(free), np.zeros(horizon)]), rcond=None)[0]
    cost = np.sum((np.concatenate(free) + forced @ best) ** 2) + 0.1 * np.sum(best**2)
    return transition, control, start, best, cost


@pytest.mark.parametrize(
    "method_fn, std, atol",
    [(functools.partial(CEM, num_elites=20), 1.5, 0.05), (functools.partial(MPPI, temperature=0.02), 0.3, 0.15)],
    ids=["cem", "mppi"],
)
def test_the_plan_of_a_linear_system_with_quadratic_costs_is_that_of_least_squares(method_fn, std, atol):
    transition, control, start, best, cost = linear_system()
    assert np.abs(best).max() < 2.5

    def evaluate(params, rng_key, root, actions):
        def propose(params, rng_key, state, step):
            action = actions[:, :, step]  # [B, W, 1]
            after = jnp.einsum("ij,bwj->bwi", transition, state) + jnp.einsum("ij,bwj->bwi", control, action)
            reward = -jnp.sum(after**2, axis=-1, keepdims=True) - 0.1 * action**2
            return make_proposal(action, reward), after

        def advance(params, rng_key, state, pending, beam, expansion, step):
            return planning.take_beams(pending, beam)

        settings = {"propose_fn": propose, "advance_fn": advance, "discount": 1.0}
        num_plans, horizon = actions.shape[1:3]
        root = jnp.broadcast_to(root[:, None], (len(root), num_plans, 2))
        scores, _, tokens = planning.sample_plans(
            params, rng_key, root, horizon=horizon, num_plans=num_plans, **settings
        )
        return scores, tokens

    settings = {"num_candidates": 200, "num_iterations": 30, "bounds": (-4.0, 4.0), "std": std}
    root = jnp.asarray(start, jnp.float32)[None]
    plans = search(method_fn, evaluate, mean=jnp.zeros([1, 5, 1]), root=root, **settings)
    np.testing.assert_allclose(plans.actions[0, :, 0], best, rtol=0, atol=atol)
    np.testing.assert_allclose(plans.scores[0, 0], -cost, rtol=0.01)


def two_hills(actions):
    """Score by the distance to -0.8 everywhere, worth 1, or to 0.8 everywhere, worth 1.5; between them is nothing."""
    distance = [jnp.sum((actions - place) ** 2, axis=(2, 3)) for place in (-0.8, 0.8)]
    return jnp.exp(-4 * distance[0]) + 1.5 * jnp.exp(-4 * distance[1])


@BOTH
def test_of_two_hills_the_higher_one_is_climbed_and_not_the_middle_between_them(method_fn):
    plans = search(method_fn, scored(two_hills), mean=jnp.zeros([3, 2, 1]), std=0.7, num_candidates=256)
    np.testing.assert_allclose(plans.actions, np.full((3, 2, 1), 0.8), rtol=0, atol=0.1)


@BOTH
def test_the_loss_that_a_greedy_planner_avoids_is_taken_for_what_follows(method_fn):
    # Going right costs 1 per unit at once and pays 3 per unit in the end, if one stays in the right half.
    def score(actions):
        first, second = actions[:, :, 0, 0], actions[:, :, 1, 0]
        return -first + 3 * first * (second > 0.5)

    plans = search(method_fn, scored(score), mean=jnp.zeros([1, 2, 1]), std=1.0, bounds=(0.0, 1.0))
    assert plans.actions[0, 0, 0] > 0.9
    assert plans.actions[0, 1, 0] > 0.5


def test_actions_stay_within_bounds_of_each_dimension_and_reach_them():
    low, high = jnp.asarray([-1.0, 0.0]), jnp.asarray([0.5, 2.0])

    def evaluate(params, rng_key, root, actions):
        outside = jnp.any((actions < low[None, None, None]) | (actions > high[None, None, None]), axis=(2, 3))
        return jnp.sum(actions, axis=(2, 3)) + jnp.where(outside, 1000.0, 0.0), actions.astype(jnp.int32)

    for method_fn in (CEM, MPPI):
        plans = search(method_fn, evaluate, mean=jnp.zeros([1, 3, 2]), std=3.0, bounds=(low, high))
        assert plans.scores.max() < 1000
        np.testing.assert_allclose(plans.actions[0], np.tile([0.5, 2.0], (3, 1)), rtol=0, atol=0.2)


def test_more_iterations_of_cem_never_find_less_and_its_first_mean_counts():
    # A spike that no draw hits, on which the search starts; and a rough landscape.
    generator = np.random.default_rng(0)
    phases = jnp.asarray(generator.normal(size=(3, 2)), jnp.float32)
    evaluate = scored(lambda actions: jnp.sum(jnp.sin(9 * actions + phases[None, None]), axis=(2, 3)))
    settings = {"mean": jnp.zeros([4, 3, 2]), "std": 1.0}
    best = [search(CEM, evaluate, num_iterations=n, **settings).scores[:, 0] for n in (1, 2, 4)]
    assert (np.diff(best, axis=0) >= 0).all() and (np.ptp(best, axis=0) > 0).sum() >= 3

    start = jnp.full([1, 3, 2], 0.25)
    spike = scored(lambda actions: -jnp.any(actions != 0.25, axis=(2, 3)).astype(jnp.float32))
    plans = search(CEM, spike, mean=start, std=1.0)
    np.testing.assert_array_equal(plans.actions, start)


def test_the_last_plan_shifted_is_a_start_from_which_few_candidates_suffice():
    # The best action at time t is sin(t / 3), wherever one plans from.
    def evaluate(params, rng_key, root, actions):
        times = root[:, None] + jnp.arange(6)[None]
        return -jnp.sum((actions[..., 0] - jnp.sin(times / 3)[:, None]) ** 2, axis=2), actions.astype(jnp.int32)

    settings = {"num_candidates": 8, "num_iterations": 2, "num_elites": 2}
    last = jnp.sin(jnp.arange(6) / 3)[None, :, None]
    np.testing.assert_array_equal(action_search.shift(last)[0, :, 0], [*last[0, 1:, 0], last[0, -1, 0]])
    np.testing.assert_array_equal(action_search.shift(last, by=4)[0, :, 0], [*last[0, 4:, 0], *[last[0, -1, 0]] * 4])
    root = jnp.asarray([1.0])
    warm = search(CEM, evaluate, mean=action_search.shift(last), std=0.05, root=root, **settings)
    cold = search(CEM, evaluate, mean=jnp.zeros([1, 6, 1]), std=1.0, root=root, **settings)
    assert warm.scores[0, 0] > -0.1 > cold.scores[0, 0]


def test_what_is_scored_minus_infinity_is_never_followed():
    def evaluate(params, rng_key, root, actions):
        first = actions[..., 0, 0]
        return jnp.where((first > 0) | (root[:, None] < 0), -jnp.inf, first), actions.astype(jnp.int32)

    for method_fn in (CEM, MPPI):
        root = jnp.asarray([1.0, -1.0])  # in the second environment everything is forbidden
        plans = search(method_fn, evaluate, mean=jnp.full([2, 2, 1], -0.5), std=0.5, root=root)
        assert -0.1 < plans.action[0, 0] <= 0
        assert np.isfinite(plans.actions).all()
        assert np.isneginf(plans.scores[1]).all()


@pytest.mark.parametrize("length", [1, 2, 8, 15])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_noise_has_variance_1_at_every_step_and_the_spectrum_of_its_color(length, exponent):
    draw = functools.partial(action_search.colored_noise, shape=(length, 1), exponent=exponent)
    noise = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 8000)))[..., 0]
    np.testing.assert_allclose(noise.mean(axis=0), np.zeros(length), atol=0.06)
    np.testing.assert_allclose(noise.var(axis=0), np.ones(length), atol=0.07)
    power = np.mean(np.abs(np.fft.rfft(noise, axis=1)) ** 2, axis=0)
    frequency = np.maximum(np.arange(len(power)), 1)
    np.testing.assert_allclose(power / power[-1], (frequency / frequency[-1]) ** -exponent, rtol=0.1)
    if exponent == 0:
        white = jax.random.normal(jax.random.key(7), (length, 1))
        np.testing.assert_allclose(draw(jax.random.key(7)), white, rtol=0, atol=1e-6)


def test_colored_noise_finds_what_needs_the_same_action_for_long():
    # A swing of 12 steps that pays only if all actions have the same sign, which white noise nearly never draws.
    evaluate = scored(lambda actions: (jnp.sum(actions > 0, axis=(2, 3)) == 12).astype(jnp.float32))
    settings = {"mean": jnp.zeros([16, 12, 1]), "std": 1.0, "num_candidates": 256, "num_iterations": 1}
    white, red = (search(CEM, evaluate, noise_exponent=exponent, **settings).scores[:, 0] for exponent in (0.0, 2.0))
    assert white.sum() <= 3 and red.sum() >= 14


@BOTH
def test_a_plan_depends_on_its_own_root_and_key_alone_and_runs_under_transformations(method_fn):
    def evaluate(params, rng_key, root, actions):
        noise = jax.vmap(lambda key: jax.random.normal(key, actions.shape[1:2]))(rng_key)
        hills = jnp.sum(jnp.sin(5 * actions + root[:, None, None, None]), axis=(2, 3))
        return hills + params * noise, actions.astype(jnp.int32)

    settings = {"num_candidates": 12, "num_iterations": 3, "noise_exponent": 1.0, "evaluate_fn": evaluate}

    def plan(params, key, root, mean):
        return method_fn(params, key[None], root[None], mean[None], jnp.ones([1, 3, 2]), (-1.0, 1.0), **settings)

    keys, roots = jax.random.split(jax.random.key(0), 3), jnp.arange(3.0)
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2)), jnp.float32)
    alone = check_transforms(plan, jnp.full([3], 0.1), keys, roots, mean)
    together = method_fn(0.1, keys, roots, mean, jnp.ones([3, 3, 2]), (-1.0, 1.0), **settings)
    chex.assert_trees_all_close(together, jax.tree.map(lambda leaf: leaf[:, 0], alone), rtol=1e-5, atol=1e-5)
    assert (np.ptp(together.actions, axis=0) > 0.01).all()


def test_impossible_settings_are_refused():
    evaluate, mean = scored(two_hills), jnp.zeros([1, 2, 1])
    with pytest.raises(ValueError, match="temperature=0.0 must be positive"):
        search(MPPI, evaluate, mean=mean, std=1.0, temperature=0.0)
    with pytest.raises(ValueError, match="num_elites=65 must be between 1 and num_candidates=64"):
        search(CEM, evaluate, mean=mean, std=1.0, num_elites=65)
    for method_fn, settings in ((CEM, {"num_elites": 1}), (MPPI, {})):
        with pytest.raises(ValueError, match="num_candidates=1 must be at least 2 and num_iterations=8 at least 1"):
            search(method_fn, evaluate, mean=mean, std=1.0, num_candidates=1, **settings)
    with pytest.raises(AssertionError, match=r"\(1, 64\)"):
        search(CEM, lambda *arguments: (jnp.zeros([1, 3]), arguments[-1]), mean=mean, std=1.0)
