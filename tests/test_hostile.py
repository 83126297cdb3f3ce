"""Each input of the catalogue is refused as it should be; a judge who would find nothing wrong is no judge."""

from pathlib import Path

import pytest

from benchmarks.hostile import ENGINES, Case, Random, Trainings, catalogue, judge

pytestmark = pytest.mark.slow

CASES = catalogue()
TRIALS = [(name, engine) for name, (_, case) in CASES.items() for engine in (ENGINES if case.trains else ENGINES[:1])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "engine"), TRIALS, ids=[f"{name} ({engine})" for name, engine in TRIALS])
def test_is_refused(name: str, engine: str) -> None:
    assert judge(CASES[name][1], engine) == ""


def test_there_are_enough() -> None:
    assert len(CASES) >= 80


def _raise(error: Exception) -> None:
    raise error


def test_the_judge_tells_what_is_wrong() -> None:
    assert judge(Case(lambda folder, trainings: None, ValueError, ""), "fused") == "raised nothing"
    assert judge(Case(lambda folder, trainings: _raise(KeyError("a")), ValueError, ""), "fused") == "raised KeyError: 'a'"
    assert judge(Case(lambda folder, trainings: _raise(ValueError("a")), ValueError, "b"), "fused") == "said: a"


def test_the_judge_looks_at_the_model_too() -> None:
    def spoil(folder: Path, trainings: Trainings) -> None:
        trainings.learn(Random())
        assert trainings.model is not None
        trainings.model.policy.state_dict()["value_net.bias"].fill_(7.0)
        raise ValueError

    assert judge(Case(spoil, ValueError, ""), "fused") == "left the model changed"
