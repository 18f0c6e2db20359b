"""Training of Implicit Q-Learning on a Minari dataset, from its configuration to checkpoints in a workdir."""

from experiments.common import control, entry, learner_run
from tt_jax import iql, iql_training, rollouts, trajectories


def train(config, workdir, *, preemption, download=False):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop."""
    train_config = entry.to_dataclass(iql_training.IQLTrainConfig, config.iql_train)
    data = learner_run.load(config, method="IQL", num_seeds=train_config.num_seeds, download=download)
    transitions = trajectories.transitions(data.trajectories)
    settings = dict(config.iql)
    has_cosine = settings.pop("actor_cosine")
    iql_config = entry.to_dataclass(
        iql.IQLConfig,
        settings,
        actor_cosine_steps=train_config.num_steps if has_cosine else 0,
        observation_dim=transitions.observations.shape[1],
        action_dim=transitions.actions.shape[1],
    )
    bounds = trajectories.action_bounds(data.trajectories)
    units = iql.fit_units(transitions, config=iql_config, action_bounds=bounds)
    learner_run.run(
        workdir,
        data,
        config=train_config,
        model_config=iql_config,
        free_fields=("actor_cosine_steps",),
        fresh=iql_training.init(config.seed, config=train_config, iql_config=iql_config, units=units),
        train_fn=iql_training.make_train_fn(
            config=train_config, iql_config=iql_config, num_transitions=len(transitions.rewards)
        ),
        store=transitions,
        policy_fn=lambda params: rollouts.observation_policy(control.mean_action_fn(params)),
        describe=lambda metrics: f"v {metrics['v'][-1].mean():.3g}, value loss {metrics['value_loss'][-1].mean():.3g}",
        preemption=preemption,
    )
