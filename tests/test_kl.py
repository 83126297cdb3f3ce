"""Exact KL of every distribution, by hand, against torch and against Monte Carlo; the sample estimators."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
    TanhBijector,
    kl_divergence,
)

from sb3_ppo_variants.kl import (
    ESTIMATORS,
    BernoulliParams,
    CategoricalParams,
    DistributionParams,
    GaussianParams,
    distribution_params,
    k1,
    k2,
    k3,
)

N_STATES = 5
EPS = float(np.finfo(np.float64).eps)


def gaussian(seed: int, squashed: bool = False) -> Distribution:
    rng = th.Generator().manual_seed(seed)
    kind = SquashedDiagGaussianDistribution if squashed else DiagGaussianDistribution
    mean = th.randn(N_STATES, 3, generator=rng, dtype=th.float64)
    return kind(3).proba_distribution(mean, 0.3 * th.randn(3, generator=rng, dtype=th.float64))


def gsde(seed: int, squash_output: bool = False) -> Distribution:
    rng = th.Generator().manual_seed(seed)
    distribution = StateDependentNoiseDistribution(2, squash_output=squash_output)
    distribution.latent_sde_dim = 4
    mean = th.randn(N_STATES, 2, generator=rng, dtype=th.float64)
    log_std = 0.3 * th.randn(4, 2, generator=rng, dtype=th.float64)
    return distribution.proba_distribution(mean, log_std, th.ones(N_STATES, 4, dtype=th.float64))


def categorical(seed: int) -> Distribution:
    logits = th.randn(N_STATES, 4, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    return CategoricalDistribution(4).proba_distribution(logits)


def multi_categorical(seed: int) -> Distribution:
    logits = th.randn(N_STATES, 5, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    return MultiCategoricalDistribution([2, 3]).proba_distribution(logits)


def bernoulli(seed: int) -> Distribution:
    logits = th.randn(N_STATES, 3, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    return BernoulliDistribution(3).proba_distribution(logits)


MAKERS = {
    "gaussian": gaussian,
    "squashed-gaussian": lambda seed: gaussian(seed, squashed=True),
    "gsde": gsde,
    "gsde-squashed": lambda seed: gsde(seed, squash_output=True),
    "categorical": categorical,
    "multi-categorical": multi_categorical,
    "bernoulli": bernoulli,
}
distributions = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def exact(old: Distribution, new: Distribution) -> th.Tensor:
    return distribution_params(old).kl_divergence(distribution_params(new))


def test_gaussian_by_hand() -> None:
    # N(0, 1) against N(1, 2): ln 2 + (1 + 1) / (2 * 4) - 1/2; N(0, 1) against itself: 0. Summed over both dimensions.
    old = GaussianParams(th.zeros(1, 2, dtype=th.float64), th.ones(1, 2, dtype=th.float64))
    new = GaussianParams(th.tensor([[1.0, 0.0]]).double(), th.tensor([[2.0, 1.0]]).double())
    assert old.kl_divergence(new).tolist() == pytest.approx([math.log(2) + 2 / 8 - 0.5], abs=2 * EPS)


def test_categorical_by_hand() -> None:
    # 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = ln 2 - 1/2 ln 3 + ... = ln(2 / sqrt 3)
    old = CategoricalParams(th.tensor([[0.5, 0.5]], dtype=th.float64).log())
    new = CategoricalParams(th.tensor([[0.25, 0.75]], dtype=th.float64).log())
    assert old.kl_divergence(new).tolist() == pytest.approx([math.log(2 / math.sqrt(3))], abs=2 * EPS)


def test_bernoulli_by_hand() -> None:
    # The same two distributions, by their logits: ln(1/2 : 1/2) = 0 and ln(1/4 : 3/4) = -ln 3; twice side by side.
    old = BernoulliParams(th.zeros(1, 2, dtype=th.float64))
    new = BernoulliParams(th.full((1, 2), -math.log(3), dtype=th.float64))
    assert old.kl_divergence(new).tolist() == pytest.approx([2 * math.log(2 / math.sqrt(3))], abs=4 * EPS)


def test_a_probability_of_zero_costs_nothing() -> None:
    old = CategoricalParams(th.log_softmax(th.tensor([[0.0, -1e8]], dtype=th.float64), dim=1))
    new = CategoricalParams(th.log_softmax(th.tensor([[0.0, 0.0]], dtype=th.float64), dim=1))
    assert old.kl_divergence(new).tolist() == pytest.approx([math.log(2)], abs=EPS)


def test_masked_actions_cost_nothing_and_get_no_gradient() -> None:
    """Logits of -inf, as action masks use them: ln(1/2 : 1/4) / 2 + ln(1/2 : 3/4) / 2 of the others."""
    logits = th.tensor([[0.0, math.log(3), 0.0]], dtype=th.float64, requires_grad=True)
    mask = th.tensor([[False, False, True]])
    old = CategoricalDistribution(3).proba_distribution(th.tensor([[0.0, 0.0, -math.inf]], dtype=th.float64))
    new = CategoricalDistribution(3).proba_distribution(logits.masked_fill(mask, -math.inf))
    kl = exact(old, new)
    assert kl.tolist() == pytest.approx([math.log(2 / math.sqrt(3))], abs=4 * EPS)
    # d KL / d logit = q - p
    kl.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([0.25 - 0.5, 0.75 - 0.5, 0.0], abs=4 * EPS)]


@distributions
def test_agrees_with_torch(make: Any) -> None:
    old, new = make(1), make(2)
    expected = kl_divergence(old, new)
    # Torch keeps action dimensions apart for Gaussian and Bernoulli distributions.
    expected = expected.sum(dim=1) if expected.ndim == 2 else expected
    th.testing.assert_close(exact(old, new), expected, rtol=1e-13, atol=1e-14)


@distributions
def test_agrees_with_monte_carlo(make: Any) -> None:
    """E[ln pi_old - ln pi_new] over actions of the old policy, within five standard errors; shows squashing's invariance."""
    n_samples = 4_000
    old, new = make(1), make(2)
    samples = []
    with th.random.fork_rng():
        th.manual_seed(0)
        if isinstance(old, StateDependentNoiseDistribution):
            # Its `sample` shares one noise matrix between states: draw from the marginal Gaussian instead.
            draws = [old.distribution.sample() for _ in range(n_samples)]
            actions = [TanhBijector.forward(draw) if old.bijector is not None else draw for draw in draws]
        else:
            actions = [old.sample() for _ in range(n_samples)]
    samples = th.stack([old.log_prob(action) - new.log_prob(action) for action in actions])
    error = (samples.mean(dim=0) - exact(old, new)).abs()
    assert (error < 5 * samples.std(dim=0) / math.sqrt(n_samples)).all()


@distributions
def test_is_zero_between_equals_and_positive_otherwise(make: Any) -> None:
    assert exact(make(1), make(1)).tolist() == [0.0] * N_STATES
    assert (exact(make(1), make(2)) > 0).all()


@distributions
def test_keeps_the_old_parameters_when_the_distribution_changes(make: Any) -> None:
    """SB3's policies refill one distribution object: read parameters must stay what they were."""
    distribution = make(1)
    params = distribution_params(distribution)
    distribution.distribution = make(2).distribution
    assert params.kl_divergence(distribution_params(make(1))).tolist() == [0.0] * N_STATES


def test_refuses_a_distribution_without_an_exact_kl() -> None:
    class Mixture:
        pass

    with pytest.raises(TypeError, match="no exact KL is known for the action distribution Mixture"):
        distribution_params(Mixture())  # type: ignore[arg-type]


def test_refuses_a_subclass_with_another_distribution_inside() -> None:
    """A Gaussian's formula would be wrong for a Student t."""

    class StudentT(DiagGaussianDistribution):
        def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "StudentT":
            self.distribution = th.distributions.StudentT(3.0, mean_actions, log_std.exp())  # type: ignore[assignment]
            return self

    with pytest.raises(TypeError, match="no exact KL is known for the action distribution StudentT of StudentT"):
        distribution_params(StudentT(2).proba_distribution(th.zeros(1, 2), th.zeros(2)))


def test_joins_batches() -> None:
    first, second = distribution_params(gaussian(1)), distribution_params(gaussian(2))
    joined = GaussianParams.cat([first, second])
    assert [tensor.shape for tensor in joined.tensors()] == [(2 * N_STATES, 3)] * 2
    rows = joined.map(lambda tensor: tensor[N_STATES:])
    assert rows.kl_divergence(second).tolist() == [0.0] * N_STATES


def numbers(low: float, high: float, shape: tuple[int, ...] = (3, 4)) -> st.SearchStrategy[th.Tensor]:
    return hnp.arrays(np.float64, shape, elements=st.floats(low, high)).map(th.from_numpy)


gaussians = st.builds(GaussianParams, numbers(-10, 10), numbers(0.01, 10))
categoricals = st.builds(lambda logits: CategoricalParams(logits.log_softmax(dim=1)), numbers(-20, 20))
bernoullis = st.builds(BernoulliParams, numbers(-20, 20))
pairs = st.one_of(st.tuples(kind, kind) for kind in (gaussians, categoricals, bernoullis))


@given(pairs)
def test_never_negative(pair: tuple[DistributionParams, DistributionParams]) -> None:
    old, new = pair
    # Up to rounding, which is relative to the largest of the terms that cancel, here below 50.
    assert (old.kl_divergence(new) >= -50 * 8 * EPS).all()


@given(st.one_of(gaussians, categoricals, bernoullis))
def test_zero_at_equality(params: DistributionParams) -> None:
    assert (params.kl_divergence(params) == 0).all()


@given(pairs, st.permutations(range(4)))
def test_order_of_action_dimensions_does_not_matter(
    pair: tuple[DistributionParams, DistributionParams], order: list[int]
) -> None:
    old, new = pair
    shuffled = old.map(lambda tensor: tensor[:, order]).kl_divergence(new.map(lambda tensor: tensor[:, order]))
    th.testing.assert_close(shuffled, old.kl_divergence(new), rtol=1e-12, atol=1e-11)


@given(pairs)
def test_independent_dimensions_add_up(pair: tuple[DistributionParams, DistributionParams]) -> None:
    old, new = pair
    doubled = old.map(lambda tensor: tensor.repeat(1, 2)).kl_divergence(new.map(lambda tensor: tensor.repeat(1, 2)))
    th.testing.assert_close(doubled, 2 * old.kl_divergence(new), rtol=1e-12, atol=1e-11)


def test_estimators_by_hand() -> None:
    # ratio 2: -ln 2, (ln 2)^2 / 2, (2 - 1) - ln 2
    log_ratio = th.tensor([2.0], dtype=th.float64).log()
    assert k1(log_ratio).item() == pytest.approx(-math.log(2), abs=EPS)
    assert k2(log_ratio).item() == pytest.approx(math.log(2) ** 2 / 2, abs=EPS)
    assert k3(log_ratio).item() == pytest.approx(1 - math.log(2), abs=EPS)


def test_k1_and_k3_are_unbiased() -> None:
    """Their expectation under the old policy, summed exactly over a categorical's actions, is the exact KL; k2's isn't."""
    old, new = distribution_params(categorical(1)), distribution_params(categorical(2))
    assert isinstance(old, CategoricalParams)
    assert isinstance(new, CategoricalParams)
    expectations = {
        name: (old.log_probs.exp() * estimator(new.log_probs - old.log_probs)).sum(dim=1)
        for name, estimator in ESTIMATORS.items()
    }
    th.testing.assert_close(expectations["k1"], old.kl_divergence(new), rtol=1e-13, atol=1e-14)
    th.testing.assert_close(expectations["k3"], old.kl_divergence(new), rtol=1e-13, atol=1e-14)
    assert (expectations["k2"] - old.kl_divergence(new)).abs().max() > 0.01


@given(hnp.arrays(np.float64, 10, elements=st.floats(-10, 10)).map(th.from_numpy))
def test_k2_and_k3_are_never_negative(log_ratio: th.Tensor) -> None:
    assert (k2(log_ratio) >= 0).all()
    assert (k3(log_ratio) >= -4 * EPS * log_ratio.exp().clamp(min=1)).all()


def test_box_spaces_with_several_axes_have_one_kl_a_state() -> None:
    """A policy's distribution over a (2, 2) action space is flat."""
    from stable_baselines3.common.policies import ActorCriticPolicy

    box = spaces.Box(-1, 1, (2, 2), np.float32)
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (3,), np.float32), box, lambda _: 1e-3)
    params = distribution_params(policy.get_distribution(th.zeros(7, 3)))
    assert params.kl_divergence(params).shape == (7,)
