"""Beta's rules, bounds and spellings."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.utils import FloatSchedule

from sb3_ppo_variants.kl_coef import KLCoefController, KLCoefState, parse_kl_coef

TARGET = 0.01


def trajectory(controller: KLCoefController, kls: list[float]) -> list[float]:
    """Beta in each update, and after the last."""
    state = controller.init()
    betas = [state.kl_coef]
    for kl in kls:
        state = controller.update(state, kl=kl, kl_target=TARGET)
        betas.append(state.kl_coef)
    return betas


def test_rule_of_the_paper() -> None:
    # Bounds of the band are 0.00667 and 0.015: doubled, doubled, kept three times, halved twice.
    kls = [0.0151, 0.1, 0.0149, 0.01, 0.0067, 0.0066, 0.0]
    assert trajectory(KLCoefController(), kls) == [1, 2, 4, 4, 4, 4, 2, 1]


def test_rule_of_tf_agents() -> None:
    # Bounds of the band are 0.007 and 0.013: times 1.5 twice, kept twice, divided by 1.5.
    kls = [0.0131, 0.02, 0.0129, 0.0071, 0.0069]
    expected = [1, 1.5, 2.25, 2.25, 2.25, 1.5]
    assert trajectory(KLCoefController.from_rule("tf_agents"), kls) == pytest.approx(expected, rel=1e-15)


def test_rule_of_rllib() -> None:
    # Bounds of the band are 0.005 and 0.02: times 1.5, kept twice, halved; its usual initial value is 0.2.
    kls = [0.0201, 0.0199, 0.0051, 0.0049]
    expected = [0.2, 0.3, 0.3, 0.3, 0.15]
    assert trajectory(KLCoefController.from_rule("rllib", initial=0.2), kls) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("rule", ["ppo", "tf_agents", "rllib"])
def test_the_edges_of_the_bands(rule: str) -> None:
    """Changed just beyond the published edges, in units of the target, and kept on them."""
    low, high = {"ppo": (1 / 1.5, 1.5), "tf_agents": (0.7, 1.3), "rllib": (0.5, 2.0)}[rule]
    controller = KLCoefController.from_rule(rule)
    for edge, beyond in ((low, 1 - 1e-9), (high, 1 + 1e-9)):
        assert trajectory(controller, [edge * TARGET]) == [1, 1]
        assert trajectory(controller, [edge * TARGET * beyond])[1] != 1


def test_stays_within_bounds_and_says_so() -> None:
    controller = KLCoefController(initial=1.0, minimum=0.4, maximum=3.0)
    with pytest.warns(UserWarning, match=r"kl_coef is saturated at its maximum, 3: "):
        assert trajectory(controller, [1.0, 1.0, 1.0]) == [1, 2, 3, 3]
    with pytest.warns(UserWarning, match=r"kl_coef is saturated at its minimum, 0\.4: "):
        assert trajectory(controller, [0.0, 0.0, 0.0]) == [1, 0.5, 0.4, 0.4]


def test_reaching_a_bound_exactly_is_no_saturation() -> None:
    assert trajectory(KLCoefController(maximum=2.0), [1.0]) == [1, 2]


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_non_finite_kl_changes_nothing_and_says_so(kl: float) -> None:
    with pytest.warns(UserWarning, match=f"KL divergence of the last update is {kl}: kl_coef stays at 1"):
        assert trajectory(KLCoefController(), [kl]) == [1, 1]


@given(st.lists(st.floats(0, 10), max_size=60))
@pytest.mark.filterwarnings("ignore:kl_coef is saturated")
def test_is_always_finite_and_within_bounds(kls: list[float]) -> None:
    assert all(1e-6 <= beta <= 1e6 for beta in trajectory(KLCoefController(), kls))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 100))
def test_more_kl_never_means_a_smaller_beta(kl: float, more: float, beta: float) -> None:
    controller, state = KLCoefController(), KLCoefState(beta)
    less_kl = controller.update(state, kl=kl, kl_target=TARGET)
    more_kl = controller.update(state, kl=kl + more, kl_target=TARGET)
    assert more_kl.kl_coef >= less_kl.kl_coef


def test_spellings_of_a_fixed_penalty() -> None:
    for value in (3, 3.0, lambda progress: 3.0):
        schedule = parse_kl_coef(value)
        assert isinstance(schedule, FloatSchedule)
        assert schedule(0.5) == 3.0
    linear = parse_kl_coef("lin_3.0")
    assert isinstance(linear, FloatSchedule)
    assert [linear(1.0), linear(0.5), linear(0.0)] == [3.0, 1.5, 0.0]


def test_spellings_of_an_adaptive_penalty() -> None:
    assert parse_kl_coef("auto") == KLCoefController()
    assert parse_kl_coef("auto_0.5") == KLCoefController(initial=0.5)
    assert parse_kl_coef({}) == KLCoefController()
    assert parse_kl_coef({"rule": "tf_agents", "initial": 0.5}) == KLCoefController.from_rule("tf_agents", initial=0.5)
    own = KLCoefController(hinge_coef=1000.0)
    assert parse_kl_coef(own) is own


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1.0, ValueError, r"`kl_coef` must be a finite number >= 0, not -1\.0"),
        (math.nan, ValueError, "`kl_coef` must be a finite number >= 0, not nan"),
        (math.inf, ValueError, "`kl_coef` must be a finite number >= 0, not inf"),
        (True, TypeError, r"`kl_coef` must be a finite number >= 0, not True \(bool\)"),
        (None, TypeError, r"`kl_coef` must be a number >= 0, a schedule, .*, a dict or a KLCoefController, not None"),
        (KLCoefController, TypeError, "`kl_coef` must be a number >= 0, .* or a KLCoefController, not <class"),
        ("auto_x", ValueError, "`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not 'auto_x'"),
        ("auto_", ValueError, "`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not 'auto_'"),
        ("auto_0", ValueError, "`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not 'auto_0'"),
        ("auto_-1", ValueError, "`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not 'auto_-1'"),
        ("auto_inf", ValueError, "`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not 'auto_inf'"),
        ("automatic", ValueError, r"`kl_coef` must be a number >= 0, a schedule, 'lin_3\.0', 'auto', .* not 'automatic'"),
        ("1e-3", ValueError, "`kl_coef` must be a number >= 0, .* not '1e-3'"),
        ("lin_x", ValueError, "`kl_coef` must be 'lin_' and a finite number >= 0 if it is a string, not 'lin_x'"),
        ("lin_-1", ValueError, "`kl_coef` must be 'lin_' and a finite number >= 0 if it is a string, not 'lin_-1'"),
        ("auto_1e7", ValueError, "`kl_coef` is not allowed to be 'auto_1e7': `initial` must not be greater than `maximum`"),
        (lambda progress: math.nan, ValueError, r"`kl_coef\(progress_remaining=1\.0\)` must be .* not nan"),
        (lambda progress: -1.0, ValueError, r"`kl_coef\(progress_remaining=1\.0\)` must be .* not -1\.0"),
        (lambda progress: "1", TypeError, r"`kl_coef\(progress_remaining=1\.0\)` must be .* not '1' \(str\)"),
        (
            {"rule": "trpo"},
            ValueError,
            "`kl_coef` is .* {'rule': 'trpo'}: `rule` must be one of 'ppo', .*, not 'trpo'",
        ),
        ({"rule": 1}, TypeError, "`rule` must be one of 'ppo', 'tf_agents', 'rllib', not 1"),
        ({"inital": 1.0}, ValueError, "`kl_coef` is .*: `key` must be one of 'rule', 'initial', .*, not 'inital'"),
        ({"initial": 0.0}, ValueError, r"`initial` must be a finite number > 0, not 0\.0"),
        ({"initial": "1"}, TypeError, r"`initial` must be a finite number > 0, not '1' \(str\)"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_kl_coef(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minimum": 2.0, "maximum": 1.0}, r"`minimum` must not be greater than `initial`, not 2\.0 > 1\.0"),
        ({"minimum": 2.0, "initial": 3.0, "maximum": 1.0}, r"`initial` must not be greater than `maximum`, not 3\.0 > 1\.0"),
        ({"initial": 1e7}, r"`initial` must not be greater than `maximum`"),
        ({"decrease_below": 2.0}, r"`decrease_below` must not be greater than `increase_above`, not 2\.0 > 1\.5"),
        ({"decrease_factor": 1.0}, r"`decrease_factor` must be less than 1, not 1\.0"),
        ({"increase_factor": 1.0}, r"`increase_factor` must be greater than 1, not 1\.0"),
        ({"maximum": math.inf}, r"`maximum` must be a finite number > 0, not inf"),
        ({"minimum": 0.0}, r"`minimum` must be a finite number > 0, not 0\.0"),
        ({"hinge_coef": -1.0}, r"`hinge_coef` must be a finite number >= 0, not -1\.0"),
        ({"hinge_threshold": math.nan}, r"`hinge_threshold` must be a finite number >= 0, not nan"),
    ],
)
def test_a_controller_checks_its_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLCoefController(**arguments)
