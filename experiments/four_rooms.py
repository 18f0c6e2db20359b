"""Reach goals that were never a goal in training: a goal-conditioned Trajectory Transformer in a maze of four rooms.

python -m experiments.four_rooms [--workdir=runs/four_rooms] [--seed=0]

A scripted controller goes from random cells to random cells, but never to those that are held out; a model learns what
it did given where each episode ended, and plans by likelihood to the held-out cells. Minutes on 2 CPU cores; the same
command goes on where it was interrupted.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time

import gymnasium
import jax
import numpy as np
from absl import flags, logging
from matplotlib.figure import Figure

from experiments import train_tt
from experiments.common import control, datasets, entry, figures, recording, stages, waypoint_controller
from tt_jax import checkpoints, rollouts, sequence_planner, trajectories

# The flags of training serve here, too, with other defaults.
CONFIG, DATASET, WORKDIR = train_tt.CONFIG, train_tt.DATASET, train_tt.WORKDIR
flags.set_default(CONFIG, str(pathlib.Path(__file__).parent / "configs" / "four_rooms.py"))
flags.set_default(WORKDIR, "runs/four_rooms")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of everything: data, training, and the episodes that are played.", 0, 2**31 // 10**6
)
DATA_EPISODES = flags.DEFINE_integer("data_episodes", 1600, "Episodes to collect.", 2)
NUM_EPISODES = flags.DEFINE_integer("num_episodes", 48, "Episodes that each policy plays.", 2)

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
ACTION_REPEAT = 5  # environment steps of 10 ms that every action is held
NOISE_HOLD = waypoint_controller.NOISE_HOLD // ACTION_REPEAT  # actions that share their noise
MAX_NOISE = 0.8  # largest standard deviation of the controller's action noise in the data
NUM_ENVS = 32  # at most, in step
FIRST_DATA_SEED = 10_000  # no episode of the data is played again for the table
# What is played: a name, the cells that goals are drawn from, and who acts.
PLAYED = {
    "random": ("h", "random"),
    "controller without noise": ("h", "controller"),
    "likelihood search": ("h", "planner"),
    "likelihood search, goals of the data": (".", "planner"),
}


def main(_):
    preemption = entry.Preemption()
    workdir = pathlib.Path(WORKDIR.value)
    CONFIG.value.seed = SEED.value
    if stages.is_done(workdir, _settings()):
        _report(workdir)
        return
    config = entry.resolve_config(CONFIG.value, dataset=DATASET.value, workdir=workdir)
    os.environ["MINARI_DATASETS_PATH"] = str(workdir.resolve() / "datasets")
    started = time.time()
    with stages.stage("1/4 collect data with a scripted controller"):
        data = stages.once(workdir / "data.json", lambda: _collect(config.dataset, preemption))
    with stages.stage("2/4 train the Trajectory Transformer"):
        train_tt.train(config, workdir, preemption=preemption)
    with stages.stage("3/4 go to goals"):
        (workdir / "episodes").mkdir(exist_ok=True)
        played = {}
        for number, name in enumerate(PLAYED):
            path = workdir / "episodes" / f"{number}.json"
            played[name] = stages.once(path, functools.partial(_control, workdir, name, preemption))
    with stages.stage("4/4 draw figures"):
        _draw(workdir, played, config.dataset)
    results = {
        "environment": f"point maze of four rooms, {len(_cells('h'))} of {len(_cells('h.'))} cells held out as goals",
        "data": data,
        "policies": {name: _summarize(episodes) for name, episodes in played.items()},
        "wall_time_s": time.time() - started,  # of what was left to do
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": _settings(),
    }
    stages.write_json(workdir / "results.json", results)
    _report(workdir)


def _settings() -> dict:
    numbers = {flag.name: flag.value for flag in (SEED, DATA_EPISODES, NUM_EPISODES)}
    return numbers | {"config": CONFIG.value.to_dict()}


def _cells(marks) -> list[tuple[int, int]]:
    """List the cells (row, column) with one of the marks in MAP."""
    rows = MAP.split()
    return [(i, j) for i, row in enumerate(rows) for j, mark in enumerate(row) if mark in marks]


def make_env(goals: str, *, seconds: int) -> gymnasium.Env:
    """Make the maze with goals in the cells marked as `goals` in MAP; episodes start in any cell."""
    maze_map = [[1 if mark == "#" else "c" if mark == goals else "r" for mark in row] for row in MAP.split()]
    settings = {"maze_map": maze_map, "reward_type": "sparse", "max_episode_steps": 100 * seconds}
    return rollouts.ActionRepeat(recording.make_env("PointMaze_UMaze-v3", **settings), ACTION_REPEAT)


def _play(policy, seeds, preemption, *, goals, seconds, title) -> list[rollouts.Episode]:
    envs = rollouts.vectorize(functools.partial(make_env, goals, seconds=seconds), min(len(seeds), NUM_ENVS))
    episodes, _ = control.play(
        envs,
        policy,
        seeds=[1_000_000 * SEED.value + seed for seed in seeds],
        config=datasets.data_config(CONFIG.value.data),
        title=title,
        check=lambda: preemption.check(title),
    )
    return episodes


def _controller(max_noise) -> rollouts.Policy:
    maze = make_env(".", seconds=1).unwrapped.maze
    return waypoint_controller.make_policy(maze, max_noise=max_noise, noise_hold=NOISE_HOLD)


def _collect(dataset_id, preemption) -> dict:
    """Record the dataset and describe it.

    An episode ends when it rests in its goal, since data that is mostly rest teaches a model to rest. Those that do not
    get there and end in a held-out cell are left out.
    """
    env = make_env(".", seconds=DATA_SECONDS)
    seeds = range(FIRST_DATA_SEED, FIRST_DATA_SEED + DATA_EPISODES.value)
    episodes = _play(_controller(MAX_NOISE), seeds, preemption, goals=".", seconds=DATA_SECONDS, title="collect")
    held_out, maze = set(_cells("h")), env.unwrapped.maze
    kept = []
    for episode in map(_until_rest, episodes):
        goal = episode.observations[-2][:2]  # the last one with an action, which training takes as the goal
        if tuple(maze.cell_xy_to_rowcol(goal).tolist()) not in held_out:
            kept.append(episode)
    recording.write(
        dataset_id, map(recording.to_buffer, kept), env=env, description="Waypoint controller with noise in four rooms."
    )
    return {
        "episodes": len(kept),
        "left_out": len(episodes) - len(kept),
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


def _control(workdir, name, preemption) -> list[dict]:
    """Play the episodes of one policy and describe each of them."""
    goals, actor = PLAYED[name]
    policy = {
        "random": lambda: control.act_randomly,
        "controller": lambda: _controller(0.0),
        "planner": lambda: _plan_policy(workdir),
    }[actor]()
    episodes = _play(policy, range(NUM_EPISODES.value), preemption, goals=goals, seconds=EPISODE_SECONDS, title=name)
    return [
        {
            "seed": episode.seed,
            "goal": episode.goal.tolist(),
            "success": episode.success,
            "seconds": 0.01 * ACTION_REPEAT * (1 + episode.successes.index(True)) if episode.success else None,
            "positions": np.round(np.array(episode.observations)[:, :2], 3).tolist(),
        }
        for episode in episodes
    ]


def _plan_policy(workdir) -> rollouts.Policy:
    checkpoint = checkpoints.restore(workdir)
    config = entry.to_dataclass(sequence_planner.PlanConfig, CONFIG.value.plan, discount=CONFIG.value.data.discount)
    num_envs = min(NUM_EPISODES.value, NUM_ENVS)
    policy = control.plan_policy(checkpoint, config, seed=SEED.value, max_batch=num_envs, by_likelihood=True)
    logging.info("compiling the planner")
    control.compile_policy(policy, checkpoint.config.spec.observation_dim, num_envs)
    return policy


def _draw(workdir, played, dataset_id):
    """Draw the learning curve; and where the data ends beside the paths to goals where it never does."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    figures.draw_learning_curve(figure.subplots(), workdir)
    figures.save(figure, workdir / "figures" / "learning_curve.png")

    data = trajectories.load(dataset_id, config=datasets.data_config(CONFIG.value.data))
    ends = data.observations[data.offsets[1:] - 1, :2]
    episodes = sorted(played["likelihood search"], key=lambda episode: not episode["success"])  # misses on top
    maze = make_env("h", seconds=1).unwrapped.maze  # its goals are the held-out cells
    figure = Figure(figsize=(12, 6.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        figures.draw_maze(axes, maze)
        figures.draw_cells(axes, maze, maze.unique_goal_locations, color="tab:orange", alpha=0.3)
    left.plot(*ends.T, ".", color="tab:blue", markersize=3)
    left.set_title(f"Where the {len(ends)} episodes of the data end (orange: held out)")
    colours = ["tab:blue" if episode["success"] else "tab:red" for episode in episodes]
    paths, goals = (np.array([episode[name] for episode in episodes]) for name in ("positions", "goal"))
    figures.draw_trajectories(right, paths, goals, colours=colours)
    figures.add_maze_legend(right)
    reached = sum(episode["success"] for episode in episodes)
    right.set_title(f"{reached} of {len(episodes)} episodes reach their held-out goal, the red ones do not")
    figures.save(figure, workdir / "figures" / "four_rooms.png")


def _summarize(episodes) -> dict:
    return {"success": control.mean_and_error([episode["success"] for episode in episodes]), "episodes": episodes}


def _report(workdir):
    """Print the table and say where everything is."""
    results = json.loads((workdir / "results.json").read_text())
    print(f"{results['environment']}; {NUM_EPISODES.value} episodes of {EPISODE_SECONDS} s for each line")
    print(f"{'policy':<40}{'success':>15}{'seconds to the goal':>22}")
    for name, row in results["policies"].items():
        seconds = [episode["seconds"] for episode in row["episodes"] if episode["success"]]
        median = f"{np.median(seconds):.2f}" if seconds else "-"
        print(f"{name:<40}{row['success']['mean']:8.2f} ± {row['success']['standard_error']:4.2f}{median:>22}")
    print(
        f"The model learned from {results['data']['episodes']} episodes, none of which ended in a held-out cell.\n"
        f"figures: {workdir / 'figures' / 'four_rooms.png'}, {workdir / 'figures' / 'learning_curve.png'}\n"
        f"numbers: {workdir / 'results.json'}"
    )


if __name__ == "__main__":
    entry.run(main)
