"""Behaviour cloning, IQL's policy and the Trajectory Transformer, alone and guided by IQL's Q, compared in a maze."""

import functools

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.common import control, datasets, entry, figures, iql_run, stages, transformer_run
from tt_jax import iql, rollouts, trajectories, transformer

METHODS = {  # title by name
    "bc": "behaviour cloning",
    "iql": "IQL",
    "tt": "Trajectory Transformer",
    "tt_q": "Trajectory Transformer + Q",
}
SHOWN_EPISODES = 20  # of each method in the figure


def compare(
    experiment: stages.Experiment, *, num_seeds: int | None, num_episodes: int, num_envs: int, download: bool
) -> None:
    """Train every method, let it play, and report; what is done is not done again.

    `num_seeds` trainings of each method (None: as the configuration says), from its seed on, play the same episodes,
    whose reset seeds go on from there, too.
    """
    config, seed = experiment.config, experiment.config.seed
    num_seeds = config.iql_train.num_seeds = num_seeds or config.iql_train.num_seeds
    numbers = {"seed": seed, "num_episodes": num_episodes, "num_seeds": num_seeds}
    seeds = range(seed, seed + num_seeds)

    def run():
        train = functools.partial(_train, experiment, download=download)
        for name in ("bc", "iql"):
            with stages.stage(f"train {METHODS[name]}, {num_seeds} seeds"):
                train(name)
        for each in seeds:
            with stages.stage(f"train the Trajectory Transformer, seed {each}"):
                train(f"tt_{each}", seed=each)
        play = functools.partial(_play, experiment, range(seed, seed + num_episodes), min(num_envs, num_episodes))
        with stages.stage("play"):
            played = {name: [play(name, i, each) for i, each in enumerate(seeds)] for name in METHODS}
        data = trajectories.load(config.dataset, config=datasets.data_config(config.data))
        with stages.stage("draw figures"):
            _draw_paths(experiment, played, data)
            _draw_curves(experiment.workdir)
        return {
            "dataset": config.dataset,
            "data": _describe_data(experiment, data),
            "methods": {name: _summarize(records) for name, records in played.items()},
        }

    stages.report(experiment, _table(stages.results(experiment, numbers, run)))


def _train(experiment, name, *, seed=None, download):
    """Train the learners of "bc" or "iql", or one transformer with its own seed, in the folder `name`."""
    run_config, folder = experiment.config.copy_and_resolve_references(), str(experiment.workdir / name)
    if seed is not None:
        run_config.seed = seed
    if name == "bc":  # the policy's weights exp(0 * advantage) are all 1
        run_config.iql.temperature = 0.0
        run_config.iql_train.num_steps = run_config.table.bc_steps
    resolved = entry.resolve_config(run_config, dataset=None, workdir=folder)
    train = iql_run.train if name in METHODS else transformer_run.train
    train(resolved, folder, preemption=experiment.preemption, download=download)


def _play(experiment, reset_seeds, num_envs, name, learner, seed) -> dict[str, np.ndarray]:
    """Play the episodes with one trained model, or read what was played before."""
    title = f"{METHODS[name]}, seed {seed}"

    def play():
        policy, make_env = _make_policy(experiment, name, learner, seed, num_envs), _make_env_fn(experiment)
        episodes, _ = stages.play(experiment, make_env, policy, reset_seeds, title=title, num_envs=num_envs)
        longest = max(episode.length for episode in episodes)
        positions = np.full((len(episodes), longest + 1, 2), np.nan, np.float32)
        for row, episode in zip(positions, episodes, strict=True):
            row[: episode.length + 1] = np.stack(episode.observations)[:, :2]
        return {
            "seeds": [episode.seed for episode in episodes],
            "successes": [bool(episode.success) for episode in episodes],
            "lengths": [episode.length for episode in episodes],
            "positions": positions,
        }

    return stages.once(experiment.workdir / "episodes" / f"{name}_{seed}.npz", play, title=title)


def _make_env_fn(experiment):
    run = _restore_learners(experiment, "iql").run
    return functools.partial(control.make_env, run, goal=experiment.config.eval.goal)


def _restore_learners(experiment, name):
    return control.restore(str(experiment.workdir / name), iql.IQLConfig, program="train_iql")


def _make_policy(experiment, name, learner, seed, num_envs) -> rollouts.Policy:
    if name in ("bc", "iql"):
        learners = control.stack_learners(_restore_learners(experiment, name).params)
        return rollouts.observation_policy(control.mean_action_fn(jax.tree.map(lambda leaf: leaf[learner], learners)))
    folder, guidance = str(experiment.workdir / f"tt_{seed}"), {}
    checkpoint = control.restore(folder, transformer.TransformerConfig, program="train_tt")
    if name == "tt_q":
        guide = control.restore_iql(str(experiment.workdir / "iql"), checkpoint.run)
        learners = jax.tree.map(lambda leaf: leaf[learner : learner + 1], guide.params)
        guidance = {"learners": learners, "discount": guide.config.discount}
    return stages.planner(experiment, checkpoint, seed=seed, max_batch=num_envs, **guidance)


def _describe_data(experiment, data) -> dict:
    """Count the episodes, those that reach the goal, and those that do so from the evaluation's start cell."""
    maze = _make_env_fn(experiment)().unwrapped.maze
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


def _draw_paths(experiment, played, data):
    """Draw the paths of each method over the mean of V at each place."""
    params = control.stack_learners(_restore_learners(experiment, "iql").params)
    params = jax.tree.map(lambda leaf: leaf[0], params)
    values = np.asarray(jax.jit(iql.values)(params, np.float32(data.observations)))
    env = _make_env_fn(experiment)()
    maze, goal = env.unwrapped.maze, env.reset(seed=0)[0]["desired_goal"]
    figure = Figure(figsize=(5 * len(METHODS), 5.5), layout="constrained")
    for axes, (name, records) in zip(figure.subplots(1, len(METHODS)), played.items(), strict=True):
        colours = figures.draw_values(axes, maze, data.observations[:, :2], values)
        figures.draw_maze(axes, maze)
        paths, successes = records[0]["positions"][:SHOWN_EPISODES], records[0]["successes"][:SHOWN_EPISODES]
        line_colours = ["white" if success else figures.VERMILION for success in successes]
        figures.draw_trajectories(axes, paths, [goal] * len(paths), colours=line_colours)
        share = np.mean([record["successes"].mean() for record in records])
        axes.set_title(f"{METHODS[name]}: {100 * share:.0f}% reach the goal")
    figure.colorbar(colours, ax=axes, label="V (IQL)", shrink=0.8)
    figures.save(figure, experiment.workdir / "figures" / "maze.png")


def _draw_curves(workdir):
    """Draw the success of IQL and of behaviour cloning over their updates."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("bc", "iql"):
        axes.plot(*figures.read_metrics(workdir / name, "eval/success"), "-o", label=METHODS[name])
    axes.set(xlabel="updates", ylabel="success of the policy", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figures.save(figure, workdir / "figures" / "iql_curve.png")


def _table(results) -> list[str]:
    data, settings = results["data"], results["settings"]
    lines = [
        f"{results['dataset']}: {data['episodes']} episodes, {100 * data['success']:.1f}% of them reach the goal, and "
        f"{100 * (data['success_from_start'] or 0):.1f}% of the {data['episodes_from_start']} from the start cell",
        f"{settings['num_episodes']} episodes for each of {settings['num_seeds']} trainings",
    ]
    for name, row in results["methods"].items():
        mean, error = row["success"]["mean"], row["success"]["standard_error"]
        lines.append(f"  {METHODS[name]:<28}{100 * mean:6.1f}% ± {100 * error:.1f}")
    return lines
