"""IQL from the command line: files, seeds side by side, resuming, guiding the planner, and the caller's mistakes."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from entry_points import MAZE, read_metrics

from experiments.common import control
from tt_jax import checkpoints, iql

pytest_plugins = ["entry_fixtures"]

IQL = [
    *(setting for setting in MAZE if "train." not in setting),
    "--config.iql.hidden_dims=(16,16)",
    "--config.iql_train.num_steps=300",
    "--config.iql_train.batch_size=16",
    "--config.iql_train.steps_per_call=20",
    "--config.iql_train.log_every=10",
    "--config.iql_train.eval_every=100",
    "--config.iql_train.checkpoint_every=50",
    "--config.eval.num_episodes=2",
]


@pytest.fixture(scope="session")
def train_iql(entry_point):
    return entry_point("train_iql")


@pytest.fixture(scope="session")
def learned(train_iql, tmp_path_factory):
    """Workdir of a run with the seeds 0 and 1 that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("learned")
    done = train_iql(*IQL, f"--workdir={workdir}", "--num_seeds=2")
    assert done.code == 0, done.stderr
    return workdir


def test_a_run_leaves_metrics_and_a_checkpoint_with_units(learned):
    metrics = read_metrics(learned)
    assert [line["step"] for line in metrics] == list(range(10, 301, 10))
    names = {"value_loss", "actor_loss", "critic_loss", "v", "q1", "q2", "advantage"}
    assert {f"train/{name}" for name in names} < metrics[0].keys()
    assert [line["step"] for line in metrics if "eval/return" in line] == [100, 200, 300]
    assert all(0 <= line["eval/success"] <= 1 for line in metrics if "eval/success" in line)
    assert metrics[-1]["time/updates_per_second"] == pytest.approx(2 * metrics[-1]["time/steps_per_second"])

    checkpoint = checkpoints.restore(learned)
    assert checkpoint.config == iql.IQLConfig(
        observation_dim=6,
        action_dim=2,
        hidden_dims=(16, 16),
        expectile=0.9,
        temperature=10.0,
        actor_cosine_steps=300,
        normalize_observations=True,
        reward_units="minus_one",
    )
    np.testing.assert_array_equal(checkpoint.params["units"]["reward_shift"], [-1.0, -1.0])
    assert np.ptp(checkpoint.params["units"]["observation_mean"][0]) > 0  # measured on the data
    assert checkpoint.run["data"]["observation_keys"] == ["observation", "desired_goal"]


def test_a_learner_among_others_ends_as_it_does_alone(train_iql, learned, tmp_path):
    done = train_iql(*IQL, f"--workdir={tmp_path}", "--config.seed=1")
    assert done.code == 0, done.stderr
    alone, both = checkpoints.restore(tmp_path).params, checkpoints.restore(learned).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1], rtol=1e-4, atol=1e-5), alone, both)
    q = iql.q_values(alone, np.zeros([3, 6], np.float32), np.zeros([3, 2], np.float32))  # has no axis of the seeds
    assert q.shape == (2, 3)


def test_a_run_that_was_stopped_ends_as_if_it_was_not(train_iql, learned, tmp_path):
    command = [*IQL, f"--workdir={tmp_path}", "--num_seeds=2"]

    def has_begun():
        return any(line["step"] >= 60 for line in read_metrics(tmp_path))

    stopped = train_iql.stop_when(has_begun, signal.SIGTERM, *command)
    assert (stopped.code, "the same command goes on" in stopped.error) == (75, True)
    assert 60 <= checkpoints.latest_step(tmp_path) < 300
    done = train_iql(*command)
    assert done.code == 0, done.stderr
    resumed, expected = (checkpoints.restore(workdir) for workdir in (tmp_path, learned))
    for part in ("params", "state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(resumed, part), getattr(expected, part))
    assert "is done: 300 of 300 steps" in train_iql(*command).stdout


def test_four_devices_learn_what_one_learns(train_iql, learned, tmp_path):
    done = train_iql(*IQL, f"--workdir={tmp_path}", "--num_seeds=2", "--config.eval.num_episodes=0", devices=4)
    assert done.code == 0, done.stderr
    got, expected = (
        {line["step"]: line["train/value_loss"] for line in read_metrics(workdir)} for workdir in (tmp_path, learned)
    )
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.step=2"], "data.step=2 must be 1: IQL learns from single steps."),
        (["--config.iql.expectile=1.5"], "expectile=1.5 must be in"),
        (["--config.iql_train.num_steps=0"], "iql_train.num_steps=0 must be at least 1."),
        (["--config.seed=-1"], "seed=-1 must be in"),
        (["--config.eval.goal=(0.0,0.0)"], "the goal (0.0, 0.0) is in a wall of the maze"),
        (["--config.eval.goal=(50.0,0.0)"], "the goal (50.0, 0.0) is outside of the maze"),
    ],
    ids=["step", "expectile", "num_steps", "seed", "wall", "outside"],
)
def test_mistakes_are_told_in_one_line(train_iql, tmp_path, arguments, message):
    done = train_iql(*IQL, f"--workdir={tmp_path}", *arguments)
    assert done.code == 2
    assert message in done.error


def test_a_workdir_keeps_its_method_and_number_of_seeds(train_iql, learned, trained, entry_point):
    done = train_iql(*IQL, f"--workdir={learned}", "--num_seeds=1")
    assert done.code == 2 and "made with iql_train.num_seeds=2, this run has 1; use" in done.error
    done = entry_point("train_baseline")(*IQL, "--method=bc", f"--workdir={learned}")
    assert done.code == 2 and "made with method='iql', this run has 'bc'; use" in done.error
    done = train_iql(*MAZE, f"--workdir={trained}")
    assert done.code == 2 and "made with method='tt', this run has 'iql'; use" in done.error


def test_data_without_an_environment_is_learned_from_without_playing(train_iql, tmp_path):
    settings = ["--dataset=test/within-v0", "--config.data.observation_keys=()", "--config.iql_train.num_steps=10"]
    done = train_iql(*IQL, *settings, f"--workdir={tmp_path}")
    assert done.code == 0, done.stderr
    assert "the dataset names no environment; the policies are not evaluated" in done.stderr
    assert checkpoints.latest_step(tmp_path) == 10
    assert not any(name.startswith("eval/") for line in read_metrics(tmp_path) for name in line)


# Guiding the planner


@pytest.fixture(scope="session")
def plan(entry_point):
    return entry_point("plan")


GUIDED = ["--num_episodes=2", "--plan.horizon=2", "--plan.beam_width=3", "--plan.context_transitions=2"]


def test_plan_is_guided_by_the_learners(plan, trained, learned):
    done = plan(f"--workdir={trained}", f"--iql_workdir={learned}", *GUIDED)
    assert done.code == 0, done.stderr
    results = json.loads((plan.folder / "results.json").read_text())
    assert results["settings"]["iql_workdir"] == str(learned)
    assert plan(f"--workdir={trained}", *GUIDED).code == 0
    without = json.loads((plan.folder / "results.json").read_text())
    assert [e["return"] for e in results["episodes"]] != [e["return"] for e in without["episodes"]]


def test_plans_with_q_have_their_own_settings_but_for_what_the_command_says(trained, learned, tmp_path):
    checkpoint = checkpoints.restore(trained)
    own = dict.fromkeys(checkpoint.run["plan"]) | {"horizon": 1, "num_elites": 4}
    fields = {name: getattr(checkpoint, name) for name in ("step", "params", "config", "tokenizer")}
    checkpoints.save(tmp_path, run=checkpoint.run | {"guided_plan": own}, **fields)

    def settings(iql_workdir, **overrides):
        return control.restore_planner(str(tmp_path), iql_workdir, overrides)[2]

    plain, guided = settings(None), settings(str(learned))
    assert plain.horizon > 1 == plain.num_elites
    assert guided == dataclasses.replace(plain, horizon=1, num_elites=4, discount=guided.discount)
    assert settings(str(learned), horizon=3) == dataclasses.replace(guided, horizon=3)


def test_a_q_function_that_does_not_suit_the_model_is_refused(plan, trained, learned, tmp_path):
    def refused(workdir, iql_workdir, *arguments):
        done = plan(f"--workdir={workdir}", f"--iql_workdir={iql_workdir}", *GUIDED, *arguments)
        assert done.code == 2
        return done.error

    def changed(source, name, **data):
        checkpoint = checkpoints.restore(source)
        run = checkpoint.run | {"data": checkpoint.run["data"] | data}
        fields = ("step", "params", "config", "tokenizer")
        checkpoints.save(tmp_path / name, run=run, **{field: getattr(checkpoint, field) for field in fields})
        return tmp_path / name

    layout = changed(learned, "layout", observation_keys=["achieved_goal", "desired_goal"])
    assert "was trained with observation_keys=['achieved_goal', 'desired_goal']" in refused(trained, layout)
    penalty = changed(trained, "penalty", termination_penalty=-100.0)
    remedy = "train the transformer with --config.data.termination_penalty=None"
    assert f"termination_penalty=None, the transformer with -100.0; {remedy}" in refused(penalty, learned)
    assert "must be that of the Q-function, 0.99" in refused(trained, learned, "--plan.discount=0.9")
    assert "a run of experiments.train_iql is needed" in refused(trained, trained)
    assert "a run of experiments.train_tt is needed" in refused(learned, learned)
