"""Going back to earlier parameters."""

import copy
from collections.abc import Iterable
from typing import Any

import torch as th


class Snapshot:
    """
    The present values of some parameters, of their optimiser's state and of modules' buffers.

    :param parameters: the parameters
    :param optimizer: their optimiser
    :param buffers: modules' buffers, such as BatchNorm's statistics
    """

    def __init__(
        self, parameters: Iterable[th.nn.Parameter], optimizer: th.optim.Optimizer, buffers: Iterable[th.Tensor] = ()
    ) -> None:
        self._optimizer = optimizer
        self._tensors = [(buffer, buffer.clone()) for buffer in buffers]
        self._states: list[tuple[th.nn.Parameter, dict[str, Any] | None]] = []
        for parameter in parameters:
            self._tensors.append((parameter.data, parameter.detach().clone()))
            self._states.append((parameter, copy.deepcopy(optimizer.state.get(parameter))))

    def restore(self) -> None:
        """Put the values back, in place; may be called more than once."""
        for tensor, saved in self._tensors:
            tensor.copy_(saved)
        for parameter, state in self._states:
            if state is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter] = copy.deepcopy(state)
