"""Control an environment by planning with a trained Trajectory Transformer, and write the results as JSON.

python -m experiments.plan --workdir=DIR --num_episodes=20 --num_envs=10 --seed=0 --out=results.json
python -m experiments.plan --workdir=DIR --planner=likelihood  # imitation, or with a goal-conditioned run to the goal
python -m experiments.plan --workdir=DIR --planner=mppi --iql_workdir=DIR --plan.beam_width=64  # or another, see --help

The newest checkpoint in the workdir brings its environment, its observation layout and its planning settings; --env and
--plan.* replace them, e.g. --plan.horizon=15 --plan.beam_width=32. Every planner reads --plan.*, as far as they have a
part in it; --search.* is for mppi and cem.
"""

import dataclasses
import functools
import time
import warnings

import jax
import numpy as np
from absl import flags

from experiments.common import control, datasets, entry, environment_check, files, planners, run_flags, signals
from tt_jax import action_planner, minari_files, rollouts, sequence_planner

WORKDIR, STEP = run_flags.workdir(help="Folder of the training run.", required=True), run_flags.step()
IQL_WORKDIR = run_flags.iql_workdir()
NUM_EPISODES = run_flags.num_episodes(default=20, help="Episodes to play.", lower_bound=1)
NUM_ENVS = run_flags.num_envs(default=10, help="Environments that are planned together; each episode has its own seed.")
SEED = run_flags.seed(help="Seed of the planner and of the first episode; each further one adds 1.", upper_bound=2**31)
OUT = flags.DEFINE_string("out", "results.json", "File for the results.")
VIDEO = flags.DEFINE_string("video", None, "File for a video of the first episode: .gif or, with imageio-ffmpeg, .mp4.")
DRAW = flags.DEFINE_string("draw", None, "Folder for pictures of all beams of some plans of the first episode.")
PLANNER = flags.DEFINE_enum(
    "planner", "reward", list(planners.PLANNERS), "How actions are found, see docs/planning.md."
)
ENV, TRUST = run_flags.env(), run_flags.trust_environment()
MAX_EPISODE_STEPS, GOAL = run_flags.max_episode_steps(), run_flags.goal()
REFERENCE_MIN = flags.DEFINE_float("reference_min", None, "Return with the normalised score 0; with --reference_max.")
REFERENCE_MAX = flags.DEFINE_float("reference_max", None, "Return with the normalised score 100.")
PLAN = run_flags.fields("plan", sequence_planner.PlanConfig)
SEARCH = run_flags.fields("search", action_planner.SearchConfig)  # of mppi and cem
SETTINGS = (WORKDIR, STEP, IQL_WORKDIR, PLANNER, NUM_EPISODES, NUM_ENVS, SEED, ENV, TRUST, MAX_EPISODE_STEPS, GOAL)
SETTINGS += (REFERENCE_MIN, REFERENCE_MAX)


def main(_):
    run_flags.check_range(REFERENCE_MIN, REFERENCE_MAX)
    preemption, out = signals.Preemption(), files.result_file(OUT.value)
    seeds = control.own_seeds(SEED.value, NUM_EPISODES.value)
    with control.another_step_named(WORKDIR.value):
        given = run_flags.given(PLAN)
        checkpoint, learners, plan_config = control.restore_planner(
            WORKDIR.value, IQL_WORKDIR.value, given, step=STEP.value
        )
    run, model, planner = checkpoint.run, checkpoint.config, PLANNER.value
    plan_config = planners.PLANNERS[planner].adapt(plan_config)
    search_given = run_flags.given(SEARCH)
    if search_given and not planners.PLANNERS[planner].refines:
        able = " or ".join(each for each in planners.PLANNERS if planners.PLANNERS[each].refines)
        raise ValueError(f"--search.{next(iter(search_given))} is for --planner={able}, not for {planner}.")
    search_config = action_planner.SearchConfig(**search_given)
    data_config = datasets.data_config(run["data"])
    settings = {"env_id": ENV.value, "trust": TRUST.value, "goal": GOAL.value or ()}
    make_env = functools.partial(control.make_env, run, max_episode_steps=MAX_EPISODE_STEPS.value, **settings)
    num_envs = min(NUM_ENVS.value, len(seeds))
    envs = control.vectorize(lambda: rollouts.Guarded(make_env()), num_envs, spec=model.spec, config=data_config)
    planners.check(planner, config=model, plan_config=plan_config, envs=envs, guided=learners is not None)
    bounds = checkpoint.tokenizer.thresholds[: model.spec.observation_dim]
    checked = environment_check.check(
        envs.envs[0], run["dataset"], low=bounds[:, 0], high=bounds[:, -1], seeds=seeds, config=data_config
    )
    drawing = DRAW.value and _open_drawing(DRAW.value, planner, plan_config.horizon)
    if VIDEO.value and entry.is_main_process():  # a machine that cannot render says so now, not after the episodes
        _write_video(VIDEO.value, make_env, seed=SEED.value, actions=[])

    choice = {"seed": SEED.value, "learners": learners, "planner": planner, "search_config": search_config}
    make_policy = functools.partial(control.plan_policy, checkpoint, plan_config, **choice)
    policy = make_policy(max_batch=envs.num_envs)
    started = time.time()
    control.compile_policy(policy, model.spec.observation_dim, envs.num_envs)
    compiled = time.time()
    with preemption.doing("plan"):
        check_fn = functools.partial(preemption.check, "plan")
        played = control.play(envs, policy, seeds=seeds, config=data_config, title="plan", check_fn=check_fn)
    episodes, num_plans = control.gather_played(*played)
    seconds = time.time() - compiled
    if not entry.is_main_process():
        return
    episodes, failures = control.without_failures(episodes)

    results = {
        "checkpoint_step": checkpoint.step,
        "environment": envs.envs[0].spec.id,
        "environment_check": checked,
        "dataset": run["dataset"],
        **control.summarize(episodes, _reference_scores(run["dataset"])),
        "failures": failures,
        "num_plans": num_plans,
        "plans_per_second": num_plans / seconds,
        "wall_time_s": seconds,
        "compile_time_s": compiled - started,
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": {
            **{flag.name: flag.value for flag in SETTINGS},
            "plan": dataclasses.asdict(plan_config),
            "search": dataclasses.asdict(search_config),
        },
    }
    files.write_json(out, results)
    if VIDEO.value:
        _write_video(VIDEO.value, make_env, seed=episodes[0].seed, actions=episodes[0].actions)
    if drawing:
        drawing.draw_plans(
            DRAW.value,
            episodes[0],
            checkpoint=checkpoint,
            make_env=make_env,
            make_policy=make_policy,
            replan_every=plan_config.replan_every,
            score_name="log-likelihood" if planner == "likelihood" else "predicted return",
        )
    control.print_summary(results, out)
    control.check_failures(failures, num_episodes=NUM_EPISODES.value, out=OUT.value)


def _open_drawing(folder, planner, horizon):
    """Return the module that draws; what prevents pictures is reported before the work."""
    if not planners.PLANNERS[planner].keeps_beams:
        able = ", ".join(each for each in planners.PLANNERS if planners.PLANNERS[each].keeps_beams)
        raise ValueError(f"--draw={folder} shows the beams of a search; plan with --planner={able}.")
    try:
        from experiments.common import drawing
    except ImportError as error:
        raise ValueError(f"--draw={folder} needs the plots extra: {error}.") from error
    drawing.check(folder, horizon=horizon)
    return drawing


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is told below
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
