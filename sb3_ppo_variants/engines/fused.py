"""
The fused engine: the gradients of an MLP policy by hand, in the bits of autograd, at a fraction of its cost.

Why the bits agree: every operation is the one that autograd would run, on the operands that autograd would give it, and
sums are taken in autograd's order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_variants.engines.engine import Engine, Forward, LazyMetrics
from sb3_ppo_variants.engines.flat_adam import FlatAdam, bounds, views
from sb3_ppo_variants.engines.heads import make_head
from sb3_ppo_variants.engines.network import Layer, Networks, Workspace, actor_and_critic, policy_inputs
from sb3_ppo_variants.engines.reasons import why_not_fused
from sb3_ppo_variants.losses import Evaluation, Metrics, Samples, mean_of_each, normalize, ppo_loss, value_loss
from sb3_ppo_variants.rollout import Minibatch, policy_actions

ONE, NORM_EPS = np.float32(1), np.float32(1e-6)
LARGE_MINIBATCH = 2**14
"""Samples from which on torch may share out the statistics of a minibatch among threads."""


class _Epoch(NamedTuple):
    """
    The rollout in the order of one epoch, but for its observations.

    :param order: indices in the flattened rollout, shape (n_samples,)
    :param actions: as the buffer keeps them, shape (n_samples, action_dim)
    :param old_values: the old critic's values, shape (n_samples,), as the following
    :param old_log_prob: the old policy's log-probabilities
    :param advantages: normalised within each minibatch, if they are to be
    :param returns: targets of the critic
    """

    order: np.ndarray
    actions: np.ndarray
    old_values: np.ndarray
    old_log_prob: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray


class FusedMinibatch(Minibatch):
    """
    Consecutive samples of an epoch.

    :param epoch: the epoch
    :param rows: which of its samples
    :param indices: where they stand in the flattened rollout, shape (b,)
    :param buffer: the rollout
    """

    def __init__(self, epoch: _Epoch, rows: slice, indices: th.Tensor, buffer: RolloutBuffer) -> None:
        super().__init__(indices, lambda: buffer._get_samples(epoch.order[rows]))
        self.epoch = epoch
        self.rows = rows


class _Part(NamedTuple):
    """
    The networks that a loss depends on, and their parameters.

    :param networks: actor, critic, or both
    :param first: index of the first parameter in the flat order
    :param last: index behind that of the last one
    :param flat_grad: their gradients, shape (n_elements,)
    :param grads: views of these, in the policy's order
    """

    networks: Networks
    first: int
    last: int
    flat_grad: np.ndarray
    grads: list[th.Tensor]


class _Evidence(NamedTuple):
    """What a minibatch's metrics are told from later."""

    minibatch: FusedMinibatch
    values: np.ndarray | None
    log_prob: np.ndarray
    dispersion: np.ndarray
    kl: th.Tensor | None


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
        self._features: th.Tensor | None = None
        self._latest: _Part | None = None
        self._retired = False
        clip_range = self._coefs.clip_range or 0.0
        self._max_norm = np.float32(self._max_grad_norm)
        self._ratio_range = np.float32(1 - clip_range), np.float32(1 + clip_range)
        self._fetch_values()

    def _lay_out(self) -> None:
        """Parameters and gradients as flat vectors, the critic's last."""
        parameters: dict[str, th.Tensor] = dict(self._policy.named_parameters())
        critics = [name for name in parameters if name.startswith(("mlp_extractor.value_net.", "value_net."))]
        actors = [name for name in parameters if name not in critics]
        names = [*actors, *critics]
        self._parameters = [parameters[name] for name in names]
        edges = bounds(self._parameters)
        flat_grad = th.zeros(edges[-1])
        self._flat, self._flat_grad = th.zeros(edges[-1]), flat_grad
        self._values, self._grads = (views(flat, self._parameters) for flat in (self._flat, flat_grad))
        values, grads = (dict(zip(names, parts, strict=True)) for parts in (self._values, self._grads))
        actor, critic = actor_and_critic(self._policy, values, grads)
        self._head = make_head(self._policy.action_dist, values, grads.get("log_std"))

        def part(stacks: list[list[Layer]], first: int, last: int) -> _Part:
            in_policys_order = [grads[name] for name in parameters if name in names[first:last]]
            return _Part(
                Networks(stacks, flat_grad), first, last, flat_grad[edges[first] : edges[last]].numpy(), in_policys_order
            )

        self._joint = part([actor, critic], 0, len(names))
        self._actor = part([actor], 0, len(actors))
        self._critic = part([critic], len(actors), len(names))

    def minibatches(self, batch_size: int) -> Iterator[FusedMinibatch]:
        """SB3's permutation; all but the observations is gathered at once."""
        buffer = self._buffer
        n_samples = buffer.buffer_size * buffer.n_envs
        order = np.random.permutation(n_samples)
        if not buffer.generator_ready:
            for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
                vars(buffer)[name] = buffer.swap_and_flatten(vars(buffer)[name])
            buffer.generator_ready = True
        columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        old_values, old_log_prob, advantages, returns = (column.reshape(-1)[order] for column in columns)
        if self._coefs.normalize_advantage:
            advantages = normalize_each(advantages, batch_size)
        actions = buffer.actions[order].astype(np.float32, copy=False)
        epoch = _Epoch(order, actions, old_values, old_log_prob, advantages, returns)
        for start, indices in zip(range(0, n_samples, batch_size), th.split(th.from_numpy(order), batch_size), strict=True):
            yield FusedMinibatch(epoch, slice(start, start + len(indices)), indices, buffer)

    def _load(self, minibatch: Minibatch, part: _Part) -> Workspace:
        """Make a minibatch's observations the networks' inputs."""
        assert isinstance(minibatch, FusedMinibatch)
        assert minibatch.indices is not None
        if self._features is None:
            self._features = policy_inputs(self._policy, th.as_tensor(self._buffer.observations))
        self._minibatch, self._part = minibatch, part
        self._at_work = at_work = part.networks.at_work(len(minibatch.indices))
        th.index_select(self._features, 0, minibatch.indices, out=at_work.inputs)
        return at_work

    @np.errstate(all="ignore")
    def forward(self, minibatch: Minibatch) -> Forward:
        """Whatever the gradient of :func:`~sb3_ppo_variants.losses.ppo_loss` needs; the loss itself is left for later."""
        coefs, values, kl = self._coefs, None, None
        with th.inference_mode():
            outputs = self._load(minibatch, self._actor if coefs.critic_apart else self._joint).forward()
            epoch, rows = self._minibatch.epoch, self._minibatch.rows
            self._head.forward(outputs[0])
            log_prob = self._head.log_prob(epoch.actions[rows])
            log_ratio = log_prob - epoch.old_log_prob[rows]
            self._ratio = _exp(log_ratio)
            if not coefs.critic_apart:
                self._new_values = values = outputs[1][:, 0].copy()
                self._vf_coef = coefs.vf_coef
            if coefs.penalizes_kl:
                assert self._trust_region is not None
                assert minibatch.indices is not None
                kl = self._head.kl(self._trust_region.old_at(minibatch.indices))
                self._mean_kl = np.float32(kl.mean())
        if math.isnan(log_prob.dot(log_prob)):  # the fastest way to ask whether any is NaN
            self._raise_what_sb3_raises(minibatch)
        evidence = _Evidence(self._minibatch, values, log_prob, self._head.dispersion, kl)
        return Forward(log_ratio, self._head.params, LazyMetrics(len(log_prob), evidence, self._measure))

    def _raise_what_sb3_raises(self, minibatch: Minibatch) -> None:
        """SB3's distributions refuse NaN, unless they have been told not to."""
        self.publish()
        actions = policy_actions(minibatch.samples.actions, self._action_space)
        self._policy.evaluate_actions(minibatch.samples.observations, actions)

    @th.inference_mode()
    def _measure(self, evidence: Sequence[_Evidence]) -> Metrics:
        """The metrics of consecutive minibatches of equal size, by the reference's formulas."""
        _, values, log_prob, dispersion, kl = zip(*evidence, strict=True)
        epoch, n_samples = evidence[0].minibatch.epoch, len(log_prob[0])
        rows = slice(evidence[0].minibatch.rows.start, evidence[-1].minibatch.rows.stop)
        new = Evaluation(
            None if values[0] is None else th.from_numpy(np.stack(values)),
            th.from_numpy(np.stack(log_prob)),
            self._head.entropy(dispersion, n_samples),
            None if kl[0] is None else th.stack(kl),
        )
        columns = (epoch.old_values, epoch.old_log_prob, epoch.advantages, epoch.returns)
        old = Samples(*(th.from_numpy(column[rows]).view(-1, n_samples) for column in columns))
        return ppo_loss(new, old, self._coefs._replace(normalize_advantage=False), mean_of_each)[1]

    def critic_forward(self, minibatch: Minibatch, vf_coef: float) -> Metrics:
        """The value loss, for a gradient at the critic's own parameters."""
        with th.inference_mode():
            values = self._load(minibatch, self._critic).forward()[0][:, 0]
            self._new_values, self._vf_coef = values, vf_coef
            epoch, rows, nothing = self._minibatch.epoch, self._minibatch.rows, th.empty(0)
            old = Samples(th.from_numpy(epoch.old_values[rows]), nothing, nothing, th.from_numpy(epoch.returns[rows]))
            return {"value_loss": value_loss(th.from_numpy(values.copy()), old, self._coefs.clip_range_vf)}

    @np.errstate(all="ignore")
    def backward(self) -> Metrics:
        """The gradient, kept until it is published."""
        part = self._latest = self._part
        with th.inference_mode():
            if part is not self._critic:
                d_log_prob = self._d_ratio() * self._ratio
                self._head.backward(d_log_prob, self._d_entropy(), self._d_kl(), self._at_work.d_outputs[0])
            if part is not self._actor:
                self._at_work.d_outputs[-1][:, 0] = self._d_values()
            self._at_work.backward()
            norm = th.linalg.vector_norm(th.stack(th._foreach_norm(part.grads)))
            scale = ONE / (norm.numpy() + NORM_EPS) * self._max_norm  # as torch divides a number by a tensor
            if not scale >= 1:
                np.multiply(part.flat_grad, scale, out=part.flat_grad)
        return {"grad_norm": norm}

    def _d_ratio(self) -> np.ndarray:
        """At r, of -mean(r A), or of -mean(min(r A, clip(r) A)); where both are equal, each gets half of the gradient."""
        ratio = self._ratio
        advantages = self._minibatch.epoch.advantages[self._minibatch.rows]
        d_surrogate: np.ndarray = (-ONE / np.float32(len(ratio))) * advantages
        if self._coefs.clip_range is None:
            return d_surrogate
        low, high = self._ratio_range
        clipped_ratio = np.minimum(np.maximum(ratio, low), high)
        share = (1 + np.sign(advantages * clipped_ratio - advantages * ratio)) / 2
        d_ratio: np.ndarray = d_surrogate * np.maximum(share, clipped_ratio == ratio)
        return d_ratio

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
        assert self._vf_coef is not None
        epoch, rows, values = self._minibatch.epoch, self._minibatch.rows, self._new_values
        returns, clip_range_vf = epoch.returns[rows], self._coefs.clip_range_vf
        slope, vf_coef = np.float32(2 / len(values)), np.float32(self._vf_coef)
        if clip_range_vf is None:
            d_values: np.ndarray = slope * (values - returns) * vf_coef
            return d_values
        low, high, old_values = np.float32(-clip_range_vf), np.float32(clip_range_vf), epoch.old_values[rows]
        move = values - old_values
        predicted = old_values + np.minimum(np.maximum(move, low), high)
        inside = (move >= low) & (move <= high)
        return np.where(inside, slope * (predicted - returns) * vf_coef, np.float32(0))

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
        if self._latest is not None:
            graded = range(self._latest.first, self._latest.last)
            for index, parameter in enumerate(self._parameters):
                parameter.grad = self._grads[index].clone() if index in graded else None
        for adam in self._adams.values():
            adam.publish()

    @th.no_grad()
    def fetch(self) -> bool:
        """Into the flat vectors; anything may have happened to the policy, or to the rollout."""
        if not self._can_go_on():
            self._retired = True
            return False
        self._features = None
        self._fetch_values()
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not None:
                grad.copy_(parameter.grad)
        for adam in self._adams.values():
            adam.fetch()
        return True

    def _can_go_on(self) -> bool:
        graded = [] if self._latest is None else self._parameters[self._latest.first : self._latest.last]
        return (
            why_not_fused(self._policy, self._buffer, list(self._adams)) is None
            and set(map(id, self._parameters)) == set(map(id, self._policy.parameters()))
            and all(parameter.grad is not None for parameter in graded)
        )

    def _fetch_values(self) -> None:
        th._foreach_copy_(self._values, [parameter.detach() for parameter in self._parameters])


def _exp(array: np.ndarray) -> np.ndarray:
    """``torch.exp``, in its bits."""
    result = np.empty_like(array)
    th.exp(th.from_numpy(array), out=th.from_numpy(result))
    return result


def normalize_each(advantages: np.ndarray, batch_size: int) -> np.ndarray:
    """
    :func:`~sb3_ppo_variants.losses.normalize` of each minibatch, in its bits.

    :param advantages: of an epoch, in its order, shape (n_samples,)
    :param batch_size: samples a minibatch, the last one may have fewer
    """
    n_rest = len(advantages) % batch_size
    if batch_size == 1 or batch_size >= LARGE_MINIBATCH:
        return th.cat([normalize(minibatch) for minibatch in th.split(th.from_numpy(advantages), batch_size)]).numpy()
    rows = th.from_numpy(advantages[: len(advantages) - n_rest]).view(-1, batch_size)
    mean = rows.mean(dim=1, keepdim=True)
    # As torch's `std` of a vector: squares in float64, added up one after the other.
    squares = (rows.double() - mean.double()).square().cumsum(dim=1)[:, -1:]
    std = (squares / (batch_size - 1)).sqrt().float()
    normalized: np.ndarray = ((rows - mean) / (std + 1e-8)).flatten().numpy()
    if n_rest == 0:
        return normalized
    return np.concatenate([normalized, normalize(th.from_numpy(advantages[-n_rest:])).numpy()])
