"""The waypoint controller, and the datasets recorded with it."""

import itertools

import minari
import numpy as np
import pytest

from experiments.common import recording, waypoint_controller
from tt_jax import environments

pytest_plugins = ["entry_fixtures"]

MAZE = [
    [1, 1, 1, 1, 1],
    [1, 0, 0, "g", 1],
    [1, 0, 1, 1, 1],
    [1, "r", 1, 0, 1],
    [1, 1, 1, 1, 1],
]


@pytest.fixture(scope="module")
def env():
    with environments.make("PointMaze_UMaze-v3", reward_type="dense") as env:
        yield env


def test_next_cell_walks_the_shortest_path_round_the_wall():
    path = [(3, 1)]
    while path[-1] != (1, 3):
        path.append(waypoint_controller.next_cell(MAZE, path[-1], (1, 3)))
    assert path == [(3, 1), (2, 1), (1, 1), (1, 2), (1, 3)]
    assert waypoint_controller.next_cell(MAZE, (1, 3), (1, 3)) == (1, 3)


def test_next_cell_reports_a_goal_that_is_walled_off():
    with pytest.raises(ValueError, match=r"no path from cell \(3, 1\) to cell \(3, 3\)"):
        waypoint_controller.next_cell(MAZE, (3, 1), (3, 3))


def test_the_controller_reaches_every_goal_and_stays_there(env):
    rng = np.random.default_rng(0)
    for seed in range(10):
        episode = waypoint_controller.run_episode(env, rng, seed=seed, noise=0.0)
        observations = episode.observations
        distance = np.linalg.norm(observations["achieved_goal"] - observations["desired_goal"], axis=1)
        assert distance[-30:].max() < 0.2


def test_noise_lowers_returns(env):
    rng = np.random.default_rng(0)
    clean, noisy = (
        [waypoint_controller.run_episode(env, rng, seed=seed, noise=noise).rewards.sum() for seed in range(10)]
        for noise in (0.0, 2.0)
    )
    assert 230 < np.mean(clean) < 280
    assert 90 < np.mean(noisy) < 160


def test_noise_is_held_so_that_actions_change_in_blocks(env):
    episode = waypoint_controller.run_episode(env, np.random.default_rng(0), seed=0, noise=1e6)
    blocks = episode.actions[: 14 * waypoint_controller.NOISE_HOLD].reshape(14, waypoint_controller.NOISE_HOLD, 2)
    np.testing.assert_array_equal(np.abs(episode.actions), 1.0)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1], blocks.shape))
    assert len(np.unique(blocks[:, 0], axis=0)) == 4


def test_episodes_depend_on_the_seed_alone(env):
    first, again, other = (
        [e.actions for e in itertools.islice(waypoint_controller.episodes(env, max_noise=2.0, seed=seed), 2)]
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("dataset_id", ["tt/umaze", "tt/u maze-v0", ""])
def test_ids_that_minari_cannot_store_are_refused_before_the_work(dataset_id):
    with pytest.raises(ValueError, match="must look like namespace/name-v0"):
        recording.check_id(dataset_id, overwrite=False)


def test_unknown_environments_are_reported():
    with pytest.raises(ValueError, match="PointMaze_Nowhere-v3 cannot be made"):
        environments.make("PointMaze_Nowhere-v3")


def test_collect_records_a_dataset_from_which_its_environment_is_recovered(own_entry_point, monkeypatch, tmp_path):
    collect = own_entry_point("collect")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    arguments = ["--env=PointMaze_UMaze-v3", "--dataset=tt/pointmaze/made-v0", "--steps=700", "--seed=1"]
    result = collect(*arguments)
    assert result.code == 0, result.stderr
    dataset = minari.load_dataset("tt/pointmaze/made-v0")
    assert [len(episode) for episode in dataset] == [300, 300, 300]  # whole episodes, at least 700 steps
    for episode in dataset:
        assert not episode.terminations.any()
        np.testing.assert_array_equal(np.flatnonzero(episode.truncations), [299])

    # The stored seed and actions replay to the stored rewards in the recovered environment.
    episode, (metadata,) = dataset[1], dataset.storage.get_episode_metadata([1])
    with dataset.recover_environment() as env:
        observation, _ = env.reset(seed=metadata["seed"])
        np.testing.assert_array_equal(observation["desired_goal"], episode.observations["desired_goal"][0])
        rewards = [env.step(action)[1] for action in episode.actions]
    np.testing.assert_allclose(rewards, episode.rewards, rtol=1e-6)

    result = collect("--env=AntMaze_UMaze-v5", "--dataset=tt/ant-v0")
    assert result.code == 2
    assert "--env=AntMaze_UMaze-v5 must be one of" in result.stderr
    result = collect(*arguments)
    assert result.code == 2
    assert "tt/pointmaze/made-v0 already exists" in result.stderr
    result = collect(*arguments, "--overwrite", "--steps=300", "--reward=sparse")
    assert result.code == 0, result.stderr
    dataset = minari.load_dataset("tt/pointmaze/made-v0")
    assert dataset.total_steps == 300
    assert set(np.unique(dataset[0].rewards)) <= {0.0, 1.0}
