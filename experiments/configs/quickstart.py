"""The quickstart's experiment: the maze settings, made small enough for minutes on 2 CPU cores.

launch/quickstart.sh
"""

from experiments.configs import maze


def get_config():
    """Return the settings of configs/maze.py with what the quickstart changes."""
    config = maze.get_config()
    config.dataset = "tt/pointmaze/quickstart-v0"  # collected by the quickstart itself

    config.train.num_steps = 2_000
    config.train.log_every = 50  # updates
    config.train.eval_every = 250
    config.train.checkpoint_every = 250

    config.plan.horizon = 15  # planned transitions
    config.plan.beam_width = 16  # plans that are kept
    config.plan.replan_every = 4  # executed steps per plan
    return config
