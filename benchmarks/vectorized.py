"""
What gymnasium's vectorised CartPole is worth: steps a second beside SB3's DummyVecEnv, and the time until it is solved.

All take turns in one process, on one torch thread; ratios are taken round by round. Run it with
``python -m benchmarks.vectorized``, about a minute a round; nothing else should run beside it.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

import sb3_ppo_variants
from benchmarks.provenance import provenance
from benchmarks.speed import timed
from benchmarks.tables import markdown
from sb3_ppo_variants import GymnasiumVecEnv
from sb3_ppo_variants.vec_env import resets_ahead

ENV = "CartPole-v1"
N_STEPS = 500
"""Steps of each environment in one measurement of speed."""
SOLVED, N_EVALUATED = 475, 100
"""Mean return, over so many episodes, that gymnasium calls solved."""


def dummy(n_envs: int, seed: int = 0) -> VecEnv:
    """SB3's way."""
    return make_vec_env(ENV, n_envs, seed=seed)


def vectorized(n_envs: int, seed: int = 0) -> VecEnv:
    """Gymnasium's."""
    env = GymnasiumVecEnv(gym.make_vec(ENV, num_envs=n_envs, vectorization_mode="vector_entry_point"))
    env.seed(seed)
    return env


class Contender(NamedTuple):
    """
    Who is to solve the environment.

    :param algorithm: PPO of SB3 or of this package
    :param make_env: takes the number of environments and a seed
    :param n_envs: number of environments
    :param arguments: hyperparameters
    :param budget: time steps over which rates fall to 0, and after which it has failed
    """

    algorithm: type[stable_baselines3.PPO]
    make_env: Callable[[int, int], VecEnv]
    n_envs: int
    arguments: dict[str, Any]
    budget: int


TUNED: dict[str, Any] = {
    **{"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20},
    **{"learning_rate": LinearSchedule(0.001, 0.0, 1.0), "clip_range": LinearSchedule(0.2, 0.0, 1.0)},
}
"""The RL Zoo's for PPO on CartPole-v1 with 8 environments."""
WIDE: dict[str, Any] = {
    **{"n_steps": 32, "batch_size": 1024, "gae_lambda": 0.98, "ent_coef": 0.01},
    **{"learning_rate": LinearSchedule(0.01, 0.0, 1.0)},
}
"""For 64 environments: found by a search with Optuna on other seeds."""
CONTENDERS = {
    "SB3, 8 in DummyVecEnv": Contender(stable_baselines3.PPO, dummy, 8, TUNED, 100_000),
    "ours, 8 in DummyVecEnv": Contender(sb3_ppo_variants.PPO, dummy, 8, TUNED, 100_000),
    "SB3, 64 in DummyVecEnv": Contender(stable_baselines3.PPO, dummy, 64, WIDE, 50_000),
    "ours, 64 in DummyVecEnv": Contender(sb3_ppo_variants.PPO, dummy, 64, WIDE, 50_000),
    "ours, 64 vectorised": Contender(sb3_ppo_variants.PPO, vectorized, 64, WIDE, 50_000),
}
"""The first is what the others are compared with; SB3 with 64 has the hyperparameters of ours with 64."""


class UntilSolved(BaseCallback):
    """
    Ends training when the environment is solved by the mode of the policy.

    The evaluation, after every rollout, isn't counted.

    :param env: for the evaluation
    """

    def __init__(self, env: VecEnv) -> None:
        super().__init__()
        self._env = env
        self.evaluating = 0.0
        self.solved = False

    def _on_step(self) -> bool:
        return not self.solved

    def _on_rollout_start(self) -> None:
        start = time.perf_counter()
        # Each of as many environments plays one episode.
        mean_return, _ = evaluate_policy(self.model, self._env, N_EVALUATED)
        self.solved = bool(np.mean(mean_return) >= SOLVED)
        self.evaluating += time.perf_counter() - start


def seconds_to_solve(contender: Contender, seed: int) -> tuple[float, int]:
    """
    Train until solved, or to the end of the budget.

    :param contender: who
    :param seed: of everything
    :return: seconds, NaN if it has not been solved; and time steps
    """
    env = contender.make_env(contender.n_envs, seed)
    model = contender.algorithm("MlpPolicy", env, seed=seed, device="cpu", **contender.arguments)
    until = UntilSolved(vectorized(N_EVALUATED))
    seconds = timed(partial(model.learn, contender.budget, until)) - until.evaluating
    return (seconds if until.solved else np.nan), model.num_timesteps


def steps_a_second(make_env: Callable[[int], VecEnv], n_envs: int) -> dict[str, float]:
    """Of the environments alone, and of this package's PPO collecting a rollout in them."""
    env = make_env(n_envs)
    env.reset()
    actions = np.random.default_rng(0).integers(2, size=(N_STEPS, n_envs))
    n_steps = 0

    def step_through() -> None:
        nonlocal n_steps
        for each in actions:
            n_steps += int(np.count_nonzero(~resets_ahead(env)))  # those that do more than reset
            env.step(each)

    alone = timed(step_through)
    model = sb3_ppo_variants.PPO("MlpPolicy", make_env(n_envs), n_steps=N_STEPS, n_epochs=1, batch_size=4096, device="cpu")
    _, callback = model._setup_learn(1)
    assert model.env is not None
    rollout = timed(partial(model.collect_rollouts, model.env, callback, model.rollout_buffer, N_STEPS))
    return {"environments alone": n_steps / alone, "rollout": model.num_timesteps / rollout}


def measure(n_rounds: int) -> pd.DataFrame:
    """One row a measurement: what, by whom, in which round, its value, and the time steps of those that solve."""
    rows = []
    for turn in range(n_rounds):
        for n_envs in (64, 1024):
            for name, make_env in (("DummyVecEnv", dummy), ("VectorEnv", vectorized)):
                for measure, value in steps_a_second(make_env, n_envs).items():
                    rows.append((f"steps/s, {n_envs} environments, {measure}", name, turn, value, np.nan))
        for name, contender in CONTENDERS.items():
            rows.append(("seconds until solved", name, turn, *seconds_to_solve(contender, turn)))
        print(f"round {turn + 1} of {n_rounds}: done")
    return pd.DataFrame(rows, columns=["measure", "who", "turn", "value", "timesteps"])


def summarize(measurements: pd.DataFrame) -> pd.DataFrame:
    """
    One row a measure and contender.

    :param measurements: as :func:`measure` returns them
    :return: medians, and the ratio to the measure's first contender, round by round: how many times as fast
    """
    rows = []
    for measure, group in measurements.groupby("measure", sort=False):
        by_turn = group.pivot(index="turn", columns="who", values="value")[group["who"].unique()]
        first = by_turn[by_turn.columns[0]]
        for who in by_turn:
            ratios = first / by_turn[who] if measure == "seconds until solved" else by_turn[who] / first
            row = {"measure": measure, "who": who, "median": f"{by_turn[who].median():.4g}"}
            row["times as fast"] = f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            steps = group.loc[group["who"] == who, "timesteps"].median()
            row["time steps"] = "" if np.isnan(steps) else f"{steps:.0f}"
            row["solved"] = f"{by_turn[who].count()} of {len(by_turn)}" if measure == "seconds until solved" else ""
            rows.append(row)
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write measurements and summary into a folder.

    :param arguments: of the command line
    """
    parser = argparse.ArgumentParser(description="Compare gymnasium's vectorised CartPole with SB3's DummyVecEnv.")
    parser.add_argument("--rounds", type=int, default=10, help="seeds, and turns of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/vectorized"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    warnings.filterwarnings("ignore")
    th.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    measurements = measure(options.rounds)
    measurements.to_csv(options.output / "measurements.csv", index=False)
    summary = summarize(measurements)
    summary.to_csv(options.output / "summary.csv", index=False)
    table = markdown([tuple(summary.columns), *summary.itertuples(index=False, name=None)])
    footnote = (
        "Medians of the rounds. How many times as fast as the first of each measure: the median of the rounds' ratios, with "
        f"the smallest and the largest. Solved: a mean return of {SOLVED} over {N_EVALUATED} episodes of the policy's mode, "
        "looked at after every update; that look isn't counted."
    )
    origin = "\n".join(f"- {key}: {value}" for key, value in provenance().items())
    report = ["# Vectorised environments", table, footnote, origin]
    (options.output / "report.md").write_text("\n\n".join(report) + "\n", encoding="utf-8")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
