import gymnasium
import jax
import numpy as np
import pytest

from tt_jax import rollouts, sequence_planner, tokenization, trajectories, types

SPEC = types.TransitionSpec(observation_dim=2, action_dim=1, num_bins=8)


class Walk(gymnasium.Env):
    """Moves by the action; lasts 1 + seed % 5 steps and is terminated if that is even, else truncated."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.left = self.np_random.uniform(), 1 + seed % 5
        self.even = self.left % 2 == 0
        return np.array([self.position, self.left]), {}

    def step(self, action):
        self.position, self.left = self.position + float(action[0]), self.left - 1
        over, info = self.left == 0, {"success": self.position > 1.0}
        return np.array([self.position, self.left]), self.position, over and self.even, over and not self.even, info


class DictWalk(Walk):
    """The same with a goal, and without an opinion on success."""

    observation_space = gymnasium.spaces.Dict(observation=Walk.observation_space, goal=Walk.observation_space)

    def _split(self, observation):
        return {"observation": observation, "goal": observation + 10.0}

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return self._split(observation), info

    def step(self, action):
        observation, *rest, _ = super().step(action)
        return self._split(observation), *rest, {}


def noise(episodes):
    """Draw every action from the episode's seed and age alone."""
    return np.stack([np.random.default_rng((e.seed, e.length)).normal(size=(1, 1)) for e in episodes])


def constant(value, num_actions=1):
    return lambda episodes: np.full((len(episodes), num_actions, 1), value)


def make_policy(plan_fn, **kwargs):
    settings = {"discretizer": discretizer(), "spec": SPEC, "context_transitions": 3, "replan_every": 1, "max_batch": 8}
    return rollouts.plan_policy(plan_fn, None, jax.random.key(0), **settings | kwargs)


def discretizer():
    return tokenization.fit(np.linspace([-2, 0, -1, -2, 0], [2, 5, 1, 2, 1], 100), num_bins=8, method="uniform")


def draw_plan(params, rng_key, context, observation):
    """Plan two actions per environment that depend on its key alone."""
    actions = jax.vmap(lambda key: jax.random.uniform(key, (2, 1), minval=-1.0))(rng_key)
    return types.PlanOutput(action=actions[:, 0], actions=actions, tokens=None, scores=None)


def play(policy, *, env=Walk, seeds=range(7), num_envs=3, config=trajectories.DataConfig(), **kwargs):  # noqa: B008
    return rollouts.run(rollouts.vectorize(env, num_envs), policy, seeds=seeds, config=config, **kwargs)


@pytest.mark.parametrize("policy", [noise, make_policy(jax.jit(draw_plan), replan_every=2)])
def test_the_number_of_environments_changes_no_episode(policy):
    alone = play(policy, num_envs=1)
    for num_envs in (2, 5, 9):
        for expected, episode in zip(alone, play(policy, num_envs=num_envs), strict=True):
            assert episode.seed == expected.seed and episode.terminated == expected.terminated
            for name in ("observations", "actions", "rewards", "successes"):
                np.testing.assert_array_equal(getattr(episode, name), getattr(expected, name))


def test_every_seed_is_played_once_to_its_end_whatever_its_neighbours_do():
    order = []
    seeds = [4, 0, 9, 8, 3, 1]  # lengths 5, 1, 5, 4, 4, 2
    episodes = play(constant(0.5), seeds=seeds, num_envs=2, on_finish=lambda episode: order.append(episode.seed))
    assert sorted(order) == sorted(seeds)
    assert [(e.seed, e.length, e.terminated) for e in episodes] == [
        (4, 5, False),
        (0, 1, False),
        (9, 5, False),
        (8, 4, True),
        (3, 4, True),
        (1, 2, True),
    ]


class Fragile(Walk):
    """Breaks in the reset of seed 2 and in the third step of seed 4."""

    def reset(self, *, seed=None, options=None):
        if seed == 2:
            raise RuntimeError("no\nlicence")
        self.whole = 2 if seed == 4 else 99
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.whole -= 1
        if self.whole < 0:
            raise FloatingPointError("the body flew away")
        return super().step(action)


def test_a_guarded_environment_that_raises_costs_that_episode_alone():
    whole = play(constant(0.5), seeds=range(6), num_envs=2)
    finished = []
    found = play(
        constant(0.5),
        env=lambda: rollouts.Guarded(Fragile()),
        seeds=range(6),
        num_envs=2,
        on_finish=lambda episode: finished.append(episode.seed),
    )
    errors = {2: (0, "RuntimeError: no licence"), 4: (2, "FloatingPointError: the body flew away")}
    assert sorted(finished) == list(range(6))
    for episode, expected in zip(found, whole, strict=True):
        assert (episode.length, episode.error) == errors.get(episode.seed, (expected.length, None))
        assert episode.rewards == expected.rewards[: episode.length]
        if episode.seed != 2:
            np.testing.assert_array_equal(episode.observations, expected.observations[: episode.length + 1])
    with pytest.raises(RuntimeError, match="licence"):
        play(constant(0.5), env=Fragile, seeds=range(6))


class Corridor(gymnasium.Env):
    """Walks over whole numbers; action 5 goes back, 6 stays and 7 goes on. The goal, a Dict, moves along."""

    observation_space = gymnasium.spaces.Dict(
        place=gymnasium.spaces.Discrete(9),
        desired_goal=gymnasium.spaces.Dict(
            near=gymnasium.spaces.Box(-9, 9, (1,), np.float32), far=gymnasium.spaces.Box(-9, 9, (2,), np.float32)
        ),
    )
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def _observe(self):
        goal = {"near": np.full(1, self.place, np.float32), "far": np.full(2, self.place + 1, np.float32)}
        return {"place": self.place, "desired_goal": goal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 4
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        self.place += int(action) - 6
        return self._observe(), 1.0, self.place in (2, 6), False, {}


def test_discrete_actions_are_rounded_to_and_moving_goals_are_the_newest():
    seen = []

    def policy(episodes):
        seen.append([episode.goal.tolist() for episode in episodes])
        return np.full((len(episodes), 1, 1), 6.6 if episodes[0].seed else -3.0)

    config = trajectories.DataConfig(observation_keys=("place",))
    for seed, actions in ((1, [[7.0], [7.0]]), (0, [[5.0], [5.0]])):
        (episode,) = play(policy, env=Corridor, seeds=[seed], num_envs=1, config=config)
        np.testing.assert_array_equal(episode.actions, actions)
        assert episode.length == 2 and episode.terminated
        place = 6.0 if seed else 2.0
        np.testing.assert_array_equal(episode.observations[-1], [place])
        np.testing.assert_array_equal(episode.goal, [place + 1, place + 1, place])  # far before near
    assert seen == [[[5.0, 5.0, 4.0]], [[6.0, 6.0, 5.0]], [[5.0, 5.0, 4.0]], [[4.0, 4.0, 3.0]]]


class Matrix(Walk):
    """The same with the action in the corner of a matrix."""

    action_space = gymnasium.spaces.Box(-1.0, 2.0, (2, 3), np.float32)

    def step(self, action):
        assert action.shape == (2, 3) and action.dtype == np.float32
        return super().step(action[1, 2:])


def test_actions_of_several_axes_get_their_shape_back():
    (episode,) = play(lambda episodes: np.arange(6.0).reshape(1, 1, 6) - 4, env=Matrix, seeds=[3], num_envs=1)
    np.testing.assert_array_equal(episode.actions[0], [-1, -1, -1, -1, 0, 1])
    np.testing.assert_allclose(np.diff([obs[0] for obs in episode.observations]), 1.0, rtol=1e-6, atol=0)


def test_an_episode_records_what_the_environment_did():
    env = Walk()
    start, _ = env.reset(seed=3)
    steps = [env.step([0.25]) for _ in range(4)]
    (episode,) = play(constant(0.25), seeds=[3])
    np.testing.assert_array_equal(episode.observations, np.float32([start, *[step[0] for step in steps]]))
    np.testing.assert_array_equal(episode.rewards, [step[1] for step in steps])
    assert episode.total_reward == sum(step[1] for step in steps)
    assert episode.success == any(step[4]["success"] for step in steps)


def test_success_is_unknown_if_the_environment_does_not_report_it():
    (episode,) = play(constant(1.0), env=DictWalk, seeds=[4], config=trajectories.DataConfig(("observation",)))
    assert episode.success is None


def test_actions_are_clipped_before_they_are_executed_and_recorded():
    (episode,) = play(constant(7.0), seeds=[1])
    np.testing.assert_array_equal(episode.actions, [[1.0], [1.0]])
    np.testing.assert_allclose(np.diff([obs[0] for obs in episode.observations]), 1.0, rtol=1e-6, atol=0)


def test_a_policy_is_asked_again_only_when_its_actions_are_used_up():
    asked = []

    def ramp(episodes):
        asked.extend((episode.seed, episode.length) for episode in episodes)
        return np.tile([[0.1], [0.2], [0.3]], (len(episodes), 1, 1))

    episodes = play(ramp, seeds=[4, 2], num_envs=2)  # lengths 5 and 3
    assert sorted(asked) == [(2, 0), (4, 0), (4, 3)]
    np.testing.assert_allclose(np.ravel(episodes[0].actions), [0.1, 0.2, 0.3, 0.1, 0.2], rtol=1e-6, atol=0)


def test_the_context_holds_the_latest_executed_transitions_as_tokens():
    contexts = []

    def overshoot(params, rng_key, context, observation):
        contexts.append((jax.tree.map(np.copy, context), observation))
        actions = np.full((len(observation), 1, 1), 1.7)
        return types.PlanOutput(action=actions[:, 0], actions=actions, tokens=None, scores=None)

    (episode,) = play(make_policy(overshoot), seeds=[9], num_envs=1)  # 5 steps, context of 3 transitions
    assert [context.length.tolist() for context, _ in contexts] == [[0], [1], [2], [3], [3]]
    low, width = np.array([-2, 0, -1, -2]), np.array([4, 5, 2, 4]) / 8
    for step, (context, observation) in enumerate(contexts):
        np.testing.assert_array_equal(observation, [episode.observations[step]])
        assert observation.dtype == np.float32 and context.tokens.shape == (1, 3, 5)
        for row, past in enumerate(range(max(step - 3, 0), step)):
            transition = [*episode.observations[past], 1.0, episode.rewards[past]]  # 1.0: the action after clipping
            tokens = np.clip(np.floor((transition - low) / width), 0, 7)
            np.testing.assert_array_equal(context.tokens[0, row], [*tokens, 7])  # value: the highest bin


def test_plans_are_batched_in_powers_of_two_up_to_the_number_of_environments():
    sizes = []

    def plan_fn(params, rng_key, context, observation):
        sizes.append((len(rng_key), len(observation), *context.tokens.shape[:1]))
        return draw_plan(params, rng_key, context, observation)

    play(make_policy(plan_fn, max_batch=6), seeds=[0, 1, 2, 3, 4, 9], num_envs=6)  # 6, 5, 4, 3, 2 episodes are left
    assert sizes == [(n, n, n) for n in (6, 6, 4, 4, 2)]


def test_full_batches_alone_are_planned_where_that_is_asked_for():
    sizes = []
    policy = make_policy(lambda *rest: sizes.append(len(rest[-1])) or draw_plan(*rest), max_batch=6, min_batch=6)
    play(policy, num_envs=6)
    assert set(sizes) == {6}


def test_episodes_that_the_caller_stops_are_returned_as_they_are():
    calls = iter(range(100))
    episodes = play(noise, seeds=range(7), num_envs=3, stop_fn=lambda: next(calls) == 3)  # after three steps
    whole = play(noise, seeds=range(7), num_envs=3)
    assert [(e.seed, e.length, e.is_cut) for e in episodes] == [(0, 1, False), (1, 2, False), (2, 3, False)] + [
        (3, 2, True),
        (4, 1, True),
    ]
    for episode in episodes:
        assert episode.rewards == whole[episode.seed].rewards[: episode.length]


def test_the_key_of_a_plan_comes_from_the_seed_and_the_age_of_the_episode():
    for episode in play(make_policy(draw_plan, replan_every=2), seeds=[2, 9]):
        for step in range(0, episode.length, 2):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), episode.seed), step)
            (plan,) = draw_plan(None, key[None], None, None).actions
            np.testing.assert_array_equal(episode.actions[step : step + 2], plan[: episode.length - step])


def test_each_episode_is_planned_to_rest_in_its_own_goal():
    planned = []

    def plan_fn(params, rng_key, context, observation):
        planned.append(params.goal)
        return draw_plan(params, rng_key, context, observation)

    params = sequence_planner.PlannerParams(transformer=None, discretizer=discretizer())
    policy = rollouts.plan_policy(
        plan_fn,
        params,
        jax.random.key(0),
        discretizer=discretizer(),
        spec=SPEC,
        context_transitions=1,
        replan_every=1,
        max_batch=4,
        goal_fn=rollouts.rest_in_goal,
    )
    start = [np.zeros(2, np.float32)]
    policy([rollouts.Episode(seed=i, observations=start, goal=np.float32([i, -i])) for i in range(3)])
    (goal,) = planned
    np.testing.assert_array_equal(goal, [[0, 0, 0, 0], [1, -1, 0, 0], [2, -2, 0, 0], [0, 0, 0, 0]])  # 3 become 4
    assert goal.dtype == np.float32


@pytest.mark.parametrize("stored_dtype", [np.float32, np.float64])
def test_a_value_on_a_threshold_keeps_its_bin_whatever_the_data_was_stored_in(stored_dtype):
    grid = (np.arange(8) / 10).astype(stored_dtype).astype(np.float64)
    bins = tokenization.fit(np.tile(grid[:, None], (1, 5)), num_bins=8)  # thresholds at 0, 0.1, 0.2, ...
    live = [np.float32([x, x]) for x in np.arange(8) / 10]
    episode = rollouts.Episode(
        seed=0, observations=[*live, live[0]], actions=[x[:1] for x in live], rewards=(np.arange(8) / 10).tolist()
    )
    context = rollouts.encode_context([episode], discretizer=bins, spec=SPEC, context_transitions=8)
    np.testing.assert_array_equal(context.tokens[0, :, :4], np.tile(np.arange(8)[:, None], (1, 4)))


def test_dict_observations_are_joined_in_the_given_order_and_cut():
    config = trajectories.DataConfig(observation_keys=("goal", "observation"), observation_slice=3)
    (episode,) = play(constant(0.0), env=DictWalk, seeds=[1], config=config)
    goal_x, goal_y, position = episode.observations[0]
    assert goal_y == 12.0
    np.testing.assert_allclose(goal_x, position + 10.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (constant(np.nan), "not finite"),
        (lambda episodes: np.zeros((len(episodes), 1, 2)), r"actions \[2, n >= 1, 1\], got \(2, 1, 2\)"),
        (lambda episodes: np.zeros((len(episodes), 0, 1)), r"got \(2, 0, 1\)"),
        (make_policy(draw_plan, replan_every=3), "replan_every=3 needs plans of that length, got 2 steps"),
    ],
)
def test_unusable_actions_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        play(policy, seeds=[1, 2], num_envs=2)


@pytest.mark.parametrize(
    ("env", "spec", "keys", "message"),
    [
        (Walk, types.TransitionSpec(3, 1, 8), (), "observation has 2 dimensions, the model was trained with 3"),
        (Walk, types.TransitionSpec(2, 4, 8), (), "action has 1 dimensions, the model was trained with 4"),
        (DictWalk, SPEC, ("speed",), r"does not have the keys \('speed',\)"),
        (Walk, SPEC, ("speed",), r"does not have the keys \('speed',\)"),
        (DictWalk, SPEC, (), "is not the one space that the model was trained on"),
    ],
)
def test_environments_that_do_not_fit_the_model_are_refused(env, spec, keys, message):
    envs, config = rollouts.vectorize(env, 2), trajectories.DataConfig(observation_keys=keys)
    with pytest.raises(ValueError, match=message):
        rollouts.check_spaces(envs, spec, config=config)


def test_environments_that_fit_the_model_are_accepted():
    rollouts.check_spaces(rollouts.vectorize(Walk, 1), SPEC, config=trajectories.DataConfig())
    config = trajectories.DataConfig(observation_keys=("goal",))
    rollouts.check_spaces(rollouts.vectorize(DictWalk, 3), SPEC, config=config)


def test_environments_that_reset_themselves_are_refused():
    with pytest.raises(ValueError, match="rollouts.vectorize"):
        rollouts.run(gymnasium.vector.SyncVectorEnv([Walk]), noise, seeds=[0], config=trajectories.DataConfig())


def test_a_fixed_goal_stands_still_while_the_start_moves():
    robotics = pytest.importorskip("gymnasium_robotics")
    gymnasium.register_envs(robotics)

    def make_env():
        return rollouts.FixedGoal(gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=2), [1.0, -1.0])

    def rest(episodes):
        return np.zeros((len(episodes), 1, 2))

    config = trajectories.DataConfig(observation_keys=("desired_goal", "achieved_goal"))
    episodes = play(rest, env=make_env, seeds=[0, 1, 2], num_envs=2, config=config)
    observations = np.array([episode.observations for episode in episodes])  # [3, 3, 4]
    np.testing.assert_array_equal(observations[..., :2], np.broadcast_to([1.0, -1.0], (3, 3, 2)))
    assert len(np.unique(observations[:, 0, 2])) == 3
    np.testing.assert_array_equal([episode.goal for episode in episodes], [[1.0, -1.0]] * 3)
    moving = play(
        rest,
        env=lambda: gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=2),
        seeds=[0, 1],
        num_envs=1,
        config=config,
    )
    for episode in moving:
        np.testing.assert_array_equal(episode.goal, episode.observations[0][:2])
    assert (moving[0].goal != moving[1].goal).any()
    assert play(constant(0.0), seeds=[0])[0].goal is None
    with pytest.raises(ValueError, match=r"the goal \(0.0, 0.0\) is in a wall of the maze"):
        rollouts.FixedGoal(gymnasium.make("PointMaze_UMaze-v3"), [0.0, 0.0])
    with pytest.raises(ValueError, match=r"the goal \(9.0, 0.0\) is outside of the maze"):
        rollouts.FixedGoal(gymnasium.make("PointMaze_UMaze-v3"), [9.0, 0.0])
    with pytest.raises(ValueError, match="maze"):
        rollouts.FixedGoal(Walk(), [0.0, 0.0])
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(make_env().spec.to_json()))
    np.testing.assert_array_equal(again.reset(seed=0)[0]["desired_goal"], [1.0, -1.0])


def test_repeated_actions_add_up_rewards_until_the_episode_ends():
    class Count(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
        count = 0

        def step(self, action):
            self.count += 1
            return action, float(self.count), self.count == 8, False, {}

    env = rollouts.ActionRepeat(Count(), 5)
    action = np.zeros(1, np.float32)
    assert env.step(action)[1:4] == (1 + 2 + 3 + 4 + 5, False, False)
    assert env.step(action)[1:4] == (6 + 7 + 8, True, False)
