"""
A callback of one's own inside the update: it ends an update at a minibatch of which too many samples are clipped.

It also logs the largest share of clipped samples as train/largest_clip_fraction, beside train/gradient_steps (tensorboard
--logdir runs/update_callback). An update has 80 gradient steps at most; most are ended earlier. CartPole-v1 is solved.
"""

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_variants import PPO, UpdateCallback, UpdateStats


class StopWhenClipped(UpdateCallback):
    """
    Ends an update when more than ``limit`` of a minibatch's samples have a ratio beyond the clip range.

    :param limit: the largest share of such samples with which the update goes on
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gradient_steps: list[int] = []

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        return stats.latest("clip_fraction") <= self.limit  # False ends this update; training goes on

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.gradient_steps.append(stats.gradient_steps)
        self.logger.record("train/largest_clip_fraction", stats.series("clip_fraction").max())


def main(timesteps: int = 100_000) -> list[int]:
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    arguments = {"n_steps": 128, "batch_size": 256, "n_epochs": 20, "learning_rate": 1e-3}
    model = PPO("MlpPolicy", env, **arguments, seed=0, device="cpu", tensorboard_log="runs/update_callback")
    callback = StopWhenClipped(limit=0.1)
    model.learn(timesteps, callback=callback)

    mean_return, _ = evaluate_policy(model, env, n_eval_episodes=100)
    print(f"gradient steps of the updates: {callback.gradient_steps}")
    print(f"mean return: {mean_return:.0f}")
    return callback.gradient_steps


if __name__ == "__main__":
    main()
