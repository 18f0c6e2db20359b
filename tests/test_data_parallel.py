"""The one wrapper over the devices and the one loop of steps, on toy steps whose results are plain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tt_jax import data_parallel

NUM_DEVICES = 4  # set in conftest.py


def test_every_device_works_on_its_own_row_and_can_add_up_with_the_others():
    def fn(x):
        return jax.lax.axis_index(data_parallel.AXIS), jax.lax.psum(x, data_parallel.AXIS)

    index, total = data_parallel.over_devices(fn)(np.float32([1, 2, 4, 8]))
    np.testing.assert_array_equal(index, np.arange(NUM_DEVICES))
    np.testing.assert_array_equal(total, np.full(NUM_DEVICES, 15))


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_rows_are_shared_by_the_devices_whatever_their_number(size):
    def fn(first, keys, rows):
        drawn = jax.vmap(lambda key: jax.random.uniform(key, [2]))(keys)
        own = rows["x"] + (0 if first["goal"] is None else first["goal"]) + first["bias"]
        return {"sum": own + drawn, "rows_of_a_device": jnp.full(len(rows["x"]), len(rows["x"]))}

    specs = {"bias": data_parallel.WHOLE, "goal": data_parallel.ROWS}
    over_rows = data_parallel.over_local_rows(fn, first_specs=specs)
    keys = jax.random.split(jax.random.key(0), size)
    rows = {"x": np.arange(2.0 * size, dtype=np.float32).reshape(size, 2)}
    for goal in (None, np.ones([size, 2], np.float32)):
        first = {"bias": jax.device_put(np.ones([1, 2], np.float32), data_parallel.on_local_devices()), "goal": goal}
        got, expected = (
            over_rows(first, keys, rows),
            fn({"bias": np.ones([1, 2], np.float32), "goal": goal}, keys, rows),
        )
        np.testing.assert_array_equal(got["sum"], expected["sum"])
        np.testing.assert_array_equal(got["rows_of_a_device"], np.full(size, -(-size // NUM_DEVICES)))


def test_what_is_taken_to_the_host_outlives_a_donation():
    tree = {"a": np.arange(3.0), "b": np.uint32(7)}
    replicas = data_parallel.replicate(tree)
    assert replicas["a"].shape == (NUM_DEVICES, 3)
    host = data_parallel.unreplicate(replicas)
    double = data_parallel.over_devices(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    doubled = data_parallel.unreplicate(double(replicas))
    assert replicas["a"].is_deleted() and host["a"].flags.owndata
    chex.assert_trees_all_equal(host, jax.tree.map(np.asarray, tree))
    chex.assert_trees_all_equal(doubled, {"a": np.array([0.0, 2.0, 4.0]), "b": np.uint32(14)})


def test_a_batch_is_shared_equally_or_refused():
    assert data_parallel.share_per_device(12, flag="train.batch_size") == 3
    with pytest.raises(ValueError, match="batch_size=6 must be a multiple of the 4 devices; set --config.x.batch_size"):
        data_parallel.share_per_device(6, flag="x.batch_size")


def step(state):
    """Add 1, 2, 4, ... and tell a number and a row, of different types."""
    total, power = state
    return (total + power, 2 * power), {"total": total, "row": jnp.arange(3) + power.astype(jnp.int32)}


def test_steps_in_one_loop_return_the_last_state_and_the_metrics_of_each():
    state, metrics = data_parallel.run_steps(step, (jnp.float32(0), jnp.float32(1)), 4, max_steps=6)
    np.testing.assert_array_equal(state, [15, 16])
    np.testing.assert_array_equal(metrics["total"], np.float32([0, 1, 3, 7, 0, 0]))
    np.testing.assert_array_equal(metrics["row"][:4], np.array([1, 2, 4, 8])[:, None] + np.arange(3))
    assert metrics["row"].shape == (6, 3) and metrics["row"].dtype == jnp.int32


def test_calls_of_any_length_share_one_program_that_traces_a_step_once():
    traces = []

    def counted_step(state):
        traces.append(state)
        return step(state)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(state, num_steps):
        return data_parallel.run_steps(counted_step, state, num_steps, max_steps=6)

    state = (jnp.float32(0), jnp.float32(1))
    for num_steps in (1, 0, 3):
        state, _ = run(state, num_steps)
    np.testing.assert_array_equal(state, [15, 16])
    assert len(traces) == 1
