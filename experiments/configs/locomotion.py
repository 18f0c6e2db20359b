"""Trajectory Transformer and IQL on the locomotion datasets, with the settings of their papers.

arXiv 2106.02039 and 2110.06169.

python -m experiments.train_tt --config=experiments/configs/locomotion.py:hopper-medium --workdir=DIR
python -m experiments.plan --workdir=DIR --num_episodes=15
python -m experiments.train_iql --config=experiments/configs/locomotion.py:hopper-medium --workdir=DIR

Selection: BODY-DATA with BODY halfcheetah, hopper, walker2d or ant and DATA medium, medium-replay or medium-expert.
"-fast" at the end is for minutes on a GPU (`experiments.reproduce`, docs/accelerators.md); "-cpu" for half an hour on a
CPU core, with plans near the model's median (docs/planning.md): on hopper-medium medians of these 9,500 updates return
2313 ± 40, and docs/results.md has hopper-medium-replay and halfcheetah-medium, too. With neither about 200,000 updates
for one GPU, which took the paper 6 to 12 hours on a V100; not run to its end here.
Minari hosts the medium datasets (for v5 of the environments); the others come from D4RL's files by way of
`python -m experiments.import_d4rl`.
"""

from experiments.configs import base

BODIES = {"halfcheetah": 25, "hopper": 16, "walker2d": 25, "ant": 37}  # tokens per transition
RETURN_TARGETS = {"halfcheetah": (12_000.0, 6_000.0), "hopper": (3_600.0, 1_800.0), "walker2d": (5_000.0, 2_500.0)}
DATA = ("medium", "medium-replay", "medium-expert")


def get_config(name="hopper-medium"):
    """Return the settings of one dataset, such as "hopper-medium", "hopper-medium-cpu" or "hopper-medium-fast"."""
    dataset, size = base.split_size(name)
    body, _, data = dataset.partition("-")
    if body not in BODIES or data not in DATA:
        names = [f"{each}-{data}" for each in BODIES for data in DATA]
        raise ValueError(
            f"no settings called {name!r}; choose one of {names}, with -cpu for small ones, -fast for a GPU"
        )

    config = base.get_config()
    config.dataset = f"mujoco/{body}/medium-v0" if data == "medium" else f"d4rl/{body}/{data}-v2"
    config.data.termination_penalty = -100.0  # of a fall
    if body == "ant":
        config.data.observation_slice = 27  # leaves the contact forces out
        config.train.batch_size = 128
    windows = 80_000_000 if data == "medium-replay" and body in ("hopper", "walker2d") else 50_000_000
    config.train.num_steps = windows // config.train.batch_size  # 1e6 / size x 50 (80) epochs of a dataset
    config.train.eval_every = config.train.checkpoint_every = 5_000
    config.plan.update(_plan_changes(body, data))
    config.baselines.dt.targets = RETURN_TARGETS.get(body, ())
    if size == "fast":
        base.fast(config, transition_dim=BODIES[body])
    elif size == "cpu":
        _scale_down(config, transition_dim=BODIES[body])
        if data == "medium-replay":  # of many agents: Q does best among all actions, see docs/results.md
            config.guided_plan.update({"horizon": 1, "beam_width": 32, "num_elites": 16, "action_central": 1.0})
    return config


def _plan_changes(body, data):
    """Return what the paper's planning changes for one dataset."""
    if body == "ant":
        return {"horizon": 5}
    return {
        ("halfcheetah", "medium"): {"horizon": 5, "beam_width": 32},
        ("halfcheetah", "medium-replay"): {"horizon": 5, "beam_width": 32},
        ("halfcheetah", "medium-expert"): {"beam_width": 32},
        ("walker2d", "medium-replay"): {"horizon": 20, "beam_width": 32, "action_top_k": 40, "action_cdf": 0.0},
        ("walker2d", "medium-expert"): {"horizon": 5},
    }.get((body, data), {})


def _scale_down(config, *, transition_dim):
    config.model.num_layers = 3
    config.model.embed_dim = 96
    config.model.max_transitions = 4
    base.no_dropout(config)  # too few updates to overfit

    config.train.batch_size = 64
    config.train.num_steps = 9_500
    config.train.learning_rate = 2e-3
    config.train.warmup_tokens = 1_000_000
    base.end_schedule_with_run(config, transition_dim=transition_dim)

    config.iql_train.num_steps = 100_000
    config.iql_train.eval_every = config.iql_train.checkpoint_every = 20_000
    base.small_baselines(config)

    config.plan.horizon = 3
    config.plan.beam_width = 8
    config.plan.context_transitions = 3
    config.plan.window = (4, 3)
    config.plan.action_cdf = 0.0
    config.plan.action_top_k = 0
    config.plan.action_central = 0.25  # near the median; further off the search finds what the model wrongly believes
