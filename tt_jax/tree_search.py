"""Gumbel MuZero over a model's own proposals, by the library mctx (Danihelka et al. 2022). Knows no transformer.

The model is that of `planning`, propose_fn and advance_fn, with one beam. What it proposes in a state are the actions
there: K samples of the policy, which therefore all have the same prior (Sampled MuZero, Hubert et al. 2021). A node of
the tree holds the model's state and what is pending in it; `embed_fn` may make that smaller.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mctx

from tt_jax import planning, types


class _Node(NamedTuple):
    state: Any  # of the model, as embed_fn made it; environments B = 1
    pending: Any  # of the model
    reward: chex.Array  # [K]
    value: chex.Array  # [K], after each candidate
    terminal: chex.Array  # [K] bool
    depth: chex.Array  # []


def tree_search(
    params: types.Params,
    rng_key: chex.PRNGKey,
    root: Any,
    *,
    propose_fn: Callable[..., tuple[types.Proposal, Any]],
    advance_fn: Callable[..., Any],
    score_fn: Callable[..., chex.Array] | None = None,
    embed_fn: Callable[[Any], Any] = lambda state: state,
    horizon: int,
    num_simulations: int,
    discount: float,
    gumbel_scale: float = 0.0,
) -> types.PlanOutput:
    """Search the tree of proposals with `num_simulations` expansions, `horizon` deep, and return the best first action.

    `rng_key` [B]; every leaf of `root` leads with [B], and each environment is searched on its own: the model's
    functions see B = 1 and W = 1 and, as `step`, the depth. `advance_fn` gets `embed_fn(state)` in place of the state.
    `score_fn` tells what a candidate is worth: it is asked with returns 0 at step 0, and what it holds beyond the
    predicted reward is the value after the candidate, unless the episode ends there. With gumbel_scale 0 nothing is
    drawn beside the model's samples; 1 is what training a policy by the search would need.

    The plan has one step, its tokens are the proposal's, and its scores [B, K] are the candidates' estimated returns
    after the search, descending, -inf for those never tried.
    Raises ValueError for a number below 1 or a discount outside of (0, 1].
    """
    if horizon < 1 or num_simulations < 1:
        raise ValueError(f"horizon={horizon} and num_simulations={num_simulations} must both be at least 1.")
    if not 0 < discount <= 1:
        raise ValueError(f"discount={discount} must be in (0, 1].")
    score_fn = score_fn or planning.score_by_value(discount)

    def visit(key, state, depth):
        """Propose in a state: return its node, the proposal and what its candidates are worth [K]."""
        proposal, pending = propose_fn(params, key[None], state, depth)
        chex.assert_shape([proposal.reward, proposal.value, proposal.terminal], (1, 1, None))
        worth = score_fn(params, jnp.zeros([1, 1], jnp.float32), proposal, 0)
        chex.assert_equal_shape([worth, proposal.reward])
        worth, reward = worth[0, 0], proposal.reward[0, 0]
        node = _Node(
            state=embed_fn(state),
            pending=pending,
            reward=reward,
            value=(worth - reward) / discount,
            terminal=proposal.terminal[0, 0],
            depth=depth,
        )
        return node, proposal, worth

    def expand(_, key, action, embedding):
        node = _remove_axis(embedding)
        advance_key, propose_key = jax.random.split(key)
        expansion = action[None]  # [1, 1]
        beam = jnp.zeros_like(expansion)
        state = advance_fn(params, advance_key[None], node.state, node.pending, beam, expansion, node.depth)
        child, _, worth = visit(propose_key, state, node.depth + 1)
        output = mctx.RecurrentFnOutput(
            reward=node.reward[action],
            discount=jnp.where(node.terminal[action], 0.0, discount),
            prior_logits=jnp.zeros_like(worth)[None],
            value=node.value[action],
        )
        return output, _add_axis(child)

    def plan_one(key, root):
        propose_key, search_key = jax.random.split(key)
        node, proposal, worth = visit(propose_key, _add_axis(root), jnp.int32(0))
        found = mctx.gumbel_muzero_policy(
            params=(),
            rng_key=search_key,
            root=mctx.RootFnOutput(
                prior_logits=jnp.zeros_like(worth)[None], value=jnp.mean(worth)[None], embedding=_add_axis(node)
            ),
            recurrent_fn=expand,
            num_simulations=num_simulations,
            max_depth=horizon,
            max_num_considered_actions=worth.shape[0],
            gumbel_scale=gumbel_scale,
        )
        summary = found.search_tree.summary()
        scores = jnp.where(summary.visit_counts[0] > 0, summary.qvalues[0], -jnp.inf)
        best = found.action[0]
        action, tokens = proposal.action[0, 0, best], proposal.tokens[0, 0, best]
        return types.PlanOutput(action=action, actions=action[None], tokens=tokens[None], scores=-jnp.sort(-scores))

    return jax.vmap(plan_one)(rng_key, root)


def _add_axis(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _remove_axis(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)
