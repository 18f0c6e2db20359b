"""Reach goals that were never a goal in training: a goal-conditioned Trajectory Transformer in a maze of four rooms.

python -m experiments.four_rooms [--workdir=runs/four_rooms] [--seed=0]

A scripted controller goes from random cells to random cells, but never to those that are held out; a model learns what
it did given where each episode ended, and plans by likelihood to the held-out cells. Minutes on 2 CPU cores; the same
command goes on where it was interrupted.
"""

import dataclasses
import functools

import gymnasium
import numpy as np
from matplotlib.figure import Figure

from experiments.common import control, datasets, entry, figures, run_flags, stages, waypoint_controller
from tt_jax import checkpoints, environments, rollouts, trajectories

CONFIG, DATASET = run_flags.config("four_rooms"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(default="runs/four_rooms"), run_flags.download()
SEED = run_flags.seed(
    help="Seed of everything: data, training, and the episodes that are played.", upper_bound=2**31 // 10**6
)
DATA_EPISODES, NUM_EPISODES = run_flags.data_episodes(default=1600), run_flags.num_episodes(default=48)

# Walls are #; the cells h are held out: no episode of the data has its goal there or ends there.
MAP = """
#########
#h..#.h.#
#.h.....#
#...#..h#
##.###.##
#..h#...#
#.....h.#
#h..#..h#
#########
"""
DATA_SECONDS, EPISODE_SECONDS = 3, 4  # of 100 environment steps: the longest way takes the controller 2.2
MAX_NOISE = 0.8  # largest standard deviation of the controller's action noise in the data
NUM_ENVS = 32  # at most, in step
# What is played: a name, the cells that goals are drawn from, and who acts.
PLAYED = {
    "random": ("h", "random"),
    "controller without noise": ("h", "controller"),
    "likelihood search": ("h", "planner"),
    "likelihood search, goals of the data": (".", "planner"),
}


def main(_):
    experiment = stages.begin(CONFIG.value, WORKDIR.value, seed=SEED.value, dataset=DATASET.value)
    held_out = f"{len(_cells('h'))} of {len(_cells('h.'))} cells held out as goals"
    results = stages.learn_and_play(
        experiment,
        numbers={flag.name: flag.value for flag in (SEED, DATA_EPISODES, NUM_EPISODES)},
        environment=f"point maze of four rooms, {held_out}",
        collect_fn=_collect,
        play_title="go to goals",
        policies=PLAYED,
        play_fn=_play,
        draw_fn=_draw,
        summarize_fn=_summarize,
        download=DOWNLOAD.value,
    )
    stages.report(experiment, _table(results), "four_rooms.png", "learning_curve.png")


def _cells(marks) -> list[tuple[int, int]]:
    """List the cells (row, column) with one of the marks in MAP."""
    rows = MAP.split()
    return [(i, j) for i, row in enumerate(rows) for j, mark in enumerate(row) if mark in marks]


def make_env(goals: str, *, seconds: int) -> gymnasium.Env:
    """Make the maze with goals in the cells marked as `goals` in MAP; episodes start in any cell."""
    maze_map = [[1 if mark == "#" else "c" if mark == goals else "r" for mark in row] for row in MAP.split()]
    settings = {"maze_map": maze_map, "reward_type": "sparse", "max_episode_steps": 100 * seconds}
    env = environments.make("PointMaze_UMaze-v3", **settings)
    return rollouts.ActionRepeat(env, waypoint_controller.ACTION_REPEAT)


def _controller(max_noise) -> rollouts.Policy:
    return waypoint_controller.make_policy(make_env(".", seconds=1).unwrapped.maze, max_noise=max_noise)


def _collect(experiment) -> dict:
    """Record the dataset and describe it.

    An episode ends when it rests in its goal, since data that is mostly rest teaches a model to rest. Those that do not
    get there and end in a held-out cell are left out.
    """
    held_out, maze = set(_cells("h")), make_env(".", seconds=DATA_SECONDS).unwrapped.maze

    def ends_in_a_goal_cell(episode):
        goal = episode.observations[-2][:2]  # the last one with an action, which training takes as the goal
        return tuple(maze.cell_xy_to_rowcol(goal).tolist()) not in held_out

    kept = stages.collect(
        experiment,
        functools.partial(make_env, ".", seconds=DATA_SECONDS),
        _controller(MAX_NOISE),
        stages.reset_seeds(SEED.value, DATA_EPISODES.value, of_data=True),
        description="Waypoint controller with noise in four rooms.",
        select_fn=lambda episodes: list(filter(ends_in_a_goal_cell, map(_until_rest, episodes))),
    )
    return {
        "episodes": len(kept),
        "left_out": DATA_EPISODES.value - len(kept),
        "transitions": sum(episode.length for episode in kept),
        "success": control.mean_and_error([episode.success for episode in kept]),
    }


def _until_rest(episode) -> rollouts.Episode:
    """Cut an episode with the first observation of rest in the goal, which is the last with an action."""
    position, velocity = np.split(np.array(episode.observations[:-1]), 2, axis=1)
    is_near = np.linalg.norm(position - episode.goal[None], axis=1) < 0.2
    at_rest = np.flatnonzero(is_near & (np.linalg.norm(velocity, axis=1) < 0.5))
    length = 1 + at_rest[0] if at_rest.size else episode.length
    fields = {name: getattr(episode, name)[:length] for name in ("actions", "rewards", "successes")}
    return dataclasses.replace(episode, observations=episode.observations[: length + 1], **fields)


def _play(experiment, name) -> list[dict]:
    """Play the episodes of one policy and describe each of them, or read what was played before."""
    goals, actor = PLAYED[name]
    make_policy = {
        "random": lambda: control.act_randomly,
        "controller": lambda: _controller(0.0),
        "planner": lambda: _plan_policy(experiment),
    }[actor]

    def play():
        seeds = stages.reset_seeds(SEED.value, NUM_EPISODES.value)
        make = functools.partial(make_env, goals, seconds=EPISODE_SECONDS)
        episodes, _ = stages.play(experiment, make, make_policy(), seeds, title=name, num_envs=NUM_ENVS)
        return list(map(_describe, episodes))

    return stages.once(experiment.workdir / "episodes" / f"{list(PLAYED).index(name)}.json", play)


def _describe(episode) -> dict:
    seconds_per_action = 0.01 * waypoint_controller.ACTION_REPEAT
    return {
        "seed": episode.seed,
        "goal": episode.goal.tolist(),
        "success": episode.success,
        "seconds": seconds_per_action * (1 + episode.successes.index(True)) if episode.success else None,
        "positions": np.round(np.array(episode.observations)[:, :2], 3).tolist(),
    }


def _plan_policy(experiment) -> rollouts.Policy:
    checkpoint, max_batch = checkpoints.restore(experiment.workdir), min(NUM_EPISODES.value, NUM_ENVS)
    return stages.planner(experiment, checkpoint, seed=SEED.value, max_batch=max_batch, by_likelihood=True)


def _draw(experiment, played):
    """Draw where the data ends beside the paths to goals where it never does."""
    data = trajectories.load(experiment.config.dataset, config=datasets.data_config(experiment.config.data))
    ends = data.observations[data.offsets[1:] - 1, :2]
    episodes = sorted(played["likelihood search"], key=lambda episode: not episode["success"])  # misses on top
    maze = make_env("h", seconds=1).unwrapped.maze  # its goals are the held-out cells
    figure = Figure(figsize=(12, 6.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        figures.draw_maze(axes, maze)
        figures.draw_cells(axes, maze, maze.unique_goal_locations, color=figures.ORANGE, alpha=0.3)
    left.plot(*ends.T, ".", color=figures.BLUE, markersize=3)
    left.set_title(f"Where the {len(ends)} episodes of the data end (orange: held out)")
    colours = [figures.BLUE if episode["success"] else figures.VERMILION for episode in episodes]
    paths, goals = (np.array([episode[name] for episode in episodes]) for name in ("positions", "goal"))
    figures.draw_trajectories(right, paths, goals, colours=colours)
    figures.add_maze_legend(right)
    reached = sum(episode["success"] for episode in episodes)
    right.set_title(f"{reached} of {len(episodes)} episodes reach their held-out goal, the red ones do not")
    figures.save(figure, experiment.workdir / "figures" / "four_rooms.png")


def _summarize(episodes) -> dict:
    return {"success": control.mean_and_error([episode["success"] for episode in episodes]), "episodes": episodes}


def _table(results) -> list[str]:
    lines = [
        f"{results['environment']}; {NUM_EPISODES.value} episodes of {EPISODE_SECONDS} s for each line",
        f"{'policy':<40}{'success':>15}{'seconds to the goal':>22}",
    ]
    for name, row in results["policies"].items():
        seconds = [episode["seconds"] for episode in row["episodes"] if episode["success"]]
        median = f"{np.median(seconds):.2f}" if seconds else "-"
        lines.append(f"{name:<40}{row['success']['mean']:8.2f} ± {row['success']['standard_error']:4.2f}{median:>22}")
    episodes = results["data"]["episodes"]
    return lines + [f"The model learned from {episodes} episodes, none of which ended in a held-out cell."]


if __name__ == "__main__":
    entry.run(main)
