"""
Our algorithms in the RL Zoo.

Importing this module registers them, as that is all that the Zoo's ``--gym-packages`` does with a module.
"""

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_variants.ppo import PPO, PPOKL
from sb3_ppo_variants.zoo.algorithms import PPOClipKL, PPOKLFixed

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "ppo": PPO,
    "ppo_clip": PPO,
    "ppo_kl": PPOKL,
    "ppo_kl_fixed": PPOKLFixed,
    "ppo_clip_kl": PPOClipKL,
}
"""What ``--algo`` calls them; ``ppo`` takes the place of SB3's."""


def register() -> None:
    """
    Make the RL Zoo know our algorithms, and how their hyperparameters are searched.

    The Zoo reads the names for ``--algo`` when it starts to parse its command line: register before. To do it again changes
    nothing.

    :raises ImportError: if the RL Zoo is not installed, or can't be imported
    """
    try:
        from rl_zoo3 import ALGOS
        from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    except ImportError as error:
        raise ImportError(
            f'the RL Zoo can\'t be imported ({error}); it is installed by: pip install "sb3-ppo-variants[zoo]"'
        ) from error
    from sb3_ppo_variants.zoo.tuning import CONVERTERS, SAMPLERS

    # One dict each, which all of the Zoo's modules share.
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(SAMPLERS)
    HYPERPARAMS_CONVERTER.update(CONVERTERS)


register()
