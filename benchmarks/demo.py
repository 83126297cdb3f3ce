"""
Clip, fixed KL and adaptive KL on CartPole-v1, about three minutes on two cores.

Run it with ``make demo`` or ``python -m benchmarks.demo``.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import table, write_report
from benchmarks.runs import Run, train_all
from benchmarks.variants import VARIANTS

ENV_ID = "CartPole-v1"
N_ENVS = 8
ARGUMENTS = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "learning_rate": "lin_0.002"}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train, print a table, draw the curves, and say how to open TensorBoard.

    :param arguments: of the command line
    """
    parser = argparse.ArgumentParser(description="Compare clip, fixed KL and adaptive KL on CartPole-v1.")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a variant (default: %(default)s)")
    parser.add_argument("--timesteps", type=int, default=150_000, help="time steps a run (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="folder of the results, replaces those of an earlier demo (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    if options.timesteps < 1:
        parser.error(f"--timesteps must be at least 1, not {options.timesteps}")

    tensorboard = options.output / "tensorboard"
    tensorboard.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(ENV_ID, variant, seed, options.timesteps, N_ENVS, {**ARGUMENTS, **variant_arguments})
        for seed in range(options.seeds)
        for variant, variant_arguments in VARIANTS.items()
    ]
    for run in runs:  # the curves of an earlier demo would mix with these
        for folder in tensorboard.glob(f"{run.name}_*"):
            shutil.rmtree(folder)
    print(f"Training {len(runs)} agents on {ENV_ID}: {', '.join(VARIANTS)}, {options.seeds} seeds each.")
    results = train_all(runs, tensorboard)
    write_report(results, options.output)
    print(f"\n{table(results)}\n")
    print(f"{ENV_ID} is solved when the mean return of 100 training episodes in a row reaches 475.")
    print(f"Learning curves: {options.output / 'learning_curves.png'}")
    print(f"Raw results:     {options.output / 'report.md'}, episodes.csv and updates.csv beside it")
    print(f"TensorBoard:     {_tensorboard_command()} --logdir {tensorboard}   (then open http://localhost:6006)")


def _tensorboard_command() -> str:
    """As it has to be typed in the shell that has started this Python."""
    command = Path(sys.executable).with_name("tensorboard")
    return str(command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command)


if __name__ == "__main__":
    main()
