"""Conservative Q-Learning (Kumar et al. 2020, arXiv 2006.04779): SAC whose critics are low away from the data.

Twin critics with targets that follow them, a squashed Gaussian policy, a temperature learned for an entropy of -A per
action, and the penalty CQL(H) on the critics, a log-sum-exp over sampled actions, with a fixed weight or with one that
is learned by dual descent (Lagrange). All losses are those at the parameters before the step. Networks and units are
IQL's, see `iql`; parameters are {"actor", "critic", "target_critic", "log_alpha", "log_weight", "units"}.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tt_jax import bc, iql, learners, networks, trajectories, types

TRAIN = learners.TrainConfig()
_LOG_STD_MIN, _LOG_STD_MAX = -20.0, 2.0
_MAX_WEIGHT = 1e6  # of the penalty, Lagrange variant


@dataclasses.dataclass(frozen=True)
class Config:
    """Static settings; the defaults are those of the public implementations for locomotion."""

    observation_dim: int  # N
    action_dim: int  # A
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of the hidden layers of all networks
    discount: float = 0.99  # of rewards, per step
    tau: float = 0.005  # how far the target critics move per update
    actor_learning_rate: float = 1e-4  # of the policy
    critic_learning_rate: float = 3e-4  # of the Q-functions
    num_samples: int = 10  # M, actions in the penalty of each kind: uniform, of the policy here, of the policy next
    penalty_weight: float = 5.0  # of the penalty on Q of actions that the data does not have
    lagrange_gap: float = 0.0  # the penalty's weight rises above this gap and falls below; 0: it is fixed
    max_backup: bool = False  # back up the best of M actions of the policy instead of one
    reward_units: str = "raw"  # as in IQLConfig
    reward_scale: float = 1.0  # of rewards in these units; the penalty tells apart values that differ by more than 1

    def __post_init__(self):
        rates = ("actor_learning_rate", "critic_learning_rate")
        types.check_ranges(
            self,
            positive=("hidden_dims", *rates, "num_samples", "reward_scale"),
            not_negative=("penalty_weight",),
            shares=("discount", "tau"),
        )
        if self.reward_units not in iql.REWARD_UNITS:
            raise ValueError(f'reward_units must be one of {", ".join(iql.REWARD_UNITS)}, got "{self.reward_units}".')


def prepare(data: trajectories.Trajectories, settings: dict) -> tuple[Config, types.Params, types.Transitions]:
    """Return the configuration with the data's sizes, the units, and what is learned from."""
    trajectories.action_bounds(data)  # refuses discrete actions
    config = Config(observation_dim=data.observations.shape[1], action_dim=data.actions.shape[1], **settings)
    return config, *bc.standardized_transitions(data, reward_units=config.reward_units)


batch = learners.take  # [B] of the transitions


def init(rng_key: chex.PRNGKey, *, config: Config, units: types.Params) -> learners.State:
    """Return the state before the first update; the policy begins with small means and deviations around 1/e."""
    actor_key, critic_key = jax.random.split(rng_key)
    hidden, observation = config.hidden_dims, jnp.zeros([1, config.observation_dim])
    actor = networks.MLP((*hidden, 2 * config.action_dim)).init(actor_key, observation)["params"]
    output = f"Dense_{len(hidden)}"
    actor = actor | {output: actor[output] | {"kernel": 0.01 * actor[output]["kernel"]}}
    inputs = jnp.zeros([2, 1, config.observation_dim + config.action_dim])
    critic = networks.Critics((*hidden, 1)).init(critic_key, inputs)["params"]
    learned = {"actor": actor, "critic": critic, "log_alpha": jnp.zeros([]), "log_weight": jnp.zeros([])}
    return learners.State(
        params=learned | {"target_critic": jax.tree.map(jnp.copy, critic), "units": jax.tree.map(jnp.asarray, units)},
        opt_state={name: optax.scale_by_adam().init(network) for name, network in learned.items()},
        step=jnp.zeros([], jnp.int32),
    )


def update(
    state: learners.State,
    batch: types.Transitions,
    row_keys: chex.PRNGKey,
    *,
    config: Config,
    axis_name: str | None = None,
) -> tuple[learners.State, dict[str, chex.Array]]:
    """Do one step of policy, temperature, critics and penalty's weight, then move the target critics.

    `batch` is [B], in the environment's units, with a key for each row; the device's equal share of the global batch if
    `axis_name` is given. The metrics are means over the global batch, [] float32, before the step: the losses, q, gap
    (of the penalty), entropy, alpha and weight.
    """
    params, count = state.params, config.num_samples
    descend = functools.partial(learners.descend, state=state, axis_name=axis_name)
    observations = iql.standardize(params, batch.observations)
    next_observations = iql.standardize(params, batch.next_observations)
    actions = iql.normalize_actions(params, batch.actions)
    alpha = jnp.exp(params["log_alpha"])
    weight = jnp.minimum(jnp.exp(params["log_weight"]), _MAX_WEIGHT) if config.lagrange_gap else jnp.float32(1)
    noise, uniform = _draw(row_keys, config)  # [1 + 2 M, B, A], [M, B, A]

    here, here_log_prob = sample(params["actor"], observations, noise[1 : 1 + count])
    after, after_log_prob = sample(params["actor"], next_observations, noise[1 + count :])
    backups = jnp.min(
        _q(params["target_critic"], next_observations, after[: count if config.max_backup else 1]), axis=0
    )
    target = config.reward_scale * iql.transform_rewards(params, batch.rewards)
    target += config.discount * batch.not_terminal * jnp.max(backups, axis=0)
    log_density = jnp.concatenate(
        [jnp.full_like(here_log_prob, -config.action_dim * np.log(2.0)), here_log_prob, after_log_prob]
    )

    def actor_loss(actor):
        action, log_prob = sample(actor, observations, noise[:1])
        q = jnp.min(_q(params["critic"], observations, action), axis=0)
        return jnp.mean(alpha * log_prob - q), {"entropy": -jnp.mean(log_prob)}

    def critic_loss(critic):
        q = iql.critics(critic, observations, actions)  # [2, B]
        q_samples = _q(critic, observations, jnp.concatenate([uniform, here, after]))  # [2, 3 M, B]
        gap = jnp.mean(penalty(q_samples, log_density, q), axis=-1)  # [2]
        bellman = jnp.sum(jnp.mean((q - target[None]) ** 2, axis=1))
        conservative = config.penalty_weight * weight * jnp.sum(gap - config.lagrange_gap)
        return bellman + conservative, {"q": jnp.mean(q), "gap": jnp.mean(gap), "bellman_error": bellman / 2}

    actor, actor_opt, metrics = descend("actor", actor_loss, config.actor_learning_rate)
    critic, critic_opt, critic_metrics = descend("critic", critic_loss, config.critic_learning_rate)
    metrics |= critic_metrics | {"alpha": alpha, "weight": weight}

    def alpha_loss(log_alpha):
        return log_alpha * (metrics["entropy"] + config.action_dim), {}

    def weight_loss(log_weight):
        weight = jnp.minimum(jnp.exp(log_weight), _MAX_WEIGHT)
        return -config.penalty_weight * weight * (metrics["gap"] - config.lagrange_gap), {}

    learned, opt_state = {"actor": actor, "critic": critic}, {"actor": actor_opt, "critic": critic_opt}
    learned["log_alpha"], opt_state["log_alpha"], _ = descend("log_alpha", alpha_loss, config.actor_learning_rate)
    if config.lagrange_gap:
        rate = config.critic_learning_rate
        learned["log_weight"], opt_state["log_weight"], _ = descend("log_weight", weight_loss, rate)
    learned["target_critic"] = optax.incremental_update(critic, params["target_critic"], config.tau)
    state = state.replace(params=params | learned, opt_state=state.opt_state | opt_state, step=state.step + 1)
    return state, metrics


def penalty(q_samples: chex.Array, log_density: chex.Array, q_data: chex.Array) -> chex.Array:
    """Return how far the critics are higher over all actions than at the data's (equation 4, appendix F), [2, B].

    `q_samples` [2, S, B] are values at sampled actions with the log-densities `log_density` [S, B], `q_data` [2, B]
    those at the data's. Over all actions means log sum_s exp(q_s) / density_s, as in the public implementations: it
    estimates log S plus the logarithm of the integral of exp(Q) over the actions.
    """
    return jax.nn.logsumexp(q_samples - log_density[None], axis=1) - q_data


def sample(actor: types.Params, observations: chex.Array, noise: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Map standard normal `noise` [S, B, A] to actions in +-1 at [B, N], and to their log-densities [S, B]."""
    mean, std = _gaussian(actor, observations)
    raw = mean[None] + std[None] * noise
    log_slope = 2 * (np.log(2.0) - raw - jax.nn.softplus(-2 * raw))  # of tanh
    log_prob = jax.scipy.stats.norm.logpdf(noise) - jnp.log(std)[None] - log_slope
    return jnp.tanh(raw), jnp.sum(log_prob, axis=-1)


encode = bc.encode  # the newest observations [B, N]


def act(params: types.Params, observations: chex.Array, *, config: Config) -> chex.Array:
    """Return the policy's squashed means [B, A], within their bounds, at observations [B, N]."""
    del config
    mean, _ = _gaussian(params["actor"], iql.standardize(params, observations))
    center, scale = iql.action_units(params, mean)
    return center + scale * jnp.tanh(mean)


def _gaussian(actor, observations):
    """Return mean and deviation [B, A] before squashing."""
    outputs = networks.MLP(networks.sizes(actor)).apply({"params": actor}, observations)
    mean, log_std = jnp.split(outputs, 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_std - 1, _LOG_STD_MIN, _LOG_STD_MAX))


def _q(critic, observations, actions):
    """Return both critics [2, S, B] at [B, N] and [S, B, A]."""
    return iql.critics(critic, jnp.broadcast_to(observations, (len(actions), *observations.shape)), actions)


def _draw(row_keys, config):
    """Draw normal [1 + 2 M, B, A] and uniform [M, B, A] numbers, a row's from its key."""

    def draw(key):
        normal_key, uniform_key = jax.random.split(key)
        shape = config.num_samples, config.action_dim
        normal = jax.random.normal(normal_key, (1 + 2 * shape[0], shape[1]))
        return normal, jax.random.uniform(uniform_key, shape, minval=-1.0, maxval=1.0)

    return jax.tree.map(lambda drawn: drawn.swapaxes(0, 1), jax.vmap(draw)(row_keys))
