"""What a file from others may hold: checks of its attributes, its tensors and its optimisers."""

import inspect
import io
import math
import re
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_ppo_variants.kl_coef import KLCoefController

MAX_BYTES = 2**31
"""Of all that is in a file, unpacked."""

MAX_PICKLE_BYTES = 2**19
"""Of an entry that torch interprets: enough for two thousand parameters with their moments."""

REAL_DTYPES = (
    *(th.float16, th.bfloat16, th.float32, th.float64),
    *(th.bool, th.uint8, th.int8, th.int16, th.int32, th.int64),
)

NON_NEGATIVE_STATES = frozenset(
    ("step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "row_var", "col_var", "variance")
)
"""Names that torch's optimisers have for counts and for sums of squares, of which they take roots."""

LAST_SEEN = ("_last_obs", "_last_original_obs", "_last_episode_starts", "_last_lstm_states")
"""Attributes that tell where training has stopped, which starts with new episodes."""

SCHEDULES = (FloatSchedule, ConstantSchedule, LinearSchedule)

HOLD_CLASSES = frozenset(("policy_class", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs"))

MAY_BE_INFINITE = frozenset(("clip_range", "clip_range_vf", "max_grad_norm", "target_kl"))
"""Bounds, which are none then."""

MAY_BE_ANY_NUMBER = frozenset(("ep_info_buffer", "ep_success_buffer"))
"""What is only logged."""


class UntrustedFileError(ValueError):
    """A file can't be read without executing code from it, or isn't what it should be."""


def _is_int(value: Any, minimum: int = 0, maximum: int = 2**63 - 1) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and minimum <= int(value) <= maximum


def _is_real(value: Any, minimum: float = 0.0, maximum: float = math.inf) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and minimum <= float(value) <= maximum


def _is_schedule(value: Any) -> bool:
    return isinstance(value, SCHEDULES) or _is_real(value, minimum=-math.inf)


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, np.bool_)) or (isinstance(value, np.ndarray) and value.size == 1)


def _are_episodes(value: Any) -> bool:
    return isinstance(value, deque) and all(
        isinstance(item, dict) and _is_number(item.get("r")) and _is_number(item.get("l")) for item in value
    )


def _is_class(value: Any, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind)


Rule = tuple[str, Callable[[Any], bool]]


def _optional(rule: Rule) -> Rule:
    allowed, accepts = rule
    return f"None or {allowed}", lambda value: value is None or accepts(value)


COUNT: Rule = ("an integer >= 1", lambda value: _is_int(value, 1))
COUNTER: Rule = ("an integer >= 0", _is_int)
FRACTION: Rule = ("a number from 0 to 1", lambda value: _is_real(value, maximum=1.0))
BOUND: Rule = ("a number >= 0", _is_real)
SCHEDULE: Rule = ("a number or a schedule", _is_schedule)
SWITCH: Rule = ("True or False", lambda value: isinstance(value, (bool, np.bool_)))
SETTINGS: Rule = ("a dict", lambda value: isinstance(value, dict))
NOTHING: Rule = ("None", lambda value: value is None)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("n_steps", "n_envs", "n_epochs", "_stats_window_size"), COUNT),
    "batch_size": _optional(COUNT),
    **dict.fromkeys(("num_timesteps", "_num_timesteps_at_start", "_episode_num", "_n_updates"), COUNTER),
    "_total_timesteps": BOUND,  # SB3 takes `learn(1e6)`
    "_current_progress_remaining": ("a number <= 1", lambda value: _is_real(value, -math.inf, 1.0)),
    "start_time": BOUND,
    **dict.fromkeys(("gamma", "gae_lambda"), FRACTION),
    "max_grad_norm": BOUND,
    "target_kl": _optional(BOUND),
    **dict.fromkeys(("learning_rate", "lr_schedule", "ent_coef", "vf_coef"), SCHEDULE),
    "clip_range": (
        "None, a number, a schedule or a pair",
        lambda value: value is None or _is_pair(value) or _is_schedule(value),
    ),
    "clip_range_vf": _optional(SCHEDULE),
    **dict.fromkeys(("use_sde", "normalize_advantage"), SWITCH),
    "sde_sample_freq": ("an integer >= -1", lambda value: _is_int(value, -1)),
    "seed": _optional(("an integer from 0 to 2**32 - 1", lambda value: _is_int(value, maximum=2**32 - 1))),
    "verbose": ("an integer", lambda value: isinstance(value, Integral)),
    "tensorboard_log": _optional(("a string", lambda value: isinstance(value, str))),
    "policy_class": ("a policy's class", lambda value: _is_class(value, BasePolicy)),
    "rollout_buffer_class": _optional(("a rollout buffer's class", lambda value: _is_class(value, RolloutBuffer))),
    **dict.fromkeys(("policy_kwargs", "rollout_buffer_kwargs"), _optional(SETTINGS)),
    "ep_info_buffer": _optional(("a deque of episodes", _are_episodes)),
    "ep_success_buffer": _optional(
        ("a deque of numbers", lambda value: isinstance(value, deque) and all(map(_is_number, value)))
    ),
    "kl_coef_state": _optional(("a number >= 0", lambda value: isinstance(value, tuple) and all(map(_is_real, value)))),
    **dict.fromkeys(("action_noise", "value_optimizer", *LAST_SEEN), NOTHING),
}
"""What SB3's attributes have to be; this package's are checked whenever they are read."""


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_schedule, value))


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """
    Check the attributes that a file gives a model.

    :param attributes: by name
    :raises UntrustedFileError: if one isn't what it should be, or not finite where it should be
    """
    for name, value in attributes.items():
        for leaf in _leaves(value):
            _check_leaf(name, leaf)
        allowed, accepts = RULES.get(name, ("", lambda value: True))
        if not accepts(value):
            raise UntrustedFileError(f"`{name}` must be {allowed}, not {repr(value)[:100]} ({type(value).__name__})")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (*SCHEDULES, KLCoefController)):
        value = vars(value)
    if isinstance(value, (list, tuple, deque, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _check_leaf(name: str, value: Any) -> None:
    if isinstance(value, type) and name not in HOLD_CLASSES:
        raise UntrustedFileError(f"`{name}` can't be the class {value.__name__}")
    if isinstance(value, Integral) and abs(int(value)) >= 2**64:
        raise UntrustedFileError(f"`{name}` holds an integer of more than 64 bits")
    if isinstance(value, (float, np.floating, np.ndarray)) and name not in MAY_BE_ANY_NUMBER:
        odd = np.isnan(value) if name in MAY_BE_INFINITE else ~np.isfinite(value)
        if np.any(odd):
            raise UntrustedFileError(f"`{name}` holds numbers that are NaN or infinite")


def check_size(archive: zipfile.ZipFile) -> None:
    """
    Check that an archive isn't too large to be unpacked.

    :param archive: the archive
    :raises UntrustedFileError: if it is
    """
    n_bytes = sum(entry.file_size for entry in archive.infolist())
    if n_bytes > MAX_BYTES:
        raise UntrustedFileError(f"it would be {n_bytes / 2**30:.0f} GiB unpacked, more than {MAX_BYTES / 2**30:.0f} GiB")


def read_tensors(name: str, content: bytes) -> Any:
    """
    Read what torch has written, if it consists of finite tensors, numbers and texts in dicts and lists.

    :param name: of the entry, for the error message
    :param content: of the entry
    :return: a copy, without whatever else a file may attach to tensors and dicts
    :raises UntrustedFileError: if there is something else, or more than is stored
    """
    if not content.startswith(b"PK\x03\x04"):  # torch reads it in its older format, whatever the archive's directory says
        raise UntrustedFileError(f"{name} is not a zip file")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        check_size(archive)
        for entry in archive.infolist():
            if entry.file_size > MAX_PICKLE_BYTES and not re.fullmatch(r"[^/]+/data/\d+", entry.filename):
                raise UntrustedFileError(f"{name} describes more tensors than {MAX_PICKLE_BYTES / 2**10:.0f} KiB can")
    value = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    tensors = list(_tensors(name, value))
    # A policy's extractor of features has three names there.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > 4 * len(content):
        raise UntrustedFileError(f"{name} holds tensors that are larger than what is stored of them")
    if not all(map(_is_finite, tensors)):
        raise UntrustedFileError(f"{name} holds numbers that are NaN or infinite")
    return _copied(value)


def _tensors(name: str, value: Any) -> Iterator[th.Tensor]:
    """All tensors in a value, in which there is nothing but plain data."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in dict.items(value):
            if type(key) not in (str, int):
                raise UntrustedFileError(f"{name} holds a key that is a {type(key).__name__}")
            yield from _tensors(name, item)
    elif kind in (list, tuple):
        for item in value:
            yield from _tensors(name, item)
    elif kind in (th.Tensor, th.nn.Parameter):
        tensor = _bare(value)
        if (
            tensor.layout is not th.strided
            or tensor.device.type != "cpu"
            or tensor.is_nested
            or tensor.dtype not in REAL_DTYPES
        ):
            raise UntrustedFileError(f"{name} holds a tensor that is not of real numbers: {tensor.dtype}, {tensor.layout}")
        yield tensor
    elif kind not in (type(None), bool, int, float, str):
        raise UntrustedFileError(f"{name} holds a {kind.__name__}")


def _bare(tensor: th.Tensor) -> th.Tensor:
    # Not `tensor.detach()`: a file can give a tensor attributes, which take the place of its methods.
    return th.Tensor.detach(tensor)


def _copied(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return _bare(value).clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


def _is_finite(value: Any) -> bool:
    if isinstance(value, th.Tensor):
        return not value.is_floating_point() or bool(th.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


def check_policy(policy: th.nn.Module) -> None:
    """
    Check a policy whose parameters were loaded, which torch may have converted.

    :param policy: the policy
    :raises UntrustedFileError: if some aren't finite
    """
    for name, tensor in policy.state_dict().items():
        if not _is_finite(tensor):
            raise UntrustedFileError(f"{name} of the policy holds numbers that are NaN or infinite")


def check_optimizer(optimizer: th.optim.Optimizer, is_known: bool) -> None:
    """
    Check an optimiser whose state was loaded: torch takes anything.

    :param optimizer: the optimiser
    :param is_known: whether another of its class may be tried, to see whether it takes these settings, and what it remembers
    :raises UntrustedFileError: if it can't go on, or not with finite numbers
    :raises Exception: of any kind if it doesn't take these settings
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not all(id(parameter) in known for parameter in optimizer.state):
        raise UntrustedFileError("an optimiser has moments of parameters that there aren't")
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        for name, value in settings.items():
            for leaf in _leaves(value):
                if isinstance(leaf, th.Tensor) or not _is_finite(leaf):
                    raise UntrustedFileError(f"`{name}` of an optimiser must be finite, not {leaf}")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not _is_finite(value) or (name in NON_NEGATIVE_STATES and not _is_non_negative(value)):
                    raise UntrustedFileError(f"`{name}` of an optimiser holds numbers that can't be")
            if is_known:
                _check_state(state, _state_after_a_step(type(optimizer), settings, parameter))


def _is_non_negative(value: Any) -> bool:
    return bool((value >= 0).all()) if isinstance(value, th.Tensor) else value >= 0


def _state_after_a_step(kind: type[Any], settings: dict[str, Any], parameter: th.Tensor) -> dict[str, Any]:
    another = th.nn.Parameter(th.zeros_like(parameter))
    another.grad = th.zeros_like(parameter)
    accepted = inspect.signature(kind).parameters
    optimizer = kind([another], **{name: value for name, value in settings.items() if name in accepted})
    optimizer.step()
    state: dict[str, Any] = optimizer.state[another]
    return state


def _check_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    if not state:  # it hasn't made a step
        return
    if state.keys() != expected.keys():
        raise UntrustedFileError(f"an optimiser remembers {sorted(state)}, not {sorted(expected)}")
    for name, value in state.items():
        if _told(value) != (told := _told(expected[name])):
            raise UntrustedFileError(f"`{name}` of an optimiser must be {told}, not {_told(value)}")


def _told(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, th.Tensor) else type(value).__name__
