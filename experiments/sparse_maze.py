"""The table of maze_table.py in a point maze, with data that holds no way from the start to the goal in one piece.

python -m experiments.sparse_maze [--workdir=runs/sparse_maze --seed=0 --num_seeds=3 --num_episodes=50]

A scripted controller with action noise walks between random cells; its episodes are cut short after about a third of
the way from the evaluation's start to its goal. The reward is 1 in the goal, which the observation does not tell.
"""

import os
import pathlib

import gymnasium
import numpy as np
import tqdm
from absl import flags
from gymnasium_robotics.envs.maze import maps
from minari.data_collector import EpisodeBuffer

from experiments import action_repeat, entry, maze_table, recording, stages, train_iql, waypoint_controller
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
        stages.once(workdir / "data.json", lambda: _collect(maze_table.CONFIG.value.dataset, preemption))
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
    return action_repeat.ActionRepeat(rollouts.FixedGoal(env, goal), ACTION_REPEAT)


def _collect(dataset_id, preemption) -> dict:
    """Record the dataset and describe it; what an interruption left of it is replaced."""
    env = make_env(start=None, max_episode_steps=DATA_STEPS)
    seeds = range(
        1_000_000 * (1 + maze_table.SEED.value), 1_000_000 * (1 + maze_table.SEED.value) + DATA_EPISODES.value
    )
    policy = _behaviour_policy(env.unwrapped.maze)
    buffers = []
    with tqdm.tqdm(total=len(seeds), unit="episode", desc="collect") as progress:

        def watched_policy(episodes):
            if preemption.requested():
                raise entry.Interrupted("stopped while collecting, which the same command does again.")
            return policy(episodes)

        envs = rollouts.vectorize(lambda: make_env(start=None, max_episode_steps=DATA_STEPS), NUM_ENVS)
        episodes = rollouts.run(
            envs, watched_policy, seeds=seeds, config=CONFIG_OF_DATA, on_finish=lambda episode: progress.update()
        )
    for episode in episodes:
        observations = np.array(episode.observations, np.float64)
        is_last = np.arange(1, episode.length + 1) == episode.length
        buffers.append(
            EpisodeBuffer(
                seed=episode.seed,
                observations={
                    "observation": observations[:, :4],
                    "achieved_goal": observations[:, :2],
                    "desired_goal": observations[:, 4:],
                },
                actions=np.array(episode.actions),
                rewards=np.array(episode.rewards),
                terminations=is_last & episode.terminated,
                truncations=is_last & (not episode.terminated),
                infos={},
            )
        )
    recording.write(
        dataset_id,
        buffers,
        env=env,
        eval_env=make_env(start=START, max_episode_steps=EVAL_STEPS),
        description="Waypoint controller with noise between random cells, cut short, see experiments/sparse_maze.py.",
    )
    return {"episodes": len(episodes), "transitions": sum(episode.length for episode in episodes)}


def _behaviour_policy(maze) -> rollouts.Policy:
    """Make the policy of the data: each episode has its own goal cell and noise level, and noise is held."""
    cells = [(i, j) for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row) if cell != 1]

    def act(episode):
        rng = np.random.default_rng(episode.seed)
        goal = maze.cell_rowcol_to_xy(np.array(cells[rng.integers(len(cells))]))
        noise = rng.uniform(0.0, MAX_NOISE)
        disturbance = noise * rng.standard_normal((1 + episode.length // NOISE_HOLD, 2))[-1]
        action = waypoint_controller.act({"observation": episode.observations[-1][:4], "desired_goal": goal}, maze)
        return np.clip(action + disturbance, -1.0, 1.0)

    return lambda episodes: np.stack([act(episode) for episode in episodes])[:, None]


if __name__ == "__main__":
    entry.run(main)
