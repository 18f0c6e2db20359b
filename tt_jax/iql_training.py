"""Train Implicit Q-Learning, several learners side by side in one program; see `learners`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import chex

from tt_jax import iql, learners, types


@dataclasses.dataclass(frozen=True)
class IQLTrainConfig(learners.TrainConfig):
    """Static settings of an IQL run; the defaults are the reference's."""

    section: ClassVar[str] = "iql_train"


def init(seed: int, *, config: IQLTrainConfig, iql_config: iql.IQLConfig, units: types.Params) -> iql.IQLState:
    """Return the states of the learners with the seeds from `seed` on, stacked: every leaf is [num_seeds, ...]."""
    init_fn = functools.partial(iql.init, config=iql_config, units=units)
    return learners.init(seed, num_seeds=config.num_seeds, init_fn=init_fn)


def make_train_fn(
    *, config: IQLTrainConfig, iql_config: iql.IQLConfig, num_transitions: int
) -> Callable[..., tuple[iql.IQLState, dict[str, chex.Array]]]:
    """Return the data-parallel train_fn(state, transitions, seed, num_steps) -> (state, metrics).

    `learners.make_train_fn` for a `types.Transitions` of [num_transitions, ...]; metrics are those of `iql.update`.
    Instead of all transitions it may get a `shards.Shard`.
    """

    def update(state, batch, _, *, axis_name):
        return iql.update(state, batch, config=iql_config, axis_name=axis_name)

    return learners.make_train_fn(config=config, update_fn=update, batch_fn=learners.take, num_rows=num_transitions)
