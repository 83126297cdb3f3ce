"""
The state of an environment: taken out of it, and put into another one that is built alike.

An environment's state is what its attributes hold, and those of its wrappers, layer by layer. Pickling the environment as a
whole would not do: many, such as gymnasium's MuJoCo environments, pickle only how they were built.
"""

import functools
import io
import multiprocessing
import pickle
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv, VectorWrapper
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_ppo_variants.vec_env import GymnasiumVecEnv

DRAWING = frozenset(
    ("mujoco_renderer", "renderer", "viewer", "screen", "surf", "clock", "isopen", "window", "screens", "window_surface")
)
"""Names of attributes that environments draw with, if these are no plain data."""


INNER = ("env", "envs", "remotes", "work_remotes", "processes", "class_attributes")
"""Attributes of SB3's vector environments that lead to others."""


DRAWERS = ("pygame", "glfw", "mujoco", "gymnasium.envs.mujoco")
"""Modules of objects that draw."""

FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial, type)

ENVIRONMENTS = (gym.Env, VectorEnv, VecEnv)


AnyEnv: TypeAlias = "gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv"


class UncapturedStateError(Exception):
    """An environment has state that can't be taken out of it."""


def capture(env: AnyEnv, _outer: tuple[Any, ...] = ()) -> list[bytes]:
    """
    The state of an environment and of its wrappers.

    :param env: the environment
    :return: of each layer from the outermost inwards, for :func:`restore`
    :raises UncapturedStateError: if an attribute can't be pickled; the message names it
    """
    layers = list(_layers(env))
    return [_capture_layer(layer, layers, (*_outer, *layers)) for layer in layers]


def restore(env: AnyEnv, state: Sequence[bytes | None]) -> None:
    """
    Put a state into an environment that is built as the one it was taken from.

    :param env: the environment, reset or not
    :param state: as :func:`capture` returns it
    :raises ValueError: if the environment has other layers
    """
    layers = list(_layers(env))
    if len(layers) != len(state):
        raise ValueError(f"`env` must have {len(state)} layers as when it was saved, not {len(layers)}: {env}")
    for layer, pickled in zip(layers, state, strict=True):
        if pickled is None:
            continue
        kind, attributes = _Unpickler(io.BytesIO(pickled), layers).load()
        if kind != _kind(layer):
            raise ValueError(f"`env` must have a {kind} as when it was saved, not a {_kind(layer)}: {env}")
        _put(attributes, layer)


def _put(attributes: dict[str, Any], layer: Any) -> None:
    for name, value in attributes.items():
        if isinstance(value, _InPlace):
            value.put_into(vars(layer)[name])
        elif _is_mujoco_data(value):
            sys.modules["mujoco"].mj_copyData(vars(layer)[name], vars(layer)["model"], value)
        else:
            vars(layer)[name] = value


def _layers(env: Any) -> Iterator[Any]:
    while isinstance(env, (gym.Wrapper, VectorWrapper, VecEnvWrapper)):
        yield env
        env = env.venv if isinstance(env, VecEnvWrapper) else env.env
    yield env


def _kind(layer: object) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


class _Pickler(pickle.Pickler):
    """Takes references to the layers for what they are: objects that belong to an environment mustn't bring a copy of it."""

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}

    def persistent_id(self, obj: Any) -> int | None:
        return self._numbers.get(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._layers = layers

    def persistent_load(self, pid: int) -> Any:
        return self._layers[pid]


def _capture_layer(layer: Any, layers: Sequence[Any], outer: tuple[Any, ...]) -> bytes:
    if any(base.__name__ == "pybind11_object" for base in type(layer).__mro__):
        raise UncapturedStateError(f"{_kind(layer)} keeps its state outside of Python")
    kept = {name: value for name, value in vars(layer).items() if not _is_built(layer, name, value, outer)}
    attributes = {name: _content(value, outer) for name, value in kept.items()}
    file = io.BytesIO()
    try:
        _Pickler(file, layers).dump((_kind(layer), attributes))  # at once, as attributes may share objects
        return file.getvalue()
    except Exception as error:
        culprits = [name for name, value in attributes.items() if not _can_be_pickled(value)]
        names = ", ".join(f"`{name}`" for name in culprits)
        raise UncapturedStateError(f"{names} of {_kind(layer)} can't be pickled: {error}") from error


def _is_built(layer: Any, name: str, value: Any, outer: Sequence[Any]) -> bool:
    """Whether an attribute is given by how the environment is built, or what it draws or logs with."""
    drawing = name in DRAWING and (type(value).__module__.startswith(DRAWERS) or not _can_be_pickled(value))
    given = name in ("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs") or (isinstance(layer, VecEnv) and name in INNER)
    built = any(value is each for each in outer) or isinstance(value, (*FUNCTIONS, EnvSpec, ModuleType, ResultsWriter))
    functions = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, FUNCTIONS) for each in value)
    return drawing or given or built or functions or type(value).__name__ == "MjModel"


def _content(value: Any, outer: tuple[Any, ...]) -> Any:
    if isinstance(value, spaces.Space):
        return _Generators(value)
    if isinstance(value, ENVIRONMENTS):
        return _Environments([value], outer)
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, (list, tuple, dict)) and value and all(isinstance(each, ENVIRONMENTS) for each in parts):
        return _Environments(list(parts), outer)
    return value


def _is_mujoco_data(value: Any) -> bool:
    return type(value).__name__ == "MjData" and type(value).__module__.startswith("mujoco")


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


class _InPlace(ABC):
    """A value that is put into another one, as that belongs to others too."""

    @abstractmethod
    def put_into(self, value: Any) -> None:
        """Change a value of the same kind."""


class _Environments(_InPlace):
    """
    The states of several environments.

    :param envs: the environments
    :param outer: environments that they stand in
    """

    def __init__(self, envs: Sequence[AnyEnv], outer: tuple[Any, ...] = ()) -> None:
        self.states = [capture(env, outer) for env in envs]

    def put_into(self, value: Any) -> None:
        """
        Into as many environments.

        :raises ValueError: if there are more or fewer
        """
        value = [value] if isinstance(value, ENVIRONMENTS) else list(value.values() if isinstance(value, dict) else value)
        if len(value) != len(self.states):
            raise ValueError(f"`env` must have {len(self.states)} environments as when it was saved, not {len(value)}")
        for env, state in zip(value, self.states, strict=True):
            restore(env, state)


class _Generators(_InPlace):
    """
    The random generators of a space and of those that it consists of.

    :param space: the space
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.own = space._np_random
        self.of_parts = [_Generators(part) for part in _parts(space)]

    def put_into(self, value: spaces.Space[Any]) -> None:
        """Into a space of the same kind."""
        value._np_random = self.own
        for generators, part in zip(self.of_parts, _parts(value), strict=True):
            generators.put_into(part)


def _parts(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    inner = getattr(space, "spaces", ())
    return list(inner.values() if isinstance(inner, dict) else inner)


class ResumableWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """
    Lets the state of an environment in another process be captured: ``make_vec_env(..., wrapper_class=ResumableWrapper)``.

    Environments in a ``DummyVecEnv`` don't need it. In another process it leaves Ctrl-C, which the terminal sends to all of
    them, to the one that trains.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def capture_state(self) -> list[bytes] | str:
        """The state of the wrapped environment; where it can't be captured, why."""
        try:
            return capture(self.env)
        except UncapturedStateError as error:
            return str(error)

    def restore_state(self, state: list[bytes]) -> None:
        """
        Put a state into the wrapped environment.

        :param state: as :meth:`capture_state` returns it
        """
        restore(self.env, state)


class VecEnvState(NamedTuple):
    """
    The state of a vector environment.

    :param wrappers: of SB3's wrappers and the vector environment itself, from the outermost inwards; ``None`` where that can't
        be captured
    :param envs: of the environments in it; where that can't be captured, why
    """

    wrappers: list[bytes | None]
    envs: Any


def capture_vec_env(venv: VecEnv) -> VecEnvState:
    """
    The state of a vector environment, and of the environments in it where that can be captured.

    :param venv: the vector environment
    """
    layers = list(_layers(venv))
    wrappers: list[bytes | None] = []
    try:
        envs = _capture_envs(venv.unwrapped)
    except UncapturedStateError as error:
        envs = str(error)
    for layer in layers:
        try:
            wrappers.append(_capture_layer(layer, layers, tuple(layers)))
        except UncapturedStateError as error:
            wrappers.append(None)
            envs = str(error)
    return VecEnvState(wrappers, envs)


def restore_vec_env(venv: VecEnv, state: VecEnvState) -> bool:
    """
    Put a state into a vector environment that is built as the one it was taken from.

    :param venv: the vector environment
    :param state: as :func:`capture_vec_env` returns it
    :return: whether the environments in it go on where they were; else they have to be reset
    :raises ValueError: if it is built in another way
    """
    restore(venv, state.wrappers)
    if isinstance(state.envs, str):
        return False
    inner: Any = venv.unwrapped
    match inner:
        case DummyVecEnv():
            state.envs.put_into(inner.envs)
        case GymnasiumVecEnv():
            restore(inner.env, state.envs)
        case _:
            if venv.num_envs != len(state.envs):
                raise ValueError(f"`env` must have {len(state.envs)} environments as when it was saved, not {venv.num_envs}")
            for index, captured in enumerate(state.envs):
                inner.env_method("restore_state", captured, indices=index)
    return True


def _capture_envs(inner: Any) -> Any:
    match inner:
        case DummyVecEnv():
            return _Environments(inner.envs)
        case GymnasiumVecEnv():
            return capture(inner.env)
    if not inner.has_attr("capture_state"):
        raise UncapturedStateError(
            f"environments in a {type(inner).__name__} can only be reached in a ResumableWrapper: make them with "
            "`make_vec_env(..., wrapper_class=ResumableWrapper)`"
        )
    states = inner.env_method("capture_state")
    for reason in states:
        if isinstance(reason, str):
            raise UncapturedStateError(reason)
    return states
