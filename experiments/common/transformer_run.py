"""Training of a Trajectory Transformer on a Minari dataset, from its configuration to checkpoints in a workdir."""

import dataclasses
import functools
import time

import jax
import numpy as np
from absl import logging

from experiments.common import datasets, entry, memory, time_budget, training_loop
from tt_jax import data_parallel, shards, training, trajectories, transformer


def train(config, workdir, *, preemption, download=False, minutes=None):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop.

    With `minutes` the number of updates and the schedule are set so that loading, compilation and training take that
    long on this machine. They are kept with the run: it goes on with them, given minutes or not.
    """
    started = time.monotonic()
    train_config = entry.to_dataclass(training.TrainConfig, config.train)
    shards.check_count(config.data.num_shards)
    with memory.explained(f"the dataset {config.dataset}", datasets.MEMORY_SETTINGS):
        data = datasets.prepare(config, download=download)
    model_config = entry.to_dataclass(transformer.TransformerConfig, config.model, spec=data.spec)
    stores = shards.split_store(data.train, config.data.num_shards)
    sizes = [trajectories.num_windows(store.offsets) for store in stores]
    train_config = training.with_token_schedule(
        train_config, num_windows=sum(sizes), block_size=model_config.block_size
    )
    windows_fn = functools.partial(
        trajectories.windows, spec=data.spec, config=data.config, max_transitions=model_config.max_transitions
    )
    functions = {"config": train_config, "model_config": model_config, "windows_fn": windows_fn}
    train_fn = training.make_train_fn(num_windows=max(sizes), **functions)
    is_timed = bool(minutes) or time_budget.is_recorded(workdir)

    def shrink(share):
        if config.train.microbatch_size >= 0:
            return None
        smaller = _smaller_microbatch(functions["config"], share, block_size=model_config.block_size)
        if not smaller:
            return None
        logging.info("train.microbatch_size is %d, since more windows at a time do not fit the memory", smaller)
        functions["config"] = dataclasses.replace(functions["config"], microbatch_size=smaller)
        smaller_fn = training.make_train_fn(num_windows=max(sizes), **functions)
        return _with_schedule(smaller_fn, functions["config"]) if is_timed else smaller_fn

    evaluate = None
    if data.held_out:
        held_out = training_loop.place(data.held_out)
        num_held_out = trajectories.num_windows(data.held_out.offsets)
        make_eval_fn = functools.cache(lambda: training.make_eval_fn(num_windows=num_held_out, **functions))

        def evaluate(state):  # by the microbatch that training has found by then
            return data_parallel.unreplicate(make_eval_fn()(state.params, held_out))

    run = data.run
    fresh = _init(config.seed, train_config, model_config)
    if is_timed:
        ends = started + 60 * (minutes or 0)
        measured = (train_config, train_fn, fresh, training_loop.shard(stores, sizes, 0), evaluate)
        fit = functools.partial(_fit, *measured, seed=config.seed, ends=ends)
        numbers = time_budget.recorded(workdir, minutes, fit)
        train_config = functions["config"] = dataclasses.replace(train_config, **numbers)
        train_fn = _with_schedule(train_fn, train_config)
        run = run | {"train": run["train"] | numbers}
    tokens_per_step = train_config.batch_size * model_config.block_size
    training_loop.run(
        workdir,
        config=train_config,
        free_fields=("remat", "attention"),
        fresh=fresh,
        model={
            "config": model_config,
            "tokenizer": data.tokenizer,
            "run": run,
        },
        train_fn=train_fn,
        shrink=shrink,
        stores=stores,
        sizes=sizes,
        seed=config.seed,
        evaluate=evaluate,
        describe=lambda metrics, rate: (
            f"loss {metrics['loss'][-1]:.4f}, lr {metrics['learning_rate'][-1]:.1e}, "
            f"{rate * tokens_per_step:.2g} tokens/s"
        ),
        work_per_step={"tokens": tokens_per_step},
        step_sizes=f"{train_config.batch_size} windows of {model_config.block_size} tokens ({tokens_per_step} in all)",
        memory_settings=_memory_settings(train_config, model_config),
        preemption=preemption,
    )


def _init(seed, train_config, model_config):
    """Return the state before the first step; one that does not fit the memory is a ValueError."""
    init = jax.jit(functools.partial(training.init, config=train_config, model_config=model_config))
    layers = f"{model_config.num_layers} layers of width {model_config.embed_dim}"
    with memory.explained(
        f"a model of {layers} for {model_config.block_size} tokens",
        "lower model.embed_dim, num_layers or max_transitions, or data.num_bins",
    ):
        memory.check(init, jax.random.key(seed))
        return init(jax.random.key(seed))


def _smaller_microbatch(train_config, share, *, block_size):
    """Return the most windows at a time that need at most the `share` of today's memory, at least 1; 0: none less."""
    windows = train_config.batch_size // jax.device_count()
    now = train_config.windows_at_once(windows, block_size=block_size)
    smaller = [size for size in range(1, now) if windows % size == 0]
    return max((size for size in smaller if size <= 0.9 * share * now), default=min(smaller, default=0))


def _memory_settings(train_config, model_config):
    """Say which settings make a step smaller; those before the last change nothing but memory."""
    windows = train_config.batch_size // jax.device_count()
    at_once = train_config.windows_at_once(windows, block_size=model_config.block_size)
    return (
        f"try --config.model.remat=True (now {model_config.remat}), a smaller train.microbatch_size (now {at_once} "
        f"windows), train.batch_size ({train_config.batch_size}), shorter windows by model.max_transitions "
        f"({model_config.max_transitions}), or fewer observed dimensions ({model_config.spec.observation_dim}) by "
        "data.observation_keys or data.observation_slice"
    )


def _with_schedule(train_fn, config):
    """Hand the schedule to a train_fn as arrays, so that what was compiled to measure it trains, too."""
    return functools.partial(train_fn, schedule=data_parallel.replicate(training.as_schedule(config)))


def _fit(config, train_fn, fresh, store, evaluate, *, seed, ends):
    """Measure a step and an evaluation, and return the fields that make the run end in time."""
    train_fn = _with_schedule(train_fn, config)
    per_step, state = time_budget.measure(train_fn, fresh, store, seed=seed, max_steps=config.steps_per_call)
    per_evaluation = 0.0
    if evaluate:
        placed = training_loop.place(state)
        evaluate(placed)  # compiles
        before = time.monotonic()
        evaluate(placed)
        per_evaluation = time.monotonic() - before
    tokens = int(state.tokens_seen[0]) * 2**32 + int(state.tokens_seen[1])
    measured = np.array([ends - time.monotonic(), per_step, per_evaluation, tokens / int(state.step)])
    names = ("seconds", "per_step", "per_evaluation", "tokens_per_step")
    return time_budget.fit(config, **dict(zip(names, time_budget.agree(measured), strict=True)))
