"""Files of models that need no pickle: hyperparameters as plain data, tensors apart. Reading one executes no code from it."""

import base64
import io
import json
import math
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_ppo_variants.kl_coef import KLCoefController, KLCoefState
from sb3_ppo_variants.safe_checks import (
    MAX_BYTES,
    UntrustedFileError,
    check_attributes,
    check_optimizer,
    check_policy,
    check_size,
    read_tensors,
)

TAG = ":safe:"
"""Key of a JSON object that stands for something that JSON hasn't got."""

TRUSTED = (
    *("stable_baselines3.", "sb3_contrib.", "sb3_ppo_variants.", "torch.optim."),
    *("torch.nn.modules.activation.", "torch.nn.modules.linear."),
)
"""Modules whose classes a file may name, if they have been imported."""

NAMED = (RolloutBuffer, BasePolicy, BaseFeaturesExtractor, th.nn.Module, th.optim.Optimizer, RMSpropTFLike)
"""What these classes have to be; :class:`RMSpropTFLike` is there to be imported, as nothing is imported for a file."""

NEED_A_CLOSURE = (th.optim.LBFGS,)
"""Optimisers that SB3 can't use."""

MAX_DATA_BYTES = 2**24
"""Of the attributes' JSON: the bounds of an image of 640 x 480 x 3 floats, each another, take 10 MB."""

MAX_ITEMS = 2**17
"""Values in it, each of which takes far more memory, and time, than its characters."""

MAX_ARRAY_BYTES = 2**28
"""Of the attributes' arrays; those whose items are all the same take hardly any bytes in a file."""

NUMBERS = "biuf"
"""Kinds of arrays that consist of numbers."""

LEFT_OUT = ":left out:"
"""Key of the names of attributes that a file lacks as they are no plain data: they have to be given when it is loaded."""

DERIVED = {"lr_schedule": "learning_rate", "_kl_coef_source": "kl_coef"}
"""Attributes that follow from others, which are left out with them."""

VARIABLES = "pytorch_variables.pth"

OTHER_ENTRIES = ("data", "_stable_baselines3_version", "system_info.txt")

GSDE_ARGUMENTS = ("use_sde", "full_std", "use_expln", "squash_output")
"""Of policies."""


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
    if _is_mapping(value) and all(isinstance(key, str) and key != TAG for key in value):
        items = value.spaces.items() if isinstance(value, spaces.Dict) else value.items()
        plain = {key: to_plain(name, item) for key, item in items}
        return {TAG: "Dict", "content": plain} if isinstance(value, spaces.Dict) else plain
    forbidden = isinstance(value, type) and not _may_be_named(value)
    if not forbidden and not (isinstance(value, np.ndarray) and value.dtype.kind not in NUMBERS):
        for kind, tag, parts in PARTS:
            if type(value) is kind or (kind in WITH_SUBCLASSES and isinstance(value, kind)):
                return {TAG: tag, "content": to_plain(name, parts(value))}
    kind, what = (value, "the class") if isinstance(value, type) else (type(value), "a")
    raise ValueError(
        f"`{name}` can't be saved as plain data, as it is {what} {kind.__module__}.{kind.__qualname__}: leave it out "
        f"by `exclude=[{name!r}]` and give it to `load` in `custom_objects`, or save without `safe`"
    )


def _is_mapping(value: Any) -> bool:
    """A user's own kind of ``Dict`` space is none."""
    return isinstance(value, Mapping) and (type(value) is spaces.Dict or not isinstance(value, spaces.Space))


def left_out(exclude: Iterable[str], attributes: Mapping[str, Any]) -> list[str]:
    """
    What of an object is left out of its file because it has to be: it is no plain data.

    :param exclude: names of attributes that are left out
    :param attributes: of the object
    """
    return [name for name in exclude if name in attributes and not _is_plain_data(attributes[name])]


def _is_plain_data(value: Any) -> bool:
    try:
        to_plain("", value)
    except ValueError:
        return False
    return True


def _array_parts(array: np.ndarray) -> list[Any]:
    content = array.tobytes()
    first = content[: array.itemsize]
    if content == first * array.size:  # as the bounds of images
        content = first
    return [array.dtype.str, list(array.shape), base64.b64encode(content).decode()]


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

WITH_SUBCLASSES = (np.generic, type, tuple)
"""Kinds whose subclasses hold no more than they do; those of others may do something else, and aren't saved as theirs."""


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
    items = np.frombuffer(base64.b64decode(data, validate=True), kind)
    return np.full(shape, items[0], kind) if items.size == 1 else items.reshape(shape).copy()


def _n_array_bytes(value: Any) -> int:
    """What the arrays in a value from JSON take."""
    if isinstance(value, dict):
        if value.get(TAG) == "array":
            dtype, shape, _ = value["content"]
            n_bytes: int = math.prod(map(abs, shape)) * np.dtype(dtype).itemsize
            return n_bytes
        value = list(value.values())
    return sum(map(_n_array_bytes, value)) if isinstance(value, list) else 0


def _class(content: Any) -> type:
    module, name = content
    if not f"{module}.".startswith(TRUSTED):
        raise TypeError(f"{module}.{name} is no class that a file may name")
    if module not in sys.modules:  # nothing is imported for a file
        raise TypeError(f"{module} isn't imported, and a file can't have it imported: import it first")
    kind = vars(sys.modules[module]).get(name)
    if not isinstance(kind, type) or not _may_be_named(kind):
        raise TypeError(f"{module}.{name} is no class that a file may name")
    return kind


def _may_be_named(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(TRUSTED) and issubclass(kind, NAMED) and not issubclass(kind, NEED_A_CLOSURE)


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
    variables: Iterable[str],
    allowed: Iterable[str],
    policies: Collection[type],
    custom_objects: Mapping[str, Any],
    given: Collection[str],
    trusted: bool,
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Read a file, and execute no code from it.

    :param path: of the file
    :param parameters: names of the state dicts that it may hold
    :param variables: names of the other tensors that it may hold
    :param allowed: names of the attributes that it may hold
    :param policies: the algorithm's, of which the file may name one
    :param custom_objects: attributes that the caller gives in place of the file's
    :param given: names of attributes that the caller sets otherwise
    :param trusted: whether it is the caller's own, and anything that can be read will do
    :return: for SB3's ``load``: a file without attributes, and the attributes as custom objects
    :raises UntrustedFileError: if the file isn't whole, isn't safe, or isn't what it should be
    """
    try:
        with zipfile.ZipFile(_opened(path)) as archive:
            entries = _entries(archive, [*OTHER_ENTRIES, VARIABLES, *(f"{name}.pth" for name in parameters)])
        content = entries.pop("data")
        data = json.loads(content) if trusted else _checked_json(content, set(allowed))
        needed = [key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value]
        pickled = [key for key in needed if key not in custom_objects]
        if pickled:
            raise UntrustedFileError(
                f"{', '.join(pickled)} would have to be unpickled: save with `safe=True`, or give them in `custom_objects`"
            )
        lacking = [name for name in data.pop(LEFT_OUT, []) if name not in custom_objects and name not in given]
        if lacking:
            raise UntrustedFileError(
                f"{', '.join(f'`{name}`' for name in lacking)} couldn't be saved as plain data, and must be given in "
                "`custom_objects`, as when the file was saved"
            )
        attributes = {key: from_plain(value) for key, value in data.items() if key not in custom_objects}
        if not trusted:
            check_attributes(attributes)
            _check_policy_class(attributes.get("policy_class"), policies)
            tensors = {name: read_tensors(name, entry) for name, entry in entries.items() if name.endswith(".pth")}
            odd = sorted((tensors.get(VARIABLES) or {}).keys() - set(variables))
            if odd:
                raise UntrustedFileError(f"it has {odd[0]!r} among its tensors, which this algorithm hasn't")
            _check_memory({**attributes, **custom_objects}, tensors["policy.pth"], "policy_kwargs" in custom_objects)
            entries.update({name: _saved(value) for name, value in tensors.items()})
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{name_of(path)} can't be loaded{'' if trusted else ' safely'}: {error}") from error
    except FileNotFoundError:
        raise
    except (Exception, RecursionError) as error:
        raise UntrustedFileError(f"{name_of(path)} is no file of a model, or a damaged one: {error}") from error
    attributes = {**attributes, **custom_objects}
    missing = {name: source for name, source in DERIVED.items() if source in custom_objects and name not in attributes}
    attributes.update({name: attributes[source] for name, source in missing.items()})
    rest = io.BytesIO()
    with zipfile.ZipFile(rest, "w") as archive:
        archive.writestr("data", json.dumps(dict.fromkeys(attributes)))
        for name, content in entries.items():
            archive.writestr(name, content)
    rest.seek(0)
    return rest, attributes


def check_loaded(policy: th.nn.Module, optimizers: Iterable[th.optim.Optimizer]) -> None:
    """
    Check what SB3's ``load`` has made of a file that :func:`read` has read.

    :param policy: with the file's parameters
    :param optimizers: with the file's moments
    :raises UntrustedFileError: if there are numbers that aren't finite, or an optimiser can't go on
    """
    check_policy(policy)
    for optimizer in optimizers:
        check_optimizer(optimizer, _may_be_named(type(optimizer)))


def _opened(path: str | Path | io.BufferedIOBase) -> Any:
    if isinstance(path, (str, Path)):
        with open_path(path, "r", suffix="zip") as file:
            return io.BytesIO(file.read())
    path.seek(0)
    content = io.BytesIO(path.read())
    path.seek(0)
    return content


def name_of(path: str | Path | io.BufferedIOBase) -> str:
    """
    What a file is called in error messages.

    :param path: of the file
    """
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
    check_size(archive)
    return {name: archive.read(name) for name in names}  # never more than the size that was checked


def _checked_json(content: bytes, allowed: set[str]) -> dict[str, Any]:
    """The attributes in an entry, if they have names that are allowed, and don't take too much memory."""
    n_items = sum(map(content.count, (b"[", b"{", b",")))
    if len(content) > MAX_DATA_BYTES or n_items > MAX_ITEMS:
        raise UntrustedFileError(
            f"its attributes take {len(content) / 2**20:.0f} MiB, with {n_items} values, more than "
            f"{MAX_DATA_BYTES / 2**20:.0f} MiB or {MAX_ITEMS} values"
        )
    data: dict[str, Any] = json.loads(content)
    n_bytes = _n_array_bytes(data)
    if n_bytes > MAX_ARRAY_BYTES:
        raise UntrustedFileError(
            f"its attributes hold arrays of {n_bytes / 2**20:.0f} MiB, more than {MAX_ARRAY_BYTES / 2**20:.0f} MiB"
        )
    odd = sorted(data.keys() - {*allowed, LEFT_OUT})
    if odd:
        raise UntrustedFileError(f"it has `{odd[0]}`, which this algorithm hasn't: it may be of another one")
    return data


def _saved(value: Any) -> bytes:
    content = io.BytesIO()
    th.save(value, content)
    return content.getvalue()


def _check_policy_class(policy_class: type | None, policies: Collection[type]) -> None:
    if policy_class is not None and policy_class not in policies:
        allowed = ", ".join(policy.__name__ for policy in policies)
        raise UntrustedFileError(
            f"`policy_class` must be one of {allowed}, not {policy_class.__name__}: is it another algorithm's?"
        )


def _check_memory(attributes: dict[str, Any], stored: dict[str, th.Tensor], callers_policy: bool) -> None:
    """That the file is as large as the policy which it describes, and its rollouts no larger than they may be."""
    observation_space, action_space = attributes.get("observation_space"), attributes.get("action_space")
    if not isinstance(observation_space, spaces.Space) or not isinstance(action_space, spaces.Space):
        raise UntrustedFileError("it has no spaces of observations and actions")
    n_numbers = math.prod(action_space.shape or ()) + 8
    policy_class = attributes["policy_class"]
    if _may_be_named(policy_class):  # else it is the caller's own
        try:
            described = _without_memory(policy_class, observation_space, action_space, attributes, len(stored))
        except Exception:
            if not callers_policy:  # whose modules may need memory to be built
                raise
        else:
            _check_parameters(stored, _expected(described, attributes))
            for lstm in (module for module in described.modules() if isinstance(module, th.nn.LSTM)):
                n_numbers += 4 * lstm.num_layers * lstm.hidden_size
    n_bytes = attributes.get("n_steps", 1) * attributes.get("n_envs", 1) * (_n_bytes(observation_space) + 4 * n_numbers)
    if n_bytes > 4 * MAX_BYTES:
        raise UntrustedFileError(f"its rollouts would take {n_bytes / 2**30:.0f} GiB")


def _n_bytes(space: spaces.Space[Any]) -> int:
    """Of an observation in a rollout."""
    if isinstance(space, spaces.Dict):
        return sum(map(_n_bytes, space.values()))
    assert space.shape is not None
    return math.prod(space.shape) * np.dtype(space.dtype).itemsize


def _without_memory(
    policy_class: type[Any],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    attributes: dict[str, Any],
    n_stored: int,
) -> th.nn.Module:
    """The policy that the attributes describe, but for gSDE, without memory for its parameters."""
    kwargs = {**(attributes.get("policy_kwargs") or {}), "ortho_init": False}
    n_layers = sum(1 for _ in _widths(kwargs.get("net_arch"))) + kwargs.get("n_lstm_layers", 0)
    if 2 * n_layers > n_stored:  # as each has two parameters at least
        raise UntrustedFileError("`policy_kwargs` names more layers than there are parameters")
    for name in GSDE_ARGUMENTS:  # gSDE draws random numbers when it is set up
        kwargs.pop(name, None)
    kwargs.update(optimizer_class=th.optim.SGD, optimizer_kwargs={})  # one that needs no memory either
    # SB3's policies move some of their modules to this device, which would by default be the processor's.
    on_meta = type(policy_class.__name__, (policy_class,), {"device": th.device("meta")})
    with th.device("meta"):
        policy = on_meta(observation_space, action_space, lambda progress: 0.0, **kwargs)
    assert isinstance(policy, th.nn.Module)
    return policy


def _widths(value: Any) -> Iterator[int]:
    if not isinstance(value, bool) and isinstance(value, Integral):
        yield int(value)
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _widths(item)


def _expected(described: th.nn.Module, attributes: dict[str, Any]) -> dict[str, th.Tensor]:
    """The parameters that the policy should have, without memory."""
    expected: dict[str, th.Tensor] = described.state_dict()
    if attributes.get("use_sde"):
        full_std = (attributes.get("policy_kwargs") or {}).get("full_std", True)
        n_actions, n_latent = expected["action_net.weight"].shape
        expected["log_std"] = th.empty(n_latent, n_actions if full_std else 1, device="meta")
    return expected


def _check_parameters(stored: dict[str, th.Tensor], expected: dict[str, th.Tensor]) -> None:
    told, told_expected = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} for tensors in (stored, expected)
    )
    if told != told_expected:
        odd = min(name for name in {*told, *told_expected} if told.get(name) != told_expected.get(name))
        raise UntrustedFileError(f"policy.pth and what the file says of the policy differ in {odd}")
