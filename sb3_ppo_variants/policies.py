"""Policies that start elsewhere than SB3's."""

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn


class ZeroHeadsPolicy(ActorCriticPolicy):
    """
    SB3's ``MlpPolicy`` with last layers that start at zero, in :class:`~sb3_ppo_variants.PPO` also ``"ZeroHeadsMlpPolicy"``.

    At first every action of a categorical distribution is as likely as any other, whatever the observation, a Gaussian's
    mean is 0 (its standard deviation is ``exp(log_std_init)``), and all values are 0. Andrychowicz et al. 2020, arXiv
    2006.05990, section 3.2, find that initial actions that don't depend on the observation help training.

    Parameters are those of ``ActorCriticPolicy``.
    """

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        for head in (self.action_net, self.value_net):
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
