"""An environment goes on from a captured state as the one that it was taken from."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor

from sb3_ppo_variants.env_state import UncapturedStateError, capture, restore
from tests.environments import OBSERVATION_SPACES, RandomEnv


def play(env: gym.Env[Any, Any], n_steps: int, seed: int) -> list[Any]:
    """What random actions lead to, over ends of episodes."""
    actions = env.action_space
    actions.seed(seed)
    seen: list[Any] = []
    for _ in range(n_steps):
        observation, reward, terminated, truncated, info = env.step(actions.sample())
        seen.append((observation, reward, terminated, truncated, info.get("episode", {}).get("r")))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


ENVIRONMENTS = [
    *("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"),
    *("HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Ant-v5", "Reacher-v5", "FrozenLake-v1"),
]


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_goes_on_as_if_nothing_had_happened(env_id: str) -> None:
    env, other = (Monitor(gym.make(env_id)) for _ in range(2))
    env.reset(seed=1)
    play(env, 50, seed=2)
    state = capture(env)
    expected = play(env, 250, seed=3)
    other.reset(seed=9)
    play(other, 7, seed=8)
    restore(other, state)
    np.testing.assert_equal(play(other, 250, seed=3), expected)
    restore(env, state)  # and again, from the same state
    np.testing.assert_equal(play(env, 250, seed=3), expected)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_random_states_of_spaces_belong_to_the_state(observation: str) -> None:
    """Those of all parts of a Dict, too; the space itself stays the object that it is."""
    env, other = RandomEnv(observation), RandomEnv(observation)
    env.reset(seed=1)
    state = capture(env)
    expected = play(env, 30, seed=3)
    other.reset(seed=2)
    space = other.observation_space
    restore(other, state)
    assert other.observation_space is space
    np.testing.assert_equal(play(other, 30, seed=3), expected)


def test_wrappers_have_state_too() -> None:
    def build() -> gym.Env[Any, Any]:
        env = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
        return gym.wrappers.TransformReward(gym.wrappers.FrameStackObservation(env, 3), lambda reward: 2 * reward)

    env, other = build(), build()
    env.reset(seed=1)
    play(env, 30, seed=2)
    state = capture(env)
    expected = play(env, 300, seed=3)
    other.reset()
    restore(other, state)
    np.testing.assert_equal(play(other, 300, seed=3), expected)


def test_what_cannot_be_captured_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Box2D's import doesn't survive an error
        env = gym.make("LunarLander-v3")
    env.reset(seed=0)
    with pytest.raises(UncapturedStateError, match=r"`world`, `moon`, `lander`.* of gymnasium.*LunarLander can't be pickled"):
        capture(env)


def test_other_environments_are_refused() -> None:
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="`env` must have 4 layers as when it was saved, not 5"):
        restore(Monitor(gym.make("CartPole-v1")), capture(env))
    with pytest.raises(
        ValueError, match=r"`env` must have a gymnasium.*CartPoleEnv as when it was saved, not a .*PendulumEnv"
    ):
        restore(gym.make("Pendulum-v1"), capture(env))
