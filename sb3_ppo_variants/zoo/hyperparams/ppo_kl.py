"""Adaptive KL penalty without clipping."""

from sb3_ppo_variants.zoo.hyperparams import of_zoo_ppo

hyperparams = of_zoo_ppo(clipped=False, kl_coef="auto", kl_target=0.01)
