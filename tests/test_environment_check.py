"""An environment that is not the one of the data is noticed before anything is played in it."""

import minari
import numpy as np
import pytest

from experiments.common import environment_check
from tt_jax import environments, trajectories

pytest_plugins = ["entry_fixtures"]

KEYS = ("observation", "desired_goal")
ONE_ROW = [[1] * 5, [1] * 5, [1] * 5, [1, 0, 0, 0, 1], [1] * 5]  # free where y is below -0.5


def check(env_id, datasets, monkeypatch, **kwargs):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets))
    config = trajectories.DataConfig(observation_keys=KEYS)
    loaded = trajectories.load("test/maze-v0", config=config).observations
    env = environments.make(env_id, reward_type="dense", **kwargs)
    bounds = {"low": loaded.min(axis=0), "high": loaded.max(axis=0)}
    return environment_check.check(env, "test/maze-v0", **bounds, seeds=range(5), config=config)


def test_the_environment_of_the_data_has_no_problems(datasets, monkeypatch, caplog):
    assert check("PointMaze_UMaze-v3", datasets, monkeypatch) == {
        "starts_outside": 0.0,
        "data_in_walls": 0.0,
        "goals_in_walls": 0.0,
        "problems": [],
    }
    assert not caplog.text


def test_other_walls_hold_data_and_goals(datasets, monkeypatch, caplog):
    found = check("PointMaze_UMaze-v3", datasets, monkeypatch, maze_map=ONE_ROW)
    episodes = [episode.observations for episode in minari.load_dataset("test/maze-v0")]
    for name, key in (("data_in_walls", "achieved_goal"), ("goals_in_walls", "desired_goal")):
        heights = np.concatenate([each[key][:, 1] for each in episodes])
        np.testing.assert_allclose(found[name], np.mean(heights > -0.5))
        assert 0.1 < found[name] < 0.9
    assert "of the data's positions lie in walls or outside of this maze" in caplog.text
    assert "of the data's goals lie in walls" in caplog.text


def test_in_a_larger_maze_starts_lie_outside_of_the_data(datasets, monkeypatch):
    found = check("PointMaze_Large-v3", datasets, monkeypatch)
    assert found["starts_outside"] > 0.5
    assert any("of the environment's starts lie outside of the data" in problem for problem in found["problems"])


@pytest.mark.parametrize("shift, share", [(0.0, 0.0), (2.2, 1.0)])
def test_starts_need_no_maze_and_no_dataset(shift, share):
    """Pendulum starts with cosine, sine and a velocity in +-1."""
    bounds = {"low": np.array([-1, -1, shift - 1]), "high": np.array([1, 1, shift + 1])}
    env, config = environments.make("Pendulum-v1"), trajectories.DataConfig()
    found = environment_check.check(env, "none/here-v0", **bounds, seeds=range(20), config=config)
    assert (found["starts_outside"], found["data_in_walls"]) == (share, None)
    assert len(found["problems"]) == share
    assert not share or "columns [2]" in found["problems"][0]
