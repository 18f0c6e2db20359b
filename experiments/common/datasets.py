"""From a run's configuration to the tokenised dataset that it trains on."""

import dataclasses

import minari
import ml_collections
import numpy as np
from absl import logging

from experiments.common import entry
from tt_jax import tokenization, trajectories, types


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset in tokens, split by episodes."""

    spec: types.TransitionSpec
    config: trajectories.DataConfig  # with the maximal path length filled in
    tokenizer: tokenization.Discretizer
    train: trajectories.TokenStore
    held_out: trajectories.TokenStore | None  # None: too few episodes
    env_spec: str | None  # JSON


def data_config(settings) -> trajectories.DataConfig:
    """Pick the fields of DataConfig out of a configuration's `data`, which holds those of the tokenizer, too."""
    names = {field.name for field in dataclasses.fields(trajectories.DataConfig)}
    return entry.to_dataclass(trajectories.DataConfig, {name: settings[name] for name in names & set(settings)})


def env_spec(dataset_id: str) -> str | None:
    """Return the specification of the environment to play in, as JSON: the one for evaluation where there is one."""
    dataset = minari.load_dataset(dataset_id)
    return dataset.storage.metadata.get("eval_env_spec") or (dataset.env_spec and dataset.env_spec.to_json())


def prepare(config: ml_collections.ConfigDict, *, download: bool = False) -> Dataset:
    """Load, tokenise and split `config.dataset`; raises ValueError if the data cannot be used.

    The tokenizer is fitted on all episodes, as the reference does, so every process fits the same.
    """
    settings = data_config(config.data)
    loaded = trajectories.load(config.dataset, config=settings, download=download)
    settings = dataclasses.replace(settings, max_path_length=loaded.max_path_length)
    values = trajectories.segment(loaded, discount=settings.discount, termination_penalty=settings.termination_penalty)
    tokenizer = tokenization.fit(
        values,
        num_bins=config.data.num_bins,
        method=config.data.method,
        distinct_values=config.data.distinct_values,
    )
    tokens = tokenization.encode(tokenizer, values)
    if merged := tokenization.merged_columns(tokens, values):
        logging.warning(
            "columns %s (of observation, action, reward, value) vary, but all their values share one bin; "
            "data.distinct_values=True keeps columns of few values apart.",
            merged,
        )
    spec = types.TransitionSpec(
        observation_dim=loaded.observations.shape[1], action_dim=loaded.actions.shape[1], num_bins=config.data.num_bins
    )
    train_episodes, held_out_episodes = _split(loaded, config.data.eval_fraction, config.seed)

    def store(episodes):
        part = trajectories.select(loaded, episodes)
        rows = np.concatenate([np.arange(loaded.offsets[e], loaded.offsets[e + 1]) for e in episodes])
        return trajectories.token_store(tokens[rows], part, num_bins=spec.num_bins)

    logging.info(
        "%s: %d transitions in %d episodes, %d tokens each, %d episodes held out",
        config.dataset,
        len(values),
        len(loaded.terminated),
        spec.transition_dim,
        len(held_out_episodes),
    )
    return Dataset(
        spec=spec,
        config=settings,
        tokenizer=tokenizer,
        train=store(train_episodes),
        held_out=store(held_out_episodes) if len(held_out_episodes) else None,
        env_spec=env_spec(config.dataset),
    )


def _split(loaded, fraction, seed):
    """Hold out a share of the episodes, none if a part would be left without windows."""
    if not 0 <= fraction < 1:
        raise entry.UsageError(f"data.eval_fraction={fraction} must be in [0, 1).")
    lengths = np.diff(loaded.offsets)
    order = np.random.default_rng(seed).permutation(len(lengths))
    num_held_out = round(fraction * len(order))
    held_out, train = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    if not (lengths[held_out] > 1).any() or not (lengths[train] > 1).any():
        return np.arange(len(lengths)), np.array([], int)
    return train, held_out
