"""Adam over a flat vector: as ``torch.optim.Adam``, element by element, but all parameters at once."""

import itertools
from typing import Any

import numpy as np
import torch as th

ALIGNMENT = 16
"""
Matrices start at a multiple of so many float32, as all that torch allocates does: others are multiplied slower by half, and on
some processors (AMD's, with MKL) with other bits.
"""


def bounds(like: list[th.Tensor]) -> list[int]:
    """
    Where the parts of a flat vector start, and its length.

    :param like: tensors that the parts stand for
    """
    return [0, *itertools.accumulate(-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in like)]


def views(flat: th.Tensor, like: list[th.Tensor]) -> list[th.Tensor]:
    """
    The parts of a flat vector.

    :param flat: as long as :func:`bounds` says; there are zeros between the parts
    :param like: tensors that the parts stand for, and whose shapes they get
    """
    starts = bounds(like)[:-1]
    return [flat[start : start + tensor.numel()].view(tensor.shape) for start, tensor in zip(starts, like, strict=True)]


class _Run:
    """
    Consecutive parameters that have stepped equally often.

    :param group: the optimiser's settings
    :param n_steps: that the parameters have made
    :param values: of the parameters, shape (n,)
    :param grad: shape (n,)
    :param moments: the optimiser's state by its names, each of shape (n,)
    """

    def __init__(
        self, group: dict[str, Any], n_steps: float, values: th.Tensor, grad: th.Tensor, moments: dict[str, th.Tensor]
    ) -> None:
        self.n_steps = n_steps
        self._values = values
        self._grad = grad
        self._exp_avg = moments["exp_avg"]
        self._exp_avg_sq = moments["exp_avg_sq"]
        self._max_exp_avg_sq = moments.get("max_exp_avg_sq")
        self._denominator = th.empty_like(values)
        # NumPy's views: it multiplies and divides by a number in half of torch's time, to the same bits.
        self._second_moment_array, self._denominator_array = self._exp_avg_sq.numpy(), self._denominator.numpy()
        (self._beta1, self._beta2), self._lr = group["betas"], group["lr"]
        self._beta2_float32, self._eps = np.float32(self._beta2), np.float32(group["eps"])
        self._weight_decay, self._maximize = group["weight_decay"], group["maximize"]

    def step(self) -> None:
        """Algorithm 1 of Kingma & Ba 2015, arXiv 1412.6980, in the order of torch's operations."""
        self.n_steps += 1
        beta1, beta2, grad, second_moment = self._beta1, self._beta2, self._grad, self._exp_avg_sq
        if self._maximize:
            grad = -grad
        if self._weight_decay != 0:
            grad = grad.add(self._values, alpha=self._weight_decay)
        self._exp_avg.lerp_(grad, 1 - beta1)
        np.multiply(self._second_moment_array, self._beta2_float32, out=self._second_moment_array)
        second_moment.addcmul_(grad, grad, value=1 - beta2)
        if self._max_exp_avg_sq is not None:
            second_moment = th.maximum(self._max_exp_avg_sq, second_moment, out=self._max_exp_avg_sq)
        th.sqrt(second_moment, out=self._denominator)
        denominator, correction = self._denominator_array, np.float32((1 - beta2**self.n_steps) ** 0.5)
        np.add(np.divide(denominator, correction, out=denominator), self._eps, out=denominator)
        self._values.addcdiv_(self._exp_avg, self._denominator, value=-(self._lr / (1 - beta1**self.n_steps)))


class FlatAdam:
    """
    A ``torch.optim.Adam`` for some of its parameters, as flat vectors; :meth:`fetch` its state first.

    :param optimizer: with one parameter group
    :param parameters: which of its parameters, in the order of the flat vectors
    :param values: of the parameters, shape (n_elements,); changed in place by each step
    :param grad: of the parameters, shape (n_elements,)
    """

    def __init__(self, optimizer: th.optim.Adam, parameters: list[th.Tensor], values: th.Tensor, grad: th.Tensor) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._values = values
        self._grad = grad
        self._moments = {name: th.zeros_like(values) for name in ("exp_avg", "exp_avg_sq")}
        if optimizer.param_groups[0]["amsgrad"]:
            self._moments["max_exp_avg_sq"] = th.zeros_like(values)
        self._views = {name: views(moment, parameters) for name, moment in self._moments.items()}
        self._steps = [0.0] * len(parameters)
        self._stepping: tuple[int, int] | None = None
        self._runs: dict[int, _Run] = {}

    def fetch(self) -> bool:
        """Take over the optimiser's state; ``False`` if that is of another kind by now."""
        if self._optimizer.param_groups[0]["amsgrad"] != ("max_exp_avg_sq" in self._moments):
            return False
        states = [self._optimizer.state.get(parameter) or {} for parameter in self._parameters]
        self._steps = [float(state["step"]) if state else 0.0 for state in states]
        self._stepping, self._runs = None, {}
        for name, parts in self._views.items():
            for view, state in zip(parts, states, strict=True):
                view.copy_(state[name]) if state else view.zero_()
        return True

    def publish(self) -> None:
        """Write the state into the optimiser's."""
        self._count_steps()
        indices = {parameter: index for index, parameter in enumerate(self._parameters)}
        for parameter in self._optimizer.param_groups[0]["params"]:  # the order in which Adam makes its states
            index = indices[parameter]
            if self._steps[index] == 0:
                continue
            state = self._optimizer.state[parameter]
            if not state:
                state["step"] = th.tensor(0.0)
                state.update({name: th.zeros_like(parameter) for name in self._moments})
            state["step"].fill_(self._steps[index])
            for name, parts in self._views.items():
                state[name].copy_(parts[index])

    def step(self, first: int, last: int) -> None:
        """
        One step of consecutive parameters.

        :param first: index of the first one
        :param last: index behind that of the last one
        """
        if self._stepping != (first, last):
            self._count_steps()
            self._stepping, self._runs = (first, last), self._plan(first, last)
        for run in self._runs.values():
            run.step()

    def _plan(self, first: int, last: int) -> dict[int, _Run]:
        """The runs among some parameters, by the index of each one's first parameter."""
        edges = bounds(self._parameters)
        runs = {}
        for n_steps, group in itertools.groupby(range(first, last), self._steps.__getitem__):
            indices = list(group)
            rows = slice(edges[indices[0]], edges[indices[-1] + 1])
            moments = {name: moment[rows] for name, moment in self._moments.items()}
            settings = self._optimizer.param_groups[0]
            runs[indices[0]] = _Run(settings, n_steps, self._values[rows], self._grad[rows], moments)
        return runs

    def _count_steps(self) -> None:
        if self._stepping is not None:
            starts = [*self._runs, self._stepping[1]]
            for start, stop in itertools.pairwise(starts):
                self._steps[start:stop] = [self._runs[start].n_steps] * (stop - start)
