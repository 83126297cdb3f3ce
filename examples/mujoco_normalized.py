"""
HalfCheetah-v5 (extra `mujoco`) with VecNormalize: observations and rewards are normalised while the policy is trained.

The policy is of use only together with the statistics that it was trained with, so both are saved, and both are loaded for
the evaluation, which counts the rewards as the environment gives them.
"""

from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_variants import PPO

FOLDER = Path("runs/mujoco_normalized")


def main(timesteps: int = 300_000) -> float:
    env = VecNormalize(make_vec_env("HalfCheetah-v5", seed=0))
    model = PPO("MlpPolicy", env, seed=0, device="cpu")
    model.learn(timesteps)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model.save(FOLDER / "model")
    env.save(str(FOLDER / "vecnormalize.pkl"))

    eval_env = VecNormalize.load(str(FOLDER / "vecnormalize.pkl"), make_vec_env("HalfCheetah-v5", seed=1))
    eval_env.training = False  # the statistics stay as they are
    eval_env.norm_reward = False
    mean_return, std = evaluate_policy(PPO.load(FOLDER / "model", device="cpu"), eval_env, n_eval_episodes=10)
    print(f"mean return: {mean_return:.0f} ± {std:.0f}")
    return float(mean_return)


if __name__ == "__main__":
    main()
