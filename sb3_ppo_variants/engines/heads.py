"""
Action distributions with their gradients, operation by operation as autograd would run them.

NumPy takes over where its bits are torch's, in sums, products and quotients of two numbers, as it needs a fraction of torch's
time for small arrays; torch keeps what libraries compute differently: exponentials, logarithms, and sums over an axis.

Where several gradients reach one tensor, they are added in autograd's order, in which what was computed last comes first: KL,
then entropy, then log-probability.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)

from sb3_ppo_variants.engines.deferred import DeferredBernoulli, DeferredCategorical, DeferredNormal
from sb3_ppo_variants.kl import BernoulliParams, CategoricalParams, DistributionParams, GaussianParams

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))
ENTROPY_OF_UNIT_GAUSSIAN = 0.5 + 0.5 * math.log(2 * math.pi)


class Head(ABC):
    """The action distributions that a network's outputs stand for; each method speaks of the latest :meth:`forward`."""

    dispersion: np.ndarray
    """What the entropy depends on; stays what it is."""

    @abstractmethod
    def forward(self, output: np.ndarray) -> None:
        """
        Set the distributions.

        :param output: of the network, shape (b, n_out)
        """

    @abstractmethod
    def params(self) -> DistributionParams:
        """The distributions' parameters."""

    @abstractmethod
    def distribution(self) -> th.distributions.Distribution | list[th.distributions.Distribution]:
        """What SB3's ``action_dist.distribution`` would be."""

    @abstractmethod
    def sample(self) -> np.ndarray:
        """Actions, as SB3's distributions draw them, shape (b, action_dim), without the last axis for Discrete."""

    @abstractmethod
    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """
        The log-probabilities of actions.

        :param actions: as drawn, or as the rollout buffer keeps them, shape (b, action_dim)
        :return: shape (b,)
        """

    @abstractmethod
    def kl(self, old: DistributionParams) -> th.Tensor:
        """:meth:`~sb3_ppo_variants.kl.DistributionParams.kl_divergence` from old distributions, shape (b,)."""

    @abstractmethod
    def backward(
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.ndarray | None, d_output: np.ndarray
    ) -> None:
        """
        Write the gradient at the network's outputs.

        :param d_log_prob: gradient of the loss at each log-probability, shape (b,)
        :param d_entropy: at each entropy, ``None`` for 0
        :param d_kl: at each KL, shape (b,), ``None`` for 0
        :param d_output: where it goes, shape (b, n_out)
        """

    @abstractmethod
    def entropy(self, dispersions: Sequence[np.ndarray], n_samples: int) -> th.Tensor:
        """
        The entropies of the distributions of ``m`` minibatches.

        :param dispersions: of each minibatch
        :param n_samples: b, of each minibatch
        :return: shape (m, b)
        """


class GaussianHead(Head):
    """
    Gaussian whose standard deviation doesn't depend on the state.

    :param log_std: ln sigma, shape (action_dim,)
    :param log_std_grad: where its gradient is written, ``None`` if there will be none
    """

    def __init__(self, log_std: th.Tensor, log_std_grad: th.Tensor | None = None) -> None:
        self._log_std = log_std
        self._log_std_array = log_std.numpy()
        self._log_std_bytes = b""
        self._exp, self._log = th.empty_like(log_std), th.empty_like(log_std)
        self._log_std_grad = None if log_std_grad is None else log_std_grad.numpy()
        self._epsilon = th.empty(0, dtype=th.float32)
        self._sums: dict[tuple[int, int], _Sums] = {}

    def forward(self, output: np.ndarray) -> None:
        """Mu is the output, sigma the parameter's exponential."""
        self._mean = output
        if self._log_std_array.tobytes() != self._log_std_bytes:
            self._log_std_bytes = self._log_std_array.tobytes()
            th.exp(self._log_std, out=self._exp)
            th.log(self._exp, out=self._log)
            self._sigma, self.dispersion = self._exp.numpy(), self._log.numpy().copy()
            self._var = self._sigma * self._sigma
            self._two_var, self._four_sigma = 2 * self._var, 4 * self._sigma

    def params(self) -> GaussianParams:
        """Mu, and sigma for each state."""
        mean = th.from_numpy(self._mean.copy())
        return GaussianParams(mean, th.from_numpy(self._sigma).expand_as(mean).clone())

    def distribution(self) -> th.distributions.Distribution:
        """A ``Normal``."""
        return DeferredNormal(self._mean.copy(), self._sigma.copy())

    def sample(self) -> np.ndarray:
        """Mu + epsilon sigma, epsilon ~ N(0, 1)."""
        if self._epsilon.shape != self._mean.shape:
            self._epsilon = th.empty(self._mean.shape, dtype=th.float32)
            self._epsilon_array = self._epsilon.numpy()
        self._epsilon.normal_()
        actions: np.ndarray = self._epsilon_array * self._sigma
        actions += self._mean
        return actions

    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """-((a - mu)^2 / 2 sigma^2 + ln sigma + ln sqrt(2 pi)), summed over the action's dimensions."""
        self._shift = shift = actions - self._mean
        self._half_square = half_square = shift * shift
        half_square /= self._two_var
        total = self._sum(1)
        np.add(half_square, self.dispersion, out=total.terms)
        total.terms += LOG_SQRT_2PI
        return -total()

    def entropy(self, dispersions: Sequence[np.ndarray], n_samples: int) -> th.Tensor:
        """1/2 + ln sqrt(2 pi) + ln sigma, summed over the action's dimensions: the same for all states."""
        entropies = (ENTROPY_OF_UNIT_GAUSSIAN + th.from_numpy(np.stack(dispersions))).sum(dim=1, keepdim=True)
        return entropies.repeat(1, n_samples)

    def kl(self, old: DistributionParams) -> th.Tensor:
        """The Gaussians' KL, remembering what its gradient needs."""
        assert isinstance(old, GaussianParams)
        self._std_ratio = old.std.numpy() / self._sigma
        self._standardized_shift = (old.mean.numpy() - self._mean) / self._sigma
        return old.kl_divergence(self.params())

    def backward(
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.ndarray | None, d_output: np.ndarray
    ) -> None:
        """At mu; the gradient at ln sigma is written too. Signs and powers of two stand where they cost least."""
        d_each, sigma = d_log_prob[:, None], self._sigma
        np.divide(d_each, self._var, out=d_output)
        d_output *= self._shift
        d_sigma = []
        if d_kl is not None:
            d_half = d_kl[:, None] * np.float32(0.5)
            d_shift = d_half * (2 * self._standardized_shift)
            d_ratio = (-d_half / (self._std_ratio * self._std_ratio) + d_half) * (2 * self._std_ratio)
            d_output -= d_shift / sigma
            d_sigma += [-d_shift * (self._standardized_shift / sigma), -d_ratio * (self._std_ratio / sigma)]
        if d_entropy is not None:
            d_sigma.append(d_entropy / sigma)
        d_sigma.append(-(d_each / sigma))
        through_var = self._half_square / self._two_var
        through_var *= d_each
        through_var *= self._four_sigma
        total = self._sum(0)
        np.add(functools.reduce(np.add, d_sigma), through_var, out=total.terms)
        np.multiply(total(), sigma, out=self._log_std_grad)

    def _sum(self, axis: int) -> "_Sums":
        key = (axis, len(self._mean))
        if key not in self._sums:
            self._sums[key] = _Sums(self._mean.shape, axis)
        return self._sums[key]


class CategoricalHead(Head):
    """
    One or several independent categorical distributions.

    :param sizes: numbers of actions, one a distribution
    :param several: whether the action has an axis for them, even if there is but one
    """

    def __init__(self, sizes: list[int], several: bool) -> None:
        self._sizes = sizes
        self._several = several
        self._bounds = [slice(stop - size, stop) for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]
        self._at_work: dict[int, list[_Categorical]] = {}

    def forward(self, output: np.ndarray) -> None:
        """The outputs are logits, side by side."""
        n_samples = len(output)
        self._logits = output
        if n_samples not in self._at_work:
            self._at_work[n_samples] = [_Categorical(n_samples, size) for size in self._sizes]
        self._parts = self._at_work[n_samples]
        log_probs = [part.forward(output[:, columns]) for part, columns in zip(self._parts, self._bounds, strict=True)]
        self.dispersion = log_probs[0] if len(log_probs) == 1 else np.concatenate(log_probs, axis=1)

    def params(self) -> CategoricalParams:
        """All ln p."""
        return CategoricalParams(th.from_numpy(self.dispersion.copy()))

    def distribution(self) -> th.distributions.Distribution | list[th.distributions.Distribution]:
        """A ``Categorical``, or a list of them."""
        logits = self._logits.copy()
        if not self._several:
            return DeferredCategorical(logits)
        return [DeferredCategorical(logits[:, columns]) for columns in self._bounds]

    def sample(self) -> np.ndarray:
        """As many draws as there are distributions."""
        draws = [part.sample() for part in self._parts]
        return draws[0] if len(draws) == 1 else np.stack(draws, axis=1)

    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """Ln p(a), summed over the distributions."""
        columns = actions.astype(np.int64).reshape(len(actions), -1).T
        log_probs = [part.log_prob(column) for part, column in zip(self._parts, columns, strict=True)]
        return log_probs[0] if len(log_probs) == 1 else _sum(np.stack(log_probs, axis=1), axis=1)

    def entropy(self, dispersions: Sequence[np.ndarray], n_samples: int) -> th.Tensor:
        """- sum p ln p, summed over the distributions."""
        log_probs = th.split(th.from_numpy(np.stack(dispersions)), self._sizes, dim=-1)
        entropies = [-(lp * lp.softmax(dim=-1)).sum(dim=-1) for lp in log_probs]
        return entropies[0] if len(entropies) == 1 else th.stack(entropies, dim=-1).sum(dim=-1)

    def kl(self, old: DistributionParams) -> th.Tensor:
        """The distributions' KL, remembering what its gradient needs."""
        assert isinstance(old, CategoricalParams)
        self._old_probs = old.log_probs.exp().numpy()
        return old.kl_divergence(self.params())

    def backward(
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.ndarray | None, d_output: np.ndarray
    ) -> None:
        """At the logits."""
        d_kls = None if d_kl is None else -(d_kl[:, None] * self._old_probs)
        for part, columns in zip(self._parts, self._bounds, strict=True):
            part.backward(d_log_prob, d_entropy, None if d_kls is None else d_kls[:, columns], d_output[:, columns])


class _Categorical:
    """
    One categorical distribution at work on ``b`` states.

    :param n_samples: b
    :param size: number of actions
    """

    def __init__(self, n_samples: int, size: int) -> None:
        self._rows = np.arange(n_samples)
        self._shifted, self._shifted_array = _shared(n_samples, size)
        self._total, self._total_array = _shared(n_samples, 1)
        self._arrivals, self._arrivals_array = _shared(n_samples, size)
        self._log_probs = self._shifted_array

    def forward(self, logits: np.ndarray) -> np.ndarray:
        """Ln p = l - ln sum exp l, by way of the largest l, as ``torch.logsumexp``; shape (b, size)."""
        largest = logits.max(axis=1, keepdims=True)
        np.subtract(logits, largest, out=self._shifted_array)
        th.exp(self._shifted, out=self._shifted)
        th.sum(self._shifted, 1, keepdim=True, out=self._total)
        th.log(self._total, out=self._total)
        self._log_probs = logits - (self._total_array + largest)
        return self._log_probs

    def sample(self) -> np.ndarray:
        """The first arrival of Poisson processes with rates p, which is what ``torch.multinomial`` draws; shape (b,)."""
        probs: np.ndarray = th.from_numpy(self._log_probs).softmax(-1).numpy()
        self._arrivals.exponential_()
        probs /= self._arrivals_array
        actions: np.ndarray = probs.argmax(axis=1)
        return actions

    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """Ln p(a), shape (b,)."""
        self._actions = actions
        chosen: np.ndarray = self._log_probs[self._rows, actions]
        return chosen

    def backward(
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.ndarray | None, d_logits: np.ndarray
    ) -> None:
        """As :meth:`Head.backward`, but for ``d_kl``, which is the gradient at ln p, shape (b, size)."""
        log_probs = th.from_numpy(self._log_probs)
        d_log_probs = [] if d_kl is None else [d_kl]
        if d_entropy is not None:
            probs = log_probs.softmax(dim=-1)
            d_product = -d_entropy
            through_probs = th._softmax_backward_data(th.from_numpy(d_product * self._log_probs), probs, -1, probs.dtype)
            d_log_probs += [through_probs.numpy(), d_product * probs.numpy()]
        d_chosen = np.zeros(log_probs.shape, dtype=np.float32)
        d_chosen[self._rows, self._actions] = d_log_prob
        d_normalized = functools.reduce(np.add, [*d_log_probs, d_chosen])
        np.negative(d_normalized, out=self._shifted_array)
        th.sum(self._shifted, 1, keepdim=True, out=self._total)
        th.exp(log_probs, out=self._shifted)
        np.add(d_normalized, self._total_array * self._shifted_array, out=d_logits)


class BernoulliHead(Head):
    """Independent Bernoulli distributions."""

    def forward(self, output: np.ndarray) -> None:
        """The outputs are logits l; p = sigmoid(l)."""
        self.dispersion = output.copy()
        self._logits = th.from_numpy(self.dispersion)
        self._probs = self._logits.sigmoid()

    def params(self) -> BernoulliParams:
        """All l."""
        return BernoulliParams(th.from_numpy(self.dispersion.copy()))

    def distribution(self) -> th.distributions.Distribution:
        """A ``Bernoulli``."""
        return DeferredBernoulli(self.dispersion.copy())

    def sample(self) -> np.ndarray:
        """One draw each."""
        actions: np.ndarray = th.bernoulli(self._probs.nan_to_num()).numpy()  # NaN is refused later, in SB3's words
        return actions

    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """-(ln(1 + e^l) - a l), summed over the distributions."""
        self._actions = actions
        return _sum(-_cross_entropy(self._logits, th.from_numpy(actions)).numpy(), axis=1)

    def entropy(self, dispersions: Sequence[np.ndarray], n_samples: int) -> th.Tensor:
        """Ln(1 + e^l) - p l, summed over the distributions."""
        # One by one: the last bit of torch's sigmoid depends on where in memory a number stands.
        logits = map(th.from_numpy, dispersions)
        return th.stack([_cross_entropy(each, each.sigmoid()).sum(dim=1) for each in logits])

    def kl(self, old: DistributionParams) -> th.Tensor:
        """The distributions' KL, remembering what its gradient needs."""
        assert isinstance(old, BernoulliParams)
        self._old_probs = old.logits.sigmoid().numpy()
        return old.kl_divergence(self.params())

    def backward(
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.ndarray | None, d_output: np.ndarray
    ) -> None:
        """At the logits."""
        logits, probs = self._logits, self._probs.numpy()
        d_logits = []
        if d_kl is not None:
            # Not as a full matrix: the last bit of torch's softplus depends on how its operands lie in memory.
            d_each = th.from_numpy(d_kl).unsqueeze(1).expand_as(logits)
            d_softplus = th.ops.aten.softplus_backward.default(d_each, logits, 1, 20)
            d_logits += [d_softplus.numpy(), -(d_kl[:, None] * self._old_probs)]
        if d_entropy is not None:
            d_probs = th.from_numpy(-self.dispersion * d_entropy)
            d_logits.append(th.ops.aten.sigmoid_backward.default(d_probs, self._probs).numpy())
        d_logits.append((probs - self._actions) * -d_log_prob[:, None])
        d_output[:] = functools.reduce(np.add, d_logits)


def make_head(distribution: Distribution, tensors: dict[str, th.Tensor], log_std_grad: th.Tensor | None = None) -> Head:
    """
    The head that stands in for an SB3 distribution.

    :param distribution: of the policy
    :param tensors: the policy's parameters by name
    :param log_std_grad: where the gradient at ``log_std`` is written
    """
    if isinstance(distribution, DiagGaussianDistribution):
        return GaussianHead(tensors["log_std"].detach(), log_std_grad)
    if isinstance(distribution, BernoulliDistribution):
        return BernoulliHead()
    if isinstance(distribution, MultiCategoricalDistribution):
        return CategoricalHead([int(size) for size in distribution.action_dims], several=True)
    assert isinstance(distribution, CategoricalDistribution)
    return CategoricalHead([distribution.action_dim], several=False)


def _cross_entropy(logits: th.Tensor, targets: th.Tensor) -> th.Tensor:
    return th.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def any_nan(array: np.ndarray) -> bool:
    """Whether any number of a vector is NaN, in the fastest way to ask: its square is added to all others."""
    return math.isnan(array.dot(array))


class _Sums:
    """
    Sums over an axis, in torch's order.

    :param shape: of the terms
    :param axis: that is summed over
    """

    terms: np.ndarray
    """To be written before the sums are asked for."""

    def __init__(self, shape: tuple[int, ...], axis: int) -> None:
        terms, self.terms = _shared(*shape)
        sums, self._sums = _shared(shape[1 - axis])
        self._add_up = functools.partial(th.sum, terms, axis, out=sums)

    def __call__(self) -> np.ndarray:
        """The sums, until they are asked for again."""
        self._add_up()
        return self._sums


def _shared(*shape: int) -> tuple[th.Tensor, np.ndarray]:
    """Memory that torch and NumPy share: conversions would cost more than most operations on so few numbers."""
    tensor = th.empty(shape, dtype=th.float32)
    return tensor, tensor.numpy()


def _sum(array: np.ndarray, axis: int) -> np.ndarray:
    """A sum over an axis, in torch's order."""
    result: np.ndarray = th.from_numpy(array).sum(axis).numpy()
    return result
