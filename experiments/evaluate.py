"""Measure how likely a trained model finds held-out episodes, by kind and by dimension, and how well it is calibrated.

python -m experiments.evaluate --workdir=DIR [--num_windows=2048 --out=evaluation.json]

Losses are in nats and bits per token, and as log-densities of the real values, which do not depend on the bins. Writes
JSON and a figure of the same name.
"""

import functools

import jax
import numpy as np
import tqdm

from experiments.common import entry, files, held_out, likelihood, run_flags, signals

WORKDIR = run_flags.workdir(help="Folder of the training run.", required=True)
NUM_WINDOWS = run_flags.num_windows(default=2048)
OUT = run_flags.out(default="evaluation.json")


def main(_):
    preemption, path = signals.Preemption(), files.result_file(OUT.value)
    run = held_out.load(WORKDIR.value)
    store, config = run.data.held_out, run.checkpoint.config
    ids = held_out.window_ids(store, count=NUM_WINDOWS.value)
    score = jax.jit(functools.partial(likelihood.score, run=run))
    arrays, size = jax.device_put((run.checkpoint.params, store)), held_out.rows_at_once(config)
    parts = []
    for start in tqdm.tqdm(range(0, len(ids), size), unit="batch", desc="evaluate"):
        preemption.check("evaluate")
        part = ids[start : start + size]
        parts.append(score(*arrays, np.resize(part, size)))  # the last batch is filled up
    scores = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(ids)], *parts)
    found = likelihood.summarize(scores, held_out.episodes_of(store, ids), run)
    found = {"dataset": run.checkpoint.run["dataset"], "checkpoint_step": run.checkpoint.step} | found
    settings = {"workdir": WORKDIR.value, "num_windows": NUM_WINDOWS.value}
    files.write_json(path, found | {"commit": entry.commit_id(), "settings": settings, "run": run.checkpoint.run})
    likelihood.draw(found, path.with_suffix(".png"))
    print(*likelihood.table(found), f"numbers: {path}", f"figure: {path.with_suffix('.png')}", sep="\n")


if __name__ == "__main__":
    entry.run(main)
