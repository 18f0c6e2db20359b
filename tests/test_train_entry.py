"""Training from the command line: files, resuming, interruptions, devices, and the caller's mistakes."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from entry_points import BOX, FAST_COMPILATION, MAZE, ROOT, damage, read_metrics

from experiments.common import lock
from tt_jax import checkpoints, tokenization, transformer, types

pytest_plugins = ["entry_fixtures"]

LOSSES = {"loss", "loss_observation", "loss_action", "loss_reward", "loss_value"}


def assert_same_training(one, other):
    """Check that two workdirs hold bit for bit the same last checkpoint, and evaluated alike on the way."""
    one, other = ((checkpoints.restore(workdir), read_metrics(workdir)) for workdir in (one, other))
    for part in ("step", "params", "state", "tokenizer"):
        first, second = ({"part": getattr(checkpoint, part)} for checkpoint, _ in (one, other))
        assert jax.tree.structure(first) == jax.tree.structure(second)
        jax.tree.map(np.testing.assert_array_equal, first, second)
    first, second = ([(m["step"], m.get("eval/loss")) for m in metrics] for _, metrics in (one, other))
    assert first == second


def assert_same_losses(one, other, *, at_least=10, interrupted_at=()):
    """Check two runs' metrics over the steps that both of them logged.

    The first line after an interruption is the mean over the steps since then, and left out.
    """
    one, other = ({m["step"]: m for m in read_metrics(workdir)} for workdir in (one, other))
    for step in interrupted_at:
        one.pop(min(logged for logged in one if logged > step))
    steps = sorted(one.keys() & other.keys())
    assert len(steps) >= at_least
    for name in [f"{part}/{loss}" for part in ("train", "eval") for loss in LOSSES]:
        pairs = [
            (one[step][name], other[step][name]) for step in steps if {name} <= one[step].keys() & other[step].keys()
        ]
        assert pairs
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5, err_msg=name)


def test_a_run_leaves_configuration_metrics_and_checkpoints(trained):
    assert {path.name for path in trained.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"}
    config = json.loads((trained / "config.json").read_text())
    assert config["dataset"] == "test/maze-v0"
    assert config["model"]["embed_dim"] == 16
    assert config["train"]["learning_rate"] == 1e-3  # not given on the command line

    metrics = read_metrics(trained)
    assert [line["step"] for line in metrics] == list(range(7, 421, 7))
    assert [line["step"] for line in metrics if "eval/loss" in line] == list(range(14, 421, 14))
    names = {f"train/{name}" for name in LOSSES | {"grad_norm", "learning_rate"}}
    names |= {"step", "time/steps_per_second", "time/tokens_per_second"}
    assert all(set(line) - {f"eval/{name}" for name in LOSSES} == names for line in metrics)
    assert all(np.isfinite(list(line.values())).all() for line in metrics)
    # Uniform guesses among 20 bins and stop cost log(21) = 3.04, actions five times that; a run learns.
    assert metrics[0]["train/loss_observation"] > 2.9
    assert metrics[-1]["train/loss_observation"] < 2.4


def test_the_checkpoint_holds_what_planning_and_resuming_need(trained):
    assert sorted(int(path.name) for path in (trained / "checkpoints").iterdir()) == [360, 400, 420]
    checkpoint = checkpoints.restore(trained)
    assert checkpoint.step == checkpoint.state["step"] == 420
    spec = types.TransitionSpec(observation_dim=6, action_dim=2, num_bins=20)
    config = transformer.TransformerConfig(spec=spec, num_layers=1, num_heads=2, embed_dim=16, max_transitions=3)
    assert checkpoint.config == config
    assert isinstance(checkpoint.tokenizer, tokenization.Discretizer)
    assert checkpoint.tokenizer.thresholds.shape == (10, 21)
    assert checkpoint.tokenizer.thresholds.dtype == np.float64
    fresh = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config=config))
    assert jax.tree.map(np.shape, checkpoint.params) == jax.tree.map(np.shape, fresh)
    assert checkpoint.run["data"]["observation_keys"] == ["observation", "desired_goal"]
    assert "PointMaze_UMaze-v3" in checkpoint.run["env_spec"]


def test_a_finished_run_says_so_and_stays_as_it_is(train, trained):
    before = (trained / "metrics.jsonl").read_text()
    done = train(*MAZE, f"--workdir={trained}")
    assert done.code == 0
    assert f"{trained} is done: 420 of 420 steps." in done.stdout
    assert (trained / "metrics.jsonl").read_text() == before
    assert checkpoints.latest_step(trained) == 420


def test_a_run_from_before_a_setting_existed_goes_on(train, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    del config["model"]["reference_goal_mask"]
    (workdir / "config.json").write_text(json.dumps(config))
    done = train(*MAZE, f"--workdir={workdir}")
    assert done.code == 0, done.stderr
    assert "is done: 420 of 420 steps." in done.stdout
    (workdir / "config.json").write_text(json.dumps(config))
    done = train(*MAZE, f"--workdir={workdir}", "--config.model.reference_goal_mask=True")
    assert done.code == 2
    assert "reference_goal_mask=False" in done.error and "reference_goal_mask=True" in done.error


# Interruptions


def test_a_run_that_was_killed_and_stopped_ends_as_if_it_was_not(train, trained, tmp_path):
    command = [*MAZE, f"--workdir={tmp_path}"]

    def last_logged():
        return max((line["step"] for line in read_metrics(tmp_path)), default=0)

    def is_saving(step):
        return any((tmp_path / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*")) or last_logged() > step + 40

    for moment in ((tmp_path / "config.json").exists, lambda: is_saving(80), lambda: is_saving(160)):
        killed = train.stop_when(moment, signal.SIGKILL, *command)
        assert killed.code == -signal.SIGKILL
    assert 40 <= checkpoints.latest_step(tmp_path) < 420

    for number in (signal.SIGTERM, signal.SIGINT):
        start = last_logged() // 40 * 40 + 50
        stopped = train.stop_when(lambda start=start: last_logged() > start, number, *command)
        step = checkpoints.latest_step(tmp_path)
        assert stopped.code == 75, stopped.stderr
        assert stopped.error == f"train_tt: stopped at step {step}, saved in {tmp_path}; the same command goes on."
        assert start < step < 420

    # What a run wrote after its last checkpoint is dropped; a torn line, too.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 413, "train/loss": 1e9, "eval/loss": 1e9}\n{"step": 420, "trai')
    finished = train(*command)
    assert finished.code == 0, finished.stderr
    assert f"resuming {tmp_path} at step {step}" in finished.stdout
    assert_same_training(tmp_path, trained)
    assert max(line["train/loss"] for line in read_metrics(tmp_path)) < 100


@pytest.mark.slow
def test_a_run_that_was_killed_in_its_first_save_starts_again(train, trained, tmp_path):
    command = [*MAZE, f"--workdir={tmp_path}"]
    killed = train.stop_when((tmp_path / "checkpoints").is_dir, signal.SIGKILL, *command)
    assert killed.code == -signal.SIGKILL
    assert train(*command).code == 0
    assert_same_training(tmp_path, trained)


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(train, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    damage(workdir, 420)
    done = train(*MAZE, f"--workdir={workdir}")
    assert done.code == 0, done.stderr
    assert f"resuming {workdir} at step 400" in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if "damaged" in line)
    assert "checkpoints/420 is damaged: " in line and line.endswith(f"Set aside as {workdir}/damaged/420.")
    assert (workdir / "damaged" / "420" / "arrays").is_dir()
    assert_same_training(workdir, trained)


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_what_was_there(train, tmp_path):
    child = train.start(*MAZE, f"--workdir={tmp_path}", "--config.train.num_steps=4000")
    while (checkpoints.latest_step(tmp_path) or 0) < 80:
        assert pathlib.Path(f"/proc/{child}/cwd").exists(), (train.folder / "stderr").read_text()
        time.sleep(0.01)
    resource.prlimit(child, resource.RLIMIT_FSIZE, (10_000, 10_000))
    started = time.monotonic()
    done = train.wait()
    assert (done.code, time.monotonic() - started < 10) == (1, True)
    assert done.error.startswith("train_tt: ") and "Traceback" not in done.stderr
    assert checkpoints.restore(tmp_path).step >= 80
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines and all(line.endswith("\n") and json.loads(line) for line in lines)


def test_a_workdir_that_another_process_writes_is_refused(train, tmp_path):
    lock.hold(tmp_path)
    done = train(*MAZE, f"--workdir={tmp_path}")
    assert done.code == 2
    assert f"{tmp_path} is written by process {os.getpid()} on " in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


# Devices


def test_four_devices_give_the_losses_of_one(train, trained, tmp_path):
    done = train(*MAZE, f"--workdir={tmp_path}", "--config.train.num_steps=70", devices=4)
    assert done.code == 0, done.stderr
    assert "4 x cpu (cpu), 1 process" in done.stdout
    assert_same_losses(tmp_path, trained)


@pytest.mark.slow
def test_a_run_can_go_on_with_another_number_of_devices(train, trained, tmp_path):
    command = [*MAZE, f"--workdir={tmp_path}"]
    for num_steps, devices in ((35, 4), (77, 2)):
        assert train(*command, f"--config.train.num_steps={num_steps}", devices=devices).code == 0
    assert_same_losses(tmp_path, trained)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_stop_together(trained, datasets, tmp_path):
    workdir = tmp_path / "run"
    command = [f"{ROOT}/launch/multi_process.sh", "experiments.train_tt", *MAZE, f"--workdir={workdir}"]
    command += ["--config.train.num_steps=28"]  # waiting for each other takes much longer than the arithmetic
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "MINARI_DATASETS_PATH": str(datasets),
        "NUM_PROCESSES": "2",
        "NUM_DEVICES": "2",
        "XLA_FLAGS": FAST_COMPILATION,
    }
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as process:
        while not read_metrics(workdir):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=300)
    step = checkpoints.latest_step(workdir)
    assert process.returncode == 75, errors
    assert 7 <= step < 28
    assert "4 x cpu (cpu), 2 processes" in output
    for process_id in range(2):
        log = (workdir / "logs" / f"{process_id}.log").read_text()
        assert log.count(f"stopped at step {step}, saved in {workdir}") == 1
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert checkpoints.latest_step(workdir) == 28
    assert_same_losses(workdir, trained, at_least=3, interrupted_at=[step])


# Data of all kinds


@pytest.mark.parametrize("name, held_out", [("short", 3), pytest.param("single", 0, marks=pytest.mark.slow)])
def test_short_and_single_episodes_train(train, tmp_path, name, held_out):
    few = ["--config.train.num_steps=7", "--config.train.eval_every=7", "--config.data.eval_fraction=0.4"]
    done = train(*BOX, *few, f"--dataset=test/{name}-v0", f"--workdir={tmp_path}")
    assert done.code == 0, done.stderr
    assert f"{held_out} episodes held out" in done.stdout
    (metrics,) = read_metrics(tmp_path)
    assert ("eval/loss" in metrics) == bool(held_out)
    assert np.isfinite(metrics["train/loss"])
    assert checkpoints.restore(tmp_path).run["env_spec"] is None


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.model.embd_dim=3"], "the configuration has no field 'embd_dim'"),
        (["--config.trian.num_steps=1"], "the configuration has no field 'trian'; did you mean \"train\"?"),
        (["--wrokdir=run"], "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
        (["--config.train.num_step=1"], "num_step"),
        (
            ["--config.model.embed_dim=18", "--config.model.num_heads=4"],
            "embed_dim=18 must be a multiple of num_heads=4",
        ),
        (
            ["--config.data.observation_keys=('observation', 'gaol')"],
            "has no gaol; set data.observation_keys to some of",
        ),
        (["--config.data.eval_fraction=1.5"], "data.eval_fraction=1.5 must be in [0, 1)"),
        (["--config.data.num_shards=0"], "data.num_shards=0 must be at least 1."),
        (
            ["--config.data.num_shards=40"],
            "data.num_shards=40 leaves a part without a window, of 18 episodes; set fewer.",
        ),
        (["--config.data.max_path_length=10"], "has 24 steps, more than max_path_length=10"),
        (["--config.train.beta1=1.5"], "train.beta1=1.5 must be in [0, 1)"),
        (["--config.train.weight_decay=-1"], "train.weight_decay=-1.0 must not be negative"),
        (["--config.train.learning_rate=nan"], "--config.train.learning_rate=nan: must be finite"),
        (["--config.data.num_bins=0"], "data.num_bins=0 must be at least 1"),
        (["--config.data.step=24"], "data.step=24 must be less than the 24 steps of the longest episode"),
        (["--config.model.action_weight=-1"], "action_weight=-1.0 must not be negative"),
        (["--config.plan.horizon=0"], "horizon=0 must be at least 1"),
        (["--config.plan.window=(5,)"], "must consist of 2 values of type int"),
        (["--config.iql.hidden_dims=(1.5,)"], "hidden_dims=(1.5,) must consist of any number of values of type int"),
        (["--config.iql.actor_dropout=1"], "actor_dropout=1.0 must be below 1"),
        (["--config.eval.num_episodes=-1"], "eval.num_episodes=-1 must not be negative"),
        (["--config.eval.goal=(1,)"], "eval.goal=(1,) be (x, y)"),
        (["--config.seed=-1"], "seed=-1 must be in [0, 2**32)"),
        (["--config=none.py"], "No such file or directory: 'none.py'"),
        (["--num_processes=2"], "--num_processes and --process_id need --coordinator_address"),
        (["--coordinator_address=here:1", "--num_processes=2", "--process_id=2"], "--process_id=2 must be in [0, 2)"),
        (["--coordinator_address=here", "--num_processes=2", "--process_id=0"], "=here must be HOST:PORT"),
        (["--coordinator_address=here:x", "--num_processes=2", "--process_id=0"], "=here:x must be HOST:PORT"),
        (["--distributed"], "--distributed: no SLURM job or TPU pod is found here"),
        (["--config.ensemble.num_members=0"], "num_members=0 must be positive"),
        (["--config.baselines.dt.num_heads=7"], "baselines.dt.embed_dim=128 must be a multiple of num_heads=7"),
        (["--config.baselines.cql.hidden_dims=(8,-1)"], "baselines.cql.hidden_dims=(8, -1) must be positive"),
        (["--config.baselines.bc.train.batch_size=0"], "baselines.bc.train.batch_size=0 must be at least 1"),
        (["--dataset="], "--dataset is missing"),
        (["--dataset=test/maze"], "test/maze"),
        (["--dataset=test/gone-v0"], "Dataset test/gone-v0 not found"),
        (["--workdir="], "--workdir is missing"),
    ],
)
def test_mistakes_are_told_in_one_line(train, tmp_path, arguments, message):
    done = train(*MAZE, f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.code == 2
    assert done.error.startswith("train_tt: ") and message in done.error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config():\n    return 3", "get_config() must return a ConfigDict, got int."),
        ("def get_config(:", "invalid syntax"),
        ("a = b", "name 'b' is not defined."),
        ("", "has no attribute 'get_config'."),
    ],
)
def test_a_file_that_is_no_configuration_is_named(train, tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    done = train(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path / 'run'}")
    assert done.code == 2 and "mine.py" in done.error and message in done.error


@pytest.mark.parametrize("name, kind", [("checkpoints", "folder"), ("config.json", "file"), ("metrics.jsonl", "file")])
def test_a_workdir_that_holds_something_else_is_refused_before_the_work(train, tmp_path, name, kind):
    if kind == "file":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    done = train(*MAZE, f"--workdir={tmp_path}")
    assert (done.code, done.stdout.count("\n")) == (2, 1)  # nothing was read
    assert f"{tmp_path}/{name} must be a {kind}; move it elsewhere." in done.error


@pytest.mark.parametrize(
    "name, message",
    [
        ("nan", "observation[2] of test/nan-v0 is nan in episode 1, step 4; all data must be finite."),
        ("steps", "Dataset test/steps-v0 has no episode of at least 2 steps, so it holds no training window."),
    ],
)
def test_data_that_cannot_be_used_are_refused(train, tmp_path, name, message):
    done = train(*BOX, f"--dataset=test/{name}-v0", f"--workdir={tmp_path}")
    assert (done.code, done.error) == (2, f"train_tt: {message}")


def test_a_run_goes_on_with_less_memory(train, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    less = ["--config.model.remat=True", "--config.train.microbatch_size=4", "--config.train.num_steps=427"]
    done = train(*MAZE, f"--workdir={tmp_path}/run", *less)
    assert done.code == 0, done.stderr
    assert "resuming" in done.stdout and checkpoints.latest_step(tmp_path / "run") == 427


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset=test/single-v0"], "dataset='test/maze-v0', this run has 'test/single-v0'"),
        (["--config.model.embed_dim=32"], "model.embed_dim=16, this run has 32"),
        (["--config.data.discount=0.9"], "data.discount=0.99, this run has 0.9"),
        (["--config.train.optimizer=muon"], "train.optimizer='adamw', this run has 'muon'"),
    ],
)
def test_a_workdir_keeps_its_dataset_and_model(train, trained, arguments, message):
    before = (trained / "config.json").read_text()
    done = train(*MAZE, f"--workdir={trained}", *arguments)
    assert done.code == 2
    assert done.error.startswith(f"train_tt: {trained} holds checkpoints made with {message}")
    assert (trained / "config.json").read_text() == before


def test_a_batch_that_the_devices_cannot_share_is_refused(train, tmp_path):
    done = train(*MAZE, f"--workdir={tmp_path}", "--config.train.batch_size=6", devices=4)
    message = "batch_size=6 must be a multiple of the 4 devices; set --config.train.batch_size."
    assert (done.code, done.error) == (2, f"train_tt: {message}")


def test_a_loss_that_is_not_finite_stops_the_run(train, trained, tmp_path):
    checkpoint = checkpoints.restore(trained)
    broken = checkpoint.params | {"norm": {name: np.full(16, np.nan, np.float32) for name in ("scale", "bias")}}
    state = checkpoint.state | {"step": np.int32(7)}
    settings = {"config": checkpoint.config, "tokenizer": checkpoint.tokenizer, "run": checkpoint.run}
    checkpoints.save(tmp_path, step=7, params=broken, state=state, **settings)
    done = train(*MAZE, f"--workdir={tmp_path}")
    assert (done.code, done.error) == (1, "train_tt: train/loss is nan at step 8.")
    assert checkpoints.latest_step(tmp_path) == 7
    assert read_metrics(tmp_path) == []


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_is_noticed_before_anything_is_saved(train, tmp_path):
    done = train(*MAZE, f"--workdir={tmp_path}", "--config.train.learning_rate=1e30")
    assert done.code == 1
    assert re.fullmatch(r"train_tt: train/\w+ is (nan|inf) at step [23]\.", done.error)
    assert checkpoints.latest_step(tmp_path) is None
