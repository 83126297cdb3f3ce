"""The statistics of a comparison, by hand or by simulation."""

import math

import numpy as np
import pytest

from benchmarks.stats import (
    curve_band,
    holm,
    improvement_estimate,
    iqm,
    iqm_estimate,
    p_value,
    performance_profile,
    smallest_p_value,
)


def test_interquartile_mean_leaves_out_a_quarter_on_both_sides() -> None:
    assert iqm(np.array([100.0, 1, 2, 3, 4, 5, 6, -100])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    # Of five, a whole run is left out on both sides: a quarter is 1.25.
    assert iqm(np.array([9.0, 1, 2, 3, -7])) == pytest.approx(2)


def test_all_tasks_runs_are_pooled() -> None:
    assert iqm_estimate([np.array([1.0, 2]), np.array([3.0, 100])]).value == pytest.approx(2.5)


def test_the_intervals_are_stratified() -> None:
    """Each task is resampled by itself: with equal runs within tasks nothing varies."""
    estimate = iqm_estimate([np.array([1.0, 1, 1]), np.array([5.0, 5, 5])])
    assert estimate == (3.0, 3.0, 3.0)


def test_the_interval_of_two_runs() -> None:
    # The mean of two draws from {0, 1} is 0 and 1 in a quarter of the cases each.
    assert iqm_estimate([np.array([0.0, 1.0])]) == (0.5, 0.0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Roughly: a percentile bootstrap of 20 runs is a little too short."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(200, 20))
    covered = np.mean([low <= 0 <= high for _, low, high in (iqm_estimate([sample]) for sample in samples)])
    assert 0.88 <= covered <= 0.98


def test_one_run_has_no_interval() -> None:
    value, low, high = iqm_estimate([np.array([3.0])])
    assert value == 3.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_probability_of_improvement_counts_pairs() -> None:
    # (1, 0), (1, 0.5), (2, 0), (2, 0.5): all; (1, 1): a half; (2, 1): one. 5.5 of 6.
    ours, theirs = np.array([1.0, 2.0]), np.array([0.0, 0.5, 1.0])
    assert improvement_estimate([ours], [theirs]).value == pytest.approx(5.5 / 6)
    # The mean over tasks.
    assert improvement_estimate([ours, theirs], [theirs, ours]).value == pytest.approx(0.5)


def test_there_is_no_interval_for_a_variant_that_always_wins() -> None:
    """No resample of five and five says how sure that is."""
    estimate = improvement_estimate([np.arange(5.0) + 10], [np.arange(5.0)])
    assert estimate == (1.0, pytest.approx(np.nan, nan_ok=True), pytest.approx(np.nan, nan_ok=True))


def test_performance_profile_is_the_share_of_runs_above() -> None:
    value, low, high = performance_profile([np.array([0.2, 0.6]), np.array([0.4, 0.8])], np.array([0.0, 0.3, 0.5, 0.9]))
    assert value.tolist() == [1.0, 0.75, 0.5, 0.0]
    assert (low <= value).all()
    assert (value <= high).all()
    # Above 0.3 the second task's runs both are, the first one's bounds are those of one in two.
    assert (low[1], high[1]) == (0.5, 1.0)


def test_bands_of_curves() -> None:
    curves = np.array([[0.0, 1.0], [1.0, 1.0]])
    mean, low, high = curve_band(curves)
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([0.5, 1.0], [0.0, 1.0], [1.0, 1.0])
    assert [bound.tolist() for bound in curve_band(curves[:1])] == [[0.0, 1.0]] * 3


def test_p_values_of_few_runs() -> None:
    # Of 3 and 3 runs there are 20 orders; two of them are as extreme as this one.
    assert p_value(np.array([4.0, 5, 6]), np.array([1.0, 2, 3])) == pytest.approx(2 / 20)
    assert smallest_p_value(3, n_comparisons=2) == pytest.approx(4 / 20)
    assert [smallest_p_value(n) for n in (1, 2, 3, 4)] == [
        1.0,
        pytest.approx(2 / 6),
        pytest.approx(2 / 20),
        pytest.approx(2 / 70),
    ]


def test_p_values_with_ties_count_orders_too() -> None:
    assert p_value(np.array([500.0] * 3), np.array([480.0] * 3)) == pytest.approx(2 / 20)
    assert p_value(np.array([500.0] * 5), np.arange(5.0)) == pytest.approx(2 / 252)
    assert p_value(np.array([500.0] * 5), np.array([500.0] * 5)) == 1.0
    # Of the 20 orders of 1, 1, 2, 2, 2, 3 those whose first three have rank sums as far from 10.5 as 1, 1, 2 and 2, 2, 3 have,
    # which is 4 + 1.5 + 1.5 = 7 and 14: three ways to choose the 2, and three to leave it out.
    assert p_value(np.array([1.0, 1, 2]), np.array([2.0, 2, 3])) == pytest.approx(6 / 20)


def test_holms_correction_by_hand() -> None:
    # The smallest of four counts four times, the next one three times, ... and none less than one before it.
    assert holm(np.array([0.04, 0.01, 0.03, 0.5])).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []


def test_what_the_report_says_of_intervals_of_few_runs() -> None:
    """Nine in ten cover the truth with five runs, three in four with three."""
    rng = np.random.default_rng(1)
    for n_runs, expected in ((5, 0.9), (3, 0.75)):
        estimates = [iqm_estimate([sample]) for sample in rng.normal(size=(300, n_runs))]
        assert np.mean([low <= 0 <= high for _, low, high in estimates]) == pytest.approx(expected, abs=0.06)
