"""
A catalogue of bad input: each must be refused by the right exception, in words that name the culprit.

Where a training fails, by a fault of its environment, say, its model must be that of the last whole update, fit to be saved,
loaded and trained on; and both engines must behave alike. Run it with ``make hostile``.
"""

import argparse
import copy
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from benchmarks.provenance import write_with_origin
from benchmarks.tables import markdown
from sb3_ppo_variants import (
    PPO,
    PPOKL,
    GradientNoiseScaleCallback,
    GymnasiumVecEnv,
    KLAdaptiveLearningRateCallback,
    KLCoefController,
    KLEarlyStoppingCallback,
    NonFiniteError,
    ResumableCheckpointCallback,
    RewardsToGoRolloutBuffer,
    TrustRegionLoggingCallback,
    UntrustedFileError,
    UpdateCallback,
    UpdateStats,
)
from sb3_ppo_variants.resume import DamagedCheckpointError

ENGINES = ("fused", "eager")
N_STEPS, N_ENVS = 16, 3
ROLLOUT = N_STEPS * N_ENVS
FAULT_STEP = 20
"""In the second rollout, so that there is a whole update before."""


class Case(NamedTuple):
    """
    A bad input.

    :param run: must raise; takes an empty folder, and :class:`Trainings` for models that are trained
    :param error: what it must raise
    :param message: a regular expression that its message, or a note to it, must match
    :param trains: whether it fails in a training, to be tried with each engine
    """

    run: Callable[[Path, "Trainings"], Any]
    error: type[BaseException] | tuple[type[BaseException], ...]
    message: str
    trains: bool = False


class Trainings:
    """
    Models, and what they were after their last whole update.

    :param engine: of the models
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self.model: PPO | None = None
        self.last: dict[str, th.Tensor] = {}

    def learn(self, env: Any, callback: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> None:
        """Three updates."""
        arguments = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", "engine": self._engine}
        self.model = PPO(policy, env, **{**arguments, **kwargs})
        self.keep(self.model)
        callbacks = [] if callback is None else callback if isinstance(callback, list) else [callback]
        self.model.learn(3 * N_STEPS * self.model.n_envs, callback=[*callbacks, _Keep(self)])

    def keep(self, model: PPO) -> None:
        """Remember what it is now."""
        self.last = copy.deepcopy(model.policy.state_dict())

    def check(self, folder: Path) -> None:
        """
        That the model is as it was after its last whole update, and can be saved, loaded and trained.

        :raises AssertionError: if not
        """
        if self.model is None:
            return
        assert all(th.equal(value, self.last[name]) for name, value in self.model.policy.state_dict().items()), "changed"
        self.model.save(folder / "last_good")
        space = (self.model.observation_space, self.model.action_space)
        loaded = PPO.load(folder / "last_good", env=DummyVecEnv([lambda: Random(*space)] * self.model.n_envs), device="cpu")
        loaded.learn(loaded.n_steps * loaded.n_envs)
        assert all(th.isfinite(value).all() for value in loaded.policy.state_dict().values()), "not finite"


class _Keep(UpdateCallback):
    def __init__(self, trainings: Trainings) -> None:
        super().__init__()
        self._trainings = trainings

    def _on_update_end(self, stats: UpdateStats) -> None:
        self._trainings.keep(self.model)  # type: ignore[arg-type]


class Random(gym.Env[Any, Any]):
    """
    Random observations and rewards, episodes of seven steps.

    :param observation_space: the observations'
    :param action_space: the actions'
    """

    def __init__(
        self, observation_space: spaces.Space[Any] | None = None, action_space: spaces.Space[Any] | None = None
    ) -> None:
        self.observation_space = copy.deepcopy(observation_space or spaces.Box(-np.inf, np.inf, (3,), np.float32))
        self.action_space = copy.deepcopy(action_space or spaces.Box(-1, 1, (2,), np.float32))
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """A random observation."""
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        """A random observation and reward."""
        self.n_steps += 1
        return self.observation_space.sample(), float(self.np_random.normal()), self.n_steps % 7 == 0, False, {}


class Faulty(Random):
    """
    Changes what one of its steps returns.

    :param change: takes and returns observation, reward, terminated, truncated, info
    """

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__()
        self._change = change

    def step(self, action: Any) -> Any:
        """Faulty from :data:`FAULT_STEP` on."""
        result = super().step(action)
        return self._change(*result) if self.n_steps >= FAULT_STEP else result


class FailsToReset(Random):
    """Its fourth reset raises."""

    n_resets = 0

    def reset(self, **kwargs: Any) -> Any:
        """As the class says."""
        self.n_resets += 1
        if self.n_resets > 3:
            raise OSError("the simulator is gone")
        return super().reset(**kwargs)


def _raise(error: BaseException) -> Any:
    raise error


def _in_a_step(change: Callable[..., Any], wrap: Callable[[Any], Any] = lambda env: env, **kwargs: Any) -> Callable[..., Any]:
    """Three environments, the second of which is faulty."""

    def run(folder: Path, trainings: Trainings) -> None:
        trainings.learn(wrap(DummyVecEnv([Random, lambda: Faulty(change), Random])), **kwargs)

    return run


def _constructor(**kwargs: Any) -> Callable[..., Any]:
    return lambda folder, trainings: PPO(**{"policy": "MlpPolicy", "env": "CartPole-v1", "device": "cpu", **kwargs})


def _constructor_cases() -> Iterator[tuple[str, Case]]:
    finite = r"must be a finite number"
    wrong: list[tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]] = [
        ({"kl_coef": -1.0}, ValueError, rf"`kl_coef` {finite} >= 0, not -1\.0"),
        ({"kl_coef": math.nan}, ValueError, rf"`kl_coef` {finite} >= 0, not nan"),
        ({"kl_coef": "automatic"}, ValueError, "`kl_coef` must be .*, not 'automatic'"),
        ({"kl_coef": "auto_-1"}, ValueError, "`kl_coef` must be 'auto' or .*, not 'auto_-1'"),
        ({"kl_coef": [1.0]}, TypeError, r"`kl_coef` must be .*, not \[1\.0\]"),
        ({"kl_coef": {"rule": "trpo"}}, ValueError, "`rule` must be one of 'ppo', .*, not 'trpo'"),
        ({"kl_coef": {"rule": "ppo", "betta": 1}}, ValueError, "must be one of 'rule', 'initial', .*, not 'betta'"),
        ({"kl_coef": lambda progress: None}, TypeError, r"`kl_coef\(progress_remaining=1\.0\)` .*, not None"),
        ({"kl_target": 0}, ValueError, rf"`kl_target` {finite} > 0, not 0"),
        ({"kl_target": "0.01"}, TypeError, rf"`kl_target` {finite} > 0, not '0\.01'"),
        ({"n_value_epochs": 0}, ValueError, "`n_value_epochs` must be an integer >= 1, not 0"),
        ({"n_value_epochs": 1.5}, TypeError, "`n_value_epochs` must be an integer >= 1, not 1.5"),
        ({"value_learning_rate": 1e-3}, ValueError, "`value_learning_rate` must be None unless `n_value_epochs` is given"),
        ({"critic_first": True}, ValueError, "`critic_first` must be False unless `n_value_epochs` is given"),
        ({"n_episodes": 0}, ValueError, "`n_episodes` must be an integer >= 1, not 0"),
        ({"surrogate": "trpo"}, ValueError, "`surrogate` must be one of 'clip', 'spo', not 'trpo'"),
        ({"surrogate": "spo", "clip_range": None}, ValueError, "`clip_range` must be a number > 0, .* not None"),
        ({"dual_clip": 0.5}, ValueError, r"`dual_clip` must be None or a number > 1, not 0\.5"),
        ({"kl_rollback": 0.1}, ValueError, "`kl_rollback` must be None unless `kl_coef` is given"),
        ({"engine": "jit"}, ValueError, "`engine` must be one of 'auto', 'eager', 'fused', not 'jit'"),
        ({"on_nonfinite": "ignore"}, ValueError, "`on_nonfinite` must be one of 'raise', 'skip', 'restore', not 'ignore'"),
        ({"on_nonfinite": None}, TypeError, "`on_nonfinite` must be one of 'raise', 'skip', 'restore', not None"),
        ({"max_kl": 0}, ValueError, rf"`max_kl` {finite} > 0, not 0"),
        ({"max_kl": "0.1"}, TypeError, rf"`max_kl` {finite} > 0, not '0\.1'"),
        ({"clip_range": (0.1, 0.2, 0.3)}, ValueError, "`clip_range` must be None, a number, a schedule or a pair"),
        ({"clip_range": "lin_wide"}, ValueError, "`clip_range` must be 'lin_' and a finite number >= 0 .*, not 'lin_wide'"),
        ({"learning_rate": "lin_"}, ValueError, "`learning_rate` must be 'lin_' and .*, not 'lin_'"),
        ({"learning_rate": -1e-3}, ValueError, r"Invalid learning rate: -0\.001"),
        ({"ent_coef": "0.1"}, TypeError, rf"`ent_coef` {finite}, not '0\.1'"),
        ({"vf_coef": None}, TypeError, rf"`vf_coef` {finite}, not None"),
        ({"batch_size": 1}, AssertionError, "`batch_size` must be greater than 1"),
        ({"n_steps": 1}, AssertionError, r"`n_steps \* n_envs` must be greater than 1"),
        ({"policy": "MplPolicy"}, ValueError, "Policy MplPolicy unknown"),
        ({"env": "CartPool-v1"}, gym.error.Error, "CartPool"),
        (
            {"env": "CartPole-v1", "policy": "CnnPolicy"},
            (AssertionError, ValueError),
            "NatureCNN",
        ),
        ({"policy_kwargs": {"net_arhc": [8]}}, TypeError, "net_arhc"),
        ({"rollout_buffer_class": RewardsToGoRolloutBuffer, "rollout_buffer_kwargs": {"gama": 1}}, TypeError, "gama"),
        ({"device": "gpu"}, RuntimeError, "gpu"),
        ({"use_sde": True}, ValueError, "can only be used with continuous actions"),
    ]
    for kwargs, error, message in wrong:
        shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items() if not callable(value))
        yield re.sub(r" at 0x\w+", "", shown) or "a schedule that returns None", Case(_constructor(**kwargs), error, message)
    yield "n_epochs=0", Case(_no_epochs, ValueError, "`n_epochs` must be an integer >= 1, not 0")


class _StopsWithText(UpdateCallback):
    def _on_minibatch(self, stats: UpdateStats) -> Any:
        return "stop"


class _Raises(UpdateCallback):
    """In one of its hooks, in the second update."""

    n_updates = 0

    def __init__(self, hook: str) -> None:
        super().__init__()
        self._hook = hook

    def _fail(self, hook: str) -> None:
        if hook == self._hook and self.n_updates == 1:
            raise LookupError(f"in {hook}")

    def _on_rollout_end(self) -> None:
        self._fail("_on_rollout_end")

    def _on_update_start(self) -> None:
        self._fail("_on_update_start")

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.n_updates += 1


class _AsksForMore(UpdateCallback):
    def _on_minibatch(self, stats: UpdateStats) -> bool:
        return stats.latest("accuracy") > 0


class _Spoils(UpdateCallback):
    """Does something to the model in the second update, before its first minibatch."""

    n_updates = 0

    def __init__(self, spoil: Callable[[Any], Any]) -> None:
        super().__init__()
        self._spoil = spoil

    def _on_rollout_end(self) -> None:
        if self.n_updates == 1:
            self._spoil(self.model)

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.n_updates += 1


def _with(make_callback: Callable[[], BaseCallback]) -> Callable[..., Any]:
    return lambda folder, trainings: trainings.learn(DummyVecEnv([Random] * N_ENVS), make_callback())


def _made(kind: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    return lambda folder, trainings: kind(**kwargs)


def _no_epochs(folder: Path, trainings: Trainings) -> None:
    PPO("MlpPolicy", "CartPole-v1", n_epochs=0, n_steps=8, batch_size=8, device="cpu").learn(8)


def _callback_cases() -> Iterator[tuple[str, Case]]:
    wrong: list[tuple[type[BaseCallback], dict[str, Any], type[Exception], str]] = [
        (KLEarlyStoppingCallback, {"target": 0}, ValueError, "`target` must be a finite number > 0, not 0"),
        (KLEarlyStoppingCallback, {"factor": math.inf}, ValueError, "`factor` must be a finite number > 0, not inf"),
        (KLEarlyStoppingCallback, {"per": "step"}, ValueError, "`per` must be one of 'minibatch', 'epoch', not 'step'"),
        (KLEarlyStoppingCallback, {"estimator": "k4"}, ValueError, "`estimator` must be one of .*, not 'k4'"),
        (KLEarlyStoppingCallback, {"restore": "yes"}, TypeError, "`restore` must be True or False, not 'yes'"),
        (KLAdaptiveLearningRateCallback, {"minimum": 1.0}, ValueError, "`minimum` must not be greater than `maximum`"),
        (KLAdaptiveLearningRateCallback, {"band": 1}, ValueError, "`band` must be a number > 1, not 1"),
        (TrustRegionLoggingCallback, {"histogram_freq": 0}, ValueError, "`histogram_freq` must be an integer >= 1, not 0"),
        (GradientNoiseScaleCallback, {"decay": 1.5}, ValueError, "`decay` must be"),
        (ResumableCheckpointCallback, {"save_path": "x", "save_freq": 0}, ValueError, "`save_freq` must be an integer >= 1"),
        (ResumableCheckpointCallback, {"save_path": "x", "keep": 2.0}, TypeError, r"`keep` must be an integer >= 1, not 2\.0"),
    ]
    for kind, kwargs, error, message in wrong:
        name = f"{kind.__name__}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})"
        yield name, Case(_made(kind, kwargs), error, message)
    yield (
        "a rule with a factor below 1",
        Case(lambda folder, trainings: KLCoefController(increase_factor=0.5), ValueError, "`increase_factor` must be"),
    )
    yield (
        "a hook that returns text",
        Case(
            _with(_StopsWithText),
            TypeError,
            r"_StopsWithText\._on_minibatch` must return True or False .*'stop'",
            True,
        ),
    )
    yield (
        "a hook that asks for an unknown metric",
        Case(_with(_AsksForMore), KeyError, "there is no metric 'accuracy' in this update so far, only", True),
    )
    for hook in ("_on_rollout_end", "_on_update_start"):
        yield f"an exception in {hook}", Case(_with(partial(_Raises, hook)), LookupError, f"in {hook}", True)
    spoiled: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
        ("kl_coef", lambda model: setattr(model, "kl_coef", -1), ValueError, "`kl_coef` must be a finite number >= 0, not -1"),
        (
            "max_kl",
            lambda model: setattr(model, "max_kl", "small"),
            TypeError,
            "`max_kl` must be a finite number > 0, not 'small'",
        ),
        (
            "lr_schedule",
            lambda model: setattr(model, "lr_schedule", lambda progress: math.nan),
            NonFiniteError,
            "`learning_rate` must be finite, not nan as in update 2",
        ),
        (
            "advantages",
            lambda model: model.rollout_buffer.advantages.fill(math.inf),
            NonFiniteError,
            "the advantage of environments 0, 1, 2 at step 0 of the rollout is inf in update 2",
        ),
    ]
    for name, spoil, error, message in spoiled:
        yield f"{name}, set by a callback", Case(_with(partial(_Spoils, spoil)), error, message, True)
    yield "checkpoints in the place of a file", Case(_checkpoints_in_a_file, FileExistsError, "file", True)


def _checkpoints_in_a_file(folder: Path, trainings: Trainings) -> None:
    (folder / "file").touch()
    trainings.learn(Random(), ResumableCheckpointCallback(folder / "file"))


def _environment_cases() -> Iterator[tuple[str, Case]]:
    in_env = "environment 1"
    changes: list[tuple[str, Callable[..., Any], type[BaseException], str]] = [
        ("NaN as reward", lambda o, r, *rest: (o, math.nan, *rest), NonFiniteError, rf"the reward .* of {in_env} at step 3"),
        ("infinite reward", lambda o, r, *rest: (o, math.inf, *rest), NonFiniteError, rf"the reward .* of {in_env} at step 3"),
        ("NaN as observation", lambda o, *rest: (o * math.nan, *rest), NonFiniteError, f"the observation of {in_env} is nan"),
        ("infinite observation", lambda o, *rest: (o + math.inf, *rest), NonFiniteError, f"observation of {in_env}"),
        ("observation too long", lambda o, *rest: (np.zeros(4, np.float32), *rest), ValueError, f"in the step of {in_env}"),
        ("observation too short", lambda o, *rest: (np.zeros(2, np.float32), *rest), ValueError, f"in the step of {in_env}"),
        ("text as observation", lambda o, *rest: ("left", *rest), ValueError, f"in the step of {in_env}"),
        ("None as observation", lambda o, *rest: (None, *rest), (TypeError, ValueError, NonFiniteError), in_env),  # type: ignore[list-item]
        ("dict as observation", lambda o, *rest: ({"o": o}, *rest), (TypeError, ValueError), f"in the step of {in_env}"),  # type: ignore[list-item]
        ("text as reward", lambda o, r, *rest: (o, "much", *rest), ValueError, f"in the step of {in_env}"),
        ("None as reward", lambda o, r, *rest: (o, None, *rest), (TypeError, NonFiniteError), in_env),  # type: ignore[list-item]
        ("several rewards", lambda o, r, *rest: (o, np.ones(2), *rest), (TypeError, ValueError), f"in the step of {in_env}"),  # type: ignore[list-item]
        ("four values from step", lambda o, r, t, u, i: (o, r, t, i), ValueError, f"in the step of {in_env}"),
        ("no info", lambda o, r, t, u, i: (o, r, t, u, None), (TypeError, AttributeError), f"in the step of {in_env}"),  # type: ignore[list-item]
        (
            "exception in step",
            lambda *result: _raise(ZeroDivisionError("physics")),
            ZeroDivisionError,
            f"in the step of {in_env}",
        ),
        ("SystemExit in step", lambda *result: _raise(SystemExit("bye")), SystemExit, "bye"),
    ]
    for name, change, error, message in changes:
        yield name, Case(_in_a_step(change), error, message, True)
    yield (
        "exception in reset",
        Case(
            lambda folder, trainings: trainings.learn(DummyVecEnv([Random, FailsToReset, Random])),
            OSError,
            f"in the step of {in_env}",
            True,
        ),
    )
    yield (
        "exception in the first reset",
        Case(lambda folder, trainings: trainings.learn(DummyVecEnv([Random, _never_resets])), OSError, "gone", True),
    )
    yield (
        "NaN as reward beneath VecNormalize",
        Case(_in_a_step(changes[0][1], VecNormalize), NonFiniteError, "the reward .* of environments 0, 1, 2 at step 3", True),
    )
    yield "a space that changes", Case(_in_a_step(_grow), ValueError, f"in the step of {in_env}", True)
    yield (
        "an environment of other spaces for set_env",
        Case(
            lambda folder, trainings: PPO("MlpPolicy", "CartPole-v1", device="cpu").set_env(gym.make("Pendulum-v1")),
            ValueError,
            "Observation spaces do not match",
        ),
    )
    yield "environments of other actions for load", Case(_load_for_other_actions, ValueError, "Action spaces do not match")
    yield (
        "an observation space of text",
        Case(_constructor(env=Random(spaces.Text(5))), (NotImplementedError, ValueError, TypeError, AssertionError), "Text"),
    )
    yield (
        "a tuple of observations",
        Case(_constructor(env=Random(spaces.Tuple([spaces.Discrete(2)]))), (AssertionError, NotImplementedError), "Tuple"),
    )
    yield (
        "an action space of text",
        Case(_constructor(env=Random(None, spaces.Text(5))), (AssertionError, NotImplementedError), "Text"),
    )
    yield (
        "actions without bounds",
        Case(_constructor(env=Random(None, spaces.Box(-np.inf, np.inf, (1,)))), AssertionError, "(?i)finite|bound"),
    )
    yield (
        "a dict of observations for MlpPolicy",
        Case(_constructor(env=Random(spaces.Dict({"a": spaces.Discrete(2)}))), ValueError, "MultiInputPolicy"),
    )
    yield "a class for an environment", Case(_constructor(env=Random), (ValueError, TypeError, AttributeError), "")
    yield (
        "a vector environment without final observations",
        Case(lambda folder, trainings: trainings.learn(_without_final_observations()), ValueError, "final_obs", True),
    )
    yield (
        "a vector environment of an unknown autoreset mode",
        Case(lambda folder, trainings: GymnasiumVecEnv(_of_unknown_mode()), ValueError, "autoreset_mode"),
    )


def _never_resets() -> Random:
    env = FailsToReset()
    env.n_resets = 3
    return env


def _grow(observation: Any, *rest: Any) -> Any:
    return np.append(observation, np.float32(0)), *rest


def _load_for_other_actions(folder: Path, trainings: Trainings) -> None:
    PPO("MlpPolicy", Random(), device="cpu").save(folder / "model")
    PPO.load(folder / "model", env=Random(None, spaces.Discrete(2)), device="cpu")


def _without_final_observations() -> Any:
    env = SyncVectorEnv([Random] * N_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)
    step = env.step

    def forgetful(actions: Any) -> Any:
        *result, infos = step(actions)
        infos.pop("final_obs", None)
        return *result, infos

    env.step = forgetful  # type: ignore[method-assign]
    return env


def _of_unknown_mode() -> Any:
    env = SyncVectorEnv([Random] * N_ENVS)
    env.metadata = {**env.metadata, "autoreset_mode": "sometimes"}
    return env


def _file_cases() -> Iterator[tuple[str, Case]]:
    yield (
        "no such checkpoint",
        Case(
            lambda folder, trainings: PPO.resume(folder / "none", Random()),
            FileNotFoundError,
            "`path` must be a checkpoint.*none",
        ),
    )
    yield "no such file", Case(lambda folder, trainings: PPO.load(folder / "none"), FileNotFoundError, "none")
    for name, content in (("an empty file", b""), ("text", b"hello"), ("half of a zip", b"PK\x03\x04" + bytes(30))):

        def load(folder: Path, trainings: Trainings, content: bytes = content) -> None:
            (folder / "model.zip").write_bytes(content)
            PPO.load(folder / "model.zip", device="cpu")

        def load_safely(folder: Path, trainings: Trainings, content: bytes = content) -> None:
            (folder / "model.zip").write_bytes(content)
            PPO.load(folder / "model.zip", device="cpu", safe=True)

        def resume(folder: Path, trainings: Trainings, content: bytes = content) -> None:
            (folder / "ppo_16_steps.checkpoint").write_bytes(content)
            PPO.resume(folder / "ppo_16_steps.checkpoint", Random(), device="cpu")

        yield f"{name} for load", Case(load, ValueError, "model.zip wasn't a zip-file")
        yield (
            f"{name} for load(safe=True)",
            Case(load_safely, UntrustedFileError, "model.zip is no file of a model, or a damaged"),
        )
        yield (
            f"{name} for resume",
            Case(resume, DamagedCheckpointError, "ppo_16_steps.checkpoint is no checkpoint, or a damaged one"),
        )
    yield (
        "resume from an empty folder",
        Case(
            lambda folder, trainings: PPO.resume(folder, Random()),
            FileNotFoundError,
            "`path` must be a checkpoint, or a folder of checkpoints",
        ),
    )
    yield (
        "resume with another number of environments",
        Case(_resume_with(DummyVecEnv, 2), ValueError, "`env` must|environments"),
    )
    yield (
        "resume without the wrapper",
        Case(_resume_with(lambda envs: VecNormalize(DummyVecEnv(envs)), 1), ValueError, "layers"),
    )
    yield "a pickle for load(safe=True)", Case(_load_pickle_safely, UntrustedFileError, "would have to be unpickled")
    yield (
        "a schedule for save(safe=True)",
        Case(
            lambda folder, trainings: PPO("MlpPolicy", Random(), learning_rate=lambda progress: 1e-3, device="cpu").save(
                folder / "model", safe=True
            ),
            ValueError,
            "`learning_rate` can't be saved as plain data",
        ),
    )
    yield "a path beneath a file", Case(_save_beneath_a_file, OSError, "file")


def _save_beneath_a_file(folder: Path, trainings: Trainings) -> None:
    (folder / "file").touch()
    PPOKL("MlpPolicy", Random(), device="cpu").save(folder / "file" / "model")


def _resume_with(make: Callable[[Any], Any], n_envs: int) -> Callable[..., Any]:
    def run(folder: Path, trainings: Trainings) -> None:
        model = PPO("MlpPolicy", DummyVecEnv([Random]), n_steps=8, batch_size=8, device="cpu")
        model.learn(8, callback=ResumableCheckpointCallback(folder))
        PPO.resume(folder, make([Random] * n_envs), device="cpu")

    return run


def _load_pickle_safely(folder: Path, trainings: Trainings) -> None:
    PPO("MlpPolicy", Random(), device="cpu").save(folder / "model")
    PPO.load(folder / "model", device="cpu", safe=True)


def _cli(module: str, *arguments: str) -> Callable[..., Any]:
    def run(folder: Path, trainings: Trainings) -> None:
        command = [sys.executable, "-m", module, *(argument.format(folder=folder) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        raise SystemExit(done.stderr)

    return run


def _cli_cases() -> Iterator[tuple[str, Case]]:
    compare = ("benchmarks.compare", "--output", "{folder}", "--timesteps", "100")
    wrong: list[tuple[tuple[str, ...], str]] = [
        ((*compare, "--env", "CartPool-v1"), "unknown environment: .*CartPool"),
        ((*compare, "--env", "CartPole-v1", "--variants", "clap"), "clap"),
        ((*compare, "--env", "CartPole-v1", "--seeds", "0"), "seeds"),
        ((*compare, "--env", "CartPole-v1", "--set", "n_stepps=8"), "n_stepps"),
        ((*compare, "--grid", "{folder}/none.yaml"), r"none\.yaml"),
        (("benchmarks.crash", "--kills", "0"), "--kills must be at least 1, not 0"),
        (("benchmarks.long_run", "--updates", "x"), "--updates: invalid int value: 'x'"),
        (("sb3_ppo_variants.train", "--algo", "ppo_lk", "--env", "CartPole-v1"), "ppo_lk"),
        (("sb3_ppo_variants.train", "--algo", "ppo_kl", "--env", "CartPool-v1", "--log-folder", "{folder}"), "CartPool-v1"),
    ]
    for (module, *arguments), message in wrong:
        shown = " ".join(argument for argument in arguments if "{" not in argument)
        yield f"{module} {shown}", Case(_cli(module, *arguments), SystemExit, message)


AREAS: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "constructor": _constructor_cases,
    "callbacks": _callback_cases,
    "environments": _environment_cases,
    "files": _file_cases,
    "commands": _cli_cases,
}


def catalogue() -> dict[str, tuple[str, Case]]:
    """All cases by name, with their area."""
    return {f"{area}: {name}": (area, case) for area, cases in AREAS.items() for name, case in cases()}


def judge(case: Case, engine: str) -> str:
    """
    Try a case.

    :param case: the case
    :param engine: for trainings
    :return: what is wrong, empty if nothing is
    """
    trainings = Trainings(engine)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            case.run(Path(temporary), trainings)
        except BaseException as error:
            said = "\n".join([str(error), *getattr(error, "__notes__", [])])
            if not isinstance(error, case.error):
                return f"raised {type(error).__name__}: {said}"
            if not re.search(case.message, said):
                return f"said: {said}"
        else:
            return "raised nothing"
        try:
            trainings.check(Path(temporary))
        except Exception as error:
            return f"left the model {error}"
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Try all, and write a table into a folder.

    :param arguments: of the command line
    :raises SystemExit: with 1 if any isn't refused as it should be
    """
    parser = argparse.ArgumentParser(description="Try a catalogue of bad input.")
    parser.add_argument("--output", type=Path, default=Path("runs/hostile"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    rows = []
    for name, (area, case) in catalogue().items():
        for engine in ENGINES if case.trains else ENGINES[:1]:
            wrong = judge(case, engine)
            rows.append(
                {"area": area, "input": name.partition(": ")[2], "engine": engine if case.trains else "", "wrong": wrong}
            )
            if wrong:
                print(f"{name} ({engine}): {wrong}", flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(options.output / "inputs.csv", index=False)
    counts = []
    for area, own in [*table.groupby("area", sort=False), ("all", table)]:
        n_wrong = int((own["wrong"] != "").sum())
        counts.append((str(area), str(own["input"].nunique()), str(len(own)), str(n_wrong)))
    text = markdown([("area", "inputs", "tried (with each engine where it trains)", "not refused as they should be"), *counts])
    write_with_origin(["# Bad input", text], options.output)
    print(f"\n{text}")
    if counts[-1][-1] != "0":
        sys.exit(1)


if __name__ == "__main__":
    main()
