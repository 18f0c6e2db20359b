"""The stages of experiments in mazes: collect data, train, play, draw, report.

What is done is kept in the workdir, and the same command goes on from there.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
import jax
import matplotlib.figure
import ml_collections
import numpy as np
from absl import logging

from experiments.common import control, datasets, entry, figures, files, recording, settings, signals, transformer_run
from tt_jax import checkpoints, rollouts


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every stage needs."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    preemption: signals.Preemption


def begin(config: ml_collections.ConfigDict, workdir: str, *, seed: int, dataset: str | None) -> Experiment:
    """Put seed and dataset (None: that of `config`) into `config`, and notice signals from now on."""
    preemption = signals.Preemption()
    settings.checked(config)
    entry.check_alone()
    entry.hold(workdir)
    for guided in (False, True):
        window = control.plan_config(config, guided=guided).window
        if max(window) > config.model.max_transitions:
            raise entry.UsageError(
                f"{'guided_' * guided}plan.window={window} exceeds model.max_transitions="
                f"{config.model.max_transitions}; set a smaller window or a larger model."
            )
    config.seed, config.dataset = seed, dataset or config.dataset
    return Experiment(config, pathlib.Path(workdir), preemption)


def results(
    experiment: Experiment,
    numbers: dict,
    make_fn: Callable[[], dict],
    is_complete: Callable[[dict], bool] = lambda parts: True,
) -> dict:
    """Return what results.json in the workdir holds; where there is none, `make_fn()` does the work and returns parts.

    So it does where `is_complete(parts)` says that something is missing.

    Raises UsageError if the workdir was made with another configuration or with other `numbers`.
    """
    workdir = experiment.workdir
    settings = json.loads(json.dumps(numbers | {"config": experiment.config.to_dict()}))
    path = workdir / "settings.json"
    if path.exists() and files.read_json(path) != settings and _has_results(workdir):
        raise entry.UsageError(f"{workdir} holds a run with other settings, see {path}; use another --workdir.")
    files.write_json(path, settings)
    path = workdir / "results.json"
    if path.exists() and is_complete(parts := files.read_json(path)):
        logging.info("%s is done; another --workdir starts anew.", workdir)
        return parts
    started = time.time()
    parts = make_fn() | {
        "wall_time_s": time.time() - started,  # of what was left to do
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": settings,
    }
    files.write_json(path, parts)
    return parts


def _has_results(workdir):
    """Whether anything was made there, other than what tells the settings."""
    files = (path for path in workdir.rglob("*") if path.is_file())
    return any(path.name not in ("settings.json", "config.json", "lock") for path in files)


@contextlib.contextmanager
def stage(title: str):
    """Say when a stage begins and how long it took."""
    logging.info("%s", title)
    started = time.time()
    yield
    logging.info("%s: %.0f s\n", title, time.time() - started)


def once(path: pathlib.Path, make_fn: Callable[[], Any], *, title: str | None = None) -> Any:
    """Return what `path` holds, a JSON value or (.npz) arrays by name; where there is nothing, make and write it."""
    is_json = path.suffix == ".json"
    if path.exists():
        logging.info("%salready done", f"{title}: " if title else "")
    elif is_json:
        files.write_json(path, make_fn())
    else:
        arrays, temporary = make_fn(), path.with_name("unfinished.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **arrays)
        temporary.replace(path)
    if is_json:
        return files.read_json(path)
    try:
        with np.load(path) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise entry.UsageError(f"{path} is damaged ({error}); move it elsewhere, and it is made anew.") from error


def keep_datasets_in(workdir: pathlib.Path) -> None:
    """Let Minari read and write in the workdir, not among the user's own datasets."""
    os.environ["MINARI_DATASETS_PATH"] = str(workdir.resolve() / "datasets")


def learn_and_play(
    experiment: Experiment,
    *,
    numbers: dict[str, int],
    environment: str,
    collect_fn: Callable[[Experiment], dict],
    play_title: str,
    policies: Iterable[str],
    play_fn: Callable[[Experiment, str], Any],
    draw_fn: Callable[[Experiment, dict[str, Any]], None],
    summarize_fn: Callable[[Any], dict],
    download: bool = False,
) -> dict:
    """Collect data, train one Trajectory Transformer on it, play every policy, draw, and return what to report.

    `collect_fn(experiment)` writes the dataset and describes it; `play_fn(experiment, name)` keeps what it played, of
    which `draw_fn(experiment, played)` gets everything by name and `summarize_fn` each policy's part.
    """
    workdir = experiment.workdir

    def run():
        config = entry.resolve_config(experiment.config, dataset=None, workdir=workdir)
        keep_datasets_in(workdir)
        with stage("1/4 collect data with a scripted controller"):
            data = once(workdir / "data.json", lambda: collect_fn(experiment))
        with stage("2/4 train the Trajectory Transformer"):
            transformer_run.train(config, workdir, preemption=experiment.preemption, download=download)
        with stage(f"3/4 {play_title}"):
            played = {name: play_fn(experiment, name) for name in policies}
        with stage("4/4 draw figures"):
            figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
            figures.draw_learning_curve(figure.subplots(), workdir)
            figures.save(figure, workdir / "figures" / "learning_curve.png")
            draw_fn(experiment, played)
        summaries = {name: summarize_fn(each) for name, each in played.items()}
        return {"environment": environment, "data": data, "policies": summaries}

    return results(experiment, numbers, run)


def reset_seeds(seed: int, num_episodes: int, *, of_data: bool = False) -> range:
    """Return the seeds of an experiment's episodes; none of the data is played again."""
    first = 1_000_000 * seed + (10_000 if of_data else 0)
    return range(first, first + num_episodes)


def play(
    experiment: Experiment,
    make_env: Callable[[], gymnasium.Env],
    policy: rollouts.Policy,
    seeds: Sequence[int],
    *,
    title: str,
    num_envs: int = 32,
) -> tuple[list[rollouts.Episode], dict[str, float]]:
    """Play one episode per seed in at most `num_envs` environments until told to stop; see `control.play`.

    Raises entry.Failed if the environment does.
    """
    envs = rollouts.vectorize(lambda: rollouts.Guarded(make_env()), min(len(seeds), num_envs))
    config = datasets.data_config(experiment.config.data)
    check_fn = functools.partial(experiment.preemption.check, title)
    with experiment.preemption.doing(title):
        episodes, counts = control.play(envs, policy, seeds=seeds, config=config, title=title, check_fn=check_fn)
    envs.close()
    _, failures = control.without_failures(episodes)
    control.check_failures(failures, num_episodes=len(seeds))
    return episodes, counts


def collect(
    experiment: Experiment,
    make_env: Callable[[], gymnasium.Env],
    policy: rollouts.Policy,
    seeds: Sequence[int],
    *,
    description: str,
    eval_env: gymnasium.Env | None = None,
    select_fn: Callable[[list[rollouts.Episode]], list[rollouts.Episode]] = list,
) -> list[rollouts.Episode]:
    """Record what `select_fn` keeps of a policy's episodes; what an interruption left of the dataset is replaced."""
    episodes, _ = play(experiment, make_env, policy, seeds, title="collect")
    kept = select_fn(episodes)
    buffers, dataset_id = map(recording.to_buffer, kept), experiment.config.dataset
    recording.write(dataset_id, buffers, env=make_env(), eval_env=eval_env, description=description)
    return kept


def planner(
    experiment: Experiment,
    checkpoint: checkpoints.Checkpoint,
    *,
    max_batch: int,
    discount=None,
    learners=None,
    **kwargs,
) -> rollouts.Policy:
    """Make a `control.plan_policy`, compiled; `discount` is by default that of the data."""
    config = experiment.config
    discount = config.data.discount if discount is None else discount
    plan_config = control.plan_config(config, guided=learners is not None, discount=discount)
    policy = control.plan_policy(checkpoint, plan_config, max_batch=max_batch, learners=learners, **kwargs)
    logging.info("compiling the planner")
    control.compile_policy(policy, checkpoint.config.spec.observation_dim, max_batch)
    return policy


def report(experiment: Experiment, lines: Iterable[str], *figure_names: str) -> None:
    """Print a table's lines and say where everything is."""
    workdir = experiment.workdir
    paths = [str(workdir / "figures" / name) for name in figure_names or [""]]
    print(*lines, f"figures: {', '.join(paths)}", f"numbers: {workdir / 'results.json'}", sep="\n")
