"""Small environments that cover the spaces of SB3's PPO, and one that ends the process."""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (4,), np.float32),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
    "dict": spaces.Dict({"vector": spaces.Box(-1, 1, (3,), np.float32), "choice": spaces.Discrete(3)}),
}
ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (3,), np.float32),
    "matrix": spaces.Box(-2, 1, (2, 2), np.float32),
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}


class RandomEnv(gym.Env[Any, Any]):
    """
    Random observations; the reward depends on observation and action, so that there is something to learn.

    Episodes end by termination (5 % of the steps) or, after 20 steps, by truncation.
    """

    def __init__(self, observation: str = "box", action: str = "box") -> None:
        # Copies: a space has a random state of its own.
        self.observation_space = type_copy(OBSERVATION_SPACES[observation])
        self.action_space = type_copy(ACTION_SPACES[action])
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._steps = 0
        self._observation = self.observation_space.sample()
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        flat = spaces.flatten(self.observation_space, self._observation).astype(np.float64)
        reward = float(np.cos(flat.mean()) - np.abs(np.mean(action) - np.tanh(flat.sum() / 10)))
        self._observation = self.observation_space.sample()
        return self._observation, reward, bool(self.np_random.random() < 0.05), self._steps >= 20, {}


def type_copy(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """A space like the given one, with a random state of its own."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: type_copy(child) for key, child in space.spaces.items()})
    if isinstance(space, spaces.Box):
        return spaces.Box(space.low, space.high, space.shape, space.dtype.type)  # type: ignore[arg-type]
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec)
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary(space.n)
    assert isinstance(space, spaces.Discrete)
    return spaces.Discrete(space.n)


class CrashingEnv(RandomEnv):
    """Ends the process at the first step, if that is one that another Python has started."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if multiprocessing.parent_process() is not None or Path(sys.argv[0]).name == "default_worker.py":  # Ray's
            os.abort()
        return super().step(action)


gym.register("Crashing-v0", entry_point=CrashingEnv)
