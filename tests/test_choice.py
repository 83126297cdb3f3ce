"""``engine="auto"`` takes the fused engine where it may, and says why where it may not."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch as th
from torch import nn

import sb3_ppo_variants
from sb3_ppo_variants.engines import EagerEngine, FusedEngine, LeanPolicy
from sb3_ppo_variants.engines.heads import GaussianHead
from tests.test_parity import N_ENVS, N_STEPS, Config, assert_same_model, make_model

ROLLOUT = N_STEPS * N_ENVS
BOTH = (stable_baselines3.PPO, sb3_ppo_variants.PPO)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What computes the steps of optimisers and environments."""
    names: list[str] = []

    def spied(kind: type, method: str) -> Any:
        original = getattr(kind, method)

        def spy(*args: Any) -> Any:
            names.append(kind.__name__)
            return original(*args)

        return spy

    for kind, method in ((EagerEngine, "step"), (FusedEngine, "step"), (LeanPolicy, "forward")):
        monkeypatch.setattr(kind, method, spied(kind, method))
    return names


def learn(n_updates: int = 2, config: Config | None = None, **kwargs: Any) -> sb3_ppo_variants.PPO:
    model = make_model(sb3_ppo_variants.PPO, config or Config(kwargs=kwargs))
    assert isinstance(model, sb3_ppo_variants.PPO)
    return model.learn(n_updates * ROLLOUT)


def test_the_default_is_fast(used: list[str]) -> None:
    learn()
    assert set(used) == {"FusedEngine", "LeanPolicy"}


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_choice_is_respected(engine: str, used: list[str]) -> None:
    learn(engine=engine)
    assert set(used) == {"eager": {"EagerEngine"}, "fused": {"FusedEngine", "LeanPolicy"}}[engine]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(kwargs={"use_sde": True}), "the action distribution is a StateDependentNoiseDistribution"),
        (Config("CnnPolicy", "image"), "the policy, a ActorCriticCnnPolicy, is not SB3's ActorCriticPolicy as it is"),
        (Config("MultiInputPolicy", "dict"), "the policy, a MultiInputActorCriticPolicy, is not SB3's"),
        (Config(kwargs={"policy_kwargs": {"activation_fn": nn.Hardswish}}), "the layers are Linear, Hardswish"),
        (Config(kwargs={"policy_kwargs": {"optimizer_class": th.optim.AdamW}}), "the optimiser, a AdamW, is not Adam"),
    ],
)
def test_says_once_why_not(config: Config, reason: str, used: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config.kwargs["verbose"] = 1
    learn(3, config)
    assert "FusedEngine" not in used
    lines = [line for line in capsys.readouterr().out.splitlines() if "engine" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"Using the eager engine, as {reason}")

    config.kwargs["verbose"] = 0
    learn(3, config)
    assert capsys.readouterr().out == ""


def test_rollouts_are_lean_whatever_the_optimizer(used: list[str]) -> None:
    learn(policy_kwargs={"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {}})
    assert set(used) == {"EagerEngine", "LeanPolicy"}


def test_falls_back_where_the_gradients_bits_differ(
    used: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they may where another library multiplies matrices in another order."""
    original = FusedEngine._d_values
    monkeypatch.setattr(FusedEngine, "_d_values", lambda self: np.nextafter(original(self), np.float32(np.inf)))
    ours = learn(verbose=1)
    assert "its gradients differ from autograd's in their last bits on this machine" in capsys.readouterr().out
    assert "FusedEngine" not in used
    assert_same_model(ours, make_model(stable_baselines3.PPO, Config()).learn(2 * ROLLOUT))
    learn(engine="fused")
    assert "FusedEngine" in used


@pytest.mark.parametrize(
    "wrong", [lambda engine: engine._part is engine._critic, lambda engine: len(engine._columns.order) != 16]
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_looks_at_the_critics_steps_and_at_truncated_minibatches(
    wrong: Any, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FusedEngine._d_values

    def d_values(self: Any) -> np.ndarray:
        return original(self) * (1.5 if wrong(self) else 1)

    monkeypatch.setattr(FusedEngine, "_d_values", d_values)
    learn(n_value_epochs=2, n_steps=20)
    assert "FusedEngine" not in used


def test_falls_back_where_the_actions_bits_differ(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = GaussianHead.sample
    monkeypatch.setattr(GaussianHead, "sample", lambda self: np.nextafter(original(self), np.float32(np.inf)))
    ours = learn()
    assert used.count("LeanPolicy") == 1
    assert_same_model(ours, make_model(stable_baselines3.PPO, Config()).learn(2 * ROLLOUT))


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_looks_at_the_bits_once_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first and the last minibatch of an epoch, on the whole loss and on the critic's."""
    looks = []
    original = EagerEngine.backward
    monkeypatch.setattr(EagerEngine, "backward", lambda self: looks.append(1) or original(self))
    model = learn(3)
    assert len(looks) == 4
    model.batch_size = 12
    model.learn(2 * ROLLOUT)
    assert len(looks) == 8
    model.ent_coef = 0.01
    model.learn(2 * ROLLOUT)
    assert len(looks) == 12
    th.set_num_threads(2 if th.get_num_threads() == 1 else 1)
    model.learn(2 * ROLLOUT)
    assert len(looks) == 16


def test_looking_at_the_bits_leaves_no_trace() -> None:
    """No gradients, no random numbers: the first update is that of an engine which has not looked."""
    models = [learn(1, engine=engine, target_kl=-1.0) for engine in ("auto", "fused")]  # stops at the first minibatch
    assert_same_model(*models)
    assert [[parameter.grad for parameter in model.policy.parameters()] for model in models] == [[None] * 13] * 2
    np.testing.assert_array_equal(models[0].rollout_buffer.observations, models[1].rollout_buffer.observations)


class Look(sb3_ppo_variants.UpdateCallback):
    """Does in each hook what changes nothing."""

    def __init__(self, look: Callable[[sb3_ppo_variants.PPO], Any]) -> None:
        super().__init__()
        self.look = look

    def _on_minibatch(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
        self.look(self.model)  # type: ignore[arg-type]
        return True

    def _on_epoch_end(self, stats: sb3_ppo_variants.UpdateStats) -> bool:
        self.look(self.model)  # type: ignore[arg-type]
        return True


def replace_by_copies(model: sb3_ppo_variants.PPO) -> None:
    parameters = list(model.policy.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach().clone(), parameters)


LOOKS: list[Callable[[sb3_ppo_variants.PPO], Any]] = [
    lambda model: model.policy.predict(model._last_obs),
    lambda model: model.policy.get_distribution(th.as_tensor(model._last_obs)),
    lambda model: nn.Tanh().register_forward_hook(lambda *args: None).remove(),
    lambda model: setattr(model.policy, "note", 1),
    replace_by_copies,
]


@pytest.mark.parametrize("n_value_epochs", [None, 2])
@pytest.mark.parametrize("look", LOOKS)
def test_goes_on_after_what_changes_nothing(look: Any, n_value_epochs: int | None, used: list[str]) -> None:
    """Some of it looks like a rebuilt policy."""
    models = []
    for engine in ("fused", "eager"):
        model = make_model(sb3_ppo_variants.PPO, Config(kwargs={"engine": engine, "n_value_epochs": n_value_epochs}))
        model.set_random_seed(3)
        used.clear()
        # Also beside autograd: copies lie elsewhere in memory, which makes other bits on some processors, with SB3's PPO, too.
        models.append(model.learn(2 * ROLLOUT, callback=Look(look)))
        assert ("EagerEngine" in used) == (engine == "eager")
    if look is LOOKS[0]:
        return  # it draws random numbers
    assert_same_model(*models)


def test_an_error_in_a_hook_is_the_error_that_is_raised() -> None:
    def fail(model: sb3_ppo_variants.PPO) -> None:
        model.policy.value_net.weight.grad = None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(sb3_ppo_variants.PPO, Config(kwargs={"engine": "fused"})).learn(ROLLOUT, callback=Look(fail))


def test_underflow_is_no_error_for_those_who_make_numpys_errors_exceptions() -> None:
    model = learn(1)
    state = model.policy.optimizer.state[model.policy.action_net.weight]
    state["exp_avg_sq"].fill_(1.2e-38)
    with np.errstate(all="raise"):
        model.learn(ROLLOUT)


def test_goes_on_after_nan_has_been_refused(tmp_path: Path) -> None:
    """With its logs, too."""
    model = learn(1, tensorboard_log=str(tmp_path))
    good = copy.deepcopy(model.get_parameters())
    with th.no_grad():
        model.policy.action_net.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="nan"):
        model.train()
    model.set_parameters(good)
    model.learn(ROLLOUT)
    assert model._exact_kl_known


@pytest.mark.parametrize(("action", "wrong"), [("discrete", -1), ("multi_discrete", 2), ("multi_binary", 2)])
def test_refuses_actions_that_are_none_as_sb3_does(action: str, wrong: int) -> None:
    errors = []
    for algorithm in BOTH:
        model = make_model(algorithm, Config(action=action))
        model.learn(ROLLOUT)
        model.rollout_buffer.actions[..., 0] = wrong
        with pytest.raises((ValueError, RuntimeError, IndexError)) as error:
            model.train()
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_the_optimizers_state_has_its_order() -> None:
    states = [make_model(kind, Config()).learn(ROLLOUT).policy.optimizer.state_dict()["state"] for kind in BOTH]
    assert list(states[0]) == list(states[1]) == list(range(13))


@pytest.mark.parametrize("order", [("sb3_ppo_variants", "patch"), ("patch", "sb3_ppo_variants")])
def test_calls_what_was_patched_before_or_after_its_import(order: tuple[str, str]) -> None:
    imports = {"sb3_ppo_variants": "import sb3_ppo_variants", "patch": PATCH}
    code = "\n".join(["calls = []", *(imports[step] for step in order), TRAIN])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "128\n"


def test_goes_on_where_torch_compile_has_been_used(monkeypatch: pytest.MonkeyPatch, used: list[str]) -> None:
    """It replaces methods of all modules, of those that build them."""
    for name in ("__init__", "__setstate__"):
        original = getattr(nn.Module, name)
        monkeypatch.setattr(nn.Module, name, lambda *args, original=original, **kwargs: original(*args, **kwargs))
    learn()
    assert set(used) == {"FusedEngine", "LeanPolicy"}


PATCH = """
from stable_baselines3.common.policies import ActorCriticPolicy
forward = ActorCriticPolicy.forward
ActorCriticPolicy.forward = lambda self, obs, deterministic=False: calls.append(1) or forward(self, obs, deterministic)
"""
TRAIN = """
sb3_ppo_variants.PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128)
print(len(calls))
"""


def test_importing_loads_no_compiler() -> None:
    """Which takes a second; SB3 leaves it to the first optimiser."""
    code = "import sys, sb3_ppo_variants; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
