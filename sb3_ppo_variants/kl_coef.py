"""The controller of the KL penalty's coefficient beta: configuration and rule here, state apart from it."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_ppo_variants.arguments import (
    LINEAR_PREFIX,
    check_choice,
    check_coefficient,
    check_non_negative,
    check_positive,
    parse_schedule,
)

AUTO = "auto"
AUTO_PREFIX = "auto_"

RULES: dict[str, dict[str, float]] = {
    "ppo": {"decrease_below": 1 / 1.5, "increase_above": 1.5, "decrease_factor": 1 / 2, "increase_factor": 2.0},
    "tf_agents": {"decrease_below": 0.7, "increase_above": 1.3, "decrease_factor": 1 / 1.5, "increase_factor": 1.5},
    "rllib": {"decrease_below": 0.5, "increase_above": 2.0, "decrease_factor": 0.5, "increase_factor": 1.5},
}


class KLCoefState(NamedTuple):
    """
    What a controller remembers from one update to the next.

    :param kl_coef: beta, in effect in the next update
    """

    kl_coef: float


@dataclass(frozen=True)
class KLCoefController:
    """
    Adaptive KL penalty: after each update, beta follows the KL that the update has caused.

    The defaults are the rule of the PPO paper (arXiv 1707.06347, section 4): beta is halved where
    KL < target / 1.5 and doubled where KL > 1.5 target. It goes back to DPPO (Heess et al. 2017, arXiv 1707.02286).

    :param initial: beta in the first update
    :param decrease_below: beta is decreased where KL < ``decrease_below`` x target
    :param increase_above: beta is increased where KL > ``increase_above`` x target
    :param decrease_factor: what beta is then multiplied by, between 0 and 1
    :param increase_factor: what beta is then multiplied by, greater than 1
    :param minimum: beta never falls below it
    :param maximum: beta never rises above it
    :param hinge_coef: weight of a second penalty on the minibatch's mean KL,
        ``hinge_coef`` x max(0, KL - ``hinge_threshold`` x target)^2; 0 is none, modular_rl and TF-Agents take 1000
    :param hinge_threshold: see ``hinge_coef``; modular_rl and TF-Agents take 2
    :raises TypeError: if an argument is no number
    :raises ValueError: if an argument is out of range, or two contradict each other
    """

    initial: float = 1.0
    decrease_below: float = RULES["ppo"]["decrease_below"]
    increase_above: float = RULES["ppo"]["increase_above"]
    decrease_factor: float = RULES["ppo"]["decrease_factor"]
    increase_factor: float = RULES["ppo"]["increase_factor"]
    minimum: float = 1e-6
    maximum: float = 1e6
    hinge_coef: float = 0.0
    hinge_threshold: float = 2.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            (check_non_negative if name.startswith("hinge") else check_positive)(name, getattr(self, name))
        for smaller, larger in (
            ("decrease_below", "increase_above"),
            ("minimum", "initial"),
            ("initial", "maximum"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                raise ValueError(
                    f"`{smaller}` must not be greater than `{larger}`, not {getattr(self, smaller)} > {getattr(self, larger)}"
                )
        if self.decrease_factor >= 1:
            raise ValueError(f"`decrease_factor` must be less than 1, not {self.decrease_factor!r}")
        if self.increase_factor <= 1:
            raise ValueError(f"`increase_factor` must be greater than 1, not {self.increase_factor!r}")

    @classmethod
    def from_rule(cls, rule: str = "ppo", **overrides: float) -> "KLCoefController":
        """
        A published rule by its name.

        - ``"ppo"``: the PPO paper's;
        - ``"tf_agents"``: beta x 1.5 above 1.3 x target, / 1.5 below 0.7 x target, also modular_rl's;
        - ``"rllib"``: beta x 1.5 above 2 x target, x 0.5 below 0.5 x target.

        :param rule: the name
        :param overrides: any of the constructor's arguments
        :raises TypeError: if an argument is no number
        :raises ValueError: if the rule or an argument is unknown, or an argument out of range
        """
        check_choice("rule", rule, RULES)
        for name in overrides:
            check_choice("key", name, ("rule", *cls.__dataclass_fields__))
        return cls(**{**RULES[rule], **overrides})

    def init(self) -> KLCoefState:
        """The state before the first update."""
        return KLCoefState(kl_coef=self.initial)

    def update(self, state: KLCoefState, *, kl: float, kl_target: float) -> KLCoefState:
        """
        The state for the next update.

        :param state: the state of the update that has ended
        :param kl: the exact KL(old || new) that it caused, averaged over the rollout, in nats
        :param kl_target: the KL that is wanted, in nats
        :return: the new state; the old one, with a warning, where ``kl`` is not finite
        """
        if not math.isfinite(kl):
            warnings.warn(f"the KL divergence of the last update is {kl}: kl_coef stays at {state.kl_coef:g}", stacklevel=2)
            return state
        if kl < self.decrease_below * kl_target:
            return self._bounded(state.kl_coef * self.decrease_factor)
        if kl > self.increase_above * kl_target:
            return self._bounded(state.kl_coef * self.increase_factor)
        return state

    def _bounded(self, kl_coef: float) -> KLCoefState:
        bounded = min(max(kl_coef, self.minimum), self.maximum)
        if bounded != kl_coef:
            name = "minimum" if kl_coef < bounded else "maximum"
            warnings.warn(f"kl_coef is saturated at its {name}, {bounded:g}: the target KL is out of its reach", stacklevel=3)
        return KLCoefState(kl_coef=bounded)


KLCoef: TypeAlias = "float | str | Schedule | Mapping[str, Any] | KLCoefController"


def parse_kl_coef(kl_coef: KLCoef) -> FloatSchedule | KLCoefController:
    """
    Read the argument ``kl_coef``.

    :param kl_coef: beta, one of

        - a number >= 0, a schedule or ``"lin_3.0"``: fixed penalty;
        - ``"auto"`` or ``"auto_0.5"``: adaptive penalty, by the PPO paper's rule (with the initial value 0.5);
        - a dict such as ``{"rule": "tf_agents", "initial": 0.5}``: the arguments of :meth:`KLCoefController.from_rule`;
        - a :class:`KLCoefController`.
    :return: the schedule of a fixed penalty, or the controller of an adaptive one
    :raises TypeError: if it is none of these
    :raises ValueError: if a number in it is not allowed
    """
    if isinstance(kl_coef, KLCoefController):
        return kl_coef
    if isinstance(kl_coef, Mapping):
        return _named(kl_coef, lambda: KLCoefController.from_rule(**kl_coef))
    if isinstance(kl_coef, str) and kl_coef.startswith(AUTO_PREFIX):
        initial = _number_after_prefix(kl_coef)
        return _named(kl_coef, lambda: KLCoefController(initial=initial))
    if kl_coef == AUTO:
        return KLCoefController()
    schedule = parse_schedule("kl_coef", kl_coef)
    if isinstance(schedule, (str, type)) or not (callable(schedule) or isinstance(schedule, Real)):
        raise (ValueError if isinstance(schedule, str) else TypeError)(
            f"`kl_coef` must be a number >= 0, a schedule, '{LINEAR_PREFIX}3.0', '{AUTO}', '{AUTO_PREFIX}0.5', a dict or a "
            f"KLCoefController, not {kl_coef!r}"
        )
    return FloatSchedule(check_coefficient("kl_coef", schedule))


def _number_after_prefix(kl_coef: str) -> float:
    try:
        return check_positive("kl_coef", float(kl_coef.removeprefix(AUTO_PREFIX)))
    except ValueError as error:
        raise ValueError(f"`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not {kl_coef!r}") from error


def _named(kl_coef: Any, make: Callable[[], KLCoefController]) -> KLCoefController:
    """The controller; errors about its arguments say that they come from ``kl_coef``."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise type(error)(f"`kl_coef` is not allowed to be {kl_coef!r}: {error}") from error
