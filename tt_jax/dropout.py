"""Dropout whose bits are drawn packed: one at a time they would cost more than the arithmetic of a CPU's train step."""

import itertools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

DropoutFn = Callable[[chex.Array, float], chex.Array]


def make(rng_key: chex.PRNGKey | None, num_rows: int) -> DropoutFn:
    """Return drop(x [B, ...], rate), each call of which draws other bits; without a key it is the identity.

    Every row's bits come from that row's key, so they do not depend on how rows are spread over devices. They are
    drawn packed, one byte each: the rate is rounded to a multiple of 1/256 and the scale follows the rounded rate.
    """
    if rng_key is None:
        return lambda x, rate: x
    row_keys = rng_key if rng_key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(num_rows))
    sites = itertools.count()

    def drop(x, rate):
        site, dropped = next(sites), round(256 * rate)
        if dropped == 0:
            return x
        size = x[0].size
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, site)
        words = jax.vmap(lambda key: jax.random.bits(key, [-(-size // 4)], jnp.uint32))(keys)
        octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(num_rows, -1)[:, :size].reshape(x.shape)
        return jnp.where(octets >= dropped, x * jnp.asarray(256 / (256 - dropped), x.dtype), 0)

    return drop
