"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tt_jax" / "__init__.py").read_text()).group(1)
README = ROOT / "README.md"

# gymnasium-robotics 1.4 cannot make its kitchen, Fetch and hand environments with mujoco from 3.12 on.
ENVS = ["gymnasium[mujoco]>=1.2,<2", "gymnasium-robotics>=1.4,<2", "mujoco>=3.3,<3.12"]
PLOTS = ["matplotlib>=3.10.7,<4", "imageio>=2.37,<3"]
LOGGING = ["tensorboardX>=2.6.4,<3"]
MCTX = ["mctx>=0.0.71,<0.1"]  # tree search

setuptools.setup(
    name="tt_jax",
    version=VERSION,
    description="Trajectory Transformer and Implicit Q-Learning in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    author="tt_jax authors",
    license="MIT",
    python_requires=">=3.11",
    packages=["tt_jax"],  # experiments/ runs from a checkout: its name is too common for site-packages
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.7,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "chex>=0.1.91,<0.2",
        "numpy>=2.0,<3",
        "minari[hdf5]>=0.5.3,<0.6",
        "gymnasium>=1.2,<2",
        "absl-py>=2.1,<3",
        "ml-collections>=1.1,<2",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "download": ["minari[hf]>=0.5.3,<0.6"],
        "envs": ENVS,
        "plots": PLOTS,
        "logging": LOGGING,
        "mctx": MCTX,
        "test": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "ruff>=0.17,<0.18", *ENVS, *PLOTS, *LOGGING, *MCTX],
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    },
)
