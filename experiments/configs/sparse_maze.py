"""A point maze with sparse reward, whose episodes are too short to reach the goal from the start: stitching is needed.

python -m experiments.sparse_maze

collects the data: 2,500 episodes between random cells, each cut short after a third of the way from the start to the
goal. Actions are held for 5 environment steps, so one transition is 50 ms. 18 CPU-minutes on 2 cores for 3 trainings of
each method; success of the transformer with Q 100 ± 0%, without 42 ± 16%, see the README.
"""

from experiments.configs import quickstart


def get_config():
    """Return the settings of configs/quickstart.py with what the sparse reward changes."""
    config = quickstart.get_config()
    config.dataset = "tt/pointmaze/sparse-v0"  # collected by the command itself
    config.data.observation_keys = ("observation",)  # position and velocity; the goal is always the same
    config.data.discount = 0.99  # per transition of 50 ms
    config.data.num_bins = 64

    config.train.num_steps = 3_000
    config.train.final_tokens = 6_600_000  # all updates

    config.plan.horizon = 3  # Q sees the rest of the way
    config.plan.replan_every = 1  # plans that go on for longer push against walls, see docs/guidance.md
    config.plan.action_cdf = 0.0  # Q chooses better when unlikely actions are among the candidates
    config.plan.observation_top_k = 0  # sampled
    config.plan.observation_cdf = 0.3

    config.iql.hidden_dims = (128, 128)
    config.iql.discount = 0.97  # per transition of 50 ms
    config.iql_train.num_steps = 30_000
    config.iql_train.log_every = 2_000
    config.iql_train.eval_every = config.iql_train.checkpoint_every = 5_000
    config.baselines.bc.hidden_dims = (128, 128)
    config.baselines.bc.train.num_steps = 10_000
    config.eval.num_episodes = 20
    return config
