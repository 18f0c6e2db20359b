"""Control from the command line: results.json, settings, and the caller's mistakes."""

import dataclasses
import json
import shutil

import gymnasium
import jax
import numpy as np
import pytest
from entry_points import MAZE, damage
from PIL import Image

from tt_jax import checkpoints, environments, tokenization, transformer, types

pytest_plugins = ["entry_fixtures"]

SMALL = ["--num_episodes=3", "--seed=5", "--plan.horizon=2", "--plan.beam_width=3", "--plan.context_transitions=2"]


@pytest.fixture(scope="session")
def plan(entry_point):
    return entry_point("plan")


def run_plan(plan, *arguments) -> tuple[dict, str]:
    """Run a command to its end and return results.json and what it said."""
    done = plan(*arguments)
    assert done.code == 0, done.stderr
    return json.loads((plan.folder / "results.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def planned(plan, trained):
    return run_plan(plan, f"--workdir={trained}", *SMALL, "--num_envs=2")


def copy_checkpoint(source, target, **changes):
    """Save the newest checkpoint of `source` in the workdir `target`, with another step, run or so."""
    checkpoint = checkpoints.restore(source)
    fields = ("step", "params", "config", "tokenizer", "state", "run")
    checkpoints.save(target, **{name: getattr(checkpoint, name) for name in fields} | changes)


def test_results_hold_every_episode_and_their_means(planned):
    results, stdout = planned
    assert results["environment"] == "PointMaze_UMaze-v3"
    assert results["environment_check"]["data_in_walls"] == 0 and not results["environment_check"]["problems"]
    assert results["dataset"] == "test/maze-v0"
    assert results["checkpoint_step"] == 420
    episodes = results["episodes"]
    assert [episode["seed"] for episode in episodes] == [5, 6, 7]
    assert [episode["length"] for episode in episodes] == [24, 24, 24]  # the time limit of the dataset's environment
    returns = np.array([episode["return"] for episode in episodes])
    assert len(set(returns)) == 3 and (returns > 0).all() and (returns < 24).all()  # exp(-distance) per step
    # The dataset's reference scores are 1 and 9.
    scores = 100 * (returns - 1) / (9 - 1)
    np.testing.assert_allclose([episode["normalized_score"] for episode in episodes], scores, rtol=1e-12)
    for name, values in (("return", returns), ("normalized_score", scores)):
        np.testing.assert_allclose(results[name]["mean"], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(results[name]["standard_error"], values.std(ddof=1) / np.sqrt(3), rtol=1e-12)
    assert results["success"]["mean"] == np.mean([episode["success"] for episode in episodes])
    assert results["num_plans"] == 3 * 24
    np.testing.assert_allclose(results["plans_per_second"], 72 / results["wall_time_s"], rtol=1e-12)
    assert results["commit"]
    for text in ("PointMaze_UMaze-v3, step 420, 3 episodes", f"return {returns.mean():.2f}", "results in results.json"):
        assert text in " ".join(stdout.split())


def test_settings_are_the_runs_and_those_of_the_flags(planned, trained):
    settings = planned[0]["settings"]
    assert settings["workdir"] == str(trained)
    assert (settings["num_episodes"], settings["num_envs"], settings["seed"]) == (3, 2, 5)
    plan_settings = settings["plan"]
    assert (plan_settings["horizon"], plan_settings["beam_width"], plan_settings["context_transitions"]) == (2, 3, 2)
    assert plan_settings["window"] == [3, 2]  # a flag of the training run
    assert plan_settings["action_cdf"] == 0.6  # of the configuration file
    assert plan_settings["discount"] == 0.99  # of the data


def test_a_damaged_checkpoint_is_not_replaced_by_an_older_one_unasked(plan, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    damage(workdir, 420)
    refused = plan(f"--workdir={workdir}", *SMALL)
    assert refused.code == 2
    assert "checkpoints/420 is damaged: " in refused.error
    assert refused.error.endswith("--step plays another of [360, 400, 420].")
    results, _ = run_plan(plan, f"--workdir={workdir}", *SMALL, "--step=400")
    assert (results["checkpoint_step"], results["settings"]["step"]) == (400, 400)


def test_the_number_of_environments_does_not_change_the_episodes(planned, plan, trained):
    results, _ = run_plan(plan, f"--workdir={trained}", *SMALL, "--num_envs=1")
    for episode, expected in zip(results["episodes"], planned[0]["episodes"], strict=True):
        np.testing.assert_allclose(episode.pop("return"), expected["return"], rtol=1e-5)
        np.testing.assert_allclose(episode.pop("normalized_score"), expected["normalized_score"], rtol=1e-5)
        assert episode == {name: expected[name] for name in episode}


def check_pictures(folder, num_plans):
    """Check that each plan is a picture, and that all of them are the animation."""
    pictures = sorted(folder.glob("plan_*.png"))
    assert len(pictures) == num_plans
    with Image.open(folder / "plans.gif") as animation, Image.open(pictures[0]) as picture:
        assert (animation.n_frames, animation.size) == (num_plans, picture.size)


def test_what_the_planner_saw_in_the_first_episode_is_drawn(plan, trained, planned, tmp_path):
    few = ["--num_envs=2", "--max_episode_steps=3"]
    results, stdout = run_plan(plan, f"--workdir={trained}", *SMALL, *few, f"--draw={tmp_path}/pictures")
    assert f"3 plans are drawn in {tmp_path}/pictures and {tmp_path}/pictures/plans.gif" in stdout
    check_pictures(tmp_path / "pictures", 3)
    assert len(results["episodes"]) == 3


def test_a_body_without_a_map_is_drawn_by_its_dimensions(plan, trained, tmp_path):
    # A model of the three observations and one action of Pendulum that has learned nothing.
    learned = checkpoints.restore(trained)
    spec = types.TransitionSpec(observation_dim=3, action_dim=1, num_bins=20)
    config = dataclasses.replace(learned.config, spec=spec)
    run = learned.run | {"data": learned.run["data"] | {"observation_keys": ()}}
    params = transformer.init(jax.random.key(0), config=config)
    tokenizer = tokenization.fit(np.random.default_rng(0).uniform(-1, 1, (40, 6)), num_bins=20)
    copy_checkpoint(trained, tmp_path, params=params, config=config, tokenizer=tokenizer, run=run)
    few = ["--env=Pendulum-v1", "--max_episode_steps=4", "--plan.replan_every=2", f"--draw={tmp_path}/pictures"]
    _, stdout = run_plan(plan, f"--workdir={tmp_path}", *SMALL, "--num_episodes=1", *few)
    check_pictures(tmp_path / "pictures", 2)
    assert "no images of bodies: " in stdout and not list(tmp_path.glob("pictures/body_*"))


@pytest.mark.slow
def test_a_fixed_goal_and_fewer_plans_reach_the_environment(plan, trained):
    few = ["--plan.replan_every=2", "--num_episodes=1", "--goal=1.0,1.0"]
    results, _ = run_plan(plan, f"--workdir={trained}", *SMALL, *few)
    assert results["num_plans"] == 12
    assert results["settings"]["goal"] == [1.0, 1.0]
    (episode,) = results["episodes"]
    # Before the body moves much, the reward is exp(-distance) of its start from that goal.
    env = environments.make("PointMaze_UMaze-v3", reward_type="dense", max_episode_steps=24)
    observation, _ = env.reset(seed=5)
    env.close()
    assert abs(episode["return"] / 24 - np.exp(-np.linalg.norm(observation["achieved_goal"] - [1.0, 1.0]))) < 0.2


def test_imitation_plays_the_most_likely_actions(plan, trained, planned):
    results, _ = run_plan(plan, f"--workdir={trained}", *SMALL, "--num_envs=3", "--planner=likelihood")
    assert results["settings"]["planner"] == "likelihood" and planned[0]["settings"]["planner"] == "reward"
    returns = [episode["return"] for episode in results["episodes"]]
    assert np.isfinite(returns).all() and returns != [episode["return"] for episode in planned[0]["episodes"]]
    again, _ = run_plan(plan, f"--workdir={trained}", *SMALL, "--num_envs=3", "--planner=likelihood")
    assert again["episodes"] == results["episodes"]  # nothing is drawn


@pytest.mark.parametrize("name", ["shoot", "mppi", "cem", "tree", "sample", "median", "greedy"])
def test_every_planner_plays_in_its_own_way(plan, trained, name):
    few = ["--num_episodes=2", "--max_episode_steps=3", f"--planner={name}", "--plan.num_expand=2"]
    searches = name in ("mppi", "cem")
    results, _ = run_plan(plan, f"--workdir={trained}", *SMALL, *few, *["--search.num_iterations=2"] * searches)
    assert [episode["length"] for episode in results["episodes"]] == [3, 3]
    assert np.isfinite([episode["return"] for episode in results["episodes"]]).all()
    settings = results["settings"]
    assert (settings["planner"], settings["search"]["num_iterations"]) == (name, 2 if searches else 4)
    without_search = {"horizon": 1, "beam_width": 1, "num_expand": 1, "action_cdf": 0.0}
    as_given = {"horizon": 2, "beam_width": 3, "num_expand": 2, "action_cdf": 0.6}
    expected = without_search if name in ("sample", "median", "greedy") else as_given
    assert {field: settings["plan"][field] for field in expected} == expected
    if name == "greedy":
        by_hand = ["--plan.horizon=1", "--plan.beam_width=1", "--plan.action_top_k=1"]
        again, _ = run_plan(plan, f"--workdir={trained}", *SMALL, *few, *by_hand, "--planner=reward")
        assert again["episodes"] == results["episodes"]


@pytest.fixture(scope="module")
def trained_with_goals(train, tmp_path_factory):
    """Return workdirs of short runs whose observations are position and velocity, and these and the goal."""
    workdirs = [tmp_path_factory.mktemp(name) for name in ("position", "position_and_goal")]
    few = [*MAZE, "--config.model.goal_conditioned=True", "--config.train.num_steps=20"]
    for workdir, keys in zip(workdirs, ["('observation',)", "('observation', 'desired_goal')"], strict=True):
        done = train(*few, f"--config.data.observation_keys={keys}", f"--workdir={workdir}")
        assert done.code == 0, done.stderr
    return workdirs


def test_a_goal_conditioned_run_plans_to_the_goal_of_each_episode(plan, trained_with_goals):
    command = [f"--workdir={trained_with_goals[0]}", *SMALL, "--planner=likelihood"]
    results, _ = run_plan(plan, *command)
    assert checkpoints.restore(trained_with_goals[0]).params["goal_embedding"]["embedding"].shape == (4 * 20, 16)
    returns = [episode["return"] for episode in results["episodes"]]
    assert np.isfinite(returns).all()
    fixed, _ = run_plan(plan, *command, "--goal=1.0,1.0")
    assert [episode["return"] for episode in fixed["episodes"]] != returns


def test_goals_that_cannot_be_planned_to_are_told_in_one_line(plan, trained_with_goals):
    position, position_and_goal = trained_with_goals
    done = plan(f"--workdir={position}", *SMALL)
    message = "this run was trained with goals; plan with --planner=likelihood."
    assert (done.code, done.error) == (2, f"plan: {message}")
    done = plan(f"--workdir={position_and_goal}", *SMALL, "--planner=likelihood")
    assert done.code == 2 and "this one has 2 dimensions, the observation 6." in done.error
    done = plan(f"--workdir={position}", *SMALL, "--planner=likelihood", "--goal=0,0")
    assert (done.code, done.error) == (2, "plan: the goal (0.0, 0.0) is in a wall of the maze.")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--planner=likely"], "--planner=likely"),
        (["--planner=tree", "--plan.unlikely_share=0.5"], "a tree search cannot leave out candidates"),
        (["--planner=mppi", "--search.temperature=0"], "temperature=0.0 must be positive"),
        (["--search.temperature=1"], "--search.temperature is for --planner=mppi or cem, not for reward"),
        (["--plan.horizn=3"], "Unknown command line flag 'plan.horizn'. Did you mean: plan.horizon ?"),
        (["--plan.horizon=0"], "horizon=0 must be at least 1"),
        (["--plan.horizon=x"], "--plan.horizon=x"),
        (["--plan.window=9,8"], "window=(9, 8) exceeds the model's max_transitions=3; use at most (3, 2)"),
        (["--plan.window=3"], "--plan.window=3: two numbers are needed"),
        (["--plan.replan_every=3"], "replan_every=3 must not exceed horizon=2"),
        (["--env=Pendulum-v1"], "does not have the keys ('observation', 'desired_goal')"),
        (["--env=PointMaze_Nowhere-v3"], "PointMaze_Nowhere-v3 cannot be made"),
        (["--plan.temperature=nan"], "--plan.temperature=nan: must be finite"),
        (["--goal=1"], "--goal=1: two numbers are needed"),
        (["--goal=1,inf"], "--goal=(1.0, inf): must be finite"),
        (["--reference_min=1", "--reference_max=1"], "must be given together, the first below the second"),
        (["--num_episodes=0"], "--num_episodes=0"),
        (["--seed=4294967295"], "--seed=4294967295"),
        (["--out=."], "--out=. must name a file, not a folder"),
        (["--out=/dev/null/results.json"], "--out=/dev/null/results.json cannot be written"),
        (["--workdir=empty"], "no checkpoint in"),
        (["--draw=/dev/null/pictures"], "--draw=/dev/null/pictures cannot be written"),
        (["--draw=pictures", "--plan.horizon=1"], "--plan.horizon=1 must be at least 2"),
    ],
)
def test_mistakes_are_told_in_one_line(plan, trained, arguments, message):
    done = plan(f"--workdir={trained}", *SMALL, *arguments)
    assert done.code == 2
    assert done.error.startswith("plan: ") and message in done.error


def test_a_checkpoint_of_data_without_an_environment_asks_for_one(plan, trained, tmp_path):
    copy_checkpoint(trained, tmp_path, run=checkpoints.restore(trained).run | {"env_spec": None})
    done = plan(f"--workdir={tmp_path}", *SMALL)
    assert (done.code, done.error) == (2, "plan: the dataset names no environment; pass --env=ID.")


STRANGER = """
import pathlib
import gymnasium
import numpy as np

pathlib.Path("ran").touch()


class Endless(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        observation=gymnasium.spaces.Box(-9, 9, (4,), np.float64),
        desired_goal=gymnasium.spaces.Box(-9, 9, (2,), np.float64),
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"observation": np.zeros(4), "desired_goal": np.zeros(2)}, {}

    def step(self, action):
        return {"observation": np.zeros(4), "desired_goal": np.zeros(2)}, 1.0, False, False, {}


class Fragile(Endless):
    def reset(self, *, seed=None, options=None):
        self.is_broken = seed == self.broken_seed
        return super().reset(seed=seed)

    def __init__(self, broken_seed=8):
        self.broken_seed = broken_seed

    def step(self, action):
        if self.is_broken:
            raise OSError("no licence")
        return super().step(action)


gymnasium.register("Endless-v0", "stranger:Endless")
gymnasium.register("Fragile-v0", "stranger:Fragile")
"""


@pytest.fixture
def stranger(plan, trained, tmp_path):
    """Workdir of a checkpoint whose environment, in the module `stranger`, is no one's and has no time limit."""
    (plan.folder / "stranger.py").write_text(STRANGER)
    (plan.folder / "ran").unlink(missing_ok=True)
    spec = gymnasium.envs.registration.EnvSpec("Endless-v0", entry_point="stranger:Endless").to_json()
    copy_checkpoint(trained, tmp_path, run=checkpoints.restore(trained).run | {"env_spec": spec})
    return tmp_path


def test_code_that_a_checkpoint_names_runs_only_when_it_is_trusted(plan, stranger):
    done = plan(f"--workdir={stranger}", *SMALL)
    assert done.code == 2
    assert done.error == (
        "plan: the stored environment Endless-v0 would run stranger:Endless, which is not known to be harmless; pass "
        "--env=ID, or --trust_environment to run it."
    )
    assert not (plan.folder / "ran").exists()
    results, _ = run_plan(plan, f"--workdir={stranger}", *SMALL, "--trust_environment")
    assert (plan.folder / "ran").exists()
    assert [episode["length"] for episode in results["episodes"]] == [24, 24, 24]  # the time limit of the data


def test_an_environment_without_a_time_limit_ends_when_it_is_told(plan, stranger):
    named = ["--env=stranger:Endless-v0", "--max_episode_steps=3"]
    results, _ = run_plan(plan, f"--workdir={stranger}", *SMALL, *named)
    assert results["environment"] == "Endless-v0"
    assert [episode["return"] for episode in results["episodes"]] == [3.0, 3.0, 3.0]


def test_an_episode_whose_environment_raises_is_told_and_the_others_are_kept(plan, stranger):
    done = plan(f"--workdir={stranger}", *SMALL, "--env=stranger:Fragile-v0", "--max_episode_steps=3", "--seed=7")
    assert done.code == 1
    assert done.error == (
        "plan: the environment failed in 1 of 3 episodes, first with seed 8 after 0 steps: OSError: no licence; the "
        "others are in results.json."
    )
    results = json.loads((plan.folder / "results.json").read_text())
    assert [(episode["seed"], episode["return"]) for episode in results["episodes"]] == [(7, 3.0), (9, 3.0)]
    assert results["failures"] == [{"seed": 8, "length": 0, "error": "OSError: no licence"}]
    one = ["--num_episodes=1", "--seed=8"]
    done = plan(f"--workdir={stranger}", *SMALL, "--env=stranger:Fragile-v0", *one)
    assert done.code == 1 and "the environment failed in all episodes, first with seed 8" in done.error


def test_a_specification_of_another_gymnasium_is_told_or_replaced(plan, trained, tmp_path):
    run = checkpoints.restore(trained).run
    copy_checkpoint(trained, tmp_path, run=run | {"env_spec": run["env_spec"].replace("PointMazeEnv", "GoneEnv")})
    done = plan(f"--workdir={tmp_path}", *SMALL)
    assert done.code == 2 and "GoneEnv, which cannot be loaded" in done.error and "pass --env=ID." in done.error
    results, _ = run_plan(plan, f"--workdir={tmp_path}", *SMALL, "--env=PointMaze_UMaze-v3", "--max_episode_steps=2")
    assert results["episodes"][0]["length"] == 2


def test_a_damaged_checkpoint_is_not_used(plan, trained, tmp_path):
    copy_checkpoint(trained, tmp_path)
    largest = max((tmp_path / "checkpoints").glob("*/arrays/**/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    done = plan(f"--workdir={tmp_path}", *SMALL)
    assert done.code == 2
    assert f"checkpoint {tmp_path}/checkpoints/420 is damaged" in done.error
