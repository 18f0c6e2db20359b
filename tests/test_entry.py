"""The behaviour that all entry points share: exit codes, one-line errors, configurations, preemption and metrics."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest
from entry_points import ROOT, EntryPoint

from experiments.common import entry, metrics
from tt_jax import checkpoints, types

pytest_plugins = ["entry_fixtures"]

PROGRAM = """
import time
from absl import flags
from ml_collections import config_flags
from experiments.common import entry, metrics, signals

CONFIG = config_flags.DEFINE_config_file("config")
MODE = flags.DEFINE_string("mode", "return", "What to do.")

def main(_):
    if MODE.value == "config":
        print(entry.resolve_config(CONFIG.value, dataset="a/b-v0", workdir="run").data.observation_keys)
    if MODE.value == "value":
        raise ValueError("first line\\nsecond line")
    if MODE.value == "number":
        raise FloatingPointError("train/loss is nan at step 3.")
    if MODE.value == "bug":
        raise KeyError("unforeseen")
    if MODE.value in ("hang", "busy"):
        preemption = signals.Preemption()
        print("waiting", flush=True)
        with preemption.doing("a game" if MODE.value == "hang" else None):
            time.sleep(600)
    if MODE.value == "wait":
        preemption = signals.Preemption()
        print("waiting", flush=True)
        for _ in range(600):
            if preemption.requested():
                raise entry.Interrupted("saved at step 7.")
            time.sleep(0.05)

if __name__ == "__main__":
    entry.run(main)
"""


@pytest.fixture
def program(server, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return EntryPoint(module="program", server=server, folder=tmp_path, environment={})


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--mode=return"], 0, None),
        (["--mdoe=return"], 2, "Unknown command line flag 'mdoe'. Did you mean: mode"),
        (["return"], 2, "unexpected argument 'return'"),
        (["--mode=config", f"--config={ROOT}/experiments/configs/maze.py", "--config.sede=1"], 2, "sede"),
        (["--mode=config", f"--config={ROOT}/experiments/configs/maze.py", "--config.model.num_layers=x"], 2, "x"),
        (["--mode=config", f"--config={ROOT}/experiments/configs/locomotion.py:hoper-medium"], 2, "hoper-medium"),
        (["--mode=config", "--config=no/such/file.py"], 2, "no/such/file.py"),
        (["--mode=config"], 2, "--config is missing"),
        (["--coordinator_address=localhost:1"], 2, "needs --num_processes"),
        (["--mode=value"], 2, "program: first line second line"),
        (["--mode=number"], 1, "train/loss is nan at step 3."),
    ],
)
def test_exit_codes_and_one_line_errors(program, arguments, code, message):
    done = program(*arguments)
    assert done.code == code, done.stderr
    if message is None:
        assert done.stderr == ""
        assert done.stdout.startswith("tt_jax ")
    else:
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_what_was_not_foreseen_shows_its_traceback(program):
    done = program("--mode=bug")
    assert done.code == 1
    assert "Traceback" in done.stderr and "unforeseen" in done.stderr


def test_configuration_fields_can_be_overridden(program, tmp_path):
    keys = "--config.data.observation_keys=('achieved_goal', 'observation')"
    config = f"--config={ROOT}/experiments/configs/maze.py"
    done = program("--mode=config", config, keys, "--config.data.termination_penalty=-1.5", "--config.seed=4")
    assert "('achieved_goal', 'observation')" in done.stdout, done.stderr
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["seed"], saved["dataset"], saved["data"]["termination_penalty"]) == (4, "a/b-v0", -1.5)


def _is_waiting(program):
    output = program.folder / "stdout"
    return output.exists() and "waiting" in output.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_run_save_and_exit_with_75(program, number):
    done = program.stop_when(lambda: _is_waiting(program), number, "--mode=wait")
    assert (done.code, done.stderr) == (75, "program: saved at step 7.\n")


@pytest.mark.parametrize(
    "mode, signals, message",
    [
        ("hang", 1, "stopped in 'a game', which did not answer; the same command does it again."),
        ("busy", 2, "told to stop twice; what was saved before stays."),
    ],
)
def test_a_signal_ends_what_does_not_answer(program, mode, signals, message):
    child = program.start_until(lambda: _is_waiting(program), f"--mode={mode}")
    started = time.monotonic()
    for _ in range(signals):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.6)
        still_runs = pathlib.Path(f"/proc/{child}/cwd").exists()
    done = program.wait()
    assert time.monotonic() - started < 5
    assert still_runs == (mode == "hang")  # once it may be busy with saving
    assert (done.code, done.stderr) == (75, f"program: {message}\n")


def test_a_signal_to_one_of_two_processes_stops_both(program, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    shared = [
        sys.executable,
        str(tmp_path / "program.py"),
        "--mode=wait",
        f"--coordinator_address={address}",
        "--num_processes=2",
    ]
    processes = [
        subprocess.Popen([*shared, f"--process_id={i}"], env=environment, stdout=-1, stderr=-1, text=True)
        for i in range(2)
    ]
    lines = []
    while not lines or "waiting" not in lines[-1]:
        lines.append(processes[1].stdout.readline())
        assert lines[-1], processes[1].communicate()
    processes[1].send_signal(signal.SIGTERM)
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], results
    assert "4 x cpu (cpu), 2 processes" in results[0][0]


# Configurations


def _config(**changes):
    config = ml_collections.ConfigDict(
        {"dataset": "", "seed": 0, "data": {"keys": ("a", "b")}, "model": {"num_layers": 2}, "train": {"num_steps": 5}}
    )
    config.update_from_flattened_dict(changes)
    return config


def _resolve(workdir, *, dataset="a/b-v0", **changes):
    return entry.resolve_config(_config(**changes), dataset=dataset, workdir=workdir)


def test_the_resolved_configuration_is_saved_and_frozen(tmp_path):
    config = _resolve(tmp_path)
    assert config.dataset == "a/b-v0"
    with pytest.raises(AttributeError):
        config.seed = 1
    expected = config.as_configdict().to_dict() | {"method": "tt", "data": {"keys": ["a", "b"]}}
    assert entry.read_config(tmp_path).to_dict() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock"}


def test_a_run_with_checkpoints_keeps_its_dataset_data_and_model(tmp_path):
    _resolve(tmp_path)
    _resolve(tmp_path, **{"model.num_layers": 3})  # nothing was trained yet
    _resolve(tmp_path)
    checkpoints.save(tmp_path, step=1, params={"a": np.ones(1)}, config=types.TransitionSpec(1, 1, 1), tokenizer=None)
    assert _resolve(tmp_path, **{"train.num_steps": 9}).train.num_steps == 9
    with pytest.raises(entry.UsageError, match="dataset='a/b-v0', this run has 'a/c-v0'"):
        _resolve(tmp_path, dataset="a/c-v0")
    with pytest.raises(entry.UsageError, match="model.num_layers=2, this run has 3"):
        _resolve(tmp_path, **{"model.num_layers": 3})
    with pytest.raises(entry.UsageError, match=r"data.keys=\['a', 'b'\], this run has \['a'\]"):
        _resolve(tmp_path, **{"data.keys": ("a",)})


def test_missing_settings_are_named(tmp_path):
    with pytest.raises(entry.UsageError, match="--dataset is missing"):
        _resolve(tmp_path, dataset=None)
    with pytest.raises(entry.UsageError, match="--workdir is missing"):
        _resolve(None)
    with pytest.raises(entry.UsageError, match="there is no run in"):
        entry.read_config(tmp_path)


@dataclasses.dataclass(frozen=True)
class _Record:
    size: int
    keys: tuple = ()
    inner: object = None


def test_to_dataclass_makes_tuples_and_names_unknown_and_missing_fields():
    config = ml_collections.FrozenConfigDict({"size": 3, "keys": ["a", "b"]})
    assert entry.to_dataclass(_Record, config, inner=5) == _Record(3, ("a", "b"), 5)
    with pytest.raises(entry.UsageError, match="_Record has no field 'sise'"):
        entry.to_dataclass(_Record, {"sise": 3})
    with pytest.raises(entry.UsageError, match="_Record.*'size'"):
        entry.to_dataclass(_Record, {})


def test_the_commit_is_that_of_the_source_or_unknown():
    assert entry.commit_id() == "unknown" or len(entry.commit_id().removesuffix("-dirty")) == 40


# Metrics


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_beyond_the_restored_step_are_dropped(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"train/loss": np.float32(step / 4)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')
    writer = metrics.MetricsWriter(tmp_path, resume_step=20)
    writer.write(30, {"train/loss": 1.0})
    writer.close()
    assert _lines(tmp_path) == [
        {"step": 10, "train/loss": 2.5},
        {"step": 20, "train/loss": 5.0},
        {"step": 30, "train/loss": 1.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_metric_that_is_not_finite_names_itself_and_the_step(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    with pytest.raises(FloatingPointError, match="train/loss is nan at step 5"):
        writer.write(5, {"time/seconds": 1.0, "train/loss": float("nan")})
    writer.close()
