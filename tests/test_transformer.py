"""The model is the reference's."""

import dataclasses

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transform_checks import check_transforms

from tt_jax import dropout, transformer, types

SPEC, CONFIG, DIM = golden.SPEC, golden.CONFIG, golden.SPEC.transition_dim
GOAL_CONFIG = dataclasses.replace(CONFIG, goal_conditioned=True, reference_goal_mask=True)


@pytest.fixture(scope="module")
def arrays():
    return golden.load("gpt")


@pytest.fixture(scope="module")
def params(arrays):
    return jax.tree.map(jnp.asarray, golden.params_from(arrays, "state/"))


def jitted(fn, **settings):
    return jax.jit(lambda *arguments: fn(*arguments, **settings))


def test_logits_are_the_reference_s(arrays, params):
    logits = jitted(transformer.apply, config=CONFIG)
    got = logits(params, arrays["X"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, arrays["logits_f64"], rtol=1e-5, atol=1e-5)
    changed = logits(params, arrays["X_values_changed"])
    np.testing.assert_allclose(changed, arrays["logits_values_changed"], rtol=1e-5, atol=1e-5)
    others = np.arange(CONFIG.block_size) % DIM != DIM - 1  # a value token acts at its own position only
    np.testing.assert_array_equal(changed[:, others], got[:, others])


def test_partial_windows_have_the_reference_s_logits(arrays, params):
    logits = jitted(transformer.apply, config=CONFIG)
    for length in arrays["lengths"]:
        got = logits(params, arrays["X"][:, :length])
        np.testing.assert_allclose(got, arrays[f"logits_T{length}"], rtol=1e-5, atol=2e-5)


def test_attention_weights_are_the_reference_s(arrays, params):
    weights = jitted(transformer.attention, config=CONFIG)(params, arrays["X"][:1])
    for layer in range(CONFIG.num_layers):
        np.testing.assert_allclose(weights[layer], arrays[f"attention/layer{layer}"], rtol=1e-5, atol=2e-6)
    assert not np.asarray(weights)[..., DIM - 1 :: DIM].any()


def test_a_token_sees_what_the_reference_lets_it_see(arrays):
    mask = arrays["state/blocks.0.attn.mask"][0, 0]
    np.testing.assert_array_equal(transformer.visible_keys(CONFIG, CONFIG.block_size), mask)
    goal = golden.load("goal")
    np.testing.assert_array_equal(
        transformer.visible_keys(GOAL_CONFIG, CONFIG.block_size), goal["state/blocks.1.attn.mask"][0, 0]
    )
    corrected = transformer.visible_keys(dataclasses.replace(GOAL_CONFIG, reference_goal_mask=False), 9)
    hidden = SPEC.observation_dim + DIM - 1
    expected = [[key <= query and key != hidden for key in range(12)] for query in range(12)]
    np.testing.assert_array_equal(corrected, expected)


@pytest.mark.parametrize("name", ["w5_1_1", "w2_3_half", "w1_1_1"])
def test_loss_and_all_gradients_are_the_reference_s(arrays, params, name):
    (prefix,) = {key.split("/")[0] for key in arrays if key.startswith(name[:3]) and key.endswith("/weights")}
    action, reward, value = map(float, arrays[f"{prefix}/weights"])
    config = dataclasses.replace(CONFIG, action_weight=action, reward_weight=reward, value_weight=value)
    batch = golden.batch_from(arrays)
    grad_fn = jitted(jax.value_and_grad(transformer.loss, has_aux=True), config=config)
    (loss, metrics), grads = grad_fn(params, batch)
    np.testing.assert_allclose(loss, arrays[f"{prefix}/loss_f64"], rtol=1e-6, atol=1e-6)
    expected = golden.params_from(arrays, f"{prefix}/grad_f64/")
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=2e-6)
    for length in (27, 20, 14, 13, 10, 5):
        if f"{prefix}/loss_T{length}" in arrays:
            part = jax.tree.map(lambda leaf, t=length: leaf[:, :t], batch)
            got, _ = transformer.loss(params, part, config=config)
            np.testing.assert_allclose(got, arrays[f"{prefix}/loss_T{length}"], rtol=1e-5)

    # The metrics are means over the tokens that count, by the kind of the target.
    log_probs = np.log(np.take_along_axis(softmax(arrays["logits_f64"]), arrays["Y"][..., None], axis=-1))[..., 0]
    kind = np.array(["observation"] * 3 + ["action"] * 2 + ["reward", "value"])[(np.arange(27) + 1) % DIM]
    kind = np.broadcast_to(kind, log_probs.shape)
    for which in ("observation", "action", "reward", "value"):
        counts = (kind == which) & arrays["mask"]
        np.testing.assert_allclose(metrics[f"loss_{which}"], -log_probs[counts].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], -log_probs[arrays["mask"]].mean(), rtol=1e-5)


def softmax(logits):
    unnormalised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=-1, keepdims=True)


def test_the_goal_conditioned_model_is_the_reference_s_with_its_columns():
    arrays = golden.load("goal")
    params, goal = golden.params_from(arrays, "state/", GOAL_CONFIG), arrays["goal"]
    logits = jitted(lambda params, tokens, goal: transformer.apply(params, tokens, config=GOAL_CONFIG, goal=goal))
    np.testing.assert_allclose(logits(params, arrays["X"], goal), arrays["logits_f64"], rtol=1e-5, atol=1e-5)
    got = logits(params, arrays["X"], arrays["goal_changed"])
    np.testing.assert_allclose(got, arrays["logits_goal_changed"], rtol=1e-5, atol=1e-5)
    for length in (1, 10, 26):
        got = logits(params, arrays["X"][:, :length], goal)
        np.testing.assert_allclose(got, arrays[f"logits_T{length}"], rtol=1e-5, atol=2e-5)
    weights = jitted(lambda *args: transformer.attention(*args[:2], config=GOAL_CONFIG, goal=args[2]))(
        params, arrays["X"][:1], goal[:1]
    )
    for layer in range(CONFIG.num_layers):
        np.testing.assert_allclose(weights[layer], arrays[f"attention/layer{layer}"], rtol=1e-5, atol=2e-6)

    def loss_fn(params):
        return transformer.loss(params, golden.batch_from(arrays), config=GOAL_CONFIG, goal=goal)[0]

    loss, grads = jitted(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-5)
    expected = golden.params_from(arrays, "grad/", GOAL_CONFIG)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_without_the_reference_s_columns_a_goal_is_seen_and_values_are_not():
    arrays = golden.load("goal")
    config = dataclasses.replace(GOAL_CONFIG, reference_goal_mask=False)
    params, tokens = jax.tree.map(jnp.asarray, golden.params_from(arrays, "state/", config)), arrays["X"]
    values = np.arange(tokens.shape[1]) % DIM == DIM - 1
    other_values = np.where(values, (tokens + 3) % SPEC.num_bins, tokens)
    logits = jax.jit(lambda tokens, goal: transformer.apply(params, tokens, config=config, goal=goal))
    got = logits(tokens, arrays["goal"])
    np.testing.assert_array_equal(logits(other_values, arrays["goal"])[:, ~values], got[:, ~values])
    assert (np.abs(logits(tokens, arrays["goal_changed"]) - got).max(axis=(0, 2)) > 1e-4).all()


def test_what_cannot_be_read_is_refused(params):
    tokens = jnp.zeros([1, CONFIG.block_size + 1], jnp.int32)
    with pytest.raises(ValueError, match="28 tokens are too long: max_transitions=4 allows 27"):
        transformer.apply(params, tokens, config=CONFIG)
    with pytest.raises(ValueError, match="goal_conditioned=True, but goal missing"):
        transformer.apply(params, tokens[:, :9], config=GOAL_CONFIG)
    with pytest.raises(ValueError, match="goal_conditioned=False, but goal given"):
        transformer.apply(params, tokens[:, :9], config=CONFIG, goal=tokens[:, :3])
    with pytest.raises(ValueError, match="embed_dim=16 must be a multiple of num_heads=3"):
        dataclasses.replace(CONFIG, num_heads=3)
    with pytest.raises(ValueError, match='dtype must be "float32" or "bfloat16", got "float16"'):
        dataclasses.replace(CONFIG, dtype="float16")
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        dataclasses.replace(CONFIG, num_layers=0)
    with pytest.raises(ValueError, match=r"attention_dropout=1.0 must be in \[0, 1\)"):
        dataclasses.replace(CONFIG, attention_dropout=1.0)


def test_smooth_embeddings_start_alike_for_neighbouring_bins_only():
    spec = types.TransitionSpec(observation_dim=11, action_dim=3, num_bins=100)
    config = transformer.TransformerConfig(spec=spec, smooth_embedding=True)
    params = transformer.init(jax.random.key(0), config=config)
    plain = transformer.init(jax.random.key(0), config=dataclasses.replace(config, smooth_embedding=False))
    without_table = [{name: leaf for name, leaf in p.items() if name != "token_embedding"} for p in (params, plain)]
    chex.assert_trees_all_equal(*without_table)
    table = np.asarray(params["token_embedding"]["embedding"])
    assert table.shape == plain["token_embedding"]["embedding"].shape and not table[-1].any()
    by_bin = table[:-1].reshape(16, 100, 128)
    np.testing.assert_allclose([by_bin.mean(), by_bin.std()], [0.0, 0.1], atol=5e-3)

    def distance(bins_apart):
        return np.linalg.norm(by_bin[:, bins_apart:] - by_bin[:, : 100 - bins_apart], axis=-1)

    assert distance(1).max() < 0.25 * distance(50).min()
    assert (distance(1).mean() < distance(5).mean()) and (distance(5).mean() < distance(20).mean())
    across = np.linalg.norm(by_bin[1:] - by_bin[:-1], axis=-1)  # the same bin of the next dimension
    assert across.min() > 4 * distance(1).mean()


def test_initial_parameters_are_distributed_as_the_reference_s():
    spec = types.TransitionSpec(observation_dim=11, action_dim=3, num_bins=100)
    config = transformer.TransformerConfig(spec=spec, goal_conditioned=True)
    params = jax.tree.map(np.asarray, transformer.init(jax.random.key(0), config=config))
    chex.assert_tree_all_finite(params)
    bound = 128**-0.5
    head = params["head"]["kernel"]
    assert head.shape == (16, 128, 101) and np.abs(head).max() <= bound and np.abs(head).max() > 0.999 * bound
    np.testing.assert_allclose([head.mean(), head.std()], [0.0, bound / 3**0.5], atol=2e-4)
    tokens, positions, goals = (params[f"{name}_embedding"]["embedding"] for name in ("token", "position", "goal"))
    assert not positions.any() and positions.shape == (159, 128)
    assert tokens.shape == (1601, 128) and goals.shape == (1100, 128)
    blocks = [params[f"blocks_{layer}"] for layer in range(4)]
    maps = ("qkv", "projection", "mlp_in", "mlp_out")
    normal = [tokens, goals, *[np.stack([block[name]["kernel"] for block in blocks]) for name in maps]]
    for leaf in normal:
        np.testing.assert_allclose([leaf.mean(), leaf.std()], [0.0, 0.02], atol=2e-4)
        assert np.abs(leaf).max() > 0.07  # 3.5 standard deviations: not truncated
    for name in maps:
        assert not any(block[name]["bias"].any() for block in blocks)
        assert (blocks[0][name]["kernel"] != blocks[1][name]["kernel"]).all()
    for norm in [params["norm"], *[block[name] for block in blocks for name in ("norm_1", "norm_2")]]:
        assert (norm["scale"] == 1).all() and not norm["bias"].any()
    other = transformer.init(jax.random.key(1), config=config)
    assert (other["head"]["kernel"] != head).mean() > 0.99


def test_dropout_drops_26_of_256_and_preserves_the_expectation():
    drop = dropout.make(jax.random.key(0), 64)
    x = jnp.full([64, 999, 7], 3.0)
    got = np.asarray(drop(x, 0.1))
    size = got.size
    rate = 26 / 256
    assert abs((got == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / size)
    np.testing.assert_allclose(got[got != 0], 3.0 / (1 - rate), rtol=1e-6)
    per_place = (got == 0).mean(axis=0)  # no place is favoured, wherever in a word its bits stand
    assert np.abs(per_place - rate).max() < 6 * np.sqrt(rate * (1 - rate) / 64)
    neighbours = ((got[:, 1:] == 0) & (got[:, :-1] == 0)).mean()
    np.testing.assert_allclose(neighbours, rate**2, rtol=0.1)
    assert ((got == 0) != (drop(x, 0.1) == 0)).mean() > rate  # another place in the model, other bits
    np.testing.assert_array_equal(drop(x, 0.001), x)


def test_dropout_bits_of_a_row_do_not_depend_on_the_batch(arrays, params):
    key = jax.random.key(7)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(5))
    logits = jitted(lambda tokens, key: transformer.apply(params, tokens, config=CONFIG, dropout_key=key))
    whole = logits(arrays["X"], key)
    np.testing.assert_array_equal(logits(arrays["X"], row_keys), whole)
    part = logits(arrays["X"][2:4], row_keys[2:4])
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-5, atol=1e-5)
    same_tokens = logits(jnp.broadcast_to(arrays["X"][:1], arrays["X"].shape), key)
    assert (np.abs(same_tokens[1:] - same_tokens[:1]).max(axis=(1, 2)) > 0.01).all()
    assert np.abs(logits(arrays["X"], jax.random.key(8)) - whole).max() > 0.01


@pytest.mark.parametrize("site", ["embedding", "attention", "residual"])
def test_each_dropout_can_be_switched_off_alone(arrays, params, site):
    off = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.0)
    tokens, key = arrays["X"][:1, :9], jax.random.key(0)

    def logits(config, dropout_key):
        return jitted(transformer.apply, config=config, dropout_key=dropout_key)(params, tokens)

    without = logits(CONFIG, None)
    config = dataclasses.replace(CONFIG, **off)
    np.testing.assert_array_equal(logits(config, key), without)
    assert np.abs(logits(dataclasses.replace(config, **{f"{site}_dropout": 0.3}), key) - without).max() > 0.01


def test_bfloat16_is_near_float32(arrays, params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    got = jitted(transformer.apply, config=config)(params, arrays["X"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, arrays["logits_f64"], rtol=0, atol=0.15)
    assert np.abs(got - arrays["logits_f64"]).max() > 1e-3
    (loss, _), grads = jitted(jax.value_and_grad(transformer.loss, has_aux=True), config=config)(
        params, golden.batch_from(arrays)
    )
    np.testing.assert_allclose(loss, arrays["w5_1_1/loss_f64"], rtol=5e-3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    expected = golden.params_from(arrays, "w5_1_1/grad_f64/")["head"]["kernel"]
    np.testing.assert_allclose(grads["head"]["kernel"], expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_parameters_of_numpy_can_be_part_of_a_compiled_function(arrays):
    params = golden.params_from(arrays, "state/")
    got = jax.jit(lambda tokens: transformer.apply(params, tokens, config=CONFIG))(arrays["X"][:, :7])
    np.testing.assert_allclose(got, arrays["logits_T7"], rtol=1e-5, atol=2e-5)


def test_the_loss_runs_under_transformations_with_dropout(arrays, params):
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:2, None, :9]), golden.batch_from(arrays))
    keys = jax.random.split(jax.random.key(0), 2)
    check_transforms(
        lambda batch, key: transformer.loss(params, batch, config=CONFIG, dropout_key=key), batch, keys, rtol=1e-4
    )


def test_fused_attention_has_the_loss_and_gradients_of_float32_within_bfloat16():
    rng = np.random.default_rng(0)
    no_dropout = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.0)
    config = dataclasses.replace(CONFIG, num_layers=1, goal_conditioned=True, **no_dropout)
    drawn = transformer.init(jax.random.key(0), config=config)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), drawn)
    tokens = rng.integers(0, SPEC.num_bins, (4, 4 * DIM)).astype(np.int32)
    batch = types.Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((4, 4 * DIM - 1), np.float32))
    goal = tokens[:, : SPEC.observation_dim]
    grad_fn = jax.jit(jax.value_and_grad(transformer.loss, has_aux=True), static_argnames="config")
    fused = dataclasses.replace(config, dtype="bfloat16", attention="fused")
    (expected, _), expected_grads = grad_fn(params, batch, goal=goal, config=config)
    (loss, _), grads = grad_fn(params, batch, goal=goal, config=fused)
    np.testing.assert_allclose(loss, expected, rtol=2**-8)
    difference = jax.tree.map(jnp.subtract, grads, expected_grads)
    assert 0 < optax.tree.norm(difference) < 0.03 * optax.tree.norm(expected_grads)  # plain attention: 0.011


def test_fused_attention_is_refused_where_no_kernel_has_what_it_needs():
    with pytest.raises(ValueError, match='needs dtype="bfloat16" and attention_dropout=0, got "float32" and 0.1'):
        dataclasses.replace(CONFIG, attention="fused")
    with pytest.raises(ValueError, match="must be one of auto, plain, fused"):
        dataclasses.replace(CONFIG, attention="flash")
