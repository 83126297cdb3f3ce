"""The ended episodes of all ranks, in one order."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from sb3_ppo_variants.distributed import Ranks


class Episodes:
    """What this rank's environments have ended in the running rollout."""

    def __init__(self) -> None:
        self._episodes: list[tuple[int, Any]] = []
        self._successes: list[tuple[int, Any]] = []

    def add(self, step: int, infos: Sequence[dict[str, Any]], dones: np.ndarray | None) -> None:
        """
        Keep what SB3 keeps of a step.

        :param step: its number in the rollout
        :param infos: of the environments
        :param dones: which of them have ended an episode
        """
        ended = [False] * len(infos) if dones is None else dones
        self._episodes += [(step, info["episode"]) for info in infos if info.get("episode") is not None]
        self._successes += [
            (step, info["is_success"])
            for info, done in zip(infos, ended, strict=True)
            if done and info.get("is_success") is not None
        ]

    def share(self, ranks: Ranks, episodes: deque[Any], successes: deque[Any]) -> None:
        """
        Put those of all ranks into SB3's buffers, by the steps in which they have ended; for all ranks to call.

        :param ranks: the ranks
        :param episodes: SB3's buffer, with this rank's at its end
        :param successes: the same
        """
        window = episodes.maxlen
        own = self._episodes, self._successes
        # No more than what a buffer keeps is of use.
        of_all = ranks.gather([part[-window:] if window else part for part in own])
        for number, (buffer, part) in enumerate(zip((episodes, successes), own, strict=True)):
            for _ in range(min(len(part), len(buffer))):
                buffer.pop()
            merged = sorted((each for parts in of_all for each in parts[number]), key=lambda of_step: of_step[0])
            buffer.extend(each for _, each in merged)
        self._episodes, self._successes = [], []
