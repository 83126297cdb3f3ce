"""Two ranks that wait in processes of their own for what tests have to do."""

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZE = 2


def _serve(rank: int, file: Path, connection: Connection) -> None:
    import torch as th
    import torch.distributed as dist

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    th.set_num_threads(1)
    dist.init_process_group("gloo", init_method=file.as_uri(), rank=rank, world_size=SIZE, timeout=timedelta(seconds=20))
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            connection.send((True, function(*arguments)))
        except Exception as error:
            traceback.print_exc()
            connection.send((False, (type(error).__name__, str(error))))
    dist.destroy_process_group()


class TwoRanks:
    """
    Runs a function of a module on both ranks.

    :param connections: to the ranks' processes
    """

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Of each rank, whether it has ended well, and its result, or its exception's class and message."""
        for connection in self._connections:
            connection.send((function, arguments))
        return [connection.recv() for connection in self._connections]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of all ranks."""
        outcomes = self.outcomes(function, *arguments)
        assert all(ended_well for ended_well, _ in outcomes), outcomes
        return [result for _, result in outcomes]


@contextmanager
def two_ranks() -> Iterator[TwoRanks]:
    """Start them, and end them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe() for _ in range(SIZE)]
        processes = [
            context.Process(target=_serve, args=(rank, Path(folder) / "store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(processes, pairs, strict=True):
            process.start()
            theirs.close()  # so that it is noticed here if the process ends
        yield TwoRanks([ours for ours, _ in pairs])
        for ours, _ in pairs:
            ours.send(None)
        for process in processes:
            process.join(30)
