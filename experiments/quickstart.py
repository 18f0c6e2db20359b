"""Collect data in a point maze, train a small Trajectory Transformer on it, and control the maze by beam search.

python -m experiments.quickstart [--workdir=runs/quickstart] [--seed=0]

Minutes on 2 CPU cores. What is done is kept in the workdir: the same command goes on where it was interrupted, or says
where the results are. The dataset is stored there, too, not among the user's own Minari datasets.
"""

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
from tt_jax import checkpoints, rollouts, sequence_planner, tokenization

# The flags of training serve here, too, with other defaults.
CONFIG, DATASET, WORKDIR = train_tt.CONFIG, train_tt.DATASET, train_tt.WORKDIR
flags.set_default(CONFIG, str(pathlib.Path(__file__).parent / "configs" / "quickstart.py"))
flags.set_default(WORKDIR, "runs/quickstart")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of everything: data, training, planning, and the episodes that are played.", 0
)
DATA_EPISODES = flags.DEFINE_integer("data_episodes", 1600, "Episodes to collect.", 2)
NUM_EPISODES = flags.DEFINE_integer("num_episodes", 24, "Episodes that each policy plays.", 2)

EPISODE_STEPS = 300
ACTION_REPEAT = 5  # environment steps of 10 ms that every action is held
NOISE_HOLD = waypoint_controller.NOISE_HOLD // ACTION_REPEAT  # actions that share their noise
NUM_ENVS = 32  # at most, in step
FIRST_DATA_SEED = 10_000  # no episode of the data is played again for the table
MAX_NOISE = 2.0  # largest standard deviation of the behaviour policy's action noise
SHOWN_EPISODES = 6  # in the figure
POLICIES = ("random", "behaviour", "behaviour without noise", "beam search")


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
    with stages.stage("3/4 control the maze"):
        played = {name: _control(workdir, name, preemption) for name in POLICIES}
    with stages.stage("4/4 draw figures"):
        _draw(workdir, played)
    results = {
        "environment": "PointMaze_UMaze-v3 with dense reward",
        "data": data,
        "policies": {name: _summarize(record) for name, record in played.items()},
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


# 1. Data


def make_env() -> gymnasium.Env:
    """Make the maze. At its own 100 actions a second a plan of some steps would lead nowhere."""
    env = recording.make_env("PointMaze_UMaze-v3", reward_type="dense")
    return rollouts.ActionRepeat(env, ACTION_REPEAT)


def _collect(dataset_id, preemption) -> dict:
    """Record the dataset and describe it; what an interruption left of it is replaced."""
    env = make_env()
    episodes = _play(
        _waypoint_policy(MAX_NOISE), _seeds(FIRST_DATA_SEED, DATA_EPISODES.value), preemption, title="collect"
    )
    buffers = [recording.to_buffer(episode) for episode in episodes]
    recording.write(dataset_id, buffers, env=env, description="Waypoint controller with noise, see the quickstart.")
    returns = [episode.total_reward for episode in episodes]
    return {
        "episodes": len(episodes),
        "transitions": sum(episode.length for episode in episodes),
        "return": control.mean_and_error(returns),
    }


# 3. Control


def _control(workdir, name, preemption) -> dict[str, np.ndarray]:
    """Play the episodes with one policy, or read what was played before."""
    path = workdir / "control" / f"{name.replace(' ', '_')}.npz"
    if path.exists():
        logging.info("%s: already done", name)
    else:
        path.parent.mkdir(exist_ok=True)
        plans = []
        make_policy = {
            "random": lambda: control.act_randomly,
            "behaviour": lambda: _waypoint_policy(MAX_NOISE),
            "behaviour without noise": lambda: _waypoint_policy(0.0),
            "beam search": lambda: _plan_policy(workdir, plans),
        }
        policy, clock = _timed(make_policy[name]())
        episodes = _play(policy, _seeds(0, NUM_EPISODES.value), preemption, title=name)
        temporary = path.with_name("unfinished.npz")
        np.savez(temporary, seconds_per_action=clock["seconds"] / clock["actions"], **_record(episodes, plans))
        temporary.replace(path)
    with np.load(path) as file:
        return dict(file)


def _seeds(first, num_episodes) -> list[int]:
    return [1_000_000 * SEED.value + first + i for i in range(num_episodes)]


def _play(policy, seeds, preemption, *, title) -> list[rollouts.Episode]:
    envs = rollouts.vectorize(make_env, min(len(seeds), NUM_ENVS))
    config = datasets.data_config(CONFIG.value.data)
    episodes, _ = control.play(
        envs, policy, seeds=seeds, config=config, title=title, check=lambda: preemption.check(title)
    )
    return episodes


def _timed(policy) -> tuple[rollouts.Policy, dict[str, float]]:
    """Let a policy count its seconds and its actions."""
    clock = {"seconds": 0.0, "actions": 0}

    def timed_policy(episodes):
        started = time.time()
        actions = policy(episodes)
        clock["seconds"] += time.time() - started
        clock["actions"] += actions.shape[0] * actions.shape[1]
        return actions

    return timed_policy, clock


def _record(episodes, plans) -> dict[str, np.ndarray]:
    observations = np.stack([episode.observations for episode in episodes])  # [E, T + 1, N]: all are equally long
    return {
        "returns": np.array([episode.total_reward for episode in episodes]),
        "successes": np.array([episode.success for episode in episodes]),
        "positions": observations[..., :2],
        "goals": observations[:, 0, 4:6],
        "plans": np.stack(plans, axis=1) if plans else np.empty(0),  # [E, plans of an episode, H, 2], imagined
    }


def _waypoint_policy(max_noise) -> rollouts.Policy:
    return waypoint_controller.make_policy(make_env().unwrapped.maze, max_noise=max_noise, noise_hold=NOISE_HOLD)


def _plan_policy(workdir, plans) -> rollouts.Policy:
    """Make the policy that plans with the trained model, compiled; it appends the positions it imagines to `plans`."""
    checkpoint = checkpoints.restore(workdir)
    config = entry.to_dataclass(sequence_planner.PlanConfig, CONFIG.value.plan, discount=CONFIG.value.data.discount)

    def note(output):
        tokens = np.asarray(output.tokens)[..., :2]
        plans.append(tokenization.decode(checkpoint.tokenizer, tokens, dims=slice(2)).astype(np.float32))

    policy = control.plan_policy(checkpoint, config, seed=SEED.value, max_batch=NUM_EPISODES.value, on_plan=note)
    logging.info("compiling the planner")
    control.compile_policy(policy, checkpoint.config.spec.observation_dim, NUM_EPISODES.value)
    plans.clear()
    return policy


# 4. Results


def _draw(workdir, played):
    """Draw the learning curve, and the maze with executed trajectories on the left and imagined plans on the right."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    figures.draw_learning_curve(figure.subplots(), workdir)
    figures.save(figure, workdir / "figures" / "learning_curve.png")

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
    figures.save(figure, workdir / "figures" / "maze.png")


def _summarize(record) -> dict:
    return {
        "return": control.mean_and_error(record["returns"]),
        "success": control.mean_and_error(record["successes"]),
        "ms_per_action": 1000 * float(record["seconds_per_action"]),
        "returns": record["returns"].tolist(),
    }


def _report(workdir):
    """Print the table and say where everything is."""
    results = json.loads((workdir / "results.json").read_text())
    data = results["data"]
    print(f"{results['environment']}, {EPISODE_STEPS} steps, {NUM_EPISODES.value} episodes on the same reset seeds")
    print(f"{'policy':<26}{'return':>15}{'success':>10}{'ms/action':>12}")
    for name, row in results["policies"].items():
        mean, error = row["return"]["mean"], row["return"]["standard_error"]
        print(f"{name:<26}{mean:8.1f} ± {error:4.1f}{row['success']['mean']:10.2f}{row['ms_per_action']:12.2f}")
    print(
        f"The model learned from {data['episodes']} episodes of the behaviour policy with mean return "
        f"{data['return']['mean']:.1f}. Without its noise it is the ceiling.\n"
        f"figures: {workdir / 'figures' / 'maze.png'}, {workdir / 'figures' / 'learning_curve.png'}\n"
        f"numbers: {workdir / 'results.json'}"
    )


if __name__ == "__main__":
    entry.run(main)
