"""What is kept of a run, and the folder that keeps it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import pandas as pd

from benchmarks.job import Job
from benchmarks.provenance import versions

LOGGED = {"kl": "train/kl", "kl_coef": "train/kl_coef", "clip_fraction": "train/clip_fraction"}
"""Keys of the logs that are kept of each update."""
COLUMNS = {"episodes": ["timesteps", "episode_return", "length"], "updates": ["timesteps", *LOGGED]}
"""Of the tables of a result."""
REPORT = ("report.md", "jobs.csv", "summary.csv", "episodes.csv.gz", "updates.csv.gz")
"""Files of a report, beside its figures."""
EPISODES = 100
"""Episodes that a return is averaged over, as in gymnasium's definition of a solved task."""
FINAL = 0.1
"""Share of the time steps at the end in which the final performance is measured."""


class ResultsError(Exception):
    """A folder can't keep a grid's results; the message says why."""


@dataclass(frozen=True)
class Result:
    """
    What is kept of a run.

    :param job: what was trained
    :param episodes: columns ``timesteps``, ``episode_return``, ``length``; one row an episode, in the order of their ends
    :param updates: columns ``timesteps``, ``kl``, ``kl_coef``, ``clip_fraction``; one row an update, NaN for what the
        algorithm doesn't tell
    :param wall_time: in seconds
    :param provenance: where it comes from
    """

    job: Job
    episodes: pd.DataFrame
    updates: pd.DataFrame
    wall_time: float
    provenance: dict[str, str]

    @property
    def mean_returns(self) -> "pd.Series[float]":
        """Mean return of the last :data:`EPISODES` episodes at the end of each episode, NaN before that many."""
        return self.episodes["episode_return"].rolling(EPISODES).mean()

    @property
    def final_return(self) -> float:
        """Mean return of the training episodes that have ended in the last tenth of the run; NaN if none ever has."""
        late = self.episodes["timesteps"] > (1 - FINAL) * self.updates["timesteps"].max()
        episodes = self.episodes[late] if late.any() else self.episodes.tail(1)
        return float(episodes["episode_return"].mean())

    @property
    def rollouts(self) -> pd.DataFrame:
        """Of each update: number of ``episodes`` that have ended in its rollout; their ``mean_return``, NaN if none has."""
        rollout = np.searchsorted(self.updates["timesteps"], self.episodes["timesteps"])
        told = self.episodes["episode_return"].groupby(rollout).agg(["size", "mean"]).reindex(range(len(self.updates)))
        return pd.DataFrame({"episodes": told["size"].fillna(0).astype(int), "mean_return": told["mean"]})

    @property
    def threshold(self) -> float | None:
        """The mean return of :data:`EPISODES` episodes that counts as solved; ``None`` if the task has none."""
        if self.job.threshold is None:
            return self.job.reward_threshold
        return self.job.threshold if isinstance(self.job.threshold, float | int) else None

    def steps_to_solve(self, threshold: float) -> float:
        """
        Steps until the mean return of :data:`EPISODES` episodes reaches a threshold, infinite if never.

        :param threshold: that return
        """
        solved = self.episodes["timesteps"][self.mean_returns >= threshold]
        return float(solved.iloc[0]) if len(solved) else np.inf

    def steps_to_return(self, threshold: float) -> float:
        """
        Steps until the mean return of a tenth of the run's steps reaches a threshold, infinite if never.

        :param threshold: that return
        """
        ends, returns = self.episodes["timesteps"].to_numpy(), self.episodes["episode_return"].to_numpy()
        window = FINAL * self.updates["timesteps"].max()
        first = np.searchsorted(ends, ends - window, side="right")
        sums = np.concatenate([[0.0], np.cumsum(returns)])
        means = (sums[1:] - sums[first]) / np.maximum(np.arange(1, len(ends) + 1) - first, 1)
        reached = ends[(means >= threshold) & (ends >= window)]
        return float(reached[0]) if len(reached) else np.inf

    def to_json(self) -> str:
        """All of it."""
        content = {
            "job": self.job.model_dump(),
            "provenance": self.provenance,
            "wall_time": self.wall_time,
            "episodes": _columns(self.episodes),
            "updates": _columns(self.updates),
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """
        The result that :meth:`to_json` has written.

        :raises ValueError: if it hasn't
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.keys() != {"job", "provenance", "wall_time", "episodes", "updates"}:
            raise ValueError("no result of a run")
        frames = {name: pd.DataFrame(content[name], dtype=float) for name in COLUMNS}
        for name, columns in COLUMNS.items():
            if list(frames[name]) != columns:
                raise ValueError(f"`{name}` must have the columns {', '.join(columns)}")
            frames[name]["timesteps"] = frames[name]["timesteps"].astype(int)
        if len(frames["updates"]) == 0 or not isinstance(content["wall_time"], float):
            raise ValueError("no updates, or no wall time")
        if not isinstance(content["provenance"], dict) or "versions" not in content["provenance"]:
            raise ValueError("`provenance` lacks the versions")
        return cls(
            Job.model_validate(content["job"]), **frames, wall_time=content["wall_time"], provenance=content["provenance"]
        )


def _columns(frame: pd.DataFrame) -> dict[str, list[float | None]]:
    """NaN is no JSON."""
    return {str(name): [None if pd.isna(value) else value for value in frame[name].tolist()] for name in frame}


class Folder:
    """
    A folder with one file a finished job, written whole or not at all.

    :param path: of the folder
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def jobs(self) -> Path:
        """Where results go."""
        return self.path / "jobs"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's files go."""
        return self.path / "tensorboard"

    @property
    def videos(self) -> Path:
        """Where videos go."""
        return self.path / "videos"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keep other comparisons out.

        :raises ResultsError: if one is writing to this folder, or the folder can't be made
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"{self.path}: {error.strerror}") from error
        try:
            with filelock.FileLock(self.path / ".lock", timeout=0):
                yield
        except filelock.Timeout as error:
            raise ResultsError(f"{self.path}: another comparison is writing there") from error

    def check(self, jobs: Sequence[Job]) -> None:
        """
        Look whether what is there belongs to a grid.

        :param jobs: of the grid
        :raises ResultsError: if it doesn't
        """
        for folder in (self.jobs, self.tensorboard, self.videos):
            if folder.exists() and not folder.is_dir():
                raise ResultsError(f"{folder}: must be a folder, and is a file; take another folder for the results")
        if not self.jobs.exists() and (there := [name for name in REPORT if (self.path / name).exists()]):
            raise ResultsError(f"{self.path}: has a {there[0]} and no results of runs; take another folder, or remove it")
        expected = {self._file(job): job for job in jobs}
        for file in sorted(each for each in self.jobs.rglob("seed_*.json") if each.is_file()):
            if file not in expected:
                raise ResultsError(f"{file}: results of another grid, which has this job too; take another folder")
            result = self._read(file)
            differences = _differences(result.job, expected[file])
            if differences:
                raise ResultsError(f"{file}: results of another grid, with {differences}; take another folder")
            if result.provenance["versions"] != versions():
                raise ResultsError(
                    f"{file}: results of other versions, {result.provenance['versions']} and not {versions()}; "
                    f"take another folder"
                )

    def finished(self, job: Job) -> bool:
        """Whether a job's result is there."""
        return self._file(job).exists()

    def read(self, jobs: Iterable[Job]) -> list[Result]:
        """
        The results of those of some jobs that have been finished.

        :raises ResultsError: if a file can't be read
        """
        return [self._read(self._file(job)) for job in jobs if self.finished(job)]

    def write(self, result: Result) -> None:
        """
        Keep a result; a file is there only when all of it is.

        :raises OSError: if the disk is full, or the like
        """
        file = self._file(result.job)
        write_whole(file, result.to_json())
        self._error_file(result.job).unlink(missing_ok=True)

    def write_error(self, job: Job, error: str) -> Path:
        """
        Keep the traceback of a job that has failed.

        :return: the file
        :raises OSError: if the disk is full, or the like
        """
        write_whole(self._error_file(job), error)
        return self._error_file(job)

    def forget_logs(self, job: Job) -> None:
        """Remove what an interrupted run of a job has left for TensorBoard."""
        for folder in self.tensorboard.glob(f"{job.name}_*"):
            shutil.rmtree(folder)

    def _file(self, job: Job) -> Path:
        return self.jobs / f"{job.name}.json"

    def _error_file(self, job: Job) -> Path:
        return self.jobs / f"{job.name}.error.txt"

    def _read(self, file: Path) -> Result:
        try:
            return Result.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, TypeError, OSError) as error:
            raise ResultsError(f"{file}: not readable as a result ({error}); remove it, and its job runs again") from error


def write_whole(file: Path, text: str) -> None:
    """
    Write a file such that it is there with all its content, whatever happens meanwhile, or not at all.

    :param file: its folders are made
    :param text: its content
    :raises OSError: if that is impossible; nothing is left behind
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _differences(found: Job, wanted: Job) -> str:
    """In words; nothing if there are none."""
    one, other = (json.loads(json.dumps(job.model_dump())) for job in (found, wanted))  # which has no tuples
    return ", ".join(f"{name} {one[name]!r} and not {other[name]!r}" for name in other if one[name] != other[name])
