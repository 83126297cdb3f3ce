"""A training that is resumed ends with the bits of one that was never interrupted."""

import contextlib
import random
import shutil
import threading
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
from sb3_ppo_variants.resume import read
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


class Frozen(BaseCallback):
    """Half of the policy is trained."""

    def _on_training_start(self) -> None:
        if self.num_timesteps == 0:
            for parameter in self.model.policy.mlp_extractor.parameters():
                parameter.requires_grad = False

    def _on_step(self) -> bool:
        return True


def test_parameters_that_are_frozen_stay_so(tmp_path: Path) -> None:
    run(*KINDS["ppo"], tmp_path, lambda: [Frozen()])


class RunningMeanBuffer(RolloutBuffer):
    """Learns from rewards less their running mean."""

    mean = 0.0

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        self.mean = 0.9 * self.mean + 0.1 * float(self.rewards.mean())
        self.rewards -= self.mean
        super().compute_returns_and_advantage(last_values, dones)


def test_a_rollout_buffers_own_numbers_go_on(tmp_path: Path) -> None:
    def make(env: VecEnv) -> PPO:
        return PPO("MlpPolicy", env, rollout_buffer_class=RunningMeanBuffer, **SETTINGS)

    run(make, KINDS["ppo"][1], tmp_path, lambda: [])


class Drawing(BaseCallback):
    """Changes what it keeps in place; draws from the model's spaces, too."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: deque[float] = deque(maxlen=5)
        self.generators = [np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]

    def _on_step(self) -> bool:
        self.latest.append(float(self.locals["rewards"].mean() + self.num_timesteps % 7))
        return True

    def _on_rollout_end(self) -> None:
        drawn = sum(float(generator.normal()) for generator in self.generators[:2]) + self.generators[2].random()
        self.logger.record("drawn/own", drawn + sum(self.latest))
        self.logger.record("drawn/actions", [str(each.action_space.sample()) for each in (self.model, self.model.policy)])


@pytest.mark.parametrize("kind", ["ppo", "adaptive"])
def test_what_callbacks_change_in_place_goes_on(kind: str, tmp_path: Path) -> None:
    run(*KINDS[kind], tmp_path, lambda: [Drawing()])


def test_spaces_are_the_environments_own(tmp_path: Path) -> None:
    saved(tmp_path)
    model = PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu")
    assert model.env is not None
    for owner in (model, model.policy, model.rollout_buffer):
        assert owner.action_space is model.env.action_space
        assert owner.observation_space is model.env.observation_space


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


def test_objects_that_a_callback_changes_in_place_are_told_too(tmp_path: Path) -> None:
    class Counts(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.settings, self.seen = Counter(), Counter()

        def _on_step(self) -> bool:
            self.seen.n += 1
            return True

    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    with pytest.warns(UserWarning, match=r"`seen` of .*Counts will be lost on resume: a Counter is no plain data") as told:
        model.learn(4 * 2 * N_STEPS, [Counts(), ResumableCheckpointCallback(tmp_path)])
    assert len(told) == 1


class Counter:
    n = 0


def test_what_is_the_models_or_only_of_one_update_is_not_lost(tmp_path: Path) -> None:
    class KnowsThePolicy(BaseCallback):
        known: Any = None

        def _on_training_start(self) -> None:
            self.known = {"policy": self.model.policy, "buffer": self.model.rollout_buffer}

        def _on_step(self) -> bool:
            return True

    callbacks = [KLEarlyStoppingCallback(0.01, per="epoch", restore=True), KnowsThePolicy()]
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(3 * 2 * N_STEPS, [*callbacks, ResumableCheckpointCallback(tmp_path)])


def test_environments_of_callbacks_that_cannot_be_captured_are_told_and_start_anew(tmp_path: Path) -> None:
    def callbacks() -> list[BaseCallback]:
        env = make_vec_env("CartPole-v1", 1, seed=1)
        env.envs[0].unwrapped.lock = threading.Lock()  # type: ignore[attr-defined]
        return [EvalCallback(env, eval_freq=12, n_eval_episodes=1, verbose=0), ResumableCheckpointCallback(tmp_path)]

    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    with pytest.warns(UserWarning, match="the environments in `eval_env` of EvalCallback will start a new episode") as told:
        model.learn(3 * 2 * N_STEPS, callbacks())
    assert len(told) == 1
    for each in tmp_path.glob("*_96_*"):
        each.unlink()
    again = callbacks()[:1]
    eval_env: Any = again[0].eval_env  # type: ignore[attr-defined]
    resets = []
    eval_env.reset = lambda: resets.append(again[0].num_timesteps) or type(eval_env).reset(eval_env)
    PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), again, device="cpu")
    assert resets[0] == 2 * 2 * N_STEPS  # before training goes on


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_a_progress_bar_is_nothing_to_lose(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(3 * 2 * N_STEPS, ResumableCheckpointCallback(tmp_path), progress_bar=True)


def saved(folder: Path, **kwargs: Any) -> None:
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(5 * 2 * N_STEPS, ResumableCheckpointCallback(folder, **kwargs))


def test_a_checkpoints_model_can_be_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    model, before = (PPO.load(tmp_path / f"ppo_{steps}_steps.checkpoint", device="cpu") for steps in (160, 128))
    assert model.num_timesteps == 5 * 2 * N_STEPS
    assert not th.equal(model.policy.action_net.weight, before.policy.action_net.weight)
    resumed = PPO.resume(str(tmp_path), make_vec_env("CartPole-v1", 2), device="cpu")
    assert_same_tensors(model.policy.state_dict(), resumed.policy.state_dict())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ppo_128_steps.checkpoint", "ppo_160_steps.checkpoint"]


def test_every_so_many_updates(tmp_path: Path) -> None:
    saved(tmp_path, save_freq=2, name_prefix="cart")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cart_128_steps.checkpoint", "cart_64_steps.checkpoint"]


def with_other_bytes(data: bytes) -> bytes:
    return data[:4000] + bytes(255 - byte for byte in data[4000:5000]) + data[5000:]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], with_other_bytes, lambda data: b""])
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    saved(tmp_path)
    last = tmp_path / "ppo_160_steps.checkpoint"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(DamagedCheckpointError, match=r"ppo_160_steps\.checkpoint is no checkpoint, or a damaged one"):
        PPO.resume(last, make_vec_env("CartPole-v1", 2))
    with pytest.warns(UserWarning, match=r"ppo_160_steps\.checkpoint is no checkpoint, .*; trying the one before"):
        model = PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu")
    assert model.num_timesteps == 160


def test_damage_that_shows_as_an_error_of_the_system_is_damage(tmp_path: Path) -> None:
    """Such as a place in the file that is before its start."""
    saved(tmp_path, keep=1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    model = read(path).model
    for position in range(len(whole) - 300, len(whole)):  # the zip file's directory
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x59]) + whole[position + 1 :])
        with contextlib.suppress(DamagedCheckpointError):
            assert read(path).model == model


def test_folders_are_no_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "ppo_999_steps.checkpoint").mkdir()
    assert PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu").num_timesteps == 160


def test_a_folder_that_is_deleted_in_training_is_made_again(tmp_path: Path) -> None:
    class Deletes(BaseCallback):
        def _on_step(self) -> bool:
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            return True

    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(2 * 2 * N_STEPS, [Deletes(), ResumableCheckpointCallback(tmp_path / "checkpoints")])
    assert list((tmp_path / "checkpoints").iterdir())


def test_an_environments_id_will_do(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", **SETTINGS)
    model.learn(2 * N_STEPS, ResumableCheckpointCallback(tmp_path))
    (tmp_path / f"ppo_{2 * N_STEPS}_steps.checkpoint").unlink()
    resumed = PPO.resume(tmp_path, "CartPole-v1", device="cpu")
    assert_same_tensors(resumed.policy.state_dict(), model.policy.state_dict())


def test_variants_of_an_algorithm_go_on_with_each_others_checkpoints_and_no_others(tmp_path: Path) -> None:
    saved(tmp_path)
    assert PPOKL.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu").clip_range is not None
    with pytest.raises(ValueError, match=r"`path` must have checkpoints of RecurrentPPO, not of PPO: use `PPO\.resume`"):
        RecurrentPPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu")


def two_groups(model: PPO) -> None:
    first, *others = model.policy.parameters()
    model.policy.optimizer = th.optim.Adam([{"params": [first]}, {"params": others}], lr=1e-3)


def another_class(model: PPO) -> None:
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=1e-3)


@pytest.mark.parametrize("change", [two_groups, another_class])
def test_an_optimiser_that_could_not_be_resumed_is_refused_before_training(
    change: Callable[[PPO], None], tmp_path: Path
) -> None:
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    change(model)
    with pytest.raises(ValueError, match=r"`policy\.optimizer` must be built as ActorCriticPolicy builds it"):
        model.learn(64, ResumableCheckpointCallback(tmp_path))
    assert model.num_timesteps == 0


class TwoGroups(ActorCriticPolicy):
    """The critic learns faster."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        critic = list(self.value_net.parameters())
        others = [parameter for parameter in self.parameters() if all(parameter is not each for each in critic)]
        self.optimizer = th.optim.Adam([{"params": others}, {"params": critic}], lr=1e-3)


def test_a_policy_that_builds_such_an_optimiser_itself_can_be_resumed(tmp_path: Path) -> None:
    run(lambda env: PPO(TwoGroups, env, **SETTINGS), KINDS["ppo"][1], tmp_path, lambda: [])


def test_tensorboard_goes_on_in_the_runs_own_folder_with_each_step_once(tmp_path: Path) -> None:
    def make(folder: str) -> PPO:
        return PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), tensorboard_log=str(tmp_path / folder), **SETTINGS)

    rollout = 2 * N_STEPS
    make("whole").learn(7 * rollout)
    with pytest.raises(CrashError):
        make("runs").learn(7 * rollout, [ResumableCheckpointCallback(tmp_path / "c", save_freq=3), Interrupt(5 * rollout + 2)])
    make("runs").learn(rollout)  # meanwhile
    PPO.resume(tmp_path / "c", make_vec_env("CartPole-v1", 2), device="cpu").logger.close()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["PPO_1", "PPO_2"]
    for key in ("train/loss", "train/kl_per_epoch", "rollout/ep_rew_mean"):
        assert logged(tmp_path / "runs", key) == logged(tmp_path / "whole", key)


def test_an_update_that_was_left_out_repeats_no_step_in_tensorboard(tmp_path: Path) -> None:
    """The checkpoint behind it has nothing of the update before to write again."""

    class Spoil(BaseCallback):
        def _on_rollout_end(self) -> None:
            if self.num_timesteps == 3 * 2 * N_STEPS:
                self.model.rollout_buffer.rewards[0] = np.nan

        def _on_step(self) -> bool:
            return True

    arguments = {**SETTINGS, "on_nonfinite": "restore", "tensorboard_log": str(tmp_path)}
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **arguments)
    callbacks = [Spoil(), ResumableCheckpointCallback(tmp_path), Interrupt(3 * 2 * N_STEPS + 2)]
    with pytest.warns(UserWarning, match="update 3 is left out"), pytest.raises(CrashError):
        model.learn(5 * 2 * N_STEPS, callbacks)
    PPO.resume(tmp_path, make_vec_env("CartPole-v1", 2), device="cpu")
    steps = [step for step, _ in logged(tmp_path, "train/kl_per_epoch")]
    assert len(steps) == 4 * 2
    assert sorted(set(steps)) == steps


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_callbacks_find_the_names_that_they_find_in_learn(algorithm: Any, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []

    class Look(BaseCallback):
        def _on_training_start(self) -> None:
            found.append({name: self.locals[name] for name in self.locals if name not in ("self", "callback", "use_masking")})
            assert self.locals["self"] is self.model

        def _on_step(self) -> bool:
            return True

    def make_env() -> VecEnv:
        return make_vec_env(MaskedEnv, 2, env_kwargs={"action": "discrete"})

    model = algorithm("MlpPolicy", make_env(), **SETTINGS)
    with pytest.raises(CrashError):
        model.learn(100, [Look(), ResumableCheckpointCallback(tmp_path), Interrupt(40)], tb_log_name="mine")
    algorithm.resume(tmp_path, make_env(), Look(), device="cpu")
    assert found[1] == {**found[0], "iteration": 1}


def logged(folder: Path, key: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of the folder's first run. Files of one second aren't told apart by their names."""
    for number, path in enumerate(sorted((folder / "PPO_1").iterdir(), key=lambda path: path.stat().st_mtime)):
        path.rename(path.with_name(f"events.out.tfevents.{number}"))
    events = EventAccumulator(str(folder / "PPO_1"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


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
