"""Training of Implicit Q-Learning on a Minari dataset, from its configuration to checkpoints in a workdir.

Learner i has the seed config.seed + i. A checkpoint holds the learners' parameters with a leading axis of the seeds, or
without one where there is one seed.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
from absl import logging

from experiments.common import control, datasets, entry, memory, time_budget, training_loop
from tt_jax import data_parallel, environments, iql, iql_training, rollouts, shards, trajectories


def train(config, workdir, *, preemption, download=False, minutes=None):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop.

    With `minutes` the updates are at most as many as this machine does in that time; they are kept with the run.
    """
    started = time.monotonic()
    train_config = entry.to_dataclass(iql_training.IQLTrainConfig, config.iql_train)
    if not 0 <= config.seed <= 2**32 - train_config.num_seeds:
        raise entry.UsageError(
            f"seed={config.seed} and the {train_config.num_seeds - 1} after it must be in [0, 2**32)."
        )
    if config.data.step != 1:
        raise entry.UsageError(f"data.step={config.data.step} must be 1: IQL learns from single steps.")
    shards.check_count(config.data.num_shards)
    data_config = datasets.with_keys(config.dataset, datasets.data_config(config.data), download=download)
    with memory.explained(f"the dataset {config.dataset}", datasets.MEMORY_SETTINGS):
        loaded = trajectories.load(config.dataset, config=data_config, download=download)
        transitions = trajectories.transitions(loaded)
    logging.info("%s: %d transitions in %d episodes", config.dataset, len(transitions.rewards), len(loaded.terminated))
    run = datasets.describe_run(config, data_config, max_path_length=loaded.max_path_length)
    stores, sizes = shards.split_transitions(transitions, config.data.num_shards)
    learners_fn = functools.partial(_learners, config, loaded, transitions, max(sizes))

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
        run["iql_train"] |= numbers
    iql_config, fresh, train_fn = learners_fn(train_config)
    training_loop.run(
        workdir,
        config=train_config,
        fresh=fresh,
        model={"config": iql_config, "tokenizer": None, "run": run},
        free_fields=("actor_cosine_steps",),
        params_fn=lambda params: params if train_config.num_seeds > 1 else jax.tree.map(lambda leaf: leaf[0], params),
        train_fn=train_fn,
        stores=stores,
        sizes=sizes,
        seed=config.seed,
        evaluate=_make_evaluate(run, data_config, iql_config, preemption) if config.eval.num_episodes else None,
        describe=lambda metrics, rate: (
            f"v {metrics['v'][-1].mean():.3g}, value loss {metrics['value_loss'][-1].mean():.3g}, {rate:.3g} updates/s"
        ),
        work_per_step={"updates": train_config.num_seeds},
        step_sizes=f"{train_config.batch_size} transitions for each of {train_config.num_seeds} learners",
        memory_settings=f"lower iql_train.batch_size ({train_config.batch_size}), iql_train.num_seeds "
        f"({train_config.num_seeds}) or iql.hidden_dims ({iql_config.hidden_dims})",
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
        observation_dim=loaded.observations.shape[1],
        action_dim=loaded.actions.shape[1],
    )
    units = iql.fit_units(transitions, config=iql_config, action_bounds=trajectories.action_bounds(loaded))
    configs = {"config": train_config, "iql_config": iql_config}
    fresh = iql_training.init(config.seed, units=units, **configs)
    return iql_config, fresh, iql_training.make_train_fn(num_transitions=num_rows, **configs)


def _make_evaluate(run, data_config, iql_config, preemption):
    """Return evaluate(state): the mean return and success of every learner's policy, acting by its mean.

    None, with a warning, if the data does not bring an environment that can be made here. An environment that fails
    costs that evaluation; told to stop, evaluate raises entry.Interrupted.
    """
    num_episodes = run["eval"]["num_episodes"]
    make_env = functools.partial(control.make_env, run, goal=run["eval"]["goal"])
    try:
        envs = rollouts.vectorize(make_env, num_episodes)
    except environments.Unavailable as error:
        logging.warning("%s; the policies are not evaluated, as with --config.eval.num_episodes=0.", error)
        return None
    rollouts.check_spaces(envs, iql_config, config=data_config)

    def evaluate(state):
        params = data_parallel.unreplicate(state.params)
        found = []
        for learner in range(len(params["actor"]["log_std"])):
            act_fn = control.mean_action_fn(jax.tree.map(lambda leaf: leaf[learner], params))  # noqa: B023
            policy = _interruptible(rollouts.observation_policy(act_fn), preemption)
            try:
                with preemption.doing("evaluation"):
                    found.append(rollouts.run(envs, policy, seeds=range(num_episodes), config=data_config))
            except entry.Interrupted:
                raise
            except Exception as error:  # an environment is code: it may raise anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                logging.warning("the environment failed, and this evaluation with it (%s)", reason)
                return {}
        returns = [[episode.total_reward for episode in episodes] for episodes in found]
        metrics = {"return": np.mean(returns), "return_std_of_seeds": np.std(np.mean(returns, axis=1))}
        if found[0][0].success is not None:
            metrics["success"] = np.mean([[episode.success for episode in episodes] for episodes in found])
        return metrics

    return evaluate


def _interruptible(policy, preemption):
    """Let a policy look for signals at every step."""

    def act(episodes):
        preemption.check("evaluation")
        return policy(episodes)

    return act
