"""What the entry points that play episodes share: the environment of a run, policies by name, play, summaries."""

import collections
import contextlib
import dataclasses
import pathlib
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from experiments.common import entry, memory, planners
from tt_jax import (
    action_planner,
    checkpoints,
    data_parallel,
    environments,
    iql,
    rollouts,
    sequence_planner,
    trajectories,
    transformer,
    types,
)

_SEARCH_DEFAULTS = action_planner.SearchConfig()


def make_env(
    run: dict, *, env_id: str | None = None, trust: bool = False, goal: Sequence[float] = (), **kwargs
) -> gymnasium.Env:
    """Make the environment of a run's dataset, or `env_id`; in a maze the goal can be fixed at `goal` (x, y).

    An environment without a time limit gets that of the data. Raises environments.Unavailable, or Untrusted unless
    `trust`, if the data does not bring an environment that can be made here.
    """
    if env_id:
        env = environments.make(env_id, **kwargs)
    elif run.get("env_spec"):
        env = environments.make_stored(run["env_spec"], trust=trust, **kwargs)
    else:
        raise environments.Unavailable("the dataset names no environment")
    limit = run.get("max_path_length") or run["data"]["max_path_length"]
    if limit and (env.spec is None or env.spec.max_episode_steps is None):
        env = gymnasium.wrappers.TimeLimit(env, limit)
    return rollouts.FixedGoal(env, goal) if goal else env


def restore(workdir: str, config_class: type, *, program: str, step: int | None = None) -> checkpoints.Checkpoint:
    """Read the newest checkpoint, or that of `step`, of a run of `program`; one of another program is a ValueError.

    Parameters that were saved in bfloat16 come in float32.
    """
    checkpoint = checkpoints.restore(workdir, step)
    if not isinstance(checkpoint.config, config_class):
        name = type(checkpoint.config).__name__
        raise ValueError(f"{workdir} holds a checkpoint with {name}; a run of experiments.{program} is needed.")
    params = jax.tree.map(lambda leaf: np.float32(leaf) if leaf.dtype == jnp.bfloat16 else leaf, checkpoint.params)
    return dataclasses.replace(checkpoint, params=params)


@contextlib.contextmanager
def another_step_named(workdir: str):
    """Say of a damaged checkpoint, in commands with --step, which others there are."""
    try:
        yield
    except checkpoints.DamagedError as error:
        raise ValueError(f"{error} --step plays another of {checkpoints.steps(workdir)}.") from error


def restore_iql(workdir: str, run: dict) -> checkpoints.Checkpoint:
    """Read the learners, stacked, that are to guide the planner of `run`; raises ValueError if they do not suit it.

    Their Q must have been trained on the same dataset and observations, and on rewards without penalties, which
    predicted rewards would otherwise hold.
    """
    checkpoint = restore(workdir, iql.IQLConfig, program="train_iql")
    names = ("observation_keys", "observation_slice", "hidden_dims", "step", "termination_penalty")
    expected, got = (
        {"dataset": each["dataset"]} | {name: each["data"].get(name, []) for name in names}  # older runs hide nothing
        for each in (run, checkpoint.run)
    )
    got |= {"termination_penalty": None}  # IQL learns from the rewards as they are
    for name, value in expected.items():
        if got[name] != value:
            remedy = "train both with the same data settings"
            if name == "termination_penalty":
                remedy = "train the transformer with --config.data.termination_penalty=None"
            raise ValueError(
                f"the Q-function in {workdir} was trained with {name}={got[name]}, the transformer with {value}; "
                f"{remedy}."
            )
    return dataclasses.replace(checkpoint, params=stack_learners(checkpoint.params))


def stack_learners(params: types.Params) -> types.Params:
    """Give the parameters of a run with one seed the leading axis of the seeds that those of several have."""
    return params if params["units"]["reward_scale"].ndim == 1 else jax.tree.map(lambda leaf: leaf[None], params)


def plan_config(run: Mapping, *, guided: bool, **others) -> sequence_planner.PlanConfig:
    """Return what a configuration says of plans with IQL's Q, or without; `others` go before it."""
    changes = run.get("guided_plan", {}) if guided else {}  # older runs have none
    settings = {"discount": run["data"]["discount"]} | dict(run["plan"])
    settings |= {name: value for name, value in changes.items() if value is not None}
    return entry.to_dataclass(sequence_planner.PlanConfig, settings, **others)


def restore_planner(
    workdir: str, iql_workdir: str | None, overrides: dict, *, step: int | None = None
) -> tuple[checkpoints.Checkpoint, types.Params | None, sequence_planner.PlanConfig]:
    """Read a run of train_tt, its newest checkpoint or that of `step`, and the learners whose Q is to guide its plans.

    The settings of planning are those of the run with `overrides`; the discount is that of Q, or of the data. Raises
    ValueError if these do not suit each other.
    """
    checkpoint = restore(workdir, transformer.TransformerConfig, program="train_tt", step=step)
    run, learners = checkpoint.run, None
    if iql_workdir:
        guide = restore_iql(iql_workdir, run)
        learners = guide.params
        if overrides.get("discount", guide.config.discount) != guide.config.discount:
            raise ValueError(
                f"--plan.discount={overrides['discount']} must be that of the Q-function, {guide.config.discount}."
            )
        overrides = overrides | {"discount": guide.config.discount}
    return checkpoint, learners, plan_config(run, guided=bool(iql_workdir), **overrides)


def vectorize(
    make_env: Callable[[], gymnasium.Env],
    num_envs: int,
    *,
    spec: types.TransitionSpec | iql.IQLConfig,
    config: trajectories.DataConfig,
) -> gymnasium.vector.VectorEnv:
    """Put environments in step; raises ValueError, naming the flags that help, if they cannot be made or do not fit."""
    try:
        envs = rollouts.vectorize(make_env, num_envs)
    except environments.Untrusted as error:
        raise ValueError(f"{error}; pass --env=ID, or --trust_environment to run it.") from error
    except environments.Unavailable as error:
        raise ValueError(f"{error}; pass --env=ID.") from error
    rollouts.check_spaces(envs, spec, config=config)
    return envs


def plan_policy(
    checkpoint: checkpoints.Checkpoint,
    plan_config: sequence_planner.PlanConfig,
    *,
    seed: int,
    max_batch: int,
    learners: types.Params | None = None,
    planner: str = "reward",
    search_config: action_planner.SearchConfig = _SEARCH_DEFAULTS,
    keep_beams: bool = False,
    on_plan: Callable[[types.PlanOutput], None] = lambda output: None,
) -> rollouts.Policy:
    """Make the policy that plans with a trained model, compiled; with `learners`, stacked, IQL's Q guides it.

    `planner` is one of `planners.PLANNERS`, to which `plan_config` is adapted. "likelihood" imitates, or goes to the
    goal that the environment set if the model was trained with goals; "mppi" and "cem" start from the last plan.
    `on_plan` sees what each call of the planner returns, with `keep_beams` the tokens of all final beams, too. Where
    compiling takes longer than idle rows, other than on a CPU, every batch is a full one.
    """
    model, whole = checkpoint.config, data_parallel.WHOLE
    plan_config = planners.PLANNERS[planner].adapt(plan_config)
    settings = {"config": model, "plan_config": plan_config, "search_config": search_config, "keep_beams": keep_beams}
    plan_fn = memory.guarded(
        data_parallel.over_local_rows(
            planners.make_plan_fn(planner, guided=learners is not None, **settings),
            first_specs=sequence_planner.PlannerParams(
                transformer=whole, discretizer=whole, extra=whole, goal=data_parallel.ROWS
            ),
        ),
        f"a plan with beam_width={plan_config.beam_width}, num_expand={plan_config.num_expand}, horizon="
        f"{plan_config.horizon} and window={plan_config.window} of {model.spec.transition_dim} tokens in "
        f"{max_batch} environments",
        "lower --num_envs or --plan.beam_width, num_expand, window or horizon",
    )

    def noted_plan_fn(*arguments):
        output = plan_fn(*arguments)
        on_plan(output)
        return output

    params = sequence_planner.PlannerParams(
        transformer=checkpoint.params, discretizer=checkpoint.tokenizer, extra=learners
    )
    return rollouts.plan_policy(
        noted_plan_fn,
        jax.device_put(params, data_parallel.on_local_devices()),
        jax.random.key(seed),
        discretizer=checkpoint.tokenizer,
        spec=model.spec,
        context_transitions=plan_config.context_transitions,
        replan_every=plan_config.replan_every,
        max_batch=max_batch,
        min_batch=1 if jax.default_backend() == "cpu" else max_batch,
        goal_fn=rollouts.rest_in_goal if model.goal_conditioned else None,
        initial_shape=(plan_config.horizon, model.spec.action_dim) if planners.PLANNERS[planner].refines else None,
    )


def act_randomly(episodes: Sequence[rollouts.Episode]) -> np.ndarray:
    """Draw one action [1, 2] in [-1, 1] for each episode, a policy for point mazes."""
    draws = [np.random.default_rng((episode.seed, episode.length)) for episode in episodes]
    return np.stack([rng.uniform(-1.0, 1.0, (1, 2)) for rng in draws])


def compile_policy(policy: rollouts.Policy, observation_dim: int, max_batch: int) -> None:
    """Compile the full batch of a policy before the clock starts; the smaller ones of the last episodes are compiled
    on the way."""
    zeros = np.zeros(observation_dim, np.float32)
    start = rollouts.Episode(seed=0, observations=[zeros], goal=zeros[: observation_dim // 2])
    policy([start] * max_batch)


def mean_action_fn(params: types.Params) -> Callable[[np.ndarray], np.ndarray]:
    """Return act_fn(observation [B, N]) -> [B, A], the mean of an IQL policy, or its likeliest discrete action."""
    params, act = jax.device_put(params), jax.jit(iql.mean_action)

    def act_fn(observation):  # in batches of a power of two, so that few programs are compiled
        size = 1 << (len(observation) - 1).bit_length()
        return np.asarray(act(params, np.resize(observation, (size, observation.shape[1])))[: len(observation)])

    return act_fn


def play(
    envs: gymnasium.vector.VectorEnv,
    policy: rollouts.Policy,
    *,
    seeds: Sequence[int],
    config: trajectories.DataConfig,
    title: str,
    check_fn: Callable[[], None] = lambda: None,
    stop_fn: Callable[[], bool] = lambda: False,
) -> tuple[list[rollouts.Episode], dict[str, float]]:
    """Play one episode per seed behind a progress bar, calling `check_fn()` before each plan; see `rollouts.run`.

    Also return the number of plans, the actions in them, and the seconds that the policy took.
    """
    returns, counts = [], collections.Counter()
    with tqdm.tqdm(total=len(seeds), unit="episode", desc=title, miniters=0) as progress:

        def counted_policy(episodes):
            check_fn()
            started = time.time()
            actions = policy(episodes)
            counts["seconds"] += time.time() - started
            counts["plans"] += len(episodes)
            counts["actions"] += actions.shape[0] * actions.shape[1]
            rate = counts["plans"] / (time.time() - progress.start_t)
            average = f"{np.mean(returns):.1f}" if returns else "-"
            longest = max(episode.length for episode in episodes)
            progress.set_postfix_str(f"step {longest}, return {average}, {rate:.1f} plans/s", refresh=False)
            progress.update(0)
            return actions

        def on_finish(episode):
            returns.extend([] if episode.error else [episode.total_reward])
            progress.update()

        hooks = {"on_finish": on_finish, "stop_fn": stop_fn}
        episodes = rollouts.run(envs, counted_policy, seeds=seeds, config=config, **hooks)
    return episodes, counts


def own_seeds(first: int, num_episodes: int) -> range:
    """Return the seeds of the episodes that this process plays; raises ValueError if there is none for one of them."""
    if num_episodes < jax.process_count():
        raise ValueError(f"--num_episodes={num_episodes} must be at least the {jax.process_count()} processes.")
    return range(first, first + num_episodes)[jax.process_index() :: jax.process_count()]


def gather_played(episodes: Sequence[rollouts.Episode], counts: dict[str, float]) -> tuple[list[rollouts.Episode], int]:
    """Return the episodes of all processes by their seeds, and the number of plans; all processes must ask."""
    played = gather((episodes, counts))
    everything = sorted((episode for part, _ in played for episode in part), key=lambda episode: episode.seed)
    return everything, sum(part["plans"] for _, part in played)


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in their order; all processes must ask."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def summarize(episodes: Sequence[rollouts.Episode], reference: tuple[float, float] | None = None) -> dict:
    """List the episodes, and the mean and standard error of each number; what is unknown is None.

    `reference` holds the returns with the normalised scores 0 and 100.
    """
    returns = [episode.total_reward for episode in episodes]
    scores = reference and 100 * (np.array(returns) - reference[0]) / (reference[1] - reference[0])
    columns = {
        "return": returns,
        "normalized_score": [None] * len(episodes) if scores is None else scores.tolist(),
        "length": [episode.length for episode in episodes],
        "success": [episode.success for episode in episodes],
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        **{name: mean_and_error(values) for name, values in columns.items()},
        "episodes": [{"seed": episode.seed} | row for episode, row in zip(episodes, rows, strict=True)],
    }


def without_failures(episodes: Sequence[rollouts.Episode]) -> tuple[list[rollouts.Episode], list[dict]]:
    """Split off the episodes in which the environment failed, as dicts: the seed, the steps before, what it raised.

    Raises entry.Failed if none is left.
    """
    failures = [{"seed": each.seed, "length": each.length, "error": each.error} for each in episodes if each.error]
    if len(failures) == len(episodes):
        raise entry.Failed(f"the environment failed in all episodes, first {tell_failure(failures[0])}.")
    return [each for each in episodes if not each.error], failures


def check_failures(failures: Sequence[dict], *, num_episodes: int, out: str | None = None) -> None:
    """Raise entry.Failed if the environment failed in some of the episodes; `out` is where the others are."""
    if failures:
        kept = f"; the others are in {out}." if out else "."
        raise entry.Failed(
            f"the environment failed in {len(failures)} of {num_episodes} episodes, first "
            f"{tell_failure(failures[0])}{kept}"
        )


def tell_failure(failure: dict) -> str:
    """Say in which episode, where in it and how the environment failed."""
    return f"with seed {failure['seed']} after {failure['length']} steps: {failure['error']}"


def mean_and_error(values: Sequence[float | None]) -> dict:
    """Return the mean and the standard error, which are None where a value is unknown or stands alone."""
    if None in values:
        return {"mean": None, "standard_error": None}
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}


def interquartile_mean(scores: np.ndarray, *, num_draws: int = 2000) -> dict:
    """Return the mean of the middle half of all scores [trainings, episodes], and its 95% bootstrap interval.

    As Agarwal et al. 2021 (arXiv 2108.13264) recommend; trainings are drawn first, then episodes of each.
    """
    rng, (size, length) = np.random.default_rng(0), scores.shape
    trainings = rng.integers(size, size=(num_draws, size, 1))
    draws = scores[trainings, rng.integers(length, size=(num_draws, size, length))].reshape(num_draws, -1)

    def middle(values):
        cut = values.shape[-1] // 4
        return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)

    low, high = np.percentile(middle(draws), [2.5, 97.5])
    return {"mean": float(middle(scores.reshape(-1))), "low": float(low), "high": float(high)}


def print_summary(results: dict, out: pathlib.Path) -> None:
    """Print what was played and where all of it is."""
    print(f"{results['environment']}, step {results['checkpoint_step']}, {len(results['episodes'])} episodes")
    for name in ("return", "normalized_score", "length", "success"):
        mean, error = results[name]["mean"], results[name]["standard_error"]
        if mean is not None:
            print(f"  {name:<17}{mean:10.2f}" + (f" +- {error:.2f}" if error is not None else ""))
    print(f"  {'plans/s':<17}{results['plans_per_second']:10.2f}\n  results in {out}")
