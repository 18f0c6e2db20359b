"""Training of single-step models on a Minari dataset, from a configuration to checkpoints in a workdir."""

import functools

import jax
import numpy as np

from experiments.common import entry, training_loop
from tt_jax import ensemble, trajectories, types

VALIDATION = 0.05  # share of the transitions by which the best weights are found


def split(transitions: types.Transitions, seed: int) -> ensemble.EnsembleData:
    """Set apart the transitions by which the best weights are found, at least one of two or more."""
    order = np.random.default_rng(seed).permutation(len(transitions.rewards))
    count = int(np.clip(round(VALIDATION * len(order)), 1, 10_000))
    parts = {"train": order[count:], "validation": order[:count]}
    parts = {name: jax.tree.map(lambda leaf, rows=rows: leaf[rows], transitions) for name, rows in parts.items()}
    return ensemble.EnsembleData(**parts)


def train(
    config,
    workdir: str,
    data: trajectories.Trajectories,
    *,
    preemption: entry.Preemption,
    run: dict,
    **changes,
) -> None:
    """Train an ensemble with the settings of `config`, and `changes`, on the transitions of `data`, or go on with it.

    Raises entry.Interrupted, after saving, when told to stop.
    """
    found = split(trajectories.transitions(data), config.seed)
    sizes = {"observation_dim": data.observations.shape[1], "action_dim": data.actions.shape[1]}
    model = entry.to_dataclass(ensemble.EnsembleConfig, config.ensemble, **sizes, **changes)
    settings = entry.to_dataclass(ensemble.EnsembleTrainConfig, config.ensemble_train)
    init = functools.partial(
        ensemble.init, config=model, units=ensemble.units(found.train), num_steps=settings.num_steps
    )
    training_loop.run(
        workdir,
        config=settings,
        fresh=jax.jit(init)(jax.random.key(config.seed)),
        model={"config": model, "tokenizer": None, "run": run},
        train_fn=ensemble.make_train_fn(config=model, train_config=settings, num_transitions=len(found.train.rewards)),
        store=found,
        seed=config.seed,
        evaluate=None,
        describe=lambda metrics, rate: (
            f"loss {metrics['loss'][-1]:.3f}, best on validation {metrics['best_validation_loss'][-1]:.3f}"
        ),
        work_per_step={"transitions": settings.batch_size * model.num_members},
        preemption=preemption,
    )
