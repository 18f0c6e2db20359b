"""From people's datasets to played episodes, from the command line: a grid world, wide actions, a kitchen."""

import importlib
import json
import signal
import tracemalloc

import gymnasium
import minari
import numpy as np
import pytest
from entry_points import MAZE, ROOT
from minari.data_collector import EpisodeBuffer

from experiments.common import datasets as prepare
from experiments.configs import maze
from tt_jax import checkpoints

pytest_plugins = ["entry_fixtures"]

SMALL = ["--config.train.num_steps=300", "--config.train.eval_every=70", "--config.train.learning_rate=0.01"]
PLAN = ["--num_episodes=2", "--plan.horizon=3", "--plan.beam_width=8", "--plan.num_expand=3", "--plan.replan_every=1"]

# A module of the user's, in the folder where the commands run.
WORLDS = """
import gymnasium
import numpy as np
from gymnasium import spaces


class Corridor(gymnasium.Env):
    '''Five cells in a row: 0 goes left, 1 stays, 2 goes right; every step in the last cell is worth 1.'''

    observation_space, action_space = spaces.Discrete(5), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(5))
        return self.cell, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.cell = int(np.clip(self.cell + action - 1, 0, 4))
        return self.cell, float(self.cell == 4), False, False, {}


class Kitchen(gymnasium.Env):
    '''A position, actions in [-3, 5] as a matrix, and a goal that is a Dict.'''

    goal_space = spaces.Dict(kettle=spaces.Box(-9, 9, (2,), np.float64), microwave=spaces.Box(-9, 9, (1,), np.float64))
    observation_space = spaces.Dict(observation=spaces.Box(-9, 9, (2,), np.float64), desired_goal=goal_space)
    action_space = spaces.Box(-3.0, 5.0, (1, 2), np.float32)

    def _observe(self):
        return {"observation": self.x, "desired_goal": {"kettle": np.ones(2), "microwave": np.zeros(1)}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = np.clip(0.5 * self.x + 0.1 * action[0], -9, 9)
        return self._observe(), -float(np.abs(self.x - 1).sum()), False, False, {}


gymnasium.register("Corridor-v0", "worlds:Corridor", max_episode_steps=6)
gymnasium.register("Kitchen-v0", "worlds:Kitchen", max_episode_steps=12)
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The module `worlds`."""
    folder, registered = tmp_path_factory.mktemp("worlds"), dict(gymnasium.registry)
    (folder / "worlds.py").write_text(WORLDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("worlds")
    gymnasium.registry.clear()
    gymnasium.registry.update(registered)


def record(make_env, *, num_steps, num_episodes, seed=0):
    """Record episodes of random actions."""
    env = make_env()
    env.action_space.seed(seed)
    for episode in range(num_episodes):
        observations, actions, rewards = [env.reset(seed=episode)[0]], [], []
        for _ in range(num_steps):
            action = env.action_space.sample()
            observation, reward, *_ = env.step(action)
            observations, actions, rewards = [*observations, observation], [*actions, action], [*rewards, reward]
        ends = np.arange(len(rewards)) == len(rewards) - 1
        yield EpisodeBuffer(
            observations=_stack(observations),
            actions=np.array(actions),
            rewards=np.array(rewards),
            terminations=np.zeros(len(rewards), bool),
            truncations=ends,
            infos={},
        )


def _stack(observations):
    if isinstance(observations[0], dict):
        return {name: _stack([each[name] for each in observations]) for name in observations[0]}
    return np.array(observations)


@pytest.fixture(scope="module")
def recorded(worlds, datasets, entry_point):
    """Write test/corridor-v0 and test/kitchen-v0, and the module where the commands find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(datasets))
        for name, cls in (("corridor", worlds.Corridor), ("kitchen", worlds.Kitchen)):
            env_id = f"{name.capitalize()}-v0"
            steps = gymnasium.spec(env_id).max_episode_steps
            episodes = list(record(cls, num_steps=steps, num_episodes=60))
            spaces = {"observation_space": cls.observation_space, "action_space": cls.action_space}
            with pytest.warns(UserWarning):
                minari.create_dataset_from_buffers(f"test/{name}-v0", episodes, env=gymnasium.spec(env_id), **spaces)
    for command in ("plan", "train_iql"):
        (entry_point(command).folder / "worlds.py").write_text(WORLDS)


@pytest.fixture(scope="module")
def plan(entry_point):
    return entry_point("plan")


def test_the_best_plan_in_a_grid_world_is_found(train, train_iql, plan, recorded, worlds, tmp_path):
    """From cell c the best return of 6 steps is 6 - (3 - c), or 6 in the last two cells.

    With Q the search looks one step ahead, so that from the first cells nothing but Q knows of the last.
    """
    done = train(
        *MAZE, "--dataset=test/corridor-v0", "--config.data.observation_keys=()", *SMALL, f"--workdir={tmp_path}"
    )
    assert done.code == 0, done.stderr
    tokenizer = checkpoints.restore(tmp_path).tokenizer
    np.testing.assert_array_equal(tokenizer.centers[0, :5], range(5))
    np.testing.assert_array_equal(tokenizer.centers[1, :3], range(3))
    q_settings = [setting for setting in MAZE if "train." not in setting]
    q_settings += [
        "--dataset=test/corridor-v0",
        "--config.data.observation_keys=()",
        "--config.iql.hidden_dims=(32,32)",
    ]
    q_settings += ["--config.iql_train.num_steps=1500", "--config.iql.learning_rate=0.003", "--config.iql.tau=0.05"]
    q_settings += ["--config.iql_train.log_every=500", "--config.eval.num_episodes=0", f"--workdir={tmp_path}/q"]
    done = train_iql(*q_settings)
    assert done.code == 0, done.stderr
    for guided in ([], [f"--iql_workdir={tmp_path}/q", "--plan.horizon=1"]):
        done = plan(f"--workdir={tmp_path}", *PLAN, "--num_episodes=5", "--env=worlds:Corridor-v0", *guided)
        assert done.code == 0, done.stderr
        results = json.loads((plan.folder / "results.json").read_text())
        starts = [worlds.Corridor().reset(seed=episode["seed"])[0] for episode in results["episodes"]]
        assert [episode["return"] for episode in results["episodes"]] == [min(6, 6 - (3 - cell)) for cell in starts]
    done = plan(f"--workdir={tmp_path}", *PLAN, "--env=worlds:Corridor-v0", "--plan.num_elites=2")
    assert done.code == 2 and "--plan.num_elites=2 must be 1: discrete actions have no mean." in done.error


def test_a_kitchen_with_wide_actions_is_learned_from_and_planned_in(train, train_iql, plan, recorded, tmp_path):
    keys = "--config.data.observation_keys=('observation','desired_goal/kettle')"
    settings = ["--dataset=test/kitchen-v0", keys]
    done = train(*MAZE, *settings, "--config.train.num_steps=20", f"--workdir={tmp_path}/tt")
    assert done.code == 0, done.stderr
    done = plan(f"--workdir={tmp_path}/tt", *PLAN)
    assert done.code == 2 and "would run worlds:Kitchen, which is not known to be harmless" in done.error
    done = plan(f"--workdir={tmp_path}/tt", *PLAN, "--trust_environment", "--reference_min=-20", "--reference_max=0")
    assert done.code == 0, done.stderr
    results = json.loads((plan.folder / "results.json").read_text())
    for episode in results["episodes"]:
        np.testing.assert_allclose(episode["normalized_score"], 100 * (episode["return"] + 20) / 20)
    few = ["--config.iql_train.num_steps=20", "--config.iql.hidden_dims=(8,8)", "--config.iql_train.batch_size=8"]
    iql_settings = [setting for setting in MAZE if "train." not in setting]
    done = train_iql(*iql_settings, *settings, *few, f"--workdir={tmp_path}/iql")
    assert done.code == 0, done.stderr
    assert "worlds:Kitchen, which is not known to be harmless; the policies are not evaluated" in done.stderr
    units = checkpoints.restore(tmp_path / "iql").params["units"]
    np.testing.assert_array_equal(units["action_center"], [1, 1])
    np.testing.assert_array_equal(units["action_scale"], [4, 4])
    done = plan(f"--workdir={tmp_path}/tt", f"--iql_workdir={tmp_path}/iql", *PLAN, "--env=worlds:Kitchen-v0")
    assert done.code == 0, done.stderr


TINY = [
    f"--config={ROOT}/experiments/configs/dataset.py:small",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=16",
    "--config.train.num_steps=10",
    "--config.train.batch_size=8",
    "--config.train.log_every=10",
    "--config.iql_train.num_steps=10",
]


def test_keys_of_numbers_are_taken_where_none_are_named(train, train_iql, plan, recorded, datasets, tmp_path):
    """In the kitchen nothing repeats; in the maze the goal that is reached is the position, which is observed."""
    done = train(*TINY, "--dataset=test/kitchen-v0", f"--workdir={tmp_path}/kitchen")
    assert done.code == 0, done.stderr
    keys = ["observation", "desired_goal/kettle", "desired_goal/microwave"]
    assert checkpoints.restore(tmp_path / "kitchen").run["data"]["observation_keys"] == keys
    assert f"data.observation_keys are {tuple(keys)}" in done.stdout
    for command, workdir in ((train, "tt"), (train_iql, "iql")):
        done = command(
            *TINY, "--dataset=test/maze-v0", f"--workdir={tmp_path}/{workdir}", "--config.eval.num_episodes=1"
        )
        assert done.code == 0, done.stderr
        run = checkpoints.restore(tmp_path / workdir).run
        assert run["data"]["observation_keys"] == ["observation", "desired_goal"]
    few = ["--num_episodes=1", "--plan.horizon=2", "--plan.beam_width=2", "--plan.replan_every=2"]
    done = plan(f"--workdir={tmp_path}/tt", f"--iql_workdir={tmp_path}/iql", *few)
    assert done.code == 0, done.stderr
    again = train(*TINY, "--dataset=test/maze-v0", f"--workdir={tmp_path}/tt")
    assert "is done: 10 of 10 steps" in again.stdout


def test_training_needs_no_configuration(train, datasets, tmp_path):
    done = train("--dataset=test/single-v0", f"--workdir={tmp_path}", "--config.train.num_steps=1", *TINY[1:3])
    assert done.code == 0, done.stderr
    assert checkpoints.restore(tmp_path).run["plan"]["beam_width"] == 32


@pytest.mark.parametrize("kind", ["fails", "sleeps"])
def test_an_evaluation_that_fails_or_is_stopped_costs_no_training(train_iql, datasets, monkeypatch, tmp_path, kind):
    """The environment of the data is one of gymnasium with an argument that makes it fail, or one that lasts."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets))
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20 if kind == "fails" else 10**9)
    episodes = list(record(lambda: env, num_steps=20, num_episodes=6))
    dataset_id = f"test/pendulum-{kind}-v0"
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(dataset_id, episodes, env=env)
    if kind == "fails":
        path = minari.storage.get_dataset_path(dataset_id) / "data" / "metadata.json"
        path.write_text(path.read_text().replace('\\"kwargs\\": {}', '\\"kwargs\\": {\\"g\\": \\"heavy\\"}'))
    settings = [setting for setting in MAZE if "train." not in setting]
    few = [f"--config.iql_train.{name}=20" for name in ("num_steps", "log_every", "eval_every", "checkpoint_every")]
    command = [*settings, f"--dataset={dataset_id}", "--config.data.observation_keys=()", *few]
    command += [f"--workdir={tmp_path}", "--config.data.max_path_length=1000000000", "--config.eval.num_episodes=1"]
    command += ["--config.iql.hidden_dims=(8,8)", "--config.iql_train.batch_size=8"]

    def is_saved():
        return checkpoints.latest_step(tmp_path) == 20

    if kind == "fails":
        done = train_iql(*command)
        assert done.code == 0, done.stderr
        assert "the environment failed, and this evaluation with it (" in done.stderr
    else:
        done = train_iql.stop_when(is_saved, signal.SIGTERM, *command)
        assert done.code in (0, 75), done.stderr
    assert checkpoints.latest_step(tmp_path) == 20


@pytest.fixture(scope="module")
def train_iql(entry_point):
    return entry_point("train_iql")


def test_reading_takes_at_most_twice_the_memory_of_the_values(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng, lengths = np.random.default_rng(0), [500] * 20

    def box(size):
        return gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    episodes = [
        EpisodeBuffer(
            observations=rng.normal(size=(length + 1, 97)),
            actions=rng.normal(size=(length, 10)),
            rewards=rng.normal(size=length),
            terminations=np.arange(length) == length - 1,
            truncations=np.zeros(length, bool),
        )
        for length in lengths
    ]
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers("test/wide-v0", episodes, observation_space=box(97), action_space=box(10))
    del episodes
    config = maze.get_config()
    config.dataset, config.data.observation_keys, config.data.distinct_values = "test/wide-v0", (), False
    tracemalloc.start()
    data = prepare.prepare(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.train.tokens.dtype == np.uint8
    values = sum(lengths) * (97 + 10 + 2) * 8
    assert peak < 2.1 * values, peak / values
