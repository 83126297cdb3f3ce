"""Engines: how an update's gradients are computed and applied."""

from sb3_ppo_variants.engines.eager import EagerEngine
from sb3_ppo_variants.engines.fused import FusedEngine, why_not_fused

ENGINES = ("auto", "eager", "fused")
"""Names for PPO's argument ``engine``."""

__all__ = ["ENGINES", "EagerEngine", "FusedEngine", "why_not_fused"]
