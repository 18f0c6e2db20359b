"""Likelihood and attention of a run, told from the command line."""

import json

import numpy as np
import pytest
from entry_points import read_metrics

from tt_jax import checkpoints

pytest_plugins = ["entry_fixtures"]


def run(program, *arguments):
    """Run a command to its end and return the numbers that it wrote and what it said."""
    done = program(*arguments, "--out=found.json")
    assert done.code == 0, done.stderr
    return json.loads((program.folder / "found.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def evaluated(entry_point, trained):
    return run(entry_point("evaluate"), f"--workdir={trained}", "--num_windows=100")


def test_losses_are_those_that_training_measured_in_nats_and_bits(evaluated, trained):
    found, stdout = evaluated
    assert (found["dataset"], found["checkpoint_step"], found["num_bins"]) == ("test/maze-v0", 420, 20)
    assert (found["windows"], found["episodes"]) == (2 * 23, 2)  # a tenth of 20 episodes of 24 steps, all windows
    measured = read_metrics(trained)[-1]  # over the same windows, two of them twice
    for kind, row in found["kinds"].items():
        np.testing.assert_allclose(row["nats"]["mean"], measured[f"eval/loss_{kind}"], rtol=0.05)
        np.testing.assert_allclose(row["bits"]["mean"], row["nats"]["mean"] / np.log(2), rtol=1e-12)
        assert len(row["nats_by_transition"]) == 3 and 0 < row["coverage"][0] < row["coverage"][-1] <= 1
    np.testing.assert_allclose(found["all"]["nats"]["mean"], measured["eval/loss"], rtol=0.05)
    assert "test/maze-v0, step 420: 46 windows of 2 held-out episodes, 20 bins" in stdout


def test_the_density_of_a_dimension_is_its_probability_over_the_width_of_the_bins(evaluated, trained):
    found, tokenizer = evaluated[0], checkpoints.restore(trained).tokenizer
    row = found["dimensions"]["observation[0]"]
    assert row["kind"] == "observation" and row["column"] == "continuous"
    widths = np.diff(np.unique(tokenizer.thresholds[0]))
    # The mean of -log(p / width): between the losses with all bins of the least and of the greatest width.
    low, high = -row["nats"]["mean"] - np.log([widths.max(), widths.min()])
    assert low < row["log_density"]["mean"] < high


def test_attention_is_measured_for_every_head_beside_its_standards(entry_point, trained):
    program = entry_point("attention")
    found, stdout = run(program, f"--workdir={trained}", "--num_windows=20")
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(0, 0), (0, 1)]
    assert found["windows"] == 20
    for head in found["heads"]:
        for share in head["shares"].values():
            np.testing.assert_allclose(share["untrained"], share["uniform"], atol=0.02)  # small weights
            assert 0 <= share["mean"] <= 1
    assert set(found["losses"]) == {"none", "older", "past_actions", "past_observations"}
    assert all(row["added"]["mean"] == 0 for row in found["losses"]["none"].values())
    assert any(row["added"]["mean"] != 0 for row in found["losses"]["older"].values())
    with np.load(program.folder / "found.npz") as arrays:
        maps = arrays["maps"]
    assert maps.shape == (1, 2, 29, 29)  # 3 transitions of 6 + 2 + 2 tokens
    np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=1e-4)
    for name in ("found.png", "found_shares.png"):
        assert (program.folder / name).stat().st_size > 1000
    assert "layer 0, head 1" in stdout


@pytest.mark.parametrize("name", ["evaluate", "attention"])
def test_a_workdir_without_a_run_is_told_in_one_line(entry_point, tmp_path, name):
    done = entry_point(name)(f"--workdir={tmp_path}")
    assert done.code == 2 and "no checkpoint in" in done.error
