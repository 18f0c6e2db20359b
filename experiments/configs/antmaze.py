"""Ant mazes with sparse reward: IQL, and a Trajectory Transformer that plans by IQL's Q-function.

python -m experiments.train_iql --config=experiments/configs/antmaze.py:medium-diverse --download --workdir=runs/ant_iql
python -m experiments.train_tt --config=experiments/configs/antmaze.py:medium-diverse --download --workdir=runs/ant_tt
python -m experiments.plan --workdir=runs/ant_tt --iql_workdir=runs/ant_iql --num_episodes=100

or all of it, beside what others would choose, with `python -m experiments.compare`. Selection: MAZE-DATA with umaze,
umaze-diverse, medium-play, medium-diverse, large-play or large-diverse, D4RL's datasets under their names in Minari,
with the settings of the papers (arXiv 2106.02039, 2110.06169): a GPU's work, which was not run to its end here. "-fast"
at the end is for minutes on a GPU (`experiments.reproduce`, docs/accelerators.md), with plans of several steps. "-cpu"
scales them to hours on 2 CPU cores, one for each transformer and half of one for IQL. Success of the transformer with Q
on two ant mazes that were recorded for this project: 81 ± 2% (umaze) and 46 ± 1% (medium), see docs/results.md.
"""

from experiments.configs import base, maze

MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")


def get_config(name="medium-diverse"):
    """Return the settings of one dataset, such as "medium-diverse", "medium-diverse-cpu" or "medium-diverse-fast"."""
    maze_name, size = base.split_size(name)
    if maze_name not in MAZES:
        raise ValueError(
            f"no settings called {name!r}; choose one of {MAZES}, with -cpu for small ones, -fast for a GPU"
        )

    config = maze.any_maze()
    config.dataset = f"D4RL/antmaze/{maze_name}-v1"
    config.data.observation_keys = ("achieved_goal", "observation")  # the goal is always the same
    config.train.batch_size = 128
    config.train.eval_every = config.train.checkpoint_every = 5_000
    if size == "cpu":
        _guide(config)
        _scale_down(config)
    elif size == "fast":
        _guide(config)
        config.model.max_transitions = 5  # all that the plans read
        base.fast(config, transition_dim=39)
        config.plan.horizon = 5
    return config


def _guide(config):
    """Let Q see far and choose among all actions."""
    config.iql.discount = 0.995  # at 0.99 everything 200 steps away from the goal looks alike
    config.eval.goal = (10.0, -10.0) if "medium" in config.dataset else ()
    config.plan.action_cdf = 0.0


def _scale_down(config):
    config.model.num_layers = 3
    config.model.num_heads = 3
    config.model.embed_dim = 96
    config.model.max_transitions = 1  # all that the plans below read; learns faster than 4, see docs/mazes.md
    base.no_dropout(config)  # noise on the inputs does more, see docs/mazes.md
    config.model.smooth_embedding = True  # this and Muon: the same loss of action tokens after 40% of the updates

    config.train.batch_size = 32
    config.train.optimizer = "muon"
    config.train.num_steps = 60_000
    config.train.learning_rate = 1.5e-3
    config.train.warmup_tokens = 1_000_000
    config.train.final_tokens = 74_400_000  # all updates
    config.train.input_noise = 5.0  # against learning the few transitions by heart
    config.train.input_noise_steps = 51_000  # then without: a model that distrusts what it reads reacts too little
    config.train.eval_every = config.train.checkpoint_every = 4_000

    config.iql_train.num_steps = 250_000
    base.small_baselines(config)
    cql = config.baselines.cql  # with a gap of 5 its values leave the range of the returns, see docs/baselines.md
    cql.lagrange_gap = 0.8
    cql.reward_scale = 10.0
    cql.hidden_dims = (256, 256, 256)

    config.plan.horizon = 1  # a model of this size walks better than it imagines: it plans anew at every step
    config.plan.beam_width = 32
    config.plan.num_expand = 1
    config.plan.num_elites = 16  # means, since the noise of the data makes ants fall
    config.plan.context_transitions = 0  # the ant's own past adds nothing, see docs/mazes.md
    config.plan.window = (1, 0)
