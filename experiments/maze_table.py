"""Compare behaviour cloning, IQL's policy and the Trajectory Transformer, alone and guided by IQL's Q, in a maze.

python -m experiments.maze_table --config=experiments/configs/antmaze.py:medium-diverse-cpu --workdir=runs/antmaze
    [--dataset=ID --config.eval.goal="(10.0, -10.0)" --seed=0 --num_seeds=3 --num_episodes=50]

Trains what is not trained yet, lets every method play the same reset seeds, and writes results.json with every episode
and figures: the paths of each method in the maze, with V as a heat map beneath, and success while IQL was trained. The
same command goes on where it was interrupted.
"""

import json
import pathlib
import time

import jax
import ml_collections
import numpy as np
from absl import flags, logging
from matplotlib.figure import Figure

from experiments import train_iql, train_tt
from experiments.common import control, datasets, entry, figures, stages, training_loop
from tt_jax import iql, rollouts, sequence_planner, trajectories, transformer

CONFIG, DATASET, WORKDIR = training_loop.CONFIG, training_loop.DATASET, training_loop.WORKDIR
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first training and of the first episode.", 0)
NUM_EPISODES = flags.DEFINE_integer("num_episodes", 50, "Episodes that each trained model plays.", 2)
NUM_ENVS = flags.DEFINE_integer("num_envs", 25, "Environments that are played in step.", 1)

METHODS = {  # title by name
    "bc": "behaviour cloning",
    "iql": "IQL",
    "tt": "Trajectory Transformer",
    "tt_q": "Trajectory Transformer + Q",
}
SHOWN_EPISODES = 20  # of each method in the figure


def main(_):
    preemption = entry.Preemption()
    if not CONFIG.value or not WORKDIR.value:
        raise entry.UsageError("--config and --workdir are needed.")
    CONFIG.value.dataset = DATASET.value or CONFIG.value.dataset
    compare(CONFIG.value, pathlib.Path(WORKDIR.value), preemption=preemption)


def compare(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, preemption: entry.Preemption) -> None:
    """Train, play, and report, as the flags and `config` say; what is done is not done again."""
    num_seeds = train_iql.NUM_SEEDS.value or config.iql_train.num_seeds
    with config.unlocked():
        config.seed, config.iql_train.num_seeds = SEED.value, num_seeds
    flag_values = {flag.name: flag.value for flag in (SEED, NUM_EPISODES)}
    settings = flag_values | {"num_seeds": num_seeds, "config": config.to_dict()}
    if stages.is_done(workdir, settings):
        _report(workdir)
        return
    started = time.time()
    seeds = range(SEED.value, SEED.value + num_seeds)
    for name in ("bc", "iql"):
        with stages.stage(f"train {METHODS[name]}, {num_seeds} seeds"):
            _train_iql(config, workdir, name, preemption)
    for seed in seeds:
        with stages.stage(f"train the Trajectory Transformer, seed {seed}"):
            run_config = config.copy_and_resolve_references()
            run_config.seed = seed
            folder = str(workdir / f"tt_{seed}")
            resolved = entry.resolve_config(run_config, dataset=None, workdir=folder)
            train_tt.train(resolved, folder, preemption=preemption, download=training_loop.DOWNLOAD.value)
    with stages.stage("play"):
        played = {
            name: [_play(config, workdir, name, learner, seed, preemption) for learner, seed in enumerate(seeds)]
            for name in METHODS
        }
    data = trajectories.load(config.dataset, config=datasets.data_config(config.data))
    with stages.stage("draw figures"):
        _draw(config, workdir, played, data)
    results = {
        "dataset": config.dataset,
        "data": _describe_data(config, workdir, data),
        "methods": {name: _summarize(records) for name, records in played.items()},
        "wall_time_s": time.time() - started,  # of what was left to do
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": settings,
    }
    stages.write_json(workdir / "results.json", results)
    _report(workdir)


def _train_iql(config, workdir, name, preemption):
    run_config = config.copy_and_resolve_references()
    if name == "bc":  # the policy's weights exp(0 * advantage) are all 1
        run_config.iql.temperature = 0.0
        run_config.iql_train.num_steps = config.table.bc_steps
    resolved = entry.resolve_config(run_config, dataset=None, workdir=str(workdir / name))
    train_iql.train(resolved, str(workdir / name), preemption=preemption, download=training_loop.DOWNLOAD.value)


def _play(config, workdir, name, learner, seed, preemption) -> dict[str, np.ndarray]:
    """Play the episodes with one trained model, or read what was played before."""
    path = workdir / "episodes" / f"{name}_{seed}.npz"
    if not path.exists():
        envs = _make_envs(config, workdir, min(NUM_ENVS.value, NUM_EPISODES.value))
        policy = _make_policy(config, workdir, name, learner, seed, envs.num_envs)

        episodes, _ = control.play(
            envs,
            policy,
            seeds=range(SEED.value, SEED.value + NUM_EPISODES.value),
            config=datasets.data_config(config.data),
            title=f"{METHODS[name]}, seed {seed}",
            check=lambda: preemption.check(METHODS[name]),
        )
        envs.close()
        longest = max(episode.length for episode in episodes)
        positions = np.full((len(episodes), longest + 1, 2), np.nan, np.float32)
        for row, episode in zip(positions, episodes, strict=True):
            row[: episode.length + 1] = np.stack(episode.observations)[:, :2]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("unfinished.npz")
        np.savez(
            temporary,
            seeds=[episode.seed for episode in episodes],
            successes=[bool(episode.success) for episode in episodes],
            lengths=[episode.length for episode in episodes],
            positions=positions,
        )
        temporary.replace(path)
    with np.load(path) as file:
        return dict(file)


def _make_envs(config, workdir, num_envs):
    run = control.restore(str(workdir / "iql"), iql.IQLConfig, program="train_iql").run
    return rollouts.vectorize(lambda: control.make_env(run, goal=config.eval.goal), num_envs)


def _make_policy(config, workdir, name, learner, seed, num_envs) -> rollouts.Policy:
    if name in ("bc", "iql"):
        checkpoint = control.restore(str(workdir / name), iql.IQLConfig, program="train_iql")
        learners = control.stack_learners(checkpoint.params)
        return rollouts.observation_policy(control.mean_action_fn(jax.tree.map(lambda leaf: leaf[learner], learners)))
    checkpoint = control.restore(str(workdir / f"tt_{seed}"), transformer.TransformerConfig, program="train_tt")
    learners, discount = None, config.data.discount
    if name == "tt_q":
        guide = control.restore_iql(str(workdir / "iql"), checkpoint.run)
        learners, discount = jax.tree.map(lambda leaf: leaf[learner : learner + 1], guide.params), guide.config.discount
    plan_config = entry.to_dataclass(sequence_planner.PlanConfig, config.plan, discount=discount)
    policy = control.plan_policy(checkpoint, plan_config, seed=seed, max_batch=num_envs, learners=learners)
    logging.info("compiling the planner")
    control.compile_policy(policy, checkpoint.config.spec.observation_dim, num_envs)
    return policy


def _describe_data(config, workdir, data) -> dict:
    """Count the episodes, those that reach the goal, and those that do so from the evaluation's start cell."""
    envs = _make_envs(config, workdir, 1)
    maze = envs.envs[0].unwrapped.maze
    envs.close()
    starts = data.observations[data.offsets[:-1], :2]
    distance = np.abs(starts[:, None] - np.array(maze.unique_reset_locations)[None]).max(axis=-1)  # [E, cells]
    from_start = (distance < maze.maze_size_scaling / 2).any(axis=1)
    reached = np.maximum.reduceat(data.rewards, data.offsets[:-1]) > 0
    return {
        "episodes": len(reached),
        "transitions": len(data.rewards),
        "success": float(reached.mean()),
        "episodes_from_start": int(from_start.sum()),
        "success_from_start": float(reached[from_start].mean()) if from_start.any() else None,
    }


def _summarize(records) -> dict:
    """Average the success over the training seeds; with one seed the error is that of its episodes."""
    by_seed = [float(record["successes"].mean()) for record in records]
    each = by_seed if len(by_seed) > 1 else records[0]["successes"].astype(float).tolist()
    episodes = [
        {"training": index, "seed": int(seed), "success": bool(success), "length": int(length)}
        for index, record in enumerate(records)
        for seed, success, length in zip(record["seeds"], record["successes"], record["lengths"], strict=True)
    ]
    return {"success": control.mean_and_error(each), "success_by_seed": by_seed, "episodes": episodes}


def _draw(config, workdir, played, data):
    """Draw the paths of each method over the mean of V at each place, and IQL's success over its updates."""
    checkpoint = control.restore(str(workdir / "iql"), iql.IQLConfig, program="train_iql")
    params = jax.tree.map(lambda leaf: leaf[0], control.stack_learners(checkpoint.params))
    values = np.asarray(jax.jit(iql.values)(params, np.float32(data.observations)))
    envs = _make_envs(config, workdir, 1)
    maze, goal = envs.envs[0].unwrapped.maze, envs.reset(seed=[0])[0]["desired_goal"][0]
    envs.close()
    figure = Figure(figsize=(5 * len(METHODS), 5.5), layout="constrained")
    for axes, (name, records) in zip(figure.subplots(1, len(METHODS)), played.items(), strict=True):
        colours = figures.draw_values(axes, maze, data.observations[:, :2], values)
        figures.draw_maze(axes, maze)
        paths, successes = records[0]["positions"][:SHOWN_EPISODES], records[0]["successes"][:SHOWN_EPISODES]
        line_colours = ["white" if success else "tab:red" for success in successes]
        figures.draw_trajectories(axes, paths, [goal] * len(paths), colours=line_colours)
        share = np.mean([record["successes"].mean() for record in records])
        axes.set_title(f"{METHODS[name]}: {100 * share:.0f}% reach the goal")
    figure.colorbar(colours, ax=axes, label="V (IQL)", shrink=0.8)
    figures.save(figure, workdir / "figures" / "maze.png")

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("bc", "iql"):
        axes.plot(*figures.read_metrics(workdir / name, "eval/success"), "-o", label=METHODS[name])
    axes.set(xlabel="updates", ylabel="success of the policy", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figures.save(figure, workdir / "figures" / "iql_curve.png")


def _report(workdir):
    """Print the table and say where everything is."""
    results = json.loads((workdir / "results.json").read_text())
    data, settings = results["data"], results["settings"]
    print(
        f"{results['dataset']}: {data['episodes']} episodes, {100 * data['success']:.1f}% of them reach the goal, and "
        f"{100 * (data['success_from_start'] or 0):.1f}% of the {data['episodes_from_start']} from the start cell"
    )
    print(f"{settings['num_episodes']} episodes for each of {settings['num_seeds']} trainings")
    for name, row in results["methods"].items():
        mean, error = row["success"]["mean"], row["success"]["standard_error"]
        print(f"  {METHODS[name]:<28}{100 * mean:6.1f}% ± {100 * error:.1f}")
    print(f"figures: {workdir / 'figures'}\nnumbers: {workdir / 'results.json'}")


if __name__ == "__main__":
    entry.run(main)
