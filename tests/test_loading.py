"""Loading what people's datasets hold: spaces of numbers, missing observations, damaged files, strangers' code."""

import dataclasses
import json
import pathlib
import sys

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces
from minari.data_collector import EpisodeBuffer

from tt_jax import iql, minari_files, spaces, trajectories


def box(*shape, dtype=np.float32):
    return gym_spaces.Box(-np.inf, np.inf, shape, dtype)


def random_episodes(lengths):
    """Episodes with 3 observations and 2 actions; the odd ones are terminated, the others truncated."""
    rng = np.random.default_rng(0)
    for i, length in enumerate(lengths):
        last = np.arange(length) == length - 1
        yield EpisodeBuffer(
            observations=rng.normal(size=(length + 1, 3)).astype(np.float32),
            actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            rewards=rng.normal(size=length),
            terminations=last & (i % 2 == 1),
            truncations=last & (i % 2 == 0),
        )


@pytest.fixture
def write(monkeypatch, tmp_path):
    """A function that writes episodes as the dataset test/made-v0 of an empty collection."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def write(episodes, *, observation_space=None, action_space=None):
        with pytest.warns(UserWarning):  # Minari asks for author, permalink and environment
            minari.create_dataset_from_buffers(
                "test/made-v0",
                list(episodes),
                observation_space=observation_space or box(3),
                action_space=action_space or box(2),
            )
        return "test/made-v0"

    return write


def load(dataset_id, **settings):
    return trajectories.load(dataset_id, config=trajectories.DataConfig(**settings))


# Spaces


def test_discrete_spaces_are_taken_as_they_are(write):
    """Discrete values start anywhere, and those of several axes are flattened."""
    rng = np.random.default_rng(0)
    observation_space = gym_spaces.Dict(
        cell=gym_spaces.MultiDiscrete([[3, 4], [5, 6]]),
        flags=gym_spaces.MultiBinary(2),
        room=gym_spaces.Discrete(4, start=-1),
    )
    episodes = []
    for episode in random_episodes([6, 3]):
        count = len(episode.rewards)
        parts = {
            "cell": rng.integers(0, [[3, 4], [5, 6]], (count + 1, 2, 2)),
            "flags": rng.integers(0, 2, (count + 1, 2)).astype(np.int8),
            "room": rng.integers(-1, 3, count + 1),
        }
        episodes.append(dataclasses.replace(episode, observations=parts, actions=rng.integers(5, 8, count)))
    dataset_id = write(episodes, observation_space=observation_space, action_space=gym_spaces.Discrete(3, start=5))
    data = load(dataset_id, observation_keys=("room", "cell", "flags"))
    first = episodes[0].observations
    np.testing.assert_array_equal(data.observations[:6, 0], first["room"][:6])
    np.testing.assert_array_equal(data.observations[:6, 1:5], first["cell"][:6].reshape(6, 4))
    np.testing.assert_array_equal(data.observations[:6, 5:], first["flags"][:6])
    np.testing.assert_array_equal(data.actions[:, 0], np.concatenate([e.actions for e in episodes]))
    columns = data.observation_columns
    np.testing.assert_array_equal(columns.low, [-1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(columns.high, [2, 2, 3, 4, 5, 1, 1])
    assert columns.is_discrete.all() and data.action_columns.values(0).tolist() == [5, 6, 7]
    assert trajectories.action_values(data).tolist() == [[5, 6, 7]]
    np.testing.assert_array_equal(trajectories.transitions(data).actions, data.actions)
    with pytest.raises(ValueError, match="actions of test/made-v0 are discrete"):
        trajectories.action_bounds(data)


@pytest.mark.parametrize("scores, expected", [((1, 9), (1, 9)), ((1, 1), None), ((None, 9), None), (("1", "9"), None)])
def test_scores_without_a_range_normalise_nothing(write, scores, expected):
    dataset_id = write(random_episodes([3]))
    path = minari.storage.get_dataset_path(dataset_id) / "data" / "metadata.json"
    scores = dict(zip(("ref_min_score", "ref_max_score"), scores, strict=True))
    path.write_text(json.dumps(json.loads(path.read_text()) | scores))
    assert minari_files.reference_scores(dataset_id) == expected


def test_numbers_outside_of_their_discrete_space_are_refused(write):
    episodes = [dataclasses.replace(e, actions=np.array([0, 1, 7, 1])) for e in random_episodes([4])]
    with pytest.raises(ValueError, match=r"action\[0\] of test/made-v0 is 7 in row 2, its space has 0 to 2"):
        load(write(episodes, action_space=gym_spaces.Discrete(3)))


def test_spaces_that_are_no_numbers_are_refused(write):
    episodes = [dataclasses.replace(e, actions={"a": e.actions}) for e in random_episodes([4])]
    with pytest.raises(ValueError, match="test/made-v0 cannot be used: its actions are Dict"):
        load(write(episodes, action_space=gym_spaces.Dict(a=box(2))))


def test_actions_of_several_axes_are_flattened(write):
    episodes = [dataclasses.replace(e, actions=np.arange(24.0).reshape(4, 3, 2)) for e in random_episodes([4])]
    data = load(write(episodes, action_space=box(3, 2)))
    np.testing.assert_array_equal(data.actions, np.arange(24).reshape(4, 6))


def test_entries_of_nested_dicts_are_read(write):
    """Kitchens have a goal for each of several things."""
    goal_space = gym_spaces.Dict(microwave=box(1), kettle=box(2))
    space = gym_spaces.Dict(observation=box(1), goal=goal_space)
    episodes = list(random_episodes([5, 3]))
    flat = np.concatenate([e.observations[:-1] for e in episodes])
    nested = []
    for e in episodes:
        goal = {"kettle": e.observations[:, :2], "microwave": e.observations[:, 2:]}
        nested.append(dataclasses.replace(e, observations={"observation": e.observations[:, :1], "goal": goal}))
    dataset_id = write(nested, observation_space=space)
    cases = {("goal",): [0, 1, 2], ("goal/microwave", "observation"): [2, 0], ("goal/kettle",): [0, 1]}
    for keys, columns in cases.items():
        np.testing.assert_array_equal(load(dataset_id, observation_keys=keys).observations, flat[:, columns])
    usable = r"\['goal/kettle', 'goal/microwave', 'observation'\]"
    with pytest.raises(ValueError, match=f"has no goal/pan; set data.observation_keys to some of {usable}"):
        load(dataset_id, observation_keys=("goal/pan",))


def test_usable_keys_are_those_of_numbers():
    space = gym_spaces.Dict(
        {"image": box(2, 2), "mission": gym_spaces.Text(9), "a/b": box(1), "goals": gym_spaces.Dict(one=box(1))}
    )
    assert spaces.keys(space) == ["a/b", "goals/one", "image"]
    assert spaces.entry(space, "a/b") is space["a/b"] and spaces.entry(space, "goals/one") is space["goals"]["one"]


# Episodes


def test_an_episode_without_its_last_observation_is_used_as_far_as_it_is_known(write, caplog):
    episodes = list(random_episodes([4, 3, 5, 2]))
    for i in (1, 2):  # the first of them is terminated, the second cut short
        episodes[i] = dataclasses.replace(episodes[i], observations=episodes[i].observations[:-1])
    data = load(write(episodes))
    assert "2 of 4 episodes of test/made-v0 lack their last observation, episode 1 the first of them" in caplog.text
    observations = np.concatenate([e.observations[: len(e)] for e in episodes])
    np.testing.assert_array_equal(data.observations, observations)
    np.testing.assert_array_equal(data.final_known, [True, False, False, True])
    steps = trajectories.transitions(data)
    used = np.delete(np.arange(14), 4 + 3 + 5 - 1)  # the successor of a terminal is not needed
    np.testing.assert_array_equal(steps.observations, observations[used])
    np.testing.assert_array_equal(steps.rewards, np.float32(data.rewards[used]))
    ends = iql.episode_ends(steps)
    np.testing.assert_array_equal(np.flatnonzero(ends), [3, 6, 10, 12])
    np.testing.assert_array_equal(steps.next_observations[:-1][~ends[:-1]], steps.observations[1:][~ends[:-1]])
    np.testing.assert_array_equal(trajectories.select(data, [2, 0]).final_known, [False, True])


@pytest.mark.parametrize("count", [2, 7])
def test_an_episode_with_a_wrong_number_of_observations_is_named(write, count):
    episodes = list(random_episodes([6, 4]))
    episodes[1] = dataclasses.replace(episodes[1], observations=np.zeros([count, 3], np.float32))
    with pytest.raises(ValueError, match=f"episode 1 of test/made-v0 has {count} observations for 4 steps"):
        load(write(episodes))


def test_a_part_of_the_episodes_is_read_from_the_front_or_evenly_spread(write):
    episodes = list(random_episodes([3, 4, 5, 6, 7]))
    dataset_id = write(episodes)
    for settings, chosen in (({}, [0, 1, 2]), ({"spread_episodes": True}, [0, 2, 4])):
        data = load(dataset_id, max_episodes=3, **settings)
        np.testing.assert_array_equal(data.rewards, np.concatenate([episodes[i].rewards for i in chosen]))
    assert len(load(dataset_id, max_episodes=99, spread_episodes=True).terminated) == 5


# Actions of any bounds


def trajectories_of(actions, space):
    data = {"observations": np.zeros([len(actions), 1]), "rewards": np.zeros(len(actions))}
    return trajectories.Trajectories(
        **data,
        actions=np.array(actions),
        final_observations=np.zeros([1, 1]),
        offsets=np.array([0, len(actions)]),
        terminated=np.array([True]),
        action_columns=space and spaces.columns(space),
    )


def test_actions_are_kept_just_inside_their_bounds_and_those_beyond_are_counted(caplog):
    space = gym_spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    steps = trajectories.transitions(trajectories_of([[-2.5, 5], [2, 10], [1, -1], [0, 0], [0, 1], [1, 11]], space))
    inner = np.float32([[-2, 5], [2, 10], [1, 0], [0, 0], [0, 1], [1, 10]])
    np.testing.assert_allclose(steps.actions, inner, rtol=0, atol=6e-5)
    assert (steps.actions > [-2, 0]).all() and (steps.actions < [2, 10]).all()
    assert "3 of 6 actions of  are beyond their bounds [-2.0, 0.0] to [2.0, 10.0] and clipped." in caplog.text


def test_actions_without_bounds_are_as_wide_as_they_get():
    actions = [[0.5, -3], [0, 1], [0.1, 0]]
    low, high = trajectories.action_bounds(trajectories_of(actions, box(2)))
    np.testing.assert_array_equal([low, high], [[-1, -3], [1, 3]])
    np.testing.assert_array_equal(trajectories.action_bounds(trajectories_of(actions, None)), [[-1, -1], [1, 1]])


# Files


def data_file(dataset_id, name):
    return pathlib.Path(minari.storage.get_dataset_path(dataset_id)) / "data" / name


def change_metadata(dataset_id, **changes):
    path = data_file(dataset_id, "metadata.json")
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in metadata.items() if value is not None}))


def test_damaged_files_are_named_in_one_line(write):
    dataset_id = write(random_episodes([40] * 20))
    path = data_file(dataset_id, "main_data.hdf5")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\0" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{path.parent} cannot be read .*; copy or download the dataset again.$"):
            load(dataset_id)
    path.write_bytes(whole)
    change_metadata(dataset_id, total_episodes=21)
    with pytest.raises(ValueError, match=r"cannot be read \(episode 20\): KeyError"):
        load(dataset_id)
    data_file(dataset_id, "metadata.json").write_text('{"total_episodes": 2')
    with pytest.raises(ValueError, match=r"metadata.json cannot be read \(metadata\): JSONDecodeError"):
        load(dataset_id)


@pytest.mark.parametrize("total_steps", [None, 0, 5, 10**6])
def test_a_wrong_number_of_steps_in_the_metadata_changes_nothing(write, total_steps):
    episodes = list(random_episodes([3, 9, 4]))
    change_metadata(write(episodes), total_steps=total_steps)
    loaded = load("test/made-v0")
    np.testing.assert_array_equal(loaded.observations, np.concatenate([each.observations[:-1] for each in episodes]))
    np.testing.assert_array_equal(loaded.final_observations, [each.observations[-1] for each in episodes])
    np.testing.assert_array_equal(loaded.actions, np.concatenate([each.actions for each in episodes]))
    np.testing.assert_array_equal(loaded.rewards, np.concatenate([each.rewards for each in episodes]))


def test_data_in_a_format_whose_package_is_missing_names_it(write, monkeypatch):
    dataset_id = write(random_episodes([4]))
    change_metadata(dataset_id, data_format="arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"cannot be read \(data_format=arrow\): .*pyarrow.*; install the package"):
        load(dataset_id)


def test_data_of_another_minari_is_refused(write):
    dataset_id = write(random_episodes([4]))
    change_metadata(dataset_id, minari_version="9.0")
    with pytest.raises(ValueError, match="is of Minari 9.0, which the installed Minari"):
        load(dataset_id)


def test_an_environment_that_cannot_be_read_is_a_warning(write, caplog):
    dataset_id = write(random_episodes([4]))
    change_metadata(dataset_id, env_spec="{", eval_env_spec="[]")
    data = load(dataset_id)
    assert (data.env_id, data.max_path_length) == ("", 4)
    assert "specification of the environment cannot be read" in caplog.text


def test_an_environment_that_another_gymnasium_wrote_gives_the_time_limit(write):
    dataset_id = write(random_episodes([4]))
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json()) | {"autoreset": False, "novelty": [1]}
    change_metadata(dataset_id, env_spec=json.dumps(spec))
    assert load(dataset_id).max_path_length == 200


def test_a_strangers_environment_is_not_made_for_its_spaces(write, tmp_path):
    dataset_id = write(random_episodes([4]))
    spec = json.dumps({"id": "Mine-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "ran")}})
    change_metadata(dataset_id, env_spec=spec, observation_space=None)
    with pytest.raises(ValueError, match="has no spaces, and the stored environment Mine-v0 would run os:mkdir"):
        load(dataset_id)
    assert not (tmp_path / "ran").exists()
