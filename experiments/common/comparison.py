"""What others would choose, IQL's policy, and the Trajectory Transformer with and without IQL's Q, on one dataset."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.common import baselines, control, entry, figures, files, iql_run, learner_run, stages, transformer_run
from tt_jax import environments, iql, minari_files, rollouts, trajectories, transformer

LEARNERS = {name: baseline.title for name, baseline in baselines.BASELINES.items()} | {"iql": "IQL"}
METHODS = LEARNERS | {  # title by name
    "tt": "Trajectory Transformer",
    "tt_imitation": "Trajectory Transformer, imitation",
    "tt_q": "Trajectory Transformer + Q",
}
SHOWN_EPISODES = 20  # of each method in the figure of a maze


def compare(
    experiment: stages.Experiment,
    *,
    methods: Sequence[str] | None = None,
    num_seeds: int | None,
    num_episodes: int,
    num_envs: int,
    download: bool,
) -> None:
    """Train every method, let it play, and report; what is done is not done again.

    `num_seeds` trainings of each method (None: as the configuration says of IQL), from its seed on, play the same
    episodes, whose reset seeds go on from there, too. `methods` (None: all) join those that the workdir has. Raises
    UsageError for those that there are not.
    """
    config, seed, workdir = experiment.config, experiment.config.seed, experiment.workdir
    num_seeds = config.iql_train.num_seeds = num_seeds or config.iql_train.num_seeds
    for name in baselines.BASELINES:
        config.baselines[name].train.num_seeds = num_seeds
    numbers = {"seed": seed, "num_episodes": num_episodes, "num_seeds": num_seeds}
    if unknown := set(methods or ()) - METHODS.keys():
        raise entry.UsageError(f"--methods={','.join(sorted(unknown))} must be some of {','.join(METHODS)}.")
    earlier = files.read_json(path)["methods"] if (path := workdir / "results.json").exists() else {}
    methods = [name for name in METHODS if not methods or name in methods or name in earlier]
    seeds = range(seed, seed + num_seeds)

    def run():
        data = learner_run.load(config, method="every baseline", num_seeds=num_seeds, download=download)
        config.data.observation_keys = data.config.observation_keys
        _check(data, methods)
        train = functools.partial(_train, experiment, download=download)
        for name in LEARNERS:
            if name in methods or (name == "iql" and "tt_q" in methods):
                with stages.stage(f"train {METHODS[name]}, {num_seeds} seeds"):
                    train(name)
        for each in seeds:
            for name in dict.fromkeys(_transformer(config, name, each) for name in methods if name not in LEARNERS):
                with stages.stage(f"train the Trajectory Transformer, {name}"):
                    train(name, seed=each)
        reset_seeds, batch = range(seed, seed + num_episodes), min(num_envs, num_episodes)
        play = functools.partial(_play, experiment, data.run, reset_seeds, batch)
        with stages.stage("play"):
            played = {name: [play(name, i, each) for i, each in enumerate(seeds)] for name in methods}
        reference = minari_files.reference_scores(config.dataset)
        summaries = {name: _summarize(records, reference) for name, records in played.items()}
        for name in methods:
            folders = [name] if name in LEARNERS else [_transformer(config, name, each) for each in seeds]
            folders += ["iql"] * (name == "tt_q")
            summaries[name]["training_seconds"] = sum(_training_seconds(workdir / folder) for folder in folders)
        with stages.stage("draw figures"):
            if _maze(data.run):
                _draw_paths(experiment, played, data)
            _draw_bars(workdir, summaries)
            _draw_curves(workdir)
        return {
            "dataset": config.dataset,
            "data": _describe_data(data.run, data.trajectories, reference),
            "methods": summaries,
        }

    done = stages.results(experiment, numbers, run, is_complete=lambda parts: parts["methods"].keys() >= set(methods))
    stages.report(experiment, _table(done))


def _check(data, methods):
    """Raise UsageError, before the training, if there is no environment or a method does not take the actions."""
    try:
        _make_env(data.run).close()
    except environments.Unavailable as error:
        raise entry.UsageError(
            f"{error}; methods are compared in the environment that their dataset names, which must be of gymnasium or "
            "registered on this machine."
        ) from error
    needs_box = [name for name, baseline in baselines.BASELINES.items() if not baseline.takes_discrete]
    if trajectories.action_values(data.trajectories) is not None and not set(needs_box).isdisjoint(methods):
        able = ",".join(name for name in METHODS if name not in needs_box)
        raise entry.UsageError(f"{' and '.join(needs_box)} take no discrete actions; set --methods={able}, or fewer.")


def _transformer(config, name, seed):
    """Return the folder of a method's transformer; Q needs rewards as they are, without the penalty of an end."""
    return f"tt_q_{seed}" if name == "tt_q" and config.data.termination_penalty is not None else f"tt_{seed}"


def _train(experiment, name, *, seed=None, download):
    """Train the learners of one method, or one transformer with its own seed, in the folder `name`."""
    run_config, folder = experiment.config.copy_and_resolve_references(), str(experiment.workdir / name)
    if seed is not None:
        run_config.seed = seed
    if name.startswith("tt_q"):
        run_config.data.termination_penalty = None
    method = name if name in LEARNERS else "tt"
    resolved = entry.resolve_config(run_config, dataset=None, workdir=folder, method=method)
    if name in baselines.BASELINES:
        train = functools.partial(baselines.train, method=name)
    else:
        train = iql_run.train if name == "iql" else transformer_run.train
    train(resolved, folder, preemption=experiment.preemption, download=download)


def _training_seconds(folder):
    """Add up the time between the lines of a run's metrics; evaluations do not count."""
    steps, speeds = figures.read_metrics(folder, "time/steps_per_second")
    return float(np.sum(np.diff([0, *steps]) / speeds))


def _play(experiment, run, reset_seeds, num_envs, name, learner, seed) -> dict[str, np.ndarray]:
    """Play the episodes with one trained model, or read what was played before."""
    title = f"{METHODS[name]}, seed {seed}"

    def play():
        policy = _make_policy(experiment, name, learner, seed, num_envs)
        make_env = functools.partial(_make_env, run)
        episodes, counts = stages.play(experiment, make_env, policy, reset_seeds, title=title, num_envs=num_envs)
        record = {
            "seeds": [episode.seed for episode in episodes],
            "returns": [episode.total_reward for episode in episodes],
            "successes": np.array([episode.success for episode in episodes], float),  # NaN: not known
            "lengths": [episode.length for episode in episodes],
            "seconds_per_action": counts["seconds"] / counts["actions"],
        }
        if _maze(run):
            longest = max(episode.length for episode in episodes)
            record["positions"] = np.full((len(episodes), longest + 1, 2), np.nan, np.float32)
            for row, episode in zip(record["positions"], episodes, strict=True):
                row[: episode.length + 1] = np.stack(episode.observations)[:, :2]
        return record

    return stages.once(experiment.workdir / "episodes" / f"{name}_{seed}.npz", play, title=title)


def _make_env(run):
    return control.make_env(run, goal=run["eval"]["goal"])


def _maze(run):
    """Return the maze of a maze's environment, else None."""
    return getattr(_make_env(run).unwrapped, "maze", None)


def _make_policy(experiment, name, learner, seed, num_envs) -> rollouts.Policy:
    """Return the policy of one training; a Decision Transformer is asked for the first of its targets."""
    if name in LEARNERS:
        checkpoint = baselines.restore(str(experiment.workdir / name))
        return next(iter(baselines.make_policies(checkpoint, learner=learner, max_batch=num_envs).values()))
    folder = str(experiment.workdir / _transformer(experiment.config, name, seed))
    guidance = {"planner": "likelihood" if name == "tt_imitation" else "reward"}
    checkpoint = control.restore(folder, transformer.TransformerConfig, program="train_tt")
    if name == "tt_q":
        guide = control.restore_iql(str(experiment.workdir / "iql"), checkpoint.run)
        learners = jax.tree.map(lambda leaf: leaf[learner : learner + 1], guide.params)
        guidance = {"learners": learners, "discount": guide.config.discount}
    return stages.planner(experiment, checkpoint, seed=seed, max_batch=num_envs, **guidance)


def _describe_data(run, data, reference) -> dict:
    """Describe the episodes; in a maze say how many reach the goal, of all and of those from the evaluation's start."""
    returns = trajectories.returns(data)
    found = {
        "episodes": len(returns),
        "transitions": len(data.rewards),
        "return": control.mean_and_error(returns.tolist()),
        "normalized_score": control.mean_and_error(_normalize(returns, reference)),
    }
    is_sparse = np.isin(data.rewards, (0, 1)).all()  # else a reward does not tell the goal
    if not (is_sparse and (maze := _maze(run))):
        return found
    starts = data.observations[data.offsets[:-1], :2]
    distance = np.abs(starts[:, None] - np.array(maze.unique_reset_locations)[None]).max(axis=-1)  # [E, cells]
    from_start = (distance < maze.maze_size_scaling / 2).any(axis=1)
    reached = np.maximum.reduceat(data.rewards, data.offsets[:-1]) > 0
    return found | {
        "success": float(reached.mean()),
        "episodes_from_start": int(from_start.sum()),
        "success_from_start": float(reached[from_start].mean()) if from_start.any() else None,
    }


def _normalize(returns, reference):
    return [None] if reference is None else 100 * (np.array(returns) - reference[0]) / (reference[1] - reference[0])


def _summarize(records, reference) -> dict:
    """Average over the trainings; with one, the errors are those of its episodes. What is not known is None."""
    returns, successes = (np.stack([record[name] for record in records]) for name in ("returns", "successes"))

    def summarize(values):
        means = values.mean(axis=1).tolist()
        return control.mean_and_error(means if len(means) > 1 else values[0].tolist())

    is_known = not np.isnan(successes).any()
    found = {
        "return": summarize(returns),
        "return_interquartile": control.interquartile_mean(returns),
        "return_by_seed": returns.mean(axis=1).tolist(),
        "normalized_score": control.mean_and_error([None]),
        "success": summarize(successes) if is_known else control.mean_and_error([None]),
        "success_by_seed": successes.mean(axis=1).tolist() if is_known else None,
        "seconds_per_action": float(np.mean([record["seconds_per_action"] for record in records])),
    }
    if reference:
        found["normalized_score"] = summarize(_normalize(returns, reference))
    names = ("seeds", "returns", "successes", "lengths")
    found["episodes"] = [
        {
            "training": index,
            "seed": int(seed),
            "return": float(total),
            "success": bool(success) if is_known else None,
            "length": int(length),
        }
        for index, record in enumerate(records)
        for seed, total, success, length in zip(*(record[name] for name in names), strict=True)
    ]
    return found


def _draw_paths(experiment, played, data):
    """Draw the paths of each method, over the mean of V at each place if IQL was trained."""
    maze, goal = _maze(data.run), _make_env(data.run).reset(seed=0)[0]["desired_goal"]
    folder, observations, values = experiment.workdir / "iql", data.trajectories.observations, None
    if folder.exists():
        params = jax.tree.map(lambda leaf: leaf[0], baselines.restore(str(folder)).params)
        values = np.asarray(jax.jit(iql.values)(params, np.float32(observations)))
    columns = min(4, len(played))
    rows = -(-len(played) // columns)
    figure = Figure(figsize=(5 * columns, 5.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, records) in zip(grid.flat, played.items(), strict=False):
        if values is not None:
            colours = figures.draw_values(axes, maze, observations[:, :2], values)
        figures.draw_maze(axes, maze)
        paths, successes = records[0]["positions"][:SHOWN_EPISODES], records[0]["successes"][:SHOWN_EPISODES]
        line_colours = ["white" if success else figures.BLACK for success in successes]
        figures.draw_trajectories(axes, paths, [goal] * len(paths), colours=line_colours)
        share = np.mean([record["successes"].mean() for record in records])
        axes.set_title(f"{METHODS[name]}: {100 * share:.0f}% reach the goal")
    figure.suptitle("White paths reach the goal, black ones do not")
    for axes in grid.flat[len(played) :]:
        axes.remove()
    if values is not None:
        figure.colorbar(colours, ax=grid, label="V of IQL", shrink=0.8)
    figures.save(figure, experiment.workdir / "figures" / "maze.png")


def _draw_bars(workdir, summaries):
    """Draw success, or the normalised score, or the return of each method as a bar with its standard error."""
    labels = {"success": "success", "normalized_score": "normalised score", "return": "return"}
    first = next(iter(summaries.values()))
    kind = next(kind for kind in labels if first[kind]["mean"] is not None)
    means, errors = ([row[kind][part] or 0.0 for row in summaries.values()] for part in ("mean", "standard_error"))
    figure = Figure(figsize=(1.3 * len(summaries) + 1.5, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = ["0.6" if name in LEARNERS else figures.BLUE for name in summaries]
    axes.bar([METHODS[name].replace(" ", "\n") for name in summaries], means, yerr=errors, capsize=4, color=colours)
    axes.set(ylabel=labels[kind])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figures.save(figure, workdir / "figures" / "bars.png")


def _draw_curves(workdir):
    """Draw what the learners' policies reach while they train, and the held-out losses of the transformers."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    learned = [name for name in LEARNERS if (workdir / name / "metrics.jsonl").exists()]
    kind = "success" if any(figures.read_metrics(workdir / name, "eval/success")[0] for name in learned) else "return"
    for name in learned:
        left.plot(*figures.read_metrics(workdir / name, f"eval/{kind}"), "-o", label=METHODS[name])
    left.set(xlabel="updates", ylabel=f"{kind} of the policy, mean of the seeds")
    for folder in sorted(workdir.glob("tt_*")):
        right.plot(*figures.read_metrics(folder, "eval/loss"), "-o", label=folder.name)
    right.set(xlabel="updates", ylabel="held-out cross-entropy per token (nats)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figures.save(figure, workdir / "figures" / "learning_curves.png")


def _table(results) -> list[str]:
    data, settings = results["data"], results["settings"]
    lines = [f"{results['dataset']}: {data['episodes']} episodes, {data['transitions']} transitions"]
    if "success" in data:
        lines[0] += (
            f"; {100 * data['success']:.1f}% reach the goal, and "
            f"{100 * (data['success_from_start'] or 0):.1f}% of the {data['episodes_from_start']} from the start cell"
        )
    columns = f"{'return':>18}{'interquartile mean':>26}{'score':>15}{'success':>15}{'training':>11}{'action':>11}"
    lines += [
        f"{settings['num_episodes']} episodes for each of {settings['num_seeds']} trainings",
        f"{'':<36}{columns}",
        _row("the data", data | {"success": {"mean": data.get("success"), "standard_error": None}}),
    ]
    return lines + [_row(METHODS[name], row) for name, row in results["methods"].items()]


def _row(title, row):
    def both(part, scale=1.0):
        mean, error = part["mean"], part["standard_error"]
        if mean is None:
            return "-"
        return f"{scale * mean:.1f}" + (f" ± {scale * error:.1f}" if error is not None else "")

    middle, seconds, action = (
        row.get(name) for name in ("return_interquartile", "training_seconds", "seconds_per_action")
    )
    return (
        f"  {title:<34}{both(row['return']):>18}"
        + (f"{middle['mean']:.1f} ({middle['low']:.1f} to {middle['high']:.1f})" if middle else "").rjust(26)
        + f"{both(row['normalized_score']):>15}{both(row['success'], 100):>15}"
        + (f"{seconds:9.0f} s{1000 * action:8.1f} ms" if middle else "")
    )
