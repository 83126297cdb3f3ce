"""
The state of an environment: taken out of it, and put into another one that is built alike.

An environment's state is what its attributes hold, and those of its wrappers, layer by layer. Pickling the environment as a
whole would not do: many, such as gymnasium's MuJoCo environments, pickle only how they were built.
"""

import pickle
import sys
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import ResultsWriter

DRAWING = frozenset(
    ("mujoco_renderer", "renderer", "viewer", "screen", "surf", "clock", "isopen", "window", "screens", "window_surface")
)
"""Attributes that environments draw with."""


class UncapturedStateError(Exception):
    """An environment has state that can't be taken out of it."""


def capture(env: gym.Env[Any, Any]) -> list[bytes]:
    """
    The state of an environment and of its wrappers.

    :param env: the environment
    :return: of each layer from the outermost inwards, for :func:`restore`
    :raises UncapturedStateError: if an attribute can't be pickled; the message names it
    """
    return [_capture_layer(layer) for layer in _layers(env)]


def restore(env: gym.Env[Any, Any], state: list[bytes]) -> None:
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
        kind, attributes = pickle.loads(pickled)
        if kind != _kind(layer):
            raise ValueError(f"`env` must have a {kind} as when it was saved, not a {_kind(layer)}: {env}")
        for name, value in attributes.items():
            if isinstance(value, _Generators):
                value.put_into(vars(layer)[name])
            elif _is_mujoco_data(value):
                sys.modules["mujoco"].mj_copyData(vars(layer)[name], vars(layer)["model"], value)
            else:
                vars(layer)[name] = value


def _layers(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def _kind(layer: gym.Env[Any, Any]) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _capture_layer(layer: gym.Env[Any, Any]) -> bytes:
    attributes = {name: _content(value) for name, value in vars(layer).items() if not _is_built(name, value)}
    try:
        return pickle.dumps((_kind(layer), attributes))  # at once, as attributes may share objects
    except Exception as error:
        culprits = [name for name, value in attributes.items() if not _can_be_pickled(value)]
        names = ", ".join(f"`{name}`" for name in culprits)
        raise UncapturedStateError(f"{names} of {_kind(layer)} can't be pickled: {error}") from error


def _is_built(name: str, value: Any) -> bool:
    """Whether an attribute is given by how the environment is built, or what it draws or logs with."""
    drawing = name in DRAWING
    given = name in ("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs")
    built = isinstance(value, (gym.Env, EnvSpec, FunctionType, MethodType, ModuleType, type, ResultsWriter))
    return drawing or given or built or type(value).__name__ == "MjModel"


def _content(value: Any) -> Any:
    return _Generators(value) if isinstance(value, spaces.Space) else value


def _is_mujoco_data(value: Any) -> bool:
    return type(value).__name__ == "MjData" and type(value).__module__.startswith("mujoco")


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


class _Generators:
    """
    The random generators of a space and of those that it consists of; the space itself belongs to others too.

    :param space: the space
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.own = space._np_random
        self.of_parts = [_Generators(part) for part in _parts(space)]

    def put_into(self, space: spaces.Space[Any]) -> None:
        """Give them to a space of the same kind."""
        space._np_random = self.own
        for generators, part in zip(self.of_parts, _parts(space), strict=True):
            generators.put_into(part)


def _parts(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    inner = getattr(space, "spaces", ())
    return list(inner.values() if isinstance(inner, dict) else inner)
