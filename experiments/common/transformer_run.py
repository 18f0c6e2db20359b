"""Training of a Trajectory Transformer on a Minari dataset, from its configuration to checkpoints in a workdir."""

import functools

import jax

from experiments.common import datasets, entry, training_loop
from tt_jax import data_parallel, shards, training, trajectories, transformer


def train(config, workdir, *, preemption, download=False):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop."""
    if not 0 <= config.seed < 2**32:
        raise entry.UsageError(f"seed={config.seed} must be in [0, 2**32).")
    shards.check_count(config.data.num_shards)
    data = datasets.prepare(config, download=download)
    model_config = entry.to_dataclass(transformer.TransformerConfig, config.model, spec=data.spec)
    stores = shards.split_store(data.train, config.data.num_shards)
    sizes = [trajectories.num_windows(store.offsets) for store in stores]
    train_config = training.with_token_schedule(
        entry.to_dataclass(training.TrainConfig, config.train),
        num_windows=sum(sizes),
        block_size=model_config.block_size,
    )
    windows_fn = functools.partial(
        trajectories.windows, spec=data.spec, config=data.config, max_transitions=model_config.max_transitions
    )
    functions = {"config": train_config, "model_config": model_config, "windows_fn": windows_fn}
    train_fn = training.make_train_fn(num_windows=max(sizes), **functions)
    evaluate = None
    if data.held_out:
        eval_fn = training.make_eval_fn(num_windows=trajectories.num_windows(data.held_out.offsets), **functions)
        held_out = training_loop.place(data.held_out)

        def evaluate(state):
            return data_parallel.unreplicate(eval_fn(state.params, held_out))

    init = functools.partial(training.init, config=train_config, model_config=model_config)
    tokens_per_step = train_config.batch_size * model_config.block_size
    training_loop.run(
        workdir,
        config=train_config,
        free_fields=("remat",),
        fresh=jax.jit(init)(jax.random.key(config.seed)),
        model={
            "config": model_config,
            "tokenizer": data.tokenizer,
            "run": data.run,
        },
        train_fn=train_fn,
        stores=stores,
        sizes=sizes,
        seed=config.seed,
        evaluate=evaluate,
        describe=lambda metrics, rate: (
            f"loss {metrics['loss'][-1]:.4f}, lr {metrics['learning_rate'][-1]:.1e}, "
            f"{rate * tokens_per_step:.2g} tokens/s"
        ),
        work_per_step={"tokens": tokens_per_step},
        preemption=preemption,
    )
