"""A small Trajectory Transformer for point mazes.

python -m experiments.collect --env=PointMaze_UMaze-v3 --dataset=tt/pointmaze/umaze-v0 --steps=20000
python -m experiments.train_tt --config=experiments/configs/maze.py --dataset=tt/pointmaze/umaze-v0 --workdir=DIR
python -m experiments.plan --workdir=DIR --num_episodes=20 --num_envs=10

For AntMaze data, whose observations hold the goal reached instead of the body's position, add
`--config.data.observation_keys="('achieved_goal', 'observation')"`.
"""

from ml_collections import config_dict

from experiments.configs import iql


def get_config():
    """Return the settings; the dataset is given by a flag."""
    config = config_dict.ConfigDict()
    config.seed = 0  # of initialisation, data order and dropout
    config.dataset = ""  # Minari id; --dataset sets it

    config.data = config_dict.ConfigDict()
    config.data.observation_keys = ("observation", "desired_goal")  # position and velocity, then the goal
    config.data.observation_slice = 0  # keep all dimensions
    config.data.step = 1  # environment steps between the transitions of a window
    config.data.discount = 0.99  # of the return-to-go, in training and in planning
    config.data.termination_penalty = config_dict.placeholder(float)  # none: an end in the goal is no failure
    config.data.max_path_length = 0  # the environment's time limit
    config.data.stop_after_truncation = False  # an episode that is cut short must not teach that it ends there
    config.data.eval_fraction = 0.1  # share of the episodes that is held out
    config.data.num_bins = 100  # per dimension
    config.data.method = "quantile"  # bins of equal counts
    config.data.distinct_values = True  # a sparse reward keeps its two values

    config.model = config_dict.ConfigDict()
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.embed_dim = 64  # 16 per head
    config.model.max_transitions = 10  # of a training window
    config.model.embedding_dropout = 0.1
    config.model.attention_dropout = 0.1
    config.model.residual_dropout = 0.1
    config.model.action_weight = 5.0  # of the loss of action tokens; observation tokens have 1
    config.model.reward_weight = 1.0
    config.model.value_weight = 1.0
    config.model.smooth_embedding = False  # start with like embeddings for neighbouring bins
    config.model.dtype = "float32"  # of the products; "bfloat16" is faster on accelerators
    config.model.goal_conditioned = False  # put the observation in which the episode ends in front

    config.train = config_dict.ConfigDict()
    config.train.num_steps = 5_000
    config.train.batch_size = 64  # windows, over all devices
    config.train.learning_rate = 1e-3
    config.train.weight_decay = 0.1  # of matrices only
    config.train.optimizer = "adamw"  # or "muon"
    config.train.grad_clip = 1.0  # largest norm of the gradient
    config.train.beta1 = 0.9
    config.train.beta2 = 0.95
    config.train.warmup_tokens = 0  # those of one epoch
    config.train.final_tokens = 0  # those of 20 epochs
    config.train.clamp_cosine = True  # stay at the floor after final_tokens
    config.train.input_noise = 0.0  # on the observation and action tokens that the model reads, in bins
    config.train.input_noise_steps = 0  # updates with that noise
    config.train.steps_per_call = 50  # updates in one compiled call
    config.train.log_every = 100  # updates
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.keep_checkpoints = 3

    config.plan = config_dict.ConfigDict()
    config.plan.horizon = 15  # planned transitions
    config.plan.beam_width = 32  # plans that are kept
    config.plan.num_expand = 2  # candidates for each of them
    config.plan.num_elites = 1  # best plans whose mean actions are executed, of a search by score
    config.plan.replan_every = 1  # executed steps per plan
    config.plan.context_transitions = 5  # past transitions that the model sees
    config.plan.window = (10, 5)  # transitions at most, and left when the window slides
    config.plan.temperature = 1.0
    config.plan.action_cdf = 0.6  # drop the least likely actions up to this mass; 0 switches it off
    config.plan.action_top_k = 0  # sample from the k likeliest actions; 0 switches it off
    config.plan.action_central = 1.0  # sample from this share of the probability around the median; 0: the median
    config.plan.observation_cdf = 0.0
    config.plan.observation_top_k = 1  # greedy
    config.plan.reward_cdf = 0.0
    config.plan.reward_top_k = 1  # greedy, but scored by the mean
    config.plan.percentile = -1.0  # of reward and value in a plan's score; -1 takes their mean
    config.plan.stop_ends_episode = True  # no reward after a predicted end; the reference goes on
    config.plan.stop_within_transition = False  # a false end would look like a reached goal

    iql.add_to(config)
    config.iql.expectile = 0.9
    config.iql.temperature = 10.0
    config.iql.normalize_observations = True  # velocities are larger than positions; the reference leaves them
    config.iql.reward_units = "minus_one"  # a step costs 1 until the goal is reached

    config.table = config_dict.ConfigDict()  # of experiments/maze_table.py
    config.table.bc_steps = 50_000  # updates of behaviour cloning
    return config.lock()
