"""What one update has done so far: collected while it runs, read by the logs and by the hooks of callbacks."""

from collections import defaultdict

import numpy as np
import torch as th

from sb3_ppo_variants.losses import Coefficients, Evaluation, Metrics
from sb3_ppo_variants.rollout import Minibatch
from sb3_ppo_variants.trust_region import Displacement, TrustRegion


class UpdateStats:
    """
    The running update, given to the hooks of :class:`~sb3_ppo_variants.callbacks.UpdateCallback`.

    Metrics stay detached tensors on their device until they are asked for as numbers. Their names: ``loss``,
    ``policy_loss``, ``value_loss``, ``entropy_loss``, ``approx_kl``, ``grad_norm`` (before clipping); where they exist
    ``clip_fraction``, ``kl`` (exact, on the minibatch) and ``kl_penalty_loss``.

    :param coefs: the coefficients in effect
    :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
    """

    epochs_completed: int
    """Passes over the rollout that the policy has completed, and so the index of the running one, from 0."""
    gradient_steps: int
    """Steps of the policy's optimiser."""
    minibatch: Minibatch
    """The latest minibatch: its samples and their indices in the flattened rollout."""
    log_ratio: th.Tensor
    """ln pi_new(a|s) - ln pi_old(a|s) of the latest minibatch, shape (b,)."""
    kl: th.Tensor | None
    """Exact KL(old || new) of the latest minibatch, shape (b,), in nats; ``None`` if it is not known."""
    displacement: Displacement | None
    """How far the whole update has moved the policy; set before ``_on_update_end``, ``None`` if it is not known."""

    def __init__(self, coefs: Coefficients, trust_region: TrustRegion | None) -> None:
        self.coefs = coefs
        self.epochs_completed = 0
        self.gradient_steps = 0
        self.displacement = None
        self.policy_stopped = False
        self.critic_stopped = False
        self._trust_region = trust_region
        self._history: defaultdict[str, list[th.Tensor]] = defaultdict(list)
        self._epochs: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, metrics: Metrics) -> None:
        """Append the metrics of one minibatch, each of shape ()."""
        for name, metric in metrics.items():
            self._history[name].append(metric)
            self._epochs[name].append(self.epochs_completed)

    def add_minibatch(self, minibatch: Minibatch, new: Evaluation, metrics: Metrics) -> None:
        """Make a minibatch the latest one, and append its metrics."""
        self.minibatch = minibatch
        self.log_ratio = new.log_prob.detach() - minibatch.samples.old_log_prob
        self.kl = None if new.kl is None else new.kl.detach()
        self.add(metrics)

    def stop_policy(self) -> None:
        """End the policy's part of this update; the critic's minibatches go on to the last epoch."""
        self.policy_stopped = True

    def stop(self) -> None:
        """End this update, for policy and critic."""
        self.policy_stopped = self.critic_stopped = True

    def __contains__(self, name: str) -> bool:
        return name in self._history

    def latest(self, name: str) -> float:
        """The metric on the latest minibatch."""
        return float(self.latest_array(name))

    def latest_array(self, name: str) -> np.ndarray:
        """The metric on the latest minibatch, shape (), in its own dtype."""
        return self._history[name][-1].cpu().numpy()

    def series(self, name: str) -> np.ndarray:
        """The metric on every minibatch of the update so far, shape (n_minibatches,), in its own dtype."""
        return np.array([metric.cpu().numpy() for metric in self._history[name]])

    def last_epoch(self, name: str) -> np.ndarray:
        """The metric on every minibatch of the last epoch that has any, shape (n_minibatches,), in its own dtype."""
        epochs = self._epochs[name]
        return self.series(name)[epochs.index(epochs[-1]) :]

    def epoch_means(self, name: str) -> list[float]:
        """The metric's mean over the minibatches of each epoch so far, in float64."""
        series, epochs = self.series(name).astype(np.float64), np.array(self._epochs[name])
        return [float(series[epochs == epoch].mean()) for epoch in np.unique(epochs)]

    def mean(self, name: str) -> float:
        """The metric's mean over the minibatches of the update so far, in float64."""
        return float(np.mean(self.series(name).astype(np.float64)))

    def measure(self) -> Displacement:
        """
        How far the policy is from the old one by now, on every state of the rollout; costs a forward pass of the actor.

        :raises ValueError: if the exact KL is not known for this policy or rollout buffer
        """
        if self._trust_region is None:
            raise ValueError("the exact KL is not known for this policy's action distribution or rollout buffer class")
        return self._trust_region.measure()
