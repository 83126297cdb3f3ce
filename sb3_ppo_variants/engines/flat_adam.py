"""Adam over a flat vector: as ``torch.optim.Adam``, element by element, but all parameters at once."""

import itertools
from typing import NamedTuple

import numpy as np
import torch as th


def views(flat: th.Tensor, like: list[th.Tensor]) -> list[th.Tensor]:
    """
    Consecutive parts of a flat vector.

    :param flat: shape (n_elements,)
    :param like: tensors of n_elements in all, whose shapes the parts get
    """
    sizes = [tensor.numel() for tensor in like]
    return [part.view(tensor.shape) for part, tensor in zip(th.split(flat, sizes), like, strict=True)]


class _Run(NamedTuple):
    """Consecutive parameters that have stepped equally often: the parts of the flat vectors that are theirs."""

    first: int
    values: th.Tensor
    grad: th.Tensor
    exp_avg: th.Tensor
    exp_avg_sq: th.Tensor
    max_exp_avg_sq: th.Tensor | None
    denominator: th.Tensor


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
        self._denominator = th.empty_like(values)
        self._steps = [0.0] * len(parameters)
        self._planned: tuple[int, int] | None = None
        self._runs: list[_Run] = []

    def fetch(self) -> None:
        """Take over the optimiser's state."""
        states = [self._optimizer.state.get(parameter) or {} for parameter in self._parameters]
        self._steps = [float(state["step"]) if state else 0.0 for state in states]
        self._planned = None
        for name, parts in self._views.items():
            for view, state in zip(parts, states, strict=True):
                view.copy_(state[name]) if state else view.zero_()

    def publish(self) -> None:
        """Write the state into the optimiser's."""
        for index, parameter in enumerate(self._parameters):
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
        if self._planned != (first, last):
            self._planned, self._runs = (first, last), self._plan(first, last)
        self._steps[first:last] = [n_steps + 1 for n_steps in self._steps[first:last]]
        for run in self._runs:
            self._step_together(run, self._steps[run.first])

    def _plan(self, first: int, last: int) -> list[_Run]:
        bounds = [0, *itertools.accumulate(parameter.numel() for parameter in self._parameters)]
        runs = []
        for _, group in itertools.groupby(range(first, last), self._steps.__getitem__):
            indices = list(group)
            rows = slice(bounds[indices[0]], bounds[indices[-1] + 1])
            largest = self._moments.get("max_exp_avg_sq")
            runs.append(
                _Run(
                    indices[0],
                    self._values[rows],
                    self._grad[rows],
                    self._moments["exp_avg"][rows],
                    self._moments["exp_avg_sq"][rows],
                    None if largest is None else largest[rows],
                    self._denominator[rows],
                )
            )
        return runs

    def _step_together(self, run: _Run, n_steps: float) -> None:
        """Algorithm 1 of Kingma & Ba 2015, arXiv 1412.6980, in the order of torch's operations."""
        group = self._optimizer.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        grad, second_moment = run.grad, run.exp_avg_sq
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] != 0:
            grad = grad.add(run.values, alpha=group["weight_decay"])
        run.exp_avg.lerp_(grad, 1 - beta1)
        _multiply(second_moment, beta2)
        second_moment.addcmul_(grad, grad, value=1 - beta2)
        if run.max_exp_avg_sq is not None:
            second_moment = th.maximum(run.max_exp_avg_sq, second_moment, out=run.max_exp_avg_sq)
        denominator: np.ndarray = th.sqrt(second_moment, out=run.denominator).numpy()
        denominator /= np.float32((1 - beta2**n_steps) ** 0.5)
        denominator += np.float32(group["eps"])
        run.values.addcdiv_(run.exp_avg, run.denominator, value=-(lr / (1 - beta1**n_steps)))


def _multiply(tensor: th.Tensor, factor: float) -> None:
    """In place, in half of torch's time."""
    array: np.ndarray = tensor.numpy()
    array *= np.float32(factor)
