"""A humanoid, for predictions far ahead; for an accelerator.

python -m experiments.horizons --config=experiments/configs/humanoid.py --workdir=DIR

The first 45 of the 348 dimensions, positions and velocities, as in the paper's figure: 64 tokens per transition, 639 in
a window. Not run here: neither its time nor its errors are known.
"""

from experiments.configs import base


def get_config():
    """Return the paper's model with the observations of the humanoid cut to its state."""
    config = base.get_config()
    config.dataset = "mujoco/humanoid/medium-v0"  # of Minari's remote: --download
    config.data.observation_slice = 45  # leaves out inertia, velocities of the mass centres, and forces
    config.data.stop_after_truncation = False

    config.train.num_steps = 100_000
    config.train.batch_size = 128
    config.train.eval_every = config.train.checkpoint_every = 5_000

    config.ensemble.hidden_dims = (400, 400, 400, 400)
    config.ensemble_train.num_steps = 100_000
    return config
