"""What collecting and importing share: checking a dataset id before the work, writing the dataset after it."""

import warnings
from collections.abc import Iterable

import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE

from tt_jax import rollouts


def check_id(dataset_id: str, *, overwrite: bool) -> None:
    """Raise ValueError unless `dataset_id` can be written: it has a version, and is new or may be overwritten."""
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise ValueError(f"--dataset={dataset_id} must look like namespace/name-v0, with a version at the end.")
    path = minari.storage.get_dataset_path(dataset_id)
    if path.exists() and not overwrite:
        raise ValueError(f"Dataset {dataset_id} already exists at {path}; pass --overwrite or choose another id.")


def to_buffer(episode: rollouts.Episode) -> EpisodeBuffer:
    """Turn a point maze's episode, whose observations begin with position and velocity, into Minari's."""
    observations = np.array(episode.observations, np.float64)[:, :4]
    is_last = np.arange(1, episode.length + 1) == episode.length
    return EpisodeBuffer(
        seed=episode.seed,
        observations={
            "observation": observations,
            "achieved_goal": observations[:, :2],
            "desired_goal": np.tile(episode.goal.astype(np.float64), (len(observations), 1)),
        },
        actions=np.array(episode.actions),
        rewards=np.array(episode.rewards),
        terminations=is_last & episode.terminated,
        truncations=is_last & (not episode.terminated),
        infos={},  # Minari cannot print episodes without
    )


def write(
    dataset_id: str,
    episodes: Iterable[EpisodeBuffer],
    *,
    env: gymnasium.Env | None,
    eval_env: gymnasium.Env | None = None,
    **metadata,
) -> minari.MinariDataset:
    """Write `episodes` as the Minari dataset `dataset_id`, in place of an existing one; `metadata` is Minari's.

    `eval_env` is the environment to evaluate in; without it, that of the data. Without an `env` both spaces are needed.
    """
    path = minari.storage.get_dataset_path(dataset_id)
    if path.exists():
        minari.delete_dataset(dataset_id)
    with warnings.catch_warnings():  # Minari asks for author and permalink, which concern published datasets
        warnings.simplefilter("ignore", UserWarning)
        return minari.create_dataset_from_buffers(dataset_id, episodes, env=env, eval_env=eval_env or env, **metadata)
