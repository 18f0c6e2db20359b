"""Train a Trajectory Transformer on a Minari dataset; the same command resumes.

python -m experiments.train_tt --config=experiments/configs/maze.py --dataset=ID --workdir=DIR [--config.seed=0 ...]
"""

import dataclasses
import functools
import time

import jax
import numpy as np
import tqdm
from absl import flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from experiments import datasets, entry
from tt_jax import checkpoints, training, trajectories, transformer

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, see experiments/configs.")
DATASET = flags.DEFINE_string("dataset", None, "Minari dataset id, in place of the configuration's.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for configuration, metrics and checkpoints.")
DOWNLOAD = flags.DEFINE_bool("download", False, "Download the dataset from Minari's remote if it is not here.")

SECONDS_PER_CALL = 1.0  # so that signals are answered soon


def main(_):
    preemption = entry.Preemption()
    config = entry.resolve_config(CONFIG.value, dataset=DATASET.value, workdir=WORKDIR.value)
    train(config, WORKDIR.value, preemption=preemption, download=DOWNLOAD.value)


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
        held_out = _place(data.held_out)

    init = functools.partial(training.init, config=train_config, model_config=model_config)
    state = jax.jit(init)(jax.random.key(config.seed))
    if checkpoints.latest_step(workdir) is not None:
        state = _resume(workdir, state, data.tokenizer)
        logging.info("resuming %s at step %d", workdir, state.step)
    step = int(state.step)
    if step >= train_config.num_steps:
        logging.info("%s is done: %d of %d steps.", workdir, step, train_config.num_steps)
        return
    state, store, seed = _place(state), _place(data.train), training.replicate(np.uint32(config.seed))
    run = config.to_dict() | {"env_spec": data.env_spec}
    metrics = entry.MetricsWriter(workdir, resume_step=step)
    notes, tokens_per_step = [], train_config.batch_size * model_config.block_size
    writer = checkpoints.Writer(workdir, keep=train_config.keep_checkpoints)
    progress = tqdm.tqdm(
        initial=step, total=train_config.num_steps, unit="step", desc="train", disable=not entry.is_main_process()
    )

    def save():
        host = training.unreplicate(state)
        rest = {"opt_state": host.opt_state, "step": host.step, "tokens_seen": host.tokens_seen}
        writer.save(step, params=host.params, config=model_config, tokenizer=data.tokenizer, state=rest, run=run)

    with progress, writer:
        call_steps, log_time, log_step = 1, time.time(), step
        while step < train_config.num_steps:
            call_steps = _steps_until_event(step, call_steps, train_config)
            started = time.time()
            state, call_metrics = train_fn(state, store, seed, training.replicate(np.int32(call_steps)))
            call_metrics = {name: values[:call_steps] for name, values in training.unreplicate(call_metrics).items()}
            _check_finite(call_metrics, first_step=step + 1)
            notes.append(call_metrics)
            step += call_steps
            rate = call_steps / (time.time() - started)
            progress.update(call_steps)
            progress.set_postfix_str(
                f"loss {call_metrics['loss'][-1]:.4f}, lr {call_metrics['learning_rate'][-1]:.1e}, "
                f"{rate * tokens_per_step:.2g} tokens/s"
            )
            is_last = step == train_config.num_steps
            if is_last or step % train_config.log_every == 0:
                means = {f"train/{name}": np.concatenate([n[name] for n in notes]).mean() for name in notes[0]}
                speed = (step - log_step) / (time.time() - log_time)
                times = {"time/steps_per_second": speed, "time/tokens_per_second": speed * tokens_per_step}
                if eval_fn and (is_last or step % train_config.eval_every == 0):
                    found = training.unreplicate(eval_fn(state.params, held_out))
                    times |= {f"eval/{name}": value for name, value in found.items()}
                metrics.write(step, means | times)
                notes, log_time, log_step = [], time.time(), step
            interrupted = preemption.requested()
            if is_last or interrupted or step % train_config.checkpoint_every == 0:
                save()
            if interrupted and not is_last:
                writer.wait()
                raise entry.Interrupted(f"stopped at step {step}, saved in {workdir}; the same command goes on.")
            wanted = int(np.clip(rate * SECONDS_PER_CALL, 1, train_config.steps_per_call))
            call_steps = int(multihost_utils.broadcast_one_to_all(np.int32(wanted)))
        metrics.close()


def _steps_until_event(step, wanted, config):
    """Shorten a call of `wanted` steps so that it ends where something has to be done."""
    ends = [config.num_steps]
    ends += [(step // every + 1) * every for every in (config.log_every, config.eval_every, config.checkpoint_every)]
    return min(wanted, min(ends) - step)


def _resume(workdir, fresh, tokenizer):
    template = {"opt_state": fresh.opt_state, "step": fresh.step, "tokens_seen": fresh.tokens_seen}
    checkpoint = checkpoints.restore(workdir, state_template=template)
    same = jax.tree.map(np.array_equal, dataclasses.astuple(checkpoint.tokenizer), dataclasses.astuple(tokenizer))
    if not all(jax.tree.leaves(same)):
        raise entry.UsageError(f"the dataset has changed since {workdir} was made; use another --workdir.")
    return training.TrainState(params=checkpoint.params, **checkpoint.state)


def _place(tree):
    try:
        return training.replicate(tree)
    except jax.errors.JaxRuntimeError as error:
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree)) / 2**20
        raise ValueError(f"{size:.0f} MiB of data do not fit the memory of a device: {error}") from error


def _check_finite(metrics, *, first_step):
    """Raise FloatingPointError naming the first step with a metric that is not finite, and the loss if it is one."""
    bad = {name: np.flatnonzero(~np.isfinite(values)) for name, values in metrics.items()}
    found = sorted((steps[0], name != "loss", name) for name, steps in bad.items() if steps.size)
    if found:
        index, _, name = found[0]
        raise FloatingPointError(f"train/{name} is {metrics[name][index]} at step {first_step + index}.")


if __name__ == "__main__":
    entry.run(main)
