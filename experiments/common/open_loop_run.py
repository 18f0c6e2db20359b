"""Open-loop predictions of trained models from real states of held-out episodes: starts, models by name, measuring."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments.common import entry
from tt_jax import checkpoints, densities, ensemble, open_loop, sampling, trajectories, types, window

NUM_KEPT = 8  # samples of each start that are kept
_FLOATS_AT_ONCE = {"cpu": 2**25}  # of activations in one call, by platform
_FLOATS_OF_ACCELERATORS = 2**31

FILTERS = {"": sampling.Filters(), "_median": sampling.Filters(central=0.0), "_greedy": sampling.Filters(top_k=1)}


@dataclasses.dataclass(frozen=True)
class Starts:
    """Real states and what follows them."""

    episodes: np.ndarray  # [n] int64, of the held-out ones
    steps: np.ndarray  # [n] int64, in the episode
    observations: np.ndarray  # [n, N] float32
    future: open_loop.Future  # [n, H, ...]
    is_real: np.ndarray  # [n, H] bool, 0 beyond the end of the episode


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be rolled out: `root_fn(params, inputs, num_samples)` gives its state for `step_fn`."""

    params: Any
    inputs: Any  # [n, ...] for the starts
    root_fn: Callable[..., Any]
    step_fn: Callable[..., tuple[Any, open_loop.Prediction]]
    num_samples: int
    floats_per_sample: int


def choose_starts(data: trajectories.Trajectories, *, horizon: int, count: int, seed: int) -> Starts:
    """Draw `count` steps with `horizon` steps after them, or as many steps as that many starts have."""
    known = np.ones(len(data.terminated), bool) if data.final_known is None else data.final_known
    lengths = np.diff(data.offsets) - ~known
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])
    episodes = np.repeat(np.arange(len(lengths)), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    needed = min(horizon, np.sort(left)[::-1][min(count, len(left)) - 1])
    fitting = np.flatnonzero(left >= needed)
    chosen = np.sort(np.random.default_rng(seed).choice(fitting, min(count, len(fitting)), replace=False))
    episodes, steps = episodes[chosen], steps[chosen]

    rows = data.offsets[episodes][:, None] + steps[:, None] + np.arange(horizon)  # [n, H]
    is_real = np.arange(horizon) < left[chosen][:, None]
    last = data.offsets[episodes + 1][:, None] - 1
    after = np.concatenate([data.observations[1:], data.final_observations[-1:]])
    after[data.offsets[1:] - 1] = data.final_observations
    rows = np.minimum(rows, last)
    future = open_loop.Future(actions=data.actions[rows], rewards=data.rewards[rows], states=after[rows])
    return Starts(
        episodes=episodes,
        steps=steps,
        observations=data.observations[rows[:, 0]].astype(np.float32),
        future=jax.tree.map(np.float32, future),
        is_real=is_real,
    )


def contexts(store: trajectories.TokenStore, starts: Starts, *, length: int) -> types.Context:
    """Return the last `length` transitions before each start, as far as its episode goes back."""
    count = np.minimum(starts.steps, length)
    first = store.offsets[starts.episodes] + starts.steps - count
    rows = np.minimum(first[:, None] + np.arange(length), len(store.tokens) - 1)
    return types.Context(tokens=store.tokens[rows].astype(np.int32), length=count.astype(np.int32))


def models(
    trained: dict[str, checkpoints.Checkpoint],
    store: trajectories.TokenStore,
    starts: Starts,
    *,
    num_samples: int,
    data: trajectories.Trajectories,
) -> dict[str, Model]:
    """Make every checkpoint of `dynamics_run.train_all` models to roll out; `data` gives the range of the states."""
    bounds = tuple(bound.astype(np.float32) for bound in (data.observations.min(axis=0), data.observations.max(axis=0)))
    found = token_models(trained["transformer"], store, starts, num_samples=num_samples, name="transformer")
    markov = token_models(trained["markov"], store, starts, num_samples=num_samples, name="markov")
    found["markov"] = markov["markov"]
    for name in ("ensemble", "deterministic"):
        found |= ensemble_models(trained[name], starts, num_samples=num_samples, bounds=bounds)
    return found


def token_models(
    checkpoint: checkpoints.Checkpoint, store: trajectories.TokenStore, starts: Starts, *, num_samples: int, name: str
) -> dict[str, Model]:
    """Make the transformer a model to roll out: sampled, median and greedy, given the data's actions and its own."""
    config = checkpoint.config
    longest, dim = config.max_transitions, config.spec.transition_dim
    limits = (longest, max(1, longest // 2))  # half is kept, so that a step costs the same however long the window
    past = contexts(store, starts, length=limits[1])
    rows = store.offsets[starts.episodes] + starts.steps
    observed = store.tokens[rows, : config.spec.observation_dim].astype(np.int32)
    params = open_loop.TokenModel(
        transformer=checkpoint.params, discretizer=checkpoint.tokenizer, cells=densities.cells(checkpoint.tokenizer)
    )

    def make(filters, own_actions):
        width = num_samples if filters == sampling.Filters() else 1

        def window_config(num_beams):
            return window.WindowConfig(
                config=config, limits=limits, num_beams=num_beams, num_slots=longest, share_ancestors=False
            )

        def root(params, inputs, num_samples):
            return open_loop.transformer_root(params, *inputs, config=window_config(num_samples))

        def step(*arguments):
            state = arguments[2]
            settings = window_config(state.logits.shape[1])
            return open_loop.transformer_step(*arguments, config=settings, filters=filters, own_actions=own_actions)

        tokens = longest * dim  # read again half at a time as the window slides
        floats = tokens * config.embed_dim * (8 + 4 * config.num_layers) + config.num_heads * (tokens // 2) ** 2
        return Model(params, (past, observed), root, step, width, floats)

    return {
        f"{name}{suffix}{'_own_actions' if own else ''}": make(filters, own)
        for suffix, filters in FILTERS.items()
        for own in (False, True)
    }


def ensemble_models(
    checkpoint: checkpoints.Checkpoint, starts: Starts, *, num_samples: int, bounds: tuple[np.ndarray, np.ndarray]
) -> dict[str, Model]:
    """Make an ensemble a model to roll out: PETS' TS-1 and TS-infinity, and TS-1 within the bounds of the data."""
    config = checkpoint.config
    params = checkpoint.state["best"]

    def make(**settings):
        def root(params, inputs, num_samples):
            return ensemble.root(inputs, num_samples=num_samples, config=config)

        step = functools.partial(ensemble.step, config=config, **settings)
        width = num_samples if config.probabilistic else config.num_members
        return Model(params, starts.observations, root, step, width, 4 * max(config.hidden_dims))

    if not config.probabilistic:
        return {"deterministic": make(resample=False)}
    return {
        "ensemble_ts1": make(resample=True),
        "ensemble_tsinf": make(resample=False),
        "ensemble_ts1_bounded": make(resample=True, bounds=bounds),
    }


def measure(model: Model, starts: Starts, *, scale: np.ndarray, seed: int, title: str) -> dict[str, np.ndarray]:
    """Roll a model out from all starts, a part of the starts and of the samples at a time; `open_loop.Measures`."""
    floats = _FLOATS_AT_ONCE.get(jax.default_backend(), _FLOATS_OF_ACCELERATORS)
    room = max(1, floats // model.floats_per_sample)
    width = max(w for w in range(1, model.num_samples + 1) if model.num_samples % w == 0 and (w <= room or w == 1))
    size = int(np.clip(room // width, 1, len(starts.steps)))
    num_groups = model.num_samples // width

    @jax.jit
    def roll_out(params, keys, inputs, future):
        state = model.root_fn(params, inputs, width)
        settings = {"step_fn": model.step_fn, "scale": scale, "num_kept": min(NUM_KEPT, width)}
        return open_loop.roll_out(params, keys, state, future, **settings)

    params, root = jax.device_put(model.params), jax.random.key(seed)
    parts = []
    for first in tqdm.trange(0, len(starts.steps), size, unit="batch", desc=title):
        rows = np.minimum(np.arange(first, first + size), len(starts.steps) - 1)  # the last batch is filled up
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (model.inputs, starts.future))
        groups = []
        for group in range(num_groups):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(root, group), jnp.asarray(rows))
            groups.append(jax.tree.map(np.asarray, roll_out(params, keys, *batch)))
        parts.append(_join_groups(groups))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(starts.steps)], *parts)
    return {field.name: getattr(joined, field.name) for field in dataclasses.fields(joined)}


def _join_groups(groups):
    """Average over groups of equally many samples, whose mixture is the mean of their densities."""
    mean = functools.partial(functools.reduce, np.add)
    count = len(groups)
    return open_loop.Measures(
        error=mean([each.error for each in groups]) / count,
        mean=mean([each.mean for each in groups]) / count,
        rewards=mean([each.rewards for each in groups]) / count,
        log_density=functools.reduce(np.logaddexp, [each.log_density for each in groups]) - np.log(count),
        samples=np.concatenate([each.samples for each in groups], axis=2)[:, :, :NUM_KEPT],
    )


def check(config, *, num_samples: int) -> None:
    """Raise UsageError for settings that the comparison does not know."""
    if config.model.goal_conditioned or config.data.step != 1:
        raise entry.UsageError("single-step models know no goals and no data.step above 1; leave both as they are.")
    if num_samples % config.ensemble.num_members:
        raise entry.UsageError(
            f"--num_samples={num_samples} must be a multiple of config.ensemble.num_members="
            f"{config.ensemble.num_members}."
        )
    if config.model.max_transitions < 2:
        raise entry.UsageError("--config.model.max_transitions must be at least 2: what follows needs a past.")
