"""Compare IQL and the Trajectory Transformer in a point maze whose data has no episode from the start to the goal.

python -m experiments.sparse_maze [--workdir=runs/sparse_maze --seed=0 --num_seeds=3 --num_episodes=50]

A scripted controller with action noise walks between random cells; its episodes are cut short after about a third of
the way from the evaluation's start to its goal. The reward is 1 in the goal, which the observation does not tell.
Prints and writes what experiments.compare does.
"""

import functools

import gymnasium
import numpy as np
from gymnasium_robotics.envs.maze import maps

from experiments.common import comparison, entry, run_flags, stages, waypoint_controller
from tt_jax import environments, rollouts

CONFIG, DATASET = run_flags.config("sparse_maze"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(default="runs/sparse_maze"), run_flags.download()
SEED = run_flags.seed(help="Seed of the data, of the first training and of the first episode.")
DATA_EPISODES, NUM_SEEDS = run_flags.data_episodes(default=2500), run_flags.num_seeds(default=3)
NUM_EPISODES = run_flags.num_episodes(default=50, help="Episodes that each trained model plays.")
NUM_ENVS = run_flags.num_envs(default=25)

DATA_STEPS, EVAL_STEPS = 80, 750  # environment steps; the noiseless controller takes about 220 from start to goal
START, GOAL = (1, 1), (6, 6)  # cells (row, column)
METHODS = ("bc", "iql", "tt", "tt_q")
MAX_NOISE = 1.0  # largest standard deviation of the behaviour policy's action noise


def main(_):
    experiment = stages.begin(CONFIG.value, WORKDIR.value, seed=SEED.value, dataset=DATASET.value)
    workdir = experiment.workdir
    stages.keep_datasets_in(workdir)
    with stages.stage("collect data with a scripted controller"):
        record = stages.once(workdir / "data.json", lambda: _collect(experiment))
    asked = {"episodes": DATA_EPISODES.value, "seed": SEED.value}
    found = {name: record.get(name) for name in asked}
    if found != asked:
        raise entry.UsageError(f"{workdir} holds data with {found}, not {asked}; use another --workdir.")
    sizes = {flag.name: flag.value for flag in (NUM_SEEDS, NUM_EPISODES, NUM_ENVS)}
    comparison.compare(experiment, methods=METHODS, **sizes, download=DOWNLOAD.value)


def make_env(*, start: tuple[int, int] | None, max_episode_steps: int) -> gymnasium.Env:
    """Make the maze with the goal in the centre of its cell, and random starts unless `start` says which cell."""
    maze_map = [[int(cell == 1) for cell in row] for row in maps.MEDIUM_MAZE]
    maze_map[GOAL[0]][GOAL[1]] = "g"
    if start:
        maze_map[start[0]][start[1]] = "r"
    env = environments.make(
        "PointMaze_Medium-v3",
        reward_type="sparse",
        maze_map=maze_map,
        continuing_task=False,
        reset_target=False,
        max_episode_steps=max_episode_steps,
    )
    goal = tuple(env.unwrapped.maze.cell_rowcol_to_xy(np.array(GOAL)).tolist())
    return rollouts.ActionRepeat(rollouts.FixedGoal(env, goal), waypoint_controller.ACTION_REPEAT)


def _collect(experiment) -> dict:
    """Record the dataset and describe it."""
    make_data_env = functools.partial(make_env, start=None, max_episode_steps=DATA_STEPS)
    first = 1_000_000 * (1 + SEED.value)  # no episode of the data is played again for the table
    episodes = stages.collect(
        experiment,
        make_data_env,
        _behaviour_policy(make_data_env().unwrapped.maze),
        range(first, first + DATA_EPISODES.value),
        description="Waypoint controller with noise between random cells, cut short, see experiments/sparse_maze.py.",
        eval_env=make_env(start=START, max_episode_steps=EVAL_STEPS),
    )
    transitions = sum(episode.length for episode in episodes)
    return {"episodes": len(episodes), "seed": SEED.value, "transitions": transitions}


def _behaviour_policy(maze) -> rollouts.Policy:
    """Make the policy of the data: each episode has its own goal cell and noise level, and noise is held."""
    cells = [(i, j) for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row) if cell != 1]

    def draw_goal(episode, rng):
        return maze.cell_rowcol_to_xy(np.array(cells[rng.integers(len(cells))]))

    return waypoint_controller.make_policy(maze, max_noise=MAX_NOISE, goal_fn=draw_goal)


if __name__ == "__main__":
    entry.run(main)
