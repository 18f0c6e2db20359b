"""Planners by name, and policies that plan from where their last plan ended."""

import sys
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sequence_planner import ONE_LAYER, SPEC, random_params

from experiments.common import control, planners
from tt_jax import action_planner, action_search, checkpoints, rollouts, sequence_planner

PLAN_CONFIG = sequence_planner.PlanConfig(
    horizon=4, beam_width=6, window=(3, 2), action_cdf=0.0, context_transitions=2, replan_every=3
)
SEARCH_CONFIG = action_planner.SearchConfig(num_iterations=2)


def test_a_policy_goes_on_from_its_last_plan_of_each_episode():
    params = random_params(config=ONE_LAYER)
    run = checkpoints.Checkpoint(
        step=0, params=params.transformer, config=ONE_LAYER, tokenizer=params.discretizer, state=None, run={}
    )
    settings = {"planner": "mppi", "search_config": SEARCH_CONFIG}
    policy = control.plan_policy(run, PLAN_CONFIG, seed=0, max_batch=2, **settings)
    make = {"config": ONE_LAYER, "plan_config": PLAN_CONFIG, "search_config": SEARCH_CONFIG}
    plan_fn = jax.jit(action_planner.make_mppi_plan_fn(**make))

    def expected_plan(episodes, initial):
        keys = [jax.random.fold_in(jax.random.key(0), episode.seed) for episode in episodes]
        keys = [jax.random.fold_in(key, episode.length) for key, episode in zip(keys, episodes, strict=True)]
        context = rollouts.encode_context(
            episodes, discretizer=params.discretizer, spec=SPEC, context_transitions=PLAN_CONFIG.context_transitions
        )
        observation = np.stack([episode.observations[-1] for episode in episodes])
        return plan_fn(params, jnp.stack(keys), context, observation, initial).actions

    observations = np.random.default_rng(0).normal(size=(3, 4, SPEC.observation_dim)).astype(np.float32)
    episodes = [rollouts.Episode(seed=seed, observations=[observations[seed][0]]) for seed in range(3)]
    old, other, new = episodes
    no_plan = np.full([1, 4, SPEC.action_dim], np.nan, np.float32)
    first = expected_plan([old, other], np.concatenate([no_plan, no_plan]))
    np.testing.assert_array_equal(policy([old, other]), first[:, :3])
    for action, observation in zip(first[0], observations[0][1:], strict=False):
        old.actions.append(np.asarray(action))
        old.rewards.append(0.5)
        old.observations.append(observation)
    initial = np.concatenate([action_search.shift(first[:1], by=3), no_plan])  # `new` has none
    second = expected_plan([new, old], initial[::-1])
    np.testing.assert_array_equal(policy([new, old]), second[:, :3])
    assert (second != expected_plan([new, old], np.concatenate([no_plan, no_plan]))).any()


def test_what_a_planner_cannot_do_is_told(monkeypatch):
    box, discrete = (
        types.SimpleNamespace(single_observation_space=gymnasium.spaces.Box(-1, 1, (2,)), single_action_space=space)
        for space in (gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3))
    )
    settings = {"config": ONE_LAYER, "plan_config": PLAN_CONFIG, "envs": box, "guided": False}
    for name, planner in planners.PLANNERS.items():
        planners.check(name, **settings)
        if planner.takes_q:
            planners.check(name, **settings | {"guided": True})
            continue
        message = f"--iql_workdir cannot guide --planner={name}; it guides reward, shoot, mppi, cem, tree."
        with pytest.raises(ValueError, match=message):
            planners.check(name, **settings | {"guided": True})
    monkeypatch.setitem(sys.modules, "mctx", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"--planner=tree needs mctx: pip install -e '.\[mctx\]'."):
        planners.check("tree", **settings)
    planners.check("shoot", **settings | {"envs": discrete})
    with pytest.raises(ValueError, match="--planner=cem draws around a mean, which discrete actions have not"):
        planners.check("cem", **settings | {"envs": discrete})
