"""
Action distributions with their gradients, operation by operation as autograd would run them.

Where several gradients reach one tensor, they are added in autograd's order, in which what was computed last comes first: KL,
then entropy, then log-probability.
"""

import functools
import math
from typing import Any

import torch as th

from sb3_ppo_variants.kl import CategoricalParams, GaussianParams

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))
ENTROPY_OF_UNIT_GAUSSIAN = 0.5 + 0.5 * math.log(2 * math.pi)


class GaussianHead:
    """
    Gaussian whose standard deviation doesn't depend on the state.

    :param log_std: ln sigma, shape (action_dim,)
    :param log_std_grad: where its gradient is written
    """

    params: GaussianParams
    """Of the latest minibatch."""

    def __init__(self, log_std: th.Tensor, log_std_grad: th.Tensor) -> None:
        self._log_std = log_std
        self._log_std_grad = log_std_grad

    def forward(self, mean: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Ln N(a; mu, sigma) = -(a - mu)^2 / 2 sigma^2 - ln sigma - ln sqrt(2 pi), and the entropy.

        :param mean: mu, shape (b, action_dim)
        :param actions: a, shape (b, action_dim)
        :return: each of shape (b,)
        """
        self._sigma = self._log_std.exp()
        std = th.ones_like(mean) * self._sigma
        self.params = GaussianParams(mean, std)
        self._shift = actions - mean
        self._two_var = 2 * std.pow(2)
        self._quotient = -self._shift.pow(2) / self._two_var
        log_std = std.log()
        log_prob = (self._quotient - log_std - LOG_SQRT_2PI).sum(dim=1)
        return log_prob, (ENTROPY_OF_UNIT_GAUSSIAN + log_std).sum(dim=1)

    def kl(self, old: GaussianParams) -> th.Tensor:
        """:meth:`GaussianParams.kl_divergence`, remembering what its gradient needs."""
        self._std_ratio = old.std / self.params.std
        self._variance_ratio = self._std_ratio.pow(2)
        self._standardized_shift = (old.mean - self.params.mean) / self.params.std
        shift = self._standardized_shift.pow(2)
        return 0.5 * (self._variance_ratio + shift - 1 - self._variance_ratio.log()).sum(dim=1)

    def backward(self, d_log_prob: th.Tensor, d_entropy: th.Tensor | None, d_kl: th.Tensor | None) -> th.Tensor:
        """
        The gradient at the mean; the one at ln sigma is written.

        :param d_log_prob: gradient of the loss at each log-probability, shape (b,)
        :param d_entropy: at each entropy, shape (), ``None`` for 0
        :param d_kl: at each KL, shape (), ``None`` for 0
        :return: shape (b, action_dim)
        """
        std = self.params.std
        d_log_prob = d_log_prob.unsqueeze(1).expand_as(std)
        d_mean = (d_log_prob / self._two_var) * (2 * self._shift)
        d_std = []
        if d_kl is not None:
            d_half = d_kl * 0.5
            d_shift = d_half * (2 * self._standardized_shift)
            d_ratio = (-d_half / self._variance_ratio + d_half) * (2 * self._std_ratio)
            d_mean = -(d_shift / std) + d_mean
            d_std += [-d_shift * (self._standardized_shift / std), -d_ratio * (self._std_ratio / std)]
        if d_entropy is not None:
            d_std.append(d_entropy / std)
        d_std.append(-d_log_prob / std)
        d_std.append((-d_log_prob * (self._quotient / self._two_var) * 2) * (2 * std))
        self._log_std_grad.copy_(functools.reduce(th.add, d_std).sum(dim=0) * self._sigma)
        return d_mean


class CategoricalHead:
    """
    One or several independent categorical distributions.

    :param sizes: numbers of actions, one a distribution
    """

    params: CategoricalParams
    """Of the latest minibatch."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def forward(self, output: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Ln p(a) = l_a - ln sum exp l, and the entropy -sum p ln p.

        :param output: logits l, side by side, shape (b, sum of sizes)
        :param actions: shape (b,) for one distribution, (b, n) for n
        :return: each of shape (b,)
        """
        self._logits = th.split(output, self._sizes, dim=1)
        self._lse = [logits.logsumexp(dim=-1, keepdim=True) for logits in self._logits]
        self._log_probs = [logits - lse for logits, lse in zip(self._logits, self._lse, strict=True)]
        self._probs = [th.softmax(log_probs, dim=-1) for log_probs in self._log_probs]
        columns = actions.long().reshape(len(output), -1).unbind(dim=1)
        self._actions = [column.unsqueeze(-1) for column in columns]
        chosen = [lp.gather(-1, a).squeeze(-1) for lp, a in zip(self._log_probs, self._actions, strict=True)]
        entropies = [-(lp * p).sum(-1) for lp, p in zip(self._log_probs, self._probs, strict=True)]
        if len(self._sizes) == 1:
            self.params = CategoricalParams(self._log_probs[0])
            return chosen[0], entropies[0]
        self.params = CategoricalParams(th.cat(self._log_probs, dim=1))
        return th.stack(chosen, dim=1).sum(dim=1), th.stack(entropies, dim=1).sum(dim=1)

    def kl(self, old: CategoricalParams) -> th.Tensor:
        """:meth:`CategoricalParams.kl_divergence`, remembering what its gradient needs."""
        self._old_probs = old.log_probs.exp()
        return old.kl_divergence(self.params)

    def backward(self, d_log_prob: th.Tensor, d_entropy: th.Tensor | None, d_kl: th.Tensor | None) -> th.Tensor:
        """
        The gradient at the logits.

        :param d_log_prob: gradient of the loss at each log-probability, shape (b,)
        :param d_entropy: at each entropy, shape (), ``None`` for 0
        :param d_kl: at each KL, shape (), ``None`` for 0
        :return: shape (b, sum of sizes)
        """
        grads = []
        d_kls: Any = None if d_kl is None else th.split(-(d_kl * self._old_probs), self._sizes, dim=1)
        for index, (log_probs, probs) in enumerate(zip(self._log_probs, self._probs, strict=True)):
            d_log_probs = [] if d_kls is None else [d_kls[index]]
            if d_entropy is not None:
                d_product = (-d_entropy).expand_as(probs)
                d_log_probs += [
                    th._softmax_backward_data(d_product * log_probs, probs, -1, probs.dtype),
                    d_product * probs,
                ]
            d_log_probs.append(th.zeros_like(log_probs).scatter_(1, self._actions[index], d_log_prob.unsqueeze(1)))
            d_normalized = functools.reduce(th.add, d_log_probs)
            d_lse = (-d_normalized).sum(dim=-1, keepdim=True)
            grads.append(d_normalized + d_lse * (self._logits[index] - self._lse[index]).exp())
        return grads[0] if len(grads) == 1 else th.cat(grads, dim=1)
