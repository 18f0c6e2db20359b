"""Predicted tokens are densities of real values: they integrate to one and give known values."""

import numpy as np
import pytest
from transform_checks import check_transforms

from tt_jax import densities, tokenization

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=1000)
COLUMNS = {
    "continuous": NORMAL,
    "with a point mass": np.where(RNG.random(1000) < 0.3, 0.0, NORMAL),
    "largest value often": np.minimum(NORMAL, 0.5),
    "few values": RNG.choice([-1.0, 0.0, 5.0], 1000),
    "constant": np.full(1000, 2.0),
}
VALUES = np.stack(list(COLUMNS.values()), axis=1)
DISCRETIZER = tokenization.fit(VALUES, num_bins=12, distinct_values=True)
CELLS = densities.cells(DISCRETIZER)
LOG_PROBS = np.log(RNG.dirichlet(np.ones(13), size=len(COLUMNS))).astype(np.float32)  # the last is the stop token


def log_density_at(values, dim, log_probs):
    tokens = tokenization.encode(DISCRETIZER, values[:, None], dims=slice(dim, dim + 1))[:, 0]
    probs = np.broadcast_to(log_probs, (len(values), log_probs.shape[-1]))
    return np.asarray(densities.log_density(CELLS, probs, tokens, dims=np.full(len(values), dim)))


def test_columns_are_told_apart():
    assert densities.column_kinds(DISCRETIZER) == ["continuous"] * 3 + ["discrete", "constant"]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_density_of_a_continuous_column_integrates_to_all_mass_but_that_of_stop(dim):
    edges = np.unique(DISCRETIZER.thresholds[dim])
    grid = np.linspace(edges[0], edges[-1], 400_001)
    middles = (grid[:-1] + grid[1:]) / 2
    integral = np.exp(log_density_at(middles, dim, LOG_PROBS[dim])).sum() * (grid[1] - grid[0])
    np.testing.assert_allclose(integral, 1 - np.exp(LOG_PROBS[dim, -1]), rtol=1e-4)


def test_the_probabilities_of_a_discrete_column_sum_to_all_mass_but_that_of_stop():
    total = np.exp(log_density_at(np.array([-1.0, 0.0, 5.0]), 3, LOG_PROBS[3])).sum()
    np.testing.assert_allclose(total, 1 - np.exp(LOG_PROBS[3, -1]), rtol=1e-5)
    no_stop = np.log(np.full(12, 1 / 12))
    # The value -1 has the first bin, 0 the second, and 5 all others.
    got = log_density_at(np.array([-1.0, 0.0, 5.0]), 3, no_stop)
    np.testing.assert_allclose(np.exp(got), [1 / 12, 1 / 12, 10 / 12], rtol=1e-5)


def test_a_constant_column_tells_nothing():
    got = log_density_at(np.array([2.0]), 4, np.log(RNG.dirichlet(np.ones(12))))
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_densities_are_mass_over_width_and_the_largest_value_shares_the_last_cell():
    discretizer = tokenization.Discretizer(
        thresholds=np.array([[0.0, 1.0, 3.0, 3.0, 3.0]]), centers=np.array([[0.5, 2.0, 3.0, 3.0]])
    )
    cells, log_probs = densities.cells(discretizer), np.log([[0.1, 0.2, 0.3, 0.4]] * 4)
    got = np.exp(densities.log_density(cells, log_probs, np.arange(4), dims=np.zeros(4, int)))
    np.testing.assert_allclose(got, [0.1, 0.45, 0.45, 0.45], rtol=1e-5)  # [0, 1) holds 0.1, [1, 3] the other 0.9


def test_coverage_of_an_interval_is_the_part_of_the_cell_inside():
    discretizer = tokenization.Discretizer(
        thresholds=np.array([[0.0, 1.0, 2.0, 3.0]]), centers=np.array([[0.5, 1.5, 2.5]])
    )
    cells, probs = densities.cells(discretizer), np.broadcast_to([0.2, 0.4, 0.4], (3, 3))
    got = densities.coverage(cells, probs, np.arange(3), np.array([0.5, 0.9]), dims=np.zeros(3, int))
    # The central half goes from 0.25 to 0.75 of the mass, 90% from 0.05 to 0.95.
    np.testing.assert_allclose(got, [[0, 0.75], [0.35 / 0.4, 1], [0.15 / 0.4, 0.35 / 0.4]], atol=1e-6)


def test_values_drawn_from_the_predictions_are_covered_as_the_levels_say():
    probs = RNG.dirichlet(np.ones(12), size=20_000)
    tokens = (probs.cumsum(axis=1) < RNG.random((20_000, 1))).sum(axis=1)
    levels = np.array([0.1, 0.5, 0.9])
    got = densities.coverage(CELLS, probs, tokens, levels, dims=np.zeros(20_000, int))
    np.testing.assert_allclose(np.mean(got, axis=0), levels, atol=0.01)


def test_log_density_and_coverage_are_pure():
    tokens, dims = RNG.integers(12, size=(4, 5)), RNG.integers(5, size=(4, 5))
    log_probs = np.log(RNG.dirichlet(np.ones(13), size=(4, 5))).astype(np.float32)
    check_transforms(
        lambda *rows: densities.log_density(CELLS, rows[0], rows[1], dims=rows[2]), log_probs, tokens, dims
    )
    check_transforms(
        lambda *rows: densities.coverage(CELLS, rows[0], rows[1], np.array([0.5]), dims=rows[2]),
        np.exp(log_probs[..., :-1]),
        tokens,
        dims,
    )
