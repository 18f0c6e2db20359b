"""Measurements of planners over one trained model: what episodes return at what cost, what plans promise and keep."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import control, planners
from tt_jax import action_planner, checkpoints, iql, rollouts, sequence_planner, trajectories, types

STARTS = (0, 10, 20, 30)  # steps of the recorded episodes from which plans are executed


@dataclasses.dataclass(frozen=True)
class Cell:
    """A planner with a budget."""

    planner: str
    horizon: int
    candidates: int  # beam_width


@dataclasses.dataclass(frozen=True)
class Study:
    """What all cells have in common."""

    checkpoint: checkpoints.Checkpoint
    learners: types.Params | None  # whose Q guides the planners that take it
    plan_config: sequence_planner.PlanConfig
    search_config: action_planner.SearchConfig
    data_config: trajectories.DataConfig
    make_env: Callable[[], gymnasium.Env]
    seeds: range  # of episodes
    num_envs: int
    reference: tuple[float, float] | None  # returns with the normalised scores 0 and 100
    check_fn: Callable[[], None]


def cells(
    plan_config: sequence_planner.PlanConfig, pairs: Iterable[tuple[str, tuple[int, int]]]
) -> list[tuple[Cell, sequence_planner.PlanConfig]]:
    """Return the cells of (planner, (horizon, candidates)) with their settings, without those that come twice.

    What a planner does not have, such as a horizon where there is no search, is what it plays with. Raises ValueError
    for settings that cannot be.
    """
    found = {}
    for name, (horizon, candidates) in pairs:
        if planners.PLANNERS[name].refines and candidates < 2:
            continue  # a distribution is moved by comparing two
        config = dataclasses.replace(
            plan_config,
            horizon=horizon,
            beam_width=candidates,
            replan_every=min(plan_config.replan_every, horizon),
            num_elites=min(plan_config.num_elites, candidates),
        )
        config = planners.PLANNERS[name].adapt(config)
        found[Cell(name, config.horizon, config.beam_width)] = config
    return list(found.items())


def cell_of(row: dict) -> Cell:
    """Return the cell of a row of results."""
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})


def play(study: Study, cell: Cell, plan_config: sequence_planner.PlanConfig) -> dict:
    """Play the episodes with one planner: returns, successes and the milliseconds that an action took."""
    policy, compile_time = _compiled_policy(study, cell, plan_config)
    envs = rollouts.vectorize(study.make_env, min(study.num_envs, len(study.seeds)))
    title = f"{cell.planner} {cell.horizon} x {cell.candidates}"
    settings = {"seeds": study.seeds, "config": study.data_config, "title": title, "check_fn": study.check_fn}
    episodes, counts = control.play(envs, policy, **settings)
    envs.close()
    return {
        **control.summarize(episodes, study.reference),
        "ms_per_action": 1000 * counts["seconds"] / counts["actions"],
        "compile_time_s": compile_time,
    }


def record(study: Study) -> list[rollouts.Episode]:
    """Play the episodes that states are taken from, by actions that the model samples."""
    ((cell, plan_config),) = cells(study.plan_config, [("sample", (1, 1))])
    policy, _ = _compiled_policy(study, cell, plan_config)
    return _play_some(study, policy, study.seeds, length=max(STARTS) + 1, title="record states")


def promise_and_keep(
    study: Study,
    cell: Cell,
    plan_config: sequence_planner.PlanConfig,
    recorded: Sequence[rollouts.Episode],
) -> dict:
    """Plan once in real states, execute the plans to their end, and compare with what the model predicts of them.

    States are reached again by the recorded actions after a reset with the same seed. Returns are the discounted sums
    of rewards over the horizon, values left out. With learners they are in the units of Q and go on: predicted is the
    score of the search, with Q of the last step in place of its reward, and what came ends with V of the last state,
    the mean over learners. Errors of observations are mean absolute ones in standard deviations of the bins of each
    dimension; log-probabilities are those of whole actions. All are means over the states with standard errors;
    "states" has the returns of each, in an order that is the same for all cells.
    """
    plan_config = dataclasses.replace(plan_config, replan_every=cell.horizon)
    planner, _ = _compiled_policy(study, cell, plan_config)
    predict_fn = jax.jit(action_planner.make_predict_fn(config=study.checkpoint.config, plan_config=plan_config))
    rows = []
    for start in STARTS:
        states = {episode.seed: _cut(episode, start) for episode in recorded if episode.length > start}
        if not states:
            continue
        plans = {}  # actions by seed

        def replay_and_plan(episodes, states=states, plans=plans, start=start):
            seeds = [episode.seed for episode in episodes]
            if episodes[0].length < start:
                return np.stack([states[seed].actions for seed in seeds])
            plans |= dict(zip(seeds, planner(episodes), strict=True))
            return np.stack([plans[seed] for seed in seeds])

        title = f"{cell.planner} {cell.horizon} x {cell.candidates}, step {start}"
        episodes = _play_some(study, replay_and_plan, list(states), length=start + cell.horizon, title=title)
        actions = np.stack([plans[episode.seed] for episode in episodes])
        steps = _predict(study, plan_config, predict_fn, list(states.values()), actions)
        rows += [_compare(study, episode, start, step) for episode, step in zip(episodes, steps, strict=True)]
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    means = {name: control.mean_and_error(values or [None]) for name, values in columns.items()}
    return means | {"states": [{name: row[name] for name in ("predicted", "real")} for row in rows]}


def _compiled_policy(study, cell, plan_config):
    started = time.time()
    takes_q = planners.PLANNERS[cell.planner].takes_q
    num_envs = min(study.num_envs, len(study.seeds))
    policy = control.plan_policy(
        study.checkpoint,
        plan_config,
        seed=study.seeds[0],
        max_batch=num_envs,
        learners=study.learners if takes_q else None,
        planner=cell.planner,
        search_config=study.search_config,
    )
    control.compile_policy(policy, study.checkpoint.config.spec.observation_dim, num_envs)
    return policy, time.time() - started


def _play_some(study, policy, seeds, *, length, title):
    """Play the first `length` steps of episodes, as many in step as fit, so that none begins late."""
    episodes = []
    for first in range(0, len(seeds), study.num_envs):
        some = seeds[first : first + study.num_envs]
        envs = rollouts.vectorize(lambda: gymnasium.wrappers.TimeLimit(study.make_env(), length), len(some))
        settings = {"seeds": some, "config": study.data_config, "title": title, "check_fn": study.check_fn}
        episodes += control.play(envs, policy, **settings)[0]
        envs.close()
    return episodes


def _cut(episode, length):
    """Return the first steps of an episode, as if it had come no farther."""
    parts = {"observations": length + 1, "actions": length, "rewards": length}
    return dataclasses.replace(episode, **{name: getattr(episode, name)[:end] for name, end in parts.items()})


def _predict(study, plan_config, predict_fn, states, actions):
    """Return what the model expects of plans [b, H, A] from the ends of episodes: a Proposal of [H, ...] for each."""
    model, discretizer = study.checkpoint.config, study.checkpoint.tokenizer
    params = sequence_planner.PlannerParams(transformer=study.checkpoint.params, discretizer=discretizer)
    keys = jax.random.split(jax.random.key(study.seeds[0]), len(states))
    past = plan_config.context_transitions
    context = rollouts.encode_context(states, discretizer=discretizer, spec=model.spec, context_transitions=past)
    observation = np.stack([state.observations[-1] for state in states])
    steps = jax.tree.map(np.asarray, predict_fn(params, keys, context, observation, actions))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], steps) for i in range(len(states))]


def _compare(study, episode, start, steps):
    """Compare what was expected of the steps from `start` on with what came; without an imagined step no error."""
    discount, horizon = study.plan_config.discount, len(steps.reward)
    powers = discount ** np.arange(horizon + 1)
    is_before_end = np.cumprod(np.concatenate([[1], ~steps.terminal[:-1]]))
    real = np.array(episode.rewards[start:])  # fewer than the horizon where the episode ended
    expected, after = steps.reward, 0.0
    if study.learners is not None:
        last_q = sequence_planner.least_q(study.learners, steps.observation[-1], steps.action[-1])
        expected = np.append(sequence_planner.rewards_of_q(study.learners, expected[:-1]), last_q)
        real = np.asarray(sequence_planner.rewards_of_q(study.learners, real))
        if not episode.terminated:
            after = float(jnp.mean(jax.vmap(iql.values, (0, None))(study.learners, episode.observations[-1])))
    predicted = float(np.sum(powers[:-1] * is_before_end * expected))
    came = float(np.sum(powers[: len(real)] * real) + powers[len(real)] * after)
    scale = np.std(study.checkpoint.tokenizer.centers[: steps.observation.shape[-1]], axis=1)
    scale = np.where(scale > 0, scale, 1.0)
    seen = np.array(episode.observations[start + 1 : start + len(real)])  # [H - 1, N]
    error = float(np.mean(np.abs(seen - steps.observation[1 : len(real)]) / scale)) if len(real) > 1 else None
    return {
        "predicted": predicted,
        "real": came,
        "predicted_minus_real": predicted - came,
        "observation_error": error,
        "log_prob": float(np.mean(steps.log_prob)),
    }
