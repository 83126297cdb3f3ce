"""Rollout buffers with other targets for the critic than SB3's."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_variants.rollout import KEPT


class RewardsToGoRolloutBuffer(RolloutBuffer):
    """
    SB3's ``RolloutBuffer``, but the returns, which the critic learns, are discounted rewards-to-go.

    The return of a step is the discounted sum of all rewards up to the end of its episode, and where the rollout has cut the
    episode off, of those it has seen and the discounted value of the last state. (SB3's are those of TD(lambda): the
    advantage of GAE plus the value.) Advantages stay those of GAE.

    :param buffer_size: as in ``RolloutBuffer``
    :param observation_space: no ``Dict``
    :param action_space: as in ``RolloutBuffer``
    :param standardize: scale the returns to mean 0 and standard deviation 1 over the rollout, and let advantages be these
        returns minus the values, which ``gae_lambda`` has no part in. For rollouts of whole episodes (``n_episodes``,
        :class:`~sb3_ppo_variants.TimeLimitAsTermination`): where one is cut off, a value of the critic's, which has learned
        the scaled returns, would stand for rewards that aren't scaled
    :param args: those of ``RolloutBuffer``
    :param kwargs: those of ``RolloutBuffer``
    :raises ValueError: if observations are dicts
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *args: Any,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(observation_space, spaces.Dict):
            name = type(self).__name__
            raise ValueError(
                f"`rollout_buffer_class` must be one for dicts, as observations are, not {name}: {observation_space}"
            )
        self.standardize = standardize
        super().__init__(buffer_size, observation_space, action_space, *args, **kwargs)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        As in ``RolloutBuffer``.

        :param last_values: values of the states behind the last step, shape (n_envs, 1)
        :param dones: whether episodes have ended in the last step, shape (n_envs,)
        """
        gae_lambda = self.gae_lambda
        self.gae_lambda = 1.0  # then GAE's advantage plus the value is the reward-to-go
        super().compute_returns_and_advantage(last_values, dones)
        self.gae_lambda = gae_lambda
        rewards_to_go = self.returns
        if self.standardize:
            kept = rewards_to_go[vars(self).get(KEPT, ...)]
            rewards_to_go = (rewards_to_go - kept.mean()) / (kept.std() + 1e-8)
            self.advantages = rewards_to_go - self.values
        else:
            super().compute_returns_and_advantage(last_values, dones)
        self.returns = rewards_to_go
