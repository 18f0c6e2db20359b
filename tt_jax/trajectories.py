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
    from tt_jax import minari_files, reading  # here, because training uses this module and must not need minari

    return reading.read(dataset_id, minari_files.open_storage(dataset_id, download=download), config=config)


def flatten_observations(observations, *, config: DataConfig) -> np.ndarray:
    """Turn a batch of environment observations, [T, ...] or a dict of such arrays, into [T, N] as a model sees it.

    The dtype is that of the parts together. Raises KeyError if one of `config.observation_keys` is not there.
    """
    keys = config.observation_keys
    if not keys and isinstance(observations, dict):
        raise KeyError(f"observation_keys must name some of {sorted(observations)}")
    parts = [spaces.flatten(spaces.entry(observations, key)) for key in keys] or [spaces.flatten(observations)]
    flat = np.concatenate(parts, axis=1)
    seen = seen_dims(flat.shape[1], config=config)
    return flat if len(seen) == flat.shape[1] else flat[:, seen]


def seen_dims(size: int, *, config: DataConfig) -> np.ndarray:
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
    warning in the log, and all are kept just inside; discrete ones are left as they are.
    """
    last_rows = trajectories.offsets[1:] - 1
    observations = trajectories.observations.astype(np.float32)
    next_observations = np.empty_like(observations)
    next_observations[:-1] = observations[1:]
    next_observations[last_rows] = trajectories.final_observations
    not_terminal = np.ones(len(next_observations), np.float32)
    not_terminal[last_rows[trajectories.terminated]] = 0
    steps = types.Transitions(
        observations=observations,
        actions=_clipped_actions(trajectories),
        rewards=trajectories.rewards.astype(np.float32),
        not_terminal=not_terminal,
        next_observations=next_observations,
    )
    if trajectories.final_known is None or (trajectories.final_known | trajectories.terminated).all():
        return steps
    is_used = np.ones(len(observations), bool)
    is_used[last_rows[~trajectories.final_known & ~trajectories.terminated]] = False
    return jax.tree.map(lambda rows: rows[is_used], steps)


def _clipped_actions(trajectories):
    actions = trajectories.actions.astype(np.float32)
    if action_values(trajectories) is not None:
        return actions
    low, high = action_bounds(trajectories)
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
    return clip_actions(actions, low=low, high=high)


def action_units(trajectories: Trajectories) -> dict:
    """Return `action_values`, or else `action_bounds`, by these names, as `iql.fit_units` takes them."""
    values = action_values(trajectories)
    return {"action_bounds": action_bounds(trajectories)} if values is None else {"action_values": values}


def action_values(trajectories: Trajectories) -> np.ndarray | None:
    """Return the values [A, n] float32 of discrete actions, rows with fewer than n end in inf; None for a Box."""
    columns = trajectories.action_columns
    if columns is None or not columns.is_discrete.all():
        return None
    rows = [columns.values(column) for column in range(columns.size)]
    values = np.full([len(rows), max(map(len, rows))], np.inf, np.float32)
    for padded, row in zip(values, rows, strict=True):
        padded[: len(row)] = row
    return values


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
            f"the actions of {trajectories.dataset_id} are discrete, this method needs a Box of them; the transformer, "
            "IQL and behaviour cloning take both."
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


def _rows_of(offsets, episodes):
    """Return the rows of the given episodes, one after the other, and their new offsets."""
    episodes = np.asarray(episodes, np.int64)
    starts = offsets[episodes]
    lengths = offsets[episodes + 1] - starts
    kept = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(kept[-1]) + np.repeat(starts - kept[:-1], lengths), kept


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
