"""
What gymnasium's vectorised CartPole is worth: steps a second beside SB3's DummyVecEnv, and the time until it is solved.

Solved means that the policy's mean return over 100 evaluation episodes has reached 475 for the first time in its training;
later updates, of which there are none here, might take it below that again.

All take turns in one process, on one torch thread, in the opposite order in every other round, so that none gains from a
machine that gets slower or faster; ratios are taken round by round. Run it with
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
from benchmarks.provenance import write_with_origin
from benchmarks.speed import timed
from benchmarks.tables import markdown_of
from sb3_ppo_variants import GymnasiumVecEnv
from sb3_ppo_variants.vec_env import resets_in_next_step

ENV = "CartPole-v1"
N_STEPS = 100
"""Steps of each environment in one pass, or rollout; a measurement of speed repeats these."""
SECONDS = 1.0
"""What a measurement of speed takes at least."""
UNTIL_SOLVED = "seconds until solved"
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


KINDS: dict[str, Callable[..., VecEnv]] = {"DummyVecEnv": dummy, "VectorEnv": vectorized}


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
    Ends training when the mode of the policy first reaches the mean return that counts as solved.

    It is evaluated before the first update and after each, the last one too; that time is to be left out.

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
        self._evaluate()

    def _on_training_end(self) -> None:
        if not self.solved:  # as the last update is followed by no rollout
            self._evaluate()

    def _evaluate(self) -> None:
        start = time.perf_counter()
        # Each of as many environments plays one episode.
        mean_return, _ = evaluate_policy(self.model, self._env, N_EVALUATED)
        self.solved = bool(np.mean(mean_return) >= SOLVED)
        self.evaluating += time.perf_counter() - start


def seconds_to_solve(contender: Contender, seed: int) -> tuple[float, int]:
    """
    Train until solved for the first time, or to the end of the budget.

    :param contender: who
    :param seed: of everything
    :return: seconds without evaluations, NaN if it has not been solved; and time steps
    """
    env = contender.make_env(contender.n_envs, seed)
    model = contender.algorithm("MlpPolicy", env, seed=seed, device="cpu", **contender.arguments)
    until = UntilSolved(vectorized(N_EVALUATED))
    seconds = timed(partial(model.learn, contender.budget, until)) - until.evaluating
    return (seconds if until.solved else np.nan), model.num_timesteps


def steps_a_second(make_env: Callable[[int], VecEnv], n_envs: int) -> dict[str, float]:
    """
    Of the environments alone, and of this package's PPO collecting rollouts in them.

    :param make_env: takes the number of environments
    :param n_envs: number of environments
    :return: by name; steps that do nothing but reset aren't counted
    """
    return {"environments alone": speed_alone(make_env(n_envs)), "rollout": speed_of_rollouts(make_env(n_envs))}


def speed_alone(env: VecEnv) -> float:
    """Of these environments, with random actions."""
    actions = np.random.default_rng(0).integers(2, size=(N_STEPS, env.num_envs))
    dones: list[np.ndarray] = []

    def step_through() -> None:
        for each in actions:
            dones.append(env.step(each)[2])

    env.reset()
    step_through()
    del dones[:-1]
    seconds = seconds_of_passes(step_through)
    # Counted only now, as counting takes time too. The step behind an episode's last one is its reset.
    n_resets = int(np.count_nonzero(dones[:-1])) if resets_in_next_step(env) else 0
    return ((len(dones) - 1) * env.num_envs - n_resets) / seconds


def speed_of_rollouts(env: VecEnv) -> float:
    """Of these environments, with this package's PPO acting and keeping what happens."""
    model = sb3_ppo_variants.PPO("MlpPolicy", env, n_steps=N_STEPS, batch_size=N_STEPS * env.num_envs, device="cpu")
    _, callback = model._setup_learn(1)
    collect = partial(model.collect_rollouts, env, callback, model.rollout_buffer, N_STEPS)
    collect()
    n_before = model.num_timesteps
    seconds = seconds_of_passes(collect)
    return (model.num_timesteps - n_before) / seconds


def seconds_of_passes(run_pass: Callable[[], Any]) -> float:
    """
    Call it again and again, until ``SECONDS`` have gone.

    :param run_pass: one pass, which has been called before, so that nothing is done for the first time
    :return: seconds that all calls have taken
    """
    seconds = 0.0
    while seconds < SECONDS:
        seconds += timed(run_pass)
    return seconds


def measure(n_rounds: int) -> pd.DataFrame:
    """One row a measurement: what, by whom, in which round, its value, and the time steps of those that solve."""
    for contender in CONTENDERS.values():
        seconds_to_solve(contender._replace(budget=1), 0)  # one update, as what torch loads on first use isn't the first's
    rows = []
    for turn in range(n_rounds):
        direction = 1 if turn % 2 == 0 else -1
        for n_envs in (64, 1024):
            for name, make_env in list(KINDS.items())[::direction]:
                for what, value in steps_a_second(make_env, n_envs).items():
                    rows.append((f"steps/s, {n_envs} environments, {what}", name, turn, value, np.nan))
        for name, contender in list(CONTENDERS.items())[::direction]:
            rows.append((UNTIL_SOLVED, name, turn, *seconds_to_solve(contender, turn)))
        print(f"round {turn + 1} of {n_rounds}: done")
    return pd.DataFrame(rows, columns=["measure", "who", "turn", "value", "timesteps"])


def summarize(measurements: pd.DataFrame) -> pd.DataFrame:
    """
    One row a measure and contender.

    Who hasn't solved it in a round has taken for ever: infinitely many seconds and time steps, 0 times as fast as who has.

    :param measurements: as :func:`measure` returns them
    :return: medians, and the ratio to the measure's first contender, round by round: how many times as fast; "-" for none
    """
    rows = []
    for what, group in measurements.groupby("measure", sort=False):
        names = group["who"].unique()
        values, steps = (group.pivot(index="turn", columns="who", values=column)[names] for column in ("value", "timesteps"))
        solved = values.notna()
        if what == UNTIL_SOLVED:
            values, steps = values.where(solved, np.inf), steps.where(solved, np.inf)
        first = values[names[0]]
        for who in names:
            # Where neither has solved it, inf / inf is NaN, which the median and the extremes leave out.
            ratios = (first / values[who] if what == UNTIL_SOLVED else values[who] / first).dropna()
            extremes = f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            row = {"measure": what, "who": who, "median": f"{values[who].median():.4g}"}
            row["times as fast"] = "-" if ratios.empty else extremes
            row["time steps"] = f"{steps[who].median():.0f}" if what == UNTIL_SOLVED else ""
            row["solved"] = f"{solved[who].sum()} of {len(solved)}" if what == UNTIL_SOLVED else ""
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
    table = markdown_of(summary)
    footnote = (
        f"Medians of the rounds. Speeds are of at least {SECONDS:g} s, after a warm-up. How many times as fast as the first "
        "of each measure: the median of the rounds' ratios, with the smallest and the largest. Solved: the mean return of the "
        f"policy's mode over {N_EVALUATED} evaluation episodes has reached {SOLVED} for the first time, whether or not it "
        "would stay there. That is looked at before the first update and after each; the look isn't counted. Who has not got "
        "there within its budget has taken infinitely long; rounds in which nor has the first are left out of its ratios."
    )
    write_with_origin(["# Vectorised environments", table, footnote], options.output)
    print(f"\n{table}")


if __name__ == "__main__":
    main()
