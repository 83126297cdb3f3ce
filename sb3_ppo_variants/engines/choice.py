"""Which engine runs a model's updates, and whether its rollouts can be lean."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.engines.eager import EagerEngine
from sb3_ppo_variants.engines.engine import Engine
from sb3_ppo_variants.engines.fused import FusedEngine
from sb3_ppo_variants.engines.lean_policy import LeanPolicy
from sb3_ppo_variants.engines.reasons import why_not_fused, why_not_lean, why_not_these_actions
from sb3_ppo_variants.isolation import undisturbed
from sb3_ppo_variants.losses import Coefficients
from sb3_ppo_variants.rollout import Minibatch
from sb3_ppo_variants.trust_region import TrustRegion

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase

ENGINES = ("auto", "eager", "fused")
"""Names for PPO's argument ``engine``."""


class EngineChoice:
    """
    Chooses by PPO's argument ``engine``.

    ``"auto"`` takes the fused engine where all its operations are known, and where it is seen to give the bits of autograd:
    for each configuration, the gradients of an epoch's first and last minibatch, and the first actions, are compared.
    Libraries of linear algebra may order their sums differently on another machine, in another version, for other shapes.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._agreements: dict[str, tuple[Any, bool]] = {}

    def engine(self, model: "PPOBase", coefs: Coefficients, trust_region: TrustRegion | None) -> Engine:
        """
        The engine of an update.

        :param model: the algorithm
        :param coefs: the coefficients in effect
        :param trust_region: the old policy over the rollout, ``None`` if its exact KL is not known
        :raises ValueError: if ``engine`` is ``"fused"`` and that isn't possible
        """
        arguments = (model.policy, model.rollout_buffer, model.action_space, coefs, model.max_grad_norm, trust_region)
        ranks = model._ranks
        if model.engine == "eager":
            return EagerEngine(*arguments, ranks)
        reason = self._why_not_fused(model) or why_not_these_actions(model.rollout_buffer, model.action_space)
        if reason is None and model.engine != "fused" and not self._gradients_agree(arguments, model._minibatch_size):
            reason = "its gradients differ from autograd's in their last bits on this machine"
        reason = next((each for each in ranks.gather(reason) if each is not None), None)  # as ranks have to take turns alike
        if reason is None:
            return FusedEngine(*arguments, ranks)
        self._say_why_eager(model, reason)
        return EagerEngine(*arguments, ranks)

    def engine_after(self, engine: Engine, obstacle: str, model: "PPOBase") -> Engine:
        """
        The engine that goes on where a fused one can't.

        :param engine: whose state has been published
        :param obstacle: why it can't go on
        :param model: the algorithm
        :raises ValueError: if ``engine`` is ``"fused"``
        """
        self._say_why_eager(model, obstacle)
        return EagerEngine.taking_over(engine)

    def lean_policy(self, model: "PPOBase", buffer: RolloutBuffer) -> LeanPolicy | None:
        """
        What stands in for the policy in a rollout, ``None`` if nothing can.

        :param model: the algorithm
        :param buffer: that will keep the rollout
        """
        if model.engine == "eager" or why_not_lean(model.policy, buffer) is not None:
            return None
        lean_policy = LeanPolicy(model.policy)
        if model.engine == "fused" or self._actions_agree(lean_policy, model):
            return lean_policy
        self._say(model, "Collecting rollouts as SB3 does, as lean ones differ in their last bits on this machine")
        return None

    def check(self, model: "PPOBase") -> None:
        """
        Refuse early what :meth:`engine` will refuse.

        :raises ValueError: if ``engine`` is ``"fused"`` and that isn't possible
        """
        if model.engine == "fused" and (reason := self._why_not_fused(model)):
            self._say_why_eager(model, reason)

    def _why_not_fused(self, model: "PPOBase") -> str | None:
        optimizers = [] if model.n_value_epochs is None or model.value_optimizer is None else [model.value_optimizer]
        return why_not_fused(model.policy, model.rollout_buffer, optimizers)

    def _say_why_eager(self, model: "PPOBase", reason: str) -> None:
        if model.engine == "fused":
            raise ValueError(f"`engine` must be 'auto' or 'eager', not 'fused', as {reason}")
        self._say(model, f"Using the eager engine, as {reason}")

    def _say(self, model: "PPOBase", text: str) -> None:
        if model.verbose >= 1 and text not in self._said:
            print(text)
        self._said.add(text)

    def _gradients_agree(self, arguments: Any, batch_size: int) -> bool:
        """Whether the gradients of an epoch's first and last minibatch are autograd's, in each part of an update."""
        policy, coefs = arguments[0], arguments[3]
        terms: list[Any] = [coefs.clip_range is None, coefs.clip_range_vf is None, coefs.ent_coef == 0, coefs.penalizes_kl]
        terms += [coefs.hinge_coef == 0, coefs.normalize_advantage, coefs.critic_apart, coefs.surrogate]
        terms += [coefs.dual_clip is None, coefs.kl_rollback is None]
        key = (*policy.modules(), batch_size, th.get_num_threads(), *terms)

        def look() -> bool:
            before = [parameter.grad for parameter in policy.parameters()]
            try:
                with undisturbed(policy):
                    return all(_losses_gradients_agree(arguments, batch_size, alone) for alone in (False, True))
            finally:
                for parameter, grad in zip(policy.parameters(), before, strict=True):
                    parameter.grad = grad

        return self._look_once("gradients", key, look)

    def _actions_agree(self, lean_policy: LeanPolicy, model: "PPOBase") -> bool:
        """Whether the first observations' actions, values and log-probabilities are the policy's own."""
        observations: Any = model._last_obs
        key = (*model.policy.modules(), len(observations), th.get_num_threads())

        def look() -> bool:
            with undisturbed(model.policy):
                lean = [th.from_numpy(array) for array in lean_policy.forward(observations)]
            with undisturbed(model.policy), th.no_grad():
                own = model.policy(th.as_tensor(observations))
            return all(map(_same_bits, lean, own))

        return self._look_once("actions", key, look)

    def _look_once(self, what: str, key: Any, look: Callable[[], bool]) -> bool:
        """What ``look`` has seen when the key was last another one."""
        if what not in self._agreements or self._agreements[what][0] != key:
            self._agreements[what] = (key, look())
        return self._agreements[what][1]


def _losses_gradients_agree(arguments: Any, batch_size: int, critic_alone: bool) -> bool:
    """Whether those of the loss, or of the value loss alone, agree on an epoch's first and last minibatch."""
    policy, buffer = arguments[:2]
    fused, eager = FusedEngine(*arguments), EagerEngine(*arguments)
    n_minibatches = -(-buffer.buffer_size * buffer.n_envs // batch_size)
    last = itertools.islice(fused.minibatches(batch_size), n_minibatches - 1, None)
    minibatches: list[Minibatch] = [next(fused.minibatches(batch_size)), next(last)]
    return all(
        all(map(_same_bits, *(_gradients(engine, minibatch, policy, critic_alone) for engine in (eager, fused))))
        for minibatch in minibatches
    )


def _gradients(engine: Engine, minibatch: Minibatch, policy: ActorCriticPolicy, critic_alone: bool) -> list[th.Tensor | None]:
    """At all parameters, of the loss or of the value loss alone."""
    if critic_alone:
        engine.critic_forward(minibatch, vf_coef=0.5)
    else:
        engine.forward(minibatch)
    engine.backward()
    engine.publish()
    return [parameter.grad for parameter in policy.parameters()]


def _same_bits(one: th.Tensor | None, other: th.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.numpy().view(np.uint8), other.numpy().view(np.uint8))
