"""
How fast this package is beside SB3's PPO, and SBX's where that is installed.

All algorithms take turns in one process, on the same environments with the same hyperparameters; ratios are taken round by
round. Run it with ``python -m benchmarks.speed``, about two minutes a round; nothing else should run beside it.
"""

import argparse
import cProfile
import importlib.util
import io
import pstats
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import sb3_ppo_variants
from benchmarks.figures import draw_speed
from benchmarks.provenance import write_with_origin
from benchmarks.tables import markdown_of

N_ROLLOUT = 2048
"""Samples a rollout, whatever the number of environments."""
WHOLE_RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "HalfCheetah-v5, defaults": ("HalfCheetah-v5", 1, {}),
    "CartPole-v1, 8 x 256, batch 64": ("CartPole-v1", 8, {"n_steps": 256, "batch_size": 64}),
}
"""Environment, number of environments, hyperparameters."""
MEASURES = {
    "whole": "us a time step",
    "environment": "us a time step",
    "minibatch": "us a minibatch",
    "rollout": "us a rollout step",
    "memory": "MiB",
    "import": "s",
}


class Measurement(NamedTuple):
    """
    One measurement, in the unit of ``MEASURES``.

    :param measure: what is measured
    :param setting: on what
    :param algorithm: by whom, "none" for the environment alone
    :param turn: number of the round
    :param value: the measurement
    """

    measure: str
    setting: str
    algorithm: str
    turn: int
    value: float


class Instant(VecEnv):
    """
    Environments that take no time, with random observations, rewards and ends of episodes.

    :param n_envs: number of environments
    :param observation_size: numbers an observation
    :param action_space: of each environment
    """

    def __init__(self, n_envs: int, observation_size: int, action_space: spaces.Space[Any]) -> None:
        super().__init__(n_envs, spaces.Box(-np.inf, np.inf, (observation_size,), np.float32), action_space)
        rng = np.random.default_rng(0)
        self._observations = rng.normal(size=(64, n_envs, observation_size)).astype(np.float32)
        self._rewards = rng.normal(size=(64, n_envs)).astype(np.float32)
        self._dones = rng.random((64, n_envs)) < 0.01
        self._infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self._step = 0

    def reset(self) -> Any:
        """The first of the observations."""
        return self._observations[0]

    def step_async(self, actions: np.ndarray) -> None:
        """Nothing depends on the actions."""

    def step_wait(self) -> Any:
        """The next of 64 results."""
        self._step = (self._step + 1) % 64
        return self._observations[self._step], self._rewards[self._step].copy(), self._dones[self._step], self._infos

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """There are no attributes but the render mode."""
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """There are no attributes."""

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """There are no methods."""
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """By nothing."""
        return [False] * self.num_envs


def algorithms() -> dict[str, Any]:
    """The classes to compare, by name."""
    found: dict[str, Any] = {"SB3": stable_baselines3.PPO, "ours": sb3_ppo_variants.PPO}
    if importlib.util.find_spec("sbx") is not None:
        found["SBX"] = importlib.import_module("sbx").PPO
    return found


def whole_runs(n_rounds: int, found: dict[str, Any]) -> list[Measurement]:
    """Complete training, and the environments alone with random actions."""
    measurements = []
    for setting, (env_id, n_envs, arguments) in WHOLE_RUNS.items():
        models = {}
        for name, algorithm in found.items():
            env = make_vec_env(env_id, n_envs, seed=0)
            models[name] = algorithm("MlpPolicy", env, seed=0, device="cpu", **arguments).learn(N_ROLLOUT)
        env = make_vec_env(env_id, n_envs, seed=0)
        env.reset()
        actions = [np.stack([env.action_space.sample() for _ in range(n_envs)]) for _ in range(64)]
        for turn in range(n_rounds):
            for name, model in models.items():
                seconds = timed(partial(model.learn, 2 * N_ROLLOUT, reset_num_timesteps=False))
                measurements.append(Measurement("whole", setting, name, turn, seconds / (2 * N_ROLLOUT) * 1e6))
            seconds = timed(partial(_step, env, actions, 2 * N_ROLLOUT // n_envs))
            measurements.append(Measurement("environment", setting, "none", turn, seconds / (2 * N_ROLLOUT) * 1e6))
    return measurements


def _step(env: VecEnv, actions: list[np.ndarray], n_steps: int) -> None:
    for step in range(n_steps):
        env.step(actions[step % len(actions)])


def grid() -> dict[str, dict[str, Any]]:
    """Settings for updates: one thing differs from the defaults at a time, and then all."""
    base = {"batch_size": 64, "width": 64, "observation_size": 17, "n_actions": 6, "discrete": False}
    settings = {"defaults": base, "2 discrete actions": {**base, "observation_size": 4, "n_actions": 2, "discrete": True}}
    settings |= {f"batch {size}": {**base, "batch_size": size} for size in (256, 1024, 2048)}
    settings |= {f"width {width}": {**base, "width": width} for width in (128, 256, 512)}
    settings |= {f"{size} observations": {**base, "observation_size": size} for size in (4, 111, 376)}
    settings |= {f"{size} action{'s' * (size > 1)}": {**base, "n_actions": size} for size in (1, 17)}
    largest = {"batch_size": 2048, "width": 512, "observation_size": 376, "n_actions": 17, "discrete": False}
    return settings | {"all large": largest}


def updates(n_rounds: int, found: dict[str, Any]) -> list[Measurement]:
    """``train()`` on a full rollout buffer."""
    measurements = []
    for setting, values in grid().items():
        size = values["n_actions"]
        action_space = spaces.Discrete(size) if values["discrete"] else spaces.Box(-1, 1, (size,), np.float32)
        models = {}
        for name, algorithm in found.items():
            env = Instant(1, values["observation_size"], action_space)
            arguments = {"batch_size": values["batch_size"], "policy_kwargs": {"net_arch": [values["width"]] * 2}}
            models[name] = algorithm("MlpPolicy", env, seed=0, device="cpu", **arguments).learn(N_ROLLOUT)
        for turn in range(n_rounds):
            for name, model in models.items():
                n_minibatches = model.n_epochs * N_ROLLOUT // values["batch_size"]
                measurements.append(Measurement("minibatch", setting, name, turn, timed(model.train) / n_minibatches * 1e6))
    return measurements


def rollouts(n_rounds: int, found: dict[str, Any]) -> list[Measurement]:
    """``collect_rollouts()``, less the time in the environments' steps."""
    box = spaces.Box(-1, 1, (6,), np.float32)
    settings: dict[str, Callable[[], VecEnv]] = {
        "HalfCheetah-v5, 1 environment": partial(make_vec_env, "HalfCheetah-v5", 1, seed=0),
        "CartPole-v1, 8 environments": partial(make_vec_env, "CartPole-v1", 8, seed=0),
        **{f"instant, {n} environment{'s' * (n > 1)}": partial(Instant, n, 17, box) for n in (1, 8, 64, 256)},
    }
    measurements = []
    for setting, make_env in settings.items():
        models = {}
        for name, algorithm in found.items():
            env = make_env()
            model = algorithm("MlpPolicy", env, n_steps=N_ROLLOUT // env.num_envs, seed=0, device="cpu")
            models[name] = model.learn(N_ROLLOUT)
            env.step_wait = _Clock(env.step_wait)  # type: ignore[method-assign]
        for turn in range(n_rounds):
            for name, model in models.items():
                clock, callback = model.env.unwrapped.step_wait, model._init_callback(None)
                clock.seconds = 0.0
                collect = partial(model.collect_rollouts, model.env, callback, model.rollout_buffer, model.n_steps)
                seconds = timed(collect)
                value = (seconds - clock.seconds) / model.n_steps * 1e6
                measurements.append(Measurement("rollout", setting, name, turn, value))
    return measurements


class _Clock:
    """Adds up how long a function takes."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self) -> Any:
        start = time.perf_counter()
        result = self._function()
        self.seconds += time.perf_counter() - start
        return result


IMPORTS = {"SB3": "stable_baselines3", "ours": "sb3_ppo_variants", "SBX": "sbx"}
IMPORT = "import time; start = time.perf_counter(); from {module} import PPO; print(time.perf_counter() - start)"
PEAK = """
import numpy, torch
from gymnasium import spaces
from benchmarks.speed import Instant, grid
from {module} import PPO
torch.set_num_threads(1)
values = grid()["{setting}"]
size = values["n_actions"]
actions = spaces.Discrete(size) if values["discrete"] else spaces.Box(-1, 1, (size,), numpy.float32)
arguments = dict(batch_size=values["batch_size"], policy_kwargs=dict(net_arch=[values["width"]] * 2))
PPO("MlpPolicy", Instant(1, values["observation_size"], actions), device="cpu", **arguments).learn(3 * 2048)
status = open("/proc/self/status").read()  # not getrusage, which counts the parent before exec
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def processes(n_rounds: int, found: dict[str, Any]) -> list[Measurement]:
    """Peak memory of a short training, and import time, each in a process of its own."""
    measurements = []
    for turn in range(n_rounds):
        for name in found:
            measurements.append(Measurement("import", "", name, turn, _printed(IMPORT.format(module=IMPORTS[name]))))
            for setting in ("defaults", "all large"):
                peak = _printed(PEAK.format(module=IMPORTS[name], setting=setting))
                measurements.append(Measurement("memory", setting, name, turn, peak))
    return measurements


def _printed(code: str) -> float:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summarize(measurements: pd.DataFrame) -> pd.DataFrame:
    """
    One row a measure and setting.

    :param measurements: one row a :class:`Measurement`
    :return: each algorithm's median, and medians of the ratios to ours in each round, with the smallest and the largest
    """
    rows = []
    for (measure, setting), group in measurements.groupby(["measure", "setting"], sort=False):
        by_turn = group.pivot(index="turn", columns="algorithm", values="value")
        row: dict[str, Any] = {"measure": f"{measure}, {MEASURES[str(measure)]}", "setting": setting}
        row |= {str(name): f"{by_turn[name].median():.4g}" for name in by_turn}
        for name in ("SB3", "SBX"):
            if name in by_turn and "ours" in by_turn:
                ratios = by_turn[name] / by_turn["ours"]
                row[f"{name} / ours"] = f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def environment_share(measurements: pd.DataFrame) -> str:
    """How long whole runs take, in units of the environment alone."""
    lines = []
    whole = measurements[measurements["measure"].isin(["whole", "environment"])]
    for setting, group in whole.groupby("setting", sort=False):
        medians = group.groupby("algorithm")["value"].median()
        factors = [f"{name} {medians[name] / medians['none']:.1f}" for name in medians.index if name != "none"]
        lines.append(f"- {setting}: {', '.join(factors)} times the environment alone ({medians['none']:.1f} us a step)")
    return "\n".join(lines)


def profile() -> str:
    """Where the time of ours goes at the defaults: a table of functions by their own time, for each half of training."""
    algorithm = sb3_ppo_variants.PPO("MlpPolicy", make_vec_env("HalfCheetah-v5", 1, seed=0), seed=0, device="cpu")
    model = algorithm.learn(N_ROLLOUT)
    callback = model._init_callback(None)
    assert model.env is not None
    halves: dict[str, Callable[[], Any]] = {
        "collect_rollouts()": partial(model.collect_rollouts, model.env, callback, model.rollout_buffer, N_ROLLOUT),
        "train()": model.train,
    }
    texts = []
    for title, function in halves.items():
        profiler, stream = cProfile.Profile(), io.StringIO()
        profiler.runcall(function)
        pstats.Stats(profiler, stream=stream).strip_dirs().sort_stats("tottime").print_stats(25)
        texts.append(f"{title} with HalfCheetah-v5 and the defaults\n{stream.getvalue()}")
    return "\n".join(texts)


PARTS = {"whole": whole_runs, "updates": updates, "rollouts": rollouts, "processes": processes}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write measurements, summary and figure into a folder.

    :param arguments: of the command line
    """
    parser = argparse.ArgumentParser(description="Compare the speed of PPO in this package, SB3 and, if installed, SBX.")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each algorithm (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="folder of the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")

    warnings.filterwarnings("ignore")
    th.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    found = algorithms()
    print(f"Comparing {', '.join(found)}, {options.rounds} rounds.")
    rows: list[Measurement] = []
    for part in options.parts:
        # SBX has its own buffers and train(): only what it has in common with SB3 is measured inside.
        takes_part = found if part in ("whole", "processes") else {name: found[name] for name in ("SB3", "ours")}
        rows += PARTS[part](options.rounds if part != "processes" else min(options.rounds, 3), takes_part)
        measurements = pd.DataFrame(rows)
        measurements.to_csv(options.output / "measurements.csv", index=False)
        print(f"{part}: done")

    summary = summarize(measurements)
    summary.to_csv(options.output / "summary.csv", index=False)
    draw_speed(measurements, options.output / "speed.png")
    (options.output / "profile.txt").write_text(profile(), encoding="utf-8")
    table = markdown_of(summary)
    footnote = "Cells are medians of the rounds; ratios are medians of the rounds' ratios, with the smallest and the largest."
    share = environment_share(measurements) if "whole" in options.parts else ""
    parts = ["# Speed", "![Ratios](speed.png)", table, footnote, share]
    write_with_origin(list(filter(None, parts)), options.output)
    print(f"\n{table}\n\n{share}")


if __name__ == "__main__":
    main()
