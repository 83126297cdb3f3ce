"""In clip mode the algorithm is SB3's PPO to the last bit: same actions, parameters, optimiser state, logged values."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

import sb3_ppo_variants
from tests.environments import RandomEnv

N_STEPS = 24
N_ENVS = 2
N_UPDATES = 4


class TinyCnn(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box, features_dim: int = 16) -> None:
        super().__init__(observation_space, features_dim)
        n_channels = observation_space.shape[0]
        self.layers = nn.Sequential(
            nn.Conv2d(n_channels, 4, 8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, features_dim)
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


class StatefulExtractor(BaseFeaturesExtractor):
    """Whatever a forward pass could disturb: dropout, BatchNorm, and random numbers drawn in evaluation mode too."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(observation_space.shape[0], 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.register_buffer("n_passes", th.zeros(()))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.n_passes += 1
        return self.layers(observations) + 0.01 * self.n_passes + 0.01 * th.randn(8)


class Wanderer(BaseFeaturesExtractor):
    """State that only a copy can protect: reassigned and late buffers, plain attributes, generators of all kinds."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.linear = nn.Linear(observation_space.shape[0], 8)
        self.register_buffer("mean", th.zeros(observation_space.shape[0]))
        self.register_buffer("late", None)
        self.n_passes = 0
        self.generator = th.Generator().manual_seed(0)

    def train(self, mode: bool = True) -> "Wanderer":
        th.rand(1)
        return super().train(mode)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.n_passes += 1
        self.mean = 0.99 * self.mean + 0.01 * observations.detach().mean(dim=0)
        self.late = self.mean if self.late is None else 0.9 * self.late + 0.1 * self.mean
        noise = np.random.random() + random.random() + th.rand(1, generator=self.generator).item()
        return self.linear(observations - self.mean + self.late) + 0.01 * noise + 0.001 * self.n_passes


class SecondThoughts(ActorCriticPolicy):
    """A user's policy that evaluates itself on other states after the actions."""

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        evaluation = super().evaluate_actions(obs, actions)
        self.get_distribution(th.cat([obs, obs]))
        return evaluation


class NoDistribution(ActorCriticPolicy):
    """A user's policy that can't tell its distribution."""

    def get_distribution(self, obs: Any) -> Any:
        raise NotImplementedError("no distribution")


class OwnEvaluation(ActorCriticPolicy):
    """A user's policy whose evaluation leaves no trace in ``action_dist``."""

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        distribution = DiagGaussianDistribution(self.action_dist.action_dim)
        distribution.proba_distribution(self.action_net(latent_pi), self.log_std)
        return self.value_net(latent_vf), distribution.log_prob(actions), distribution.entropy()


class OwnMinibatches(RolloutBuffer):
    """A user's buffer that gathers minibatches in its own way."""

    def get(self, batch_size: int | None = None) -> Iterator[Any]:
        samples = next(super().get(None))
        for rows in th.randperm(self.buffer_size * self.n_envs).split(batch_size or 1):
            yield type(samples)(*(tensor[rows] for tensor in samples))


class Unflattened(RolloutBuffer):
    """A user's buffer that keeps its arrays as they are, and names its arguments in its own way."""

    def get(self, batch_size: int | None = None) -> Iterator[Any]:
        for rows in np.array_split(np.random.permutation(self.buffer_size * self.n_envs), 3):
            yield self._get_samples(rows=rows)

    def _get_samples(self, rows: np.ndarray) -> Any:  # type: ignore[override]
        steps, envs = np.divmod(rows, self.n_envs)
        arrays = (self.observations, self.actions, self.values, self.log_probs, self.advantages, self.returns)
        return RolloutBufferSamples(*(self.to_torch(array[steps, envs]) for array in arrays))


class Doubled(RolloutBuffer):
    """A user's buffer that hands out every sample twice."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        samples = super()._get_samples(batch_inds, env)
        return type(samples)(*(th.cat([tensor, tensor]) for tensor in samples))


@dataclass
class Config:
    """An environment's spaces, a policy, and what else SB3's PPO takes."""

    policy: Any = "MlpPolicy"
    observation: str = "box"
    action: str = "box"
    kwargs: dict[str, Any] = field(default_factory=dict)
    normalize: bool = False
    n_envs: int = N_ENVS


CONFIGS: dict[str, Config] = {
    "box": Config(),
    "matrix-actions": Config(action="matrix"),
    "discrete": Config(action="discrete"),
    "multi-discrete": Config(action="multi_discrete"),
    "multi-binary": Config(action="multi_binary"),
    "discrete-observations": Config(observation="discrete", action="discrete"),
    "multi-discrete-observations": Config(observation="multi_discrete"),
    "dict-observations": Config("MultiInputPolicy", "dict", "discrete"),
    "dict-observations-box": Config("MultiInputPolicy", "dict"),
    "cnn": Config("CnnPolicy", "image", "discrete"),
    "cnn-own-extractor": Config(
        "CnnPolicy", "image", "box", {"policy_kwargs": {"features_extractor_class": TinyCnn, "net_arch": [8]}}
    ),
    "cnn-extractors-apart": Config(
        "CnnPolicy",
        "image",
        "box",
        {"policy_kwargs": {"features_extractor_class": TinyCnn, "share_features_extractor": False}},
    ),
    "value-clipping": Config(kwargs={"clip_range_vf": 0.1}),
    "entropy-bonus": Config(kwargs={"ent_coef": 0.01, "vf_coef": 0.7}),
    "entropy-bonus-discrete": Config(action="discrete", kwargs={"ent_coef": 0.01}),
    "raw-advantages": Config(kwargs={"normalize_advantage": False}),
    "schedules": Config(
        kwargs={
            "learning_rate": LinearSchedule(1e-3, 1e-4, 0.8),
            "clip_range": LinearSchedule(0.3, 0.1, 1.0),
            "clip_range_vf": lambda progress: 0.1 + 0.1 * progress,
        }
    ),
    "truncated-minibatch": Config(kwargs={"batch_size": 14}),
    "single-sample-minibatch": Config(kwargs={"batch_size": 47}),
    "full-batch": Config(kwargs={"batch_size": N_STEPS * N_ENVS, "n_epochs": 10}),
    "gsde": Config(kwargs={"use_sde": True, "sde_sample_freq": 4}),
    "gsde-squashed": Config(kwargs={"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}}),
    "gsde-expln": Config(kwargs={"use_sde": True, "policy_kwargs": {"use_expln": True, "full_std": False}}),
    "early-stop": Config(kwargs={"target_kl": 0.02, "learning_rate": 3e-3}),
    "early-stop-at-once": Config(action="discrete", kwargs={"target_kl": 1e-9, "n_epochs": 4}),
    "early-stop-never": Config(kwargs={"target_kl": 10.0}),
    "large-steps": Config(kwargs={"learning_rate": 3e-2, "max_grad_norm": 5.0}),
    "linear-networks": Config(kwargs={"policy_kwargs": {"net_arch": []}}),
    "unequal-networks": Config(kwargs={"policy_kwargs": {"net_arch": {"pi": [16], "vf": [32, 8]}, "activation_fn": nn.ReLU}}),
    "other-optimizer": Config(
        kwargs={"policy_kwargs": {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}}
    ),
    "adam-options": Config(
        kwargs={"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 1e-2, "betas": (0.8, 0.99), "amsgrad": True}}}
    ),
    "log-std": Config(kwargs={"policy_kwargs": {"log_std_init": -1.5, "ortho_init": False}}),
    "discounting": Config(kwargs={"gamma": 0.9, "gae_lambda": 0.5}),
    "vec-normalize": Config(normalize=True),
    "one-environment": Config(n_envs=1),
    "stateful-extractor": Config(kwargs={"policy_kwargs": {"features_extractor_class": StatefulExtractor}}),
    "own-evaluation": Config(OwnEvaluation),
    "wanderer": Config(kwargs={"policy_kwargs": {"features_extractor_class": Wanderer}}),
    "second-thoughts": Config(SecondThoughts),
    "no-distribution": Config(NoDistribution),
    "unflattened-buffer": Config(kwargs={"rollout_buffer_class": Unflattened}),
    "doubled-buffer": Config(kwargs={"rollout_buffer_class": Doubled}),
    "own-minibatches": Config(kwargs={"rollout_buffer_class": OwnMinibatches}),
}


class Journal(KVWriter):
    """Keeps all that is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.lines.append({"step": step, **key_values})

    def close(self) -> None:
        pass


class RolloutRecorder(BaseCallback):
    """Keeps what each rollout has collected."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        for array in (buffer.actions, buffer.rewards, buffer.values, buffer.log_probs, buffer.advantages):
            self.rollouts.append(array.copy())


def make_env(config: Config) -> VecEnv:
    env: VecEnv = DummyVecEnv([lambda: Monitor(RandomEnv(config.observation, config.action)) for _ in range(config.n_envs)])
    return VecNormalize(env) if config.normalize else env


def make_model(algorithm: type[stable_baselines3.PPO], config: Config) -> stable_baselines3.PPO:
    kwargs = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 3, "seed": 7, "device": "cpu", **config.kwargs}
    return algorithm(config.policy, make_env(config), **kwargs)


def learn(model: stable_baselines3.PPO, n_updates: int, **kwargs: Any) -> tuple[Journal, RolloutRecorder]:
    journal, recorder = Journal(), RolloutRecorder()
    model.set_logger(Logger(folder=None, output_formats=[journal]))
    model.learn(n_updates * model.n_steps * model.n_envs, callback=recorder, **kwargs)
    model.logger.dump(model.num_timesteps)
    return journal, recorder


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    """Equal nested structures of tensors and plain values, to the last bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, th.Tensor):
        assert ours.dtype == theirs.dtype
        assert th.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_tensors(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for own, their in zip(ours, theirs, strict=True):
            assert_same_tensors(own, their)
    else:
        assert ours == theirs


def assert_same_model(ours: stable_baselines3.PPO, theirs: stable_baselines3.PPO) -> None:
    assert_same_tensors(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))
    assert_same_tensors(ours.policy.optimizer.state_dict(), theirs.policy.optimizer.state_dict())
    assert ours._n_updates == theirs._n_updates
    assert ours.num_timesteps == theirs.num_timesteps
    assert [episode["r"] for episode in ours.ep_info_buffer] == [episode["r"] for episode in theirs.ep_info_buffer]


def assert_same_journal(ours: Journal, theirs: Journal) -> None:
    """All of SB3's keys with SB3's values, but for those that tell the time."""
    assert len(ours.lines) == len(theirs.lines)
    for own, their in zip(ours.lines, theirs.lines, strict=True):
        assert their.keys() <= own.keys()
        for key in their.keys() - {"time/fps", "time/time_elapsed"}:
            np.testing.assert_array_equal(own[key], their[key], err_msg=key)


def assert_same_random_state(state: tuple[Any, th.Tensor]) -> None:
    np.testing.assert_array_equal(np.random.get_state()[1], state[0])
    assert th.equal(th.get_rng_state(), state[1])


def random_state() -> tuple[Any, th.Tensor]:
    return np.random.get_state()[1].copy(), th.get_rng_state()


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.filterwarnings("ignore:the exact KL is not logged")
def test_trains_the_same_bits(name: str, n_threads: int) -> None:
    th.set_num_threads(n_threads)
    runs = []
    for algorithm in (stable_baselines3.PPO, sb3_ppo_variants.PPO):
        model = make_model(algorithm, CONFIGS[name])
        runs.append((model, *learn(model, N_UPDATES), random_state()))
    (theirs, their_journal, their_recorder, their_random_state), (ours, own_journal, own_recorder, _) = runs

    assert_same_random_state(their_random_state)
    assert len(own_recorder.rollouts) == N_UPDATES * 5
    for own, their in zip(own_recorder.rollouts, their_recorder.rollouts, strict=True):
        np.testing.assert_array_equal(own, their)
    assert_same_model(ours, theirs)
    assert_same_journal(own_journal, their_journal)


def test_the_configurations_do_what_they_are_named_for() -> None:
    """Early stops trip in some updates and not in others, and clipping bites: else their parity would prove nothing."""
    stopped = learn(make_model(sb3_ppo_variants.PPO, CONFIGS["early-stop"]), N_UPDATES)[0]
    epochs = [line["train/stopped_epoch"] for line in stopped.lines[1:]]
    assert min(epochs) < 3
    assert max(epochs) == 3

    clipped = learn(make_model(sb3_ppo_variants.PPO, CONFIGS["large-steps"]), N_UPDATES)[0]
    assert min(line["train/clip_fraction"] for line in clipped.lines[1:]) > 0


@pytest.mark.parametrize("name", ["box", "discrete", "early-stop", "gsde", "vec-normalize", "schedules"])
def test_continues_the_same_bits_after_save_and_load(name: str, tmp_path: Path) -> None:
    """Both are saved after two updates, loaded, and go on for two; ours also from SB3's file."""
    config = CONFIGS[name]
    theirs = make_model(stable_baselines3.PPO, config)
    learn(theirs, 2)
    theirs.save(tmp_path / "theirs.zip")
    ours = make_model(sb3_ppo_variants.PPO, config)
    learn(ours, 2)
    ours.save(tmp_path / "ours.zip")

    def continued(load: Callable[..., stable_baselines3.PPO], path: Path) -> stable_baselines3.PPO:
        env = make_env(config)
        env.seed(3)
        model = load(path, env=env, device="cpu")
        model.set_random_seed(11)
        learn(model, 2, reset_num_timesteps=False)
        return model

    expected = continued(stable_baselines3.PPO.load, tmp_path / "theirs.zip")
    assert_same_model(continued(sb3_ppo_variants.PPO.load, tmp_path / "ours.zip"), expected)
    assert_same_model(continued(sb3_ppo_variants.PPO.load, tmp_path / "theirs.zip"), expected)
    assert_same_model(continued(stable_baselines3.PPO.load, tmp_path / "ours.zip"), expected)


def test_prints_what_sb3_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for algorithm in (stable_baselines3.PPO, sb3_ppo_variants.PPO):
        config = Config(kwargs={**CONFIGS["early-stop"].kwargs, "verbose": 1})
        learn(make_model(algorithm, config), N_UPDATES)
        printed.append(capsys.readouterr().out)
    assert "Early stopping at step" in printed[0]
    assert printed[1] == printed[0]


@pytest.mark.parametrize(
    "make",
    [
        partial(make_model, config=Config(kwargs={"batch_size": 1})),
        partial(make_model, config=Config(kwargs={"n_steps": 1}, n_envs=1)),
        partial(make_model, config=Config(kwargs={"clip_range": "0.2"})),
        partial(make_model, config=Config(kwargs={"clip_range_vf": "x"})),
        partial(make_model, config=Config(kwargs={"learning_rate": "x"})),
        partial(make_model, config=Config("MlpPolicy", "dict")),
        partial(make_model, config=Config(kwargs={"clip_range_vf": -1.0})),
        partial(make_model, config=Config("NoPolicy")),
        partial(make_model, config=Config(action="discrete", kwargs={"use_sde": True})),
    ],
)
def test_refuses_what_sb3_refuses_in_its_words(make: Callable[..., Any]) -> None:
    with pytest.raises((AssertionError, ValueError)) as theirs:
        make(stable_baselines3.PPO)
    with pytest.raises((AssertionError, ValueError)) as ours:
        make(sb3_ppo_variants.PPO)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


def test_warns_what_sb3_warns() -> None:
    with pytest.warns(UserWarning, match="mini-batch size of 14") as theirs:
        make_model(stable_baselines3.PPO, CONFIGS["truncated-minibatch"])
    with pytest.warns(UserWarning, match="mini-batch size of 14") as ours:
        make_model(sb3_ppo_variants.PPO, CONFIGS["truncated-minibatch"])
    assert [str(warning.message) for warning in ours] == [str(warning.message) for warning in theirs]


def patched_buffer(model: stable_baselines3.PPO) -> None:
    """A user's own way of gathering, on the instance."""
    buffer = model.rollout_buffer
    buffer._get_samples = lambda rows, env=None: type(buffer)._get_samples(buffer, rows[::-1], env)  # type: ignore[method-assign]


def logger_without_outputs(model: stable_baselines3.PPO) -> None:
    class Own:
        def record(self, key: str, value: Any, exclude: Any = None) -> None:
            pass

        def dump(self, step: int = 0) -> None:
            pass

    model.set_logger(Own())  # type: ignore[arg-type]


def assert_same_training(prepare: Callable[[stable_baselines3.PPO], None]) -> stable_baselines3.PPO:
    """Train both algorithms after ``prepare``; returns ours."""
    models = []
    for algorithm in (stable_baselines3.PPO, sb3_ppo_variants.PPO):
        model = make_model(algorithm, CONFIGS["box"])
        prepare(model)
        models.append(model.learn(3 * N_STEPS * N_ENVS))
    theirs, ours = models
    assert_same_model(ours, theirs)
    return ours


@pytest.mark.parametrize("prepare", [patched_buffer, logger_without_outputs])
def test_trains_the_same_bits_with_what_users_put_into_a_model(prepare: Callable[[stable_baselines3.PPO], None]) -> None:
    assert_same_training(prepare)


def counting_hook(model: stable_baselines3.PPO) -> None:
    """A forward hook with state in the module."""
    layer = model.policy.mlp_extractor.policy_net[0]
    layer.n_passes = 0

    def hook(module: nn.Module, inputs: Any, output: th.Tensor) -> th.Tensor:
        module.n_passes += 1
        return output + 0.001 * module.n_passes

    layer.register_forward_hook(hook)


def scripted_network(model: stable_baselines3.PPO) -> None:
    """A network in TorchScript, with a buffer that changes."""

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", th.zeros(64))

        def forward(self, x: th.Tensor) -> th.Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))
            return x - self.mean

    model.policy.mlp_extractor.policy_net.append(th.jit.script(Running()))


def compiled_policy(model: stable_baselines3.PPO) -> None:
    model.policy = th.compile(model.policy, backend="eager")


@pytest.mark.parametrize("prepare", [counting_hook, scripted_network, compiled_policy])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trains_the_same_bits_with_what_users_do_to_a_policy(prepare: Callable[[stable_baselines3.PPO], None]) -> None:
    assert "train/kl" in assert_same_training(prepare).logger.name_to_value


def entropy_schedule(base: type[stable_baselines3.PPO]) -> type[stable_baselines3.PPO]:
    class Scheduled(base):  # type: ignore[misc, valid-type]
        """A property in place of SB3's attribute, which can't be read before the constructor has ended."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.decay = 0.9

        @property
        def ent_coef(self) -> float:
            return self._ent_coef * self.decay

        @ent_coef.setter
        def ent_coef(self, value: float) -> None:
            self._ent_coef = value

    return Scheduled


def own_value_optimizer(base: type[stable_baselines3.PPO]) -> type[stable_baselines3.PPO]:
    class Apart(base):  # type: ignore[misc, valid-type]
        """A second optimiser for the critic, under the name that ours has."""

        def _setup_model(self) -> None:
            super()._setup_model()
            self.value_optimizer = th.optim.SGD(self.policy.value_net.parameters(), lr=1e-2)

        def train(self) -> None:
            super().train()
            for group in self.value_optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = th.full_like(parameter, group["lr"])
            self.value_optimizer.step()

        def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
            return ["policy", "policy.optimizer", "value_optimizer"], []

    return Apart


@pytest.mark.parametrize("subclass", [entropy_schedule, own_value_optimizer])
def test_trains_the_same_bits_under_users_subclasses(subclass: Callable[..., Any], tmp_path: Path) -> None:
    models = []
    for algorithm in (stable_baselines3.PPO, sb3_ppo_variants.PPO):
        model = make_model(subclass(algorithm), Config(kwargs={"ent_coef": 0.1}))
        learn(model, 2)
        model.save(tmp_path / "model.zip")
        loaded = type(model).load(tmp_path / "model.zip", env=make_env(CONFIGS["box"]))
        assert vars(loaded).get("_ent_coef") == vars(model).get("_ent_coef")
        models.append(model)
    assert_same_model(*reversed(models))
