"""Training of the models that are compared in open loop, from a configuration to checkpoints in a workdir."""

import functools
import pathlib

import jax
import ml_collections
import numpy as np

from experiments.common import entry, signals, stages, training_loop, transformer_run
from tt_jax import checkpoints, ensemble, types

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
    transitions: types.Transitions,
    *,
    preemption: signals.Preemption,
    run: dict,
    **changes,
) -> None:
    """Train an ensemble with the settings of `config`, and `changes`, on `transitions`, or go on with it.

    Raises entry.Interrupted, after saving, when told to stop.
    """
    found = split(transitions, config.seed)
    sizes = {"observation_dim": transitions.observations.shape[1], "action_dim": transitions.actions.shape[1]}
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
        stores=[found],
        sizes=[len(found.train.rewards)],
        seed=config.seed,
        evaluate=None,
        describe=lambda metrics, rate: (
            f"loss {metrics['loss'][-1]:.3f}, best on validation {metrics['best_validation_loss'][-1]:.3f}"
        ),
        work_per_step={"transitions": settings.batch_size * model.num_members},
        step_sizes=f"{settings.batch_size} transitions for each of {model.num_members} networks",
        memory_settings=f"lower ensemble_train.batch_size ({settings.batch_size}), ensemble.num_members "
        f"({model.num_members}) or ensemble.hidden_dims ({model.hidden_dims})",
        preemption=preemption,
    )


def train_all(
    config, workdir: pathlib.Path, transitions: types.Transitions, *, run: dict, preemption: signals.Preemption
) -> dict[str, checkpoints.Checkpoint]:
    """Train, as far as they are not trained yet, the transformer, one with a window of one transition, and networks.

    The first learns in `workdir`, the others below it. Returns the checkpoints "transformer", "markov", "ensemble" and
    "deterministic".
    """
    with stages.stage("1/4 train the transformer"):
        transformer_run.train(config, workdir, preemption=preemption)
    with stages.stage("2/4 train the transformer with a window of one transition"):
        single = ml_collections.ConfigDict(config.to_dict())
        transition_dim = transitions.observations.shape[1] + transitions.actions.shape[1] + 2
        blocks = [length * transition_dim - 1 for length in (config.model.max_transitions, 2)]
        single.train.num_steps = round(config.train.num_steps * blocks[0] / blocks[1])  # as many tokens
        single.model.max_transitions = 2  # one to look at, one to predict
        single = entry.resolve_config(single, dataset=None, workdir=workdir / "markov")
        transformer_run.train(single, workdir / "markov", preemption=preemption)
    settings = {"run": run, "preemption": preemption}
    with stages.stage(f"3/4 train {config.ensemble.num_members} probabilistic networks"):
        train(config, workdir / "ensemble", transitions, **settings)
    with stages.stage("4/4 train a deterministic network"):
        train(config, workdir / "deterministic", transitions, num_members=1, probabilistic=False, **settings)
    folders = {"transformer": "", "markov": "markov", "ensemble": "ensemble", "deterministic": "deterministic"}
    return {name: checkpoints.restore(workdir / folder) for name, folder in folders.items()}
