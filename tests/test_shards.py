"""Data whose parts take turns: their order, and the losses of a run against a plain loop over the same order."""

import functools
import itertools
import signal

import jax
import numpy as np
import pytest
from entry_points import read_metrics

from experiments.common import agreement, entry, signals, training_loop
from tt_jax import shards, training, trajectories, transformer, types

SPEC = types.TransitionSpec(observation_dim=2, action_dim=1, num_bins=5)
LENGTHS = [3, 1, 8, 5, 12, 2, 7, 9, 4]


def _store():
    rng = np.random.default_rng(0)
    return trajectories.TokenStore(
        tokens=rng.integers(0, 5, [sum(LENGTHS), SPEC.transition_dim]).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32),
        terminated=rng.random(len(LENGTHS)) < 0.5,
    )


def _plain_turns(sizes, *, batch_size, seed):
    """Yield (shard, how many steps were made on it before) of every step."""
    made = [0] * len(sizes)
    for number in itertools.count():
        for shard in np.random.default_rng((seed, number)).permutation(len(sizes)):
            for _ in range(-(-sizes[shard] // batch_size)):
                yield int(shard), made[shard]
                made[shard] += 1


def test_every_shard_has_a_turn_in_every_round():
    sizes = [10, 25, 7]
    expected = list(itertools.islice(_plain_turns(sizes, batch_size=5, seed=3), 60))
    got = []
    for step in range(60):
        index, first_step, ends = shards.turn(step, sizes=sizes, batch_size=5, seed=3)
        got.append((index, step - first_step))
        assert shards.turn(ends - 1, sizes=sizes, batch_size=5, seed=3) == (index, first_step, ends)
    assert got == expected
    rounds = [tuple(shard for shard, _ in got[i : i + 9]) for i in range(0, 54, 9)]  # 2 + 5 + 2 steps
    assert all(sorted(each) == [0, 0, 1, 1, 1, 1, 1, 2, 2] for each in rounds)
    assert len(set(rounds)) > 1
    assert [shards.turn(step, sizes=[7], batch_size=5, seed=0)[:2] for step in range(9)] == [(0, 0)] * 9


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_the_parts_of_a_store_have_its_windows_in_order(num_shards):
    store, gather = (
        _store(),
        functools.partial(
            trajectories.windows, spec=SPEC, config=trajectories.DataConfig(max_path_length=12), max_transitions=3
        ),
    )
    parts = shards.split_store(store, num_shards)
    assert len({tuple(leaf.shape for leaf in jax.tree.leaves(part)) for part in parts}) == 1
    sizes = [trajectories.num_windows(part.offsets) for part in parts]
    assert min(sizes) >= 1
    expected = gather(store, np.arange(trajectories.num_windows(store.offsets)))
    got = [gather(part, np.arange(size)) for part, size in zip(parts, sizes, strict=True)]
    jax.tree.map(lambda whole, *rows: np.testing.assert_array_equal(whole, np.concatenate(rows)), expected, *got)


def test_parts_without_windows_are_refused():
    with pytest.raises(ValueError, match="data.num_shards=9 leaves a part without a window, of 9 episodes; set fewer"):
        shards.split_store(_store(), 9)
    with pytest.raises(ValueError, match="data.num_shards=0 must be at least 1"):
        shards.split_store(_store(), 0)


def test_transitions_are_split_into_nearly_equal_parts():
    rows = types.Transitions(
        observations=np.arange(14.0).reshape(7, 2),
        actions=np.arange(7.0)[:, None],
        rewards=np.arange(7.0),
        not_terminal=np.ones(7),
        next_observations=np.zeros([7, 2]),
    )
    parts, sizes = shards.split_transitions(rows, 3)
    assert sorted(sizes) == [2, 2, 3]
    jax.tree.map(
        lambda whole, *each: np.testing.assert_array_equal(
            whole, np.concatenate([part[:size] for part, size in zip(each, sizes, strict=True)])
        ),
        *(rows, *parts),
    )
    assert {part.observations.shape for part in parts} == {(3, 2)}


@pytest.fixture
def preemption():
    handlers = {number: signal.getsignal(number) for number in entry.STOP_SIGNALS}
    yield signals.Preemption()
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_on_four_shards_has_the_losses_of_a_plain_loop(tmp_path, preemption):
    store, seed, batch_size, num_steps = _store(), 3, 4, 30
    data_config = trajectories.DataConfig(max_path_length=12)
    model_config = transformer.TransformerConfig(
        spec=SPEC,
        num_layers=1,
        num_heads=1,
        embed_dim=8,
        max_transitions=2,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        residual_dropout=0.0,
    )
    windows_fn = functools.partial(trajectories.windows, spec=SPEC, config=data_config, max_transitions=2)
    stores = shards.split_store(store, 4)
    sizes = [trajectories.num_windows(part.offsets) for part in stores]

    def config(num_steps):
        return training.TrainConfig(
            num_steps=num_steps, batch_size=batch_size, steps_per_call=5, log_every=1, eval_every=100
        )

    train_fn = training.make_train_fn(
        config=config(num_steps), model_config=model_config, windows_fn=windows_fn, num_windows=max(sizes)
    )
    fresh = training.init(jax.random.key(0), config=config(1), model_config=model_config)
    for last in (17, num_steps):  # it goes on in the middle of a turn
        training_loop.run(
            str(tmp_path),
            config=config(last),
            fresh=fresh,
            model={"config": model_config, "tokenizer": None, "run": {}},
            train_fn=train_fn,
            stores=stores,
            sizes=sizes,
            seed=seed,
            evaluate=None,
            describe=lambda metrics, rate: "",
            work_per_step={},
            step_sizes="some windows",
            memory_settings="take fewer",
            preemption=preemption,
        )

    update = jax.jit(functools.partial(training.update, config=config(1), model_config=model_config))
    state, losses = fresh, []
    turns = _plain_turns(sizes, batch_size=batch_size, seed=seed)
    for shard, step_in_shard in itertools.islice(turns, num_steps):
        own_sizes = {"num_windows": sizes[shard], "max_windows": max(sizes)}
        ids = training.window_ids(seed, step_in_shard, batch_size=batch_size, **own_sizes)
        state, metrics = update(state, windows_fn(store, sum(sizes[:shard]) + np.asarray(ids)), None)
        losses.append(metrics["loss"])
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, num_steps + 1))
    np.testing.assert_allclose([line["train/loss"] for line in read_metrics(tmp_path)], losses, rtol=1e-5)


def test_data_that_do_not_fit_a_device_say_how_much_they_are_and_what_to_set(monkeypatch):
    def full(tree):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(training_loop.data_parallel, "replicate", full)
    with pytest.raises(ValueError, match=r"^3 MiB of data do not fit the memory .* --config.data.num_shards=N \(RES"):
        training_loop.place({"a": np.zeros(3 * 2**20, np.uint8)})


def test_the_process_that_differs_is_named():
    names, hosts = ["data", "tokenizer", "configuration"], ["a", "b", "c"]
    assert agreement.describe(names, np.array([[1, 2, 3]] * 3), hosts) is None
    assert agreement.describe(names, np.array([[9, 2, 3], [1, 2, 3], [1, 2, 8]]), hosts).startswith(
        "process 1 on b has another data; process 2 on c has another data and another configuration than"
    )
    assert agreement.describe(names, np.array([[7, 2, 3], [1, 2, 3], [1, 2, 3]]), hosts).startswith(
        "process 0 on a has another data than the rest"
    )
    parts = [{"a": np.float32([1, 2])}, {"a": np.float32([2, 1])}, {"a": np.float64([1, 2])}, "text", None]
    assert len({agreement._checksum(part) for part in parts}) == len(parts)
