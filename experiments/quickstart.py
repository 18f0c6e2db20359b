"""Collect data in a point maze, train a small Trajectory Transformer on it, and control the maze by beam search.

python -m experiments.quickstart [--workdir=runs/quickstart] [--seed=0]

Minutes on 2 CPU cores. What is done is kept in the workdir: the same command goes on where it was interrupted, or says
where the results are. The dataset is stored there, too, not among the user's own Minari datasets.
"""

import functools

import gymnasium
import numpy as np
from matplotlib.figure import Figure

from experiments.common import control, drawing, entry, figures, run_flags, stages, waypoint_controller
from tt_jax import checkpoints, environments, rollouts

CONFIG, DATASET = run_flags.config("quickstart"), run_flags.dataset()
WORKDIR, DOWNLOAD = run_flags.workdir(default="runs/quickstart"), run_flags.download()
SEED = run_flags.seed(help="Seed of everything: data, training, planning, and the episodes that are played.")
DATA_EPISODES, NUM_EPISODES = run_flags.data_episodes(default=1600), run_flags.num_episodes(default=24)

EPISODE_STEPS = 300
MAX_NOISE = 2.0  # largest standard deviation of the behaviour policy's action noise
SHOWN_EPISODES = 6  # in the figure
POLICIES = ("random", "behaviour", "behaviour without noise", "beam search")


def main(_):
    experiment = stages.begin(CONFIG.value, WORKDIR.value, seed=SEED.value, dataset=DATASET.value)
    results = stages.learn_and_play(
        experiment,
        numbers={flag.name: flag.value for flag in (SEED, DATA_EPISODES, NUM_EPISODES)},
        environment="PointMaze_UMaze-v3 with dense reward",
        collect_fn=_collect,
        play_title="control the maze",
        policies=POLICIES,
        play_fn=_play,
        draw_fn=_draw,
        summarize_fn=_summarize,
        download=DOWNLOAD.value,
    )
    stages.report(experiment, _table(results), "maze.png", "learning_curve.png", "plans/plans.gif")


def make_env() -> gymnasium.Env:
    """Make the maze. At its own 100 actions a second a plan of some steps would lead nowhere."""
    env = environments.make("PointMaze_UMaze-v3", reward_type="dense")
    return rollouts.ActionRepeat(env, waypoint_controller.ACTION_REPEAT)


def _waypoint_policy(max_noise) -> rollouts.Policy:
    return waypoint_controller.make_policy(make_env().unwrapped.maze, max_noise=max_noise)


def _collect(experiment) -> dict:
    """Record the dataset and describe it."""
    seeds = stages.reset_seeds(SEED.value, DATA_EPISODES.value, of_data=True)
    description = "Waypoint controller with noise, see the quickstart."
    episodes = stages.collect(experiment, make_env, _waypoint_policy(MAX_NOISE), seeds, description=description)
    return {
        "episodes": len(episodes),
        "transitions": sum(episode.length for episode in episodes),
        "return": control.mean_and_error([episode.total_reward for episode in episodes]),
    }


def _play(experiment, name) -> dict[str, np.ndarray]:
    """Play the episodes with one policy, or read what was played before."""

    def play():
        make_policy = {
            "random": lambda: control.act_randomly,
            "behaviour": lambda: _waypoint_policy(MAX_NOISE),
            "behaviour without noise": lambda: _waypoint_policy(0.0),
            "beam search": lambda: _plan_policy(experiment, max_batch=NUM_EPISODES.value),
        }
        seeds = stages.reset_seeds(SEED.value, NUM_EPISODES.value)
        episodes, counts = stages.play(experiment, make_env, make_policy[name](), seeds, title=name)
        return {  # all episodes are equally long
            "seconds_per_action": counts["seconds"] / counts["actions"],
            "returns": np.array([episode.total_reward for episode in episodes]),
            "successes": np.array([episode.success for episode in episodes]),
            "observations": np.stack([episode.observations for episode in episodes]),  # [E, T + 1, N]
            "actions": np.stack([episode.actions for episode in episodes]),
            "rewards": np.stack([episode.rewards for episode in episodes]),
        }

    return stages.once(experiment.workdir / "control" / f"{name.replace(' ', '_')}.npz", play, title=name)


def _plan_policy(experiment, **settings) -> rollouts.Policy:
    """Make the policy that plans with the trained model."""
    return stages.planner(experiment, checkpoints.restore(experiment.workdir), seed=SEED.value, **settings)


def _draw(experiment, played):
    """Draw the maze with executed trajectories on the left and imagined plans on the right, and plans as animation."""
    record = played["beam search"]
    positions, goals = record["observations"][..., :2], record["observations"][:, 0, 4:6]
    longest = int(np.argmax(np.ptp(positions, axis=1).sum(axis=-1)))  # the episode that covers most of the maze
    moments = drawing.draw_plans(
        experiment.workdir / "figures" / "plans",
        rollouts.Episode(
            seed=stages.reset_seeds(SEED.value, NUM_EPISODES.value)[longest],
            **{name: list(record[name][longest]) for name in ("observations", "actions", "rewards")},
        ),
        checkpoint=checkpoints.restore(experiment.workdir),
        make_env=make_env,
        make_policy=functools.partial(_plan_policy, experiment),
        replan_every=experiment.config.plan.replan_every,
    )
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        figures.draw_maze(axes, make_env().unwrapped.maze)
    figures.draw_trajectories(left, positions[:SHOWN_EPISODES], goals[:SHOWN_EPISODES])
    left.set_title(f"What beam search did in {len(goals[:SHOWN_EPISODES])} episodes")
    figures.draw_trajectories(right, positions[[longest]], goals[[longest]], colours=["0.6"])
    plans, steps = zip(*((moment.beams[0, :, :2], moment.step) for moment in moments), strict=True)
    colours = figures.draw_plans(right, plans, steps, limit=record["actions"].shape[1])
    figure.colorbar(colours, ax=right, label="action before which the plan was made", shrink=0.8)
    right.set_title("What it imagined: best plans of one episode")
    for axes in (left, right):
        figures.add_maze_legend(axes)
    figures.save(figure, experiment.workdir / "figures" / "maze.png")


def _summarize(record) -> dict:
    return {
        "return": control.mean_and_error(record["returns"]),
        "success": control.mean_and_error(record["successes"]),
        "ms_per_action": 1000 * float(record["seconds_per_action"]),
        "returns": record["returns"].tolist(),
    }


def _table(results) -> list[str]:
    lines = [
        f"{results['environment']}, {EPISODE_STEPS} steps, {NUM_EPISODES.value} episodes on the same reset seeds",
        f"{'policy':<26}{'return':>15}{'success':>10}{'ms/action':>12}",
    ]
    for name, row in results["policies"].items():
        mean, error = row["return"]["mean"], row["return"]["standard_error"]
        lines.append(f"{name:<26}{mean:8.1f} ± {error:4.1f}{row['success']['mean']:10.2f}{row['ms_per_action']:12.2f}")
    data = results["data"]
    return lines + [
        f"The model learned from {data['episodes']} episodes of the behaviour policy with mean return "
        f"{data['return']['mean']:.1f}. Without its noise it is the ceiling."
    ]


if __name__ == "__main__":
    entry.run(main)
