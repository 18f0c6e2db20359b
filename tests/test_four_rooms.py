"""The experiment in four rooms from start to end, with everything small."""

import json

import minari
import numpy as np
import pytest
from entry_points import ROOT

from tt_jax import checkpoints, environments

pytest_plugins = ["entry_fixtures"]

SMALL = [
    f"--config={ROOT}/experiments/configs/four_rooms.py",  # its overrides are known only when it is read late
    "--data_episodes=6",
    "--num_episodes=2",
    "--config.data.eval_fraction=0.2",
    "--config.model.num_layers=1",
    "--config.model.num_heads=1",
    "--config.model.embed_dim=8",
    "--config.train.num_steps=6",
    "--config.train.batch_size=8",
    "--config.train.log_every=2",
    "--config.train.eval_every=3",
    "--config.plan.horizon=1",
    "--config.plan.beam_width=2",
]


@pytest.fixture(scope="module")
def four_rooms(entry_point):
    return entry_point("four_rooms")


@pytest.fixture(scope="module")
def finished(four_rooms, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    done = four_rooms(*SMALL, f"--workdir={workdir}")
    assert done.code == 0, done.stderr
    return workdir, done


@pytest.fixture(scope="module")
def maze(finished):
    """Return the maze of the data, in which goals are drawn from the cells marked c."""
    env_spec = checkpoints.restore(finished[0]).run["env_spec"]
    return environments.make_stored(env_spec).unwrapped.maze


def _cell(maze, position):
    row, column = maze.cell_xy_to_rowcol(np.asarray(position))
    return maze.maze_map[row][column]


def test_no_episode_of_the_data_ends_in_a_held_out_cell_and_all_evaluation_goals_do(finished, maze, monkeypatch):
    workdir, _ = finished
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(workdir / "datasets"))
    marks = [mark for row in maze.maze_map for mark in row]
    assert (marks.count("r"), marks.count("c")) == (8, 32)  # held out, and goals of the data
    episodes = list(minari.load_dataset("tt/pointmaze/four-rooms-v0").iterate_episodes())
    data = json.loads((workdir / "data.json").read_text())
    assert len(episodes) == data["episodes"] and data["episodes"] + data["left_out"] == 6
    for episode in episodes:
        last, goal = (episode.observations[name][-2] for name in ("observation", "desired_goal"))
        assert _cell(maze, last[:2]) == _cell(maze, goal) == "c"
        if len(episode) < 60:  # rests in its goal
            assert np.linalg.norm(last[:2] - goal) < 0.2 and np.linalg.norm(last[2:]) < 0.5
    policies = json.loads((workdir / "results.json").read_text())["policies"]
    for name, policy in policies.items():
        mark = "c" if "data" in name else "r"
        assert [_cell(maze, episode["goal"]) for episode in policy["episodes"]] == [mark] * 2


def test_the_run_leaves_a_goal_conditioned_model_every_episode_and_figures(finished, maze):
    workdir, done = finished
    assert "likelihood search" in done.stdout and "four_rooms.png" in done.stdout
    checkpoint = checkpoints.restore(workdir)
    assert checkpoint.config.goal_conditioned and checkpoint.config.spec.observation_dim == 4
    for name in ("learning_curve.png", "four_rooms.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    policies = json.loads((workdir / "results.json").read_text())["policies"]
    controller = policies["controller without noise"]
    assert controller["success"]["mean"] == 1.0
    for policy in policies.values():
        for episode, expected in zip(policy["episodes"], controller["episodes"], strict=True):
            assert np.shape(episode["positions"]) == (81, 2)
            assert episode["seed"] == expected["seed"]
            distances = np.linalg.norm(np.array(episode["positions"]) - episode["goal"], axis=1)
            reached = np.flatnonzero(distances[1:] <= 0.45)
            assert episode["success"] == bool(reached.size)
            if reached.size:
                np.testing.assert_allclose(episode["seconds"], 0.05 * (1 + reached[0]))


def test_a_finished_run_says_so_and_other_settings_are_refused(four_rooms, finished):
    workdir, first = finished
    again = four_rooms(*SMALL, f"--workdir={workdir}")
    assert again.code == 0, again.stderr
    assert "is done; another --workdir starts anew" in again.stdout
    assert again.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]
    refused = four_rooms(*SMALL, f"--workdir={workdir}", "--seed=1")
    assert (refused.code, "holds a run with other settings" in refused.error) == (2, True)
