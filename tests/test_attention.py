"""What attention goes to is counted rightly, for a model made by hand whose attention is known."""

import dataclasses
import functools

import golden
import jax
import numpy as np
import pytest
from transform_checks import check_transforms

from tt_jax import attention, transformer

SPEC, DIM = golden.SPEC, golden.SPEC.transition_dim  # 3 observations, 2 actions, reward, value
CONFIG = dataclasses.replace(golden.CONFIG, num_layers=1, num_heads=1, embed_dim=28)
LENGTH = CONFIG.block_size  # 27 tokens of 4 transitions
TOKENS = np.random.default_rng(0).integers(SPEC.num_bins, size=(2, LENGTH)).astype(np.int32)
KIND = ["observation"] * 3 + ["action"] * 2 + ["reward", "value"]


def attend(params, tokens=TOKENS, config=CONFIG, **settings):
    return jax.jit(functools.partial(transformer.attention, config=config, **settings))(params, tokens)


def expect(query, key):
    """Say by hand which relations hold between two places."""
    (time, dim), (past_time, past_dim) = divmod(query, DIM), divmod(key, DIM)
    if key > query or KIND[past_dim] == "value":
        return set()
    asks_for_action = KIND[(dim + 1) % DIM] == "action"
    rules = {
        "near": past_time >= time - 1 and time >= 2,
        "same_dimension": past_time < time and past_dim == dim,
        "target_dimension": past_time < time and past_dim == (dim + 1) % DIM,
        "past_actions": past_time < time and asks_for_action and KIND[past_dim] == "action",
        "past_observations": past_time < time and asks_for_action and KIND[past_dim] == "observation",
    }
    return {name for name, holds in rules.items() if holds}


def test_relations_are_those_found_by_hand():
    found = attention.relations(CONFIG, LENGTH)
    assert tuple(found) == attention.RELATIONS
    for query, key in np.ndindex(LENGTH, LENGTH):
        assert {name for name in found if found[name][query, key]} == expect(query, key), (query, key)


def test_goals_stand_in_front_of_every_transition():
    config = dataclasses.replace(CONFIG, goal_conditioned=True)
    goals = SPEC.observation_dim
    for name, pairs in attention.relations(config, LENGTH).items():
        np.testing.assert_array_equal(pairs[goals:, goals:], attention.relations(CONFIG, LENGTH)[name])
        assert not pairs[:goals].any() and not pairs[:, :goals].any()
    for visible in attention.masks(config, LENGTH).values():
        np.testing.assert_array_equal(visible[:, :goals], transformer.visible_keys(config, LENGTH)[:, :goals])


def uniform_params():
    params = transformer.init(jax.random.key(0), config=CONFIG)
    params["blocks_0"]["qkv"]["kernel"] *= 0
    return params


def test_a_model_without_preferences_has_uniform_shares():
    weights = attend(uniform_params())[0]
    np.testing.assert_allclose(weights[0, 0], attention.uniform(CONFIG, LENGTH), atol=1e-6)
    pairs = attention.relations(CONFIG, LENGTH)
    # Queries with a past for an action: dimensions 2 and 3 of transitions 1 to 3, whose past has 6 keys each.
    expected = [2 * time / (6 * time + dim + 1) for time in (1, 2, 3) for dim in (2, 3)]
    np.testing.assert_allclose(attention.shares(weights, pairs["past_actions"]), np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(
        attention.shares(weights, pairs["past_observations"]), 1.5 * np.mean(expected), rtol=1e-5
    )


def looking_back_params():
    """Make a model whose tokens look at their own dimension one transition before, or else at the first token."""
    params = jax.tree.map(lambda leaf: 0 * leaf, uniform_params())
    embed, wanted = CONFIG.embed_dim, np.zeros([CONFIG.embed_dim] * 2)
    for query in range(LENGTH):
        wanted[query, query - DIM if query >= DIM else 0] = 50.0
    wanted = wanted - wanted.mean(axis=0)  # the norm takes the mean from what is compared
    block = params["blocks_0"]
    block["norm_1"]["scale"] = block["norm_1"]["scale"] + 1
    block["qkv"]["kernel"] = np.concatenate([wanted, np.eye(embed), np.eye(embed)], axis=1).astype(np.float32)
    params["position_embedding"]["embedding"] = np.eye(LENGTH, embed, dtype=np.float32)
    return params


def test_a_model_that_looks_at_the_same_dimension_before_is_seen_to_do_so():
    weights, pairs = attend(looking_back_params())[0], attention.relations(CONFIG, LENGTH)
    for query in range(DIM, LENGTH):
        if query % DIM != DIM - 1:  # a value sees no values
            assert weights[0, 0, query].argmax() == query - DIM and weights[0, 0, query].max() > 0.999
    shares = {name: float(attention.shares(weights, each)[0, 0]) for name, each in pairs.items()}
    np.testing.assert_allclose(shares["same_dimension"], 1, atol=1e-3)
    np.testing.assert_allclose(shares["target_dimension"], 0, atol=0.01)  # values have nothing to look at
    # An action is asked for by the last observation, and by the first action.
    np.testing.assert_allclose([shares["past_actions"], shares["past_observations"]], [0.5, 0.5], atol=1e-3)


@pytest.mark.parametrize("name", attention.HIDDEN)
def test_what_is_hidden_changes_nothing_and_the_rest_does(name):
    config = dataclasses.replace(golden.CONFIG, num_layers=1)
    params = transformer.init(jax.random.key(0), config=config)
    visible = attention.masks(config, LENGTH)[name]
    apply = jax.jit(lambda tokens: transformer.apply(params, tokens, config=config, visible=visible))
    before = apply(TOKENS)
    for key in range(0, LENGTH - DIM):
        time, kind = key // DIM, KIND[key % DIM]
        changed = TOKENS.copy()
        changed[:, key] = (TOKENS[:, key] + 5) % SPEC.num_bins
        after = apply(changed)
        moved = np.abs(after - before).max(axis=(0, 2)) > 1e-6
        later = np.arange(LENGTH) // DIM
        hidden = {
            "older": later > time + 1,
            "past_actions": (later > time) & (kind == "action"),
            "past_observations": (later > time) & (kind == "observation"),
        }[name]
        hidden = hidden | (kind == "value")
        assert not moved[hidden & (np.arange(LENGTH) != key)].any()
        assert moved[~hidden & (np.arange(LENGTH) >= key)].all()


def test_one_layer_s_weights_are_those_of_all():
    arrays = golden.load("gpt")
    params, tokens = golden.params_from(arrays, "state/"), arrays["X"]
    every = attend(params, tokens, golden.CONFIG)
    for layer in range(golden.CONFIG.num_layers):
        np.testing.assert_allclose(attend(params, tokens, golden.CONFIG, layer=layer), every[layer], atol=1e-6)


def test_shares_are_pure():
    pairs = attention.relations(CONFIG, LENGTH)["near"]
    weights = np.random.default_rng(0).random((3, 2, LENGTH, LENGTH)).astype(np.float32)
    check_transforms(lambda each: attention.shares(each, pairs), weights)
