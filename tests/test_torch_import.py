"""Weights of the reference find their places; what does not fit is named."""

import dataclasses

import golden
import jax
import numpy as np
import pytest

from tt_jax import torch_import, transformer

GOAL_CONFIG = dataclasses.replace(golden.CONFIG, goal_conditioned=True)


@pytest.fixture(scope="module")
def state():
    arrays = golden.load("gpt")
    return {name.removeprefix("state/"): array for name, array in arrays.items() if name.startswith("state/")}


def test_every_weight_stands_where_the_model_reads_it(state):
    params = torch_import.from_state_dict(state, config=golden.CONFIG)
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    blocks = params["blocks_1"]
    qkv = x @ blocks["qkv"]["kernel"] + blocks["qkv"]["bias"]
    for part, name in zip(np.split(qkv, 3), ("query", "key", "value"), strict=True):
        weight, bias = (state[f"blocks.1.attn.{name}.{kind}"] for kind in ("weight", "bias"))
        np.testing.assert_allclose(part, weight @ x + bias, rtol=1e-5, atol=1e-5)
    hidden = x @ blocks["mlp_in"]["kernel"] + blocks["mlp_in"]["bias"]
    np.testing.assert_allclose(
        hidden, state["blocks.1.mlp.0.weight"] @ x + state["blocks.1.mlp.0.bias"], rtol=1e-4, atol=1e-5
    )
    for ours, theirs in [("projection", "attn.proj"), ("mlp_out", "mlp.2")]:
        np.testing.assert_array_equal(blocks[ours]["kernel"], state[f"blocks.1.{theirs}.weight"].T)
        np.testing.assert_array_equal(blocks[ours]["bias"], state[f"blocks.1.{theirs}.bias"])
    for ours, theirs in [("norm_1", "ln1"), ("norm_2", "ln2")]:
        np.testing.assert_array_equal(blocks[ours]["scale"], state[f"blocks.1.{theirs}.weight"])
        np.testing.assert_array_equal(blocks[ours]["bias"], state[f"blocks.1.{theirs}.bias"])
    np.testing.assert_array_equal(params["norm"]["scale"], state["ln_f.weight"])
    np.testing.assert_array_equal(params["norm"]["bias"], state["ln_f.bias"])
    np.testing.assert_array_equal(params["token_embedding"]["embedding"], state["tok_emb.weight"])
    np.testing.assert_array_equal(params["position_embedding"]["embedding"], state["pos_emb"][0])
    np.testing.assert_array_equal(params["head"]["kernel"][3], state["head.weight"][3].T)


@pytest.mark.parametrize("config, name", [(golden.CONFIG, "gpt"), (GOAL_CONFIG, "goal")], ids=["gpt", "goal"])
def test_the_tree_is_that_of_init(config, name):
    params = golden.params_from(golden.load(name), "state/", config)
    expected = jax.eval_shape(lambda key: transformer.init(key, config=config), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_the_float_type_is_kept_and_lists_are_taken(state):
    double = {name: value.astype(np.float64) for name, value in state.items()}
    double["ln_f.bias"] = double["ln_f.bias"].tolist()
    params = torch_import.from_state_dict(double, config=golden.CONFIG)
    assert params["head"]["kernel"].dtype == params["norm"]["bias"].dtype == np.float64
    np.testing.assert_array_equal(params["norm"]["bias"], state["ln_f.bias"])


@pytest.mark.parametrize("prefix", ["", "trajectory_transformer."])
def test_the_names_of_the_transformers_library_are_read(state, prefix):
    """Its `modeling_trajectory_transformer.py` calls the layers of the MLP l1 and l2, and stores no mask."""

    def rename(name):
        return prefix + name.replace(".mlp.0.", ".l1.").replace(".mlp.2.", ".l2.")

    theirs = {rename(name): value for name, value in state.items() if not name.endswith("mask")}
    assert f"{prefix}blocks.1.l2.bias" in theirs
    assert torch_import.read_sizes(theirs) == torch_import.read_sizes(state)
    jax.tree.map(
        np.testing.assert_array_equal,
        torch_import.from_state_dict(theirs, config=golden.CONFIG),
        torch_import.from_state_dict(state, config=golden.CONFIG),
    )


@pytest.mark.parametrize("prefix", ["", "blocks.1."])
def test_what_is_missing_or_left_over_is_named(state, prefix):
    names = [name for name in state if name.startswith(prefix) and not name.endswith("mask")]
    for name in names:
        missing = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=f"the state_dict has no '{name}'"):
            torch_import.from_state_dict(missing, config=golden.CONFIG)
    with pytest.raises(ValueError, match=rf"the state_dict holds '{prefix}other', which a model of 2 layers lacks"):
        torch_import.from_state_dict(state | {f"{prefix}other": np.zeros(3)}, config=golden.CONFIG)


def test_a_model_of_other_sizes_is_named(state):
    for changes, message in [
        ({"num_layers": 3}, r"has no 'blocks\.2\.\S+'; is it the reference's GPT with 3 layers"),
        ({"num_layers": 1}, r"holds 'blocks\.1\.\S+', which a model of 1 layers lacks"),
        ({"embed_dim": 8}, r"'\S+' has shape \(\S+ 16\), but the configuration asks for \(\S+ 8\)"),
        ({"max_transitions": 5}, r"'pos_emb' has shape \(1, 27, 16\), but the configuration asks for \(1, 34, 16\)"),
        ({"goal_conditioned": True}, "'pos_emb' has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch_import.from_state_dict(state, config=dataclasses.replace(golden.CONFIG, **changes))


def test_sizes_are_read_off_the_shapes(state):
    sizes = torch_import.read_sizes(state)
    assert sizes == {"num_layers": 2, "embed_dim": 16, "num_bins": 10, "transition_dim": 7, "max_transitions": 4}
    with pytest.raises(ValueError, match="not a state_dict of the reference's GPT; look at 'head.weight'"):
        torch_import.read_sizes({name: value for name, value in state.items() if name != "head.weight"})
    with pytest.raises(ValueError, match="'pos_emb' has 26 positions, one less than a multiple of 7 expected"):
        torch_import.read_sizes(state | {"pos_emb": state["pos_emb"][:, 1:]})
    with pytest.raises(ValueError, match="ConditionalGPT"):
        torch_import.read_sizes(state | {"goal_emb.weight": np.zeros((30, 16))})
