"""What every engine does: gradient steps on minibatches of one rollout."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.distributed import ALONE, Ranks
from sb3_ppo_variants.kl import DistributionParams
from sb3_ppo_variants.losses import Coefficients, Metrics
from sb3_ppo_variants.rollout import Minibatch
from sb3_ppo_variants.trust_region import TrustRegion


class LazyMetrics(NamedTuple):
    """
    What the metrics of a minibatch can be told from: of many at once in a fraction of the time.

    :param n_samples: in the minibatch
    :param evidence: what ``measure`` goes by
    :param measure: the metrics, each of shape (m,), of ``m`` consecutive minibatches of equal size
    """

    n_samples: int
    evidence: Any
    measure: Callable[[Sequence[Any]], Metrics]


class Forward(NamedTuple):
    """
    What a minibatch of ``b`` samples shows of the current policy, all detached.

    :param log_ratio: ln pi_new(a|s) - ln pi_old(a|s), shape (b,)
    :param params: tells the action distributions' parameters until the next forward pass, ``None`` if they are not known
    :param metrics: the losses and what else is logged, each of shape (); or what tells them later
    """

    log_ratio: th.Tensor | np.ndarray
    params: Callable[[], DistributionParams | None]
    metrics: Metrics | LazyMetrics


class Engine(ABC):
    """
    Takes gradient steps on minibatches: :meth:`forward`, :meth:`backward`, :meth:`step`, in this order.

    :param policy: the policy that is updated
    :param buffer: the full rollout buffer
    :param action_space: of the environment
    :param coefs: the coefficients in effect
    :param max_grad_norm: gradients are scaled down to this norm
    :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
    :param ranks: that take the step together, each on a minibatch of its own
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        buffer: RolloutBuffer,
        action_space: spaces.Space[Any],
        coefs: Coefficients,
        max_grad_norm: float,
        trust_region: TrustRegion | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._policy = policy
        self._buffer = buffer
        self._action_space = action_space
        self._coefs = coefs
        self._max_grad_norm = max_grad_norm
        self._trust_region = trust_region
        self._ranks = ranks

    @abstractmethod
    def minibatches(self, batch_size: int) -> Iterator[Minibatch]:
        """One pass over the rollout, in random order: SB3's permutation."""

    @abstractmethod
    def forward(self, minibatch: Minibatch) -> Forward:
        """The loss of the current policy on a minibatch."""

    @abstractmethod
    def critic_forward(self, minibatch: Minibatch, vf_coef: float) -> Metrics:
        """
        The value loss alone on a minibatch; the gradient step that follows is the critic's alone.

        :param vf_coef: its weight
        """

    @abstractmethod
    def backward(self) -> Metrics:
        """
        The gradient of the latest loss, averaged over the ranks and clipped in norm; that of whatever the loss doesn't depend
        on is ``None``.

        :return: the gradient's norm before clipping
        """

    @abstractmethod
    def step(self, optimizer: th.optim.Optimizer | None = None) -> None:
        """
        Apply the gradient.

        :param optimizer: that applies it; ``None`` for the policy's
        """

    @abstractmethod
    def publish(self) -> None:
        """Write parameters, gradients and the optimisers' state into the policy and its optimisers."""

    @abstractmethod
    def fetch(self) -> str | None:
        """
        Take over what somebody may have changed there.

        :return: why this engine can't go on with it, ``None`` if it can
        """
