"""Train the Trajectory Transformer: schedule, optimizer, train steps.

The tokenised dataset lives on every device; a compiled call runs many steps and gathers its own windows, so that the
position in the data is the step alone. All devices compute the ids of the global batch and take their share of it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from tt_jax import data_parallel, shards, trajectories, transformer, types

_EVAL_WINDOWS = 2048  # whatever the batch, so that runs can be compared
_CPU_TOKENS = 1_000  # per core that are computed at a time; larger buffers take longer, see docs/performance.md
_NOISE_SITE = 2**31 - 1  # of the random bits of a row; the places of dropout are counted from 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Static settings of a training run; the defaults are the reference's."""

    num_steps: int = 195_000  # updates
    batch_size: int = 256  # windows per step over all devices
    microbatch_size: int = 0  # windows per device whose gradient is computed at a time; 0: see `windows_at_once`
    learning_rate: float = 6e-4  # the highest
    weight_decay: float = 0.1  # of matrices only
    grad_clip: float = 1.0  # largest global norm of the gradient
    beta1: float = 0.9  # of Adam's mean of gradients
    beta2: float = 0.95  # of their squares
    optimizer: str = "adamw"  # or "muon", which needs fewer updates
    warmup_tokens: int = 0  # 0: those of one epoch
    final_tokens: int = 0  # where the cosine first reaches its floor; 0: those of 20 epochs
    clamp_cosine: bool = False  # stay at the floor after final_tokens; the reference's cosine rises again
    input_noise: float = 0.0  # standard deviation in bins of noise on the observations and actions that the model reads
    input_noise_steps: int = 0  # steps with that noise; then the model learns to trust what it reads
    steps_per_call: int = 50  # train steps in one compiled call
    log_every: int = 100  # steps
    eval_every: int = 1000  # steps, a multiple of log_every; also at the end
    checkpoint_every: int = 1000  # steps; also at the end
    keep_checkpoints: int = 3  # the newest

    def __post_init__(self):
        counts = ("num_steps", "batch_size", "steps_per_call", "log_every", "eval_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1.")
        if self.microbatch_size < -1:
            raise ValueError(
                f"train.microbatch_size={self.microbatch_size} must not be negative, but for -1: as many windows "
                "as fit, or like 0 where nobody finds out."
            )
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f'train.optimizer must be "adamw" or "muon", got "{self.optimizer}".')
        if self.learning_rate <= 0 or self.grad_clip <= 0:
            raise ValueError(
                f"train.learning_rate={self.learning_rate} and train.grad_clip={self.grad_clip} must be positive."
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be in [0, 1).")
        for name in ("weight_decay", "warmup_tokens", "final_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must not be negative.")
        if self.input_noise < 0 or (self.input_noise > 0) != (self.input_noise_steps > 0):
            raise ValueError(
                f"train.input_noise={self.input_noise} and train.input_noise_steps={self.input_noise_steps} must both "
                "be positive, or both 0 for no noise."
            )

    def windows_at_once(self, local_size: int, *, block_size: int) -> int:
        """Return how many of a device's `local_size` windows of `block_size` tokens are computed at a time.

        Where the configuration leaves it open these are all, and on a CPU the divisor nearest to 1,000 tokens per core.
        Raises ValueError if what it sets does not divide them.
        """
        if self.microbatch_size > 0:
            _check_microbatches(self.microbatch_size, local_size)
            return self.microbatch_size
        if jax.default_backend() != "cpu":
            return local_size
        wanted = _CPU_TOKENS * os.cpu_count() / block_size
        divisors = (size for size in range(1, local_size + 1) if local_size % size == 0)
        return min(divisors, key=lambda size: abs(math.log(size / wanted)))


@chex.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    params: types.Params
    opt_state: optax.OptState
    step: chex.Array  # [] int32, steps done
    tokens_seen: chex.Array  # [2] uint32, high and low word of the number of targets so far that are not stop


@chex.dataclass(frozen=True)
class Schedule:
    """How long a run is, as arrays in place of its configuration's fields: one program serves runs of any length."""

    warmup_tokens: chex.Array  # [] float32
    final_tokens: chex.Array  # [] float32
    input_noise_steps: chex.Array  # [] int32


def as_schedule(config: TrainConfig) -> Schedule:
    """Return the schedule of a configuration without zeros, see `with_token_schedule`."""
    return Schedule(
        warmup_tokens=np.float32(config.warmup_tokens),
        final_tokens=np.float32(config.final_tokens),
        input_noise_steps=np.int32(config.input_noise_steps),
    )


def with_token_schedule(config: TrainConfig, *, num_windows: int, block_size: int) -> TrainConfig:
    """Fill in what is 0 by the reference's schedule: warm-up over the tokens of one epoch, the floor after 20.

    An epoch is `num_windows` windows of `block_size` tokens.
    """
    epoch_tokens = num_windows * block_size
    return dataclasses.replace(
        config,
        warmup_tokens=config.warmup_tokens or epoch_tokens,
        final_tokens=config.final_tokens or 20 * epoch_tokens,
    )


def learning_rate(tokens_seen: chex.Numeric, *, config: TrainConfig, schedule: Schedule | None = None) -> chex.Array:
    """Return the float32 rate after `tokens_seen` targets: linear warm-up, then a cosine that never falls below 10%.

    As in the reference the cosine rises again after `final_tokens` unless the configuration clamps it. (The very
    first step of a run uses the full rate, which `update` sees to.) A `schedule` replaces that of the configuration.
    """
    tokens_seen = jnp.asarray(tokens_seen, jnp.float32)
    lengths = config if schedule is None else schedule
    cosine_tokens = jnp.maximum(1.0, jnp.float32(lengths.final_tokens - lengths.warmup_tokens))
    progress = (tokens_seen - lengths.warmup_tokens) / cosine_tokens
    if config.clamp_cosine:
        progress = jnp.minimum(progress, 1.0)
    cosine = jnp.maximum(0.1, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
    warmup = tokens_seen / jnp.maximum(1.0, jnp.float32(lengths.warmup_tokens))
    multiplier = jnp.where(tokens_seen < lengths.warmup_tokens, warmup, cosine)
    return config.learning_rate * multiplier


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon without its rate, which depends on tokens and is applied in `update`; see `decay_mask`.

    Muon (kellerjordan.github.io/posts/muon) orthogonalises the momentum of the blocks' kernels and leaves everything
    else to Adam with Nesterov momentum. The root mean square of its updates, 0.4, is somewhat above Adam's, so that one
    rate serves both.
    """
    direction = optax.scale_by_adam(config.beta1, config.beta2, eps=1e-8)
    if config.optimizer == "muon":
        direction = optax.contrib.muon(
            learning_rate=-1.0,  # optax would turn the sign
            consistent_rms=0.4,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def _muon_dimensions(params):
    """Mark the kernels of the blocks as matrices [input, output]."""
    matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matrices if path[-1].key == "kernel" and path[0].key != "head" else None, params
    )


def decay_mask(params: types.Params) -> types.Params:
    """Mark with True what weight decay applies to, in a tree like `params`: the kernels, the head's included."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def init(rng_key: chex.PRNGKey, *, config: TrainConfig, model_config: transformer.TransformerConfig) -> TrainState:
    """Return the state before the first step, with parameters from `transformer.init`."""
    params = transformer.init(rng_key, config=model_config)
    return TrainState(
        params=params,
        opt_state=make_optimizer(config).init(params),
        step=jnp.zeros([], jnp.int32),
        tokens_seen=jnp.zeros([2], jnp.uint32),
    )


def update(
    state: TrainState,
    batch: types.Batch,
    dropout_key: chex.PRNGKey | None,
    *,
    config: TrainConfig,
    model_config: transformer.TransformerConfig,
    axis_name: str | None = None,
    schedule: Schedule | None = None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Do one step of the optimizer on `batch`, the device's equal share of the global batch if `axis_name` is given.

    `batch` is [B, T] int32, and `dropout_key` a key, one per row, or None for no dropout. The metrics, [] float32, are
    those of `transformer.loss`, means over the global batch before the step; grad_norm, before clipping; and
    learning_rate. Microbatches draw the same bits for dropout, and their gradients add up to the same but for rounding.
    A `schedule` replaces that of the configuration. Raises ValueError if they do not divide the batch.
    """
    add_up = functools.partial(jax.lax.psum, axis_name=axis_name) if axis_name else lambda x: x
    num_positions = add_up(jnp.float32(batch.targets.size))

    @functools.partial(jax.grad, has_aux=True)
    def grad_fn(params, part, key):
        total, *sums_and_counts = transformer.loss_sums(
            params, part, config=model_config, goal=_goal(part, model_config), dropout_key=key
        )
        return total / num_positions, sums_and_counts

    if 0 < config.microbatch_size != len(batch.targets):
        first = jax.lax.axis_index(axis_name) if axis_name else 0
        found = _accumulate(grad_fn, state.params, batch, dropout_key, size=config.microbatch_size, zero=0 * first)
    else:
        found = grad_fn(state.params, batch, dropout_key)
    grads, (sums, counts) = add_up(found)
    real_targets = add_up(jnp.sum(batch.targets != model_config.spec.stop_token, dtype=jnp.uint32))

    tokens_seen = state.tokens_seen[0].astype(jnp.float32) * 2.0**32 + state.tokens_seen[1].astype(jnp.float32)
    rate = learning_rate(tokens_seen, config=config, schedule=schedule)
    rate = jnp.where(state.step == 0, config.learning_rate, rate)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    low_word = state.tokens_seen[1] + real_targets
    carry = (low_word < real_targets).astype(jnp.uint32)
    metrics = transformer.mean_losses(sums, counts)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = rate
    state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        tokens_seen=jnp.stack([state.tokens_seen[0] + carry, low_word]),
    )
    return state, metrics


def _accumulate(grad_fn, params, batch, dropout_key, *, size, zero):
    """Add up `grad_fn(params, part, keys)` over parts of `size` rows, one after the other.

    `zero` is 0, as an array that may differ between the devices, as the gradients may.
    """
    num_rows = len(batch.targets)
    _check_microbatches(size, num_rows)
    if dropout_key is not None and not dropout_key.ndim:
        dropout_key = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, jnp.arange(num_rows))
    parts = jax.tree.map(lambda rows: rows.reshape(-1, size, *rows.shape[1:]), (batch, dropout_key))
    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda rows: rows[0], parts))
    zeros = jax.tree.map(lambda shape: jnp.full(shape.shape, zero, shape.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _check_microbatches(size, num_rows):
    if num_rows % size:
        raise ValueError(f"train.microbatch_size={size} must divide the {num_rows} windows of a device's batch.")


def window_ids(
    seed: chex.Numeric,
    step: chex.Numeric,
    *,
    batch_size: int,
    num_windows: chex.Numeric,
    max_windows: int | None = None,
) -> chex.Array:
    """Return the int32 ids [batch_size] of the windows of a step.

    Every epoch visits each window once, in an order that depends only on `seed` and the epoch; a batch that crosses
    the end of an epoch goes on in the next. `step * batch_size` must stay below 2**32. A traced `num_windows` needs
    `max_windows`, a static bound, on which the order depends as well.
    """
    position = jnp.uint32(step) * jnp.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)
    size = jnp.uint32(num_windows)
    epoch, index = position // size, position % size
    key = _mix(jnp.uint32(seed) + _mix(epoch))
    return _permute(index, key, size, max_size=max_windows or num_windows).astype(jnp.int32)


def _permute(index, key, size, *, max_size):
    """Permute [0, size) by a Feistel network on the next even number of bits, repeated until the result is in range."""
    half = (max(max_size - 1, 1).bit_length() + 1) // 2

    def feistel(x):
        left, right = x >> half, x & ((1 << half) - 1)
        for round_number in range(4):
            hashed = _mix(right ^ _mix(key + jnp.uint32(round_number)))
            left, right = right, left ^ (hashed & jnp.uint32((1 << half) - 1))
        return (left << half) | right

    return jax.lax.while_loop(
        lambda x: jnp.any(x >= size), lambda x: jnp.where(x >= size, feistel(x), x), feistel(index)
    )


def _mix(x):
    """Scramble a uint32 (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def make_train_fn(
    *,
    config: TrainConfig,
    model_config: transformer.TransformerConfig,
    windows_fn: Callable[[trajectories.TokenStore, chex.Array], types.Batch],
    num_windows: int,
) -> Callable[..., tuple[TrainState, dict[str, chex.Array]]]:
    """Return the data-parallel train_fn(state, store, seed, num_steps, schedule=None) -> (state, metrics).

    Arguments and results have a leading axis of the local devices (see `replicate`); the state is donated. `num_steps`
    is traced, at most `config.steps_per_call`; metrics are [steps_per_call], of which the first `num_steps` count. A
    `schedule`, by name, replaces that of the configuration. How a run is split into calls, and over how many devices,
    changes none of the random bits. `windows_fn(store, ids)` gathers windows. `store` may be a `shards.Shard` of at
    most `num_windows`. Raises ValueError if the batch cannot be shared equally or the run is too long to count.
    """
    if config.num_steps * config.batch_size >= 2**32:
        raise ValueError(f"num_steps * batch_size = {config.num_steps * config.batch_size} must be below 2**32.")
    local_size = data_parallel.share_per_device(config.batch_size, flag="train.batch_size")
    size = config.windows_at_once(local_size, block_size=model_config.block_size)
    config = dataclasses.replace(config, microbatch_size=size)

    def train(state, store, seed, num_steps, schedule=None):
        lengths = config if schedule is None else schedule
        dropout_root = jax.random.fold_in(jax.random.key(seed), 1)
        first = jax.lax.axis_index(data_parallel.AXIS) * local_size
        rows = first + jnp.arange(local_size)
        sizes = {"num_windows": num_windows, "batch_size": config.batch_size}
        first_step = 0
        if isinstance(store, shards.Shard):
            sizes |= {"num_windows": store.size, "max_windows": num_windows}
            store, first_step = store.data, store.first_step

        def one_step(state):
            ids = window_ids(seed, state.step - first_step, **sizes)
            batch = windows_fn(store, jax.lax.dynamic_slice_in_dim(ids, first, local_size))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(dropout_root, state.step), rows)
            if config.input_noise:
                deviation = jnp.where(state.step < lengths.input_noise_steps, config.input_noise, 0.0)
                inputs = _add_noise(batch.inputs, keys, spec=model_config.spec, deviation=deviation)
                batch = batch.replace(inputs=inputs)
            settings = {"config": config, "model_config": model_config, "axis_name": data_parallel.AXIS}
            return update(state, batch, keys, schedule=schedule, **settings)

        return data_parallel.run_steps(one_step, state, num_steps, max_steps=config.steps_per_call)

    return data_parallel.over_devices(train, donate_argnums=0)


def _add_noise(tokens, row_keys, *, spec, deviation):
    """Move the observation and action tokens [B, T] by normal noise to other bins; stop tokens stay."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, _NOISE_SITE)
    noise = deviation * jax.vmap(lambda key: jax.random.normal(key, tokens.shape[1:]))(keys)
    moved = jnp.clip(tokens + jnp.round(noise).astype(jnp.int32), 0, spec.num_bins - 1)
    is_moved = np.arange(tokens.shape[1])[None] % spec.transition_dim < spec.observation_dim + spec.action_dim
    return jnp.where(is_moved & (tokens != spec.stop_token), moved, tokens)


def make_eval_fn(
    *,
    config: TrainConfig,
    model_config: transformer.TransformerConfig,
    windows_fn: Callable[[trajectories.TokenStore, chex.Array], types.Batch],
    num_windows: int,
) -> Callable[[types.Params, trajectories.TokenStore], dict[str, chex.Array]]:
    """Return the data-parallel eval_fn(params, store) -> metrics over evenly spaced windows, 2,048 or all if fewer.

    They are rounded up to whole batches.
    """
    local_size = data_parallel.share_per_device(config.batch_size, flag="train.batch_size")
    size = config.windows_at_once(local_size, block_size=model_config.block_size)
    num_batches = math.ceil(min(_EVAL_WINDOWS, num_windows) / config.batch_size)
    spaced = np.linspace(0, num_windows - 1, num_batches * config.batch_size).astype(np.int32)
    ids = spaced.reshape(num_batches, -1, local_size // size, size)  # [batches, devices, parts, rows]
    ids = ids.swapaxes(1, 2).reshape(-1, ids.shape[1], size)

    def evaluate(params, store):
        def add_batch(carry, batch_ids):
            batch = windows_fn(store, batch_ids[jax.lax.axis_index(data_parallel.AXIS)])
            goal = _goal(batch, model_config)
            _, sums, counts = transformer.loss_sums(params, batch, config=model_config, goal=goal)
            return (carry[0] + sums, carry[1] + counts), None

        totals, _ = jax.lax.scan(add_batch, (jnp.zeros([4]), jnp.zeros([4])), jnp.asarray(ids))
        return transformer.mean_losses(*jax.lax.psum(totals, data_parallel.AXIS))

    return data_parallel.over_devices(evaluate)


def _goal(batch: types.Batch, model_config: transformer.TransformerConfig) -> chex.Array | None:
    return batch.goal if model_config.goal_conditioned else None
