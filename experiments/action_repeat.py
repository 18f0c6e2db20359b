"""A wrapper that makes an environment coarser in time."""

import gymnasium


class ActionRepeat(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Hold every action for `num_steps` environment steps and add up their rewards, so that returns stay the same."""

    def __init__(self, env: gymnasium.Env, num_steps: int):
        gymnasium.utils.RecordConstructorArgs.__init__(self, num_steps=num_steps)
        super().__init__(env)
        self._num_steps = num_steps

    def step(self, action):
        total = 0.0
        for _ in range(self._num_steps):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info
