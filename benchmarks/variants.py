"""What is compared: variants by name, and the algorithms that they are variants of."""

from typing import Any, NamedTuple

import stable_baselines3
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_variants import PPO

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {
    "ppo": PPO,
    "sb3_ppo": stable_baselines3.PPO,
    "a2c": stable_baselines3.A2C,
}
BASELINE = "clip"
"""The variant that all others are compared with, where it takes part."""


class Variant(NamedTuple):
    """
    An algorithm with some arguments.

    :param algorithm: key of :data:`ALGORITHMS`
    :param arguments: of the algorithm
    :param callbacks: arguments of this package's callbacks, by their names
    """

    algorithm: str
    arguments: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]


def _ppo(**arguments: Any) -> Variant:
    return Variant("ppo", arguments, {})


def _penalty(kl_coef: float | str, **arguments: Any) -> Variant:
    return _ppo(clip_range=None, kl_coef=kl_coef, **arguments)


VARIANTS: dict[str, Variant] = {
    # Table 1 of Schulman et al. 2017, arXiv 1707.06347, in its order.
    "none": _ppo(clip_range=None),
    "clip_0.1": _ppo(clip_range=0.1),
    "clip": _ppo(clip_range=0.2),
    "clip_0.3": _ppo(clip_range=0.3),
    "adaptive_kl_0.003": _penalty("auto", kl_target=0.003),
    "adaptive_kl": _penalty("auto", kl_target=0.01),
    "adaptive_kl_0.03": _penalty("auto", kl_target=0.03),
    "fixed_kl_0.3": _penalty(0.3),
    "fixed_kl_1": _penalty(1.0),
    "fixed_kl_3": _penalty(3.0),
    "fixed_kl_10": _penalty(10.0),
    # Not in the table.
    "clip_adaptive_kl": _ppo(clip_range=0.2, kl_coef="auto", kl_target=0.01),
    "clip_higher": _ppo(clip_range=(0.2, 0.28)),
    "dual_clip": _ppo(dual_clip=3.0),
    "spo": _ppo(surrogate="spo"),
    "truly": _penalty(5.0, kl_rollback=0.03),
    "adaptive_lr": Variant("ppo", {}, {"KLAdaptiveLearningRateCallback": {"target": 0.01}}),
    "sb3_ppo": Variant("sb3_ppo", {}, {}),
    # A2C's own defaults stand before what is set for all variants: its rollouts are short.
    "a2c": Variant("a2c", {"learning_rate": 7e-4, "n_steps": 5, "gae_lambda": 1.0}, {}),
}
