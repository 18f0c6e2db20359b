"""Baselines from the command line, their policies played, and the comparison with all methods, everything small."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from entry_points import MAZE, ROOT, damage, read_metrics
from scipy import stats

from experiments.common import control
from tt_jax import bc, checkpoints, cql, decision_transformer

pytest_plugins = ["entry_fixtures"]

MODULES = {"bc": bc, "bc10": bc, "dt": decision_transformer, "cql": cql}
SMALL = [
    *MAZE,
    *(f"--config.baselines.{name}.train.num_steps=20" for name in MODULES),
    *(f"--config.baselines.{name}.train.log_every=5" for name in MODULES),
    *(f"--config.baselines.{name}.train.eval_every=10" for name in MODULES),
    *(f"--config.baselines.{name}.hidden_dims=(8,8)" for name in ("bc", "bc10", "cql")),
    "--config.baselines.cql.num_samples=2",
    "--config.baselines.dt.num_layers=1",
    "--config.baselines.dt.embed_dim=8",
    "--config.baselines.dt.window=3",
    "--config.baselines.dt.dropout=0.0",
    "--config.iql.hidden_dims=(8,8)",
    "--config.iql_train.num_steps=20",
    "--config.iql_train.log_every=10",
    "--config.eval.num_episodes=1",
    *(f"--config.model.{name}_dropout=0.0" for name in ("embedding", "attention", "residual")),
    "--config.train.num_steps=10",
    "--config.train.log_every=5",
    "--config.train.eval_every=5",
    "--config.plan.horizon=2",
    "--config.plan.beam_width=2",
]
SPARSE = [
    f"--config={ROOT}/experiments/configs/sparse_maze.py",  # its overrides are known only when it is read late
    "--data_episodes=30",
    "--num_episodes=2",
    "--num_seeds=1",
    "--config.iql.hidden_dims=(8,8)",
    "--config.iql_train.num_steps=20",
    "--config.iql_train.log_every=20",
    "--config.baselines.bc.hidden_dims=(8,8)",
    "--config.baselines.bc.train.num_steps=20",
    "--config.eval.num_episodes=1",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=8",
    "--config.train.num_steps=10",
    "--config.plan.horizon=2",
    "--config.plan.beam_width=2",
    "--config.plan.replan_every=2",
]


@pytest.fixture(scope="module")
def trained(entry_point, tmp_path_factory):
    """Folder with a run of two learners of each baseline, under its name; that of bc goes on from 10 of 20 updates."""
    folder = tmp_path_factory.mktemp("compared")
    short = "--config.baselines.bc.train.num_steps=10"
    for method, *more in [("bc", short), *((name,) for name in MODULES)]:
        done = entry_point("train_baseline")(
            *SMALL, f"--method={method}", f"--workdir={folder / method}", "--num_seeds=2", *more
        )
        assert done.code == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", MODULES)
def test_a_run_leaves_metrics_and_a_checkpoint(trained, method):
    metrics = read_metrics(trained / method)
    assert [line["step"] for line in metrics] == [5, 10, 15, 20]
    assert [line["step"] for line in metrics if "eval/return" in line] == [10, 20]
    assert any(name.endswith("loss") for name in metrics[0])
    checkpoint = checkpoints.restore(trained / method)
    assert isinstance(checkpoint.config, MODULES[method].Config)
    assert (checkpoint.run["method"], checkpoint.config.observation_dim, checkpoint.config.action_dim) == (method, 6, 2)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], checkpoint.params) for i in (0, 1))
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, second)
    assert max(jax.tree.leaves(differences)) > 0
    if method.startswith("bc"):
        assert checkpoint.config.best_share == {"bc": 1.0, "bc10": 0.1}[method]


def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(entry_point, trained, tmp_path):
    done = entry_point("train_baseline")(*SMALL, "--method=bc", f"--workdir={tmp_path}", "--num_seeds=2")
    assert done.code == 0, done.stderr
    resumed, expected = (checkpoints.restore(workdir) for workdir in (trained / "bc", tmp_path))
    for part in ("params", "state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(resumed, part), getattr(expected, part))


def test_play_writes_what_plan_writes_and_a_decision_transformer_plays_every_target(entry_point, trained):
    play = entry_point("play")
    done = play(f"--workdir={trained / 'dt'}", "--num_episodes=3", "--num_envs=2", "--learner=1", "--seed=7")
    assert done.code == 0, done.stderr
    results = json.loads((play.folder / "results.json").read_text())
    assert [episode["seed"] for episode in results["episodes"]] == [7, 8, 9]
    returns = [episode["return"] for episode in results["episodes"]]
    assert results["return"]["mean"] == pytest.approx(np.mean(returns))
    assert (results["checkpoint_step"], results["settings"]["learner"]) == (20, 1)
    assert results["normalized_score"]["mean"] == pytest.approx(100 * (np.mean(returns) - 1) / 8)  # of the dataset
    config = checkpoints.restore(trained / "dt").config
    assert list(results["targets"]) == [f"{target:g}" for target in config.targets] and len(config.targets) == 2
    first, second = results["targets"].values()
    assert first["episodes"] == results["episodes"] and first["return"] != second["return"]
    assert (play(f"--workdir={trained / 'bc'}", "--learner=2")).error.endswith("the learners 0 to 1, not 2.")


def test_play_takes_no_older_checkpoint_unasked(entry_point, trained, tmp_path):
    workdir = shutil.copytree(trained / "bc", tmp_path / "bc")
    shutil.copytree(workdir / "checkpoints" / "20", workdir / "checkpoints" / "30")
    damage(workdir, 30)
    refused = entry_point("play")(f"--workdir={workdir}")
    assert refused.code == 2 and refused.error.endswith(" --step plays another of [10, 20, 30].")
    done = entry_point("play")(f"--workdir={workdir}", "--num_episodes=1", "--step=20", "--out=older.json")
    assert done.code == 0, done.stderr
    results = json.loads((entry_point("play").folder / "older.json").read_text())
    assert (results["checkpoint_step"], results["settings"]["step"]) == (20, 20)


FRAGILE = """
import gymnasium
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv


class Fragile(PointMazeEnv):
    def reset(self, *, seed=None, options=None):
        self.is_broken = seed == 8
        return super().reset(seed=seed)

    def step(self, action):
        if self.is_broken:
            raise OSError("no licence")
        return super().step(action)


gymnasium.register("Fragile-v0", "fragile:Fragile", max_episode_steps=3)
"""


def test_play_keeps_the_episodes_in_which_the_environment_did_not_raise(entry_point, trained):
    play = entry_point("play")
    (play.folder / "fragile.py").write_text(FRAGILE)
    done = play(f"--workdir={trained / 'bc'}", "--num_episodes=3", "--seed=7", "--env=fragile:Fragile-v0")
    assert done.code == 1
    assert done.error == (
        "play: the environment failed in 1 of 3 episodes, first with seed 8 after 0 steps: OSError: no licence; the "
        "others are in results.json."
    )
    results = json.loads((play.folder / "results.json").read_text())
    assert [(episode["seed"], episode["length"]) for episode in results["episodes"]] == [(7, 3), (9, 3)]
    assert results["failures"] == [{"seed": 8, "length": 0, "error": "OSError: no licence"}]


def test_every_method_plays_the_same_episodes_for_every_seed(entry_point, trained):
    compare = entry_point("compare")
    command = [*SMALL, f"--workdir={trained}", "--num_seeds=2", "--num_episodes=3"]
    done = compare(*command, "--methods=bc,iql")
    assert done.code == 0, done.stderr
    assert json.loads((trained / "results.json").read_text())["methods"].keys() == {"bc", "iql"}
    assert f"{trained / 'bc'} is done: 20 of 20 steps" in done.stdout
    done = compare(*command)
    assert done.code == 0, done.stderr
    assert "IQL, seed 1: already done" in done.stdout
    results = json.loads((trained / "results.json").read_text())
    names = ["bc", "bc10", "dt", "cql", "iql", "tt", "tt_imitation", "tt_q"]
    assert list(results["methods"]) == names
    for row in results["methods"].values():
        episodes = row["episodes"]
        assert [(e["training"], e["seed"]) for e in episodes] == [(i, seed) for i in (0, 1) for seed in (0, 1, 2)]
        by_seed = [np.mean([e["return"] for e in episodes if e["training"] == i]) for i in (0, 1)]
        assert row["return"]["mean"] == pytest.approx(np.mean(by_seed))
        assert row["return"]["standard_error"] == pytest.approx(np.abs(by_seed[0] - by_seed[1]) / 2)
        assert row["success"]["mean"] == pytest.approx(np.mean([e["success"] for e in episodes]))
        middle = row["return_interquartile"]
        assert middle["low"] <= middle["mean"] <= middle["high"]
        assert row["training_seconds"] > 0 and row["seconds_per_action"] > 0
    assert results["methods"]["tt"]["episodes"] != results["methods"]["tt_q"]["episodes"]
    assert results["data"]["episodes"] == 20
    assert "Trajectory Transformer + Q" in done.stdout and "the data" in done.stdout
    for name in ("maze", "bars", "learning_curves"):
        assert (trained / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    again = compare(*command, "--methods=cql")
    assert (again.code, "is done; another --workdir starts anew" in again.stdout) == (0, True)
    other = compare(*command, "--seed=1")
    assert (other.code, "holds a run with other settings" in other.error) == (2, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods=bc,sac"], "--methods=sac must be some of bc,bc10,dt,cql,iql,tt,tt_imitation,tt_q"),
        (["--config.baselines.dt.embed_dim=9", "--config.baselines.dt.num_heads=2", "--methods=bc"], "dt.embed_dim=9"),
        (["--config.model.max_transitions=2"], "plan.window=(3, 2) exceeds model.max_transitions=2; set"),
        (["--config.guided_plan.window=(9,2)"], "guided_plan.window=(9, 2) exceeds model.max_transitions="),
        (["--config.guided_plan.num_elites=3"], "num_elites=3 must not exceed beam_width=2."),
        (["--dataset=test/gone-v0"], "Dataset test/gone-v0 not found"),
        (
            ["--dataset=test/within-v0", "--config.data.observation_keys=()"],
            "the dataset names no environment; methods are compared in the environment that their dataset names",
        ),
    ],
    ids=["unknown", "heads", "window", "guided_window", "guided_elites", "dataset", "environment"],
)
def test_mistakes_are_told_in_one_line(entry_point, tmp_path, arguments, message):
    done = entry_point("compare")(*SMALL, f"--workdir={tmp_path}", *arguments)
    assert (done.code, message in done.error) == (2, True), done.stderr
    assert not list(tmp_path.glob("*/checkpoints"))
    # The workdir is free for other settings.
    again = entry_point("compare")(*SMALL, f"--workdir={tmp_path}", "--dataset=test/gone-v0", "--seed=1")
    assert (again.code, "Dataset test/gone-v0 not found" in again.error) == (2, True), again.stderr


@pytest.mark.slow
def test_a_sparse_maze_collects_its_data_and_compares_on_it(entry_point, tmp_path):
    run, arguments = entry_point("sparse_maze"), [*SPARSE, f"--workdir={tmp_path}"]
    done = run(*arguments)
    assert done.code == 0, done.stderr
    results = json.loads((pathlib.Path(tmp_path) / "results.json").read_text())
    assert list(results["methods"]) == ["bc", "iql", "tt", "tt_q"]
    assert all(0 < e["length"] <= 150 for row in results["methods"].values() for e in row["episodes"])
    assert results["data"]["episodes"] == 30
    other = run(*arguments, "--data_episodes=31")
    assert (other.code, "holds data with {'episodes': 30, 'seed': 0}" in other.error) == (2, True)


def test_the_interquartile_mean_leaves_out_a_quarter_at_both_ends():
    scores = np.random.default_rng(1).normal(size=(3, 20)) ** 3
    found = control.interquartile_mean(scores)
    assert found["mean"] == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    apart = control.interquartile_mean(np.repeat([[0.0], [10.0]], 50, axis=1))  # the training decides, not the episode
    assert (apart["low"], apart["high"]) == (0.0, 10.0)
    assert control.interquartile_mean(np.full([3, 5], 2.0)) == {"mean": 2.0, "low": 2.0, "high": 2.0}
