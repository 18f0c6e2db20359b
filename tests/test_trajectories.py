"""Loading, returns-to-go and windows, against the stored arrays of the PyTorch reference and a plain numpy version."""

import dataclasses
import json
import pathlib

import chex
import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from transform_checks import check_transforms

from tt_jax import trajectories, types

# Made by running the PyTorch reference on 6 paths of made-up data (3 observations, 2 actions, 10 bins).
SEGMENTS = np.load(pathlib.Path(__file__).parent / "data" / "segments.npz")
SPEC = types.TransitionSpec(observation_dim=3, action_dim=2, num_bins=10)


def box(*shape, dtype=np.float32):
    return gymnasium.spaces.Box(-np.inf, np.inf, shape, dtype)


def random_episodes(lengths, *, seed=0, dtype=np.float32):
    """Episodes with 3 observations and 2 actions; the odd ones are terminated, the others truncated."""
    rng = np.random.default_rng(seed)
    for i, length in enumerate(lengths):
        last = np.arange(length) == length - 1
        yield EpisodeBuffer(
            observations=rng.normal(size=(length + 1, 3)).astype(dtype),
            actions=rng.normal(size=(length, 2)).astype(np.float32),
            rewards=rng.normal(size=length),
            terminations=last & (i % 2 == 1),
            truncations=last & (i % 2 == 0),
        )


def as_dicts(episodes):
    """Split the observation into position [T, 2, 1] and goal [T, 1]."""
    for episode in episodes:
        position, goal = episode.observations[:, :2, None], episode.observations[:, 2:]
        yield dataclasses.replace(episode, observations={"position": position, "goal": goal})


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


def reference_trajectories():
    flat = {name: SEGMENTS[f"flat_end1/{name}"] for name in ("observations", "actions", "rewards", "realterminals")}
    offsets = np.concatenate([[0], np.cumsum(SEGMENTS["step1/path_lengths"])])
    return trajectories.Trajectories(
        observations=flat["observations"],
        final_observations=np.zeros([len(offsets) - 1, flat["observations"].shape[1]]),
        actions=flat["actions"],
        rewards=flat["rewards"][:, 0],
        offsets=offsets,
        terminated=flat["realterminals"][offsets[1:] - 1, 0],
        max_path_length=int(SEGMENTS["max_path_length"]),
    )


def made_trajectories(lengths, *, terminated=None, seed=0):
    rng = np.random.default_rng(seed)
    num_steps = sum(lengths)
    return trajectories.Trajectories(
        observations=rng.normal(size=(num_steps, 3)),
        final_observations=rng.normal(size=(len(lengths), 3)),
        actions=rng.normal(size=(num_steps, 2)),
        rewards=rng.normal(size=num_steps),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        terminated=np.zeros(len(lengths), bool) if terminated is None else np.asarray(terminated),
    )


def made_store(lengths, *, terminated=None, seed=0):
    data = made_trajectories(lengths, terminated=terminated)
    tokens = np.random.default_rng(seed).integers(0, SPEC.num_bins, (sum(lengths), SPEC.transition_dim))
    return trajectories.token_store(tokens, data, num_bins=SPEC.num_bins)


def plain_windows(store, *, config, max_transitions):
    """All windows in order, one transition at a time."""
    inputs, targets, weights = [], [], []
    for begin, end, terminated in zip(store.offsets[:-1], store.offsets[1:], store.terminated, strict=True):
        for start in range(begin, end - 1):
            rows = [start + k * config.step for k in range(max_transitions)]
            tokens = [t for row in rows for t in (store.tokens[row] if row < end else [10] * 7)]
            counts = [row - begin <= config.max_path_length - config.step for row in rows for _ in range(7)]
            inputs.append(tokens[:-1])
            targets.append(tokens[1:])
            weights.append(
                [
                    float(count and (target != 10 or terminated or config.stop_after_truncation))
                    for count, target in zip(counts[:-1], tokens[1:], strict=True)
                ]
            )
    return np.array(inputs), np.array(targets), np.array(weights)


# Returns-to-go


def test_values_of_a_short_episode_match_those_by_hand():
    data = dataclasses.replace(made_trajectories([3, 1]), rewards=np.array([1.0, 2.0, 4.0, 8.0]))
    joined = trajectories.segment(data, discount=0.5)
    np.testing.assert_array_equal(joined[:, -2], [1, 2, 4, 8])
    np.testing.assert_array_equal(joined[:, -1], [2 + 0.5 * 4, 4, 0, 0])


@pytest.mark.parametrize("step", [1, 2])
def test_segment_reproduces_the_reference(step):
    data = reference_trajectories()
    joined = trajectories.segment(data, discount=SEGMENTS["discount"], termination_penalty=SEGMENTS["penalty"])
    assert joined.dtype == np.float64
    np.testing.assert_array_equal(joined[:, -2:-1], SEGMENTS[f"step{step}/rewards_raw"])
    np.testing.assert_allclose(joined[:, -1:], SEGMENTS[f"step{step}/values_raw"], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(joined, SEGMENTS[f"step{step}/joined_raw"], rtol=1e-13, atol=1e-13)


def test_the_penalty_replaces_rewards_of_terminated_episodes_only():
    data = made_trajectories([2, 2], terminated=[False, True])
    joined = trajectories.segment(data, discount=0.9, termination_penalty=-100.0)
    np.testing.assert_array_equal(joined[:, -2], [*data.rewards[:3], -100.0])
    np.testing.assert_array_equal(joined[:, -1], [data.rewards[1], 0, -100.0, 0])


def test_values_are_the_discounted_sums_of_later_rewards():
    data = made_trajectories([40, 1, 2, 25])
    values = trajectories.segment(data, discount=0.97)[:, -1]
    for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        for t in range(start, stop):
            later = data.rewards[t + 1 : stop]
            np.testing.assert_allclose(values[t], later @ 0.97 ** np.arange(len(later)), rtol=1e-12, atol=1e-12)


# Windows


@pytest.mark.parametrize("step", [1, 2])
def test_windows_reproduce_the_reference(step):
    joined, thresholds = SEGMENTS[f"step{step}/joined_raw"], SEGMENTS[f"step{step}/thresholds"]
    tokens = np.clip((joined[:, None] >= thresholds).sum(axis=1) - 1, 0, 9)  # the last threshold that is reached
    data = reference_trajectories()
    store = trajectories.token_store(tokens, data, num_bins=10)
    config = trajectories.DataConfig(step=step, max_path_length=data.max_path_length)
    ids = np.arange(trajectories.num_windows(data.offsets))
    batch = trajectories.windows(store, ids, spec=SPEC, config=config, max_transitions=4)
    np.testing.assert_array_equal(batch.inputs, SEGMENTS[f"step{step}/X"])
    np.testing.assert_array_equal(batch.targets, SEGMENTS[f"step{step}/Y"])
    np.testing.assert_array_equal(batch.weights, SEGMENTS[f"step{step}/mask"])
    np.testing.assert_array_equal(batch.goal, SEGMENTS[f"step{step}/goal"])


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("stop_after_truncation", [True, False])
@pytest.mark.parametrize("lengths", [[9], [2], [1, 5, 1, 1, 2, 12, 1], [12, 3, 1, 7]])
def test_windows_equal_those_made_one_by_one(lengths, stop_after_truncation, step):
    store = made_store(lengths, terminated=np.arange(len(lengths)) % 3 == 0)
    config = trajectories.DataConfig(step=step, max_path_length=12, stop_after_truncation=stop_after_truncation)
    ids = np.arange(trajectories.num_windows(store.offsets))
    batch = trajectories.windows(store, ids, spec=SPEC, config=config, max_transitions=4)
    inputs, targets, weights = plain_windows(store, config=config, max_transitions=4)
    np.testing.assert_array_equal(batch.inputs, inputs)
    np.testing.assert_array_equal(batch.targets, targets)
    np.testing.assert_array_equal(batch.weights, weights)
    goals = [
        store.tokens[end - 1, :3] for end, n in zip(np.cumsum(lengths), lengths, strict=True) for _ in range(n - 1)
    ]
    np.testing.assert_array_equal(batch.goal, goals)
    chex.assert_type(
        [batch.inputs, batch.targets, batch.weights, batch.goal], [np.int32, np.int32, np.float32, np.int32]
    )


def test_windows_are_the_same_when_transformed():
    store, config = made_store([3, 1, 6, 12]), trajectories.DataConfig(max_path_length=12)

    def windows(ids):
        return trajectories.windows(store, ids, spec=SPEC, config=config, max_transitions=4)

    looped = check_transforms(windows, np.arange(18).reshape(6, 3))
    inputs, _, _ = plain_windows(store, config=config, max_transitions=4)
    np.testing.assert_array_equal(looped.inputs.reshape(18, -1), inputs)


def test_windows_refuse_an_unknown_time_limit():
    with pytest.raises(ValueError, match="max_path_length is 0"):
        trajectories.windows(
            made_store([3]), np.array([0]), spec=SPEC, config=trajectories.DataConfig(), max_transitions=2
        )


def test_num_windows_leaves_out_the_last_step_of_each_episode():
    assert trajectories.num_windows(np.array([0, 1, 3, 8])) == 0 + 1 + 4


@pytest.mark.parametrize("num_bins, dtype", [(255, np.uint8), (256, np.uint16)])
def test_token_store_is_as_small_as_the_stop_token_allows(num_bins, dtype):
    assert trajectories.token_store(np.zeros((3, 7)), made_trajectories([3]), num_bins=num_bins).tokens.dtype == dtype


# Loading


def test_load_keeps_stored_numbers_and_drops_the_observation_after_the_end(write):
    episodes = list(random_episodes([5, 1, 2], dtype=np.float64))
    data = trajectories.load(
        write(episodes, observation_space=box(3, dtype=np.float64)), config=trajectories.DataConfig()
    )
    np.testing.assert_array_equal(data.observations, np.concatenate([e.observations[:-1] for e in episodes]))
    np.testing.assert_array_equal(data.actions, np.concatenate([e.actions for e in episodes]))
    np.testing.assert_array_equal(data.rewards, np.concatenate([e.rewards for e in episodes]))
    np.testing.assert_array_equal(data.offsets, [0, 5, 6, 8])
    np.testing.assert_array_equal(data.terminated, [False, True, False])
    assert (data.observations.dtype, data.actions.dtype) == (np.float64, np.float32)
    assert data.max_path_length == 5  # no environment, so the longest episode


def test_load_does_not_rely_on_the_count_of_steps_and_looks_at_all_rows(write, tmp_path, monkeypatch):
    episodes = list(random_episodes([5, 3, 9, 2]))
    dataset_id = write(episodes)
    expected = trajectories.load(dataset_id, config=trajectories.DataConfig())
    (path,) = tmp_path.rglob("metadata.json")
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"total_steps": 4}))
    monkeypatch.setattr(trajectories, "_ROWS_AT_A_TIME", 4)
    loaded = trajectories.load(dataset_id, config=trajectories.DataConfig())
    for name in ("observations", "actions", "rewards", "offsets", "final_observations"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(expected, name))
    parts = [episode.actions for episode in episodes]
    np.testing.assert_array_equal(loaded.actions, np.concatenate(parts))
    joined = trajectories.segment(loaded, discount=0.9)
    np.testing.assert_allclose(joined[:, -2], np.concatenate([episode.rewards for episode in episodes]))
    values = [
        sum(0.9**k * r for k, r in enumerate(e.rewards[t + 1 :])) for e in episodes for t in range(len(e.rewards))
    ]
    np.testing.assert_allclose(joined[:, -1], values, rtol=1e-12, atol=1e-12)


def test_load_takes_the_time_limit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            "test/pendulum-v0", list(random_episodes([4])), env="Pendulum-v1", action_space=box(2)
        )
    data = trajectories.load("test/pendulum-v0", config=trajectories.DataConfig())
    assert (data.max_path_length, data.env_id) == (200, "Pendulum-v1")
    with pytest.raises(ValueError, match="has 4 steps, more than max_path_length=3; set data.max_path_length to at"):
        trajectories.load("test/pendulum-v0", config=trajectories.DataConfig(max_path_length=3))


def test_load_concatenates_dict_observations_in_the_order_asked_for(write):
    episodes = list(random_episodes([5, 3]))
    space = gymnasium.spaces.Dict(position=box(2, 1), goal=box(1))
    dataset_id = write(as_dicts(episodes), observation_space=space)
    flat = np.concatenate([e.observations[:-1] for e in episodes])
    for keys, columns in ((("goal", "position"), [2, 0, 1]), (("position",), [0, 1])):
        data = trajectories.load(dataset_id, config=trajectories.DataConfig(observation_keys=keys))
        np.testing.assert_array_equal(data.observations, flat[:, columns])
    with pytest.raises(ValueError, match=r"is a Dict; set data.observation_keys to some of \['goal', 'position'\]"):
        trajectories.load(dataset_id, config=trajectories.DataConfig())
    with pytest.raises(ValueError, match="has no velocity; set"):
        trajectories.load(dataset_id, config=trajectories.DataConfig(observation_keys=("goal", "velocity")))


def test_load_keeps_the_first_dimensions(write):
    episodes = list(random_episodes([4, 4]))
    episodes[1].observations[2, 2] = np.nan  # in a dimension that is left out
    dataset_id = write(episodes)
    data = trajectories.load(dataset_id, config=trajectories.DataConfig(observation_slice=2))
    np.testing.assert_array_equal(data.observations, np.concatenate([e.observations[:-1, :2] for e in episodes]))
    with pytest.raises(ValueError, match="observation_slice=4 exceeds the 3 observed dimensions"):
        trajectories.load(dataset_id, config=trajectories.DataConfig(observation_slice=4))


def test_load_leaves_out_hidden_dimensions(write):
    episodes = list(random_episodes([4, 4]))
    dataset_id = write(episodes)
    data = trajectories.load(dataset_id, config=trajectories.DataConfig(hidden_dims=(1,)))
    flat = np.concatenate([e.observations[:-1] for e in episodes])
    np.testing.assert_array_equal(data.observations, flat[:, [0, 2]])
    assert data.observation_columns.size == 2 and data.final_observations.shape == (2, 2)
    for hidden in ((3,), (0, 1, 2)):
        with pytest.raises(ValueError, match="must be some, but not all, of the 3 observed dimensions"):
            trajectories.load(dataset_id, config=trajectories.DataConfig(hidden_dims=hidden))


@pytest.mark.parametrize(
    "name, index, value, place",
    [
        ("observations", (2, 1), np.nan, r"observation\[1\]"),
        ("actions", (2, 0), np.inf, r"action\[0\]"),
        ("rewards", (2,), np.nan, "reward"),
    ],
)
def test_load_names_the_place_of_a_number_that_is_not_finite(write, name, index, value, place):
    episodes = list(random_episodes([4, 3, 4]))
    getattr(episodes[1], name)[index] = value
    with pytest.raises(ValueError, match=f"^{place} of test/made-v0 is {value} in episode 1, step 2; "):
        trajectories.load(write(episodes), config=trajectories.DataConfig())


def test_load_refuses_data_without_a_window(write):
    with pytest.raises(ValueError, match="no episode of at least 2 steps"):
        trajectories.load(write(random_episodes([1, 1])), config=trajectories.DataConfig())


def test_load_refuses_keys_for_plain_observations(write):
    with pytest.raises(ValueError, match="is not a Dict; leave data.observation_keys"):
        trajectories.load(write(random_episodes([4])), config=trajectories.DataConfig(observation_keys=("goal",)))


def test_a_missing_dataset_is_reported_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(ValueError, match="test/none-v0 not found at .*MINARI_DATASETS_PATH.*--download"):
        trajectories.load("test/none-v0", config=trajectories.DataConfig())


@pytest.mark.parametrize("settings", [{"step": 0}, {"discount": 1.5}, {"observation_slice": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        trajectories.DataConfig(**settings)


def test_select_keeps_whole_episodes():
    data = made_trajectories([3, 1, 4, 2], terminated=[False, True, True, False])
    chosen = trajectories.select(data, [2, 0])
    np.testing.assert_array_equal(chosen.rewards, [*data.rewards[4:8], *data.rewards[:3]])
    np.testing.assert_array_equal(chosen.observations[:4], data.observations[4:8])
    np.testing.assert_array_equal(chosen.actions[4:], data.actions[:3])
    np.testing.assert_array_equal(chosen.offsets, [0, 4, 7])
    np.testing.assert_array_equal(chosen.terminated, [True, False])
    nothing = trajectories.select(data, [])
    assert len(nothing.rewards) == 0 and trajectories.num_windows(nothing.offsets) == 0


def test_single_steps_for_iql_end_where_the_episode_says_and_only_terminals_are_final():
    data = made_trajectories([3, 1, 2], terminated=[True, False, False])
    data = dataclasses.replace(data, actions=np.clip(data.actions, -1, 1))
    steps = trajectories.transitions(data)
    row = 0
    for episode, length in enumerate([3, 1, 2]):
        observations = [*data.observations[row : row + length], data.final_observations[episode]]
        for step in range(length):
            np.testing.assert_array_equal(steps.observations[row], np.float32(observations[step]))
            np.testing.assert_array_equal(steps.next_observations[row], np.float32(observations[step + 1]))
            assert steps.not_terminal[row] == (0 if episode == 0 and step == length - 1 else 1)
            row += 1
    np.testing.assert_array_equal(steps.rewards, np.float32(data.rewards))
    assert np.abs(steps.actions).max() == np.float32(1 - 1e-5)


@pytest.mark.parametrize("name", ["small", "unfinished"])
def test_actions_are_clipped_as_in_the_reference_of_iql(name):
    arrays = np.load(pathlib.Path(__file__).parent / "data" / "iql.npz")
    actions = arrays[f"data/{name}/in_actions"]
    ones = np.ones(actions.shape[1], np.float32)
    clipped = trajectories.clip_actions(actions, low=-ones, high=ones)
    np.testing.assert_array_equal(clipped, arrays[f"data/{name}/actions_clipped"])
