"""
What a second rank is worth, what more of them would be, and whether they learn what one process learns.

Measured, in turns: one rank, two ranks, two that are bound to a core each, and two processes that don't know of each other,
which show what the machine itself allows. The all-reduce alone gives the network's latency and bandwidth, and these the
prediction of :mod:`benchmarks.cost_model`. ``--learning`` compares returns instead. Run it with
``python -m benchmarks.scaling``; nothing else should run beside it.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.cost_model import (
    Network,
    UpdateCost,
    all_reduce_seconds,
    communication_seconds,
    efficiency,
    fit_network,
    most_ranks,
    update_seconds,
    waiting_seconds,
    with_waiting,
)
from benchmarks.provenance import write_with_origin
from benchmarks.tables import markdown_of

WARM_UP = 2
"""Updates that aren't counted."""
TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        **{"n_envs": 8, "normalize": False, "n_updates": 22},
        "arguments": {"n_steps": 128, "batch_size": 256, "learning_rate": 1e-3},
    },
    "HalfCheetah-v5": {
        **{"n_envs": 4, "normalize": True, "n_updates": 8},
        "arguments": {"n_steps": 512, "batch_size": 64},
    },
    "Humanoid-v5": {
        **{"n_envs": 4, "normalize": True, "n_updates": 6},
        "arguments": {"n_steps": 512, "batch_size": 128, "n_epochs": 5},
    },
}
"""A light environment, a usual one, and a heavy one."""
CONTENDERS = {
    "one rank": (1, 1, False),
    "two ranks": (2, 1, False),
    "two ranks, bound": (2, 1, True),
    "two apart": (1, 2, False),
}
"""How many ranks, how many copies of all, and whether each rank is bound to a core."""
LEARNING = {"CartPole-v1": 60, "HalfCheetah-v5": 75}
"""Updates of a whole training."""
NETWORKS = {
    "data centre, 25 Gb/s Ethernet": Network(latency=30e-6, bandwidth=25e9 / 8),
    "office, 1 Gb/s Ethernet": Network(latency=100e-6, bandwidth=1e9 / 8),
}
"""Assumed, to be compared with the loopback that is measured: latency of a message through gloo, and bandwidth."""
SHOWN_BYTES = (2**10, 2**16, 2**20)
"""Sizes of the vectors whose all-reduces are told."""
MEASURED_RANKS = (2, 4, 8)
"""Whose all-reduces are measured: the first are fitted, the others compared with what follows from them."""
RANKS = (2, 8, 32, 128, 512, 1024)


def start(n_ranks: int, output: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a task on so many ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "benchmarks.rank_task", str(output), *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(n_ranks: int, settings: dict[str, Any] | None, seed: int = 0, n_copies: int = 1, bind: bool = False) -> list[Any]:
    """
    Run a task to its end.

    :param n_ranks: of each copy
    :param settings: as :func:`benchmarks.rank_task.train` takes them, ``None`` for the all-reduce alone
    :param seed: of everything
    :param n_copies: that run at the same time, and don't know of each other
    :param bind: each rank to a core
    :return: what each copy has found
    """
    arguments = ["--seed", str(seed), *([] if settings is None else ["--train", json.dumps(settings)]), *["--bind"] * bind]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{number}.json" for number in range(n_copies)]
        processes = [start(n_ranks, output, *arguments) for output in outputs]
        for process in processes:
            if process.wait() != 0:
                raise subprocess.CalledProcessError(process.returncode, process.args)
        return [json.loads(output.read_text(encoding="utf-8")) for output in outputs]


def measure_speed(n_rounds: int) -> pd.DataFrame:
    """One row an update, behind the warm-up: who, in which round, and what it has taken."""
    rows = []
    for turn in range(n_rounds):
        for env, settings in TASKS.items():
            for who, (n_ranks, n_copies, bind) in list(CONTENDERS.items())[:: 1 if turn % 2 == 0 else -1]:
                results = run(n_ranks, {"env": env, **settings}, turn, n_copies, bind)
                for row in overlapping([result["updates"][WARM_UP:] for result in results]):
                    rows.append({"env": env, "who": who, "turn": turn, "n_bytes": results[0]["n_bytes"], **row})
        print(f"round {turn + 1} of {n_rounds}: done", flush=True)
    return pd.DataFrame(rows)


def overlapping(copies: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """The updates of all copies that lie in the time in which all of them were running."""
    start = max(updates[0]["began"] for updates in copies)
    end = min(updates[-1]["began"] + updates[-1]["seconds"] for updates in copies)
    of_all = [update for updates in copies for update in updates]
    return [update for update in of_all if update["began"] >= start and update["began"] + update["seconds"] <= end]


def summarize_speed(measurements: pd.DataFrame) -> pd.DataFrame:
    """
    One row an environment and contender.

    :param measurements: as :func:`measure_speed` returns them
    :return: samples a second of all its ranks or copies, as a ratio to one rank's, round by round, and shares of an update;
        copies of which no updates overlapped have no row
    """
    rows = []
    for env, of_env in measurements.groupby("env", sort=False):
        settings = TASKS[str(env)]
        samples = settings["n_envs"] * settings["arguments"]["n_steps"]
        speeds = {}
        for who, group in of_env.groupby("who"):
            factor = 1 if who == "one rank" else 2
            speeds[who] = factor * samples / group.groupby("turn")["seconds"].mean()
        for who in filter(speeds.__contains__, CONTENDERS):
            group = of_env[of_env["who"] == who]
            ratios, shares = (
                speeds[who] / speeds["one rank"],
                group[["rollout", "communication"]].sum() / group["seconds"].sum(),
            )
            rows.append(
                {
                    **{"environment": env, "who": who, "samples/s": f"{speeds[who].median():.0f}"},
                    "times one rank's": f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
                    "rollout": f"{shares['rollout']:.0%}",
                    "communication, and waiting": f"{shares['communication']:.0%}",
                }
            )
    return pd.DataFrame(rows)


def costs(measurements: pd.DataFrame, network: Network) -> dict[str, UpdateCost]:
    """
    What an update of each environment costs one rank, as medians.

    :param measurements: as :func:`measure_speed` returns them
    :param network: that ranks have been measured on, for what they waited
    """
    found = {}
    of_two = measurements[measurements["who"] == "two ranks, bound"].groupby("env")
    others, communication = of_two["others"].median(), of_two["communication"].median()
    for env, group in measurements[measurements["who"] == "one rank"].groupby("env", sort=False):
        rollout, seconds = group["rollout"].median(), group["seconds"].median()
        steps, n_bytes = int(group["gradient_steps"].median()), int(group["n_bytes"].iloc[0])
        rollout_std = (group["rollout"] - group.groupby("turn")["rollout"].transform("mean")).std()
        cost = UpdateCost(float(rollout), float(seconds - rollout), steps, n_bytes, int(others[env]), float(rollout_std))
        found[str(env)] = with_waiting(cost, network, 2, float(communication[env]))
    return found


def predict(found: dict[str, UpdateCost], networks: dict[str, Network]) -> pd.DataFrame:
    """
    Efficiency by number of ranks, and where it falls to a half.

    :param found: what an update costs one rank, by environment
    :param networks: by name
    """
    rows = []
    for env, cost in found.items():
        for name, network in networks.items():
            row = {"environment": env, "network": name}
            row |= {f"{n_ranks} ranks": f"{efficiency(n_ranks, cost, network):.0%}" for n_ranks in RANKS}
            rows.append({**row, "half is lost from": f"{most_ranks(0.5, cost, network) + 1} ranks"})
    return pd.DataFrame(rows)


def check_model(measurements: pd.DataFrame, found: dict[str, UpdateCost], network: Network) -> pd.DataFrame:
    """What the model says of an update of two bound ranks, beside what was measured."""
    rows = []
    two = measurements[measurements["who"] == "two ranks, bound"]
    for env, cost in found.items():
        alone = update_seconds(1, cost, network)
        parts = (alone, communication_seconds(2, cost, network), waiting_seconds(2, cost), update_seconds(2, cost, network))
        seen = two[two["env"] == env]["seconds"].median()
        rows.append((env, *(f"{1e3 * seconds:.0f} ms" for seconds in (*parts, seen))))
    return pd.DataFrame(rows, columns=["environment", "alone", "network", "waiting", "update of two ranks", "measured"])


def check_ring(measured: dict[int, list[tuple[int, float]]], network: Network) -> pd.DataFrame:
    """What the model says of more ranks than this machine has cores for, beside what was measured."""
    rows = []
    for n_ranks, reductions in measured.items():
        for n_bytes, seconds in reductions:
            if n_bytes in SHOWN_BYTES:
                expected = all_reduce_seconds(n_ranks, n_bytes, network)
                rows.append((n_ranks, f"{n_bytes / 2**10:.0f} KiB", f"{1e6 * expected:.0f} us", f"{1e6 * seconds:.0f} us"))
    return pd.DataFrame(rows, columns=["ranks", "vector", "predicted", "measured"])


def draw_prediction(found: dict[str, UpdateCost], networks: dict[str, Network], path: Path) -> None:
    """Efficiency over the number of ranks."""
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), sharey=True, layout="constrained", squeeze=False)
    n_ranks = np.unique(np.logspace(0, 10, 200, base=2).astype(int))
    for axis, (env, cost) in zip(axes[0], found.items(), strict=True):
        for name, network in networks.items():
            axis.plot(n_ranks, [efficiency(int(number), cost, network) for number in n_ranks], label=name)
        axis.set(title=env, xscale="log", xlabel="ranks", ylim=(0, 1.02))
        axis.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("efficiency")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure_learning(n_seeds: int) -> pd.DataFrame:
    """Mean returns by time step, of two ranks and of one process with twice the environments and twice the minibatch."""
    rows = []
    for env, n_updates in LEARNING.items():
        ranks = {**copy.deepcopy(TASKS[env]), "env": env, "n_updates": n_updates}
        alone = copy.deepcopy(ranks)
        alone["n_envs"] *= 2
        alone["noise_scale"] = True
        alone["arguments"]["batch_size"] *= 2
        for seed in range(n_seeds):
            for who, n_ranks, settings in (("two ranks", 2, ranks), ("one process", 1, alone)):
                (result,) = run(n_ranks, settings, seed)
                rows += [{"env": env, "who": who, "seed": seed, **row} for row in result["updates"]]
            print(f"{env}, seed {seed}: done", flush=True)
    return pd.DataFrame(rows)


def summarize_learning(measurements: pd.DataFrame) -> pd.DataFrame:
    """Mean returns of the last 100 episodes, over seeds."""
    last = measurements.sort_values("timesteps").groupby(["env", "who", "seed"], sort=False).tail(1)
    rows = []
    for (env, who), group in last.groupby(["env", "who"], sort=False):
        returns = group["return"]
        rows.append((env, who, len(returns), f"{returns.mean():.0f}", f"{returns.std():.0f}", f"{returns.min():.0f}"))
    return pd.DataFrame(rows, columns=["environment", "who", "seeds", "mean return", "standard deviation", "lowest"])


def compare_learning(measurements: pd.DataFrame) -> str:
    """Differences of mean returns, seed by seed, with Student's interval."""
    last = measurements.sort_values("timesteps").groupby(["env", "who", "seed"], sort=False)["return"].last().unstack("who")
    told = []
    for env, of_env in last.groupby("env", sort=False):
        differences = (of_env["two ranks"] - of_env["one process"]).to_numpy()
        interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95) if len(differences) > 1 else (np.nan, np.nan)
        told.append(f"{env}: {differences.mean():.0f} (95 % interval {interval[0]:.0f} to {interval[1]:.0f})")
    return "Mean return of two ranks less that of one process: " + "; ".join(told) + "."


def tell_noise_scales(measurements: pd.DataFrame) -> str:
    """Where larger minibatches, which more ranks make, stop being of use."""
    told = []
    for env, group in measurements[measurements["who"] == "one process"].groupby("env", sort=False):
        late = group[group["timesteps"] > group["timesteps"].max() / 2]["noise_scale"].median()
        batch_size = TASKS[str(env)]["arguments"]["batch_size"]
        told.append(f"{env}: {late:.0f} samples, which {max(late / batch_size, 1):.0f} ranks of {batch_size} have together")
    return (
        "Gradient noise scale in the second half of training, beyond which larger minibatches are of little use (McCandlish "
        f"et al. 2018): {'; '.join(told)}."
    )


def draw_learning(measurements: pd.DataFrame, path: Path) -> None:
    """All seeds' curves, and their means."""
    envs = measurements["env"].unique()
    figure, axes = plt.subplots(1, len(envs), figsize=(4.5 * len(envs), 3.4), layout="constrained", squeeze=False)
    for axis, env in zip(axes[0], envs, strict=True):
        for color, (who, group) in zip(("C0", "C1"), measurements[measurements["env"] == env].groupby("who"), strict=True):
            by_seed = group.pivot(index="timesteps", columns="seed", values="return")
            axis.plot(by_seed.index, by_seed, color=color, alpha=0.3, lw=0.8)
            axis.plot(by_seed.index, by_seed.mean(axis=1), color=color, label=who)
        axis.set(title=env, xlabel="time steps of all ranks")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mean return of 100 episodes")
    axes[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report_speed(n_rounds: int, output: Path) -> list[str]:
    """Measure, write what was measured, and tell it."""
    measurements = measure_speed(n_rounds)
    reductions = {n_ranks: [(size, seconds) for size, seconds in run(n_ranks, None)[0]] for n_ranks in MEASURED_RANKS}
    measurements.to_csv(output / "updates.csv", index=False)
    rows = [(n_ranks, *reduction) for n_ranks, of_ranks in reductions.items() for reduction in of_ranks]
    pd.DataFrame(rows, columns=["ranks", "n_bytes", "seconds"]).to_csv(output / "all_reduce.csv", index=False)
    sizes, seconds = zip(*reductions[2], strict=True)
    loopback = fit_network(2, sizes, seconds)
    found = costs(measurements, loopback)
    networks = {"measured loopback": loopback, **NETWORKS}
    draw_prediction(found, networks, output / "efficiency.png")
    told = ", ".join(f"{name}: {1e6 * net.latency:.0f} us, {net.bandwidth / 1e9:.2g} GB/s" for name, net in networks.items())
    tables = [summarize_speed(measurements), check_model(measurements, found, loopback), predict(found, networks)]
    summary, check, prediction, ring = map(markdown_of, [*tables, check_ring(reductions, loopback)])
    return [
        *("# Several ranks", summary),
        "Samples a second of all ranks together, medians of the rounds; shares are those of an update's time on rank 0. Two "
        "apart are two processes that don't know of each other: what this machine allows.",
        *("## The model", check),
        "Alone is measured with one rank, the network with the all-reduce alone, and waiting is what two ranks communicate or "
        "wait beyond that: each minibatch's standard deviation is fitted to it. What is measured beyond their sum is what two "
        "ranks take longer to compute for.",
        f"A message's latency and bandwidth: {told}. The first is fitted to all_reduce.csv, the others are assumptions.",
        ring,
        "The network is fitted to two ranks. More ranks than cores take turns on them, and so more time.",
        *("## Predicted efficiency", prediction, "![efficiency](efficiency.png)"),
    ]


def report_learning(n_seeds: int, output: Path) -> list[str]:
    """Measure, write what was measured, and tell it."""
    measurements = measure_learning(n_seeds)
    measurements.drop(columns=["seconds", "rollout", "communication"]).to_csv(output / "returns.csv", index=False)
    draw_learning(measurements, output / "returns.png")
    table, told = markdown_of(summarize_learning(measurements)), tell_noise_scales(measurements)
    return ["# What several ranks learn", table, compare_learning(measurements), told, "![returns](returns.png)"]


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write measurements and report into a folder.

    :param arguments: of the command line
    """
    parser = argparse.ArgumentParser(description="Compare two ranks with one.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, or seeds with --learning (default: %(default)s)")
    parser.add_argument("--learning", action="store_true", help="compare returns instead of speed")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    matplotlib.use("Agg")
    options.output.mkdir(parents=True, exist_ok=True)
    parts = (report_learning if options.learning else report_speed)(options.rounds, options.output)
    write_with_origin(parts, options.output)
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
