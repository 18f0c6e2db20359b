"""Any Minari dataset whose spaces are numbers; what train_tt and train_iql take without --config.

python -m experiments.train_tt --dataset=ID --workdir=DIR
python -m experiments.train_iql --dataset=ID --workdir=DIR2  # optional: its Q guides the plans with --iql_workdir=DIR2
python -m experiments.plan --workdir=DIR

Of Dict observations all entries of numbers are taken, goals included. `--config=experiments/configs/dataset.py:small`
reads 100 episodes and takes minutes and less than 1 GB of memory on a laptop; for hundreds of dimensions add
`--config.train.microbatch_size=1`. A start for one's own data, without a score to compare.
"""

from experiments.configs import base

SIZES = ("medium", "small")


def get_config(size="medium"):
    """Return settings that assume nothing of the data; `size` is one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"dataset.py:{size} must end in one of {', '.join(SIZES)}.")
    config = base.get_config()
    config.data.eval_fraction = 0.05
    config.data.distinct_values = True  # a sparse reward keeps its values
    config.data.stop_after_truncation = False  # an episode that is cut short must not teach that it ends there

    config.train.num_steps = 20_000
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.train.clamp_cosine = True

    config.plan.beam_width = 32
    config.plan.window = (10, 5)

    config.iql.normalize_observations = True
    config.iql_train.num_steps = 100_000
    config.iql_train.eval_every = config.iql_train.checkpoint_every = 10_000
    if size == "small":
        config.data.max_episodes = 100
        config.data.spread_episodes = True

        config.model.num_layers = 2
        config.model.embed_dim = 64
        config.model.max_transitions = 5

        config.train.num_steps = 1_000
        config.train.batch_size = 32
        config.train.eval_every = config.train.checkpoint_every = 200

        config.plan.horizon = 5
        config.plan.beam_width = 16
        config.plan.window = (5, 3)

        config.baselines.bc.train.num_steps = config.baselines.bc10.train.num_steps = 5_000
        config.baselines.dt.train.num_steps = 1_000
        config.baselines.dt.warmup_steps = 100
        config.baselines.cql.train.num_steps = 2_000
        config.iql_train.num_steps = 10_000
        config.iql_train.log_every = 1_000
        config.iql_train.eval_every = config.iql_train.checkpoint_every = 5_000
    return config
