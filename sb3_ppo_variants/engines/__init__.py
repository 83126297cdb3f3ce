"""Engines: how an update's gradients are computed and applied."""

from sb3_ppo_variants.engines.eager import EagerEngine
from sb3_ppo_variants.engines.engine import Engine
from sb3_ppo_variants.engines.fused import FusedEngine
from sb3_ppo_variants.engines.reasons import why_not_fused, why_not_lean

ENGINES = ("auto", "eager", "fused")
"""Names for PPO's argument ``engine``."""

__all__ = ["ENGINES", "EagerEngine", "Engine", "FusedEngine", "why_not_fused", "why_not_lean"]
