"""A small Trajectory Transformer for point mazes.

python -m experiments.collect --env=PointMaze_UMaze-v3 --dataset=tt/pointmaze/umaze-v0 --steps=20000
python -m experiments.train_tt --config=experiments/configs/maze.py --dataset=tt/pointmaze/umaze-v0 --workdir=DIR
python -m experiments.plan --workdir=DIR --num_episodes=20 --num_envs=10

For AntMaze data, whose observations hold the goal reached instead of the body's position, add
`--config.data.observation_keys="('achieved_goal', 'observation')"`.

Half an hour of training on one core of a shared 2-core machine. A start for one's own data, without a score to compare.
"""

from experiments.configs import base


def get_config():
    """Return the settings of a small model; the dataset is given by a flag."""
    config = any_maze()
    config.data.observation_keys = ("observation", "desired_goal")  # position and velocity, then the goal
    config.data.eval_fraction = 0.1

    config.model.num_layers = 2
    config.model.embed_dim = 64

    config.train.num_steps = 5_000
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.train.eval_every = config.train.checkpoint_every = 500

    config.plan.beam_width = 32
    config.plan.window = (10, 5)
    return config


def in_minutes():
    """Return these settings, changed for minutes on 2 CPU cores; every action is held for 5 environment steps."""
    config = get_config()
    config.data.eval_fraction = 0.05
    config.data.num_bins = 32  # coarse: distances in the maze are learned sooner

    base.no_dropout(config)  # few passes over the data

    config.train.batch_size = 96
    config.train.learning_rate = 4e-3
    config.train.warmup_tokens = 150_000
    config.train.log_every = 50
    config.train.eval_every = 400
    return config


def any_maze():
    """Return the defaults with what the goal of a maze changes, whatever the size of model and data."""
    config = base.get_config()
    config.data.stop_after_truncation = False  # an episode that is cut short must not teach that it ends there
    config.data.distinct_values = True  # a sparse reward keeps its two values
    config.train.clamp_cosine = True
    config.plan.stop_within_transition = False  # a false end would look like a reached goal

    config.iql.expectile = 0.9
    config.iql.temperature = 10.0
    config.iql.normalize_observations = True  # velocities are larger than positions; the reference leaves them
    config.iql.reward_units = "minus_one"  # a step costs 1 until the goal is reached
    config.baselines.dt.return_scale = 1.0
    config.baselines.cql.reward_units = "minus_one"
    config.baselines.cql.lagrange_gap = 5.0
    config.baselines.cql.max_backup = True
    return config
