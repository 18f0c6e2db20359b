"""The Trajectory Transformer and its tokenizer as the model that `tree_search` searches: plans by Gumbel MuZero.

Environments reach nodes of different depth at the same time, so nothing is cached from node to node: a node of the tree
holds the tokens of the transitions before it, and expanding it reads them again, all at once. That is also faster than
to keep keys and values in the nodes: on one CPU core by a third for one environment, threefold for sixteen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from tt_jax import planning, sequence_planner, transformer, tree_search, types, window


class _State(NamedTuple):
    context: types.Context  # the real past and the planned transitions, the newest that fit
    observed: chex.Array | None  # [B, N] tokens of the real observation, at the root
    reading: Any = None  # of sequence_planner.Model, after the imagined observation of a node; never stored


def make_tree_plan_fn(
    *, config: transformer.TransformerConfig, plan_config: sequence_planner.PlanConfig, **functions
) -> Callable[..., types.PlanOutput]:
    """Return the plan_fn of `tree_search.tree_search`: plan_fn(params, rng_key [B], context, observation [B, N]).

    Arguments are those of `sequence_planner.make_plan_fn`: `beam_width` simulations of `num_expand` proposals per node,
    `horizon` deep. Plans have one step. Each node sees the newest `window[0]` - 1 whole transitions.

    Raises ValueError if that is none, if `unlikely_share` is to leave candidates out, if the window is longer than
    the model can read, or if the model has goals.
    """
    num_slots = plan_config.window[0] - 1
    if num_slots < 1:
        raise ValueError(f"window={plan_config.window} must have a max of at least 2 for a tree search.")
    if plan_config.unlikely_share:
        raise ValueError("a tree search cannot leave out candidates; set unlikely_share to 0.")
    plan_config = dataclasses.replace(plan_config, window=(num_slots + 1, num_slots))
    one_beam = dataclasses.replace(plan_config, beam_width=1, num_elites=1)
    window_config = sequence_planner.make_window_config(config, one_beam, num_transitions=2)
    model = sequence_planner.Model(window_config, one_beam, **functions)
    searched = model.functions(score_fn=model.score_fn)

    def propose(params, rng_key, state, step):
        reading = state.reading
        if reading is None:
            reading = model.read(params, state.context, state.observed)
        proposal, pending = searched["propose_fn"](params, rng_key, reading, step)
        return proposal, pending.tokens

    def advance(params, rng_key, state, candidates, beam, expansion, step):
        chosen = planning.take_candidates(candidates, beam, expansion)[:, 0]  # [B, D]
        before = window.keep_newest(state.context, num_slots - 1)
        short = before.replace(tokens=before.tokens[:, : num_slots - 1])
        read, _ = window.root(params.transformer, short, chosen[:, :-1], config=window_config)
        tokens = jax.vmap(lambda rows, length, new: rows.at[length].set(new))(before.tokens, before.length, chosen)
        return _State(
            context=types.Context(tokens=tokens, length=before.length + 1),
            observed=None,
            reading=model.observe(params, rng_key, read, chosen[:, -1:], step),
        )

    def plan_fn(params, rng_key, context, observation):
        context = window.keep_newest(context, num_slots)
        missing = max(num_slots - context.tokens.shape[1], 0)
        rows = jnp.pad(context.tokens[:, :num_slots], [(0, 0), (0, missing), (0, 0)])
        observed = sequence_planner.encode_observation(params, observation, spec=config.spec)
        return tree_search.tree_search(
            params,
            rng_key,
            _State(context=context.replace(tokens=rows), observed=observed),
            propose_fn=propose,
            advance_fn=advance,
            score_fn=searched["score_fn"],
            embed_fn=lambda state: _State(context=state.context, observed=None),
            horizon=plan_config.horizon,
            num_simulations=plan_config.beam_width,
            discount=plan_config.discount,
        )

    return plan_fn
