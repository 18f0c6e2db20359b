"""Collect data in a point maze, train a small Trajectory Transformer on it, and control the maze by beam search.

python -m experiments.quickstart [--workdir=runs/quickstart] [--seed=0]

Minutes on 2 CPU cores. What is done is kept in the workdir: the same command goes on where it was interrupted, or says
where the results are. The dataset is stored there, too, not among the user's own Minari datasets.
"""

import contextlib
import functools
import json
import os
import pathlib
import time

import jax
import numpy as np
import tqdm
from absl import flags, logging
from matplotlib.figure import Figure

from experiments import datasets, entry, figures, recording, train_tt, waypoint_controller
from tt_jax import checkpoints, rollouts, sequence_planner, tokenization

# The flags of training serve here, too, with other defaults.
CONFIG, DATASET, WORKDIR = train_tt.CONFIG, train_tt.DATASET, train_tt.WORKDIR
flags.set_default(CONFIG, str(pathlib.Path(__file__).parent / "configs" / "quickstart.py"))
flags.set_default(WORKDIR, "runs/quickstart")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything: data, training, planning, and the episodes played.", 0)
STEPS = flags.DEFINE_integer("steps", 50_000, "Transitions to collect.", 1)
NUM_EPISODES = flags.DEFINE_integer("num_episodes", 24, "Episodes that each policy plays.", 2)

MAX_NOISE = 2.0  # largest standard deviation of the behaviour policy's action noise
POLICIES = ("random", "behaviour", "behaviour without noise", "beam search")

make_env = functools.partial(recording.make_env, "PointMaze_UMaze-v3", reward_type="dense")


def main(_):
    preemption = entry.Preemption()
    workdir = pathlib.Path(WORKDIR.value)
    CONFIG.value.seed = SEED.value
    if _is_done(workdir):
        logging.info("%s is done; another --workdir starts anew.", workdir)
        _report(workdir)
        return
    config = entry.resolve_config(CONFIG.value, dataset=DATASET.value, workdir=workdir)
    os.environ["MINARI_DATASETS_PATH"] = str(workdir / "datasets")
    started = time.time()
    with _stage("1/4 collect data with a scripted controller"):
        data = _once(workdir / "data.json", lambda: _collect(config.dataset, preemption))
    with _stage("2/4 train the Trajectory Transformer"):
        train_tt.train(config, workdir, preemption=preemption)
    with _stage("3/4 control the maze"):
        played = {name: _control(workdir, name, preemption) for name in POLICIES}
    with _stage("4/4 draw figures"):
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
    _write_json(workdir / "results.json", results)
    _report(workdir)


def _settings() -> dict:
    numbers = {flag.name: flag.value for flag in (SEED, STEPS, NUM_EPISODES)}
    return json.loads(json.dumps(numbers | {"config": CONFIG.value.to_dict()}))


def _is_done(workdir) -> bool:
    """Say whether the results are there; raise UsageError if the workdir was made with other settings."""
    path = workdir / "settings.json"
    if path.exists() and json.loads(path.read_text()) != _settings():
        raise entry.UsageError(f"{workdir} holds a run with other settings, see {path}; use another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json(path, _settings())
    return (workdir / "results.json").exists()


@contextlib.contextmanager
def _stage(title):
    logging.info("%s", title)
    started = time.time()
    yield
    logging.info("%s: %.0f s\n", title, time.time() - started)


def _once(path, make):
    """Return what `path` holds, or make it and write it there."""
    if path.exists():
        logging.info("already done")
    else:
        _write_json(path, make())
    return json.loads(path.read_text())


def _write_json(path, value):
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


# 1. Data


def _collect(dataset_id, preemption) -> dict:
    """Record the dataset and describe it; what an interruption left of it is replaced."""
    env = make_env()
    episodes = []
    with tqdm.tqdm(total=STEPS.value, unit="step", desc="collect") as progress:
        for episode in waypoint_controller.episodes(env, max_noise=MAX_NOISE, seed=SEED.value):
            episodes.append(episode)
            progress.update(len(episode))
            if preemption.requested():
                raise entry.Interrupted("stopped before the data was complete; the same command starts again.")
            if progress.n >= STEPS.value:
                break
    recording.write(dataset_id, episodes, env=env, description="Waypoint controller with noise, see the quickstart.")
    returns = [float(np.sum(episode.rewards)) for episode in episodes]
    return {"transitions": progress.n, "episodes": len(episodes), "return": _mean_and_error(returns)}


# 3. Control


def _control(workdir, name, preemption) -> dict[str, np.ndarray]:
    """Play the episodes with one policy, or read what was played before."""
    path = workdir / "control" / f"{name.replace(' ', '_')}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name("tmp.npz")
        np.savez(temporary, **_play(workdir, name, preemption))
        temporary.replace(path)
    with np.load(path) as file:
        return dict(file)


def _play(workdir, name, preemption) -> dict[str, np.ndarray]:
    envs = rollouts.vectorize(make_env, NUM_EPISODES.value)
    maze = envs.envs[0].unwrapped.maze
    plans = []
    policy = {
        "random": lambda: _each(_act_randomly),
        "behaviour": lambda: _each(functools.partial(_act_by_waypoints, maze=maze, max_noise=MAX_NOISE)),
        "behaviour without noise": lambda: _each(functools.partial(_act_by_waypoints, maze=maze, max_noise=0.0)),
        "beam search": lambda: _plan_policy(workdir, plans),
    }[name]()
    seconds = 0.0
    with tqdm.tqdm(total=envs.envs[0].spec.max_episode_steps, unit="step", desc=name) as progress:

        def timed_policy(episodes):
            nonlocal seconds
            if preemption.requested():
                raise entry.Interrupted("stopped in control; the same command plays these episodes again.")
            progress.update(episodes[0].length - progress.n)
            started = time.time()
            actions = policy(episodes)
            seconds += time.time() - started
            return actions

        seeds = [NUM_EPISODES.value * SEED.value + i for i in range(NUM_EPISODES.value)]
        episodes = rollouts.run(envs, timed_policy, seeds=seeds, config=datasets.data_config(CONFIG.value.data))
        progress.update(episodes[0].length - progress.n)
    observations = np.stack([episode.observations for episode in episodes])  # [E, T + 1, N]; all are equally long
    return {
        "returns": np.array([episode.total_reward for episode in episodes]),
        "successes": np.array([episode.success for episode in episodes]),
        "seconds_per_action": np.float64(seconds / sum(episode.length for episode in episodes)),
        "positions": observations[..., :2],
        "goals": observations[:, 0, 4:6],
        "plans": np.stack(plans, axis=1) if plans else np.empty(0),  # [E, plans per episode, H, 2] positions
    }


def _each(act) -> rollouts.Policy:
    """Make a policy of a function that acts for one episode."""
    return lambda episodes: np.stack([act(episode) for episode in episodes])[:, None]


def _act_randomly(episode):
    return np.random.default_rng((episode.seed, episode.length)).uniform(-1.0, 1.0, 2)


def _act_by_waypoints(episode, *, maze, max_noise):
    """Act as the policy that made the data: its noise level is drawn per episode, its noise is held."""
    rng = np.random.default_rng(episode.seed)
    noise = rng.uniform(0.0, max_noise)
    disturbance = noise * rng.standard_normal((1 + episode.length // waypoint_controller.NOISE_HOLD, 2))[-1]
    point, goal = np.split(episode.observations[-1], [4])
    action = waypoint_controller.act({"observation": point, "desired_goal": goal}, maze)
    return np.clip(action + disturbance, -1.0, 1.0)


def _plan_policy(workdir, plans) -> rollouts.Policy:
    """Make the policy that plans with the trained model, compile it, and append to `plans` the positions it imagines."""
    checkpoint = checkpoints.restore(workdir)
    config = entry.to_dataclass(
        sequence_planner.PlanConfig, CONFIG.value.plan, discount=CONFIG.value.data.discount
    )
    plan_fn = jax.jit(sequence_planner.make_plan_fn(config=checkpoint.config, plan_config=config))

    def noted_plan_fn(*arguments):
        output = plan_fn(*arguments)
        tokens = np.asarray(output.tokens)[..., :2]
        plans.append(tokenization.decode(checkpoint.tokenizer, tokens, dims=slice(2)).astype(np.float32))
        return output

    params = sequence_planner.PlannerParams(transformer=checkpoint.params, discretizer=checkpoint.tokenizer)
    policy = rollouts.plan_policy(
        noted_plan_fn,
        jax.device_put(params),
        jax.random.key(SEED.value),
        discretizer=checkpoint.tokenizer,
        spec=checkpoint.config.spec,
        context_transitions=config.context_transitions,
        replan_every=config.replan_every,
        max_batch=NUM_EPISODES.value,
    )
    logging.info("compiling the planner")
    start = rollouts.Episode(seed=0, observations=[np.zeros(checkpoint.config.spec.observation_dim, np.float32)])
    policy([start] * NUM_EPISODES.value)
    plans.clear()
    return policy


# 4. Results


def _draw(workdir, played):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    figures.draw_learning_curve(figure.subplots(), workdir)
    figures.save(figure, workdir / "figures" / "learning_curve.png")

    maze = make_env().unwrapped.maze
    record = played["beam search"]
    positions, goals = record["positions"], record["goals"]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        figures.draw_maze(axes, maze)
    figures.draw_trajectories(left, positions[:6], goals[:6])
    left.set_title("Beam search: executed trajectories of 6 episodes")
    
    far = int(np.argmax(np.linalg.norm(positions[:, 0] - goals, axis=-1)))
    ...


def _mean_and_error(values) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "standard_error": float(np.std(values, ddof=1) / np.sqrt(len(values)))}


def _summarize(record) -> dict:
    return {
        "return": _mean_and_error(record["returns"]),
        "success": _mean_and_error(record["successes"]),
        "ms_per_action": 1000 * float(record["seconds_per_action"]),
        "returns": record["returns"].tolist(),
    }


def _report(workdir):
    """Print the table and say where everything is."""
    results = json.loads((workdir / "results.json").read_text())
    print(f"{results['environment']}, {NUM_EPISODES.value} episodes on the same reset seeds")
    print(f"{'policy':<26}{'return':>16}{'success':>9}{'ms/action':>11}")
    for name, row in results["policies"].items():
        mean, error = row["return"].values()
        print(f"{name:<26}{mean:9.1f} ± {error:4.1f}{row['success']['mean']:9.2f}{row['ms_per_action']:11.2f}")


if __name__ == "__main__":
    entry.run(main)
