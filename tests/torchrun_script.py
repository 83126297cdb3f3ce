"""A training for torchrun to start, in which something may go wrong; a script as users write them."""

import argparse
import atexit
import json
import os
import signal
import time
from pathlib import Path

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_variants import PPOKL, LostRankError, ResumableCheckpointCallback

FAULT_STEP = 40
"""In the third rollout."""


class Fault(BaseCallback):
    """Something happens to rank 1, when torchrun has started it for the first time."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__()
        self.kind, self.folder = kind, folder

    def _on_step(self) -> bool:
        if self.n_calls == FAULT_STEP and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            match self.kind:
                case "kill":
                    (self.folder / "was_killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(600)
                case "raise":
                    raise OSError("the simulator is gone")
                case "wait":  # for whoever runs the test
                    (self.folder / "waiting").touch()
                    time.sleep(3)
        return True


def keep_names_of_threads(folder: Path, when: str) -> None:
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    (folder / f"threads_{when}_{os.environ['RANK']}.json").write_text(json.dumps(names))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args()
    atexit.register(keep_names_of_threads, options.folder, "at_the_end")  # the first that is registered is called last
    os.environ["SB3_PPO_VARIANTS_TIMEOUT"] = str(options.timeout)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        time.sleep(2)  # the address of the rank that was killed is still in torchrun's store, for rank 0 to find
    th.set_num_threads(1)

    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    callbacks = [ResumableCheckpointCallback(options.folder / "checkpoints"), Fault(options.fault, options.folder)]
    try:
        train(options.folder, env, callbacks)
        keep_names_of_threads(options.folder, "before")
    except LostRankError as error:
        (options.folder / f"lost_{os.environ['RANK']}.txt").write_text(str(error))
        raise


def train(folder: Path, env: VecNormalize, callbacks: list[BaseCallback]) -> None:
    try:
        model = PPOKL.resume(folder / "checkpoints", env, callbacks, device="cpu")
    except FileNotFoundError:
        model = PPOKL("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu")
        model.learn(6 * 16 * 2 * int(os.environ["WORLD_SIZE"]), callbacks)

    parameters = {name: value.tolist() for name, value in model.policy.state_dict().items()}
    result = {"parameters": parameters, "num_timesteps": model.num_timesteps, "beta": model.kl_coef_state.kl_coef}
    result["mean"] = env.obs_rms.mean.tolist()
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
