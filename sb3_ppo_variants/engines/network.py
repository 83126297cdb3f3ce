"""Multi-layer perceptrons with their gradients, operation by operation as autograd would run them."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch as th
from torch import nn

Backward: TypeAlias = Callable[[th.Tensor, th.Tensor], th.Tensor]

ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[th.Tensor], th.Tensor], Backward]] = {
    nn.Tanh: (th.tanh, th.ops.aten.tanh_backward),
    nn.ReLU: (th.relu, lambda grad, y: th.ops.aten.threshold_backward(grad, y, 0)),
    nn.Sigmoid: (th.sigmoid, th.ops.aten.sigmoid_backward),
}
"""y = f(x), and the gradient at x from the gradient at y and from y."""


class Layer(NamedTuple):
    """
    An affine layer, and the activation behind it: y = f(x W^T + b).

    :param weight: W, shape (n_out, n_in)
    :param bias: b, shape (n_out,)
    :param weight_grad: where W's gradient is written
    :param bias_grad: where b's gradient is written
    :param activation: the class of f, ``None`` for the identity
    """

    weight: th.Tensor
    bias: th.Tensor
    weight_grad: th.Tensor
    bias_grad: th.Tensor
    activation: type[nn.Module] | None


class Network:
    """
    A stack of layers that remembers its latest forward pass.

    :param layers: from input to output
    """

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._activations: list[th.Tensor] = []

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        The output for a batch.

        :param x: shape (b, n_in)
        :return: shape (b, n_out)
        """
        self._activations = [x]
        for layer in self._layers:
            x = th.addmm(layer.bias, x, layer.weight.t())
            if layer.activation is not None:
                x = ACTIVATIONS[layer.activation][0](x)
            self._activations.append(x)
        return x

    def backward(self, grad: th.Tensor) -> None:
        """
        Write the gradients of weights and biases.

        :param grad: of the loss at the output, shape (b, n_out)
        """
        for index in reversed(range(len(self._layers))):
            layer, x, y = self._layers[index], self._activations[index], self._activations[index + 1]
            if layer.activation is not None:
                grad = ACTIVATIONS[layer.activation][1](grad, y)
            th.mm(grad.t(), x, out=layer.weight_grad)
            th.sum(grad, 0, out=layer.bias_grad)
            if index > 0:
                grad = th.mm(grad, layer.weight)
