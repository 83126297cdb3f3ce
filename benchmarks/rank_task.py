"""What each rank of a measurement does; torchrun starts it."""

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_variants import PPO, GradientNoiseScaleCallback, UpdateCallback, UpdateStats
from sb3_ppo_variants.distributed import Ranks

SIZES = tuple(2**exponent for exponent in range(8, 25, 2))
"""Bytes of the vectors whose all-reduce is measured."""


class Watch(UpdateCallback):
    """
    Seconds of each update, when it began, and what of it was rollout and communication; and what has come of it.

    Exchanges are counted as collectives: those of objects are two, of sizes and of contents.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.communication, self.n_exchanges = 0.0, 0

    def _on_rollout_start(self) -> None:
        self._start, self.communication, self.n_exchanges = time.perf_counter(), 0.0, 0
        self._began = time.time()

    def _on_rollout_end(self) -> None:
        self._rollout = time.perf_counter() - self._start

    def _on_update_settled(self) -> None:
        episodes: Any = self.model.ep_info_buffer or []
        row = {"seconds": time.perf_counter() - self._start, "rollout": self._rollout, "communication": self.communication}
        row |= {"timesteps": float(self.model.num_timesteps), "gradient_steps": float(self._steps)}
        row |= {"began": self._began, "others": float(self.n_exchanges - self._steps)}
        row["noise_scale"] = float(self.model.logger.name_to_value.get("train/gradient_noise_scale", np.nan))
        self.rows.append({**row, "return": float(np.mean([episode["r"] for episode in episodes])) if episodes else np.nan})

    def _on_update_end(self, stats: UpdateStats) -> None:
        self._steps = stats.gradient_steps


@contextmanager
def timed_communication(watch: Watch) -> Iterator[None]:
    """Adds up the time that this rank spends with, or waiting for, the others, and counts collectives."""
    together, gather, broadcast = Ranks._together, Ranks.gather, Ranks.broadcast

    @contextmanager
    def watched(ranks: Ranks) -> Iterator[None]:
        start = time.perf_counter()
        with together(ranks):
            yield
        watch.communication += time.perf_counter() - start
        watch.n_exchanges += 1

    def counted(exchange: Any) -> Any:
        def of_objects(ranks: Ranks, value: Any) -> Any:
            watch.n_exchanges += int(ranks.several)
            return exchange(ranks, value)

        return of_objects

    Ranks._together = watched  # type: ignore[method-assign, assignment]
    Ranks.gather, Ranks.broadcast = counted(gather), counted(broadcast)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ranks._together = together  # type: ignore[method-assign]
        Ranks.gather, Ranks.broadcast = gather, broadcast  # type: ignore[method-assign]


def train(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """
    Train on this rank.

    :param settings: ``env``, ``n_envs``, ``normalize``, ``n_updates`` and ``arguments`` of PPO; ``noise_scale``, if that is to
        be estimated
    :param seed: of everything
    :return: ``updates``, as :class:`Watch` has seen them, and ``n_bytes`` of a gradient
    """
    env: VecEnv = make_vec_env(settings["env"], settings["n_envs"])
    if settings["normalize"]:
        env = VecNormalize(env)
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", **settings["arguments"])
    n_timesteps = settings["n_updates"] * settings["arguments"]["n_steps"] * settings["n_envs"] * Ranks.present().size
    watch = Watch()
    with timed_communication(watch):
        model.learn(n_timesteps, [GradientNoiseScaleCallback(), watch] if settings.get("noise_scale") else watch)
    return {"updates": watch.rows, "n_bytes": 4 * sum(parameter.numel() for parameter in model.policy.parameters())}


def measure_all_reduce() -> list[tuple[int, float]]:
    """Bytes, and the median of the seconds that an all-reduce of so many takes."""
    ranks = Ranks.present()
    ranks.connect()
    rows = []
    for size in SIZES:
        vector, seconds = th.zeros(size // 4), []
        for _ in range(max(20, min(500, 2**26 // size))):
            start = time.perf_counter()
            ranks.average(vector)
            seconds.append(time.perf_counter() - start)
        rows.append((size, float(np.median(seconds))))
    return rows


def main() -> None:
    """Do what the command line says, and write the result as JSON, on rank 0 only."""
    parser = argparse.ArgumentParser(description="One rank of a measurement.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=json.loads, default=None, help="settings, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bind", action="store_true", help="to a core of its own")
    options = parser.parse_args()
    if options.bind:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ.get("LOCAL_RANK", "0"))]})
    warnings.filterwarnings("ignore")
    th.set_num_threads(1)
    result = measure_all_reduce() if options.train is None else train(options.train, options.seed)
    if os.environ.get("RANK", "0") == "0":
        options.output.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
