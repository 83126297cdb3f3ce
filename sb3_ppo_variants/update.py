"""What one update has done so far: collected while it runs, read by the logs and by the hooks of callbacks."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_ppo_variants.engines.engine import Forward, LazyMetrics
from sb3_ppo_variants.kl import DistributionParams
from sb3_ppo_variants.losses import Coefficients, Metrics
from sb3_ppo_variants.rollout import Minibatch
from sb3_ppo_variants.trust_region import Displacement, TrustRegion

MAX_PENDING = 2**18
"""Numbers in the distributions' parameters that are kept until their KL is evaluated."""

MAX_UNMEASURED = 2**16
"""Samples of minibatches whose metrics are still to be measured."""


class _Record(NamedTuple):
    """A metric on consecutive minibatches: their epochs, and values of shape (), or (m,) on ``m`` of them."""

    epochs: list[int]
    values: th.Tensor


class UpdateStats:
    """
    The running update, given to the hooks of :class:`~sb3_ppo_variants.callbacks.UpdateCallback`.

    Metrics stay detached tensors on their device until they are asked for as numbers. Their names: ``loss``,
    ``policy_loss``, ``value_loss``, ``entropy_loss``, ``approx_kl``, ``grad_norm`` (before clipping), and where they
    exist ``clip_fraction`` and ``kl_penalty_loss``.

    :param coefs: the coefficients in effect
    :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
    :param keep_kls: whether anybody may ask for the exact KL of minibatches before the latest one
    """

    epochs_completed: int
    """Passes over the rollout that the policy has completed, and so the index of the running one, from 0."""
    gradient_steps: int
    """Steps of the policy's optimiser."""
    minibatch: Minibatch
    """The latest minibatch: its samples and their indices in the flattened rollout."""
    n_minibatches: int
    """Minibatches of the policy's passes so far."""
    n_skipped: int
    """Minibatches, of the policy's passes or the critic's, that were left out as their gradients weren't finite."""
    restored: bool
    """Whether the update was taken back, as something in it wasn't finite; known before ``_on_update_end``."""
    n_halvings: int | None
    """How often the whole step had to be halved for ``max_kl``; ``None`` without."""
    whole_step_kl: float | None
    """Mean of the exact KL(old || new), in nats, that the update had before ``max_kl`` or a callback took part of it back."""
    displacement: Displacement | None
    """How far the whole update has moved the policy; set before ``_on_update_end``, ``None`` if it is not known."""

    def __init__(self, coefs: Coefficients, trust_region: TrustRegion | None, keep_kls: bool = True) -> None:
        self.coefs = coefs
        self.epochs_completed = 0
        self.gradient_steps = 0
        self.displacement = None
        self.whole_step_kl: float | None = None
        self.policy_stopped = False
        self.critic_stopped = False
        self.n_minibatches = 0
        self.n_skipped = 0
        self.restored = False
        self.n_halvings: int | None = None
        self._trust_region = trust_region
        self._history: dict[str, list[_Record]] = {}
        self._keep_kls = keep_kls
        self._forward: Forward
        self._kls: list[tuple[int, th.Tensor]] = []
        # The exact KL costs several small operations: evaluated over many minibatches at once.
        self._pending: list[tuple[int, th.Tensor, DistributionParams]] = []
        self._n_pending = 0
        # The same holds for the other metrics: those of minibatches of equal size.
        self._unmeasured: list[LazyMetrics] = []
        self._unmeasured_epochs: list[int] = []

    def add_minibatch(self, minibatch: Minibatch, forward: Forward) -> None:
        """
        Make a minibatch the latest one.

        :param minibatch: the minibatch
        :param forward: what it shows of the current policy
        """
        self.minibatch = minibatch
        self.n_minibatches += 1
        self._forward = forward
        self._latest_has_kl = False
        if self._keep_kls:
            self._keep_for_kl(minibatch, forward.params())
        if isinstance(forward.metrics, LazyMetrics):
            self._add_lazily(forward.metrics)
        else:
            self.add(forward.metrics)

    def drop_minibatch(self) -> None:
        """Forget what the latest minibatch has shown, before its gradient's norm is added: it isn't learned from."""
        if self._latest_has_kl:
            if self._pending:
                self._n_pending -= self._pending.pop()[2].tensors()[0].numel()
            else:
                self._kls.pop()
        if isinstance(self._forward.metrics, LazyMetrics):
            self._unmeasured.pop()
            self._unmeasured_epochs.pop()
        else:
            for name in self._forward.metrics:
                self._history[name].pop()
                if not self._history[name]:
                    del self._history[name]

    def add(self, metrics: Metrics) -> None:
        """Append metrics of the latest minibatch, each of shape ()."""
        if metrics.keys() != {"grad_norm"}:  # which is never left for later: all others have to wait for their turn
            self._measure_metrics()
        for name, metric in metrics.items():
            self._history.setdefault(name, []).append(_Record([self.epochs_completed], metric))

    def _add_lazily(self, metrics: LazyMetrics) -> None:
        n_unmeasured = len(self._unmeasured)
        if n_unmeasured and not (
            self._unmeasured[0].n_samples == metrics.n_samples and n_unmeasured * metrics.n_samples < MAX_UNMEASURED
        ):
            self._measure_metrics()
        self._unmeasured.append(metrics)
        self._unmeasured_epochs.append(self.epochs_completed)

    def _measure_metrics(self) -> None:
        """Fill in the metrics of the minibatches that have left them out."""
        if self._unmeasured:
            metrics = self._unmeasured[0].measure([lazily.evidence for lazily in self._unmeasured])
            epochs, self._unmeasured, self._unmeasured_epochs = self._unmeasured_epochs, [], []
            for name, values in metrics.items():
                self._history.setdefault(name, []).append(_Record(epochs, values))

    def _keep_for_kl(self, minibatch: Minibatch, params: DistributionParams | None) -> None:
        if params is not None and minibatch.indices is not None:
            self._latest_has_kl = True
            self._pending.append((self.epochs_completed, minibatch.indices, params))
            self._n_pending += params.tensors()[0].numel()
            if self._n_pending > MAX_PENDING:
                self._minibatch_kls()

    def stop_policy(self) -> None:
        """End the policy's part of this update; the critic's minibatches go on to the last epoch."""
        self.policy_stopped = True

    def stop(self) -> None:
        """End this update, for policy and critic."""
        self.policy_stopped = self.critic_stopped = True

    def stop_policy_phase(self) -> None:
        """End the policy's part, and the critic's too unless it has passes of its own, which go on."""
        if self.coefs.critic_apart:
            self.stop_policy()
        else:
            self.stop()

    @property
    def log_ratio(self) -> th.Tensor:
        """Ln pi_new(a|s) - ln pi_old(a|s) of the latest minibatch, shape (b,)."""
        return th.as_tensor(self._forward.log_ratio)

    @property
    def kl(self) -> th.Tensor | None:
        """Exact KL(old || new) of the latest minibatch, shape (b,), in nats; ``None`` if it is not known."""
        params = self._forward.params()
        if self._trust_region is None or params is None or self.minibatch.indices is None:
            return None
        return self._trust_region.kl(self.minibatch.indices, params)

    def kl_series(self) -> np.ndarray:
        """Exact KL(old || new) of every minibatch so far, averaged over its samples, in nats; empty if it is not known."""
        return np.array([kl.mean().item() for _, kl in self._minibatch_kls()])

    def kl_per_epoch(self) -> list[float]:
        """Exact KL(old || new) during each epoch so far, averaged over its samples, in nats; empty if it is not known."""
        kls = self._minibatch_kls()
        epochs = sorted({epoch for epoch, _ in kls})
        return [th.cat([kl for epoch, kl in kls if epoch == running]).mean().item() for running in epochs]

    def _minibatch_kls(self) -> list[tuple[int, th.Tensor]]:
        """The epoch and the samples' KL, of shape (b,), of each minibatch whose exact KL is known."""
        if self._pending:
            assert self._trust_region is not None
            epochs, indices, params = zip(*self._pending, strict=True)
            kl = self._trust_region.kl(th.cat(indices), type(params[0]).cat(params))
            self._kls.extend(zip(epochs, th.split(kl, [len(rows) for rows in indices]), strict=True))
            self._pending, self._n_pending = [], 0
        return self._kls

    def __contains__(self, name: str) -> bool:
        self._measure_metrics()
        return name in self._history

    def latest(self, name: str) -> float:
        """
        The metric on the latest minibatch.

        :raises KeyError: if there is no such metric
        """
        return float(self._records(name)[-1].values.flatten()[-1])

    def series(self, name: str) -> np.ndarray:
        """
        The metric on every minibatch of the update so far, shape (n_minibatches,), in its own dtype.

        :raises KeyError: if there is no such metric
        """
        return _join(self._records(name))

    def last_epoch(self, name: str) -> np.ndarray:
        """The metric on every minibatch of the last epoch that has any, shape (n_minibatches,), in its own dtype."""
        records = self._records(name)
        epochs = [epoch for record in records for epoch in record.epochs]
        return _join(records)[epochs.index(epochs[-1]) :]

    def mean(self, name: str) -> float:
        """
        The metric's mean over the minibatches of the update so far, in float64.

        :raises KeyError: if there is no such metric
        """
        return np.float64(np.mean(self.series(name).astype(np.float64)))  # SB3 logs this type, too

    def measure(self) -> Displacement:
        """
        How far the policy is from the old one by now, on every state of the rollout; costs a forward pass of the actor.

        :raises ValueError: if the exact KL is not known for this policy or rollout buffer
        """
        if self._trust_region is None:
            raise ValueError("the exact KL is not known for this policy's action distribution or rollout buffer class")
        return self._trust_region.measure()

    def _records(self, name: str) -> list[_Record]:
        if name not in self:
            raise KeyError(f"there is no metric {name!r} in this update so far, only {', '.join(self._history) or 'none'}")
        return self._history[name]


def _join(records: list[_Record]) -> np.ndarray:
    return np.concatenate([record.values.cpu().numpy().reshape(-1) for record in records])
