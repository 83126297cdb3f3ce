"""Training runs: what to train, the training, and what is kept of it."""

import multiprocessing
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import gymnasium as gym
import joblib
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from tqdm import tqdm

from sb3_ppo_variants import PPO, TrustRegionLoggingCallback, UpdateCallback, UpdateStats

EPISODES = 100
"""Episodes that a return is averaged over, as in gymnasium's definition of a solved task."""


@dataclass(frozen=True)
class Run:
    """
    One training run.

    :param env_id: the environment's name
    :param variant: the variant's name
    :param seed: of everything
    :param timesteps: steps of all environments together; training ends after the rollout that reaches them
    :param n_envs: number of environments
    :param arguments: those of :class:`sb3_ppo_variants.PPO`
    """

    env_id: str
    variant: str
    seed: int
    timesteps: int
    n_envs: int
    arguments: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """The run's name among others, also in TensorBoard."""
        return f"{self.env_id}/{self.variant}/seed_{self.seed}"


@dataclass(frozen=True)
class Result:
    """
    What is kept of a run.

    :param run: the run
    :param episodes: columns ``timesteps``, ``episode_return``; one row an episode, in the order of their ends
    :param updates: columns ``timesteps``, ``kl``, ``kl_coef``; one row an update
    """

    run: Run
    episodes: pd.DataFrame
    updates: pd.DataFrame

    @property
    def mean_returns(self) -> pd.Series:
        """Mean return of the last :data:`EPISODES` episodes at the end of each episode, NaN before that many."""
        return self.episodes["episode_return"].rolling(EPISODES).mean()

    @property
    def final_return(self) -> float:
        """Mean return of the last :data:`EPISODES` training episodes."""
        return float(self.episodes["episode_return"].tail(EPISODES).mean())

    @property
    def steps_to_solve(self) -> int | None:
        """Steps until the mean return of :data:`EPISODES` episodes reaches the task's threshold, ``None`` if never."""
        threshold = gym.spec(self.run.env_id).reward_threshold
        solved = self.episodes["timesteps"][self.mean_returns >= (np.inf if threshold is None else threshold)]
        return int(solved.iloc[0]) if len(solved) else None


class RecordingCallback(UpdateCallback):
    """
    Keeps each episode's return and each update's KL and beta.

    :param progress: gets the number of new steps after every update
    """

    def __init__(self, progress: "Queue[int | None]") -> None:
        super().__init__()
        self.episodes: list[tuple[int, float]] = []
        self.updates: list[tuple[int, float, float]] = []
        self._progress = progress
        self._reported = 0

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, info["episode"]["r"]))
        return True

    def _on_update_end(self, stats: UpdateStats) -> None:
        kl = np.nan if stats.displacement is None else stats.displacement.kl.mean().item()
        self.updates.append((self.num_timesteps, kl, stats.coefs.kl_coef))
        self._report(min(self.num_timesteps, self.locals["total_timesteps"]))

    def _report(self, timesteps: int) -> None:
        self._progress.put(timesteps - self._reported)
        self._reported = timesteps


def train(run: Run, tensorboard_log: Path | None, progress: "Queue[int | None]") -> Result:
    """
    Train, on one torch thread.

    :param run: what to train
    :param tensorboard_log: folder for TensorBoard, ``None`` for none
    :param progress: as :class:`RecordingCallback` takes it
    """
    th.set_num_threads(1)
    env = make_vec_env(run.env_id, run.n_envs, seed=run.seed)
    log = None if tensorboard_log is None else str(tensorboard_log)
    model = PPO("MlpPolicy", env, seed=run.seed, device="cpu", tensorboard_log=log, **run.arguments)
    recording = RecordingCallback(progress)
    model.learn(run.timesteps, callback=[recording, TrustRegionLoggingCallback(histogram_freq=10)], tb_log_name=run.name)
    model.logger.close()
    env.close()
    return Result(
        run,
        pd.DataFrame(recording.episodes, columns=["timesteps", "episode_return"]),
        pd.DataFrame(recording.updates, columns=["timesteps", "kl", "kl_coef"]),
    )


def train_all(runs: Sequence[Run], tensorboard_log: Path | None, n_jobs: int = -1) -> list[Result]:
    """
    Train in parallel, under one progress bar that counts steps.

    :param runs: what to train
    :param tensorboard_log: folder for TensorBoard, ``None`` for none
    :param n_jobs: number of processes, -1 for one a core
    :return: results in the order of the runs
    """
    with (
        multiprocessing.Manager() as manager,
        tqdm(total=sum(run.timesteps for run in runs), unit="step", unit_scale=True, mininterval=0.5) as bar,
    ):
        progress: Queue[int | None] = manager.Queue()
        thread = threading.Thread(target=_show, args=(progress, bar))
        thread.start()
        try:
            jobs = (joblib.delayed(train)(run, tensorboard_log, progress) for run in runs)
            return list(joblib.Parallel(n_jobs=n_jobs, batch_size=1, pre_dispatch="all")(jobs))
        finally:
            progress.put(None)
            thread.join()


def _show(progress: "Queue[int | None]", bar: "tqdm[Any]") -> None:
    while (n_steps := progress.get()) is not None:
        bar.update(n_steps)
