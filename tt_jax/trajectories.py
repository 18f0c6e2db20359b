"""Episodes of a Minari dataset as flat arrays, returns-to-go, and windows of tokens for training.

Nothing is padded: the transitions of all episodes stand one after the other, and `offsets` says where each begins.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import types


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How a dataset is read and cut into windows."""

    observation_keys: tuple[str, ...] = ()  # Dict observations: the keys to concatenate, in this order
    observation_slice: int = 0  # keep the first n dimensions; 0 keeps all
    step: int = 1  # environment steps from one transition of a window to the next
    discount: float = 0.99  # of the return-to-go, per environment step
    termination_penalty: float | None = None  # replaces the reward of a terminal step
    max_path_length: int = 0  # 0: the environment's time limit or, without one, the longest episode
    stop_after_truncation: bool = True  # whether stop tokens are also trained on after a truncation

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"data.step={self.step} must be at least 1.")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"data.discount={self.discount} must be in [0, 1].")
        if self.observation_slice < 0 or self.max_path_length < 0:
            raise ValueError("data.observation_slice and data.max_path_length must not be negative; 0 means unset.")


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


@chex.dataclass(frozen=True)
class TokenStore:
    """The tokenised dataset, as it lives on every device."""

    tokens: chex.Array  # [n, D] uint8, or uint16 if the stop token needs it
    offsets: chex.Array  # [E + 1] int32
    terminated: chex.Array  # [E] bool


def load(dataset_id: str, *, config: DataConfig, download: bool = False) -> Trajectories:
    """Read a Minari dataset with Box actions and Box or Dict-of-Box observations.

    Raises:
      ValueError: the dataset is missing, its spaces do not fit, a number is not finite, an episode is longer than
        the maximum, or no episode has two steps.
    """
    dataset = _open(dataset_id, download=download)
    _check_spaces(dataset, config)
    episodes = [_read_episode(episode, config) for episode in dataset.iterate_episodes()]
    lengths = [len(rewards) for *_, rewards, _ in episodes]
    if max(lengths, default=0) < 2:
        raise ValueError(f"Dataset {dataset_id} has no episode of at least 2 steps, so it holds no training window.")
    observations, final_observations, actions, rewards, terminated = zip(*episodes, strict=True)
    env_spec = dataset.env_spec
    trajectories = Trajectories(
        observations=np.concatenate(observations),
        final_observations=np.stack(final_observations),
        actions=np.concatenate(actions),
        rewards=np.concatenate(rewards),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        terminated=np.array(terminated),
        dataset_id=dataset_id,
        env_id=env_spec.id if env_spec else "",
        max_path_length=config.max_path_length or (env_spec and env_spec.max_episode_steps) or max(lengths),
    )
    _check_lengths(trajectories)
    _check_finite(trajectories)
    return trajectories


def flatten_observations(observations, *, config: DataConfig) -> np.ndarray:
    """Turn a batch of environment observations, [T, ...] or a dict of such arrays, into [T, N] as a model sees it.

    The dtype is that of the parts together. Raises KeyError if one of `config.observation_keys` is not there.
    """
    parts = [observations[key] for key in config.observation_keys] if config.observation_keys else [observations]
    flat = np.concatenate([np.reshape(part, (len(part), -1)) for part in parts], axis=1)
    return flat[:, : config.observation_slice] if config.observation_slice else flat


def select(trajectories: Trajectories, episodes) -> Trajectories:
    """Keep the episodes with the given indices [E'] in [0, E), in the given order."""
    episodes = np.asarray(episodes, np.int64)
    starts = trajectories.offsets[episodes]
    lengths = trajectories.offsets[episodes + 1] - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return dataclasses.replace(
        trajectories,
        observations=trajectories.observations[rows],
        final_observations=trajectories.final_observations[episodes],
        actions=trajectories.actions[rows],
        rewards=trajectories.rewards[rows],
        offsets=offsets,
        terminated=trajectories.terminated[episodes],
    )


def segment(trajectories: Trajectories, *, discount: float, termination_penalty: float | None = None) -> np.ndarray:
    """Join observation, action, reward and value of each step into [n, D] float64.

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
    columns = trajectories.observations, trajectories.actions, rewards[:, None], values[:, None]
    return np.concatenate(columns, axis=1, dtype=np.float64)


def transitions(trajectories: Trajectories) -> types.Transitions:
    """Cut episodes into their n single steps, float32, in the order they were made, as `iql.update` learns from them.

    Only real terminals have `not_terminal` 0: a truncated episode goes on for a Q-function. Actions are clipped just
    inside +-1. Raises ValueError if an action is not within +-1.
    """
    largest = np.abs(trajectories.actions).max()
    if largest > 1:
        raise ValueError(f"actions must be within +-1, {trajectories.dataset_id} has {largest}; rescale its actions.")
    last_rows = trajectories.offsets[1:] - 1
    next_observations = np.empty_like(trajectories.observations)
    next_observations[:-1] = trajectories.observations[1:]
    next_observations[last_rows] = trajectories.final_observations
    not_terminal = np.ones(len(next_observations), np.float32)
    not_terminal[last_rows[trajectories.terminated]] = 0
    return types.Transitions(
        observations=trajectories.observations.astype(np.float32),
        actions=clip_actions(trajectories.actions.astype(np.float32)),
        rewards=trajectories.rewards.astype(np.float32),
        not_terminal=not_terminal,
        next_observations=next_observations.astype(np.float32),
    )


def clip_actions(actions: np.ndarray) -> np.ndarray:
    """Keep actions [n, A] just inside +-1, as the reference of IQL does before training."""
    limit = np.float32(1 - 1e-5)
    return np.clip(actions, -limit, limit)


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


def _open(dataset_id, *, download):
    import minari  # here, because training uses this module and must not need minari

    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError:
        if not download:
            raise ValueError(
                f"Dataset {dataset_id} not found at {minari.storage.get_dataset_path(dataset_id)}; "
                "set MINARI_DATASETS_PATH to the folder that holds it, or pass --download."
            ) from None
    try:
        minari.download_dataset(dataset_id)
    except Exception as error:  # missing client, network, unknown dataset: whatever the remote's client raises
        raise ValueError(f"Dataset {dataset_id} could not be downloaded: {error}") from error
    return minari.load_dataset(dataset_id)


def _check_spaces(dataset, config):
    from gymnasium import spaces

    if not isinstance(dataset.action_space, spaces.Box):
        raise ValueError(f"Actions must be a Box, got {dataset.action_space}; discrete actions are not supported.")
    space, keys = dataset.observation_space, config.observation_keys
    if isinstance(space, spaces.Dict):
        unknown = [key for key in keys if key not in space.spaces]
        if unknown or not keys:
            problem = f"has no {', '.join(unknown)}" if unknown else "is a Dict"
            raise ValueError(
                f"The observation of {dataset.id} {problem}; set data.observation_keys to some of {sorted(space)}."
            )
    elif keys:
        raise ValueError(f"The observation of {dataset.id} is not a Dict; leave data.observation_keys={keys} empty.")
    parts = [space[key] for key in keys] if keys else [space]
    if not all(isinstance(part, spaces.Box) for part in parts):
        raise ValueError(f"Observations must be a Box or a Dict of Boxes, got {space}.")
    size = sum(int(np.prod(part.shape)) for part in parts)
    if config.observation_slice > size:
        raise ValueError(f"data.observation_slice={config.observation_slice} exceeds the {size} observed dimensions.")


def _read_episode(episode, config):
    observations = flatten_observations(episode.observations, config=config)
    actions = np.reshape(episode.actions, (len(episode), -1))
    # Minari stores one observation more than steps; the copies let go of what the slices leave out.
    before, after = observations[: len(episode)].copy(), observations[len(episode)].copy()
    return before, after, actions, episode.rewards, bool(episode.terminations[-1])


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
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
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


def _returns_after(rewards, is_last, *, discount):
    # One pass over Python floats takes 0.1 s per million steps, also when they are a single episode.
    values, value, next_reward = [], 0.0, 0.0
    for reward, last in zip(reversed(rewards.tolist()), reversed(is_last.tolist()), strict=True):
        value = 0.0 if last else next_reward + discount * value
        next_reward = reward
        values.append(value)
    return np.array(values[::-1])
