"""Predictions far ahead without a look at what happens: any model's, rolled out, and measured against the real future.

A model takes part with one function,

    step_fn(params, rng_key [B], state, actions [B, A], next_state [B, N]) -> (state, Prediction)

which predicts what follows the given actions in W samples, or acts by itself, and says how likely it finds the real
next state, which must not enter its samples. Time is a `lax.scan`: cost is linear in the horizon, and what is kept per
step is a summary of the samples.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import densities, sampling, tokenization, types, window


@chex.dataclass(frozen=True)
class Future:
    """The H steps that really follow B starts; those beyond the end of an episode are for the caller to leave out."""

    actions: chex.Array  # [B, H, A] float32
    rewards: chex.Array  # [B, H] float32
    states: chex.Array  # [B, H, N] float32, after each action


@chex.dataclass(frozen=True)
class Prediction:
    """One step ahead."""

    states: chex.Array  # [B, W, N] float32
    rewards: chex.Array  # [B, W] float32
    log_density: chex.Array  # [B, N] float32, of each dimension of the real state under the mixture over the samples


@chex.dataclass(frozen=True)
class Measures:
    """What is kept of the predictions of every step."""

    error: chex.Array  # [B, H, N] float32, mean over the samples of their distances to the real state, in `scale`
    mean: chex.Array  # [B, H, N] float32, of the samples
    rewards: chex.Array  # [B, H] float32, mean over the samples
    log_density: chex.Array  # [B, H, N] float32
    samples: chex.Array  # [B, H, S, N] float32, the first S


def roll_out(
    params: Any,
    rng_key: chex.PRNGKey,
    state: Any,
    future: Future,
    *,
    step_fn: Callable[..., tuple[Any, Prediction]],
    scale: chex.Array,
    num_kept: int = 1,
) -> Measures:
    """Predict the H steps of `future` from the model's `state` on.

    `rng_key` [B] is a key per start, `scale` [N] > 0 the unit of errors, and S = `num_kept` samples are returned.
    """
    num_starts, horizon, state_dim = future.states.shape
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (1, 1, state_dim))

    def step(state, inputs):
        index, actions, real = inputs
        keys = jax.vmap(jax.random.fold_in, (0, None))(rng_key, index)
        state, found = step_fn(params, keys, state, actions, real)
        chex.assert_shape(found.states, (num_starts, None, state_dim))
        chex.assert_shape(found.log_density, (num_starts, state_dim))
        real = real[:, None]
        return state, Measures(
            error=jnp.mean(jnp.abs(found.states - real) / scale, axis=1),
            mean=jnp.mean(found.states, axis=1),
            rewards=jnp.mean(found.rewards, axis=1),
            log_density=found.log_density,
            samples=found.states[:, :num_kept],
        )

    steps = (jnp.arange(horizon), jnp.moveaxis(future.actions, 1, 0), jnp.moveaxis(future.states, 1, 0))
    _, measures = jax.lax.scan(step, state, steps)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), measures)


def energy_distance(predicted: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Return the energy distance of predicted and real states of n starts, and its standard error over the starts.

    `predicted` [n, S, N] are S samples for each start, `real` [n, N] what happened. 2 E|X - Y| - E|X - X'| - E|Y - Y'|
    (Szekely and Rizzo 2013) over pairs of different starts alone: 0 in the mean if the model is right, so it can be
    negative. The error is the jackknife's, sqrt(2) too wide where the model is right. n must be at least 3.
    """
    n, num_samples, _ = predicted.shape
    others = ~np.eye(n, dtype=bool)
    cross = np.zeros([n, n])
    for k in range(num_samples):
        cross += 2 * _distances(predicted[:, k], real) / num_samples
        for other in range(num_samples):
            cross -= _distances(predicted[:, k], predicted[:, other]) / num_samples**2
    cross -= _distances(real, real)
    cross = np.where(others, cross, 0.0)
    total = cross.sum()
    left_out = (total - cross.sum(axis=0) - cross.sum(axis=1)) / ((n - 1) * (n - 2))
    return total / (n * (n - 1)), float(np.sqrt((n - 1) * np.var(left_out)))


def _distances(a, b):
    return np.sqrt(np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T, 0.0))


# The transformer


@chex.dataclass(frozen=True)
class TokenModel:
    """The transformer with its tokenizer, as `transformer_step` wants them."""

    transformer: types.Params
    discretizer: tokenization.Discretizer
    cells: densities.Cells


class _Read(NamedTuple):
    window: window.Window
    logits: chex.Array  # [B, W, V + 1] of the next token, the first of an action


def transformer_root(
    params: TokenModel, context: types.Context, observed: chex.Array, *, config: window.WindowConfig
) -> _Read:
    """Read the past [B, C, D] and the present [B, N], int32 tokens; W = `config.num_beams` samples go on from there."""
    return _Read(*window.root(params.transformer, context, observed, config=config))


def transformer_step(
    params: TokenModel,
    rng_key: chex.PRNGKey,
    state: _Read,
    actions: chex.Array,
    next_state: chex.Array,
    *,
    config: window.WindowConfig,
    filters: sampling.Filters,
    own_actions: bool = False,
) -> tuple[_Read, Prediction]:
    """Draw the tokens of one transition and of the next observation, as `roll_out` wants it.

    Every token is drawn from what `filters` leave of the prediction: all for samples, the median or the likeliest one.
    With `own_actions` those given are not read. A real future goes on, so none of the samples ends: stop is left out.
    The log-density is that of the mixture over the samples of what is predicted given each one's own past.
    """
    spec = config.config.spec
    dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)
    given = tokenization.encode(params.discretizer, actions, dims=dims)

    def draw(carry, index):
        state, logits = carry
        logits = logits.at[..., spec.stop_token].set(-jnp.inf)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index), logits.shape[1:2]))(rng_key)
        token = _draw(logits, uniform, filters)
        if not own_actions:
            action = jax.lax.dynamic_index_in_dim(given, index, axis=1)  # [B, 1]; beyond the last, the last
            token = jnp.where(index < spec.action_dim, action, token)
        log_probs = jax.nn.log_softmax(logits[..., :-1], axis=-1)
        mixture = jax.nn.logsumexp(log_probs, axis=1) - math.log(log_probs.shape[1])  # [B, V]
        return window.append(params.transformer, state, token, config=config), (token, mixture)

    (grown, logits), (tokens, mixtures) = jax.lax.scan(
        draw, (state.window, state.logits), jnp.arange(spec.transition_dim)
    )
    reward = tokenization.decode(params.discretizer, tokens[spec.action_dim][..., None], dims=slice(-2, -1))[..., 0]
    states = jnp.moveaxis(tokens[spec.action_dim + 2 :], 0, -1)  # [B, W, N]
    mixtures = jnp.moveaxis(mixtures[spec.action_dim + 2 :], 0, 1)  # [B, N, V]
    observed = slice(spec.observation_dim)
    real = tokenization.encode(params.discretizer, next_state, dims=observed)
    columns = jnp.broadcast_to(jnp.arange(spec.observation_dim), real.shape)
    return _Read(grown, logits), Prediction(
        states=tokenization.decode(params.discretizer, states, dims=observed),
        rewards=reward,
        log_density=densities.log_density(params.cells, mixtures, real, dims=columns),
    )


def _draw(logits, uniform, filters):
    """Draw tokens [B, W] from logits [B, W, V + 1]."""
    if filters.top_k == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return sampling.categorical(sampling.filter_logits(logits, filters), uniform)
