"""Settings of Implicit Q-Learning that every family of experiments starts from: the paper's for locomotion.

Not an experiment by itself; `maze.py` and `locomotion.py` add them to theirs.
"""

from ml_collections import config_dict


def add_to(config: config_dict.ConfigDict) -> None:
    """Add the parts iql, iql_train and eval to `config`."""
    config.iql = config_dict.ConfigDict()
    config.iql.hidden_dims = (256, 256)
    config.iql.expectile = 0.7
    config.iql.temperature = 3.0  # of the policy's weights exp(temperature * advantage); 0: behaviour cloning
    config.iql.discount = 0.99
    config.iql.tau = 0.005  # how far the target critic moves per update
    config.iql.learning_rate = 3e-4
    config.iql.actor_cosine = True  # the policy's rate falls to 0 over the run
    config.iql.actor_dropout = 0.0
    config.iql.normalize_observations = False
    config.iql.reward_units = "return_range"  # times 1000 / (best return - worst return)

    config.iql_train = config_dict.ConfigDict()
    config.iql_train.num_steps = 1_000_000
    config.iql_train.batch_size = 256  # transitions, over all devices
    config.iql_train.num_seeds = 1  # learners side by side
    config.iql_train.steps_per_call = 1_000  # updates in one compiled call
    config.iql_train.log_every = 5_000  # updates
    config.iql_train.eval_every = 50_000
    config.iql_train.checkpoint_every = 50_000
    config.iql_train.keep_checkpoints = 3

    config.eval = config_dict.ConfigDict()  # of IQL's policy while it trains
    config.eval.num_episodes = 10  # of each learner; 0: none
    config.eval.goal = ()  # x, y where the goal of a maze stands in every episode; (): where the environment puts it
