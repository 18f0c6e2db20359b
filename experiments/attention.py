"""Measure what a trained model's attention goes to on held-out episodes, and what it loses when that is hidden.

python -m experiments.attention --workdir=DIR [--num_windows=256 --out=attention.json]

Writes JSON, the mean maps of all layers and heads as arrays (.npz) and as a figure of the same name, and a figure of
the numbers (_shares.png): shares of attention per head beside those of uniform attention and of an untrained model, and
the loss per kind when older transitions, past actions or past observations are hidden.
"""

import jax
import numpy as np

from experiments.common import attention_report, entry, files, held_out, run_flags, signals
from tt_jax import transformer

WORKDIR = run_flags.workdir(help="Folder of the training run.", required=True)
NUM_WINDOWS = run_flags.num_windows(default=256)
OUT = run_flags.out(default="attention.json")


def main(_):
    signals.Preemption()  # ends it soon, whatever it does
    path = files.result_file(OUT.value)
    run = held_out.load(WORKDIR.value)
    store, config = run.data.held_out, run.checkpoint.config
    ids = held_out.window_ids(store, count=NUM_WINDOWS.value, max_transitions=config.max_transitions)
    if not len(ids):
        raise entry.UsageError(
            f"no held-out episode is as long as the window of {config.max_transitions} transitions; train with a "
            "smaller --config.model.max_transitions or hold out more episodes."
        )
    batches = attention_report.read_windows(run, ids)
    maps, shares = attention_report.measure(run.checkpoint.params, batches, config=config, title="attention")
    untrained = jax.jit(lambda key: transformer.init(key, config=config))(jax.random.key(run.checkpoint.run["seed"]))
    _, untrained_shares = attention_report.measure(untrained, batches, config=config, title="untrained model")
    losses = attention_report.intervene(run.checkpoint.params, batches, config=config)
    episodes = held_out.episodes_of(store, ids)
    found = {
        "dataset": run.checkpoint.run["dataset"],
        "checkpoint_step": run.checkpoint.step,
        "windows": len(ids),
        "episodes": len(np.unique(episodes)),
        "heads": attention_report.summarize_shares(shares, untrained_shares, episodes, config=config),
        "losses": attention_report.summarize_losses(losses, episodes, config=config),
        "settings": {"workdir": WORKDIR.value, "num_windows": NUM_WINDOWS.value},
        "commit": entry.commit_id(),
        "run": run.checkpoint.run,
    }
    files.write_json(path, found)
    np.savez_compressed(path.with_suffix(".npz"), maps=maps)  # [L, H, T, T]
    figures = [path.with_suffix(".png"), path.with_name(f"{path.stem}_shares.png")]
    attention_report.draw_maps(maps, found, figures[0], config=config)
    attention_report.draw_numbers(found, figures[1])
    print(*attention_report.table(found), f"numbers: {path}", f"figures: {', '.join(map(str, figures))}", sep="\n")


if __name__ == "__main__":
    entry.run(main)
