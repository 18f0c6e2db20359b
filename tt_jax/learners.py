"""Train learners of any method side by side in one program.

As in `training`, the dataset lives on every device, a compiled call runs many steps, and all devices draw the rows of
the global batch and take their share of it. What is drawn for a learner comes from its own seed and step, and for a row
from its place in the global batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import optax

from tt_jax import data_parallel, shards, types


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Static settings of a run."""

    section: ClassVar[str] = "baselines.METHOD.train"  # of the configuration, for messages

    num_steps: int = 1_000_000  # updates
    batch_size: int = 256  # rows per update over all devices
    num_seeds: int = 1  # learners trained side by side in one program
    steps_per_call: int = 1000  # updates in one compiled call
    log_every: int = 5_000  # updates
    eval_every: int = 50_000  # updates, a multiple of log_every; also at the end
    checkpoint_every: int = 50_000  # updates; also at the end
    keep_checkpoints: int = 3  # the newest

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{self.section}.{field.name}={getattr(self, field.name)} must be at least 1.")


@chex.dataclass(frozen=True)
class State:
    """Everything that an update of a baseline changes."""

    params: types.Params
    opt_state: dict[str, optax.OptState]  # by the name of the parameters
    step: chex.Array  # [] int32, updates done


def init(seed: int, *, num_seeds: int, init_fn: Callable[[chex.PRNGKey], Any]) -> Any:
    """Return `init_fn(key)` of the learners with the seeds from `seed` on, stacked: every leaf is [num_seeds, ...]."""
    return jax.vmap(init_fn)(jax.vmap(jax.random.key)(_seeds(seed, num_seeds)))


def take(store: Any, rows: chex.Array, *, config: Any = None) -> Any:
    """Gather the `rows` [B] of each array of `store` [n, ...]."""
    del config
    return jax.tree.map(lambda leaf: leaf[rows], store)


def make_train_fn(
    *,
    config: TrainConfig,
    update_fn: Callable[..., tuple[Any, dict[str, chex.Array]]],
    batch_fn: Callable[[Any, chex.Array], Any],
    num_rows: int,
) -> Callable[..., tuple[Any, dict[str, chex.Array]]]:
    """Return the data-parallel train_fn(state, store, seed, num_steps) -> (state, metrics).

    As `training.make_train_fn`, for the stacked states of `init`; metrics are [steps_per_call, num_seeds].
    `batch_fn(store, rows)` gathers the rows [B], drawn from [0, num_rows) with replacement, and
    `update_fn(state, batch, keys, axis_name=...)` learns from them, with a key for each row. Each learner learns what
    it would learn alone. `store` may be a `shards.Shard` of at most `num_rows`. Raises ValueError if the batch cannot
    be shared equally.
    """
    local_size = data_parallel.share_per_device(config.batch_size, flag=f"{config.section}.batch_size")

    def train(state, store, seed, num_steps):
        first, size = jax.lax.axis_index(data_parallel.AXIS) * local_size, num_rows
        if isinstance(store, shards.Shard):
            store, size = store.data, store.size

        def one_step(learner, learner_seed):
            root = jax.random.key(learner_seed)
            row_key, noise_key = (jax.random.fold_in(jax.random.fold_in(root, use), learner.step) for use in (1, 2))
            rows = jax.random.randint(row_key, [config.batch_size], 0, size)
            rows = jax.lax.dynamic_slice_in_dim(rows, first, local_size)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_key, first + jnp.arange(local_size))
            return update_fn(learner, batch_fn(store, rows), keys, axis_name=data_parallel.AXIS)

        def step_of_all(state):
            return jax.vmap(one_step)(state, _seeds(seed, config.num_seeds))

        return data_parallel.run_steps(step_of_all, state, num_steps, max_steps=config.steps_per_call)

    return data_parallel.over_devices(train, donate_argnums=0)


def descend(
    name: str,
    loss_fn: Callable[[types.Params], tuple[chex.Array, dict[str, chex.Array]]],
    rate: chex.Numeric,
    *,
    state: Any,
    axis_name: str | None,
) -> tuple[types.Params, optax.OptState, dict[str, chex.Array]]:
    """Do one step of Adam on `state.params[name]`, whose optimizer's state is `state.opt_state[name]`.

    `loss_fn(parameters) -> (loss, metrics)`. Return the parameters, the optimizer's state and the metrics with the
    loss, all averaged over the devices.
    """
    network = state.params[name]
    # As arrays that may differ between the devices the gradients stay those of the device's share; for arrays known to
    # be replicated `jax.shard_map` sums them by itself.
    zero = 0 * jax.lax.axis_index(axis_name) if axis_name else 0
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(jax.tree.map(lambda p: p + zero, network))
    metrics = {f"{name}_loss": loss, **metrics}
    if axis_name:
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    updates, opt_state = optax.scale_by_adam().update(grads, state.opt_state[name])
    return jax.tree.map(lambda p, u: p - rate * u, network, updates), opt_state, metrics


def _seeds(seed, num_seeds):
    return jnp.uint32(seed) + jnp.arange(num_seeds, dtype=jnp.uint32)
