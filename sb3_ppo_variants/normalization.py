"""The statistics of ``VecNormalize``, over all ranks."""

from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_ppo_variants.distributed import Ranks

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase

Moments = tuple[np.ndarray, np.ndarray, float]
"""Mean, variance and count."""


class SharedStatistics:
    """
    Makes the statistics of all ranks' ``VecNormalize`` those of all that any of them has seen.

    While a rollout is collected each goes by what it sees itself; behind it, what is new on each is merged.

    :param model: whose environments may be normalised
    """

    def __init__(self, model: "PPOBase") -> None:
        self._model = model
        self._common = {name: _moments(statistics) for name, statistics in self._statistics().items()}

    def take_firsts(self, ranks: Ranks) -> None:
        """Start from the statistics of rank 0; for all ranks to call."""
        if ranks.several and self._common:
            self._common = ranks.broadcast(self._common)
            for name, each in self._statistics().items():
                each.mean, each.var, each.count = self._common[name]

    def merge(self, ranks: Ranks) -> None:
        """Behind a rollout; for all ranks to call."""
        statistics = self._statistics()
        if not ranks.several or not statistics:
            return
        of_all = ranks.gather({name: news(_moments(each), self._common[name]) for name, each in statistics.items()})
        for name, each in statistics.items():
            each.mean, each.var, each.count = self._common[name]
            for of_rank in of_all:
                if of_rank[name][2] > 0:
                    each.update_from_moments(*of_rank[name])
            self._common[name] = _moments(each)

    def _statistics(self) -> dict[str, RunningMeanStd]:
        normalizer: Any = self._model.get_vec_normalize_env()
        if normalizer is None:
            return {}
        found = {"returns": normalizer.ret_rms}
        if normalizer.norm_obs:
            own = normalizer.obs_rms
            found |= {f"observations {key}": each for key, each in own.items()} if isinstance(own, dict) else {"": own}
        return found


def news(now: Moments, before: Moments) -> Moments:
    """
    The moments of what has come since then: :meth:`RunningMeanStd.update_from_moments`, backwards.

    :param now: moments of all
    :param before: moments of what was there before
    """
    count = now[2] - before[2]
    if count <= 0:
        return now[0], now[1], 0.0
    mean = (now[0] * now[2] - before[0] * before[2]) / count
    delta = mean - before[0]
    sum_of_squares = now[1] * now[2] - before[1] * before[2] - np.square(delta) * before[2] * count / now[2]
    return mean, np.maximum(sum_of_squares, 0.0) / count, count


def _moments(statistics: RunningMeanStd) -> Moments:
    return np.array(statistics.mean), np.array(statistics.var), float(statistics.count)
