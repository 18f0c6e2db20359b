"""The environments that Minari's datasets of continuous control name can be made and stepped."""

import numpy as np
import pytest

from tt_jax import environments

pytest.importorskip("gymnasium_robotics")

# An environment per family and version in the metadata of D4RL/* and mujoco/*; D4RL/minigrid has discrete actions. No
# dataset names Fetch, but a family with goals like it is a user's first own.
NAMES = [
    "PointMaze_UMaze-v3",
    "PointMaze_LargeDense-v3",
    "AntMaze_UMaze-v4",
    "AntMaze_Medium_Diverse_GR-v4",
    "AntMaze_UMaze-v5",
    "FrankaKitchen-v1",
    "AdroitHandDoor-v1",
    "AdroitHandHammer-v1",
    "AdroitHandPen-v1",
    "AdroitHandRelocate-v1",
    "FetchReach-v4",
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
]


@pytest.mark.filterwarnings(r"ignore:.*AntMaze_\w+-v4 is out of date")  # D4RL's datasets keep to it
@pytest.mark.filterwarnings("ignore:.*`reset` and the following `step` share an object")  # the kitchen's goals
@pytest.mark.parametrize("name", NAMES)
def test_the_environment_of_a_dataset_is_made_and_stepped(name):
    env = environments.make(name)
    env.reset(seed=0)
    observation, reward, *_ = env.step(np.zeros(env.action_space.shape, env.action_space.dtype))
    assert env.observation_space.contains(observation) and np.isfinite(reward)
    env.close()
