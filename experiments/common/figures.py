"""Figures of runs: each function draws on given axes and returns nothing; `save` writes the file.

All have one style: the colours of Okabe and Ito and viridis, which the colour-blind can tell apart, and text that is
readable at half size.
"""

import json
import pathlib
from collections.abc import Sequence

import cycler
import matplotlib.axes
import matplotlib.cm
import matplotlib.collections
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY, YELLOW, BLACK = "#D55E00", "#56B4E9", "#F0E442", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, YELLOW, BLACK)  # of Okabe and Ito
matplotlib.rcParams.update(
    {"font.size": 13, "axes.titlesize": "medium", "axes.prop_cycle": cycler.cycler(color=COLOURS)}
)

START = {"marker": "o", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 2, "linestyle": "", "zorder": 3}
GOAL = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "linestyle": "", "zorder": 3}
EXECUTED = {"color": VERMILION, "linewidth": 3}
HAPPENED = {"color": VERMILION, "linewidth": 3, "linestyle": (0, (1, 1))}
NOW = {"marker": "o", "markersize": 13, "color": VERMILION, "markeredgecolor": "white", "linestyle": "", "zorder": 4}
SPAN = "0.88"  # between the highest and the lowest beam
LOSS_COLOURS = {"observation": BLUE, "action": ORANGE, "reward": GREEN, "value": PURPLE}


def save(figure: matplotlib.figure.Figure, path: str | pathlib.Path) -> None:
    """Write the figure to `path`, whose ending gives the format; its folder is made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_metrics(workdir: str | pathlib.Path, name: str) -> tuple[list[int], list[float]]:
    """Read the steps and values of one metric from `workdir`/metrics.jsonl."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw_learning_curve(axes: matplotlib.axes.Axes, workdir: str | pathlib.Path) -> None:
    """Draw the loss per kind of token over the steps: lines in training, dots on held-out episodes."""
    for kind, colour in LOSS_COLOURS.items():
        axes.plot(*read_metrics(workdir, f"train/loss_{kind}"), color=colour, label=kind)
        axes.plot(*read_metrics(workdir, f"eval/loss_{kind}"), "o", color=colour, markersize=4)
    axes.plot([], [], "o", color="0.4", markersize=4, label="held-out episodes")
    axes.set(xlabel="training step", ylabel="cross-entropy per token (nats)", title="Learning curve")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower center", ncols=3, fontsize="small")


def draw_maze(axes: matplotlib.axes.Axes, maze) -> None:
    """Draw the walls of a gymnasium-robotics maze (`env.unwrapped.maze`) in the coordinates of its observations."""
    walls = np.array([[cell == 1 for cell in row] for row in maze.maze_map])
    half_width, half_height = maze.x_map_center, maze.y_map_center
    extent = (-half_width, half_width, -half_height, half_height)
    axes.imshow(np.where(walls, 1.0, np.nan), extent=extent, cmap="Greys", vmin=0.0, vmax=1.6, interpolation="nearest")
    margin = maze.maze_size_scaling / 2  # of the outer wall half a cell is enough
    limits = {"xlim": (margin - half_width, half_width - margin), "ylim": (margin - half_height, half_height - margin)}
    axes.set(aspect="equal", xlabel="x (m)", ylabel="y (m)", **limits)


def draw_cells(axes: matplotlib.axes.Axes, maze, centres: Sequence[np.ndarray], **style) -> None:
    """Shade the cells of a maze with the given centres (x, y); `style` is that of matplotlib's patches."""
    size = maze.maze_size_scaling
    for centre in centres:
        axes.add_patch(matplotlib.patches.Rectangle(np.asarray(centre) - size / 2, size, size, linewidth=0, **style))


def draw_values(
    axes: matplotlib.axes.Axes, maze, positions: np.ndarray, values: np.ndarray
) -> matplotlib.cm.ScalarMappable:
    """Draw the mean of `values` [n] at each place of `positions` [n, 2] as a heat map; for a colour bar, return how."""
    cells_per_maze_cell = 4
    bins = [cells_per_maze_cell * maze.map_width, cells_per_maze_cell * maze.map_length]
    limits = [(-maze.x_map_center, maze.x_map_center), (-maze.y_map_center, maze.y_map_center)]
    total, *_ = np.histogram2d(*positions.T, bins=bins, range=limits, weights=values)
    count, *_ = np.histogram2d(*positions.T, bins=bins, range=limits)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return axes.imshow(mean.T, extent=np.ravel(limits), origin="lower", cmap="viridis", interpolation="nearest")


def draw_trajectories(axes: matplotlib.axes.Axes, positions: np.ndarray, goals: np.ndarray, *, colours=None) -> None:
    """Draw paths [E, T, 2], each in a colour of its own, from a ring at the start to a star at the goal [E, 2]."""
    colours = colours or [COLOURS[i % len(COLOURS)] for i in range(len(positions))]
    for path, goal, colour in zip(positions, goals, colours, strict=True):
        axes.plot(*path.T, color=colour, linewidth=1.5, alpha=0.85)
        axes.plot(*path[0], color=colour, **START)
        axes.plot(*goal, color=colour, **GOAL)


def add_maze_legend(axes: matplotlib.axes.Axes) -> None:
    """Explain the markers of `draw_trajectories` inside the wall at the lower edge."""
    handles = [
        axes.plot([], [], color="0.4", label="start", **START)[0],
        axes.plot([], [], color="0.4", label="goal", **GOAL)[0],
        axes.plot([], [], color="0.4", label="path")[0],
    ]
    axes.legend(handles=handles, loc="lower center", ncols=3, framealpha=1.0)


def beam_colours(lowest: float) -> matplotlib.cm.ScalarMappable:
    """Return the colours of beams whose scores are between `lowest` and 0, the best beam's: the better, the darker."""
    shades = matplotlib.colors.LinearSegmentedColormap.from_list(
        "beams", matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, 256))
    )
    return matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(min(lowest, -1e-6), 0.0), shades)


def draw_beams(
    axes: matplotlib.axes.Axes, lines: np.ndarray, scores: np.ndarray, colours: matplotlib.cm.ScalarMappable
) -> None:
    """Draw what W beams imagine, lines [W, H, 2] in the colours of their scores [W], the best one, the first, on top.

    Every imagined step of the best one is a dot.
    """
    rgba = colours.to_rgba(scores)
    others = matplotlib.collections.LineCollection(lines[:0:-1], colors=rgba[:0:-1], linewidths=1.8, zorder=2)
    axes.add_collection(others)
    axes.plot(*lines[0].T, "-o", color=rgba[0], linewidth=2.5, markersize=5, zorder=2.5, label="imagined: best plan")
    axes.plot([], [], color=colours.to_rgba(colours.norm.vmin / 2), linewidth=1.8, label="other plans")


def draw_plans(
    axes: matplotlib.axes.Axes, plans: Sequence[np.ndarray], steps: Sequence[float], *, limit: float
) -> matplotlib.cm.ScalarMappable:
    """Draw imagined paths [H, 2], coloured by when they were made, from 0 to `limit`; for a colour bar, return how.

    Every imagined step is a dot.
    """
    mappable = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, limit), "viridis")
    for plan, step in zip(plans, steps, strict=True):
        axes.plot(*plan.T, "-o", color=mappable.to_rgba(step), linewidth=1.5, markersize=3)
    return mappable
