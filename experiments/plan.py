"""Control an environment by planning with a trained Trajectory Transformer, and write the results as JSON.

python -m experiments.plan --workdir=DIR --num_episodes=20 --num_envs=10 --seed=0 --out=results.json
python -m experiments.plan --workdir=DIR --planner=likelihood  # imitation, or with a goal-conditioned run to the goal

The newest checkpoint in the workdir brings its environment, its observation layout and its planning settings; --env and
--plan.* replace them, e.g. --plan.horizon=15 --plan.beam_width=32.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import time

import gymnasium
import jax
import minari
import numpy as np
import tqdm
from absl import flags

from experiments import entry, recording
from tt_jax import checkpoints, likelihood_search, rollouts, sequence_planner, trajectories, transformer

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run.", required=True)
NUM_EPISODES = flags.DEFINE_integer("num_episodes", 20, "Episodes to play.", 1)
NUM_ENVS = flags.DEFINE_integer(
    "num_envs", 10, "Environments that are planned together; each episode has its own seed.", 1
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the planner and of the first episode; each further one adds 1.", 0, 2**31
)
OUT = flags.DEFINE_string("out", "results.json", "File for the results.")
VIDEO = flags.DEFINE_string("video", None, "File for a video of the first episode: .gif or, with imageio-ffmpeg, .mp4.")
PLANNER = flags.DEFINE_enum(
    "planner", "reward", ["reward", "likelihood"], "What a plan has the most of: predicted reward, or likelihood."
)
ENV = flags.DEFINE_string("env", None, "Environment id, in place of the dataset's environment.")


class _PairParser(flags.ArgumentParser):
    """Reads 5,4 or (5, 4)."""

    def __init__(self, number_type):
        self._number_type = number_type

    def parse(self, argument):
        numbers = argument.strip("()").split(",")
        if len(numbers) != 2:
            raise ValueError("two numbers are needed, such as 5,4")
        return tuple(self._number_type(number) for number in numbers)


GOAL = flags.DEFINE(
    _PairParser(float), "goal", None, "x,y where the goal of a gymnasium-robotics maze stands in every episode."
)

# One flag per planning setting, by the type of its default. (A config flag would fail on a misspelt one at import.)
_PARSERS = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    tuple: _PairParser(int),
}
PLAN = {
    field.name: flags.DEFINE(_PARSERS[type(field.default)], f"plan.{field.name}", None, "Replaces the run's setting.")
    for field in dataclasses.fields(sequence_planner.PlanConfig)
}


def main(_):
    checkpoint = checkpoints.restore(WORKDIR.value)
    run, model = checkpoint.run, checkpoint.config
    if not isinstance(model, transformer.TransformerConfig):
        raise ValueError(
            f"{WORKDIR.value} holds a {type(model).__name__}; planning needs a run of experiments.train_tt."
        )
    overrides = {name: flag.value for name, flag in PLAN.items() if flag.value is not None}
    plan_config = entry.to_dataclass(
        sequence_planner.PlanConfig, {"discount": run["data"]["discount"]} | run["plan"] | overrides
    )
    data_fields = {field.name for field in dataclasses.fields(trajectories.DataConfig)}
    data_config = entry.to_dataclass(
        trajectories.DataConfig, {name: value for name, value in run["data"].items() if name in data_fields}
    )
    if model.goal_conditioned and PLANNER.value == "reward":
        raise ValueError("this run was trained with goals; plan with --planner=likelihood.")
    makers = {
        "reward": sequence_planner.make_plan_fn,
        "likelihood": likelihood_search.make_likelihood_plan_fn,
    }
    plan_fn = jax.jit(makers[PLANNER.value](config=model, plan_config=plan_config))

    make_env = functools.partial(_make_env, run)
    envs = rollouts.vectorize(make_env, min(NUM_ENVS.value, NUM_EPISODES.value))
    rollouts.check_spaces(envs, model.spec, config=data_config)
    goal_space = getattr(envs.single_observation_space, "spaces", {}).get("desired_goal")
    if model.goal_conditioned and (not goal_space or 2 * goal_space.shape[0] != model.spec.observation_dim):
        raise ValueError(
            "a goal must be the position in an observation of position and velocity, as in point mazes; this one has "
            f"{goal_space.shape[0] if goal_space else 0} dimensions, the observation {model.spec.observation_dim}."
        )
    out = _result_file()
    if VIDEO.value:  # a machine that cannot render says so now, not after the episodes
        _write_video(VIDEO.value, make_env, seed=SEED.value, actions=[])

    params = sequence_planner.PlannerParams(transformer=checkpoint.params, discretizer=checkpoint.tokenizer)
    policy = rollouts.plan_policy(
        plan_fn,
        jax.device_put(params),
        jax.random.key(SEED.value),
        discretizer=checkpoint.tokenizer,
        spec=model.spec,
        context_transitions=plan_config.context_transitions,
        replan_every=plan_config.replan_every,
        max_batch=envs.num_envs,
        goal_fn=rollouts.rest_in_goal if model.goal_conditioned else None,
    )
    # Compile the full batch before the clock starts; the smaller ones of the last episodes are compiled on the way.
    started = time.time()
    zeros = np.zeros(model.spec.observation_dim, np.float32)
    start = rollouts.Episode(seed=0, observations=[zeros], goal=zeros[: len(zeros) // 2])
    policy([start] * envs.num_envs)
    compiled = time.time()
    episodes, num_plans = _play(envs, policy, data_config)
    seconds = time.time() - compiled

    results = {
        "checkpoint_step": checkpoint.step,
        "environment": envs.envs[0].spec.id,
        "dataset": run["dataset"],
        **_summarize(episodes, None if ENV.value else _open_dataset(run["dataset"])),
        "num_plans": num_plans,
        "plans_per_second": num_plans / seconds,
        "wall_time_s": seconds,
        "compile_time_s": compiled - started,
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": {
            **{flag.name: flag.value for flag in (WORKDIR, NUM_EPISODES, NUM_ENVS, SEED, PLANNER, ENV, GOAL)},
            "plan": dataclasses.asdict(plan_config),
        },
    }
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(out)
    if VIDEO.value:
        _write_video(VIDEO.value, make_env, seed=SEED.value, actions=episodes[0].actions)
    _print_table(results)


def _result_file() -> pathlib.Path:
    """Make the folder of --out; a place where no file can be written is reported before the work."""
    out = pathlib.Path(OUT.value)
    if out.is_dir():
        raise ValueError(f"--out={OUT.value} must name a file, not a folder.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out={OUT.value} cannot be written: {error}.") from error
    return out


def _make_env(run, **kwargs) -> gymnasium.Env:
    spec = ENV.value or run.get("env_spec")
    if not spec:
        raise ValueError("the dataset of this checkpoint names no environment; pass --env=ID.")
    env = recording.make_env(ENV.value or gymnasium.envs.registration.EnvSpec.from_json(spec), **kwargs)
    return rollouts.FixedGoal(env, GOAL.value) if GOAL.value else env


def _play(envs, policy, data_config) -> tuple[list[rollouts.Episode], int]:
    """Run all episodes behind a progress bar; also count the plans."""
    returns, counts = [], collections.Counter()
    with tqdm.tqdm(total=NUM_EPISODES.value, unit="episode", desc="plan", miniters=0) as progress:

        def counted_policy(episodes):
            actions = policy(episodes)
            counts["plans"] += len(episodes)
            rate = counts["plans"] / (time.time() - progress.start_t)
            average = f"{np.mean(returns):.1f}" if returns else "-"
            progress.set_postfix_str(f"return {average}, {rate:.1f} plans/s", refresh=False)
            progress.update(0)
            return actions

        def on_finish(episode):
            returns.append(episode.total_reward)
            progress.update()

        seeds = range(SEED.value, SEED.value + NUM_EPISODES.value)
        episodes = rollouts.run(envs, counted_policy, seeds=seeds, config=data_config, on_finish=on_finish)
    return episodes, counts["plans"]


def _summarize(episodes, dataset) -> dict:
    """List the episodes, and the mean and standard error of each number; what is unknown is None."""
    returns = [episode.total_reward for episode in episodes]
    scores = rollouts.normalized_scores(returns, dataset) if dataset else None
    columns = {
        "return": returns,
        "normalized_score": [None] * len(episodes) if scores is None else scores.tolist(),
        "length": [episode.length for episode in episodes],
        "success": [episode.success for episode in episodes],
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        **{name: _mean_and_error(values) for name, values in columns.items()},
        "episodes": [{"seed": episode.seed} | row for episode, row in zip(episodes, rows, strict=True)],
    }


def _mean_and_error(values) -> dict:
    if None in values:
        return {"mean": None, "standard_error": None}
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error and float(error)}


def _print_table(results):
    print(f"{results['environment']}, step {results['checkpoint_step']}, {len(results['episodes'])} episodes")
    for name in ("return", "normalized_score", "length", "success"):
        mean, error = results[name]["mean"], results[name]["standard_error"]
        if mean is not None:
            print(f"  {name:<17}{mean:10.2f}" + (f" +- {error:.2f}" if error is not None else ""))
    print(f"  {'plans/s':<17}{results['plans_per_second']:10.2f}\n  results in {OUT.value}")


def _open_dataset(dataset_id) -> minari.MinariDataset | None:
    """Open the dataset for its reference scores; None if it is not on this machine."""
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError:
        return None


def _write_video(path, make_env, *, seed, actions):
    """Replay the actions in a fresh environment with the same seed; without actions, film the first frame alone."""
    try:
        import imageio.v3 as imageio

        env = make_env(render_mode="rgb_array")
        env.reset(seed=seed)
        frames = [env.render()]
        for action in actions:
            env.step(action)
            frames.append(env.render())
        fps = env.metadata.get("render_fps", 30)
        env.close()
        options = {"duration": 1000 / fps, "loop": 0} if path.endswith(".gif") else {"fps": fps}
        imageio.imwrite(path, np.stack(frames), **options)
    except Exception as error:  # drivers, rendering backends and codecs raise whatever they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = "needs the plots extra, imageio-ffmpeg for .mp4, and a display or MUJOCO_GL=egl or osmesa"
        raise ValueError(f"--video={path} {hint} ({reason}).") from error


if __name__ == "__main__":
    entry.run(main)
