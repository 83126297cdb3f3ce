"""Reading and checking arguments: every error names the argument, its value and what is allowed."""

import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

LINEAR_PREFIX = "lin_"


def check_real(name: str, value: Any, allowed: str, accepts: Callable[[float], bool]) -> float:
    """
    Check that ``value`` is a real number which ``accepts`` accepts.

    :param name: the argument, for the error message
    :param value: its value
    :param allowed: what is allowed, for the error message
    :param accepts: true for the allowed numbers; is only given finite ones
    :return: the value as a float
    :raises TypeError: if it is no real number (a bool is none)
    :raises ValueError: if it is NaN, infinite or not accepted
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = " (YAML reads 1e-3 as a string, and 1.0e-3 as a number)" if isinstance(value, str) else ""
        raise TypeError(f"`{name}` must be {allowed}, not {value!r} ({type(value).__name__}){hint}")
    number = float(value)
    if not math.isfinite(number) or not accepts(number):
        raise ValueError(f"`{name}` must be {allowed}, not {value!r}")
    return number


def check_positive(name: str, value: Any) -> float:
    """:func:`check_real` for finite numbers > 0."""
    return check_real(name, value, "a finite number > 0", lambda number: number > 0)


def check_non_negative(name: str, value: Any) -> float:
    """:func:`check_real` for finite numbers >= 0."""
    return check_real(name, value, "a finite number >= 0", lambda number: number >= 0)


def check_finite(name: str, value: Any) -> float:
    """:func:`check_real` for any finite number."""
    return check_real(name, value, "a finite number", lambda number: True)


def check_positive_int(name: str, value: Any) -> int:
    """
    Check that ``value`` is an integer >= 1.

    :raises TypeError: if it is no integer (a bool is none)
    :raises ValueError: if it is smaller than 1
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer >= 1, not {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1, not {value!r}")
    return int(value)


def check_bool(name: str, value: Any) -> bool:
    """
    Check that ``value`` is a bool.

    :raises TypeError: if it is not
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, not {value!r} ({type(value).__name__})")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """
    Check that ``value`` is one of ``choices``.

    :raises TypeError: if it is no string
    :raises ValueError: if it is none of them
    """
    allowed = ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {allowed}, not {value!r} ({type(value).__name__})")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {allowed}, not {value!r}")
    return value


def parse_schedule(name: str, value: Any) -> Any:
    """
    Turn ``"lin_0.2"`` into the schedule that falls linearly from 0.2 to 0, as the RL Zoo does; leave the rest as it is.

    The schedule is SB3's own class, so that a saved model can be read without this package.

    :raises ValueError: if what stands after ``"lin_"`` is no finite number >= 0
    """
    if not isinstance(value, str) or not value.startswith(LINEAR_PREFIX):
        return value
    try:
        return LinearSchedule(check_non_negative(name, float(value.removeprefix(LINEAR_PREFIX))), 0.0, 1.0)
    except ValueError as error:
        raise ValueError(f"`{name}` must be 'lin_' and a finite number >= 0 if it is a string, not {value!r}") from error


def check_coefficient(name: str, value: Any, check: Callable[[str, Any], float] = check_non_negative) -> float | Schedule:
    """
    Check a coefficient that is either a number or a schedule; a schedule is tried at the start and the end of training.

    :param name: the argument, for the error message
    :param value: a number, or a function of the progress remaining (1 at the start, 0 at the end)
    :param check: what the number, or the schedule's value, has to pass
    :return: the number as a float, or the schedule
    :raises TypeError: if it is neither a number nor callable, or the schedule returns no number
    :raises ValueError: if the number, or what the schedule returns, is not allowed
    """
    if not callable(value):
        return check(name, value)
    for progress_remaining in (1.0, 0.0):
        current_value(name, value, progress_remaining, check)
    return value  # type: ignore[no-any-return]


def is_pair(value: Any) -> bool:
    """Whether ``value`` is a tuple, or what YAML and JSON make of one."""
    return isinstance(value, (tuple, list))


def parse_clip_range(value: Any) -> Any:
    """
    Read the argument ``clip_range`` as far as SB3 doesn't.

    :param value: ``"lin_0.2"``, or a pair of numbers, such strings or schedules, below 1 and above; the rest is left as it is
    :return: the schedule, or a tuple of numbers and schedules
    :raises TypeError: if a part of a pair is neither a number nor a schedule
    :raises ValueError: if a pair doesn't have two parts, or one of them is not allowed
    """
    if not is_pair(value):
        return parse_schedule("clip_range", value)
    if len(value) != 2:
        raise ValueError(f"`clip_range` must be None, a number, a schedule or a pair of these, not {value!r}")
    names = ("clip_range[0]", "clip_range[1]")
    return tuple(check_coefficient(name, parse_schedule(name, part)) for name, part in zip(names, value, strict=True))


def current_value(
    name: str, value: Any, progress_remaining: float, check: Callable[[str, Any], float] = check_non_negative
) -> Any:
    """
    Today's value of a coefficient that is either a number, checked before, or a schedule.

    :param name: the argument, for the error message
    :param value: a number, or a function of the progress remaining
    :param progress_remaining: from 1 (start of training) to 0 (its end); what is below 0 counts as 0
    :param check: what the schedule's value has to pass
    :raises TypeError: if the schedule returns no number
    :raises ValueError: if what the schedule returns is not allowed
    """
    if not callable(value):
        return value
    # SB3's progress falls below 0 in a last rollout that goes beyond the planned end, where no schedule has been tried.
    progress_remaining = max(progress_remaining, 0.0)
    return check(f"{name}(progress_remaining={progress_remaining})", value(progress_remaining))
