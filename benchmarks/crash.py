"""
Kills trainings with SIGKILL, again and again, and lets them go on from their checkpoints: what do they end with?

Each training runs in a process of its own. It is killed at random moments, while a checkpoint is being written, or in between,
and sometimes its newest checkpoint is cut short as after a power cut. It must end with the parameters, the optimiser's state,
the statistics and the random states of a training that was never killed. Run it with ``make crash``, about ten minutes.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from benchmarks.provenance import write_with_origin
from benchmarks.tables import markdown_of
from sb3_ppo_variants import PPO, PPOKL, GymnasiumVecEnv, ResumableCheckpointCallback
from sb3_ppo_variants.env_state import ResumableWrapper
from sb3_ppo_variants.resume import SUFFIX, in_order

N_ROLLOUTS = 60
KILLS_OF_A_RUN = 5
DAMAGED = 0.2
"""Share of kills behind which the newest checkpoint is cut short."""


class Scenario(NamedTuple):
    """
    A training.

    :param algorithm: of this package
    :param make_env: its environments
    :param arguments: its hyperparameters
    """

    algorithm: type[PPO]
    make_env: Callable[[], VecEnv]
    arguments: dict[str, Any]


def _vectorized() -> VecEnv:
    return GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode="sync"))


def _subprocesses() -> VecEnv:
    return make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv, wrapper_class=ResumableWrapper)


SCENARIOS = {
    "CartPole-v1, clip": Scenario(PPO, lambda: make_vec_env("CartPole-v1", 4), {"n_steps": 128, "batch_size": 64}),
    "CartPole-v1, eager": Scenario(
        PPO, lambda: make_vec_env("CartPole-v1", 2), {"n_steps": 128, "batch_size": 64, "n_epochs": 4, "engine": "eager"}
    ),
    "Pendulum-v1, adaptive KL, VecNormalize": Scenario(
        PPOKL, lambda: VecNormalize(make_vec_env("Pendulum-v1", 4)), {"n_steps": 128, "batch_size": 64, "kl_target": 0.02}
    ),
    "HalfCheetah-v5, critic's own passes": Scenario(
        PPO, lambda: make_vec_env("HalfCheetah-v5"), {"n_steps": 256, "batch_size": 64, "n_value_epochs": 5}
    ),
    "CartPole-v1 in two processes": Scenario(PPO, _subprocesses, {"n_steps": 128, "batch_size": 64}),
    "CartPole-v1, gymnasium's SyncVectorEnv": Scenario(PPO, _vectorized, {"n_steps": 128, "batch_size": 64}),
}


def child(name: str, folder: Path) -> None:
    """
    One process's part of a training: from its newest checkpoint, or from the start, to its end.

    :param name: of the scenario
    :param folder: of the checkpoints, and of the digest at the end
    """
    th.set_num_threads(1)
    scenario = SCENARIOS[name]
    env = scenario.make_env()
    checkpoints = ResumableCheckpointCallback(folder)
    print("training", flush=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*is no checkpoint, or a damaged one")
            model = scenario.algorithm.resume(folder, env, checkpoints, device="cpu")
    except FileNotFoundError:
        model = scenario.algorithm("MlpPolicy", env, seed=1, device="cpu", **scenario.arguments)
        model.learn(N_ROLLOUTS * model.n_steps * env.num_envs, checkpoints)
    (folder / "digest").write_text(digest(model))
    env.close()


def digest(model: PPO) -> str:
    """
    Of all that a training ends with.

    :param model: behind its training
    """
    result = hashlib.sha256()
    for part in _flat([model.get_parameters(), model.num_timesteps, model.kl_coef_state, model.ep_info_buffer]):
        result.update(part)
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        for statistics in (normalize.obs_rms, normalize.ret_rms):
            result.update(repr(vars(statistics)).encode())
    for state in (random.getstate(), np.random.get_state(), th.get_rng_state().numpy().tobytes(), model._last_obs):
        result.update(repr(state).encode())
    return result.hexdigest()


def _flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, th.Tensor):
        yield value.numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "t":  # an episode's end in seconds since the start
                yield str(key).encode()
                yield from _flat(item)
    elif isinstance(value, str) or not hasattr(value, "__iter__"):
        yield repr(value).encode()
    else:
        for item in value:
            yield from _flat(item)


def start(name: str, folder: Path) -> "subprocess.Popen[str]":
    """
    Start a process, and wait until it trains.

    :param name: of the scenario
    :param folder: of its checkpoints
    """
    command = [sys.executable, "-m", "benchmarks.crash", "--child", name, "--output", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(process: "subprocess.Popen[str]") -> None:
    """
    Wait for its end.

    :raises RuntimeError: if it fails
    """
    errors = process.communicate()[1]
    if process.returncode != 0:
        raise RuntimeError(f"a training has failed:\n{errors}")


def kill(process: "subprocess.Popen[str]", folder: Path, seconds: float, in_a_write: bool) -> bool:
    """
    Kill a training with all of its processes.

    :param process: of the training
    :param folder: of its checkpoints
    :param seconds: from now on
    :param in_a_write: whether to wait longer, for a checkpoint that is being written
    :return: whether it was still running
    """
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and process.poll() is None:
        time.sleep(0.001)
    while in_a_write and process.poll() is None and not any(folder.glob(".*.tmp")):
        pass
    running = process.poll() is None
    if running:
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
    process.communicate()
    return running


def measure(n_kills: int, names: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """
    Kill until there have been so many.

    :param n_kills: how many
    :param names: of the scenarios, which take turns
    :param seed: of the moments
    :return: one row a kill, and one a training's end
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    references: dict[str, tuple[str, float]] = {}
    run = 0
    while sum(row["kind"] == "kill" for row in rows) < n_kills:
        name = names[run % len(names)]
        with tempfile.TemporaryDirectory() as temporary:
            if name not in references:
                references[name] = _uninterrupted(name, Path(temporary, "reference"))
            folder = Path(temporary, "run")
            folder.mkdir()
            expected, seconds = references[name]
            for _ in range(KILLS_OF_A_RUN):
                process, in_a_write = start(name, folder), draw.random() < 0.5
                if not kill(process, folder, draw.uniform(0, seconds / KILLS_OF_A_RUN), in_a_write):
                    break
                half_written = len(list(folder.glob(".*.tmp")))
                whole = in_order(folder)
                damaged = len(whole) > 1 and draw.random() < DAMAGED
                if damaged:
                    content = whole[-1].read_bytes()
                    whole[-1].write_bytes(content[: draw.randrange(len(content))])
                rows.append(
                    {"kind": "kill", "run": run, "scenario": name, "half-written": half_written, "damaged": int(damaged)}
                    | {"checkpoints": len(list(folder.glob(f"*{SUFFIX}")))}
                )
                for left in folder.glob(".*.tmp"):
                    left.unlink()
            if not (folder / "digest").exists():
                finish(start(name, folder))
            same = (folder / "digest").read_text() == expected
        rows.append({"kind": "end", "run": run, "scenario": name, "same": same})
        print(f"run {run + 1}: {name}: {'the same' if same else 'DIFFERENT'}", flush=True)
        run += 1
    return pd.DataFrame(rows)


def _uninterrupted(name: str, folder: Path) -> tuple[str, float]:
    folder.mkdir()
    process, since = start(name, folder), time.perf_counter()
    finish(process)
    return (folder / "digest").read_text(), time.perf_counter() - since


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """
    One row a scenario, and one for all.

    :param rows: as :func:`measure` returns them
    """
    table = []
    for name, own in [*rows.groupby("scenario", sort=False), ("all", rows)]:
        kills, ends = own[own["kind"] == "kill"], own[own["kind"] == "end"]
        table.append(
            {
                "scenario": name,
                "trainings": len(ends),
                "kills": len(kills),
                "in a write": int((kills["half-written"] > 0).sum()),
                "newest checkpoint cut short": int(kills["damaged"].sum()),
                "lost": int((~ends["same"].astype(bool)).sum()),
            }
        )
    return pd.DataFrame(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write rows and summary into a folder.

    :param arguments: of the command line
    :raises SystemExit: with 1 if a training has ended with anything else
    """
    parser = argparse.ArgumentParser(description="Kill trainings, and compare what they end with.")
    parser.add_argument("--kills", type=int, default=60, help="how many (default: %(default)s)")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/crash"), help="folder (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        child(options.child, options.output)
        return
    if options.kills < 1:
        parser.error(f"--kills must be at least 1, not {options.kills}")
    options.output.mkdir(parents=True, exist_ok=True)
    rows = measure(options.kills, options.scenarios, options.seed)
    rows.to_csv(options.output / "kills.csv", index=False)
    summary = summarize(rows)
    table = markdown_of(summary)
    footnote = (
        "Lost: trainings that have ended with other parameters, optimiser's state, statistics, observations or random states "
        "than one that was never killed. In a write: a half-written checkpoint was left behind."
    )
    write_with_origin(["# Killed trainings", table, footnote], options.output)
    print(f"\n{table}")
    if summary["lost"].iloc[-1]:
        sys.exit(1)


if __name__ == "__main__":
    main()
