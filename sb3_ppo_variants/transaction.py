"""An update as a transaction: if something in it isn't finite, or ends it, it is taken back as a whole."""

import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import torch as th

from sb3_ppo_variants.critic import critic_parameters
from sb3_ppo_variants.losses import Metrics
from sb3_ppo_variants.nonfinite import NonFiniteError, is_torchs_refusal, nonfinite_in_minibatch
from sb3_ppo_variants.snapshot import Snapshot
from sb3_ppo_variants.trust_region import Displacement
from sb3_ppo_variants.update import UpdateStats

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase

MAX_HALVINGS = 10
"""Of a step that leads too far, before it is taken back."""


class Transaction:
    """
    Takes parameters and optimisers back to the start of an update if anything is raised in it, such as a callback's error.

    The error goes on to the caller, but for a :class:`NonFiniteError` where ``model.on_nonfinite`` isn't ``"raise"``: then
    ``undone`` says that there was one.

    :param model: the algorithm at the start of an update
    """

    def __init__(self, model: "PPOBase") -> None:
        self._policy = policy = model.policy
        self._snapshots = [Snapshot(policy, list(policy.parameters()), policy.optimizer)]
        if model._value_optimizer_policy is not None:
            assert model.value_optimizer is not None
            self._snapshots.append(Snapshot(policy, critic_parameters(policy), model.value_optimizer))
        self._model, self._n_updates = model, model._n_updates
        self._raises = model.on_nonfinite == "raise"
        self._verbose, self._several = model.verbose, model._ranks.several
        self.undone = False

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return False
        for snapshot in self._snapshots:
            snapshot.restore()
        self._model._n_updates = self._n_updates
        self.undone = True
        if not (isinstance(error, NonFiniteError) or is_torchs_refusal(error)):
            return False
        raises = self._raises or (self._several and is_torchs_refusal(error))  # which other ranks know nothing of
        if self._verbose >= 1 and not raises:
            print(f"Taking the update back: {error}")
        if raises and not isinstance(error, NonFiniteError):
            raise NonFiniteError(f"what the policy makes of finite samples isn't finite behind the update: {error}") from error
        return not raises

    @th.no_grad()
    def backtrack(
        self, displacement: Displacement, measure: Callable[[], Displacement], max_kl: float
    ) -> tuple[Displacement, int]:
        """
        Halve the policy's whole step until it is within a bound: a line search as TRPO's (Schulman et al. 2015, appendix C).

        The critic's own parameters, and the optimiser's moments, stay as the update has left them. If ten halvings don't do,
        the policy and its optimiser go back to where they were.

        :param displacement: of the whole step
        :param measure: tells the displacement by now
        :param max_kl: largest mean of the exact KL(old || new), in nats
        :return: the displacement in the end, and the number of halvings
        """
        if self._mean_kl(displacement) <= max_kl:
            return displacement, 0
        start = self._of_policy()
        end = [parameter.clone() for parameter, _ in start.parameters]
        for n_halvings in range(1, MAX_HALVINGS + 1):
            for (parameter, old), new in zip(start.parameters, end, strict=True):
                parameter.copy_(th.lerp(old, new, 0.5**n_halvings))
            displacement = measure()
            if self._mean_kl(displacement) <= max_kl:
                return displacement, n_halvings
        start.restore()
        return measure(), MAX_HALVINGS + 1

    def _mean_kl(self, displacement: Displacement) -> float:
        return float(self._model._ranks.mean(displacement.kl.mean().item()))

    def _of_policy(self) -> Snapshot:
        try:
            critics_own = set(critic_parameters(self._policy))
        except ValueError:  # it has none
            critics_own = set()
        return self._snapshots[0].without(critics_own)


class Attempt:
    """
    To learn from one minibatch at a time: what isn't finite in it is named, or the minibatch is left out.

    :param model: the algorithm
    :param stats: its running update
    """

    def __init__(self, model: "PPOBase", stats: UpdateStats) -> None:
        self._model = model
        self._stats = stats
        # Such as BatchNorm's statistics, which the forward pass has already changed when a gradient shows NaN.
        self._buffers = [(buffer, buffer.clone()) for buffer in model.policy.buffers()] if model.on_nonfinite == "skip" else []
        self.failed = False
        """Whether the latest minibatch was left out."""

    def at(self, what: str, number: int, minibatch: int) -> "Attempt":
        """
        Say which minibatch comes next.

        :param what: "epoch" or "the critic's pass"
        :param number: of the epoch or pass, from 0
        :param minibatch: its number in there, from 0
        """
        self._place = what, number, minibatch
        self._n_before = self._stats.n_minibatches
        self.failed = False
        return self

    def __enter__(self) -> None:
        for buffer, before in self._buffers:
            before.copy_(buffer)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or not (isinstance(error, NonFiniteError) or is_torchs_refusal(error)):
            return False
        stats, model = self._stats, self._model
        added = stats.n_minibatches > self._n_before
        if is_torchs_refusal(error) and model._ranks.several:
            return False  # the others learn from this minibatch: no update can be made of it
        if model.on_nonfinite == "skip":
            stats.n_skipped += 1
            self.failed = True
            for buffer, before in self._buffers:
                buffer.copy_(before)
            if added:
                stats.drop_minibatch()
            return True
        culprit: str | None = (
            "what the policy makes of finite samples isn't finite" if is_torchs_refusal(error) else str(error)
        )
        if added:
            culprit = nonfinite_in_minibatch(stats, model.rollout_buffer) or culprit
        what, number, minibatch = self._place
        place = f"in update {model._iteration}, {what} {number}, minibatch {minibatch} (epochs and minibatches from 0)"
        raise NonFiniteError(f"{culprit} {place}") from error


def checked(metrics: Metrics) -> Metrics:
    """
    A gradient's norm, which is finite only if all is that has led to it.

    :param metrics: as :meth:`Engine.backward` returns them
    :raises NonFiniteError: if it isn't
    """
    if not math.isfinite(metrics["grad_norm"].item()):
        raise NonFiniteError(f"the gradient's norm is {metrics['grad_norm'].item()}")
    return metrics
