"""One run within a given time: train, play the paper's search and what it has to beat, and write what to keep."""

import dataclasses
import functools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.common import control, datasets, entry, figures, files, iql_run, stages, time_budget, transformer_run
from tt_jax import checkpoints, environments, iql, minari_files, rollouts, sequence_planner, trajectories, transformer

IQL_SHARE = 0.3  # of the minutes of training, at most
NUMBERS = ("return", "normalized_score", "success")


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to act with what was trained."""

    title: str
    plan: sequence_planner.PlanConfig | None = None  # None: the policy of IQL
    planner: str = "reward"
    guided: bool = False  # by Q


def ways(plan: sequence_planner.PlanConfig, *, guided: bool) -> dict[str, Way]:
    """Return the ways to compare by name, from cheap to costly; the last is the search with the settings `plan`."""
    few = math.ceil(plan.beam_width / 4)
    fewer = dataclasses.replace(plan, beam_width=few, num_elites=min(plan.num_elites, few))
    one_step = dataclasses.replace(fewer, horizon=1, num_expand=1, replan_every=1, action_cdf=0.0, action_top_k=0)
    by = "by Q" if guided else "by reward"
    found = {
        "medians": Way("one step, medians", sequence_planner.policy_config(plan, "median")),
        "likelihood": Way(f"one step by likelihood, {few} beams", one_step, planner="likelihood"),
        "fewer_beams": Way(f"search {by}, {few} beams, horizon {plan.horizon}", fewer, guided=guided),
        "search": Way(f"search {by}, {plan.beam_width} beams, horizon {plan.horizon}", plan, guided=guided),
    }
    if guided:  # the mean of the better half, see docs/mazes.md
        best = dataclasses.replace(one_step, num_elites=math.ceil(few / 2))
        found = {
            "iql": Way("IQL's policy"),
            "one_step": Way(f"one step by Q, mean of {best.num_elites} of {few}", best, guided=True),
        } | found
    return found


def reproduce(
    experiment: stages.Experiment,
    *,
    minutes: float,
    total_minutes: float,
    num_episodes: int,
    guided: bool,
    download: bool,
) -> None:
    """Train for `minutes`, play every way for what is left of `total_minutes`, and report.

    All `num_episodes` of a way are played in one batch. Those that the clock cuts off count with what they returned
    until then; the same command plays them again.
    """
    ends = time.monotonic() + 60 * total_minutes
    config, workdir = experiment.config, experiment.workdir
    numbers = {"minutes": minutes, "num_episodes": num_episodes, "guided": guided}

    def run():
        _check_environment(config, download)
        _train(experiment, minutes=minutes, guided=guided, download=download)
        _save_small(workdir, guided)
        played = _play_all(experiment, num_episodes, ends, guided)
        found = _describe(experiment, played)
        _draw(workdir, found)
        return found

    found = stages.results(experiment, numbers, run, is_complete=lambda parts: parts["complete"])
    stages.report(experiment, _table(found), "curves.png")


def _check_environment(config, download):
    """Raise UsageError, before any work, if nothing could be played."""
    minari_files.open_storage(config.dataset, download=download)
    run = {"env_spec": minari_files.evaluation_spec(config.dataset), "data": config.data.to_dict()}
    try:
        control.make_env(run, goal=config.eval.goal).close()
    except environments.Unavailable as error:
        raise entry.UsageError(f"{error}; what was trained is played in the environment of the data.") from error


def _train(experiment, *, minutes, guided, download):
    """Train IQL, if it guides, and the transformer for what is left of the minutes."""
    ends = time.monotonic() + 60 * minutes
    if guided:
        with stages.stage("train IQL"):
            folder = str(experiment.workdir / "iql")
            config = experiment.config.copy_and_resolve_references()
            config.eval.num_episodes = 0  # its policy is played in the end
            config = entry.resolve_config(config, dataset=None, workdir=folder, method="iql")
            settings = {"download": download, "minutes": IQL_SHARE * minutes}
            iql_run.train(config, folder, preemption=experiment.preemption, **settings)
    with stages.stage("train the Trajectory Transformer"):
        folder = str(experiment.workdir / "tt")
        config = entry.resolve_config(experiment.config, dataset=None, workdir=folder)
        left = None if time_budget.is_recorded(folder) else max(0.01, (ends - time.monotonic()) / 60)
        transformer_run.train(config, folder, preemption=experiment.preemption, download=download, minutes=left)


def _restore(workdir):
    return control.restore(str(workdir / "tt"), transformer.TransformerConfig, program="train_tt")


def _restore_learners(workdir, run):
    return control.restore_iql(str(workdir / "iql"), run)


def _save_small(workdir, guided):
    """Save the newest parameters without what training needs beside them: those of the transformer in bfloat16."""
    checkpoint = _restore(workdir)
    halved = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), checkpoint.params)
    kept = {"tt": dataclasses.replace(checkpoint, params=halved)}
    if guided:
        kept["iql"] = control.restore(str(workdir / "iql"), iql.IQLConfig, program="train_iql")
    for name, each in kept.items():
        folder = workdir / "small" / name
        if checkpoints.latest_step(folder) is None:
            parts = {part: getattr(each, part) for part in ("step", "params", "config", "tokenizer", "run")}
            checkpoints.save(folder, **parts)


def _play_all(experiment, num_episodes, ends, guided) -> dict[str, dict]:
    """Play the ways that were not played to their end yet; each gets an equal part of the time that is left."""
    checkpoint = _restore(experiment.workdir)
    learners = _restore_learners(experiment.workdir, checkpoint.run) if guided else None
    discount = learners.config.discount if guided else checkpoint.run["data"]["discount"]
    plan = control.plan_config(experiment.config, guided=guided, discount=discount)
    played, waiting = {}, ways(plan, guided=guided)
    for name, way in list(waiting.items()):
        deadline = time.monotonic() + (ends - time.monotonic()) / len(waiting)
        del waiting[name]
        path = experiment.workdir / "played" / f"{name}.json"
        if not path.exists():
            with stages.stage(way.title):
                record = _play(experiment, checkpoint, learners, way, num_episodes, deadline)
            if record["num_cut"]:
                played[name] = record
                continue
            files.write_json(path, record)
        played[name] = json.loads(path.read_text())
    return played


def _play(experiment, checkpoint, learners, way, num_episodes, deadline) -> dict:
    """Play one episode per seed in one batch until the deadline."""
    seed, run = experiment.config.seed, checkpoint.run
    started = time.monotonic()
    make_env = functools.partial(control.make_env, run, goal=experiment.config.eval.goal)
    envs = rollouts.vectorize(make_env, num_episodes)
    if way.plan is None:
        first = jax.tree.map(lambda leaf: leaf[0], learners.params)
        policy = rollouts.observation_policy(control.mean_action_fn(first))
    else:
        settings = {"planner": way.planner, "learners": learners.params if way.guided else None}
        policy = control.plan_policy(checkpoint, way.plan, seed=seed, max_batch=num_episodes, **settings)
    if time.monotonic() < deadline:
        control.compile_policy(policy, checkpoint.config.spec.observation_dim, num_episodes)
    compiled = time.monotonic()
    episodes, counts = control.play(
        envs,
        policy,
        seeds=range(seed, seed + num_episodes),
        config=datasets.data_config(run["data"]),
        title=way.title,
        check_fn=functools.partial(experiment.preemption.check, way.title),
        stop_fn=lambda: time.monotonic() > deadline,
    )
    envs.close()
    seconds = time.monotonic() - compiled
    reference = minari_files.reference_scores(run["dataset"])
    unknown = dict.fromkeys(NUMBERS, {"mean": None, "standard_error": None})
    summary = control.summarize(episodes, reference) if episodes else unknown | {"episodes": []}
    return summary | {
        "title": way.title,
        "plan": way.plan and dataclasses.asdict(way.plan),
        "num_cut": num_episodes - sum(not episode.is_cut for episode in episodes),
        "compile_seconds": compiled - started,
        "seconds": seconds,
        "actions_per_second": counts["actions"] / seconds,
    }


def _describe(experiment, played) -> dict:
    """Put together what results.json holds."""
    workdir, checkpoint = experiment.workdir, _restore(experiment.workdir)
    run = checkpoint.run
    data = trajectories.load(run["dataset"], config=datasets.data_config(run["data"]))
    returns = np.add.reduceat(data.rewards, data.offsets[:-1])
    _, losses = figures.read_metrics(workdir / "tt", "eval/loss")
    files = [path for path in (workdir / "small").rglob("*") if path.is_file()]
    return {
        "dataset": run["dataset"],
        "data": {"episodes": len(returns), "return": control.mean_and_error(returns.tolist())},
        "updates": checkpoint.step,
        "windows": checkpoint.step * run["train"]["batch_size"],
        "held_out_losses": losses,
        "small_checkpoint_bytes": sum(path.stat().st_size for path in files),
        "policies": played,
        "complete": not any(record["num_cut"] for record in played.values()),
    }


def _draw(workdir: pathlib.Path, found: dict):
    """Draw the learning curve, and the returns with their standard errors."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figures.draw_learning_curve(left, workdir / "tt")
    rows = [record for record in found["policies"].values() if record["return"]["mean"] is not None]
    errors = [row["return"]["standard_error"] or 0.0 for row in rows]
    right.barh([row["title"] for row in rows], [row["return"]["mean"] for row in rows], xerr=errors, color=figures.BLUE)
    right.axvline(found["data"]["return"]["mean"], color="0.4", linestyle="--", label="mean of the data")
    right.invert_yaxis()
    right.set(xlabel="return", title=found["dataset"])
    right.legend(frameon=False)
    figures.save(figure, workdir / "figures" / "curves.png")


def _table(results) -> list[str]:
    """Return the lines to print."""
    data, settings = results["data"], results["settings"]
    losses = results["held_out_losses"]
    lines = [
        f"{results['dataset']}: {data['episodes']} episodes with a return of {_number(data['return'])}",
        f"{results['updates']} updates, {results['windows']:.3g} windows, in {settings['minutes']:g} minutes on "
        f"{results['device']}" + (f", held-out loss {losses[-1]:.3f} (least {min(losses):.3f})" if losses else ""),
        f"  {'':<45}{'return':>15}{'normalised':>15}{'success':>15}",
    ]
    for record in results["policies"].values():
        cut = f"  {record['num_cut']} of {settings['num_episodes']} cut off by the clock" if record["num_cut"] else ""
        lines.append(f"  {record['title']:<45}" + "".join(f"{_number(record[n]):>15}" for n in NUMBERS) + cut)
    return [*lines, f"checkpoint without optimizer, {results['small_checkpoint_bytes'] / 2**20:.1f} MiB: small/"]


def _number(statistic):
    mean, error = statistic["mean"], statistic["standard_error"]
    return "-" if mean is None else f"{mean:.4g}" + ("" if error is None else f" ± {error:.3g}")
