"""Planners over injected model functions: beam search (Trajectory Transformer, section 3.2), shooting, likelihood.

A model takes part with two functions (compare mctx):

    propose_fn(params, rng_key [B], state, step) -> (Proposal, pending)
        samples K actions for each of the W beams of `state` and predicts their reward and the value after them;
    advance_fn(params, rng_key [B], state, pending, beam [B, W], expansion [B, W], step) -> state
        keeps the picked candidates, candidate `expansion[b, w]` of beam `beam[b, w]`, and samples their next
        observations. `pending` is whatever propose_fn wants to hand over.

Since picking is told as indices, a model is free to keep what it remembers as a tree. `beam_plan` picks at every step;
`sample_plans` never does, and `shoot` only at the end. `likelihood_search` looks for the most likely tokens instead of
the best rewards and has its own two functions, of single tokens. Nothing here knows a transformer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from tt_jax import types


class _Beams(NamedTuple):
    state: Any  # of the model
    returns: chex.Array  # [B, W] discounted rewards so far; -inf marks a beam that does not exist
    ended: chex.Array  # [B, W] bool, the episode is over


class _Candidates(NamedTuple):
    proposal: types.Proposal
    pending: Any  # of the model
    scores: chex.Array  # [B, W, K]; -inf marks one that does not exist
    returns: chex.Array  # [B, W, K] discounted rewards up to this step
    ended: chex.Array  # [B, W, K] bool
    advance_key: chex.PRNGKey  # [B]


def score_by_value(discount: float) -> Callable[..., chex.Array]:
    """Return the score_fn of the paper: rewards so far, this step's, and the predicted return after it.

    It maps the returns [B, W] float32 and a Proposal to [B, W, K] float32; `discount` is per step, in [0, 1].
    """

    def score_fn(params, returns, proposal, step):
        del params
        return returns[..., None] + discount**step * (proposal.reward + discount * proposal.value)

    return score_fn


def score_by_q(q_fn: Callable[..., chex.Array], *, discount: float) -> Callable[..., chex.Array]:
    """Return the score_fn of a search that a Q-function guides: rewards before this step, and Q of this step.

    `q_fn(params, observation [B, W, 1, N], action [B, W, K, A]) -> [B, W, K]`, all float32. Q contains
    this step's reward, so the predicted one is not counted. The caller keeps the proposals' rewards in Q's units.
    """

    def score_fn(params, returns, proposal, step):
        q = q_fn(params, proposal.observation[:, :, None], proposal.action)
        return returns[..., None] + discount**step * q

    return score_fn


def favour_likely(
    propose_fn: Callable[..., tuple[types.Proposal, Any]],
    score_fn: Callable[..., chex.Array],
    *,
    weight: float,
    discount: float,
) -> tuple[Callable[..., tuple[types.Proposal, Any]], Callable[..., chex.Array]]:
    """Return a model's propose_fn and score_fn with `weight` times the log-probability of actions added to rewards.

    A plan is then worth its score, and the discounted log-probabilities of its actions, so that a search does not leave
    what the model has seen for a reward that it wrongly believes in. Divergence from the data's policy as a cost is
    that of KL control (Jaques et al. 2017, arXiv 1611.02796).
    """

    def propose(*arguments, **settings):
        proposal, pending = propose_fn(*arguments, **settings)
        return proposal.replace(reward=proposal.reward + weight * proposal.log_prob), pending

    def score(params, returns, proposal, step):  # whether or not the inner one reads the step's reward
        bonus = weight * proposal.log_prob
        inner = score_fn(params, returns, proposal.replace(reward=proposal.reward - bonus), step)
        return inner + discount**step * bonus

    return propose, score


def drop_unlikely(score_fn: Callable[..., chex.Array], *, share: float) -> Callable[..., chex.Array]:
    """Return a score_fn that leaves out, at each step, the `share` of an environment's candidates with the least likely
    actions; `share` is in [0, 1), and the likeliest one always stays.
    """

    def score(params, returns, proposal, step):
        is_live = jnp.isfinite(returns)[..., None]
        log_prob = jnp.where(is_live, proposal.log_prob, jnp.nan)
        least = jnp.nanquantile(log_prob, share, axis=(1, 2), keepdims=True)
        return jnp.where(log_prob < least, -jnp.inf, score_fn(params, returns, proposal, step))

    return score


def beam_plan(
    params: types.Params,
    rng_key: chex.PRNGKey,
    root: Any,
    *,
    propose_fn: Callable[..., tuple[types.Proposal, Any]],
    advance_fn: Callable[..., Any],
    score_fn: Callable[..., chex.Array] | None = None,
    horizon: int,
    beam_width: int,
    num_expand: int,
    discount: float,
    num_elites: int = 1,
    keep_beams: bool = False,
) -> types.PlanOutput:
    """Search for the action sequence with the best score and return it, or the mean of the `num_elites` best.

    `rng_key` [B] holds a key per environment, from which everything drawn for it comes; `root` is the model's state at
    step 0, with all beams at the root. Of the W * K candidates of a step the W with the best
    `score_fn(params, returns [B, W], proposal, step) -> [B, W, K]` go on, the lower index first among equals; the
    default is `score_by_value(discount)`. `returns` are the rewards before this step, discounted per step in [0, 1].
    A beam whose episode has ended contributes one candidate, which keeps its return, and gets no further reward.
    With `keep_beams` the output holds the tokens of all final beams; those scored -inf stand for nothing.
    Raises ValueError for a number below 1, or more elites than beams.
    """
    if horizon < 1 or beam_width < 1 or num_expand < 1:
        raise ValueError(
            f"horizon={horizon}, beam_width={beam_width} and num_expand={num_expand} must all be at least 1."
        )
    if not 1 <= num_elites <= beam_width:
        raise ValueError(f"num_elites={num_elites} must be between 1 and beam_width={beam_width}.")
    score_fn = score_fn or score_by_value(discount)
    num_envs = rng_key.shape[0]
    size = (num_envs, beam_width)

    def search_step(beams, step):
        found = _propose(params, rng_key, beams, step, propose_fn, score_fn, num_expand=num_expand, discount=discount)
        best_scores, best = jax.lax.top_k(found.scores.reshape(num_envs, -1), beam_width)  # of [B, W * K]
        beam, expansion = best // num_expand, best % num_expand

        def pick(x):
            return take_candidates(x, beam, expansion)

        beams = _Beams(
            state=_advance(params, beams, found, beam, expansion, step, advance_fn, horizon=horizon),
            returns=jnp.where(jnp.isfinite(best_scores), pick(found.returns), -jnp.inf),
            ended=pick(found.ended),
        )
        return beams, (beam, pick(found.proposal.action), pick(found.proposal.tokens), best_scores)

    beams = _Beams(state=root, returns=jnp.zeros(size, jnp.float32), ended=jnp.zeros(size, bool))
    _, (beam, action, tokens, scores) = jax.lax.scan(search_step, beams, jnp.arange(horizon))

    is_plan = jnp.isfinite(scores[-1][:, :num_elites, None]).at[:, 0].set(True)  # with few candidates there are fewer

    num_traced = beam_width if keep_beams else num_elites
    num_kept = beam_width if keep_beams else 1

    def trace_back(index, picked):  # index [B, num_traced]: where the best plans stood among the beams after a step
        step_beam, step_action, step_tokens = picked
        mean_action = jnp.mean(take_beams(step_action, index[:, :num_elites]), axis=1, where=is_plan)
        return take_beams(step_beam, index), (mean_action, take_beams(step_tokens, index)[:, :num_kept])

    best = jnp.broadcast_to(jnp.arange(num_traced, dtype=beam.dtype), (num_envs, num_traced))
    _, (actions, tokens) = jax.lax.scan(trace_back, best, (beam, action, tokens), reverse=True)
    actions, beams = actions.swapaxes(0, 1), jnp.moveaxis(tokens, 0, 2)  # [B, H, A], [B, num_kept, H, D]
    return types.PlanOutput(
        action=actions[:, 0],
        actions=actions,
        tokens=beams[:, 0],
        scores=scores[-1],
        beams=beams if keep_beams else None,
    )


def sample_plans(
    params: types.Params,
    rng_key: chex.PRNGKey,
    root: Any,
    *,
    propose_fn: Callable[..., tuple[types.Proposal, Any]],
    advance_fn: Callable[..., Any],
    score_fn: Callable[..., chex.Array] | None = None,
    horizon: int,
    num_plans: int,
    discount: float,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Follow each of W = `num_plans` beams from the root to the horizon and score it there; drop and copy none.

    Takes what `beam_plan` takes, but `propose_fn` makes one candidate per beam (K = 1). Since beam w stays beam w, it
    may also propose actions that the caller has set, and so tell what they are worth. A beam's score is that of its
    last step, or its return if the episode ended before; -inf at any step is final.
    Returns scores [B, W], actions [B, W, H, A] and tokens [B, W, H, D].
    """
    if horizon < 1 or num_plans < 1:
        raise ValueError(f"horizon={horizon} and num_plans={num_plans} must both be at least 1.")
    score_fn = score_fn or score_by_value(discount)
    size = (rng_key.shape[0], num_plans)
    itself = jnp.broadcast_to(jnp.arange(num_plans)[None], size)

    def follow_step(beams, step):
        found = _propose(params, rng_key, beams, step, propose_fn, score_fn, num_expand=1, discount=discount)
        first = jnp.zeros_like(itself)
        state = _advance(params, beams, found, itself, first, step, advance_fn, horizon=horizon)
        scores = found.scores[..., 0]
        returns = jnp.where(jnp.isfinite(scores), found.returns[..., 0], -jnp.inf)
        beams = _Beams(state=state, returns=returns, ended=found.ended[..., 0])
        return beams, (scores, found.proposal.action[:, :, 0], found.proposal.tokens[:, :, 0])

    beams = _Beams(state=root, returns=jnp.zeros(size, jnp.float32), ended=jnp.zeros(size, bool))
    _, (scores, actions, tokens) = jax.lax.scan(follow_step, beams, jnp.arange(horizon))
    return scores[-1], jnp.moveaxis(actions, 0, 2), jnp.moveaxis(tokens, 0, 2)


def shoot(
    params: types.Params,
    rng_key: chex.PRNGKey,
    root: Any,
    *,
    propose_fn: Callable[..., tuple[types.Proposal, Any]],
    advance_fn: Callable[..., Any],
    score_fn: Callable[..., chex.Array] | None = None,
    horizon: int,
    num_plans: int,
    discount: float,
    num_elites: int = 1,
) -> types.PlanOutput:
    """Sample W = `num_plans` plans from the model and return the best, or the mean of the `num_elites` best.

    Random shooting (Nagabandi et al. 2018, arXiv 1708.02596) that draws the model's own actions instead of uniform
    ones: `beam_plan` with one candidate per beam, which drops none and picks at the end.
    Raises ValueError for a number below 1, or more elites than plans.
    """
    if not 1 <= num_elites <= num_plans:
        raise ValueError(f"num_elites={num_elites} must be between 1 and num_plans={num_plans}.")
    scores, actions, tokens = sample_plans(
        params,
        rng_key,
        root,
        propose_fn=propose_fn,
        advance_fn=advance_fn,
        score_fn=score_fn,
        horizon=horizon,
        num_plans=num_plans,
        discount=discount,
    )
    scores, order = jax.lax.top_k(scores, num_plans)
    elites = order[:, :num_elites]
    is_plan = jnp.isfinite(scores[:, :num_elites, None, None]).at[:, 0].set(True)
    actions = jnp.mean(take_beams(actions, elites), axis=1, where=is_plan)  # [B, H, A]
    tokens = take_beams(tokens, elites[:, :1])[:, 0]
    return types.PlanOutput(action=actions[:, 0], actions=actions, tokens=tokens, scores=scores)


def _propose(params, rng_key, beams, step, propose_fn, score_fn, *, num_expand, discount):
    """Let the model propose K candidates per beam and score them; one that does not exist is scored -inf."""
    size = (*beams.returns.shape, num_expand)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(rng_key, step)
    propose_key, advance_key = jnp.moveaxis(jax.vmap(jax.random.split)(step_keys), 1, 0)
    proposal, pending = propose_fn(params, propose_key, beams.state, step)
    chex.assert_shape([proposal.reward, proposal.value, proposal.terminal], size)
    scores = score_fn(params, beams.returns, proposal, step)
    chex.assert_shape(scores, size)
    ended = beams.ended[..., None]
    kept_as_is = jnp.where(jnp.arange(num_expand) == 0, beams.returns[..., None], -jnp.inf)
    scores = jnp.where(ended, kept_as_is, jnp.where(jnp.isfinite(beams.returns)[..., None], scores, -jnp.inf))
    returns = beams.returns[..., None] + jnp.where(ended, 0.0, discount**step * proposal.reward)
    return _Candidates(proposal, pending, scores, returns, ended | proposal.terminal, advance_key)


def _advance(params, beams, found, beam, expansion, step, advance_fn, *, horizon):
    """Return the model's state after the picked candidates, unless no step follows."""
    if horizon == 1:  # do not even compile one
        return beams.state
    return jax.lax.cond(
        step + 1 < horizon,
        lambda: advance_fn(params, found.advance_key, beams.state, found.pending, beam, expansion, step),
        lambda: beams.state,
    )


class _Hypotheses(NamedTuple):
    state: Any  # of the model
    tokens: chex.Array  # [B, W, num_tokens] int32, those found so far first
    scores: chex.Array  # [B, W] float32 log-likelihoods, descending; -inf marks one that does not exist


def likelihood_search(
    params: types.Params,
    root: Any,
    *,
    next_logits_fn: Callable[..., chex.Array],
    extend_fn: Callable[..., Any],
    num_tokens: int,
    beam_width: int,
) -> tuple[chex.Array, chex.Array]:
    """Search for the most likely next `num_tokens` tokens (Trajectory Transformer, section 3.2, imitation).

    `next_logits_fn(params, state, step) -> [B, W, V + 1]` gives the logits of each beam's next token, after temperature
    and filters; their log-softmax is added to the score of the beam, and the W best of all W * (V + 1) candidates go
    on, the lower index first among equals. Only logits of minus infinity are no candidates.
    `extend_fn(params, state, beam [B, W], token [B, W], step) -> state` appends `token` to the picked beams. `root` is
    the model's state with all beams at the same prefix, whose score is 0. Nothing is special about the stop token.

    Returns tokens [B, W, num_tokens] int32 and log-likelihoods [B, W] float32, most likely first; -inf marks rows that
    stand for nothing, where there were fewer than W candidates.
    """
    if num_tokens < 1 or beam_width < 1:
        raise ValueError(f"num_tokens={num_tokens} and beam_width={beam_width} must both be at least 1.")
    num_envs = jax.eval_shape(next_logits_fn, params, root, jnp.int32(0)).shape[0]

    def search_step(beams, step):
        logits = next_logits_fn(params, beams.state, step)
        chex.assert_shape(logits, (num_envs, beam_width, None))
        candidates = beams.scores[..., None] + jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        scores, best = jax.lax.top_k(candidates.reshape(num_envs, -1), beam_width)  # of [B, W * (V + 1)]
        beam, token = best // logits.shape[-1], best % logits.shape[-1]
        tokens = take_beams(beams.tokens, beam).at[:, :, step].set(token)
        state = jax.lax.cond(
            step + 1 < num_tokens, lambda: extend_fn(params, beams.state, beam, token, step), lambda: beams.state
        )
        return _Hypotheses(state=state, tokens=tokens, scores=scores), None

    is_first = jnp.arange(beam_width)[None] == 0
    scores = jnp.broadcast_to(jnp.where(is_first, 0.0, -jnp.inf), (num_envs, beam_width))
    tokens = jnp.zeros([num_envs, beam_width, num_tokens], jnp.int32)
    beams = _Hypotheses(state=root, tokens=tokens, scores=scores)
    beams, _ = jax.lax.scan(search_step, beams, jnp.arange(num_tokens))
    return beams.tokens, beams.scores


def take_beams(x: chex.Array, beam: chex.Array) -> chex.Array:
    """Gather [B, W, ...] at `beam` [B, W'] into [B, W', ...]."""
    return jax.vmap(lambda row, index: row[index])(x, beam)


def take_candidates(x: chex.Array, beam: chex.Array, expansion: chex.Array) -> chex.Array:
    """Gather [B, W, K, ...] at `beam` and `expansion` [B, W'] into [B, W', ...]."""
    return jax.vmap(lambda row, i, k: row[i, k])(x, beam, expansion)
