"""Behaviour cloning: the policy that makes the data's actions, all or those of the best episodes, most likely.

The policy is that of IQL, a Gaussian whose mean depends on the observation or, of discrete actions, a categorical
distribution; parameters are {"actor", "units"} of `iql`.
"""

import dataclasses
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tt_jax import iql, learners, rollouts, trajectories, types

TRAIN = learners.TrainConfig(num_steps=50_000, log_every=1_000, eval_every=10_000, checkpoint_every=10_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static settings."""

    observation_dim: int  # N
    action_dim: int  # A
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    learning_rate: float = 3e-4  # of Adam
    best_share: float = 1.0  # of the episodes, by return, that are imitated

    def __post_init__(self):
        if not 0 < self.best_share <= 1:
            raise ValueError(f"best_share={self.best_share} must be in (0, 1].")
        types.check_ranges(self, positive=("hidden_dims", "learning_rate"))


def prepare(data: trajectories.Trajectories, settings: dict) -> tuple[Config, types.Params, types.Transitions]:
    """Return the configuration with the data's sizes, the units, and what is learned from."""
    config = Config(observation_dim=data.observations.shape[1], action_dim=data.actions.shape[1], **settings)
    return config, *standardized_transitions(best_episodes(data, share=config.best_share))


def best_episodes(data: trajectories.Trajectories, *, share: float) -> trajectories.Trajectories:
    """Keep the `share` of the episodes with the largest returns, at least one, in their order; the first of equals."""
    returns = trajectories.returns(data)
    num_kept = max(1, round(share * len(returns)))
    return trajectories.select(data, np.sort(np.argsort(-returns, kind="stable")[:num_kept]))


def standardized_transitions(
    data: trajectories.Trajectories, *, reward_units: str = "raw"
) -> tuple[types.Params, types.Transitions]:
    """Cut episodes into steps, and measure `iql.fit_units` on them: every dimension has mean 0 and deviation 1."""
    steps = trajectories.transitions(data)
    config = iql.IQLConfig(
        observation_dim=steps.observations.shape[1],
        action_dim=steps.actions.shape[1],
        normalize_observations=True,
        reward_units=reward_units,
    )
    return iql.fit_units(steps, config=config, **trajectories.action_units(data)), steps


batch = learners.take  # [B] of the transitions


def init(rng_key: chex.PRNGKey, *, config: Config, units: types.Params) -> learners.State:
    """Return the state before the first update."""
    actor = iql.init_actor(rng_key, config=config, action_values=units.get("action_values"))
    return learners.State(
        params={"actor": actor, "units": jax.tree.map(jnp.asarray, units)},
        opt_state={"actor": optax.scale_by_adam().init(actor)},
        step=jnp.zeros([], jnp.int32),
    )


def update(
    state: learners.State,
    batch: types.Transitions,
    row_keys: chex.PRNGKey | None = None,
    *,
    config: Config,
    axis_name: str | None = None,
) -> tuple[learners.State, dict[str, chex.Array]]:
    """Do one step of Adam on the negative log-likelihood of the actions, in the networks' units.

    `batch` is [B], the device's equal share of the global batch if `axis_name` is given; no random bits are drawn. The
    metric is actor_loss, the mean over the global batch before the step.
    """
    del row_keys
    observations = iql.standardize(state.params, batch.observations)
    actions = iql.normalize_actions(state.params, batch.actions)

    def loss(actor):
        return -jnp.mean(iql.log_prob(state.params | {"actor": actor}, observations, actions)), {}

    actor, opt_state, metrics = learners.descend("actor", loss, config.learning_rate, state=state, axis_name=axis_name)
    return state.replace(
        params=state.params | {"actor": actor}, opt_state={"actor": opt_state}, step=state.step + 1
    ), metrics


def encode(episodes: Sequence[rollouts.Episode], *, config: Config) -> np.ndarray:
    """Return what the policy sees of running episodes: their newest observations [B, N]."""
    del config
    return np.stack([episode.observations[-1] for episode in episodes])


def act(params: types.Params, observations: chex.Array, *, config: Config) -> chex.Array:
    """Return the policy's mean actions [B, A], within their bounds, or the likeliest, at observations [B, N]."""
    del config
    return iql.mean_action(params, observations)
