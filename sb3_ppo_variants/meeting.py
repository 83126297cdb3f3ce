"""How ranks find each other: those that run now, not those that ran before torchrun started all of them anew."""

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PAUSE = 0.02
"""Seconds between two looks at the store."""


class LostRankError(RuntimeError):
    """Other ranks have died, or don't answer; the message names them."""


def make_group(timeout: timedelta) -> None:
    """
    Make the process group of the ranks that torchrun has started, or what stands in for it; for all to call.

    torchrun keeps its store when it starts ranks anew, and gloo would find the addresses in it of those that are gone. So each
    meeting of the ranks has a part of the store of its own.

    :param timeout: of the group, and of the wait for all
    :raises LostRankError: if they don't all come in time
    """
    # A module whose functions have the group for a default would keep it, with its threads, if it were imported later.
    import torch.distributed.nn.functional  # noqa: F401
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # not in all builds of torch

    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    except RuntimeError as error:
        raise LostRankError(
            f"not all ranks have come in {timeout.total_seconds():g} s, or rank 0 can't be reached: {error}"
        ) from error
    store.set_timeout(timeout)
    store = PrefixStore(meet(PrefixStore("sb3_ppo_variants", store), rank, size, timeout), store)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timeout)


def meet(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """
    Agree on who is there; for all ranks to call, each once in a process's life.

    Each rank comes under a name that it has never had before. Rank 0 calls a meeting of the names that it finds; it takes
    place when all of them have said that they are there, and until then is called anew whenever a name has changed.

    :param store: torch's, which may have in it what ranks that are gone have left
    :param rank: of the caller
    :param size: how many there are
    :param timeout: how long to wait for all
    :return: the name of the meeting, which no other has
    :raises LostRankError: if they don't all come in time; that of rank 0 names those that haven't
    """
    name = uuid.uuid4().hex
    store.set(f"name/{rank}", name)
    deadline = time.monotonic() + timeout.total_seconds()
    called: list[str] = []
    meeting = ""
    while time.monotonic() < deadline:
        if rank == 0:
            names = [_read(store, f"name/{other}") for other in range(size)]
            if names != called:
                called, meeting = names, uuid.uuid4().hex
                for other in called:
                    store.set(f"called/{other}", meeting)
            if store.check([f"there/{meeting}/{other}" for other in called]):
                store.set(f"all there/{meeting}", "")
        meeting = _read(store, f"called/{name}")
        if meeting:
            store.set(f"there/{meeting}/{name}", "")
            if store.check([f"all there/{meeting}"]):
                return meeting
        time.sleep(PAUSE)
    waited = f"in {timeout.total_seconds():g} s, as rank {rank} sees it"
    if rank > 0:
        raise LostRankError(f"not all {size} ranks have come {waited}")
    missing = [str(other) for other, its in enumerate(called) if not store.check([f"there/{meeting}/{its}"])]
    raise LostRankError(f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {size} didn't come {waited}")


def _read(store: Any, key: str) -> str:
    """Nothing, if there is nothing: a store would wait for it."""
    return str(store.get(key), "ascii") if store.check([key]) else ""
