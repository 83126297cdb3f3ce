"""A training that is resumed ends with the bits of one that was never interrupted."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from sb3_ppo_variants import (
    PPO,
    PPOKL,
    DamagedCheckpointError,
    GymnasiumVecEnv,
    KLAdaptiveLearningRateCallback,
    KLEarlyStoppingCallback,
    ResumableCheckpointCallback,
    ResumableWrapper,
)
from sb3_ppo_variants.contrib import MaskablePPO, RecurrentPPO
from tests.environments import RandomEnv
from tests.test_contrib import MaskedEnv
from tests.test_parity import assert_same_tensors

N_STEPS = 16
SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}


class Logged(BaseCallback):
    """What is written to the log, but for times."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[dict[str, Any]] = []

    def _on_training_start(self) -> None:
        dump = self.model.logger.dump

        def watched_dump(step: int = 0) -> None:
            values = self.model.logger.name_to_value
            self.written.append(
                {"step": step, **{key: value for key, value in values.items() if key not in ("time/fps", "time/time_elapsed")}}
            )
            dump(step)

        self.model.logger.dump = watched_dump  # type: ignore[method-assign]

    def _on_step(self) -> bool:
        return True


class CrashError(Exception):
    """Of the process."""


class Interrupt(BaseCallback):
    """Ends the process's training as a crash would: in the middle of a rollout."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            raise CrashError
        return True


def run(
    make: Callable[[Any], Any], make_env: Callable[[], VecEnv], folder: Path, callbacks: Callable[[], list[BaseCallback]]
) -> None:
    """Six rollouts at once, and six with interruptions in the third and in the fifth."""
    env = make_env()
    total = 6 * N_STEPS * env.num_envs
    whole = make(env)
    logged = Logged()
    whole.learn(total, [logged, ResumableCheckpointCallback(folder / "whole"), *callbacks()], log_interval=2)

    parts = [Logged(), Logged(), Logged()]
    saving = [ResumableCheckpointCallback(folder / "interrupted") for _ in parts]
    model = make(make_env())
    with pytest.raises(CrashError):
        model.learn(total, [parts[0], saving[0], *callbacks(), Interrupt(int(0.4 * total))], log_interval=2)
    np.random.seed(99)  # in another process nothing would be left of it
    again = [parts[1], saving[1], *callbacks(), Interrupt(int(0.75 * total))]
    with pytest.raises(CrashError):
        type(model).resume(folder / "interrupted", make_env(), again, device="cpu")
    np.random.seed(98)
    again = [parts[2], saving[2], *callbacks(), Interrupt(10**9)]
    resumed = type(model).resume(folder / "interrupted", make_env(), again, device="cpu")

    assert_same_tensors(resumed.policy.state_dict(), whole.policy.state_dict())
    assert_same_tensors(resumed.policy.optimizer.state_dict(), whole.policy.optimizer.state_dict())
    if whole.value_optimizer is not None:
        assert_same_tensors(resumed.value_optimizer.state_dict(), whole.value_optimizer.state_dict())
    if isinstance(env, VecNormalize):
        statistics = [(each.obs_rms, each.ret_rms, each.returns) for each in (resumed.env, env)]
        np.testing.assert_equal(*([(vars(obs), vars(ret), returns) for obs, ret, returns in statistics]))
    assert resumed.num_timesteps == whole.num_timesteps
    assert resumed.kl_coef_state == whole.kl_coef_state
    assert parts[1].written
    assert parts[2].written
    written = {(entry["step"], *entry): entry for part in parts for entry in part.written}
    np.testing.assert_equal(list(written.values()), logged.written)


KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[], VecEnv]]] = {
    "ppo": (lambda env: PPO("MlpPolicy", env, **SETTINGS), lambda: make_vec_env("CartPole-v1", 2)),
    "eager": (lambda env: PPO("MlpPolicy", env, engine="eager", **SETTINGS), lambda: make_vec_env("CartPole-v1", 2)),
    "adaptive": (
        lambda env: PPOKL("MlpPolicy", env, learning_rate="lin_0.003", n_value_epochs=2, **SETTINGS),
        lambda: VecNormalize(make_vec_env("Pendulum-v1", 2)),
    ),
    "mujoco": (lambda env: PPO("MlpPolicy", env, **SETTINGS), lambda: VecNormalize(make_vec_env("Hopper-v5", 1))),
    "gsde": (lambda env: PPO("MlpPolicy", env, use_sde=True, **SETTINGS), lambda: make_vec_env("Pendulum-v1", 2)),
    "own": (lambda env: PPO("MlpPolicy", env, **SETTINGS), lambda: make_vec_env(RandomEnv, 2)),
    "processes": (
        lambda env: PPO("MlpPolicy", env, **SETTINGS),
        lambda: make_vec_env("Pendulum-v1", 2, wrapper_class=ResumableWrapper, vec_env_cls=SubprocVecEnv),
    ),
    "vector": (
        lambda env: PPO("MlpPolicy", env, **SETTINGS),
        lambda: GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode="vector_entry_point")),
    ),
    "masked": (
        lambda env: MaskablePPO("MlpPolicy", env, kl_coef="auto", **SETTINGS),
        lambda: make_vec_env(lambda: MaskedEnv("box", "discrete"), 2),
    ),
    "recurrent": (
        lambda env: RecurrentPPO("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 8}, **SETTINGS),
        lambda: make_vec_env(lambda: RandomEnv("box", "discrete"), 2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    run(*KINDS[kind], tmp_path, lambda: [])


def test_callbacks_go_on(tmp_path: Path) -> None:
    """Evaluations, too, whose environments have random states of their own; and a learning rate that has been adapted."""

    def callbacks() -> list[BaseCallback]:
        evaluation = EvalCallback(make_vec_env("CartPole-v1", 1, seed=1), eval_freq=12, n_eval_episodes=2, verbose=0)
        return [CallbackList([evaluation, KLAdaptiveLearningRateCallback(1e-3)]), KLEarlyStoppingCallback(0.01)]

    run(*KINDS["ppo"], tmp_path, callbacks)


def test_what_a_callback_loses_is_told_once(tmp_path: Path) -> None:
    class Keeps(BaseCallback):
        kept: Any = None

        def _on_step(self) -> bool:
            self.kept = object()
            return True

    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    with pytest.warns(UserWarning, match=r"`kept` of .*Keeps will be lost on resume: a object is no plain data") as told:
        model.learn(4 * 2 * N_STEPS, [Keeps(), ResumableCheckpointCallback(tmp_path)])
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_a_progress_bar_is_nothing_to_lose(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(3 * 2 * N_STEPS, ResumableCheckpointCallback(tmp_path), progress_bar=True)


def saved(folder: Path, **kwargs: Any) -> None:
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(5 * 2 * N_STEPS, ResumableCheckpointCallback(folder, **kwargs))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ppo_128_steps.checkpoint", "ppo_160_steps.checkpoint"]


def test_every_so_many_updates(tmp_path: Path) -> None:
    saved(tmp_path, save_freq=2, name_prefix="cart")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cart_128_steps.checkpoint", "cart_64_steps.checkpoint"]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:5000] + b"x" + data[5001:], lambda data: b""])
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    saved(tmp_path)
    last = tmp_path / "ppo_160_steps.checkpoint"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(DamagedCheckpointError, match=r"ppo_160_steps\.checkpoint is no checkpoint, or a damaged one"):
        PPO.resume(last, make_vec_env("CartPole-v1", 2))
    with pytest.warns(UserWarning, match=r"ppo_160_steps\.checkpoint is no checkpoint, .*; trying the one before"):
        model = PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu")
    assert model.num_timesteps == 160


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`path` must be a checkpoint, or a folder of checkpoints, not"):
        PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2))


def test_environments_that_cannot_be_captured_start_anew(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Box2D's import doesn't survive an error
        env = make_vec_env("LunarLander-v3", 1)
    model = PPO("MlpPolicy", env, **SETTINGS)
    with pytest.warns(
        UserWarning, match="environments will start a new episode on resume, as `world`.* can't be pickled"
    ) as told:
        model.learn(3 * N_STEPS, ResumableCheckpointCallback(tmp_path))
    assert len(told) == 1
    checkpoint = tmp_path / f"ppo_{2 * N_STEPS}_steps.checkpoint"
    assert PPO.resume(checkpoint, make_vec_env("LunarLander-v3", 1), device="cpu").num_timesteps == 3 * N_STEPS


def test_other_environments_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="`env` must have 1 layers as when it was saved, not 2"):
        PPO.resume(tmp_path, VecNormalize(make_vec_env("CartPole-v1", 2)))


def test_a_second_training_in_the_same_folder_is_refused_before_it_starts(tmp_path: Path) -> None:
    """Its checkpoints would be taken for older ones."""
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"`save_path` must not have checkpoints of another training, such as .*ppo_96_steps"):
        saved(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_prefixes_keep_trainings_apart(tmp_path: Path) -> None:
    saved(tmp_path, name_prefix="ppo_kl")
    saved(tmp_path, name_prefix="ppo", keep=1)
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        "ppo_160_steps",
        "ppo_kl_128_steps",
        "ppo_kl_160_steps",
        "ppo_kl_96_steps",
    ]


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(file: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_whole_checkpoint_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "ppo_32_steps.checkpoint").write_bytes(b"")
    env = make_vec_env("CartPole-v1", 2)
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(DamagedCheckpointError, match="none of the 1"),
    ):
        PPO.resume(tmp_path, env, device="cpu")


def test_saves_where_an_evaluation_calls_for_it(tmp_path: Path) -> None:
    """SB3 doesn't tell such a callback that training starts."""
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", 1), callback_on_new_best=ResumableCheckpointCallback(tmp_path), eval_freq=16, verbose=0
    )
    PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS).learn(128, evaluation)
    assert list(tmp_path.iterdir())


def test_a_training_within_a_training_leaves_the_outer_ones_checkpoints_alone(tmp_path: Path) -> None:
    class Within(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 64:
                inner = PPO("MlpPolicy", "CartPole-v1", **SETTINGS)
                inner.learn(32)
            return True

    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(128, [Within(), ResumableCheckpointCallback(tmp_path)])
    assert model._learn_arguments["total_timesteps"] == 128
