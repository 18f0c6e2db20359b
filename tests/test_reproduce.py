"""Training for some minutes, and the whole experiment in one run with everything tiny."""

import json

import numpy as np
import pytest
from entry_points import MAZE, read_metrics

from experiments.common import time_budget
from tt_jax import checkpoints, training

pytest_plugins = ["entry_fixtures"]

SETTINGS = [
    *MAZE,
    "--config.train.steps_per_call=50",
    "--config.iql.hidden_dims=(8,8)",
    "--config.iql.actor_cosine=False",
    "--config.iql_train.num_steps=30",
    "--config.plan.horizon=2",
    "--config.plan.beam_width=4",
]
TINY = [*SETTINGS, "--num_episodes=2", "--minutes=0.02"]  # over before it trains: one update


@pytest.fixture(scope="module")
def finished(entry_point, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reproduce")
    done = entry_point("reproduce")(*TINY, f"--workdir={workdir}", "--total_minutes=10")
    assert done.code == 0, done.stderr
    return workdir, done


def test_one_run_trains_plays_and_writes_table_curves_and_small_checkpoints(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results["complete"]
    assert list(results["policies"]) == ["iql", "one_step", "medians", "likelihood", "fewer_beams", "search"]
    for record in results["policies"].values():
        assert [(e["seed"], e["length"]) for e in record["episodes"]] == [(0, 24), (1, 24)]
        # the scores 1 and 9 of the data are 0 and 100
        assert record["normalized_score"]["mean"] == pytest.approx((record["return"]["mean"] - 1) / 8 * 100)
        assert record["title"] in done.stdout
    assert results["policies"]["search"]["plan"]["beam_width"] == 4
    assert results["policies"]["fewer_beams"]["plan"]["beam_width"] == 1
    assert (workdir / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["updates"] == checkpoints.latest_step(workdir / "tt") == read_metrics(workdir / "tt")[-1]["step"]


def test_the_small_checkpoint_is_the_last_one_in_bfloat16_and_plans(finished, entry_point, tmp_path):
    workdir, _ = finished
    small, large = checkpoints.restore(workdir / "small" / "tt"), checkpoints.restore(workdir / "tt")
    assert small.state is None and small.step == large.step
    kernel = small.params["blocks_0"]["qkv"]["kernel"]
    assert kernel.dtype.name == "bfloat16"
    np.testing.assert_allclose(np.float32(kernel), large.params["blocks_0"]["qkv"]["kernel"], rtol=2**-8)
    arguments = [f"--workdir={workdir}/small/tt", f"--iql_workdir={workdir}/small/iql", "--num_episodes=2"]
    done = entry_point("plan")(*arguments, f"--out={tmp_path}/out.json", "--num_envs=2")
    assert done.code == 0, done.stderr


def test_the_same_command_says_that_it_is_done_and_other_minutes_are_refused(finished, entry_point):
    workdir, _ = finished
    again = entry_point("reproduce")(*TINY, f"--workdir={workdir}")
    assert (again.code, "is done; another --workdir starts anew" in again.stdout) == (0, True)
    other = entry_point("reproduce")(*TINY, f"--workdir={workdir}", "--minutes=0.03")
    assert (other.code, "holds a run with other settings" in other.error) == (2, True)


@pytest.mark.slow  # two more runs
def test_what_the_clock_leaves_out_is_told_and_played_by_the_same_command(finished, entry_point):
    workdir, _ = finished
    before = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").unlink()
    for name in ("medians", "likelihood", "fewer_beams", "search"):
        (workdir / "played" / f"{name}.json").rename(workdir / f"{name}.json")
    late = entry_point("reproduce")(*TINY, f"--workdir={workdir}", "--total_minutes=0.02")  # is over before it plays
    assert late.code == 0, late.stderr
    assert late.stdout.count("2 of 2 cut off by the clock") == 4
    assert not json.loads((workdir / "results.json").read_text())["complete"]
    for name in ("medians", "likelihood", "fewer_beams"):
        (workdir / f"{name}.json").rename(workdir / "played" / f"{name}.json")
    again = entry_point("reproduce")(*TINY, f"--workdir={workdir}", "--total_minutes=10")
    assert again.code == 0, again.stderr
    after = json.loads((workdir / "results.json").read_text())
    assert after["complete"]
    assert after["policies"]["search"]["episodes"] == before["policies"]["search"]["episodes"]


def test_a_resumed_run_keeps_its_updates_and_other_minutes_are_refused(finished, train):
    workdir, _ = finished
    again = train(*SETTINGS, f"--workdir={workdir}/tt")
    assert again.code == 0, again.stderr
    updates = checkpoints.latest_step(workdir / "tt")
    assert f"is done: {updates} of {updates} steps" in again.stdout
    other = train(*SETTINGS, f"--workdir={workdir}/tt", "--minutes=5")
    assert (other.code, "not 5; use another --workdir" in other.error) == (2, True)


def test_minutes_are_refused_for_a_run_that_began_without(trained, train):
    done = train(*MAZE, f"--workdir={trained}", "--minutes=5")
    assert (done.code, "holds a run without --minutes" in done.error) == (2, True)


def test_a_schedule_fills_the_time_and_keeps_its_shape():
    config = training.TrainConfig(
        num_steps=1000, warmup_tokens=50, final_tokens=1000, input_noise=1.0, input_noise_steps=900, log_every=100
    )
    measured = {"seconds": 100.0, "per_step": 0.01, "per_evaluation": 1.0, "tokens_per_step": 7.0}
    numbers = time_budget.fit(config, **measured)
    assert numbers["num_steps"] == 8700  # 97 s less 10 evaluations
    assert numbers["final_tokens"] == 8700 * 7
    assert numbers["warmup_tokens"] == 8700 * 7 * 0.05
    assert numbers["input_noise_steps"] == 7830
    assert numbers["log_every"] == 87
    assert numbers["eval_every"] == numbers["checkpoint_every"] == 870
