"""All settings of a configuration against their records, before any work."""

import itertools

import ml_collections

from experiments.common import datasets, entry
from tt_jax import iql, iql_training, sequence_planner, training, transformer, types


def checked(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict | None:
    """Return a configuration, or None where none is given; raises ValueError, naming the setting, if one is wrong."""
    if config is None:
        return None
    try:
        seed = config.seed
    except OSError as error:  # config_flags keeps a file that is not found until it is used
        raise entry.UsageError(str(error)) from error
    if not 0 <= seed < 2**32:
        raise entry.UsageError(f"seed={seed} must be in [0, 2**32).")
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
    # The sizes come with the data.
    spec = types.TransitionSpec(observation_dim=1, action_dim=1, num_bins=config.data.num_bins)
    iql_settings = {name: value for name, value in config.iql.items() if name != "actor_cosine"}
    entry.to_dataclass(transformer.TransformerConfig, config.model, spec=spec)
    entry.to_dataclass(training.TrainConfig, config.train)
    entry.to_dataclass(sequence_planner.PlanConfig, config.plan)
    entry.to_dataclass(iql.IQLConfig, iql_settings, observation_dim=1, action_dim=1)
    entry.to_dataclass(iql_training.IQLTrainConfig, config.iql_train)
    return config
