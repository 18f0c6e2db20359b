"""Episodes of a Minari dataset as `trajectories.Trajectories`, and what is asked of them."""

import logging

import numpy as np
from minari.dataset.minari_storage import MinariStorage

from tt_jax import minari_files, spaces, trajectories

_ROWS_AT_A_TIME = 2**20  # of what would double the memory of the data


def read(dataset_id: str, storage: MinariStorage, *, config: trajectories.DataConfig) -> trajectories.Trajectories:
    """Read the episodes of an open dataset; see `trajectories.load`, which says what raises ValueError."""
    observation_columns, action_columns = _columns(dataset_id, storage, config)
    chosen = _chosen_episodes(storage.total_episodes, config)
    expected_rows = int(storage.metadata.get("total_steps") or 0)
    flat, offsets, final_observations, terminated = [None, None, None], [0], [], []
    for index, episode in zip(chosen, minari_files.read_episodes(storage, chosen), strict=True):
        *parts, final, is_terminal = _read_episode(dataset_id, index, episode, config, action_columns.size)
        pairs = zip(flat, parts, strict=True)
        flat = [_put(whole, part, offsets[-1], expected_rows) for whole, part in pairs]
        offsets.append(offsets[-1] + len(parts[0]))
        final_observations.append(final)
        terminated.append(is_terminal)
    lengths = np.diff(offsets).tolist()
    if max(lengths, default=0) < 2:
        raise ValueError(f"Dataset {dataset_id} has no episode of at least 2 steps, so it holds no training window.")
    observations, actions, rewards = (whole[: offsets[-1]] for whole in flat)
    final_known = np.array([final is not None for final in final_observations])
    if not final_known.all():
        logging.getLogger(__name__).warning(
            "%d of %d episodes of %s lack their last observation, episode %d the first of them; their last steps are "
            "not used where the next observation is needed.",
            np.sum(~final_known),
            len(chosen),
            dataset_id,
            chosen[np.argmin(final_known)],
        )
        pairs = zip(final_observations, offsets[1:], strict=True)
        final_observations = [observations[end - 1] if final is None else final for final, end in pairs]
    env_id, time_limit = minari_files.environment_limits(storage)
    loaded = trajectories.Trajectories(
        observations=observations,
        final_observations=np.stack(final_observations),
        final_known=final_known,
        actions=actions,
        rewards=rewards,
        offsets=np.array(offsets),
        terminated=np.array(terminated),
        dataset_id=dataset_id,
        env_id=env_id,
        max_path_length=config.max_path_length or time_limit or max(lengths),
        observation_columns=observation_columns,
        action_columns=action_columns,
    )
    _check_lengths(loaded)
    _check_finite(loaded)
    _check_discrete(loaded)
    return loaded


def _columns(dataset_id, storage, config):
    """Return the columns of observations and actions; raises ValueError if the keys or the spaces do not fit."""
    space, keys = storage.observation_space, config.observation_keys
    if isinstance(getattr(space, "spaces", None), dict):
        unknown = [key for key in keys if not _has(space, key)]
        if unknown or not keys:
            problem = f"has no {', '.join(unknown)}" if unknown else "is a Dict"
            raise ValueError(
                f"The observation of {dataset_id} {problem}; set data.observation_keys to some of {spaces.keys(space)}."
            )
    elif keys:
        raise ValueError(f"The observation of {dataset_id} is not a Dict; leave data.observation_keys={keys} empty.")
    try:
        parts = [spaces.entry(space, key) for key in keys] or [space]
        observed = spaces.join([spaces.columns(part) for part in parts])
        actions = spaces.columns(storage.action_space)
    except ValueError as error:
        raise ValueError(f"{dataset_id} cannot be used: {error}") from error
    if isinstance(getattr(storage.action_space, "spaces", None), dict):
        raise ValueError(f"{dataset_id} cannot be used: its actions are {storage.action_space}, not one space.")
    if config.observation_slice > observed.size:
        raise ValueError(
            f"data.observation_slice={config.observation_slice} exceeds the {observed.size} observed dimensions."
        )
    unknown = [dim for dim in config.hidden_dims if not 0 <= dim < (config.observation_slice or observed.size)]
    seen = trajectories.seen_dims(observed.size, config=config)
    if unknown or not len(seen):
        raise ValueError(
            f"data.hidden_dims={config.hidden_dims} must be some, but not all, of the "
            f"{config.observation_slice or observed.size} observed dimensions, counted from 0."
        )
    return spaces.take(observed, seen), actions


def _has(space, key):
    try:
        spaces.entry(space, key)
    except KeyError:
        return False
    return True


def _chosen_episodes(total, config):
    """List the episodes to read: all, the first, or as many evenly spread."""
    count = min(config.max_episodes or total, total)
    if config.spread_episodes and count:
        return np.linspace(0, total - 1, count).round().astype(int).tolist()
    return list(range(count))


def _read_episode(dataset_id, index, episode, config, action_dim):
    """Return observations, actions, rewards, the last observation (None if it was not recorded), and the terminal."""
    observations = trajectories.flatten_observations(episode["observations"], config=config)
    length = len(episode["rewards"])
    counts = {name: len(episode[name]) for name in ("actions", "terminations")} | {"observations": len(observations)}
    if not length or counts["actions"] != length or counts["terminations"] != length:
        raise ValueError(f"episode {index} of {dataset_id} has {length} rewards, but {counts}; remove the episode.")
    if not length <= len(observations) <= length + 1:
        raise ValueError(
            f"episode {index} of {dataset_id} has {len(observations)} observations for {length} steps; there must be "
            f"{length + 1}, or {length} without the last one."
        )
    actions = spaces.flatten(episode["actions"])
    if actions.shape[1] != action_dim:
        raise ValueError(
            f"episode {index} of {dataset_id} has actions of {actions.shape[1]} dimensions, its space {action_dim}."
        )
    # Minari stores one observation more than steps; the copy lets go of the others.
    after = observations[length].copy() if len(observations) > length else None
    return observations[:length], actions, np.asarray(episode["rewards"]), after, bool(episode["terminations"][-1])


def _put(whole, part, begin, expected_rows):
    """Write `part` into the rows of `whole` from `begin` on, and return it.

    Rows that are not written yet take no memory. A `whole` that is None, too short or of a narrower type is made anew.
    """
    end, dtype = begin + len(part), part.dtype if whole is None else np.result_type(whole, part)
    if whole is None or end > len(whole) or dtype != whole.dtype:
        larger = np.empty([max(expected_rows, end, 2 * begin), *part.shape[1:]], dtype)
        if whole is not None:
            larger[:begin] = whole[:begin]
        whole = larger
    whole[begin:end] = part
    return whole


def _check_lengths(loaded):
    lengths = np.diff(loaded.offsets)
    longest = int(np.argmax(lengths))
    if lengths[longest] > loaded.max_path_length:
        raise ValueError(
            f"Episode {longest} of {loaded.dataset_id} has {lengths[longest]} steps, more than "
            f"max_path_length={loaded.max_path_length}; set data.max_path_length to at least {lengths[longest]}."
        )


def _check_finite(loaded):
    for name in ("observation", "action", "reward"):
        values = getattr(loaded, f"{name}s").reshape(len(loaded.rewards), -1)
        for begin in range(0, len(values), _ROWS_AT_A_TIME):
            bad = np.argwhere(~np.isfinite(values[begin : begin + _ROWS_AT_A_TIME]))
            if not len(bad):
                continue
            row, column = begin + bad[0][0], bad[0][1]
            episode = int(np.searchsorted(loaded.offsets, row, side="right")) - 1
            place = name if name == "reward" else f"{name}[{column}]"
            raise ValueError(
                f"{place} of {loaded.dataset_id} is {values[row, column]} in episode {episode}, "
                f"step {row - loaded.offsets[episode]}; all data must be finite."
            )
    bad = np.flatnonzero(~np.isfinite(loaded.final_observations).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the last observation of episode {bad[0]} of {loaded.dataset_id} is not finite; all data must be."
        )


def _check_discrete(loaded):
    for name in ("observation", "action"):
        values, columns = getattr(loaded, f"{name}s"), getattr(loaded, f"{name}_columns")
        for column in np.flatnonzero(columns.is_discrete):
            bad = np.flatnonzero(~np.isin(values[:, column], columns.values(column)))
            if len(bad):
                raise ValueError(
                    f"{name}[{column}] of {loaded.dataset_id} is {values[bad[0], column]} in row {bad[0]}, its "
                    f"space has {columns.low[column]:.0f} to {columns.high[column]:.0f}; mend the data or its space."
                )
