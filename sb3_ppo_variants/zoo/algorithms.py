"""PPO with other defaults, for the RL Zoo, where each variant is a class of its own."""

from typing import Any, TypeVar

from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_ppo_variants.kl_coef import KLCoef
from sb3_ppo_variants.ppo import PPO, PPOKL

SelfPPO = TypeVar("SelfPPO", bound=PPO)


class PPOKLFixed(PPOKL):
    """
    :class:`PPOKL` with a fixed penalty, the best of the PPO paper's Table 1 (``clip_range=None, kl_coef=3.0``).

    Parameters are those of :class:`PPO`, in its order.
    """

    def __init__(self, *args: Any, kl_coef: KLCoef = 3.0, **kwargs: Any) -> None:
        super().__init__(*args, kl_coef=kl_coef, **kwargs)

    def learn(
        self: SelfPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOKLFixed",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPO:
        """SB3's."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


class PPOClipKL(PPO):
    """
    :class:`PPO` with clipping and an adaptive KL penalty (``clip_range=0.2, kl_coef="auto"``).

    Parameters are those of :class:`PPO`, in its order.
    """

    def __init__(self, *args: Any, kl_coef: KLCoef = "auto", **kwargs: Any) -> None:
        super().__init__(*args, kl_coef=kl_coef, **kwargs)

    def learn(
        self: SelfPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOClipKL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPO:
        """SB3's."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
