"""Train Implicit Q-Learning, several learners side by side in one program.

As in `training`, the dataset lives on every device, a compiled call runs many steps, and all devices draw the rows of
the global batch and take their share of it.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from tt_jax import data_parallel, iql, shards, types


@dataclasses.dataclass(frozen=True)
class IQLTrainConfig:
    """Static settings of an IQL run; the defaults are the reference's."""

    num_steps: int = 1_000_000  # updates
    batch_size: int = 256  # transitions per update over all devices
    num_seeds: int = 1  # learners trained side by side in one program
    steps_per_call: int = 1000  # updates in one compiled call
    log_every: int = 5_000  # updates
    eval_every: int = 50_000  # updates, a multiple of log_every; also at the end
    checkpoint_every: int = 50_000  # updates; also at the end
    keep_checkpoints: int = 3  # the newest

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"iql_train.{field.name}={getattr(self, field.name)} must be at least 1.")


def init(seed: int, *, config: IQLTrainConfig, iql_config: iql.IQLConfig, units: types.Params) -> iql.IQLState:
    """Return the states of the learners with the seeds from `seed` on, stacked: every leaf is [num_seeds, ...]."""
    keys = jax.vmap(jax.random.key)(_learner_seeds(seed, config))
    return jax.vmap(functools.partial(iql.init, config=iql_config, units=units))(keys)


def make_train_fn(
    *, config: IQLTrainConfig, iql_config: iql.IQLConfig, num_transitions: int
) -> Callable[..., tuple[iql.IQLState, dict[str, chex.Array]]]:
    """Return the data-parallel train_fn(state, transitions, seed, num_steps) -> (state, metrics).

    As `training.make_train_fn`, for the stacked states of `init` and a `types.Transitions` of [num_transitions, ...];
    metrics, those of `iql.update`, are [steps_per_call, num_seeds]. Each learner draws its transitions, with
    replacement, from its own seed and step, so it learns what it would learn alone. Instead of all transitions it may
    get a `shards.Shard`. Raises ValueError if the batch
    cannot be shared equally.
    """
    local_size = data_parallel.share_per_device(config.batch_size, flag="iql_train.batch_size")

    def train(state, transitions, seed, num_steps):
        first = jax.lax.axis_index(data_parallel.AXIS) * local_size
        size = num_transitions
        if isinstance(transitions, shards.Shard):
            transitions, size = transitions.data, transitions.size

        def one_step(learner, learner_seed):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(learner_seed), 1), learner.step)
            rows = jax.random.randint(key, [config.batch_size], 0, size)
            rows = jax.lax.dynamic_slice_in_dim(rows, first, local_size)
            batch = jax.tree.map(lambda leaf: leaf[rows], transitions)
            return iql.update(learner, batch, config=iql_config, axis_name=data_parallel.AXIS)

        def step_of_all(state):
            return jax.vmap(one_step)(state, _learner_seeds(seed, config))

        return data_parallel.run_steps(step_of_all, state, num_steps, max_steps=config.steps_per_call)

    return data_parallel.over_devices(train, donate_argnums=0)


def _learner_seeds(seed, config):
    return jnp.uint32(seed) + jnp.arange(config.num_seeds, dtype=jnp.uint32)
