"""Ranks find those that run now, whatever others have left in the store."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from sb3_ppo_variants import LostRankError
from sb3_ppo_variants.meeting import meet

SIZE = 3
SOON = timedelta(seconds=0.5)
LONG = timedelta(seconds=60)


def start(pool: ThreadPoolExecutor, store: "dist.Store", rank: int, timeout: timedelta = LONG) -> "Future[str]":
    return pool.submit(meet, store, rank, SIZE, timeout)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_all_come_to_one_meeting(order: tuple[int, ...]) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(SIZE) as pool:
        meetings = []
        for rank in order:
            meetings.append(start(pool, store, rank))
            time.sleep(0.1)
        assert len({meeting.result() for meeting in meetings}) == 1


@pytest.mark.parametrize("late", range(SIZE))
def test_those_who_were_there_before_are_not_met_again(late: int) -> None:
    """Whoever comes last, what it has left in the store under its rank, when it came before, isn't taken for it."""
    store = dist.HashStore()
    with ThreadPoolExecutor(SIZE) as pool:
        before = {meeting.result() for meeting in [start(pool, store, rank) for rank in range(SIZE)]}
        meetings = [start(pool, store, rank) for rank in range(SIZE) if rank != late]
        time.sleep(0.2)
        assert not any(meeting.done() for meeting in meetings)
        after = {meeting.result() for meeting in [*meetings, start(pool, store, late)]}
    assert len(after) == 1
    assert before != after


def test_one_that_dies_while_it_waits_and_comes_again() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(SIZE + 1) as pool:
        with pytest.raises(LostRankError, match=r"not all 3 ranks have come in 0\.5 s, as rank 1 sees it"):
            start(pool, store, 1, SOON).result()
        meetings = [start(pool, store, rank) for rank in range(SIZE)]
        assert len({meeting.result() for meeting in meetings}) == 1


def test_rank_0_names_who_does_not_come() -> None:
    """Rank 1 has been there before, rank 2 never was."""
    store = dist.HashStore()
    with ThreadPoolExecutor(SIZE) as pool:
        with pytest.raises(LostRankError, match="ranks 1, 2 of 3 didn't come"):
            start(pool, store, 0, SOON).result()
        with pytest.raises(LostRankError):
            start(pool, store, 1, SOON).result()
        with pytest.raises(LostRankError, match=r"ranks 1, 2 of 3 didn't come in 0\.5 s, as rank 0 sees it"):
            start(pool, store, 0, SOON).result()


def test_rank_0_waits_for_the_last_of_them() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(SIZE) as pool:
        waiting = [start(pool, store, rank, timedelta(seconds=2)) for rank in (0, 2)]
        with pytest.raises(LostRankError, match="rank 1 of 3 didn't come in 2 s"):
            waiting[0].result()
        with pytest.raises(LostRankError):
            waiting[1].result()
