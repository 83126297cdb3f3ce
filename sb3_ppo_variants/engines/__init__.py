"""Engines: how an update's gradients are computed and applied."""

from sb3_ppo_variants.engines.eager import EagerEngine

ENGINES = ("auto", "eager")
"""Names for PPO's argument ``engine``."""

__all__ = ["ENGINES", "EagerEngine"]
