"""Files of models that need no pickle: hyperparameters as plain data, tensors apart. Reading one executes no code from it."""

import base64
import io
import json
import math
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_ppo_variants.kl_coef import KLCoefController, KLCoefState

TAG = ":safe:"
"""Key of a JSON object that stands for something that JSON hasn't got."""

TRUSTED = ("stable_baselines3.", "sb3_contrib.", "sb3_ppo_variants.", "torch.nn.modules.", "torch.optim.")
"""Modules whose classes a file may name, if they have been imported."""

NAMED = (RolloutBuffer, BasePolicy, BaseFeaturesExtractor, th.nn.Module, th.optim.Optimizer)
"""What these classes have to be."""

MAX_BYTES = 2**31
"""Of all that is in a file, unpacked."""

NUMBERS = "biuf"
"""Kinds of arrays that consist of numbers."""

MAY_BE_INFINITE = frozenset(("max_grad_norm", "ep_info_buffer", "ep_success_buffer"))
"""Attributes: a norm without a bound is infinite, and so are the returns of environments whose rewards are."""

OTHER_ENTRIES = ("data", "_stable_baselines3_version", "system_info.txt")


class UntrustedFileError(ValueError):
    """A file can't be read without executing code from it, or isn't what it should be."""


def to_plain(name: str, value: Any) -> Any:
    """
    A value as what JSON has.

    :param name: of the attribute, for the error message
    :param value: the value
    :raises ValueError: if that isn't possible
    """
    if type(value) in (type(None), bool, int, float, str):
        return value
    if isinstance(value, list):
        return [to_plain(name, item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != TAG for key in value):
        items = value.spaces.items() if isinstance(value, spaces.Dict) else value.items()
        plain = {key: to_plain(name, item) for key, item in items}
        return {TAG: "Dict", "content": plain} if isinstance(value, spaces.Dict) else plain
    forbidden = isinstance(value, type) and not _may_be_named(value)
    if not forbidden and not (isinstance(value, np.ndarray) and value.dtype.kind not in NUMBERS):
        for kind, tag, parts in PARTS:
            if isinstance(value, kind):
                return {TAG: tag, "content": to_plain(name, parts(value))}
    raise ValueError(
        f"`{name}` can't be saved as plain data, as it is a {type(value).__module__}.{type(value).__qualname__}: leave it out "
        f"by `exclude=[{name!r}]` and give it to `load` in `custom_objects`, or save without `safe`"
    )


def _array_parts(array: np.ndarray) -> list[Any]:
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


PARTS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (np.generic, "number", np.asarray),
    (np.ndarray, "array", _array_parts),
    (type, "class", lambda kind: [kind.__module__, kind.__qualname__]),
    (KLCoefState, "KLCoefState", list),
    (KLCoefController, "KLCoefController", lambda controller: dict(vars(controller))),
    (tuple, "tuple", list),
    (deque, "deque", lambda items: [list(items), items.maxlen]),
    (FloatSchedule, "FloatSchedule", lambda schedule: schedule.value_schedule),
    (ConstantSchedule, "ConstantSchedule", lambda schedule: schedule.val),
    (LinearSchedule, "LinearSchedule", lambda schedule: [schedule.start, schedule.end, schedule.end_fraction]),
    (spaces.Box, "Box", lambda space: [space.low, space.high]),
    (spaces.Discrete, "Discrete", lambda space: [int(space.n), int(space.start)]),
    (spaces.MultiDiscrete, "MultiDiscrete", lambda space: [space.nvec, space.start]),
    (spaces.MultiBinary, "MultiBinary", lambda space: space.n if isinstance(space.n, int) else space.shape),
)
"""What is no JSON: its kind, its name in files, and the parts that :data:`BUILDERS` make it of again."""


def from_plain(value: Any) -> Any:
    """
    The value that :func:`to_plain` has turned into plain data.

    :param value: as read from JSON
    :raises Exception: of any kind if it is something else
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: from_plain(item) for key, item in value.items()}
    return BUILDERS[value[TAG]](from_plain(value["content"]))


def _array(content: Any) -> np.ndarray:
    dtype, shape, data = content
    kind = np.dtype(dtype)
    if kind.kind not in NUMBERS:
        raise TypeError(f"arrays must be of numbers, not {dtype}")
    return np.frombuffer(base64.b64decode(data, validate=True), kind).reshape(shape).copy()


def _class(content: Any) -> type:
    module, name = content
    if not f"{module}.".startswith(TRUSTED):
        raise TypeError(f"{module}.{name} is no class that a file may name")
    kind = getattr(sys.modules.get(module), name, None)  # nothing is imported for a file
    if not isinstance(kind, type) or not _may_be_named(kind):
        raise TypeError(f"{module}.{name} is no class that a file may name")
    return kind


def _may_be_named(kind: type) -> bool:
    return kind.__module__.startswith(TRUSTED) and issubclass(kind, NAMED)


BUILDERS: dict[str, Callable[[Any], Any]] = {
    "number": lambda content: content[()],
    "array": _array,
    "class": _class,
    "tuple": tuple,
    "deque": lambda content: deque(content[0], maxlen=content[1]),
    "KLCoefState": lambda content: KLCoefState(*content),
    "KLCoefController": lambda content: KLCoefController(**content),
    "FloatSchedule": FloatSchedule,
    "ConstantSchedule": ConstantSchedule,
    "LinearSchedule": lambda content: LinearSchedule(*content),
    "Box": lambda content: spaces.Box(content[0], content[1], dtype=content[0].dtype.type),
    "Discrete": lambda content: spaces.Discrete(content[0], start=content[1]),
    "MultiDiscrete": lambda content: spaces.MultiDiscrete(content[0], content[0].dtype.type, start=content[1]),
    "MultiBinary": spaces.MultiBinary,
    "Dict": spaces.Dict,
}


def is_plain(path: str | Path | io.BufferedIOBase) -> bool:
    """
    Whether a file was saved as plain data.

    :param path: of the file
    """
    try:
        with zipfile.ZipFile(_opened(path)) as archive:
            return f'"{TAG}"'.encode() in archive.read("data")
    except (zipfile.BadZipFile, KeyError, OSError):
        return False


def read(
    path: str | Path | io.BufferedIOBase,
    parameters: Iterable[str],
    allowed: Iterable[str],
    custom_objects: Mapping[str, Any],
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Read a file, and execute no code from it.

    :param path: of the file
    :param parameters: names of the state dicts that it may hold
    :param allowed: names of the attributes that it may hold
    :param custom_objects: attributes that the caller gives in place of the file's
    :return: for SB3's ``load``: a file without attributes, and the attributes as custom objects
    :raises UntrustedFileError: if the file isn't whole, isn't safe, or isn't finite
    """
    try:
        with zipfile.ZipFile(_opened(path)) as archive:
            entries = _entries(archive, [*OTHER_ENTRIES, "pytorch_variables.pth", *(f"{name}.pth" for name in parameters)])
        data = json.loads(entries.pop("data"))
        infinite = sorted(name for name in data.keys() - MAY_BE_INFINITE if not _is_finite(data[name]))
        if infinite:
            raise UntrustedFileError(f"`{infinite[0]}` holds numbers that are NaN or infinite")
        odd = sorted(data.keys() - set(allowed))
        if odd:
            raise UntrustedFileError(f"it has `{odd[0]}`, which this algorithm hasn't: it may be of another one")
        needed = [key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value]
        pickled = [key for key in needed if key not in custom_objects]
        if pickled:
            raise UntrustedFileError(
                f"{', '.join(pickled)} would have to be unpickled: save with `safe=True`, or give them in `custom_objects`"
            )
        attributes = {key: from_plain(value) for key, value in data.items() if key not in custom_objects}
        for name, content in entries.items():
            if name.endswith(".pth"):
                _check_tensors(name, content)
        _check_memory({**attributes, **custom_objects}, entries["policy.pth"])
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{_name(path)} can't be loaded safely: {error}") from error
    except FileNotFoundError:
        raise
    except (Exception, RecursionError) as error:
        raise UntrustedFileError(f"{_name(path)} is no file of a model, or a damaged one: {error}") from error
    attributes = {**attributes, **custom_objects}
    rest = io.BytesIO()
    with zipfile.ZipFile(rest, "w") as archive:
        archive.writestr("data", json.dumps(dict.fromkeys(attributes)))
        for name, content in entries.items():
            archive.writestr(name, content)
    rest.seek(0)
    return rest, attributes


def _opened(path: str | Path | io.BufferedIOBase) -> Any:
    if isinstance(path, (str, Path)):
        with open_path(path, "r", suffix="zip") as file:
            return io.BytesIO(file.read())
    path.seek(0)
    content = io.BytesIO(path.read())
    path.seek(0)
    return content


def _name(path: str | Path | io.BufferedIOBase) -> str:
    return str(path) if isinstance(path, (str, Path)) else "the file"


def _entries(archive: zipfile.ZipFile, allowed: list[str]) -> dict[str, bytes]:
    """All that is in an archive, if it isn't more than it may be."""
    names = archive.namelist()
    odd = [name for name in names if name not in allowed]
    if odd:
        raise UntrustedFileError(
            f"it holds {', '.join(map(repr, odd[:3]))}, which no file of this algorithm has: damaged, or of another?"
        )
    if len(set(names)) < len(names):
        raise UntrustedFileError("it holds an entry twice")
    _check_size(archive)
    return {name: archive.read(name) for name in names}  # never more than the size that was checked


def _check_size(archive: zipfile.ZipFile) -> None:
    n_bytes = sum(entry.file_size for entry in archive.infolist())
    if n_bytes > MAX_BYTES:
        raise UntrustedFileError(f"it would be {n_bytes / 2**30:.0f} GiB unpacked, more than {MAX_BYTES / 2**30:.0f} GiB")


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_tensors(name: str, content: bytes) -> None:
    """That the tensors in an entry are no larger than what is stored of them, and finite."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_size(archive)
    for tensor in _flat(th.load(io.BytesIO(content), map_location="cpu", weights_only=True)):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UntrustedFileError(f"{name} holds a tensor that is larger than what is stored of it")
        if tensor.is_floating_point() and not th.isfinite(tensor).all():
            raise UntrustedFileError(f"{name} holds numbers that are NaN or infinite")


def _flat(value: Any) -> Iterator[th.Tensor]:
    if isinstance(value, th.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)


def _check_memory(attributes: dict[str, Any], entry: bytes) -> None:
    """That the file is as large as the policy which it describes, and its rollouts no larger than they may be."""
    observation_space, action_space = attributes.get("observation_space"), attributes.get("action_space")
    if not isinstance(observation_space, spaces.Space) or not isinstance(action_space, spaces.Space):
        raise UntrustedFileError("it has no spaces of observations and actions")
    n_numbers = spaces.flatdim(observation_space) + spaces.flatdim(action_space) + 8
    policy_class = attributes["policy_class"]
    if _may_be_named(policy_class):  # else it is the caller's own
        stored = th.load(io.BytesIO(entry), map_location="cpu", weights_only=True)
        described = _without_memory(policy_class, observation_space, action_space, attributes, len(stored))
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        if shapes != (expected := {name: tensor.shape for name, tensor in described.state_dict().items()}):
            odd = min(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
            raise UntrustedFileError(f"policy.pth and what the file says of the policy differ in {odd}")
        for lstm in (module for module in described.modules() if isinstance(module, th.nn.LSTM)):
            n_numbers += 4 * lstm.num_layers * lstm.hidden_size
    n_bytes = 4 * attributes.get("n_steps", 1) * attributes.get("n_envs", 1) * n_numbers
    if n_bytes > 4 * MAX_BYTES:
        raise UntrustedFileError(f"its rollouts would take {n_bytes / 2**30:.0f} GiB")


def _without_memory(
    policy_class: type[Any],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    attributes: dict[str, Any],
    max_layers: int,
) -> th.nn.Module:
    """The policy that the attributes describe, without memory for its parameters."""
    kwargs = {**(attributes.get("policy_kwargs") or {}), "ortho_init": False}
    if sum(1 for _ in _widths(kwargs.get("net_arch"))) > max_layers:
        raise UntrustedFileError("`policy_kwargs` names more layers than there are parameters")
    if attributes.get("use_sde"):
        kwargs["use_sde"] = True  # contrib's policies don't know the argument
    # SB3's policies move some of their modules to this device, which would by default be the processor's.
    on_meta = type(policy_class.__name__, (policy_class,), {"device": th.device("meta")})
    with th.device("meta"):
        policy = on_meta(observation_space, action_space, lambda progress: 0.0, **kwargs)
    assert isinstance(policy, th.nn.Module)
    return policy


def check_moments(optimizer: th.optim.Optimizer) -> None:
    """
    Check an optimiser that was loaded: torch doesn't.

    :param optimizer: the optimiser
    :raises UntrustedFileError: if its moments have other shapes than its parameters
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, th.Tensor) and value.shape not in (th.Size([]), th.Size([1]), parameter.shape):
                raise UntrustedFileError(
                    f"`{name}` of an optimiser must have shape {list(parameter.shape)}, not {list(value.shape)}"
                )


def _widths(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _widths(item)
