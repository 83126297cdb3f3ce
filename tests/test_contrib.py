"""MaskablePPO and RecurrentPPO: contrib's in clip mode, with exact KLs under masks and along sequences, and all callbacks."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch.distributions import Categorical, Normal, kl_divergence

from sb3_ppo_variants import (
    GradientNoiseScaleCallback,
    KLAdaptiveLearningRateCallback,
    KLEarlyStoppingCallback,
    TrustRegionLoggingCallback,
    UpdateStats,
)
from sb3_ppo_variants.contrib import MaskablePPO, RecurrentPPO
from sb3_ppo_variants.critic import critic_parameters
from tests.environments import RandomEnv
from tests.test_parity import assert_same_tensors
from tests.test_ppo import Watch
from tests.test_vec_env import Native

N_STEPS, N_ENVS = 24, 2
ROLLOUT = N_STEPS * N_ENVS


class MaskedEnv(RandomEnv):
    """Forbids some actions, others at each step, but never all."""

    def action_masks(self) -> np.ndarray:
        sizes = {
            spaces.Discrete: lambda space: [int(space.n)],
            spaces.MultiDiscrete: lambda space: [int(n) for n in space.nvec],
            spaces.MultiBinary: lambda space: [2] * int(space.n),
        }[type(self.action_space)](self.action_space)  # type: ignore[index]
        masks = [np.arange(size) != (self._steps + index) % (size + 1) for index, size in enumerate(sizes)]
        return np.concatenate(masks)


SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 3, "seed": 0, "device": "cpu"}
SMALL: dict[str, Any] = {"lstm_hidden_size": 8, "net_arch": [8]}


def masked(algorithm: Any = MaskablePPO, observation: str = "box", action: str = "discrete", **kwargs: Any) -> Any:
    policy = "MultiInputPolicy" if observation == "dict" else "MlpPolicy"
    env = make_vec_env(lambda: MaskedEnv(observation, action), N_ENVS, seed=0)
    return algorithm(policy, env, **{**SETTINGS, **kwargs})


def recurrent(algorithm: Any = RecurrentPPO, observation: str = "box", action: str = "box", **kwargs: Any) -> Any:
    policy = "MultiInputLstmPolicy" if observation == "dict" else "MlpLstmPolicy"
    env = make_vec_env(lambda: RandomEnv(observation, action), N_ENVS, seed=0)
    policy_kwargs = {**SMALL, **kwargs.pop("policy_kwargs", {})}
    return algorithm(policy, env, **{**SETTINGS, "policy_kwargs": policy_kwargs, **kwargs})


MASKED_CONFIGS: dict[str, dict[str, Any]] = {
    "discrete": {},
    "multi-discrete": {"action": "multi_discrete"},
    "multi-binary": {"action": "multi_binary"},
    "dict": {"observation": "dict"},
    "all-terms": {"ent_coef": 0.01, "clip_range_vf": 0.1, "normalize_advantage": False},
    "early-stop": {"target_kl": 0.005, "learning_rate": 1e-2},
}
RECURRENT_CONFIGS: dict[str, dict[str, Any]] = {
    "box": {},
    "discrete": {"action": "discrete"},
    "multi-discrete": {"action": "multi_discrete"},
    "dict": {"observation": "dict"},
    "all-terms": {"ent_coef": 0.01, "clip_range_vf": 0.1, "normalize_advantage": False},
    "early-stop": {"target_kl": 0.005, "learning_rate": 1e-2},
    "shared-lstm": {"policy_kwargs": {"shared_lstm": True, "enable_critic_lstm": False}},
    "critic-without-lstm": {"policy_kwargs": {"enable_critic_lstm": False}},
    "gsde": {"use_sde": True, "sde_sample_freq": 4},
    "two-layers": {"policy_kwargs": {"n_lstm_layers": 2}},
}


def assert_same_training(make: Any, own: Any, of_contrib: Any, config: dict[str, Any]) -> None:
    """Parameters, optimiser state, and what is logged under contrib's keys, after two updates."""
    ours, contribs = (make(algorithm, **copy.deepcopy(config)).learn(2 * ROLLOUT) for algorithm in (own, of_contrib))
    assert isinstance(ours, of_contrib)
    assert_same_tensors(ours.policy.state_dict(), contribs.policy.state_dict())
    assert_same_tensors(ours.policy.optimizer.state_dict(), contribs.policy.optimizer.state_dict())
    logged, expected = ours.logger.name_to_value, contribs.logger.name_to_value
    for key, value in expected.items():
        if key.startswith("train/"):
            assert logged[key] == value, key
    assert {"train/kl", "train/kl_coef", "train/grad_norm"} <= logged.keys()


@pytest.mark.parametrize("config", MASKED_CONFIGS)
def test_maskable_ppo_is_contribs(config: str) -> None:
    assert_same_training(masked, MaskablePPO, sb3_contrib.MaskablePPO, MASKED_CONFIGS[config])


@pytest.mark.parametrize("config", RECURRENT_CONFIGS)
def test_recurrent_ppo_is_contribs(config: str) -> None:
    assert_same_training(recurrent, RecurrentPPO, sb3_contrib.RecurrentPPO, RECURRENT_CONFIGS[config])


class Kept(Watch):
    """The old policy as a whole, and each minibatch's exact KL."""

    def __init__(self) -> None:
        super().__init__()
        self.minibatch_kls: list[tuple[th.Tensor, th.Tensor]] = []

    def _on_update_start(self) -> None:
        super()._on_update_start()
        self.old = copy.deepcopy(self.model.policy)

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        assert stats.kl is not None
        self.minibatch_kls.append((stats.kl, self.expected(stats.minibatch.samples)))
        return True

    def expected(self, samples: Any) -> th.Tensor:
        raise NotImplementedError


class KeptMasked(Kept):
    def expected(self, samples: Any) -> th.Tensor:
        """By torch, on the allowed actions alone."""
        kls = []
        for observation, mask in zip(samples.observations, samples.action_masks.bool(), strict=True):
            with th.no_grad():
                logits = [
                    policy.get_distribution(observation[None]).distribution.logits[0][mask]
                    for policy in (self.old, self.model.policy)
                ]
            kls.append(kl_divergence(*(Categorical(logits=each) for each in logits)))
        return th.stack(kls)


class KeptRecurrent(Kept):
    def expected(self, samples: Any) -> th.Tensor:
        """By torch, in place of the old policy's distributions of the whole rollout those of the same sequences."""
        with th.no_grad():
            old, new = (
                policy.get_distribution(samples.observations, samples.lstm_states.pi, samples.episode_starts)[0].distribution
                for policy in (self.old, self.model.policy)
            )
        kl = kl_divergence(Normal(old.mean, old.stddev), Normal(new.mean, new.stddev)).sum(dim=1)
        return kl[samples.mask > 0]


@pytest.mark.parametrize(("model", "watch"), [(masked, KeptMasked), (recurrent, KeptRecurrent)])
def test_exact_kl_of_minibatches(model: Any, watch: Any) -> None:
    kept = watch()
    model(learning_rate=1e-2).learn(ROLLOUT, callback=kept)
    assert len(kept.minibatch_kls) == 9
    for kl, expected in kept.minibatch_kls:
        assert len(kl) == 16
        th.testing.assert_close(kl, expected, rtol=1e-3, atol=1e-6)
    assert kept.minibatch_kls[-1][0].mean() > 1e-3


def test_exact_kl_of_an_update_under_masks() -> None:
    kept = KeptMasked()
    model = masked(learning_rate=1e-2)
    model.learn(ROLLOUT, callback=kept)
    whole = next(model.rollout_buffer.get())
    assert kept.kls[-1] == pytest.approx(kept.expected(whole).mean().item(), rel=1e-3)


def test_exact_kl_of_an_update_along_sequences() -> None:
    """Step by step through the rollout, each policy with what it remembers itself."""
    kept = KeptRecurrent()
    model = recurrent(learning_rate=1e-2)
    model.learn(ROLLOUT, callback=kept)
    model.learn(ROLLOUT, callback=kept, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    observations = buffer.observations.reshape(N_ENVS, N_STEPS, -1)
    starts = buffer.episode_starts.reshape(N_ENVS, N_STEPS)
    kls = []
    for number in range(N_ENVS):
        first = number * N_STEPS
        memory = tuple(th.as_tensor(states[first][:, None]) for states in (buffer.hidden_states_pi, buffer.cell_states_pi))
        states = {"old": memory, "new": memory}
        for step in range(N_STEPS):
            observation, start = th.as_tensor(observations[number, step][None]), th.as_tensor(starts[number, step][None])
            distributions = []
            for name, policy in (("old", kept.old), ("new", model.policy)):
                with th.no_grad():
                    distribution, states[name] = policy.get_distribution(observation, states[name], start)  # type: ignore[misc, call-arg]
                distributions.append(Normal(distribution.distribution.mean, distribution.distribution.stddev))  # type: ignore[attr-defined]
            kls.append(kl_divergence(*distributions).sum().item())
    assert kept.kls[-1] == pytest.approx(np.mean(kls), rel=1e-3)
    assert kept.kls[-1] > 1e-3
    assert starts.sum() > 1


@pytest.mark.parametrize("make", [masked, recurrent])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"clip_range": None},
        {"clip_range": None, "kl_coef": 3.0},
        {"clip_range": None, "kl_coef": "auto"},
        {"kl_coef": "auto_0.5", "ent_coef": "lin_0.01"},
        {"surrogate": "spo"},
        {"clip_range": (0.1, 0.3), "dual_clip": 3.0},
        {"n_value_epochs": 2, "value_learning_rate": 1e-2},
        {"n_value_epochs": 2, "critic_first": True},
    ],
)
def test_variants(make: Any, kwargs: dict[str, Any]) -> None:
    watch = Watch()
    model = make(**kwargs)
    model.learn(3 * ROLLOUT, callback=watch)
    assert len(watch.updates) == 3
    assert all(np.isfinite(kl) and kl > 0 for kl in watch.kls)


@pytest.mark.parametrize("make", [masked, recurrent])
def test_a_large_penalty_keeps_the_kl_small(make: Any) -> None:
    kls = []
    for kl_coef in (0.0, 100.0):
        watch = Watch()
        make(clip_range=None, kl_coef=kl_coef, learning_rate=3e-3).learn(ROLLOUT, callback=watch)
        kls.append(watch.kls[0])
    assert kls[1] < kls[0] / 3


@pytest.mark.parametrize("make", [masked, recurrent])
def test_callbacks(make: Any, tmp_path: Path) -> None:
    stops = KLEarlyStoppingCallback(1e-9, restore=True, stop="policy")
    callbacks = [stops, TrustRegionLoggingCallback(), GradientNoiseScaleCallback(), KLAdaptiveLearningRateCallback()]
    watch = Watch()
    make(tensorboard_log=str(tmp_path)).learn(2 * ROLLOUT, callback=[*callbacks, watch])
    assert watch.kls == pytest.approx([0, 0], abs=1e-7)
    assert all(stats.policy_stopped for stats in watch.updates)


@pytest.mark.parametrize("make", [masked, recurrent])
def test_the_critics_own_parameters(make: Any) -> None:
    model = make()
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    names = {name for name, parameter in model.policy.named_parameters() if id(parameter) in own}
    assert names == {name for name in dict(model.policy.named_parameters()) if "value_net" in name or "lstm_critic" in name}


@pytest.mark.parametrize(("make", "contribs"), [(masked, sb3_contrib.MaskablePPO), (recurrent, sb3_contrib.RecurrentPPO)])
def test_save_and_load(make: Any, contribs: Any, tmp_path: Path) -> None:
    """Contrib's files here, ours there and here."""
    model = make()
    model.learn(ROLLOUT)
    model.save(tmp_path / "ours")
    make(contribs).save(tmp_path / "contribs")
    assert_same_tensors(contribs.load(tmp_path / "ours").policy.state_dict(), model.policy.state_dict())
    assert type(model).load(tmp_path / "contribs", kl_coef="auto", clip_range=None).clip_range is None
    again = type(model).load(tmp_path / "ours", env=model.get_env())
    again.learn(ROLLOUT)


def test_evaluation() -> None:
    model = masked().learn(ROLLOUT)
    env = make_vec_env(lambda: MaskedEnv("box", "discrete"), 1, seed=1)
    assert np.isfinite(evaluate_masked(model, env, 2)[0])  # type: ignore[arg-type]
    observation = env.reset()
    action = model.predict(observation, action_masks=get_action_masks(env))[0]
    assert get_action_masks(env)[0][action[0]]
    assert np.isfinite(evaluate_policy(recurrent().learn(ROLLOUT), make_vec_env(RandomEnv, 1), 2)[0])  # type: ignore[operator]


def test_masks_of_a_gymnasium_vector_env() -> None:
    env = SyncVectorEnv([lambda: MaskedEnv("box", "discrete")] * N_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)
    ours = MaskablePPO("MlpPolicy", env, **SETTINGS).learn(2 * ROLLOUT)
    dummy = make_vec_env(lambda: MaskedEnv("box", "discrete"), N_ENVS)
    contribs = sb3_contrib.MaskablePPO("MlpPolicy", dummy, **SETTINGS).learn(2 * ROLLOUT)
    assert_same_tensors(ours.policy.state_dict(), contribs.policy.state_dict())


@pytest.mark.parametrize(("algorithm", "policy"), [(MaskablePPO, "MlpPolicy"), (RecurrentPPO, "MlpLstmPolicy")])
def test_environments_that_reset_in_the_next_step(algorithm: Any, policy: str) -> None:
    env = Native(SyncVectorEnv([lambda: MaskedEnv("box", "discrete")] * N_ENVS))
    model = algorithm(policy, env, **SETTINGS)
    with pytest.raises(ValueError, match=r"`env` must reset in the same step for (Maskable|Recurrent)PPO"):
        model.learn(ROLLOUT)


class Forbidding(MaskedEnv):
    masks: Any = None

    def action_masks(self) -> np.ndarray:
        return np.array(self.masks if self._steps == 3 else np.ones(np.size(self.masks)))


@pytest.mark.parametrize(
    ("action", "masks", "message"),
    [
        ("discrete", [0, 0, 0], "`action_masks` of environment 0 must allow an action, not forbid all$"),
        (
            "multi_discrete",
            [1, 1, 0, 0, 0],
            "`action_masks` of environment 0 must allow an action, not forbid all in dimension 1",
        ),
        ("multi_binary", [1, 0, 0, 0, 1, 1], "must allow an action, not forbid all in dimension 1"),
        (
            "discrete",
            [1, 1],
            r"`action_masks` of environment 0 must have 3 elements for Discrete\(3\), not 2 \(shape \(2,\)\)",
        ),
    ],
)
def test_bad_masks(action: str, masks: list[int], message: str) -> None:
    def make_env() -> Forbidding:
        env = Forbidding("box", action)
        env.masks = masks
        return env

    model = MaskablePPO("MlpPolicy", make_vec_env(make_env, 1), **SETTINGS)
    with pytest.raises(ValueError, match=message):
        model.learn(ROLLOUT)


@pytest.mark.parametrize("masks", [[0, 0, 0], [[1, 1, 1], [0, 0, 0]]])
def test_bad_masks_for_a_prediction(masks: Any) -> None:
    observations = np.zeros((np.ndim(masks), 4), dtype=np.float32)[: len(np.atleast_2d(masks))]
    with pytest.raises(ValueError, match=r"`action_masks` of environment \d must allow an action, not forbid all"):
        masked().predict(observations, action_masks=np.array(masks))


def test_missing_masks() -> None:
    model = MaskablePPO("MlpPolicy", make_vec_env(lambda: RandomEnv("box", "discrete"), 1), **SETTINGS)
    with pytest.raises(ValueError, match=r"`env` must have a method `action_masks`, or be wrapped in .*ActionMasker"):
        model.learn(ROLLOUT)
    model.learn(ROLLOUT, use_masking=False)


@pytest.mark.parametrize("make", [masked, recurrent])
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(ValueError, match="`kl_target` must be a finite number > 0"):
        make(kl_target=0.0)
    with pytest.raises(ValueError, match="`engine` must be 'auto' or 'eager', not 'fused', as the policy"):
        make(engine="fused").learn(ROLLOUT)
    with pytest.raises(TypeError, match="n_episodes"):
        make(n_episodes=2)
