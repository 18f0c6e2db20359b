"""Training of Implicit Q-Learning on a Minari dataset, from its configuration to checkpoints in a workdir."""

import dataclasses
import functools
import time

import numpy as np

from experiments.common import control, datasets, entry, learner_run, memory, time_budget, training_loop
from tt_jax import iql, iql_training, rollouts, shards, trajectories


def train(config, workdir, *, preemption, download=False, minutes=None):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop.

    With `minutes` the updates are at most as many as this machine does in that time; they are kept with the run.
    """
    started = time.monotonic()
    train_config = entry.to_dataclass(iql_training.IQLTrainConfig, config.iql_train)
    shards.check_count(config.data.num_shards)
    data = learner_run.load(config, method="IQL", num_seeds=train_config.num_seeds, download=download)
    with memory.explained(f"the dataset {config.dataset}", datasets.MEMORY_SETTINGS):
        transitions = trajectories.transitions(data.trajectories)
        stores, sizes = shards.split_transitions(transitions, config.data.num_shards)
    learners_fn = functools.partial(_learners, config, data.trajectories, transitions, max(sizes))

    def fit():
        _, fresh, train_fn = learners_fn(train_config)
        store = training_loop.shard(stores, sizes, 0)
        size = {"seed": config.seed, "max_steps": train_config.steps_per_call}
        per_step, _ = time_budget.measure(train_fn, fresh, store, **size)
        left = started + 60 * minutes - time.monotonic()
        seconds, per_step = time_budget.agree(np.array([left, per_step]))
        return time_budget.cut(train_config, seconds=seconds, per_step=per_step)

    if minutes or time_budget.is_recorded(workdir):
        numbers = time_budget.recorded(workdir, minutes, fit)
        train_config = dataclasses.replace(train_config, **numbers)
        data.run["iql_train"] |= numbers
    iql_config, fresh, train_fn = learners_fn(train_config)
    learner_run.run(
        workdir,
        data,
        config=train_config,
        model_config=iql_config,
        free_fields=("actor_cosine_steps",),
        fresh=fresh,
        train_fn=train_fn,
        stores=stores,
        sizes=sizes,
        policy_fn=lambda params: rollouts.observation_policy(control.mean_action_fn(params)),
        describe=lambda metrics: f"v {metrics['v'][-1].mean():.3g}, value loss {metrics['value_loss'][-1].mean():.3g}",
        preemption=preemption,
    )


def _learners(config, loaded, transitions, num_rows, train_config):
    """Return the static settings of the learners, their states before the first update, and what trains them."""
    settings = dict(config.iql)
    has_cosine = settings.pop("actor_cosine")
    iql_config = entry.to_dataclass(
        iql.IQLConfig,
        settings,
        actor_cosine_steps=train_config.num_steps if has_cosine else 0,
        observation_dim=transitions.observations.shape[1],
        action_dim=transitions.actions.shape[1],
    )
    units = iql.fit_units(transitions, config=iql_config, **trajectories.action_units(loaded))
    configs = {"config": train_config, "iql_config": iql_config}
    fresh = iql_training.init(config.seed, units=units, **configs)
    return iql_config, fresh, iql_training.make_train_fn(num_transitions=num_rows, **configs)
