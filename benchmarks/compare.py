"""
Which variant should I use here, and how sure can I be?

Run it with ``python -m benchmarks.compare``; ``--help`` lists what can be said.
"""

import argparse
import importlib.util
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from benchmarks.grid import Grid, GridError, included, make_grid, one_of, override, read_grid
from benchmarks.job import Job
from benchmarks.report import write_report
from benchmarks.result import Folder, ResultsError
from benchmarks.scheduling import BACKENDS, run_jobs
from benchmarks.training import make_callbacks, make_env, make_model
from benchmarks.variants import VARIANTS

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Plan:
    """
    What the command line asks for.

    :param grid: what to compare
    :param folder: where the results go
    :param options: the rest
    """

    grid: Grid
    folder: Folder
    options: argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train what has not been trained yet, and write the report.

    :param arguments: of the command line
    :return: the exit status
    """
    try:
        plan = _plan(arguments)
        jobs = plan.grid.jobs()
        with plan.folder.locked():
            plan.folder.check(jobs)
            left = [job for job in jobs if not plan.folder.finished(job)]
            check_jobs(left, plan.options.backend, plan.options.video)
            return _compare(plan, jobs, left)
    except (GridError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"error: {error}. What has been finished is kept.", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("\ninterrupted. What has been finished is kept: the same command goes on from there.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _compare(plan: Plan, jobs: Sequence[Job], left: Sequence[Job]) -> int:
    options, folder = plan.options, plan.folder
    variants, envs = ", ".join(plan.grid.variants), ", ".join(plan.grid.envs)
    done = f", {len(jobs) - len(left)} of them already done" if len(left) < len(jobs) else ""
    print(f"Runs of {variants} on {envs}: {len(jobs)}, seeds of each: {plan.grid.seeds}{done}.")
    failed: dict[str, str] = {}
    if left:
        failed = run_jobs(
            left, folder, backend=options.backend, n_jobs=options.jobs, tensorboard=options.tensorboard, video=options.video
        )
    results = folder.read(jobs)
    if not results:
        print("No run has been finished: there is nothing to report.", file=sys.stderr)
        return EXIT_FAILED
    print(f"\n{write_report(plan.grid, results, folder.path, failed)}\n")
    print(f"Report:      {folder.path / 'report.md'}, with figures and CSV files beside it")
    if options.tensorboard and folder.tensorboard.exists():
        command = shlex.join([_beside_python("tensorboard"), "--logdir", str(folder.tensorboard)])
        print(f"TensorBoard: {command}   (then open http://localhost:6006)")
    if options.video and folder.videos.exists():
        print(f"Videos:      {folder.videos}")
    elif options.video:
        print("Videos are recorded while training: there was none left to do.")
    return EXIT_FAILED if failed else 0


def check_jobs(jobs: Sequence[Job], backend: str, video: bool) -> None:
    """
    Build everything once, so that what is wrong with it shows before any job starts.

    :param jobs: what to train
    :param backend: that runs them
    :param video: whether videos are to be recorded
    :raises GridError: if something can't be built
    """
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise GridError("--backend ray needs the package ray (pip install ray)")
    if video and importlib.util.find_spec("moviepy") is None:
        raise GridError("--video needs the package moviepy (pip install moviepy)")
    for job in {job.env: job for job in jobs}.values():
        _check_env(job, video)
    for job in {(job.env, job.variant): job for job in jobs}.values():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the job itself will warn
                env = make_env(job)
                make_model(job, env)
                make_callbacks(job)
                env.close()
        except (Exception, SystemExit) as error:
            raise GridError(f"{job.variant} on {job.env}: {error}") from error


def _check_env(job: Job, video: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = gym.make(job.env, **job.env_kwargs)
            env.close()
            modes = env.metadata.get("render_modes", [])
            registered = job.env if env.spec is None else env.spec.id
    except gym.error.UnregisteredEnv as error:
        raise GridError(f"unknown environment: {error}") from error
    except (Exception, SystemExit) as error:
        raise GridError(f"environment {job.env}: {error}") from error
    if job.env.rpartition(":")[2] != registered.rpartition(":")[2]:
        raise GridError(f"environment {job.env}: name its version, as in {registered}")
    if video and "rgb_array" not in modes:
        raise GridError(f"environment {job.env} can't be recorded: it has no render mode 'rgb_array'")
    if video and "render_mode" in job.env_kwargs:
        raise GridError(f"environment {job.env} can't be recorded with a `render_mode` of its own in `env_kwargs`")


def _plan(arguments: Sequence[str] | None) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare variants of PPO.")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--grid", type=Path, metavar="FILE", help="a YAML file that says all of the following")
    for kind, text in (("preset", "a source system"), ("study", "a study of which results are committed")):
        source.add_argument(f"--{kind}", metavar="NAME", help=f"{text}: {', '.join(included(kind)) or 'none'}")
    add("--env", nargs="+", action="extend", metavar="ID", help="environments, by gymnasium's names")
    add(
        "--variants",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"among {', '.join(VARIANTS)} (default: clip adaptive_kl fixed_kl_3)",
    )
    add("--seeds", type=_positive, metavar="N", help="seeds of each variant (default: 5)")
    add("--timesteps", type=_positive, metavar="N", help="time steps of a run (default: 100000)")
    add("--n-envs", type=_positive, metavar="N", help="environments of a run (default: 1)")
    add("--normalize", action="store_true", default=None, help="normalise observations and rewards (VecNormalize)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="ARGUMENT=VALUE",
        help="arguments of PPO; VARIANT:ARGUMENT=VALUE for one variant",
    )
    add("--output", type=_folder, metavar="FOLDER", help="where results go, and go on (default: runs/compare, or runs/NAME)")
    add("--jobs", type=_positive, default=-1, metavar="N", help="runs at the same time (default: one a core)")
    add("--backend", choices=BACKENDS, default="loky", help="processes here, a Ray cluster, or one after the other")
    add("--no-tensorboard", dest="tensorboard", action="store_false", help="write no files for TensorBoard")
    add("--video", action="store_true", help="record the first seed of each variant before, during and after training")
    options = parser.parse_args(arguments)
    content, name = _content(options)
    grid = make_grid(content, str(options.grid or name))
    return Plan(grid, Folder(options.output or Path("runs") / name), options)


def _content(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the file says, and the command line over it; and a name for it."""
    content: dict[str, Any] = {"variants": {"clip": {}, "adaptive_kl": {}, "fixed_kl_3": {}}}
    file, name = options.grid, "compare" if options.grid is None else options.grid.stem
    for kind in ("preset", "study"):
        if (chosen := getattr(options, kind)) is not None:
            grids = included(kind)
            file, name = grids[one_of(kind, chosen, grids)], chosen
    if file is not None:
        content |= read_grid(file)
    if "envs" not in content and not options.env:
        raise GridError("--env is missing: name one or several environments, or a --grid, --preset or --study")
    # What a file says is checked before flags change or hide it.
    make_grid({"envs": options.env, **content}, str(options.grid or name)).check_claims()
    flags = {"envs": options.env, "variants": options.variants, "seeds": options.seeds, "timesteps": options.timesteps}
    flags |= {"n_envs": options.n_envs, "normalize": options.normalize}
    given = {key: value for key, value in flags.items() if value is not None}
    for key in ("envs", "variants"):
        content[key] = _chosen(given.pop(key, None), content.get(key))
    content |= given
    for task in content["envs"].values():
        for key in given:
            task.pop(key, None)
    override(content, options.set)
    return content, name


def _chosen(names: list[str] | None, said: Any) -> dict[str, dict[str, Any]]:
    """Those of a file's environments or variants that a flag names, or all, as copies that can be changed."""
    settings = said if isinstance(said, dict) else dict.fromkeys(said or ())
    return {name: dict(settings.get(name) or {}) for name in names or settings}


def _positive(text: str) -> int:
    try:
        number = int(text)  # also 50_000
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return number


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a folder, not empty")
    return Path(text)


def _beside_python(command: str) -> str:
    """As it has to be typed in the shell that has started this Python."""
    path = Path(sys.executable).with_name(command)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
