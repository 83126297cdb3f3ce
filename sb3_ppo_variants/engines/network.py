"""Multi-layer perceptrons with their gradients, operation by operation as autograd would run them."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import nn

ATEN = th.ops.aten


class Activation(NamedTuple):
    """
    An activation function y = f(x).

    :param forward: y from x
    :param backward: the gradient at x from the gradient at y, from x and from y
    """

    forward: Callable[[th.Tensor], th.Tensor]
    backward: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def activation(module: nn.Module) -> Activation | None:
    """A module's function, ``None`` if it is none of those known; a subclass is a user's own."""
    settings = vars(module)
    if settings.get("inplace"):
        return None
    known: dict[type[nn.Module], Callable[[], Activation]] = {
        nn.Tanh: lambda: Activation(th.tanh, lambda grad, x, y: ATEN.tanh_backward.default(grad, y)),
        nn.Sigmoid: lambda: Activation(th.sigmoid, lambda grad, x, y: ATEN.sigmoid_backward.default(grad, y)),
        nn.ReLU: lambda: Activation(th.relu, lambda grad, x, y: ATEN.threshold_backward.default(grad, y, 0)),
        nn.LeakyReLU: lambda: _leaky_relu(settings["negative_slope"]),
        nn.ELU: lambda: _elu(settings["alpha"]),
        nn.GELU: lambda: _gelu(settings["approximate"]),
        nn.SiLU: lambda: Activation(ATEN.silu.default, lambda grad, x, y: ATEN.silu_backward.default(grad, x)),
        nn.Softplus: lambda: _softplus(settings["beta"], settings["threshold"]),
        nn.Identity: lambda: Activation(lambda x: x, lambda grad, x, y: grad),
    }
    return known[type(module)]() if type(module) in known else None


def _leaky_relu(slope: float) -> Activation:
    return Activation(
        lambda x: ATEN.leaky_relu.default(x, slope),
        lambda grad, x, y: ATEN.leaky_relu_backward.default(grad, x, slope, False),
    )


def _elu(alpha: float) -> Activation:
    return Activation(
        lambda x: ATEN.elu.default(x, alpha),
        lambda grad, x, y: ATEN.elu_backward.default(grad, alpha, 1, 1, False, x),
    )


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: ATEN.gelu.default(x, approximate=approximate),
        lambda grad, x, y: ATEN.gelu_backward.default(grad, x, approximate=approximate),
    )


def _softplus(beta: float, threshold: float) -> Activation:
    return Activation(
        lambda x: ATEN.softplus.default(x, beta, threshold),
        lambda grad, x, y: ATEN.softplus_backward.default(grad, x, beta, threshold),
    )


class Layer(NamedTuple):
    """
    An affine layer, and the activation behind it: y = f(x W^T + b).

    :param weight: W, shape (n_out, n_in)
    :param weight_t: a view of W^T
    :param bias: b, shape (n_out,)
    :param activation: f, ``None`` for the identity
    """

    weight: th.Tensor
    weight_t: th.Tensor
    bias: th.Tensor
    activation: Activation | None


class Network:
    """
    A stack of layers that remembers its latest forward pass.

    :param layers: from input to output
    """

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._inputs: list[th.Tensor] = []
        self._outputs: list[tuple[th.Tensor, th.Tensor]] = []

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        The output for a batch.

        :param x: shape (b, n_in)
        :return: shape (b, n_out)
        """
        self._inputs, self._outputs = [], []
        for layer in self._layers:
            self._inputs.append(x)
            affine = th.addmm(layer.bias, x, layer.weight_t)
            x = affine if layer.activation is None else layer.activation.forward(affine)
            self._outputs.append((affine, x))
        return x

    def backward(self, grad: th.Tensor, parameter_grads: list[tuple[th.Tensor, th.Tensor]]) -> None:
        """
        Write the gradients of weights and biases.

        :param grad: of the loss at the output, shape (b, n_out)
        :param parameter_grads: where those of each layer's weight and bias go
        """
        for index in reversed(range(len(self._layers))):
            layer, (affine, y), (weight_grad, bias_grad) = self._layers[index], self._outputs[index], parameter_grads[index]
            if layer.activation is not None:
                grad = layer.activation.backward(grad, affine, y)
            th.mm(grad.t(), self._inputs[index], out=weight_grad)
            th.sum(grad, 0, out=bias_grad)
            if index > 0:
                grad = th.mm(grad, layer.weight)


def layer_names(policy: ActorCriticPolicy, hidden: str, output: str) -> dict[str, nn.Module | None]:
    """
    The names of a network's affine layers in the policy, and the activation modules behind them.

    :param policy: with SB3's ``MlpExtractor``
    :param hidden: ``"policy_net"`` or ``"value_net"``: its part in the extractor
    :param output: ``"action_net"`` or ``"value_net"``: its last layer
    """
    modules = list(getattr(policy.mlp_extractor, hidden))
    names: dict[str, nn.Module | None] = {
        f"mlp_extractor.{hidden}.{index}": modules[index + 1] for index in range(0, len(modules), 2)
    }
    return {**names, output: None}


def network(layers: dict[str, nn.Module | None], tensors: dict[str, th.Tensor]) -> Network:
    """
    A network of given layers.

    :param layers: as :func:`layer_names` returns them
    :param tensors: weights and biases by their names in the policy
    """
    weights = {name: tensors[f"{name}.weight"].detach() for name in layers}
    return Network(
        [
            Layer(weights[name], weights[name].t(), tensors[f"{name}.bias"].detach(), module and activation(module))
            for name, module in layers.items()
        ]
    )


def policy_inputs(policy: ActorCriticPolicy, observations: th.Tensor) -> th.Tensor:
    """
    What SB3's ``FlattenExtractor`` makes of observations.

    :param policy: that they are for
    :param observations: as the environments return them, shape (b, *obs_shape)
    :return: shape (b, n_features)
    """
    features = preprocess_obs(observations, policy.observation_space, policy.normalize_images)
    assert isinstance(features, th.Tensor)
    return features.flatten(start_dim=1)
