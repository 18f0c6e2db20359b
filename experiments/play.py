"""Play the policy of a baseline or of IQL in an environment, and write the results as JSON.

python -m experiments.play --workdir=DIR --num_episodes=20 --out=results.json [--learner=0 --num_envs=10 --seed=0]

The workdir is one of train_baseline or train_iql and brings the environment. A Decision Transformer plays the same
reset seeds with each of its targets in turn: --out holds the first as `plan` writes it, and all of them in "targets".
"""

import functools
import time

import jax
from absl import flags

from experiments.common import baselines, control, datasets, entry, files, run_flags, signals
from tt_jax import minari_files, rollouts

WORKDIR, STEP = run_flags.workdir(help="Folder of the training run.", required=True), run_flags.step()
NUM_EPISODES = run_flags.num_episodes(default=20, help="Episodes to play.", lower_bound=1)
NUM_ENVS = run_flags.num_envs(default=10)
SEED = run_flags.seed(help="Seed of the first episode; each further one adds 1.", upper_bound=2**31)
LEARNER = flags.DEFINE_integer("learner", 0, "Which of the seeds that were trained side by side.", lower_bound=0)
OUT = flags.DEFINE_string("out", "results.json", "File for the results.")
ENV, TRUST = run_flags.env(), run_flags.trust_environment()
SETTINGS = (WORKDIR, STEP, NUM_EPISODES, NUM_ENVS, SEED, LEARNER, ENV, TRUST)


def main(_):
    preemption, out = signals.Preemption(), files.result_file(OUT.value)
    seeds = control.own_seeds(SEED.value, NUM_EPISODES.value)
    with control.another_step_named(WORKDIR.value):
        checkpoint = baselines.restore(WORKDIR.value, step=STEP.value)
    run, num_envs = checkpoint.run, min(NUM_ENVS.value, len(seeds))
    policies = baselines.make_policies(checkpoint, learner=LEARNER.value, max_batch=num_envs)
    data_config = datasets.data_config(run["data"])
    place = {"env_id": ENV.value, "trust": TRUST.value, "goal": run["eval"]["goal"]}
    make_env = functools.partial(control.make_env, run, **place)
    envs = control.vectorize(lambda: rollouts.Guarded(make_env()), num_envs, spec=checkpoint.config, config=data_config)
    reference = None if ENV.value else minari_files.reference_scores(run["dataset"])

    found, failed = {}, []
    for target, policy in policies.items():
        started = time.time()
        title = f"play, target {target}" if target else "play"
        with preemption.doing(title):
            check_fn = functools.partial(preemption.check, title)
            played = control.play(envs, policy, seeds=seeds, config=data_config, title=title, check_fn=check_fn)
        episodes, num_plans = control.gather_played(*played)
        episodes, failures = control.without_failures(episodes)
        failed += failures
        seconds = time.time() - started
        speed = {"num_plans": num_plans, "plans_per_second": num_plans / seconds, "wall_time_s": seconds}
        found[target] = control.summarize(episodes, reference) | {"failures": failures} | speed
    if not entry.is_main_process():
        return
    common = {"checkpoint_step": checkpoint.step, "environment": envs.envs[0].spec.id, "dataset": run["dataset"]}
    results = common | next(iter(found.values())) | ({"targets": found} if "" not in found else {})
    results |= {
        "device": jax.devices()[0].device_kind,
        "commit": entry.commit_id(),
        "settings": {flag.name: flag.value for flag in SETTINGS},
    }
    files.write_json(out, results)
    for target, summary in found.items():
        print(f"target {target}:" if target else "", end=" " if target else "")
        control.print_summary(common | summary, out)
    control.check_failures(failed, num_episodes=NUM_EPISODES.value * len(policies), out=OUT.value)


if __name__ == "__main__":
    entry.run(main)
