"""Rollouts that end with an episode: ``n_episodes``."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_variants import PPO, UpdateCallback, UpdateStats
from tests.environments import RandomEnv
from tests.test_parity import assert_same_model


class Episodes(gym.Env[Any, Any]):
    """Episodes of 3, 4, 5, 3, 4, 5, ... steps, the reward is the step's number."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self._episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode += 1
        self._step = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        return np.zeros(2, np.float32), float(self._step), self._step == 3 + self._episode % 3, False, {}


class Sizes(UpdateCallback):
    """The number of samples in each update, and of its minibatches."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[int] = []
        self.minibatches: list[list[int]] = []

    def _on_update_start(self) -> None:
        buffer = self.model.rollout_buffer
        assert buffer.full
        self.rollouts.append(buffer.buffer_size * buffer.n_envs)
        assert len(buffer.rewards) == buffer.buffer_size
        self.minibatches.append([])

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        self.minibatches[-1].append(len(stats.log_ratio))
        return True


def train(env: Any, timesteps: int, **kwargs: Any) -> tuple[PPO, Sizes]:
    sizes = Sizes()
    model = PPO("MlpPolicy", env, n_steps=10, batch_size=10, n_epochs=1, seed=0, device="cpu", **kwargs)
    model.learn(timesteps, callback=sizes)
    return model, sizes


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_rollout_ends_with_its_last_episode(engine: str) -> None:
    model, sizes = train(Episodes(), 21, n_episodes=2, engine=engine)
    assert sizes.rollouts == [3 + 4, 5 + 3, 4 + 5]
    assert sizes.minibatches == [[7], [8], [9]]
    assert model.num_timesteps == 24
    assert model.rollout_buffer.rewards.flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert model.rollout_buffer.episode_starts.flatten().tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_or_after_n_steps() -> None:
    # 3 + 4 and the first three steps of the next episode; its last two, 3 + 4.
    assert train(Episodes(), 19, n_episodes=3)[1].rollouts == [10, 9]


def test_episodes_of_all_environments_count() -> None:
    # Both end after 3 steps at the same time, then after 4.
    assert train(make_vec_env(Episodes, 2, seed=0), 14, n_episodes=2)[1].rollouts == [6, 8]
    assert train(make_vec_env(Episodes, 2, seed=0), 14, n_episodes=3)[1].rollouts == [14]


def test_rollouts_have_their_full_length_again_without_it() -> None:
    model, sizes = train(Episodes(), 7, n_episodes=2)
    model.n_episodes = None
    model.learn(20, callback=sizes)
    assert sizes.rollouts == [7, 10, 10]


@pytest.mark.parametrize(
    "config",
    [
        {"action": "box"},
        {"action": "box", "use_sde": True, "sde_sample_freq": 3},
        {"action": "box", "use_sde": True, "policy_kwargs": {"squash_output": True}},
        {"action": "multi_binary", "kl_coef": "auto"},
        {"observation": "dict", "policy": "MultiInputPolicy"},
    ],
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_many_episodes_change_nothing(config: dict[str, Any]) -> None:
    """The loop that counts them is SB3's, for all policies."""
    kwargs = dict(config)
    spaces_ = {name: kwargs.pop(name) for name in ("observation", "action") if name in kwargs}
    models = []
    for n_episodes in (None, 1000):
        env = make_vec_env(RandomEnv, 2, seed=0, env_kwargs=spaces_)
        arguments = {"policy": "MlpPolicy", "n_steps": 24, "batch_size": 16, "n_epochs": 2, "seed": 0, **kwargs}
        models.append(PPO(env=env, device="cpu", n_episodes=n_episodes, **arguments).learn(96))
    assert_same_model(*models)


@pytest.mark.parametrize(("n_episodes", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)])
def test_bad_numbers(n_episodes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n_episodes"):
        PPO("MlpPolicy", "CartPole-v1", n_episodes=n_episodes, device="cpu")


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize(("n_episodes", "error"), [(0, ValueError), ("2", TypeError)])
def test_bad_numbers_that_are_assigned_later(n_episodes: Any, error: type[Exception], engine: str) -> None:
    model, _ = train(Episodes(), 7, n_episodes=2, engine=engine)
    model.n_episodes = n_episodes
    with pytest.raises(error, match="`n_episodes` must be an integer >= 1"):
        model.learn(7)
    assert model.n_episodes == 2


def test_a_number_that_a_callback_assigns_holds_from_the_next_rollout_on() -> None:
    class Assign(Sizes):
        def _on_step(self) -> bool:
            self.model.n_episodes = 1
            return True

    assign = Assign()
    train(Episodes(), 1, n_episodes=2)[0].learn(17, callback=assign)
    assert assign.rollouts == [3 + 4, 5, 3, 4]


def test_a_short_rollouts_returns_are_those_of_its_steps() -> None:
    """With lambda 1 and no discount, minus the values: what is left of the episode's rewards."""
    model, _ = train(Episodes(), 7, n_episodes=2, gamma=1.0, gae_lambda=1.0)
    returns = th.as_tensor(model.rollout_buffer.returns).flatten()
    th.testing.assert_close(returns, th.tensor([6.0, 5, 3, 10, 9, 7, 4]))
