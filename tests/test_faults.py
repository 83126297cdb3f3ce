"""A short run of the harness that injects faults, and that it would see what it looks for."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import faults
from benchmarks.faults import KINDS, Fault, inject, main, measure
from sb3_ppo_variants.engines import EagerEngine

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_no_fault_reaches_the_parameters() -> None:
    rows = measure(30, seed=1)
    assert set(rows["kind"]) == set(KINDS)
    assert (rows["wrong"] == "").all()
    assert rows["outcome"].str.startswith("raised").any()
    assert (rows["outcome"] == "trained on").any()


@pytest.mark.parametrize("engine", ["fused", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_is_a_fault_indeed(kind: str, engine: str) -> None:
    outcome, _ = inject(Fault(kind, float("nan"), "raise", 1, 3, 1, {}), engine)
    assert outcome.startswith("raised: ")


def test_an_engine_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = EagerEngine.backward

    def wrong(self: EagerEngine) -> object:
        metrics = backward(self)
        self._policy.value_net.bias.grad.neg_()  # type: ignore[union-attr]  # Adam's steps are the same for any scale
        return metrics

    monkeypatch.setattr(EagerEngine, "backward", wrong)
    fault = Fault("reward", float("nan"), "skip", 1, 3, 1, {})
    monkeypatch.setattr(faults, "draw_fault", lambda draw: fault)
    assert measure(1)["wrong"][0].startswith("engines differ")


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "draw_fault", lambda draw: Fault("reward", float("nan"), "restore", 1, 3, 1, {}))
    monkeypatch.setattr(faults, "cost", lambda: np.array([1.01, 1.02, 1.03]))
    main(["--faults", "1", "--output", str(tmp_path)])
    assert "| reward   | 1        | 0                       | 1          | 0 " in (tmp_path / "report.md").read_text()
    assert "takes +2.0% of its time longer" in (tmp_path / "report.md").read_text()


def test_the_checks_can_be_left_out_for_the_measurement() -> None:
    assert (faults.cost(2) > 0).all()


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--faults", "0"])
    assert "--faults must be at least 1, not 0" in capsys.readouterr().err
