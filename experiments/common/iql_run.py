"""Training of Implicit Q-Learning on a Minari dataset, from its configuration to checkpoints in a workdir.

Learner i has the seed config.seed + i. A checkpoint holds the learners' parameters with a leading axis of the seeds, or
without one where there is one seed.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import logging

from experiments.common import control, datasets, entry, training_loop
from tt_jax import checkpoints, data_parallel, environments, iql, iql_training, rollouts, trajectories


def train(config, workdir, *, preemption, download=False):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop."""
    train_config = entry.to_dataclass(iql_training.IQLTrainConfig, config.iql_train)
    if not 0 <= config.seed <= 2**32 - train_config.num_seeds:
        raise entry.UsageError(
            f"seed={config.seed} and the {train_config.num_seeds - 1} after it must be in [0, 2**32)."
        )
    if config.data.step != 1:
        raise entry.UsageError(f"data.step={config.data.step} must be 1: IQL learns from single steps.")
    data_config = datasets.data_config(config.data)
    loaded = trajectories.load(config.dataset, config=data_config, download=download)
    transitions = trajectories.transitions(loaded)
    settings = dict(config.iql)
    has_cosine = settings.pop("actor_cosine")
    iql_config = entry.to_dataclass(
        iql.IQLConfig,
        settings,
        actor_cosine_steps=train_config.num_steps if has_cosine else 0,
        observation_dim=loaded.observations.shape[1],
        action_dim=loaded.actions.shape[1],
    )
    run = config.to_dict() | {
        "env_spec": datasets.env_spec(config.dataset),
        "max_path_length": loaded.max_path_length,
    }
    units = iql.fit_units(transitions, config=iql_config)
    state = iql_training.init(config.seed, config=train_config, iql_config=iql_config, units=units)
    if checkpoints.latest_step(workdir) is not None:
        state = _resume(workdir, state, iql_config)
        logging.info("resuming %s at step %d", workdir, state.step[0])
    step = int(state.step[0])
    if step >= train_config.num_steps:
        logging.info("%s is done: %d of %d steps.", workdir, step, train_config.num_steps)
        return
    logging.info("%s: %d transitions in %d episodes", config.dataset, len(transitions.rewards), len(loaded.terminated))
    train_fn = iql_training.make_train_fn(
        config=train_config, iql_config=iql_config, num_transitions=len(transitions.rewards)
    )
    store, seed = training_loop.place(transitions), data_parallel.replicate(np.uint32(config.seed))

    def save(writer, step, host):
        rest = {"opt_state": host.opt_state, "step": host.step, "dropout_key": host.dropout_key}
        params = jax.tree.map(lambda leaf: leaf[0], host.params) if train_config.num_seeds == 1 else host.params
        writer.save(step, params=params, config=iql_config, tokenizer=None, state=rest, run=run)

    training_loop.run(
        workdir,
        config=train_config,
        state=training_loop.place(state),
        step=step,
        advance=lambda state, num_steps: train_fn(state, store, seed, data_parallel.replicate(np.int32(num_steps))),
        evaluate=_make_evaluate(run, data_config, iql_config) if config.eval.num_episodes else None,
        save=save,
        describe=lambda metrics, rate: (
            f"v {metrics['v'][-1].mean():.3g}, value loss {metrics['value_loss'][-1].mean():.3g}, {rate:.3g} updates/s"
        ),
        work_per_step={"updates": train_config.num_seeds},
        preemption=preemption,
    )


def _resume(workdir, fresh, iql_config):
    template = {"opt_state": fresh.opt_state, "step": fresh.step, "dropout_key": fresh.dropout_key}
    checkpoint = checkpoints.restore(workdir, state_template=template)
    if checkpoint.config != dataclasses.replace(iql_config, actor_cosine_steps=checkpoint.config.actor_cosine_steps):
        raise entry.UsageError(f"{workdir} holds {checkpoint.config}, this run is {iql_config}; use another --workdir.")
    params = jax.tree.map(lambda leaf, new: np.reshape(leaf, new.shape), checkpoint.params, fresh.params)
    return iql.IQLState(params=params, **checkpoint.state)


def _make_evaluate(run, data_config, iql_config):
    """Return evaluate(state): the mean return and success of every learner's policy, acting by its mean.

    None, with a warning, if the data does not bring an environment that can be made here.
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
            policy = rollouts.observation_policy(act_fn)
            found.append(rollouts.run(envs, policy, seeds=range(num_episodes), config=data_config))
        returns = [[episode.total_reward for episode in episodes] for episodes in found]
        metrics = {"return": np.mean(returns), "return_std_of_seeds": np.std(np.mean(returns, axis=1))}
        if found[0][0].success is not None:
            metrics["success"] = np.mean([[episode.success for episode in episodes] for episodes in found])
        return metrics

    return evaluate
