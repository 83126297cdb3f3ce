"""The benchmark of vectorised environments: what it computes from its measurements, and that it measures what it says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import vectorized
from benchmarks.vectorized import CONTENDERS, Contender, main, seconds_to_solve, summarize


def test_summary_by_hand() -> None:
    """Speeds: 30 / 10 = 3 and 80 / 20 = 4 times as fast. Times: 10 / 2 = 5 in the one round in which both have solved it."""
    speed, time = "steps/s, 64 environments, rollout", "seconds until solved"
    rows = [
        *((speed, "DummyVecEnv", turn, value, np.nan) for turn, value in enumerate((10.0, 20.0))),
        *((speed, "VectorEnv", turn, value, np.nan) for turn, value in enumerate((30.0, 80.0))),
        *((time, "SB3", turn, value, steps) for turn, (value, steps) in enumerate([(10.0, 5000), (np.nan, 9000)])),
        *((time, "ours", turn, value, steps) for turn, (value, steps) in enumerate([(2.0, 4000), (3.0, 6000)])),
    ]
    summary = summarize(pd.DataFrame(rows, columns=["measure", "who", "turn", "value", "timesteps"]))
    assert summary.to_dict("list") == {
        "measure": [speed, speed, time, time],
        "who": ["DummyVecEnv", "VectorEnv", "SB3", "ours"],
        "median": ["15", "55", "10", "2.5"],
        "times as fast": ["1.00 (1.00 to 1.00)", "3.50 (3.00 to 4.00)", "1.00 (1.00 to 1.00)", "5.00 (5.00 to 5.00)"],
        "time steps": ["", "", "7000", "5000"],
        "solved": ["", "", "1 of 2", "2 of 2"],
    }


def test_who_does_not_solve_it_has_no_time() -> None:
    contender = Contender(CONTENDERS["ours, 64 vectorised"].algorithm, vectorized.vectorized, 64, {"n_steps": 8}, 1024)
    seconds, timesteps = seconds_to_solve(contender, seed=0)
    assert np.isnan(seconds)
    assert 1024 <= timesteps < 1024 + 8 * 64


def test_training_ends_when_it_is_solved() -> None:
    contender = CONTENDERS["ours, 64 vectorised"]
    seconds, timesteps = seconds_to_solve(contender, seed=0)
    assert seconds > 0
    assert timesteps < contender.budget


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "N_STEPS", 2)
    monkeypatch.setattr(vectorized, "CONTENDERS", {"one": CONTENDERS["ours, 64 vectorised"]._replace(budget=2048)})
    main(["--rounds", "1", "--output", str(tmp_path)])
    measurements = pd.read_csv(tmp_path / "measurements.csv")
    assert len(measurements) == 2 * 2 * 2 + 1  # numbers of environments, kinds, with and without a policy; one contender
    report = (tmp_path / "report.md").read_text()
    assert all(f"- {key}: " in report for key in ("command", "commit", "versions", "machine"))


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
