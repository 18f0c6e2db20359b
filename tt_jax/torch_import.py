"""Weights of the PyTorch reference as our parameters; needs numpy only.

Those of the transformers library's `TrajectoryTransformerModel` are the same but for names, and are read alike.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tt_jax import transformer, types


def read_sizes(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Read the sizes of the reference's GPT off the shapes of its state_dict.

    Returns num_layers, embed_dim, num_bins, transition_dim and max_transitions; the number of heads leaves no trace in
    the shapes. Raises ValueError if the names or shapes are not those of that model.
    """
    state_dict = _with_reference_names(state_dict)
    try:
        transition_dim, num_outputs, embed_dim = np.shape(state_dict["head.weight"])
        _, block_size, _ = np.shape(state_dict["pos_emb"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"this is not a state_dict of the reference's GPT; look at {error}.") from error
    if "goal_emb.weight" in state_dict:
        raise ValueError("this is a ConditionalGPT, made for goals; only from_state_dict can read it.")
    if (block_size + 1) % transition_dim:
        raise ValueError(
            f"'pos_emb' has {block_size} positions, one less than a multiple of {transition_dim} expected."
        )
    layers = {name.split(".")[1] for name in state_dict if name.startswith("blocks.")}
    return {
        "num_layers": len(layers),
        "embed_dim": embed_dim,
        "num_bins": num_outputs - 1,
        "transition_dim": transition_dim,
        "max_transitions": (block_size + 1) // transition_dim,
    }


def from_state_dict(state_dict: Mapping[str, Any], *, config: transformer.TransformerConfig) -> types.Params:
    """Turn a state_dict of the reference's GPT (or ConditionalGPT) into parameters for `config`.

    Values are anything that numpy.asarray takes; their float type is kept. The map is linear, so gradients can be
    turned likewise. Raises ValueError naming the first parameter that is missing, left over or of another shape.
    """
    state_dict = _with_reference_names(state_dict)
    state = {name: np.asarray(value) for name, value in state_dict.items() if not name.endswith("attn.mask")}
    used = set()

    def take(name, *shape):
        if name not in state:
            raise ValueError(
                f"the state_dict has no '{name}'; is it the reference's GPT with {config.num_layers} layers?"
            )
        if state[name].shape != shape:
            raise ValueError(f"'{name}' has shape {state[name].shape}, but the configuration asks for {shape}.")
        used.add(name)
        return state[name]

    def linear(name, fan_in, fan_out):
        return {"kernel": take(f"{name}.weight", fan_out, fan_in).T, "bias": take(f"{name}.bias", fan_out)}

    def norm(name):
        return {"scale": take(f"{name}.weight", embed), "bias": take(f"{name}.bias", embed)}

    def block(name):
        heads = [linear(f"{name}.attn.{part}", embed, embed) for part in ("query", "key", "value")]
        return {
            "norm_1": norm(f"{name}.ln1"),
            "qkv": {part: np.concatenate([head[part] for head in heads], axis=-1) for part in ("kernel", "bias")},
            "projection": linear(f"{name}.attn.proj", embed, embed),
            "norm_2": norm(f"{name}.ln2"),
            "mlp_in": linear(f"{name}.mlp.0", embed, 4 * embed),
            "mlp_out": linear(f"{name}.mlp.2", 4 * embed, embed),
        }

    spec, embed = config.spec, config.embed_dim
    # For a goal the reference adds rows of positions that it never reads.
    num_positions = config.block_size + (spec.observation_dim if config.goal_conditioned else 0)
    params = {
        "token_embedding": {"embedding": take("tok_emb.weight", spec.num_bins * spec.transition_dim + 1, embed)},
        "position_embedding": {"embedding": take("pos_emb", 1, num_positions, embed)[0, : config.block_size]},
        **{f"blocks_{index}": block(f"blocks.{index}") for index in range(config.num_layers)},
        "norm": norm("ln_f"),
        "head": {"kernel": take("head.weight", spec.transition_dim, spec.num_bins + 1, embed).swapaxes(1, 2)},
    }
    if config.goal_conditioned:
        params["goal_embedding"] = {"embedding": take("goal_emb.weight", spec.num_bins * spec.observation_dim, embed)}
    left_over = sorted(set(state) - used)
    if left_over:
        raise ValueError(f"the state_dict holds '{left_over[0]}', which a model of {config.num_layers} layers lacks.")
    return params


def _with_reference_names(state_dict):
    """Rename what the transformers library names otherwise: the layers of the MLP, and perhaps a prefix of all."""

    def rename(name):
        name = name.removeprefix("trajectory_transformer.")
        return re.sub(r"^(blocks\.\d+)\.l([12])\.", lambda found: f"{found[1]}.mlp.{2 * int(found[2]) - 2}.", name)

    return {rename(name): value for name, value in state_dict.items()}
