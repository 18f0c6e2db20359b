"""Pictures of MuJoCo bodies in real and in predicted states."""

import warnings

import numpy as np
from absl import logging
from matplotlib.figure import Figure

from experiments.common import control, datasets, figures, open_loop_run
from tt_jax import environments

SHOWN = {"transformer": "transformer", "ensemble_ts1": "ensemble"}  # models and their titles
EVERY = 20  # steps between pictures


def draw_strip(starts: open_loop_run.Starts, measured: dict, data: datasets.Dataset, path) -> None:
    """Draw one real future above one sampled future of each model; where nothing can be drawn, say why in one line."""
    try:
        env = control.make_env(data.run, render_mode="rgb_array")
    except (environments.Unavailable, environments.Untrusted) as error:
        return logging.info("no pictures of bodies: %s", error)
    structure = getattr(env.unwrapped, "observation_structure", None)
    if structure is None or data.config.hidden_dims or data.config.observation_keys:
        return logging.info("no pictures of bodies: the observations do not tell the whole state of one.")
    start = int(np.argmax(starts.is_real.sum(axis=1)))  # the first of those that go on longest
    steps = np.arange(0, int(starts.is_real[start].sum()) + 1, EVERY)
    rows = {"real": starts.future.states[start]}
    rows |= {title: measured[name]["samples"][start, :, 0] for name, title in SHOWN.items()}
    figure = Figure(figsize=(2.2 * len(steps), 2.2 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), len(steps), squeeze=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is tried before something renders
            env.reset(seed=0)
            env.render()
        for axes_row, (title, states) in zip(grid, rows.items(), strict=True):
            states = np.concatenate([starts.observations[start][None], states])
            for axes, step in zip(axes_row, steps, strict=True):
                axes.imshow(_render(env, states[step], structure))
                axes.set(xticks=[], yticks=[], title=f"step {step}" if title == "real" else "")
            axes_row[0].set_ylabel(title)
    except Exception as error:  # whatever is missing of OpenGL shows only here, each time in another way
        hint = "they need a display or MUJOCO_GL=egl or osmesa"
        return logging.info("no pictures of bodies: %s (%s).", hint, type(error).__name__)
    finally:
        env.close()
    figures.save(figure, path)
    return logging.info("bodies: %s", path)


def _render(env, observation, structure):
    """Draw the body of an observation: positions without the first ones, then velocities."""
    num_positions = structure["qpos"]
    positions = np.concatenate([np.zeros(structure["skipped_qpos"]), observation[:num_positions]])
    velocities = observation[num_positions : num_positions + structure["qvel"]]
    env.unwrapped.set_state(np.float64(positions), np.float64(velocities))
    return env.render()
