"""The quickstart's experiment: the maze settings, made small enough for minutes on 2 CPU cores.

launch/quickstart.sh

Every action is held for 5 environment steps, so one transition is 50 ms. The data is 1,600 episodes of a noisy scripted
controller; results are those of `python -m experiments.quickstart`, which collects, trains and plans.
"""

from experiments.configs import maze


def get_config():
    """Return the settings of configs/maze.py with what the quickstart changes."""
    config = maze.get_config()
    config.dataset = "tt/pointmaze/quickstart-v0"  # collected by the quickstart itself

    config.data.discount = 0.92  # per transition; a longer view is mostly noise of the time that is left
    config.data.eval_fraction = 0.05  # share of the episodes that is held out
    config.data.num_bins = 32  # coarse: distances in the maze are learned sooner

    config.model.max_transitions = 3  # a training step on short windows sees more of the maze
    config.model.embedding_dropout = 0.0  # few passes over the data
    config.model.attention_dropout = 0.0
    config.model.residual_dropout = 0.0
    config.model.action_weight = 2.0  # of the loss of action tokens; observation tokens have 1
    config.model.reward_weight = 2.0
    config.model.value_weight = 2.0

    config.train.num_steps = 4_000
    config.train.batch_size = 96  # windows, over all devices
    config.train.learning_rate = 4e-3
    config.train.warmup_tokens = 150_000  # 54 updates
    config.train.final_tokens = 11_100_000  # all updates
    config.train.log_every = 50  # updates
    config.train.eval_every = 400
    config.train.checkpoint_every = 500

    config.plan.horizon = 10  # planned transitions
    config.plan.beam_width = 16  # plans that are kept
    config.plan.replan_every = 3  # executed actions per plan
    config.plan.context_transitions = 1  # past transitions that the model sees
    config.plan.window = (3, 1)  # transitions at most, and left when the window slides
    config.plan.action_cdf = 0.2  # drop the least likely actions up to this mass
    return config
