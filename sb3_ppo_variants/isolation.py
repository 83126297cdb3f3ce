"""Evaluating a policy in a way that training doesn't notice."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

KNOWN_LIBRARIES = ("torch.", "stable_baselines3.")
"""Their modules' forward passes change nothing in evaluation mode."""


@contextmanager
def undisturbed(policy: ActorCriticPolicy) -> Iterator[ActorCriticPolicy]:
    """
    A policy that acts as the given one does, in evaluation mode, and may be evaluated without a trace.

    The random states of Python, NumPy and torch are put back. If any module is a user's own, whose forward pass may
    keep statistics, counters or generators, it is a copy that is evaluated.

    :param policy: the policy in training
    """
    python_state, numpy_state, training = random.getstate(), np.random.get_state(), policy.training
    devices = [policy.device] if policy.device.type == "cuda" else []
    known = all(type(module).__module__.startswith(KNOWN_LIBRARIES) for module in policy.modules())
    try:
        with th.random.fork_rng(devices):
            isolated = policy if known else _copied(policy)
            isolated.set_training_mode(False)
            yield isolated
    finally:
        if known:
            policy.set_training_mode(training)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _copied(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    # The optimiser would be two thirds of the copy; the distribution's tensors have a graph, which can't be copied, and
    # are replaced at each evaluation.
    memo: dict[int, Any] = {id(policy.optimizer): None}
    distribution = getattr(policy, "action_dist", None)
    if distribution is not None:
        memo[id(distribution)] = copy.copy(distribution)
    return copy.deepcopy(policy, memo)
