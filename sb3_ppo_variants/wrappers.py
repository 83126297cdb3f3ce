"""Wrappers of environments."""

from typing import Any, SupportsFloat

import gymnasium as gym


class TimeLimitAsTermination(gym.Wrapper[Any, Any, Any, Any]):
    """
    Lets time limits end episodes for good, as in code from before gymnasium told truncation from termination.

    SB3 adds the discounted value of the last state to the reward where a time limit cuts an episode off (SB3 issue #633; Pardo
    et al. 2018, arXiv 1712.00378). With this wrapper nothing is added: returns are the sums of the rewards that were given.

    :param env: with a time limit
    """

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """What was truncated has terminated."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated or truncated, False, info
