"""What presets are to reach, on runs made up by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.claims import Claim
from benchmarks.job import Job
from benchmarks.result import Result

JOB = Job(
    env="CartPole-v1",
    variant="clip",
    seed=0,
    algorithm="ppo",
    policy="MlpPolicy",
    timesteps=400,
    n_envs=1,
    normalize=False,
    terminal_time_limits=False,
    env_kwargs={},
    threshold=None,
    arguments={},
    callbacks={},
)


def run(returns: list[float], seed: int = 0, n_updates: int = 4) -> Result:
    """Episodes of 10 steps, updates every 100."""
    ends = 10 * np.arange(1, len(returns) + 1)
    episodes = pd.DataFrame({"timesteps": ends, "episode_return": returns, "length": 10})
    updates = pd.DataFrame({"timesteps": 100 * np.arange(1, n_updates + 1), "kl": 0.01, "kl_coef": 1.0, "clip_fraction": 0.1})
    return Result(JOB.model_copy(update={"seed": seed}), episodes, updates, 1.0, {"versions": "1"})


def claim(**kwargs: Any) -> Claim:
    return Claim(says="so", env="CartPole-v1", variant="clip", **kwargs)


def test_returns_of_each_rollout() -> None:
    # Ten episodes a rollout: the tenth ends with the rollout's last step.
    result = run([1.0] * 10 + [2.0] * 9 + [4.0] + [3.0] * 20)
    assert result.rollouts["mean_return"].tolist() == pytest.approx([1, 2.2, 3, 3])
    assert result.final_return == 3.0


def test_rollouts_in_which_no_episode_ends() -> None:
    result = run([1.0] * 10)
    assert np.isnan(result.rollouts["mean_return"].tolist()).tolist() == [False, True, True, True]
    assert result.final_return == 1.0


def test_number_of_rollouts_until_a_return_is_reached() -> None:
    reaching = claim(measure="updates_to_return", of_return=2.0, at_most=2)
    runs = [run([1.0] * 10 + [2.0] * 30, 0), run([2.0] * 40, 1), run([1.0] * 40, 2)]
    assert reaching.values(runs).tolist() == [2, 1, np.inf]
    assert reaching.holds(reaching.values(runs))
    assert not claim(measure="updates_to_return", of_return=2.0, at_most=2, seeds="all").holds(reaching.values(runs))


def test_last_and_best_returns() -> None:
    result = run([5.0] * 100 + [1.0] * 100, n_updates=20)
    assert claim(measure="last_rollout_return", at_least=1).values([result]).tolist() == [1.0]
    assert claim(measure="final_return", at_least=1).values([result]).tolist() == [1.0]
    assert claim(measure="best_return", at_least=1).values([result]).tolist() == [5.0]
    lowest = claim(measure="lowest_rollout_return", from_update=10, at_least=1)
    assert lowest.values([run([0.0] * 90 + [5.0] * 100 + [2.0] * 10, n_updates=20)]).tolist() == [2.0]
    assert claim(measure="best_return", at_least=5).holds(np.array([5.0]))
    assert not claim(measure="best_return", at_least=5).holds(np.array([4.9]))


def test_nothing_holds_of_no_runs() -> None:
    some = claim(measure="best_return", at_least=0)
    assert not some.holds(some.values([]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"measure": "updates_to_return", "at_most": 3}, "`of_return` is missing"),
        ({"measure": "lowest_rollout_return", "at_least": 3}, "`from_update` is missing"),
        ({"measure": "best_return"}, "`at_least` or `at_most` is missing"),
    ],
)
def test_claims_must_be_complete(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claim(**kwargs)


def test_steps_to_solve_by_hand() -> None:
    # 100 episodes of 400, then 500s: the mean of the last 100 reaches 475 with the 75th of them, after 175 episodes.
    solved = run([400.0] * 100 + [500.0] * 80)
    assert solved.steps_to_solve(475.0) == 1750
    assert run([500.0] * 99).steps_to_solve(475.0) == np.inf
    assert run([474.9] * 300).steps_to_solve(475.0) == np.inf
    assert solved.threshold == 475.0


def test_steps_to_a_return_over_a_tenth_of_the_run() -> None:
    # 400 steps, so that the mean is over four episodes: 1, 1, 3, 3 have a mean of 2 after twelve.
    assert run([1.0] * 10 + [3.0] * 30).steps_to_return(2.0) == 120
    # One episode at the start is no tenth of the run.
    assert run([3.0] + [1.0] * 39).steps_to_return(2.5) == np.inf


def test_results_survive_being_written() -> None:
    result = run([1.0, 2.0])
    result.updates.loc[1, "kl"] = np.nan
    again = Result.from_json(result.to_json())
    pd.testing.assert_frame_equal(again.updates, result.updates)
    assert again.job == result.job
