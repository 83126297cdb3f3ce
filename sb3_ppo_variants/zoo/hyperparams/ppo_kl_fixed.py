"""Fixed KL penalty without clipping."""

from sb3_ppo_variants.zoo.hyperparams import of_zoo_ppo

hyperparams = of_zoo_ppo(clipped=False, kl_coef=3.0)
