"""
The RL Zoo (extra `zoo`): variants trained by its command with one file of hyperparameters, then loaded and compared.

It prints the mean return of each; all should be near 500. `python -m sb3_ppo_variants.enjoy --algo ppo_kl --env CartPole-v1
--folder runs/rl_zoo` shows an agent.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rl_zoo3.utils import get_latest_run_id
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_variants import PPO

ENV = "CartPole-v1"
CONFIG = Path(__file__).with_name("rl_zoo.yml")
FOLDER = Path("runs/rl_zoo")


def main(algorithms: Sequence[str] = ("ppo_clip", "ppo_kl", "ppo_kl_fixed"), timesteps: int = 50_000) -> dict[str, float]:
    returns = {}
    for algo in algorithms:
        options = f"--algo {algo} --env {ENV} --n-timesteps {timesteps} --seed 0 --device cpu --verbose 0".split()
        paths = ["--conf-file", str(CONFIG), "--log-folder", str(FOLDER)]
        subprocess.run([sys.executable, "-m", "sb3_ppo_variants.train", *options, *paths], check=True)

        run = get_latest_run_id(str(FOLDER / algo), ENV)
        model = PPO.load(FOLDER / algo / f"{ENV}_{run}" / f"{ENV}.zip", device="cpu")
        mean_return, _ = evaluate_policy(model, make_vec_env(ENV, n_envs=8, seed=1), n_eval_episodes=100)
        returns[algo] = float(mean_return)
    print(returns)
    return returns


if __name__ == "__main__":
    main()
