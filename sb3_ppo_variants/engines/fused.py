"""
The fused engine: the gradients of an MLP policy by hand, in the bits of autograd, at a fraction of its cost.

Why the bits agree: every operation is the one that autograd would run, on the operands that autograd would give it, and
sums are taken in autograd's order.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_variants.engines.engine import Engine, Forward, LazyMetrics
from sb3_ppo_variants.engines.flat_adam import FlatAdam, bounds, views
from sb3_ppo_variants.engines.heads import any_nan, make_head
from sb3_ppo_variants.engines.network import (
    Layer,
    Networks,
    Workspace,
    actor_and_critic,
    input_writer,
    is_critics,
    takes_plain_numbers,
)
from sb3_ppo_variants.engines.reasons import why_not_fused
from sb3_ppo_variants.engines.watch import Watch
from sb3_ppo_variants.losses import (
    Evaluation,
    Metrics,
    Samples,
    mean_of_each,
    normalize_each,
    normalize_over_ranks,
    ppo_loss,
    rolls_back,
    value_loss,
)
from sb3_ppo_variants.rollout import Minibatch, flatten, policy_actions

ONE, NORM_EPS = np.float32(1), np.float32(1e-6)
ZEROS = np.array([0.0, -0.0], dtype=np.float32)
"""Added where clipping takes a gradient away, which makes -0 a 0, and where it doesn't, which changes nothing."""


class _Columns(NamedTuple):
    """
    Samples of the rollout, but for their observations.

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
    A minibatch as the fused engine wants it.

    :param columns: its samples
    :param buffer: the rollout
    """

    def __init__(self, columns: _Columns, buffer: RolloutBuffer) -> None:
        super().__init__(None, lambda: buffer._get_samples(columns.order))
        self.columns = columns

    @property
    def indices(self) -> th.Tensor:
        """As in the base class, made when asked for."""
        return th.from_numpy(self.columns.order)


class _Part(NamedTuple):
    """
    The networks that a loss depends on, and their parameters.

    :param networks: actor, critic, or both
    :param first: index of the first parameter in the flat order
    :param last: index behind that of the last one
    :param names: of these parameters
    :param flat_grad: their gradients, shape (n_elements,)
    :param grads: views of these, in the policy's order
    """

    networks: Networks
    first: int
    last: int
    names: set[str]
    flat_grad: np.ndarray
    grads: list[th.Tensor]


class _Evidence(NamedTuple):
    """What a minibatch's metrics are told from later."""

    columns: _Columns
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
        self._watched = False
        self._features: np.ndarray | None = None
        self._latest: _Part | None = None
        self._retired = False
        low, high = self._coefs.clip_range or (0.0, 0.0)
        self._max_norm = np.float32(float(self._max_grad_norm))
        self._ratio_range = np.float32(1 - low), np.float32(1 + high)
        self._set_up()
        self._fetch_values()

    def _set_up(self) -> None:
        """For the policy as it is built now."""
        self._lay_out()
        self._adams: dict[th.optim.Optimizer, FlatAdam] = {}
        self._watch = Watch(self._policy)
        self._write_inputs = input_writer(self._policy)
        self._plain = takes_plain_numbers(self._policy)
        self._optimizer = self._policy.optimizer
        self._evaluated = False

    def _lay_out(self) -> None:
        """Parameters and gradients as flat vectors, the critic's last."""
        parameters: dict[str, th.Tensor] = dict(self._policy.named_parameters())
        critics = [name for name in parameters if is_critics(name)]
        actors = [name for name in parameters if name not in critics]
        names = [*actors, *critics]
        self._parameters = [parameters[name] for name in names]
        edges = bounds(self._parameters)
        flat_grad = th.zeros(edges[-1], dtype=th.float32)
        self._flat, self._flat_grad = th.zeros(edges[-1], dtype=th.float32), flat_grad
        self._values, self._grads = (views(flat, self._parameters) for flat in (self._flat, flat_grad))
        values, grads = (dict(zip(names, parts, strict=True)) for parts in (self._values, self._grads))
        actor, critic = actor_and_critic(self._policy, values, grads)
        self._head = make_head(self._policy.action_dist, values, grads.get("log_std"))

        def part(stacks: list[list[Layer]], first: int, last: int) -> _Part:
            in_policys_order = [grads[name] for name in parameters if name in names[first:last]]
            networks, flat = Networks(stacks, flat_grad), flat_grad[edges[first] : edges[last]].numpy()
            return _Part(networks, first, last, set(names[first:last]), flat, in_policys_order)

        self._joint = part([actor, critic], 0, len(names))
        self._actor = part([actor], 0, len(actors))
        self._critic = part([critic], len(actors), len(names))

    def minibatches(self, batch_size: int) -> Iterator[FusedMinibatch]:
        """SB3's permutation; gathered at once, unless callbacks might change the rollout in between."""
        flatten(self._buffer)
        order = np.random.permutation(self._buffer.buffer_size * self._buffer.n_envs)
        epoch = None if self._watched else self._gather(order, batch_size)
        for start in range(0, len(order), batch_size):
            rows = slice(start, start + batch_size)
            if epoch is None or self._watched:
                yield FusedMinibatch(self._gather(order[rows], batch_size), self._buffer)
            else:
                yield FusedMinibatch(_Columns(*(column[rows] for column in epoch)), self._buffer)

    def _gather(self, order: np.ndarray, batch_size: int) -> _Columns:
        buffer = self._buffer
        columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        old_values, old_log_prob, advantages, returns = (column.reshape(-1)[order] for column in columns)
        if self._coefs.normalize_advantage:
            advantages = self._normalize(th.from_numpy(advantages), batch_size).numpy()
        actions = buffer.actions[order].astype(np.float32, copy=False)
        return _Columns(order, actions, old_values, old_log_prob, advantages, returns)

    def _normalize(self, advantages: th.Tensor, batch_size: int) -> th.Tensor:
        if self._ranks.several:
            return normalize_over_ranks(advantages, batch_size, self._ranks)
        return normalize_each(advantages, batch_size)

    def _load(self, minibatch: Minibatch, part: _Part) -> Workspace:
        """Make a minibatch's observations the networks' inputs."""
        assert isinstance(minibatch, FusedMinibatch)
        self._columns, self._part = minibatch.columns, part
        self._at_work = at_work = part.networks.at_work(len(self._columns.order))
        order, observations = self._columns.order, self._buffer.observations
        if self._watched or not self._plain:
            self._write_inputs(observations[order], at_work.inputs)
            return at_work
        if self._features is None:
            self._features = observations.reshape(len(observations), -1).astype(np.float32, copy=False)
        np.take(self._features, order, axis=0, out=at_work.inputs.numpy(), mode="clip")
        return at_work

    @np.errstate(all="ignore")
    def forward(self, minibatch: Minibatch) -> Forward:
        """Whatever the gradient of :func:`~sb3_ppo_variants.losses.ppo_loss` needs; the loss itself is left for later."""
        coefs, values, kl = self._coefs, None, None
        with th.inference_mode():
            outputs = self._load(minibatch, self._actor if coefs.critic_apart else self._joint).forward()
            columns = self._columns
            self._head.forward(outputs[0])
            self._evaluated = True
            log_prob = self._head.log_prob(columns.actions)
            log_ratio = log_prob - columns.old_log_prob
            self._ratio = _exp(log_ratio)
            if not coefs.critic_apart:
                self._new_values = values = outputs[1][:, 0].copy()
                self._vf_coef = coefs.vf_coef
            if coefs.penalizes_kl:
                assert self._trust_region is not None
                assert minibatch.indices is not None
                kl = self._head.kl(self._trust_region.old_at(minibatch.indices))
                self._kl = kl
        if any_nan(log_prob):
            self._raise_what_sb3_raises(minibatch)
        evidence = _Evidence(columns, values, log_prob, self._head.dispersion, kl)
        return Forward(log_ratio, self._head.params, LazyMetrics(len(log_prob), evidence, self._measure))

    def _raise_what_sb3_raises(self, minibatch: Minibatch) -> None:
        """SB3's distributions refuse NaN, unless they have been told not to."""
        self.publish()
        actions = policy_actions(minibatch.samples.actions, self._action_space)
        self._policy.evaluate_actions(minibatch.samples.observations, actions)

    @th.inference_mode()
    def _measure(self, evidence: Sequence[_Evidence]) -> Metrics:
        """The metrics of consecutive minibatches of equal size, by the reference's formulas."""
        columns, values, log_prob, dispersion, kl = zip(*evidence, strict=True)
        new = Evaluation(
            None if values[0] is None else _stack(values),
            _stack(log_prob),
            self._head.entropy(dispersion, len(log_prob[0])),
            None if kl[0] is None else th.stack(kl),
        )
        _, _, *old = zip(*columns, strict=True)
        coefs = self._coefs._replace(normalize_advantage=False)
        return ppo_loss(new, Samples(*map(_stack, old)), coefs, mean_of_each)[1]

    def critic_forward(self, minibatch: Minibatch, vf_coef: float) -> Metrics:
        """The value loss, for a gradient at the critic's own parameters."""
        with th.inference_mode():
            values = self._load(minibatch, self._critic).forward()[0][:, 0]
            self._new_values, self._vf_coef = values, vf_coef
            columns, nothing = self._columns, th.empty(0, dtype=th.float32)
            old = Samples(th.from_numpy(columns.old_values), nothing, nothing, th.from_numpy(columns.returns))
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
            self._ranks.average(th.from_numpy(part.flat_grad))
            norm = th.linalg.vector_norm(th.stack(th._foreach_norm(part.grads)))
            scale = ONE / (norm.numpy() + NORM_EPS) * self._max_norm  # as torch divides a number by a tensor
            if not scale >= 1:
                np.multiply(part.flat_grad, scale, out=part.flat_grad)
        return {"grad_norm": norm}

    def _d_ratio(self) -> np.ndarray:
        """At r, of -mean(r A), or of what bounds it; where two are equal, each gets half of the gradient."""
        ratio, advantages, coefs = self._ratio, self._columns.advantages, self._coefs
        d_surrogate: np.ndarray = (-ONE / np.float32(len(ratio))) * advantages
        if coefs.clip_range is None:
            return d_surrogate
        if coefs.surrogate == "spo":
            weight = np.abs(advantages) / np.float32(2 * coefs.clip_range[0])
            d_spo: np.ndarray = d_surrogate + (ONE / np.float32(len(ratio))) * weight * (2 * (ratio - 1))
            return d_spo
        low, high = self._ratio_range
        clipped_ratio = np.minimum(np.maximum(ratio, low), high)
        share = (1 + np.sign(advantages * clipped_ratio - advantages * ratio)) / 2
        inside = clipped_ratio == ratio
        d_ratio: np.ndarray = d_surrogate * np.maximum(share, inside) + ZEROS[inside.view(np.int8)]
        if coefs.dual_clip is not None:
            clipped = np.minimum(advantages * ratio, advantages * clipped_ratio)
            bound = np.where(advantages < 0, np.float32(coefs.dual_clip) * advantages, -np.inf)
            d_ratio *= (1 + np.sign(clipped - bound)) / 2
        return d_ratio

    def _d_entropy(self) -> np.float32 | None:
        """At each entropy S, of -ent_coef mean(S)."""
        if self._coefs.ent_coef == 0:
            return None
        return -np.float32(self._coefs.ent_coef) / np.float32(len(self._ratio))

    def _d_kl(self) -> np.ndarray | None:
        """At each KL, of beta mean(KL), and of the hinge."""
        coefs, n_samples = self._coefs, np.float32(len(self._ratio))
        if not coefs.penalizes_kl:
            return None
        slope, hinge = np.float32(coefs.kl_coef), np.float32(0)
        excess = np.float32(self._ranks.mean(self._kl.mean())) - np.float32(coefs.hinge_kl)
        if coefs.hinge_coef > 0 and excess > 0:
            hinge = np.float32(coefs.hinge_coef) * (2 * excess)
        if coefs.kl_rollback is None:
            return np.full(len(self._ratio), (hinge + slope) / n_samples)
        ratio, advantages = map(th.from_numpy, (self._ratio, self._columns.advantages))
        d_kl: np.ndarray = (
            hinge / n_samples + slope / n_samples * rolls_back(self._kl, ratio, advantages, coefs.kl_rollback).numpy()
        )
        return d_kl

    def _d_values(self) -> np.ndarray:
        """At V, of vf_coef mean((V - R)^2), where V is clipped to the old one's vicinity if wanted."""
        assert self._vf_coef is not None
        values, returns, clip_range_vf = self._new_values, self._columns.returns, self._coefs.clip_range_vf
        slope, vf_coef = np.float32(2 / len(values)), np.float32(self._vf_coef)
        if clip_range_vf is None:
            d_values: np.ndarray = slope * (values - returns) * vf_coef
            return d_values
        low, high, old_values = np.float32(-clip_range_vf), np.float32(clip_range_vf), self._columns.old_values
        move = values - old_values
        predicted = old_values + np.minimum(np.maximum(move, low), high)
        inside = (move >= low) & (move <= high)
        return np.where(inside, slope * (predicted - returns) * vf_coef, np.float32(0))

    @np.errstate(all="ignore")
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
        if self._evaluated:
            self._policy.action_dist.distribution = self._head.distribution()
        th._foreach_copy_(self._parameters, self._values)
        if self._latest is not None:
            graded = range(self._latest.first, self._latest.last)
            for index, parameter in enumerate(self._parameters):
                parameter.grad = self._grads[index].clone() if index in graded else None
        for adam in self._adams.values():
            adam.publish()

    @th.no_grad()
    def fetch(self) -> str | None:
        """Into the flat vectors; anything may have happened to the policy, or to the rollout."""
        obstacle = self._obstacle()
        if obstacle is not None:
            self._retired = True
            return obstacle
        if not self._watch.is_current(self._policy) or self._policy.optimizer is not self._optimizer:
            self._start_anew()
        self._watched = True
        self._fetch_values()
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not None:
                grad.copy_(parameter.grad)
        self._adams = {optimizer: adam for optimizer, adam in self._adams.items() if adam.fetch()}
        return None

    def _start_anew(self) -> None:
        """After somebody has rebuilt the policy, in a way that makes no difference to the loss of the latest minibatch."""
        parts = [self._joint, self._actor, self._critic]
        latest = None if self._latest is None else parts.index(self._latest)
        self._set_up()
        if latest is not None:
            self._latest = self._part = [self._joint, self._actor, self._critic][latest]

    def _obstacle(self) -> str | None:
        """What keeps the step on the latest minibatch, or the next minibatch, from being made here."""
        others = [optimizer for optimizer in self._adams if optimizer is not self._optimizer]
        reason = why_not_fused(self._policy, self._buffer, others)
        if reason is None and self._latest is not None:
            graded = {name for name, parameter in self._policy.named_parameters() if parameter.grad is not None}
            if graded != self._latest.names:
                return "a callback has removed or added a gradient"
        return reason

    def _fetch_values(self) -> None:
        th._foreach_copy_(self._values, [parameter.detach() for parameter in self._parameters])


def _stack(arrays: Sequence[np.ndarray]) -> th.Tensor:
    return th.from_numpy(np.stack(arrays))


def _exp(array: np.ndarray) -> np.ndarray:
    """``torch.exp``, in its bits."""
    result = np.empty_like(array)
    th.exp(th.from_numpy(array), out=th.from_numpy(result))
    return result
