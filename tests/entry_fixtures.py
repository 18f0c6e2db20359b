"""What the tests of the entry points share: a process that runs programs, datasets, and a trained run."""

import functools
import itertools
import os
import subprocess
import sys

import gymnasium
import minari
import numpy as np
import pytest
from entry_points import MAZE, ROOT, SERVER, EntryPoint
from minari.data_collector import EpisodeBuffer

from experiments.common import recording, waypoint_controller
from tt_jax import environments


@pytest.fixture(scope="session")
def server():
    """The process that runs the entry points."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        text=True,
    )

    yield process
    process.communicate(timeout=60)


@pytest.fixture(scope="session")
def entry_point(server, tmp_path_factory, datasets):
    """A function from the name of an entry point to its EntryPoint."""

    @functools.cache
    def find(name):
        return EntryPoint(
            module=f"experiments.{name}",
            server=server,
            folder=tmp_path_factory.mktemp(name),
            environment={"MINARI_DATASETS_PATH": str(datasets)},
        )

    return find


@pytest.fixture
def own_entry_point(server, tmp_path):
    """A function from the name of an entry point to its EntryPoint in tmp_path, where its datasets are, too."""

    def find(name):
        environment = {"MINARI_DATASETS_PATH": str(tmp_path)}
        return EntryPoint(module=f"experiments.{name}", server=server, folder=tmp_path, environment=environment)

    return find


@pytest.fixture(scope="session")
def train(entry_point):
    return entry_point("train_tt")


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """Workdir of a run on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("trained")
    done = train(*MAZE, f"--workdir={workdir}")
    assert done.code == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Folder of the Minari datasets test/NAME-v0."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        env = environments.make("PointMaze_UMaze-v3", reward_type="dense", max_episode_steps=24)
        episodes = itertools.islice(waypoint_controller.episodes(env, max_noise=2.0, seed=0), 20)
        recording.write("test/maze-v0", episodes, env=env, ref_min_score=1.0, ref_max_score=9.0)
        env.close()
        _write_boxes("short", [1, 2, 1, 3, 1, 2, 2])
        _write_boxes("single", [30])
        _write_boxes("within", [20, 25, 30, 20], largest_action=1.0)
        _write_boxes("steps", [1, 1, 1])
        _write_boxes("nan", [6, 6, 6], broken=(1, 4))
    return folder


def _write_boxes(name, lengths, *, broken=None, largest_action=np.inf):
    """Write random episodes with 3 observations and 2 actions; the odd ones are terminated, the others truncated."""
    rng = np.random.default_rng(0)
    episodes = []
    for i, length in enumerate(lengths):
        last = np.arange(length) == length - 1
        episode = EpisodeBuffer(
            observations=rng.normal(size=(length + 1, 3)).astype(np.float32),
            actions=np.clip(rng.normal(size=(length, 2)), -largest_action, largest_action).astype(np.float32),
            rewards=rng.normal(size=length),
            terminations=last & (i % 2 == 1),
            truncations=last & (i % 2 == 0),
        )
        if broken and broken[0] == i:
            episode.observations[broken[1], 2] = np.nan
        episodes.append(episode)

    def box(size):
        return gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    with pytest.warns(UserWarning):  # Minari asks for author, permalink and environment
        minari.create_dataset_from_buffers(f"test/{name}-v0", episodes, observation_space=box(3), action_space=box(2))
