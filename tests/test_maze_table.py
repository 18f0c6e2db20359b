"""The table of methods in a maze, end to end with everything small."""

import json
import pathlib

import numpy as np
import pytest
from entry_points import ROOT

pytest_plugins = ["entry_fixtures"]

SMALL = [
    f"--config={ROOT}/experiments/configs/sparse_maze.py",  # its overrides are known only when it is read late
    "--data_episodes=30",
    "--num_episodes=2",
    "--num_seeds=2",
    "--config.iql.hidden_dims=(8,8)",
    "--config.iql_train.num_steps=40",
    "--config.iql_train.log_every=20",
    "--config.iql_train.eval_every=20",
    "--config.table.bc_steps=20",
    "--config.eval.num_episodes=1",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=8",
    "--config.train.num_steps=10",
    "--config.plan.horizon=2",
    "--config.plan.beam_width=2",
    "--config.plan.replan_every=2",
]


@pytest.fixture(scope="module")
def command(entry_point, tmp_path_factory):
    return entry_point("sparse_maze"), [*SMALL, f"--workdir={tmp_path_factory.mktemp('table')}"]


def test_every_method_plays_the_same_episodes_for_every_seed(command):
    run, arguments = command
    done = run(*arguments)
    assert done.code == 0, done.stderr
    workdir = pathlib.Path(arguments[-1].split("=")[1])
    results = json.loads((workdir / "results.json").read_text())
    assert results["methods"].keys() == {"bc", "iql", "tt", "tt_q"}
    for row in results["methods"].values():
        assert [(e["training"], e["seed"]) for e in row["episodes"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert all(0 < e["length"] <= 150 for e in row["episodes"])
        by_seed = np.mean([[e["success"] for e in row["episodes"] if e["training"] == i] for i in (0, 1)], axis=1)
        assert row["success"]["mean"] == by_seed.mean()
    assert results["data"]["episodes"] == 30
    assert "Trajectory Transformer + Q" in done.stdout
    for name in ("maze", "iql_curve"):
        assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_says_that_it_is_done_and_another_setting_is_refused(command):
    run, arguments = command
    again = run(*arguments)
    assert (again.code, "is done; another --workdir starts anew" in again.stdout) == (0, True)
    other = run(*arguments, "--num_episodes=3")
    assert (other.code, "holds a run with other settings" in other.error) == (2, True)
    other = run(*arguments, "--data_episodes=31")
    assert (other.code, "holds data with {'episodes': 30, 'seed': 0}" in other.error) == (2, True)
