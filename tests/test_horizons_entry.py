"""Open-loop predictions from the command line: the starts, the numbers by horizon, mistakes."""

import json

import numpy as np
import pytest
from entry_points import MAZE

from experiments.common import open_loop_run
from tt_jax import trajectories

pytest_plugins = ["entry_fixtures"]

SMALL = [
    *MAZE,
    "--config.train.num_steps=20",
    "--config.train.checkpoint_every=20",
    "--config.ensemble.num_members=2",
    "--config.ensemble.hidden_dims=(8,)",
    "--config.ensemble.validate_every=10",
    "--config.ensemble_train.num_steps=40",
    "--config.ensemble_train.batch_size=16",
    "--config.ensemble_train.log_every=20",
    "--config.ensemble_train.eval_every=20",
    "--config.ensemble_train.checkpoint_every=40",
    "--num_starts=4",
    "--num_samples=4",
]


@pytest.fixture(scope="module")
def horizons(entry_point):
    return entry_point("horizons")


@pytest.mark.slow
def test_every_model_is_measured_at_every_step_without_the_hidden_dimensions(horizons, tmp_path):
    arguments = [*SMALL, f"--workdir={tmp_path}/run", "--horizon=5", "--hidden_dims=half"]
    done = horizons(*arguments)
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "run" / "horizons.json").read_text())
    assert found["run"]["data"]["hidden_dims"] == [3, 4, 5]  # position, velocity and goal have 6
    assert found["dimensions"] == ["observation[0]", "observation[1]", "observation[2]"]
    assert found["num_starts"] == [4] * 5
    assert found["trained_steps"] == {"transformer": 20, "markov": 31, "ensemble": 40, "deterministic": 40}
    kinds = ["transformer", "transformer_median", "transformer_greedy"]
    kinds += [f"{kind}_own_actions" for kind in kinds]
    others = ["markov", "ensemble_ts1", "ensemble_tsinf", "ensemble_ts1_bounded", "deterministic"]
    assert set(found["models"]) == {*kinds, *others}
    for rows in found["models"].values():
        for name in ("error", "error_90th_percentile", "error_of_mean", "return_error", "log_likelihood"):
            assert np.isfinite([rows[name], rows[f"{name}_standard_error"]]).all() and len(rows[name]) == 5
        assert np.isfinite(rows["energy_distance"]).all()
    first = [found["models"][name]["error"][0] for name in ("ensemble_ts1", "ensemble_tsinf")]
    assert first == pytest.approx([np.mean(first)] * 2, rel=0.5)
    for name in ("horizons.json", "horizons.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    assert "no pictures of bodies" in done.stdout  # of a point

    again = horizons(*arguments)
    assert again.code == 0 and "transformer_greedy: already done" in again.stdout
    repeated = json.loads((tmp_path / "run" / "horizons.json").read_text())
    assert repeated["models"] == found["models"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_samples=5"], "--num_samples=5 must be a multiple of config.ensemble.num_members=2"),
        (["--hidden_dims=1,x"], "--hidden_dims=1,x must be numbers, or half"),
        (["--hidden_dims=9"], "data.hidden_dims=(9,) must be some, but not all, of the 6 observed dimensions"),
        (["--config.data.step=2"], "single-step models know no goals"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_work(horizons, tmp_path, arguments, message):
    done = horizons(*SMALL, f"--workdir={tmp_path}", *arguments)
    assert done.code == 2 and message in done.error
    assert not list(tmp_path.glob("**/checkpoints"))


# Episodes of 5 and 3 steps, whose observations count up by 1 from 0 and from 10; the last one's end is not known.
DATA = trajectories.Trajectories(
    observations=np.array([[0.0], [1], [2], [3], [4], [10], [11], [12]]),
    final_observations=np.array([[5.0], [12]]),
    final_known=np.array([True, False]),
    actions=np.arange(8.0)[:, None],
    rewards=np.arange(8.0),
    offsets=np.array([0, 5, 8]),
    terminated=np.array([True, False]),
)


def test_starts_have_the_horizon_before_them():
    starts = open_loop_run.choose_starts(DATA, horizon=4, count=2, seed=0)
    assert list(zip(starts.episodes, starts.steps, strict=True)) == [(0, 0), (0, 1)]
    np.testing.assert_array_equal(starts.observations[:, 0], [0, 1])
    np.testing.assert_array_equal(starts.future.states[..., 0], [[1, 2, 3, 4], [2, 3, 4, 5]])
    np.testing.assert_array_equal(starts.future.actions[..., 0], [[0, 1, 2, 3], [1, 2, 3, 4]])
    assert starts.is_real.all()


def test_where_too_few_starts_have_it_what_lies_beyond_the_episode_does_not_count():
    starts = open_loop_run.choose_starts(DATA, horizon=6, count=6, seed=0)
    chosen = list(zip(starts.episodes, starts.steps, strict=True))
    assert len(chosen) == 6 and (0, 0) in chosen
    left = [(5 if episode == 0 else 2) - step for episode, step in chosen]
    np.testing.assert_array_equal(starts.is_real.sum(axis=1), left)
    for state, real, first in zip(starts.future.states, starts.is_real, starts.observations, strict=True):
        np.testing.assert_array_equal(state[real, 0], first[0] + 1 + np.arange(real.sum()))


def test_the_past_of_a_start_is_that_of_its_episode():
    starts = open_loop_run.choose_starts(DATA, horizon=1, count=7, seed=0)
    assert list(starts.steps) == [0, 1, 2, 3, 4, 0, 1]
    tokens = np.arange(8)[:, None].astype(np.uint8)
    store = trajectories.TokenStore(tokens=tokens, offsets=DATA.offsets, terminated=DATA.terminated)
    past = open_loop_run.contexts(store, starts, length=2)
    np.testing.assert_array_equal(past.length, [0, 1, 2, 2, 2, 0, 1])
    rows = [list(row[:length, 0]) for row, length in zip(past.tokens, past.length, strict=True)]
    assert rows == [[], [0], [0, 1], [1, 2], [2, 3], [], [5]]
