"""Compare planners over one trained Trajectory Transformer: what they return at what cost, and whether search helps.

python -m experiments.planners --workdir=DIR --num_episodes=20 --out=planners.json [--iql_workdir=DIR]
python -m experiments.planners --workdir=DIR --study=grid --out=planners.json
python -m experiments.planners --workdir=DIR --study=search --out=planners.json

    budgets  return against milliseconds per action, for each planner over --candidates and --horizons
    grid     return of one planner by --horizons, and by --candidates
    search   the return that plans of so many steps and candidates promise, and the one that the environment gives

All play the same reset seeds and plan anew at every step, unless --plan.replan_every says otherwise. --out holds what
is done of all studies, so that the same command goes on; the figure lies beside it.
"""

import dataclasses
import functools
import itertools
import json

import jax
from absl import flags, logging

from experiments.common import (
    control,
    datasets,
    entry,
    files,
    planner_figures,
    planner_study,
    planners,
    run_flags,
    signals,
)
from tt_jax import action_planner, minari_files, sequence_planner

WORKDIR, IQL_WORKDIR = run_flags.workdir(help="Folder of the training run.", required=True), run_flags.iql_workdir()
NUM_EPISODES = run_flags.num_episodes(default=20)
NUM_ENVS = run_flags.num_envs(default=20)
SEED = run_flags.seed(help="Seed of the planners and of the first episode; each further one adds 1.", upper_bound=2**31)
OUT = flags.DEFINE_string("out", "planners.json", "File for the results; figures get its name.")
STUDY = flags.DEFINE_enum("study", "budgets", ["budgets", "grid", "search"], "What to measure, see above.")
PLANNERS = flags.DEFINE_list("planners", None, "Planners to compare; by default all in budgets, else reward.")
HORIZONS = flags.DEFINE_list("horizons", None, "Planned steps; by default the run's, 1,2,3,5,10 or 1,2,3,5,10,15.")
CANDIDATES = flags.DEFINE_list("candidates", None, "Beam widths; by default 4,16,64, 1,8,64,256 or 1,2,4,...,256.")
ENV, TRUST = run_flags.env(), run_flags.trust_environment()
MAX_EPISODE_STEPS, GOAL = run_flags.max_episode_steps(), run_flags.goal()
PLAN = run_flags.fields("plan", sequence_planner.PlanConfig)
SEARCH = run_flags.fields("search", action_planner.SearchConfig)
SETTINGS = (WORKDIR, IQL_WORKDIR, NUM_EPISODES, NUM_ENVS, SEED, ENV, TRUST, MAX_EPISODE_STEPS, GOAL)


def main(_):
    preemption = signals.Preemption()
    overrides = {"replan_every": 1} | run_flags.given(PLAN)
    checkpoint, learners, plan_config = control.restore_planner(WORKDIR.value, IQL_WORKDIR.value, overrides)
    run, environment = checkpoint.run, {"env_id": ENV.value, "trust": TRUST.value, "goal": GOAL.value or ()}
    study = planner_study.Study(
        checkpoint=checkpoint,
        learners=learners,
        plan_config=plan_config,
        search_config=action_planner.SearchConfig(**run_flags.given(SEARCH)),
        data_config=datasets.data_config(run["data"]),
        make_env=functools.partial(control.make_env, run, max_episode_steps=MAX_EPISODE_STEPS.value, **environment),
        seeds=range(SEED.value, SEED.value + NUM_EPISODES.value),
        num_envs=NUM_ENVS.value,
        reference=None if ENV.value else minari_files.reference_scores(run["dataset"]),
        check_fn=functools.partial(preemption.check, f"planners --study={STUDY.value}"),
    )
    envs = control.vectorize(study.make_env, 1, spec=checkpoint.config.spec, config=study.data_config)
    cells = planner_study.cells(plan_config, _pairs(study, envs))
    out, settings = files.result_file(OUT.value), _settings(study)
    results = files.read_json(out) if out.exists() else {"settings": settings, "studies": {}}
    if not isinstance(results, dict) or not {"settings", "studies"} <= results.keys():
        raise entry.UsageError(f"--out={out} holds something else than results of planners; use another file.")
    if results["settings"] != settings:
        raise entry.UsageError(f"--out={out} holds results with other settings; use another file.")
    results |= {"device": jax.devices()[0].device_kind, "commit": entry.commit_id()}
    rows = results["studies"].setdefault(STUDY.value, [])
    recorded = None
    for cell, cell_config in cells:
        if any(cell == planner_study.cell_of(row) for row in rows):
            continue
        if STUDY.value == "search":
            recorded = recorded or planner_study.record(study)
            row = planner_study.promise_and_keep(study, cell, cell_config, recorded)
        else:
            row = planner_study.play(study, cell, cell_config)
        rows.append(dataclasses.asdict(cell) | row)
        files.write_json(out, results)
    figure = out.with_name(f"{out.stem}_{STUDY.value}.png")
    planner_figures.draw(STUDY.value, rows, plan_config, figure)
    print(*planner_figures.table(rows), f"figure: {figure}", f"numbers: {out}", sep="\n")


def _pairs(study, envs):
    """Return (planner, (horizon, candidates)) for each cell of the study."""
    plan, is_budgets = study.plan_config, STUDY.value == "budgets"
    names = []
    for name in PLANNERS.value or (planners.PLANNERS if is_budgets else ["reward"]):
        if name not in planners.PLANNERS:
            raise ValueError(f"--planners={name} must be of {', '.join(planners.PLANNERS)}.")
        guided = study.learners is not None and planners.PLANNERS[name].takes_q
        settings = {"config": study.checkpoint.config, "plan_config": plan, "envs": envs}
        try:
            planners.check(name, guided=guided, **settings)
        except ValueError as error:
            if PLANNERS.value:
                raise
            logging.info("%s is left out: %s", name, error)
        else:
            names.append(name)
    if is_budgets:
        budgets = itertools.product(_numbers(HORIZONS, [plan.horizon]), _numbers(CANDIDATES, [4, 16, 64]))
    elif STUDY.value == "grid":
        budgets = [(horizon, plan.beam_width) for horizon in _numbers(HORIZONS, [1, 2, 3, 5, 10])]
        budgets += [(plan.horizon, candidates) for candidates in _numbers(CANDIDATES, [1, 8, 64, 256])]
    else:
        powers = [2**i for i in range(9)]
        budgets = itertools.product(_numbers(HORIZONS, [1, 2, 3, 5, 10, 15]), _numbers(CANDIDATES, powers))
    return itertools.product(names, budgets)


def _numbers(flag, default):
    try:
        numbers = [int(text) for text in flag.value or default]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"--{flag.name}={','.join(flag.value)} must be whole numbers of at least 1.")
    return numbers


def _settings(study) -> dict:
    """Return what all rows of a file share, as JSON has it."""
    settings = {flag.name: flag.value for flag in SETTINGS} | {"checkpoint_step": study.checkpoint.step}
    settings |= {"plan": dataclasses.asdict(study.plan_config), "search": dataclasses.asdict(study.search_config)}
    return json.loads(json.dumps(settings))


if __name__ == "__main__":
    entry.run(main)
