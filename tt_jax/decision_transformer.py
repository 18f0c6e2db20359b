"""Decision Transformer (Chen et al. 2021, arXiv 2106.01345): actions that led to the return that is asked for.

A causal transformer reads the last K steps as return-to-go, observation and action, each embedded by a matrix of its
own plus a learned embedding of the time step, and predicts each action from what is before it. Windows begin with their
oldest step and are filled up behind the newest: nothing real attends to what is later, so that this equals the
reference's padding in front with a mask. Its blocks are the Trajectory Transformer's, with GELU for ReLU.
"""

import dataclasses
import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tt_jax import bc, dropout, iql, learners, rollouts, trajectories, transformer, types

TRAIN = learners.TrainConfig(
    num_steps=100_000, batch_size=64, steps_per_call=100, log_every=500, eval_every=10_000, checkpoint_every=10_000
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static settings; the defaults are the reference's."""

    observation_dim: int  # N
    action_dim: int  # A
    max_timesteps: int  # of an episode; later ones share the last embedding
    window: int = 20  # K, steps that are read
    num_layers: int = 3  # blocks of attention and feed-forward
    num_heads: int = 1  # of attention
    embed_dim: int = 128  # E, width of a token
    dropout: float = 0.1  # of embeddings, attention and what blocks add
    learning_rate: float = 1e-4  # after the warm-up
    warmup_steps: int = 10_000  # updates over which the rate rises linearly
    weight_decay: float = 1e-4  # of AdamW
    grad_clip: float = 0.25  # largest global norm of the gradient
    return_scale: float = 1000.0  # returns-to-go are divided by this
    targets: tuple[float, ...] = ()  # returns to ask for, one after the other; (): the data's best and half of it

    def __post_init__(self):
        types.check_ranges(
            self,
            positive=("window", "learning_rate", "grad_clip", "return_scale"),
            not_negative=("warmup_steps", "weight_decay"),
        )
        _ = self.blocks  # checks its own

    @property
    def blocks(self) -> transformer.TransformerConfig:
        """The settings of the blocks."""
        return transformer.TransformerConfig(
            spec=types.TransitionSpec(observation_dim=self.observation_dim, action_dim=self.action_dim, num_bins=1),
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            attention_dropout=self.dropout,
            residual_dropout=self.dropout,
        )


@chex.dataclass(frozen=True)
class Steps:
    """The dataset as it lives on every device, or a batch of windows [B, K] of it, in the environment's units."""

    observations: chex.Array  # [..., N] float32
    actions: chex.Array  # [..., A] float32
    returns_to_go: chex.Array  # [...] float32, undiscounted, this step's reward included
    timesteps: chex.Array  # [...] int32
    left: chex.Array  # [...] int32, steps from this one on to the end of episode or window; 0: filled up


class DecisionTransformer(nn.Module):
    """The whole model."""

    config: Config

    @nn.compact
    def __call__(self, steps: Steps, row_keys: chex.PRNGKey | None = None) -> chex.Array:
        """Predict the actions [B, K, A], in +-1, of windows in the model's units; with keys there is dropout."""
        config, (size, length) = self.config, steps.timesteps.shape
        dense = functools.partial(
            nn.Dense,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # as PyTorch's, +-1/sqrt(in)
        )
        dropout_fn = dropout.make(row_keys, size)
        time = nn.Embed(config.max_timesteps, config.embed_dim, embedding_init=nn.initializers.normal(1.0), name="time")
        parts = {"return": steps.returns_to_go[..., None], "observation": steps.observations, "action": steps.actions}
        tokens = [dense(config.embed_dim, name=name)(part) + time(steps.timesteps) for name, part in parts.items()]
        x = jnp.stack(tokens, axis=2).reshape(size, 3 * length, config.embed_dim)
        x = dropout_fn(transformer.Norm(name="norm_in")(x), config.dropout)
        attend_fn = functools.partial(
            transformer.attend_causally,
            visible=np.tri(3 * length, dtype=bool),
            dropout_fn=dropout_fn,
            config=config.blocks,
        )
        for layer in range(config.num_layers):
            x, _ = transformer.Block(config.blocks, name=f"blocks_{layer}")(x, attend_fn, dropout_fn)
        x = transformer.Norm(name="norm_out")(x).reshape(size, length, 3, config.embed_dim)
        return jnp.tanh(dense(config.action_dim, name="head")(x[:, :, 1]))  # of the observations


def prepare(data: trajectories.Trajectories, settings: dict) -> tuple[Config, types.Params, Steps]:
    """Return the configuration with the data's sizes, the units, and what is learned from."""
    returns = trajectories.returns(data)
    if not settings.get("targets"):
        settings = settings | {"targets": (float(returns.max()), float(returns.max()) / 2)}
    config = Config(
        observation_dim=data.observations.shape[1],
        action_dim=data.actions.shape[1],
        max_timesteps=data.max_path_length,
        **settings,
    )
    units, _ = bc.standardized_transitions(data)
    low, high = trajectories.action_bounds(data)
    lengths = np.diff(data.offsets)
    timesteps = np.arange(len(data.rewards)) - np.repeat(data.offsets[:-1], lengths)
    rewards_and_after = trajectories.segment(data, discount=1.0)[:, -2:]
    return (
        config,
        units,
        Steps(
            observations=data.observations.astype(np.float32),
            actions=np.clip(data.actions.astype(np.float32), low, high),
            returns_to_go=rewards_and_after.sum(axis=1).astype(np.float32),
            timesteps=timesteps.astype(np.int32),
            left=(np.repeat(lengths, lengths) - timesteps).astype(np.int32),
        ),
    )


def batch(store: Steps, rows: chex.Array, *, config: Config) -> Steps:
    """Gather the windows that begin at `rows` [B] and end after K steps or with their episode; the rest is 0."""
    index = jnp.arange(config.window)[None]  # [1, K]
    is_real = index < store.left[rows][:, None]  # [B, K]
    found = jax.tree.map(lambda leaf: leaf[jnp.where(is_real, rows[:, None] + index, 0)], store)

    def blank(leaf):
        return jnp.where(is_real.reshape(*is_real.shape, *(1,) * (leaf.ndim - 2)), leaf, 0)

    return jax.tree.map(blank, found)


def init(rng_key: chex.PRNGKey, *, config: Config, units: types.Params) -> learners.State:
    """Return the state before the first update."""
    steps = Steps(
        observations=jnp.zeros([1, 1, config.observation_dim]),
        actions=jnp.zeros([1, 1, config.action_dim]),
        returns_to_go=jnp.zeros([1, 1]),
        timesteps=jnp.zeros([1, 1], jnp.int32),
        left=jnp.ones([1, 1], jnp.int32),
    )
    model = DecisionTransformer(config).init(rng_key, steps)["params"]
    return learners.State(
        params={"model": model, "units": jax.tree.map(jnp.asarray, units)},
        opt_state={"model": _optimizer(config).init(model)},
        step=jnp.zeros([], jnp.int32),
    )


def predict(params: types.Params, steps: Steps, *, config: Config, row_keys: chex.PRNGKey | None = None) -> chex.Array:
    """Predict the actions [B, K, A] of windows, in +-1 of their bounds; with keys [B] dropout is applied."""
    steps = steps.replace(
        observations=iql.standardize(params, steps.observations),
        actions=iql.normalize_actions(params, steps.actions),
        returns_to_go=steps.returns_to_go / config.return_scale,
    )
    return DecisionTransformer(config).apply({"params": params["model"]}, steps, row_keys)


def update(
    state: learners.State,
    batch: Steps,
    row_keys: chex.PRNGKey | None = None,
    *,
    config: Config,
    axis_name: str | None = None,
) -> tuple[learners.State, dict[str, chex.Array]]:
    """Do one step of AdamW on the squared error of the actions, a mean over the real steps of all windows.

    `batch` is [B, K], the device's equal share of the global batch if `axis_name` is given; `row_keys` [B] or None for
    no dropout. The metrics, [] float32 before the step: loss and grad_norm, before clipping.
    """
    add_up = functools.partial(jax.lax.psum, axis_name=axis_name) if axis_name else lambda x: x
    params, targets = state.params, iql.normalize_actions(state.params, batch.actions)
    is_real = (batch.left > 0).astype(jnp.float32)  # [B, K]
    num_values = add_up(jnp.sum(is_real)) * config.action_dim

    def loss_fn(model):
        predicted = predict(params | {"model": model}, batch, config=config, row_keys=row_keys)
        return jnp.sum(is_real[..., None] * (predicted - targets) ** 2) / num_values

    loss, grads = add_up(jax.value_and_grad(loss_fn)(params["model"]))
    updates, opt_state = _optimizer(config).update(grads, state.opt_state["model"], params["model"])
    state = state.replace(
        params=params | {"model": optax.apply_updates(params["model"], updates)},
        opt_state={"model": opt_state},
        step=state.step + 1,
    )
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def encode(episodes: Sequence[rollouts.Episode], *, config: Config) -> Steps:
    """Return the last K steps of running episodes, the present one included, as a window.

    Of the return that is asked for, `config.targets[0]`, the rewards so far are taken off. Later time steps than the
    longest of training count as that.
    """
    size, last = (len(episodes), config.window), config.max_timesteps - 1
    steps = Steps(
        observations=np.zeros((*size, config.observation_dim), np.float32),
        actions=np.zeros((*size, config.action_dim), np.float32),
        returns_to_go=np.zeros(size, np.float32),
        timesteps=np.zeros(size, np.int32),
        left=np.zeros(size, np.int32),
    )
    for row, episode in enumerate(episodes):
        first = max(0, episode.length + 1 - config.window)
        past, count = episode.actions[first:], episode.length + 1 - first
        rewards = np.cumsum([0.0, *episode.rewards])[first:]
        steps.observations[row, :count] = episode.observations[first:]
        steps.actions[row, : len(past)] = np.reshape(past, (-1, config.action_dim))  # the present one is to be found
        steps.returns_to_go[row, :count] = config.targets[0] - rewards
        steps.timesteps[row, :count] = np.minimum(np.arange(first, first + count), last)
        steps.left[row, :count] = np.arange(count, 0, -1)
    return steps


def act(params: types.Params, steps: Steps, *, config: Config) -> chex.Array:
    """Return the actions [B, A], within their bounds, at the newest step of each window [B, K]."""
    newest = jnp.sum(steps.left > 0, axis=1) - 1  # [B]
    actions = predict(params, steps, config=config)
    actions = jnp.take_along_axis(actions, newest[:, None, None], axis=1)[:, 0]
    center, scale = iql.action_units(params, actions)
    return center + scale * actions


def _optimizer(config):
    def rate(count):
        return config.learning_rate * jnp.minimum((count + 1) / config.warmup_steps, 1.0)

    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adamw(rate, weight_decay=config.weight_decay))
