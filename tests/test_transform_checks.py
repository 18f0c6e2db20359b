"""The shared check catches what it is for."""

import jax.numpy as jnp
import numpy as np
import pytest
from transform_checks import check_transforms


def test_check_transforms_accepts_a_pure_function_and_returns_the_loop():
    looped = check_transforms(lambda x: {"sum": x.sum(), "mask": x > 1}, jnp.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(looped["sum"], [1.0, 5.0, 9.0])


def test_check_transforms_rejects_a_function_whose_examples_depend_on_their_order():
    calls = []

    def impure(x):
        calls.append(x)
        return x + len(calls)

    with pytest.raises(AssertionError, match="Mismatched elements|Not equal"):
        check_transforms(impure, jnp.zeros(3))
