"""Videos of a policy before, during and after training."""

import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.job import Job

MAX_STEPS = 2000
"""Of a video: not all environments have a time limit."""


class VideoCallback(BaseCallback):
    """
    Records an episode, played deterministically in an environment of its own: training doesn't notice.

    ``seconds`` is the time that this has taken.

    Files: ``<folder>/<env>/<variant>/seed_<n>/before/before-episode-0.mp4``, and the same with ``during`` (after half of the
    steps) and ``after``.

    :param job: that is trained
    :param folder: of the videos
    """

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__()
        self._job = job
        self._folder = folder / job.name
        self._half = False
        self.seconds = 0.0

    def _on_training_start(self) -> None:
        self._record("before")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if not self._half and self.num_timesteps >= self._job.timesteps / 2:
            self._half = True
            self._record("during")

    def _on_training_end(self) -> None:
        self._record("after")

    def _record(self, name: str) -> None:
        start = time.perf_counter()
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
            env: gym.Env[Any, Any] = gym.make(self._job.env, render_mode="rgb_array", **self._job.env_kwargs)
        env = RecordVideo(env, str(folder), name_prefix=name, episode_trigger=lambda episode: True, disable_logger=True)
        normalizer = self.model.get_vec_normalize_env()
        observation, _ = env.reset(seed=self._job.seed)
        for _ in range(MAX_STEPS):
            seen = normalizer.normalize_obs(observation) if isinstance(normalizer, VecNormalize) else observation
            action, _ = self.model.predict(seen, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
        env.close()  # type: ignore[no-untyped-call]
        self.seconds += time.perf_counter() - start
