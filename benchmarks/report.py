"""The report of a comparison: tables, warnings, figures and CSV files, all from its results."""

import functools
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import figures
from benchmarks.grid import Grid
from benchmarks.result import EPISODES, FINAL, Result, write_whole
from benchmarks.stats import (
    CONFIDENCE,
    Estimate,
    holm,
    improvement_estimate,
    iqm,
    iqm_estimate,
    p_value,
    smallest_p_value,
)
from benchmarks.tables import markdown
from benchmarks.training import random_return
from benchmarks.variants import BASELINE, VARIANTS

WAY = 0.9
"""From random actions to the baseline's final return: the threshold of tasks that have none."""
ALL = "all"
"""In place of an environment's name."""


class Comparison:
    """
    Results by environment and variant, and what follows from them.

    :param grid: what was compared
    :param results: of the runs that have been finished
    :param random: mean return of random actions, by environment
    """

    def __init__(self, grid: Grid, results: Sequence[Result], random: Mapping[str, float]) -> None:
        self.grid = grid
        self.random = random
        self.cells: dict[tuple[str, str], list[Result]] = {}
        for env in grid.envs:
            for variant in grid.variants:
                own = [result for result in results if (result.job.env, result.job.variant) == (env, variant)]
                if own:
                    self.cells[env, variant] = own
        self.envs = [env for env in grid.envs if any(env == each for each, _ in self.cells)]
        self.variants = [variant for variant in grid.variants if any(variant == each for _, each in self.cells)]
        self.baseline = BASELINE if BASELINE in self.variants else self.variants[0]
        # Without those of runs in which no episode has ended, of which `write_report` warns.
        finals = {key: np.array([result.final_return for result in own]) for key, own in self.cells.items()}
        self.finals = {key: values[~np.isnan(values)] for key, values in finals.items() if not np.isnan(values).all()}
        self.jobs = self._jobs()

    def _threshold(self, env: str) -> tuple[float, bool]:
        """The return that counts as solved, and whether it is the task's own and not made from the baseline's."""
        result = next(own[0] for (each, _), own in self.cells.items() if each == env)
        if result.threshold is not None:
            return result.threshold, True
        reached = float(iqm(self.finals.get((env, self.baseline), np.array([np.nan]))))
        return self.random[env] + WAY * (reached - self.random[env]), False

    def _jobs(self) -> pd.DataFrame:
        """One row a run."""
        rows = [
            {
                "env": env,
                "variant": variant,
                "seed": result.job.seed,
                "timesteps": result.updates["timesteps"].max(),
                "final_return": result.final_return,
                "threshold": threshold,
                "steps_to_threshold": (result.steps_to_solve if tasks_own else result.steps_to_return)(threshold),
                "median_kl": result.updates["kl"].median(),
                "last_kl_coef": result.updates["kl_coef"].iloc[-1],
                "mean_clip_fraction": result.updates["clip_fraction"].mean(),
                "wall_time": result.wall_time,
                "steps_per_second": result.updates["timesteps"].max() / result.wall_time,
            }
            for (env, variant), own in self.cells.items()
            for threshold, tasks_own in [self._threshold(env)]
            for result in own
        ]
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """One row an environment (or all) and variant; intervals are 95 %."""
        rows = []
        for env, variant in self.cells:
            own = self.jobs[(self.jobs["env"] == env) & (self.jobs["variant"] == variant)]
            finals, theirs = self.finals.get((env, variant)), self.finals.get((env, self.baseline))
            row = {"env": env, "variant": variant, "n_seeds": len(own), "random_return": self.random[env]}
            if finals is not None:
                row |= _spread("final_return", iqm_estimate([finals]))
            if finals is not None and theirs is not None and variant != self.baseline:
                row |= _spread("improvement", improvement_estimate([finals], [theirs]))
            row |= dict(zip(("p_value", "p_corrected"), self.p_values.get((env, variant), ()), strict=False))
            steps = own["steps_to_threshold"]
            row |= {
                "threshold": own["threshold"].iloc[0],
                "n_solved": int(np.isfinite(steps).sum()),
                "median_steps": steps.median(),
            }
            row |= {
                name: own[name].median() for name in ("median_kl", "last_kl_coef", "mean_clip_fraction", "steps_per_second")
            }
            rows.append(row)
        scores = self.scores
        for variant in scores if len(self.envs) > 1 else ():
            row = {"env": ALL, "variant": variant, "n_seeds": min(map(len, scores[variant]))}
            row |= _spread("final_return", iqm_estimate(scores[variant]))
            if variant != self.baseline and self.baseline in scores:
                row |= _spread("improvement", improvement_estimate(scores[variant], scores[self.baseline]))
            rows.append(row)
        return pd.DataFrame(rows)

    @functools.cached_property
    def best(self) -> dict[str, float]:
        """The best run's final return, of the environments in which it is better than that of random actions."""
        best = {env: self.jobs["final_return"][self.jobs["env"] == env].max() for env in self.envs}
        return {env: value for env, value in best.items() if value > self.random[env]}

    @functools.cached_property
    def scores(self) -> dict[str, list[np.ndarray]]:
        """Normalised final returns of the variants that have run everywhere: 0 at random, 1 the best run."""
        return {
            variant: [
                (self.finals[env, variant] - self.random[env]) / (best - self.random[env]) for env, best in self.best.items()
            ]
            for variant in self.variants
            if self.best and all((env, variant) in self.finals for env in self.best)
        }

    @functools.cached_property
    def p_values(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Of each variant against the baseline: p, and p after Holm's correction for all variants on that environment."""
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for env in self.envs:
            if (env, self.baseline) in self.finals:
                others = [each for each in self.variants if (env, each) in self.finals and not self._is_baseline(env, each)]
                own = np.array([p_value(self.finals[env, each], self.finals[env, self.baseline]) for each in others])
                found |= {(env, each): pair for each, pair in zip(others, zip(own, holm(own), strict=True), strict=True)}
        return found

    def _is_baseline(self, env: str, variant: str) -> bool:
        """Also SB3's PPO with clip's settings: it is there to show that nothing differs."""
        if variant == self.baseline:
            return True
        job, baseline = (self.cells[env, each][0].job for each in (variant, self.baseline))
        same = {"algorithm": "ppo", "arguments": {**VARIANTS[BASELINE].arguments, **job.arguments}, "variant": self.baseline}
        return job.algorithm == "sb3_ppo" and job.model_copy(update=same) == baseline

    def alike(self) -> dict[str, list[str]]:
        """By environment, the variants that may as well be the baseline."""
        alike: dict[str, list[str]] = {}
        for (env, variant), (_, corrected) in self.p_values.items():
            if corrected > 1 - CONFIDENCE:
                alike.setdefault(env, []).append(variant)
        return alike

    @property
    def n_comparisons(self) -> int:
        """With the baseline on one environment, at most."""
        return max(sum(env == each for each, _ in self.p_values) for env in self.envs)


def write_report(grid: Grid, results: Sequence[Result], folder: Path, failed: Mapping[str, str]) -> str:
    """
    Write everything about a grid's results into a folder.

    ``report.md``; ``episodes.csv.gz`` and ``updates.csv.gz`` (the raw results, with each rollout's mean return), ``jobs.csv``
    (one row a run), ``summary.csv`` (the tables' numbers), and figures. They replace an earlier report when all are written.

    :param grid: what was compared
    :param results: of the runs that have been finished, at least one
    :param folder: an existing folder
    :param failed: runs that have failed, and why
    :return: the tables and warnings
    """
    comparison = Comparison(grid, results, _random_returns(results, folder))
    summary = comparison.summary()
    tables = "\n\n".join([*_tables(comparison, summary), *_claims(grid, results), *_warnings(comparison, failed)])
    title = grid.title or " on ".join(map(", ".join, (comparison.variants, comparison.envs)))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report") as new:
        _write_csv(comparison, summary, Path(new))
        names = _draw(comparison, summary, Path(new))
        pictures = "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in names)
        text = "\n\n".join([f"# {title}", tables, pictures, _explanations(comparison), _origin(results), _settings(grid)])
        (Path(new) / "report.md").write_text(text + "\n", encoding="utf-8")
        for file in Path(new).iterdir():
            file.replace(folder / file.name)
    return tables


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _write_csv(comparison: Comparison, summary: pd.DataFrame, folder: Path) -> None:
    runs = {(*key, result.job.seed): result for key, own in comparison.cells.items() for result in own}
    tables = {
        "episodes": {key: result.episodes for key, result in runs.items()},
        "updates": {key: result.updates.join(result.rollouts) for key, result in runs.items()},
    }
    for name, frames in tables.items():
        raw = pd.concat(frames, names=["env", "variant", "seed", "row"]).droplevel("row")
        # Without the time in the archive the same results make the same file.
        raw.to_csv(folder / f"{name}.csv.gz", float_format="%.8g", compression={"method": "gzip", "mtime": 1})
    comparison.jobs.to_csv(folder / "jobs.csv", index=False, float_format="%.8g")
    summary.to_csv(folder / "summary.csv", index=False, float_format="%.8g")


def _draw(comparison: Comparison, summary: pd.DataFrame, folder: Path) -> list[str]:
    """Draw the figures; return the names of those that there are."""
    styles = figures.styles_of(comparison.cells)
    figures.learning_curves(comparison.cells, styles, folder / "learning_curves.png")
    estimates = {
        (row["env"], row["variant"]): Estimate(row["improvement"], row["improvement_low"], row["improvement_high"])
        for _, row in summary.iterrows()
        if "improvement" in row and np.isfinite(row["improvement"])
    }
    if estimates:
        figures.improvement(estimates, comparison.baseline, styles, folder / "improvement.png")
    if len(comparison.envs) > 1 and comparison.scores:
        figures.profiles(comparison.scores, styles, folder / "profiles.png")
    figures.divergence(comparison.cells, styles, folder / "divergence.png")
    figures.efficiency(comparison.jobs, styles, folder / "efficiency.png")
    figures.all_seeds(comparison.cells, folder / "all_seeds.png")
    names = ("learning_curves", "improvement", "profiles", "divergence", "efficiency", "all_seeds")
    return [name for name in names if (folder / f"{name}.png").exists()]


def _tables(comparison: Comparison, summary: pd.DataFrame) -> list[str]:
    tables = []
    for env in comparison.envs:
        own = summary[summary["env"] == env]
        threshold = own["threshold"].iloc[0]
        header = (
            "variant",
            "final return",
            f"beats {comparison.baseline}",
            "p",
            "reached " + _number(threshold, ".4g"),
            "steps to it",
            "KL an update",
        )
        rows = [_row(row) for _, row in own.iterrows()]
        tables.append(f"## {env}\n\n{markdown([(*header, 'beta at the end', 'clip fraction', 'steps/s'), *rows])}")
    total = summary[summary["env"] == ALL]
    if len(total):
        rows = [
            (row["variant"], _interval(row, "final_return", ".3f"), _interval(row, "improvement", ".2f"))
            for _, row in total.iterrows()
        ]
        title = f"## {len(comparison.best)} environments together"
        tables.append(
            f"{title}\n\n{markdown([('variant', 'normalised final return', f'beats {comparison.baseline}'), *rows])}"
        )
    return tables


def _row(row: "pd.Series[float]") -> tuple[str, ...]:
    steps = row["median_steps"]
    return (
        str(row["variant"]),
        _interval(row, "final_return", ".4g"),
        _interval(row, "improvement", ".2f"),
        "<0.001" if row.get("p_corrected", 1.0) < 0.0005 else _number(row.get("p_corrected"), ".3f"),
        f"{row['n_solved']:.0f} of {row['n_seeds']:.0f}",
        f"{steps:,.0f}" if np.isfinite(steps) else "-",
        _number(row["median_kl"], ".2g"),
        _number(row["last_kl_coef"], ".2g"),
        _number(row["mean_clip_fraction"], ".2g"),
        _number(row["steps_per_second"], ",.0f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not np.isfinite(value) else format(value, form)


def _interval(row: "pd.Series[float]", name: str, form: str) -> str:
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    bounds = "" if low is None or not np.isfinite(low) else f" [{_number(low, form)}, {_number(high, form)}]"
    return _number(value, form) + bounds


def _claims(grid: Grid, results: Sequence[Result]) -> list[str]:
    rows = []
    for claim in grid.claims:
        values = claim.values(results)
        if len(values):
            low, middle, high = (_number(value, ".4g") for value in (values.min(), np.median(values), values.max()))
            bounds = {"at least": claim.at_least, "at most": claim.at_most}
            bound = " and ".join(f"{words} {value:g}" for words, value in bounds.items() if value is not None)
            measure = claim.measure.replace("_", " ") + ("" if claim.of_return is None else f" {claim.of_return:g}")
            wanted = f"{measure} {bound}, {'median' if claim.seeds == 'median' else 'all seeds'}"
            n_seeds, verdict = f"{grid.seeds} seeds", "yes" if claim.holds(values) else "no"
            if len(values) < grid.seeds:
                n_seeds, verdict = f"{len(values)} of {n_seeds}", "not all seeds yet"
            reached = f"{middle} ({low} to {high}, {n_seeds})"
            rows.append((claim.says, f"{claim.variant} on {claim.env}: {wanted}", reached, verdict))
    return (
        [f"## What was to be shown\n\n{markdown([('claim', 'here', 'reached (median, range)', 'holds'), *rows])}"]
        if rows
        else []
    )


def _warnings(comparison: Comparison, failed: Mapping[str, str]) -> list[str]:
    """What a reader should know before concluding anything."""
    texts = [f"{name} has failed: {error}" for name, error in failed.items()]
    counts = {len(own) for own in comparison.cells.values()}
    n_jobs = len(comparison.grid.jobs())
    missing = n_jobs - len(comparison.jobs)
    if missing:
        texts.append(f"{missing} of {n_jobs} runs are missing.")
    silent = comparison.jobs[comparison.jobs["final_return"].isna()]
    for (env, variant), own in silent.groupby(["env", "variant"], sort=False):
        texts.append(f"In {len(own)} runs of {variant} on {env} no episode has ended: they are left out.")
    unscaled = [env for env in comparison.envs if env not in comparison.best]
    if unscaled and len(comparison.envs) > 1:
        texts.append(
            f"No run is known to be better than random actions on {', '.join(unscaled)}: left out of what is said of all."
        )
    n_seeds, n_comparisons = min(counts), comparison.n_comparisons
    smallest = smallest_p_value(n_seeds, n_comparisons)
    if n_comparisons and smallest > 1 - CONFIDENCE:
        count = "1 seed is" if n_seeds == 1 else f"{n_seeds} seeds are"
        texts.append(
            f"{count} too few to tell variants apart: even if all runs of one beat all of the other, p is "
            f"{smallest:.2g}. Take at least {_enough_seeds(n_comparisons)}."
        )
    for env, variants in comparison.alike().items():
        texts.append(f"With these seeds {comparison.baseline} can't be told apart on {env} from: {', '.join(variants)}.")
    for key in ("commit", "machine"):
        values = dict.fromkeys(result.provenance[key] for own in comparison.cells.values() for result in own)
        if len(values) > 1:
            texts.append(f"The runs come from more than one {key}: {'; '.join(values)}.")
    if any("uncommitted" in result.provenance["commit"] for own in comparison.cells.values() for result in own):
        texts.append("There were uncommitted changes: these results can't be reproduced from the commit alone.")
    return ["## Read with care\n\n" + "\n".join(f"- {text}" for text in texts)] if texts else []


def _enough_seeds(n_comparisons: int) -> int:
    return next(n for n in itertools.count(1) if smallest_p_value(n, n_comparisons) <= 1 - CONFIDENCE)


def _explanations(comparison: Comparison) -> str:
    baseline = comparison.baseline
    return f"""## What the numbers mean

- final return: of a run, the mean of the training episodes that have ended in the last {FINAL:.0%} of its time steps (of the
  last episode, if none has); of a variant, the interquartile mean of its runs (of fewer than four: their mean), with the 95 %
  interval of a bootstrap over seeds, stratified by environment. Training episodes are played by the stochastic policy.
  With fewer than ten seeds these intervals are too short: of five normally distributed runs nine in ten cover the truth, of
  three three in four.
- beats {baseline}: the probability that a run drawn at random has a higher final return than one of {baseline}, with the same
  kind of interval. The closer to 0 or 1, the more these intervals are too short, and there is none at 0 and 1 themselves.
- p: what can be told apart from {baseline} is decided by p of a two-sided Mann-Whitney test, after Holm's correction for all
  variants on that environment: below 0.05, the chance that any of an environment's findings is false is at most 5 %. SB3's own
  PPO with {baseline}'s settings is the same algorithm, and isn't tested.
- reached: how many runs have reached a mean return, and after how many time steps (median). It is gymnasium's or the grid's,
  of {EPISODES} consecutive episodes; for tasks without one it is {WAY:.0%} of the way from random actions to {baseline}'s
  final return, over a tenth of the run's steps.
- KL an update: exact KL(old || new) of a whole update, in nats, median over updates, then over runs; beta at the end: the
  penalty's coefficient in the last update, median over runs; clip fraction: as SB3 logs it, mean over updates. SB3's own
  algorithms log no exact KL.
- steps/s: time steps a second of wall time, median; other runs on the same machine share its memory and caches.
- normalised: 0 is the mean return of random actions, 1 the best run's final return, so it depends on who takes part."""


def _origin(results: Sequence[Result]) -> str:
    """Where the results come from; they may have been computed in several goes."""
    lines = []
    for key in ("command", "commit", "date", "versions", "machine"):
        values = dict.fromkeys(result.provenance[key] for result in results)
        lines.append(f"- {key}: " + "; ".join(f"`{value}`" if key == "command" else value for value in values))
    return "## Where they come from\n\n" + "\n".join(lines)


def _random_returns(results: Sequence[Result], folder: Path) -> dict[str, float]:
    """Of each environment, kept for the next report."""
    file = folder / "random_returns.json"
    try:
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:  # damaged
        known = {}
    new = {result.job.env: result.job for result in results if result.job.env not in known}
    if new:
        known |= {env: random_return(job) for env, job in new.items()}
        write_whole(file, json.dumps(known, indent=1))
    return known


def _settings(grid: Grid) -> str:
    """Of each task and variant, what isn't the algorithm's default."""
    jobs = {(job.env, job.variant): job for job in grid.jobs() if job.seed == 0}
    rows = [("env", "variant", "algorithm", "time steps", "environments", "arguments")]
    for (env, variant), job in jobs.items():
        more = {"policy": job.policy, "normalize": job.normalize, "terminal_time_limits": job.terminal_time_limits}
        more |= {"env_kwargs": job.env_kwargs, "threshold": job.threshold}
        unusual = {name: value for name, value in more.items() if value and value != "MlpPolicy"}
        arguments = {**job.arguments, **job.callbacks, **unusual}
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        rows.append((env, variant, job.algorithm, f"{job.timesteps:,}", str(job.n_envs), f"`{shown}`" if shown else "-"))
    return f"## Settings\n\n{markdown(rows)}"
