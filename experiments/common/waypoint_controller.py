"""A scripted policy for point mazes: breadth-first path over the maze map, PD controller, noise that is held.

The policy is a function of the observation alone: at each step it steers to the centre of the next cell on the shortest
path, or to the goal once it is in its cell, so it also recovers when noise has thrown it off its path.
"""

import collections
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
from minari.data_collector import EpisodeBuffer

from tt_jax import rollouts

POSITION_GAIN = 10.0
VELOCITY_GAIN = 1.0
NOISE_HOLD = 20  # steps; noise drawn anew at each of the 100 steps per second would average out
ACTION_REPEAT = 5  # steps that every action is held in `make_policy`'s environments, see rollouts.ActionRepeat


def next_cell(maze_map, start: tuple[int, int], goal: tuple[int, int]) -> tuple[int, int]:
    """Return the cell after `start` on a shortest path to `goal` (row, column); `goal` itself when already there.

    Walls are the entries 1. Raises ValueError if no path exists.
    """
    after = {goal: goal}  # search from the goal, so that a cell's predecessor is the one to go to
    queue = collections.deque([goal])
    while queue:
        row, column = cell = queue.popleft()
        if cell == start:
            return after[cell]
        for neighbour in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            inside = 0 <= neighbour[0] < len(maze_map) and 0 <= neighbour[1] < len(maze_map[0])
            if inside and maze_map[neighbour[0]][neighbour[1]] != 1 and neighbour not in after:
                after[neighbour] = cell
                queue.append(neighbour)
    raise ValueError(f"The maze has no path from cell {start} to cell {goal}.")


def act(observation: dict[str, np.ndarray], maze) -> np.ndarray:
    """Return the noiseless action [2], in [-1, 1], for one observation of a point maze.

    `maze` is the environment's own (`env.unwrapped.maze`).
    """
    position, velocity = np.split(observation["observation"], 2)
    goal = observation["desired_goal"]
    cell, goal_cell = (tuple(maze.cell_xy_to_rowcol(xy).tolist()) for xy in (position, goal))
    target = goal if cell == goal_cell else maze.cell_rowcol_to_xy(next_cell(maze.maze_map, cell, goal_cell))
    return np.clip(POSITION_GAIN * (target - position) - VELOCITY_GAIN * velocity, -1.0, 1.0)


def make_policy(
    maze,
    *,
    max_noise: float,
    goal_fn: Callable[[rollouts.Episode, np.random.Generator], np.ndarray] = lambda episode, rng: episode.goal,
) -> rollouts.Policy:
    """Make the noisy controller for environments in step, a function of an episode alone.

    Each episode has its own noise level in [0, max_noise], and noise is held for NOISE_HOLD environment steps, of which
    an action takes ACTION_REPEAT. `goal_fn`, which may draw from the episode's generator, says where it goes (x, y).
    Observations begin with position and velocity [4].
    """
    noise_hold = NOISE_HOLD // ACTION_REPEAT  # actions

    def act_noisily(episode):
        rng = np.random.default_rng(episode.seed)
        goal = goal_fn(episode, rng)
        noise = rng.uniform(0.0, max_noise)
        disturbance = noise * rng.standard_normal((1 + episode.length // noise_hold, 2))[-1]
        action = act({"observation": episode.observations[-1][:4], "desired_goal": goal}, maze)
        return np.clip(action + disturbance, -1.0, 1.0)

    return lambda episodes: np.stack([act_noisily(episode) for episode in episodes])[:, None]


def run_episode(env: gymnasium.Env, rng: np.random.Generator, *, seed: int, noise: float) -> EpisodeBuffer:
    """Control `env` for one episode from `reset(seed=seed)`, with Gaussian action noise of standard deviation `noise`.

    The buffer holds arrays: observations (one more than steps), actions, rewards, terminations and truncations.
    """
    maze = env.unwrapped.maze
    observation, _ = env.reset(seed=seed)
    observations, steps = [observation], []
    ended = False
    while not ended:
        if len(steps) % NOISE_HOLD == 0:
            disturbance = noise * rng.standard_normal(2)
        action = np.clip(act(observation, maze) + disturbance, -1.0, 1.0).astype(env.action_space.dtype)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        steps.append((action, reward, terminated, truncated))
        ended = terminated or truncated
    actions, rewards, terminations, truncations = map(np.array, zip(*steps, strict=True))
    return EpisodeBuffer(
        seed=seed,
        observations={key: np.stack([each[key] for each in observations]) for key in observation},
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos={},  # Minari cannot print episodes without
    )


def episodes(env: gymnasium.Env, *, max_noise: float, seed: int) -> Iterator[EpisodeBuffer]:
    """Yield episodes without end, each with its own noise level from [0, max_noise]; they depend on `seed` alone."""
    rng = np.random.default_rng(seed)
    while True:
        noise = rng.uniform(0.0, max_noise)
        yield run_episode(env, rng, seed=int(rng.integers(2**31)), noise=noise)
