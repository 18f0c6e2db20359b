"""What a dataset holds, told from the command line."""

import json

import numpy as np
import pytest

pytest_plugins = ["entry_fixtures"]


@pytest.fixture(scope="module")
def describe(entry_point):
    return entry_point("describe")


def test_a_maze_is_described_with_its_picture(describe, tmp_path):
    done = describe("--dataset=test/maze-v0", f"--out={tmp_path}/out")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "out" / "description.json").read_text())
    assert (found["episodes"], found["steps"], found["terminated"], found["truncated"]) == (20, 20 * 24, 0, 20)
    assert found["length"] == {"min": 24, "median": 24, "max": 24, "mean": 24, "std": 0}
    assert found["environment"] == "PointMaze_UMaze-v3" and found["time_limit"] == 24
    assert found["observation_keys"] == ["observation", "desired_goal"]
    assert found["tokens_per_transition"] == 6 + 2 + 2
    assert found["constant_columns"] == []
    assert "data.stop_after_truncation=False" in found["suggestions"]
    assert (tmp_path / "out" / "dataset.png").stat().st_size > 1000
    assert "suggested: --config.data.stop_after_truncation=False  # no episode really ends" in done.stdout


def test_numbers_are_those_of_the_data(describe, datasets, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets))
    done = describe("--dataset=test/short-v0")
    assert done.code == 0, done.stderr
    returns = [episode.rewards.sum() for episode in minari.load_dataset("test/short-v0")]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    assert lines["episodes"] == "7" and lines["terminated"] == "3" and lines["observation_keys"] == "none"
    assert lines["length"].startswith("min 1, median 2, max 3, ")
    assert f"mean {np.mean(returns):.6g}, std {np.std(returns):.6g}" in lines["return"]
    assert lines["environment"] == "" and lines["merged_by_quantiles"] == "none"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset=test/none-v0"], "Dataset test/none-v0 not found at"),
        (["--dataset=test/nan-v0"], "all data must be finite"),
        ([], "dataset"),
    ],
)
def test_mistakes_are_told_in_one_line(describe, arguments, message):
    done = describe(*arguments)
    assert done.code == 2 and message in done.error
