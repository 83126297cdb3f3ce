"""
Action distributions with their gradients, operation by operation as autograd would run them.

NumPy takes over where its bits are torch's, in sums, products and quotients of two numbers, as it needs a fraction of torch's
time for small arrays; torch keeps what libraries compute differently: exponentials, logarithms, and sums over an axis.

Where several gradients reach one tensor, they are added in autograd's order, in which what was computed last comes first: KL,
then entropy, then log-probability.
"""

import functools
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
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.float32 | None, d_output: np.ndarray
    ) -> None:
        """
        Write the gradient at the network's outputs.

        :param d_log_prob: gradient of the loss at each log-probability, shape (b,)
        :param d_entropy: at each entropy, ``None`` for 0
        :param d_kl: at each KL, ``None`` for 0
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
        self._log_std_grad = None if log_std_grad is None else log_std_grad.numpy()
        self._epsilon = th.empty(0)
        self._sums: dict[tuple[int, int], _Sums] = {}

    def forward(self, output: np.ndarray) -> None:
        """Mu is the output, sigma the parameter's exponential."""
        self._mean = output
        if self._log_std_array.tobytes() != self._log_std_bytes:
            self._log_std_bytes = self._log_std_array.tobytes()
            sigma = self._log_std.exp()
            self._sigma, self.dispersion = sigma.numpy(), sigma.log().numpy()
            self._two_var = 2 * (self._sigma * self._sigma)

    def params(self) -> GaussianParams:
        """Mu, and sigma for each state."""
        mean = th.from_numpy(self._mean.copy())
        return GaussianParams(mean, th.from_numpy(self._sigma).expand_as(mean).clone())

    def sample(self) -> np.ndarray:
        """Mu + epsilon sigma, epsilon ~ N(0, 1)."""
        if self._epsilon.shape != self._mean.shape:
            self._epsilon = th.empty(self._mean.shape)
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
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.float32 | None, d_output: np.ndarray
    ) -> None:
        """At mu; the gradient at ln sigma is written too. Signs and powers of two stand where they cost least."""
        d_each, sigma = d_log_prob[:, None], self._sigma
        np.divide(d_each, self._two_var / 2, out=d_output)
        d_output *= self._shift
        d_sigma = []
        if d_kl is not None:
            d_half = d_kl * np.float32(0.5)
            d_shift = d_half * (2 * self._standardized_shift)
            d_ratio = (-d_half / (self._std_ratio * self._std_ratio) + d_half) * (2 * self._std_ratio)
            d_output -= d_shift / sigma
            d_sigma += [-d_shift * (self._standardized_shift / sigma), -d_ratio * (self._std_ratio / sigma)]
        if d_entropy is not None:
            d_sigma.append(d_entropy / sigma)
        d_sigma.append(-(d_each / sigma))
        through_var = self._half_square / self._two_var
        through_var *= d_each
        through_var *= 4 * sigma
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
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._splits = np.cumsum(sizes)[:-1]

    def forward(self, output: np.ndarray) -> None:
        """The outputs are logits l, side by side; ln p = l - ln sum exp l."""
        if len(self._sizes) == 1:
            self.dispersion = output - _logsumexp(output)
            self._log_probs = [self.dispersion]
        else:
            self._log_probs = [logits - _logsumexp(logits) for logits in np.split(output, self._splits, axis=1)]
            self.dispersion = np.concatenate(self._log_probs, axis=1)

    def params(self) -> CategoricalParams:
        """All ln p."""
        return CategoricalParams(th.from_numpy(self.dispersion))

    def sample(self) -> np.ndarray:
        """As many draws as there are distributions."""
        draws = [_multinomial(th.from_numpy(log_probs).softmax(dim=-1)) for log_probs in self._log_probs]
        return draws[0] if len(draws) == 1 else np.stack(draws, axis=1)

    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """Ln p(a), summed over the distributions."""
        self._rows = np.arange(len(actions))
        self._actions = actions.astype(np.int64).reshape(len(actions), -1).T
        chosen = [lp[self._rows, a] for lp, a in zip(self._log_probs, self._actions, strict=True)]
        return chosen[0] if len(chosen) == 1 else _sum(np.stack(chosen, axis=1), axis=1)

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
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.float32 | None, d_output: np.ndarray
    ) -> None:
        """At the logits."""
        d_logits = np.split(d_output, self._splits, axis=1)
        d_kls = None if d_kl is None else np.split(-(d_kl * self._old_probs), self._splits, axis=1)
        for index, log_probs in enumerate(self._log_probs):
            d_log_probs = [] if d_kls is None else [d_kls[index]]
            if d_entropy is not None:
                probs = th.from_numpy(log_probs).softmax(dim=-1)
                d_product = -d_entropy
                d_probs = th.from_numpy(d_product * log_probs)
                through_probs = th._softmax_backward_data(d_probs, probs, -1, probs.dtype)
                d_log_probs += [through_probs.numpy(), d_product * probs.numpy()]
            d_chosen = np.zeros(log_probs.shape, dtype=np.float32)
            d_chosen[self._rows, self._actions[index]] = d_log_prob
            d_normalized = functools.reduce(np.add, [*d_log_probs, d_chosen])
            d_lse = _sum(-d_normalized, axis=-1)[:, None]
            np.add(d_normalized, d_lse * th.from_numpy(log_probs).exp().numpy(), out=d_logits[index])


class BernoulliHead(Head):
    """Independent Bernoulli distributions."""

    def forward(self, output: np.ndarray) -> None:
        """The outputs are logits l; p = sigmoid(l)."""
        self.dispersion = output.copy()
        self._logits = th.from_numpy(self.dispersion)
        self._probs = self._logits.sigmoid()

    def params(self) -> BernoulliParams:
        """All l."""
        return BernoulliParams(self._logits)

    def sample(self) -> np.ndarray:
        """One draw each."""
        actions: np.ndarray = th.bernoulli(self._probs.nan_to_num()).numpy()  # NaN is refused later, in SB3's words
        return actions

    def log_prob(self, actions: np.ndarray) -> np.ndarray:
        """-(ln(1 + e^l) - a l), summed over the distributions."""
        self._actions = actions
        return -_sum(_cross_entropy(self._logits, th.from_numpy(actions)).numpy(), axis=1)

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
        self, d_log_prob: np.ndarray, d_entropy: np.float32 | None, d_kl: np.float32 | None, d_output: np.ndarray
    ) -> None:
        """At the logits."""
        logits, probs = self._logits, self._probs.numpy()
        d_logits = []
        if d_kl is not None:
            # Not as a full matrix: the last bit of torch's softplus depends on how its operands lie in memory.
            d_each = th.full((len(logits),), d_kl.item()).unsqueeze(1).expand_as(logits)
            d_softplus = th.ops.aten.softplus_backward.default(d_each, logits, 1, 20)
            d_logits += [d_softplus.numpy(), -(d_kl * self._old_probs)]
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
        return CategoricalHead([int(size) for size in distribution.action_dims])
    assert isinstance(distribution, CategoricalDistribution)
    return CategoricalHead([distribution.action_dim])


def _cross_entropy(logits: th.Tensor, targets: th.Tensor) -> th.Tensor:
    return th.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class _Sums:
    """
    Sums over an axis, in torch's order, in memory that torch and NumPy share.

    :param shape: of the terms
    :param axis: that is summed over
    """

    terms: np.ndarray
    """To be written before the sums are asked for."""

    def __init__(self, shape: tuple[int, ...], axis: int) -> None:
        terms = th.empty(shape)
        sums = th.empty(shape[1 - axis])
        self.terms = terms.numpy()
        self._sums = sums.numpy()
        self._add_up = functools.partial(th.sum, terms, axis, out=sums)

    def __call__(self) -> np.ndarray:
        """The sums, until they are asked for again."""
        self._add_up()
        return self._sums


def _sum(array: np.ndarray, axis: int) -> np.ndarray:
    """A sum over an axis, in torch's order."""
    result: np.ndarray = th.from_numpy(array).sum(axis).numpy()
    return result


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    """``torch.logsumexp`` over the last axis, which is kept, in its bits."""
    largest = logits.max(axis=-1, keepdims=True)
    total = th.from_numpy(logits - largest).exp_().sum(dim=-1, keepdim=True)
    return total.log_().numpy() + largest  # type: ignore[no-any-return]


def _multinomial(probs: th.Tensor) -> np.ndarray:
    """``torch.multinomial`` for one draw: the first arrival of processes with these rates, by the same random numbers."""
    arrivals = th.empty_like(probs).exponential_()
    return np.argmax(probs.numpy() / arrivals.numpy(), axis=-1)  # type: ignore[no-any-return]
