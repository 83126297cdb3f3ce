"""
The fused engine: the gradients of an MLP policy by hand, in the bits of autograd, at a fraction of its cost.

Why the bits agree: every operation is the one that autograd would run, on the operands that autograd would give it, and
sums are taken in autograd's order.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_ppo_variants.engines.engine import Engine, Forward, LazyMetrics
from sb3_ppo_variants.engines.flat_adam import FlatAdam, views
from sb3_ppo_variants.engines.heads import make_head
from sb3_ppo_variants.engines.network import layer_names, network, policy_inputs
from sb3_ppo_variants.engines.reasons import why_not_fused
from sb3_ppo_variants.losses import Evaluation, Metrics, Samples, mean_of_each, normalize, ppo_loss, value_loss
from sb3_ppo_variants.rollout import Minibatch, policy_actions

LARGE_MINIBATCH = 2**14
"""Samples from which on torch may share out the statistics of a minibatch among threads."""


class FusedMinibatch(Minibatch):
    """
    A minibatch as the fused engine wants it.

    :param features: the policy's inputs, shape (b, n_features)
    :param actions: as the rollout buffer keeps them, shape (b, action_dim)
    :param old: the rollout's view; advantages are normalised already, if they are to be
    """

    def __init__(
        self,
        indices: th.Tensor,
        gather: Callable[[], RolloutBufferSamples],
        features: th.Tensor,
        actions: np.ndarray,
        old: Samples,
    ) -> None:
        super().__init__(indices, gather)
        self.features = features
        self.actions = actions
        self.old = old


class _Part(NamedTuple):
    """
    The parameters that a loss depends on.

    :param first: index of the first one in the flat order
    :param last: index behind that of the last one
    :param flat_grad: their gradients, shape (n_elements,)
    :param grads: views of these, in the policy's order
    """

    first: int
    last: int
    flat_grad: th.Tensor
    grads: list[th.Tensor]


class FusedEngine(Engine):
    """
    What :class:`~sb3_ppo_variants.engines.eager.EagerEngine` does, to the last bit.

    It works on flat copies of parameters, gradients and the optimisers' state: :meth:`publish` writes them back before
    anybody else may look, :meth:`fetch` takes over what somebody has changed. For policies and buffers for which
    :func:`~sb3_ppo_variants.engines.reasons.why_not_fused` finds no reason.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lay_out()
        self._adams: dict[th.optim.Optimizer, FlatAdam] = {}
        self._part = self._all
        self._retired = False
        self._fetch_values()

    def _lay_out(self) -> None:
        """Parameters and gradients as flat vectors, the critic's last."""
        policy = self._policy
        actor_layers = layer_names(policy, "policy_net", "action_net")
        critic_layers = layer_names(policy, "value_net", "value_net")
        parameters: dict[str, th.Tensor] = dict(policy.named_parameters())
        critics = [f"{name}.{kind}" for name in critic_layers for kind in ("weight", "bias")]
        actors = [name for name in parameters if name not in critics]
        names = [*actors, *critics]
        self._parameters = [parameters[name] for name in names]
        n_elements = sum(parameter.numel() for parameter in self._parameters)
        self._flat, self._flat_grad = th.zeros(n_elements), th.zeros(n_elements)
        self._values, self._grads = (views(flat, self._parameters) for flat in (self._flat, self._flat_grad))
        values, grads = (dict(zip(names, parts, strict=True)) for parts in (self._values, self._grads))

        self._head = make_head(policy.action_dist, values, grads.get("log_std"))
        self._actor, self._critic = network(actor_layers, values), network(critic_layers, values)
        self._actor_grads, self._critic_grads = (
            [(grads[f"{name}.weight"], grads[f"{name}.bias"]) for name in layers] for layers in (actor_layers, critic_layers)
        )

        def part(first: int, last: int) -> _Part:
            start, stop = (sum(parameter.numel() for parameter in self._parameters[:index]) for index in (first, last))
            in_part = set(names[first:last])
            return _Part(first, last, self._flat_grad[start:stop], [grads[name] for name in parameters if name in in_part])

        self._all, self._actors = part(0, len(names)), part(0, len(actors))
        self._critics = part(len(actors), len(names))
        self._published_part: _Part | None = None

    def minibatches(self, batch_size: int) -> Iterator[FusedMinibatch]:
        """One pass over the rollout, in random order: SB3's permutation, gathered at once."""
        buffer = self._buffer
        n_samples = buffer.buffer_size * buffer.n_envs
        order = np.random.permutation(n_samples)
        if not buffer.generator_ready:
            for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
                vars(buffer)[name] = buffer.swap_and_flatten(vars(buffer)[name])
            buffer.generator_ready = True
        features = policy_inputs(self._policy, th.as_tensor(buffer.observations[order])).split(batch_size)
        actions = buffer.actions[order].astype(np.float32, copy=False)
        columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        old_values, old_log_prob, advantages, returns = (th.from_numpy(column.flatten()[order]) for column in columns)
        if self._coefs.normalize_advantage:
            advantages = normalize_each(advantages, batch_size)
        old = zip(*(column.split(batch_size) for column in (old_values, old_log_prob, advantages, returns)), strict=True)
        indices = th.from_numpy(order).split(batch_size)
        for number, (rows, samples) in enumerate(zip(indices, old, strict=True)):
            start = number * batch_size
            yield FusedMinibatch(
                rows,
                functools.partial(buffer._get_samples, order[start : start + batch_size]),
                features[number],
                actions[start : start + batch_size],
                Samples(*samples),
            )

    @np.errstate(all="ignore")
    def forward(self, minibatch: Minibatch) -> Forward:
        """Whatever the gradient of :func:`~sb3_ppo_variants.losses.ppo_loss` needs; the loss itself is left for later."""
        assert isinstance(minibatch, FusedMinibatch)
        self._minibatch, coefs, old = minibatch, self._coefs, minibatch.old
        self._part = self._actors if coefs.critic_apart else self._all
        with th.inference_mode():
            self._head.forward(self._actor.forward(minibatch.features))
            log_prob = self._head.log_prob(minibatch.actions)
            log_ratio = log_prob - old.old_log_prob.numpy()
            self._ratio = th.from_numpy(log_ratio).exp().numpy()
            values, kl = None, None
            if not coefs.critic_apart:
                values = self._critic.forward(minibatch.features).flatten()
                self._new_values, self._vf_coef = values.numpy(), coefs.vf_coef
            if coefs.penalizes_kl:
                assert self._trust_region is not None
                assert minibatch.indices is not None
                kl = self._head.kl(self._trust_region.old_at(minibatch.indices))
                self._mean_kl = np.float32(kl.mean())
        if math.isnan(log_prob.dot(log_prob)):  # the fastest way to ask whether any is NaN
            self._raise_what_sb3_raises(minibatch)
        params = self._head.params
        lazily = LazyMetrics(Evaluation(values, th.from_numpy(log_prob), None, kl), old, params, self._measure)
        return Forward(th.from_numpy(log_ratio), params, lazily)

    def _raise_what_sb3_raises(self, minibatch: Minibatch) -> None:
        """SB3's distributions refuse NaN, unless they have been told not to."""
        self.publish()
        with th.no_grad():
            actions = policy_actions(minibatch.samples.actions, self._action_space)
            self._policy.evaluate_actions(minibatch.samples.observations, actions)

    @th.inference_mode()
    def _measure(self, minibatches: Sequence[LazyMetrics]) -> Metrics:
        """The metrics of several minibatches of equal size, by the reference's formulas."""
        values, log_prob, _, kl = (
            None if column[0] is None else th.stack(column)
            for column in zip(*(lazily.new for lazily in minibatches), strict=True)
        )
        assert log_prob is not None
        entropy = self._head.entropy([lazily.params for lazily in minibatches])
        old = Samples(*(th.stack(column) for column in zip(*(lazily.old for lazily in minibatches), strict=True)))
        coefs = self._coefs._replace(normalize_advantage=False)
        return ppo_loss(Evaluation(values, log_prob, entropy, kl), old, coefs, mean_of_each)[1]

    def critic_forward(self, minibatch: Minibatch, vf_coef: float) -> Metrics:
        """The value loss, for a gradient at the critic's own parameters."""
        assert isinstance(minibatch, FusedMinibatch)
        self._minibatch, self._vf_coef, self._part = minibatch, vf_coef, self._critics
        with th.inference_mode():
            values = self._critic.forward(minibatch.features).flatten()
            self._new_values = values.numpy()
            return {"value_loss": value_loss(values, minibatch.old, self._coefs.clip_range_vf)}

    @np.errstate(all="ignore")
    @th.inference_mode()
    def backward(self) -> Metrics:
        """The gradient, kept until it is published."""
        if self._part is not self._critics:
            d_log_prob = self._d_ratio() * self._ratio
            self._actor.backward(self._head.backward(d_log_prob, self._d_entropy(), self._d_kl()), self._actor_grads)
        if self._part is not self._actors:
            self._critic.backward(th.from_numpy(self._d_values()).unsqueeze(1), self._critic_grads)
        self._published_part = self._part
        norm = th.linalg.vector_norm(th.stack(th._foreach_norm(self._part.grads)))
        self._part.flat_grad.mul_((self._max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        return {"grad_norm": norm}

    def _d_ratio(self) -> np.ndarray:
        """At r, of -mean(r A), or of -mean(min(r A, clip(r) A)); where both are equal, each gets half of the gradient."""
        advantages, ratio, clip_range = self._minibatch.old.advantages.numpy(), self._ratio, self._coefs.clip_range
        d_surrogate = (np.float32(-1) / np.float32(len(ratio))) * advantages
        if clip_range is None:
            return d_surrogate
        clipped_ratio = np.minimum(np.maximum(ratio, np.float32(1 - clip_range)), np.float32(1 + clip_range))
        unclipped_share = np.heaviside(advantages * clipped_ratio - advantages * ratio, np.float32(0.5))
        return np.where(clipped_ratio == ratio, d_surrogate, d_surrogate * unclipped_share)

    def _d_entropy(self) -> np.float32 | None:
        """At each entropy S, of -ent_coef mean(S)."""
        if self._coefs.ent_coef == 0:
            return None
        return -np.float32(self._coefs.ent_coef) / np.float32(len(self._ratio))

    def _d_kl(self) -> np.float32 | None:
        """At each KL, of beta mean(KL), and of the hinge."""
        coefs = self._coefs
        if not coefs.penalizes_kl:
            return None
        slope = np.float32(coefs.kl_coef)
        excess = self._mean_kl - np.float32(coefs.hinge_kl)
        if coefs.hinge_coef > 0 and excess > 0:
            slope = np.float32(coefs.hinge_coef) * (2 * excess) + slope
        return slope / np.float32(len(self._ratio))

    def _d_values(self) -> np.ndarray:
        """At V, of vf_coef mean((V - R)^2), where V is clipped to the old one's vicinity if wanted."""
        old, values, clip_range_vf = self._minibatch.old, self._new_values, self._coefs.clip_range_vf
        slope, vf_coef = np.float32(2 / len(values)), np.float32(self._vf_coef)
        if clip_range_vf is None:
            return slope * (values - old.returns.numpy()) * vf_coef
        low, high = np.float32(-clip_range_vf), np.float32(clip_range_vf)
        old_values = old.old_values.numpy()
        move = values - old_values
        predicted = old_values + np.minimum(np.maximum(move, low), high)
        inside = (move >= low) & (move <= high)
        return np.where(inside, slope * (predicted - old.returns.numpy()) * vf_coef, np.float32(0))

    def step(self, optimizer: th.optim.Optimizer | None = None) -> None:
        """Adam, on flat vectors."""
        adam = self._adam(optimizer or self._policy.optimizer)
        with th.inference_mode():
            adam.step(self._part.first, self._part.last)

    def _adam(self, optimizer: th.optim.Optimizer) -> FlatAdam:
        if optimizer not in self._adams:
            assert isinstance(optimizer, th.optim.Adam)
            self._adams[optimizer] = FlatAdam(optimizer, self._parameters, self._flat, self._flat_grad)
            self._adams[optimizer].fetch()
        return self._adams[optimizer]

    @th.no_grad()
    def publish(self) -> None:
        """Copies of the flat vectors' parts."""
        if self._retired:
            return
        th._foreach_copy_(self._parameters, self._values)
        if self._published_part is not None:
            indices = range(self._published_part.first, self._published_part.last)
            for index, parameter in enumerate(self._parameters):
                parameter.grad = self._grads[index].clone() if index in indices else None
        for adam in self._adams.values():
            adam.publish()

    @th.no_grad()
    def fetch(self) -> bool:
        """Into the flat vectors; anything may have happened to the policy."""
        part = self._published_part
        in_part = [] if part is None else self._parameters[part.first : part.last]
        if why_not_fused(self._policy, self._buffer, list(self._adams)) or any(p.grad is None for p in in_part):
            self._retired = True
            return False
        self._fetch_values()
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not None:
                grad.copy_(parameter.grad)
        for adam in self._adams.values():
            adam.fetch()
        return True

    def _fetch_values(self) -> None:
        th._foreach_copy_(self._values, [parameter.detach() for parameter in self._parameters])


def normalize_each(advantages: th.Tensor, batch_size: int) -> th.Tensor:
    """
    :func:`~sb3_ppo_variants.losses.normalize` of each minibatch, in its bits.

    :param advantages: of an epoch, in its order, shape (n_samples,)
    :param batch_size: samples a minibatch, the last one may have fewer
    """
    n_samples = len(advantages)
    if batch_size == 1 or batch_size >= LARGE_MINIBATCH:
        return th.cat([normalize(minibatch) for minibatch in advantages.split(batch_size)])
    rows = advantages[: n_samples - n_samples % batch_size].view(-1, batch_size)
    mean = rows.mean(dim=1, keepdim=True)
    # As torch's `std` of a vector: squares in float64, added up one after the other.
    squares = (rows.double() - mean.double()).square().cumsum(dim=1)[:, -1:]
    std = (squares / (batch_size - 1)).sqrt().float()
    normalized = [((rows - mean) / (std + 1e-8)).flatten()]
    if n_samples % batch_size > 0:
        normalized.append(normalize(advantages[-(n_samples % batch_size) :]))
    return th.cat(normalized)
