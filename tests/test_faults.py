"""A disk that is full, and checkpoints that are damaged."""

import resource
import shutil

import gymnasium
import numpy as np
import pytest
from entry_points import read_metrics
from minari import data_collector

from experiments.common import metrics, recording
from tt_jax import checkpoints, minari_files, types


@pytest.fixture
def small_files():
    """Return a function that limits the size of every file that this process writes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path, small_files):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    small_files(3 * size - 10)
    writer.write(2, {"train/loss": 0.5})
    with pytest.raises(OSError, match="File too large"):
        writer.write(3, {"train/loss": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 2 * size
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_run_goes_on_without_tensorboard_when_its_files_cannot_be_written(tmp_path, small_files):
    writer = metrics.MetricsWriter(tmp_path)
    small_files(4_000)  # 100 lines are 3,400 bytes, as many events 6,000
    for step in range(100):  # tensorboardX's own queue holds ten
        writer.write(step, {"train/loss": 0.5})
    writer.close()
    assert len(read_metrics(tmp_path)) == 100
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size == 4_000


def test_a_dataset_appears_whole_or_not_at_all(tmp_path, small_files, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    box = gymnasium.spaces.Box(-9.0, 9.0, (3,))

    def write(length, **settings):
        last = np.arange(length) == length - 1
        steps = {"actions": np.ones((length, 3)), "rewards": np.ones(length), "terminations": last, "truncations": last}
        episode = data_collector.EpisodeBuffer(observations=np.ones((length + 1, 3)), infos={}, **steps)
        recording.write("test/a-v0", [episode], env=None, observation_space=box, action_space=box, **settings)

    def steps():
        return minari_files.open_storage("test/a-v0").total_steps

    write(7)
    with pytest.raises(ValueError, match="a-v0 already exists"):
        write(8, overwrite=False)
    small_files(20_000)  # HDF5 would end this process with a segmentation fault
    with pytest.raises(OSError, match=r"a-v0 cannot be written, what was there before stays \(File too large\)"):
        write(20_000)
    small_files(resource.RLIM_INFINITY)
    assert steps() == 7 and [path.name for path in tmp_path.iterdir()] == ["test"]
    write(9)
    assert steps() == 9


def flip(step):
    """Change a bit of the arrays."""
    path = max((step / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(step):
    path = max((step / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(step):
    (step / "settings" / "metadata").unlink()


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, lose_a_file, empty])
def test_the_newest_checkpoint_that_is_whole_is_found(tmp_path, damage):
    for step in (1, 2, 3):
        values = np.random.default_rng(step).normal(size=3000)
        config = types.TransitionSpec(observation_dim=1, action_dim=1, num_bins=3)
        checkpoints.save(tmp_path, step=step, params={"a": values}, config=config, tokenizer=None)
    for step in (2, 3):
        damage(tmp_path / "checkpoints" / str(step))
    checkpoint, damaged = checkpoints.restore_newest(tmp_path)
    assert (checkpoint.step, list(damaged)) == (1, [3, 2])
    for step in (3, 2):
        aside = checkpoints.set_aside(tmp_path, step)
        assert aside == tmp_path / "damaged" / str(step) and aside.is_dir()
    checkpoint, damaged = checkpoints.restore_newest(tmp_path)
    assert (checkpoint.step, damaged) == (1, {})
    damage(tmp_path / "checkpoints" / "1")
    with pytest.raises(checkpoints.DamagedError, match="no checkpoint in .* can be read: checkpoint .*/1 is damaged"):
        checkpoints.restore_newest(tmp_path)
