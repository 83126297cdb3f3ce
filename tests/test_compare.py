"""The comparison as a user runs it, shortened: a grid, its interruption, its report recomputed from its CSV files."""

import io
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks import compare, report, result, scheduling
from benchmarks.compare import main
from benchmarks.grid import GridError, included, make_grid, read_grid
from benchmarks.job import Job
from benchmarks.result import Folder
from benchmarks.training import make_env, make_model
from benchmarks.variants import VARIANTS

SEEDS = range(5)
GRID = {
    "envs": {"CartPole-v1": {"timesteps": 1500, "n_envs": 2}, "Pendulum-v1": {"timesteps": 1200}},
    "variants": {"clip": None, "adaptive_kl": {"arguments": {"kl_target": 0.02}}, "sb3_ppo": None, "a2c": None},
    "seeds": len(SEEDS),
    "arguments": {"n_steps": 256, "batch_size": 128, "n_epochs": 2, "learning_rate": "lin_1e-3"},
}


CLAIM = {"says": "so", "env": "CartPole-v1", "variant": "clip", "measure": "best_return", "at_least": 1}


def write_grid(folder: Path, content: Any = GRID) -> Path:
    path = folder / "grid.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    assert main(["--grid", str(write_grid(folder)), "--output", str(folder / "results"), "--jobs", "2"]) == 0
    return folder / "results"


def cells(frame: pd.DataFrame, env: str, variant: str) -> pd.DataFrame:
    return frame[(frame["env"] == env) & (frame["variant"] == variant)]


def test_every_job_has_kept_its_result(output: Path) -> None:
    files = sorted(str(path.relative_to(output / "jobs")) for path in (output / "jobs").rglob("*.*"))
    variants = sorted(GRID["variants"])
    envs = sorted(GRID["envs"])
    assert files == [f"{env}/{variant}/seed_{seed}.json" for env in envs for variant in variants for seed in SEEDS]
    kept = json.loads((output / "jobs/CartPole-v1/adaptive_kl/seed_1.json").read_text())
    assert kept["job"]["arguments"] == {
        **GRID["arguments"],
        **{"clip_range": None, "kl_coef": "auto", "kl_target": 0.02},
    }
    assert set(kept["provenance"]) == {"command", "commit", "date", "versions", "machine"}
    assert kept["wall_time"] > 0
    # Three rollouts of 2 x 256 steps; the last update's learning rate is 0.
    assert kept["updates"]["timesteps"] == [512, 1024, 1536]
    assert all(kl > 0 for kl in kept["updates"]["kl"][:2])
    assert kept["updates"]["kl_coef"][0] == 1.0
    lengths, returns = kept["episodes"]["length"], kept["episodes"]["episode_return"]
    assert lengths == returns
    assert sum(lengths) <= 1536


def test_sb3s_control_trains_the_same(output: Path) -> None:
    """To the last bit; it doesn't tell the exact KL."""
    ours, theirs = (json.loads((output / f"jobs/Pendulum-v1/{name}/seed_0.json").read_text()) for name in ("clip", "sb3_ppo"))
    assert ours["episodes"] == theirs["episodes"]
    assert ours["updates"]["clip_fraction"] == theirs["updates"]["clip_fraction"]
    assert theirs["updates"]["kl"] == [None] * 5


def interquartile_mean_of_five(values: list[float]) -> float:
    """A quarter of five is one on both sides."""
    return sum(sorted(values)[1:4]) / 3


def resampled(rng: np.random.Generator, *samples: list[float]) -> Iterator[list[np.ndarray]]:
    for _ in range(3000):
        yield [rng.choice(sample, len(sample)) for sample in samples]


def steps_to(threshold: float, episodes: pd.DataFrame, env: str) -> float:
    """Of 100 episodes on CartPole, of a tenth of the run's 1,280 steps on Pendulum."""
    returns = episodes["episode_return"].to_list()
    for number, end in enumerate(episodes["timesteps"], 1):
        last = (
            returns[number - 100 : number]
            if env == "CartPole-v1"
            else [each for each, its_end in zip(returns, episodes["timesteps"], strict=True) if end - 128 < its_end <= end]
        )
        if (number >= 100 if env == "CartPole-v1" else end >= 128) and sum(last) / len(last) >= threshold:
            return float(end)
    return np.inf


def alike(report: str, env: str) -> list[str]:
    told = re.search(rf"clip can't be told apart on {env} from: (.*)\.", report)
    return told[1].split(", ") if told else []


def table_of(output: Path, env: str) -> pd.DataFrame:
    """The report's, as text."""
    part = (output / "report.md").read_text().split(f"## {env}\n")[1].split("\n## ")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if "|" in line]
    return pd.DataFrame(rows, columns=header).set_index("variant")


def test_the_reports_numbers_can_be_recomputed(output: Path) -> None:
    """From the raw episodes and updates alone, by other means."""
    episodes, updates = (pd.read_csv(output / f"{name}.csv.gz") for name in ("episodes", "updates"))
    jobs = pd.read_csv(output / "jobs.csv").set_index(["env", "variant", "seed"])
    summary = pd.read_csv(output / "summary.csv").set_index(["env", "variant"])
    rng = np.random.default_rng(0)
    finals: dict[tuple[str, str], list[float]] = {}
    for env, variant, seed in itertools.product(GRID["envs"], GRID["variants"], SEEDS):
        own = cells(episodes, env, variant).query(f"seed == {seed}")
        end = cells(updates, env, variant).query(f"seed == {seed}")["timesteps"].iloc[-1]
        late = own[own["timesteps"] > 0.9 * end]["episode_return"].to_numpy()
        late = late if len(late) else own["episode_return"].to_numpy()[-1:]
        finals.setdefault((env, variant), []).append(sum(late) / len(late))
        assert jobs.loc[env, variant, seed]["final_return"] == pytest.approx(finals[env, variant][-1], rel=1e-6)
        start = 0
        for row in cells(updates, env, variant).query(f"seed == {seed}").itertuples():
            ended = own[(start < own["timesteps"]) & (own["timesteps"] <= row.timesteps)]["episode_return"]
            assert row.episodes == len(ended)
            assert row.mean_return == pytest.approx(ended.mean(), rel=1e-6, nan_ok=True)
            start = row.timesteps
    for env in GRID["envs"]:
        table = table_of(output, env)
        for variant in GRID["variants"]:
            mine, clips, row, told = finals[env, variant], finals[env, "clip"], summary.loc[env, variant], table.loc[variant]
            mean = interquartile_mean_of_five(mine)
            assert row["final_return"] == pytest.approx(mean, rel=1e-6)
            assert told["final return"].startswith(f"{mean:.4g} [")
            bounds = np.quantile([interquartile_mean_of_five(list(own)) for (own,) in resampled(rng, mine)], [0.025, 0.975])
            spread = max(mine) - min(mine)
            assert (row["final_return_low"], row["final_return_high"]) == pytest.approx(
                tuple(bounds), abs=0.05 * spread + 1e-9
            )
            own_updates = cells(updates, env, variant).groupby("seed")
            for column, name, form, over_updates in (
                ("kl", "KL an update", ".2g", "median"),
                ("kl_coef", "beta at the end", ".2g", "last"),
                ("clip_fraction", "clip fraction", ".2g", "mean"),
            ):
                number = getattr(own_updates[column], over_updates)().median()
                assert told[name] == ("-" if np.isnan(number) else f"{number:{form}}"), (env, variant, name)
            if variant == "clip":
                assert (told["beats clip"], told["p"]) == ("-", "-")
                continue
            beaten = np.mean([(a > b) + (a == b) / 2 for a in mine for b in clips])
            assert row["improvement"] == pytest.approx(beaten)
            assert told["beats clip"].startswith(f"{beaten:.2f} [")
            chances = [np.mean([(a > b) + (a == b) / 2 for a in x for b in y]) for x, y in resampled(rng, mine, clips)]
            low, high = np.quantile(chances, [0.025, 0.975])
            assert (row["improvement_low"], row["improvement_high"]) == pytest.approx((low, high), abs=0.06)


@pytest.mark.parametrize("env", GRID["envs"])
def test_p_values_can_be_recomputed(output: Path, env: str) -> None:
    finals = pd.read_csv(output / "jobs.csv").set_index(["env", "variant"])["final_return"]
    summary, table = pd.read_csv(output / "summary.csv").set_index(["env", "variant"]).loc[env], table_of(output, env)
    p_values = {}
    for variant in ("adaptive_kl", "a2c"):
        # By counting: in how many of all orders of the ten runs are clip's ranks as uneven, or more?
        ranks = pd.Series([*finals[env, variant], *finals[env, "clip"]]).rank().to_numpy()
        uneven = [abs(sum(ranks[list(rows)]) - 27.5) for rows in itertools.combinations(range(10), 5)]
        p_values[variant] = np.mean([each >= uneven[0] - 1e-9 for each in uneven])
        assert summary["p_value"][variant] == pytest.approx(p_values[variant])
    # Holm's correction of two.
    first, second = sorted(p_values, key=lambda variant: p_values[variant])
    corrected = {first: min(1, 2 * p_values[first]), second: max(p_values[second], min(1, 2 * p_values[first]))}
    for variant, p in corrected.items():
        assert summary["p_corrected"][variant] == pytest.approx(p)
        assert table["p"][variant] == f"{p:.3f}"
        assert (p > 0.05) == (variant in alike((output / "report.md").read_text(), env))
    assert table["p"]["sb3_ppo"] == "-"  # the control
    assert table["beats clip"]["sb3_ppo"].startswith("0.50 [")


@pytest.mark.parametrize("env", GRID["envs"])
def test_steps_to_thresholds_can_be_recomputed(output: Path, env: str) -> None:
    episodes, jobs = pd.read_csv(output / "episodes.csv.gz"), pd.read_csv(output / "jobs.csv").set_index(["env", "variant"])
    summary, table = pd.read_csv(output / "summary.csv").set_index(["env", "variant"]).loc[env], table_of(output, env)
    # CartPole's own threshold; Pendulum has none: nine tenths of the way from random actions to what clip ends at.
    random = summary["random_return"]["clip"]
    reached = interquartile_mean_of_five(jobs.loc[env, "clip"]["final_return"].to_list())
    threshold = 475 if env == "CartPole-v1" else random + 0.9 * (reached - random)
    for variant in GRID["variants"]:
        assert summary["threshold"][variant] == pytest.approx(threshold, rel=1e-6)
        steps = [steps_to(threshold, cells(episodes, env, variant).query(f"seed == {seed}"), env) for seed in SEEDS]
        assert jobs.loc[env, variant]["steps_to_threshold"].to_list() == steps
        assert table[f"reached {threshold:.4g}"][variant] == f"{np.isfinite(steps).sum()} of 5"
        assert table["steps to it"][variant] == (f"{np.median(steps):,.0f}" if np.isfinite(np.median(steps)) else "-")
        speed = (jobs.loc[env, variant]["timesteps"] / jobs.loc[env, variant]["wall_time"]).median()
        assert table["steps/s"][variant] == f"{speed:,.0f}"


def test_normalised_scores_can_be_recomputed(output: Path) -> None:
    summary = pd.read_csv(output / "summary.csv").set_index(["env", "variant"])
    jobs = pd.read_csv(output / "jobs.csv")
    random = {env: summary.loc[env, "clip"]["random_return"] for env in GRID["envs"]}
    assert random["Pendulum-v1"] == pytest.approx(-1200, abs=150)  # as everybody finds
    assert random["CartPole-v1"] == pytest.approx(22, abs=6)
    scores: dict[str, list[float]] = {}
    for name, own in jobs.groupby("env"):
        best = own["final_return"].max()
        for _, row in own.iterrows():
            scores.setdefault(row["variant"], []).append((row["final_return"] - random[name]) / (best - random[name]))
    for variant, values in scores.items():
        expected = np.mean(sorted(values)[2:8])  # of ten, a quarter is two on both sides
        assert summary.loc["all", variant]["final_return"] == pytest.approx(expected, rel=1e-5)


def test_the_report_says_where_it_comes_from_and_what_it_cannot_tell(output: Path) -> None:
    report = (output / "report.md").read_text()
    for key in ("command", "commit", "date", "versions", "machine"):
        assert f"\n- {key}: " in report
    assert "adaptive_kl" in alike(report, "Pendulum-v1")
    assert "| Pendulum-v1" in report.split("## Settings")[1]
    assert "too few" not in report


def test_the_report_warns_of_few_seeds_and_of_several_commits(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "results", ignore=shutil.ignore_patterns("seed_[3-9]*", "tensorboard"))
    file = tmp_path / "results/jobs/CartPole-v1/clip/seed_0.json"
    content = json.loads(file.read_text())
    content["provenance"]["commit"] = "0123456789"
    file.write_text(json.dumps(content))
    grid = str(output.parent / "grid.yaml")
    assert main(["--grid", grid, "--output", str(tmp_path / "results"), "--seeds", "3", "--no-tensorboard"]) == 0
    report = (tmp_path / "results/report.md").read_text()
    # Of three and three runs, the best order has the probability 1 / 20 on both sides; there are two comparisons. Of five
    # and five it has 1 / 252, and of four and four 1 / 70.
    assert (
        "3 seeds are too few to tell variants apart: even if all runs of one beat all of the other, p is 0.2. "
        "Take at least 5." in report
    )
    assert "The runs come from more than one commit: " in report


def test_figures_are_pictures(output: Path) -> None:
    report = (output / "report.md").read_text()
    names = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert names == [
        f"{name}.png" for name in ("learning_curves", "improvement", "profiles", "divergence", "efficiency", "all_seeds")
    ]
    for name in names:
        with Image.open(output / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_tensorboard_has_one_run_a_job(output: Path) -> None:
    folders = {str(path.parent.relative_to(output / "tensorboard")) for path in output.rglob("events.out.*")}
    assert folders == {
        f"{env}/{variant}/seed_{seed}_1" for env in GRID["envs"] for variant in GRID["variants"] for seed in SEEDS
    }
    scalars = EventAccumulator(str(output / "tensorboard/CartPole-v1/adaptive_kl/seed_0_1")).Reload()
    assert [each.step for each in scalars.Scalars("train/kl")] == [1024, 1536, 1536]  # SB3 writes them a rollout late
    scalars = EventAccumulator(str(output / "tensorboard/CartPole-v1/a2c/seed_0_1")).Reload()
    assert scalars.Scalars("rollout/ep_rew_mean")[-1].step == 1500


def test_the_same_command_again_trains_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    summary = (output / "summary.csv").read_bytes()
    monkeypatch.setattr(compare, "run_jobs", None)
    assert main(["--grid", str(output.parent / "grid.yaml"), "--output", str(output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == before
    assert (output / "summary.csv").read_bytes() == summary


def strip_times(folder: Path) -> dict[str, Any]:
    """What doesn't depend on the clock."""
    contents = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("seed_*.json")}
    return {name: [content["job"], content["episodes"], content["updates"]] for name, content in contents.items()}


@pytest.mark.slow
def test_goes_on_after_kill_9(tmp_path: Path) -> None:
    """Of the command alone, in the middle of a grid; the results are those of a grid that wasn't interrupted."""
    content = {**GRID, "envs": {"CartPole-v1": {"timesteps": 20_000}}, "variants": ["clip", "none"], "seeds": 4}
    command = ["-m", "benchmarks.compare", "--grid", str(write_grid(tmp_path, content)), "--jobs", "2", "--no-tensorboard"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*command[2:], "--output", str(whole)]) == 0

    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    arguments = [sys.executable, *command, "--output", str(broken)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(broken.rglob("seed_*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    # The processes that it has started end with it: nobody writes there any more.
    time.sleep(2)
    finished = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    assert 0 < len(list(broken.rglob("seed_*.json"))) < 8
    time.sleep(2)
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("*")} == finished
    assert main([*command[2:], "--output", str(broken)]) == 0
    assert strip_times(broken) == strip_times(whole)
    for name in ("summary.csv", "episodes.csv.gz", "updates.csv.gz"):
        frames = [pd.read_csv(folder / name).drop(columns="steps_per_second", errors="ignore") for folder in (whole, broken)]
        pd.testing.assert_frame_equal(*frames)
    assert not list(broken.rglob(".seed_*"))


def small(
    tmp_path: Path, *more: str, env: Sequence[str] = ("CartPole-v1",), variants: Sequence[str] = ("clip", "none")
) -> list[str]:
    flags = ["--env", *env, "--variants", *variants, "--seeds", "1", "--timesteps", "300", "--no-tensorboard"]
    return [*flags, "--set", "n_steps=128", "--backend", "sequential", "--output", str(tmp_path / "results"), *more]


def test_a_job_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import training

    original = training.train

    def train(job: Any, *args: Any) -> Any:
        if job.variant == "none":
            raise RuntimeError("the lights went out")
        return original(job, *args)

    monkeypatch.setattr(training, "train", train)
    assert main(small(tmp_path)) == 1
    printed = capsys.readouterr()
    assert "CartPole-v1/none/seed_0 has failed: RuntimeError: the lights went out" in printed.out + printed.err
    assert "the lights went out" in (tmp_path / "results/jobs/CartPole-v1/none/seed_0.error.txt").read_text()
    report = (tmp_path / "results/report.md").read_text()
    assert "- CartPole-v1/none/seed_0 has failed: RuntimeError: the lights went out" in report
    assert "(traceback: jobs/CartPole-v1/none/seed_0.error.txt)" in report
    assert "1 of 2 runs are missing" in report

    monkeypatch.setattr(training, "train", original)
    assert main(small(tmp_path)) == 0
    assert [path.name for path in (tmp_path / "results/jobs/CartPole-v1/none").iterdir()] == ["seed_0.json"]


def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The jobs whose results can't be written have failed; what was there before stays."""
    assert main(small(tmp_path, variants=["clip"])) == 0
    kept = (tmp_path / "results/jobs/CartPole-v1/clip/seed_0.json").read_bytes()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result.os, "replace", full)
    assert main([*small(tmp_path), "--seeds", "2"]) == 1
    printed = capsys.readouterr()
    for job in ("none/seed_0", "none/seed_1", "clip/seed_1"):
        assert f"CartPole-v1/{job} has failed: OSError: [Errno 28] No space left on device" in printed.out + printed.err
    files = [path for path in (tmp_path / "results/jobs").rglob("*") if path.is_file()]
    assert files == [tmp_path / "results/jobs/CartPole-v1/clip/seed_0.json"]
    assert files[0].read_bytes() == kept
    monkeypatch.setattr(result.os, "replace", replace)
    assert main([*small(tmp_path), "--seeds", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--env is missing"),
        (["--env", "CartPole"], "environment CartPole: name its version, as in CartPole-v1"),
        (["--env", "CartPole-v1", "--set", "n_steps=2020-13-45"], "--set n_steps=2020-13-45: the value is no YAML"),
        (["--env", "CartPol-v1"], "unknown environment: Environment `CartPol` doesn't exist. Did you mean: `CartPole`?"),
        (["--env", "CartPole-v1", "--variants", "clipp"], "unknown variant: 'clipp'; did you mean 'clip'?"),
        (["--env", "CartPole-v1", "--set", "n_step=3"], "unknown argument of clip: 'n_step'; did you mean 'n_steps'?"),
        (
            ["--env", "CartPole-v1", "--set", "clip:kl_targe=3"],
            "unknown argument of clip: 'kl_targe'; did you mean 'kl_target'?",
        ),
        (["--env", "CartPole-v1", "--set", "none:n_steps=3"], "unknown variant in --set: 'none'"),
        (["--env", "CartPole-v1", "--set", "n_steps"], "--set n_steps: must be of the form argument=value"),
        (["--env", "CartPole-v1", "--set", "kl_target=-1"], "`kl_target` makes adaptive_kl what it is"),
        (
            ["--env", "CartPole-v1", "--set", "clip:kl_target=-1"],
            "clip on CartPole-v1: `kl_target` must be a finite number > 0",
        ),
        (["--env", "CartPole-v1", "--set", "n_steps=[1]"], "clip on CartPole-v1: "),
        (["--preset", "z"], "unknown preset: 'z'; it must be one of a, b"),
        (["--env", "CartPole-v1", "--set", "n_steps=["], "--set n_steps=[: the value is no YAML"),
        (["--env", "CartPole-v1", "--set", "seed=3"], "unknown argument of clip: 'seed'"),
        (["--env", "tests.no_such_module:X-v0"], "environment tests.no_such_module:X-v0"),
        (["--env", "Dull-v0", "--video"], "environment Dull-v0 can't be recorded"),
        (["--grid", "/nowhere/grid.yaml"], "/nowhere/grid.yaml: No such file or directory"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--output", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results" / "jobs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "0"],
        ["--timesteps", "-1"],
        ["--timesteps", "1e5"],
        ["--output", ""],
        ["--n-envs", "x"],
        ["--backend", "dask"],
        ["--nonsense"],
    ],
)
def test_bad_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--env", "CartPole-v1", *arguments])
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a: [", "grid.yaml: not YAML"),
        ("title: 0x_", "grid.yaml: not YAML"),
        ("title: " + "[" * 5000, "grid.yaml: not YAML: too many levels"),
        (
            {**GRID, "envs": {"CartPole-v1": {"env_kwargs": {"day": date(2020, 1, 1)}}}},
            "and datetime.date(2020, 1, 1) is a date",
        ),
        ("- 3", "grid.yaml: must be a mapping with the keys title, envs"),
        ("seeds: 1\nseeds: 2", "'seeds' stands there twice"),
        ("envs: [CartPole-v1, [a, b]]", "`envs` must be a list of names, or a mapping"),
        ("envs: [CartPole-v1]\narguments: &x {policy_kwargs: *x}", "something contains itself"),
        ({**GRID, "variants": {"../x": {"of": "clip"}}}, "`variants.../x.[key]`: string should match pattern"),
        ({**GRID, "envs": {"CartPole-v1": {"threshold": float("nan")}}}, "`envs.CartPole-v1.threshold"),
        ({**GRID, "seed": 3}, "`seed`: unknown key: 'seed'; did you mean 'seeds'?"),
        ({**GRID, "seeds": 0}, "`seeds`: input should be greater than 0, not 0"),
        ({**GRID, "seeds": "three"}, "`seeds`: input should be a valid integer, not 'three'"),
        ({**GRID, "envs": {}}, "`envs`: dictionary should have at least 1 item"),
        (
            {**GRID, "envs": {"CartPole-v1": {"timestep": 3}}},
            "`envs.CartPole-v1.timestep`: unknown key: 'timestep'; did you mean",
        ),
        ({**GRID, "variants": {"mine": {"arguments": {}}}}, "unknown variant: 'mine'"),
        ({**GRID, "variants": {"clip": {"argument": {}}}}, "`variants.clip.argument`: unknown key: 'argument'; did you mean"),
        ({**GRID, "variants": {"a2c": {"arguments": {"clip_range": 0.1}}}}, "unknown argument of a2c: 'clip_range'"),
        ({**GRID, "variants": {"clip": {"callbacks": {"Stop": {}}}}}, "`callbacks` must be among"),
        ({**GRID, "variants": {"clip": {"arguments": {"policy_kwargs": {"activation_fn": "Relu"}}}}}, "activation_fn"),
        ({"variants": GRID["variants"]}, "--env is missing"),
        ({**GRID, "claims": [{**CLAIM, "env": "CartPol-v1"}]}, "unknown env in claims: 'CartPol-v1'; did you mean"),
        ({**GRID, "claims": [{**CLAIM, "variant": "clipp"}]}, "unknown variant in claims: 'clipp'; did you mean 'clip'?"),
        ({**GRID, "arguments": {"n_episodes": 2}}, "`n_episodes` is unknown to sb3_ppo, which would be no control"),
    ],
)
def test_bad_grids(change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--grid", str(write_grid(tmp_path, change)), "--output", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results" / "jobs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": [1]}, "`arguments`: input should be a valid dictionary, not [1]"),
        ({"variants": "clip"}, "`variants`: input should be a valid dictionary, not 'clip'"),
        ({"variants": {"clip": "x"}}, "`variants.clip`: "),
        ({"variants": [["a"]]}, "`variants` must be a list of names, or a mapping, not [['a']]"),
    ],
)
def test_bad_grids_are_told_as_such_also_with_flags(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--grid", str(write_grid(tmp_path, {**GRID, **change})), "--set", "clip:n_steps=3"]) == 2
    assert message in capsys.readouterr().err


def other_result(output: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = output / "jobs/CartPole-v1/clip/seed_0.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda output: other_result(output, lambda content: content["job"].update(n_envs=3)),
            "results of another grid, with n_envs 3 and",
        ),
        (
            lambda output: other_result(output, lambda content: content["provenance"].update(versions="Python 2.7")),
            "results of other versions, Python 2.7 and not Python 3",
        ),
        (lambda output: (output / "jobs/CartPole-v1/clip/seed_0.json").write_text('{"job": '), "not readable as a result"),
        (lambda output: (output / "jobs/CartPole-v1/clip/seed_0.json").write_text("[]"), "not readable as a result"),
        (lambda output: other_result(output, lambda content: content.update(episodes={})), "`episodes` must have the columns"),
        (lambda output: other_result(output, lambda content: content["updates"].pop("kl")), "`updates` must have the columns"),
        (lambda output: other_result(output, lambda content: content.update(provenance=[])), "`provenance` lacks"),
        (lambda output: other_result(output, lambda content: content.update(wall_time="x")), "no updates, or no wall time"),
        (
            lambda output: (output / "jobs/CartPole-v1/clip/seed_0.json").rename(output / "jobs/CartPole-v1/clip/seed_9.json"),
            "results of another grid, which has this job too",
        ),
    ],
)
def test_refuses_results_of_something_else(
    spoil: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small(tmp_path, variants=["clip"])) == 0
    spoil(tmp_path / "results")
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("seed_*")}
    assert main(small(tmp_path)) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("seed_*")} == before


def test_refuses_results_of_something_else_for_environments_with_a_namespace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gym.register("tests/CartPole-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=100)
    try:
        flags = small(tmp_path, env=["tests/CartPole-v0"], variants=["clip"])
        assert main(flags) == 0
        assert main([*flags, "--timesteps", "999"]) == 2
    finally:
        del gym.registry["tests/CartPole-v0"]
    assert "results of another grid, with timesteps 300 and not 999" in capsys.readouterr().err


def test_environments_of_different_runs_have_nothing_in_common() -> None:
    """Though SB3 gives those of one run consecutive seeds."""
    grid = make_grid({"envs": ["CartPole-v1"], "variants": ["clip"], "seeds": 3, "n_envs": 4}, "test")
    observations = []
    for job in grid.jobs():
        env = make_env(job)
        make_model(job, env)
        observations += list(env.reset())
        env.close()
    assert len({tuple(each) for each in observations}) == 12


def test_environments_render_only_where_asked() -> None:
    """Gymnasium's LunarLander simulates the sparks of its engines if it could be rendered (Gymnasium's issue #170)."""
    grid = make_grid({"envs": ["CartPole-v1"], "variants": ["clip"]}, "test")
    env = make_env(grid.jobs()[0])
    assert env.get_attr("render_mode") == [None]
    env.close()


def test_time_limits_may_be_ends() -> None:
    grid = make_grid({"envs": ["CartPole-v0"], "variants": ["clip"], "terminal_time_limits": True}, "test")
    env = make_env(grid.jobs()[0])
    env.reset()
    env.envs[0].unwrapped.theta_threshold_radians = env.envs[0].unwrapped.x_threshold = 1e9  # type: ignore[attr-defined]
    for _ in range(199):
        assert not env.step(np.array([0]))[2][0]
    *_, dones, infos = env.step(np.array([0]))
    assert dones[0]
    assert not infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["l"] == 200


def test_more_seeds_and_variants_are_added_to_what_is_there(tmp_path: Path) -> None:
    assert main(small(tmp_path, variants=["clip"])) == 0
    assert main([*small(tmp_path), "--seeds", "2"]) == 0
    assert len(list((tmp_path / "results").rglob("seed_*.json"))) == 4


def test_says_so_if_the_report_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "write_report", full)
    assert main(small(tmp_path, variants=["clip"])) == 1
    assert "error: [Errno 28] No space left on device. What has been finished is kept." in capsys.readouterr().err
    assert (tmp_path / "results/jobs/CartPole-v1/clip/seed_0.json").exists()


def test_refuses_a_second_comparison_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Folder(tmp_path / "results").locked():
        assert main(small(tmp_path)) == 2
    assert "another comparison is writing there" in capsys.readouterr().err


class Dull(gym.Env[Any, Any]):
    """Nothing happens; episodes never end."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 0.0, False, False, {}


gym.register("Dull-v0", entry_point=Dull)


def test_tasks_in_which_no_episode_ends_are_left_out_and_named(tmp_path: Path) -> None:
    assert main(small(tmp_path, env=["Dull-v0", "CartPole-v1"])) == 0
    report = (tmp_path / "results/report.md").read_text()
    assert "In 1 runs of none on Dull-v0 no episode has ended: they are left out." in report
    assert "No run is known to be better than random actions on Dull-v0" in report
    dull = report.split("## Dull-v0")[1].split("## ")[0]
    assert re.search(r"\| none +\| - +\| - +\| - ", dull)


def test_environments_of_modules_are_named_as_gymnasium_does(tmp_path: Path) -> None:
    env = "benchmarks.cartpole_swingup:CartPoleSwingUp-v0"
    assert main(small(tmp_path, "--timesteps", "1200", env=[env], variants=["clip"])) == 0
    assert "CartPoleSwingUp" in (tmp_path / "results/report.md").read_text()


def test_an_environment_that_exits_is_a_failed_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import training

    def leave(job: Any, *args: Any) -> Any:
        raise SystemExit("two\nlines")

    monkeypatch.setattr(training, "train", leave)
    assert main(small(tmp_path)) == 1
    error = (tmp_path / "results/jobs/CartPole-v1/none/seed_0.error.txt").read_text()
    assert error.splitlines()[0] == "SystemExit: two"
    assert "Traceback" in error


def run_as_users_do(flags: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])  # for the processes of Ray
    command = [sys.executable, "-m", "benchmarks.compare", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "n_jobs"), [("loky", 1), ("loky", 2), ("ray", 2)])
def test_an_environment_that_crashes_is_a_failed_job_and_the_others_go_on(backend: str, n_jobs: int, tmp_path: Path) -> None:
    """Also those that ran beside it, and ended with it."""
    crashing, fine = "tests.environments:Crashing-v0", "CartPole-v1"
    flags = small(tmp_path, "--backend", backend, "--jobs", str(n_jobs), env=[crashing, fine], variants=["clip", "none"])
    assert run_as_users_do(flags).returncode == 1
    results = tmp_path / "results/jobs"
    for variant in ("clip", "none"):
        assert "its process has died" in (results / crashing / variant / "seed_0.error.txt").read_text()
        assert [path.name for path in (results / fine / variant).iterdir()] == ["seed_0.json"]
    assert "Crashing-v0/clip/seed_0 has failed: its process has died" in (tmp_path / "results/report.md").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_of_all_variants_are_known_again(variant: str) -> None:
    (job,) = make_grid({"envs": ["CartPole-v1"], "variants": [variant], "seeds": 1}, "test").jobs()
    assert result._differences(Job.model_validate(json.loads(json.dumps(job.model_dump()))), job) == ""


def test_a_report_replaces_another_one_as_a_whole(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(output, tmp_path / "results", ignore=shutil.ignore_patterns("tensorboard"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir() if path.is_file()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.figures, "efficiency", full)
    assert main(["--grid", str(output.parent / "grid.yaml"), "--output", str(tmp_path / "results"), "--seeds", "5"]) == 1
    assert "No space left on device. What has been finished is kept." in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir() if path.is_file()} == before
    assert not list((tmp_path / "results").glob(".report*"))


def test_what_is_no_folder_of_results_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/report.md").write_text("my notes")
    assert main(small(tmp_path)) == 2
    assert "has a report.md and no results of runs; take another folder, or remove it" in capsys.readouterr().err
    assert (tmp_path / "results/report.md").read_text() == "my notes"
    (tmp_path / "results/jobs").touch()
    assert main(small(tmp_path)) == 2
    assert "jobs: must be a folder, and is a file" in capsys.readouterr().err


def test_sb3_is_a_control_only_with_the_settings_of_clip(tmp_path: Path) -> None:
    flags = small(tmp_path, "--seeds", "2", variants=["clip", "sb3_ppo"])
    for setting, is_control in (("clip:learning_rate=0.1", False), ("learning_rate=0.1", True)):
        folder = tmp_path / setting
        assert main([*flags, "--set", setting, "--output", str(folder)]) == 0
        rows = pd.read_csv(folder / "summary.csv").set_index("variant")
        assert np.isnan(rows.loc["sb3_ppo"].get("p_value", np.nan)) == is_control


def test_damaged_returns_of_random_actions_are_measured_again(tmp_path: Path) -> None:
    assert main(small(tmp_path)) == 0
    known = (tmp_path / "results/random_returns.json").read_text()
    (tmp_path / "results/random_returns.json").write_text('{"CartP')
    assert main(small(tmp_path)) == 0
    assert (tmp_path / "results/random_returns.json").read_text() == known


def test_says_how_to_go_on_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_jobs", interrupted)
    assert main(small(tmp_path)) == 130
    assert "interrupted. What has been finished is kept: the same command goes on from there." in capsys.readouterr().err


def test_overrides_reach_their_variant(tmp_path: Path) -> None:
    content = {"envs": ["CartPole-v1"], "variants": {"clip": None, "mine": {"of": "clip", "arguments": {"clip_range": 0.1}}}}
    grid = make_grid(content, "test")
    jobs = {job.variant: job for job in grid.jobs() if job.seed == 0}
    assert jobs["clip"].arguments == {"clip_range": 0.2}
    assert jobs["mine"].arguments == {"clip_range": 0.1}
    assert len(grid.jobs()) == 10


def test_flags_add_up() -> None:
    plan = compare._plan(["--env", "CartPole-v1", "--env", "Acrobot-v1", "--set", "n_steps=64", "--set", "batch_size=32"])
    assert list(plan.grid.envs) == ["CartPole-v1", "Acrobot-v1"]
    assert plan.grid.arguments == {"n_steps": 64, "batch_size": 32}


def test_flags_are_over_what_a_file_says_of_single_environments() -> None:
    flags = ["--timesteps", "500", "--n-envs", "3", "--normalize", "--set", "n_steps=16"]
    plan = compare._plan(["--study", "clip_or_kl", "--env", "CartPole-v1", "--variants", "clip", *flags])
    job = plan.grid.jobs()[0]
    assert (job.timesteps, job.n_envs, job.normalize) == (500, 3, True)
    assert job.arguments == {"n_steps": 16, "batch_size": 256, "learning_rate": "lin_1e-3", "clip_range": 0.2}


def test_parts_of_a_file_can_be_shared(tmp_path: Path) -> None:
    path = write_grid(tmp_path, "envs: {CartPole-v1: &a {timesteps: 100, n_envs: 2}, Pendulum-v1: {<<: *a, n_envs: 3}}")
    assert read_grid(path)["envs"]["Pendulum-v1"] == {"timesteps": 100, "n_envs": 3}


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    path = write_grid(tmp_path, "envs: {CartPole-v1: {env_kwargs: {task: '007', scale: 1e-3}}}\nvariants: [clip]")
    assert make_grid(read_grid(path), "test").jobs()[0].env_kwargs == {"task": "007", "scale": 0.001}


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 3e-4 for a string."""
    path = write_grid(tmp_path, "envs: [CartPole-v1]\nvariants: [clip]\narguments: {learning_rate: 3e-4, ent_coef: lin_0.2}")
    arguments = make_grid(read_grid(path), "test").jobs()[0].arguments
    assert arguments == {"learning_rate": 3e-4, "ent_coef": "lin_0.2", "clip_range": 0.2}


@pytest.mark.parametrize("path", [*included("preset").values(), *included("study").values()], ids=lambda path: path.stem)
def test_included_grids_can_be_built(path: Path) -> None:
    grid = make_grid(read_grid(path), str(path))
    compare.check_jobs([job for job in grid.jobs() if job.seed == 0], "loky", video=False)
    known = {(job.env, job.variant) for job in grid.jobs()}
    assert all((claim.env, claim.variant) in known for claim in grid.claims)


def test_an_unknown_key_of_a_claim_is_an_error() -> None:
    with pytest.raises(GridError, match=r"`claims.0.measures`: unknown key: 'measures'; did you mean 'measure'"):
        make_grid({"envs": ["CartPole-v1"], "variants": ["clip"], "claims": [{"measures": 3}]}, "test")


@pytest.mark.slow
def test_runs_on_a_ray_cluster(tmp_path: Path, output: Path) -> None:
    """A real one, on this machine."""
    flags = [
        "--grid",
        str(output.parent / "grid.yaml"),
        "--output",
        str(tmp_path / "ray"),
        "--no-tensorboard",
        "--backend",
        "ray",
    ]
    done = run_as_users_do([*flags, "--jobs", "2", "--env", "CartPole-v1"])
    assert done.returncode == 0, done.stderr
    expected = {name: content for name, content in strip_times(output).items() if "CartPole" in name}
    assert strip_times(tmp_path / "ray") == expected


def test_results_of_machines_with_other_disks_are_kept_too(output: Path, tmp_path: Path) -> None:
    """As on a cluster: the run's own file is somewhere else."""
    kept = result.Result.from_json((output / "jobs/CartPole-v1/clip/seed_0.json").read_text())
    news: queue.Queue[Any] = queue.Queue()
    for item in (512, (kept.job.name, kept.to_json(), None), None):
        news.put(item)
    with tqdm(total=512, file=io.StringIO()) as bar:
        scheduling._listen(news, {kept.job.name: kept.job}, Folder(tmp_path), bar, {})
        assert bar.n == 512
    assert Folder(tmp_path).read([kept.job])[0].to_json() == kept.to_json()
