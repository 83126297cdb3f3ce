"""Lean rollouts: what SB3 collects, and what its callbacks see on the way, to the last bit."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

import sb3_ppo_variants
from sb3_ppo_variants import NonFiniteError
from sb3_ppo_variants.collection import compute_returns_and_advantage
from sb3_ppo_variants.engines import LeanPolicy
from tests import test_parity
from tests.test_parity import (
    N_ENVS,
    N_STEPS,
    Config,
    Journal,
    assert_same_journal,
    assert_same_model,
    assert_same_tensors,
    make_env,
    make_model,
)

ALGORITHMS = (stable_baselines3.PPO, sb3_ppo_variants.PPO)


@pytest.fixture
def lean_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many observations each lean step was for."""
    steps: list[int] = []
    forward = LeanPolicy.forward

    def counting(self: LeanPolicy, observations: np.ndarray) -> Any:
        steps.append(len(observations))
        return forward(self, observations)

    monkeypatch.setattr(LeanPolicy, "forward", counting)
    return steps


NUMBERS = ("loc", "scale", "logits", "probs", "batch_shape")
"""Of torch's distributions."""


class Locals(BaseCallback):
    """Keeps all that SB3 shows at each step, and the buffer."""

    NAMES = (
        "obs_tensor",
        "actions",
        "clipped_actions",
        "values",
        "log_probs",
        "new_obs",
        "rewards",
        "dones",
        "infos",
        "n_steps",
    )

    def __init__(self, stop_at: int = 10**9) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.stop_at = stop_at

    def _keep(self) -> None:
        buffer = self.model.rollout_buffer
        assert self.locals["self"] is self.model
        assert self.locals["env"] is self.model.env
        assert self.locals["rollout_buffer"] is buffer
        shown = [self.locals[name] for name in self.NAMES]
        distribution = self.model.policy.action_dist.distribution
        each = distribution if isinstance(distribution, list) else [distribution]
        shown += [[getattr(one, name, None) for name in NUMBERS] for one in each] + [type(one) for one in each]
        arrays = [getattr(buffer, name) for name in ("observations", "actions", "rewards", "episode_starts", "values")]
        arrays += [buffer.log_probs, buffer.advantages, buffer.returns]
        self.seen.append(plain([*shown, *arrays, buffer.pos, buffer.full, self.num_timesteps]))

    def _on_rollout_start(self) -> None:
        if self.n_calls:
            self.seen.append(plain(self.model.policy.action_dist.entropy().detach()))

    def _on_step(self) -> bool:
        self._keep()
        return self.n_calls < self.stop_at

    def _on_rollout_end(self) -> None:
        self._keep()


def plain(value: Any) -> Any:
    """Copies, with tensors for arrays, without the times that Monitor adds."""
    if isinstance(value, (np.ndarray, th.Tensor)):
        return [type(value).__name__, str(value.dtype), th.as_tensor(value).clone()]
    if isinstance(value, dict):
        return {key: plain(content) for key, content in value.items() if key != "t"}
    return [plain(content) for content in value] if isinstance(value, (list, tuple)) else value


CONFIGS = {
    name: test_parity.CONFIGS[name]
    for name in (
        *("box", "matrix-actions", "discrete", "multi-discrete", "multi-binary"),
        *("discrete-observations", "multi-discrete-observations", "vec-normalize", "one-environment", "linear-networks"),
    )
} | {
    "many-environments": Config(n_envs=19),
    "images": Config(observation="image", action="discrete"),
    "unequal-elu": Config(kwargs={"policy_kwargs": {"net_arch": {"pi": [5], "vf": [5, 3]}, "activation_fn": nn.ELU}}),
}


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_shows_callbacks_what_sb3_shows(name: str, n_threads: int, lean_steps: list[int]) -> None:
    th.set_num_threads(n_threads)
    seen = []
    for algorithm in ALGORITHMS:
        callback = Locals()
        model = make_model(algorithm, CONFIGS[name])
        model.learn(2 * N_STEPS * model.n_envs, callback=callback)
        seen.append(callback.seen)
    assert len(seen[0]) == 2 * (N_STEPS + 1) + 1
    assert len(lean_steps) == 2 * N_STEPS + 1  # one to see whether the bits agree
    assert_same_tensors(seen[1], seen[0])


def test_every_sb3_name_is_among_the_locals() -> None:
    names = []
    for algorithm in ALGORITHMS:
        callback = Locals()
        make_model(algorithm, Config()).learn(2 * N_STEPS * N_ENVS, callback=callback)
        names.append(set(callback.locals))
    assert {"idx", "done", "terminal_obs", "terminal_value"} <= names[0]
    assert names[0] <= names[1]


def test_stops_where_sb3_stops() -> None:
    models = []
    for algorithm in ALGORITHMS:
        callback = Locals(stop_at=N_STEPS + 5)
        model = make_model(algorithm, Config())
        model.learn(3 * N_STEPS * N_ENVS, callback=callback)
        models.append([plain([model._last_obs, model._last_episode_starts, list(model.ep_info_buffer)]), callback.seen])
        assert model.num_timesteps == (N_STEPS + 5) * N_ENVS
    assert_same_tensors(*reversed(models))


def shifted_forward(model: stable_baselines3.PPO) -> None:
    """A user's method in place of the policy's."""
    forward = model.policy.forward
    model.policy.forward = lambda obs, deterministic=False: forward(obs * 0.9, deterministic)  # type: ignore[method-assign]


def shifted_evaluation(model: stable_baselines3.PPO) -> None:
    evaluate = model.policy.evaluate_actions
    model.policy.evaluate_actions = lambda obs, actions: evaluate(obs * 0.9, actions)  # type: ignore[method-assign]


def hooked_module(model: stable_baselines3.PPO) -> None:
    model.policy.mlp_extractor.value_net[0].register_forward_hook(lambda module, args, output: output * 0.9)


def hooked_gradient(model: stable_baselines3.PPO) -> None:
    model.policy.mlp_extractor.value_net[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    model.policy.action_net.weight.register_hook(lambda grad: grad * 0.5)


def own_forward_in_a_module(model: stable_baselines3.PPO) -> None:
    layer = model.policy.action_net
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) + 0.1  # type: ignore[method-assign]


def other_module(model: stable_baselines3.PPO) -> None:
    model.policy.value_net = nn.Sequential(model.policy.value_net, nn.Tanh())  # type: ignore[assignment]


def other_weights(model: stable_baselines3.PPO) -> None:
    weight = nn.Parameter(model.policy.action_net.weight.detach() * 1.1)
    model.policy.action_net.weight = weight
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def other_data(model: stable_baselines3.PPO) -> None:
    model.policy.action_net.weight.data = model.policy.action_net.weight.data * 1.1
    model.policy.log_std.data = model.policy.log_std.data + 0.1


def changed_in_place(model: stable_baselines3.PPO) -> None:
    for parameter in model.policy.parameters():
        parameter.data.mul_(0.9)
        parameter.data.add_(0.01)


class Scaled(nn.Module):
    def forward(self, weight: th.Tensor) -> th.Tensor:
        return weight * 1.1


def parametrized(model: stable_baselines3.PPO) -> None:
    """The weight is no parameter any more, but computed from one."""
    nn.utils.parametrize.register_parametrization(model.policy.action_net, "weight", Scaled())
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def other_slope(model: stable_baselines3.PPO) -> None:
    model.policy.mlp_extractor.policy_net[1].negative_slope = 0.9


def other_activation(model: stable_baselines3.PPO) -> None:
    model.policy.mlp_extractor.policy_net[1] = nn.ReLU()


def own_sampling(model: stable_baselines3.PPO) -> None:
    distribution = model.policy.action_dist
    distribution.sample = lambda: 0.5 * type(distribution).sample(distribution)  # type: ignore[method-assign]


def own_method_in_a_module(model: stable_baselines3.PPO) -> None:
    extractor = model.policy.mlp_extractor
    extractor.forward_actor = lambda features: extractor.policy_net(0.9 * features)  # type: ignore[method-assign]
    extractor.forward = lambda features: (extractor.forward_actor(features), extractor.forward_critic(features))  # type: ignore[method-assign]


class Halved(ActorCriticPolicy):
    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(0.5 * obs, deterministic)


def other_class(model: stable_baselines3.PPO) -> None:
    model.policy.__class__ = Halved


def own_buffer_method(model: stable_baselines3.PPO) -> None:
    buffer = model.rollout_buffer
    buffer.add = lambda obs, *rest: type(buffer).add(buffer, 0.9 * obs, *rest)  # type: ignore[method-assign]


def shared_layer(model: stable_baselines3.PPO) -> None:
    extractor = model.policy.mlp_extractor
    extractor.value_net[0].weight = extractor.policy_net[0].weight
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def shared_memory(model: stable_baselines3.PPO) -> None:
    extractor = model.policy.mlp_extractor
    extractor.value_net[0].weight.data = extractor.policy_net[0].weight.data


def columns_first(model: stable_baselines3.PPO) -> None:
    weight = model.policy.mlp_extractor.policy_net[2].weight
    weight.data = weight.data.t().contiguous().t()


class Network(nn.Module):
    """No sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: th.Tensor) -> th.Tensor:
        return th.as_tensor(self.inner(features)) * 0.9


def own_network(model: stable_baselines3.PPO) -> None:
    model.policy.mlp_extractor.policy_net = Network(model.policy.mlp_extractor.policy_net)  # type: ignore[assignment]


def linear_at_the_end(model: stable_baselines3.PPO) -> None:
    model.policy.mlp_extractor.value_net.append(nn.Linear(64, 64))
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def named_layers(model: stable_baselines3.PPO) -> None:
    layers = model.policy.mlp_extractor.policy_net.named_children()
    model.policy.mlp_extractor.policy_net = nn.Sequential(OrderedDict((f"layer_{name}", layer) for name, layer in layers))


def unbiased(model: stable_baselines3.PPO) -> None:
    model.policy.value_net.bias = None  # type: ignore[assignment]
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def one_deviation(model: stable_baselines3.PPO) -> None:
    model.policy.log_std = nn.Parameter(th.tensor(-0.5))
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def fixed_deviation(model: stable_baselines3.PPO) -> None:
    deviation = model.policy.log_std.detach() - 0.5
    del model.policy.log_std
    model.policy.register_buffer("log_std", deviation)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)


def squashing(model: stable_baselines3.PPO) -> None:
    model.policy._squash_output = True


def whole_rollouts(model: stable_baselines3.PPO) -> None:
    model.batch_size = None  # type: ignore[assignment]


def other_policy(model: stable_baselines3.PPO) -> None:
    space = model.observation_space
    model.policy = model.policy_class(space, model.action_space, model.lr_schedule)


CHANGES = [
    shifted_forward,
    shifted_evaluation,
    hooked_module,
    hooked_gradient,
    own_forward_in_a_module,
    other_module,
    other_weights,
    other_data,
    changed_in_place,
    parametrized,
    other_slope,
    other_activation,
    own_sampling,
    own_method_in_a_module,
    other_class,
    own_buffer_method,
    shared_layer,
    shared_memory,
    columns_first,
    own_network,
    linear_at_the_end,
    named_layers,
    unbiased,
    one_deviation,
    fixed_deviation,
    squashing,
    whole_rollouts,
    other_policy,
]
LEAKY = Config(kwargs={"policy_kwargs": {"activation_fn": partial(nn.LeakyReLU, 0.1)}})


class ChangeInMidRollout(BaseCallback):
    def __init__(self, change: Callable[[stable_baselines3.PPO], None], at: int) -> None:
        super().__init__()
        self.change = change
        self.at = at

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            self.change(self.model)
        return True


@pytest.mark.parametrize("at", [0, 1, N_STEPS + 7])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:the exact KL is not logged")
def test_does_what_users_have_put_into_the_policy(change: Callable[[stable_baselines3.PPO], None], at: int) -> None:
    """From the step on which a callback puts it there, or before training."""
    models = []
    for algorithm in ALGORITHMS:
        model = make_model(algorithm, LEAKY)
        if at == 0:
            change(model)
        model.learn(3 * N_STEPS * N_ENVS, callback=ChangeInMidRollout(change, at))
        models.append(model)
    assert_same_model(*reversed(models))


class ChangeInMidUpdate(sb3_ppo_variants.UpdateCallback):
    """Doesn't look at the statistics, which would make them complete."""

    def __init__(self, change: Callable[[stable_baselines3.PPO], None]) -> None:
        super().__init__()
        self.change = change

    def _on_minibatch(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
        if stats.gradient_steps == 4:
            self.change(self.model)
        return True

    def _on_update_end(self, stats: sb3_ppo_variants.UpdateStats) -> None:
        self.logger.record("test/losses", list(stats.series("loss")))


def without_gradient(model: stable_baselines3.PPO) -> None:
    model.policy.log_std.grad = None


def other_rollout(model: stable_baselines3.PPO) -> None:
    model.rollout_buffer.advantages *= 0.5
    model.rollout_buffer.returns = model.rollout_buffer.returns + 1


def other_precision(model: stable_baselines3.PPO) -> None:
    model.rollout_buffer.log_probs = 1.1 * model.rollout_buffer.log_probs.astype(np.float64)


def other_rule(model: stable_baselines3.PPO) -> None:
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=1e-3)


UNCOMPARABLE = (other_policy, other_class, own_buffer_method, own_sampling, one_deviation, fixed_deviation)


@pytest.mark.parametrize(
    "change",
    [
        *(change for change in CHANGES if change not in UNCOMPARABLE),
        *(without_gradient, other_rollout, other_precision, other_rule),
    ],
)
def test_does_what_hooks_have_put_into_the_policy(change: Callable[[stable_baselines3.PPO], None]) -> None:
    """And tells the same of it."""
    models, journals = [], []
    for engine in ("auto", "eager"):
        model = make_model(sb3_ppo_variants.PPO, Config(kwargs={**LEAKY.kwargs, "engine": engine}))
        journal = Journal()
        model.set_logger(Logger(folder=None, output_formats=[journal]))
        model.learn(2 * N_STEPS * N_ENVS, callback=ChangeInMidUpdate(change))
        model.logger.dump()
        models.append(model)
        journals.append(journal)
    assert_same_model(*models)
    assert_same_journal(*journals)
    assert "test/losses" in journals[0].lines[-1]


def test_steps_what_hooks_have_given_a_gradient() -> None:
    """Also parameters that the loss doesn't reach."""

    class Push(sb3_ppo_variants.UpdateCallback):
        def _on_minibatch(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
            parameter = self.model.policy.value_net.weight
            parameter.grad = th.ones_like(parameter)
            return True

    models = []
    for engine in ("auto", "eager"):
        model = make_model(sb3_ppo_variants.PPO, Config(kwargs={"engine": engine, "n_value_epochs": 2}))
        models.append(model.learn(2 * N_STEPS * N_ENVS, callback=Push()))
    assert_same_model(*models)


@pytest.mark.parametrize("keep", ["log_ratio", "kl", "minibatch"])
def test_what_hooks_keep_stays_what_it_was(keep: str) -> None:
    class Keep(sb3_ppo_variants.UpdateCallback):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Any] = []

        def _on_minibatch(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
            self.kept.append(getattr(stats, keep))
            return True

        def _on_epoch_end(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
            self.model.rollout_buffer.advantages *= 0.5
            return True

    kept = []
    for engine in ("auto", "eager"):
        callback = Keep()
        model = make_model(sb3_ppo_variants.PPO, Config(action="discrete", kwargs={"engine": engine}))
        model.learn(2 * N_STEPS * N_ENVS, callback=callback)
        kept.append([list(each.samples) if keep == "minibatch" else each for each in callback.kept])
    assert_same_tensors(*kept)


def patched_class(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    policy_class = stable_baselines3.ppo.MlpPolicy
    original = getattr(policy_class, name)
    monkeypatch.setattr(policy_class, name, lambda self, obs, *args, **kwargs: original(self, obs * 0.9, *args, **kwargs))


@pytest.mark.parametrize("name", ["forward", "evaluate_actions", "predict_values"])
def test_does_what_users_have_put_into_sb3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched_class(monkeypatch, name)
    models = [make_model(algorithm, Config()).learn(2 * N_STEPS * N_ENVS) for algorithm in ALGORITHMS]
    assert_same_model(*reversed(models))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((RolloutBuffer, name) for name in ("add", "get", "compute_returns_and_advantage", "swap_and_flatten")),
        (th.optim.Adam, "step"),
        *((MlpExtractor, name) for name in ("forward", "forward_actor", "forward_critic")),
        *((DiagGaussianDistribution, name) for name in ("proba_distribution", "log_prob", "entropy", "sample")),
        *((nn.Linear, "forward"), (nn.Sequential, "forward"), (nn.Tanh, "forward"), (th.distributions.Normal, "log_prob")),
    ],
)
def test_calls_what_users_have_put_into_libraries(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = getattr(kind, name)

    def own(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, name, staticmethod(own) if name == "swap_and_flatten" else own)
    counts = []
    for algorithm in ALGORITHMS:
        called.clear()
        make_model(algorithm, Config()).learn(2 * N_STEPS * N_ENVS)
        counts.append(len(called))
    assert counts[1] >= counts[0] > 0


@pytest.mark.parametrize("name", ["train", "collect_rollouts"])
def test_does_what_users_override(name: str) -> None:
    """Without a call of what they override."""

    def train(self: stable_baselines3.PPO) -> None:
        with th.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(0.9)

    def collect_rollouts(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stable_baselines3.PPO.collect_rollouts(self, *args, **{**kwargs, "n_rollout_steps": N_STEPS}) and False

    override = {"train": train, "collect_rollouts": collect_rollouts}[name]
    models = []
    for algorithm in ALGORITHMS:
        own = type("Own", (algorithm,), {name: override})
        models.append(make_model(own, Config()).learn(3 * N_STEPS * N_ENVS))
    assert_same_model(*reversed(models))


@pytest.mark.parametrize("method", ["add", "compute_returns_and_advantage"])
def test_calls_the_buffers_own_methods(method: str) -> None:
    called = []

    class Own(RolloutBuffer):
        pass

    def override(self: Any, *args: Any, **kwargs: Any) -> None:
        called.append(method)
        getattr(RolloutBuffer, method)(self, *args, **kwargs)

    setattr(Own, method, override)
    make_model(sb3_ppo_variants.PPO, Config(kwargs={"rollout_buffer_class": Own})).learn(N_STEPS * N_ENVS)
    assert len(called) == {"add": N_STEPS, "compute_returns_and_advantage": 1}[method]


@given(
    n_envs=st.integers(1, 5),
    gamma=st.floats(0, 1) | st.integers(0, 1) | st.floats(0, 1).map(np.float64),
    gae_lambda=st.floats(0, 1) | st.integers(0, 1) | st.floats(0, 1).map(np.float64),
    seed=st.integers(0, 1000),
)
def test_advantages_are_the_buffers(n_envs: int, gamma: Any, gae_lambda: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = spaces.Box(-1, 1, (2,))
    buffers = [RolloutBuffer(13, box, box, "cpu", gae_lambda, gamma, n_envs) for _ in range(2)]
    arrays = {name: rng.normal(size=(13, n_envs)).astype(np.float32) for name in ("rewards", "values")}
    arrays["episode_starts"] = (rng.random((13, n_envs)) < 0.2).astype(np.float32)
    last_values, dones = th.as_tensor(rng.normal(size=(n_envs, 1)).astype(np.float32)), rng.random(n_envs) < 0.3
    for buffer in buffers:
        vars(buffer).update({name: array.copy() for name, array in arrays.items()})
    buffers[0].compute_returns_and_advantage(last_values, dones)
    compute_returns_and_advantage(buffers[1], last_values, dones)
    for name in ("advantages", "returns"):
        theirs, ours = (getattr(buffer, name) for buffer in buffers)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


class Poisoned(gym.Wrapper):  # type: ignore[type-arg]
    """Observes NaN from the 30th step on."""

    n_steps = 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        observation, *rest = self.env.step(action)
        return (observation * np.nan if self.n_steps > 30 else observation, *rest)


@pytest.mark.parametrize("action", ["box", "discrete", "multi_binary"])
def test_refuses_nan_where_sb3_does(action: str) -> None:
    """In its words, too, behind the name of the environment."""
    messages = []
    for algorithm in ALGORITHMS:
        model = make_model(algorithm, Config(action=action, n_envs=1, kwargs={"batch_size": 12}))
        env = make_env(Config(action=action, n_envs=1))
        env.envs = [Poisoned(inner) for inner in env.envs]  # type: ignore[attr-defined]
        env.seed(3)
        model.set_env(env)
        with pytest.raises(ValueError, match="invalid values") as error:
            model.learn(4 * N_STEPS)
        culprit = "the observation of environment 0 is nan at step 7 of the rollout before update 2: "
        messages.append([str(error.value).removeprefix(culprit), model.num_timesteps])
    assert messages[1] == messages[0]


def test_collects_nan_where_sb3_does() -> None:
    """The random numbers, too, are those of one draw a step; what differs is the update."""

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            kept.append([self.model.rollout_buffer.actions.tobytes(), th.get_rng_state()])

    th.distributions.Distribution.set_default_validate_args(False)
    try:
        collected: list[Any] = []
        for algorithm in ALGORITHMS:
            kept: list[Any] = []
            env = make_env(Config(n_envs=1))
            env.envs = [Poisoned(inner) for inner in env.envs]  # type: ignore[attr-defined]
            env.seed(3)
            model = algorithm("MlpPolicy", env, n_steps=N_STEPS, batch_size=12, n_epochs=2, seed=7, device="cpu")
            with contextlib.suppress(NonFiniteError):
                model.learn(2 * N_STEPS, callback=Keep())
            collected.append(kept)
    finally:
        th.distributions.Distribution.set_default_validate_args(True)
    assert len(collected[0]) == 2
    assert_same_tensors(*collected)


def test_refuses_a_buffer_that_is_not_full_as_sb3_does() -> None:
    for algorithm in ALGORITHMS:
        model = make_model(algorithm, Config())
        model.n_steps = N_STEPS - 4
        with pytest.raises(AssertionError):
            model.learn(N_STEPS * N_ENVS)


@pytest.mark.parametrize("engine", ["auto", "eager", "fused"])
def test_refuses_no_gradient_norm_as_sb3_does(engine: str) -> None:
    model = make_model(sb3_ppo_variants.PPO, Config(kwargs={"engine": engine}))
    model.max_grad_norm = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        model.learn(N_STEPS * N_ENVS)


def test_the_default_dtype_may_change_after_construction() -> None:
    models = []
    try:
        for algorithm in ALGORITHMS:
            th.set_default_dtype(th.float32)
            model = make_model(algorithm, Config())
            th.set_default_dtype(th.float64)
            models.append(model.learn(2 * N_STEPS * N_ENVS))
    finally:
        th.set_default_dtype(th.float32)
    assert_same_model(*reversed(models))
