"""The benchmark of speed: what it computes from its measurements, and that it measures what it says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gymnasium import spaces

from benchmarks import speed
from benchmarks.speed import Instant, Measurement, environment_share, main, summarize


def test_ratios_by_hand() -> None:
    """Round by round 8 / 2 = 4, 9 / 3 = 3 and 10 / 1 = 10, with 4 in the middle; not 9 / 2 = 4.5, the medians' ratio."""
    values = {"SB3": (8.0, 9.0, 10.0), "ours": (2.0, 3.0, 1.0)}
    rows = [
        Measurement("minibatch", "defaults", name, turn, value)
        for name, column in values.items()
        for turn, value in enumerate(column)
    ]
    (row,) = summarize(pd.DataFrame(rows)).to_dict("records")
    assert row == {
        "measure": "minibatch, us a minibatch",
        "setting": "defaults",
        "SB3": "9",
        "ours": "2",
        "SB3 / ours": "4.00 (3.00 to 10.00)",
    }


def test_share_of_the_environment_by_hand() -> None:
    rows = [
        *(Measurement("whole", "task", name, 0, value) for name, value in (("SB3", 100.0), ("ours", 30.0))),
        Measurement("environment", "task", "none", 0, 10.0),
    ]
    assert environment_share(pd.DataFrame(rows)) == "- task: SB3 10.0, ours 3.0 times the environment alone (10.0 us a step)"


def test_instant_environments_repeat_themselves_after_64_steps() -> None:
    env = Instant(3, 5, spaces.Discrete(2))
    first = [env.step(np.zeros(3)) for _ in range(64)]
    again = [env.step(np.zeros(3)) for _ in range(64)]
    assert first[0][0].shape == (3, 5)
    for one, other in zip(first, again, strict=True):
        for array, same in zip(one[:3], other[:3], strict=True):
            np.testing.assert_array_equal(array, same)


def test_measures_every_setting_of_every_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"batch_size": 64, "width": 8, "observation_size": 3, "n_actions": 2, "discrete": True}
    monkeypatch.setattr(speed, "grid", lambda: {"small": small})
    monkeypatch.setattr(speed, "profile", lambda: "no profile")
    main(["--rounds", "2", "--parts", "updates", "--output", str(tmp_path)])
    measurements = pd.read_csv(tmp_path / "measurements.csv")
    assert set(zip(measurements["algorithm"], measurements["turn"], strict=True)) == {
        (name, turn) for name in ("SB3", "ours") for turn in (0, 1)
    }
    assert (measurements["value"] > 0).all()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert all(f"- {key}: " in report for key in ("command", "commit", "versions", "machine"))


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--threads", "-1"], ["--parts", "everything"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err
