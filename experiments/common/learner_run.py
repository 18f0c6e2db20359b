"""What the training of every learner on single steps shares, from data to checkpoints in a workdir.

Learner i has the seed config.seed + i. A checkpoint holds the learners' parameters with a leading axis of the seeds, or
without one where there is one seed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from experiments.common import control, datasets, entry, memory, signals, training_loop
from tt_jax import data_parallel, environments, learners, rollouts, trajectories, types


@dataclasses.dataclass(frozen=True)
class Data:
    """A dataset in its own units, and what a checkpoint holds of the run on it."""

    trajectories: trajectories.Trajectories
    config: trajectories.DataConfig
    run: dict


def load(config, *, method: str, num_seeds: int, download: bool = False) -> Data:
    """Read the dataset for learners of a `method`; raises UsageError for seeds and settings that they cannot use."""
    if not 0 <= config.seed <= 2**32 - num_seeds:
        raise entry.UsageError(f"seed={config.seed} and the {num_seeds - 1} after it must be in [0, 2**32).")
    if config.data.step != 1:
        raise entry.UsageError(f"data.step={config.data.step} must be 1: {method} learns from single steps.")
    settings = datasets.with_keys(config.dataset, datasets.data_config(config.data), download=download)
    with memory.explained(f"the dataset {config.dataset}", datasets.MEMORY_SETTINGS):
        loaded = trajectories.load(config.dataset, config=settings, download=download)
    run = datasets.describe_run(config, settings, max_path_length=loaded.max_path_length)
    logging.info("%s: %d transitions in %d episodes", config.dataset, len(loaded.rewards), len(loaded.terminated))
    return Data(loaded, settings, run)


def run(
    workdir: str,
    data: Data,
    *,
    config: learners.TrainConfig,
    model_config: Any,
    fresh: Any,
    train_fn: Callable[..., Any],
    stores: Sequence[Any],
    sizes: Sequence[int],
    policy_fn: Callable[[types.Params], rollouts.Policy],
    describe: Callable[[dict[str, np.ndarray]], str],
    preemption: signals.Preemption,
    free_fields: Sequence[str] = (),
) -> None:
    """Train the learners of the state `fresh` and save them; the arguments are those of `training_loop.run`.

    While they train, `policy_fn(params)`, the policy of one learner, is played; `describe(metrics)` says how it goes.
    """

    def params_fn(params):
        return jax.tree.map(lambda leaf: leaf[0], params) if config.num_seeds == 1 else params

    training_loop.run(
        workdir,
        config=config,
        fresh=fresh,
        model={"config": model_config, "tokenizer": None, "run": data.run},
        free_fields=free_fields,
        params_fn=params_fn,
        train_fn=train_fn,
        stores=stores,
        sizes=sizes,
        seed=data.run["seed"],
        evaluate=_make_evaluate(data, config.num_seeds, model_config, policy_fn, preemption),
        describe=lambda metrics, rate: f"{describe(metrics)}, {rate:.3g} updates/s",
        work_per_step={"updates": config.num_seeds},
        step_sizes=f"{config.batch_size} rows for each of {config.num_seeds} learners",
        memory_settings=f"lower {config.section}.batch_size ({config.batch_size}), {config.section}.num_seeds "
        f"({config.num_seeds}) or the sizes of the networks",
        preemption=preemption,
    )


def _make_evaluate(data, num_learners, model_config, policy_fn, preemption):
    """Return evaluate(state): the mean return and success of every learner's policy.

    None if no episodes are wanted or, with a warning, if the data does not bring an environment that can be made here.
    An environment that fails costs that evaluation; told to stop, evaluate raises entry.Interrupted.
    """
    num_episodes = data.run["eval"]["num_episodes"]
    if not num_episodes:
        return None
    make_env = functools.partial(control.make_env, data.run, goal=data.run["eval"]["goal"])
    try:
        envs = rollouts.vectorize(make_env, num_episodes)
    except environments.Unavailable as error:
        logging.warning("%s; the policies are not evaluated, as with --config.eval.num_episodes=0.", error)
        return None
    rollouts.check_spaces(envs, model_config, config=data.config)

    def evaluate(state):
        params = data_parallel.unreplicate(state.params)
        found = []
        for learner in range(num_learners):
            policy = policy_fn(jax.tree.map(lambda leaf: leaf[learner], params))  # noqa: B023
            policy = _interruptible(policy, preemption)
            try:
                with preemption.doing("evaluation"):
                    found.append(rollouts.run(envs, policy, seeds=range(num_episodes), config=data.config))
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
