"""Where the old policy stood, state by state, and how far the current one has moved from it."""

from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.evaluation import get_distribution, state_chunks
from sb3_ppo_variants.isolation import undisturbed
from sb3_ppo_variants.kl import DistributionParams, distribution_params, exact_kl_known
from sb3_ppo_variants.rollout import (
    flat_actions,
    flat_log_probs,
    gathers_by_index,
)

CHUNK_ELEMENTS = 2**20
"""Numbers in a chunk of observations: large enough that overhead doesn't count, small beside the rollout itself."""


class Displacement(NamedTuple):
    """
    How far the current policy is from the old one on each of the rollout's states.

    :param kl: exact KL(old || new), shape (n_steps * n_envs,), in nats, summed over action dimensions
    :param log_ratio: ln pi_new(a|s) - ln pi_old(a|s) of the actions taken, shape (n_steps * n_envs,)
    """

    kl: th.Tensor
    log_ratio: th.Tensor


class TrustRegion:
    """
    The old policy's distribution parameters on every state of the rollout, kept for the update.

    They are evaluated anew from the stored observations at the start of the update, when the policy is still the old
    one: of what the rollout collected, SB3 keeps the log-probabilities only.

    :param policy: the policy, not yet updated
    :param buffer: the full rollout buffer
    :param action_space: of the environment
    :param batch_size: a lower bound of the number of states evaluated at once
    :raises TypeError: if no exact KL is known for the policy's distribution
    """

    old: DistributionParams

    def __init__(
        self, policy: ActorCriticPolicy, buffer: RolloutBuffer, action_space: spaces.Space[Any], batch_size: int
    ) -> None:
        self._policy = policy
        self._buffer = buffer
        self._action_space = action_space
        self._chunk_size = max(batch_size, CHUNK_ELEMENTS // spaces.flatdim(buffer.observation_space))
        with th.no_grad(), undisturbed(policy):
            chunks = state_chunks(buffer, self._chunk_size)
            params = [distribution_params(get_distribution(policy, states)) for _, states in chunks]
        self.old = type(params[0]).cat(params)

    def old_at(self, indices: th.Tensor) -> DistributionParams:
        """
        The old policy's parameters on some of the rollout's states.

        :param indices: of the states in the flattened rollout, shape (b,)
        """
        return self.old.map(lambda tensor: tensor[indices])

    def kl(self, indices: th.Tensor, new: DistributionParams) -> th.Tensor:
        """
        Exact KL(old || new) on some of the rollout's states.

        :param indices: of the states in the flattened rollout, shape (b,)
        :param new: the current policy's parameters on these states
        :return: shape (b,), in nats
        """
        return self.old_at(indices).kl_divergence(new)

    def measure(self) -> Displacement:
        """How far the policy has moved by now; one forward pass of the actor over the rollout."""
        actions = flat_actions(self._buffer, self._action_space)
        params, log_probs = [], []
        with th.no_grad(), undisturbed(self._policy):
            for rows, states in state_chunks(self._buffer, self._chunk_size):
                distribution = get_distribution(self._policy, states)
                params.append(distribution_params(distribution))
                log_probs.append(distribution.log_prob(actions[rows]))
            kl = self.old.kl_divergence(type(self.old).cat(params))
            return Displacement(kl, th.cat(log_probs) - flat_log_probs(self._buffer))


def check_exact_kl(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> None:
    """
    Check that the exact KL of a policy over a rollout, and over its minibatches, can be known.

    :raises ValueError: if it can't; the message names the argument at fault
    """
    if not gathers_by_index(buffer):
        raise ValueError(
            f"`rollout_buffer_class` lacks what the exact KL needs: it must be a subclass of RolloutBuffer that leaves "
            f"`get` and `_get_samples` as they are, not {type(buffer).__name__}"
        )
    known = exact_kl_known()
    if not hasattr(policy, "get_distribution") or not isinstance(getattr(policy, "action_dist", None), known):
        raise ValueError(
            f"`policy` lacks what the exact KL needs: it must have `get_distribution` and an `action_dist` of "
            f"{', '.join(kind.__name__ for kind in known)}, not {type(policy).__name__}"
        )
