"""The quickstart's experiment: the maze settings, made small enough for minutes on 2 CPU cores.

launch/quickstart.sh

Every action is held for 5 environment steps, so one transition is 50 ms. The data is 1,600 episodes of a noisy scripted
controller. 4.5 minutes with installation on 2 CPU cores; returns of 202 ± 9 to 223 ± 7 where the data has 179, see
docs/results.md.
"""

from experiments.configs import maze


def get_config():
    """Return the settings of configs/maze.py with what the quickstart changes."""
    config = maze.in_minutes()
    config.dataset = "tt/pointmaze/quickstart-v0"  # collected by the quickstart itself
    config.data.discount = 0.92  # per transition; a longer view is mostly noise of the time that is left

    config.model.max_transitions = 3  # a training step on short windows sees more of the maze
    config.model.action_weight = 2.0
    config.model.reward_weight = 2.0
    config.model.value_weight = 2.0

    config.train.num_steps = 4_000
    config.train.final_tokens = 11_100_000  # all updates

    config.plan.horizon = 10
    config.plan.beam_width = 16
    config.plan.replan_every = 3
    config.plan.context_transitions = 1
    config.plan.window = (3, 1)
    config.plan.action_cdf = 0.2
    return config
