"""
Updates of up to 20 epochs without clipping, each ended once the exact KL divergence of the new policy exceeds a bound.

The policy then goes back to the end of the last epoch that was within the bound, so that no update exceeds it. A line is
printed for each update that was ended early. CartPole-v1 is solved.
"""

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_variants import PPO, KLEarlyStoppingCallback


def main(timesteps: int = 100_000) -> float:
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    arguments = {"n_steps": 128, "batch_size": 256, "n_epochs": 20, "learning_rate": 1e-3}
    model = PPO("MlpPolicy", env, clip_range=None, **arguments, seed=0, device="cpu")
    # The bound is factor x target = 0.03 nats; per="minibatch" would check more often, but on a few samples only.
    early_stopping = KLEarlyStoppingCallback(target=0.02, factor=1.5, per="epoch", restore=True, verbose=1)
    model.learn(timesteps, callback=early_stopping)

    mean_return, std = evaluate_policy(model, env, n_eval_episodes=100)
    print(f"mean return: {mean_return:.0f} ± {std:.0f}")
    return float(mean_return)


if __name__ == "__main__":
    main()
