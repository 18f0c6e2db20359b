"""Tokens and decoded values are those of the reference, and what it gets wrong is mended as documented."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transform_checks import check_transforms

from tt_jax import tokenization


@pytest.fixture(scope="module")
def arrays():
    return golden.load("discretizer")


@pytest.fixture(scope="module")
def discretizer(arrays):
    return tokenization.fit(arrays["data"], num_bins=int(arrays["N"]))


def test_quantile_thresholds_and_bin_values_are_the_reference_s_to_the_last_bit(arrays, discretizer):
    np.testing.assert_array_equal(discretizer.thresholds, arrays["thresholds"].T)
    assert discretizer.thresholds.dtype == discretizer.centers.dtype == np.float64
    np.testing.assert_allclose(discretizer.centers, arrays["bin_midpoints"].T, rtol=0, atol=1e-10)
    from_float32 = tokenization.fit(arrays["f32/data"], num_bins=int(arrays["N"]))
    np.testing.assert_array_equal(from_float32.thresholds, arrays["f32/thresholds"].T.astype(np.float64))


@pytest.mark.parametrize(
    "values, tokens", [("data", "tokens"), ("probe_in", "probe_tokens"), ("edge_in", "edge_tokens")]
)
def test_values_at_between_and_beyond_the_thresholds_get_the_reference_s_tokens(arrays, discretizer, values, tokens):
    np.testing.assert_array_equal(tokenization.encode(discretizer, arrays[values]), arrays[tokens])


def test_decoded_tokens_are_the_reference_s_also_out_of_range(arrays, discretizer):
    np.testing.assert_allclose(tokenization.decode(discretizer, arrays["tokens"]), arrays["recon"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        tokenization.decode(discretizer, arrays["clip_tokens_in"]), arrays["clip_recon"], rtol=0, atol=1e-10
    )


def test_any_leading_axes_and_any_part_of_the_columns_can_be_encoded(arrays, discretizer):
    one = tokenization.encode(discretizer, arrays["one_d_in"])
    np.testing.assert_array_equal(one, arrays["one_d_tokens"][0])
    part = tokenization.encode(discretizer, arrays["subslice_in"], dims=slice(0, 4))
    np.testing.assert_array_equal(part, arrays["subslice_0_4_tokens"])
    cube = tokenization.encode(discretizer, arrays["data"][:24].reshape(2, 3, 4, 7)[..., 5:], dims=slice(5, 7))
    np.testing.assert_array_equal(cube.reshape(24, 2), arrays["tokens"][:24, 5:])
    recon = tokenization.decode(discretizer, cube, dims=slice(5, 7))
    np.testing.assert_allclose(recon.reshape(24, 2), arrays["recon"][:24, 5:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="values must have 7 columns, got 4; name a part of them with dims"):
        tokenization.encode(discretizer, arrays["subslice_in"])


def test_expectations_are_the_reference_s_and_do_not_make_up_for_the_stop_mass(arrays, discretizer):
    probs = arrays["probs"][..., :-1].astype(np.float64)
    for slot, dim, name in [
        (0, -2, "value_expectation_reward"),
        (1, -1, "value_expectation_value"),
        (0, 0, "expectation_dim0"),
    ]:
        got = tokenization.expectation(discretizer, probs[:, slot], dim=dim)
        np.testing.assert_allclose(got, arrays[name], rtol=0, atol=1e-10)
    assert tokenization.expectation(discretizer, np.zeros(len(discretizer.centers[0])), dim=0) == 0.0
    for slot, dim, name in [(0, -2, "reward"), (1, -1, "value")]:
        traced = jax.jit(lambda p, d=dim: tokenization.expectation(discretizer, p, dim=d))
        got = traced(arrays["probs"][:, slot, :-1])
        np.testing.assert_allclose(got, arrays[f"value_expectation_{name}_torch"], rtol=1e-5, atol=1e-6)


def test_uniform_bins_have_equal_widths():
    discretizer = tokenization.fit(np.array([[0.0, -4.0], [1.0, 0.0], [8.0, 4.0]]), num_bins=4, method="uniform")
    np.testing.assert_allclose(discretizer.thresholds, [[0, 2, 4, 6, 8], [-4, -2, 0, 2, 4]])
    np.testing.assert_allclose(discretizer.centers, [[1, 3, 5, 7], [-3, -1, 1, 3]])
    tokens = tokenization.encode(discretizer, np.array([[-1.0, -4.0], [1.9, -2.0], [2.0, -2.1], [8.0, 9.0]]))
    np.testing.assert_array_equal(tokens, [[0, 0], [0, 1], [1, 0], [3, 3]])


def test_the_percentile_is_the_value_of_the_first_bin_beyond_the_share():
    discretizer = tokenization.Discretizer(
        thresholds=np.arange(5.0)[None], centers=np.array([[10.0, 20.0, 30.0, 40.0]])
    )
    probs = np.array([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.1, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]])
    got = {q: tokenization.percentile(discretizer, probs, q, dim=0).tolist() for q in (0.0, 0.4, 0.5, 0.75)}
    assert got == {
        0.0: [10.0, 10.0, 20.0, 40.0],
        0.4: [10.0, 20.0, 20.0, 40.0],
        0.5: [10.0, 30.0, 30.0, 40.0],  # strictly more than the share of what is left without stop
        0.75: [10.0, 40.0, 30.0, 40.0],
    }


def test_with_distinct_values_a_rare_reward_survives_and_other_columns_stay_as_they_were():
    generator = np.random.default_rng(0)
    rare = np.zeros(1000)
    rare[::400] = 1.0
    values = np.stack([rare, generator.normal(size=1000), np.full(1000, 3.5)], axis=1)
    plain = tokenization.fit(values, num_bins=20)
    assert tokenization.merged_columns(tokenization.encode(plain, values), values) == [0]
    distinct = tokenization.fit(values, num_bins=20, distinct_values=True)
    assert tokenization.merged_columns(tokenization.encode(distinct, values), values) == []
    recon = tokenization.decode(distinct, tokenization.encode(distinct, values))
    np.testing.assert_array_equal(recon[:, [0, 2]], values[:, [0, 2]])
    np.testing.assert_array_equal(distinct.thresholds[1], plain.thresholds[1])
    between = tokenization.encode(distinct, np.array([[-9.0], [0.49], [0.51], [9.0]]), dims=slice(0, 1))
    recon = tokenization.decode(distinct, between, dims=slice(0, 1))
    np.testing.assert_array_equal(recon[:, 0], [0.0, 0.0, 1.0, 1.0])


def test_as_many_distinct_values_as_bins_fit_and_one_more_does_not():
    values = np.arange(4.0)[:, None] ** 2
    exact = tokenization.fit(values, num_bins=4, distinct_values=True)
    np.testing.assert_array_equal(exact.centers, values.T)
    np.testing.assert_array_equal(tokenization.encode(exact, values)[:, 0], [0, 1, 2, 3])
    quantile = tokenization.fit(values, num_bins=3, distinct_values=True)
    np.testing.assert_array_equal(quantile.thresholds, tokenization.fit(values, num_bins=3).thresholds)


def test_too_few_rows_to_fill_the_bins_are_no_error(arrays):
    num_bins = int(arrays["short_N"])
    short = tokenization.fit(arrays["short_data"], num_bins=num_bins)
    assert short.thresholds.shape == (2, num_bins + 1)
    num_filled = len(arrays["short_thresholds"])
    np.testing.assert_array_equal(short.thresholds[:, :num_filled], arrays["short_thresholds"].T)
    tokens = tokenization.encode(short, arrays["short_data"])
    np.testing.assert_array_equal(tokens, arrays["short_tokens"])
    # The maximum's token has no upper threshold in the reference, which cannot decode it.
    best = arrays["short_data"].max(axis=0)
    last = tokenization.encode(short, best)
    np.testing.assert_array_equal(tokenization.decode(short, last), best)
    single = tokenization.fit(np.array([[2.0, -1.0]]), num_bins=5)
    np.testing.assert_array_equal(
        tokenization.decode(single, tokenization.encode(single, np.array([[9.0, 0.0]]))), [[2, -1]]
    )


@pytest.mark.parametrize("method", ["quantile", "uniform"])
@pytest.mark.parametrize("distinct_values", [False, True])
def test_a_constant_column_decodes_to_its_value_and_one_bin_is_enough(method, distinct_values):
    values = np.stack([np.full(50, 0.1), np.linspace(-1, 3, 50)], axis=1)
    for num_bins in (1, 7):
        discretizer = tokenization.fit(values, num_bins=num_bins, method=method, distinct_values=distinct_values)
        recon = tokenization.decode(discretizer, tokenization.encode(discretizer, values + [[5.0, 0.0]]))
        np.testing.assert_array_equal(recon[:, 0], values[:, 0])
        assert tokenization.merged_columns(tokenization.encode(discretizer, values), values) == (
            [1] if num_bins == 1 else []
        )
        if num_bins == 1:
            np.testing.assert_allclose(recon[:, 1], 1.0)  # the middle


def test_data_that_cannot_be_binned_is_refused_with_its_columns_named():
    values = np.zeros((10, 4))
    values[3, 1], values[5, 3] = np.nan, -np.inf
    with pytest.raises(ValueError, match=r"columns \[1, 3\] hold values that are not finite"):
        tokenization.fit(values, num_bins=5)
    with pytest.raises(ValueError, match=r"shape \[n, D\] with n >= 1, got \(0, 4\)"):
        tokenization.fit(np.zeros((0, 4)), num_bins=5)
    with pytest.raises(ValueError, match=r"shape \[n, D\] with n >= 1, got \(4,\)"):
        tokenization.fit(np.zeros(4), num_bins=5)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        tokenization.fit(np.zeros((3, 4)), num_bins=0)
    with pytest.raises(ValueError, match='method must be "quantile" or "uniform", got "kmeans"'):
        tokenization.fit(np.zeros((3, 4)), num_bins=5, method="kmeans")


def test_traced_functions_agree_with_numpy(arrays, discretizer):
    values = arrays["f32/data"][:60]
    thresholds = discretizer.thresholds.astype(np.float32)
    expected = np.array([[np.sum(edges <= x) for edges, x in zip(thresholds, row, strict=True)] for row in values])
    expected = np.clip(expected - 1, 0, int(arrays["N"]) - 1)

    tokens = check_transforms(lambda x: tokenization.encode(discretizer, x), jnp.asarray(values))
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.dtype == jnp.int32
    clear = np.abs(values[..., None] - discretizer.thresholds).min(axis=-1) > 1e-5
    np.testing.assert_array_equal(tokens[clear], tokenization.encode(discretizer, values)[clear])
    assert clear.sum() > 200

    tokens = jnp.asarray(arrays["clip_tokens_in"])
    recon = check_transforms(lambda x: tokenization.decode(discretizer, x), tokens)
    np.testing.assert_allclose(recon, arrays["clip_recon"], rtol=1e-6)
    part = check_transforms(lambda x: tokenization.decode(discretizer, x, dims=slice(2, 5)), tokens[:, None, 2:5])
    np.testing.assert_allclose(part[:, 0], arrays["clip_recon"][:, 2:5], rtol=1e-6)
    probs = arrays["percentile_probs"][:, 0, :-1]
    for fn in (
        lambda p: tokenization.expectation(discretizer, p, dim=1),
        lambda p: tokenization.percentile(discretizer, p, 0.3, dim=1),
    ):
        np.testing.assert_allclose(check_transforms(fn, jnp.asarray(probs)), fn(probs.astype(np.float64)), rtol=1e-5)


def test_known_values_get_a_bin_each_whether_the_data_holds_them_or_not():
    values = np.array([[0.3, 7.0], [0.1, 5.0], [0.2, 5.0]])
    discretizer = tokenization.fit(values, num_bins=6, known_values={1: np.arange(4.0, 9.0)})
    column = np.arange(4.0, 9.0)[:, None]
    tokens = tokenization.encode(discretizer, column, dims=slice(1, 2))
    np.testing.assert_array_equal(tokens[:, 0], [0, 1, 2, 3, 5])  # the bins that are left over are the last value's
    np.testing.assert_array_equal(tokenization.decode(discretizer, tokens, dims=slice(1, 2)), column)
    for token in (4, 6):  # a bin that is left over, and the stop token
        assert tokenization.decode(discretizer, np.array([[token]]), dims=slice(1, 2)) == 8.0
    plain = tokenization.fit(values, num_bins=6)
    np.testing.assert_array_equal(discretizer.thresholds[0], plain.thresholds[0])
    with pytest.raises(ValueError, match="column 1 takes 5 values, more than num_bins=4"):
        tokenization.fit(values, num_bins=4, known_values={1: np.arange(5.0)})
