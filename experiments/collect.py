"""Record a Minari dataset in a point maze of gymnasium-robotics with a scripted waypoint controller.

python -m experiments.collect --env=PointMaze_UMaze-v3 --dataset=tt/pointmaze/umaze-v0 --steps=20000 --seed=0

Starts and goals are the environment's random ones. The action noise is held for 20 steps, with a standard deviation
drawn for each episode from [0, --noise], so that returns range from near-perfect to poor. The environment as it was
used, reward included, is stored with the data: `minari.load_dataset(...).recover_environment()`.
"""

import numpy as np
import tqdm
from absl import flags, logging

from experiments.common import entry, recording, run_flags, signals, waypoint_controller
from tt_jax import environments

ENV = flags.DEFINE_string("env", "PointMaze_UMaze-v3", "Point maze of gymnasium-robotics.")
DATASET = run_flags.new_dataset()
STEPS = flags.DEFINE_integer("steps", 20_000, "Least number of transitions; the last episode is completed.", 1)
SEED = run_flags.seed(help="Seed of starts, goals and noise.")
NOISE = flags.DEFINE_float("noise", 2.0, "Largest standard deviation of the action noise.", 0.0)
REWARD = flags.DEFINE_enum(
    "reward", "dense", ["dense", "sparse"], "exp(-distance to the goal), or 1 within 0.45 of it."
)
OVERWRITE = run_flags.overwrite()


def main(_):
    preemption = signals.Preemption()
    entry.check_alone()
    recording.check_id(DATASET.value, overwrite=OVERWRITE.value)
    if not ENV.value.startswith("PointMaze_"):
        raise ValueError(f"--env={ENV.value} must be one of gymnasium-robotics' PointMaze_* environments.")
    env = environments.make(ENV.value, reward_type=REWARD.value)
    episodes = []
    with tqdm.tqdm(total=STEPS.value, unit="step", desc="collect") as progress:
        for episode in waypoint_controller.episodes(env, max_noise=NOISE.value, seed=SEED.value):
            episodes.append(episode)
            progress.update(len(episode))
            preemption.check("collect")
            if progress.n >= STEPS.value:
                break
    recording.write(
        DATASET.value,
        episodes,
        env=env,
        overwrite=OVERWRITE.value,
        algorithm_name="waypoint controller",
        description=f"{ENV.value}, {REWARD.value} reward: shortest-path waypoints and a PD controller, action noise "
        f"held for {waypoint_controller.NOISE_HOLD} steps, standard deviation up to {NOISE.value}; seed {SEED.value}.",
    )
    returns = np.array([np.sum(episode.rewards) for episode in episodes])
    logging.info(
        "%s: %d steps in %d episodes, return %.1f +- %.1f (standard deviation)",
        *(DATASET.value, sum(map(len, episodes)), len(episodes), returns.mean(), returns.std()),
    )


if __name__ == "__main__":
    entry.run(main)
