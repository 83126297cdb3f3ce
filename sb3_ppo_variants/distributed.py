"""The ranks: processes, started by torchrun, that train one model together; what they tell each other, and who is missing."""

import atexit
import functools
import io
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.meeting import LostRankError, make_group

T = TypeVar("T", bound=SupportsFloat)

TIMEOUT = "SB3_PPO_VARIANTS_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others, in a group that isn't the user's own; 600 by default."""
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets, and what starts processes in its place."""
GRACE = 5.0
"""Seconds in which ranks that live on say so when another one is missing."""
AWAKE = 0.02 if hasattr(os, "sched_yield") else 0.0
"""Seconds for which a rank that waits for the others at a minibatch doesn't go to sleep, where systems let it make way."""


class Ranks:
    """
    All that train a model together, as one of them sees it; a process that trains alone is rank 0 of 1.

    What all ranks have to call, with values of the same kind, says so: a rank that doesn't is waited for until the group's
    timeout. Alone, values are returned as they are.

    :param rank: the number of this one, from 0
    :param size: how many there are
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._name = ""
        self._place = 0

    @classmethod
    def present(cls) -> "Ranks":
        """Those of the process group, or else those that torchrun, or what stands in for it, has started."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if dist.is_available() and all(name in os.environ for name in LAUNCHED):
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return cls()

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs, evaluates and writes checkpoints."""
        return self.rank == 0

    def choose_device(self) -> None:
        """Each rank of a machine has a GPU of its own, if there are any."""
        number = int(os.environ.get("LOCAL_RANK", self.rank))
        if self.several and th.cuda.is_available() and number < th.cuda.device_count():
            th.cuda.set_device(number)

    def connect(self) -> None:
        """Make a process group, if there is none yet; for all ranks to call."""
        if not self.several:
            return
        if not dist.is_initialized():
            make_group(_timeout())
            atexit.register(_leave)
        self._name = self.broadcast(uuid.uuid4().hex)

    def average(self, tensor: th.Tensor) -> None:
        """Replace a tensor by its mean over the ranks, in place; for all to call, with the same shape."""
        if self.several:
            with self._together():
                self._all_reduce(tensor)
            tensor.div_(self.size)

    def _all_reduce(self, tensor: th.Tensor) -> None:
        if tensor.is_cuda:
            dist.all_reduce(tensor)
            return
        work = dist.all_reduce(tensor, group=_group_on_cpu(), async_op=True)
        # A core that goes to sleep takes longer to wake up than the others take to come, mostly.
        deadline = time.perf_counter() + AWAKE
        while not work.is_completed() and time.perf_counter() < deadline:
            os.sched_yield()
        work.wait()

    def means(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The means of numbers over the ranks, those of whole numbers and texts as they are; for all to call."""
        if not self.several:
            return dict(numbers)
        floats = {name: float(number) for name, number in numbers.items() if isinstance(number, (float, np.floating))}
        tensor = th.tensor(list(floats.values()), dtype=th.float64)
        self.average(tensor)
        return {**numbers, **dict(zip(floats, tensor.tolist(), strict=True))}

    def mean(self, number: T) -> T | float:
        """The mean of a number over the ranks; for all to call."""
        return float(self.means({"": float(number)})[""]) if self.several else number

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank; for all to call."""
        return float(self.mean(float(flag))) > 0 if self.several else flag

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order; for all to call."""
        values = [value] * self.size
        if self.several:
            with self._together():
                dist.all_gather_object(values, value, group=_group_on_cpu())
        return values

    def gather_at_first(self, value: Any) -> list[Any] | None:
        """On rank 0 the values of all, in order; ``None`` elsewhere; for all to call."""
        if not self.several:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self._together():
            dist.gather_object(value, values, dst=0, group=_group_on_cpu())
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0; for all to call."""
        if not self.several:
            return value
        values = [value]
        with self._together():
            dist.broadcast_object_list(values, src=0, group=_group_on_cpu())
        return values[0]

    def scatter(self, values: list[Any] | None) -> Any:
        """The value that rank 0 has for this one; for all to call, rank 0 with a value for each."""
        if not self.several:
            assert values is not None
            return values[0]
        mine: list[Any] = [None]
        with self._together():
            dist.scatter_object_list(mine, values, src=0, group=_group_on_cpu())
        return mine[0]

    def arrive(self) -> None:
        """Tell the others that this one has come to the next rollout or update."""
        if self.several:
            self._place += 1
            with self._together():
                self._store().set(f"place/{self.rank}", str(self._place))

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(str(error)) from error

    def _lost(self, reason: str) -> LostRankError:
        """Who doesn't answer, as far as that can be found out."""
        found: list[list[int]] = []
        # In a thread, as nothing may come back from the store any more, for longer than anybody wants to wait.
        search = threading.Thread(target=lambda: found.append(self._missing()), daemon=True)
        search.start()
        search.join(2 * GRACE)
        if not found:
            return LostRankError(f"rank 0, or its machine, can't be reached any more by rank {self.rank}: {reason}")
        (missing,) = found
        if not missing:
            return LostRankError(f"the connection between ranks has failed, though all of them run: {reason}")
        names = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
        return LostRankError(f"{names} died, or not come so far in time, as rank {self.rank} sees it: {reason}")

    def _missing(self) -> list[int]:
        """Those that don't say that they live; if some have been left behind, these, as others may just wait for them."""
        store = self._store()
        store.set(f"alive/{self.rank}", "")
        missing = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + GRACE
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"alive/{rank}"])]
            time.sleep(0.05)
        places = {rank: int(store.get(f"place/{rank}")) if store.check([f"place/{rank}"]) else 0 for rank in missing}
        return [rank for rank in missing if places[rank] < self._place] or missing

    def _store(self) -> Any:
        """What ranks can read and write while another one is missing; not what others have left in it, see ``meeting``."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # which not all builds of torch have

        return PrefixStore(f"sb3_ppo_variants/{self._name}", dist.distributed_c10d._get_default_store())


ALONE = Ranks()


def is_first_rank() -> bool:
    """
    Whether this process is the one that logs, evaluates and writes: rank 0, or a process that trains alone.

    For callbacks and scripts that write files of their own.
    """
    return Ranks.present().is_first


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"the environment variable {TIMEOUT} must be a number of seconds > 0, not {text!r}")
    return timedelta(seconds=seconds)


@functools.cache
def _group_of(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=_timeout())


def _group_on_cpu() -> Any:
    """The default group if it can exchange what is in main memory, else one of gloo's beside it."""
    return dist.group.WORLD if "cpu:" in str(dist.get_backend_config()) else _group_of(dist.group.WORLD)


def _leave() -> None:
    """
    End the group of this process before Python ends.

    gloo's threads may still have a tensor to give back, and a thread that does so when Python has gone aborts the process
    (`PyTorch's pull request 179291 <https://github.com/pytorch/pytorch/pull/179291>`_). They end with the last reference to
    their group. Where a GPU is used nothing is done, as NCCL may wait for ranks that have died, and then none would say so; a
    group that the script has made is the script's to end.
    """
    if dist.is_initialized() and not th.cuda.is_initialized():  # type: ignore[no-untyped-call]
        dist.destroy_process_group()


def to_bytes(value: Any) -> bytes:
    """What ``torch.save`` makes of a value: tensors of any device."""
    file = io.BytesIO()
    th.save(value, file)
    return file.getvalue()


def draw_apart(ranks: Ranks, env: VecEnv) -> None:
    """
    Give a rank random numbers of its own, where the script, which is the same on all ranks, may have seeded them alike.

    :param ranks: the ranks
    :param env: the environments, which are to be reset; if they have seeds, they get those behind the other ranks' ones
    """
    if ranks.is_first:
        return
    set_random_seed((th.initial_seed() + ranks.rank) % 2**32)
    seeds: list[int | None] = env.unwrapped._seeds
    if None in seeds:
        env.seed()
    else:
        env.unwrapped._seeds = [seed + ranks.rank * env.num_envs for seed in seeds if seed is not None]


@contextmanager
def written_by_all(path: str | Path, ranks: Ranks) -> Iterator[Path]:
    """
    A file that each rank writes, perhaps at the same time: none ever finds a part of it.

    :param path: of the file; ``.zip`` is added to a name without a suffix
    :param ranks: the ranks
    :return: where to write it
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.zip")
    own = path.with_name(f".{path.stem}.of_rank_{ranks.rank}{path.suffix}")
    try:
        yield own
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
