"""
Statistics of a few runs: what a reader may conclude, and how surely.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264, by means
of SciPy. Samples are scores of one variant's seeds on one task, or one sample a task; intervals are stratified: each sample is
resampled by itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
N_RESAMPLES = 5000
MAX_ORDERS = 100_000
"""Of two variants' runs, that are counted one by one."""
SEED = 0
"""Of the bootstrap, so that a report can be made again."""


class Estimate(NamedTuple):
    """
    A number, and the bounds of its 95 % bootstrap interval, which are NaN where there is none, as with fewer than two runs.

    :param value: the number
    :param low: lower bound
    :param high: upper bound
    """

    value: float
    low: float
    high: float


def iqm(scores: np.ndarray, axis: int = -1) -> Any:
    """
    Interquartile mean: of the middle half of the scores.

    :param scores: any shape
    :param axis: over which they are averaged
    """
    return scipy.stats.trim_mean(scores, 0.25, axis=axis)


def iqm_estimate(samples: Sequence[np.ndarray]) -> Estimate:
    """
    The interquartile mean of all scores.

    :param samples: scores of shape (n_seeds,), one array a task
    """
    return _estimate(samples, lambda *resampled, axis: iqm(np.concatenate(resampled, axis=axis), axis=axis))


def improvement_estimate(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Estimate:
    """
    The probability that a run of one variant beats one of another on a task drawn at random; a tie counts half.

    Where no run is beaten by one of the other variant, or all are, no resample says anything else: there is no interval.

    :param ours: scores of shape (n_seeds,), one array a task
    :param theirs: the other variant's, on the same tasks
    """
    n_tasks = len(ours)

    def probability(*resampled: np.ndarray, axis: int) -> Any:
        pairs = zip(resampled[:n_tasks], resampled[n_tasks:], strict=True)
        return np.mean([_beaten(*(np.moveaxis(np.asarray(sample), axis, -1) for sample in pair)) for pair in pairs], axis=0)

    estimate = _estimate([*ours, *theirs], probability)
    return Estimate(estimate.value, math.nan, math.nan) if estimate.value in (0.0, 1.0) else estimate


def _beaten(ours: np.ndarray, theirs: np.ndarray) -> Any:
    mine, other = ours[..., :, None], theirs[..., None, :]
    return ((mine > other) + 0.5 * (mine == other)).mean(axis=(-2, -1))


def performance_profile(samples: Sequence[np.ndarray], thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The share of runs that score above each threshold, with the bounds of its 95 % bootstrap interval.

    :param samples: scores of shape (n_seeds,), one array a task
    :param thresholds: shape (n_thresholds,)
    :return: three arrays of shape (n_thresholds,)
    """
    estimates = [
        _estimate([(sample > threshold).astype(float) for sample in samples], _pooled_mean) for threshold in thresholds
    ]
    value, low, high = np.array(estimates).T
    return value, low, high


def _pooled_mean(*resampled: np.ndarray, axis: int) -> Any:
    return np.concatenate(resampled, axis=axis).mean(axis=axis)


def curve_band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The interquartile mean at each point of several runs' curves, with the bounds of its 95 % bootstrap interval.

    :param curves: shape (n_seeds, n_points)
    :return: three arrays of shape (n_points,); the bounds are the mean itself if there is but one run
    """
    mean = iqm(curves, axis=0)
    if len(curves) < 2:
        return mean, mean, mean
    result = scipy.stats.bootstrap(
        (curves,), iqm, axis=0, method="percentile", n_resamples=1000, confidence_level=CONFIDENCE, rng=SEED, vectorized=True
    )
    return mean, np.asarray(result.confidence_interval.low), np.asarray(result.confidence_interval.high)


def p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """
    Two-sided Mann-Whitney test: how likely are such ranks, or more extreme ones, if both variants are the same?

    :param ours: scores, shape (n_seeds,)
    :param theirs: scores of the other variant
    """
    n_orders = math.comb(len(ours) + len(theirs), len(ours))
    # With ties, SciPy's own choice would be a normal distribution, whose p can be smaller than any order's of few runs.
    count = min(len(ours), len(theirs)) > 1 and n_orders <= MAX_ORDERS
    method: Any = scipy.stats.PermutationMethod(n_resamples=MAX_ORDERS) if count else "auto"
    return float(scipy.stats.mannwhitneyu(ours, theirs, alternative="two-sided", method=method).pvalue)


def smallest_p_value(n_seeds: int, n_comparisons: int = 1) -> float:
    """
    What is left of :func:`p_value`, corrected by :func:`holm`, if all runs of one variant beat all of the other.

    Two of all orders are like that.

    :param n_seeds: of each variant
    :param n_comparisons: that are corrected for
    """
    return min(1.0, n_comparisons * 2 / math.comb(2 * n_seeds, n_seeds))


def holm(p_values: np.ndarray) -> np.ndarray:
    """
    P-values corrected for their number (Holm 1979): below 0.05, the chance that any of the findings is false is at most 5 %.

    :param p_values: shape (n_comparisons,)
    :return: the same shape
    """
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return corrected


def _estimate(samples: Sequence[np.ndarray], statistic: Callable[..., Any]) -> Estimate:
    value = float(statistic(*samples, axis=-1))
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, math.nan, math.nan)
    result = scipy.stats.bootstrap(
        tuple(samples),
        statistic,
        n_resamples=N_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=SEED,
        vectorized=True,
        batch=500,
    )
    return Estimate(value, float(result.confidence_interval.low), float(result.confidence_interval.high))
