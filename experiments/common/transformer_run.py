"""Training of a Trajectory Transformer on a Minari dataset, from its configuration to checkpoints in a workdir."""

import dataclasses
import functools

import jax
from absl import logging

from experiments.common import datasets, entry, memory, training_loop
from tt_jax import data_parallel, training, trajectories, transformer


def train(config, workdir, *, preemption, download=False):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop."""
    train_config = entry.to_dataclass(training.TrainConfig, config.train)
    with memory.explained(f"the dataset {config.dataset}", datasets.MEMORY_SETTINGS):
        data = datasets.prepare(config, download=download)
    model_config = entry.to_dataclass(transformer.TransformerConfig, config.model, spec=data.spec)
    num_windows = trajectories.num_windows(data.train.offsets)
    train_config = training.with_token_schedule(
        train_config, num_windows=num_windows, block_size=model_config.block_size
    )
    windows_fn = functools.partial(
        trajectories.windows, spec=data.spec, config=data.config, max_transitions=model_config.max_transitions
    )
    functions = {"config": train_config, "model_config": model_config, "windows_fn": windows_fn}

    def shrink(share):
        smaller = _smaller_microbatch(functions["config"], share) if config.train.microbatch_size < 0 else 0
        if not smaller:
            return None
        logging.info("train.microbatch_size is %d, since more windows at a time do not fit the memory", smaller)
        functions["config"] = dataclasses.replace(functions["config"], microbatch_size=smaller)
        return training.make_train_fn(num_windows=num_windows, **functions)

    evaluate = None
    if data.held_out:
        held_out = training_loop.place(data.held_out)
        num_held_out = trajectories.num_windows(data.held_out.offsets)
        make_eval_fn = functools.cache(lambda: training.make_eval_fn(num_windows=num_held_out, **functions))

        def evaluate(state):  # by the microbatch that training has found by then
            return data_parallel.unreplicate(make_eval_fn()(state.params, held_out))

    init = jax.jit(functools.partial(training.init, config=train_config, model_config=model_config))
    sizes = f"{model_config.num_layers} layers of width {model_config.embed_dim} for {model_config.block_size} tokens"
    with memory.explained(
        f"a model of {sizes}", "lower model.embed_dim, num_layers or max_transitions, or data.num_bins"
    ):
        memory.check(init, jax.random.key(config.seed))
        fresh = init(jax.random.key(config.seed))
    tokens_per_step = train_config.batch_size * model_config.block_size
    training_loop.run(
        workdir,
        config=train_config,
        free_fields=("remat",),
        fresh=fresh,
        model={
            "config": model_config,
            "tokenizer": data.tokenizer,
            "run": data.run,
        },
        train_fn=training.make_train_fn(num_windows=num_windows, **functions),
        shrink=shrink,
        store=data.train,
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


def _smaller_microbatch(train_config, share):
    """Return the most windows at a time that need at most the `share` of today's memory, at least 1; 0: none less."""
    windows = train_config.batch_size // jax.device_count()
    now = train_config.windows_at_once(windows)
    smaller = [size for size in range(1, now) if windows % size == 0]
    return max((size for size in smaller if size <= 0.9 * share * now), default=min(smaller, default=0))


def _memory_settings(train_config, model_config):
    """Say which settings make a step smaller; those before the last change nothing but memory."""
    at_once = train_config.windows_at_once(train_config.batch_size // jax.device_count())
    return (
        f"try --config.model.remat=True (now {model_config.remat}), a smaller train.microbatch_size (now {at_once} "
        f"windows), train.batch_size ({train_config.batch_size}), shorter windows by model.max_transitions "
        f"({model_config.max_transitions}), or fewer observed dimensions ({model_config.spec.observation_dim}) by "
        "data.observation_keys or data.observation_slice"
    )
