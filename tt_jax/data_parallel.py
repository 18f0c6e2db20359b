"""Data parallelism over the devices: the one wrapper, a device's share of a batch, many steps per compiled call."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import jax_utils

AXIS = "devices"
ROWS, WHOLE = jax.sharding.PartitionSpec(AXIS), jax.sharding.PartitionSpec()  # see `over_local_rows`


def over_devices(fn: Callable[..., Any], *, donate_argnums: int | tuple[int, ...] = ()) -> Callable[..., Any]:
    """Compile `fn` to run on all devices of all processes; it can reduce over the axis `AXIS`.

    Every array in arguments and results has a leading axis of the local devices, see `replicate`.
    """
    return jax.pmap(fn, axis_name=AXIS, donate_argnums=donate_argnums)


def over_local_rows(fn: Callable[..., Any], *, first_specs: Any) -> Callable[..., Any]:
    """Compile `fn(first, *rows)`, whose rows do not depend on each other, to share them among this process's devices.

    `rows` and results are pytrees of arrays [B, ...], for any B: some rows are computed twice where the devices do not
    divide it. Of `first`, `first_specs`, a prefix of it, says with `ROWS` which arrays are shared, too, and with
    `WHOLE` which every device needs whole. With one device this is `jax.jit`.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return jax.jit(fn)

    @functools.cache
    def compiled(num_rows):
        # Without the check of what differs between devices: `fn` need not know of them.
        specs = {"in_specs": (first_specs, *[ROWS] * num_rows), "out_specs": ROWS, "check_vma": False}
        return jax.jit(jax.shard_map(fn, mesh=on_local_devices().mesh, **specs))

    def prepare(first, rows):
        size = len(jax.tree.leaves(rows)[0])
        taken = np.arange(-(-size // len(devices)) * len(devices)) % size

        def pad(spec, tree):
            return jax.tree.map(lambda leaf: leaf[taken], tree) if spec == ROWS else tree

        return jax.tree.map(pad, first_specs, first), *(pad(ROWS, row) for row in rows)

    def call(first, *rows):
        results = compiled(len(rows))(*prepare(first, rows))
        return jax.tree.map(lambda leaf: leaf[: len(jax.tree.leaves(rows)[0])], results)

    call.lower = lambda first, *rows: compiled(len(rows)).lower(*prepare(first, rows))  # as that of `jax.jit`
    return call


def on_local_devices() -> jax.sharding.NamedSharding:
    """Return where `over_local_rows` wants what is `WHOLE`, for `jax.device_put`."""
    return jax.sharding.NamedSharding(jax.sharding.Mesh(jax.local_devices(), (AXIS,)), WHOLE)


def replicate(tree: Any) -> Any:
    """Copy a pytree of host arrays [...] to each local device, [local devices, ...], as `over_devices` takes it."""
    return jax_utils.replicate(tree, axis_name=AXIS)


def unreplicate(tree: Any) -> Any:
    """Take what the first local device holds, [...], to numpy, as own copies that outlive a donation."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)[0]), tree)


def share_per_device(batch_size: int, *, flag: str) -> int:
    """Return the rows of a global batch that each device takes.

    Raises ValueError, naming the configuration's field `flag`, if they cannot be shared equally.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {devices} devices; set --config.{flag}.")
    return batch_size // devices


def run_steps(
    step_fn: Callable[[Any], tuple[Any, dict[str, chex.Array]]], state: Any, num_steps: chex.Numeric, *, max_steps: int
) -> tuple[Any, dict[str, chex.Array]]:
    """Call `step_fn(state) -> (state, metrics)` as often as `num_steps` says, at most `max_steps`, in one loop.

    `num_steps` may be traced, so that calls of any length share one program. Returns the last state, and the metrics
    of all steps, [max_steps, ...] each, of which the first `num_steps` count.
    """
    step_fn = jax.jit(step_fn)  # traced once, for the shapes and for the loop
    _, shapes = jax.eval_shape(step_fn, state)

    def step_and_note(index, carry):
        state, notes = carry
        state, metrics = step_fn(state)
        return state, jax.tree.map(lambda note, metric: note.at[index].set(metric), notes, metrics)

    notes = jax.tree.map(lambda shape: jnp.zeros([max_steps, *shape.shape], shape.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, step_and_note, (state, notes))
