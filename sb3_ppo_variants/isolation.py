"""Evaluating a policy in a way that training doesn't notice."""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy

MAX_ELEMENTS = 2**22
"""Arrays and tensors in attributes are only put back up to this size: larger ones are data, not statistics."""
MAX_CHILDREN = 1000
"""What stands in a container is only put back up to this number, for the same reason; the container itself always is."""


@contextmanager
def undisturbed(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Put the policy into evaluation mode, and back into what it was before.

    Put back are the random states of Python, NumPy and torch, modules' buffers, and what else the forward passes of users'
    modules may change: attributes that are numbers, arrays, tensors, random generators, or containers of these.

    :param policy: the policy in training
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [policy.device] if policy.device.type == "cuda" else []
    modes = [(module, module.training) for module in policy.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in policy.buffers()]
    contents = _Contents([getattr(policy, "action_dist", None), *map(vars, filter(_may_change, policy.modules()))])
    try:
        with th.random.fork_rng(devices):
            for module, _ in modes:
                module.training = False  # `train` may be a user's, with effects of its own
            yield
    finally:
        contents.put_back()
        for buffer, saved in buffers:
            buffer.data.copy_(saved)
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _may_change(module: th.nn.Module) -> bool:
    """Whether a forward pass in evaluation mode may change attributes: those of torch and SB3 don't, hooks may."""
    known = type(module).__module__.startswith(("torch.nn.", "stable_baselines3."))
    return not known or bool(module._forward_hooks or module._forward_pre_hooks)


class _Contents:
    """
    The contents of mutable values, and of those that stand in them.

    :param values: what is to be put back later
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self._put_back: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        for value in values:
            self._save(value)

    def put_back(self) -> None:
        """Give all values their contents again."""
        for put_back in self._put_back:
            put_back()

    def _save(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        match value:
            case th.Tensor() if not value.requires_grad and value.numel() <= MAX_ELEMENTS:
                self._later(value.copy_, value.clone())
            case np.ndarray() if value.size <= MAX_ELEMENTS:
                self._later(np.copyto, value, value.copy())
            case th.Generator() | np.random.RandomState():
                self._later(value.set_state, value.get_state())
            case np.random.Generator():
                self._later(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
            case random.Random():
                self._later(value.setstate, value.getstate())
            case Distribution():
                self._save(vars(value))
            case dict() | list() | deque() | set() | tuple():
                self._save_container(value)

    def _save_container(self, container: Any) -> None:
        children = list(container.values() if isinstance(container, dict) else container)
        if isinstance(container, dict):
            self._later(_refill_dict, container, dict(container))
        elif not isinstance(container, tuple):
            self._later(_refill, container, children)
        for child in children[:MAX_CHILDREN]:
            self._save(child)

    def _later(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._put_back.append(lambda: function(*arguments))


def _refill_dict(value: dict[Any, Any], content: dict[Any, Any]) -> None:
    for key in value.keys() - content.keys():
        del value[key]
    value.update(content)


def _refill(value: Any, content: list[Any]) -> None:
    value.clear()
    (value.update if isinstance(value, set) else value.extend)(content)
