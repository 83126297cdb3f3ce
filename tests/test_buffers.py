"""Rewards-to-go as the critic's targets, worked out episode by episode."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_variants import PPO, RewardsToGoRolloutBuffer
from sb3_ppo_variants.engines import FusedEngine, LeanPolicy
from tests.environments import RandomEnv
from tests.test_parity import assert_same_model

SPACE = spaces.Box(-1, 1, (1,), np.float32)


def filled(buffer_class: type[RolloutBuffer] = RewardsToGoRolloutBuffer, **kwargs: Any) -> RolloutBuffer:
    """Four steps with rewards 1, 2, 4, 8; the second one ends an episode, the fourth one doesn't; values 1, 1, 1, 1."""
    buffer = buffer_class(4, SPACE, SPACE, gamma=0.5, gae_lambda=0.0, device="cpu", **kwargs)
    nothing, one = np.zeros((1, 1)), th.ones(1)
    for reward, starts in ((1.0, True), (2.0, False), (4.0, True), (8.0, False)):
        buffer.add(nothing, nothing, np.array([reward]), np.array([starts]), one, one)
    buffer.compute_returns_and_advantage(last_values=th.tensor([[16.0]]), dones=np.array([False]))
    return buffer


def test_returns_are_the_discounted_sums_of_rewards() -> None:
    buffer = filled()
    # First episode: 1 + 0.5 x 2, 2. Second one: 4 + 0.5 x 8 + 0.25 x 16, 8 + 0.5 x 16, the last state's value for the rest.
    assert buffer.returns.flatten().tolist() == [2.0, 2.0, 12.0, 16.0]


def test_advantages_stay_those_of_gae() -> None:
    # With lambda 0: r + gamma V' - V, so 1 + 0.5 - 1, 2 - 1, 4 + 0.5 - 1, 8 + 8 - 1.
    assert filled().advantages.flatten().tolist() == [0.5, 1.0, 3.5, 15.0]
    np.testing.assert_array_equal(filled().advantages, filled(RolloutBuffer).advantages)
    assert filled(RolloutBuffer).returns.flatten().tolist() == [1.5, 2.0, 4.5, 16.0]


def test_standardized_returns_and_their_advantages() -> None:
    buffer = filled(standardize=True)
    # Mean 8, variance (36 + 36 + 16 + 64) / 4 = 38.
    expected = (np.array([2.0, 2.0, 12.0, 16.0]) - 8) / 38**0.5
    np.testing.assert_allclose(buffer.returns.flatten(), expected, rtol=1e-6)
    np.testing.assert_allclose(buffer.advantages.flatten(), expected - 1, rtol=1e-6)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_fused_engine_trains_with_it_as_the_eager_one(standardize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    for kind, name in ((FusedEngine, "step"), (LeanPolicy, "forward")):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *args, original=original: used.add(type(self)) or original(self, *args))
    models = []
    for engine in ("auto", "eager"):
        env: gym.Env[Any, Any] | Any = make_vec_env("CartPole-v1", 2, seed=0)
        buffer = {"rollout_buffer_class": RewardsToGoRolloutBuffer, "rollout_buffer_kwargs": {"standardize": standardize}}
        model = PPO("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu", engine=engine, **buffer)
        models.append(model.learn(128))
        assert used == {FusedEngine, LeanPolicy}
    assert_same_model(*models)


def test_dicts_as_observations_are_refused() -> None:
    env = make_vec_env(lambda: RandomEnv("dict"), 1)
    with pytest.raises(ValueError, match="`rollout_buffer_class` must be one for dicts, as observations are, not RewardsToGo"):
        PPO("MultiInputPolicy", env, rollout_buffer_class=RewardsToGoRolloutBuffer)
