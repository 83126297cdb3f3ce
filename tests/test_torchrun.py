"""Real ranks, started by torchrun, on one machine and on two; some of them die, hang, or can't be reached any more."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_variants import PPOKL

pytestmark = pytest.mark.slow
RANK_1_IS_LOST = "rank 1 has died, or not come so far in time, as rank 0 sees it"
SCRIPT = Path(__file__).parent / "torchrun_script.py"
LIMIT = 120
"""Seconds after which a test has failed: much more than any of them takes."""


def torchrun(options: list[str], folder: Path, arguments: list[str]) -> list[str]:
    """A command."""
    module = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*module, str(SCRIPT), str(folder), *arguments]


def start(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    folder.mkdir(exist_ok=True)
    on_this_machine = ["--standalone", "--nproc-per-node", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = torchrun(on_this_machine, folder, list(arguments))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)


def results(folder: Path) -> list[Any]:
    """What each rank has written in the end."""
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Any:
    return results(folder)


def test_ranks_end_with_one_model(uninterrupted: list[Any]) -> None:
    first, second = uninterrupted
    assert first == second
    assert first["num_timesteps"] == 6 * 16 * 2 * 2


def test_no_thread_of_gloo_is_left_when_python_ends(folder: Path) -> None:
    """One that gives back a tensor when Python has gone aborts the process."""
    for rank in range(2):
        before, names = (json.loads((folder / f"threads_{when}_{rank}.json").read_text()) for when in ("before", "at_the_end"))
        assert [name for name in before if "gloo" in name]
        assert names
        assert not [name for name in names if "gloo" in name]


def test_a_training_that_is_killed_goes_on_from_its_last_update(uninterrupted: list[Any], tmp_path: Path) -> None:
    """To the bits of one that was never interrupted."""
    process = start(tmp_path, "--fault", "kill", options=("--max-restarts", "1"))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "was_killed").exists()
    assert results(tmp_path) == uninterrupted


def test_a_rank_that_dies_ends_all(tmp_path: Path) -> None:
    """Torchrun, which ends the others, names it."""
    process = start(tmp_path, "--fault", "kill")
    assert process.returncode != 0
    assert re.search(r"rank +: 1 .*\n *exitcode +: -9", process.stderr), process.stderr
    assert not (tmp_path / "rank_0.json").exists()


def test_a_rank_that_hangs_is_named_and_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "hang", "--timeout", "5")
    assert process.returncode != 0
    assert f"LostRankError: {RANK_1_IS_LOST}" in process.stderr
    assert not (tmp_path / "rank_0.json").exists()


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.returncode == 0, process.stderr
    with pytest.raises(ValueError, match="`path` must be a checkpoint of 1 ranks, not of 2"):
        PPOKL.resume(tmp_path / "checkpoints", VecNormalize(make_vec_env("CartPole-v1", n_envs=2)), device="cpu")


def test_an_exception_on_one_rank_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "--fault", "raise")
    assert process.returncode != 0
    assert "OSError: the simulator is gone" in process.stderr


# Two machines


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, which only a cable connects."""
    names = [f"ppo{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces: {error}")
    try:
        ip("link", "add", f"v{names[0]}", "type", "veth", "peer", "name", f"v{names[1]}")
        for number, name in enumerate(names):
            ip("link", "set", f"v{name}", "netns", name)
            ip("-n", name, "addr", "add", f"10.199.77.{number + 1}/24", "dev", f"v{name}")
            ip("-n", name, "link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def start_on(machines: list[str], folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """One rank on each."""
    processes = []
    for number, name in enumerate(machines):
        options = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        options += ["--master-addr", "10.199.77.1", "--master-port", "29511"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
        environment["GLOO_SOCKET_IFNAME"] = f"v{name}"
        command = ["ip", "netns", "exec", name, *torchrun(options, folder, list(arguments))]
        pipes: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "start_new_session": True,
        }
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def test_two_machines_train_what_two_ranks_on_one_do(machines: list[str], uninterrupted: Any, tmp_path: Path) -> None:
    processes = start_on(machines, tmp_path)
    outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert results(tmp_path) == uninterrupted


def test_a_machine_that_is_lost_is_told_by_the_other(machines: list[str], tmp_path: Path) -> None:
    with ended(start_on(machines, tmp_path, "--fault", "kill")):
        assert told(tmp_path, 0).startswith(RANK_1_IS_LOST)


def test_a_cable_that_is_pulled_out_ends_all(machines: list[str], tmp_path: Path) -> None:
    with ended(start_on(machines, tmp_path, "--fault", "wait", "--timeout", "5")):
        wait_for(tmp_path / "waiting")
        ip("-n", machines[1], "link", "set", f"v{machines[1]}", "down")
        assert told(tmp_path, 0).startswith(RANK_1_IS_LOST)
        assert told(tmp_path, 1).startswith("rank 0, or its machine, can't be reached any more by rank 1")


@contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Torchrun itself may wait for its other half for minutes."""
    try:
        yield
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(folder: Path, rank: int) -> str:
    """What a rank says of the others."""
    path = folder / f"lost_{rank}.txt"
    wait_for(path)
    time.sleep(0.2)  # it may just be being written
    return path.read_text()
