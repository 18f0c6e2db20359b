"""Checkpoints come back bit for bit, or not at all."""

import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tt_jax import checkpoints, tokenization, types

# Orbax reads the arrays in parallel: when one of them cannot be read, the others end after its event loop has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SPEC = types.TransitionSpec(observation_dim=3, action_dim=1, num_bins=5)


def _params(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "block_0": {"kernel": generator.normal(size=(60, 50)).astype(np.float32), "bias": np.zeros(50, np.float32)},
        "embedding": generator.normal(size=(7, 4)).astype(np.float32),
    }


def _discretizer():
    return tokenization.fit(np.random.default_rng(1).normal(size=(100, 6)), num_bins=5, method="quantile")


def _save(workdir, step=1, **changes):
    arguments = {"params": _params(), "config": SPEC, "tokenizer": _discretizer(), "run": {"dataset": "a/b-v0"}}
    checkpoints.save(workdir, step=step, **(arguments | changes))


def test_everything_comes_back_bit_for_bit_without_a_template(tmp_path):
    run = {"seed": 3, "rate": 0.1, "keys": ["observation"], "nothing": None}
    _save(tmp_path, step=12, run=run, state={"counts": np.array([1, 2**32 - 1], np.uint32), "inner": [np.float32(0.5)]})
    restored = checkpoints.restore(tmp_path)
    assert (restored.step, restored.config, restored.run) == (12, SPEC, run)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored.params, _params())
    chex.assert_trees_all_equal(restored.params, _params())
    np.testing.assert_array_equal(restored.state["counts"], np.array([1, 2**32 - 1], np.uint32))
    assert restored.state["inner"]["0"] == np.float32(0.5)


def test_the_tokenizer_keeps_its_float64_values(tmp_path):
    _save(tmp_path)
    restored, expected = checkpoints.restore(tmp_path).tokenizer, _discretizer()
    assert isinstance(restored, tokenization.Discretizer)
    assert restored.thresholds.dtype == restored.centers.dtype == np.float64
    assert (expected.centers != expected.centers.astype(np.float32)).any()
    np.testing.assert_array_equal(restored.thresholds, expected.thresholds)
    np.testing.assert_array_equal(restored.centers, expected.centers)


def test_a_state_of_namedtuples_is_rebuilt_in_the_template(tmp_path):
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, 10))
    params = jax.tree.map(jnp.asarray, _params())
    state = optimizer.init(params)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    _save(tmp_path, state=state)
    restored = checkpoints.restore(tmp_path, state_template=optimizer.init(params)).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)

    with pytest.raises(ValueError, match="another structure.*state/0/.*is not expected here"):
        checkpoints.restore(tmp_path, state_template=optax.sgd(1e-3).init(params))
    with pytest.raises(ValueError, match=r"state/0/mu/block_0/kernel.*\(60, 50\).*\(60, 51\)"):
        wider = jax.tree.map(lambda leaf: jnp.zeros((60, 51)) if leaf.shape == (60, 50) else leaf, params)
        checkpoints.restore(tmp_path, state_template=optimizer.init(wider))


def test_networks_of_version_0_1_come_back_under_today_s_names(tmp_path):
    def array(*shape):
        return np.random.default_rng(shape).normal(size=shape).astype(np.float32)

    kernels, dense = array(2, 4, 12), {"kernel": array(3, 4), "bias": array(4)}
    old = {
        "blocks": {"qkv": {"kernel": kernels}},
        "head": array(6, 4, 7),
        "token_embedding": array(31, 4),
        "actor": {"dense_0": dense, "log_std": array(1)},
        "value": {"dense_0": dense},
    }
    today = {
        "blocks_0": {"qkv": {"kernel": kernels[0]}},
        "blocks_1": {"qkv": {"kernel": kernels[1]}},
        "head": {"kernel": array(6, 4, 7)},
        "token_embedding": {"embedding": array(31, 4)},
        "actor": {"mlp": {"Dense_0": dense}, "log_std": array(1)},
        "value": {"Dense_0": dense},
    }
    _save(tmp_path, params=old, state=optax.scale_by_adam().init(old)._replace(nu=old))
    restored = checkpoints.restore(tmp_path, state_template=optax.scale_by_adam().init(today))
    chex.assert_trees_all_equal(restored.params, today)
    chex.assert_trees_all_equal(restored.state.nu, today)


def test_the_newest_are_kept_and_each_can_be_restored(tmp_path):
    with checkpoints.Writer(tmp_path, keep=2) as writer:
        for step in (10, 20, 30):
            writer.save(step, params=_params(seed=step), config=SPEC, tokenizer=None)
    assert checkpoints.latest_step(tmp_path) == 30
    chex.assert_trees_all_equal(checkpoints.restore(tmp_path, 20).params, _params(seed=20))
    assert checkpoints.restore(tmp_path).tokenizer is None
    with pytest.raises(ValueError, match=r"no checkpoint of step 10 .*\[20, 30\]"):
        checkpoints.restore(tmp_path, 10)


def test_saving_copies_first_so_that_buffers_may_be_donated(tmp_path):
    kernel = jnp.arange(1000.0)
    mutable = np.ones(1000)
    with checkpoints.Writer(tmp_path) as writer:
        writer.save(1, params={"a": kernel, "b": mutable}, config=SPEC, tokenizer=None)
        kernel.delete()
        mutable[:] = 0
    restored = checkpoints.restore(tmp_path).params
    np.testing.assert_array_equal(restored["a"], np.arange(1000, dtype=np.float32))
    np.testing.assert_array_equal(restored["b"], np.ones(1000))


def test_steps_only_go_forward(tmp_path):
    _save(tmp_path, step=5)
    with checkpoints.Writer(tmp_path) as writer:
        writer.save(5, params=_params(seed=9), config=SPEC, tokenizer=None)
        with pytest.raises(ValueError, match="already holds step 5, later than 4"):
            writer.save(4, params=_params(), config=SPEC, tokenizer=None)
    chex.assert_trees_all_equal(checkpoints.restore(tmp_path).params, _params())
    with pytest.raises(ValueError, match="already holds step 5"):
        _save(tmp_path, step=5)


def test_a_workdir_without_checkpoint_is_a_clear_error(tmp_path):
    assert checkpoints.latest_step(tmp_path) is None
    with pytest.raises(ValueError, match=f"^no checkpoint in {tmp_path}[^\n]*$"):
        checkpoints.restore(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_changed_byte_in_any_file_is_noticed_or_harmless(tmp_path):
    _save(tmp_path / "good", state={"count": np.arange(4)})
    expected = checkpoints.restore(tmp_path / "good")
    messages = []
    for path in sorted((tmp_path / "good").rglob("*")):
        if not path.is_file():
            continue
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        copy = tmp_path / "bad" / path.relative_to(tmp_path / "good")
        content = bytearray(copy.read_bytes())
        content[len(content) // 2] ^= 1
        copy.write_bytes(content)
        try:
            restored = checkpoints.restore(tmp_path / "bad")
            assert (restored.config, restored.run) == (expected.config, expected.run)
            for part in ("params", "tokenizer", "state"):
                chex.assert_trees_all_equal(getattr(restored, part), getattr(expected, part))
        except ValueError as error:
            messages.append(str(error))
        shutil.rmtree(tmp_path / "bad")
    assert all("is damaged: " in message and "\n" not in message for message in messages), messages
    assert any("the checksum of 'params/block_0/kernel' is wrong" in message for message in messages), messages


@pytest.mark.parametrize(
    "name, old, new",
    [("settings", '"a/b-v0"', '"a/c-v0"'), ("params/embedding", '"params/embedding": ', '"params/embedding": 1')],
)
def test_a_wrong_checksum_names_what_is_damaged(tmp_path, name, old, new):
    _save(tmp_path)
    (settings,) = tmp_path.rglob("settings/metadata")
    settings.write_text(settings.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"the checksum of '{name}' is wrong; training goes on from the one before"):
        checkpoints.restore(tmp_path)


def test_a_save_cut_short_is_ignored_and_cleaned_away(tmp_path):
    script = (
        "import os, signal, sys, numpy as np\n"
        "from tt_jax import checkpoints, types\n"
        "writer = checkpoints.Writer(sys.argv[1])\n"
        "arguments = dict(config=types.TransitionSpec(3, 1, 5), tokenizer=None)\n"
        "writer.save(1, params={'a': np.ones(10)}, **arguments)\n"
        "writer.save(2, params={'a': np.random.default_rng(0).normal(size=3_000_000)}, **arguments)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = pathlib.Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    leftovers = [path for path in (tmp_path / "checkpoints").iterdir() if not path.name.isdigit()]
    assert leftovers, "the save was complete before the process ended: make the arrays larger"
    assert checkpoints.latest_step(tmp_path) == 1
    np.testing.assert_array_equal(checkpoints.restore(tmp_path).params["a"], np.ones(10))

    _save(tmp_path, step=3)
    assert checkpoints.restore(tmp_path).step == 3
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_a_full_disk_names_the_path_and_leaves_the_older_checkpoints(tmp_path):
    _save(tmp_path, step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"a": np.random.default_rng(0).normal(size=500_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match=f"cannot write a checkpoint to {tmp_path}"):
            _save(tmp_path, step=2, params=big, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    chex.assert_trees_all_equal(checkpoints.restore(tmp_path).params, _params())


def test_only_records_of_the_package_are_settings(tmp_path):
    with pytest.raises(ValueError, match="fractions:Fraction|no record"):
        checkpoints._find_class("fractions:Fraction")
    with pytest.raises(TypeError, match="a static setting must be"):
        _save(tmp_path, config=[1, 2])
