"""What the entry points that play episodes share: the environment of a run, policies by name, play, summaries."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import gymnasium
import jax
import numpy as np
import tqdm

from tt_jax import checkpoints, environments, iql, likelihood_search, rollouts, sequence_planner, trajectories, types


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


def restore(workdir: str, config_class: type, *, program: str) -> checkpoints.Checkpoint:
    """Read the newest checkpoint of a run of `program`; one of another program is a ValueError."""
    checkpoint = checkpoints.restore(workdir)
    if not isinstance(checkpoint.config, config_class):
        name = type(checkpoint.config).__name__
        raise ValueError(f"{workdir} holds a checkpoint with {name}; a run of experiments.{program} is needed.")
    return checkpoint


def restore_iql(workdir: str, run: dict) -> checkpoints.Checkpoint:
    """Read the learners, stacked, that are to guide the planner of `run`; raises ValueError if they do not suit it.

    Their Q must have been trained on the same dataset and observations, and on rewards without penalties, which
    predicted rewards would otherwise hold.
    """
    checkpoint = restore(workdir, iql.IQLConfig, program="train_iql")
    names = ("observation_keys", "observation_slice", "step", "termination_penalty")
    expected, got = (
        {"dataset": each["dataset"]} | {n: each["data"][n] for n in names} for each in (run, checkpoint.run)
    )
    got |= {"termination_penalty": None}  # IQL learns from the rewards as they are
    for name, value in expected.items():
        if got[name] != value:
            raise ValueError(
                f"the Q-function in {workdir} was trained with {name}={got[name]}, the transformer with {value}; "
                "train both with the same data settings."
            )
    return dataclasses.replace(checkpoint, params=stack_learners(checkpoint.params))


def stack_learners(params: types.Params) -> types.Params:
    """Give the parameters of a run with one seed the leading axis of the seeds that those of several have."""
    return params if params["actor"]["log_std"].ndim == 2 else jax.tree.map(lambda leaf: leaf[None], params)


def plan_policy(
    checkpoint: checkpoints.Checkpoint,
    plan_config: sequence_planner.PlanConfig,
    *,
    seed: int,
    max_batch: int,
    learners: types.Params | None = None,
    by_likelihood: bool = False,
    keep_beams: bool = False,
    on_plan: Callable[[types.PlanOutput], None] = lambda output: None,
) -> rollouts.Policy:
    """Make the policy that plans with a trained model, compiled; with `learners`, stacked, IQL's Q guides it.

    `by_likelihood` it imitates, or goes to the goal that the environment set if the model was trained with goals.
    `on_plan` sees what each call of the planner returns, with `keep_beams` the tokens of all final beams, too.
    """
    make_plan_fn = likelihood_search.make_likelihood_plan_fn if by_likelihood else sequence_planner.make_plan_fn
    guidance = sequence_planner.guide_by_q(discount=plan_config.discount) if learners else {}
    settings = {"config": checkpoint.config, "plan_config": plan_config, "keep_beams": keep_beams}
    plan_fn = jax.jit(make_plan_fn(**settings, **guidance))

    def noted_plan_fn(*arguments):
        output = plan_fn(*arguments)
        on_plan(output)
        return output

    params = sequence_planner.PlannerParams(
        transformer=checkpoint.params, discretizer=checkpoint.tokenizer, extra=learners
    )
    return rollouts.plan_policy(
        noted_plan_fn,
        jax.device_put(params),
        jax.random.key(seed),
        discretizer=checkpoint.tokenizer,
        spec=checkpoint.config.spec,
        context_transitions=plan_config.context_transitions,
        replan_every=plan_config.replan_every,
        max_batch=max_batch,
        goal_fn=rollouts.rest_in_goal if checkpoint.config.goal_conditioned else None,
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
    """Return act_fn(observation [B, N]) -> [B, A], the mean of an IQL policy."""
    params = jax.device_put(params)
    act = jax.jit(lambda params, observation: iql.sample_action(params, jax.random.key(0), observation, temperature=0))
    return lambda observation: np.asarray(act(params, observation))


def play(
    envs: gymnasium.vector.VectorEnv,
    policy: rollouts.Policy,
    *,
    seeds: Sequence[int],
    config: trajectories.DataConfig,
    title: str,
    check_fn: Callable[[], None] = lambda: None,
) -> tuple[list[rollouts.Episode], dict[str, float]]:
    """Play one episode per seed behind a progress bar, calling `check_fn()` before each plan.

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
            returns.append(episode.total_reward)
            progress.update()

        episodes = rollouts.run(envs, counted_policy, seeds=seeds, config=config, on_finish=on_finish)
    return episodes, counts


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


def mean_and_error(values: Sequence[float | None]) -> dict:
    """Return the mean and the standard error, which are None where a value is unknown or stands alone."""
    if None in values:
        return {"mean": None, "standard_error": None}
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}
