"""The networks of IQL and of single-step models as Flax modules: MLPs that XLA updates fast, on a CPU and under `vmap`.

Their products have derivatives of reverse mode alone (`jax.grad`, `jax.vjp`).
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from tt_jax import types

_PRECISION = jax.lax.Precision.HIGHEST
_LOG_STD_MIN, _LOG_STD_MAX = -5.0, 2.0

DropoutFn = Callable[[chex.Array, int], chex.Array]


class MLP(nn.Module):
    """Dense layers, with the activation after all but the last; `sizes` are their units."""

    sizes: tuple[int, ...]
    activation: Callable[[chex.Array], chex.Array] = nn.relu

    @nn.compact
    def __call__(self, x: chex.Array, dropout_fn: DropoutFn | None = None) -> chex.Array:
        """Map x [..., in] to [..., sizes[-1]]; `dropout_fn(hidden, layer)` is applied to each hidden layer."""
        for layer, size in enumerate(self.sizes):
            x = nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5), dot_general=_dot_general)(x)
            if layer < len(self.sizes) - 1:
                x = self.activation(x)
                x = dropout_fn(x, layer) if dropout_fn else x
        return x


class Policy(nn.Module):
    """A Gaussian whose mean is within +-1 and whose deviation does not depend on the observation."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observations: chex.Array, dropout_fn: DropoutFn | None = None) -> tuple[chex.Array, chex.Array]:
        """Return the mean [..., A] and the deviation [A] at observations [..., N]."""
        mean = jnp.tanh(MLP(self.sizes, name="mlp")(observations, dropout_fn))
        log_std = self.param("log_std", nn.initializers.zeros, self.sizes[-1:])
        return mean, jnp.exp(jnp.clip(log_std, _LOG_STD_MIN, _LOG_STD_MAX))


Critics = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)  # [2, ...] both ways


def sizes(mlp: types.Params) -> tuple[int, ...]:
    """Return the units of each layer of an MLP with the parameters `mlp`."""
    return tuple(mlp[f"Dense_{i}"]["bias"].shape[-1] for i in range(len(mlp)))


def _dot_general(x, kernel, dimension_numbers, precision):
    """Multiply as `nn.Dense` does, [..., in] by [in, out]."""
    del dimension_numbers, precision
    return _product(x, kernel)


@jax.custom_vjp
def _product(x, kernel):
    return jnp.matmul(x, kernel, precision=_PRECISION)


def _product_forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    # [in, out] at once: the product that JAX derives is [out, in], which under vmap costs copies, 15% of an update.
    dot, leading = functools.partial(jax.lax.dot_general, precision=_PRECISION), tuple(range(x.ndim - 1))
    dkernel = dot(x, dy, dimension_numbers=((leading, leading), ((), ())))
    return dot(dy, kernel, dimension_numbers=(((dy.ndim - 1,), (1,)), ((), ()))), dkernel


_product.defvjp(_product_forward, _product_backward)
