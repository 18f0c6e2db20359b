"""Settings of every test, made before jax is imported."""

import atexit
import importlib.metadata
import os
import shutil
import signal
import tempfile

from entry_points import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
flags = f"{FAST_COMPILATION} --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["MPLBACKEND"] = "agg"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what shells run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests, in all workers, and entry points share what they compile, but with no earlier run of the tests. Most programs
# are small, and many. One that is half written, by another process or one that was killed, is compiled again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tt_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"


def pytest_report_header():
    """Say what the tests run with."""
    versions = {each.name: each.version for each in importlib.metadata.distributions()}
    names = [
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "chex",
        "numpy",
        "minari",
        "gymnasium",
        "gymnasium-robotics",
        "mujoco",
    ]
    return ", ".join(f"{name} {versions.get(name, 'is missing')}" for name in names)
