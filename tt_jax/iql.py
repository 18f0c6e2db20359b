"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv 2110.06169): networks, losses, update, Q-values and policy.

Twin critics Q, a value V fitted to an upper expectile of Q over the data's actions, a target critic that follows Q, and
a Gaussian policy by advantage-weighted regression. Parameters are a nested dict of arrays

    actor, value                  networks; the actor also holds log_std, which does not depend on the observation
    critic, target_critic         networks whose leaves are stacked over the two critics
    units                         mean and deviation of the observations, scale and shift of the rewards

so that they bring their units along: every function here takes observations and rewards as the environment gives them.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tt_jax import types

_LOG_STD_MIN, _LOG_STD_MAX = -5.0, 2.0
_MAX_WEIGHT = 100.0  # of a sample in the policy's regression
_PRECISION = jax.lax.Precision.HIGHEST
REWARD_UNITS = ("raw", "minus_one", "return_range")


@dataclasses.dataclass(frozen=True)
class IQLConfig:
    """Static settings; the defaults are the reference's for locomotion."""

    observation_dim: int  # N
    action_dim: int  # A
    hidden_dims: tuple[int, ...] = (256, 256)
    expectile: float = 0.7  # 0.9 in ant mazes
    temperature: float = 3.0  # of exp(temperature * advantage); 10 in ant mazes
    discount: float = 0.99
    tau: float = 0.005  # how far the target critic moves per update
    learning_rate: float = 3e-4
    actor_cosine_steps: int = 0  # the actor's rate falls to 0 over so many updates; 0: constant
    actor_dropout: float = 0.0  # after each hidden layer of the actor, in its update only
    normalize_observations: bool = False
    reward_units: str = "return_range"  # see `fit_units`; "minus_one" in ant mazes

    def __post_init__(self):
        if self.observation_dim < 1 or self.action_dim < 1 or not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(
                f"observation_dim={self.observation_dim}, action_dim={self.action_dim} and the layers of "
                f"hidden_dims={self.hidden_dims} must be at least 1, and there must be a layer."
            )
        for name in ("expectile", "discount", "tau", "actor_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1].")
        if self.reward_units not in REWARD_UNITS:
            raise ValueError(f'reward_units must be one of {", ".join(REWARD_UNITS)}, got "{self.reward_units}".')


@chex.dataclass(frozen=True)
class Transitions:
    """Single steps of any episodes, in the environment's units; actions are within +-1."""

    observations: chex.Array  # [B, N] float32
    actions: chex.Array  # [B, A] float32
    rewards: chex.Array  # [B] float32
    not_terminal: chex.Array  # [B] float32, 0 after a real terminal; 1 also where the episode was cut short
    next_observations: chex.Array  # [B, N] float32


@chex.dataclass(frozen=True)
class IQLState:
    """Everything that an update changes, and the key of the dropout."""

    params: types.Params
    opt_state: dict[str, optax.OptState]  # of actor, critic and value
    step: chex.Array  # [] int32, updates done
    dropout_key: chex.Array  # [...] uint32, data of the key that the steps are folded into


def init(rng_key: chex.PRNGKey, *, config: IQLConfig, units: types.Params | None = None) -> IQLState:
    """Return the state before the first update: orthogonal matrices with gain sqrt(2), outputs included, biases 0.

    `units` come from `fit_units`; without them observations and rewards are left as they are.
    """
    actor_key, critic_key, value_key, dropout_key = jax.random.split(rng_key, 4)
    observation_dim, action_dim, hidden = config.observation_dim, config.action_dim, config.hidden_dims
    critic_sizes = (observation_dim + action_dim, *hidden, 1)
    critic = jax.vmap(functools.partial(_init_network, sizes=critic_sizes))(jax.random.split(critic_key))
    actor = _init_network(actor_key, sizes=(observation_dim, *hidden, action_dim))
    networks = {
        "actor": {**actor, "log_std": jnp.zeros([action_dim])},
        "critic": critic,
        "value": _init_network(value_key, sizes=(observation_dim, *hidden, 1)),
    }
    units = _raw_units(observation_dim) if units is None else units
    if np.shape(units["observation_mean"]) != (observation_dim,):
        raise ValueError(
            f"the units are those of observations {np.shape(units['observation_mean'])}, "
            f"but observation_dim={observation_dim}; fit them on the same layout."
        )
    return IQLState(
        params={
            **networks,
            "target_critic": jax.tree.map(jnp.copy, critic),
            "units": {name: jnp.asarray(value, jnp.float32) for name, value in units.items()},
        },
        opt_state={name: optax.scale_by_adam().init(network) for name, network in networks.items()},
        step=jnp.zeros([], jnp.int32),
        dropout_key=jax.random.key_data(dropout_key),
    )


def update(
    state: IQLState, batch: Transitions, *, config: IQLConfig, axis_name: str | None = None
) -> tuple[IQLState, dict[str, chex.Array]]:
    """Do one step of V, then of the policy and of Q with the new V, then move the target critic (algorithm 1).

    `batch` is the device's equal share of the global batch if `axis_name` is given. The metrics are means over the
    global batch: the losses, V and the critics before their steps, and the advantage by the new V. Raises ValueError if
    the shapes of the batch do not suit the configuration.
    """
    _check_batch(batch, config)
    params, actions = state.params, batch.actions
    observations, next_observations = _standardize(params, jnp.stack([batch.observations, batch.next_observations]))
    rewards = transform_rewards(params, batch.rewards)
    target_q = jnp.min(_critics(params["target_critic"], observations, actions), axis=0)  # [B]

    def value_loss(network):
        v = _network(network, observations)[..., 0]
        return jnp.mean(expectile_loss(target_q - v, expectile=config.expectile)), {"v": jnp.mean(v)}

    def step(name, loss_fn, rate):
        return _descend(loss_fn, params[name], state.opt_state[name], rate=rate, axis_name=axis_name)

    value, value_opt, value_metrics = step("value", value_loss, config.learning_rate)
    new_v, next_v = _network(value, jnp.stack([observations, next_observations]))[..., 0]
    advantage = target_q - new_v
    weights = jnp.minimum(jnp.exp(config.temperature * advantage), _MAX_WEIGHT)
    bootstrapped = rewards + config.discount * batch.not_terminal * next_v

    def actor_loss(network):
        dropout_fn = _dropout(state, len(actions), config=config, axis_name=axis_name)
        mean = jnp.tanh(_network(network, observations, dropout_fn))
        return -jnp.mean(weights * _log_prob(mean, network["log_std"], actions)), {"advantage": jnp.mean(advantage)}

    def critic_loss(network):
        q = _critics(network, observations, actions)  # [2, B]
        q1, q2 = jnp.mean(q, axis=1)
        return jnp.sum(jnp.mean((q - bootstrapped) ** 2, axis=1)), {"q1": q1, "q2": q2}

    actor, actor_opt, actor_metrics = step("actor", actor_loss, actor_learning_rate(state.step, config=config))
    critic, critic_opt, critic_metrics = step("critic", critic_loss, config.learning_rate)
    target_critic = optax.incremental_update(critic, params["target_critic"], config.tau)
    metrics = {
        "value_loss": value_metrics.pop("loss"),
        "actor_loss": actor_metrics.pop("loss"),
        "critic_loss": critic_metrics.pop("loss"),
        **value_metrics,
        **actor_metrics,
        **critic_metrics,
    }
    state = IQLState(
        params={
            "actor": actor,
            "critic": critic,
            "value": value,
            "target_critic": target_critic,
            "units": params["units"],
        },
        opt_state={"actor": actor_opt, "critic": critic_opt, "value": value_opt},
        step=state.step + 1,
        dropout_key=state.dropout_key,
    )
    return state, metrics
