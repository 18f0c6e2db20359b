"""All settings of a configuration against their records, before any work."""

import dataclasses
import itertools

import ml_collections

from experiments.common import control, datasets, entry
from experiments.common.baselines import BASELINES
from tt_jax import ensemble, iql, iql_training, learners, training, transformer, types


def checked(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict | None:
    """Return a configuration, or None where none is given; raises ValueError, naming the setting, if one is wrong."""
    if config is None:
        return None
    if not 0 <= config.seed < 2**32:
        raise entry.UsageError(f"seed={config.seed} must be in [0, 2**32).")
    if not 1 <= config.data.num_bins < 2**16:
        raise entry.UsageError(f"data.num_bins={config.data.num_bins} must be at least 1 and below 2**16.")
    for part, name in itertools.product(("train", "iql_train"), ("num_steps", "batch_size", "steps_per_call")):
        if config[part][name] >= 2**31:
            raise entry.UsageError(f"{part}.{name}={config[part][name]} must be below 2**31.")
    if not 0 <= config.data.eval_fraction < 1:
        raise entry.UsageError(f"data.eval_fraction={config.data.eval_fraction} must be in [0, 1).")
    if config.eval.num_episodes < 0 or len(config.eval.goal) not in (0, 2):
        raise entry.UsageError(
            f"eval.num_episodes={config.eval.num_episodes} must not be negative, and eval.goal={config.eval.goal} be "
            "(x, y), or () for the environment's goals."
        )
    datasets.data_config(config.data)
    sizes = {"observation_dim": 1, "action_dim": 1}  # come with the data
    spec = types.TransitionSpec(**sizes, num_bins=config.data.num_bins)
    iql_settings = {name: value for name, value in config.iql.items() if name != "actor_cosine"}
    entry.to_dataclass(transformer.TransformerConfig, config.model, spec=spec)
    entry.to_dataclass(training.TrainConfig, config.train)
    for guided in (False, True):
        control.plan_config(config, guided=guided)
    entry.to_dataclass(iql.IQLConfig, iql_settings, **sizes)
    entry.to_dataclass(iql_training.IQLTrainConfig, config.iql_train)
    entry.to_dataclass(ensemble.EnsembleConfig, config.ensemble, **sizes)
    entry.to_dataclass(ensemble.EnsembleTrainConfig, config.ensemble_train)
    for method, baseline in BASELINES.items():
        _check_baseline(method, baseline.module, dict(config.baselines[method]))
    return config


def _check_baseline(method, module, settings):
    train = settings.pop("train")
    sizes = {
        field.name: 1 for field in dataclasses.fields(module.Config) if field.default is dataclasses.MISSING
    }  # come with the data
    try:
        entry.to_dataclass(learners.TrainConfig, train)
        entry.to_dataclass(module.Config, settings, **sizes)
    except ValueError as error:
        reason = str(error).removeprefix("baselines.METHOD.")
        raise entry.UsageError(f"baselines.{method}.{reason}") from error
