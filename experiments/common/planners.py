"""Planners by name, for the commands that play them: a new planner is one file of the library and one line here."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import gymnasium

from tt_jax import action_planner, likelihood_search, sequence_planner, spaces, transformer, types

PlanConfig = sequence_planner.PlanConfig


@dataclasses.dataclass(frozen=True)
class Planner:
    """How a planner is made and what it can.

    `make_plan_fn` takes `config`, `plan_config` and, if Q guides it, `score_fn` and `reward_fn`.
    """

    make_plan_fn: Callable[..., Callable[..., types.PlanOutput]]
    takes_q: bool = True
    keeps_beams: bool = False  # returns all final beams if asked by `keep_beams`
    refines: bool = False  # the last plan, its argument `initial`; it takes `search_config`, too
    adapt: Callable[[PlanConfig], PlanConfig] = lambda plan_config: plan_config  # to what the planner can
    extra: str | None = None  # of setup.py, a library of the same name, without which it cannot be made


def _make_tree_plan_fn(**settings):
    from tt_jax import tree_planner  # here, because it imports mctx

    return tree_planner.make_tree_plan_fn(**settings)


def _one_step(plan_config):
    """Plan anew at every step; a tree search finds one action."""
    return dataclasses.replace(plan_config, replan_every=1)


def _without_search(policy):
    adapt = functools.partial(sequence_planner.policy_config, policy=policy)
    return Planner(sequence_planner.make_plan_fn, takes_q=False, adapt=adapt)


PLANNERS = {
    "reward": Planner(sequence_planner.make_plan_fn, keeps_beams=True),
    "likelihood": Planner(likelihood_search.make_likelihood_plan_fn, takes_q=False, keeps_beams=True),
    "shoot": Planner(action_planner.make_shoot_plan_fn),
    "mppi": Planner(action_planner.make_mppi_plan_fn, refines=True),
    "cem": Planner(action_planner.make_cem_plan_fn, refines=True),
    "tree": Planner(_make_tree_plan_fn, adapt=_one_step, extra="mctx"),
    "sample": _without_search("sample"),
    "median": _without_search("median"),
    "greedy": _without_search("greedy"),
}


def make_plan_fn(
    name: str,
    *,
    config: transformer.TransformerConfig,
    plan_config: PlanConfig,
    search_config: action_planner.SearchConfig,
    guided: bool,
    keep_beams: bool = False,
) -> Callable[..., types.PlanOutput]:
    """Return the plan_fn of a planner, `guided` by the Q of `PlannerParams.extra`; raises ValueError if it cannot."""
    planner = PLANNERS[name]
    settings = {"search_config": search_config} if planner.refines else {}
    settings |= {"keep_beams": True} if keep_beams else {}
    settings |= sequence_planner.guide_by_q(discount=plan_config.discount) if guided else {}
    return planner.make_plan_fn(config=config, plan_config=plan_config, **settings)


def check(
    name: str,
    *,
    config: transformer.TransformerConfig,
    plan_config: PlanConfig,
    envs: gymnasium.vector.VectorEnv,
    guided: bool,
) -> None:
    """Raise ValueError unless the planner is installed and suits model, environment, and Q that is to guide it."""
    planner = PLANNERS[name]
    if planner.extra and importlib.util.find_spec(planner.extra) is None:
        raise ValueError(f"--planner={name} needs {planner.extra}: pip install -e '.[{planner.extra}]'.")
    if config.goal_conditioned and name != "likelihood":
        raise ValueError("this run was trained with goals; plan with --planner=likelihood.")
    observation_space = envs.single_observation_space
    has_goal = isinstance(observation_space, gymnasium.spaces.Dict) and "desired_goal" in observation_space.spaces
    goal_dim = spaces.columns(observation_space["desired_goal"]).size if has_goal else 0
    if config.goal_conditioned and 2 * goal_dim != config.spec.observation_dim:
        raise ValueError(
            "a goal must be the position in an observation of position and velocity, as in point mazes; this one has "
            f"{goal_dim} dimensions, the observation {config.spec.observation_dim}."
        )
    if guided and not planner.takes_q:
        able = ", ".join(each for each in PLANNERS if PLANNERS[each].takes_q)
        raise ValueError(f"--iql_workdir cannot guide --planner={name}; it guides {able}.")
    if isinstance(envs.single_action_space, gymnasium.spaces.Box):
        return
    if plan_config.num_elites > 1:
        raise ValueError(f"--plan.num_elites={plan_config.num_elites} must be 1: discrete actions have no mean.")
    if planner.refines:
        raise ValueError(f"--planner={name} draws around a mean, which discrete actions have not; try shoot.")
