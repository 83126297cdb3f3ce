"""A short run of the crash harness, and what it computes."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import crash
from benchmarks.crash import main, measure, summarize

pytestmark = pytest.mark.slow


def test_killed_trainings_end_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash, "KILLS_OF_A_RUN", 3)
    rows = measure(3, ["CartPole-v1, clip"])
    assert list(rows["kind"]) == ["kill", "kill", "kill", "end"]
    assert rows["same"].iloc[-1]


def test_a_difference_would_be_seen() -> None:
    models = [crash.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=seed, device="cpu") for seed in (0, 0, 1)]
    digests = []
    for model in models:
        model.set_random_seed(3)
        digests.append(crash.digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_summary_by_hand() -> None:
    rows = pd.DataFrame(
        [
            {"kind": "kill", "scenario": "one", "half-written": 1, "damaged": 0},
            {"kind": "kill", "scenario": "one", "half-written": 0, "damaged": 1},
            {"kind": "end", "scenario": "one", "same": True},
            {"kind": "kill", "scenario": "other", "half-written": 0, "damaged": 0},
            {"kind": "end", "scenario": "other", "same": False},
        ]
    )
    assert summarize(rows).to_dict("list") == {
        "scenario": ["one", "other", "all"],
        "trainings": [1, 1, 2],
        "kills": [2, 1, 3],
        "in a write": [1, 0, 1],
        "newest checkpoint cut short": [1, 0, 1],
        "lost": [0, 1, 1],
    }


def test_lost_trainings_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kill = {"kind": "kill", "scenario": "one", "half-written": 1, "damaged": 0}
    rows = pd.DataFrame([kill, {"kind": "end", "scenario": "one", "same": False}])
    monkeypatch.setattr(crash, "measure", lambda *arguments: rows)
    with pytest.raises(SystemExit, match="1"):
        main(["--output", str(tmp_path)])
    assert "| all      | 1         | 1     |" in (tmp_path / "report.md").read_text()


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kills", "0"])
    assert "--kills must be at least 1, not 0" in capsys.readouterr().err
