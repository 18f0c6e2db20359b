"""The table of maze_table.py in a point maze, with data that holds no way from the start to the goal in one piece.

python -m experiments.sparse_maze [--workdir=runs/sparse_maze --seed=0 --num_seeds=3 --num_episodes=50]

A scripted controller with action noise walks between random cells; its episodes are cut short after about a third of
the way from the evaluation's start to its goal. The reward is 1 in the goal, which the observation does not tell.
"""

import os
import pathlib

import gymnasium
import numpy as np
from absl import flags
from gymnasium_robotics.envs.maze import maps

from experiments import maze_table, train_iql
from experiments.common import control, entry, recording, stages, waypoint_controller
from tt_jax import rollouts, trajectories

flags.set_default(maze_table.CONFIG, str(pathlib.Path(__file__).parent / "configs" / "sparse_maze.py"))
flags.set_default(maze_table.WORKDIR, "runs/sparse_maze")
flags.set_default(train_iql.NUM_SEEDS, 3)
DATA_EPISODES = flags.DEFINE_integer("data_episodes", 2500, "Episodes to collect.", 2)

ACTION_REPEAT = 5  # environment steps of 10 ms that every action is held
DATA_STEPS, EVAL_STEPS = 80, 750  # environment steps; the noiseless controller takes about 220 from start to goal
START, GOAL = (1, 1), (6, 6)  # cells (row, column)
MAX_NOISE = 1.0  # largest standard deviation of the behaviour policy's action noise
NOISE_HOLD = waypoint_controller.NOISE_HOLD // ACTION_REPEAT  # actions that share their noise
NUM_ENVS = 50  # in step
CONFIG_OF_DATA = trajectories.DataConfig(observation_keys=("observation", "desired_goal"))


def main(_):
    preemption = entry.Preemption()
    workdir = pathlib.Path(maze_table.WORKDIR.value)
    os.environ["MINARI_DATASETS_PATH"] = str(workdir.resolve() / "datasets")
    with stages.stage("collect data with a scripted controller"):
        record = stages.once(workdir / "data.json", lambda: _collect(maze_table.CONFIG.value.dataset, preemption))
    asked = {"episodes": DATA_EPISODES.value, "seed": maze_table.SEED.value}
    found = {name: record.get(name) for name in asked}
    if found != asked:
        raise entry.UsageError(f"{workdir} holds data with {found}, not {asked}; use another --workdir.")
    maze_table.compare(maze_table.CONFIG.value, workdir, preemption=preemption)


def make_env(*, start: tuple[int, int] | None, max_episode_steps: int) -> gymnasium.Env:
    """Make the maze with the goal in the centre of its cell, and random starts unless `start` says which cell."""
    maze_map = [[int(cell == 1) for cell in row] for row in maps.MEDIUM_MAZE]
    maze_map[GOAL[0]][GOAL[1]] = "g"
    if start:
        maze_map[start[0]][start[1]] = "r"
    env = recording.make_env(
        "PointMaze_Medium-v3",
        reward_type="sparse",
        maze_map=maze_map,
        continuing_task=False,
        reset_target=False,
        max_episode_steps=max_episode_steps,
    )
    goal = tuple(env.unwrapped.maze.cell_rowcol_to_xy(np.array(GOAL)).tolist())
    return rollouts.ActionRepeat(rollouts.FixedGoal(env, goal), ACTION_REPEAT)


def _collect(dataset_id, preemption) -> dict:
    """Record the dataset and describe it; what an interruption left of it is replaced."""
    env = make_env(start=None, max_episode_steps=DATA_STEPS)
    first = 1_000_000 * (1 + maze_table.SEED.value)  # no episode of the data is played again for the table
    envs = rollouts.vectorize(lambda: make_env(start=None, max_episode_steps=DATA_STEPS), NUM_ENVS)
    episodes, _ = control.play(
        envs,
        _behaviour_policy(env.unwrapped.maze),
        seeds=range(first, first + DATA_EPISODES.value),
        config=CONFIG_OF_DATA,
        title="collect",
        check=lambda: preemption.check("collect"),
    )
    recording.write(
        dataset_id,
        map(recording.to_buffer, episodes),
        env=env,
        eval_env=make_env(start=START, max_episode_steps=EVAL_STEPS),
        description="Waypoint controller with noise between random cells, cut short, see experiments/sparse_maze.py.",
    )
    transitions = sum(episode.length for episode in episodes)
    return {"episodes": len(episodes), "seed": maze_table.SEED.value, "transitions": transitions}


def _behaviour_policy(maze) -> rollouts.Policy:
    """Make the policy of the data: each episode has its own goal cell and noise level, and noise is held."""
    cells = [(i, j) for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row) if cell != 1]

    def draw_goal(episode, rng):
        return maze.cell_rowcol_to_xy(np.array(cells[rng.integers(len(cells))]))

    return waypoint_controller.make_policy(maze, max_noise=MAX_NOISE, noise_hold=NOISE_HOLD, goal_fn=draw_goal)


if __name__ == "__main__":
    entry.run(main)
