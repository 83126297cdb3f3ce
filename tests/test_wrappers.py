"""Time limits as ends like any other."""

import gymnasium as gym
import numpy as np
import pytest

from sb3_ppo_variants import PPO, TimeLimitAsTermination
from tests.test_episodes import Episodes


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_returns_are_the_rewards_that_were_given(engine: str) -> None:
    """Of episodes that a limit cuts off after two steps, with rewards 1 and 2, whatever the critic thinks."""
    returns = []
    for wrapper in (TimeLimitAsTermination, lambda env: env):
        env = wrapper(gym.wrappers.TimeLimit(Episodes(), 2))
        kwargs = {"gamma": 0.5, "gae_lambda": 1.0, "device": "cpu", "engine": engine, "seed": 0}
        model = PPO("MlpPolicy", env, n_steps=6, batch_size=6, **kwargs)
        model.policy.value_net.bias.data.fill_(8.0)  # the value of all states, as the observations are zeros
        model.learn(6)
        returns.append(model.rollout_buffer.returns.flatten())
    np.testing.assert_allclose(returns[0], [1 + 0.5 * 2, 2] * 3, rtol=1e-6)
    np.testing.assert_allclose(returns[1], [1 + 0.5 * (2 + 0.5 * 8), 2 + 0.5 * 8] * 3, rtol=1e-6)
