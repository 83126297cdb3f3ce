"""Clipping: the Zoo's PPO as it is."""

from sb3_ppo_variants.zoo.hyperparams import of_zoo_ppo

hyperparams = of_zoo_ppo(clipped=True)
