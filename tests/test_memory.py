"""What does not fit the memory is one line: by an estimate before it runs, or when it fails."""

import dataclasses
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_points import MAZE

from experiments.common import memory, training_loop, transformer_run
from tt_jax import checkpoints, training

pytest_plugins = ["entry_fixtures"]


@jax.jit
def tebibytes(x):
    """Return 4 TiB."""
    return jnp.zeros([2**40]) + x


@pytest.mark.parametrize("function", [lambda x: memory.check(tebibytes, x), tebibytes], ids=["estimated", "failed"])
def test_what_does_not_fit_is_one_line_with_the_settings(function):
    with (
        pytest.raises(ValueError, match=r"^a step of 3 does not fit the memory \(.+\); lower size=3\.$") as found,
        memory.explained("a step of 3", "lower size=3"),
    ):
        function(np.float32(1))
    assert "\n" not in str(found.value)


def test_the_call_after_a_check_compiles_nothing(caplog):
    fn = jax.jit(lambda x: jnp.sort(x) * 2)
    x = np.arange(3.0, dtype=np.float32)
    with jax.log_compiles():
        memory.check(fn, x)
        assert "XLA compilation" in caplog.text
        caplog.clear()
        np.testing.assert_array_equal(fn(x), 2 * x)
        assert "XLA compilation" not in caplog.text


def test_training_takes_the_most_windows_that_fit():
    """4 TiB for 64 windows; a device has some GiB, so that the share is small and another function is found."""
    config, seen = training.TrainConfig(batch_size=4 * 64, microbatch_size=-1), []  # 64 windows for each of 4 devices

    def shrink(share):
        seen.append(share)
        return jax.jit(lambda x: x + 1)

    fn, needed = training_loop._fitting(tebibytes, (np.float32(1),), shrink)
    assert fn(1) == 2 and needed < 100 and len(seen) == 1 and 0 < seen[0] < 0.5
    for share, windows in ((0.5, 16), (0.6, 32), (0.04, 2), (0.001, 1)):  # a tenth is left for what does not shrink
        assert transformer_run._smaller_microbatch(config, share, block_size=1) == windows
    one = dataclasses.replace(config, microbatch_size=1)
    assert transformer_run._smaller_microbatch(one, 0.1, block_size=1) == 0


def test_other_failures_pass():
    with pytest.raises(ZeroDivisionError), memory.explained("a step", "lower it"):
        _ = 1 // 0


def test_a_limit_of_the_process_counts():
    free, (soft, hard) = memory.free_bytes(), resource.getrlimit(resource.RLIMIT_AS)
    assert 2**20 < free < 2**50
    with open("/proc/self/statm") as file:
        virtual = int(file.read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**28, hard))
        assert memory.free_bytes() <= 2**28 // jax.local_device_count()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_step_or_a_plan_too_large_for_the_machine_is_told_before_it_runs(train, entry_point, trained, tmp_path):
    size = [f"--config.train.{name}=5000000" for name in ("batch_size", "microbatch_size")]
    done = train(*MAZE, *size, f"--workdir={tmp_path}")
    assert done.code == 2, done.stderr
    assert "train_tt: a step of 5000000 windows of 29 tokens" in done.error
    assert "--config.model.remat=True" in done.error and "train.microbatch_size" in done.error
    assert checkpoints.latest_step(tmp_path) is None
    done = entry_point("plan")(f"--workdir={trained}", "--plan.beam_width=10000000", "--num_episodes=1")
    assert done.code == 2, done.stderr
    assert "plan: a plan with beam_width=10000000" in done.error and "lower --num_envs" in done.error
