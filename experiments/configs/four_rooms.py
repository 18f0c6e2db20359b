"""A goal-conditioned Trajectory Transformer for a point maze of four rooms, minutes on 2 CPU cores.

python -m experiments.four_rooms --workdir=DIR

Every action is held for 5 environment steps, so one transition is 50 ms. The goal is not in the observation: the model
reads the observation in which an episode ends before its first transition, and plans to a goal by likelihood.
"""

from experiments.configs import maze


def get_config():
    """Return the settings of configs/maze.py with what four rooms change."""
    config = maze.get_config()
    config.dataset = "tt/pointmaze/four-rooms-v0"  # collected by the experiment itself

    config.data.observation_keys = ("observation",)  # position and velocity
    config.data.eval_fraction = 0.05  # share of the episodes that is held out
    config.data.discount = 0.0  # rewards say nothing that the goal does not; a value is the next reward
    config.data.num_bins = 32
    config.data.method = "uniform"  # a place is as fine where few episodes pass

    config.model.goal_conditioned = True
    config.model.max_transitions = 2  # a training step on short windows sees more of the maze
    config.model.embedding_dropout = 0.0  # few passes over the data
    config.model.attention_dropout = 0.0
    config.model.residual_dropout = 0.0

    config.train.num_steps = 3_000
    config.train.batch_size = 96  # windows, over all devices
    config.train.learning_rate = 4e-3
    config.train.warmup_tokens = 150_000
    config.train.final_tokens = 4_300_000  # all updates
    config.train.log_every = 50  # updates
    config.train.eval_every = 400

    config.plan.horizon = 2  # planned transitions
    config.plan.beam_width = 8  # sequences that are kept
    config.plan.replan_every = 1  # executed actions per plan
    config.plan.context_transitions = 0  # past transitions that the model sees
    config.plan.window = (2, 1)  # transitions at most, and left when the window slides
    config.plan.action_cdf = 0.0  # all tokens are candidates
    config.plan.observation_top_k = 0
    config.plan.reward_top_k = 0
    return config
