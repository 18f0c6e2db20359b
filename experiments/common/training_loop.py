"""The training loop of transformer and learners: compiled calls between events, metrics, checkpoints, signals."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from jax.experimental import multihost_utils

from experiments.common import entry
from tt_jax import checkpoints, data_parallel, learners, training

SECONDS_PER_CALL = 1.0  # so that signals are answered soon


def run(
    workdir: str,
    *,
    config: training.TrainConfig | learners.TrainConfig,
    fresh: Any,
    model: dict[str, Any],
    free_fields: Sequence[str] = (),
    params_fn: Callable[[Any], Any] = lambda params: params,
    train_fn: Callable[[Any, Any, Any, Any], tuple[Any, dict]],
    store: Any,
    seed: int,
    evaluate: Callable[[Any], dict[str, float]] | None,
    describe: Callable[[dict[str, np.ndarray], float], str],
    work_per_step: dict[str, int],
    preemption: entry.Preemption,
) -> None:
    """Train to `config.num_steps`; raises entry.Interrupted, after saving, when told to stop.

    Goes on from the newest checkpoint in `workdir`, which must be of the same `model` but for the `free_fields` of its
    config, or from the state `fresh`. `model` holds the `config`, `tokenizer` and `run` of a checkpoint, and
    `params_fn` makes its parameters of those in the state, which may have further axes of size 1.

    `train_fn(state, store, seed, num_steps)`, all replicated over the devices, does so many steps and returns the state
    and metrics [num_steps, ...]; `evaluate(state)` returns further metrics every `config.eval_every` steps, after the
    step's checkpoint, and may raise entry.Interrupted when told to stop;
    `describe(metrics, steps_per_second)` is what the progress bar says; `work_per_step` holds what else is measured per
    second, such as {"tokens": 4096}.
    """
    state = _resume(workdir, fresh, model, free_fields)
    step = int(np.ravel(state.step)[0])
    if step >= config.num_steps:
        logging.info("%s is done: %d of %d steps.", workdir, step, config.num_steps)
        return
    state, store, seed = place(state), place(store), data_parallel.replicate(np.uint32(seed))
    metrics = entry.MetricsWriter(workdir, resume_step=step)
    notes = []
    progress = tqdm.tqdm(
        initial=step, total=config.num_steps, unit="step", desc="train", disable=not entry.is_main_process()
    )
    with progress, checkpoints.Writer(workdir, keep=config.keep_checkpoints) as writer:
        call_steps, log_time, log_step = 1, time.time(), step
        while step < config.num_steps:
            call_steps = _steps_until_event(step, call_steps, config)
            started = time.time()
            state, call_metrics = train_fn(state, store, seed, data_parallel.replicate(np.int32(call_steps)))
            host_metrics = data_parallel.unreplicate(call_metrics)
            call_metrics = {name: values[:call_steps] for name, values in host_metrics.items()}
            _check_finite(call_metrics, first_step=step + 1)
            notes.append(call_metrics)
            step += call_steps
            rate = call_steps / (time.time() - started)
            progress.update(call_steps)
            progress.set_postfix_str(describe(call_metrics, rate))
            is_last = step == config.num_steps
            is_saved = is_last or step % config.checkpoint_every == 0
            if is_saved:  # before the evaluation, which may take long or fail
                _save(writer, step, state, model, params_fn)
            if is_last or step % config.log_every == 0:
                means = {f"train/{name}": np.concatenate([n[name] for n in notes]).mean() for name in notes[0]}
                speed = (step - log_step) / (time.time() - log_time)
                works = {"steps": 1} | work_per_step
                times = {f"time/{name}_per_second": speed * amount for name, amount in works.items()}
                found = {}
                if evaluate and (is_last or step % config.eval_every == 0):
                    with contextlib.suppress(entry.Interrupted):  # what is done then follows
                        found = {f"eval/{name}": value for name, value in evaluate(state).items()}
                metrics.write(step, means | times | found)
                notes, log_time, log_step = [], time.time(), step
            if preemption.requested() and not is_last:
                if not is_saved:
                    _save(writer, step, state, model, params_fn)
                writer.wait()
                raise entry.Interrupted(f"stopped at step {step}, saved in {workdir}; the same command goes on.")
            wanted = int(np.clip(rate * SECONDS_PER_CALL, 1, config.steps_per_call))
            call_steps = int(multihost_utils.broadcast_one_to_all(np.int32(wanted)))
        metrics.close()


def _save(writer, step, state, model, params_fn):
    host = data_parallel.unreplicate(state)
    writer.save(step, params=params_fn(host.params), state=_without_params(host), **model)


def place(tree: Any) -> Any:
    """Copy arrays to each device; what does not fit is a ValueError that says how much it is."""
    try:
        return data_parallel.replicate(tree)
    except jax.errors.JaxRuntimeError as error:
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree)) / 2**20
        raise ValueError(f"{size:.0f} MiB of data do not fit the memory of a device: {error}") from error


def _resume(workdir, fresh, model, free_fields):
    if checkpoints.latest_step(workdir) is None:
        return fresh
    checkpoint = checkpoints.restore(workdir, state_template=_without_params(fresh))
    config, found = model["config"], checkpoint.config
    if dataclasses.replace(config, **{name: getattr(found, name) for name in free_fields}) != found:
        # also by a setting that the run's config.json is too old to know
        raise entry.UsageError(f"{workdir} holds {found}, this run is {config}; use another --workdir.")
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, checkpoint.tokenizer, model["tokenizer"]))):
        raise entry.UsageError(f"the dataset has changed since {workdir} was made; use another --workdir.")
    params = jax.tree.map(lambda leaf, new: np.reshape(leaf, new.shape), checkpoint.params, fresh.params)
    logging.info("resuming %s at step %d", workdir, checkpoint.step)
    return dataclasses.replace(fresh, params=params, **checkpoint.state)


def _without_params(state):
    """Return the parts of a training state that a checkpoint holds beside the parameters, by name."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}


def _steps_until_event(step, wanted, config):
    """Shorten a call of `wanted` steps so that it ends where something has to be done."""
    ends = [config.num_steps]
    ends += [(step // every + 1) * every for every in (config.log_every, config.eval_every, config.checkpoint_every)]
    return min(wanted, min(ends) - step)


def _check_finite(metrics, *, first_step):
    """Raise FloatingPointError naming the first step with a metric that is not finite, and the loss if it is one."""
    found = []
    for name, values in metrics.items():
        steps = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        found += [(steps[0], name != "loss", name)] if steps.size else []
    if found:
        index, _, name = min(found)
        values = np.ravel(metrics[name][index])
        raise FloatingPointError(f"train/{name} is {values[~np.isfinite(values)][0]} at step {first_step + index}.")
