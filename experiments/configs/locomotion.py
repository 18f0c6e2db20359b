"""Trajectory Transformer and IQL on the locomotion datasets, with the settings of their papers.

arXiv 2106.02039 and 2110.06169.

python -m experiments.train_tt --config=experiments/configs/locomotion.py:hopper-medium --workdir=DIR
python -m experiments.plan --workdir=DIR --num_episodes=15
python -m experiments.train_iql --config=experiments/configs/locomotion.py:hopper-medium --workdir=DIR

Selection: BODY-DATA with BODY halfcheetah, hopper, walker2d or ant and DATA medium, medium-replay or medium-expert.
Minari hosts the medium datasets (for v5 of the environments); the others come from D4RL's files by way of
`python -m experiments.import_d4rl`. About 200,000 updates; the paper took 6 to 12 hours on one V100.
"""

from ml_collections import config_dict

from experiments.configs import iql

BODIES = ("halfcheetah", "hopper", "walker2d", "ant")
DATA = ("medium", "medium-replay", "medium-expert")


def get_config(name="hopper-medium"):
    """Return the settings of one dataset, such as "hopper-medium"."""
    body, _, data = name.partition("-")
    if body not in BODIES or data not in DATA:
        raise ValueError(f"no settings called {name!r}; choose one of {[f'{b}-{d}' for b in BODIES for d in DATA]}")

    config = config_dict.ConfigDict()
    config.seed = 0  # of initialisation, data order and dropout
    config.dataset = f"mujoco/{body}/medium-v0" if data == "medium" else f"d4rl/{body}/{data}-v2"  # Minari id

    config.data = config_dict.ConfigDict()
    config.data.observation_keys = ()  # the observations are plain arrays
    config.data.observation_slice = 27 if body == "ant" else 0  # ant: leave the contact forces out
    config.data.step = 1  # environment steps between the transitions of a window
    config.data.discount = 0.99  # of the return-to-go, in training and in planning
    config.data.termination_penalty = -100.0  # replaces the reward of a fall
    config.data.max_path_length = 0  # the environment's time limit
    config.data.stop_after_truncation = True  # as the PyTorch reference
    config.data.eval_fraction = 0.02  # share of the episodes that is held out
    config.data.num_bins = 100  # per dimension
    config.data.method = "quantile"  # bins of equal counts; the paper's other variant is "uniform"
    config.data.distinct_values = False  # as the PyTorch reference

    config.model = config_dict.ConfigDict()
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128  # 32 per head
    config.model.max_transitions = 10  # of a training window
    config.model.embedding_dropout = 0.1
    config.model.attention_dropout = 0.1
    config.model.residual_dropout = 0.1
    config.model.action_weight = 5.0  # of the loss of action tokens; observation tokens have 1
    config.model.reward_weight = 1.0
    config.model.value_weight = 1.0
    config.model.smooth_embedding = False  # start with like embeddings for neighbouring bins
    config.model.dtype = "float32"  # of the products; "bfloat16" is faster on accelerators

    config.train = config_dict.ConfigDict()
    config.train.batch_size = 128 if body == "ant" else 256  # windows, over all devices
    windows = 80_000_000 if data == "medium-replay" and body in ("hopper", "walker2d") else 50_000_000
    config.train.num_steps = windows // config.train.batch_size  # 1e6 / size x 50 (80) epochs of a dataset
    config.train.learning_rate = 6e-4
    config.train.weight_decay = 0.1  # of matrices only
    config.train.optimizer = "adamw"  # or "muon"
    config.train.grad_clip = 1.0  # largest norm of the gradient
    config.train.beta1 = 0.9
    config.train.beta2 = 0.95
    config.train.warmup_tokens = 0  # those of one epoch
    config.train.final_tokens = 0  # those of 20 epochs
    config.train.clamp_cosine = False  # the reference's rate rises again after final_tokens
    config.train.input_noise = 0.0  # on the observation and action tokens that the model reads, in bins
    config.train.input_noise_steps = 0  # updates with that noise
    config.train.steps_per_call = 50  # updates in one compiled call
    config.train.log_every = 100  # updates
    config.train.eval_every = 5_000
    config.train.checkpoint_every = 5_000
    config.train.keep_checkpoints = 3

    config.plan = config_dict.ConfigDict()
    config.plan.horizon = 15  # planned transitions
    config.plan.beam_width = 128  # plans that are kept
    config.plan.num_expand = 2  # candidates for each of them
    config.plan.num_elites = 1  # best plans whose mean actions are executed, of a search by score
    config.plan.replan_every = 1  # executed steps per plan
    config.plan.context_transitions = 5  # past transitions that the model sees
    config.plan.window = (5, 4)  # transitions at most, and left when the window slides
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
    config.plan.stop_within_transition = True  # as the reference
    iql.add_to(config)

    for field, value in _plan_changes(body, data).items():
        config.plan[field] = value
    return config.lock()


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
