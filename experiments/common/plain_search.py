"""Beam search with the Trajectory Transformer, written to be understood: nothing is cached.

One pass of `transformer.apply` over the whole window gives one token, as in the PyTorch reference; the rest is numpy.
It is the standard that `tt_jax.sequence_planner` must meet token for token, and what its speed is compared with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tt_jax import planning, tokenization, transformer, types


@functools.partial(jax.jit, static_argnames="config")
def _logits_at(params, tokens, places, goal=None, *, config):
    """Return the logits [rows, V + 1] after the token at `places` [rows] of `tokens` [rows, T]."""
    logits = transformer.apply(params, tokens, config=config, goal=goal)
    return jnp.take_along_axis(logits, places[:, None, None], axis=1)[:, 0]


def make_plan_fn(*, config, plan_config, score_fn=None, draw_fn=None):
    """Return plan_fn(params, rng_key [B], context, observation [B, N]), to be called without jit.

    As `sequence_planner.make_plan_fn`, but without a `draw_fn` other random numbers are drawn. `draw_fn` and `score_fn`
    get numpy arrays.
    """
    spec, plan = config.spec, plan_config
    score_fn = score_fn or planning.score_by_value(plan.discount)
    observation_dims = slice(spec.observation_dim)
    action_dims = slice(spec.observation_dim, spec.observation_dim + spec.action_dim)

    def plan_fn(params, rng_key, context, observation):
        next_token = functools.partial(
            _next_token, params.transformer, rng_key, config=config, plan=plan, draw_fn=draw_fn
        )
        discretizer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params.discretizer)
        env = np.arange(len(observation))[:, None]
        window, num_empty = _first_window(context, plan)
        first = tokenization.encode(discretizer, np.asarray(observation, np.float32), dims=observation_dims)
        begun = np.repeat(first[:, None], plan.beam_width, axis=1)  # [B, W, N]
        returns = np.zeros(begun.shape[:2], np.float32)
        ended = np.zeros(begun.shape[:2], bool)
        plans = np.zeros((*begun.shape[:2], 0, spec.transition_dim), np.int32)

        for step in range(plan.horizon):
            call_index = step * spec.transition_dim
            candidates, log_prob, reward, value = _expand(
                next_token, discretizer, window, num_empty, begun, call_index, spec=spec, plan=plan
            )
            is_stop = (candidates == spec.stop_token) & plan.stop_ends_episode
            over_before = ended[..., None] | is_stop[..., :-1].any(-1)  # before this step's reward
            over = over_before | is_stop[..., -1]
            proposal = types.Proposal(
                observation=tokenization.decode(discretizer, begun, dims=observation_dims),
                action=tokenization.decode(discretizer, candidates[..., action_dims], dims=action_dims),
                reward=np.where(over_before, 0.0, reward),
                value=np.where(over, 0.0, value),
                log_prob=log_prob,
                terminal=over,
                tokens=candidates,
            )
            scores = np.array(score_fn(params, returns, proposal, step))
            scores[np.isneginf(returns)] = -np.inf
            scores[ended] = -np.inf  # an ended beam goes on as one candidate
            scores[..., 0][ended] = returns[ended]
            returns = returns[..., None] + np.where(over_before, 0.0, plan.discount**step * reward)

            scores = scores.reshape(len(env), -1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, : plan.beam_width]
            beam, expansion = np.divmod(best, plan.num_expand)
            scores = np.take_along_axis(scores, best, axis=1)
            returns = np.where(np.isneginf(scores), -np.inf, returns[env, beam, expansion]).astype(np.float32)
            ended = (ended[..., None] | over)[env, beam, expansion]
            picked = candidates[env, beam, expansion][:, :, None]
            plans = np.concatenate([plans[env, beam], picked], axis=2)
            window, num_empty = _slide(np.concatenate([window[env, beam], picked], axis=2), num_empty, plan)

            if step + 1 < plan.horizon:
                begun = np.zeros((*begun.shape[:2], 0), np.int32)
                for index in range(spec.observation_dim):
                    call = call_index + spec.action_dim + 2 + index
                    filters = plan.observation_cdf, plan.observation_top_k
                    begun, _ = next_token(window, num_empty, begun, call, filters)
                ended = ended | ((begun == spec.stop_token).any(-1) & plan.stop_ends_episode)

        actions = tokenization.decode(discretizer, plans[:, 0][..., action_dims], dims=action_dims)
        return types.PlanOutput(action=actions[:, 0], actions=actions, tokens=plans[:, 0], scores=scores)

    return plan_fn


def _expand(next_token, discretizer, window, num_empty, begun, call_index, *, spec, plan):
    """Draw actions, reward and value after the observations `begun` [B, W, N]: whole transitions [B, W, K, D].

    Also return the log-probability of each one's action and the estimates of its reward and value, all [B, W, K].
    """

    def estimate(logits, dim):
        probs = _softmax(logits / np.float32(plan.temperature))[..., :-1]
        if plan.percentile < 0:
            return tokenization.expectation(discretizer, probs, dim=dim)
        return tokenization.percentile(discretizer, probs, plan.percentile, dim=dim)

    tokens, log_prob = np.repeat(begun[:, :, None], plan.num_expand, axis=2), 0.0
    for index in range(spec.action_dim):
        filters = plan.action_cdf, plan.action_top_k, plan.action_central
        tokens, logits = next_token(window[:, :, None], num_empty, tokens, call_index + index, filters)
        probs = _softmax(logits / np.float32(plan.temperature))
        log_prob = log_prob + np.log(np.take_along_axis(probs, tokens[..., -1:], axis=-1)[..., 0])
    filters, call_index = (plan.reward_cdf, plan.reward_top_k), call_index + spec.action_dim
    tokens, of_reward = next_token(window[:, :, None], num_empty, tokens, call_index, filters)
    tokens, of_value = next_token(window[:, :, None], num_empty, tokens, call_index + 1, filters)
    return tokens, log_prob, estimate(of_reward, -2), estimate(of_value, -1)


def _next_token(params, rng_key, window, num_empty, partial, call_index, filters, *, config, plan, draw_fn):
    """Draw what follows `window` [B, ..., S, D] and the begun transition `partial` [B, ..., d].

    The first `num_empty` [B] of the S places are empty; real tokens stand at positions from 0 on. Returns `partial`
    with the token, and the logits before the filters.
    """
    dim = config.spec.transition_dim
    window = np.broadcast_to(window, (*partial.shape[:-1], *window.shape[-2:]))
    sequence = np.concatenate([window.reshape(*partial.shape[:-1], -1), partial], axis=-1)
    padded = np.zeros((*partial.shape[:-1], plan.window[0] * dim - 1), np.int32)
    places = np.zeros(partial.shape[:-1], np.int32)
    for env, empty in enumerate(num_empty):
        real = sequence[env][..., empty * dim :]
        padded[env][..., : real.shape[-1]] = real
        places[env] = real.shape[-1] - 1
    logits = _logits_at(params, padded.reshape(-1, padded.shape[-1]), places.reshape(-1), config=config)
    logits = np.asarray(logits).reshape(*partial.shape[:-1], -1)
    filtered = _filtered(logits, plan, *filters)
    if draw_fn is not None:
        token = np.asarray(draw_fn(rng_key, filtered, call_index))
    elif filters[1] == 1:  # the most likely one alone is left
        token = np.argmax(filtered, axis=-1)
    else:
        keys = jax.vmap(jax.random.fold_in, (0, None))(rng_key, call_index)
        uniform = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, filtered.shape[1:-1]))(keys))
        mass = np.cumsum(_softmax(filtered), axis=-1)
        token = np.sum(mass <= uniform[..., None] * mass[..., -1:], axis=-1)
    return np.concatenate([partial, token[..., None]], axis=-1), logits


def _first_window(context, plan):
    """Return the context as [B, W, S, D], empty places first, and the number of these [B]."""
    tokens, length = np.asarray(context.tokens), np.asarray(context.length)
    num_slots = tokens.shape[1]
    window = np.stack([np.roll(rows, num_slots - n, axis=0) for rows, n in zip(tokens, length, strict=True)])
    return _slide(np.repeat(window[:, None], plan.beam_width, axis=1), num_slots - length, plan)


def _slide(window, num_empty, plan):
    """Drop the oldest places, empty ones first, if the window has become full."""
    num_slots, (window_max, window_keep) = window.shape[2], plan.window
    if num_slots < window_max:
        return window, num_empty
    return window[:, :, num_slots - window_keep :], np.maximum(num_empty - (num_slots - window_keep), 0)


def search_by_likelihood(params, context, observed, num_tokens, *, config, plan_config, goal=None):
    """Find the most likely `num_tokens` tokens after `observed` [N] in one environment, all in tokens.

    `context` [n, D] is the past in a buffer of `plan_config.context_transitions` places, of which the last n are
    filled; `goal` [N]. Returns tokens [W, num_tokens] and their log-likelihoods [W], as many as there are.
    """
    spec, plan = config.spec, plan_config
    window_max, window_keep = plan.window
    num_slots, dim = plan.context_transitions, spec.transition_dim
    num_empty = num_slots - len(context)
    dropped = max(num_slots - window_keep, 0) if num_slots >= window_max else 0  # places, from the oldest on
    filters = [(plan.observation_cdf, plan.observation_top_k)] * spec.observation_dim
    filters += [(plan.action_cdf, plan.action_top_k, plan.action_central)] * spec.action_dim
    filters += [(plan.reward_cdf, plan.reward_top_k)] * 2
    found, scores = np.asarray(observed)[None], np.zeros(1, np.float32)
    for _ in range(num_tokens):
        is_whole, done = found.shape[1] % dim == 0, found.shape[1] // dim
        if is_whole and num_slots + done - dropped == window_max:
            dropped += window_max - window_keep
        past = np.asarray(context, np.int32)[max(dropped - num_empty, 0) :].reshape(-1)
        planned = found[:, max(dropped - num_slots, 0) * dim :]
        sequence = np.concatenate([np.tile(past, (len(found), 1)), planned], axis=1)
        padded = np.zeros((plan.beam_width, window_max * dim - 1), np.int32)
        padded[: len(found), : sequence.shape[1]] = sequence
        places = np.full(len(padded), sequence.shape[1] - 1)
        goals = None if goal is None else np.tile(goal, (len(padded), 1))
        logits = np.asarray(_logits_at(params, padded, places, goals, config=config))[: len(found)]

        logits = _filtered(logits, plan, *filters[found.shape[1] % dim])
        with np.errstate(divide="ignore"):
            largest = logits.max(axis=-1, keepdims=True)
            log_probs = logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
        candidates = (scores[:, None] + log_probs).reshape(-1)
        best = np.argsort(-candidates, kind="stable")[: plan.beam_width]
        best = best[np.isfinite(candidates[best])]
        scores = candidates[best]
        beam, token = np.divmod(best, spec.num_bins + 1)
        found = np.concatenate([found[beam], token[:, None]], axis=1)
    return found[:, len(observed) :], scores


def _filtered(logits, plan, cdf, top_k, central=1.0):
    """Scale the logits by the temperature and leave out what the filters forbid."""
    logits = logits / np.float32(plan.temperature)
    if cdf:
        logits = _filter_cdf(logits, cdf)
    if top_k:
        logits = np.where(logits < np.sort(logits, axis=-1)[..., -top_k, None], -np.inf, logits)
    return _filter_central(logits, central) if central < 1 else logits


def _softmax(logits):
    unnormalised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=-1, keepdims=True)


def _filter_central(logits, share):
    """Cut the cumulated probabilities to the central share and take the logarithm of what each token has left."""
    mass = np.cumsum(_softmax(logits), axis=-1)
    edges = np.concatenate([np.zeros_like(mass[..., :1]), mass], axis=-1)
    with np.errstate(divide="ignore"):
        return np.log(np.diff(np.clip(edges, (1 - share) / 2, (1 + share) / 2), axis=-1))


def _filter_cdf(logits, threshold):
    """Floor the least likely tokens while their joint mass is below `threshold`, ties with the last of them too."""
    probs = _softmax(logits)
    ascending = np.sort(probs, axis=-1)
    num_below = np.sum(np.cumsum(ascending, axis=-1) < threshold, axis=-1, keepdims=True)
    cut = np.take_along_axis(ascending, np.maximum(num_below - 1, 0), axis=-1)
    return np.where((probs > cut) | (probs == ascending[..., -1:]), logits, np.float32(-1000.0))
