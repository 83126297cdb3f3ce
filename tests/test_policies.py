"""Policies whose last layers start at zero."""

from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_variants import PPO, ZeroHeadsPolicy
from tests.test_parity import assert_same_model


@pytest.mark.parametrize("policy", ["ZeroHeadsMlpPolicy", ZeroHeadsPolicy])
def test_starts_without_preferences(policy: str | type[ZeroHeadsPolicy]) -> None:
    model = PPO(policy, "CartPole-v1", n_steps=32, batch_size=16, device="cpu")
    observations = th.randn(5, 4)
    assert model.policy.predict_values(observations).tolist() == [[0.0]] * 5
    assert model.policy.get_distribution(observations).distribution.probs.tolist() == [[0.5, 0.5]] * 5


def test_gaussians_start_at_zero_with_the_deviation_that_is_asked_for() -> None:
    model = PPO(
        "ZeroHeadsMlpPolicy", "Pendulum-v1", n_steps=32, batch_size=16, device="cpu", policy_kwargs={"log_std_init": 1}
    )
    distribution = model.policy.get_distribution(th.randn(5, 3)).distribution
    assert distribution.mean.tolist() == [[0.0]] * 5
    assert distribution.stddev.tolist() == [[pytest.approx(2.7182818)]] * 5


def test_trains_the_same_bits_in_both_engines() -> None:
    models = []
    for engine in ("fused", "eager"):
        env = make_vec_env("CartPole-v1", 2, seed=0)
        model = PPO("ZeroHeadsMlpPolicy", env, n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu", engine=engine)
        models.append(model.learn(128))
    assert_same_model(*models)


def test_what_has_been_trained_survives_saving(tmp_path: Path) -> None:
    model = PPO("ZeroHeadsMlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, device="cpu").learn(64)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded.policy, ZeroHeadsPolicy)
    assert_same_model(loaded, model)
    assert loaded.policy.action_net.weight.any()
