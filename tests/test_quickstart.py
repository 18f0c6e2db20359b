"""The quickstart from start to end, with everything small."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from entry_points import ROOT, EntryPoint

from tt_jax import checkpoints, environments

pytest_plugins = ["entry_fixtures"]

SMALL = [
    "--workdir=run",
    "--data_episodes=4",
    "--num_episodes=2",
    "--config.train.num_steps=6",
    "--config.train.batch_size=8",
    "--config.train.log_every=2",
    "--config.train.eval_every=3",
    "--config.train.checkpoint_every=3",
    "--config.model.num_layers=1",
    "--config.model.num_heads=1",
    "--config.model.embed_dim=8",
    "--config.plan.beam_width=2",
    "--config.plan.replan_every=10",
]
AS_USERS_HAVE_IT = {"XLA_FLAGS": ""}  # compiled as always


@pytest.fixture(scope="module")
def quickstart(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return EntryPoint(module="experiments.quickstart", server=server, folder=folder, environment=AS_USERS_HAVE_IT)


@pytest.fixture(scope="module")
def finished(quickstart):
    """Interrupt the quickstart while it collects, start it again, and return its folder and what both runs said."""
    folder, environment = quickstart.folder, os.environ | AS_USERS_HAVE_IT | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.quickstart", *SMALL]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True) as process:
        while "1/4" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    return folder / "run", (process.returncode, errors), quickstart(*SMALL)


def test_an_interrupted_run_goes_on(finished):
    _, (code, errors), done = finished
    assert code == 75
    assert "quickstart: stopped" in errors and "Traceback" not in errors
    assert done.code == 0, done.stderr


def test_the_run_leaves_data_model_results_and_figures(finished):
    workdir, _, done = finished
    assert "beam search" in done.stdout and "maze.png" in done.stdout
    assert checkpoints.latest_step(workdir) == 6
    assert (workdir / "datasets" / "tt" / "pointmaze" / "quickstart-v0").is_dir()
    for name in ("learning_curve.png", "maze.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    animation = workdir / "figures" / "plans" / "plans.gif"
    assert animation.read_bytes().startswith(b"GIF89a") and animation.stat().st_size < 1_000_000
    assert "figures/plans/plans.gif" in done.stdout
    results = json.loads((workdir / "results.json").read_text())
    assert results["data"]["transitions"] == 240 and results["data"]["episodes"] == 4
    assert list(results["policies"]) == ["random", "behaviour", "behaviour without noise", "beam search"]
    for policy in results["policies"].values():
        assert len(policy["returns"]) == 2
        np.testing.assert_allclose(policy["return"]["mean"], np.mean(policy["returns"]), rtol=1e-12)
        error = abs(policy["returns"][0] - policy["returns"][1]) / 2  # of two numbers
        np.testing.assert_allclose(policy["return"]["standard_error"], error, rtol=1e-9)
        assert policy["ms_per_action"] > 0
    assert results["policies"]["behaviour without noise"]["return"]["mean"] > 150


def test_all_policies_play_the_same_episodes(finished):
    workdir, *_ = finished
    records = [np.load(path) for path in sorted((workdir / "control").glob("*.npz"))]
    assert len(records) == 4
    for record in records:
        np.testing.assert_array_equal(record["observations"][:, 0], records[0]["observations"][:, 0])
        assert record["observations"].shape == (2, 61, 6) and record["actions"].shape == (2, 60, 2)
        np.testing.assert_allclose(record["rewards"].sum(axis=1), record["returns"], rtol=1e-12)


def test_the_checkpoint_brings_the_environment_back(finished):
    workdir, *_ = finished
    text = checkpoints.restore(workdir).run["env_spec"]
    assert "tt_jax.rollouts:ActionRepeat" in text
    before = text.replace("tt_jax.rollouts:ActionRepeat", "experiments.action_repeat:ActionRepeat")  # recorded earlier
    env, earlier = (environments.make_stored(each) for each in (text, before))
    assert earlier.spec == env.spec
    observation, _ = env.reset(seed=0)
    played = np.load(workdir / "control" / "random.npz")
    np.testing.assert_allclose(observation["desired_goal"], played["observations"][0, 0, 4:6], rtol=1e-6)
    rewards = []
    truncated = False
    while not truncated:
        observation, reward, _, truncated, _ = env.step(np.zeros(2, np.float32))
        rewards.append(reward)
    assert len(rewards) == 60
    # without force the point rests, and each of the 5 steps pays exp(-distance)
    distance = np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"])
    np.testing.assert_allclose(rewards, 5 * np.exp(-distance), rtol=1e-6)


def test_a_finished_run_says_so_at_once(quickstart, finished):
    *_, first = finished
    again = quickstart(*SMALL)
    assert again.code == 0, again.stderr
    assert "run is done" in again.stdout
    table = [line for line in first.stdout.splitlines() if line.startswith("beam search")]
    assert table and table[-1] in again.stdout
    assert "collect" not in again.stderr and "train:" not in again.stderr


def test_a_workdir_of_other_settings_is_refused(quickstart, finished):
    refused = quickstart(*SMALL, "--seed=1")
    assert refused.code == 2
    assert "use another --workdir" in refused.error
