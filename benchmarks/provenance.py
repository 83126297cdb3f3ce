"""Where results come from: command, commit, versions, machine."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("sb3-ppo-variants", "stable-baselines3", "gymnasium", "torch", "numpy", "mujoco", "Box2D")


def provenance() -> dict[str, str]:
    """What a reader needs to know to reproduce the results of the running command."""
    module = sys.modules["__main__"].__spec__
    command = ["python", "-m", module.name] if module is not None else ["python", Path(sys.argv[0]).name]
    return {
        "command": shlex.join([*command, *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": machine(),
    }


def write_with_origin(parts: Sequence[str], folder: Path) -> None:
    """
    Write a short report, which ends with where its results come from, as ``report.md``.

    :param parts: its paragraphs and tables, in Markdown
    :param folder: where to write it
    """
    origin = "\n".join(f"- {key}: {value}" for key, value in provenance().items())
    (folder / "report.md").write_text("\n\n".join([*parts, origin]) + "\n", encoding="utf-8")


def machine() -> str:
    """Its cores, processor and operating system."""
    return f"{os.cpu_count()} cores, {_processor()}, {platform.system()}"


def versions() -> str:
    """Of Python and of the packages that results depend on."""
    return ", ".join([f"Python {platform.python_version()}", *filter(None, map(_package, PACKAGES))])


def _package(name: str) -> str:
    """Nothing if it isn't installed, as simulators needn't be."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the checkout, with a note if there are changes on top of it."""
    try:
        changes = _git("status", "--porcelain", "--untracked-files=no")  # results may lie in the checkout
        return _git("rev-parse", "--short=10", "HEAD") + (" with uncommitted changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
