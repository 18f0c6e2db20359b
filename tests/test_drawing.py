"""Pictures of plans show what the planner saw, and imagined bodies stand where the plan puts them."""

import functools

import gymnasium
import jax
import numpy as np
from PIL import Image

from experiments.common import control, drawing
from experiments.configs import base
from tt_jax import checkpoints, environments, rollouts, sequence_planner, tokenization, transformer, types

PLAN = sequence_planner.PlanConfig(
    horizon=4, beam_width=3, num_expand=2, context_transitions=2, window=(3, 2), action_cdf=0.0, replan_every=2
)


def make_checkpoint(observations, action_dim, *, keys=()) -> checkpoints.Checkpoint:
    """Return a checkpoint of an untrained model, with bins for the observations [n, N]."""
    rng = np.random.default_rng(0)
    others = rng.uniform(-1, 1, (len(observations), action_dim + 2))
    spec = types.TransitionSpec(observation_dim=observations.shape[1], action_dim=action_dim, num_bins=12)
    config = transformer.TransformerConfig(spec=spec, num_layers=1, num_heads=1, embed_dim=8, max_transitions=3)
    return checkpoints.Checkpoint(
        step=1,
        params=jax.tree.map(lambda leaf: 2 * np.asarray(leaf), transformer.init(jax.random.key(0), config=config)),
        config=config,
        tokenizer=tokenization.fit(np.concatenate([observations, others], axis=1), num_bins=12),
        state=None,
        run={"data": base.get_config().data.to_dict() | {"observation_keys": keys}},
    )


def play_randomly(make_env, *, keys=()):
    """Return an episode of random actions, and the checkpoint of a model that could have played it."""
    env = make_env()
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    episode, done = rollouts.Episode(seed=0, observations=[]), False
    while True:
        parts = [observation[key] for key in keys] or [observation]
        episode.observations.append(np.concatenate(parts).astype(np.float32))
        if done:
            return episode, make_checkpoint(np.array(episode.observations), len(episode.actions[0]), keys=keys)
        episode.actions.append(env.action_space.sample())
        observation, reward, terminated, truncated, _ = env.step(episode.actions[-1])
        episode.rewards.append(float(reward))
        done = terminated or truncated


def draw(folder, episode, checkpoint, make_env, plan_config=PLAN):
    make_policy = functools.partial(control.plan_policy, checkpoint, plan_config, seed=0)
    settings = {"make_env": make_env, "make_policy": make_policy, "replan_every": plan_config.replan_every}
    return drawing.draw_plans(folder, episode, checkpoint=checkpoint, **settings)


def check_pictures(folder, steps):
    names = [f"plan_{step:04d}.png" for step in steps]
    assert sorted(path.name for path in folder.glob("plan_*")) == names
    with Image.open(folder / "plans.gif") as animation, Image.open(folder / names[-1]) as picture:
        assert (animation.n_frames, animation.size) == (len(steps), picture.size)


def test_all_beams_of_the_plans_that_were_played_are_drawn(tmp_path):
    make_env = functools.partial(gymnasium.make, "Pendulum-v1", max_episode_steps=5)
    _, checkpoint = play_randomly(make_env)
    outputs = []
    policy = control.plan_policy(checkpoint, PLAN, seed=0, max_batch=2, on_plan=outputs.append)
    envs = rollouts.vectorize(make_env, 2)
    config = drawing.datasets.data_config(checkpoint.run["data"])
    episodes = rollouts.run(envs, policy, seeds=[7, 8], config=config)
    moments = draw(tmp_path, episodes[0], checkpoint, make_env)

    assert [moment.step for moment in moments] == [0, 2, 4]  # every second action starts a plan
    for moment, output in zip(moments, outputs, strict=True):
        played = tokenization.decode(checkpoint.tokenizer, np.asarray(output.tokens[0]))
        np.testing.assert_array_equal(moment.beams[0], played)
        np.testing.assert_allclose(moment.scores, output.scores[0], rtol=1e-5)
        assert moment.beams.shape == (3, 4, 3 + 1 + 2)
        assert len(np.unique(moment.beams, axis=0)) > 1
    check_pictures(tmp_path, [0, 2, 4])


def test_a_maze_is_drawn_as_its_map_wherever_observations_hold_the_position(tmp_path, monkeypatch):
    make_env = functools.partial(environments.make, "PointMaze_UMaze-v3", max_episode_steps=4)
    episode, checkpoint = play_randomly(make_env, keys=("desired_goal", "observation"))
    drawn = []
    monkeypatch.setattr(drawing.figures, "draw_beams", lambda axes, lines, *_: drawn.append((lines, axes.get_lines())))
    moments = draw(tmp_path, episode, checkpoint, make_env)
    check_pictures(tmp_path, [0, 2])
    assert len(drawn) == 2  # a map for each moment
    for moment, (lines, _) in zip(moments, drawn, strict=True):
        np.testing.assert_array_equal(lines, moment.beams[:, :, 2:4])
        np.testing.assert_array_equal(moment.goal, episode.observations[0][:2])


def test_imagined_bodies_stand_where_the_plan_puts_them_and_real_ones_where_they_were(tmp_path, monkeypatch):
    make_env = functools.partial(gymnasium.make, "Hopper-v5", max_episode_steps=6)
    episode, checkpoint = play_randomly(make_env)
    rendered = []

    def render(env):
        rendered.append(np.concatenate([env.data.qpos, env.data.qvel]))
        return np.zeros([8, 8, 3], np.uint8)

    monkeypatch.setattr(type(make_env().unwrapped), "render", render)
    moments = draw(tmp_path, episode, checkpoint, make_env)
    assert sorted(path.name for path in tmp_path.glob("body_*")) == [f"body_{step:04d}.png" for step in (0, 2, 4)]
    env = make_env()
    env.reset(seed=0)
    real = []
    for action in episode.actions:
        real.append(np.concatenate([env.unwrapped.data.qpos, env.unwrapped.data.qvel]))
        env.step(action)
    for moment, (first, size) in zip(moments, [(0, 4), (8, 4), (16, 2)], strict=True):
        imagined, happened = np.array(rendered[first : first + 2 * size]).reshape(2, size, -1)
        np.testing.assert_allclose(happened, real[moment.step : moment.step + size], atol=1e-9)
        np.testing.assert_allclose(imagined[:, 1:], moment.beams[0, :size, :11])
        # Observations lack x, which begins where the body is and moves with the imagined speed for 8 ms a step.
        np.testing.assert_allclose(imagined[0, 0], real[moment.step][0])
        np.testing.assert_allclose(np.diff(imagined[:, 0]), 0.008 * moment.beams[0, : size - 1, 5])


def test_names_of_a_body_s_dimensions_are_its_joints_with_units():
    names = drawing.coordinate_names(gymnasium.make("Hopper-v5").unwrapped.model)
    assert names[:4] == ["rootx (m)", "rootz (m)", "rooty (rad)", "thigh (rad)"]
    assert names[6:] == ["rootx (m/s)", "rootz (m/s)", "rooty (rad/s)", "thigh (rad/s)", "leg (rad/s)", "foot (rad/s)"]


def test_moments_are_spread_over_the_way():
    way = np.cumsum([1.0] * 100 + [0.0] * 900)  # the goal is reached after a tenth of the episode
    steps = drawing.spread(np.arange(0, 1000, 5), way)
    assert (steps[0], steps[-1]) == (0, 100)
    assert len(steps) == drawing.MAX_MOMENTS and max(np.diff(steps)) <= 10
