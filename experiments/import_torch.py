"""Turn a model of the PyTorch reference into a workdir that plan reads and that train_tt can train further.

python -m experiments.import_torch --state_dict=state_50.pt --dataset=d4rl/hopper/medium-v2 \
    --config=experiments/configs/locomotion.py:hopper-medium --workdir=DIR

A TrajectoryTransformerModel of the transformers library is read alike (its pytorch_model.bin). The file's shapes tell
layers, width, bins and window, which replace the configuration's. The discretizer is not in the file: it is fitted
again, so dataset and data settings must be those that the model was trained with. This needs torch, which nothing else
here does.
"""

import pickle
from collections.abc import Mapping

import numpy as np
from absl import flags, logging

from experiments.common import datasets, entry, run_flags, settings
from tt_jax import checkpoints, torch_import, training, transformer

STATE_DICT = flags.DEFINE_string("state_dict", None, "File that torch.save wrote of model.state_dict().", required=True)
CONFIG, DATASET = run_flags.config(), run_flags.dataset()
WORKDIR = run_flags.workdir(help="Folder for configuration and checkpoint, without checkpoints so far.")
NUM_HEADS = flags.DEFINE_integer("num_heads", 4, "Attention heads, of which the file has no trace.", 1)


def main(_):
    config = CONFIG.value
    if WORKDIR.value and checkpoints.latest_step(WORKDIR.value) is not None:
        raise entry.UsageError(f"{WORKDIR.value} holds checkpoints already; use another --workdir.")
    settings.checked(config)
    entry.resolve_config(config, dataset=DATASET.value, workdir=WORKDIR.value)  # says what is missing
    state_dict = _load(STATE_DICT.value)
    sizes = torch_import.read_sizes(state_dict)
    config.data.num_bins, config.model.num_heads = sizes["num_bins"], NUM_HEADS.value
    for name in ("num_layers", "embed_dim", "max_transitions"):
        config.model[name] = sizes[name]
    config = entry.resolve_config(config, dataset=DATASET.value, workdir=WORKDIR.value)

    data = datasets.prepare(config)
    if data.spec.transition_dim != sizes["transition_dim"]:
        raise entry.UsageError(
            f"the model has {sizes['transition_dim']} tokens per transition, {config.dataset} has "
            f"{data.spec.transition_dim}; is it another dataset, or is config.data.observation_slice missing?"
        )
    model_config = entry.to_dataclass(transformer.TransformerConfig, config.model, spec=data.spec)
    params = torch_import.from_state_dict(state_dict, config=model_config)
    train_config = entry.to_dataclass(training.TrainConfig, config.train)
    checkpoints.save(
        WORKDIR.value,
        step=0,
        params=params,
        config=model_config,
        tokenizer=data.tokenizer,
        state={
            "opt_state": training.make_optimizer(train_config).init(params),
            "step": np.zeros([], np.int32),
            "tokens_seen": np.zeros([2], np.uint32),
        },
        run=data.run,
    )
    described = ", ".join(f"{name} {value}" for name, value in sizes.items())
    logging.info("%s is now the checkpoint of step 0 in %s: %s", STATE_DICT.value, WORKDIR.value, described)


def _load(path) -> dict[str, np.ndarray]:
    """Read a file of torch without running code that it may hold."""
    try:
        import torch
    except ImportError as error:
        raise entry.UsageError(f"--state_dict={path} can only be read with PyTorch: pip install torch.") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise entry.UsageError(f"--state_dict={path} cannot be read: {reason}") from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise entry.UsageError(f"--state_dict={path} must hold a state_dict: tensors by name.")
    return {name: value.float().numpy() for name, value in loaded.items()}


if __name__ == "__main__":
    entry.run(main)
