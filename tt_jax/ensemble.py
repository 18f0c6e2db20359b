"""Single-step models of the dynamics: PETS' ensembles of probabilistic networks, and a deterministic one.

Chua et al. 2018 (arXiv 1805.12114). A network predicts the change of the state and the reward from state and action,
all in standard deviations of the data, as a Gaussian with a variance of its own for each dimension, softly bounded by
learned bounds. Members differ in their first weights and in their bootstrap sample of the data, and each keeps its best
weights by the loss on transitions that are held out from training. All members are one program.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tt_jax import data_parallel, networks, open_loop, types

_BOUND_WEIGHT = 0.01  # of the width between the bounds of the variance in the loss, as in PETS
_LEAST_VARIANCE = 1e-6  # of a deterministic network, in squared standard deviations of the data


@dataclasses.dataclass(frozen=True)
class EnsembleConfig:
    """Static settings of the networks and of their optimizer."""

    observation_dim: int  # N
    action_dim: int  # A
    num_members: int = 5  # M, networks
    hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # widths of the hidden layers
    probabilistic: bool = True  # False: squared errors; the variance is theirs on the validation transitions
    learning_rate: float = 1e-3  # at first; it falls to 0 as a cosine
    weight_decay: float = 5e-5  # of half the squared kernels in the loss, about PETS' mean over layers
    validate_every: int = 200  # updates between the losses by which the best weights are found

    def __post_init__(self):
        positive = ("num_members", "hidden_dims", "learning_rate", "validate_every")
        types.check_ranges(self, positive=positive, not_negative=("weight_decay",))


@dataclasses.dataclass(frozen=True)
class EnsembleTrainConfig:
    """Static settings of a training run."""

    num_steps: int = 40_000  # updates
    batch_size: int = 256  # transitions per update and member over all devices
    steps_per_call: int = 1000  # updates in one compiled call
    log_every: int = 1000  # updates
    eval_every: int = 5000  # updates, a multiple of log_every; also at the end
    checkpoint_every: int = 5000  # updates; also at the end
    keep_checkpoints: int = 1  # the newest

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"ensemble_train.{field.name}={getattr(self, field.name)} must be at least 1.")


@chex.dataclass(frozen=True)
class EnsembleData:
    """Transitions to learn from, and those by which the best weights are found."""

    train: types.Transitions
    validation: types.Transitions


@chex.dataclass(frozen=True)
class EnsembleState:
    """Everything that an update changes."""

    params: types.Params  # {"members": [M, ...] each, "units": see `units`}, those last learned
    best: types.Params  # those with the least loss on the validation transitions, in all of `params`
    best_loss: chex.Array  # [M] float32
    opt_state: optax.OptState
    step: chex.Array  # [] int32, updates done


class Network(nn.Module):
    """A Gaussian for each of the changes of N dimensions and the reward, from N + A inputs of unit variance."""

    config: EnsembleConfig

    @nn.compact
    def __call__(self, x: chex.Array) -> tuple[chex.Array, chex.Array]:
        """Map x [..., N + A] to mean and logarithm of the variance [..., N + 1]."""
        size = self.config.observation_dim + 1
        mlp = networks.MLP((*self.config.hidden_dims, size * (2 if self.config.probabilistic else 1)), nn.swish)
        if not self.config.probabilistic:
            mean, log_var = mlp(x), self.param("log_var", nn.initializers.zeros, (size,))
            return mean, jnp.broadcast_to(log_var.reshape((1,) * (mean.ndim - 1) + (size,)), mean.shape)
        mean, log_var = jnp.split(mlp(x), 2, axis=-1)
        shape = (1,) * (mean.ndim - 1) + (size,)
        highest = self.param("max_log_var", nn.initializers.constant(0.5), (size,)).reshape(shape)
        lowest = self.param("min_log_var", nn.initializers.constant(-10.0), (size,)).reshape(shape)
        log_var = highest - nn.softplus(highest - log_var)
        return mean, lowest + nn.softplus(log_var - lowest)


def units(data: types.Transitions) -> types.Params:
    """Return centers and scales of the inputs [N + A] and of the changes and rewards [N + 1], from host transitions.

    A column that does not vary has scale 1.
    """

    def of(columns):
        columns = np.concatenate(columns, axis=1, dtype=np.float64)
        std = columns.std(axis=0)
        scale = np.where(std > 1e-8 * np.abs(columns).max(axis=0, initial=1e-30), std, 1.0)
        return {"center": columns.mean(axis=0).astype(np.float32), "scale": scale.astype(np.float32)}

    change = data.next_observations - data.observations
    return {"input": of([data.observations, data.actions]), "output": of([change, data.rewards[:, None]])}


def init(rng_key: chex.PRNGKey, *, config: EnsembleConfig, units: types.Params, num_steps: int) -> EnsembleState:
    """Return the state before the first of `num_steps` updates."""
    inputs = jnp.zeros([1, config.observation_dim + config.action_dim])
    keys = jax.random.split(rng_key, config.num_members)
    members = jax.vmap(lambda key: Network(config).init(key, inputs)["params"])(keys)
    params = {"members": members, "units": jax.tree.map(jnp.asarray, units)}
    return EnsembleState(
        params=params,
        best=jax.tree.map(jnp.copy, params),
        best_loss=jnp.full([config.num_members], jnp.inf),
        opt_state=_optimizer(config, num_steps).init(members),
        step=jnp.zeros([], jnp.int32),
    )


def _optimizer(config, num_steps):
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))


def predict(
    params: types.Params, observations: chex.Array, actions: chex.Array, *, config: EnsembleConfig
) -> tuple[chex.Array, chex.Array]:
    """Predict next observation and reward for each member's [M, n, N] and [M, n, A]: mean and deviation [M, n, N + 1].

    In the units of the data.
    """
    mean, log_var = _apply(params, observations, actions, config)
    center, scale = (_row(params["units"]["output"][name], mean) for name in ("center", "scale"))
    before = jnp.pad(observations, [(0, 0), (0, 0), (0, 1)])  # the reward is no change
    return before + center + scale * mean, scale * jnp.exp(0.5 * log_var)


def _apply(params, observations, actions, config):
    inputs = jnp.concatenate([observations, actions], axis=-1)
    inputs = _standardize(inputs, params["units"]["input"])
    return jax.vmap(lambda member, x: Network(config).apply({"params": member}, x))(params["members"], inputs)


def _standardize(x, unit):
    return (x - _row(unit["center"], x)) / _row(unit["scale"], x)


def _row(values, like):
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


def losses(
    params: types.Params, batch: types.Transitions, *, config: EnsembleConfig
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Return what each member learns from on its transitions [M, n, ...], its score, and its squared errors [M, N + 1].

    Both losses [M] are means over dimensions, in standard deviations of the data. The score leaves out weights and
    bounds: the negative log-likelihood in nats up to a constant, or half the squared error of deterministic networks.
    """
    mean, log_var = _apply(params, batch.observations, batch.actions, config)
    outputs = jnp.concatenate([batch.next_observations - batch.observations, batch.rewards[..., None]], axis=-1)
    squares = jnp.square(mean - _standardize(outputs, params["units"]["output"]))
    members = params["members"]
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(members) if path[-1].key == "kernel"]
    loss = 0.5 * config.weight_decay * sum(jnp.sum(jnp.square(leaf), axis=(1, 2)) for leaf in kernels)
    score = 0.5 * jnp.mean(squares, axis=(1, 2))
    if config.probabilistic:
        score = 0.5 * jnp.mean(squares * jnp.exp(-log_var) + log_var, axis=(1, 2))
        loss += _BOUND_WEIGHT * jnp.sum(members["max_log_var"] - members["min_log_var"], axis=-1)
    return loss + score, score, jnp.mean(squares, axis=1)


def make_train_fn(
    *, config: EnsembleConfig, train_config: EnsembleTrainConfig, num_transitions: int
) -> Callable[..., tuple[EnsembleState, dict[str, chex.Array]]]:
    """Return the data-parallel train_fn(state, data: EnsembleData, seed, num_steps) -> (state, metrics).

    As `training.make_train_fn`. Each member draws from its bootstrap sample of the `num_transitions`, which depends on
    the seed alone. Raises ValueError if the batch cannot be shared equally.
    """
    local_size = data_parallel.share_per_device(train_config.batch_size, flag="ensemble_train.batch_size")
    optimizer = _optimizer(config, train_config.num_steps)

    def train(state, data, seed, num_steps):
        first = jax.lax.axis_index(data_parallel.AXIS) * local_size

        def one_step(state):
            drawn = _draw_rows(seed, state.step, config.num_members, train_config.batch_size, num_transitions)
            drawn = jax.lax.dynamic_slice_in_dim(drawn, first, local_size, axis=1)
            batch = jax.tree.map(lambda leaf: leaf[drawn], data.train)
            return _update(state, batch, data.validation, optimizer, config, train_config.num_steps)

        return data_parallel.run_steps(one_step, state, num_steps, max_steps=train_config.steps_per_call)

    return data_parallel.over_devices(train, donate_argnums=0)


def _draw_rows(seed, step, num_members, batch_size, num_transitions):
    """Draw a batch [M, n] of rows: places in the members' bootstrap samples, each of which stands for a random row."""
    root = jax.random.key(seed)
    members = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(root, 0), jnp.arange(num_members))
    step_key = jax.random.fold_in(jax.random.fold_in(root, 1), step)
    places = jax.random.randint(step_key, (num_members, batch_size), 0, num_transitions)

    def row(member, place):
        return jax.random.randint(jax.random.fold_in(member, place), (), 0, num_transitions)

    return jax.vmap(jax.vmap(row, (None, 0)))(members, places)


def _update(state, batch, validation, optimizer, config, num_steps):
    def total(members):
        loss, score, _ = losses(state.params | {"members": members}, batch, config=config)
        return jnp.sum(loss), score

    grads, score = jax.grad(total, has_aux=True)(state.params["members"])
    grads, score = jax.lax.pmean((grads, score), data_parallel.AXIS)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    params = state.params | {"members": optax.apply_updates(state.params["members"], updates)}
    state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)

    def validate():
        every = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.num_members, *leaf.shape)), validation)
        _, found, squares = losses(params, every, config=config)
        is_better, members = found < state.best_loss, params["members"]
        if not config.probabilistic:
            members = members | {"log_var": jnp.log(jnp.maximum(squares, _LEAST_VARIANCE))}

        def keep(new, old):
            return jnp.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        members = jax.tree.map(keep, members, state.best["members"])
        return state.best | {"members": members}, jnp.where(is_better, found, state.best_loss)

    is_due = (state.step % config.validate_every == 0) | (state.step == num_steps)
    best, best_loss = jax.lax.cond(is_due, validate, lambda: (state.best, state.best_loss))
    metrics = {
        "loss": jnp.mean(score),
        "best_validation_loss": jnp.mean(jnp.where(best_loss < jnp.inf, best_loss, 0.0)),
    }
    return state.replace(best=best, best_loss=best_loss), metrics


# Open loop


class Particles(NamedTuple):
    """W samples of each start; the member of sample w is the (w // (W / M))-th."""

    states: chex.Array  # [B, W, N]


def root(observations: chex.Array, *, num_samples: int, config: EnsembleConfig) -> Particles:
    """Start W = `num_samples` samples at each of `observations` [B, N]; raises ValueError unless M divides W."""
    if num_samples % config.num_members:
        raise ValueError(f"{num_samples} samples must be a multiple of the {config.num_members} members.")
    return Particles(jnp.repeat(observations[:, None], num_samples, axis=1))


def step(
    params: types.Params,
    rng_key: chex.PRNGKey,
    state: Particles,
    actions: chex.Array,
    next_state: chex.Array,
    *,
    config: EnsembleConfig,
    resample: bool,
    bounds: tuple[chex.Array, chex.Array] | None = None,
) -> tuple[Particles, open_loop.Prediction]:
    """Predict one step, as `open_loop.roll_out` wants it: PETS' trajectory sampling.

    A sample has the same member all the time (TS-infinity), or with `resample` a new one at every step (TS-1), drawn
    such that all members have equally many samples. A deterministic network's samples are its means. States are kept
    within `bounds` ([N] each), such as those of the data; without them a model may go anywhere.
    """
    num_starts, num_samples, state_dim = state.states.shape
    shuffle_key, noise_key = jnp.moveaxis(jax.vmap(jax.random.split)(rng_key), 1, 0)
    states = state.states
    if resample:
        states = jax.vmap(jax.random.permutation)(shuffle_key, states)
    acted = jnp.broadcast_to(actions[:, None], (num_starts, num_samples, actions.shape[-1]))
    by_member = (_by_member(leaf, config.num_members) for leaf in (states, acted))
    mean, std = (_by_start(leaf, num_starts) for leaf in predict(params, *by_member, config=config))
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(noise_key)
    drawn = mean + std * noise if config.probabilistic else mean
    states = drawn[..., :state_dim]
    low, high = bounds or (jnp.full([state_dim], -_FAR), jnp.full([state_dim], _FAR))
    states = jnp.clip(states, _row(low, states), _row(high, states))
    distance = (next_state[:, None] - mean[..., :state_dim]) / std[..., :state_dim]
    log_densities = -0.5 * (distance**2 + math.log(2 * math.pi)) - jnp.log(std[..., :state_dim])
    return Particles(states), open_loop.Prediction(
        states=states,
        rewards=drawn[..., -1],
        log_density=jax.nn.logsumexp(log_densities, axis=1) - math.log(num_samples),
    )


_FAR = 1e6  # where a diverging prediction stops, so that it can be written down


def _by_member(leaf, num_members):
    """Turn [B, W, ...] into [M, B * W / M, ...]."""
    split = leaf.reshape(leaf.shape[0], num_members, -1, leaf.shape[-1])
    return jnp.moveaxis(split, 1, 0).reshape(num_members, -1, leaf.shape[-1])


def _by_start(leaf, num_starts):
    """Invert `_by_member`."""
    split = leaf.reshape(leaf.shape[0], num_starts, -1, leaf.shape[-1])
    return jnp.moveaxis(split, 0, 1).reshape(num_starts, -1, leaf.shape[-1])
