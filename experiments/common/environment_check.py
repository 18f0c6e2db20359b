"""Whether an environment is the one of the data: its starts against the data's values, the data against its walls."""

from collections.abc import Sequence

import gymnasium
import numpy as np
from absl import logging

from tt_jax import minari_files, trajectories

_MARGIN = 0.1  # of the width of the data that a start may lie outside of it
_TOLERATED = 0.01  # share of positions in walls, since bodies lean over
_EPISODES = 50  # of the data, evenly spread
_STARTS = 10


def check(
    env: gymnasium.Env,
    dataset_id: str,
    *,
    low: np.ndarray,
    high: np.ndarray,
    seeds: Sequence[int],
    config: trajectories.DataConfig,
) -> dict:
    """Compare an environment with the data, whose observations [N], flat by `config`, lie between `low` and `high`.

    Returns `problems`, one line each and warned of in the log, and the shares they come from: `starts_outside`, of the
    resets with the first seeds that lie outside of the data; `data_in_walls` and `goals_in_walls`, of the data's
    positions and goals that lie in walls or outside, None unless this is a maze of gymnasium-robotics and the dataset
    is on this machine.
    """
    starts, columns = _starts_outside(env, low, high, seeds, config)
    found = {"starts_outside": starts, "data_in_walls": None, "goals_in_walls": None, "problems": []}
    if columns.size:
        found["problems"].append(
            f"{starts:.0%} of the environment's starts lie outside of the data, in observation columns "
            f"{columns.tolist()[:10]} (goals included)"
        )
    maze = getattr(env.unwrapped, "maze", None)
    positions = _positions(dataset_id) if hasattr(maze, "cell_xy_to_rowcol") else {}
    for name, key in (("data_in_walls", "achieved_goal"), ("goals_in_walls", "desired_goal")):
        if key in positions:
            found[name] = float(np.mean([_is_wall(maze, position) for position in positions[key]]))
            if found[name] > _TOLERATED:
                what = "positions" if key == "achieved_goal" else "goals"
                found["problems"].append(f"{found[name]:.0%} of the data's {what} lie in walls or outside of this maze")
    for problem in found["problems"]:
        logging.warning("this may not be the environment of the data: %s.", problem)
    return found


def _starts_outside(env, low, high, seeds, config):
    """Return the share of resets outside of the data, and the columns in which they are."""
    starts = []
    for seed in seeds[:_STARTS]:
        observation = env.reset(seed=seed)[0]
        starts.append(trajectories.flatten_observations(_batch(observation), config=config)[0])
    margin = _MARGIN * (high - low) + 1e-3 * np.maximum(np.abs(low), np.abs(high)) + 1e-6
    is_outside = (starts < low - margin) | (starts > high + margin)
    return float(is_outside.any(axis=1).mean()), np.flatnonzero(is_outside.any(axis=0))


def _batch(observation):
    if isinstance(observation, dict):
        return {name: _batch(value) for name, value in observation.items()}
    return np.asarray(observation)[None]


def _positions(dataset_id):
    """Return some of the positions [n, 2] of a goal maze's data by key; none if it is not here or has no such."""
    try:
        storage = minari_files.open_storage(dataset_id)
        total = storage.total_episodes
        chosen = np.unique(np.linspace(0, total - 1, min(_EPISODES, total)).round().astype(int))
        episodes = [episode["observations"] for episode in minari_files.read_episodes(storage, chosen.tolist())]
    except ValueError:
        return {}
    keys = [key for key in ("achieved_goal", "desired_goal") if isinstance(episodes[0], dict) and key in episodes[0]]
    found = {key: np.concatenate([each[key] for each in episodes]) for key in keys}
    return {key: values for key, values in found.items() if values.shape[1:] == (2,)}


def _is_wall(maze, position):
    row, column = maze.cell_xy_to_rowcol(position)
    is_inside = 0 <= row < maze.map_length and 0 <= column < maze.map_width
    return not is_inside or maze.maze_map[row][column] == 1
