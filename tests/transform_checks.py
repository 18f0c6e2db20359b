"""The one check that every public pure function passes: plain, jitted and vmapped calls agree with a Python loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def check_transforms(fn, *batched, rtol=1e-5, atol=1e-6):
    """Check `fn(*examples)` against a Python loop over the leading axis of the `batched` pytrees.

    The loop's plain calls are the standard; `jit` (traced once for all examples) and `vmap` under `jit` must give the
    same: floats within the tolerances, integers, masks and keys exactly. Close over what is not batched. Returns the
    stacked result of the loop, so that the caller can compare it with the right answer.
    """
    size = len(jax.tree.leaves(batched)[0])
    examples = [jax.tree.map(lambda leaf, i=i: leaf[i], batched) for i in range(size)]
    looped = _stack([fn(*example) for example in examples])

    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(fn, n=1))
    _assert_same(_stack([jitted(*example) for example in examples]), looped, rtol=rtol, atol=atol)
    _assert_same(jax.jit(jax.vmap(fn))(*batched), looped, rtol=rtol, atol=atol)
    return looped


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _assert_same(got, expected, *, rtol, atol):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(one, other)
