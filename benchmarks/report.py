"""Tables and figures of results."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from benchmarks.provenance import provenance
from benchmarks.runs import EPISODES, Result

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, told apart by colour-blind readers too."""


def table(results: Sequence[Result]) -> str:
    """
    One row a variant, over its seeds.

    :param results: of all variants and seeds
    :return: Markdown, which reads well in a terminal too
    """
    rows = []
    for variant, group in _by_variant(results).items():
        solved = [result.steps_to_solve for result in group if result.steps_to_solve is not None]
        updates = pd.concat([result.updates for result in group])
        rows.append(
            (
                variant,
                _mean_and_range([result.final_return for result in group], "{:.1f}"),
                f"{updates['kl'].mean():.4f}",
                _mean_and_range([float(result.updates["kl_coef"].iloc[-1]) for result in group], "{:.2g}"),
                _mean_and_range(solved, "{:,.0f}") if solved else "-",
                f"{len(solved)} of {len(group)}",
            )
        )
    header = ("variant", f"final return ({EPISODES} episodes)", "KL an update", "beta at the end", "steps to solve", "solved")
    return markdown([header, *rows])


def write_report(results: Sequence[Result], folder: Path) -> None:
    """
    Write everything about some results into a folder.

    ``report.md`` (table, and where the results come from), ``learning_curves.png``, ``episodes.csv`` and
    ``updates.csv`` (the raw results).

    :param results: of all variants and seeds, of one environment
    :param folder: an existing folder
    """
    for name in ("episodes", "updates"):
        frames = {(result.run.env_id, result.run.variant, result.run.seed): getattr(result, name) for result in results}
        raw = pd.concat(frames, names=["env_id", "variant", "seed", "row"]).droplevel("row")
        raw.to_csv(folder / f"{name}.csv", float_format="%.6g")
    learning_curves(results, folder / "learning_curves.png")
    origin = "\n".join(f"- {key}: {value}" for key, value in provenance().items())
    arguments = {result.run.variant: result.run.arguments for result in results}
    variants = "\n".join(f"- {variant}: `{kwargs}`" for variant, kwargs in arguments.items())
    title = f"# {results[0].run.env_id}: {', '.join(arguments)}"
    text = f"{title}\n\n{table(results)}\n\n![Learning curves](learning_curves.png)\n\n{origin}\n\nArguments:\n\n{variants}\n"
    (folder / "report.md").write_text(text, encoding="utf-8")


def learning_curves(results: Sequence[Result], path: Path, n_points: int = 200) -> None:
    """
    Return, KL and beta against time steps, the mean of each variant's seeds with their range.

    :param results: of all variants and seeds, of one environment
    :param path: the PNG
    :param n_points: points a curve
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    steps = np.linspace(0, max(result.run.timesteps for result in results), n_points)
    for color, (variant, group) in zip(itertools.cycle(COLORS), _by_variant(results).items(), strict=False):
        returns = [_resampled(steps, result.episodes["timesteps"], _smoothed_returns(result)) for result in group]
        _band(axes[0], steps, returns, variant, color)
        for axis, column in ((axes[1], "kl"), (axes[2], "kl_coef")):
            curves = [_resampled(steps, result.updates["timesteps"], result.updates[column]) for result in group]
            if column == "kl" or np.nanmax(curves) > 0:
                _band(axis, steps, curves, variant, color)
    env_id, n_seeds = results[0].run.env_id, len({result.run.seed for result in results})
    axes[0].set(title=f"{env_id}: return (mean of {EPISODES} episodes)", xlabel="time steps", ylim=(0, None))
    axes[1].set(title="exact KL(old || new) of each update", xlabel="time steps", ylabel="nats", yscale="log")
    axes[2].set(title="coefficient beta of the KL penalty", xlabel="time steps", yscale="log")
    targets = {result.run.arguments["kl_target"] for result in results if "kl_target" in result.run.arguments}
    for target in targets:
        axes[1].axhline(target, color="grey", linestyle=":", label="target of adaptive_kl")
    for axis in axes:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Lines: mean of {n_seeds} seeds; bands: their range", fontsize="medium", color="grey")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    variants = dict.fromkeys(result.run.variant for result in results)
    return {variant: [result for result in results if result.run.variant == variant] for variant in variants}


def _smoothed_returns(result: Result) -> "pd.Series[float]":
    return result.episodes["episode_return"].rolling(EPISODES, min_periods=1).mean()


def _resampled(steps: np.ndarray, timesteps: "pd.Series[int]", values: "pd.Series[float]") -> np.ndarray:
    """The curve's value at each of ``steps``: the latest one, NaN before the first."""
    latest = np.searchsorted(timesteps.to_numpy(), steps, side="right") - 1
    return np.where(latest >= 0, values.to_numpy()[np.maximum(latest, 0)], np.nan)


def _band(axis: Axes, steps: np.ndarray, curves: list[np.ndarray], label: str, color: str) -> None:
    known = ~np.isnan(curves).any(axis=0)
    axis.plot(steps[known], np.mean(curves, axis=0)[known], label=label, color=color)
    axis.fill_between(steps[known], np.min(curves, axis=0)[known], np.max(curves, axis=0)[known], color=color, alpha=0.2, lw=0)


def _mean_and_range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    mean = form.format(float(np.mean(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


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


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """A table, with its header as the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
