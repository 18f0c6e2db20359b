"""Collect data in a point maze, train a small Trajectory Transformer on it, and control the maze by beam search.

python -m experiments.quickstart [--workdir=runs/quickstart] [--seed=0]

Minutes on 2 CPU cores. What is done is kept in the workdir: the same command goes on where it was interrupted, or says
where the results are. The dataset is stored there, too, not among the user's own Minari datasets.
"""

import gymnasium
import numpy as np
from matplotlib.figure import Figure

from experiments.common import control, entry, figures, run_flags, stages, waypoint_controller
from tt_jax import checkpoints, environments, rollouts, tokenization

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
    stages.report(experiment, _table(results), "maze.png", "learning_curve.png")


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
        plans = []
        make_policy = {
            "random": lambda: control.act_randomly,
            "behaviour": lambda: _waypoint_policy(MAX_NOISE),
            "behaviour without noise": lambda: _waypoint_policy(0.0),
            "beam search": lambda: _plan_policy(experiment, plans),
        }
        seeds = stages.reset_seeds(SEED.value, NUM_EPISODES.value)
        episodes, counts = stages.play(experiment, make_env, make_policy[name](), seeds, title=name)
        observations = np.stack([episode.observations for episode in episodes])  # [E, T + 1, N]: all are equally long
        return {
            "seconds_per_action": counts["seconds"] / counts["actions"],
            "returns": np.array([episode.total_reward for episode in episodes]),
            "successes": np.array([episode.success for episode in episodes]),
            "positions": observations[..., :2],
            "goals": observations[:, 0, 4:6],
            "plans": np.stack(plans, axis=1) if plans else np.empty(0),  # [E, plans of an episode, H, 2], imagined
        }

    return stages.once(experiment.workdir / "control" / f"{name.replace(' ', '_')}.npz", play, title=name)


def _plan_policy(experiment, plans) -> rollouts.Policy:
    """Make the policy that plans with the trained model; it appends the positions it imagines to `plans`."""
    checkpoint = checkpoints.restore(experiment.workdir)

    def note(output):
        tokens = np.asarray(output.tokens)[..., :2]
        plans.append(tokenization.decode(checkpoint.tokenizer, tokens, dims=slice(2)).astype(np.float32))

    policy = stages.planner(experiment, checkpoint, seed=SEED.value, max_batch=NUM_EPISODES.value, on_plan=note)
    plans.clear()  # of the compilation
    return policy


def _draw(experiment, played):
    """Draw the maze with executed trajectories on the left and imagined plans on the right."""
    record = played["beam search"]
    positions, goals = record["positions"], record["goals"]
    longest = int(np.argmax(np.ptp(positions, axis=1).sum(axis=-1)))  # the episode that covers most of the maze
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        figures.draw_maze(axes, make_env().unwrapped.maze)
    figures.draw_trajectories(left, positions[:SHOWN_EPISODES], goals[:SHOWN_EPISODES])
    left.set_title(f"Beam search: what it did in {len(goals[:SHOWN_EPISODES])} episodes")
    figures.draw_trajectories(right, positions[[longest]], goals[[longest]], colours=["0.6"])
    colours = figures.draw_plans(right, record["plans"][longest], limit=EPISODE_STEPS)
    figure.colorbar(colours, ax=right, label="environment step at which the plan was made", shrink=0.8)
    right.set_title("What it imagined: the best plans of one episode")
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
