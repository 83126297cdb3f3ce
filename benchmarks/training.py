"""One job: its environments, its model, its training, and what is recorded on the way."""

import math
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_ppo_variants
from benchmarks.job import Job
from benchmarks.provenance import machine
from benchmarks.result import COLUMNS, LOGGED, Folder, Result
from benchmarks.variants import ALGORITHMS
from benchmarks.video import VideoCallback
from sb3_ppo_variants import PPO, TimeLimitAsTermination, TrustRegionLoggingCallback
from sb3_ppo_variants.arguments import parse_schedule

SEEDS_OF_A_RUN = 10_000
"""More than a run has environments."""
MAX_UNTOLD = 1000
"""Updates of a run that are kept if none of them is logged."""


def make_env(job: Job) -> VecEnv:
    """
    A job's environments.

    :param job: the job
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # CartPole-v0 has to be old
        wrapper = TimeLimitAsTermination if job.terminal_time_limits else None
        # By its name, SB3 makes an environment that could render: LunarLander then moves its sparks too, three times slower.
        make = partial(gym.make, job.env)
        env = make_vec_env(make, job.n_envs, _seed(job), env_kwargs=job.env_kwargs, wrapper_class=wrapper)
    if job.normalize:
        return VecNormalize(env, gamma=job.arguments.get("gamma", 0.99))
    return env


def random_return(job: Job, n_episodes: int = 30, max_steps: int = 100_000) -> float:
    """
    The mean return of actions drawn evenly from the action space; NaN if no episode ends.

    :param job: in whose environment
    :param n_episodes: episodes that are played to their end
    :param max_steps: an end of patience
    """
    env = make_env(job.model_copy(update={"n_envs": 1, "normalize": False, "seed": 0}))
    env.action_space.seed(0)
    env.reset()
    returns: list[float] = []
    for _ in range(max_steps):
        info = env.step(np.array([env.action_space.sample()]))[3][0]
        if "episode" in info:
            returns.append(info["episode"]["r"])
        if len(returns) == n_episodes:
            break
    env.close()
    return float(np.mean(returns)) if returns else math.nan


def make_model(job: Job, env: VecEnv, tensorboard_log: Path | None = None) -> OnPolicyAlgorithm:
    """
    A job's algorithm.

    :param job: the job
    :param env: its environments
    :param tensorboard_log: folder for TensorBoard, ``None`` for none
    """
    algorithm = ALGORITHMS[job.algorithm]
    log = None if tensorboard_log is None else str(tensorboard_log)
    return algorithm(job.policy, env, seed=_seed(job), device="cpu", tensorboard_log=log, **_objects(job.arguments, algorithm))


def _seed(job: Job) -> int:
    """SB3 seeds environments with consecutive numbers: those of different runs must not meet."""
    return SEEDS_OF_A_RUN * job.seed


def make_callbacks(job: Job) -> list[BaseCallback]:
    """
    The callbacks that a job asks for.

    :param job: the job
    :raises ValueError: if this package has no such callback
    """
    kinds = {name: kind for name, kind in vars(sb3_ppo_variants).items() if name.endswith("Callback")}
    unknown = job.callbacks.keys() - kinds.keys()
    if unknown:
        raise ValueError(f"`callbacks` must be among {', '.join(kinds)}, not {', '.join(sorted(unknown))}")
    return [kinds[name](**arguments) for name, arguments in job.callbacks.items()]


def _objects(arguments: dict[str, Any], algorithm: type[OnPolicyAlgorithm]) -> dict[str, Any]:
    """Arguments with classes and schedules for their names, which is all that YAML can write."""
    result = dict(arguments)
    if "rollout_buffer_class" in result:
        result["rollout_buffer_class"] = _named(sb3_ppo_variants, "rollout_buffer_class", result["rollout_buffer_class"])
    policy_kwargs = dict(result.get("policy_kwargs") or {})
    for name, module in (("activation_fn", th.nn), ("optimizer_class", th.optim)):
        if name in policy_kwargs:
            policy_kwargs[name] = _named(module, f"policy_kwargs.{name}", policy_kwargs[name])
    if policy_kwargs:
        result["policy_kwargs"] = policy_kwargs
    if not issubclass(algorithm, PPO):  # which parses them itself
        for name, value in result.items():
            if isinstance(value, str) and value.startswith("lin_"):
                result[name] = parse_schedule(name, value)
    return result


def _named(module: Any, argument: str, name: str) -> Any:
    if not isinstance(getattr(module, name, None), type):
        raise ValueError(f"`{argument}` must be the name of a class in {module.__name__}, not {name!r}")
    return getattr(module, name)


class RecordingCallback(BaseCallback):
    """
    Keeps each episode's return and length, and some of what is logged of each update.

    It has no hooks in the update, so that other algorithms can be recorded too.

    :param timesteps: how many are asked for
    :param report: gets the number of new ones after every rollout
    """

    def __init__(self, timesteps: int, report: Callable[[int], Any]) -> None:
        super().__init__()
        self._timesteps = timesteps
        self.episodes: list[tuple[int, float, int]] = []
        self.updates: list[tuple[float, ...]] = []
        self._report = report
        self._reported = 0
        self._kept = 0

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, info["episode"]["r"], info["episode"]["l"]))
        return True

    def _on_rollout_end(self) -> None:
        timesteps = min(self.num_timesteps, self._timesteps)
        self._report(timesteps - self._reported)
        self._reported = timesteps

    def _on_rollout_start(self) -> None:
        self._keep_update()

    def _on_training_end(self) -> None:
        self._keep_update()

    def _keep_update(self) -> None:
        """What the update before has logged; it hasn't been written yet."""
        logged = self.logger.name_to_value
        values = [float(logged.get(key, np.nan)) for key in LOGGED.values()]
        # A2C tells none of these, at each of very many updates.
        enough_since = self.num_timesteps - self._kept >= self._timesteps / MAX_UNTOLD
        if "train/n_updates" in logged and (enough_since or not np.isnan(values).all()):
            self.updates.append((self.num_timesteps, *values))
            self._kept = self.num_timesteps


def train(
    job: Job, origin: dict[str, str], tensorboard_log: Path | None, videos: Path | None, report: Callable[[int], Any]
) -> Result:
    """
    Train, on one torch thread.

    :param job: what to train
    :param origin: provenance of the grid
    :param tensorboard_log: folder for TensorBoard, ``None`` for none
    :param videos: folder for videos of the policy, ``None`` for none
    :param report: as :class:`RecordingCallback` takes it
    """
    th.set_num_threads(1)
    env = make_env(job)
    try:
        model = make_model(job, env, tensorboard_log)
        recording = RecordingCallback(job.timesteps, report)
        callbacks = [recording, *make_callbacks(job)]
        if tensorboard_log is not None and isinstance(model, PPO):
            callbacks.append(TrustRegionLoggingCallback(histogram_freq=10))
        video = None if videos is None else VideoCallback(job, videos)
        if video is not None:
            callbacks.append(video)
        start = time.perf_counter()
        # The logs' interval in rollouts: A2C's are many.
        model.learn(job.timesteps, callbacks, log_interval=100 if job.algorithm == "a2c" else 1, tb_log_name=job.name)
        wall_time = time.perf_counter() - start - (0.0 if video is None else video.seconds)
        model.dump_logs()  # SB3 writes what an update has logged after the next rollout
        model.logger.close()
    finally:
        env.close()
    return Result(
        job,
        pd.DataFrame(recording.episodes, columns=COLUMNS["episodes"]),
        pd.DataFrame(recording.updates, columns=COLUMNS["updates"]),
        wall_time,
        {**origin, "machine": machine()},
    )


def train_and_keep(
    job: Job, origin: dict[str, str], folder: Folder, tensorboard: bool, video: bool, report: Callable[[int], Any]
) -> str | None:
    """
    Train, and write the result into a folder.

    :param job: what to train
    :param origin: provenance of the grid
    :param folder: of the results
    :param tensorboard: whether to write TensorBoard's files
    :param video: whether to record videos
    :param report: as :class:`RecordingCallback` takes it
    :return: if anything has failed, a line that says what, and the traceback
    """
    try:
        folder.forget_logs(job)
        log = folder.tensorboard if tensorboard else None
        folder.write(train(job, origin, log, folder.videos if video else None, report))
    except (Exception, SystemExit) as error:  # an environment may want to exit
        summary = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
        return f"{summary}\n\n{traceback.format_exc()}"
    return None
