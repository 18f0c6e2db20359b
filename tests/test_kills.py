"""Runs that are killed again and again, at any moment, end bit for bit as one that was not."""

import contextlib
import os
import pathlib
import random
import signal
import time

import jax
import numpy as np
import pytest
from entry_points import MAZE, read_metrics

from tt_jax import checkpoints

pytest_plugins = ["entry_fixtures"]

SETTINGS = {
    "train_tt": [*MAZE, "--config.train.checkpoint_every=20"],
    "train_iql": [
        *(setting for setting in MAZE if "train." not in setting),
        "--config.iql.hidden_dims=(16,16)",
        "--config.iql_train.num_steps=1000",
        "--config.iql_train.batch_size=16",
        "--config.iql_train.steps_per_call=20",
        "--config.iql_train.log_every=20",
        "--config.iql_train.checkpoint_every=50",
        "--config.eval.num_episodes=0",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("program, rounds", [("train_tt", 20), ("train_iql", 20)])
def test_kills_at_random_moments_change_nothing(entry_point, tmp_path, program, rounds):
    """Half of them come while a checkpoint is written, some before the first step."""
    train, generator, workdir = entry_point(program), random.Random(rounds), tmp_path / "killed"
    part, steps_per_round = ("train", 140) if program == "train_tt" else ("iql_train", 300)
    settings = [*SETTINGS[program], f"--config.{part}.num_steps={steps_per_round * rounds}"]
    started = time.monotonic()
    assert train(*settings, f"--workdir={tmp_path / 'whole'}").code == 0
    seconds_per_round, kills, saves = (time.monotonic() - started) / rounds, 0, 0

    def time_of_metrics():
        path = workdir / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.exists() else None

    def unfinished():
        return {path.name for path in (workdir / "checkpoints").glob("*tmp*")}

    for index in range(rounds):
        metrics_before, unfinished_before = time_of_metrics(), unfinished()
        child, begun = train.start(*settings, f"--workdir={workdir}"), None
        deadline = time.monotonic() + generator.uniform(0, 2)
        after = generator.uniform(0, seconds_per_round)
        while pathlib.Path(f"/proc/{child}/cwd").exists():
            if begun is None and time_of_metrics() != metrics_before:
                begun = time.monotonic()
            if index % 2 == 0 and unfinished() - unfinished_before:
                break
            if index % 4 == 1 and begun and time.monotonic() > begun + after:
                break
            if index % 4 == 3 and time.monotonic() > deadline:
                break
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed = train.wait()
        assert killed.code in (-signal.SIGKILL, 0), killed.stderr
        kills += killed.code != 0
        saves += bool(unfinished())
    assert kills == rounds and saves, (kills, saves)
    done = train(*settings, f"--workdir={workdir}")
    assert done.code == 0, done.stderr
    one, other = (checkpoints.restore(tmp_path / name) for name in ("whole", "killed"))
    for part in ("params", "state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, part), getattr(other, part))
    steps, expected = ([line["step"] for line in read_metrics(tmp_path / name)] for name in ("killed", "whole"))
    assert steps == expected
