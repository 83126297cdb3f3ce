"""
MaskablePPO with an adaptive KL penalty (extra `contrib`): at every step some actions are invalid, and are never drawn.

Drop-in for sb3-contrib's, from which the environment is taken: the agent has to name the observation's number, out of 60 of
which 50 are invalid at a time. The KL divergence is that between the actions allowed.
"""

from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy

from sb3_ppo_variants.contrib import MaskablePPO


def main(timesteps: int = 10_000) -> float:
    env = InvalidActionEnvDiscrete(dim=60, n_invalid_actions=50)
    model = MaskablePPO("MlpPolicy", env, n_steps=512, gamma=0.4, clip_range=None, kl_coef="auto", seed=0, device="cpu")
    model.learn(timesteps)

    mean_return, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean return: {mean_return:.0f} of {env.ep_length}")
    return float(mean_return)


if __name__ == "__main__":
    main()
