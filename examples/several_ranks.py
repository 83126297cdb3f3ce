"""
HalfCheetah-v5 (extra `mujoco`) on as many processes as there are, with checkpoints that a restarted job goes on from:

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/several_ranks.py

By itself, `python examples/several_ranks.py` trains on one process: nothing in the script depends on their number.
"""

from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_variants import PPO, ResumableCheckpointCallback, is_first_rank

FOLDER = Path("runs/several_ranks")


def main(timesteps: int = 300_000) -> float:
    env = VecNormalize(make_vec_env("HalfCheetah-v5", n_envs=2))
    checkpoints = ResumableCheckpointCallback(FOLDER / "checkpoints", save_freq=10)
    try:
        model = PPO.resume(FOLDER / "checkpoints", env, callback=checkpoints, device="cpu")
    except FileNotFoundError:
        model = PPO("MlpPolicy", env, n_steps=512, seed=0, device="cpu")
        model.learn(timesteps, callback=checkpoints)

    episodes = model.ep_info_buffer or []
    mean_return = sum(episode["r"] for episode in episodes) / max(len(episodes), 1)
    if is_first_rank():  # files and texts once, not from every process
        model.save(FOLDER / "model")
        env.save(str(FOLDER / "vecnormalize.pkl"))
        print(f"mean return of the last {len(episodes)} episodes, of all processes: {mean_return:.0f}")
    return float(mean_return)


if __name__ == "__main__":
    main()
