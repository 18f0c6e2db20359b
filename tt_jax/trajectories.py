"""Episodes of a Minari dataset as flat arrays, returns-to-go, and windows of tokens for training.

Nothing is padded: the transitions of all episodes stand one after the other, and `offsets` says where each begins.
"""

import dataclasses
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import spaces, types

_ROWS_AT_A_TIME = 2**20  # of what takes many times the memory of the data


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How a dataset is read and cut into windows."""

    observation_keys: tuple[str, ...] = ()  # Dict observations: the keys to concatenate, in this order; nested: a/b
    observation_slice: int = 0  # keep the first n dimensions; 0 keeps all
    hidden_dims: tuple[int, ...] = ()  # leave out these of the dimensions that are kept
    step: int = 1  # environment steps from one transition of a window to the next
    discount: float = 0.99  # of the return-to-go, per environment step
    termination_penalty: float | None = None  # replaces the reward of a terminal step
    max_path_length: int = 0  # 0: the environment's time limit or, without one, the longest episode
    stop_after_truncation: bool = True  # whether stop tokens are also trained on after a truncation
    max_episodes: int = 0  # read the first n episodes alone; 0 reads all
    spread_episodes: bool = False  # read n that are evenly spread over the dataset instead of the first

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"data.step={self.step} must be at least 1.")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"data.discount={self.discount} must be in [0, 1].")
        for name in ("observation_slice", "max_path_length", "max_episodes"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must not be negative; 0 means unset.")


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Episodes as flat host arrays in the dtypes they are stored in. Every episode has at least one step."""

    observations: np.ndarray  # [n, N] before each action
    final_observations: np.ndarray  # [E, N] after the last step of each episode
    actions: np.ndarray  # [n, A]
    rewards: np.ndarray  # [n]
    offsets: np.ndarray  # [E + 1] int64, episode e is rows offsets[e] to offsets[e + 1]
    terminated: np.ndarray  # [E] bool, 1 where the last step is a real terminal, 0 where the episode was cut short
    dataset_id: str = ""
    env_id: str = ""
    max_path_length: int = 0  # time limit, at least the longest episode
    final_known: np.ndarray | None = None  # [E] bool, 0 where the last observation is not recorded; None: all are
    observation_columns: spaces.Columns | None = None  # of the N columns; None: any real numbers
    action_columns: spaces.Columns | None = None  # of the A columns


@chex.dataclass(frozen=True)
class TokenStore:
    """The tokenised dataset, as it lives on every device."""

    tokens: chex.Array  # [n, D] uint8, or uint16 if the stop token needs it
    offsets: chex.Array  # [E + 1] int32
    terminated: chex.Array  # [E] bool


def load(dataset_id: str, *, config: DataConfig, download: bool = False) -> Trajectories:
    """Read a Minari dataset whose observations and actions consist of numbers, see `spaces`.

    An environment that cannot be read and an episode without its last observation are warnings in the log.

    Raises:
      ValueError: the dataset is missing or damaged, its spaces do not fit, a number is not finite or not in its
        discrete space, an episode is longer than the maximum, or no episode has two steps.
    """
    from tt_jax import minari_files  # here, because training uses this module and must not need minari

    storage = minari_files.open_storage(dataset_id, download=download)
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
    trajectories = Trajectories(
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
    _check_lengths(trajectories)
    _check_finite(trajectories)
    _check_discrete(trajectories)
    return trajectories


def flatten_observations(observations, *, config: DataConfig) -> np.ndarray:
    """Turn a batch of environment observations, [T, ...] or a dict of such arrays, into [T, N] as a model sees it.

    The dtype is that of the parts together. Raises KeyError if one of `config.observation_keys` is not there.
    """
    keys = config.observation_keys
    if not keys and isinstance(observations, dict):
        raise KeyError(f"observation_keys must name some of {sorted(observations)}")
    parts = [spaces.flatten(spaces.entry(observations, key)) for key in keys] or [spaces.flatten(observations)]
    flat = np.concatenate(parts, axis=1)
    seen = _seen_dims(flat.shape[1], config)
    return flat if len(seen) == flat.shape[1] else flat[:, seen]


def _seen_dims(size, config):
    """List which of `size` observed dimensions a model sees."""
    return np.setdiff1d(np.arange(size)[: config.observation_slice or size], config.hidden_dims)


def select(trajectories: Trajectories, episodes) -> Trajectories:
    """Keep the episodes with the given indices [E'] in [0, E), in the given order."""
    rows, offsets = _rows_of(trajectories.offsets, episodes)
    return dataclasses.replace(
        trajectories,
        observations=trajectories.observations[rows],
        final_observations=trajectories.final_observations[episodes],
        actions=trajectories.actions[rows],
        rewards=trajectories.rewards[rows],
        offsets=offsets,
        terminated=trajectories.terminated[episodes],
        final_known=None if trajectories.final_known is None else trajectories.final_known[episodes],
    )


def returns(trajectories: Trajectories) -> np.ndarray:
    """Sum the rewards of each episode, [E] float64."""
    return np.add.reduceat(trajectories.rewards.astype(np.float64), trajectories.offsets[:-1])


def segment(trajectories: Trajectories, *, discount: float, termination_penalty: float | None = None) -> np.ndarray:
    """Join observation, action, reward and value of each step, the `columns`, into [n, D] float64."""
    return np.stack(columns(trajectories, discount=discount, termination_penalty=termination_penalty), axis=1)


def columns(
    trajectories: Trajectories, *, discount: float, termination_penalty: float | None = None
) -> list[np.ndarray]:
    """Return the D columns [n] of observation, action, reward and value of each step; those that are stored as views.

    The value is the discounted return after this step, V_t = r_{t+1} + discount r_{t+2} + ..., hence 0 at the last
    step of every episode, truncated ones included: nothing is bootstrapped. The penalty takes the place of the reward
    at real terminals before the values are computed.
    """
    last_rows = trajectories.offsets[1:] - 1
    rewards = trajectories.rewards.astype(np.float64)
    if termination_penalty is not None:
        rewards[last_rows[trajectories.terminated]] = termination_penalty
    is_last = np.zeros(len(rewards), bool)
    is_last[last_rows] = True
    values = _returns_after(rewards, is_last, discount=discount)
    return [*trajectories.observations.T, *trajectories.actions.T, rewards, values]


def transitions(trajectories: Trajectories) -> types.Transitions:
    """Cut episodes into their single steps, float32, in the order they were made, as `iql.update` learns from them.

    Only real terminals have `not_terminal` 0: a truncated episode goes on for a Q-function, and its last step is left
    out where the observation after it is not known. Actions beyond the bounds of `action_bounds` are clipped, with a
    warning in the log, and all are kept just inside. Raises ValueError if actions are discrete.
    """
    low, high = action_bounds(trajectories)
    actions = trajectories.actions.astype(np.float32)
    num_outside = int(np.sum(((actions < low) | (actions > high)).any(axis=1)))
    if num_outside:
        logging.getLogger(__name__).warning(
            "%d of %d actions of %s are beyond their bounds %s to %s and clipped.",
            num_outside,
            len(actions),
            trajectories.dataset_id,
            low.tolist(),
            high.tolist(),
        )
    last_rows = trajectories.offsets[1:] - 1
    observations = trajectories.observations.astype(np.float32)
    next_observations = np.empty_like(observations)
    next_observations[:-1] = observations[1:]
    next_observations[last_rows] = trajectories.final_observations
    not_terminal = np.ones(len(next_observations), np.float32)
    not_terminal[last_rows[trajectories.terminated]] = 0
    steps = types.Transitions(
        observations=observations,
        actions=clip_actions(actions, low=low, high=high),
        rewards=trajectories.rewards.astype(np.float32),
        not_terminal=not_terminal,
        next_observations=next_observations,
    )
    if trajectories.final_known is None or (trajectories.final_known | trajectories.terminated).all():
        return steps
    is_used = np.ones(len(actions), bool)
    is_used[last_rows[~trajectories.final_known & ~trajectories.terminated]] = False
    return jax.tree.map(lambda rows: rows[is_used], steps)


def action_bounds(trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest action [A] float32: those of the action space, +-1 if there is none.

    A dimension without bounds is as wide as its largest action, at least +-1. Raises ValueError for discrete actions.
    """
    columns = trajectories.action_columns
    if columns is None:
        ones = np.ones(trajectories.actions.shape[1], np.float32)
        return -ones, ones
    if columns.is_discrete.any():
        raise ValueError(
            f"the actions of {trajectories.dataset_id} are discrete, Q-learning here needs a Box of them; "
            "the transformer plans without it, by predicted returns or by likelihood."
        )
    widest = np.maximum(np.abs(trajectories.actions).max(axis=0), 1.0)
    is_bounded = np.isfinite(columns.low) & np.isfinite(columns.high)
    low, high = np.where(is_bounded, columns.low, -widest), np.where(is_bounded, columns.high, widest)
    return low.astype(np.float32), high.astype(np.float32)


def clip_actions(actions: np.ndarray, *, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Keep actions [n, A] just inside their bounds [A], as the reference of IQL does with +-1 before training."""
    center, reach = (high + low) / 2, (high - low) / 2 * np.float32(1 - 1e-5)
    return np.clip(actions, center - reach, center + reach)


def select_tokens(store: TokenStore, episodes) -> TokenStore:
    """Keep the episodes with the given indices [E'] in [0, E), in the given order, as `select` does."""
    rows, offsets = _rows_of(store.offsets.astype(np.int64), episodes)
    return TokenStore(
        tokens=store.tokens[rows], offsets=offsets.astype(np.int32), terminated=store.terminated[np.asarray(episodes)]
    )


def num_windows(offsets) -> int:
    """Count the windows of all episodes, `offsets` [E + 1]; one of L steps has L - 1, starting at all but its last."""
    return int(offsets[-1]) - (len(offsets) - 1)


def token_store(tokens, trajectories: Trajectories, *, num_bins: int) -> TokenStore:
    """Pack the tokens [n, D] of `trajectories`, in [0, V), into the smallest dtype that also holds the stop token V."""
    return TokenStore(
        tokens=np.asarray(tokens).astype(np.min_scalar_type(num_bins)),
        offsets=trajectories.offsets.astype(np.int32),
        terminated=trajectories.terminated,
    )


def windows(
    store: TokenStore, ids, *, spec: types.TransitionSpec, config: DataConfig, max_transitions: int
) -> types.Batch:
    """Gather the windows `ids` [B] int32 in [0, num_windows) as a Batch of K * D - 1 input tokens and targets each.

    A window is K = max_transitions transitions, `config.step` environment steps apart; those beyond the end of the
    episode are stop tokens throughout. As in the reference implementation, the weights drop the transitions later
    than max_path_length - step and are aligned with the inputs, not the targets. Stop tokens count after a
    termination, and after a truncation if `config.stop_after_truncation`. The goal of a window is the episode's last
    stored observation. Meant for use inside a compiled step, which leaves out what it does not use.

    Raises:
      ValueError: `config.max_path_length` is 0; here it must be set, to that of the loaded trajectories.
    """
    if not config.max_path_length:
        raise ValueError("data.max_path_length is 0; set it to the max_path_length of the loaded trajectories.")
    store = jax.tree.map(jnp.asarray, store)
    num_episodes = len(store.terminated)
    first_ids = store.offsets - jnp.arange(num_episodes + 1)  # each episode before e has one window less than steps
    episode = jnp.searchsorted(first_ids, ids, side="right") - 1  # [B], the last of equals skips one-step episodes
    start = (ids + episode)[:, None]
    begin, end = store.offsets[episode][:, None], store.offsets[episode + 1][:, None]

    rows = start + config.step * jnp.arange(max_transitions)[None]  # [B, K]
    is_over = rows >= end
    tokens = store.tokens[jnp.minimum(rows, end - 1)].astype(jnp.int32)  # [B, K, D]
    tokens = jnp.where(is_over[..., None], spec.stop_token, tokens).reshape(len(ids), -1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    in_time = rows - begin <= config.max_path_length - config.step
    weights = jnp.repeat(in_time, spec.transition_dim, axis=1)[:, :-1]
    if not config.stop_after_truncation:
        weights &= (targets != spec.stop_token) | store.terminated[episode][:, None]
    goal = store.tokens[end[:, 0] - 1, : spec.observation_dim].astype(jnp.int32)
    return types.Batch(inputs=inputs, targets=targets, weights=weights.astype(jnp.float32), goal=goal)


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
    seen = _seen_dims(observed.size, config)
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
    observations = flatten_observations(episode["observations"], config=config)
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


def _rows_of(offsets, episodes):
    """Return the rows of the given episodes, one after the other, and their new offsets."""
    episodes = np.asarray(episodes, np.int64)
    starts = offsets[episodes]
    lengths = offsets[episodes + 1] - starts
    kept = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(kept[-1]) + np.repeat(starts - kept[:-1], lengths), kept


def _check_lengths(trajectories):
    lengths = np.diff(trajectories.offsets)
    longest = int(np.argmax(lengths))
    if lengths[longest] > trajectories.max_path_length:
        raise ValueError(
            f"Episode {longest} of {trajectories.dataset_id} has {lengths[longest]} steps, more than "
            f"max_path_length={trajectories.max_path_length}; set data.max_path_length to at least {lengths[longest]}."
        )


def _check_finite(trajectories):
    for name in ("observation", "action", "reward"):
        values = getattr(trajectories, f"{name}s").reshape(len(trajectories.rewards), -1)
        for begin in range(0, len(values), _ROWS_AT_A_TIME):
            bad = np.argwhere(~np.isfinite(values[begin : begin + _ROWS_AT_A_TIME]))
            if not len(bad):
                continue
            row, column = begin + bad[0][0], bad[0][1]
            episode = int(np.searchsorted(trajectories.offsets, row, side="right")) - 1
            place = name if name == "reward" else f"{name}[{column}]"
            raise ValueError(
                f"{place} of {trajectories.dataset_id} is {values[row, column]} in episode {episode}, "
                f"step {row - trajectories.offsets[episode]}; all data must be finite."
            )
    bad = np.flatnonzero(~np.isfinite(trajectories.final_observations).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the last observation of episode {bad[0]} of {trajectories.dataset_id} is not finite; all data must be."
        )


def _check_discrete(trajectories):
    for name in ("observation", "action"):
        values, columns = getattr(trajectories, f"{name}s"), getattr(trajectories, f"{name}_columns")
        for column in np.flatnonzero(columns.is_discrete):
            bad = np.flatnonzero(~np.isin(values[:, column], columns.values(column)))
            if len(bad):
                raise ValueError(
                    f"{name}[{column}] of {trajectories.dataset_id} is {values[bad[0], column]} in row {bad[0]}, its "
                    f"space has {columns.low[column]:.0f} to {columns.high[column]:.0f}; mend the data or its space."
                )


def _returns_after(rewards, is_last, *, discount):
    # One pass over Python floats takes 0.1 s per million steps, also when they are a single episode.
    values, value, next_reward = np.empty(len(rewards)), 0.0, 0.0
    for end in range(len(rewards), 0, -_ROWS_AT_A_TIME):
        rows, part = slice(max(end - _ROWS_AT_A_TIME, 0), end), []
        for reward, last in zip(reversed(rewards[rows].tolist()), reversed(is_last[rows].tolist()), strict=True):
            value = 0.0 if last else next_reward + discount * value
            next_reward = reward
            part.append(value)
        values[rows] = part[::-1]
    return values
