"""The comparison as a user runs it, shortened: a grid, its interruption, its report recomputed from its CSV files."""

import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmarks import compare, result, scheduling
from benchmarks.compare import main
from benchmarks.grid import GridError, included, make_grid, read_grid
from benchmarks.result import Folder

GRID = {
    "envs": {"CartPole-v1": {"timesteps": 1500, "n_envs": 2}, "Pendulum-v1": {"timesteps": 1200}},
    "variants": {"clip": None, "adaptive_kl": {"arguments": {"kl_target": 0.02}}, "sb3_ppo": None, "a2c": None},
    "seeds": 2,
    "arguments": {"n_steps": 256, "batch_size": 128, "n_epochs": 2, "learning_rate": "lin_1e-3"},
}


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
    assert files == [f"{env}/{variant}/seed_{seed}.json" for env in envs for variant in variants for seed in (0, 1)]
    kept = json.loads((output / "jobs/CartPole-v1/adaptive_kl/seed_1.json").read_text())
    assert kept["job"]["arguments"] == {
        **GRID["arguments"],
        **{"clip_range": None, "kl_coef": "auto", "kl_target": 0.02},
    }
    assert set(kept["provenance"]) == {"commit", "date", "versions", "machine"}
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


def test_the_reports_numbers_can_be_recomputed(output: Path) -> None:
    """From the raw episodes alone, by other means."""
    episodes, updates = (pd.read_csv(output / f"{name}.csv.gz") for name in ("episodes", "updates"))
    summary = pd.read_csv(output / "summary.csv")
    report = (output / "report.md").read_text()
    finals: dict[tuple[str, str], list[float]] = {}
    for env in GRID["envs"]:
        for variant in GRID["variants"]:
            for seed in (0, 1):
                own = cells(episodes, env, variant).query(f"seed == {seed}")
                end = cells(updates, env, variant).query(f"seed == {seed}")["timesteps"].iloc[-1]
                late = own[own["timesteps"] > 0.9 * end]["episode_return"].to_numpy()
                late = late if len(late) else own["episode_return"].to_numpy()[-1:]
                finals.setdefault((env, variant), []).append(sum(late) / len(late))
    for env in GRID["envs"]:
        section = report.split(f"## {env}\n")[1].split("\n## ")[0]
        for variant in GRID["variants"]:
            mine, clips = finals[env, variant], finals[env, "clip"]
            mean = sum(mine) / 2  # of two runs, the middle half is both
            row = cells(summary, env, variant).iloc[0]
            assert row["final_return"] == pytest.approx(mean, rel=1e-6)
            line = next(line for line in section.splitlines() if line.startswith(f"| {variant} "))
            assert f"| {mean:.4g}" in line
            kl = cells(updates, env, variant).groupby("seed")["kl"].median().median()
            assert f"{kl:.2g}" in line or variant in ("sb3_ppo", "a2c")
            # Two runs resampled with replacement: both are the smaller or the larger one in a quarter of the cases each.
            assert (row["final_return_low"], row["final_return_high"]) == pytest.approx((min(mine), max(mine)), rel=1e-6)
            if variant != "clip":
                beaten = np.mean([(a > b) + (a == b) / 2 for a in mine for b in clips])
                assert row["improvement"] == pytest.approx(beaten)
                assert f"| {beaten:.2f}" in line


def test_the_report_says_where_it_comes_from_and_what_it_can_t_tell(output: Path) -> None:
    report = (output / "report.md").read_text()
    for key in ("command", "commit", "date", "versions", "machine"):
        assert f"\n- {key}: " in report
    # Of two and two runs, the best order has the probability 2 / 6 on both sides.
    assert "2 seeds are too few to tell variants apart: even if all runs of one beat all of the other, p is 0.33" in report
    assert re.search(r"clip can't be told apart on Pendulum-v1 from: .*sb3_ppo", report)
    assert "| Pendulum-v1" in report.split("## Settings")[1]


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
        f"{env}/{variant}/seed_{seed}_1" for env in GRID["envs"] for variant in GRID["variants"] for seed in (0, 1)
    }
    scalars = EventAccumulator(str(output / "tensorboard/CartPole-v1/adaptive_kl/seed_0_1")).Reload()
    assert len(scalars.Scalars("train/kl")) == 2  # the third update is after the last rollout


def test_the_same_command_again_trains_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    summary = (output / "summary.csv").read_bytes()
    monkeypatch.setattr(compare, "run_jobs", None)
    assert main(["--grid", str(output.parent / "grid.yaml"), "--output", str(output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == before
    assert (output / "summary.csv").read_bytes() == summary


def strip_times(folder: Path) -> dict[str, Any]:
    """What doesn't depend on the clock."""
    contents = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("*.json")}
    return {name: [content["job"], content["episodes"], content["updates"]] for name, content in contents.items()}


def test_goes_on_after_kill_9(tmp_path: Path) -> None:
    """In the middle of a grid; the results are those of a grid that wasn't interrupted."""
    content = {**GRID, "envs": {"CartPole-v1": {"timesteps": 4000}}, "variants": ["clip", "none"], "seeds": 4}
    command = ["-m", "benchmarks.compare", "--grid", str(write_grid(tmp_path, content)), "--jobs", "2", "--no-tensorboard"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*command[2:], "--output", str(whole)]) == 0

    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    arguments = [sys.executable, *command, "--output", str(broken)]
    with subprocess.Popen(
        arguments, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not list(broken.rglob("seed_*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    n_finished = len(list(broken.rglob("seed_*.json")))
    assert 0 < n_finished < 8
    assert main([*command[2:], "--output", str(broken)]) == 0
    assert strip_times(broken) == strip_times(whole)
    for name in ("summary.csv", "episodes.csv.gz", "updates.csv.gz"):
        frames = [pd.read_csv(folder / name).drop(columns="steps_per_second", errors="ignore") for folder in (whole, broken)]
        pd.testing.assert_frame_equal(*frames)
    assert not list(broken.rglob(".seed_*"))


def small(tmp_path: Path, *more: str) -> list[str]:
    flags = ["--env", "CartPole-v1", "--variants", "clip", "none", "--seeds", "1", "--timesteps", "300", "--no-tensorboard"]
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
    assert "1 of 2 runs are missing" in report

    monkeypatch.setattr(training, "train", original)
    assert main(small(tmp_path)) == 0
    assert [path.name for path in (tmp_path / "results/jobs/CartPole-v1/none").iterdir()] == ["seed_0.json"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job whose result can't be written has failed; what was there before stays."""
    assert main([*small(tmp_path), "--variants", "clip"]) == 0
    kept = (tmp_path / "results/jobs/CartPole-v1/clip/seed_0.json").read_bytes()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(result.os, "replace", full)
    assert main(small(tmp_path)) == 1
    assert (tmp_path / "results/jobs/CartPole-v1/clip/seed_0.json").read_bytes() == kept
    folder = tmp_path / "results/jobs/CartPole-v1/none"
    assert [path.name for path in folder.iterdir()] == ["seed_0.error.txt"]
    assert "No space left on device" in (folder / "seed_0.error.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--env is missing"),
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
        (["--grid", "/nowhere/grid.yaml"], "/nowhere/grid.yaml: No such file or directory"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--output", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results" / "jobs").exists()


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--timesteps", "-1"], ["--n-envs", "x"], ["--backend", "dask"], ["--nonsense"]]
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
        ("- 3", "grid.yaml: must be a mapping with the keys title, envs"),
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
    ],
)
def test_bad_grids(change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--grid", str(write_grid(tmp_path, change)), "--output", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results" / "jobs").exists()


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
        (
            lambda output: (output / "jobs/CartPole-v1/clip/seed_0.json").rename(output / "jobs/CartPole-v1/clip/seed_9.json"),
            "results of another grid, which has this job too",
        ),
    ],
)
def test_refuses_results_of_something_else(
    spoil: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(tmp_path), "--variants", "clip"]) == 0
    spoil(tmp_path / "results")
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("seed_*")}
    assert main(small(tmp_path)) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("seed_*")} == before


def test_more_seeds_and_variants_are_added_to_what_is_there(tmp_path: Path) -> None:
    assert main([*small(tmp_path), "--variants", "clip"]) == 0
    assert main([*small(tmp_path), "--seeds", "2"]) == 0
    assert len(list((tmp_path / "results").rglob("seed_*.json"))) == 4


def test_refuses_a_second_comparison_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Folder(tmp_path / "results").locked():
        assert main(small(tmp_path)) == 2
    assert "another comparison is writing there" in capsys.readouterr().err


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


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 3e-4 for a string."""
    path = write_grid(tmp_path, "envs: [CartPole-v1]\nvariants: [clip]\narguments: {learning_rate: 3e-4, ent_coef: lin_0.2}")
    arguments = make_grid(read_grid(path), "test").jobs()[0].arguments
    assert arguments == {"learning_rate": 3e-4, "ent_coef": "lin_0.2", "clip_range": 0.2}


@pytest.mark.parametrize("path", [*included("preset").values(), *included("study").values()], ids=lambda path: path.stem)
def test_included_grids_can_be_built(path: Path) -> None:
    grid = make_grid(read_grid(path), str(path))
    compare.check_jobs([job for job in grid.jobs() if job.seed == 0], video=False)
    known = {(job.env, job.variant) for job in grid.jobs()}
    assert all((claim.env, claim.variant) in known for claim in grid.claims)


def test_an_unknown_key_of_a_claim_is_an_error() -> None:
    with pytest.raises(GridError, match=r"`claims.0.measures`: unknown key: 'measures'; did you mean 'measure'"):
        make_grid({"envs": ["CartPole-v1"], "variants": ["clip"], "claims": [{"measures": 3}]}, "test")


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
    command = [sys.executable, "-m", "benchmarks.compare", *flags, "--jobs", "2", "--env", "CartPole-v1"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
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
