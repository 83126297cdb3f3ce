"""Figures of comparisons."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import pandas as pd

from benchmarks.result import Result
from benchmarks.stats import Estimate, curve_band, performance_profile

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers too."""
N_POINTS = 100
"""Of a curve."""
WINDOW = 0.05
"""Share of the time steps before a curve's point whose episodes it averages."""

Cells: TypeAlias = Mapping[tuple[str, str], list[Result]]
"""Results by environment and variant."""
Styles: TypeAlias = Mapping[str, dict[str, Any]]
"""How each variant is drawn, in all figures."""


def styles_of(cells: Cells) -> Styles:
    """
    Colours for variants; SB3's own algorithms are dashed, above the others, as the same bits make the same line as ours.

    :param cells: the results
    """
    _, variants = _axes_of(cells)
    lines = {variant: "--" for (_, variant), results in cells.items() if results[0].job.algorithm != "ppo"}
    cycle = itertools.cycle((color, line) for line in ("-", ":", "-.") for color in COLORS)
    return {
        name: {"color": color, "linestyle": lines.get(name, line), "zorder": 3 if name in lines else 2}
        for name, (color, line) in zip(variants, cycle, strict=False)
    }


def returns_at(result: Result, steps: np.ndarray) -> np.ndarray:
    """
    The learning curve: mean return of the episodes that have ended within a window before each of some time steps.

    Where none has, the latest episode's; NaN before the first.

    :param result: of a run
    :param steps: shape (n_points,)
    :return: shape (n_points,)
    """
    ends, returns = result.episodes["timesteps"].to_numpy(), result.episodes["episode_return"].to_numpy()
    if len(ends) == 0:
        return np.full(len(steps), np.nan)
    last = np.searchsorted(ends, steps, side="right")
    first = np.searchsorted(ends, steps - WINDOW * result.job.timesteps, side="right")
    first = np.where(first == last, last - 1, first)
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    means = (sums[last] - sums[np.maximum(first, 0)]) / np.maximum(last - first, 1)
    return np.where(last > 0, means, np.nan)


def learning_curves(cells: Cells, styles: Styles, path: Path) -> None:
    """
    Returns against time steps: interquartile mean and its interval for each variant, a panel for each environment.

    :param cells: the results
    :param styles: of the variants
    :param path: the PNG
    """
    envs, variants = _axes_of(cells)
    figure, panels = _panels(envs)
    for env, axis in panels:
        for variant in variants:
            if results := cells.get((env, variant)):
                steps = _points(results[0])
                _band(axis, steps, np.array([returns_at(result, steps) for result in results]), variant, styles)
        axis.set(title=env, xlabel="time steps", ylabel="return")
        if not axis.lines:
            axis.annotate("no episode has ended", (0.5, 0.5), xycoords="axes fraction", ha="center")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, [axis for _, axis in panels])
    seeds = {len(results) for results in cells.values()}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    title = "One seed each" if seeds == {1} else f"Interquartile mean of {count} seeds and its 95 % bootstrap interval"
    _save(figure, path, title)


def all_seeds(cells: Cells, path: Path) -> None:
    """
    Each run's learning curve: a row for each environment, a column for each variant.

    :param cells: the results
    :param path: the PNG
    """
    envs, variants = _axes_of(cells)
    size = (2.6 * len(variants) + 0.6, 2.2 * len(envs) + 0.6)
    figure, axes = plt.subplots(
        len(envs), len(variants), figsize=size, layout="constrained", squeeze=False, sharex="row", sharey="row"
    )
    for row, env in zip(axes, envs, strict=True):
        for axis, variant in zip(row, variants, strict=True):
            for result in cells.get((env, variant), []):
                steps = _points(result)
                axis.plot(steps, returns_at(result, steps), color=COLORS[0], alpha=0.6, lw=0.8)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set(ylabel=f"{env}\nreturn")
    for axis, variant in zip(axes[0], variants, strict=True):
        axis.set(title=variant)
    _save(figure, path, "One line a seed; time steps from left to right")


def divergence(cells: Cells, styles: Styles, path: Path) -> None:
    """
    How far updates go: the exact KL of all updates of each variant (left), and beta over time (right).

    :param cells: the results
    :param styles: of the variants
    :param path: the PNG
    """
    told = {key: results for key, results in cells.items() if any((result.updates["kl"] > 0).any() for result in results)}
    if not told:
        return
    envs, variants = _axes_of(told)
    penalized = {
        key: results for key, results in told.items() if any((result.updates["kl_coef"] > 0).any() for result in results)
    }
    n_columns = 2 if penalized else 1
    figure, axes = plt.subplots(
        *(len(envs), n_columns),
        figsize=(11 if penalized else 8.5, 0.9 + (0.6 + 0.25 * len(variants)) * len(envs) + 1.2),
        layout="constrained",
        squeeze=False,
    )
    for row, env in zip(axes, envs, strict=True):
        _draw_kls(row[0], {variant: told[env, variant] for variant in variants if (env, variant) in told})
        row[0].set_title(f"{env}: KL(old || new) of an update")
        if penalized:
            _draw_betas(
                row[1], {variant: penalized[env, variant] for variant in variants if (env, variant) in penalized}, styles
            )
            row[1].set_title(f"{env}: coefficient β")
    _save(
        figure,
        path,
        "Boxes: quartiles of all updates that moved the policy, whiskers: 5 % and 95 %; dotted: targets of the adaptive rule",
    )


def _draw_kls(axis: Axes, cells: Mapping[str, Sequence[Result]]) -> None:
    """A box a variant; those of updates that moved nothing have no place on a logarithmic axis."""
    kls = [pd.concat([result.updates["kl"] for result in results]) for results in cells.values()]
    axis.boxplot(
        [kl[kl > 0].to_numpy() for kl in kls],
        orientation="horizontal",
        tick_labels=list(cells),
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        medianprops={"color": COLORS[0]},
    )
    axis.invert_yaxis()
    arguments = [result.job.arguments for results in cells.values() for result in results]
    for target in {float(each["kl_target"]) for each in arguments if each.get("kl_target") is not None}:
        axis.axvline(target, color="grey", linestyle=":", lw=1)
    axis.set(xlabel="nats", xscale="log")
    _few_ticks(axis.xaxis)


def _draw_betas(axis: Axes, cells: Mapping[str, Sequence[Result]], styles: Styles) -> None:
    for variant, results in cells.items():
        steps = _points(results[0])
        _band(axis, steps, np.array([_latest(result, "kl_coef", steps) for result in results]), variant, styles)
    axis.set(xlabel="time steps", yscale="log")
    _few_ticks(axis.yaxis)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_visible(bool(axis.lines))
    if axis.lines:
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _few_ticks(axis: Axis) -> None:
    """Numbers that can be read on a logarithmic axis, however little of it is shown."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MaxNLocator(4) if high < 10 * low else LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def profiles(scores: Mapping[str, Sequence[np.ndarray]], styles: Styles, path: Path) -> None:
    """
    The share of runs above each score.

    :param scores: by variant, normalised, of shape (n_seeds,), one array an environment
    :param styles: of the variants
    :param path: the PNG
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    thresholds = np.linspace(0, 1, 51)
    for variant in scores:
        value, low, high = performance_profile(scores[variant], thresholds)
        axis.plot(thresholds, value, label=variant, **styles[variant])
        axis.fill_between(thresholds, low, high, color=styles[variant]["color"], alpha=0.12, lw=0)
    axis.set(
        xlabel="normalised final return: 0 random actions, 1 the best run", ylabel="share of runs above it", ylim=(0, 1.02)
    )
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path, "Performance profiles, with 95 % bootstrap intervals")


def improvement(estimates: Mapping[tuple[str, str], Estimate], baseline: str, styles: Styles, path: Path) -> None:
    """
    The probability that each variant beats the baseline, environment by environment and over all.

    :param estimates: by environment (or ``"all"``) and variant
    :param baseline: name of the variant that the others are compared with
    :param styles: of the variants
    :param path: the PNG
    """
    envs, variants = _axes_of(estimates)
    height = 0.9 + 0.28 * len(variants) + 0.5
    figure, panels = _panels(envs, width=3.4, height=height, sharey=True)
    for env, axis in panels:
        for row, variant in enumerate(variants):
            if estimate := estimates.get((env, variant)):
                whiskers = np.nan_to_num([[estimate.value - estimate.low], [estimate.high - estimate.value]]).clip(0)
                axis.errorbar(estimate.value, row, xerr=whiskers, fmt="o", color=styles[variant]["color"], capsize=3)
        axis.axvline(0.5, color="grey", lw=1, linestyle=":")
        axis.set(title=env, xlim=(-0.03, 1.03), yticks=range(len(variants)), yticklabels=variants)
    panels[0][1].invert_yaxis()
    _save(figure, path, f"Probability that a run beats one of {baseline}; dotted: neither is better")


def efficiency(jobs: pd.DataFrame, styles: Styles, path: Path) -> None:
    """
    What a result costs: time steps to the threshold, and wall time, of each run.

    :param jobs: one row a run, with ``env``, ``variant``, ``timesteps``, ``steps_to_threshold``, ``steps_per_second``
    :param styles: of the variants
    :param path: the PNG
    """
    envs, variants = list(dict.fromkeys(jobs["env"])), list(dict.fromkeys(jobs["variant"]))
    figure, axes = plt.subplots(
        len(envs), 2, figsize=(10, 0.9 + (0.9 + 0.26 * len(variants)) * len(envs)), layout="constrained", squeeze=False
    )
    for (left, right), env in zip(axes, envs, strict=True):
        for row, variant in enumerate(variants):
            own = jobs[(jobs["env"] == env) & (jobs["variant"] == variant)]
            steps = own["steps_to_threshold"].replace(np.inf, np.nan)
            for axis, values in ((left, steps), (right, own["steps_per_second"])):
                axis.plot(values, np.full(len(values), row), "o", color=styles[variant]["color"], alpha=0.6, clip_on=False)
            if len(own):
                note = f"{steps.notna().sum()} of {len(own)}"
                left.annotate(note, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize="small")
        for axis in (left, right):
            axis.set(yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.spines[["top", "right"]].set_visible(False)
        threshold = jobs["threshold"][jobs["env"] == env].iloc[0]
        left.set(title=env, xlabel=f"time steps to a mean return of {threshold:.5g}")
        right.set(title=env, xlabel="time steps a second")
        left.set_xlim(0, 1.02 * jobs["timesteps"][jobs["env"] == env].max())
        right.set_xlim(left=0)
    _save(figure, path, "One point a run; beside them how many runs have reached the threshold")


def draw_speed(measurements: pd.DataFrame, path: Path) -> None:
    """
    How many times as long others take as this package, setting by setting.

    :param measurements: with columns measure, setting, algorithm, turn, value
    :param path: the PNG
    """
    titles = {
        "whole": "whole runs",
        "minibatch": "a minibatch of an update",
        "rollout": "a rollout step, outside the environment",
    }
    drawn = {measure: measurements[measurements["measure"] == measure] for measure in titles}
    drawn = {measure: group for measure, group in drawn.items() if len(group) > 0}
    if not drawn:
        return
    heights = [group.groupby(["setting", "algorithm"]).ngroups for group in drawn.values()]
    figure, axes = plt.subplots(
        len(drawn),
        1,
        figsize=(9, 1.5 + 0.25 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for axis, (measure, group) in zip(axes[:, 0], drawn.items(), strict=True):
        by_turn = group.pivot(index=["setting", "turn"], columns="algorithm", values="value")
        ratios = by_turn.div(by_turn["ours"], axis=0).drop(columns="ours").dropna(axis=1)
        settings = list(dict.fromkeys(group["setting"]))[::-1]
        for number, name in enumerate(ratios):
            each = ratios[name].groupby("setting").agg(["median", "min", "max"]).loc[settings]
            heights_of_bars = np.arange(len(settings)) - (number - (ratios.shape[1] - 1) / 2) * 0.4
            whiskers = [each["median"] - each["min"], each["max"] - each["median"]]
            style = {"color": COLORS[number], "height": 0.36, "label": f"{name} / ours", "error_kw": {"ecolor": "grey"}}
            axis.barh(heights_of_bars, each["median"], xerr=whiskers, **style)
        axis.axvline(1, color="black", lw=1)
        axis.set(title=titles[measure], yticks=range(len(settings)), yticklabels=settings)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set(xlabel="times as long as this package (bars: median of rounds; whiskers: smallest and largest)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _points(result: Result) -> np.ndarray:
    """Time steps, evenly spread over a run, at which its curves are drawn."""
    return np.linspace(0, result.updates["timesteps"].max(), N_POINTS + 1)[1:]


def _latest(result: Result, column: str, steps: np.ndarray) -> np.ndarray:
    """An update's value from its time step on, NaN before the first."""
    row = np.searchsorted(result.updates["timesteps"], steps, side="right") - 1
    return np.where(row >= 0, result.updates[column].to_numpy()[np.maximum(row, 0)], np.nan)


def _axes_of(cells: Mapping[tuple[str, str], Any]) -> tuple[list[str], list[str]]:
    """Environments and variants, in their order."""
    envs, variants = zip(*cells, strict=True)
    return list(dict.fromkeys(envs)), list(dict.fromkeys(variants))


def _panels(
    envs: Sequence[str], width: float = 4.2, height: float = 3.2, **shared: Any
) -> tuple[Figure, list[tuple[str, Axes]]]:
    n_columns = min(len(envs), 4)
    n_rows = -(-len(envs) // n_columns)
    size = (width * n_columns + 1.4, height * n_rows + 0.4)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False, **shared)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(envs) :]:
        axis.set_visible(False)
    return figure, list(zip(envs, axes.flat, strict=False))


def _band(axis: Axes, steps: np.ndarray, curves: np.ndarray, label: str, styles: Styles) -> None:
    known = ~np.isnan(curves).any(axis=0)
    if known.any():
        mean, low, high = curve_band(curves[:, known])
        axis.plot(steps[known], mean, label=label, **styles[label])
        axis.fill_between(steps[known], low, high, color=styles[label]["color"], alpha=0.15, lw=0)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), frameon=False, loc="outside right center")


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize="medium", color="grey")
    figure.savefig(path, dpi=110)
    plt.close(figure)
