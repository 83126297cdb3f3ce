"""
The fused engine: the gradients of an MLP policy by hand, in the bits of autograd, at a fraction of its cost.

Why the bits agree: every operation is the one that autograd would run, on the operands that autograd would give it, and
sums are taken in autograd's order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import nn

from sb3_ppo_variants.engines.eager import Forward
from sb3_ppo_variants.engines.flat_adam import FlatAdam, views
from sb3_ppo_variants.engines.heads import CategoricalHead, GaussianHead
from sb3_ppo_variants.engines.network import ACTIVATIONS, Layer, Network
from sb3_ppo_variants.kl import k3
from sb3_ppo_variants.losses import Coefficients, Metrics, entropy_loss, kl_penalty, normalize
from sb3_ppo_variants.rollout import Minibatch, gathers_by_index, policy_actions
from sb3_ppo_variants.trust_region import TrustRegion

HEADED = (DiagGaussianDistribution, CategoricalDistribution, MultiCategoricalDistribution)
"""Action distributions whose gradients are known."""


def why_not_fused(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> str | None:
    """
    Why the fused engine can't stand in for the eager one.

    :param policy: the policy
    :param buffer: the rollout buffer
    :return: the first reason that is found, ``None`` if it can
    """
    return next(_objections(policy, buffer), None)


def _objections(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> Iterator[str]:
    """Everything that has to be SB3's own, as it is, for the operations to be known."""
    methods = {name for name in dir(ActorCriticPolicy) if callable(getattr(ActorCriticPolicy, name))}
    if type(policy) is not ActorCriticPolicy or methods & vars(policy).keys():
        yield f"the policy, a {type(policy).__name__}, is not SB3's ActorCriticPolicy as it is"
        return
    if type(buffer) is not RolloutBuffer or not gathers_by_index(buffer):
        yield f"the rollout buffer, a {type(buffer).__name__}, is not SB3's RolloutBuffer as it is"
    if policy.device.type != "cpu":
        yield f"the device is {policy.device}, not the CPU"
    if {type(policy.pi_features_extractor), type(policy.vf_features_extractor)} != {FlattenExtractor}:
        yield "the features extractor is not SB3's FlattenExtractor"
    if type(policy.action_dist) not in HEADED:
        yield f"the action distribution is a {type(policy.action_dist).__name__}"
    if type(policy.mlp_extractor) is not MlpExtractor:
        yield f"the MLP extractor is a {type(policy.mlp_extractor).__name__}"
        return
    for network in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net):
        kinds = [type(layer) for layer in network]
        if any(kind is not nn.Linear for kind in kinds[::2]) or not ACTIVATIONS.keys() >= set(kinds[1::2]):
            yield f"the layers are {', '.join(kind.__name__ for kind in kinds)}"
    if any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in policy.modules()):
        yield "a module of the policy has hooks"
    yield from _objections_to_optimizer(policy)


def _objections_to_optimizer(policy: ActorCriticPolicy) -> Iterator[str]:
    parameters, optimizer = list(policy.parameters()), policy.optimizer
    if any(not parameter.requires_grad or parameter.dtype != th.float32 for parameter in parameters):
        yield "a parameter is frozen or not of type float32"
    if any(parameter._backward_hooks for parameter in parameters):
        yield "a parameter has hooks"
    if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
        yield f"the optimiser, a {type(optimizer).__name__}, is not Adam with one group of parameters"
        return
    group = optimizer.param_groups[0]
    if any(group.get(name) for name in ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")):
        yield "Adam has other than its plain settings"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        yield "the optimiser has hooks"
    if list(map(id, group["params"])) != list(map(id, parameters)):
        yield "the optimiser's parameters are not the policy's"
    if len({float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0 for p in parameters}) > 1:
        yield "the optimiser has stepped some parameters more often than others"


class FusedEngine:
    """
    Takes gradient steps on minibatches, as :class:`~sb3_ppo_variants.engines.eager.EagerEngine` does, to the last bit.

    It works on flat copies of parameters, gradients and the optimiser's state: :meth:`publish` writes them back before anybody
    else may look, :meth:`fetch` takes over what somebody has changed.

    :param policy: the policy that is updated, one for which :func:`why_not_fused` has no objection
    :param buffer: the full rollout buffer
    :param action_space: of the environment
    :param coefs: the coefficients in effect, with the critic in the loss
    :param max_grad_norm: gradients are scaled down to this norm
    :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
    """

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
        assert coefs.vf_coef is not None
        self._coefs = coefs
        self._vf_coef = coefs.vf_coef
        self._max_grad_norm = max_grad_norm
        self._trust_region = trust_region
        self._parameters: list[th.Tensor] = list(policy.parameters())
        n_elements = sum(parameter.numel() for parameter in self._parameters)
        self._flat, self._flat_grad = th.empty(n_elements), th.zeros(n_elements)
        self._values, self._grads = (views(flat, self._parameters) for flat in (self._flat, self._flat_grad))
        self._adam = FlatAdam(policy.optimizer, self._parameters)  # type: ignore[arg-type]
        self._has_gradient = False
        self._build_networks()
        self.fetch()

    def _build_networks(self) -> None:
        names = [name for name, _ in self._policy.named_parameters()]
        value, grad = dict(zip(names, self._values, strict=True)), dict(zip(names, self._grads, strict=True))

        def layer(name: str, activation: type[nn.Module] | None) -> Layer:
            weight, bias = f"{name}.weight", f"{name}.bias"
            return Layer(value[weight], value[bias], grad[weight], grad[bias], activation)

        def network(hidden: str, output: str) -> Network:
            modules = list(getattr(self._policy.mlp_extractor, hidden))
            prefix = f"mlp_extractor.{hidden}"
            layers = [layer(f"{prefix}.{index}", type(modules[index + 1])) for index in range(0, len(modules), 2)]
            return Network([*layers, layer(output, None)])

        self._actor, self._critic = network("policy_net", "action_net"), network("value_net", "value_net")
        self._head: GaussianHead | CategoricalHead
        distribution = self._policy.action_dist
        if isinstance(distribution, MultiCategoricalDistribution):
            self._head = CategoricalHead([int(size) for size in distribution.action_dims])
        elif isinstance(distribution, CategoricalDistribution):
            self._head = CategoricalHead([distribution.action_dim])
        else:
            self._head = GaussianHead(value["log_std"], grad["log_std"])

    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """One pass over the rollout, in random order: SB3's permutation, gathered once."""
        buffer = self._buffer
        n_samples = buffer.buffer_size * buffer.n_envs
        indices = th.from_numpy(np.random.permutation(n_samples))
        if not buffer.generator_ready:
            for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
                vars(buffer)[name] = buffer.swap_and_flatten(vars(buffer)[name])
            buffer.generator_ready = True
        arrays = (buffer.observations, buffer.actions.astype(np.float32, copy=False))
        columns = (array.flatten() for array in (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns))
        shuffled = [th.as_tensor(array)[indices] for array in (*arrays, *columns)]
        features = preprocess_obs(shuffled[0], self._policy.observation_space, self._policy.normalize_images)
        assert isinstance(features, th.Tensor)
        features = features.flatten(start_dim=1)
        for start in range(0, n_samples, batch_size):
            rows = slice(start, start + batch_size)
            self._features = features[rows]
            yield Minibatch(RolloutBufferSamples(*(tensor[rows] for tensor in shuffled)), indices[rows])

    @th.no_grad()
    def forward(self, minibatch: Minibatch) -> Forward:
        """The loss of the current policy on a minibatch, as :func:`~sb3_ppo_variants.losses.ppo_loss` composes it."""
        samples, coefs = minibatch.samples, self._coefs
        self._samples = samples
        actions = policy_actions(samples.actions, self._action_space)
        log_prob, entropy = self._head.forward(self._actor.forward(self._features), actions)
        self._advantages = normalize(samples.advantages) if coefs.normalize_advantage else samples.advantages
        log_ratio = log_prob - samples.old_log_prob
        self._ratio = th.exp(log_ratio)
        self._surrogate = self._advantages * self._ratio
        metrics: Metrics = {}
        if coefs.clip_range is None:
            policy_loss = -self._surrogate.mean()
        else:
            self._clipped = self._advantages * th.clamp(self._ratio, 1 - coefs.clip_range, 1 + coefs.clip_range)
            policy_loss = -th.min(self._surrogate, self._clipped).mean()
            metrics["clip_fraction"] = th.mean((th.abs(self._ratio - 1) > coefs.clip_range).float())
        negative_entropy = entropy_loss(entropy, log_prob)

        self._predicted = values = self._critic.forward(self._features).flatten()
        if coefs.clip_range_vf is not None:
            self._move = values - samples.old_values
            self._predicted = samples.old_values + th.clamp(self._move, -coefs.clip_range_vf, coefs.clip_range_vf)
        value_loss = nn.functional.mse_loss(samples.returns, self._predicted)

        loss = policy_loss + coefs.ent_coef * negative_entropy + self._vf_coef * value_loss
        if coefs.penalizes_kl:
            metrics["kl_penalty_loss"] = self._kl_penalty(minibatch)
            loss = loss + metrics["kl_penalty_loss"]
        metrics.update(policy_loss=policy_loss, entropy_loss=negative_entropy, approx_kl=k3(log_ratio).mean())
        metrics.update(value_loss=value_loss, loss=loss)
        return Forward(log_ratio, self._head.params, metrics)

    def _kl_penalty(self, minibatch: Minibatch) -> th.Tensor:
        """:func:`~sb3_ppo_variants.losses.kl_penalty`, remembering the mean KL for its gradient."""
        assert self._trust_region is not None
        assert minibatch.indices is not None
        old: Any = self._trust_region.old_at(minibatch.indices)
        kl = self._head.kl(old)
        self._mean_kl = kl.mean()
        return kl_penalty(kl, self._coefs)

    @th.no_grad()
    def backward(self) -> Metrics:
        """The gradient of the latest loss, clipped in norm, and its norm before clipping."""
        coefs, samples, n_samples = self._coefs, self._samples, len(self._ratio)
        one = th.ones(())
        # policy loss: -mean(min(r A, clip(r) A)); where both are equal, each gets a half, which add up
        d_ratio = (-one / n_samples) * self._advantages
        if coefs.clip_range is not None:
            d_ratio = th.where(self._surrogate <= self._clipped, d_ratio, 0.0)
        d_log_prob = d_ratio * self._ratio
        d_entropy = -(one * coefs.ent_coef) / n_samples if coefs.ent_coef != 0 else None
        d_kl = self._d_mean_kl() / n_samples if coefs.penalizes_kl else None
        self._actor.backward(self._head.backward(d_log_prob, d_entropy, d_kl))

        # value loss: mean (V - R)^2
        d_values = th.ops.aten.mse_loss_backward(one * self._vf_coef, self._predicted, samples.returns, 1)
        if coefs.clip_range_vf is not None:
            inside = (self._move >= -coefs.clip_range_vf) & (self._move <= coefs.clip_range_vf)
            d_values = th.where(inside, d_values, 0.0)
        self._critic.backward(d_values.unsqueeze(1))

        self._has_gradient = True
        norm = th.linalg.vector_norm(th.stack(th._foreach_norm(self._grads)))
        self._flat_grad.mul_((self._max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        return {"grad_norm": norm}

    def _d_mean_kl(self) -> th.Tensor:
        """beta, and the slope of the hinge."""
        beta = th.ones(()) * self._coefs.kl_coef
        if self._coefs.hinge_coef == 0:
            return beta
        excess = th.relu(self._mean_kl - self._coefs.hinge_kl)
        slope = self._coefs.hinge_coef * th.ones(()) * (2 * excess)
        return th.where(excess > 0, slope, 0.0) + beta

    @th.no_grad()
    def step(self) -> None:
        """Apply the gradient."""
        self._adam.step(self._flat, self._flat_grad)

    @th.no_grad()
    def publish(self) -> None:
        """Write parameters, gradients and the optimiser's state into the policy."""
        th._foreach_copy_(self._parameters, self._values)
        if self._has_gradient:
            for parameter, grad in zip(self._parameters, self._grads, strict=True):
                parameter.grad = grad.clone()
        self._adam.publish()

    @th.no_grad()
    def fetch(self) -> None:
        """Take parameters, gradients and the optimiser's state from the policy."""
        th._foreach_copy_(self._values, self._parameters)
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not None:
                grad.copy_(parameter.grad)
        self._adam.fetch()
