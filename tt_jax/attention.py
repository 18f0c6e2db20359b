"""What the attention of the Trajectory Transformer goes to: shares of it by kind and time, and masks that hide these.

A token asks (query) and is looked at (key); both stand in a window of T tokens, G goal tokens in front if the model has
goals. A token asks in order to predict the next one, so an action query is a token whose next one is an action.
"""

import chex
import jax.numpy as jnp
import numpy as np

from tt_jax import transformer

RELATIONS = ("near", "same_dimension", "target_dimension", "past_actions", "past_observations")
HIDDEN = ("older", "past_actions", "past_observations")


def relations(config: transformer.TransformerConfig, length: int) -> dict[str, np.ndarray]:
    """Return the pairs of query and key of each of `RELATIONS` in a window of `length` tokens, [G + T, G + T] bool.

    near               the key is of the query's transition or the one before it; queries with an older one to look at
    same_dimension     the key is of the query's dimension in an earlier transition
    target_dimension   the key is of the dimension that is predicted, in an earlier transition
    past_actions       the query predicts an action, the key is an action of an earlier transition
    past_observations  the same for observations

    Hidden keys are left out, and so are queries without a key that counts.
    """
    transition, dim, kind, visible = _places(config, length)
    next_dim = (dim + 1) % config.spec.transition_dim
    is_earlier = (transition[None] < transition[:, None]) & (transition[None] >= 0)
    is_old = is_earlier & (transition[None] < transition[:, None] - 1)
    first_action, after_actions = config.spec.observation_dim, config.spec.observation_dim + config.spec.action_dim
    asks_for_action = (first_action <= next_dim) & (next_dim < after_actions) & (transition >= 0)
    found = {
        "near": ~is_old & (transition[None] >= 0) & (is_old & visible).any(axis=1, keepdims=True),
        "same_dimension": is_earlier & (dim[None] == dim[:, None]),
        "target_dimension": is_earlier & (dim[None] == next_dim[:, None]),
        "past_actions": is_earlier & (kind[None] == "action") & asks_for_action[:, None],
        "past_observations": is_earlier & (kind[None] == "observation") & asks_for_action[:, None],
    }
    return {name: pairs & visible for name, pairs in found.items()}


def shares(weights: chex.Array, pairs: chex.Array) -> chex.Array:
    """Return the share [...] of attention weights [..., T, T] that goes to `pairs` [T, T], a mean over their queries.

    A query counts if it has a key in `pairs`; 0 where there is none.
    """
    num_queries = jnp.maximum(jnp.sum(jnp.any(pairs, axis=1)), 1)
    return jnp.einsum("...qk,qk->...", weights, jnp.asarray(pairs, weights.dtype)) / num_queries


def uniform(config: transformer.TransformerConfig, length: int) -> np.ndarray:
    """Return the weights [G + T, G + T] of attention that is equal over all keys that a query sees."""
    visible = transformer.visible_keys(config, length)
    return (visible / visible.sum(axis=1, keepdims=True)).astype(np.float32)


def masks(config: transformer.TransformerConfig, length: int) -> dict[str, np.ndarray]:
    """Return what is `visible` when something is hidden from all queries, [G + T, G + T] bool for each of `HIDDEN`.

    older              keys of transitions before the one before the query's
    past_actions       actions of transitions before the query's
    past_observations  observations of transitions before the query's

    Layers stack: what a layer hides, tokens between may have read one layer below.
    """
    transition, _, kind, visible = _places(config, length)
    is_earlier = (transition[None] < transition[:, None]) & (transition[None] >= 0)
    return {
        "older": visible & ~(is_earlier & (transition[None] < transition[:, None] - 1)),
        "past_actions": visible & ~(is_earlier & (kind[None] == "action")),
        "past_observations": visible & ~(is_earlier & (kind[None] == "observation")),
    }


def kinds(config: transformer.TransformerConfig, length: int) -> np.ndarray:
    """Return the kind [G + T] of each token: goal, observation, action, reward or value."""
    spec = config.spec
    of_dim = np.repeat(["observation", "action", "reward", "value"], [spec.observation_dim, spec.action_dim, 1, 1])
    num_goals = spec.observation_dim if config.goal_conditioned else 0
    return np.concatenate([np.repeat(["goal"], num_goals), of_dim[np.arange(length) % spec.transition_dim]])


def _places(config, length):
    """Return transition and dimension, both -1 for goals, kind, and the visible keys of each token in the window."""
    kind = kinds(config, length)
    index = np.arange(length - len(kind), length)
    transition = np.where(index < 0, -1, index // config.spec.transition_dim)
    dim = np.where(index < 0, -1, index % config.spec.transition_dim)
    return transition, dim, kind, transformer.visible_keys(config, length)
