"""The reference engine: losses as written, gradients by autograd, steps by the policy's own optimiser."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.kl import DistributionParams, distribution_params
from sb3_ppo_variants.losses import Coefficients, Evaluation, Metrics, Samples, ppo_loss, value_loss
from sb3_ppo_variants.rollout import Minibatch, minibatches, policy_actions
from sb3_ppo_variants.trust_region import TrustRegion


class Forward(NamedTuple):
    """
    What a minibatch of ``b`` samples shows of the current policy, all detached.

    :param log_ratio: ln pi_new(a|s) - ln pi_old(a|s), shape (b,)
    :param params: the action distributions' parameters, ``None`` if they are not known
    :param metrics: the losses and what else is logged, each of shape ()
    """

    log_ratio: th.Tensor
    params: DistributionParams | None
    metrics: Metrics


class EagerEngine:
    """
    Takes gradient steps on minibatches: :meth:`forward`, :meth:`backward`, :meth:`step`, in this order.

    :param policy: the policy that is updated
    :param buffer: the full rollout buffer
    :param action_space: of the environment
    :param coefs: the coefficients in effect
    :param max_grad_norm: gradients are scaled down to this norm
    :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
    """

    _loss: th.Tensor

    def __init__(
        self,
        policy: ActorCriticPolicy,
        buffer: RolloutBuffer,
        action_space: spaces.Space[Any],
        coefs: Coefficients,
        max_grad_norm: float,
        trust_region: TrustRegion | None,
    ) -> None:
        self._policy = policy
        self._buffer = buffer
        self._action_space = action_space
        self._coefs = coefs
        self._max_grad_norm = max_grad_norm
        self._trust_region = trust_region

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """One pass over the rollout, in random order."""
        return minibatches(self._buffer, batch_size)

    def forward(self, minibatch: Minibatch) -> Forward:
        """The loss of the current policy on a minibatch."""
        actions = policy_actions(minibatch.samples.actions, self._action_space)
        stale = _inner_distribution(self._policy)
        values, log_prob, entropy = self._policy.evaluate_actions(minibatch.samples.observations, actions)
        params = None if self._trust_region is None else self._params(minibatch, actions, log_prob, stale)
        kl = None
        if self._coefs.penalizes_kl:
            assert self._trust_region is not None
            assert minibatch.indices is not None
            assert params is not None
            kl = self._trust_region.kl(minibatch.indices, params)
        self._loss, metrics = ppo_loss(Evaluation(values.flatten(), log_prob, entropy, kl), _samples(minibatch), self._coefs)
        log_ratio = log_prob.detach() - minibatch.samples.old_log_prob
        return Forward(log_ratio, None if params is None else params.map(th.Tensor.detach), metrics)

    def critic_forward(self, minibatch: Minibatch, vf_coef: float) -> Metrics:
        """
        The value loss alone on a minibatch.

        :param vf_coef: its weight
        """
        values = self._policy.predict_values(minibatch.samples.observations).flatten()
        loss = value_loss(values, _samples(minibatch), self._coefs.clip_range_vf)
        self._loss = vf_coef * loss
        return {"value_loss": loss.detach()}

    def backward(self, parameters: list[th.nn.Parameter] | None = None) -> Metrics:
        """
        Leave the gradient of the latest loss, clipped in norm, in ``parameter.grad``.

        :param parameters: those that get a gradient; ``None`` for all that the loss depends on
        :return: the gradient's norm before clipping
        """
        self._policy.optimizer.zero_grad()
        self._loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        grad_norm = th.nn.utils.clip_grad_norm_(self._policy.parameters(), self._max_grad_norm)
        return {"grad_norm": grad_norm.detach()}

    def step(self, optimizer: th.optim.Optimizer | None = None) -> None:
        """
        Apply the gradient.

        :param optimizer: that applies it; ``None`` for the policy's
        """
        (optimizer or self._policy.optimizer).step()

    def publish(self) -> None:
        """Nothing: this engine works on the policy itself."""

    def fetch(self) -> None:
        """Nothing: this engine works on the policy itself."""

    def _params(
        self, minibatch: Minibatch, actions: th.Tensor, log_prob: th.Tensor, stale: object
    ) -> DistributionParams | None:
        """
        The parameters of the action distributions behind ``log_prob``.

        SB3's ``evaluate_actions`` leaves the distribution that it has built in ``policy.action_dist``. One that a user has
        overridden may build another, or evaluate the policy again afterwards: what it leaves is believed if it is new and
        explains the log-probabilities. If not, or if ``get_distribution``, which has told the old parameters, is a user's
        own, a second forward pass has to tell, but only if the loss needs it, as it may draw random numbers (dropout) that
        SB3 would not draw.
        """
        distribution: Any = getattr(self._policy, "action_dist", None)
        left = _inner_distribution(self._policy) is not stale and _is_sb3s(self._policy, "get_distribution")
        if left and (_is_sb3s(self._policy, "evaluate_actions") or _explains(distribution, actions, log_prob)):
            return distribution_params(distribution)
        if self._coefs.penalizes_kl:
            return distribution_params(self._policy.get_distribution(minibatch.samples.observations))
        return None


def _is_sb3s(policy: ActorCriticPolicy, method: str) -> bool:
    """Whether a method of the policy is SB3's own, not one that a user has put there."""
    return getattr(getattr(policy, method, None), "__func__", None) is getattr(ActorCriticPolicy, method)


def _explains(distribution: Any, actions: th.Tensor, log_prob: th.Tensor) -> bool:
    try:
        with th.no_grad():
            return th.allclose(distribution.log_prob(actions), log_prob, rtol=0.0, atol=0.0, equal_nan=True)
    except Exception:  # it is a user's own, for other states, or none at all
        return False


def _inner_distribution(policy: ActorCriticPolicy) -> object:
    return getattr(getattr(policy, "action_dist", None), "distribution", None)


def _samples(minibatch: Minibatch) -> Samples:
    samples = minibatch.samples
    return Samples(samples.old_values, samples.old_log_prob, samples.advantages, samples.returns)
