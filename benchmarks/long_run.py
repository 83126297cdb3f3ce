"""
A thousand updates with all that writes and keeps something: does memory stay flat, time steady, and nothing open?

Each engine trains in a process of its own, with TensorBoard, checkpoints, hooks in the update and an evaluation. Run it with
``make long-run``; nothing else should run beside it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch as th
from scipy.stats import theilslopes
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.provenance import write_with_origin
from benchmarks.tables import markdown_of
from sb3_ppo_variants import PPO, ResumableCheckpointCallback, TrustRegionLoggingCallback, UpdateCallback, UpdateStats

ENGINES = ("fused", "eager")
N_STEPS, N_ENVS = 128, 4


class Watch(UpdateCallback):
    """
    What each update finds: seconds since the one before, and of a piece of work that is always the same; resident memory in
    MiB, threads, open files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[float, float, float, int, int]] = []

    def _on_training_start(self) -> None:
        self._since = time.perf_counter()

    def _on_update_end(self, stats: UpdateStats) -> None:
        seconds = time.perf_counter() - self._since
        self.rows.append((seconds, yardstick(), memory(), threading.active_count(), open_files()))
        self._since = time.perf_counter()


def yardstick() -> float:
    """Seconds that a piece of work takes which is always the same: how fast the machine is just now."""
    start = time.perf_counter()
    vector = th.ones(64)
    for _ in range(1000):
        vector = th.tanh(vector)
    return time.perf_counter() - start


def open_files() -> int:
    """How many this process has open, without TensorBoard's, which a thread of its own opens for each write."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own, and what is closed meanwhile
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum("tfevents" not in target for target in targets)


def memory() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(engine: str, n_updates: int, folder: Path) -> pd.DataFrame:
    """
    Train, and watch.

    :param engine: of the model
    :param n_updates: how many
    :param folder: for logs and checkpoints
    :return: one row an update
    """
    th.set_num_threads(1)
    rollout = N_STEPS * N_ENVS
    env, eval_env = make_vec_env("CartPole-v1", N_ENVS), make_vec_env("CartPole-v1", N_ENVS)
    model = PPO(
        *("MlpPolicy", env),
        n_steps=N_STEPS,
        batch_size=128,
        n_epochs=4,
        engine=engine,
        device="cpu",
        tensorboard_log=str(folder),
    )
    watch = Watch()
    callbacks = [
        watch,
        ResumableCheckpointCallback(folder / "checkpoints", save_freq=10),
        TrustRegionLoggingCallback(),
        EvalCallback(eval_env, eval_freq=100 * N_STEPS, n_eval_episodes=4, verbose=0),
    ]
    model.learn(n_updates * rollout, callback=callbacks)
    model.logger.close()
    return pd.DataFrame(watch.rows, columns=["seconds", "yardstick", "memory", "threads", "files"])


def summarize(rows: pd.DataFrame) -> dict[str, str]:
    """
    The second tenth of a training beside its last tenth: in the first, all is still being set up.

    :param rows: as :func:`train` returns them
    """
    tenth = len(rows) // 10
    early, late = rows.iloc[tenth : 2 * tenth], rows.iloc[-tenth:]
    pace = (rows["seconds"] / rows["yardstick"]).groupby(rows.index // tenth).median()
    slope, _, *interval = (100 * len(pace) * each / pace.median() for each in theilslopes(pace))
    growth = np.polyfit(np.arange(len(rows) - tenth), rows["memory"].iloc[tenth:], 1)[0]
    return {
        "updates": str(len(rows)),
        "memory, MiB": f"{early['memory'].median():.0f}, {late['memory'].median():.0f}",
        "growth, KiB an update": f"{growth * 1024:.2f}",
        "ms an update": f"{early['seconds'].median() * 1e3:.1f}, {late['seconds'].median() * 1e3:.1f}",
        "late / early": f"{late['seconds'].median() / early['seconds'].median():.2f}",
        "slower by, %": f"{slope:+.0f} ({interval[0]:+.0f} to {interval[1]:+.0f})",
        "threads": f"{early['threads'].max()}, {late['threads'].max()}",
        "open files": f"{early['files'].max()}, {late['files'].max()}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write rows and summary into a folder.

    :param arguments: of the command line
    """
    parser = argparse.ArgumentParser(description="Train for many updates, and watch memory, time, threads and files.")
    parser.add_argument("--updates", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/long_run"), help="folder (default: %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.updates < 20:
        parser.error(f"--updates must be at least 20, not {options.updates}")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.engine is not None:
        with tempfile.TemporaryDirectory() as folder:
            train(options.engine, options.updates, Path(folder)).to_csv(options.output / f"{options.engine}.csv", index=False)
        return
    table = []
    for engine in ENGINES:
        command = [sys.executable, "-m", "benchmarks.long_run", "--engine", engine]
        subprocess.run([*command, "--updates", str(options.updates), "--output", str(options.output)], check=True)
        table.append({"engine": engine, **summarize(pd.read_csv(options.output / f"{engine}.csv"))})
    text = markdown_of(pd.DataFrame(table))
    footnote = (
        "Medians of the second tenth of the updates, and of the last; of threads and files the most, without TensorBoard's "
        "own, which it opens for each write. Growth: slope of a line through the memory of all updates but the first "
        "tenth. Slower by: change over the whole run, Theil and Sen's slope through the tenths' medians with its 95 % "
        "interval, of updates in units of a piece of work beside them that is always the same, as the machine isn't always "
        "equally fast."
    )
    write_with_origin(["# Long runs", text, footnote], options.output)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
