"""The training loop of transformer and learners: compiled calls between events, metrics, checkpoints, signals."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from jax.experimental import multihost_utils

from experiments.common import agreement, entry, memory, signals
from experiments.common.metrics import MetricsWriter
from tt_jax import checkpoints, data_parallel, learners, shards, training

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
    stores: Sequence[Any],
    sizes: Sequence[int],
    seed: int,
    evaluate: Callable[[Any], dict[str, float]] | None,
    describe: Callable[[dict[str, np.ndarray], float], str],
    work_per_step: dict[str, int],
    step_sizes: str,
    memory_settings: str,
    shrink: Callable[[float], Any] = lambda share: None,
    preemption: signals.Preemption,
) -> None:
    """Train to `config.num_steps`; raises entry.Interrupted, after saving, when told to stop.

    Goes on from the newest checkpoint in `workdir`, which must be of the same `model` but for the `free_fields` of its
    config, or from the state `fresh`. `model` holds the `config`, `tokenizer` and `run` of a checkpoint, and
    `params_fn` makes its parameters of those in the state, which may have further axes of size 1.

    `train_fn(state, store, seed, num_steps)`, all replicated over the devices, does so many steps and returns the state
    and metrics [num_steps, ...]. Of several `stores`, with the `sizes` that they draw from, one is on the devices at a
    time, as a `shards.Shard`. `evaluate(state)` returns further metrics every `config.eval_every` steps, after the
    step's checkpoint, and may raise entry.Interrupted when told to stop;
    `describe(metrics, steps_per_second)` is what the progress bar says; `work_per_step` holds what else is measured per
    second, such as {"tokens": 4096}. `step_sizes` tells what a step takes and `memory_settings` what makes it smaller,
    for the ValueError of a step that does not fit a device, by an estimate before the first one or when it fails.
    Before that `shrink(share)` may return another `train_fn`, which needs about that share of the memory, or None.
    """
    state = _resume(workdir, fresh, model, free_fields, stores, config)
    step = first_step = int(np.ravel(state.step)[0])
    if step >= config.num_steps:
        logging.info("%s is done: %d of %d steps.", workdir, step, config.num_steps)
        return
    state, device_seed = place(state), data_parallel.replicate(np.uint32(seed))
    store, turn_ends = _take_turn(step, stores, sizes, config=config, seed=seed)
    num_parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(fresh.params))
    explained = functools.partial(memory.explained, f"a step of {step_sizes}", memory_settings)
    with explained():
        arguments = (state, store, device_seed, data_parallel.replicate(np.int32(1)))
        train_fn, needed = _fitting(train_fn, arguments, shrink)
    size = f"{needed / 2**30:.2g} GiB of memory"
    logging.info("%s parameters; a step takes %s and %s", f"{num_parameters:,}", step_sizes, size)
    metrics = MetricsWriter(workdir, resume_step=step)
    notes = []
    progress = tqdm.tqdm(
        initial=step, total=config.num_steps, unit="step", desc="train", disable=not entry.is_main_process()
    )
    with (
        explained(),
        contextlib.ExitStack() as answers,
        progress,
        checkpoints.Writer(workdir, keep=config.keep_checkpoints) as writer,
    ):
        call_steps, log_time, log_step, num_calls = 1, time.time(), step, 0
        while step < config.num_steps:
            if step >= turn_ends:
                store = None  # makes room
                store, turn_ends = _take_turn(step, stores, sizes, config=config, seed=seed)
            call_steps = min(_steps_until_event(step, call_steps, config), turn_ends - step)
            started = time.time()
            state, call_metrics = train_fn(state, store, device_seed, data_parallel.replicate(np.int32(call_steps)))
            host_metrics = data_parallel.unreplicate(call_metrics)
            call_metrics = {name: values[:call_steps] for name, values in host_metrics.items()}
            writer.check()
            _check_finite(call_metrics, first_step=step + 1)
            notes.append(call_metrics)
            if step == first_step:  # compiled; from here on a signal is answered by saving
                answers.enter_context(preemption.doing(None))
            step += call_steps
            rate = call_steps / (time.time() - started)
            num_calls += 1
            if num_calls == 2:  # the first is a single step
                left = tqdm.tqdm.format_interval((config.num_steps - step) / rate)
                with tqdm.tqdm.external_write_mode():  # not in the line of the bar
                    logging.info(
                        "%.3g steps per second: %s to step %d without evaluations", rate, left, config.num_steps
                    )
            progress.update(call_steps)
            progress.set_postfix_str(describe(call_metrics, rate))
            is_last = step == config.num_steps
            is_saved = is_last or step % config.checkpoint_every == 0
            if is_saved:  # before the evaluation, which may take long or fail
                _save(writer, step, state, model, params_fn)
            if is_last or step % config.log_every == 0:
                speed, found = (step - log_step) / (time.time() - log_time), {}
                if evaluate and (is_last or step % config.eval_every == 0):
                    with contextlib.suppress(entry.Interrupted):  # what is done then follows
                        found = {f"eval/{name}": value for name, value in evaluate(state).items()}
                metrics.write(step, _means(notes, {"steps": 1} | work_per_step, speed) | found)
                notes, log_time, log_step = [], time.time(), step
            if preemption.requested() and not is_last:
                if not is_saved:
                    _save(writer, step, state, model, params_fn)
                writer.wait()
                raise entry.Interrupted(f"stopped at step {step}, saved in {workdir}; the same command goes on.")
            wanted = int(np.clip(rate * SECONDS_PER_CALL, 1, config.steps_per_call))
            call_steps = int(multihost_utils.broadcast_one_to_all(np.int32(wanted)))
        metrics.close()


def _means(notes, works, speed):
    """Return the metrics of calls as means over their steps, and what was done per second."""
    means = {f"train/{name}": np.concatenate([note[name] for note in notes]).mean() for name in notes[0]}
    return means | {f"time/{name}_per_second": speed * amount for name, amount in works.items()}


def _fitting(train_fn, arguments, shrink):
    """Return the first train_fn that fits the memory, and the bytes that it needs."""
    while True:
        try:
            return train_fn, memory.check(train_fn, *arguments)
        except memory.TooLarge as error:
            smaller = shrink(error.share)
            if smaller is None:
                raise
            train_fn = smaller


def _save(writer, step, state, model, params_fn):
    host = data_parallel.unreplicate(state)
    writer.save(step, params=params_fn(host.params), state=_without_params(host), **model)


def place(tree: Any) -> Any:
    """Copy arrays to each device; what does not fit is a ValueError that says how much it is and how to split it."""
    try:
        return jax.block_until_ready(data_parallel.replicate(tree))
    except jax.errors.JaxRuntimeError as error:
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree)) / 2**20
        memory = jax.local_devices()[0].memory_stats() or {}
        free = (memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)) / 2**20
        room = f"the {free:.0f} MiB that are free on a device" if free > 0 else "the memory of a device"
        raise ValueError(
            f"{size:.0f} MiB of data do not fit {room}; let parts of them take turns with --config.data.num_shards=N "
            f"({' '.join(str(error).split())[:200]})."
        ) from error


def shard(stores: Sequence[Any], sizes: Sequence[int], index: int, *, first_step: int = 0) -> Any:
    """Return one of several parts of the data as a `shards.Shard`; data in one part is that part."""
    if len(stores) == 1:
        return stores[0]
    return shards.Shard(data=stores[index], size=np.int32(sizes[index]), first_step=np.int32(first_step))


def _take_turn(step, stores, sizes, *, config, seed):
    """Return the data of a step on the devices, and the step up to which they serve."""
    if len(stores) == 1:
        return place(stores[0]), config.num_steps
    index, first_step, ends = shards.turn(step, sizes=sizes, batch_size=config.batch_size, seed=seed)
    return place(shard(stores, sizes, index, first_step=first_step)), ends


def _resume(workdir, fresh, model, free_fields, stores, config):
    """Return the state to go on from, the same in all processes; damaged checkpoints after it are set aside."""
    state, damaged = fresh, {}
    if checkpoints.latest_step(workdir) is not None:
        checkpoint, damaged = checkpoints.restore_newest(workdir, state_template=_without_params(fresh))
        wanted, found = model["config"], checkpoint.config
        if dataclasses.replace(wanted, **{name: getattr(found, name) for name in free_fields}) != found:
            # also by a setting that the run's config.json is too old to know
            raise entry.UsageError(f"{workdir} holds {found}, this run is {wanted}; use another --workdir.")
        if not all(jax.tree.leaves(jax.tree.map(np.array_equal, checkpoint.tokenizer, model["tokenizer"]))):
            raise entry.UsageError(f"the dataset has changed since {workdir} was made; use another --workdir.")
        params = jax.tree.map(lambda leaf, new: np.reshape(leaf, new.shape), checkpoint.params, fresh.params)
        logging.info("resuming %s at step %d", workdir, checkpoint.step)
        state = dataclasses.replace(fresh, params=params, **checkpoint.state)
    parts = {"data": stores, "tokenizer": model["tokenizer"], "configuration": repr((config, model))}
    agreement.check(parts | {"checkpoint": int(np.ravel(state.step)[0])})
    for bad_step, error in damaged.items() if entry.is_main_process() else ():
        logging.warning("%s Set aside as %s.", error, checkpoints.set_aside(workdir, bad_step))
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    return state


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
