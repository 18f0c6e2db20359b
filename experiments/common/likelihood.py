"""The likelihood of held-out windows under a transformer: scores of each token, their summary, table and figure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.common import figures, held_out
from tt_jax import densities, trajectories, transformer, types

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # masses of the central intervals


class Scores(NamedTuple):
    """What the model makes of the target at each place of W windows; `is_real` is 0 where the episode is over."""

    nats: np.ndarray  # [W, T]
    log_density: np.ndarray  # [W, T]
    coverage: np.ndarray  # [W, T, levels]
    is_counted: np.ndarray  # [W, T] bool
    is_real: np.ndarray  # [W, T] bool


def score(params: types.Params, store: trajectories.TokenStore, ids, *, run: held_out.Run) -> Scores:
    """Score the windows `ids` [W] of a store of episodes."""
    config, data = run.checkpoint.config, run.data
    batch = trajectories.windows(
        store, ids, spec=config.spec, config=data.config, max_transitions=config.max_transitions
    )
    goal = batch.goal if config.goal_conditioned else None
    log_probs = jax.nn.log_softmax(transformer.apply(params, batch.inputs, config=config, goal=goal), axis=-1)
    is_stop = batch.targets == config.spec.stop_token
    tokens = jnp.where(is_stop, 0, batch.targets)
    dims = np.broadcast_to(np.arange(1, tokens.shape[1] + 1) % config.spec.transition_dim, tokens.shape)
    cells = densities.cells(data.tokenizer)
    levels = jnp.asarray(LEVELS)
    return Scores(
        nats=-jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0],
        log_density=densities.log_density(cells, log_probs, tokens, dims=dims),
        coverage=densities.coverage(cells, jnp.exp(log_probs[..., :-1]), tokens, levels, dims=dims),
        is_counted=batch.weights > 0,
        is_real=(batch.weights > 0) & ~is_stop,
    )


def summarize(scores: Scores, episodes: np.ndarray, run: held_out.Run) -> dict:
    """Average the scores by kind, by dimension, and by place in the window, with errors over `episodes` [W]."""
    spec = run.checkpoint.config.spec
    places = np.arange(1, scores.nats.shape[1] + 1)
    dims, transitions = places % spec.transition_dim, places // spec.transition_dim
    column_kinds, kinds = densities.column_kinds(run.data.tokenizer), held_out.kinds_of_dimensions(spec)
    is_varying = np.array(column_kinds) != "constant"

    def average(columns):
        counted, real = scores.is_counted[:, columns], (scores.is_real & is_varying[dims])[:, columns]
        owners = np.broadcast_to(episodes[:, None], counted.shape)
        if not counted.any():
            return None
        nats = held_out.mean_and_error(scores.nats[:, columns][counted], owners[counted])
        bits = {name: value and value / np.log(2) for name, value in nats.items()}
        found = {"tokens": int(counted.sum()), "nats": nats, "bits": bits, "log_density": None, "coverage": None}
        if real.any():
            found["log_density"] = held_out.mean_and_error(scores.log_density[:, columns][real], owners[real])
            found["coverage"] = scores.coverage[:, columns][real].mean(axis=0).tolist()
        return found

    by_kind = {}
    for kind in held_out.KINDS:
        is_kind = kinds[dims] == kind
        full = average(is_kind & (transitions == transitions[-1]))  # with all of the window before it
        nats = [average(is_kind & (transitions == each)) for each in range(transitions[-1] + 1)]
        by_kind[kind] = average(is_kind) | {
            "last_transition": full,
            "nats_by_transition": [each and each["nats"]["mean"] for each in nats],
        }
    names = held_out.dimension_names(spec)
    by_dimension = {
        name: {"kind": str(kinds[dim]), "column": column_kinds[dim]} | (average(dims == dim) or {})
        for dim, name in enumerate(names)
    }
    return {
        "windows": len(scores.nats),
        "episodes": len(np.unique(episodes)),
        "max_transitions": run.checkpoint.config.max_transitions,
        "num_bins": spec.num_bins,
        "levels": list(LEVELS),
        "all": average(dims >= 0),
        "kinds": by_kind,
        "dimensions": by_dimension,
    }


def table(found: dict) -> list[str]:
    """Write the summary as lines."""
    middle = found["levels"].index(0.5), found["levels"].index(0.9)

    def line(name, row):
        density, covered = row["log_density"], row["coverage"]
        shares = "".join(f"{100 * covered[i]:7.0f}%" if covered else f"{'-':>8}" for i in middle)
        density = f"{density['mean']:+9.3f} ± {density['standard_error'] or np.nan:5.3f}" if density else f"{'-':>17}"
        nats = f"{row['nats']['mean']:8.3f} ± {row['nats']['standard_error'] or np.nan:5.3f}"
        return f"{name:<18}{nats}{row['bits']['mean']:9.3f}{density}{shares}"

    rows = [("all", found["all"]), *found["kinds"].items(), *found["dimensions"].items()]
    return [
        f"{found['dataset']}, step {found['checkpoint_step']}: {found['windows']} windows of {found['episodes']} "
        f"held-out episodes, {found['num_bins']} bins",
        f"{'':<18}{'nats per token':>16}{'bits':>9}{'log-density':>17}{'in 50%':>8}{'in 90%':>8}",
        *(line(name, row) for name, row in rows if "nats" in row),
    ]


def draw(found: dict, path) -> None:
    """Draw the losses by dimension and by place in the window, and the calibration by kind."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    by_dimension, by_place, calibration = figure.subplots(1, 3, width_ratios=[1.4, 1, 1])
    rows = {name: row for name, row in found["dimensions"].items() if "nats" in row}
    by_dimension.bar(
        range(len(rows)),
        [row["nats"]["mean"] for row in rows.values()],
        yerr=[row["nats"]["standard_error"] or 0 for row in rows.values()],
        color=[figures.LOSS_COLOURS[row["kind"]] for row in rows.values()],
    )
    if len(rows) <= 40:
        by_dimension.set_xticks(range(len(rows)), rows, rotation=90)
    by_dimension.axhline(np.log(found["num_bins"]), color="0.4", linestyle=":", label="uniform over bins")
    by_dimension.set(ylabel="cross-entropy per token (nats)", title="Held-out loss by dimension")
    by_dimension.legend(frameon=False)
    for kind, row in found["kinds"].items():
        colour = figures.LOSS_COLOURS[kind]
        losses = [np.nan if each is None else each for each in row["nats_by_transition"]]
        by_place.plot(range(1, len(losses) + 1), losses, "-o", color=colour, label=kind)
        if row["coverage"]:
            calibration.plot(found["levels"], row["coverage"], "-o", color=colour, markersize=4, label=kind)
    by_place.set(xlabel="transition of the window", ylabel="nats per token", title="What the window brings")
    by_place.set_ylim(bottom=0.0)
    by_place.set_xticks(range(1, found["max_transitions"] + 1))
    calibration.plot([0, 1], [0, 1], color="0.4", linestyle=":", label="calibrated")
    calibration.set(xlabel="mass of the central interval", ylabel="share of values in it", title="Calibration")
    for axes in (by_place, calibration):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"{found['dataset']}, step {found['checkpoint_step']}")
    figures.save(figure, path)
