"""What the check of long runs computes, and that a short one leaks neither threads nor files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.long_run import main, summarize

pytestmark = pytest.mark.slow


def test_summary_by_hand() -> None:
    """
    From update 10 on memory grows by 1 MiB an update; early are updates 10 to 19, late 90 to 99, when updates take twice as
    long. In units of the yardstick the tenths take 10, 11, ..., 19: a change of 10 of 14.5.
    """
    updates = np.arange(100)
    seconds = np.where(updates < 90, 0.01, 0.02)
    times = {"seconds": seconds, "yardstick": seconds / (10 + updates // 10)}
    rows = pd.DataFrame({**times, "memory": 100.0 + updates, "threads": 2, "files": 7})
    assert summarize(rows) == {
        "updates": "100",
        "memory, MiB": "114, 194",
        "growth, KiB an update": "1024.00",
        "ms an update": "10.0, 20.0",
        "late / early": "2.00",
        "slower by, %": "+69 (+69 to +69)",
        "threads": "2, 2",
        "open files": "7, 7",
    }


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_neither_threads_nor_files_are_left_open(engine: str, tmp_path: Path) -> None:
    """In a process of its own: what other tests left open may be closed at any time by the garbage collector."""
    command = [sys.executable, "-m", "benchmarks.long_run", "--updates", "30", "--engine", engine, "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    rows = pd.read_csv(tmp_path / f"{engine}.csv")
    assert len(rows) == 30
    assert rows["threads"].iloc[10:].nunique() == 1
    assert rows["files"].iloc[10:].nunique() == 1


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--updates", "1"])
    assert "--updates must be at least 20, not 1" in capsys.readouterr().err
