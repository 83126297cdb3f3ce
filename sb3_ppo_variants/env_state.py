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
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
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


INNER = ("env", "envs", "remotes", "work_remotes", "processes", "class_attributes", "buf_infos")
"""Attributes of SB3's vector environments that lead to others, or that each step sets without a look at what was there."""


DRAWERS = ("pygame", "glfw", "mujoco", "gymnasium.envs.mujoco")
"""Modules of objects that draw."""

FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial, type)

ENVIRONMENTS = (gym.Env, VectorEnv, VecEnv)


AnyEnv: TypeAlias = "gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv"


class UncapturedStateError(Exception):
    """An environment has state that can't be taken out of it."""


class EnvState(NamedTuple):
    """
    The state of an environment, of its wrappers, and of environments in their attributes.

    :param kinds: of these layers
    :param content: pickled, see :func:`_dump`
    """

    kinds: list[str]
    content: bytes


def capture(env: AnyEnv) -> EnvState:
    """
    The state of an environment and of its wrappers.

    :param env: the environment
    :return: for :func:`restore`
    :raises UncapturedStateError: if an attribute can't be pickled; the message names it
    """
    layers = _with_inner(env)
    return EnvState(_kinds(layers), _dump(layers, layers))


def restore(env: AnyEnv, state: EnvState) -> None:
    """
    Put a state into an environment that is built as the one it was taken from.

    :param env: the environment, reset or not
    :param state: as :func:`capture` returns it
    :raises ValueError: if the environment has other layers
    """
    layers = _with_inner(env)
    _check_kinds(env, layers, state.kinds)
    _load(state.content, layers)


def _check_kinds(env: AnyEnv, layers: Sequence[Any], kinds: Sequence[str]) -> None:
    if len(layers) != len(kinds):
        raise ValueError(f"`env` must have {len(kinds)} layers as when it was saved, not {len(layers)}: {env}")
    for layer, kind in zip(layers, kinds, strict=True):
        if kind != _kind(layer):
            raise ValueError(f"`env` must have a {kind} as when it was saved, not a {_kind(layer)}: {env}")


def _layers(env: Any) -> Iterator[Any]:
    while isinstance(env, (gym.Wrapper, VectorWrapper, VecEnvWrapper)):
        yield env
        env = env.venv if isinstance(env, VecEnvWrapper) else env.env
    yield env


def _with_inner(env: Any, known: Sequence[Any] = ()) -> list[Any]:
    """An environment's layers, and those of environments in their attributes; not those that are known already."""
    seen = {id(layer) for layer in known}
    found: list[Any] = []

    def add(each: Any) -> None:
        new = [layer for layer in _layers(each) if id(layer) not in seen]
        seen.update(map(id, new))
        found.extend(new)

    add(env)
    for layer in found:  # which grows
        # Containers first: which of their environments an attribute such as `current` names may change.
        inner = sorted(_attributes(layer).items(), key=lambda item: (isinstance(item[1], ENVIRONMENTS), item[0]))
        for _, value in inner:
            for each in _environments(value):
                add(each)
    return found


def _environments(value: Any) -> list[Any]:
    """What an attribute leads to: an environment, or several."""
    parts = list(value.values() if isinstance(value, dict) else value) if isinstance(value, (list, tuple, dict)) else [value]
    return parts if all(isinstance(part, ENVIRONMENTS) for part in parts) else []


def _kind(layer: object) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _kinds(layers: Sequence[Any]) -> list[str]:
    return [_kind(layer) for layer in layers]


def _slots(kind: type) -> Iterator[str]:
    """Names of attributes that stand beside ``vars``."""
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                yield f"_{base.__name__.lstrip('_')}{name}" if private else name


def _attributes(layer: Any) -> dict[str, Any]:
    return {**{name: getattr(layer, name) for name in _slots(type(layer)) if hasattr(layer, name)}, **vars(layer)}


def _dump(layers: Sequence[Any], known: Sequence[Any]) -> bytes:
    """
    The attributes of some layers, pickled at once, as layers may share objects.

    :param layers: which are captured
    :param known: all layers, which may refer to one another
    :raises UncapturedStateError: if something can't be pickled, or wouldn't be the same when it is unpickled
    """
    for layer in layers:
        if any(base.__name__ == "pybind11_object" for base in type(layer).__mro__):
            raise UncapturedStateError(f"{_kind(layer)} keeps its state outside of Python")
    numbers: dict[int, Any] = {id(layer): number for number, layer in enumerate(known)}
    attributes = {numbers[id(layer)]: _attributes(layer) for layer in layers}
    references = {**_in_place(attributes), **numbers}
    for number, values in attributes.items():
        for name in [name for name, value in values.items() if _is_built(known[number], name, value, references)]:
            del values[name]
    file = io.BytesIO()
    pickler = _Pickler(file, references)
    try:
        pickler.dump(attributes)
    except Exception as error:
        for number, values in attributes.items():
            culprits = [f"`{name}`" for name, value in values.items() if not _can_be_pickled(value, references)]
            if culprits:
                raise UncapturedStateError(
                    f"{', '.join(culprits)} of {_kind(known[number])} can't be pickled: {error}"
                ) from error
        raise UncapturedStateError(f"{_kind(layers[0])} can't be pickled: {error}") from error
    _check_views(
        pickler.arrays, {f"`{name}` of {_kind(known[n])}": v for n, each in attributes.items() for name, v in each.items()}
    )
    return file.getvalue()


def _load(content: bytes, known: Sequence[Any]) -> None:
    """Put what :func:`_dump` has returned into layers of the same kinds."""
    for number, attributes in _Unpickler(io.BytesIO(content), known).load().items():
        slots = set(_slots(type(known[number])))
        for name, value in attributes.items():
            if name in slots:
                setattr(known[number], name, value)
            else:
                vars(known[number])[name] = value


class _Pickler(pickle.Pickler):
    """
    Takes references to layers for what they are: objects that belong to an environment mustn't bring a copy of it.

    :param file: where it writes to
    :param references: what is written in place of objects, by their ids
    """

    def __init__(self, file: io.BytesIO, references: Mapping[int, Any]) -> None:
        super().__init__(file)
        self._references = references
        self.arrays: list[np.ndarray] = []
        """Those that were written."""

    def persistent_id(self, obj: Any) -> Any:
        reference = self._references.get(id(obj))
        if reference is None and isinstance(obj, ENVIRONMENTS):
            raise UncapturedStateError(
                f"a {_kind(obj)} in it can't be reached: it would have to be an attribute of the environment itself"
            )
        if isinstance(obj, np.ndarray):
            self.arrays.append(obj)
        return reference


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self._layers = layers
        self._put: dict[tuple[int, str], Any] = {}
        self._loaded: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self._layers[pid]
        number, name, content = pid
        if (number, name) not in self._put:
            layer = self._layers[number]
            value = _attributes(layer).get(name)
            if value is None:
                raise ValueError(f"`env` must have a `{name}` in its {_kind(layer)} as when it was saved")
            if isinstance(content, bytes) and id(content) not in self._loaded:  # a model's and its data's are the same
                self._loaded[id(content)] = pickle.loads(content)
            self._put[number, name] = _put(self._loaded.get(id(content), content), value)
        return self._put[number, name]


def _in_place(attributes: Mapping[int, Mapping[str, Any]]) -> dict[int, tuple[int, str, Any]]:
    """What is put into an object that is there already, as that belongs to others too: where it stands, and its content."""
    found: dict[int, tuple[int, str, Any]] = {}
    values = [(number, name, value) for number, each in attributes.items() for name, value in each.items()]
    of_models: dict[int, bytes] = {}  # the pickle of MuJoCo's data holds the model
    for number, name, value in values:
        if id(value) in found:
            continue
        if isinstance(value, spaces.Space):
            found[id(value)] = number, name, _generators(value)
        elif _is_mujocos(value, "MjData"):
            found[id(value)] = number, name, pickle.dumps(value)
            of_models[id(value.model)] = found[id(value)][2]
    for number, name, value in values:
        if _is_mujocos(value, "MjModel") and id(value) not in found:
            found[id(value)] = number, name, of_models.get(id(value)) or pickle.dumps(value)
    return found


def _put(content: Any, value: Any) -> Any:
    """
    Put content into an object.

    :param content: see :func:`_in_place`, unpickled
    :param value: the object
    :return: the object; what takes its place if the content is too large or too small for it
    """
    if isinstance(value, spaces.Space):
        _put_generators(content, value)
        return value
    model = content.model if _is_mujocos(content, "MjData") else content
    if _is_mujocos(value, "MjModel"):
        return value if _copy_model(model, value) else model
    if not _copy_model(model, value.model):
        return content
    sys.modules["mujoco"].mj_copyData(value, value.model, content)
    return value


def _generators(space: spaces.Space[Any]) -> Any:
    """The random generators of a space and of those that it consists of."""
    return space._np_random, [_generators(part) for part in _parts(space)]


def _put_generators(generators: Any, space: spaces.Space[Any]) -> None:
    space._np_random, of_parts = generators
    for each, part in zip(of_parts, _parts(space), strict=True):
        _put_generators(each, part)


def _parts(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    inner = getattr(space, "spaces", ())
    return list(inner.values() if isinstance(inner, dict) else inner)


def _is_mujocos(value: Any, name: str) -> bool:
    return type(value).__name__ == name and type(value).__module__.startswith("mujoco")


def _fields(struct: Any) -> Iterator[tuple[str, Any]]:
    names = [name for name in dir(struct) if not name.startswith("_")]
    return ((name, value) for name in names if not callable(value := getattr(struct, name)))


def _copy_model(source: Any, target: Any) -> bool:
    """
    Copy what may have been changed of one of MuJoCo's models into another, such as masses that are drawn in each reset.

    :param source: the model
    :param target: the other
    :return: whether that was possible, as they have the same sizes
    """
    if any(getattr(target, name) != value for name, value in _fields(source) if isinstance(value, int)):
        return False
    _copy_fields(source, target)
    return True


def _copy_fields(source: Any, target: Any) -> None:
    for name, value in _fields(source):
        if isinstance(value, np.ndarray):
            np.copyto(getattr(target, name), value)
        elif isinstance(value, (int, float)) and getattr(target, name) != value:
            setattr(target, name, value)
        elif type(value).__module__.startswith("mujoco"):
            _copy_fields(value, getattr(target, name))


def _check_views(arrays: Sequence[np.ndarray], attributes: Mapping[str, Any]) -> None:
    """
    Check that no array is a view of another one, or of MuJoCo's numbers, which it would no longer be when it is unpickled.

    :param arrays: all arrays in the state
    :param attributes: what they may be named by
    :raises UncapturedStateError: if one is
    """
    view = _overlapping(arrays)
    structs = {id(each): each for each in attributes.values() if _is_mujocos(each, "MjData") or _is_mujocos(each, "MjModel")}
    foreign = [array for array in arrays if structs and not isinstance(_owner(array), np.ndarray)]
    if foreign:
        owned = [value for struct in structs.values() for _, value in _fields(struct) if isinstance(value, np.ndarray)]
        view = next((array for array in foreign if any(np.may_share_memory(array, each) for each in owned)), view)
    if view is not None:
        name = next((name for name, value in attributes.items() if value is view), "an array in it")
        raise UncapturedStateError(f"{name} shares its memory with another array, as NumPy's views do")


def _owner(array: np.ndarray) -> Any:
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner


def _overlapping(arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """One of different arrays that share memory which may be written to, if there are any."""
    places = []
    for array in {id(array): array for array in arrays}.values():
        if array.size:
            steps = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
            start = array.__array_interface__["data"][0]
            first, last = start + sum(min(step, 0) for step in steps), start + sum(max(step, 0) for step in steps)
            places.append((first, last + array.itemsize, array))
    end, writeable = 0, False
    for first, last, array in sorted(places, key=lambda place: place[:2]):
        if first < end and (writeable or array.flags.writeable):
            return array
        end, writeable = max((end, writeable), (last, array.flags.writeable))
    return None


def _is_built(layer: Any, name: str, value: Any, references: Mapping[int, Any]) -> bool:
    """Whether an attribute is given by how the environment is built, or what it draws or logs with."""
    drawing = name in DRAWING and (type(value).__module__.startswith(DRAWERS) or not _can_be_pickled(value, references))
    given = name in ("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs") or (isinstance(layer, VecEnv) and name in INNER)
    built = isinstance(value, (EnvSpec, ModuleType, ResultsWriter))
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    functions = bool(several) and all(isinstance(each, FUNCTIONS) for each in several)
    return drawing or given or built or (functions and not all(_is_found_again(each, references) for each in several))


def _is_found_again(function: Any, references: Mapping[int, Any]) -> bool:
    """Whether a function can be pickled, and is then the same: a method that another one hides isn't."""
    hidden = isinstance(function, MethodType) and getattr(function.__self__, function.__name__, None) != function
    return not hidden and _can_be_pickled(function, references)


def _can_be_pickled(value: Any, references: Mapping[int, Any]) -> bool:
    try:
        _Pickler(io.BytesIO(), references).dump(value)
    except Exception:
        return False
    return True


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

    @classmethod
    def class_name(cls) -> str:
        """By which a vector environment tells that this is the outermost wrapper: of one further out it would get the name."""
        return ResumableWrapper.__name__

    def capture_state(self) -> EnvState | str:
        """The state of the wrapped environment; where it can't be captured, why."""
        try:
            return capture(self.env)
        except UncapturedStateError as error:
            return str(error)

    def restore_state(self, state: EnvState) -> None:
        """
        Put a state into the wrapped environment.

        :param state: as :meth:`capture_state` returns it
        """
        restore(self.env, state)


class VecEnvState(NamedTuple):
    """
    The state of a vector environment.

    :param n_envs: how many environments are in it
    :param kinds: of SB3's wrappers and the vector environment itself, and of the layers of each environment in this process
    :param parts: pickled: all of them at once; where that can't be, SB3's wrappers and the vector environment one by one, with
        ``None`` where that can't be either
    :param envs: the states of environments in other processes; where the environments can't be captured, why
    """

    n_envs: int
    kinds: list[list[str]]
    parts: list[bytes | None]
    envs: list[EnvState] | str


def capture_vec_env(venv: VecEnv) -> VecEnvState:
    """
    The state of a vector environment, and of the environments in it where that can be captured.

    :param venv: the vector environment
    """
    groups = _groups(venv)
    known = [layer for group in groups for layer in group]
    kinds = [_kinds(group) for group in groups]
    try:
        return VecEnvState(venv.num_envs, kinds, [_dump(known, known)], _capture_processes(venv.unwrapped))
    except UncapturedStateError as error:
        return VecEnvState(venv.num_envs, kinds, [_dump_if_possible(layer, known) for layer in groups[0]], str(error))


def _dump_if_possible(layer: Any, known: Sequence[Any]) -> bytes | None:
    try:
        return _dump([layer], known)
    except UncapturedStateError:
        return None


def restore_vec_env(venv: VecEnv, state: VecEnvState) -> bool:
    """
    Put a state into a vector environment that is built as the one it was taken from.

    :param venv: the vector environment
    :param state: as :func:`capture_vec_env` returns it
    :return: whether the environments in it go on where they were; else they have to be reset
    :raises ValueError: if it is built in another way
    """
    groups = _groups(venv)
    known = [layer for group in groups for layer in group]
    _check_kinds(venv, groups[0], state.kinds[0])
    if venv.num_envs != state.n_envs:
        raise ValueError(f"`env` must have {state.n_envs} environments as when it was saved, not {venv.num_envs}")
    captured = not isinstance(state.envs, str)
    for group, kinds in zip(groups[1:], state.kinds[1:], strict=True):
        if captured:
            _check_kinds(venv, group, kinds)
    for part in filter(None, state.parts):
        _load(part, known)
    for index, each in enumerate(state.envs if captured else ()):
        venv.unwrapped.env_method("restore_state", each, indices=index)
    return captured


def _groups(venv: VecEnv) -> list[list[Any]]:
    """The layers of a vector environment, and those of each environment that it holds in this process."""
    own = list(_layers(venv))
    inner: Any = venv.unwrapped
    match inner:
        case DummyVecEnv():
            envs: list[Any] = list(inner.envs)
        case GymnasiumVecEnv():
            envs = [inner.env]
        case _:
            return [_with_inner(venv)]
    groups, known = [own], list(own)
    for env in envs:
        groups.append(_with_inner(env, known))
        known.extend(groups[-1])
    return groups


def _capture_processes(inner: Any) -> list[EnvState]:
    if isinstance(inner, (DummyVecEnv, GymnasiumVecEnv)):
        return []
    kind = type(inner).__name__
    try:
        wrapped = inner.has_attr("capture_state")
        outermost = wrapped and all(name == ResumableWrapper.__name__ for name in inner.env_method("class_name"))
    except Exception as error:  # of any kind: the vector environment is somebody's own
        raise UncapturedStateError(f"environments in a {kind} can't be reached: {error!r}") from error
    if not wrapped:
        raise UncapturedStateError(
            f"environments in a {kind} can only be reached in a ResumableWrapper: make them with "
            "`make_vec_env(..., wrapper_class=ResumableWrapper)`"
        )
    if not outermost:
        raise UncapturedStateError(f"the ResumableWrapper of environments in a {kind} must be their outermost wrapper")
    states = inner.env_method("capture_state")
    for reason in states:
        if isinstance(reason, str):
            raise UncapturedStateError(reason)
    return list(states)
