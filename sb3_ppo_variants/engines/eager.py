"""The reference engine: losses as written, gradients by autograd, steps by the policy's own optimiser."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.kl import DistributionParams, distribution_params
from sb3_ppo_variants.losses import Coefficients, Evaluation, Metrics, Samples, ppo_loss, value_loss
from sb3_ppo_variants.rollout import Minibatch, policy_actions
from sb3_ppo_variants.trust_region import TrustRegion


class EagerEngine:
    """
    Takes gradient steps on minibatches.

    :param policy: the policy that is updated
    :param action_space: of the environment
    :param coefs: the coefficients in effect
    :param max_grad_norm: gradients are scaled down to this norm
    :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        action_space: spaces.Space[Any],
        coefs: Coefficients,
        max_grad_norm: float,
        trust_region: TrustRegion | None,
    ) -> None:
        self._policy = policy
        self._action_space = action_space
        self._coefs = coefs
        self._max_grad_norm = max_grad_norm
        self._trust_region = trust_region

    def loss(self, minibatch: Minibatch) -> tuple[th.Tensor, Evaluation, Metrics]:
        """
        The loss of the current policy on a minibatch.

        :return: the loss, shape (), with its graph; the policy's evaluation of the minibatch; detached metrics
        :raises ValueError: if the loss has a KL penalty and the minibatch's indices are not known
        """
        evaluation = self._evaluate(minibatch)
        if self._coefs.penalizes_kl and evaluation.kl is None:
            raise ValueError(
                "`rollout_buffer_class` lacks what the exact KL of `kl_coef` needs: its `get` must gather minibatches "
                "with `_get_samples(batch_inds)`, as RolloutBuffer's does"
            )
        loss, metrics = ppo_loss(evaluation, _samples(minibatch), self._coefs)
        return loss, evaluation, metrics

    def critic_loss(self, minibatch: Minibatch, vf_coef: float) -> tuple[th.Tensor, Metrics]:
        """
        The value loss alone.

        :param vf_coef: its weight
        :return: the weighted loss, shape (), with its graph; detached metrics
        """
        values = self._policy.predict_values(minibatch.samples.observations).flatten()
        loss = value_loss(values, _samples(minibatch), self._coefs.clip_range_vf)
        return vf_coef * loss, {"value_loss": loss.detach()}

    def backward(self, loss: th.Tensor, parameters: list[th.nn.Parameter] | None = None) -> Metrics:
        """
        Leave the loss's gradient, clipped in norm, in ``parameter.grad``.

        :param loss: shape (), with its graph
        :param parameters: those that get a gradient; ``None`` for all that the loss depends on
        :return: the gradient's norm before clipping
        """
        self._policy.optimizer.zero_grad()
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        grad_norm = th.nn.utils.clip_grad_norm_(self._policy.parameters(), self._max_grad_norm)
        return {"grad_norm": grad_norm.detach()}

    def _evaluate(self, minibatch: Minibatch) -> Evaluation:
        actions = policy_actions(minibatch.samples.actions, self._action_space)
        stale = _inner_distribution(self._policy)
        values, log_prob, entropy = self._policy.evaluate_actions(minibatch.samples.observations, actions)
        kl = None
        if self._trust_region is not None and minibatch.indices is not None:
            old = self._trust_region.old.map(lambda tensor: tensor[minibatch.indices])
            new = self._new_params(minibatch, stale)
            kl = old.kl_divergence(new) if new is not None else None
        return Evaluation(values.flatten(), log_prob, entropy, kl)

    def _new_params(self, minibatch: Minibatch, stale: object) -> DistributionParams | None:
        # `evaluate_actions` leaves the distribution that it has built in `policy.action_dist`. One that a user has
        # overridden may not: then a second forward pass has to tell, but only if the loss needs it, as it may draw
        # random numbers (dropout) that SB3 would not draw.
        if _inner_distribution(self._policy) is not stale:
            params = distribution_params(self._policy.action_dist)
            return params if self._coefs.penalizes_kl else params.map(th.Tensor.detach)
        if self._coefs.penalizes_kl:
            return distribution_params(self._policy.get_distribution(minibatch.samples.observations))
        return None


def _inner_distribution(policy: ActorCriticPolicy) -> object:
    return getattr(getattr(policy, "action_dist", None), "distribution", None)


def _samples(minibatch: Minibatch) -> Samples:
    samples = minibatch.samples
    return Samples(samples.old_values, samples.old_log_prob, samples.advantages, samples.returns)
