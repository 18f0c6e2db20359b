"""Arrays computed by the PyTorch reference (see data/README.md) and its model as ours."""

import pathlib

import numpy as np

from tt_jax import tokenization, torch_import, transformer, types

SPEC = types.TransitionSpec(observation_dim=3, action_dim=2, num_bins=10)
CONFIG = transformer.TransformerConfig(spec=SPEC, num_layers=2, num_heads=2, embed_dim=16, max_transitions=4)


def load(name):
    """Return the arrays of data/<name>.npz by their names."""
    with np.load(pathlib.Path(__file__).parent / "data" / f"{name}.npz") as arrays:
        return dict(arrays)


def params_from(arrays, prefix, config=CONFIG):
    """Turn the arrays under `prefix`, named as in the reference's state_dict, into a tree of parameters."""
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return torch_import.from_state_dict(state, config=config)


def batch_from(arrays, prefix=""):
    """Return the training batch stored under `prefix`."""
    return types.Batch(
        inputs=arrays[f"{prefix}X"].astype(np.int32),
        targets=arrays[f"{prefix}Y"].astype(np.int32),
        weights=arrays[f"{prefix}mask"].astype(np.float32),
    )


def discretizer_from(thresholds):
    """Return the discretizer with the `thresholds` [V + 1, D] of the reference."""
    edges = thresholds.T
    return tokenization.Discretizer(thresholds=edges, centers=(edges[:, :-1] + edges[:, 1:]) / 2)
