"""Engines: how an update's gradients are computed and applied, and how a rollout's actions are drawn."""

from sb3_ppo_variants.engines.choice import ENGINES, EngineChoice
from sb3_ppo_variants.engines.eager import EagerEngine
from sb3_ppo_variants.engines.engine import Engine
from sb3_ppo_variants.engines.fused import FusedEngine
from sb3_ppo_variants.engines.lean_policy import LeanPolicy

__all__ = ["ENGINES", "EagerEngine", "Engine", "EngineChoice", "FusedEngine", "LeanPolicy"]
