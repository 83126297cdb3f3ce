"""Going back to earlier parameters."""

import copy
from collections.abc import Collection
from typing import Any

import torch as th


class Snapshot:
    """
    The present values of some of a module's parameters, of their optimiser's state, and of the buffers beside them.

    Buffers, such as BatchNorm's statistics, belong to a submodule: they are left out where its parameters are.

    :param module: the module
    :param parameters: which of its parameters
    :param optimizer: their optimiser
    """

    parameters: list[tuple[th.nn.Parameter, th.Tensor]]
    """Each with its value."""

    def __init__(self, module: th.nn.Module, parameters: Collection[th.nn.Parameter], optimizer: th.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.parameters = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._states = [(parameter, _copy(optimizer.state.get(parameter))) for parameter in parameters]
        included = set(parameters)
        self._buffers = [
            (submodule, {name: buffer.clone() for name, buffer in submodule.named_buffers(recurse=False)})
            for submodule in module.modules()
            if set(submodule.parameters(recurse=False)) <= included
        ]

    def without(self, parameters: Collection[th.nn.Parameter]) -> "Snapshot":
        """
        The same but for some parameters, and the buffers beside them.

        :param parameters: that are left out
        """
        rest = copy.copy(self)
        rest.parameters = [pair for pair in self.parameters if pair[0] not in parameters]
        rest._states = [pair for pair in self._states if pair[0] not in parameters]
        included = {parameter for parameter, _ in rest.parameters}
        rest._buffers = [pair for pair in self._buffers if set(pair[0].parameters(recurse=False)) <= included]
        return rest

    @th.no_grad()
    def restore(self) -> None:
        """Put the values back, in place; may be called more than once."""
        for parameter, saved in self.parameters:
            parameter.copy_(saved)
        for submodule, buffers in self._buffers:
            for name, saved in buffers.items():
                submodule.get_buffer(name).copy_(saved)
        for parameter, state in self._states:
            if state is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter] = _copy(state)


def _copy(state: Any) -> Any:
    """As ``copy.deepcopy`` does, which takes ten times as long."""
    if not isinstance(state, dict):
        return copy.deepcopy(state)
    return {name: value.clone() if isinstance(value, th.Tensor) else copy.deepcopy(value) for name, value in state.items()}
