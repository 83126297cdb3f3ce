"""
The Kullback-Leibler divergence between the old and the new policy: exact, and estimated from samples.

Throughout, KL is KL(old || new), in nats, summed over action dimensions, one value a state.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn.functional import softplus

SelfDistributionParams = TypeVar("SelfDistributionParams", bound="DistributionParams")


@dataclass(frozen=True)
class DistributionParams(ABC):
    """
    The parameters of one action distribution for each of ``b`` states.

    SB3's policies reuse a single mutable distribution object, in which the old policy would turn into the new one;
    these stay what they were.
    """

    @abstractmethod
    def kl_divergence(self: SelfDistributionParams, new: SelfDistributionParams) -> th.Tensor:
        """
        Exact KL(self || new).

        :param new: parameters of the same kind, for the same states
        :return: shape (b,), in nats
        """

    def map(self: SelfDistributionParams, function: Callable[[th.Tensor], th.Tensor]) -> SelfDistributionParams:
        """Apply ``function`` to each of the tensors."""
        return type(self)(*(function(tensor) for tensor in self.tensors()))

    def tensors(self) -> tuple[th.Tensor, ...]:
        """The tensors, each of shape (b, ...)."""
        return tuple(vars(self).values())

    @classmethod
    def cat(cls: type[SelfDistributionParams], chunks: Sequence[SelfDistributionParams]) -> SelfDistributionParams:
        """Join the parameters of several batches of states."""
        return cls(*(th.cat(tensors) for tensors in zip(*(chunk.tensors() for chunk in chunks), strict=True)))


@dataclass(frozen=True)
class GaussianParams(DistributionParams):
    """
    Gaussian with a diagonal covariance: mean and standard deviation, each of shape (b, action_dim).

    Also for gSDE, and for a squashed Gaussian, by its base: KL is invariant under a bijection of the actions.
    """

    mean: th.Tensor
    std: th.Tensor

    def kl_divergence(self, new: "GaussianParams") -> th.Tensor:
        r""":math:`\sum_i \frac12 (\sigma_i^2/\sigma_i'^2 + (\mu_i-\mu_i')^2/\sigma_i'^2 - 1 - \ln \sigma_i^2/\sigma_i'^2)`"""
        variance_ratio = (self.std / new.std).pow(2)
        standardized_shift = ((self.mean - new.mean) / new.std).pow(2)
        return 0.5 * (variance_ratio + standardized_shift - 1 - variance_ratio.log()).sum(dim=1)


@dataclass(frozen=True)
class CategoricalParams(DistributionParams):
    """
    One or several independent categorical distributions: log-probabilities, side by side, of shape (b, sum of sizes).

    KL adds up over independent distributions, so that one sum serves Categorical and MultiCategorical alike.
    """

    log_probs: th.Tensor

    def kl_divergence(self, new: "CategoricalParams") -> th.Tensor:
        r""":math:`\sum_i p_i (\ln p_i - \ln p_i')`, where :math:`0 \ln 0 = 0`, as for masked actions"""
        probs = self.log_probs.exp()
        return th.where(probs > 0, probs * (self.log_probs - new.log_probs), 0.0).sum(dim=1)


@dataclass(frozen=True)
class BernoulliParams(DistributionParams):
    """Independent Bernoulli distributions: logits of shape (b, action_dim)."""

    logits: th.Tensor

    def kl_divergence(self, new: "BernoulliParams") -> th.Tensor:
        r""":math:`\sum_i p_i (l_i - l_i') - \ln(1+e^{l_i}) + \ln(1+e^{l_i'})`, as :math:`\ln(1-p) = -\ln(1+e^l)`"""
        shift = self.logits - new.logits
        return (self.logits.sigmoid() * shift - softplus(self.logits) + softplus(new.logits)).sum(dim=1)


@functools.singledispatch
def distribution_params(distribution: Distribution) -> DistributionParams:
    """
    Read the parameters of an action distribution of a kind that is registered here, or of a subclass.

    :param distribution: set up for a batch of ``b`` states
    :return: its parameters, which later changes of ``distribution`` leave alone; gradients flow through them
    :raises TypeError: if no exact KL is known for this kind of distribution, or what a subclass has put into it
    """
    raise _unknown(distribution, getattr(distribution, "distribution", None))


@distribution_params.register(DiagGaussianDistribution)
@distribution_params.register(StateDependentNoiseDistribution)
def _gaussian_params(distribution: Any) -> GaussianParams:
    inner = distribution.distribution
    if not isinstance(inner, Normal):
        raise _unknown(distribution, inner)
    return GaussianParams(inner.mean, inner.stddev)


@distribution_params.register(CategoricalDistribution)
def categorical_params(distribution: Any) -> CategoricalParams:
    """Of what has one of torch's categorical distributions."""
    inner = distribution.distribution
    if not isinstance(inner, Categorical):
        raise _unknown(distribution, inner)
    return CategoricalParams(inner.logits)


@distribution_params.register(MultiCategoricalDistribution)
def multi_categorical_params(distribution: Any) -> CategoricalParams:
    """Of what has several of torch's categorical distributions."""
    inner = getattr(distribution, "distributions", None) or distribution.distribution
    if not isinstance(inner, list) or not inner or not all(isinstance(each, Categorical) for each in inner):
        raise _unknown(distribution, inner)
    return CategoricalParams(th.cat([categorical.logits for categorical in inner], dim=1))


@distribution_params.register(BernoulliDistribution)
def _bernoulli_params(distribution: Any) -> BernoulliParams:
    inner = distribution.distribution
    if not isinstance(inner, Bernoulli):
        raise _unknown(distribution, inner)
    return BernoulliParams(inner.logits)


def _unknown(distribution: Any, inner: Any) -> TypeError:
    return TypeError(
        f"no exact KL is known for the action distribution {type(distribution).__name__} of {type(inner).__name__}"
    )


def exact_kl_known() -> tuple[type, ...]:
    """Action distributions, with their subclasses, whose exact KL is known."""
    return tuple(kind for kind in distribution_params.registry if kind is not object)


def k1(log_ratio: th.Tensor) -> th.Tensor:
    """
    Unbiased, high variance: -ln r. From Schulman's note "Approximating KL divergence", joschu.net/blog/kl-approx.html.

    :param log_ratio: ln r = ln pi_new(a|s) - ln pi_old(a|s) for actions drawn from the old policy, any shape
    :return: estimates of KL(old || new), of the same shape; their mean is the estimate
    """
    return -log_ratio


def k2(log_ratio: th.Tensor) -> th.Tensor:
    """Biased, low variance: (ln r)^2 / 2. Parameters and source as for :func:`k1`."""
    return log_ratio.pow(2) / 2


def k3(log_ratio: th.Tensor) -> th.Tensor:
    """
    Unbiased, low variance, never negative: (r - 1) - ln r. Parameters and source as for :func:`k1`.

    Its mean is SB3's ``train/approx_kl`` (SB3 PR #419), to the last bit.
    """
    return (th.exp(log_ratio) - 1) - log_ratio


ESTIMATORS: dict[str, Callable[[th.Tensor], th.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
