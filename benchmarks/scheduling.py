"""Running a grid's jobs side by side: on this machine's cores, or on a Ray cluster."""

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from typing import Any, Protocol, TypeAlias

import joblib
from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError
from tqdm import tqdm

from benchmarks.job import Job
from benchmarks.provenance import provenance
from benchmarks.result import Folder, Result
from benchmarks.training import train_and_keep

BACKENDS = ("loky", "ray", "sequential")
"""Processes on this machine, a Ray cluster (that which ``RAY_ADDRESS`` names, or a local one), one job after the other."""

News: TypeAlias = "int | tuple[str, str | None, str | None] | None"
"""New time steps; or a job's name, its result if it may be on another disk, its traceback; or that nothing follows."""
DIED = "its process has died, also when it ran by itself: a crash, or too little memory"
"""The error of a job that can't tell one."""


class NewsQueue(Protocol):
    """What processes tell this one through."""

    def put(self, item: News) -> Any:
        """Tell."""

    def get(self) -> News:
        """Listen."""


def run_jobs(
    jobs: Sequence[Job],
    folder: Folder,
    *,
    backend: str = "loky",
    n_jobs: int = -1,
    tensorboard: bool = True,
    video: bool = False,
) -> dict[str, str]:
    """
    Run jobs under one progress bar that counts steps; each keeps its result itself.

    :param jobs: what to train
    :param folder: that keeps the results
    :param backend: one of :data:`BACKENDS`
    :param n_jobs: how many at once, -1 for one a core
    :param tensorboard: whether to write TensorBoard's files
    :param video: whether to record videos of each variant's first seed
    :return: what has gone wrong in each job that has failed, by the jobs' names
    """
    failed: dict[str, str] = {}
    total = sum(job.timesteps for job in jobs)
    with (
        tqdm(total=total, unit="step", unit_scale=True, mininterval=0.5, smoothing=0.05) as bar,
        _listening({job.name: job for job in jobs}, folder, bar, failed, backend) as queue,
        joblib.parallel_config(backend=backend, n_jobs=n_jobs),
    ):
        arguments = (provenance(), Folder(folder.path.absolute()), tensorboard, video, queue, backend == "ray")
        left, n_running = list(jobs), joblib.effective_n_jobs(n_jobs)
        if backend != "sequential" and n_running == 1:  # for which joblib takes this process
            _run_alone(left, backend, queue, *arguments)
            left = []
        while left:
            try:
                joblib.Parallel(batch_size=1)(joblib.delayed(_run)(job, *arguments) for job in left)
                break
            except _deaths(backend):
                left = [job for job in left if not folder.finished(job) and job.name not in failed]
                # Jobs begin in their order: one of those that ran has ended its process, and others with it.
                _run_alone(left[:n_running], backend, queue, *arguments)
                left = left[n_running:]
    return failed


def _deaths(backend: str) -> Any:
    """What a backend raises if a process has died."""
    if backend == "ray":
        from ray.exceptions import RayError

        return RayError
    return TerminatedWorkerError


def _run_alone(jobs: Sequence[Job], backend: str, queue: NewsQueue, *arguments: Any) -> None:
    """Run jobs one after the other, each in a process that has no other, and tell of those whose process dies."""
    run_alone = _in_a_process_of_ray if backend == "ray" else _in_a_process
    for job in jobs:
        try:
            run_alone(job, *arguments)
        except _deaths(backend):
            queue.put((job.name, None, DIED))


def _in_a_process(*arguments: Any) -> None:
    executor = ProcessPoolExecutor(max_workers=1)
    try:
        executor.submit(_run, *arguments).result()
    finally:
        executor.shutdown(kill_workers=True)


def _in_a_process_of_ray(*arguments: Any) -> None:
    import ray

    ray.get(ray.remote(max_retries=0, max_calls=1)(_run).remote(*arguments))


def _run(
    job: Job, origin: dict[str, str], folder: Folder, tensorboard: bool, video: bool, queue: NewsQueue, elsewhere: bool
) -> None:
    """Run a job, perhaps on another machine."""
    if not elsewhere:
        _exit_with_parent()
    error = train_and_keep(job, origin, folder, tensorboard, video and job.seed == 0, queue.put)
    text = folder.read([job])[0].to_json() if elsewhere and error is None else None
    queue.put((job.name, text, error))


@contextmanager
def _listening(
    jobs: Mapping[str, Job], folder: Folder, bar: "tqdm[Any]", failed: dict[str, str], backend: str
) -> Iterator[NewsQueue]:
    """A queue that the jobs' processes can reach, and a thread that listens to it."""
    with _queue(backend) as queue:
        thread = threading.Thread(target=_listen, args=(queue, jobs, folder, bar, failed))
        thread.start()
        try:
            yield queue
        finally:
            queue.put(None)
            thread.join()


def _listen(queue: NewsQueue, jobs: Mapping[str, Job], folder: Folder, bar: "tqdm[Any]", failed: dict[str, str]) -> None:
    while (news := queue.get()) is not None:
        if isinstance(news, int):
            bar.update(news)
            continue
        name, text, error = news
        try:
            if text is not None and not folder.finished(jobs[name]):
                folder.write(Result.from_json(text))
            if error is not None:
                failed[name] = error.partition("\n")[0]
                failed[name] += f" (traceback: {folder.write_error(jobs[name], error).relative_to(folder.path)})"
        except OSError as full:  # the others may have more luck
            failed[name] = failed.get(name, f"{type(full).__name__}: {full}")
        if name in failed:
            bar.write(f"{name} has failed: {failed[name]}")


@contextmanager
def _queue(backend: str) -> Iterator[NewsQueue]:
    if backend == "ray":
        import ray
        from ray.util.joblib import register_ray
        from ray.util.queue import Queue

        register_ray()  # type: ignore[no-untyped-call]
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        yield Queue()
        ray.shutdown()
        return
    manager = SyncManager()
    manager.start(_exit_with_parent)
    with manager:
        yield manager.Queue()


@functools.cache
def _exit_with_parent() -> None:
    """In a process of ours: end it when the process that has started it is killed, lest it writes where others do by then."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if multiprocessing.parent_process() is not None:
        threading.Thread(target=watch, daemon=True).start()
