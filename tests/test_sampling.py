"""Filters keep what the reference keeps, with one documented mend, and draws follow the distribution."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transform_checks import check_transforms

from tt_jax import sampling

NUM_DRAWS = 20_000


@pytest.fixture(scope="module")
def arrays():
    return golden.load("beam")


def softmax(logits):
    unnormalised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=-1, keepdims=True)


def test_filter_cdf_floors_what_the_reference_floors_but_never_everything(arrays):
    logits, mended = arrays["filter/logits"], 0
    for index, threshold in enumerate(arrays["filter/thresholds"]):
        got = np.asarray(sampling.filter_cdf(jnp.asarray(logits), float(threshold)))
        for row, expected, original in zip(got, arrays[f"filter/cdf{index}_logits"], logits, strict=True):
            if (expected == -1000).all():  # the mend: the most likely tokens stay
                expected = np.where(original == original.max(), original, -1000)
                mended += 1
            np.testing.assert_array_equal(row, expected)
    assert mended > 0
    over_one = np.asarray(sampling.filter_cdf(jnp.asarray(logits), 1.5))
    np.testing.assert_array_equal(over_one != -1000, logits == logits.max(axis=-1, keepdims=True))


def test_filter_cdf_by_hand():
    probs = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
    for threshold, kept in [(0.0, [1, 2, 3, 4]), (0.2, [1, 3, 4]), (0.4, [1, 3]), (0.7, [1]), (0.99, [1])]:
        got = sampling.filter_cdf(jnp.log(jnp.asarray(probs, jnp.float32)), threshold)
        np.testing.assert_array_equal(np.flatnonzero(got > -1000), kept)
    tied = jnp.log(jnp.array([[0.4, 0.4, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]))
    np.testing.assert_array_equal(sampling.filter_cdf(tied, 0.6) > -1000, [[1, 1, 0, 0], [1, 1, 1, 1]])


def test_filter_top_k_keeps_the_reference_s_tokens_and_ties(arrays):
    logits = jnp.asarray(arrays["filter/logits"])
    for k in arrays["filter/ks"]:
        got = sampling.filter_top_k(logits, int(k))
        np.testing.assert_array_equal(np.isfinite(got), arrays[f"filter/topk{k}_kept"])
        np.testing.assert_allclose(softmax(np.asarray(got)), arrays[f"filter/topk{k}_probs"], rtol=1e-5, atol=1e-7)


def test_filter_central_keeps_the_middle_of_the_mass():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.4, 0.2, 0.1, 0.0]))
    for share, expected in [
        (1.0, [0.1, 0.2, 0.4, 0.2, 0.1, 0.0]),
        (0.8, [0.0, 0.2, 0.4, 0.2, 0.0, 0.0]),
        (0.6, [0.0, 0.1, 0.4, 0.1, 0.0, 0.0]),
        (0.1, [0.0, 0.0, 0.1, 0.0, 0.0, 0.0]),
    ]:
        np.testing.assert_allclose(np.exp(sampling.filter_central(logits, share)), expected, atol=1e-6)
    # Its draws are those of all tokens whose uniform number lies within the share.
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(500, 100)), jnp.float32)
    uniform = jax.random.uniform(jax.random.key(0), (500,))
    got = sampling.categorical(sampling.filter_central(logits, 0.3), uniform)
    expected = sampling.categorical(logits, 0.35 + 0.3 * uniform)
    assert (np.asarray(got) == np.asarray(expected)).mean() > 0.99  # the rest is rounding
    medians = sampling.categorical(logits, jnp.full(500, 0.5))
    only = np.isfinite(sampling.filter_central(logits, 0.0))
    assert (only.sum(axis=-1) == 1).all()
    assert (only.argmax(axis=-1) == np.asarray(medians)).mean() > 0.99


def test_filters_in_turn_give_the_reference_s_distributions(arrays):
    logits = jnp.asarray(arrays["filter/logits"])
    for index, threshold in enumerate(arrays["filter/thresholds"]):
        filters = sampling.Filters(cdf=float(threshold), top_k=3)
        got = softmax(np.asarray(sampling.filter_logits(logits, filters)))
        all_floored = (arrays[f"filter/cdf{index}_logits"] == -1000).all(axis=-1)
        expected = arrays[f"filter/cdf{index}_then_topk3_probs"]
        np.testing.assert_allclose(got[~all_floored], expected[~all_floored], rtol=1e-5, atol=1e-7)
    for name in ("p0", "p1", "p2"):
        logits = jnp.log(jnp.asarray(arrays[f"dist/{name}/raw_probs"]))
        got = softmax(np.asarray(sampling.filter_cdf(logits / 2, 0.6)))
        np.testing.assert_allclose(got, arrays[f"dist/{name}/temp2_cdf06_probs"], rtol=1e-4, atol=1e-6)


def test_draws_are_as_frequent_as_the_reference_s_distributions_say(arrays):
    names = ["raw_probs", "topk3_probs", "temp2_cdf06_probs"]
    names += [f"{setting}/filtered_probs" for setting in ("t1_cdf06", "t1_cdf02", "t3_cdf06")]
    probs = np.concatenate([arrays[f"dist/{prefix}/{name}"] for prefix in ("p0", "p1", "p2") for name in names])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(probs))  # minus infinity where a token was filtered
    uniform = jax.random.uniform(jax.random.key(0), (NUM_DRAWS, len(probs)))
    tokens = np.asarray(jax.jit(sampling.categorical)(jnp.broadcast_to(logits, (NUM_DRAWS, *logits.shape)), uniform))
    for row, expected in enumerate(probs):
        counts = np.bincount(tokens[:, row], minlength=len(expected))
        sigma = np.sqrt(NUM_DRAWS * expected * (1 - expected))
        assert (np.abs(counts - NUM_DRAWS * expected) <= 4 * sigma + 1).all()
        assert not counts[expected == 0].any()


def test_a_token_without_probability_is_never_drawn_at_either_end():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf], [-1000.0, -1000.0, 2.0, -1000.0, -1000.0]])
    below_one = np.nextafter(np.float32(1), np.float32(0))
    for uniform, expected in [(0.0, [1, 2]), (0.4999, [1, 2]), (0.5, [3, 2]), (below_one, [3, 2])]:
        np.testing.assert_array_equal(sampling.categorical(logits, jnp.full(2, uniform)), expected)
    # Neither when rounding keeps the sum of the probabilities away from one.
    logits = jnp.concatenate(
        [jnp.asarray(np.random.default_rng(0).normal(size=(500, 100))), jnp.full((500, 1), -jnp.inf)], 1
    )
    assert sampling.categorical(logits, jnp.full(500, below_one)).max() < 100


def test_categorical_inverts_the_cdf():
    generator = np.random.default_rng(1)
    logits, uniform = generator.normal(size=(6, 9)).astype(np.float32), generator.random(6).astype(np.float32)
    expected = [
        np.searchsorted(np.cumsum(softmax(row)), u, side="right") for row, u in zip(logits, uniform, strict=True)
    ]
    got = check_transforms(sampling.categorical, jnp.asarray(logits), jnp.asarray(uniform))
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.int32


def test_filters_run_under_transformations_and_keep_the_type():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3, 9)), jnp.float32)
    filters = [lambda x: sampling.filter_cdf(x, 0.6), lambda x: sampling.filter_top_k(x, 3)]
    filters += [lambda x, share=share: sampling.filter_central(x, share) for share in (0.0, 0.5)]
    for fn in filters:
        check_transforms(fn, logits)
        assert fn(logits.astype(jnp.bfloat16)).dtype == jnp.bfloat16
