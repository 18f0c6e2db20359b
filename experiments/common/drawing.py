"""Pictures of what a planner saw: all beams of its search at moments of an episode, under what then happened.

A maze is drawn as its map, any other environment as one panel per dimension; of MuJoCo's bodies there are images, too.
"""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Sequence

import gymnasium
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from absl import logging
from PIL import Image

from experiments.common import datasets, figures, files
from tt_jax import checkpoints, rollouts, tokenization

MAX_MOMENTS = 20
MAX_PANELS = 12  # of a body, the one of the reward among them
MIN_SPAN = 0.2  # of a panel, as a share of what the dimension spans in the whole episode
STRIP_IMAGES = 6  # of a body, from the present to the horizon
FRAME_MS = 400
MAX_SPEED = 10.0  # to which some of MuJoCo's environments clip what they say of speeds


@dataclasses.dataclass(frozen=True)
class Moment:
    """A plan that was made again, in the units of the environment."""

    step: int  # actions before it
    goal: np.ndarray | None  # [G], where the environment has one
    beams: np.ndarray  # [W, H, D] float64: observation, action, reward and value of each step, the best beam first
    scores: np.ndarray  # [W] float32, descending


@dataclasses.dataclass(frozen=True)
class _Body:
    """What MuJoCo knows of an episode whose observations begin with its coordinates and their speeds."""

    skipped: int  # coordinates that observations leave out: how far the body went
    positions: np.ndarray  # [T, nq]
    speeds: np.ndarray  # [T, nv]
    names: list[str]  # of the dimensions of observations that are coordinates and speeds, with units
    seconds: float  # that an action takes


def check(folder: str, *, horizon: int) -> None:
    """Make the folder; raises ValueError where that fails, and for plans that imagine no observation."""
    if horizon < 2:
        raise ValueError(
            f"--plan.horizon={horizon} must be at least 2 for --draw: a plan of one step imagines no observation."
        )
    files.make_folder(folder, flag="draw")


def draw_plans(
    folder: str | pathlib.Path,
    episode: rollouts.Episode,
    *,
    checkpoint: checkpoints.Checkpoint,
    make_env: Callable[..., gymnasium.Env],
    make_policy: Callable[..., rollouts.Policy],
    replan_every: int,
    score_name: str = "predicted return",
) -> list[Moment]:
    """Plan again at moments of an episode that was played, and draw all beams over the map or the dimensions.

    `make_policy(max_batch=, on_plan=, keep_beams=)` is a `control.plan_policy` that plays as the episode was played, so
    that each moment's plan is the one that was executed. In `folder` are `plan_STEP.png` for each moment, all of them
    in `plans.gif`, and, if MuJoCo has a body and renders here, `body_STEP.png`. Returns the moments.
    """
    folder = pathlib.Path(folder)
    envs = rollouts.vectorize(make_env, 1)
    maze, columns = _find_map(envs, episode)
    path = np.array(episode.observations)[:, columns]
    moves = np.ones(episode.length) if maze is None else np.linalg.norm(np.diff(path, axis=0), axis=1)
    steps = spread(np.arange(0, episode.length, replan_every), np.cumsum(moves))
    moments, body = _plan_again(episode, steps, envs, checkpoint, make_policy)
    envs.close()
    colours = _score_colours(moments)
    if maze is None:
        panels = _panels(episode, checkpoint.config.spec.transition_dim - 2, body)
    paths = []
    for moment in moments:
        if maze is None:
            figure = _draw_dimensions(moment, panels, colours, score_name)
        else:
            figure = _draw_map(moment, path, maze, columns, colours, score_name)
        paths.append(folder / f"plan_{moment.step:04d}.png")
        figures.save(figure, paths[-1])
    _write_gif(folder / "plans.gif", paths)
    logging.info("%d plans are drawn in %s and %s", len(moments), folder, folder / "plans.gif")
    if maze is None:
        _draw_bodies(folder, moments, body, make_env)
    return moments


def _find_map(envs, episode):
    """Return the maze and the columns of observations that are the position in it, or None and no columns."""
    maze = getattr(envs.envs[0].unwrapped, "maze", None)
    if maze is not None:
        first, _ = envs.reset(seed=[episode.seed])
        start, observed = np.float32(first["achieved_goal"][0]), episode.observations[0]
        for i in range(len(observed) - 1):
            if np.array_equal(observed[i : i + 2], start):
                return maze, slice(i, i + 2)
    return None, slice(0)


def spread(steps, way):
    """Choose steps between which about the same way [T] was gone, and the first one."""
    before = np.concatenate([[0.0], way])[steps]
    wanted = np.linspace(0.0, before[-1], MAX_MOMENTS)
    return steps[np.unique(np.searchsorted(before, wanted))].tolist()


def _plan_again(episode, steps, envs, checkpoint, make_policy):
    """Go through the episode once more for its goals and MuJoCo's state; return the moments at `steps`, and the body.

    The planner is given what it was given: the recorded past, from whose seed and length its key comes.
    """
    seen, moments, states = [], [], []
    policy = make_policy(max_batch=1, on_plan=seen.append, keep_beams=True)
    env = envs.envs[0].unwrapped

    def follow(running):
        (now,) = running
        step = now.length
        if hasattr(env, "set_state") and hasattr(env, "data"):
            states.append((env.data.qpos.copy(), env.data.qvel.copy(), env.data.time))
        if step in steps:
            past = {"actions": episode.actions[:step], "rewards": episode.rewards[:step], "goal": now.goal}
            policy([dataclasses.replace(episode, observations=episode.observations[: step + 1], **past)])
            moments.append(_decode(seen[-1], step, now.goal, checkpoint.tokenizer))
        return episode.actions[min(step, episode.length - 1)][None, None]

    rollouts.run(envs, follow, seeds=[episode.seed], config=datasets.data_config(checkpoint.run["data"]))
    return moments, _find_body(episode, states, env) if states else None


def _decode(output, step, goal, tokenizer):
    tokens = output.tokens[:, None] if output.beams is None else output.beams
    scores = np.asarray(output.scores)[0, : tokens.shape[1]]
    exists = np.isfinite(scores)
    beams = tokenization.decode(tokenizer, np.asarray(tokens)[0, exists])
    return Moment(step=step, goal=goal, beams=beams, scores=scores[exists])


def _score_colours(moments):
    """Map scores relative to the best beam, of all moments but a few outliers, to the colours of beams."""
    relative = np.concatenate([moment.scores - moment.scores[0] for moment in moments])
    return figures.beam_colours(float(np.percentile(relative, 10)))


def _draw_map(moment, path, maze, columns, colours, score_name):
    """Draw a maze with all imagined paths, the way so far and what was executed over the planned steps."""
    figure = matplotlib.figure.Figure(figsize=(7.5, 7), layout="constrained")
    axes = figure.subplots()
    figures.draw_maze(axes, maze)
    figures.draw_beams(axes, moment.beams[:, :, columns], moment.scores - moment.scores[0], colours)
    step = moment.step
    axes.plot(*path[step : step + moment.beams.shape[1]].T, label="what then happened", **figures.HAPPENED)
    axes.plot(*path[: step + 1].T, label="way so far", **figures.EXECUTED)
    axes.plot(*path[step], label="now", **figures.NOW)
    if moment.goal is not None:
        axes.plot(*moment.goal, label="goal", color=figures.YELLOW, **figures.GOAL)
    _finish(figure, axes, moment, len(path) - 1, colours, score_name)
    return figure


def _panels(episode, reward_column, body):
    """List what a body's panels show: a title with units, the column of plans, and the real values of the episode."""
    observed = np.array(episode.observations)
    names = [f"observation {i}" for i in range(observed.shape[1])]
    if body is not None:
        names[: len(body.names)] = body.names
    panels = [(names[i], i, observed[:, i]) for i in range(min(len(names), MAX_PANELS - 1))]
    return [*panels, ("reward", reward_column, np.array(episode.rewards))]


def _draw_dimensions(moment, panels, colours, score_name):
    """Draw a panel per dimension: all beams over the planned steps, the span of them, and what happened."""
    num_columns = min(4, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = matplotlib.figure.Figure(figsize=(3 * num_columns + 1, 2.2 * num_rows + 1.8), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    ahead = np.arange(moment.beams.shape[1])
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, column, real) in zip(grid.flat, panels, strict=False):
        values = moment.beams[:, :, column]
        axes.fill_between(ahead, values.min(axis=0), values.max(axis=0), color=figures.SPAN, linewidth=0)
        lines = np.stack([np.broadcast_to(ahead, values.shape), values], axis=-1)
        figures.draw_beams(axes, lines, moment.scores - moment.scores[0], colours)
        happened = real[moment.step : moment.step + len(ahead)]
        axes.plot(ahead[: len(happened)], happened, label="what then happened", **figures.HAPPENED)
        shown = np.append(happened, values)
        span = max(np.ptp(shown), MIN_SPAN * np.ptp(real)) or 1.0  # noise of a dimension at rest stays small
        middle = (shown.max() + shown.min()) / 2
        axes.set(title=name, xlim=(0, ahead[-1]), ylim=(middle - 0.55 * span, middle + 0.55 * span))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    for axes in grid[-1]:
        axes.set_xlabel("steps ahead")
    _finish(figure, grid, moment, len(panels[-1][2]), colours, score_name)
    return figure


def _finish(figure, axes, moment, num_steps, colours, score_name):
    """Add title, colour bar and legend."""
    figure.suptitle(
        "What the planner imagines, and what then happens\n"
        f"step {moment.step} of {num_steps}: the {len(moment.beams)} plans that the search ends with"
    )
    figure.colorbar(colours, ax=axes, label=f"{score_name} (best plan: 0)", shrink=0.8, extend="min")
    handles, labels = np.ravel(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _write_gif(path, frame_paths):
    """Put PNG files of the same size one after the other, in colours that all of them share."""
    frames = [Image.open(each).convert("RGB") for each in frame_paths]
    palette = frames[len(frames) // 2].quantize(256, method=Image.Quantize.MAXCOVERAGE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [3 * FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _find_body(episode, states, env):
    """Return the body if observations begin with MuJoCo's coordinates, but for the first ones, and speeds; or None."""
    positions, speeds, times = (np.array(each) for each in zip(*states, strict=True))
    observed = np.array(episode.observations)[: len(positions)]
    if len(observed) != len(positions):  # another episode: the environment does not repeat itself
        return None
    for skipped in range(positions.shape[1]):
        state = np.concatenate([positions[:, skipped:], speeds], axis=1)
        width = state.shape[1]
        if width > observed.shape[1]:
            continue
        clipped = (np.clip(each, -MAX_SPEED, MAX_SPEED) for each in (state, observed[:, :width]))
        if np.allclose(*clipped, atol=1e-3):
            names = coordinate_names(env.model)
            seconds = float(times[1] - times[0]) if len(times) > 1 else 0.0
            return _Body(skipped, positions, speeds, names[skipped:], seconds)
    return None


def coordinate_names(model):
    """Name each coordinate and each speed by its joint, with its unit; those of free joints by number."""
    joints = [model.joint(i) for i in range(model.njnt)]
    names = []
    for address, unit in (("qposadr", ""), ("dofadr", "/s")):
        total = model.nq if address == "qposadr" else model.nv
        part = [f"{'speed' if unit else 'coordinate'} {i}" for i in range(total)]
        for joint in joints:
            kind = {2: "m", 3: "rad"}.get(int(joint.type[0]))  # mjJNT_SLIDE and mjJNT_HINGE
            if kind:
                part[int(getattr(joint, address)[0])] = f"{joint.name.removesuffix('_joint')} ({kind}{unit})"
        names += part
    return names


def _draw_bodies(folder, moments: Sequence[Moment], body, make_env):
    """Draw imagined bodies of the best plan over the real ones, or say in one line why there are none."""
    if body is None:
        logging.info("no images of bodies: the environment's observations do not say all of a MuJoCo state")
        return
    try:
        with warnings.catch_warnings(), contextlib.closing(make_env(render_mode="rgb_array")) as env:
            warnings.simplefilter("ignore")  # of a display that is not there; the error says so, too
            env.reset(seed=0)
            for moment in moments:
                figures.save(_draw_strip(moment, body, env.unwrapped), folder / f"body_{moment.step:04d}.png")
    except Exception as error:  # drivers and rendering backends raise whatever they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        logging.info("no images of bodies: they need a display or MUJOCO_GL=egl or osmesa (%s)", reason)


def _draw_strip(moment, body, env):
    """Draw one moment's imagined bodies over the real ones."""
    num_positions, num_speeds = body.positions.shape[1], body.speeds.shape[1]
    imagined = moment.beams[0, :, : num_positions - body.skipped + num_speeds]  # [H, ...]
    speeds = imagined[:, num_positions - body.skipped :]
    way = np.cumsum(body.seconds * speeds[:, : body.skipped], axis=0)
    start = body.positions[moment.step, : body.skipped]
    before = np.concatenate([np.zeros([1, body.skipped]), way[:-1]])  # each speed tells of the step after it
    positions = np.concatenate([start + before, imagined[:, : num_positions - body.skipped]], axis=1)
    last = min(len(positions), len(body.positions) - moment.step) - 1
    steps = np.unique(np.linspace(0, last, STRIP_IMAGES).round().astype(int))
    rows = {
        "imagined": [(positions[i], speeds[i]) for i in steps],
        "real": [(body.positions[moment.step + i], body.speeds[moment.step + i]) for i in steps],
    }
    figure = matplotlib.figure.Figure(figsize=(1.7 * len(steps) + 0.4, 4.2), layout="constrained")
    grid = figure.subplots(2, len(steps), squeeze=False)
    for axes_row, (name, states) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(name)
        for axes, state, step in zip(axes_row, states, steps, strict=True):
            env.set_state(*state)
            axes.imshow(env.render())
            axes.set(xticks=[], yticks=[])
            if axes in grid[0]:
                axes.set_title(f"{1000 * body.seconds * step:.0f} ms")
    figure.suptitle(f"The best plan of step {moment.step}, and what then happened")
    return figure
