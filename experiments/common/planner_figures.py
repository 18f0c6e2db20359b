"""Tables and figures of measurements of planners, see `planner_study`."""

import itertools
import pathlib

import matplotlib.axes
import numpy as np
from matplotlib.figure import Figure

from experiments.common import control, figures
from tt_jax import sequence_planner

# A colour and a marker, for print, of each planner.
STYLES = list(zip((*figures.COLOURS[:6], figures.BLACK, "0.6", "#B8A800"), "osD^vP*Xh", strict=True))


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a table: a row for each cell, a column for each mean with its standard error."""
    columns = {name: name.replace("_", " ") for name in rows[0] if isinstance(rows[0][name], dict)}
    columns = {name: title for name, title in columns.items() if any(row[name]["mean"] is not None for row in rows)}
    lines = ["planner     horizon  candidates" + "".join(f"{title:>22}" for title in columns.values())]
    has_cost = "ms_per_action" in rows[0]
    lines[0] += f"{'ms/action':>12}" if has_cost else ""
    for row in rows:
        line = f"{row['planner']:<12}{row['horizon']:7}{row['candidates']:12}"
        for name in columns:
            mean, error = row[name]["mean"], row[name]["standard_error"]
            text = "-" if mean is None else f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"
            line += f"{text:>22}"
        lines.append(line + (f"{row['ms_per_action']:12.2f}" if has_cost else ""))
    return lines


def draw(study: str, rows: list[dict], plan_config: sequence_planner.PlanConfig, path: str | pathlib.Path) -> None:
    """Draw the rows of a study and write the figure."""
    draw_study = {"budgets": _draw_budgets, "grid": _draw_grid, "search": _draw_search}[study]
    figure = Figure(figsize=(7, 4.5) if study == "budgets" else (9, 3.6), layout="constrained")
    draw_study(figure, rows, plan_config)
    figures.save(figure, path)


def _draw_budgets(figure, rows, plan_config):
    axes = figure.subplots()
    for line, (colour, marker) in zip(dict.fromkeys(map(_line, rows)), itertools.cycle(STYLES)):
        name, horizon = line
        label = name if horizon == 1 else f"{name}, {horizon} steps"
        group = [row for row in rows if _line(row) == line]
        _draw_line(axes, group, "ms_per_action", "return", color=colour, marker=marker, label=label)
    axes.set(xscale="log", xlabel="milliseconds per action", ylabel="return (mean, standard error)")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_grid(figure, rows, plan_config):
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, varied, fixed, name in (
        (left, "horizon", "candidates", "beam_width"),
        (right, "candidates", "horizon", "horizon"),
    ):
        value = getattr(plan_config, name)
        order = list(dict.fromkeys(row["planner"] for row in rows))
        for planner, (colour, marker) in zip(order, itertools.cycle(STYLES)):
            group = [row for row in rows if row["planner"] == planner and row[fixed] == value]
            _draw_line(axes, group, varied, "return", color=colour, marker=marker, label=planner)
        axes.set_title(f"{value} {'planned steps' if fixed == 'horizon' else fixed}")
        _label_each(axes, varied, [row for row in rows if row[fixed] == value])
    left.set_ylabel("return (mean, standard error)")
    if len(order) > 1:
        right.legend(frameon=False)


def _draw_search(figure, rows, plan_config):
    left, middle, right = figure.subplots(1, 3)
    for line, (colour, marker) in zip(dict.fromkeys(map(_line, rows)), itertools.cycle(STYLES)):
        group = sorted((row for row in rows if _line(row) == line), key=lambda row: row["candidates"])
        style = {"color": colour, "marker": marker}
        for name, more in (("predicted", {"linestyle": "--"}), ("real", {"label": f"{line[0]}, {line[1]} steps"})):
            _draw_line(left, _gains(group, name), "candidates", "gain", **style, **more)
        if group[0]["observation_error"]["mean"] is not None:
            _draw_line(middle, group, "candidates", "observation_error", **style)
        _draw_line(right, group, "candidates", "log_prob", **style)
    left.set(title="gain in return over the horizon\ndashed: predicted, solid: real", ylabel="discounted return")
    middle.set(title="error of predicted\nobservations", ylabel="standard deviations")
    right.set(title="log-probability\nof an action", ylabel="nats")
    for axes in (left, middle, right):
        _label_each(axes, "candidates", rows)
    left.legend(frameon=False, fontsize="x-small")


def _gains(rows, name):
    """Return what rows have over the first one, state by state."""
    values = [np.array([state[name] for state in row["states"]]) for row in rows]
    gains = [control.mean_and_error(each - values[0]) for each in values]
    return [{"candidates": row["candidates"], "gain": gain} for row, gain in zip(rows, gains, strict=True)]


def _line(row):
    return row["planner"], row["horizon"]


def _label_each(axes, name, rows):
    """Put a tick at each value of a column, on a logarithmic scale."""
    ticks = sorted({row[name] for row in rows})
    axes.set(xscale="log", xlabel=name)
    axes.set_xticks(ticks, labels=ticks)
    axes.minorticks_off()


def _draw_line(axes: matplotlib.axes.Axes, rows, x_name, y_name, **style):
    rows = sorted(rows, key=lambda row: row[x_name])
    x, y = [row[x_name] for row in rows], [row[y_name]["mean"] for row in rows]
    errors = [row[y_name]["standard_error"] or 0.0 for row in rows]
    axes.errorbar(x, y, yerr=errors, markersize=5, capsize=2, **style)
    axes.grid(alpha=0.3)
