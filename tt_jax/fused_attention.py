"""Causal attention as one kernel where the backend has one: no weights are kept for the gradient.

A GPU's is cuDNN's, for bfloat16; elsewhere XLA compiles the same computation from its parts.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

_MULTIPLE = 8  # of widths, which cuDNN asks for, and of lengths
_HIDDEN_SCORE = -1e9


def attend(query: chex.Array, key: chex.Array, value: chex.Array, *, hidden: np.ndarray) -> tuple[chex.Array, None]:
    """Attend within sequences [B, H, T, E / H], the query scaled; return the mixed values and None.

    `hidden` [T] bool are keys that no query sees; the first is none of them. The kernel is told that queries see no
    later keys. One more coordinate hides the others: 1 in every query, a large negative number in each hidden key. As a
    bias it would take memory, and its gradient time.
    """
    length, width = query.shape[-2:]
    columns = (np.ones(length), np.where(hidden, _HIDDEN_SCORE, 0.0), np.zeros(length))

    def pad(x, column):
        column = jnp.broadcast_to(jnp.asarray(column, x.dtype)[None, None, :, None], (*x.shape[:-1], 1))
        widths = [(0, 0), (0, 0), (0, -length % _MULTIPLE), (0, -(width + 1) % _MULTIPLE)]
        return jnp.pad(jnp.concatenate([x, column], axis=-1), widths).swapaxes(1, 2)  # [B, T, H, E / H]

    arrays = [pad(x, column) for x, column in zip((query, key, value), columns, strict=True)]
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    mixed = jax.nn.dot_product_attention(*arrays, scale=1.0, is_causal=True, implementation=implementation)
    return mixed.swapaxes(1, 2)[:, :, :length, :width], None
