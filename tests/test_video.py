"""Videos of a policy before, during and after training."""

from pathlib import Path

import pytest
from moviepy import VideoFileClip

from benchmarks.compare import main

pytestmark = pytest.mark.slow


def flags(tmp_path: Path, *more: str) -> list[str]:
    shared = ["--env", "CartPole-v1", "--variants", "clip", "--seeds", "2", "--timesteps", "600", "--set", "n_steps=200"]
    return [*shared, "batch_size=200", "--backend", "sequential", "--output", str(tmp_path), *more]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_videos_of_the_first_seed(tmp_path: Path) -> None:
    assert main(flags(tmp_path / "with", "--video")) == 0
    videos = sorted((tmp_path / "with" / "videos").rglob("*.mp4"))
    folder = tmp_path / "with/videos/CartPole-v1/clip/seed_0"
    assert videos == [folder / f"{moment}/{moment}-episode-0.mp4" for moment in ("after", "before", "during")]
    for video in videos:
        with VideoFileClip(str(video)) as clip:
            assert clip.n_frames > 5
            assert clip.size == [600, 400]
    assert main(flags(tmp_path / "without")) == 0
    for seed in (0, 1):  # training doesn't notice
        files = [tmp_path / name / f"tensorboard/CartPole-v1/clip/seed_{seed}_1" for name in ("with", "without")]
        assert all(file.exists() for file in files)
    episodes = [(tmp_path / name / "episodes.csv.gz").read_bytes() for name in ("with", "without")]
    assert episodes[0] == episodes[1]
