"""Planners that draw sequences of actions themselves and improve them: MPPI and the cross-entropy method.

A model takes part with one function, which says what given actions are worth:

    evaluate_fn(params, rng_key [B], root, actions [B, W, H, A]) -> (scores [B, W], tokens [B, W, H, D])

from the state `root` on; the tokens are the predicted transitions, of any D, and -inf marks what must not be chosen.
`planning.sample_plans` makes such scores of a model that goes step by step. Nothing here knows a transformer.

Both planners hold a normal distribution of each action, mean and standard deviation [B, H, A], draw W candidates from
it, let them be scored, and move it towards the better ones, a few times. The caller gives the first distribution, say
the last plan, moved on by `shift`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from tt_jax import types


class _Found(NamedTuple):
    mean: chex.Array  # [B, H, A]
    std: chex.Array  # [B, H, A]
    best: chex.Array  # [B, H, A], of the last candidates
    tokens: chex.Array  # [B, H, D], of the best
    scores: chex.Array  # [B, W], of the last candidates


def mppi(
    params: types.Params,
    rng_key: chex.PRNGKey,
    root: Any,
    mean: chex.Array,
    std: chex.Array,
    bounds: tuple[chex.Numeric, chex.Numeric],
    *,
    temperature: float,
    **settings,
) -> types.PlanOutput:
    """Plan by model predictive path integral control (Williams et al. 2017, Information Theoretic MPC).

    The mean moves to the candidates' mean under weights exp(score / temperature), and is the plan in the end; `std`
    stays. The paper's own cost of leaving the mean is left out. The temperature is in the scores' units.

    `rng_key` [B]; `mean` and `std` [B, H, A]; `bounds` are the least and the greatest action, each a number or [A]. The
    settings are `evaluate_fn`, `num_candidates`, `num_iterations`, and the noise's `noise_exponent`, by default 0. One
    candidate is the mean itself; the others differ from it by noise as `colored_noise` makes it, and are clipped to the
    bounds. The plan's tokens are the best candidate's, its scores [B, W] the last candidates', descending.
    Raises ValueError for fewer than 2 candidates or 1 iteration, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive.")

    def weigh(scores):
        is_any = jnp.any(jnp.isfinite(scores), axis=-1, keepdims=True)
        return jax.nn.softmax(jnp.where(is_any, scores, 0.0) / temperature, axis=-1)

    found = _search(params, rng_key, root, mean, std, bounds, weigh_fn=weigh, refit=False, **settings)
    return _output(found.mean, found)


def cem(
    params: types.Params,
    rng_key: chex.PRNGKey,
    root: Any,
    mean: chex.Array,
    std: chex.Array,
    bounds: tuple[chex.Numeric, chex.Numeric],
    *,
    num_candidates: int,
    num_elites: int,
    **settings,
) -> types.PlanOutput:
    """Plan by the cross-entropy method (Rubinstein 1999; for control Pinneri et al. 2020, iCEM, arXiv 2008.06389).

    Mean and standard deviation become those of the `num_elites` best candidates. As in iCEM the mean is one of the
    candidates, the best of the iteration before another, and the plan is the best candidate of the last iteration: it
    scores no less than the first mean, and no less after more iterations, if scores are not drawn. Arguments and result
    are those of `mppi`.
    Raises ValueError for fewer than 2 candidates or 1 iteration, or elites beyond 1 to `num_candidates`.
    """
    if not 1 <= num_elites <= num_candidates:
        raise ValueError(f"num_elites={num_elites} must be between 1 and num_candidates={num_candidates}.")

    def weigh(scores):
        best, index = jax.lax.top_k(scores, num_elites)
        is_elite = jnp.isfinite(best).at[:, 0].set(True).astype(scores.dtype)
        weights = jax.vmap(lambda row, i, elite: row.at[i].set(elite))(jnp.zeros_like(scores), index, is_elite)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)

    settings |= {"num_candidates": num_candidates}
    found = _search(params, rng_key, root, mean, std, bounds, weigh_fn=weigh, refit=True, **settings)
    return _output(found.best, found)


def colored_noise(rng_key: chex.PRNGKey, shape: tuple[int, int], *, exponent: float) -> chex.Array:
    """Draw normal noise [H, A] of variance 1 whose power falls with frequency f as f^-exponent along H.

    White for 0, pink for 1, red for 2: the higher, the longer an action stays on one side (iCEM). Noise of
    the spectrum's lowest frequency stands for frequency 0, and the ends of the sequence are neighbours.
    """
    frequency = jnp.abs(jnp.fft.fftfreq(shape[0]))
    gain = jnp.maximum(frequency, 1 / shape[0]) ** (-exponent / 2)
    gain = gain / jnp.sqrt(jnp.mean(gain**2))  # of white noise, every frequency's share of the variance is 1 / H
    white = jax.random.normal(rng_key, shape)
    return jnp.fft.ifft(jnp.fft.fft(white, axis=0) * gain[:, None], axis=0).real


def shift(actions: chex.Array, *, by: int = 1) -> chex.Array:
    """Drop the first `by` actions of plans [B, H, A], which have been executed, and repeat the last."""
    return jnp.concatenate([actions[:, by:], jnp.repeat(actions[:, -1:], by, axis=1)], axis=1)


def _search(
    params,
    rng_key,
    root,
    mean,
    std,
    bounds,
    *,
    evaluate_fn: Callable[..., tuple[chex.Array, chex.Array]],
    weigh_fn: Callable[[chex.Array], chex.Array],
    refit: bool,
    num_candidates: int,
    num_iterations: int,
    noise_exponent: float = 0.0,
):
    """Move the distribution to the candidates' mean, and with `refit` its width to theirs, under weights [B, W]."""
    if num_candidates < 2 or num_iterations < 1:
        raise ValueError(
            f"num_candidates={num_candidates} must be at least 2 and num_iterations={num_iterations} at least 1."
        )
    num_envs, *shape = mean.shape
    size = (num_envs, num_candidates)
    low, high = (jnp.broadcast_to(jnp.asarray(bound, mean.dtype), (1, 1, 1, shape[-1])) for bound in bounds)

    def noise(key):
        keys = jax.random.split(key, num_candidates)
        return jax.vmap(lambda each: colored_noise(each, tuple(shape), exponent=noise_exponent))(keys)

    def improve(found, iteration):
        keys = jax.vmap(jax.random.fold_in, (0, None))(rng_key, iteration)
        noise_key, evaluate_key = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        actions = found.mean[:, None] + found.std[:, None] * jax.vmap(noise)(noise_key)  # [B, W, H, A]
        actions = actions.at[:, 0].set(found.mean)
        if refit:
            actions = actions.at[:, 1].set(jnp.where(iteration > 0, found.best, actions[:, 1]))
        actions = jnp.clip(actions, low, high)
        scores, tokens = evaluate_fn(params, evaluate_key, root, actions)
        chex.assert_shape(scores, size)
        chex.assert_shape(tokens, (*size, shape[0], None))

        weights = weigh_fn(scores)[..., None, None]
        mean = jnp.sum(weights * actions, axis=1)
        std = jnp.sqrt(jnp.sum(weights * (actions - mean[:, None]) ** 2, axis=1)) if refit else found.std
        best = jnp.argmax(scores, axis=1)
        best_actions, best_tokens = (jax.vmap(lambda row, i: row[i])(x, best) for x in (actions, tokens))
        return _Found(mean=mean, std=std, best=best_actions, tokens=best_tokens, scores=scores), None

    candidates = jax.ShapeDtypeStruct((*size, *shape), mean.dtype)
    scores, tokens = jax.eval_shape(evaluate_fn, params, rng_key, root, candidates)
    chex.assert_shape(tokens, (*size, shape[0], None))
    start = _Found(
        mean=mean,
        std=jnp.broadcast_to(std, mean.shape),
        best=mean,
        tokens=jnp.zeros(tokens.shape[:1] + tokens.shape[2:], tokens.dtype),
        scores=jnp.zeros(size, scores.dtype),
    )
    return jax.lax.scan(improve, start, jnp.arange(num_iterations))[0]


def _output(actions, found):
    scores = -jnp.sort(-found.scores, axis=-1)
    return types.PlanOutput(action=actions[:, 0], actions=actions, tokens=found.tokens, scores=scores)
