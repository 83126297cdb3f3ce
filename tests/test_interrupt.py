"""Ctrl-C in a training with checkpoints: it ends behind an update, with a checkpoint and flushed logs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_ppo_variants import PPO, ResumableCheckpointCallback, UpdateCallback, UpdateStats
from sb3_ppo_variants.resume import in_order

SETTINGS: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has its jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC(UpdateCallback):
    """Sends SIGINT in the middle of a rollout, ``times`` times."""

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times = at, times

    def _on_step(self) -> bool:
        for _ in range(self.times if self.num_timesteps == self.at else 0):
            signal.raise_signal(signal.SIGINT)
        return True

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        return True


@pytest.mark.parametrize("save_freq", [1, 100])
def test_ends_behind_the_update_with_a_checkpoint(save_freq: int, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = PPO("MlpPolicy", "CartPole-v1", **SETTINGS).learn(80)
    model = PPO("MlpPolicy", "CartPole-v1", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        model.learn(80, callback=[CtrlC(at=20), ResumableCheckpointCallback(tmp_path, save_freq)])
    assert model.num_timesteps == 32
    assert in_order(tmp_path)[-1].stem == "ppo_32_steps"
    assert signal.getsignal(signal.SIGINT) is before

    resumed = PPO.resume(tmp_path, model.get_env(), [ResumableCheckpointCallback(tmp_path, save_freq)], device="cpu")
    assert resumed.num_timesteps == 80
    for name, value in whole.policy.state_dict().items():
        assert value.equal(resumed.policy.state_dict()[name])


def test_the_second_time_it_ends_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    model = PPO("MlpPolicy", "CartPole-v1", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        model.learn(80, callback=[CtrlC(at=20, times=2), ResumableCheckpointCallback(tmp_path)])
    assert model.num_timesteps == 20
    assert in_order(tmp_path)[-1].stem == "ppo_16_steps"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_put_back_at_the_end(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    PPO("MlpPolicy", "CartPole-v1", **SETTINGS).learn(32, callback=ResumableCheckpointCallback(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_logs_are_on_the_disk_without_checkpoints_too(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", **SETTINGS, tensorboard_log=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        model.learn(80, callback=CtrlC(at=50))
    events = EventAccumulator(str(tmp_path / "PPO_1"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/kl")] == [32, 48]
    model.logger.close()


@pytest.mark.parametrize("times", [1, 2])
def test_several_of_them_save_and_leave_no_handler_behind(times: int, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    model = PPO("MlpPolicy", "CartPole-v1", **SETTINGS)
    folders = [tmp_path / "often", tmp_path / "seldom"]
    saving = [ResumableCheckpointCallback(folder, save_freq=100) for folder in folders]
    with pytest.raises(KeyboardInterrupt):
        model.learn(80, callback=[CtrlC(at=20, times=times), *saving])
    assert [len(in_order(folder)) for folder in folders] == ([1, 1] if times == 1 else [0, 0])
    assert signal.getsignal(signal.SIGINT) is before


SCRIPT = """
import signal
import sys
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_ppo_variants import PPO, ResumableCheckpointCallback
from sb3_ppo_variants.env_state import ResumableWrapper

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv, wrapper_class=ResumableWrapper)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu")
    print("training", flush=True)
    try:
        model.learn(10_000_000, callback=ResumableCheckpointCallback(sys.argv[1], save_freq=1_000_000))
    except KeyboardInterrupt:
        print("left in order", flush=True)
        env.close()
"""


def test_a_terminals_ctrl_c_reaches_environments_in_other_processes_too(tmp_path: Path) -> None:
    """They are in the same process group."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "checkpoints")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    assert "left in order" in output
    assert len(in_order(tmp_path / "checkpoints")) == 1
