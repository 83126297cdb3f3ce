"""
The losses of PPO, as pure functions: tensors of one minibatch in, (loss, metrics) out.

Equation numbers are those of Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347.
Every operation, and the order of the sums, is SB3's, so that the gradients are the same to the last bit.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch as th
from torch.nn import functional as F

from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.kl import k3

Metrics: TypeAlias = dict[str, th.Tensor]
Mean: TypeAlias = Callable[[th.Tensor], th.Tensor]


LARGE_MINIBATCH = 2**14
"""Samples from which on torch may share out a sum over one minibatch among threads, which changes its order."""


def mean_of_each(samples: th.Tensor) -> th.Tensor:
    """
    In place of ``th.mean``, for several minibatches at once, in the bits that each has alone.

    :param samples: of ``m`` minibatches, shape (m, b)
    :return: shape (m,)
    """
    if samples.shape[-1] >= LARGE_MINIBATCH:
        return th.stack([minibatch.mean() for minibatch in samples])
    return samples.mean(dim=-1)


SURROGATES = ("clip", "spo")
"""What may become of the bounds of the ratio."""


class Coefficients(NamedTuple):
    """
    The coefficients in effect during one update.

    :param clip_range: how far the ratio may fall below 1 and rise above it, ``None`` for no bounds
    :param clip_range_vf: the same for the values, in units of the return, ``None`` for none
    :param normalize_advantage: whether advantages are normalised within the minibatch
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss, ``None`` where the critic is not part of this loss
    :param kl_coef: beta, weight of the KL penalty
    :param hinge_coef: weight of the hinge on the mean KL
    :param hinge_kl: the mean KL from which on the hinge acts, in nats
    :param surrogate: what becomes of the ratio's bounds: ``"clip"`` or ``"spo"``
    :param dual_clip: the least multiple of a negative advantage that counts, ``None`` for no such bound
    :param kl_rollback: the KL in nats from which on the penalty acts, ``None`` for 0
    """

    clip_range: tuple[float, float] | None
    clip_range_vf: float | None
    normalize_advantage: bool
    ent_coef: float
    vf_coef: float | None
    kl_coef: float
    hinge_coef: float
    hinge_kl: float
    surrogate: str = "clip"
    dual_clip: float | None = None
    kl_rollback: float | None = None

    @property
    def critic_apart(self) -> bool:
        """Whether the critic has passes of its own."""
        return self.vf_coef is None

    @property
    def penalizes_kl(self) -> bool:
        """Whether the loss has a KL penalty."""
        return self.kl_coef > 0 or self.hinge_coef > 0


class Evaluation(NamedTuple):
    """
    What the current policy says of the ``b`` samples of a minibatch.

    :param values: of the states, shape (b,), ``None`` where the critic is not part of this loss
    :param log_prob: of the actions, shape (b,)
    :param entropy: of the action distributions, shape (b,), ``None`` if no closed form is known
    :param kl: exact KL(old || new), shape (b,), in nats, ``None`` if it is not known
    """

    values: th.Tensor | None
    log_prob: th.Tensor
    entropy: th.Tensor | None
    kl: th.Tensor | None


class Samples(NamedTuple):
    """
    What the rollout says of the ``b`` samples of a minibatch; every tensor is of shape (b,).

    :param old_values: the old critic's values of the states
    :param old_log_prob: the old policy's log-probabilities of the actions
    :param advantages: the actions' advantages
    :param returns: targets of the critic
    """

    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


def normalize(advantages: th.Tensor) -> th.Tensor:
    """
    Advantages with mean 0 and standard deviation 1 within the minibatch; a single one stays as it is (SB3 issue #325).

    :param advantages: shape (b,)
    :return: shape (b,)
    """
    if len(advantages) == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def normalize_each(advantages: th.Tensor, batch_size: int) -> th.Tensor:
    """
    :func:`normalize` of each minibatch, in the bits that it has alone.

    :param advantages: of an epoch, in its order, shape (n_samples,)
    :param batch_size: samples a minibatch, the last one may have fewer
    :return: shape (n_samples,)
    """
    n_rest = len(advantages) % batch_size
    if batch_size == 1 or batch_size >= LARGE_MINIBATCH:
        return th.cat([normalize(minibatch) for minibatch in th.split(advantages, batch_size)])
    minibatches, rest = advantages[: len(advantages) - n_rest].view(-1, batch_size), advantages[len(advantages) - n_rest :]
    mean = minibatches.mean(dim=1, keepdim=True)
    # As torch's `std` of a vector: squares in float64, added up one after the other.
    squares = (minibatches.double() - mean.double()).square().cumsum(dim=1)[:, -1:]
    std = (squares / (batch_size - 1)).sqrt().float()
    normalized = ((minibatches - mean) / (std + 1e-8)).flatten()
    return th.cat([normalized, normalize(rest)]) if n_rest > 0 else normalized


def normalize_over_ranks(advantages: th.Tensor, batch_size: int, ranks: Ranks) -> th.Tensor:
    """
    :func:`normalize` of minibatches of which each rank has an equal part; for all ranks to call.

    :param advantages: of this rank's part, in its order, shape (n_samples,)
    :param batch_size: samples of a minibatch on this rank, the last one may have fewer
    :param ranks: the ranks
    :return: shape (n_samples,)
    """
    parts = th.split(advantages.double(), batch_size)
    moments = th.stack([th.stack([part.sum(), part.square().sum()]) for part in parts])
    sizes = th.tensor([len(part) for part in parts], dtype=th.float64, device=advantages.device)
    ranks.average(moments)
    mean, mean_square = (moments / sizes[:, None]).T
    n_samples = sizes * ranks.size
    std = ((mean_square - mean.square()).clamp(min=0) * n_samples / (n_samples - 1)).sqrt()
    each = th.repeat_interleave(sizes.long())
    normalized: th.Tensor = (advantages - mean[each]) / (std[each] + 1e-8)
    return normalized.float()


def surrogate(ratio: th.Tensor, advantages: th.Tensor, mean: Mean = th.mean) -> th.Tensor:
    """
    The conservative policy iteration objective of eq. 6, to be maximised: E[r A].

    :param ratio: r = pi_new(a|s) / pi_old(a|s), shape (b,)
    :param advantages: A, shape (b,)
    :return: shape ()
    """
    return mean(advantages * ratio)


def clipped_surrogate(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: tuple[float, float],
    dual_clip: float | None = None,
    mean: Mean = th.mean,
) -> th.Tensor:
    """
    The clipped surrogate objective of eq. 7, to be maximised: E[min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)].

    With a larger epsilon above 1 than below it is "clip-higher" (DAPO, Yu et al. 2025, arXiv 2503.14476). With dual clip it
    is, where A < 0, not less than c A (Ye et al. 2020, arXiv 1912.09729, eq. 5).

    :param ratio: r = pi_new(a|s) / pi_old(a|s), shape (b,)
    :param advantages: A, shape (b,)
    :param clip_range: epsilon below 1, and above
    :param dual_clip: c, greater than 1, ``None`` for no such bound
    :return: shape ()
    """
    low, high = clip_range
    clipped = th.min(advantages * ratio, advantages * th.clamp(ratio, 1 - low, 1 + high))
    if dual_clip is not None:
        clipped = th.max(clipped, th.where(advantages < 0, dual_clip * advantages, -math.inf))
    return mean(clipped)


def spo_surrogate(ratio: th.Tensor, advantages: th.Tensor, clip_range: float, mean: Mean = th.mean) -> th.Tensor:
    """
    The objective of Simple Policy Optimization, to be maximised: E[r A - |A| / (2 epsilon) (r - 1)^2].

    Its maximum for each sample is at the ratio where clipping would begin (Xie et al. 2024, arXiv 2401.16025).

    :param ratio: r = pi_new(a|s) / pi_old(a|s), shape (b,)
    :param advantages: A, shape (b,)
    :param clip_range: epsilon
    :return: shape ()
    """
    return mean(advantages * ratio - advantages.abs() / (2 * clip_range) * (ratio - 1).pow(2))


def policy_objective(ratio: th.Tensor, advantages: th.Tensor, coefs: Coefficients, mean: Mean = th.mean) -> th.Tensor:
    """
    The surrogate objective that the coefficients choose, to be maximised.

    :param ratio: r = pi_new(a|s) / pi_old(a|s), shape (b,)
    :param advantages: A, shape (b,)
    :param coefs: the coefficients in effect
    :return: shape ()
    """
    if coefs.clip_range is None:
        return surrogate(ratio, advantages, mean)
    if coefs.surrogate == "spo":
        return spo_surrogate(ratio, advantages, coefs.clip_range[0], mean)
    return clipped_surrogate(ratio, advantages, coefs.clip_range, coefs.dual_clip, mean)


def rolls_back(kl: th.Tensor, ratio: th.Tensor, advantages: th.Tensor, kl_rollback: float) -> th.Tensor:
    """
    Where Truly PPO pulls the policy back (Wang et al. 2019, arXiv 1903.07940): KL >= delta, and r A >= A.

    There the policy has left the trust region, and the surrogate would lead it further away.

    :param kl: shape (b,), in nats
    :param ratio: r = pi_new(a|s) / pi_old(a|s), shape (b,)
    :param advantages: A, shape (b,)
    :param kl_rollback: delta, in nats
    :return: shape (b,), of type bool
    """
    return (kl >= kl_rollback) & (ratio * advantages >= advantages)


def kl_penalty(
    kl: th.Tensor,
    coefs: Coefficients,
    mean: Mean = th.mean,
    where: th.Tensor | None = None,
    hinge_kl: Callable[[th.Tensor], th.Tensor] | None = None,
) -> th.Tensor:
    """
    The KL penalty of eq. 8, to be minimised: beta E[KL(old || new)], and the hinge of modular_rl and TF-Agents.

    :param kl: shape (b,), in nats
    :param coefs: beta, the hinge's weight and threshold
    :param where: the samples that beta acts on, shape (b,), ``None`` for all
    :param hinge_kl: makes of the mean KL what the hinge acts on, ``None`` if it is that itself
    :return: shape ()
    """
    mean_kl = mean(kl)
    penalty = coefs.kl_coef * (mean_kl if where is None else mean(kl * where))
    if coefs.hinge_coef > 0:
        mean_kl = mean_kl if hinge_kl is None else hinge_kl(mean_kl)
        penalty = penalty + coefs.hinge_coef * F.relu(mean_kl - coefs.hinge_kl).pow(2)
    return penalty


def value_loss(values: th.Tensor, samples: Samples, clip_range_vf: float | None, mean: Mean = th.mean) -> th.Tensor:
    """
    The squared error of eq. 9, to be minimised: E[(V(s) - return)^2], V clipped to the old one's vicinity if wanted.

    :param values: V(s), shape (b,)
    :param samples: returns and old values
    :param clip_range_vf: how far V may move from its old value before the gradient ends, ``None`` for any distance
    :return: shape ()
    """
    if clip_range_vf is not None:
        values = samples.old_values + th.clamp(values - samples.old_values, -clip_range_vf, clip_range_vf)
    if mean is th.mean:
        return F.mse_loss(samples.returns, values)  # its gradient has other bits than that of a mean of squares
    return mean(F.mse_loss(samples.returns, values, reduction="none"))


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor, mean: Mean = th.mean) -> th.Tensor:
    """
    The negative entropy bonus of eq. 9, to be minimised: -E[S(pi)].

    :param entropy: shape (b,), ``None`` if no closed form is known
    :param log_prob: shape (b,), whose negative mean estimates the entropy in that case
    :return: shape ()
    """
    if entropy is None:
        return -mean(-log_prob)
    return -mean(entropy)


def ppo_loss(
    new: Evaluation,
    samples: Samples,
    coefs: Coefficients,
    mean: Mean = th.mean,
    hinge_kl: Callable[[th.Tensor], th.Tensor] | None = None,
) -> tuple[th.Tensor, Metrics]:
    """
    The whole loss, to be minimised: -surrogate - ent_coef S + vf_coef value loss + KL penalty (eqs. 7 to 9).

    :param new: the current policy's view of the minibatch
    :param samples: the rollout's view of it
    :param coefs: the coefficients in effect
    :param mean: the average over samples, E; :func:`mean_of_each` for several minibatches at once, whose advantages have
        to be normalised before
    :param hinge_kl: as :func:`kl_penalty` takes it
    :return: the loss, shape (), with its gradient's graph; and detached metrics, each of shape ()
    """
    advantages = normalize(samples.advantages) if coefs.normalize_advantage else samples.advantages
    log_ratio = new.log_prob - samples.old_log_prob
    ratio = th.exp(log_ratio)

    policy_loss = -policy_objective(ratio, advantages, coefs, mean)
    negative_entropy = entropy_loss(new.entropy, new.log_prob, mean)
    loss = policy_loss + coefs.ent_coef * negative_entropy
    metrics = {"policy_loss": policy_loss, "entropy_loss": negative_entropy, "approx_kl": mean(k3(log_ratio.detach()))}

    if coefs.vf_coef is not None:
        assert new.values is not None
        metrics["value_loss"] = value_loss(new.values, samples, coefs.clip_range_vf, mean)
        loss = loss + coefs.vf_coef * metrics["value_loss"]
    if coefs.penalizes_kl:
        assert new.kl is not None
        where = None
        if coefs.kl_rollback is not None:
            where = rolls_back(new.kl.detach(), ratio.detach(), advantages, coefs.kl_rollback)
        metrics["kl_penalty_loss"] = kl_penalty(new.kl, coefs, mean, where, hinge_kl)
        loss = loss + metrics["kl_penalty_loss"]
    if coefs.clip_range is not None:
        low, high = coefs.clip_range
        metrics["clip_fraction"] = mean(((1 - ratio > low) | (ratio - 1 > high)).float())

    metrics["loss"] = loss
    return loss, {name: metric.detach() for name, metric in metrics.items()}
