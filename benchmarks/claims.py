"""What the results of a grid are to show, such as the figures that a document reports, and whether they do."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import FiniteFloat, PositiveInt, model_validator
from typing_extensions import Self

from benchmarks.job import Model
from benchmarks.result import Result

MEASURES = Literal["updates_to_return", "last_rollout_return", "lowest_rollout_return", "best_return", "final_return"]


class Claim(Model):
    """
    A bound on a measure of one variant's runs.

    :param says: what the document reports, in its words
    :param env: name of the environment
    :param variant: name of the variant
    :param measure: ``updates_to_return``: the number of rollouts until the mean return of a rollout's episodes reaches
        ``of_return``, infinite if never; ``last_rollout_return``: that mean in the last one; ``lowest_rollout_return``: the
        smallest of these means from rollout ``from_update`` on; ``best_return``: the largest mean return of 100 consecutive
        episodes; ``final_return``: the report's, over the last tenth of the training
    :param of_return: see there
    :param from_update: see there
    :param at_least: the measure's lower bound
    :param at_most: its upper bound
    :param seeds: ``median``: holds for the seeds' median; ``all``: for each of them
    """

    says: str
    env: str
    variant: str
    measure: MEASURES
    of_return: float | None = None
    from_update: PositiveInt | None = None
    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None
    seeds: Literal["median", "all"] = "median"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"updates_to_return": "of_return", "lowest_rollout_return": "from_update"}.get(self.measure)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"`{needed}` is missing, which `measure` {self.measure!r} needs")
        if self.at_least is None and self.at_most is None:
            raise ValueError("`at_least` or `at_most` is missing")
        return self

    def values(self, results: Sequence[Result]) -> np.ndarray:
        """
        The measure of each run, in the order of the seeds.

        :param results: of the grid
        """
        own = sorted((each for each in results if (each.job.env, each.job.variant) == (self.env, self.variant)), key=_seed)
        return np.array([self._value(result) for result in own])

    def _value(self, result: Result) -> float:
        if self.measure == "best_return":
            return float(result.mean_returns.max())
        if self.measure == "final_return":
            return result.final_return
        returns = result.rollouts["mean_return"]
        if self.measure == "last_rollout_return":
            return float(returns.iloc[-1])
        if self.measure == "lowest_rollout_return":
            assert self.from_update is not None
            return float(returns.iloc[self.from_update - 1 :].min())
        assert self.of_return is not None
        reached = np.flatnonzero(returns.to_numpy() >= self.of_return)
        return float(reached[0] + 1) if len(reached) else np.inf

    def holds(self, values: np.ndarray) -> bool:
        """
        Whether the bounds hold.

        :param values: as :meth:`values` returns them
        """
        if len(values) == 0:
            return False
        bounded = np.median(values, keepdims=True) if self.seeds == "median" else values
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return bool(np.all((low <= bounded) & (bounded <= high)))


def _seed(result: Result) -> int:
    return result.job.seed
