"""Read files of D4RL and OGBench as episodes: flat arrays in which `terminals` and `timeouts` mark the last steps."""

import itertools
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator

import gymnasium
import h5py
import numpy as np
import tqdm
from absl import logging
from minari.data_collector import EpisodeBuffer

# Returns of a random and an expert policy, by which D4RL normalises scores (its infos.py).
REFERENCE_SCORES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "AntMaze": (0.0, 1.0),
}


def reference_scores(env_id: str) -> tuple[float | None, float | None]:
    """Return D4RL's (minimum, maximum) score for environments such as Hopper-v5 or AntMaze_UMaze-v4."""
    name = env_id.split("/")[-1].split("-")[0].split("_")[0]
    return REFERENCE_SCORES.get(name, (None, None))


def fetch(source: str, folder: str) -> str:
    """Return the path of `source`, downloaded into `folder` with a progress bar if it is a URL."""
    if "://" not in source:
        return source
    try:
        with urllib.request.urlopen(source) as response, tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.tqdm.wrapattr(response, "read", total=size, desc=os.path.basename(source)) as stream:
                shutil.copyfileobj(stream, file)
    except (OSError, ValueError) as error:  # ValueError: no URL
        raise ValueError(f"{source} cannot be downloaded: {error}") from error
    return file.name


def episode_offsets(terminals, timeouts, *, max_episode_steps: int | None) -> np.ndarray:
    """Return [E + 1] bounds of the episodes of flat data; an unfinished tail counts as one.

    Without `timeouts` (None), whatever is longer than `max_episode_steps` is cut at its multiples.
    """
    ends = terminals if timeouts is None else terminals | timeouts
    offsets = np.unique(np.concatenate([[0], np.flatnonzero(ends) + 1, [len(ends)]]))
    if timeouts is None and max_episode_steps:
        cuts = [np.arange(start, stop, max_episode_steps) for start, stop in itertools.pairwise(offsets)]
        offsets = np.concatenate([*cuts, offsets[-1:]])
    return offsets


def read_episodes(
    path: str, *, max_episode_steps: int | None, space: gymnasium.spaces.Dict | None = None
) -> Iterator[EpisodeBuffer]:
    """Yield the episodes of one file.

    The observation after an episode's last step, which Minari wants, comes from `next_observations`. Files without them
    repeat the last observation at terminals, where nobody needs it; from an episode that was cut short the last step is
    dropped, as D4RL does. With the observation `space` of a goal maze the flat observation is split as the environment
    has it into `observation`, `achieved_goal` (x, y) and `desired_goal` (`infos/goal`).

    OGBench's files (npz without rewards) mark with `terminals` the row that holds an episode's last observation, where
    it is cut; their rewards are 0 here, with a warning.

    Raises ValueError if the file lacks a needed array, the arrays differ in length, or it does not fit the `space`.
    """
    arrays = _read(path, goal_maze=space is not None)
    goal_parts = _goal_parts(path, arrays, space) if space else None
    terminals, timeouts = arrays["terminals"], arrays.get("timeouts")
    offsets = episode_offsets(terminals, timeouts, max_episode_steps=max_episode_steps)
    for start, stop in itertools.pairwise(offsets):
        is_cut = not terminals[stop - 1]
        truncations = np.zeros(stop - start, bool)
        truncations[-1] = is_cut or (timeouts is not None and timeouts[stop - 1])
        last = arrays.get("next_observations", arrays["observations"])[stop - 1 : stop]
        if is_cut and "next_observations" not in arrays:
            stop, truncations = stop - 1, truncations[1:]
            if start == stop:
                continue
        steps = slice(start, stop)
        observations = np.concatenate([arrays["observations"][steps], last])
        if goal_parts:
            goals = arrays["infos/goal"][steps]
            observations = {name: observations[:, columns] for name, columns in goal_parts.items()}
            observations["desired_goal"] = np.concatenate([goals, goals[-1:]])
        yield EpisodeBuffer(
            observations=observations,
            actions=arrays["actions"][steps],
            rewards=arrays["rewards"][steps],
            terminations=terminals[steps],
            truncations=truncations,
            infos={},  # Minari cannot print episodes without
        )


def _goal_parts(path, arrays, space):
    """Return the columns of `observation` and `achieved_goal` in a goal maze's flat observations.

    An ant's begin with its position, which its environment reports as `achieved_goal` alone; a point's position stays
    in the `observation`.
    """
    size, goal_size = arrays["observations"].shape[1], space["achieved_goal"].shape[0]
    observed = space["observation"].shape[0]
    if arrays["infos/goal"].shape[1:] == space["desired_goal"].shape:
        if size == observed:
            return {"observation": slice(None), "achieved_goal": slice(goal_size)}
        if size == observed + goal_size:
            return {"observation": slice(goal_size, None), "achieved_goal": slice(goal_size)}
    raise ValueError(
        f"{path} has observations of {size} dimensions and goals {arrays['infos/goal'].shape[1:]}, which fit no known "
        f"layout: {observed} or {observed + goal_size} and {space['desired_goal'].shape} for this environment; choose "
        "the --env of the data, such as AntMaze_*-v4 or PointMaze_*-v3."
    )


def unbounded_space(values) -> gymnasium.Space:
    """Return the unbounded space of recorded observations or actions, an array [T, ...] or a dict of them.

    Old recordings may be wider than what today's environment observes, so this comes from the data.
    """
    if isinstance(values, dict):
        return gymnasium.spaces.Dict({key: unbounded_space(array) for key, array in values.items()})
    return gymnasium.spaces.Box(-np.inf, np.inf, values.shape[1:], values.dtype)


def _read(path, *, goal_maze):
    needed = ["observations", "actions", "rewards", "terminals"] + ["infos/goal"] * goal_maze
    found, arrays = _load(path, [*needed, "timeouts", "next_observations"])
    is_ogbench = zipfile.is_zipfile(path) and found.isdisjoint({"rewards", "timeouts"}) and "terminals" in arrays
    if is_ogbench:
        ends = arrays["terminals"]
        arrays |= {"rewards": np.zeros(len(ends)), "timeouts": ends, "terminals": np.zeros_like(ends)}
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(
            f"{path} is in the layout of neither D4RL nor OGBench: {', '.join(missing)} missing among {sorted(found)}."
        )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or not lengths["rewards"]:
        raise ValueError(f"The arrays of {path} must have one length of at least 1, got {lengths}.")
    if is_ogbench:
        logging.warning("%s has OGBench's layout, without rewards: they are 0 here, which plans cannot maximise.", path)
    if no_numbers := {name: str(array.dtype) for name, array in arrays.items() if array.dtype.kind not in "fiub"}:
        raise ValueError(f"The arrays of {path} must hold numbers, got {no_numbers}.")
    arrays["rewards"] = arrays["rewards"].reshape(-1)
    for name in {"terminals", "timeouts"} & arrays.keys():
        arrays[name] = arrays[name].reshape(-1).astype(bool)
    return arrays


def _load(path, names):
    """Return the names in an HDF5 or npz file, and those of the arrays `names` that are there."""
    try:
        if zipfile.is_zipfile(path):
            with np.load(path) as file:
                return set(file), {name: file[name] for name in names if name in file}
        with h5py.File(path, "r") as file:
            found = {f"{name}/" if isinstance(file[name], h5py.Group) else name for name in file}
            return found, {name: file[name][()] for name in names if isinstance(file.get(name), h5py.Dataset)}
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as HDF5 or npz: {reason}; copy or download it again.") from error
