"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv 2110.06169): networks, losses, update, Q-values and policy.

Twin critics Q, a value V fitted to an upper expectile of Q over the data's actions, a target critic that follows Q, and
a policy by advantage-weighted regression: a Gaussian, or a categorical distribution per dimension of discrete actions,
which enter Q one-hot. Parameters are a nested dict of arrays

    actor, value                  those of a `networks.Policy`, or {"mlp": logits}, and of an `networks.MLP`
    critic, target_critic         those of `networks.Critics`, whose leaves are stacked over the two critics
    units                         mean and deviation of the observations, center and half-width of the actions, scale
                                  and shift of the rewards; if actions are discrete, their values

so that they bring their units along: every function here takes observations, actions and rewards
as the environment has them. Networks have derivatives of reverse mode alone (`jax.grad`, `jax.vjp`).
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tt_jax import learners, networks, types

_MAX_WEIGHT = 100.0  # of a sample in the policy's regression
REWARD_UNITS = ("raw", "minus_one", "return_range")


@dataclasses.dataclass(frozen=True)
class IQLConfig:
    """Static settings; the defaults are the reference's for locomotion."""

    observation_dim: int  # N
    action_dim: int  # A
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of the hidden layers of all networks
    expectile: float = 0.7  # of Q that V learns: nearer to 1, the best action; 0.9 in ant mazes
    temperature: float = 3.0  # of exp(temperature * advantage); 10 in ant mazes, 0: behaviour cloning
    discount: float = 0.99  # of rewards, per step
    tau: float = 0.005  # how far the target critic moves per update
    learning_rate: float = 3e-4  # of all networks
    actor_cosine_steps: int = 0  # the actor's rate falls to 0 over so many updates; 0: constant
    actor_dropout: float = 0.0  # after each hidden layer of the actor, in its update only
    normalize_observations: bool = False  # to mean 0 and deviation 1
    reward_units: str = "return_range"  # times 1000 / (best - worst return); "minus_one" in ant mazes; "raw"

    def __post_init__(self):
        if self.observation_dim < 1 or self.action_dim < 1 or not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(
                f"observation_dim={self.observation_dim}, action_dim={self.action_dim} and the layers of "
                f"hidden_dims={self.hidden_dims} must be at least 1, and there must be a layer."
            )
        for name in ("expectile", "discount", "tau", "actor_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1].")
        if self.actor_dropout == 1 or self.learning_rate <= 0 or self.temperature < 0:
            raise ValueError(
                f"actor_dropout={self.actor_dropout} must be below 1, learning_rate={self.learning_rate} positive and "
                f"temperature={self.temperature} not negative."
            )
        if self.reward_units not in REWARD_UNITS:
            raise ValueError(f'reward_units must be one of {", ".join(REWARD_UNITS)}, got "{self.reward_units}".')


@chex.dataclass(frozen=True)
class IQLState:
    """Everything that an update changes, and the key of the dropout."""

    params: types.Params
    opt_state: dict[str, optax.OptState]  # of actor, critic and value
    step: chex.Array  # [] int32, updates done
    dropout_key: chex.Array  # [...] uint32, data of the key that the steps are folded into


def init(rng_key: chex.PRNGKey, *, config: IQLConfig, units: types.Params | None = None) -> IQLState:
    """Return the state before the first update: orthogonal matrices with gain sqrt(2), outputs included, biases 0.

    `units` come from `fit_units`, which know whether actions are discrete; without them observations and rewards are
    left as they are. All arrays are float32. Raises ValueError if the units are of another observation size.
    """
    actor_key, critic_key, value_key, dropout_key = jax.random.split(rng_key, 4)
    observation_dim, action_dim, hidden = config.observation_dim, config.action_dim, config.hidden_dims
    observation, values = jnp.zeros([1, observation_dim]), (units or {}).get("action_values")
    inputs = jnp.zeros([2, 1, observation_dim + (action_dim if values is None else values.size)])  # of both critics
    learned = {
        "actor": init_actor(actor_key, config=config, action_values=values),
        "critic": networks.Critics((*hidden, 1)).init(critic_key, inputs)["params"],
        "value": networks.MLP((*hidden, 1)).init(value_key, observation)["params"],
    }
    units = _raw_units(observation_dim, action_dim) | (units or {})
    if np.shape(units["observation_mean"]) != (observation_dim,):
        raise ValueError(
            f"the units are those of observations {np.shape(units['observation_mean'])}, "
            f"but observation_dim={observation_dim}; fit them on the same layout."
        )
    return IQLState(
        params={
            **learned,
            "target_critic": jax.tree.map(jnp.copy, learned["critic"]),
            "units": {name: jnp.asarray(value, jnp.float32) for name, value in units.items()},
        },
        opt_state={name: optax.scale_by_adam().init(network) for name, network in learned.items()},
        step=jnp.zeros([], jnp.int32),
        dropout_key=jax.random.key_data(dropout_key),
    )


def init_actor(rng_key: chex.PRNGKey, *, config: Any, action_values: chex.Array | None = None) -> types.Params:
    """Return an untrained policy of the sizes in `config`, for the units' `action_values` [A, n] if they are there."""
    observation, hidden = jnp.zeros([1, config.observation_dim]), config.hidden_dims
    if action_values is None:
        return networks.Policy((*hidden, config.action_dim)).init(rng_key, observation)["params"]
    return {"mlp": networks.MLP((*hidden, action_values.size)).init(rng_key, observation)["params"]}


def update(
    state: IQLState, batch: types.Transitions, *, config: IQLConfig, axis_name: str | None = None
) -> tuple[IQLState, dict[str, chex.Array]]:
    """Do one step of V, then of the policy and of Q with the new V, then move the target critic (algorithm 1).

    `batch` is [B], in the environment's units; the device's equal share of the global batch if `axis_name` is given.
    The metrics are means over the global batch, [] float32: value_loss, actor_loss, critic_loss, v, q1 and q2 before
    their steps, advantage by the new V. Raises ValueError if the shapes of the batch do not suit the configuration.
    """
    _check_batch(batch, config)
    params, actions = state.params, normalize_actions(state.params, batch.actions)
    observations = standardize(params, batch.observations)
    both_observations = jnp.stack([observations, standardize(params, batch.next_observations)])
    rewards = transform_rewards(params, batch.rewards)
    target_q = jnp.min(critics(params["target_critic"], observations, actions), axis=0)  # [B]
    descend_on = functools.partial(learners.descend, state=state, axis_name=axis_name)

    def value_loss(value):
        v = _value(value, observations)
        return jnp.mean(expectile_loss(target_q - v, expectile=config.expectile)), {"v": jnp.mean(v)}

    value, value_opt, value_metrics = descend_on("value", value_loss, config.learning_rate)
    v, next_v = _value(value, both_observations)  # of the new V
    advantage = target_q - v
    weights = jnp.minimum(jnp.exp(config.temperature * advantage), _MAX_WEIGHT)
    q_goal = rewards + config.discount * batch.not_terminal * next_v

    def actor_loss(actor):
        dropout_fn = _dropout_fn(state, len(actions), config, axis_name) if config.actor_dropout else None
        likelihood = log_prob(params | {"actor": actor}, observations, actions, dropout_fn)
        return -jnp.mean(weights * likelihood), {"advantage": jnp.mean(advantage)}

    def critic_loss(critic):
        q = critics(critic, observations, actions)  # [2, B]
        q1, q2 = jnp.mean(q, axis=1)
        return jnp.sum(jnp.mean((q - q_goal[None]) ** 2, axis=1)), {"q1": q1, "q2": q2}

    actor, actor_opt, actor_metrics = descend_on("actor", actor_loss, actor_learning_rate(state.step, config=config))
    critic, critic_opt, critic_metrics = descend_on("critic", critic_loss, config.learning_rate)
    target_critic = optax.incremental_update(critic, params["target_critic"], config.tau)
    learned = {"actor": actor, "critic": critic, "value": value, "target_critic": target_critic}
    state = state.replace(
        params=params | learned,
        opt_state={"actor": actor_opt, "critic": critic_opt, "value": value_opt},
        step=state.step + 1,
    )
    return state, value_metrics | actor_metrics | critic_metrics


def q_values(params: types.Params, observation: chex.Array, action: chex.Array) -> chex.Array:
    """Return both critics [2, ...] at observation [..., N] and action [..., A], whose leading axes are broadcast.

    In the transformed reward's units; IQL's estimate is the minimum, `.min(axis=0)`. To evaluate the target critic
    pass `params | {"critic": params["target_critic"]}`. Raises ValueError if the last axes are not those trained on.
    """
    _check_size("observation", observation, params["actor"]["mlp"]["Dense_0"]["kernel"].shape[-2])
    _check_size("action", action, params["units"]["action_scale"].shape[-1])
    leading = jnp.broadcast_shapes(observation.shape[:-1], action.shape[:-1])
    observation = jnp.broadcast_to(standardize(params, observation), (*leading, observation.shape[-1]))
    action = jnp.broadcast_to(action, (*leading, action.shape[-1]))
    return critics(params["critic"], observation, normalize_actions(params, action))


def values(params: types.Params, observation: chex.Array) -> chex.Array:
    """Return V [...] at observation [..., N], in the transformed reward's units; raises ValueError as `q_values`."""
    _check_size("observation", observation, params["value"]["Dense_0"]["kernel"].shape[-2])
    return _value(params["value"], standardize(params, observation))


def policy(params: types.Params, observation: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Return the mean [..., A] of actions at observation [..., N], within their bounds, and their deviation [A].

    Discrete actions have neither, see `mean_action` and `sample_action`.
    """
    _check_size("observation", observation, params["actor"]["mlp"]["Dense_0"]["kernel"].shape[-2])
    mean, std = _policy(params["actor"], standardize(params, observation))
    center, scale = action_units(params, mean)
    return center + scale * mean, params["units"]["action_scale"] * std


def mean_action(params: types.Params, observation: chex.Array) -> chex.Array:
    """Return the policy's mean action [..., A] at observation [..., N], of discrete ones the likeliest."""
    if is_discrete(params):
        return _likeliest(params, _action_logits(params, observation))
    return policy(params, observation)[0]


def sample_action(
    params: types.Params, rng_key: chex.PRNGKey, observation: chex.Array, *, temperature: chex.Numeric = 1.0
) -> chex.Array:
    """Draw actions [..., A], clipped to their bounds, at observation [..., N]; temperature 0 gives `mean_action`.

    `rng_key` is one key, or one per observation, so that an action does not depend on the other observations. The
    temperature multiplies the deviation, and divides the logits of discrete actions. Raises ValueError as `q_values`.
    """

    def draw(distribution, shape):
        if not rng_key.ndim:
            return distribution(rng_key, shape)
        draw_one = functools.partial(distribution, shape=shape[observation.ndim - 1 :])
        return jax.vmap(draw_one)(rng_key.reshape(-1)).reshape(shape)

    if is_discrete(params):
        logits = _action_logits(params, observation)
        return _likeliest(params, logits + temperature * draw(jax.random.gumbel, logits.shape))
    mean, std = policy(params, observation)
    noise = draw(jax.random.normal, mean.shape)
    center, scale = action_units(params, mean)
    return jnp.clip(mean + temperature * noise * jnp.broadcast_to(std, mean.shape), center - scale, center + scale)


def actor_learning_rate(step: chex.Numeric, *, config: IQLConfig) -> chex.Array:
    """Return the actor's rate [] after `step` updates: constant, or a cosine that is 0 from actor_cosine_steps on."""
    if not config.actor_cosine_steps:
        return jnp.float32(config.learning_rate)
    return optax.cosine_decay_schedule(config.learning_rate, config.actor_cosine_steps)(step)


def expectile_loss(difference: chex.Array, *, expectile: float) -> chex.Array:
    """Square `difference` [...], times `expectile` where it is positive and 1 - expectile elsewhere (equation 5)."""
    return jnp.where(difference > 0, expectile, 1 - expectile) * difference**2


def fit_units(
    transitions: types.Transitions,
    *,
    config: IQLConfig,
    action_bounds: tuple[np.ndarray, np.ndarray] | None = None,
    action_values: np.ndarray | None = None,
) -> types.Params:
    """Measure on the whole dataset [n], in numpy, the units in which the networks work, as the configuration says.

    Returns observation_mean and observation_std [N], action_center and action_scale [A], reward_scale and reward_shift
    [], all float32. The `action_bounds`, lowest and highest [A], are +-1 to the networks; None leaves actions alone.
    The `action_values` [A, n] of discrete actions, see `trajectories.action_values`, are returned with them.
    Observations: mean 0 and deviation 1 per dimension (deviations below 1e-3 count as 1e-3), or as they are. Rewards:
    "raw"; "minus_one", 1 less per step; "return_range", multiplied by 1000 / (largest - smallest return), with the
    episodes told apart as in the reference (see `episode_ends`), so the rows must be in the order they were made.
    Raises ValueError if the observations are of another size or all returns are equal.
    """
    _check_batch(transitions, config)
    units = jax.tree.map(np.asarray, _raw_units(config.observation_dim, config.action_dim))
    if action_bounds is not None:
        low, high = (np.asarray(bound, np.float32) for bound in action_bounds)
        units["action_center"] = (low + high) / 2
        units["action_scale"] = np.where(low < high, (high - low) / 2, np.float32(1))
    if action_values is not None:
        units["action_values"] = np.asarray(action_values, np.float32)
    if config.normalize_observations:
        observations = np.asarray(transitions.observations, np.float64)
        units["observation_mean"] = observations.mean(axis=0).astype(np.float32)
        units["observation_std"] = np.maximum(observations.std(axis=0), 1e-3).astype(np.float32)
    if config.reward_units == "minus_one":
        units["reward_shift"] = np.float32(-1)
    elif config.reward_units == "return_range":
        returns = episode_returns(transitions)
        if returns.max() == returns.min():
            raise ValueError(
                f'all {len(returns)} returns are {returns[0]}, so reward_units="return_range" has no scale; '
                'set reward_units to "minus_one" or "raw".'
            )
        units["reward_scale"] = np.float32(1000 / (returns.max() - returns.min()))
    return units


def transform_rewards(params: types.Params, rewards: chex.Array) -> chex.Array:
    """Bring rewards [...] of the environment to the units of Q and V."""
    units = params["units"]
    return rewards * units["reward_scale"] + units["reward_shift"]


def episode_ends(transitions: types.Transitions) -> np.ndarray:
    """Mark the rows [n] that end an episode: terminals, the last row, and those whose next observation is not the next
    row's observation (by more than 1e-6 in norm)."""
    jumps = np.asarray(transitions.observations)[1:] - np.asarray(transitions.next_observations)[:-1]
    is_end = np.append(np.linalg.norm(jumps, axis=1) > 1e-6, True)
    return is_end | (np.asarray(transitions.not_terminal) == 0)


def episode_returns(transitions: types.Transitions) -> np.ndarray:
    """Sum the rewards [n] of each episode, in float64; an unfinished last episode counts too."""
    starts = np.append(0, np.flatnonzero(episode_ends(transitions))[:-1] + 1)
    return np.add.reduceat(np.asarray(transitions.rewards, np.float64), starts)


# Networks, in their own units; other methods are made of them, too


def _value(value, observations):
    return networks.MLP(networks.sizes(value)).apply({"params": value}, observations)[..., 0]


def critics(critic: types.Params, observations: chex.Array, actions: chex.Array) -> chex.Array:
    """Return both critics [2, ...] at standardised observations [..., N] and actions of `normalize_actions`."""
    inputs = jnp.concatenate([observations, actions.reshape(*observations.shape[:-1], -1)], axis=-1)
    inputs = jnp.broadcast_to(inputs, (2, *inputs.shape))  # else a CPU reorders the result of a shared product
    return networks.Critics(networks.sizes(critic)).apply({"params": critic}, inputs)[..., 0]  # [2, ...]


def _policy(actor, observations, dropout_fn=None):
    return networks.Policy(networks.sizes(actor["mlp"])).apply({"params": actor}, observations, dropout_fn)


def log_prob(
    params: types.Params,
    observations: chex.Array,
    actions: chex.Array,
    dropout_fn: networks.DropoutFn | None = None,
) -> chex.Array:
    """Return the log-density [...] of actions of `normalize_actions` at standardised observations [..., N]."""
    if is_discrete(params):
        log_probs = jax.nn.log_softmax(_logits(params, observations, dropout_fn), axis=-1)
        return jnp.sum(jnp.where(actions > 0, log_probs, 0), axis=(-2, -1))
    mean, std = _policy(params["actor"], observations, dropout_fn)
    std = jnp.broadcast_to(std, mean.shape)
    return jnp.sum(jax.scipy.stats.norm.logpdf(actions, mean, std), axis=-1)


def _logits(params, observations, dropout_fn=None):
    """Return logits [..., A, n] of discrete actions at standardised observations [..., N], -inf where there is none."""
    mlp, values = params["actor"]["mlp"], params["units"]["action_values"]
    logits = networks.MLP(networks.sizes(mlp)).apply({"params": mlp}, observations, dropout_fn)
    logits = logits.reshape(*observations.shape[:-1], *values.shape)
    return jnp.where(jnp.isfinite(jnp.broadcast_to(values, logits.shape)), logits, -jnp.inf)


def _action_logits(params, observation):
    _check_size("observation", observation, params["actor"]["mlp"]["Dense_0"]["kernel"].shape[-2])
    return _logits(params, standardize(params, observation))


def _likeliest(params, logits):
    """Return the actions [..., A] with the largest of the logits [..., A, n]."""
    values = jnp.broadcast_to(params["units"]["action_values"], logits.shape)
    return jnp.take_along_axis(values, jnp.argmax(logits, axis=-1, keepdims=True), axis=-1)[..., 0]


def _dropout_fn(state, num_rows, config, axis_name):
    """Return dropout of [rows, units]; its bits depend on the row in the global batch, not on the devices."""
    first = jax.lax.axis_index(axis_name) * num_rows if axis_name else 0
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, first + jnp.arange(num_rows))
    keep = 1 - config.actor_dropout

    def dropout_fn(x, layer):
        kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), keep, x.shape[1:]))(row_keys)
        return jnp.where(kept, x / keep, 0)

    return dropout_fn


# Units and checks


def _raw_units(observation_dim, action_dim):
    return {
        "action_center": jnp.zeros([action_dim]),
        "action_scale": jnp.ones([action_dim]),
        "observation_mean": jnp.zeros([observation_dim]),
        "observation_std": jnp.ones([observation_dim]),
        "reward_scale": jnp.ones([]),
        "reward_shift": jnp.zeros([]),
    }


def standardize(params: types.Params, observations: chex.Array) -> chex.Array:
    """Bring observations [..., N] of the environment to the networks' units."""
    units = params["units"]
    mean, std = (jnp.broadcast_to(units[f"observation_{name}"], observations.shape) for name in ("mean", "std"))
    return (observations - mean) / std


def action_units(params: types.Params, actions: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Return the center and the half-width of the actions' bounds in the shape of `actions` [..., A]."""
    return tuple(jnp.broadcast_to(params["units"][f"action_{name}"], actions.shape) for name in ("center", "scale"))


def is_discrete(params: types.Params) -> bool:
    """Whether the actions are discrete."""
    return "action_values" in params["units"]


def normalize_actions(params: types.Params, actions: chex.Array) -> chex.Array:
    """Bring actions [..., A] of the environment to the networks' +-1, or, discrete ones, to one-hot [..., A, n]."""
    if is_discrete(params):
        values = params["units"]["action_values"]
        shape = (*actions.shape, values.shape[-1])
        distance = jnp.broadcast_to(actions[..., None], shape) - jnp.broadcast_to(values, shape)
        return jnp.float32(jnp.abs(distance) < 0.5)  # the values are whole numbers
    center, scale = action_units(params, actions)
    return (actions - center) / scale


def _check_size(name, array, size):
    if array.ndim < 1 or array.shape[-1] != size:
        raise ValueError(f"{name} must be [..., {size}] as in training, got {array.shape}; use the same layout.")


def _check_batch(batch, config):
    size = len(batch.observations)
    expected = {
        "observations": (size, config.observation_dim),
        "actions": (size, config.action_dim),
        "rewards": (size,),
        "not_terminal": (size,),
        "next_observations": (size, config.observation_dim),
    }
    for name, shape in expected.items():
        if jnp.shape(batch[name]) != shape:
            raise ValueError(
                f"{name} must have shape {shape} for observation_dim={config.observation_dim} and "
                f"action_dim={config.action_dim}, got {jnp.shape(batch[name])}."
            )
