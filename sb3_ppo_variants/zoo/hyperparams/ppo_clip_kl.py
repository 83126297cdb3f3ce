"""Clipping and adaptive KL penalty."""

from sb3_ppo_variants.zoo.hyperparams import of_zoo_ppo

hyperparams = of_zoo_ppo(clipped=True, kl_coef="auto", kl_target=0.01)
