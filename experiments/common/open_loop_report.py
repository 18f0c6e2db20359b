"""What open-loop predictions of several models amount to: numbers by horizon with their errors, figures, a table."""

import numpy as np
from matplotlib.figure import Figure

from experiments.common import figures, held_out, open_loop_run
from tt_jax import densities, open_loop, tokenization, trajectories

RESAMPLES = 100  # of the bootstrap over starts
_LOWEST = -1e6  # log-density of a diverged prediction, so that it can be written down

STYLES = {  # title, colour and line of each model
    "transformer": ("transformer, sampled", figures.BLUE, "-"),
    "transformer_median": ("transformer, median", figures.SKY, "-"),
    "transformer_greedy": ("transformer, likeliest bin", figures.PURPLE, "-"),
    "transformer_own_actions": ("sampled, own actions", figures.BLUE, ":"),
    "transformer_median_own_actions": ("median, own actions", figures.SKY, ":"),
    "transformer_greedy_own_actions": ("likeliest bin, own actions", figures.PURPLE, ":"),
    "markov": ("transformer with one transition", figures.GREEN, "-"),
    "ensemble_ts1": ("ensemble, TS-1", figures.VERMILION, "-"),
    "ensemble_tsinf": ("ensemble, TS-infinity", figures.ORANGE, "-"),
    "ensemble_ts1_bounded": ("ensemble, TS-1, within the data's range", figures.VERMILION, "--"),
    "deterministic": ("deterministic network", "0.5", "-"),
}
REFERENCE = ("any state of the data", "black", "-.")


def summarize(
    measured: dict[str, np.ndarray], starts: open_loop_run.Starts, scale: np.ndarray, columns: list[densities.Kind]
) -> dict:
    """Return lists over the horizon, None where no start has that many steps, from `open_loop.Measures` by name.

    Columns [N] that are constant are left out, and of the likelihood also those that have no density.
    """
    is_real, counts = starts.is_real, starts.is_real.sum(axis=0)
    varies, has_density = (np.isin(columns, kinds) for kinds in (["continuous", "discrete"], ["continuous"]))
    real, scale = starts.future.states[..., varies], scale[varies]
    of_mean = np.abs(measured["mean"][..., varies] - real) / scale
    samples = measured["samples"][..., varies]
    log_density = np.maximum(measured["log_density"][..., has_density], _LOWEST)
    off_return = np.cumsum(measured["rewards"] - starts.future.rewards, axis=1, dtype=np.float64)
    found = {
        "error": _quantiles(measured["error"][..., varies], is_real, (0.5, 0.9)),
        "error_of_mean": _quantiles(of_mean, is_real, (0.5, 0.9)),
        "return_error": _means(np.abs(off_return), is_real),
        "log_likelihood": _means(log_density.mean(axis=-1), is_real),
        "log_likelihood_median": _quantiles(log_density.mean(axis=-1, keepdims=True), is_real, (0.5,)),
        "energy_distance": [
            open_loop.energy_distance(samples[rows, step] / scale, real[rows, step] / scale)
            if count >= 3
            else (None, None)
            for step, (rows, count) in enumerate(zip(is_real.T, counts, strict=True))
        ],
    }
    lists = {}
    for name, rows in found.items():
        names = (name, f"{name}_standard_error")
        if name.startswith("error"):
            names += (f"{name}_90th_percentile", f"{name}_90th_percentile_standard_error")
        lists |= dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    lists["error_by_dimension"] = [
        np.median(measured["error"][rows, step], axis=0).tolist() if count else None
        for step, (rows, count) in enumerate(zip(is_real.T, counts, strict=True))
    ]
    return lists


def _quantiles(errors, is_real, shares):
    """Return for each step the quantiles over starts and dimensions, each with its error by resampling the starts."""
    draws, found = np.random.default_rng(0), []
    for step, rows in enumerate(is_real.T):
        values = errors[rows, step]  # [n, N]
        if not len(values):
            found.append((None,) * 2 * len(shares))
            continue
        again = values[draws.integers(len(values), size=(RESAMPLES, len(values)))].reshape(RESAMPLES, -1)
        deviations = np.quantile(again, shares, axis=1).std(axis=1)
        found.append(sum(zip(np.quantile(values, shares).tolist(), deviations.tolist(), strict=True), ()))
    return found


def _means(values, is_real):
    """Return the mean over the starts of each step, and its standard error."""
    found = []
    for step, rows in enumerate(is_real.T):
        column = values[rows, step].astype(np.float64)
        error = float(column.std(ddof=1) / np.sqrt(len(column))) if len(column) > 1 else None
        found.append((float(column.mean()) if len(column) else None, error))
    return found


def reference(
    store: trajectories.TokenStore,
    tokenizer: tokenization.Discretizer,
    starts: open_loop_run.Starts,
    scale: np.ndarray,
    columns: list[densities.Kind],
) -> dict:
    """Return what knowing nothing of the start gives: the density of all training states, and the distance to them."""
    num_dims, num_bins = len(scale), tokenizer.centers.shape[1]
    dims = slice(num_dims)
    tokens = np.asarray(store.tokens)[:, dims]
    counts = np.stack([np.bincount(column, minlength=num_bins) for column in tokens.T]) + 1  # no value is impossible
    log_probs = np.log(counts / counts.sum(axis=1, keepdims=True))
    real = starts.future.states
    varies, has_density = (np.isin(columns, kinds) for kinds in (["continuous", "discrete"], ["continuous"]))
    column = np.broadcast_to(np.arange(num_dims), real.shape)
    real_tokens = tokenization.encode(tokenizer, np.float64(real), dims=dims)
    log_density = np.asarray(
        densities.log_density(densities.cells(tokenizer), log_probs[column], real_tokens, dims=column)
    )
    chosen = np.linspace(0, len(tokens) - 1, 200).astype(int)
    states = tokenization.decode(tokenizer, tokens[chosen].astype(np.int64), dims=dims)
    error = np.stack([np.abs(row[:, None] - states).mean(axis=1) for row in real]) / scale
    quantiles = _quantiles(error[..., varies], starts.is_real, (0.5,))
    likelihood = _means(log_density[..., has_density].mean(axis=-1), starts.is_real)
    return {"error": [row[0] for row in quantiles], "log_likelihood": [row[0] for row in likelihood]}


def draw(found: dict, path) -> None:
    """Draw every measure of every model against the horizon."""
    panels = {
        "error": ("median error (standard deviations)", "log"),
        "error_90th_percentile": ("90th percentile of the error", "log"),
        "error_of_mean": ("median error of the samples' mean", "log"),
        "return_error": ("error of the predicted return", "log"),
        "log_likelihood": ("log-density of the real state (nats per dimension)", "linear"),
        "energy_distance": ("energy distance to the real states", "linear"),
    }
    figure = Figure(figsize=(17, 10), layout="constrained")
    for axes, (name, (title, yscale)) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        axes.set(title=title, xlabel="steps ahead", yscale=yscale)
        axes.grid(alpha=0.3)
        for model, rows in found["models"].items():
            label, colour, line = STYLES[model]
            _draw_line(axes, rows[name], rows[f"{name}_standard_error"], label=label, color=colour, linestyle=line)
        if name in found["reference"]:
            label, colour, line = REFERENCE
            _draw_line(axes, found["reference"][name], None, label=label, color=colour, linestyle=line)
        if name == "log_likelihood":  # a model that is sure and wrong has no bottom
            highest = np.nanmax([np.array(rows[name], float) for rows in found["models"].values()])
            axes.set_ylim(np.nanmin(np.array(found["reference"][name], float)) - 4, highest + 0.5)
        if name == "energy_distance":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(bottom=-0.3)
        handles = axes.get_legend_handles_labels() if name == "log_likelihood" else None
        if handles:
            figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{found['dataset']}: open loop from {found['num_starts'][0]} held-out states")
    figures.save(figure, path)


def _draw_line(axes, values, errors, **style):
    values = np.array(values, float)
    axes.plot(np.arange(1, len(values) + 1), values, linewidth=1.5, **style)
    if errors is not None and style["linestyle"] == "-":
        errors = np.array(errors, float)
        steps = np.arange(1, len(values) + 1)
        low = np.maximum(values - errors, values / 3) if axes.get_yscale() == "log" else values - errors
        axes.fill_between(steps, low, values + errors, color=style["color"], alpha=0.15, linewidth=0)


def table(found: dict) -> list[str]:
    """Write a few horizons of each model as lines."""
    horizon = len(found["num_starts"])
    steps = sorted({step for step in (1, 5, 20, 50, 100, 500, 1000) if step < horizon} | {horizon})

    def line(title, rows, name):
        cells = [rows[name][step - 1] for step in steps]
        texts = ["-" if cell is None else f"{cell:.3f}" if abs(cell) < 1000 else f"{cell:.1e}" for cell in cells]
        return f"  {title:<42}" + "".join(f"{text:>10}" for text in texts)

    lines = [f"{found['dataset']}: {found['num_starts'][0]} starts, {found['settings']['num_samples']} samples"]
    titles = {
        "error": "median error",
        "log_likelihood": "log-density in nats per dimension",
        "log_likelihood_median": "its median over starts",
    }
    for name, title in titles.items():
        lines.append(f"{title + ', steps ahead':<44}" + "".join(f"{step:10d}" for step in steps))
        lines += [line(STYLES[model][0], rows, name) for model, rows in found["models"].items()]
        if name in found["reference"]:
            lines.append(line(REFERENCE[0], found["reference"], name))
    return lines


def names_of_states(spec) -> list[str]:
    """Name the dimensions of a state."""
    return held_out.dimension_names(spec)[: spec.observation_dim]
