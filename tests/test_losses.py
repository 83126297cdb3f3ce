"""Losses by hand, their gradients against finite differences, and what must hold for all of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_ppo_variants.engines import EagerEngine
from sb3_ppo_variants.kl import distribution_params
from sb3_ppo_variants.losses import (
    Coefficients,
    Evaluation,
    Samples,
    clipped_surrogate,
    entropy_loss,
    kl_penalty,
    mean_of_each,
    normalize,
    ppo_loss,
    rolls_back,
    spo_surrogate,
    surrogate,
    value_loss,
)
from sb3_ppo_variants.rollout import Minibatch
from sb3_ppo_variants.trust_region import TrustRegion
from tests.environments import ACTION_SPACES, OBSERVATION_SPACES

NEITHER = Coefficients(
    clip_range=None,
    clip_range_vf=None,
    normalize_advantage=False,
    ent_coef=0.0,
    vf_coef=0.0,
    kl_coef=0.0,
    hinge_coef=0.0,
    hinge_kl=0.02,
)


def tensor(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


# Four samples: ratios 1.5, 1.5, 0.5, 1.1; advantages 1, -1, -1, 2; values 0, 1, 2, 3; old values 0, 0, 0, 0; returns 1.
RATIO = tensor(1.5, 1.5, 0.5, 1.1)
SAMPLES = Samples(
    old_values=tensor(0, 0, 0, 0),
    old_log_prob=tensor(-1, -2, -3, -4),
    advantages=tensor(1, -1, -1, 2),
    returns=tensor(1, 1, 1, 1),
)
NEW = Evaluation(
    values=tensor(0, 1, 2, 3),
    log_prob=SAMPLES.old_log_prob + RATIO.log(),
    entropy=tensor(1, 2, 3, 4),
    kl=tensor(0.01, 0.02, 0.03, 0.06),
)


def test_surrogate_by_hand() -> None:
    # (1.5 - 1.5 - 0.5 + 2.2) / 4
    assert surrogate(RATIO, SAMPLES.advantages).item() == pytest.approx(1.7 / 4, abs=1e-15)


def test_clipped_surrogate_by_hand() -> None:
    # A > 0 and r beyond 1.2 is cut to 1.2; A < 0 and r = 1.5 is not; A < 0 and r = 0.5 is cut to 0.8; 1.1 is inside:
    # (1.2 - 1.5 - 0.8 + 2.2) / 4
    assert clipped_surrogate(RATIO, SAMPLES.advantages, (0.2, 0.2)).item() == pytest.approx(1.1 / 4, abs=1e-15)


def test_clip_higher_by_hand() -> None:
    # A > 0 and r beyond 1.4 is cut to 1.4; A < 0 and r = 0.5 is cut to 0.9: (1.4 - 1.5 - 0.9 + 2.2) / 4
    assert clipped_surrogate(RATIO, SAMPLES.advantages, (0.1, 0.4)).item() == pytest.approx(1.2 / 4, abs=1e-15)


def test_dual_clip_by_hand() -> None:
    # as clipped above, but of the two with A = -1, min(r A, ...) = -1.5 and -0.8, the first is raised to c A = -1.25:
    # (1.2 - 1.25 - 0.8 + 2.2) / 4
    clipped = clipped_surrogate(RATIO, SAMPLES.advantages, (0.2, 0.2), dual_clip=1.25)
    assert clipped.item() == pytest.approx(1.35 / 4, abs=1e-15)


def test_spo_by_hand() -> None:
    # r A - |A| (r - 1)^2 / 0.4, with (r - 1)^2 = 0.25, 0.25, 0.25, 0.01:
    # (1.5 - 0.625) + (-1.5 - 0.625) + (-0.5 - 0.625) + (2.2 - 0.05)
    assert spo_surrogate(RATIO, SAMPLES.advantages, 0.2).item() == pytest.approx((0.875 - 2.125 - 1.125 + 2.15) / 4, abs=1e-15)
    # Its maximum is where clipping begins, at 1 + epsilon where A > 0 and at 1 - epsilon where A < 0.
    edge = tensor(1.2, 0.8, 0.8, 1.2).requires_grad_()
    spo_surrogate(edge, SAMPLES.advantages, 0.2).backward()
    assert edge.grad is not None
    assert edge.grad.tolist() == pytest.approx([0] * 4, abs=1e-15)


def test_rollback_by_hand() -> None:
    """The penalty acts where KL >= 0.02 and r A >= A: not on the first (KL), not on the second (r A = -1.5 < A = -1)."""
    assert NEW.kl is not None
    where = rolls_back(NEW.kl, RATIO, SAMPLES.advantages, 0.02)
    assert where.tolist() == [False, False, True, True]
    coefs = NEITHER._replace(kl_coef=5.0, kl_rollback=0.02)
    assert kl_penalty(NEW.kl, coefs, where=where).item() == pytest.approx(5 * (0.03 + 0.06) / 4, abs=1e-15)
    loss, metrics = ppo_loss(NEW, SAMPLES, coefs)
    assert metrics["kl_penalty_loss"].item() == pytest.approx(0.1125, abs=1e-15)
    assert loss.item() == pytest.approx(-1.7 / 4 + 0.1125, abs=1e-15)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clip_range": (0.1, 0.4)}, 1.2),
        ({"clip_range": (0.2, 0.2), "dual_clip": 1.25}, 1.35),
        ({"clip_range": (0.2, 0.2), "surrogate": "spo"}, -0.225),
        ({"clip_range": None}, 1.7),
    ],
)
def test_the_coefficients_choose_the_objective(changes: dict[str, Any], expected: float) -> None:
    """Values as above, four times the mean."""
    metrics = ppo_loss(NEW, SAMPLES, NEITHER._replace(**changes))[1]
    assert metrics["policy_loss"].item() == pytest.approx(-expected / 4, abs=1e-15)


def test_clip_fraction_of_a_pair_by_hand() -> None:
    # beyond (0.6, 1.3): 1.5, 1.5 and 0.5
    metrics = ppo_loss(NEW, SAMPLES, NEITHER._replace(clip_range=(0.4, 0.3)))[1]
    assert metrics["clip_fraction"].item() == 0.75
    assert ppo_loss(NEW, SAMPLES, NEITHER._replace(clip_range=(0.6, 0.3)))[1]["clip_fraction"].item() == 0.5


def test_kl_penalty_by_hand() -> None:
    # mean KL 0.03; beta 3: 0.09; hinge 1000 (0.03 - 0.02)^2 = 0.1, none where the mean is within the threshold
    assert NEW.kl is not None
    assert kl_penalty(NEW.kl, NEITHER._replace(kl_coef=3.0)).item() == pytest.approx(0.09, abs=1e-15)
    assert kl_penalty(NEW.kl, NEITHER._replace(kl_coef=3.0, hinge_coef=1000.0)).item() == pytest.approx(0.19, abs=1e-14)
    assert kl_penalty(NEW.kl, NEITHER._replace(hinge_coef=1000.0, hinge_kl=0.04)).item() == 0


def test_value_loss_by_hand() -> None:
    # errors -1, 0, 1, 2: (1 + 0 + 1 + 4) / 4; values cut to 0, 0.5, 0.5, 0.5: (1 + 3 * 0.25) / 4
    assert value_loss(NEW.values, SAMPLES, None).item() == 1.5
    assert value_loss(NEW.values, SAMPLES, 0.5).item() == 1.75 / 4


def test_entropy_loss_by_hand() -> None:
    assert entropy_loss(NEW.entropy, NEW.log_prob).item() == -2.5
    # No closed form: estimated by -mean(log_prob), which are -1 to -4 here.
    assert entropy_loss(None, SAMPLES.old_log_prob).item() == -2.5


def test_normalize_by_hand() -> None:
    # mean 2, standard deviation 1 (with n - 1 = 2 in the denominator)
    assert normalize(tensor(1, 2, 3)).tolist() == pytest.approx([-1, 0, 1], abs=1e-7)
    assert normalize(tensor(5)).tolist() == [5]


def test_the_whole_loss_by_hand() -> None:
    coefs = NEITHER._replace(clip_range=(0.2, 0.2), ent_coef=0.1, vf_coef=0.5, kl_coef=3.0)
    loss, metrics = ppo_loss(NEW, SAMPLES, coefs)
    # -0.275 - 0.1 * 2.5 + 0.5 * 1.5 + 3 * 0.03
    assert loss.item() == pytest.approx(0.315, abs=1e-15)
    log_ratios = [math.log(ratio) for ratio in (1.5, 1.5, 0.5, 1.1)]
    expected = {
        "loss": 0.315,
        "policy_loss": -0.275,
        "entropy_loss": -2.5,
        "value_loss": 1.5,
        "kl_penalty_loss": 0.09,
        "clip_fraction": 0.75,
        "approx_kl": (0.5 + 0.5 - 0.5 + 0.1 - sum(log_ratios)) / 4,
    }
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(expected, abs=1e-7)


def test_without_a_critic_there_is_no_value_loss() -> None:
    loss, metrics = ppo_loss(NEW, SAMPLES, NEITHER._replace(vf_coef=None))
    assert "value_loss" not in metrics
    assert loss.item() == pytest.approx(-1.7 / 4, abs=1e-15)


def test_metrics_are_detached() -> None:
    new = NEW._replace(log_prob=NEW.log_prob.clone().requires_grad_())
    loss, metrics = ppo_loss(new, SAMPLES, NEITHER._replace(clip_range=(0.2, 0.2)))
    assert loss.requires_grad
    assert not any(metric.requires_grad for metric in metrics.values())


def numbers(low: float, high: float) -> st.SearchStrategy[th.Tensor]:
    return hnp.arrays(np.float64, 6, elements=st.floats(low, high)).map(th.from_numpy)


samples = st.builds(Samples, numbers(-5, 5), numbers(-5, 0), numbers(-5, 5), numbers(-5, 5))
evaluations = st.builds(Evaluation, numbers(-5, 5), numbers(-5, 0), numbers(0, 5), numbers(0, 1))


def loss_of(new: Evaluation, rollout: Samples, **coefs: Any) -> float:
    return ppo_loss(new, rollout, NEITHER._replace(**coefs))[0].item()


@given(evaluations, samples)
def test_an_infinite_clip_range_is_none(new: Evaluation, rollout: Samples) -> None:
    assert loss_of(new, rollout, clip_range=(math.inf, math.inf)) == loss_of(new, rollout, clip_range=None)
    assert loss_of(new, rollout, clip_range=(1e6, 1e6)) == loss_of(new, rollout, clip_range=None)


@given(evaluations, samples, st.floats(0.01, 1))
def test_a_zero_beta_is_no_penalty(new: Evaluation, rollout: Samples, clip_range: float) -> None:
    unpenalized = new._replace(kl=None)
    assert loss_of(new, rollout, clip_range=(clip_range, clip_range)) == loss_of(
        unpenalized, rollout, clip_range=(clip_range, clip_range)
    )


@given(evaluations, samples, st.floats(0.01, 1))
def test_clipping_never_raises_the_objective(new: Evaluation, rollout: Samples, clip_range: float) -> None:
    """Eq. 7 is a pessimistic bound of eq. 6."""
    assert loss_of(new, rollout, clip_range=(clip_range, clip_range)) >= loss_of(new, rollout, clip_range=None) - 1e-12


@given(evaluations, samples, st.permutations(range(6)))
def test_order_of_samples_does_not_matter(new: Evaluation, rollout: Samples, order: list[int]) -> None:
    coefs = {"clip_range": (0.2, 0.2), "ent_coef": 0.1, "vf_coef": 0.5, "kl_coef": 3.0, "normalize_advantage": True}
    shuffled = loss_of(Evaluation(*(t[order] for t in new)), Samples(*(t[order] for t in rollout)), **coefs)
    assert shuffled == pytest.approx(loss_of(new, rollout, **coefs), rel=1e-9, abs=1e-9)


@given(evaluations, samples, st.floats(0, 10), st.floats(0, 10))
def test_more_beta_never_lowers_the_loss(new: Evaluation, rollout: Samples, beta: float, more: float) -> None:
    assert loss_of(new, rollout, kl_coef=beta + more) >= loss_of(new, rollout, kl_coef=beta) - 1e-12


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"clip_range": (0.2, 0.2)},
    "neither": {},
    "fixed-kl": {"kl_coef": 3.0},
    "clip-and-kl": {"clip_range": (0.2, 0.2), "kl_coef": 0.7},
    "hinge": {"kl_coef": 0.5, "hinge_coef": 1000.0, "hinge_kl": 1e-4},
    "value-clipping": {"clip_range": (0.2, 0.2), "clip_range_vf": 0.2, "normalize_advantage": False},
    "dual-clip": {"clip_range": (0.1, 0.3), "dual_clip": 1.05},
    "spo": {"clip_range": (0.2, 0.2), "surrogate": "spo"},
    "rollback": {"kl_coef": 5.0, "kl_rollback": 1e-5},
    "policy-only": {"kl_coef": 1.0, "vf_coef": None},
}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("box", {}),
    # No hidden layers: SB3 lets no gradient through the features into gSDE's noise, finite differences would.
    "gsde": ("box", {"use_sde": True, "net_arch": []}),
    "gsde-squashed": ("box", {"use_sde": True, "squash_output": True, "net_arch": []}),
    "categorical": ("discrete", {}),
    "multi-categorical": ("multi_discrete", {}),
    "bernoulli": ("multi_binary", {}),
}


class DoubleExtractor(FlattenExtractor):
    """SB3 turns observations into float32: back to float64, for finite differences."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_the_whole_loss_against_finite_differences(variant: str, policy_name: str) -> None:
    """
    The engine's gradient with respect to every parameter of the policy, in float64, along random directions.

    Central differences with step h err by O(h^2) + O(eps / h), about 1e-9 at h = 1e-5.
    """
    action, policy_kwargs = POLICIES[policy_name]
    coefs = NEITHER._replace(**{"normalize_advantage": True, "ent_coef": 0.01, "vf_coef": 0.5, **VARIANTS[variant]})
    action_space = ACTION_SPACES[action]
    n_samples = 12
    with th.random.fork_rng():
        th.manual_seed(3)
        policy_kwargs = {"net_arch": [8], "features_extractor_class": DoubleExtractor, **policy_kwargs}
        policy = ActorCriticPolicy(OBSERVATION_SPACES["box"], action_space, lambda _: 1e-3, **policy_kwargs).double()
        observations = th.randn(n_samples, 4, dtype=th.float64)
        if policy.use_sde:
            policy.reset_noise(n_samples)
        with th.no_grad():
            actions, values, log_prob = policy(observations)
            old = distribution_params(policy.get_distribution(observations))
            # Move away from the old policy, so that KL, ratio and clipping matter, and off all kinks.
            for parameter in policy.parameters():
                parameter += 0.2 * th.randn_like(parameter)
        rollout = RolloutBufferSamples(
            observations=observations,
            actions=actions.reshape(n_samples, -1).double(),
            old_values=values.flatten(),
            old_log_prob=log_prob,
            advantages=th.randn(n_samples, dtype=th.float64),
            returns=th.randn(n_samples, dtype=th.float64),
        )
        trust_region = TrustRegion.__new__(TrustRegion)
        trust_region.old = old
        buffer: Any = None  # the engine is given its minibatch
        engine = EagerEngine(policy, buffer, action_space, coefs, math.inf, trust_region)
        minibatch = Minibatch(th.arange(n_samples), lambda: rollout)

        metrics = engine.forward(minibatch).metrics
        engine.backward()
        if coefs.clip_range is not None:
            assert 0 < metrics["clip_fraction"] < 1

        step = 1e-5
        for parameter in policy.parameters():
            gradient = th.zeros_like(parameter) if parameter.grad is None else parameter.grad
            direction = th.randn_like(parameter)
            ends = []
            for sign in (1, -2):  # to +step, then from there to -step
                with th.no_grad():
                    parameter += sign * step * direction
                ends.append(engine.forward(minibatch).metrics["loss"].item())
            with th.no_grad():
                parameter += step * direction
            difference = (ends[0] - ends[1]) / (2 * step)
            assert difference == pytest.approx((gradient * direction).sum().item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("n_samples", [1, 7, 64, 1000, 40_000])
def test_the_mean_of_each_minibatch_is_its_own_mean(n_samples: int) -> None:
    """To the last bit, also where torch shares out a long sum among threads."""
    th.set_num_threads(2)
    samples = th.randn(3, n_samples)
    assert th.equal(mean_of_each(samples), th.stack([minibatch.clone().mean() for minibatch in samples]))
