"""From minutes to a number of updates: a step is measured once, and what follows from it stays with the workdir."""

import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from experiments.common import entry, files, training_loop
from tt_jax import checkpoints, data_parallel, iql_training, training

RESERVE = 0.03  # share of the time that is left for checkpoints and for what varies
EVALUATION_SHARE, MOST_EVALUATIONS = 0.1, 20  # of the time that evaluations may take, and how many they are
_CALL_SECONDS = 0.5  # of a call that counts in a measurement
_CALLS = 3


def recorded(workdir: str, minutes: float | None, make_fn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of `workdir`/minutes.json; where there are none, make them by `make_fn()` and write them.

    Without `minutes` those of the record count. Raises UsageError if the workdir holds a run with other minutes or
    without, whose schedule would change.
    """
    path = pathlib.Path(workdir) / "minutes.json"
    if path.exists():
        record = json.loads(path.read_text())
        if minutes not in (None, record["minutes"]):
            raise entry.UsageError(
                f"{workdir} holds a run of --minutes={record['minutes']:g}, not {minutes:g}; use another --workdir."
            )
        return record["numbers"]
    if checkpoints.latest_step(workdir) is not None:
        raise entry.UsageError(f"{workdir} holds a run without --minutes; leave them out or use another --workdir.")
    numbers = make_fn()
    if entry.is_main_process():
        device = jax.devices()[0].device_kind
        files.write_json(path, {"minutes": minutes, "device": device, "numbers": numbers})
    return numbers


def is_recorded(workdir: str) -> bool:
    """Whether the run in `workdir` was started with minutes."""
    return (pathlib.Path(workdir) / "minutes.json").exists()


def measure(train_fn, state: Any, store: Any, *, seed: int, max_steps: int) -> tuple[float, Any]:
    """Return the seconds of a step of `train_fn`, see `training_loop.run`, and the state after some steps.

    Compilation does not count.
    """
    state, store, seed = (
        training_loop.place(state),
        training_loop.place(store),
        data_parallel.replicate(np.uint32(seed)),
    )
    seconds, num_steps, is_compiled = [], 1, False
    while len(seconds) < _CALLS:
        started = time.monotonic()
        state, metrics = train_fn(state, store, seed, data_parallel.replicate(np.int32(num_steps)))
        data_parallel.unreplicate(metrics)
        took = time.monotonic() - started
        if is_compiled and (took > _CALL_SECONDS or num_steps == max_steps):
            seconds.append(took / num_steps)
        elif is_compiled:
            num_steps = min(2 * num_steps, max_steps)
        is_compiled = True
    return float(np.median(seconds)), data_parallel.unreplicate(state)


def agree(values: np.ndarray) -> list[float]:
    """Return what process 0 measured, in every process."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.float32(values))).tolist()


def fit(
    config: training.TrainConfig, *, seconds: float, per_step: float, per_evaluation: float, tokens_per_step: float
) -> dict[str, int]:
    """Return the fields of `config`, whose schedule is filled in, that make a training last for `seconds`.

    The learning rate falls to its floor at the last update; warm-up and input noise keep their shares of the run. A
    step and an evaluation take `per_step` and `per_evaluation` seconds.
    """
    num_evaluations = MOST_EVALUATIONS
    if per_evaluation:
        num_evaluations = int(np.clip(EVALUATION_SHARE * seconds / per_evaluation, 1, MOST_EVALUATIONS))
    for_steps = (1 - RESERVE) * seconds - num_evaluations * per_evaluation
    num_steps = int(np.clip(for_steps / per_step, 1, (2**32 - 1) // config.batch_size))
    final_tokens = math.ceil(num_steps * tokens_per_step)
    log_every = min(config.log_every, max(1, num_steps // 100))
    event_every = log_every * math.ceil(num_steps / num_evaluations / log_every)
    noise_steps = round(num_steps * config.input_noise_steps / config.num_steps)
    logging.info(
        "%.3g ms per step: %d updates of %d windows in %.0f s, with %d evaluations of %.1f s",
        *(1000 * per_step, num_steps, config.batch_size, seconds, num_evaluations, per_evaluation),
    )
    return {
        "num_steps": num_steps,
        "warmup_tokens": math.ceil(final_tokens * config.warmup_tokens / config.final_tokens),
        "final_tokens": final_tokens,
        "input_noise_steps": max(noise_steps, 1) if config.input_noise else 0,
        "log_every": log_every,
        "eval_every": event_every,
        "checkpoint_every": event_every,
    }


def cut(config: iql_training.IQLTrainConfig, *, seconds: float, per_step: float) -> dict[str, int]:
    """Return the fields of `config` for as many of its updates as fit into `seconds`."""
    num_steps = int(np.clip((1 - RESERVE) * seconds / per_step, 1, config.num_steps))
    return {"num_steps": num_steps, "log_every": min(config.log_every, max(1, num_steps // 20))}
