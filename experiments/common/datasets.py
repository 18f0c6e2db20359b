"""From a run's configuration to the tokenised dataset that it trains on."""

import dataclasses

import ml_collections
import numpy as np
from absl import logging

from experiments.common import entry
from tt_jax import minari_files, spaces, tokenization, trajectories, types

MEMORY_SETTINGS = (
    "read a part of it with --config.data.max_episodes=N, or fewer of its numbers by data.observation_keys or "
    "data.observation_slice"
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset in tokens, split by episodes."""

    spec: types.TransitionSpec
    config: trajectories.DataConfig  # with the maximal path length filled in
    tokenizer: tokenization.Discretizer
    train: trajectories.TokenStore
    held_out: trajectories.TokenStore | None  # None: too few episodes
    run: dict  # for the checkpoint, see `describe_run`


def data_config(settings) -> trajectories.DataConfig:
    """Pick the fields of DataConfig out of a configuration's `data`, which holds those of the tokenizer, too."""
    names = {field.name for field in dataclasses.fields(trajectories.DataConfig)}
    return entry.to_dataclass(trajectories.DataConfig, {name: settings[name] for name in names & set(settings)})


def with_keys(dataset_id: str, settings: trajectories.DataConfig, *, download: bool = False) -> trajectories.DataConfig:
    """Fill in the keys of a Dict observation that none are named of: all of numbers, goals last.

    An `achieved_goal` all of whose columns are in the observation is left out.
    """
    storage = minari_files.open_storage(dataset_id, download=download)
    if settings.observation_keys or not hasattr(storage.observation_space, "keys") or not storage.total_episodes:
        return settings
    keys = sorted(spaces.keys(storage.observation_space), key=lambda key: (key.startswith("desired_goal"), key))
    (episode,) = minari_files.read_episodes(storage, [0])
    columns = {key: spaces.flatten(spaces.entry(episode["observations"], key)).T for key in keys}
    others = [
        column for key in keys if not key.startswith(("achieved_goal", "desired_goal")) for column in columns[key]
    ]

    def repeats(key):
        return all(any(np.array_equal(column, other) for other in others) for column in columns[key])

    keys = [key for key in keys if not (key.startswith("achieved_goal") and repeats(key))]
    logging.info("data.observation_keys are %s", tuple(keys))
    return dataclasses.replace(settings, observation_keys=tuple(keys))


def describe_run(config: ml_collections.ConfigDict, settings: trajectories.DataConfig, *, max_path_length: int) -> dict:
    """Return what a checkpoint holds of how it was made: the configuration with the keys that were taken, and more."""
    run = config.to_dict()
    run["data"]["observation_keys"] = list(settings.observation_keys)
    return run | {"env_spec": minari_files.evaluation_spec(config.dataset), "max_path_length": max_path_length}


def prepare(config: ml_collections.ConfigDict, *, download: bool = False) -> Dataset:
    """Load, tokenise and split `config.dataset`; raises ValueError if the data cannot be used.

    The tokenizer is fitted on all episodes, as the reference does, so every process fits the same.
    """
    settings = with_keys(config.dataset, data_config(config.data), download=download)
    loaded = trajectories.load(config.dataset, config=settings, download=download)
    if settings.step >= (longest := np.diff(loaded.offsets).max()):
        raise entry.UsageError(
            f"data.step={settings.step} must be less than the {longest} steps of the longest episode."
        )
    settings = dataclasses.replace(settings, max_path_length=loaded.max_path_length)
    spec = types.TransitionSpec(
        observation_dim=loaded.observations.shape[1], action_dim=loaded.actions.shape[1], num_bins=config.data.num_bins
    )
    rewards = {"discount": settings.discount, "termination_penalty": settings.termination_penalty}
    columns = trajectories.columns(loaded, **rewards)
    tokenizer = _fit(loaded, columns, config.data)
    tokens, merged = _encode(tokenizer, columns)
    if merged:
        logging.warning(
            "columns %s (of observation, action, reward, value) vary, but all their values share one bin; "
            "data.distinct_values=True keeps columns of few values apart.",
            merged,
        )
    train_episodes, held_out_episodes = split(loaded, config.data.eval_fraction, config.seed)
    logging.info(
        "%s: %d transitions in %d episodes, %d tokens each, %d episodes held out",
        config.dataset,
        len(tokens),
        len(loaded.terminated),
        spec.transition_dim,
        len(held_out_episodes),
    )
    store = trajectories.token_store(tokens, loaded, num_bins=spec.num_bins)
    return Dataset(
        spec=spec,
        config=settings,
        tokenizer=tokenizer,
        train=trajectories.select_tokens(store, train_episodes),
        held_out=trajectories.select_tokens(store, held_out_episodes) if len(held_out_episodes) else None,
        run=describe_run(config, settings, max_path_length=settings.max_path_length),
    )


def _encode(tokenizer, columns):
    """Return the tokens [n, D] and the columns that vary while their tokens do not; one by one, to save memory."""
    num_bins = tokenizer.centers.shape[1]
    tokens = np.empty([len(columns[0]), len(columns)], np.min_scalar_type(num_bins))
    merged = []
    for dim, column in enumerate(columns):
        values = np.asarray(column, np.float64)[:, None]
        own = tokenization.encode(tokenizer, values, dims=slice(dim, dim + 1))
        merged += [dim] if tokenization.merged_columns(own, values) else []
        tokens[:, dim] = own[:, 0]
    return tokens, merged


def _fit(loaded, data_columns, settings) -> tokenization.Discretizer:
    """Fit the tokenizer; a discrete dimension gets one bin for each value of its space."""
    columns = spaces.join([loaded.observation_columns, loaded.action_columns])
    known = {int(column): columns.values(column) for column in np.flatnonzero(columns.is_discrete)}
    largest = max(map(len, known.values()), default=0)
    if largest > settings.num_bins:
        raise entry.UsageError(
            f"a discrete dimension has {largest} values, more than data.num_bins={settings.num_bins}; set "
            f"--config.data.num_bins={largest}."
        )
    return tokenization.fit_columns(
        data_columns,
        num_bins=settings.num_bins,
        method=settings.method,
        distinct_values=settings.distinct_values,
        known_values=known,
    )


def split(loaded: trajectories.Trajectories, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the episodes to train on and a share that is held out, none if a part would be left without windows."""
    lengths = np.diff(loaded.offsets)
    order = np.random.default_rng(seed).permutation(len(lengths))
    num_held_out = round(fraction * len(order))
    held_out, train = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    if not (lengths[held_out] > 1).any() or not (lengths[train] > 1).any():
        return np.arange(len(lengths)), np.array([], int)
    return train, held_out
