"""The fused engine has the bits of the eager one, in everything that anybody can see."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_ppo_variants import PPO, KLEarlyStoppingCallback, UpdateCallback, UpdateStats
from sb3_ppo_variants.engines import FusedEngine
from sb3_ppo_variants.losses import Coefficients, normalize, normalize_each, policy_objective
from tests.environments import RandomEnv
from tests.test_parity import assert_same_tensors
from tests.test_ppo import Watch, make

ROLLOUT = 48
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "neither": {"clip_range": None},
    "entropy-bonus": {"ent_coef": 0.01},
    "value-clipping": {"clip_range_vf": 0.1},
    "fixed-kl": {"clip_range": None, "kl_coef": 3.0},
    "adaptive-kl-and-entropy": {"kl_coef": "auto", "ent_coef": 0.02},
    "hinge": {"kl_coef": {"hinge_coef": 1000.0, "hinge_threshold": 0.01}},
    "raw-advantages": {"normalize_advantage": False},
    "truncated-minibatch": {"batch_size": 14},
    "single-sample-minibatch": {"batch_size": 47},
    "large-steps": {"learning_rate": 3e-2, "max_grad_norm": 5.0},
    "early-stop": {"learning_rate": 3e-3, "target_kl": 0.02},
    "early-stop-at-once": {"target_kl": 1e-9},
    "schedules": {"learning_rate": "lin_0.01", "clip_range": "lin_0.3", "ent_coef": "lin_0.02", "kl_coef": "lin_2.0"},
    "linear-networks": {"policy_kwargs": {"net_arch": []}},
    "unequal-networks": {"policy_kwargs": {"net_arch": {"pi": [16], "vf": [32, 8]}, "activation_fn": nn.ReLU}},
    "adam-options": {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 1e-2, "betas": (0.8, 0.99), "amsgrad": True}}},
    "critic-apart": {"n_value_epochs": 2, "value_learning_rate": 1e-2, "ent_coef": 0.01, "clip_range_vf": 0.2},
    "critic-first": {"n_value_epochs": 2, "value_learning_rate": 1e-2, "critic_first": True},
    "critic-apart-early-stop": {"n_value_epochs": 4, "learning_rate": 3e-3, "target_kl": 0.02, "kl_coef": 1.0},
    "clip-higher": {"clip_range": (0.1, 0.28), "learning_rate": 3e-3},
    "scheduled-pair": {"clip_range": ["lin_0.2", 0.3], "learning_rate": 3e-3},
    "dual-clip": {"dual_clip": 1.01, "learning_rate": 1e-2},
    "spo": {"surrogate": "spo", "learning_rate": 3e-3},
    "rollback": {"clip_range": None, "kl_coef": 5.0, "kl_rollback": 1e-3, "learning_rate": 3e-3},
    "rollback-and-hinge": {"kl_coef": {"hinge_coef": 100.0, "hinge_threshold": 0.01}, "kl_rollback": 1e-3},
    "adam-maximizing": {"policy_kwargs": {"optimizer_kwargs": {"maximize": True}}},
}


class Everything(Watch):
    """Whatever a callback can see, at each hook."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _look(self, stats: UpdateStats) -> None:
        policy = self.model.policy
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in policy.parameters()]
        state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        optimizer = [
            {name: value.clone() for name, value in policy.optimizer.state.get(parameter, {}).items()}
            for parameter in policy.parameters()
        ]
        minibatch = [stats.log_ratio, stats.kl, stats.minibatch.indices, list(stats.minibatch.samples)]
        self.seen.append([gradients, state, optimizer, minibatch, stats.latest("loss")])

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        self._look(stats)
        return True

    def _on_epoch_end(self, stats: UpdateStats) -> bool:
        self._look(stats)
        return True


def run(engine: str, callback: Any = None, n_updates: int = 3, **kwargs: Any) -> PPO:
    model = make(engine=engine, **kwargs)
    return model.learn(n_updates * ROLLOUT, callback=callback)


def visible(model: PPO) -> list[Any]:
    """All that a model shows between two updates."""
    logged = {key: value for key, value in model.logger.name_to_value.items() if not key.startswith("time/")}
    gradients = [parameter.grad for parameter in model.policy.parameters()]
    buffer = model.rollout_buffer
    arrays = [th.as_tensor(array) for array in (buffer.observations, buffer.actions, buffer.values, buffer.returns)]
    return [
        dict(model.policy.state_dict()),
        model.policy.optimizer.state_dict(),
        gradients,
        arrays,
        logged,
        model.kl_coef_state,
    ]


def assert_same_runs(engine: str = "fused", **kwargs: Any) -> None:
    eager = run("eager", **kwargs)
    state = th.get_rng_state(), np.random.get_state()[1].copy()
    fused = run(engine, **kwargs)
    assert_same_tensors(visible(fused), visible(eager))
    assert th.equal(th.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])


@pytest.mark.parametrize(
    ("action", "n_threads"),
    [
        *[(action, 1) for action in ("box", "matrix", "discrete", "multi_discrete", "multi_binary")],
        *[(action, 2) for action in ("box", "multi_discrete")],
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_trains_the_same_bits(variant: str, action: str, n_threads: int) -> None:
    th.set_num_threads(n_threads)
    assert_same_runs(action=action, **VARIANTS[variant])


@pytest.mark.parametrize("observation", ["discrete", "multi_discrete", "image"])
def test_trains_the_same_bits_on_other_observations(observation: str) -> None:
    assert_same_runs(observation=observation, action="discrete")


@pytest.mark.parametrize(
    "activation_fn",
    [
        nn.Sigmoid,
        nn.ELU,
        nn.SiLU,
        nn.Softplus,
        nn.GELU,
        partial(nn.GELU, approximate="tanh"),
        partial(nn.LeakyReLU, 0.2),
    ],
)
@pytest.mark.parametrize("net_arch", [[9, 33], {"pi": [7], "vf": [7, 5]}])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_trains_the_same_bits_with_other_activations(activation_fn: Any, net_arch: Any) -> None:
    assert_same_runs(policy_kwargs={"net_arch": net_arch, "activation_fn": activation_fn}, batch_size=15)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    engine=st.sampled_from(["auto", "fused"]),
    n_threads=st.sampled_from([1, 2]),
    normalize_advantage=st.booleans(),
    action=st.sampled_from(["box", "matrix", "discrete", "multi_discrete", "multi_binary"]),
    activation_fn=st.sampled_from([nn.Tanh, nn.ReLU, nn.Sigmoid]),
    n_value_epochs=st.sampled_from([None, None, 1]),
    batch_size=st.integers(2, 60),
    widths=st.lists(st.integers(1, 33), max_size=3),
    clip_range=st.none() | st.floats(0.01, 0.5),
    clip_range_vf=st.none() | st.floats(0.01, 1.0),
    ent_coef=st.sampled_from([0.0, 0.01, -0.01]),
    vf_coef=st.sampled_from([0.0, 0.5, 1.0]),
    kl_coef=st.sampled_from([0.0, 1.0, "auto"]),
    learning_rate=st.floats(1e-5, 0.03),
    max_grad_norm=st.floats(0.01, 10.0),
    seed=st.integers(0, 100),
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.filterwarnings("ignore:kl_coef is saturated")
def test_trains_the_same_bits_in_drawn_configurations(
    engine: str, n_threads: int, widths: list[int], activation_fn: type[nn.Module], **kwargs: Any
) -> None:
    th.set_num_threads(n_threads)
    assert_same_runs(engine, n_updates=2, policy_kwargs={"net_arch": widths, "activation_fn": activation_fn}, **kwargs)


@pytest.mark.parametrize("action", ["box", "multi_discrete"])
@pytest.mark.parametrize("variant", ["clip", "adaptive-kl-and-entropy", "adam-options"])
def test_shows_callbacks_the_same_bits(variant: str, action: str) -> None:
    """Parameters, gradients, the optimiser's state, minibatch and losses, at each hook."""
    seen = []
    for engine in ("eager", "fused"):
        callback = Everything()
        run(engine, callback, action=action, **VARIANTS[variant])
        seen.append([callback.seen, callback.kls])
    assert len(seen[0][0]) == 3 * (9 + 3)
    assert_same_tensors(*seen)


class Meddle(UpdateCallback):
    """Changes gradients, parameters and the learning rate."""

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        for parameter in self.model.policy.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5
            parameter.data += 0.001
        self.model.policy.optimizer.param_groups[0]["lr"] *= 0.9
        return stats.gradient_steps < 7


@pytest.mark.parametrize(
    "callback",
    [
        Meddle,
        lambda: KLEarlyStoppingCallback(1e-4, per="epoch", restore=True),
        lambda: KLEarlyStoppingCallback(1e-5, restore=True),
        lambda: KLEarlyStoppingCallback(1e-4),
        lambda: KLEarlyStoppingCallback(1e-4, stop="policy"),  # from then on, Adam has stepped the critic more often
        lambda: KLEarlyStoppingCallback(1e-5, stop="policy", restore=True),
    ],
)
def test_callbacks_change_the_same_bits(callback: Any) -> None:
    models = [run(engine, callback(), learning_rate=1e-3) for engine in ("eager", "fused")]
    assert_same_tensors(*map(visible, models))


def test_an_interrupted_update_leaves_the_same_bits() -> None:
    class Interrupt(UpdateCallback):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            if stats.gradient_steps == 4:
                raise KeyboardInterrupt
            return True

    states = []
    for engine in ("eager", "fused"):
        model = make(engine=engine)
        with pytest.raises(KeyboardInterrupt):
            model.learn(ROLLOUT, callback=Interrupt())
        states.append([dict(model.policy.state_dict()), model.policy.optimizer.state_dict()])
    assert_same_tensors(*states)


def test_goes_on_from_the_other_engines_state() -> None:
    alternating, eager = make(engine="fused"), make(engine="eager")
    for model, engines in ((alternating, ("fused", "eager", "fused")), (eager, ("eager", "eager", "eager"))):
        model.set_random_seed(3)
        for engine in engines:
            model.engine = engine
            model.learn(ROLLOUT)
    assert_same_tensors(visible(alternating), visible(eager))


def near(value: float) -> st.SearchStrategy[float]:
    """Float32 numbers within a few units in the last place."""
    return st.integers(-3, 3).map(lambda n: float(np.float32(value) + n * np.spacing(np.float32(value))))


@given(
    ratio=st.lists(near(0.8) | near(1.2) | st.floats(0, 4, width=32), min_size=6, max_size=6),
    # Halves of numbers near the smallest one that float32 can tell from zero are not exact.
    advantages=st.lists(
        st.floats(2**-60, 3, width=32) | st.floats(-3, -(2**-60), width=32) | st.just(0.0), min_size=6, max_size=6
    ),
)
@example(ratio=[float(np.float32(1.2) + np.spacing(np.float32(1.2)))] * 6, advantages=[1.0, 1.1, 1.3, 1.5, 1.7, 1.9])
@example(ratio=[float(np.float32(0.8) - np.spacing(np.float32(0.8)))] * 6, advantages=[-1.0, -1.1, -1.3, -1.5, -1.7, -1.9])
@pytest.mark.parametrize("changes", [{}, {"dual_clip": 1.2}, {"surrogate": "spo"}])
def test_the_surrogates_gradient_is_autograds_at_the_edges(
    changes: dict[str, Any], ratio: list[float], advantages: list[float]
) -> None:
    """Just outside the clip range, both sides of the minimum may round to the same number: each then gets a half."""
    r, a = th.tensor(ratio, requires_grad=True), th.tensor(advantages)
    coefs = Coefficients((0.2, 0.2), None, False, 0.0, None, 0.0, 0.0, 0.0, **changes)
    (-policy_objective(r, a, coefs)).backward()
    engine: Any = SimpleNamespace(
        _ratio=r.detach().numpy(),
        _ratio_range=(np.float32(0.8), np.float32(1.2)),
        _coefs=coefs,
        _columns=SimpleNamespace(advantages=a.numpy()),
    )
    assert r.grad is not None
    np.testing.assert_array_equal(FusedEngine._d_ratio(engine), r.grad.numpy())


@given(n_samples=st.integers(2, 300), batch_size=st.integers(1, 300), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_advantages_are_normalized_as_in_each_minibatch(n_samples: int, batch_size: int, scale: float, seed: int) -> None:
    advantages = (np.random.default_rng(seed).normal(0.3, 1, n_samples) * scale).astype(np.float32)
    minibatches = [normalize(th.from_numpy(part)) for part in np.split(advantages, range(batch_size, n_samples, batch_size))]
    assert th.equal(normalize_each(th.from_numpy(advantages), batch_size), th.cat(minibatches))


class OwnPolicy(ActorCriticPolicy):
    pass


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"use_sde": True}, "the action distribution is a StateDependentNoiseDistribution"),
        ({"observation": "dict"}, "the policy, a MultiInputActorCriticPolicy, is not SB3's ActorCriticPolicy as it is"),
        ({"policy_kwargs": {"activation_fn": nn.Mish}}, "the layers are Linear, Mish, Linear, Mish"),
        ({"policy_kwargs": {"activation_fn": partial(nn.ReLU, inplace=True)}}, "the layers are Linear, ReLU, Linear, ReLU"),
        (
            {"policy_kwargs": {"optimizer_class": th.optim.SGD}},
            "the optimiser, a SGD, is not Adam with one group of parameters",
        ),
        ({"policy_kwargs": {"optimizer_kwargs": {"foreach": True}}}, "Adam has other than its plain settings"),
    ],
)
def test_refuses_what_it_does_not_know(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"`engine` must be 'auto' or 'eager', not 'fused', as {reason}"):
        run("fused", **kwargs)


def test_refuses_what_users_have_changed() -> None:
    def refused(model: PPO, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            model.learn(ROLLOUT)

    model = make(engine="fused")
    model.policy.mlp_extractor.policy_net[0].register_forward_hook(lambda *args: None)
    refused(model, "a module of the policy has hooks")
    model = make(engine="fused")
    model.policy.evaluate_actions = model.policy.evaluate_actions  # type: ignore[method-assign]
    refused(model, "the policy, a ActorCriticPolicy, is not SB3's ActorCriticPolicy as it is")
    model = make(engine="fused")
    model.policy.value_net.weight.requires_grad_(False)
    refused(model, "a parameter is frozen")
    model = make(engine="fused")
    model.policy.optimizer.register_step_post_hook(lambda *args: None)
    refused(model, "the optimiser has hooks")
    env = make_vec_env(RandomEnv, 2, seed=0)
    refused(PPO(OwnPolicy, env, n_steps=24, batch_size=16, device="cpu", engine="fused"), "the policy, a OwnPolicy, is not")
    handle = register_optimizer_step_post_hook(lambda *args: None)
    refused(make(engine="fused"), "all optimisers have hooks")
    handle.remove()
    with th.autograd.set_detect_anomaly(True):
        refused(make(engine="fused"), "autograd is to detect anomalies")


def test_refuses_optimizers_of_a_part_of_the_critic() -> None:
    model = make(engine="fused", n_value_epochs=1)
    model.value_optimizer = th.optim.Adam(model.policy.value_net.parameters())
    with pytest.raises(ValueError, match="an optimiser's parameters are not those of the critic"):
        model.learn(ROLLOUT)
