"""Going back to earlier parameters."""

import copy
from collections.abc import Collection

import torch as th


class Snapshot:
    """
    The present values of some of a module's parameters, of their optimiser's state, and of the buffers beside them.

    Buffers, such as BatchNorm's statistics, belong to a submodule: they are left out where its parameters are.

    :param module: the module
    :param parameters: which of its parameters
    :param optimizer: their optimiser
    """

    def __init__(self, module: th.nn.Module, parameters: Collection[th.nn.Parameter], optimizer: th.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._states = [(parameter, copy.deepcopy(optimizer.state.get(parameter))) for parameter in parameters]
        included = set(parameters)
        self._buffers = [
            (submodule, {name: buffer.clone() for name, buffer in submodule.named_buffers(recurse=False)})
            for submodule in module.modules()
            if set(submodule.parameters(recurse=False)) <= included
        ]

    @th.no_grad()
    def restore(self) -> None:
        """Put the values back, in place; may be called more than once."""
        for parameter, saved in self._parameters:
            parameter.copy_(saved)
        for submodule, buffers in self._buffers:
            for name, saved in buffers.items():
                submodule.get_buffer(name).copy_(saved)
        for parameter, state in self._states:
            if state is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter] = copy.deepcopy(state)
