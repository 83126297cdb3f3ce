"""The benchmark of vectorised environments: what it computes from its measurements, and that it measures what it says."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from benchmarks import vectorized
from benchmarks.vectorized import CONTENDERS, UNTIL_SOLVED, Contender, main, measure, seconds_to_solve, summarize

pytestmark = pytest.mark.slow

COLUMNS = ["measure", "who", "turn", "value", "timesteps"]
CONTENDER = CONTENDERS["ours, 64 vectorised"]
NEVER = np.nan


class Clock:
    """Stands still but for what is said to take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Lasting(VecEnvWrapper):
    """
    Every step takes time.

    :param venv: CartPole, whose reward is 1 in every step but those that only reset
    :param clock: that tells the time
    :param seconds: of the first, second, ... pass over so many steps; the last one's of all others
    :param n_steps: of one pass
    """

    def __init__(self, venv: VecEnv, clock: Clock, seconds: tuple[float, ...], n_steps: int = 1) -> None:
        super().__init__(venv)
        self.clock, self.seconds, self.n_steps = clock, seconds, n_steps
        self.rewards: list[np.ndarray] = []

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        n_passes = len(self.rewards) // self.n_steps
        self.clock.now += self.seconds[min(n_passes, len(self.seconds) - 1)]
        observations, rewards, dones, infos = self.venv.step_wait()
        self.rewards.append(rewards.copy())
        return observations, rewards, dones, infos


def summary_of(measure: str, first: list[float], other: list[float], steps: int = 1000) -> dict[str, list[str]]:
    """The summary of two contenders, "first" and "other", by their values in each round."""
    rows = [
        (measure, who, turn, value, steps if measure == UNTIL_SOLVED else np.nan)
        for who, values in (("first", first), ("other", other))
        for turn, value in enumerate(values)
    ]
    return summarize(pd.DataFrame(rows, columns=COLUMNS)).to_dict("list")


def test_summary_by_hand() -> None:
    """Speeds: 30 / 10 = 3 and 80 / 20 = 4 times as fast. Times: 10 / 2 = 5 and 12 / 4 = 3."""
    speed = "steps/s, 64 environments, rollout"
    rows = [
        *((speed, "DummyVecEnv", turn, value, np.nan) for turn, value in enumerate((10.0, 20.0))),
        *((speed, "VectorEnv", turn, value, np.nan) for turn, value in enumerate((30.0, 80.0))),
        *((UNTIL_SOLVED, "SB3", turn, value, steps) for turn, (value, steps) in enumerate([(10.0, 5000), (12.0, 9000)])),
        *((UNTIL_SOLVED, "ours", turn, value, steps) for turn, (value, steps) in enumerate([(2.0, 4000), (4.0, 6000)])),
    ]
    assert summarize(pd.DataFrame(rows, columns=COLUMNS)).to_dict("list") == {
        "measure": [speed, speed, UNTIL_SOLVED, UNTIL_SOLVED],
        "who": ["DummyVecEnv", "VectorEnv", "SB3", "ours"],
        "median": ["15", "55", "11", "3"],
        "times as fast": ["1.00 (1.00 to 1.00)", "3.50 (3.00 to 4.00)", "1.00 (1.00 to 1.00)", "4.00 (3.00 to 5.00)"],
        "time steps": ["", "", "7000", "5000"],
        "solved": ["", "", "2 of 2", "2 of 2"],
    }


def test_who_is_compared_with_is_named_first_whatever_came_last() -> None:
    rows = [("steps/s", who, turn, 1.0, np.nan) for turn, order in enumerate(("ab", "ba", "ba")) for who in order]
    assert summarize(pd.DataFrame(rows, columns=COLUMNS))["who"].tolist() == ["a", "b"]


def test_a_round_that_is_not_solved_is_0_times_as_fast() -> None:
    """Ratios 10 / 2 = 5, 0 and 0: it doesn't pay to solve only the easy one. Of 2, inf and inf the median is inf."""
    summary = summary_of(UNTIL_SOLVED, [10.0, 10.0, 10.0], [2.0, NEVER, NEVER])
    assert summary["median"] == ["10", "inf"]
    assert summary["times as fast"] == ["1.00 (1.00 to 1.00)", "0.00 (0.00 to 5.00)"]
    assert summary["time steps"] == ["1000", "inf"]
    assert summary["solved"] == ["3 of 3", "1 of 3"]


def test_a_round_that_only_the_first_has_not_solved_is_infinitely_many_times_as_fast() -> None:
    """Ratios 6 / 2 = 3, 8 / 2 = 4 and inf / 2; those of the first itself 1, 1, and none."""
    summary = summary_of(UNTIL_SOLVED, [6.0, 8.0, NEVER], [2.0, 2.0, 2.0])
    assert summary["median"] == ["8", "2"]
    assert summary["times as fast"] == ["1.00 (1.00 to 1.00)", "4.00 (3.00 to inf)"]
    assert summary["solved"] == ["2 of 3", "3 of 3"]


def test_a_round_that_neither_has_solved_has_no_ratio() -> None:
    """That leaves 10 / 2 = 5, though of two times, one of which is inf, the median is inf."""
    summary = summary_of(UNTIL_SOLVED, [10.0, NEVER], [2.0, NEVER])
    assert summary["median"] == ["inf", "inf"]
    assert summary["times as fast"] == ["1.00 (1.00 to 1.00)", "5.00 (5.00 to 5.00)"]
    assert summary["solved"] == ["1 of 2", "1 of 2"]


def test_without_a_round_that_either_has_solved_there_is_no_ratio() -> None:
    summary = summary_of(UNTIL_SOLVED, [NEVER], [NEVER])
    assert summary["median"] == ["inf", "inf"]
    assert summary["times as fast"] == ["-", "-"]
    assert summary["solved"] == ["0 of 1", "0 of 1"]


@pytest.mark.parametrize("make_env", [vectorized.dummy, vectorized.vectorized])
@pytest.mark.parametrize("speed", [vectorized.speed_alone, vectorized.speed_of_rollouts])
def test_speed_counts_steps_that_are_no_resets_in_whole_passes_after_a_warm_up(
    clock: Clock, make_env: Callable[[int], VecEnv], speed: Callable[[VecEnv], float]
) -> None:
    """
    Passes of 100 steps, the first of 1000 s, then each of 100 / 256 s: it takes 3 of those for a second, so 300 / 256 s.

    CartPole's reward is 1 in a step, and 0 in one that only resets.
    """
    env = Lasting(make_env(3), clock, seconds=(10.0, 1 / 256), n_steps=100)
    steps_a_second = speed(env)
    assert len(env.rewards) == 100 + 300
    rewards = np.array(env.rewards[100:])
    assert (rewards.mean() < 1) == (make_env is vectorized.vectorized)
    assert steps_a_second == rewards.sum() / (300 / 256)


@pytest.mark.parametrize(
    ("n_unsolved", "seconds", "timesteps"),
    [
        (0, 1.0, 2),  # one step, at which training can be ended
        (1, 8.0 + 1.0, 18),
        (2, 16.0 + 1.0, 34),
        (3, 24.0, 48),  # by the last update
        (4, np.nan, 48),
    ],
)
def test_time_until_solved_by_hand(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, n_unsolved: int, seconds: float, timesteps: int
) -> None:
    """3 rollouts of 8 steps, of 1 s each, in 2 environments; evaluations take 100 s, none of which counts."""
    returns = [474.9] * n_unsolved + [475.0]

    def evaluate_policy(*args: Any) -> tuple[float, float]:
        clock.now += 100
        return returns.pop(0), 0.0

    monkeypatch.setattr(vectorized, "evaluate_policy", evaluate_policy)
    contender = Contender(
        CONTENDER.algorithm,
        lambda n_envs, seed: Lasting(vectorized.dummy(n_envs, seed), clock, seconds=(1.0,)),
        n_envs=2,
        arguments={"n_steps": 8, "batch_size": 16},
        budget=48,
    )
    np.testing.assert_equal(seconds_to_solve(contender, seed=0), (seconds, timesteps))
    assert len(returns) == (n_unsolved == 4)  # who has solved it isn't asked again


def test_what_is_solved_is_cartpole_for_the_mode_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_policy, returns = vectorized.evaluate_policy, []

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        episodes, lengths = evaluate_policy(*args, **kwargs, return_episode_rewards=True)
        assert episodes == lengths
        returns.append(episodes)
        return np.mean(episodes), np.std(episodes)

    monkeypatch.setattr(vectorized, "evaluate_policy", evaluate)
    seconds, timesteps = seconds_to_solve(CONTENDER, seed=0)
    assert seconds > 0
    assert timesteps < CONTENDER.budget
    assert {len(episodes) for episodes in returns} == {100}
    assert [np.mean(episodes) >= 475 for episodes in returns] == [False] * (len(returns) - 1) + [True]


def test_every_other_round_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "steps_a_second", lambda make_env, n_envs: {"rollout": 1.0})
    monkeypatch.setattr(vectorized, "seconds_to_solve", lambda contender, seed: (1.0, 1))
    measurements = measure(3)
    for what, forwards in {
        "steps/s, 64 environments, rollout": ["DummyVecEnv", "VectorEnv"],
        "steps/s, 1024 environments, rollout": ["DummyVecEnv", "VectorEnv"],
        UNTIL_SOLVED: list(CONTENDERS),
    }.items():
        rows = measurements[measurements["measure"] == what]
        assert rows["who"].tolist() == [*forwards, *reversed(forwards), *forwards]
        assert rows["turn"].tolist() == [turn for turn in range(3) for _ in forwards]


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "N_STEPS", 2)
    monkeypatch.setattr(vectorized, "SECONDS", 0.001)
    monkeypatch.setattr(vectorized, "CONTENDERS", {"one": CONTENDER._replace(budget=2048)})
    main(["--rounds", "1", "--output", str(tmp_path)])
    measurements = pd.read_csv(tmp_path / "measurements.csv")
    assert len(measurements) == 2 * 2 * 2 + 1  # numbers of environments, kinds, with and without a policy; one contender
    report = (tmp_path / "report.md").read_text()
    assert all(f"- {key}: " in report for key in ("command", "commit", "versions", "machine"))


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
