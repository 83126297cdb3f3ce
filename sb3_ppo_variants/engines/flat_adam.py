"""Adam over flat vectors: as ``torch.optim.Adam``, element by element, but all parameters at once."""

import torch as th


def views(flat: th.Tensor, like: list[th.Tensor]) -> list[th.Tensor]:
    """
    Consecutive parts of a flat vector.

    :param flat: shape (n_elements,)
    :param like: tensors of n_elements in all, whose shapes the parts get
    """
    sizes = [tensor.numel() for tensor in like]
    return [part.view(tensor.shape) for part, tensor in zip(th.split(flat, sizes), like, strict=True)]


class FlatAdam:
    """
    The state of a ``torch.optim.Adam`` for some of its parameters, as flat vectors; :meth:`fetch` it first.

    :param optimizer: with one parameter group
    :param parameters: which of its parameters, all of them at the same step
    """

    def __init__(self, optimizer: th.optim.Adam, parameters: list[th.Tensor]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        n_elements = sum(parameter.numel() for parameter in parameters)
        self._moments = {name: th.zeros(n_elements) for name in ("exp_avg", "exp_avg_sq")}
        if optimizer.param_groups[0]["amsgrad"]:
            self._moments["max_exp_avg_sq"] = th.zeros(n_elements)
        self._views = {name: views(moment, parameters) for name, moment in self._moments.items()}
        self._denominator = th.empty(n_elements)
        self._step = 0.0

    def fetch(self) -> None:
        """Take over the optimiser's state."""
        states = [self._optimizer.state.get(parameter) or {} for parameter in self._parameters]
        self._step = float(states[0]["step"]) if states[0] else 0.0
        for name, parts in self._views.items():
            for view, state in zip(parts, states, strict=True):
                view.copy_(state[name]) if state else view.zero_()

    def publish(self) -> None:
        """Write the state into the optimiser's."""
        if self._step == 0:
            return
        for index, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            if not state:
                state["step"] = th.tensor(0.0)
                state.update({name: th.zeros_like(parameter) for name in self._moments})
            state["step"].fill_(self._step)
            for name, parts in self._views.items():
                state[name].copy_(parts[index])

    def step(self, parameters: th.Tensor, grad: th.Tensor) -> None:
        """
        One step, in place.

        :param parameters: shape (n_elements,)
        :param grad: shape (n_elements,)
        """
        group = self._optimizer.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] != 0:
            grad = grad.add(parameters, alpha=group["weight_decay"])
        self._step += 1
        exp_avg, exp_avg_sq = self._moments["exp_avg"], self._moments["exp_avg_sq"]
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["amsgrad"]:
            exp_avg_sq = th.maximum(self._moments["max_exp_avg_sq"], exp_avg_sq, out=self._moments["max_exp_avg_sq"])
        th.sqrt(exp_avg_sq, out=self._denominator).div_((1 - beta2**self._step) ** 0.5).add_(group["eps"])
        parameters.addcdiv_(exp_avg, self._denominator, value=-(lr / (1 - beta1**self._step)))
