"""Training of a Trajectory Transformer on a Minari dataset, from its configuration to checkpoints in a workdir."""

import dataclasses
import functools

import jax
import numpy as np
from absl import logging

from experiments.common import datasets, entry, training_loop
from tt_jax import checkpoints, data_parallel, training, trajectories, transformer


def train(config, workdir, *, preemption, download=False):
    """Train as `config` says until its last step; raises entry.Interrupted, after saving, when told to stop."""
    if not 0 <= config.seed < 2**32:
        raise entry.UsageError(f"seed={config.seed} must be in [0, 2**32).")
    data = datasets.prepare(config, download=download)
    model_config = entry.to_dataclass(transformer.TransformerConfig, config.model, spec=data.spec)
    num_windows = trajectories.num_windows(data.train.offsets)
    train_config = training.with_token_schedule(
        entry.to_dataclass(training.TrainConfig, config.train),
        num_windows=num_windows,
        block_size=model_config.block_size,
    )
    windows_fn = functools.partial(
        trajectories.windows, spec=data.spec, config=data.config, max_transitions=model_config.max_transitions
    )
    functions = {"config": train_config, "model_config": model_config, "windows_fn": windows_fn}
    train_fn = training.make_train_fn(num_windows=num_windows, **functions)
    eval_fn = held_out = None
    if data.held_out:
        eval_fn = training.make_eval_fn(num_windows=trajectories.num_windows(data.held_out.offsets), **functions)
        held_out = training_loop.place(data.held_out)

    init = functools.partial(training.init, config=train_config, model_config=model_config)
    state = jax.jit(init)(jax.random.key(config.seed))
    if checkpoints.latest_step(workdir) is not None:
        state = _resume(workdir, state, model_config, data.tokenizer)
        logging.info("resuming %s at step %d", workdir, state.step)
    step = int(state.step)
    if step >= train_config.num_steps:
        logging.info("%s is done: %d of %d steps.", workdir, step, train_config.num_steps)
        return
    state, store = training_loop.place(state), training_loop.place(data.train)
    seed = data_parallel.replicate(np.uint32(config.seed))
    run = config.to_dict() | {"env_spec": data.env_spec, "max_path_length": data.config.max_path_length}
    tokens_per_step = train_config.batch_size * model_config.block_size

    def save(writer, step, host):
        rest = {"opt_state": host.opt_state, "step": host.step, "tokens_seen": host.tokens_seen}
        writer.save(step, params=host.params, config=model_config, tokenizer=data.tokenizer, state=rest, run=run)

    training_loop.run(
        workdir,
        config=train_config,
        state=state,
        step=step,
        advance=lambda state, num_steps: train_fn(state, store, seed, data_parallel.replicate(np.int32(num_steps))),
        evaluate=eval_fn and (lambda state: data_parallel.unreplicate(eval_fn(state.params, held_out))),
        save=save,
        describe=lambda metrics, rate: (
            f"loss {metrics['loss'][-1]:.4f}, lr {metrics['learning_rate'][-1]:.1e}, "
            f"{rate * tokens_per_step:.2g} tokens/s"
        ),
        work_per_step={"tokens": tokens_per_step},
        preemption=preemption,
    )


def _resume(workdir, fresh, model_config, tokenizer):
    template = {"opt_state": fresh.opt_state, "step": fresh.step, "tokens_seen": fresh.tokens_seen}
    checkpoint = checkpoints.restore(workdir, state_template=template)
    if checkpoint.config != model_config:  # also by a setting that the run's config.json is too old to know
        raise entry.UsageError(
            f"{workdir} holds {checkpoint.config}, this run is {model_config}; use another --workdir."
        )
    same = jax.tree.map(np.array_equal, dataclasses.astuple(checkpoint.tokenizer), dataclasses.astuple(tokenizer))
    if not all(jax.tree.leaves(same)):
        raise entry.UsageError(f"the dataset has changed since {workdir} was made; use another --workdir.")
    return training.TrainState(params=checkpoint.params, **checkpoint.state)
