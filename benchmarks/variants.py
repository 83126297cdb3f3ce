"""The variants that are compared, by name."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"clip_range": 0.2},
    "fixed_kl": {"clip_range": None, "kl_coef": 3.0},
    "adaptive_kl": {"clip_range": None, "kl_coef": "auto", "kl_target": 0.01},
}
"""Arguments of :class:`sb3_ppo_variants.PPO` for each variant."""
