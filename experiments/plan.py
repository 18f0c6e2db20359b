"""Control an environment by planning with a trained Trajectory Transformer, and write the results as JSON.

python -m experiments.plan --workdir=DIR --num_episodes=20 --num_envs=10 --seed=0 --out=results.json
python -m experiments.plan --workdir=DIR --planner=likelihood  # imitation, or with a goal-conditioned run to the goal

The newest checkpoint in the workdir brings its environment, its observation layout and its planning settings; --env and
--plan.* replace them, e.g. --plan.horizon=15 --plan.beam_width=32.
"""

import dataclasses
import functools
import pathlib
import time

import gymnasium
import jax
import numpy as np
from absl import flags

from experiments.common import control, datasets, entry, run_flags
from tt_jax import environments, minari_files, rollouts, sequence_planner, spaces, transformer

WORKDIR = run_flags.workdir(help="Folder of the training run.", required=True)
IQL_WORKDIR = flags.DEFINE_string("iql_workdir", None, "Folder of a run of train_iql whose Q guides the plans.")
NUM_EPISODES = run_flags.num_episodes(default=20, help="Episodes to play.", lower_bound=1)
NUM_ENVS = run_flags.num_envs(default=10, help="Environments that are planned together; each episode has its own seed.")
SEED = run_flags.seed(help="Seed of the planner and of the first episode; each further one adds 1.", upper_bound=2**31)
OUT = flags.DEFINE_string("out", "results.json", "File for the results.")
VIDEO = flags.DEFINE_string("video", None, "File for a video of the first episode: .gif or, with imageio-ffmpeg, .mp4.")
DRAW = flags.DEFINE_string("draw", None, "Folder for pictures of all beams of some plans of the first episode.")
PLANNER = flags.DEFINE_enum(
    "planner", "reward", ["reward", "likelihood"], "What a plan has the most of: predicted reward, or likelihood."
)
ENV = flags.DEFINE_string("env", None, "Environment id, or MODULE:ID, in place of the dataset's environment.")
TRUST = flags.DEFINE_bool(
    "trust_environment", False, "Run whatever code the dataset names as its environment, not only gymnasium's."
)
MAX_EPISODE_STEPS = flags.DEFINE_integer(
    "max_episode_steps", None, "Cut episodes after so many steps; by default as the environment or the data does.", 1
)
REFERENCE_MIN = flags.DEFINE_float("reference_min", None, "Return with the normalised score 0; with --reference_max.")
REFERENCE_MAX = flags.DEFINE_float("reference_max", None, "Return with the normalised score 100.")


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
SETTINGS = (WORKDIR, IQL_WORKDIR, PLANNER, NUM_EPISODES, NUM_ENVS, SEED, ENV, TRUST, MAX_EPISODE_STEPS, GOAL)
SETTINGS += (REFERENCE_MIN, REFERENCE_MAX)


def main(_):
    if (REFERENCE_MIN.value is None) != (REFERENCE_MAX.value is None) or (
        REFERENCE_MIN.value is not None and REFERENCE_MIN.value >= REFERENCE_MAX.value
    ):
        raise ValueError(
            f"--reference_min={REFERENCE_MIN.value} and --reference_max={REFERENCE_MAX.value} must be given together, "
            "the first below the second."
        )
    checkpoint = control.restore(WORKDIR.value, transformer.TransformerConfig, program="train_tt")
    run, model = checkpoint.run, checkpoint.config
    overrides = {name: flag.value for name, flag in PLAN.items() if flag.value is not None}
    learners = None
    if IQL_WORKDIR.value:
        guide = control.restore_iql(IQL_WORKDIR.value, run)
        learners, overrides = guide.params, {"discount": guide.config.discount} | overrides
        if overrides["discount"] != guide.config.discount:
            raise ValueError(
                f"--plan.discount={overrides['discount']} must be that of the Q-function, {guide.config.discount}."
            )
    plan_config = entry.to_dataclass(
        sequence_planner.PlanConfig, {"discount": run["data"]["discount"]} | run["plan"] | overrides
    )
    data_config = datasets.data_config(run["data"])
    settings = {"env_id": ENV.value, "trust": TRUST.value, "goal": GOAL.value or ()}
    make_env = functools.partial(control.make_env, run, max_episode_steps=MAX_EPISODE_STEPS.value, **settings)
    if model.goal_conditioned and PLANNER.value == "reward":
        raise ValueError("this run was trained with goals; plan with --planner=likelihood.")
    if learners and PLANNER.value != "reward":
        raise ValueError("--iql_workdir guides --planner=reward alone.")
    try:
        envs = rollouts.vectorize(make_env, min(NUM_ENVS.value, NUM_EPISODES.value))
    except environments.Untrusted as error:
        raise ValueError(f"{error}; pass --env=ID, or --trust_environment to run it.") from error
    except environments.Unavailable as error:
        raise ValueError(f"{error}; pass --env=ID.") from error
    rollouts.check_spaces(envs, model.spec, config=data_config)
    if plan_config.num_elites > 1 and not isinstance(envs.single_action_space, gymnasium.spaces.Box):
        raise ValueError(f"--plan.num_elites={plan_config.num_elites} must be 1: discrete actions have no mean.")
    observation_space = envs.single_observation_space
    has_goal = isinstance(observation_space, gymnasium.spaces.Dict) and "desired_goal" in observation_space.spaces
    goal_dim = spaces.columns(observation_space["desired_goal"]).size if has_goal else 0
    if model.goal_conditioned and 2 * goal_dim != model.spec.observation_dim:
        raise ValueError(
            "a goal must be the position in an observation of position and velocity, as in point mazes; this one has "
            f"{goal_dim} dimensions, the observation {model.spec.observation_dim}."
        )
    out = _result_file()
    drawing = DRAW.value and _open_drawing(DRAW.value, plan_config.horizon)
    if VIDEO.value:  # a machine that cannot render says so now, not after the episodes
        _write_video(VIDEO.value, make_env, seed=SEED.value, actions=[])

    by_likelihood = PLANNER.value == "likelihood"
    planner = {"seed": SEED.value, "learners": learners, "by_likelihood": by_likelihood}
    make_policy = functools.partial(control.plan_policy, checkpoint, plan_config, **planner)
    policy = make_policy(max_batch=envs.num_envs)
    started = time.time()
    control.compile_policy(policy, model.spec.observation_dim, envs.num_envs)
    compiled = time.time()
    seeds = range(SEED.value, SEED.value + NUM_EPISODES.value)
    episodes, counts = control.play(envs, policy, seeds=seeds, config=data_config, title="plan")
    seconds = time.time() - compiled

    results = {
        "checkpoint_step": checkpoint.step,
        "environment": envs.envs[0].spec.id,
        "dataset": run["dataset"],
        **control.summarize(episodes, _reference_scores(run["dataset"])),
        "num_plans": counts["plans"],
        "plans_per_second": counts["plans"] / seconds,
        "wall_time_s": seconds,
        "compile_time_s": compiled - started,
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": {
            **{flag.name: flag.value for flag in SETTINGS},
            "plan": dataclasses.asdict(plan_config),
        },
    }
    entry.write_json(out, results)
    if VIDEO.value:
        _write_video(VIDEO.value, make_env, seed=SEED.value, actions=episodes[0].actions)
    if drawing:
        drawing.draw_plans(
            DRAW.value,
            episodes[0],
            checkpoint=checkpoint,
            make_env=make_env,
            make_policy=make_policy,
            replan_every=plan_config.replan_every,
            score_name="log-likelihood" if by_likelihood else "predicted return",
        )
    _print_table(results)


def _open_drawing(folder, horizon):
    """Return the module that draws; what prevents pictures is reported before the work."""
    try:
        from experiments.common import drawing
    except ImportError as error:
        raise ValueError(f"--draw={folder} needs the plots extra: {error}.") from error
    drawing.check(folder, horizon=horizon)
    return drawing


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


def _print_table(results):
    print(f"{results['environment']}, step {results['checkpoint_step']}, {len(results['episodes'])} episodes")
    for name in ("return", "normalized_score", "length", "success"):
        mean, error = results[name]["mean"], results[name]["standard_error"]
        if mean is not None:
            print(f"  {name:<17}{mean:10.2f}" + (f" +- {error:.2f}" if error is not None else ""))
    print(f"  {'plans/s':<17}{results['plans_per_second']:10.2f}\n  results in {OUT.value}")


def _reference_scores(dataset_id) -> tuple[float, float] | None:
    """Return the returns that count as 0 and 100: those of the flags, or of the dataset if it is on this machine."""
    if REFERENCE_MIN.value is not None:
        return REFERENCE_MIN.value, REFERENCE_MAX.value
    return None if ENV.value else minari_files.reference_scores(dataset_id)


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
