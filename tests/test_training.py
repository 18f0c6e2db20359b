"""Steps are the reference's, and neither devices nor calls change them."""

import dataclasses
import functools
import itertools

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tt_jax import data_parallel, training, transformer, types

NUM_DEVICES = 4  # set in conftest.py


@pytest.fixture(scope="module")
def arrays():
    return golden.load("optim")


@pytest.fixture(scope="module")
def config(arrays):
    return training.TrainConfig(
        warmup_tokens=int(arrays["warmup_tokens"]),
        final_tokens=int(arrays["final_tokens"]),
        num_steps=100,
        batch_size=8,
        steps_per_call=4,
    )


@pytest.fixture(scope="module")
def start(arrays, config):
    """Return the state before the first step, with the parameters of the reference's run."""
    params = jax.tree.map(jnp.asarray, golden.params_from(arrays, "init/"))
    opt_state = training.make_optimizer(config).init(params)
    return training.TrainState(
        params=params, opt_state=opt_state, step=jnp.int32(0), tokens_seen=jnp.zeros([2], jnp.uint32)
    )


@pytest.fixture(scope="module")
def update(config):
    """Return the compiled update(state, batch) without dropout."""

    def update(state, batch):
        return training.update(state, batch, None, config=config, model_config=golden.CONFIG)

    return jax.jit(update)


def without_key_bias(params):
    """Leave out the key biases, whose gradient is zero but for rounding, which Adam blows up to whole steps."""

    def shorten(path, leaf):
        if "qkv" not in jax.tree_util.keystr(path) or path[-1].key != "bias":
            return leaf
        query, _, value = jnp.split(leaf, 3)
        return jnp.concatenate([query, value])

    return jax.tree_util.tree_map_with_path(shorten, params)


def test_every_step_is_the_reference_s(arrays, start, update):
    state = start
    for index in range(5):
        state, metrics = update(state, golden.batch_from(arrays, f"batch{index}/"))
        np.testing.assert_allclose(metrics["learning_rate"], arrays["lr_used_at_step"][index], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], arrays["grad_norms_before_clip_f64"][index], rtol=1e-5)
        if f"after{index + 1}_f64/pos_emb" in arrays:
            expected = golden.params_from(arrays, f"after{index + 1}_f64/")
            chex.assert_trees_all_close(without_key_bias(state.params), without_key_bias(expected), rtol=0, atol=1e-6)
            chex.assert_trees_all_close(state.params, expected, rtol=0, atol=1e-3)
    assert int(state.step) == 5
    np.testing.assert_array_equal(state.tokens_seen, [0, arrays["n_tokens_after_all"]])


def test_the_loss_is_that_of_the_reference_before_the_step(arrays):
    params = golden.params_from(arrays, "init/")
    loss, _ = transformer.loss(params, golden.batch_from(arrays, "batch0/"), config=golden.CONFIG)
    np.testing.assert_allclose(loss, arrays["losses_f64"][0], rtol=1e-5)


def test_weight_decay_is_for_the_reference_s_parameters(arrays):
    names = set(arrays["decay_names"].tolist())
    state = {name: np.full(arrays[f"init/{name}"].shape, name in names) for name in
             (key.removeprefix("init/") for key in arrays if key.startswith("init/"))}  # fmt: skip
    expected = golden.params_from({f"x/{name}": value for name, value in state.items()}, "x/")
    mask = training.decay_mask(golden.params_from(arrays, "init/"))
    assert jax.tree.map(bool, mask) == jax.tree.map(lambda leaf: bool(leaf.all()), expected)
    assert all(leaf.all() == leaf.any() for leaf in jax.tree.leaves(expected))


def test_muon_turns_kernels_by_their_polar_factors_and_leaves_the_rest_to_adam(arrays, config, start, update):
    batch = golden.batch_from(arrays, "batch0/")
    muon = dataclasses.replace(config, optimizer="muon", weight_decay=0.0)
    state = start.replace(opt_state=training.make_optimizer(muon).init(start.params))
    step = functools.partial(training.update, config=muon, model_config=golden.CONFIG)
    moved, metrics = jax.jit(step)(state, batch, None)
    turned = jax.tree.map(lambda old, new: (old - new) / metrics["learning_rate"], start.params, moved.params)
    grads = jax.grad(lambda params: transformer.loss(params, batch, config=golden.CONFIG)[0])(start.params)
    for block in ("blocks_0", "blocks_1"):
        for name in ("qkv", "projection", "mlp_in", "mlp_out"):
            got, grad = (tree[block][name]["kernel"] for tree in (turned, grads))
            left, _, right = np.linalg.svd(grad, full_matrices=False)
            expected = left @ right * 0.4 * max(grad.shape) ** 0.5
            cosine = np.sum(got * expected) / np.linalg.norm(got) / np.linalg.norm(expected)
            assert cosine > 0.9, (name, cosine)  # Newton-Schulz stops short of 1 for the smallest singular values
            assert 0.7 < np.linalg.norm(got) / np.linalg.norm(expected) < 1.2
    adam, _ = update(start, batch)  # Nesterov's first step is longer by 1 + 0.9 / 1.9
    expected = jax.tree.map(lambda old, new: old + 28 / 19 * (new - old), start.params, adam.params)
    for params in (moved.params, expected):
        del params["head"]
        for block, name in itertools.product(("blocks_0", "blocks_1"), ("qkv", "projection", "mlp_in", "mlp_out")):
            del params[block][name]["kernel"]
    chex.assert_trees_all_close(moved.params, expected, rtol=0, atol=1e-6)


def test_the_schedule_is_the_reference_s_also_where_its_cosine_rises_again(arrays):
    settings = {"warmup_tokens": int(arrays["schedule_warmup"]), "final_tokens": int(arrays["schedule_final"])}
    config = training.TrainConfig(learning_rate=1.0, **settings)
    got = training.learning_rate(arrays["schedule_tokens"], config=config)
    np.testing.assert_allclose(got, arrays["schedule_mult"], rtol=1e-5, atol=1e-6)
    beyond = arrays["schedule_tokens"] >= settings["final_tokens"]
    assert (arrays["schedule_mult"][beyond] > 0.2).any()
    clamped = training.learning_rate(arrays["schedule_tokens"], config=dataclasses.replace(config, clamp_cosine=True))
    np.testing.assert_allclose(clamped[beyond], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(clamped[~beyond], got[~beyond])
    other = training.TrainConfig(learning_rate=1.0, warmup_tokens=1, final_tokens=2)
    as_arrays = training.learning_rate(arrays["schedule_tokens"], config=other, schedule=training.as_schedule(config))
    np.testing.assert_allclose(as_arrays, got, rtol=1e-5)


def test_the_schedule_is_filled_in_from_the_number_of_windows():
    config = training.with_token_schedule(training.TrainConfig(), num_windows=1000, block_size=27)
    assert (config.warmup_tokens, config.final_tokens) == (27_000, 540_000)
    given = training.TrainConfig(warmup_tokens=5, final_tokens=70)
    assert training.with_token_schedule(given, num_windows=1000, block_size=27) == given


def test_tokens_are_counted_beyond_32_bits(arrays, config, start, update):
    batch = golden.batch_from(arrays, "batch1/")
    real = int((batch.targets != golden.SPEC.stop_token).sum())
    seen = jnp.array([2, 2**32 - 5], jnp.uint32)
    state, metrics = update(start.replace(tokens_seen=seen, step=jnp.int32(9)), batch)
    np.testing.assert_array_equal(state.tokens_seen, [3, real - 5])
    expected = training.learning_rate(3.0 * 2**32 - 5, config=config)
    np.testing.assert_allclose(metrics["learning_rate"], expected, rtol=1e-6)
    unmoved, _ = update(state.replace(tokens_seen=jnp.array([3, 1], jnp.uint32)), batch)
    np.testing.assert_array_equal(unmoved.tokens_seen, [3, real + 1])


def test_a_step_of_a_goal_conditioned_model_has_the_gradient_of_the_reference():
    arrays = golden.load("goal")
    model_config = dataclasses.replace(golden.CONFIG, goal_conditioned=True, reference_goal_mask=True)
    batch = golden.batch_from(arrays).replace(goal=arrays["goal"].astype(np.int32))
    params = jax.tree.map(jnp.asarray, golden.params_from(arrays, "state/", model_config))
    config = training.TrainConfig(num_steps=1)
    opt_state = training.make_optimizer(config).init(params)
    state = training.TrainState(
        params=params, opt_state=opt_state, step=jnp.int32(0), tokens_seen=jnp.zeros([2], jnp.uint32)
    )
    update = functools.partial(training.update, config=config, model_config=model_config)
    moved, metrics = jax.jit(update)(state, batch, None)
    squares = [np.sum(np.square(value)) for name, value in arrays.items() if name.startswith("grad/")]
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(np.sum(squares)), rtol=1e-5)
    used = np.zeros(params["goal_embedding"]["embedding"].shape[0], bool)
    used[(arrays["goal"] + golden.SPEC.num_bins * np.arange(3)).reshape(-1)] = True
    has_moved = (moved.params["goal_embedding"]["embedding"] != params["goal_embedding"]["embedding"]).any(axis=1)
    np.testing.assert_array_equal(has_moved, used)


def ids_of_steps(steps, *, seed=0, **settings):
    """Return the window ids of `steps`, one after the other."""
    ids = jax.jit(jax.vmap(lambda seed, step: training.window_ids(seed, step, **settings), (None, 0)))
    return np.asarray(ids(seed, jnp.asarray(steps))).reshape(-1)


@pytest.mark.parametrize("num_windows, batch_size", [(1, 3), (2, 2), (3, 2), (8, 8), (64, 16), (100, 7), (1000, 256)])
def test_every_epoch_visits_each_window_once_in_its_own_order(num_windows, batch_size):
    num_epochs = 4
    steps = np.arange(-(-num_epochs * num_windows // batch_size))  # some batches cross the end of an epoch
    settings = {"num_windows": num_windows, "batch_size": batch_size}
    orders = [ids_of_steps(steps, seed=seed, **settings)[: num_epochs * num_windows] for seed in (0, 1)]
    epochs = np.concatenate([order.reshape(num_epochs, num_windows) for order in orders])
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_windows))
    if num_windows >= 64:
        assert len({tuple(epoch) for epoch in [*epochs, np.arange(num_windows)]}) == 2 * num_epochs + 1


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = [
        ids_of_steps(np.arange(120 // batch_size), seed=3, batch_size=batch_size, num_windows=50)
        for batch_size in (10, 40, 120)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])


def test_the_order_is_well_mixed():
    order = ids_of_steps([0], batch_size=2000, num_windows=2000)
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1
    steps = np.abs(np.diff(order))
    np.testing.assert_allclose(steps.mean(), 2000 / 3, rtol=0.1)  # as for independent numbers


def test_the_position_is_exact_up_to_the_end_of_32_bits():
    settings = {"seed": 1, "num_windows": 1000}
    last = 2**32 // 256 - 1
    begin = last * 256 // 1000 * 1000  # of the last epoch, which 2**32 cuts short
    counted = ids_of_steps(np.arange(begin // 8, 2**32 // 8, dtype=np.uint32), batch_size=8, **settings)
    assert len(set(counted.tolist())) == len(counted) == 2**32 - begin
    np.testing.assert_array_equal(ids_of_steps([last], batch_size=256, **settings), counted[-256:])


SEED = 5
TOKENS = np.random.default_rng(0).integers(
    0, golden.SPEC.num_bins + 1, size=(30, golden.CONFIG.block_size + 1), dtype=np.int32
)


def windows_fn(store, ids):
    """Return made-up windows, of which some tokens are masked."""
    tokens = store[ids]
    weights = (tokens[:, :-1] % 4 != 1).astype(jnp.float32)
    return types.Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=weights)


@pytest.fixture(scope="module")
def train_on_four(config):
    """Return train(state, num_steps) of the compiled steps on four devices, with dropout."""
    assert golden.CONFIG.attention_dropout > 0
    return make_train_on_four(config)


def make_train_on_four(config):
    assert jax.device_count() == NUM_DEVICES
    train_fn = training.make_train_fn(
        config=config, model_config=golden.CONFIG, windows_fn=windows_fn, num_windows=len(TOKENS)
    )
    store, seed = data_parallel.replicate(TOKENS), data_parallel.replicate(np.int32(SEED))
    return lambda state, num_steps: train_fn(state, store, seed, data_parallel.replicate(np.int32(num_steps)))


def test_four_devices_take_the_steps_of_one(config, start, train_on_four):
    replicas, metrics = train_on_four(data_parallel.replicate(start), 4)
    for leaf in jax.tree.leaves((replicas, metrics)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))  # all devices agree

    def step_on_one(state):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 1), state.step)
        ids = training.window_ids(SEED, state.step, batch_size=config.batch_size, num_windows=len(TOKENS))
        batch = windows_fn(jnp.asarray(TOKENS), ids)
        return training.update(state, batch, key, config=config, model_config=golden.CONFIG)

    step_on_one = jax.jit(step_on_one)
    assert config.batch_size * 4 > len(TOKENS)  # so the last batch crosses the end of the epoch
    state = start
    for index in range(4):
        state, expected = step_on_one(state)
        got = jax.tree.map(lambda leaf, i=index: leaf[0, i], metrics)
        chex.assert_trees_all_close(got, expected, rtol=2e-5)
    got = data_parallel.unreplicate(replicas)
    chex.assert_trees_all_close(without_key_bias(got.params), without_key_bias(state.params), rtol=0, atol=5e-6)
    np.testing.assert_array_equal(got.tokens_seen, state.tokens_seen)
    assert int(got.step) == 4


def test_splitting_the_steps_into_calls_changes_nothing(start, train_on_four):
    whole, metrics = train_on_four(data_parallel.replicate(start), 4)
    state = data_parallel.replicate(start)
    for num_steps in (1, 3):
        state, part = train_on_four(state, num_steps)
    np.testing.assert_array_equal(part["loss"][0, :3], metrics["loss"][0, 1:4])
    chex.assert_trees_all_equal(data_parallel.unreplicate(state), data_parallel.unreplicate(whole))


@pytest.mark.parametrize("size, remat", [(2, False), (4, True), (1, True)])
def test_less_memory_changes_no_bits_of_dropout_and_no_more_than_the_rounding(arrays, config, start, size, remat):
    batch, key = golden.batch_from(arrays, "batch0/"), jax.random.key(9)

    def step(train_config, model_config):
        def update(state):
            return training.update(state, batch, key, config=train_config, model_config=model_config)

        return jax.jit(update)(start)

    assert golden.CONFIG.attention_dropout > 0 and len(batch.targets) == 4
    expected, expected_metrics = step(config, golden.CONFIG)
    small = dataclasses.replace(config, microbatch_size=size)
    got, metrics = step(small, dataclasses.replace(golden.CONFIG, remat=remat))
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)
    # Adam's first moment is a tenth of the clipped gradient.
    chex.assert_trees_all_close(got.opt_state[1].mu, expected.opt_state[1].mu, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(got.tokens_seen, expected.tokens_seen)


def test_microbatches_of_four_devices_take_the_same_steps(config, start, train_on_four):
    expected, expected_metrics = train_on_four(data_parallel.replicate(start), 2)
    got, metrics = make_train_on_four(dataclasses.replace(config, microbatch_size=1))(data_parallel.replicate(start), 2)
    for name in metrics:
        np.testing.assert_allclose(metrics[name][:, :2], expected_metrics[name][:, :2], rtol=1e-4)
    got, expected = (without_key_bias(data_parallel.unreplicate(each.params)) for each in (got, expected))
    chex.assert_trees_all_close(got, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "windows, block_size, expected",
    [(64, 99, 16), (64, 159, 16), (96, 29, 96), (97, 99, 97), (8, 5000, 1)],  # 97 has no divisor but 1
)
def test_a_cpu_computes_about_a_thousand_tokens_per_core_at_a_time(config, monkeypatch, windows, block_size, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert config.windows_at_once(windows, block_size=block_size) == expected
    assert dataclasses.replace(config, microbatch_size=1).windows_at_once(windows, block_size=block_size) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert config.windows_at_once(windows, block_size=block_size) == windows


def test_a_run_uses_the_microbatches_that_suit_the_processor(config, start, monkeypatch):
    """Made to fit one window: a train_fn that is traced sees the update of parts of 1 row."""
    monkeypatch.setattr(training, "_CPU_TOKENS", 1e-3)
    sizes, accumulate = [], training._accumulate

    def spy(*arguments, size, **rest):
        sizes.append(size)
        return accumulate(*arguments, size=size, **rest)

    monkeypatch.setattr(training, "_accumulate", spy)
    make_train_on_four(config)(data_parallel.replicate(start), 1)
    assert sizes and set(sizes) == {1}


def test_microbatches_must_divide_the_batch_of_a_device(config):
    odd = dataclasses.replace(config, microbatch_size=3)
    settings = {"config": odd, "model_config": golden.CONFIG, "windows_fn": windows_fn, "num_windows": 30}
    for make_fn in (training.make_train_fn, training.make_eval_fn):
        with pytest.raises(ValueError, match="train.microbatch_size=3 must divide the 2 windows of a device's batch"):
            make_fn(**settings)
    with pytest.raises(ValueError, match="train.microbatch_size=-2 must not be negative"):
        dataclasses.replace(config, microbatch_size=-2)


def test_input_noise_moves_observation_and_action_tokens_alone():
    spec = types.TransitionSpec(observation_dim=3, action_dim=2, num_bins=100)
    dims = np.arange(34) % spec.transition_dim
    tokens = np.full([2000, 34], 50)
    tokens[:, 7:10] = spec.stop_token
    row_keys = jax.random.split(jax.random.key(0), len(tokens))
    moved = np.asarray(training._add_noise(tokens, row_keys, spec=spec, deviation=4.0))
    is_free = (dims < 5) & (tokens[0] != spec.stop_token)
    np.testing.assert_array_equal(moved[:, ~is_free], tokens[:, ~is_free])
    np.testing.assert_allclose(moved[:, is_free].mean(axis=0), 50, atol=6 * 4 / 2000**0.5)
    np.testing.assert_allclose(moved[:, is_free].std(axis=0), 4, rtol=0.1)  # with 1 / 12 of the rounding
    part = training._add_noise(tokens[3:5], row_keys[3:5], spec=spec, deviation=4.0)
    np.testing.assert_array_equal(part, moved[3:5])
    for edge in (0, 99):
        at_edge = training._add_noise(jnp.full([50, 34], edge), row_keys[:50], spec=spec, deviation=4.0)
        assert at_edge.min() >= 0 and at_edge.max() < spec.num_bins and (at_edge != edge).any()


def test_input_noise_ends_after_its_steps(config, start, train_on_four):
    train_noisy = make_train_on_four(dataclasses.replace(config, input_noise=2.0, input_noise_steps=2))
    plain = train_on_four(data_parallel.replicate(start), 2)[1]["loss"][0, :2]
    state, metrics = train_noisy(data_parallel.replicate(start), 2)
    assert (np.abs(metrics["loss"][0, :2] - plain) > 1e-4).all()
    state = jax.tree.map(np.asarray, state)  # what follows is given away
    noisy, metrics = train_noisy(jax.tree.map(jnp.asarray, state), 1)
    expected, expected_metrics = train_on_four(jax.tree.map(jnp.asarray, state), 1)
    np.testing.assert_allclose(metrics["loss"][0, 0], expected_metrics["loss"][0, 0], rtol=1e-6)
    chex.assert_trees_all_close(noisy.params, expected.params, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1])
def test_evaluation_is_the_mean_over_evenly_spaced_windows_without_dropout(config, start, size):
    evaluate = training.make_eval_fn(
        config=dataclasses.replace(config, microbatch_size=size),
        model_config=golden.CONFIG,
        windows_fn=windows_fn,
        num_windows=len(TOKENS),
    )
    metrics = evaluate(data_parallel.replicate(start.params), data_parallel.replicate(TOKENS))
    ids = np.linspace(0, 29, 32).astype(int)  # 30 windows fill 4 batches of 8
    _, expected = transformer.loss(start.params, windows_fn(jnp.asarray(TOKENS), ids), config=golden.CONFIG)
    chex.assert_trees_all_close(data_parallel.unreplicate(metrics), jax.tree.map(np.asarray, expected), rtol=1e-5)


def test_batches_and_runs_of_impossible_size_are_refused(config):
    settings = {"model_config": golden.CONFIG, "windows_fn": windows_fn, "num_windows": 30}
    odd = dataclasses.replace(config, batch_size=6)
    message = "batch_size=6 must be a multiple of the 4 devices; set --config.train.batch_size"
    with pytest.raises(ValueError, match=message):
        training.make_train_fn(config=odd, **settings)
    with pytest.raises(ValueError, match=message):
        training.make_eval_fn(config=odd, **settings)
    with pytest.raises(ValueError, match=r"num_steps \* batch_size = 4294967296 must be below 2\*\*32"):
        training.make_train_fn(config=dataclasses.replace(config, num_steps=2**29), **settings)
    with pytest.raises(ValueError, match="train.batch_size=0 must be at least 1"):
        dataclasses.replace(config, batch_size=0)
    with pytest.raises(ValueError, match="train.learning_rate=0.0 and train.grad_clip=1.0 must be positive"):
        dataclasses.replace(config, learning_rate=0.0)
    with pytest.raises(ValueError, match="train.input_noise=5.0 and train.input_noise_steps=0 must both be positive"):
        dataclasses.replace(config, input_noise=5.0)


def test_a_step_tells_the_losses_by_kind_the_gradient_s_norm_and_the_rate(arrays, start, update):
    _, metrics = update(start, golden.batch_from(arrays, "batch0/"))
    losses = {"loss", "loss_observation", "loss_action", "loss_reward", "loss_value"}
    assert set(metrics) == losses | {"grad_norm", "learning_rate"}
