"""An SB3 script with its usual company runs unchanged but for its import, and ends with the same weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.save_util import load_from_zip_file

from tests.test_parity import assert_same_tensors

pytestmark = pytest.mark.slow
SCRIPT = """
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

if __name__ == "__main__":
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv))
    eval_env = VecNormalize(make_vec_env("CartPole-v1", seed=1, vec_env_cls=SubprocVecEnv), training=False, norm_reward=False)
    callback = CallbackList(
        [
            CheckpointCallback(save_freq=500, save_path="checkpoints", save_vecnormalize=True),
            EvalCallback(
                eval_env,
                callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=200, verbose=1),
                eval_freq=500,
                best_model_save_path="best",
                log_path="evaluations",
            ),
            ProgressBarCallback(),
        ]
    )
    model = PPO("MlpPolicy", env, n_steps=256, learning_rate=1e-3, seed=0, verbose=1, tensorboard_log="tensorboard")
    model.learn(total_timesteps=20_000, callback=callback)
    model.save("final")
    env.save("normalization.pkl")
    print("timesteps", model.num_timesteps)
    env.close()
    eval_env.close()
"""


def run(script: str, folder: Path) -> str:
    folder.mkdir()
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-W", "ignore", "script.py"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout


def test_existing_script(tmp_path: Path) -> None:
    swapped = SCRIPT.replace("from stable_baselines3 import PPO", "from sb3_ppo_variants import PPO")
    outputs = {name: run(script, tmp_path / name) for name, script in (("sb3", SCRIPT), ("ours", swapped))}

    def files(name: str) -> list[str]:
        paths = (path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if "tfevents" not in path.name)

    assert files("ours") == files("sb3")
    assert "Stopping training because the mean reward" in outputs["sb3"]
    told = [[line for line in outputs[name].splitlines() if "timesteps" in line or "reward" in line] for name in outputs]
    assert told[0] == told[1]
    for file in files("sb3"):
        if file.endswith(".zip"):
            th.set_grad_enabled(True)
            assert_same_tensors(*(load_from_zip_file(tmp_path / name / file)[1] for name in ("ours", "sb3")))
