"""Measurements of planners: what plans promise and keep in real states, and the command that compares planners."""

import functools
import json
import operator

import gymnasium
import jax
import numpy as np
import pytest
from test_sequence_planner import ONE_LAYER, SPEC, random_params

from experiments.common import planner_study, planners
from tt_jax import action_planner, checkpoints, iql, rollouts, sequence_planner, tokenization, trajectories

pytest_plugins = ["entry_fixtures"]


class Clock(gymnasium.Env):
    """Pays the number of the step, ends after `limit` of them, and shows the sums of the actions and the time."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (SPEC.observation_dim,), np.float64)
    action_space = gymnasium.spaces.Box(-10.0, 10.0, (SPEC.action_dim,), np.float32)
    limit = 22

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sums, self.time = self.np_random.normal(size=2), 0
        return np.array([*self.sums, 0.0]), {}

    def step(self, action):
        self.sums, self.time = self.sums + action, self.time + 1
        return np.array([*self.sums, self.time / 10]), float(self.time), self.time == self.limit, False, {}


PLAN_CONFIG = sequence_planner.PlanConfig(horizon=3, beam_width=4, window=(3, 2), context_transitions=2, discount=0.5)


def make_study(params, learners=None):
    return planner_study.Study(
        checkpoint=checkpoints.Checkpoint(
            step=0, params=params.transformer, config=ONE_LAYER, tokenizer=params.discretizer, state=None, run={}
        ),
        learners=learners,
        plan_config=PLAN_CONFIG,
        search_config=action_planner.SearchConfig(),
        data_config=trajectories.DataConfig(),
        make_env=Clock,
        seeds=range(5, 9),
        num_envs=2,
        reference=None,
        check_fn=lambda: None,
    )


def past_of(episode, params, start):
    """Return the end of the first `start` steps of a recorded episode as a planner reads it: context, observation."""
    past = rollouts.Episode(
        seed=0,
        observations=episode.observations[: start + 1],
        actions=episode.actions[:start],
        rewards=episode.rewards[:start],
    )
    context = rollouts.encode_context([past], discretizer=params.discretizer, spec=SPEC, context_transitions=2)
    return context, past.observations[-1][None]


def test_plans_are_executed_in_the_recorded_states_and_compared_step_by_step():
    params = random_params(config=ONE_LAYER, stop_logit=-30.0)
    plan_config, study = PLAN_CONFIG, make_study(params)
    recorded = planner_study.record(study)
    assert [(episode.seed, episode.length) for episode in recorded] == [(seed, 22) for seed in range(5, 9)]
    ((cell, cell_config),) = planner_study.cells(plan_config, [("shoot", (3, 4)), ("shoot", (3, 4))])
    row = planner_study.promise_and_keep(study, cell, cell_config, recorded)
    # From steps 0, 10 and 20, where the third action would come after the end.
    real = [1 + 0.5 * 2 + 0.25 * 3, 11 + 0.5 * 12 + 0.25 * 13, 21 + 0.5 * 22]
    np.testing.assert_allclose(row["real"]["mean"], np.mean(real), rtol=1e-6)
    np.testing.assert_allclose(row["real"]["standard_error"], np.std(4 * real, ddof=1) / 12**0.5, rtol=1e-6)

    # The same by hand, with the library's own planner.
    plan_fn = jax.jit(action_planner.make_shoot_plan_fn(config=ONE_LAYER, plan_config=plan_config))
    predict_fn = jax.jit(action_planner.make_predict_fn(config=ONE_LAYER, plan_config=plan_config))
    predicted, errors, log_probs = [], [], []
    for episode in recorded:
        for start in (0, 10, 20):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), episode.seed), start)
            context, observation = past_of(episode, params, start)
            arguments = (params, key[None], context, observation)
            plan = plan_fn(*arguments)
            steps = predict_fn(*arguments, plan.actions)
            predicted.append(np.sum(0.5 ** np.arange(3) * steps.reward[0]))
            log_probs.append(np.mean(steps.log_prob))
            imagined = tokenization.decode(params.discretizer, plan.tokens[0, 1:, :3], dims=slice(3))
            sums = np.cumsum(np.concatenate([observation[:, :2], plan.actions[0, :2]]), axis=0)[1:]
            seen = np.column_stack([sums, (start + np.arange(1, 3)) / 10])[: 21 - start]
            scale = np.std(params.discretizer.centers[:3], axis=1)
            errors.append(np.mean(np.abs(imagined[: len(seen)] - seen) / scale))
    for name, values in (("predicted", predicted), ("observation_error", errors), ("log_prob", log_probs)):
        np.testing.assert_allclose(row[name]["mean"], np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(row["predicted_minus_real"]["mean"], np.mean(predicted) - np.mean(real), rtol=1e-5)


def test_with_learners_plans_promise_what_the_search_scores_and_keep_rewards_and_a_value():
    units = {"observation_mean": np.ones(3), "observation_std": np.ones(3), "reward_scale": 3.0, "reward_shift": -0.5}
    init = functools.partial(
        iql.init, config=iql.IQLConfig(observation_dim=3, action_dim=2, hidden_dims=(8,)), units=units
    )
    learners = jax.vmap(init)(jax.random.split(jax.random.key(1), 2)).params
    params = random_params(config=ONE_LAYER, stop_logit=-30.0).replace(extra=learners)
    study = make_study(params, learners)
    recorded = planner_study.record(study)
    ((cell, cell_config),) = planner_study.cells(PLAN_CONFIG, [("shoot", (2, 4))])
    row = planner_study.promise_and_keep(study, cell, cell_config, recorded)

    guided = sequence_planner.guide_by_q(discount=0.5)
    plan_fn = jax.jit(action_planner.make_shoot_plan_fn(config=ONE_LAYER, plan_config=cell_config, **guided))
    scores, came = [], []
    for start in (0, 10, 20):
        for episode in recorded:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), episode.seed), start)
            context, observation = past_of(episode, params, start)
            plan = plan_fn(params, key[None], context, observation)
            scores.append(plan.scores[0, 0])
            rewards = 3 * (start + 1) - 0.5 + 0.5 * (3 * (start + 2) - 0.5)
            end = np.append(observation[0, :2] + plan.actions[0].sum(axis=0), (start + 2) / 10)
            values = [iql.values(jax.tree.map(operator.itemgetter(i), learners), end) for i in range(2)]
            came.append(rewards + (0.25 * np.mean(values) if start < 20 else 0.0))  # step 22 ends the episode
    np.testing.assert_allclose(row["predicted"]["mean"], np.mean(scores), rtol=1e-4)
    np.testing.assert_allclose([state["real"] for state in row["states"]], came, rtol=1e-4)


@pytest.fixture(scope="module")
def command(entry_point, trained):
    program = entry_point("planners")
    # The programs are those of the tests of `plan`, which need not be compiled again.
    plan = {"horizon": 2, "beam_width": 3, "num_expand": 2, "context_transitions": 2}
    arguments = [f"--plan.{name}={value}" for name, value in plan.items()]
    arguments += ["--num_episodes=2", "--max_episode_steps=3", "--search.num_iterations=2", "--out=planners.json"]
    return program.folder, lambda *more: program(f"--workdir={trained}", *arguments, *more)


def read_rows(folder, study, name="planners"):
    return json.loads((folder / f"{name}.json").read_text())["studies"][study]


def check_budgets(folder, done, cells, name="planners"):
    """Check the rows of the study of budgets against its (planner, horizon, candidates), and return them."""
    assert done.code == 0, done.stderr
    rows = read_rows(folder, "budgets", name)
    assert [(row["planner"], row["horizon"], row["candidates"]) for row in rows] == cells
    for row in rows:
        assert [episode["seed"] for episode in row["episodes"]] == [0, 1]
        assert row["return"]["mean"] == np.mean([episode["return"] for episode in row["episodes"]])
        assert row["ms_per_action"] > 0
        assert f"{row['return']['mean']:.2f} ± " in done.stdout
    return rows


def test_planners_play_the_same_episodes_and_what_is_done_stays(command):
    folder, run = command
    done = run("--planners=reward,sample", "--candidates=3")
    rows = check_budgets(folder, done, [("reward", 2, 3), ("sample", 1, 1)])
    assert (folder / "planners_budgets.png").stat().st_size > 5000
    again = run("--planners=reward,sample", "--candidates=3,1")
    assert again.code == 0, again.stderr
    more = read_rows(folder, "budgets")
    assert more[:-1] == rows and (more[-1]["planner"], more[-1]["candidates"]) == ("reward", 1)
    other = run("--seed=1")
    message = "planners: --out=planners.json holds results with other settings; use another file."
    assert (other.code, other.error) == (2, message)


ALL = [(name, 2, 3) for name in ("reward", "likelihood", "shoot", "mppi", "cem", "tree")]
ALL += [(name, 1, 1) for name in ("sample", "median", "greedy")]  # search nothing


def test_every_planner_has_a_cell_with_the_budget_that_it_can_use():
    plan_config = sequence_planner.PlanConfig(horizon=5, beam_width=7)
    found = planner_study.cells(plan_config, [(name, (2, 3)) for name in planners.PLANNERS])
    assert [(cell.planner, cell.horizon, cell.candidates) for cell, _ in found] == ALL
    assert all((config.horizon, config.beam_width) == (cell.horizon, cell.candidates) for cell, config in found)


@pytest.mark.slow  # nine programs
def test_all_planners_are_compared_unless_some_are_named(command):
    folder, run = command
    check_budgets(folder, run("--candidates=3", "--out=all.json"), ALL, "all")


def test_the_grid_and_the_search_go_into_the_same_file(command):
    folder, run = command
    done = run("--study=grid", "--horizons=1,2", "--candidates=1,3")
    assert done.code == 0, done.stderr
    assert {(row["horizon"], row["candidates"]) for row in read_rows(folder, "grid")} == {(1, 3), (2, 3), (2, 1)}
    done = run("--study=search", "--horizons=1,2", "--candidates=3")
    assert done.code == 0, done.stderr
    one, two = read_rows(folder, "search")
    assert one["observation_error"]["mean"] is None and two["observation_error"]["mean"] > 0
    for row in (one, two):  # rewards are exp(-distance)
        assert 0 < row["real"]["mean"] < row["horizon"]
        difference = row["predicted"]["mean"] - row["real"]["mean"]
        np.testing.assert_allclose(row["predicted_minus_real"]["mean"], difference, rtol=1e-9)
    for name in ("planners_grid.png", "planners_search.png"):
        assert (folder / name).stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--planners=best"],
            "--planners=best must be of reward, likelihood, shoot, mppi, cem, tree, sample, median, ",
        ),
        (["--candidates=0"], "--candidates=0 must be whole numbers of at least 1"),
        (["--horizons=x"], "--horizons=x must be whole numbers of at least 1"),
        (["--out=text.json"], "text.json cannot be read"),
        (["--out=other.json"], "--out=other.json holds something else than results of planners"),
    ],
)
def test_mistakes_are_told_in_one_line(command, arguments, message):
    for name, text in (("text", "x"), ("other", "{}")):
        (command[0] / f"{name}.json").write_text(text)
    done = command[1]("--horizons=2", *arguments)
    assert done.code == 2 and done.error.startswith("planners: ") and message in done.error
