"""The reference engine: losses as written, gradients by autograd, steps by the policy's own optimiser."""

import functools
from collections.abc import Iterator
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.critic import critic_parameters
from sb3_ppo_variants.engines.engine import Engine, Forward
from sb3_ppo_variants.evaluation import evaluate_actions, get_distribution, predict_values, unpadded
from sb3_ppo_variants.kl import DistributionParams, distribution_params
from sb3_ppo_variants.losses import Evaluation, Mean, Metrics, Samples, normalize_over_ranks, ppo_loss, value_loss
from sb3_ppo_variants.rollout import Minibatch, minibatches, policy_actions


class EagerEngine(Engine):
    """The policy's own evaluation, autograd's gradient, the optimiser's own step, whatever users have made of them."""

    _loss: th.Tensor
    _differentiated: list[th.nn.Parameter] | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._coefs.critic_apart:
            self._critic_parameters  # noqa: B018  # while the policy, which tells them, can still be evaluated

    @classmethod
    def taking_over(cls, engine: Engine) -> "EagerEngine":
        """
        One that goes on where another engine has stopped.

        :param engine: whose state has been published
        """
        arguments = (engine._policy, engine._buffer, engine._action_space, engine._coefs, engine._max_grad_norm)
        return cls(*arguments, engine._trust_region, engine._ranks)

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """One pass over the rollout, in the order, and by the means, of its buffer."""
        return minibatches(self._buffer, batch_size)

    def forward(self, minibatch: Minibatch) -> Forward:
        """The loss of the current policy on a minibatch."""
        actions = policy_actions(minibatch.samples.actions, self._action_space)
        stale = _inner_distribution(self._policy)
        values, log_prob, entropy = evaluate_actions(self._policy, minibatch.samples, actions)
        params = None if self._trust_region is None else self._params(minibatch, actions, log_prob, stale)
        kept = unpadded(minibatch.samples)
        if kept is not None:
            values, log_prob, entropy = values[kept], log_prob[kept], None if entropy is None else entropy[kept]
            params = None if params is None else params.map(lambda tensor: tensor[kept])
        samples, coefs = _samples(minibatch), self._coefs
        if self._ranks.several and coefs.normalize_advantage:
            advantages = normalize_over_ranks(samples.advantages, len(samples.advantages), self._ranks)
            samples, coefs = samples._replace(advantages=advantages), coefs._replace(normalize_advantage=False)
        kl = None
        if self._coefs.penalizes_kl:
            assert self._trust_region is not None
            assert minibatch.indices is not None
            assert params is not None
            kl = self._trust_region.kl(minibatch.indices, params)
        self._differentiated = None
        new = Evaluation(values.flatten(), log_prob, entropy, kl)
        self._loss, metrics = ppo_loss(new, samples, coefs, _mean(minibatch), self._hinge_kl)
        log_ratio = log_prob.detach() - samples.old_log_prob
        detached = None if params is None else params.map(th.Tensor.detach)
        return Forward(log_ratio, lambda: detached, metrics)

    def _hinge_kl(self, kl: th.Tensor) -> th.Tensor:
        """The mean KL over the ranks, with the gradient of this one's."""
        return kl + (self._ranks.mean(kl.item()) - kl.detach()) if self._ranks.several else kl

    def critic_forward(self, minibatch: Minibatch, vf_coef: float) -> Metrics:
        """The value loss, for a gradient at the critic's own parameters."""
        values, kept = predict_values(self._policy, minibatch.samples), unpadded(minibatch.samples)
        values = values if kept is None else values[kept]
        loss = value_loss(values, _samples(minibatch), self._coefs.clip_range_vf, _mean(minibatch))
        self._differentiated = [parameter for parameter in self._critic_parameters if parameter.requires_grad]
        self._loss = vf_coef * loss
        return {"value_loss": loss.detach()}

    @functools.cached_property
    def _critic_parameters(self) -> list[th.nn.Parameter]:
        return critic_parameters(self._policy)

    def backward(self) -> Metrics:
        """The gradient, in ``parameter.grad``."""
        self._policy.optimizer.zero_grad()
        if not self._is_frozen():
            self._loss.backward(inputs=self._differentiated)  # type: ignore[no-untyped-call]
        if self._ranks.several:
            self._average_gradients()
        grad_norm = th.nn.utils.clip_grad_norm_(self._policy.parameters(), self._max_grad_norm)
        return {"grad_norm": grad_norm.detach()}

    def _is_frozen(self) -> bool:
        """Whether the actor, or the critic, that has passes of its own is frozen; if all is, torch says so, as under SB3."""
        if self._differentiated is not None:
            return not self._differentiated
        return self._coefs.critic_apart and not self._loss.requires_grad

    def _average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self._policy.parameters() if parameter.grad is not None]
        if not gradients:
            return
        flat = th.cat([gradient.flatten() for gradient in gradients])
        self._ranks.average(flat)
        for gradient, mean in zip(gradients, th.split(flat, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def step(self, optimizer: th.optim.Optimizer | None = None) -> None:
        """The optimiser's own."""
        (optimizer or self._policy.optimizer).step()

    def publish(self) -> None:
        """Nothing: this engine works on the policy itself."""

    def fetch(self) -> str | None:
        """Nothing: this engine works on the policy itself."""
        return None

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
            return distribution_params(get_distribution(self._policy, minibatch.samples))
        return None


def _is_sb3s(policy: ActorCriticPolicy, method: str) -> bool:
    """Whether a method of the policy is SB3's or contrib's own, not one that a user has put there."""
    function = getattr(getattr(policy, method, None), "__func__", None)
    return getattr(function, "__module__", "").partition(".")[0] in ("stable_baselines3", "sb3_contrib")


def _explains(distribution: Any, actions: th.Tensor, log_prob: th.Tensor) -> bool:
    try:
        with th.no_grad():
            return th.allclose(distribution.log_prob(actions), log_prob, rtol=0.0, atol=0.0, equal_nan=True)
    except Exception:  # it is a user's own, for other states, or none at all
        return False


def _inner_distribution(policy: ActorCriticPolicy) -> object:
    distribution = getattr(policy, "action_dist", None)
    return getattr(distribution, "distribution", None) or getattr(distribution, "distributions", None)


def _samples(minibatch: Minibatch) -> Samples:
    samples, kept = minibatch.samples, unpadded(minibatch.samples)
    columns = (samples.old_values, samples.old_log_prob, samples.advantages, samples.returns)
    return Samples(*(columns if kept is None else (column[kept] for column in columns)))


def _mean(minibatch: Minibatch) -> Mean:
    """Where samples are padded, contrib's loss is a mean of squares, with other bits than a mean squared error."""
    return th.mean if unpadded(minibatch.samples) is None else th.Tensor.mean
