"""Runs of several processes: the losses of one, checkpoints for any number, a lost process, other data on one host."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from entry_points import FAST_COMPILATION, MAZE, ROOT, read_metrics

from tt_jax import checkpoints

pytest_plugins = ["entry_fixtures"]
pytestmark = pytest.mark.slow

SHAPES = [(1, 4), (2, 2), (4, 1)]  # processes x devices of each
SETTINGS = {
    "train_tt": [*MAZE, "--config.train.num_steps=50", "--config.train.log_every=5", "--config.train.eval_every=50"],
    "train_iql": [
        *(setting for setting in MAZE if "train." not in setting),
        "--config.iql.hidden_dims=(16,16)",
        "--config.iql_train.num_steps=50",
        "--config.iql_train.batch_size=16",
        "--config.iql_train.steps_per_call=5",
        "--config.iql_train.log_every=5",
        "--config.iql_train.checkpoint_every=20",
        "--config.eval.num_episodes=0",
        "--num_seeds=2",
    ],
}
SAME = ["--config.iql.actor_cosine=False"]  # the rate of IQL's policy would follow the number of steps


@pytest.fixture
def launch(datasets, tmp_path):
    """Return a function that starts a command in so many processes with so many devices each."""

    def start(program, *arguments, processes, devices=1, **variables):
        environment = os.environ | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "MINARI_DATASETS_PATH": str(datasets),
            "NUM_PROCESSES": str(processes),
            "NUM_DEVICES": str(devices),
            "XLA_FLAGS": FAST_COMPILATION,
        }
        script = "multi_process" if processes > 1 else "local"
        command = [f"{ROOT}/launch/{script}.sh", f"experiments.{program}", *arguments]
        environment |= variables
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)

    return start


def finish(process):
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, (output, errors)
    return output


def losses(workdir, program):
    name = "train/loss" if program == "train_tt" else "train/value_loss"
    return [line[name] for line in read_metrics(workdir)]


@pytest.mark.parametrize("program", SETTINGS)
def test_processes_and_devices_change_no_loss(launch, tmp_path, program):
    one = tmp_path / "1x1"
    finish(launch(program, *SETTINGS[program], f"--workdir={one}", processes=1))
    assert len(losses(one, program)) == 10
    for processes, devices in SHAPES:
        workdir = tmp_path / f"{processes}x{devices}"
        shape = {"processes": processes, "devices": devices}
        output = finish(launch(program, *SETTINGS[program], f"--workdir={workdir}", **shape))
        assert f"4 x cpu (cpu), {processes} process" in output
        np.testing.assert_allclose(losses(workdir, program), losses(one, program), rtol=1e-4)


@pytest.mark.parametrize("program", SETTINGS)
def test_a_checkpoint_of_any_shape_goes_on_with_any_other(launch, tmp_path, program):
    one, other = tmp_path / "one", tmp_path / "other"
    finish(launch(program, *SETTINGS[program], *SAME, f"--workdir={one}", processes=1))
    part = "train" if program == "train_tt" else "iql_train"
    for num_steps, (processes, devices) in zip((10, 20, 30, 50), [(4, 1), (2, 2), (1, 4), (1, 1)], strict=True):
        arguments = [*SETTINGS[program], *SAME, f"--config.{part}.num_steps={num_steps}", f"--workdir={other}"]
        finish(launch(program, *arguments, processes=processes, devices=devices))
        assert checkpoints.latest_step(other) == num_steps
    np.testing.assert_allclose(losses(other, program), losses(one, program), rtol=1e-4)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_told_in_one_line_and_all_start_again(launch, tmp_path, lost):
    workdir = tmp_path / "run"
    arguments = [*SETTINGS["train_tt"], f"--workdir={workdir}", "--config.train.num_steps=100"]
    process = launch("train_tt", *arguments, "--config.train.checkpoint_every=5", processes=2)
    while (checkpoints.latest_step(workdir) or 0) < 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        command = path.read_bytes().split(b"\0") if path.exists() else []
        if f"--process_id={lost}".encode() in command and f"--workdir={workdir}".encode() in command:
            os.kill(int(path.parent.name), signal.SIGKILL)
            break
    started = time.monotonic()
    while "was lost" not in (workdir / "logs" / f"{1 - lost}.log").read_text():
        assert time.monotonic() - started < 60
        time.sleep(0.1)
    output = finish(process)
    log = (workdir / "logs" / f"{1 - lost}.log").read_text()
    assert log.count("another process of this run was lost; start all of them again to go on.") == 1
    assert "stack trace" not in log and "Traceback" not in log
    assert "resuming" in output and checkpoints.latest_step(workdir) == 100


def test_a_process_that_is_told_something_else_is_named(datasets, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"MINARI_DATASETS_PATH": str(datasets), "XLA_FLAGS": FAST_COMPILATION}
    command = [sys.executable, "-m", "experiments.train_tt", *SETTINGS["train_tt"], f"--workdir={tmp_path}"]
    command += [f"--coordinator_address={address}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}", f"--config.data.eval_fraction={fraction}"],
            **{"cwd": ROOT, "env": environment, "stdout": -1, "stderr": -1, "text": True},
        )
        for i, fraction in enumerate((0.1, 0.5))
    ]
    results = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], results
    for _, errors in results:
        assert f"process 1 on {os.uname().nodename} has another data and another configuration than" in errors


def test_processes_plan_what_one_plans(launch, trained, tmp_path):
    arguments = [f"--workdir={trained}", "--num_episodes=5", "--num_envs=2", "--plan.horizon=2", "--plan.beam_width=3"]
    results = []
    for processes, devices in [(1, 1), (1, 4), (2, 2)]:
        out = tmp_path / f"{processes}x{devices}.json"
        logs = {"LOGS": str(tmp_path / "logs")}
        finish(launch("plan", *arguments, f"--out={out}", processes=processes, devices=devices, **logs))
        results.append(json.loads(out.read_text()))
    assert [episode["seed"] for episode in results[0]["episodes"]] == list(range(5))
    for other in results[1:]:
        assert other["episodes"] == results[0]["episodes"]
        assert other["num_plans"] == results[0]["num_plans"] == 5 * 24
