"""The benchmark of several ranks: what it computes from its measurements, and that it measures what it says."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import scaling
from benchmarks.cost_model import Network, UpdateCost, slowest
from benchmarks.scaling import compare_learning, costs, main, overlapping, summarize_learning, summarize_speed

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {
    "CartPole-v1": {
        "n_envs": 2,
        "normalize": True,
        "n_updates": 4,
        "arguments": {"n_steps": 16, "batch_size": 16, "n_epochs": 2},
    }
}


def test_speed_by_hand() -> None:
    """1,024 samples of a rank in 2 s and in 4 s; of two in 2 s and 5 s: 2 and 1.6 times as many; apart: 2 and 2 times."""
    rows = [
        ("one rank", 0, 2.0, 1.0, 0.0),
        ("one rank", 1, 4.0, 2.0, 0.0),
        ("two ranks", 0, 2.0, 1.0, 0.5),
        ("two ranks", 1, 5.0, 2.5, 0.9),
        ("two ranks, bound", 0, 2.0, 1.0, 0.5),
        ("two ranks, bound", 1, 5.0, 2.5, 0.9),
        ("two apart", 0, 2.0, 1.0, 0.0),
        ("two apart", 1, 4.0, 2.0, 0.0),
    ]
    measurements = pd.DataFrame(rows, columns=["who", "turn", "seconds", "rollout", "communication"])
    measurements = measurements.assign(env="CartPole-v1", gradient_steps=40.0, n_bytes=400, others=9.0)
    summary = summarize_speed(measurements).to_dict("list")
    assert summary["samples/s"] == ["384", "717", "717", "768"]  # (512 + 256) / 2, (1,024 + 409.6) / 2, (1,024 + 512) / 2
    assert summary["times one rank's"] == ["1.00 (1.00 to 1.00)", *["1.80 (1.60 to 2.00)"] * 2, "2.00 (2.00 to 2.00)"]
    assert summary["communication, and waiting"] == ["0%", "20%", "20%", "0%"]
    # Rollouts differ between turns only; of 0.7 s, 49 exchanges of two messages take 0.49 s, and 40 times is waited for.
    step_std = (0.7 - 0.49) / slowest(2) / 40
    expected = UpdateCost(rollout=1.5, compute=1.5, n_reductions=40, n_bytes=400, n_others=9, rollout_std=0, step_std=step_std)
    assert costs(measurements, Network(latency=5e-3, bandwidth=math.inf))["CartPole-v1"] == pytest.approx(expected)


def test_only_updates_beside_another_copys_count() -> None:
    """One runs from 0 to 6, the other from 1 to 8."""
    first = [{"began": float(began), "seconds": 2.0} for began in (0, 2, 4)]
    second = [{"began": 1.0, "seconds": 3.0}, {"began": 4.0, "seconds": 4.0}]
    assert overlapping([first, second]) == [first[1], first[2], second[0]]
    assert overlapping([first]) == first


def test_differences_are_those_of_each_seed() -> None:
    """1 and 3: mean 2, standard error 1, Student's quantile of one degree of freedom 12.7."""
    rows = [("two ranks", 0, 11.0), ("two ranks", 1, 23.0), ("one process", 0, 10.0), ("one process", 1, 20.0)]
    measurements = pd.DataFrame(rows, columns=["who", "seed", "return"]).assign(env="a", timesteps=1)
    assert compare_learning(measurements).endswith("a: 2 (95 % interval -11 to 15).")


def test_learning_by_hand() -> None:
    rows = [("two ranks", 0, 10, 1.0), ("two ranks", 0, 20, 5.0), ("two ranks", 1, 10, 3.0), ("two ranks", 1, 20, 7.0)]
    measurements = pd.DataFrame(rows, columns=["who", "seed", "timesteps", "return"]).assign(env="a")
    (row,) = summarize_learning(measurements).itertuples(index=False, name=None)
    assert row == ("a", "two ranks", 2, "6", "1", "5")  # 5 and 7 in the end


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "TASKS", SMALL)
    monkeypatch.setattr(scaling, "MEASURED_RANKS", (2, 3))  # more than there are cores take turns, for minutes
    main(["--rounds", "1", "--output", str(tmp_path)])
    updates = pd.read_csv(tmp_path / "updates.csv")
    sizes = updates.groupby("who").size().to_dict()
    assert sizes.pop("two apart", 0) <= 4  # as many as have run beside one of the other copy, which is a matter of timing
    assert sizes == {"one rank": 2, "two ranks": 2, "two ranks, bound": 2}
    assert (updates["communication"] > 0).tolist() == updates["who"].str.startswith("two ranks").tolist()
    assert set(updates["gradient_steps"]) == {2 * 2}
    report = (tmp_path / "report.md").read_text()
    assert all(f"- {key}: " in report for key in ("command", "commit", "versions", "machine"))
    assert (tmp_path / "efficiency.png").stat().st_size > 0


def test_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "TASKS", SMALL)
    monkeypatch.setattr(scaling, "LEARNING", {"CartPole-v1": 3})
    main(["--learning", "--rounds", "1", "--output", str(tmp_path)])
    returns = pd.read_csv(tmp_path / "returns.csv")
    assert returns.groupby("who")["timesteps"].max().to_dict() == {"one process": 3 * 64, "two ranks": 3 * 64}


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
