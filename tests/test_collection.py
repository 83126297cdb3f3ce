"""Lean rollouts: what SB3 collects, and what its callbacks see on the way, to the last bit."""

from collections.abc import Callable
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
from torch import nn

import sb3_ppo_variants
from sb3_ppo_variants.collection import compute_returns_and_advantage
from sb3_ppo_variants.engines import LeanPolicy
from tests.test_parity import N_ENVS, N_STEPS, Config, assert_same_model, assert_same_tensors, make_env, make_model

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


class Locals(BaseCallback):
    """Keeps all that SB3 shows at each step, and the buffer."""

    NAMES = (
        *(
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
        ),
        *("n_rollout_steps",),
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
        arrays = [getattr(buffer, name) for name in ("observations", "actions", "rewards", "episode_starts", "values")]
        arrays += [buffer.log_probs, buffer.advantages, buffer.returns]
        self.seen.append(plain([*shown, *arrays, buffer.pos, buffer.full, self.num_timesteps]))

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
    "box": Config(),
    "one-environment": Config(n_envs=1),
    "many-environments": Config(n_envs=19),
    "matrix": Config(action="matrix"),
    "discrete": Config(action="discrete"),
    "multi-discrete": Config(action="multi_discrete"),
    "multi-binary": Config(action="multi_binary"),
    "discrete-observations": Config(observation="discrete", action="discrete"),
    "multi-discrete-observations": Config(observation="multi_discrete"),
    "images": Config(observation="image", action="discrete"),
    "vec-normalize": Config(normalize=True),
    "linear": Config(kwargs={"policy_kwargs": {"net_arch": []}}),
    "unequal": Config(kwargs={"policy_kwargs": {"net_arch": {"pi": [5], "vf": [5, 3]}, "activation_fn": nn.ELU}}),
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
    assert len(seen[0]) == 2 * (N_STEPS + 1)
    assert len(lean_steps) == 2 * N_STEPS + 1  # one to see whether the bits agree
    assert_same_tensors(seen[1], seen[0])


def test_every_sb3_name_is_among_the_locals() -> None:
    """But for those of the loop over environments that have ended an episode."""
    names = []
    for algorithm in ALGORITHMS:
        callback = Locals()
        make_model(algorithm, Config()).learn(N_STEPS * N_ENVS, callback=callback)
        names.append(set(callback.locals))
    assert names[0] - names[1] <= {"idx", "done", "terminal_obs", "terminal_value"}


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
    other_policy,
]


class ChangeInMidRollout(BaseCallback):
    def __init__(self, change: Callable[[stable_baselines3.PPO], None], at: int) -> None:
        super().__init__()
        self.change = change
        self.at = at

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            self.change(self.model)
        return True


@pytest.mark.parametrize("at", [1, N_STEPS + 7])
@pytest.mark.parametrize("change", CHANGES)
def test_does_what_users_have_put_into_the_policy(change: Callable[[stable_baselines3.PPO], None], at: int) -> None:
    """From the step on which a callback puts it there."""
    models = []
    for algorithm in ALGORITHMS:
        model = make_model(algorithm, Config())
        model.learn(3 * N_STEPS * N_ENVS, callback=ChangeInMidRollout(change, at))
        models.append(model)
    assert_same_model(*reversed(models))


class ChangeInMidUpdate(sb3_ppo_variants.UpdateCallback):
    def __init__(self, change: Callable[[stable_baselines3.PPO], None]) -> None:
        super().__init__()
        self.change = change

    def _on_minibatch(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
        if stats.gradient_steps == 4:
            self.change(self.model)
        return True


def without_gradient(model: stable_baselines3.PPO) -> None:
    model.policy.log_std.grad = None


@pytest.mark.parametrize("change", [*(change for change in CHANGES if change is not other_policy), without_gradient])
def test_does_what_hooks_have_put_into_the_policy(change: Callable[[stable_baselines3.PPO], None]) -> None:
    models = []
    for engine in ("auto", "eager"):
        model = make_model(sb3_ppo_variants.PPO, Config(kwargs={"engine": engine}))
        model.learn(2 * N_STEPS * N_ENVS, callback=ChangeInMidUpdate(change))
        models.append(model)
    assert_same_model(*models)


def patched_class(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    policy_class = stable_baselines3.ppo.MlpPolicy
    original = getattr(policy_class, name)
    monkeypatch.setattr(policy_class, name, lambda self, obs, *args, **kwargs: original(self, obs * 0.9, *args, **kwargs))


@pytest.mark.parametrize("name", ["forward", "evaluate_actions", "predict_values"])
def test_does_what_users_have_put_into_sb3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched_class(monkeypatch, name)
    models = [make_model(algorithm, Config()).learn(2 * N_STEPS * N_ENVS) for algorithm in ALGORITHMS]
    assert_same_model(*reversed(models))


@pytest.mark.parametrize("name", ["train", "collect_rollouts"])
def test_calls_what_users_override(name: str) -> None:
    called = []

    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return getattr(sb3_ppo_variants.PPO, name)(self, *args, **kwargs)

    own = type("Own", (sb3_ppo_variants.PPO,), {name: override})
    make_model(own, Config()).learn(2 * N_STEPS * N_ENVS)
    assert called == [name, name]


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
def test_refuses_nan_in_sb3s_words(action: str) -> None:
    messages = []
    for algorithm in ALGORITHMS:
        model = make_model(algorithm, Config(action=action, n_envs=1, kwargs={"batch_size": 12}))
        env = make_env(Config(action=action, n_envs=1))
        env.envs = [Poisoned(inner) for inner in env.envs]  # type: ignore[attr-defined]
        env.seed(3)
        model.set_env(env)
        with pytest.raises(ValueError, match="invalid values") as error:
            model.learn(4 * N_STEPS)
        messages.append([str(error.value), model.num_timesteps])
    assert messages[1] == messages[0]


@pytest.mark.parametrize("action", ["box", "discrete", "multi_binary"])
def test_refuses_nan_in_an_update_in_sb3s_words(action: str) -> None:
    messages = []
    for algorithm in ALGORITHMS:
        model = make_model(algorithm, Config(action=action))
        model.lr_schedule = lambda progress_remaining: float("nan")
        with pytest.raises(ValueError, match="invalid values") as error:
            model.learn(4 * N_STEPS * N_ENVS)
        assert th.isnan(model.policy.action_net.weight).all()
        messages.append(str(error.value))
    assert messages[1] == messages[0]
