"""The demo, shortened; its table and figure recomputed from its raw results."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.demo import main
from benchmarks.report import _resampled, table
from benchmarks.runs import Result, Run
from benchmarks.variants import VARIANTS


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    # What an earlier demo has left is replaced, what a user has put beside it is not.
    for name in ("CartPole-v1/clip/seed_0_1", "mine"):
        (folder / "tensorboard" / name).mkdir(parents=True)
        (folder / "tensorboard" / name / "old").touch()
    main(["--seeds", "2", "--timesteps", "3000", "--output", str(folder)])
    assert [path.parent.name for path in folder.rglob("old")] == ["mine"]
    return folder


def test_raw_results_are_complete(output: Path) -> None:
    episodes, updates = pd.read_csv(output / "episodes.csv"), pd.read_csv(output / "updates.csv")
    for frame in (episodes, updates):
        assert set(frame["variant"]) == set(VARIANTS)
        assert set(frame["seed"]) == {0, 1}
    # 3 rollouts of 8 x 128 steps each
    assert updates.groupby(["variant", "seed"])["timesteps"].apply(list).tolist() == [[1024, 2048, 3072]] * 6
    # The learning rate has fallen to 0 when the third update starts.
    assert ((updates["kl"] > 0) == (updates["timesteps"] < 3000)).all()
    assert updates[updates["variant"] == "fixed_kl"]["kl_coef"].unique().tolist() == [3.0]
    assert updates[updates["variant"] == "clip"]["kl_coef"].unique().tolist() == [0.0]


def test_table_can_be_recomputed(output: Path) -> None:
    episodes, updates = pd.read_csv(output / "episodes.csv"), pd.read_csv(output / "updates.csv")
    report = (output / "report.md").read_text()
    for variant in VARIANTS:
        row = next(line for line in report.splitlines() if line.startswith(f"| {variant} "))
        own = episodes[episodes["variant"] == variant]
        finals = [own[own["seed"] == seed]["episode_return"].to_numpy()[-100:].mean() for seed in (0, 1)]
        assert f"{np.mean(finals):.1f} (" in row
        assert f"{updates[updates['variant'] == variant]['kl'].mean():.4f}" in row
        assert "0 of 2" in row


def test_report_says_where_it_comes_from(output: Path) -> None:
    report = (output / "report.md").read_text()
    for key in ("command", "commit", "date", "versions", "machine"):
        assert f"\n- {key}: " in report


def test_figure_is_a_picture(output: Path) -> None:
    with Image.open(output / "learning_curves.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (504, 1800, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_tensorboard_has_one_run_a_job(output: Path) -> None:
    folders = sorted((output / "tensorboard").glob("CartPole-v1/*/*"))
    assert [str(folder.relative_to(output / "tensorboard")) for folder in folders] == [
        f"CartPole-v1/{variant}/seed_{seed}_1" for variant in sorted(VARIANTS) for seed in (0, 1)
    ]
    assert EventAccumulator(str(folders[0])).Reload().Scalars("train/kl")


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--timesteps", "0"], ["--seeds", "x"], ["--variant", "clip"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def result(returns: list[float]) -> Result:
    """Episodes of 10 steps each with the given returns."""
    timesteps = 10 * np.arange(1, len(returns) + 1)
    updates = pd.DataFrame({"timesteps": [10, 20], "kl": [0.01, 0.03], "kl_coef": [1.0, 2.0]})
    episodes = pd.DataFrame({"timesteps": timesteps, "episode_return": returns})
    return Result(Run("CartPole-v1", "clip", 0, 2000, 1, {}), episodes, updates)


def test_steps_to_solve_by_hand() -> None:
    # 100 episodes of 400, then 500s: the mean of the last 100 reaches 475 with the 75th of them, after 175 episodes.
    solved = result([400.0] * 100 + [500.0] * 80)
    assert solved.steps_to_solve == 1750
    assert solved.final_return == pytest.approx((20 * 400 + 80 * 500) / 100)
    assert result([500.0] * 99).steps_to_solve is None
    assert result([474.9] * 300).steps_to_solve is None


def test_table_by_hand() -> None:
    row = table([result([500.0] * 100)]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["clip", "500.0", "0.0200", "2", "1,000", "1 of 1"]


def test_curves_are_steps() -> None:
    """Between two points a curve keeps the value of the earlier one; before the first it has none."""
    timesteps, values = pd.Series([10, 20]), pd.Series([1.0, 2.0])
    np.testing.assert_array_equal(_resampled(np.array([0, 10, 15, 20, 99]), timesteps, values), [np.nan, 1, 1, 2, 2])
