"""PPO with a clipped surrogate, a fixed or an adaptive KL penalty, as a drop-in for Stable-Baselines3's PPO."""

from sb3_ppo_variants.agreement import RanksDifferError
from sb3_ppo_variants.buffers import RewardsToGoRolloutBuffer
from sb3_ppo_variants.callbacks import (
    GradientNoiseScaleCallback,
    KLAdaptiveLearningRateCallback,
    KLEarlyStoppingCallback,
    TrustRegionLoggingCallback,
    UpdateCallback,
)
from sb3_ppo_variants.distributed import is_first_rank
from sb3_ppo_variants.env_state import ResumableWrapper
from sb3_ppo_variants.kl_coef import KLCoefController
from sb3_ppo_variants.meeting import LostRankError
from sb3_ppo_variants.nonfinite import NonFiniteError
from sb3_ppo_variants.policies import ZeroHeadsPolicy
from sb3_ppo_variants.ppo import PPO, PPOKL
from sb3_ppo_variants.resume import DamagedCheckpointError, ResumableCheckpointCallback
from sb3_ppo_variants.safe_checks import UntrustedFileError
from sb3_ppo_variants.update import UpdateStats
from sb3_ppo_variants.vec_env import GymnasiumVecEnv
from sb3_ppo_variants.version import __version__
from sb3_ppo_variants.wrappers import TimeLimitAsTermination

__all__ = [
    "PPO",
    "PPOKL",
    "DamagedCheckpointError",
    "GradientNoiseScaleCallback",
    "GymnasiumVecEnv",
    "KLAdaptiveLearningRateCallback",
    "KLCoefController",
    "KLEarlyStoppingCallback",
    "LostRankError",
    "NonFiniteError",
    "RanksDifferError",
    "ResumableCheckpointCallback",
    "ResumableWrapper",
    "RewardsToGoRolloutBuffer",
    "TimeLimitAsTermination",
    "TrustRegionLoggingCallback",
    "UntrustedFileError",
    "UpdateCallback",
    "UpdateStats",
    "ZeroHeadsPolicy",
    "__version__",
    "is_first_rank",
]
