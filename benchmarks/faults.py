"""
Injects NaN and infinity into trainings at random moments: does any reach the parameters?

Rewards, observations, advantages, log-probabilities, gradients and steps that overflow; each with each way to deal with it
(``on_nonfinite``) and with each engine. A training that raises must leave the model of its last whole update; one that goes on
must end with finite parameters; and both engines with the same. Run it with ``make faults``.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.hostile import ENGINES, N_ENVS, N_STEPS, Random, Trainings
from benchmarks.provenance import write_with_origin
from benchmarks.tables import markdown
from sb3_ppo_variants import PPO, NonFiniteError, UpdateCallback, UpdateStats, algorithm

KINDS = ("reward", "observation", "advantage", "log-probability", "gradient", "step")
VALUES = (float("nan"), float("inf"), float("-inf"))
MODES = ("raise", "skip", "restore")


class Fault(NamedTuple):
    """
    One injection.

    :param kind: one of :data:`KINDS`
    :param value: of which number; a step's is always the overflow of its learning rate
    :param mode: ``on_nonfinite``
    :param update: in which update, from 0, of three
    :param position: of the sample in the rollout, or of the minibatch in the update
    :param env: of the sample
    :param arguments: of the algorithm
    """

    kind: str
    value: float
    mode: str
    update: int
    position: int
    env: int
    arguments: dict[str, Any]


class _FaultyEnv(Random):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        if self.n_steps == self._fault.update * N_STEPS + self._fault.position + 1:
            if self._fault.kind == "reward":
                reward = self._fault.value
            elif self._fault.kind == "observation":
                observation[0] = self._fault.value
        return observation, reward, *rest


class _Inject(UpdateCallback):
    """What environments can't do."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault
        self._update, self._minibatch = -1, 0

    def _on_rollout_end(self) -> None:
        self._update += 1
        if self._update == self._fault.update and self._fault.kind == "advantage":
            self.model.rollout_buffer.advantages[self._fault.position, self._fault.env] = self._fault.value

    def _on_update_start(self) -> None:
        self._minibatch = 0
        if self._update == self._fault.update and self._fault.kind == "log-probability":
            self.model.rollout_buffer.log_probs[self._fault.position, self._fault.env] = self._fault.value

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        if (self._update, self._minibatch) == (self._fault.update, self._fault.position % 6):
            if self._fault.kind == "gradient":
                gradients = [parameter.grad for parameter in self.model.policy.parameters() if parameter.grad is not None]
                gradients[self._fault.position % len(gradients)].view(-1)[0] = self._fault.value
            elif self._fault.kind == "step":
                for optimizer in (self.model.policy.optimizer, self.model.value_optimizer):
                    for group in () if optimizer is None else optimizer.param_groups:
                        group["lr"] = 1e30
        self._minibatch += 1
        return True


def draw_fault(draw: random.Random) -> Fault:
    """
    A random one.

    :param draw: the generator
    """
    arguments: dict[str, Any] = {"normalize_advantage": draw.random() < 0.7}
    arguments |= draw.choice([{}, {"clip_range": None, "kl_coef": "auto"}, {"n_value_epochs": 2}, {"max_kl": 0.01}])
    place = (draw.randrange(3), draw.randrange(N_STEPS), draw.randrange(N_ENVS))
    return Fault(draw.choice(KINDS), draw.choice(VALUES), draw.choice(MODES), *place, arguments)


def inject(fault: Fault, engine: str) -> tuple[str, dict[str, th.Tensor]]:
    """
    Train with a fault.

    :param fault: the fault
    :param engine: of the model
    :return: what has become of the training, and the parameters
    :raises AssertionError: if something that isn't finite is left, or a training that has failed has changed the model
    """
    trainings = Trainings(engine)
    envs = DummyVecEnv([(lambda: _FaultyEnv(fault)) if index == fault.env else Random for index in range(N_ENVS)])
    outcome = "trained on"
    try:
        trainings.learn(envs, _Inject(fault), on_nonfinite=fault.mode, **fault.arguments)
    except NonFiniteError as error:
        outcome = f"raised: {error}".partition(": Expected")[0]
        with tempfile.TemporaryDirectory() as folder:
            trainings.check(Path(folder))
    assert trainings.model is not None
    parameters = trainings.model.policy.state_dict()
    assert all(th.isfinite(value).all() for value in parameters.values()), "parameters that aren't finite"
    states = trainings.model.policy.optimizer.state.values()
    assert all(th.isfinite(value).all() for state in states for value in state.values()), "optimiser's state that isn't finite"
    return outcome, parameters


def measure(n_faults: int, seed: int = 0) -> pd.DataFrame:
    """
    Inject so many faults, each with both engines.

    :param n_faults: how many
    :param seed: of the draw
    :return: one row a fault
    """
    draw, rows = random.Random(seed), []
    for _ in range(n_faults):
        fault, wrong = draw_fault(draw), ""
        try:
            (outcome, one), (other_outcome, other) = (inject(fault, engine) for engine in ENGINES)
            if outcome != other_outcome or not all(th.equal(one[name], other[name]) for name in one):
                wrong = f"engines differ: {outcome}; {other_outcome}"
        except Exception as error:
            outcome, wrong = "", f"{type(error).__name__}: {error}"
        row = {**fault._asdict(), "outcome": outcome, "wrong": wrong}
        rows.append(row)
        if wrong:
            print(f"{fault}: {wrong}", flush=True)
    return pd.DataFrame(rows)


class _NoTransaction(contextlib.nullcontext[Any]):
    """What would be there without transactions."""

    undone = False

    def __init__(self, model: PPO) -> None:
        super().__init__(self)


class _NoAttempt(contextlib.nullcontext[None]):
    def __init__(self, model: PPO, stats: UpdateStats) -> None:
        super().__init__()
        self.failed = False

    def at(self, *place: Any) -> "_NoAttempt":
        return self


UNCHECKED = {
    "Transaction": _NoTransaction,
    "Attempt": _NoAttempt,
    "checked": lambda metrics: metrics,
    "nonfinite_in_rollout": lambda buffer: None,
}


def cost(n_rounds: int = 30) -> np.ndarray:
    """
    What the checks cost: the time of an update with SB3's defaults, over that of one without them, round by round.

    :param n_rounds: how many
    :return: the ratios, shape (n_rounds,)
    """
    th.set_num_threads(1)
    model = PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu").learn(1)
    ratios = []
    for turn in range(n_rounds):
        seconds = {}
        for checks in (True, False) if turn % 2 else (False, True):
            with contextlib.ExitStack() as stack:
                for name, stand_in in () if checks else UNCHECKED.items():
                    stack.enter_context(mock.patch.object(algorithm, name, stand_in))
                start = time.perf_counter()
                model.train()
                seconds[checks] = time.perf_counter() - start
        ratios.append(seconds[True] / seconds[False])
    return np.array(ratios)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, and write rows and summary into a folder.

    :param arguments: of the command line
    :raises SystemExit: with 1 if any fault has had another effect than it may
    """
    parser = argparse.ArgumentParser(description="Inject numbers that aren't finite into trainings.")
    parser.add_argument("--faults", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/faults"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.faults < 1:
        parser.error(f"--faults must be at least 1, not {options.faults}")
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    np.seterr(all="ignore")
    rows = measure(options.faults, options.seed)
    rows.to_csv(options.output / "faults.csv", index=False)
    table = []
    for kind, own in [*rows.groupby("kind", sort=False), ("all", rows)]:
        raised = own["outcome"].str.startswith("raised")
        counts = (len(own), int(raised.sum()), int((own["outcome"] == "trained on").sum()), int((own["wrong"] != "").sum()))
        table.append((str(kind), *map(str, counts)))
    header = ("fault in", "injected", "raised, last model kept", "trained on", "lost, or engines differ")
    text = markdown([header, *table])
    ratios = cost()
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]) - 1
    price = (
        f"An update with SB3's defaults on Pendulum-v1 takes {middle:+.1%} of its time longer with the checks than without "
        f"them (median of {len(ratios)} rounds; quartiles {low:+.1%} and {high:+.1%})."
    )
    write_with_origin(["# Injected faults", text, price], options.output)
    print(f"\n{text}\n\n{price}")
    if table[-1][-1] != "0":
        sys.exit(1)


if __name__ == "__main__":
    main()
