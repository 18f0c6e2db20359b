"""D4RL files, written here in D4RL's layout, become Minari datasets."""

import gymnasium
import h5py
import minari
import numpy as np
import pytest

from experiments.common import d4rl

pytest_plugins = ["entry_fixtures"]


def flat_data(num_steps=10, *, terminals=(), timeouts=(), observation_dim=11, action_dim=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(num_steps, observation_dim)).astype(np.float32),
        "next_observations": rng.normal(size=(num_steps, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (num_steps, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=num_steps).astype(np.float32),
        "terminals": np.isin(np.arange(num_steps), terminals),
        "timeouts": np.isin(np.arange(num_steps), timeouts),
    }


def write_file(path, data):
    with h5py.File(path, "w") as file:
        for name, array in data.items():
            file[name] = array
    return str(path)


def test_episodes_end_at_terminals_and_timeouts_and_the_tail_is_truncated(tmp_path):
    data = flat_data(10, terminals=[2, 6], timeouts=[3, 6])
    path = write_file(tmp_path / "data.hdf5", data)
    episodes = list(d4rl.read_episodes(path, max_episode_steps=1000))
    assert [len(episode) for episode in episodes] == [3, 1, 3, 3]
    assert [bool(episode.terminations[-1]) for episode in episodes] == [True, False, True, False]
    assert [bool(episode.truncations[-1]) for episode in episodes] == [False, True, True, True]
    for name in ("actions", "rewards"):
        np.testing.assert_array_equal(np.concatenate([getattr(e, name) for e in episodes]), data[name])
    np.testing.assert_array_equal(np.concatenate([e.observations[:-1] for e in episodes]), data["observations"])
    np.testing.assert_array_equal([e.observations[-1] for e in episodes], data["next_observations"][[2, 3, 6, 9]])


def test_without_timeouts_episodes_are_cut_at_the_time_limit():
    terminals = np.isin(np.arange(12), [3])
    offsets = d4rl.episode_offsets(terminals, None, max_episode_steps=5)
    np.testing.assert_array_equal(offsets, [0, 4, 9, 12])
    np.testing.assert_array_equal(d4rl.episode_offsets(terminals, None, max_episode_steps=None), [0, 4, 12])


def test_without_next_observations_cut_ends_lose_their_last_step(tmp_path):
    """As in D4RL, which drops transitions whose successor is not there; a terminal's is not needed."""
    data = flat_data(9, terminals=[2, 6], timeouts=[2, 4, 7])
    del data["next_observations"]
    episodes = list(d4rl.read_episodes(write_file(tmp_path / "data.hdf5", data), max_episode_steps=None))
    rows = [[0, 1, 2], [3], [5, 6]]  # the rows 7 and 8 are episodes of one step, which is dropped
    assert [bool(episode.terminations[-1]) for episode in episodes] == [True, False, True]
    assert [bool(episode.truncations[-1]) for episode in episodes] == [True, True, False]
    for episode, each in zip(episodes, rows, strict=True):
        np.testing.assert_array_equal(episode.rewards, data["rewards"][each])
        last = each[-1] if episode.terminations[-1] else each[-1] + 1
        np.testing.assert_array_equal(episode.observations, data["observations"][[*each, last]])


def test_ant_maze_observations_are_split_as_in_the_environment(tmp_path):
    data = flat_data(4, timeouts=[3], observation_dim=29, action_dim=8) | {"infos/goal": np.ones((4, 2), np.float32)}
    path = write_file(tmp_path / "data.hdf5", data)
    (episode,) = d4rl.read_episodes(path, max_episode_steps=700, space=goal_space(27))
    parts = episode.observations
    np.testing.assert_array_equal(
        np.concatenate([parts["achieved_goal"], parts["observation"]], axis=1)[:-1], data["observations"]
    )
    np.testing.assert_array_equal(parts["desired_goal"], np.ones((5, 2)))
    assert {key: space.shape for key, space in d4rl.unbounded_space(parts).items()} == {
        "achieved_goal": (2,),
        "desired_goal": (2,),
        "observation": (27,),
    }


def test_point_maze_observations_keep_their_positions(tmp_path):
    data = flat_data(4, timeouts=[3], observation_dim=4, action_dim=2) | {"infos/goal": np.ones((4, 2), np.float32)}
    path = write_file(tmp_path / "data.hdf5", data)
    (episode,) = d4rl.read_episodes(path, max_episode_steps=300, space=goal_space(4))
    parts = episode.observations
    np.testing.assert_array_equal(parts["observation"][:-1], data["observations"])
    np.testing.assert_array_equal(parts["achieved_goal"], parts["observation"][:, :2])
    np.testing.assert_array_equal(parts["desired_goal"], np.ones((5, 2)))


@pytest.mark.parametrize("observation_dim, goal_dim", [(5, 2), (29, 3), (27, 1)])
def test_mazes_of_no_known_layout_are_refused(tmp_path, observation_dim, goal_dim):
    data = flat_data(4, observation_dim=observation_dim) | {"infos/goal": np.ones((4, goal_dim), np.float32)}
    path = write_file(tmp_path / "data.hdf5", data)
    with pytest.raises(
        ValueError, match=f"observations of {observation_dim} dimensions and goals .* fit no known layout"
    ):
        list(d4rl.read_episodes(path, max_episode_steps=None, space=goal_space(27)))


def goal_space(observation_dim):
    """Return the observation space of a goal maze of gymnasium-robotics."""
    sizes = {"observation": observation_dim, "achieved_goal": 2, "desired_goal": 2}
    return gymnasium.spaces.Dict({name: gymnasium.spaces.Box(-9, 9, (size,)) for name, size in sizes.items()})


def test_a_url_is_downloaded(tmp_path):
    path = write_file(tmp_path / "data.hdf5", flat_data(4, timeouts=[3]))
    fetched = d4rl.fetch(f"file://{path}", str(tmp_path))
    assert fetched != path
    assert len(list(d4rl.read_episodes(fetched, max_episode_steps=None))) == 1
    assert d4rl.fetch(path, str(tmp_path)) == path
    with pytest.raises(ValueError, match="none.hdf5 cannot be downloaded"):
        d4rl.fetch(f"file://{tmp_path}/none.hdf5", str(tmp_path))


def test_reference_scores_are_those_of_d4rl():
    assert d4rl.reference_scores("Hopper-v5") == (-20.272305, 3234.3)
    assert d4rl.reference_scores("AntMaze_UMaze-v4") == (0.0, 1.0)
    assert d4rl.reference_scores("Swimmer-v5") == (None, None)


def test_files_in_another_layout_are_refused(tmp_path):
    data = flat_data(4)
    np.savez(tmp_path / "whole.npz", **data)
    np.savez(tmp_path / "other.npz", states=np.zeros((5, 2)), actions=np.zeros((5, 1)))
    with pytest.raises(ValueError, match=r"observations, rewards, terminals missing among \['actions', 'states'\]"):
        list(d4rl.read_episodes(str(tmp_path / "other.npz"), max_episode_steps=None))
    for change, message in (
        ({"terminals": None}, "terminals missing among"),
        ({"rewards": np.zeros(3)}, "must have one length of at least 1"),
        ({"actions": None, "actions/left": np.zeros(4)}, r"actions missing among \['actions/', "),
        ({"actions": np.array([b"left"] * 4)}, r"must hold numbers, got {'actions': '\|S4'}"),
    ):
        broken = {name: array for name, array in (data | change).items() if array is not None}
        path = write_file(tmp_path / "broken.hdf5", broken)
        with pytest.raises(ValueError, match=message):
            list(d4rl.read_episodes(path, max_episode_steps=None))
    for name, content in {"none": None, "text": b"no data", "cut": (tmp_path / "whole.npz").read_bytes()[:-40]}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as HDF5 or npz"):
            list(d4rl.read_episodes(str(tmp_path / name), max_episode_steps=None))


def test_npz_files_are_read_in_either_layout(tmp_path, caplog):
    """OGBench's rows end in the last observation of an episode, whose action led nowhere; it knows no real ends."""
    data = flat_data(8, terminals=[3, 7])
    np.savez(tmp_path / "d4rl.npz", **data)
    episodes = list(d4rl.read_episodes(str(tmp_path / "d4rl.npz"), max_episode_steps=None))
    assert [(len(episode), bool(episode.terminations[-1])) for episode in episodes] == [(4, True), (4, True)]
    assert not caplog.text
    names = ("observations", "actions", "terminals")
    np.savez(tmp_path / "og.npz", qpos=np.zeros((8, 3)), **{name: data[name] for name in names})
    episodes = list(d4rl.read_episodes(str(tmp_path / "og.npz"), max_episode_steps=None))
    assert "og.npz has OGBench's layout, without rewards" in caplog.text
    for episode, start in zip(episodes, (0, 4), strict=True):
        np.testing.assert_array_equal(episode.observations, data["observations"][start : start + 4])
        np.testing.assert_array_equal(episode.actions, data["actions"][start : start + 3])
        np.testing.assert_array_equal(episode.rewards, np.zeros(3))
        np.testing.assert_array_equal(episode.terminations, np.zeros(3, bool))
        np.testing.assert_array_equal(episode.truncations, [False, False, True])


def test_two_files_make_one_dataset_with_reference_scores(own_entry_point, monkeypatch, tmp_path):
    run_import = own_entry_point("import_d4rl")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    medium, expert = flat_data(6, terminals=[2], timeouts=[5]), flat_data(4, timeouts=[3], seed=1)
    medium_path = write_file(tmp_path / "medium.hdf5", medium)
    expert_path = write_file(tmp_path / "expert.hdf5", expert)
    arguments = [f"--files={medium_path},file://{expert_path}", "--env=Hopper-v5", "--dataset=d4rl/hopper/made-v0"]
    result = run_import(*arguments)
    assert result.code == 0, result.stderr
    dataset = minari.load_dataset("d4rl/hopper/made-v0")
    assert [len(episode) for episode in dataset] == [3, 3, 4]
    actions = np.concatenate([episode.actions for episode in dataset])
    np.testing.assert_array_equal(actions, np.concatenate([medium["actions"], expert["actions"]]))
    assert dataset.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float32)
    assert dataset.env_spec.id == "Hopper-v5"
    np.testing.assert_allclose(minari.get_normalized_score(dataset, np.array([-20.272305, 3234.3])), [0, 1])

    result = run_import(*arguments)
    assert result.code == 2
    assert "already exists" in result.stderr
    result = run_import(*arguments, "--overwrite", "--env=HalfCheetah-v5")
    assert result.code == 2
    assert "actions do not fit --env=HalfCheetah-v5" in result.stderr
