"""The baselines by name: their training on a Minari dataset, and the policies of what was trained.

A baseline is a module of the library with

    Config, TRAIN                                  its settings, and those of its training
    prepare(trajectories, settings) -> (config, units, store)     what it learns from, on the host
    batch(store, rows [B], *, config)              gathers a batch
    init(key, *, config, units) -> learners.State
    update(state, batch, keys [B], *, config, axis_name) -> (state, metrics)
    encode(episodes, *, config), act(params, encoded, *, config) -> actions [B, A]     its policy

and an entry in BASELINES; its part of a configuration, its commands and its row in the comparison follow.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping

import jax
import numpy as np

from experiments.common import control, entry, learner_run, signals
from tt_jax import bc, checkpoints, cql, decision_transformer, iql, learners, rollouts


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A method and what it changes of its module's settings."""

    title: str
    module: types.ModuleType
    takes_discrete: bool = False  # actions
    settings: Mapping = dataclasses.field(default_factory=dict)


BASELINES = {
    "bc": Baseline("behaviour cloning", bc, takes_discrete=True),
    "bc10": Baseline("behaviour cloning, best 10%", bc, takes_discrete=True, settings={"best_share": 0.1}),
    "dt": Baseline("Decision Transformer", decision_transformer),
    "cql": Baseline("CQL", cql),
}


def train(config, workdir, *, method: str, preemption: signals.Preemption, download: bool = False) -> None:
    """Train as `config` says until the last step; raises entry.Interrupted, after saving, when told to stop."""
    baseline, settings = BASELINES[method], dict(config.baselines[method])
    module = baseline.module
    train_config = entry.to_dataclass(learners.TrainConfig, settings.pop("train"))
    if config.data.num_shards != 1:
        raise entry.UsageError(f"data.num_shards={config.data.num_shards} must be 1: {method} learns from whole data.")
    data = learner_run.load(config, method=baseline.title, num_seeds=train_config.num_seeds, download=download)
    data.run["method"] = method
    model_config, units, store = module.prepare(data.trajectories, settings)
    init_fn = functools.partial(module.init, config=model_config, units=units)
    init = jax.jit(functools.partial(learners.init, num_seeds=train_config.num_seeds, init_fn=init_fn))
    learner_run.run(
        workdir,
        data,
        config=train_config,
        model_config=model_config,
        fresh=init(np.uint32(config.seed)),
        train_fn=learners.make_train_fn(
            config=train_config,
            update_fn=functools.partial(module.update, config=model_config),
            batch_fn=functools.partial(module.batch, config=model_config),
            num_rows=len(store.actions),
        ),
        stores=[store],
        sizes=[len(store.actions)],
        policy_fn=lambda params: _make_policy(module, params, model_config, config.eval.num_episodes),
        describe=lambda metrics: ", ".join(
            f"{name} {value[-1].mean():.3g}" for name, value in metrics.items() if name.endswith("loss")
        ),
        preemption=preemption,
    )


def restore(workdir: str, *, step: int | None = None) -> checkpoints.Checkpoint:
    """Read the learners, stacked, of a run of train_baseline or train_iql; another run is a ValueError.

    They are those of the newest checkpoint or of `step`.
    """
    checkpoint = checkpoints.restore(workdir, step)
    method = checkpoint.run.get("method")
    if method is None:
        checkpoint = control.restore(workdir, iql.IQLConfig, program="train_baseline or train_iql", step=step)
        return dataclasses.replace(checkpoint, params=control.stack_learners(checkpoint.params))
    if checkpoint.run["baselines"][method]["train"]["num_seeds"] > 1:
        return checkpoint
    return dataclasses.replace(checkpoint, params=jax.tree.map(lambda leaf: leaf[None], checkpoint.params))


def make_policies(checkpoint: checkpoints.Checkpoint, *, learner: int, max_batch: int) -> dict[str, rollouts.Policy]:
    """Return the policies of one learner of `restore` by the return that is asked for, or "" if none is.

    They take up to `max_batch` episodes at a time. Raises ValueError if there is no such learner.
    """
    num_learners = len(jax.tree.leaves(checkpoint.params)[0])
    if learner >= num_learners:
        raise ValueError(f"there are the learners 0 to {num_learners - 1}, not {learner}.")
    params, config = jax.tree.map(lambda leaf: leaf[learner], checkpoint.params), checkpoint.config
    if isinstance(config, iql.IQLConfig):
        return {"": rollouts.observation_policy(control.mean_action_fn(params))}
    make = functools.partial(_make_policy, BASELINES[checkpoint.run["method"]].module, params, config, max_batch)
    targets = getattr(config, "targets", ())
    return {f"{target:g}": make(targets=(target,)) for target in targets} or {"": make()}


def _make_policy(module, params, config, max_batch, **changes):
    """Return a policy that acts by `params`; the `changes` of the configuration concern what it is told."""
    params, act = jax.device_put(params), jax.jit(module.act, static_argnames="config")
    told = dataclasses.replace(config, **changes)

    def policy(episodes):
        inputs = module.encode(rollouts.pad(episodes, max_batch), config=told)
        return np.asarray(act(params, inputs, config=config))[: len(episodes), None]

    return policy
