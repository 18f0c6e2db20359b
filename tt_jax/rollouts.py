"""Control gymnasium environments in step with any policy, one episode per seed.

A policy is a plain function of running episodes, so that a planner, a scripted controller and random actions share one
loop: `policy(episodes) -> actions [b, n, A]`, the next n >= 1 actions of each of the b episodes. They are executed one
by one, and an episode is handed to the policy again once its actions are used up. A policy keeps no state: what it
wants to know of the past is in `Episode`, where it may note something for the next time, and what it draws comes from
the episode's seed and length.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import action_search, iql, spaces, tokenization, trajectories, types


@dataclasses.dataclass(frozen=True)
class Episode:
    """What happened so far; the lists grow while the episode runs."""

    seed: int
    observations: list[np.ndarray]  # length + 1 times [N] float32
    goal: np.ndarray | None = None  # [G] float32, the newest desired_goal, if the environment has goals
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)  # length times [A], as executed, flattened
    rewards: list[float] = dataclasses.field(default_factory=list)  # length times float64
    successes: list[bool] = dataclasses.field(default_factory=list)  # per step; empty without success information
    terminated: bool = False  # False also for an episode that was cut off
    notes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # the policy's own
    error: str | None = None  # what the environment raised in its next step, if it is `Guarded`
    is_cut: bool = False  # by the caller, see `run`, not by the environment

    @property
    def length(self) -> int:
        """The number of steps so far."""
        return len(self.actions)

    @property
    def total_reward(self) -> float:
        """The undiscounted return."""
        return float(np.sum(self.rewards))

    @property
    def success(self) -> bool | None:
        """Whether the goal was reached at any step; None if the environment does not say."""
        return any(self.successes) if self.successes else None


_ERROR = "tt_jax_error"  # in the info of a `Guarded` environment

Policy = Callable[[Sequence[Episode]], np.ndarray]  # b running episodes -> [b, n, A]


def vectorize(make_env: Callable[[], gymnasium.Env], num_envs: int) -> gymnasium.vector.VectorEnv:
    """Put `num_envs` environments in step, without the automatic resets that would swallow assigned seeds."""
    disabled = gymnasium.vector.AutoresetMode.DISABLED
    return gymnasium.vector.SyncVectorEnv([make_env] * num_envs, autoreset_mode=disabled)


def run(
    envs: gymnasium.vector.VectorEnv,
    policy: Policy,
    *,
    seeds: Sequence[int],
    config: trajectories.DataConfig,
    on_finish: Callable[[Episode], None] = lambda episode: None,
    stop_fn: Callable[[], bool] = lambda: False,
) -> list[Episode]:
    """Play one episode per seed in `envs` (from `vectorize`) and return them in the order of `seeds`.

    `policy(episodes) -> actions [b, n, A]` gives the next n >= 1 actions of each of b running episodes.
    `config` says how observations are flattened, as for the data; the rest of it is not used here.
    A slot whose episode ends takes the next seed, so every seed is played to its end exactly once and short episodes
    do not bias the mean. Actions are clipped to the action space, and rounded if it is discrete, before they are
    executed and recorded; a policy sees those of several axes flattened. The policy
    sees only the episodes that need actions; `on_finish` sees each episode when it is over. Results do not depend on
    the number of environments if the policy treats its rows independently. When `stop_fn` says so, the episodes that
    are running are returned as they are and no other begins.

    Raises ValueError for a space that cannot be used and for actions that have the wrong shape or are not finite.
    """
    if envs.metadata["autoreset_mode"] != gymnasium.vector.AutoresetMode.DISABLED:
        raise ValueError("the environments reset themselves; make them with rollouts.vectorize.")
    low, high = _action_bounds(envs)
    action_space = envs.single_action_space
    waiting = collections.deque(seeds)
    running: dict[int, Episode] = {}  # by slot; a slot that is missing idles
    planned: dict[int, list[np.ndarray]] = {}  # actions still to execute, by slot
    finished = []
    ended = np.ones(envs.num_envs, bool)
    while (waiting or running) and not stop_fn():
        if ended.any():
            starts = {slot: waiting.popleft() for slot in np.flatnonzero(ended) if waiting}
            # Idle slots are reset and stepped too, as the vector API knows no other way; nobody looks at them.
            reset_seeds = [starts.get(slot, 0) for slot in range(envs.num_envs)]
            first, _ = envs.reset(seed=reset_seeds, options={"reset_mask": ended})
            observations = _flatten(first, config)
            goals = _goals(first, envs.num_envs)
            for slot, seed in starts.items():
                running[slot] = Episode(seed=seed, observations=[observations[slot]], goal=goals[slot])
                planned[slot] = []

        asking = [slot for slot in running if not planned[slot]]
        if asking:
            actions = _checked(policy([running[slot] for slot in asking]), len(asking), low.shape)
            if _is_discrete(action_space):
                actions = np.rint(actions)
            for slot, sequence in zip(asking, np.clip(actions, low, high), strict=True):
                planned[slot] = list(sequence)
        executed = np.clip(np.zeros_like(low, shape=(envs.num_envs, *low.shape)), low, high)
        for slot in running:
            executed[slot] = planned[slot].pop(0)

        stepped, rewards, terminated, truncated, infos = envs.step(spaces.unflatten(executed, action_space))
        observations, goals = _flatten(stepped, config), _goals(stepped, envs.num_envs)
        successes = infos.get("success", infos.get("is_success"))
        errors = infos.get(_ERROR, [None] * envs.num_envs)
        ended = terminated | truncated
        for slot, episode in list(running.items()):
            if errors[slot] is not None:
                finished.append(dataclasses.replace(running.pop(slot), error=errors[slot]))
                on_finish(finished[-1])
                continue
            episode.observations.append(observations[slot])
            episode.actions.append(executed[slot])
            episode.rewards.append(float(rewards[slot]))
            if successes is not None:
                episode.successes.append(bool(successes[slot]))
            if goals[slot] is not None:  # it may move
                episode = running[slot] = dataclasses.replace(episode, goal=goals[slot])
            if ended[slot]:
                finished.append(dataclasses.replace(running.pop(slot), terminated=bool(terminated[slot])))
                on_finish(finished[-1])
    finished += [dataclasses.replace(episode, is_cut=True) for episode in running.values()]
    return sorted(finished, key=lambda episode: seeds.index(episode.seed))


def plan_policy(
    plan_fn: Callable[..., types.PlanOutput],
    params: types.Params,
    rng_key: chex.PRNGKey,
    *,
    discretizer: tokenization.Discretizer,
    spec: types.TransitionSpec,
    context_transitions: int,
    replan_every: int,
    max_batch: int,
    min_batch: int = 1,
    goal_fn: Callable[[Episode], np.ndarray] | None = None,
    initial_shape: tuple[int, int] | None = None,
) -> Policy:
    """Make a policy that executes the first `replan_every` actions of each plan of `plan_fn` (best given jitted).

    `plan_fn(params, rng_key [B], context, observation [B, N])` is called with B a power of two from `min_batch` on, or
    `max_batch` (the number of environments), so that few programs are compiled and the last episodes do not pay for a
    full batch. The key of a plan comes from `rng_key`, the seed of the episode and its length, so a plan does not
    depend on its neighbours, up to the rounding of `plan_fn` at different batch sizes. For a goal-conditioned model
    `goal_fn` gives the goal [N] of an episode, which enters the planner's parameters. With `initial_shape`, the (H, A)
    of its plans, `plan_fn` gets the last plan of each episode as one argument more, [B, H, A], moved on by the executed
    actions with `action_search.shift`, and NaN where there is none.
    """

    no_plan = np.full(initial_shape or (), np.nan, np.float32)

    def policy(episodes: Sequence[Episode]) -> np.ndarray:
        batch = pad(episodes, max_batch, min_batch)
        keys = _plan_keys(rng_key, [episode.seed for episode in batch], [episode.length for episode in batch])
        context = encode_context(batch, discretizer=discretizer, spec=spec, context_transitions=context_transitions)
        observation = np.stack([episode.observations[-1] for episode in batch])  # [B, N] float32
        with_goals = params
        if goal_fn:
            with_goals = params.replace(goal=np.stack([goal_fn(episode) for episode in batch]).astype(np.float32))
        arguments = (with_goals, keys, context, observation)
        if initial_shape:
            arguments += (np.stack([episode.notes.get("plan", no_plan) for episode in batch]),)
        actions = np.asarray(plan_fn(*arguments).actions)
        if actions.shape[1] < replan_every:
            raise ValueError(f"replan_every={replan_every} needs plans of that length, got {actions.shape[1]} steps.")
        if initial_shape:
            for episode, rest in zip(episodes, action_search.shift(actions, by=replan_every), strict=False):
                episode.notes["plan"] = np.asarray(rest)
        return actions[: len(episodes), :replan_every]

    return policy


def observation_policy(act_fn: Callable[[np.ndarray], np.ndarray]) -> Policy:
    """Make a policy of `act_fn(observation [b, N] float32) -> action [b, A]`, one action at a time."""
    return lambda episodes: act_fn(np.stack([episode.observations[-1] for episode in episodes]))[:, None]


def rest_in_goal(episode: Episode) -> np.ndarray:
    """Return the observation [2 G] of a point that rests in the goal of its episode, for `plan_policy`'s `goal_fn`."""
    return np.concatenate([episode.goal, np.zeros_like(episode.goal)])


def encode_context(
    episodes: Sequence[Episode],
    *,
    discretizer: tokenization.Discretizer,
    spec: types.TransitionSpec,
    context_transitions: int,
) -> types.Context:
    """Encode the last C = `context_transitions` transitions of each of B episodes: tokens [B, C, D], length [B].

    Values and thresholds are compared in float32, as the planner compares the current observation: a value that equals
    a threshold keeps its bin, whether the data was recorded in float32 or in float64. The value of a past transition is
    unknown; the highest bin stands in for it, as in the reference, and the transformer never attends to it.
    """
    values = np.zeros((len(episodes), context_transitions, spec.transition_dim - 1), np.float32)  # [B, C, D - 1]
    discretizer = jax.tree.map(np.float32, discretizer)
    lengths = [min(episode.length, context_transitions) for episode in episodes]
    for row, episode, length in zip(values, episodes, lengths, strict=True):
        for i, step in enumerate(range(episode.length - length, episode.length)):
            row[i] = np.concatenate([episode.observations[step], episode.actions[step], [episode.rewards[step]]])
    tokens = np.full((*values.shape[:2], spec.transition_dim), spec.num_bins - 1, np.int32)
    tokens[..., :-1] = tokenization.encode(discretizer, values, dims=slice(0, spec.transition_dim - 1))
    return types.Context(tokens=tokens, length=np.asarray(lengths, np.int32))


def check_spaces(
    envs: gymnasium.vector.VectorEnv,
    spec: types.TransitionSpec | iql.IQLConfig,
    *,
    config: trajectories.DataConfig,
) -> None:
    """Raise ValueError unless the environments have the observation and action sizes of `spec`."""
    try:
        observation_dim = _flatten(envs.observation_space.sample(), config).shape[1]
    except (KeyError, IndexError, ValueError):
        space, keys = envs.single_observation_space, config.observation_keys
        problem = f"does not have the keys {keys}" if keys else "is not the one space that the model was trained on"
        raise ValueError(f"the environment's {space} {problem}.") from None
    sizes = {
        "observation": (observation_dim, spec.observation_dim),
        "action": (len(_action_bounds(envs)[0]), spec.action_dim),
    }
    for name, (size, expected) in sizes.items():
        if size != expected:
            raise ValueError(f"the environment's {name} has {size} dimensions, the model was trained with {expected}.")


class Guarded(gymnasium.Wrapper):
    """An environment that, where it raises, ends that episode alone, which `run` then notes in its `error`.

    If it is the reset that raises, the first step ends the episode.
    """

    _error: str | None = None
    _observation: Any = None

    def reset(self, **kwargs) -> tuple[Any, dict]:
        try:
            self._error = None
            self._observation, info = self.env.reset(**kwargs)
        except Exception as error:  # an environment is code: it may raise anything
            self._error, self._observation, info = _one_line(error), self.observation_space.sample(), {}
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple:
        if self._error is None:
            try:
                stepped = self.env.step(action)
                self._observation = stepped[0]
                return stepped
            except Exception as error:
                self._error = _one_line(error)
        return self._observation, 0.0, False, True, {_ERROR: self._error}


class FixedGoal(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """A gymnasium-robotics maze whose goal stands at `goal` [2] after each reset; the start keeps its noise."""

    def __init__(self, env: gymnasium.Env, goal: Sequence[float]):
        if not hasattr(env.unwrapped, "update_target_site_pos"):
            raise ValueError(f"a goal can only be fixed in a maze of gymnasium-robotics, not in {env}.")
        gymnasium.utils.RecordConstructorArgs.__init__(self, goal=tuple(goal))
        super().__init__(env)
        self._goal = np.asarray(goal, np.float64)
        maze = env.unwrapped.maze
        row, column = maze.cell_xy_to_rowcol(self._goal)
        inside = 0 <= row < maze.map_length and 0 <= column < maze.map_width
        if not inside or maze.maze_map[row][column] == 1:
            raise ValueError(
                f"the goal {tuple(self._goal.tolist())} is {'in a wall' if inside else 'outside'} of the maze."
            )

    def reset(self, **kwargs) -> tuple[dict, dict]:
        observation, info = self.env.reset(**kwargs)
        maze = self.env.unwrapped
        maze.goal = self._goal.copy()
        maze.update_target_site_pos()
        return observation | {"desired_goal": self._goal.copy()}, info


class ActionRepeat(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Hold every action for `num_steps` environment steps and add up their rewards, so that returns stay the same."""

    def __init__(self, env: gymnasium.Env, num_steps: int):
        gymnasium.utils.RecordConstructorArgs.__init__(self, num_steps=num_steps)
        super().__init__(env)
        self._num_steps = num_steps

    def step(self, action: np.ndarray) -> tuple:
        total = 0.0
        for _ in range(self._num_steps):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _flatten(observations: np.ndarray | dict, config: trajectories.DataConfig) -> np.ndarray:
    return trajectories.flatten_observations(observations, config=config).astype(np.float32)  # [B, N]


def _action_bounds(envs: gymnasium.vector.VectorEnv) -> tuple[np.ndarray, np.ndarray]:
    space = envs.single_action_space
    if isinstance(space, gymnasium.spaces.Dict):
        raise ValueError(f"the action space must be one space of numbers, got {space}.")
    columns = spaces.columns(space)
    dtype = np.float32 if columns.is_discrete.any() else space.dtype
    return columns.low.astype(dtype), columns.high.astype(dtype)


def _is_discrete(space: gymnasium.Space) -> bool:
    return not isinstance(space, gymnasium.spaces.Box)


def _goals(observations: np.ndarray | dict, num_envs: int) -> list[np.ndarray | None]:
    """Return the goal [G] float32 of each environment, the entries of a Dict in the order of their names, or None."""
    if not isinstance(observations, dict) or "desired_goal" not in observations:
        return [None] * num_envs
    return list(spaces.flatten(observations["desired_goal"]).astype(np.float32))


def _checked(actions: np.ndarray, num_episodes: int, action_shape: tuple[int, ...]) -> np.ndarray:
    actions = np.asarray(actions)
    if actions.ndim != 3 or len(actions) != num_episodes or not actions.shape[1] or actions.shape[2:] != action_shape:
        raise ValueError(
            f"the policy must return actions [{num_episodes}, n >= 1, {action_shape[0]}], got {actions.shape}."
        )
    if not np.isfinite(actions).all():
        raise ValueError("the policy returned actions that are not finite (NaN or infinity).")
    return actions


def pad(episodes: Sequence[Episode], max_batch: int, min_batch: int = 1) -> list[Episode]:
    """Repeat episodes up to the next power of two, at least `min_batch` and at most `max_batch`."""
    size = max(len(episodes), min(max_batch, max(min_batch, 1 << (len(episodes) - 1).bit_length())))
    return [episodes[i % len(episodes)] for i in range(size)]


def _plan_keys(rng_key: chex.PRNGKey, seeds: Sequence[int], lengths: Sequence[int]) -> chex.PRNGKey:
    """Derive one key [B] per plan."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng_key, jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(lengths, jnp.uint32))
