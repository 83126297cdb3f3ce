"""
Actor and critic as multi-layer perceptrons, with their gradients, operation by operation as autograd would run them.

Both run side by side, layer by layer, in memory of their own that serves every minibatch: where their layers are equally
wide, one operation applies the activation function to both, or adds up the gradients of both biases.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from torch import nn

from sb3_ppo_variants.engines.flat_adam import ALIGNMENT

ATEN = th.ops.aten


class Activation(NamedTuple):
    """
    An activation function y = f(x).

    :param forward: writes y, from x
    :param backward: writes the gradient at x, from the gradient at y, and from x, or from y if it is ``in_place``
    :param in_place: whether y may be written over x
    :param anywhere: whether its bits don't depend on where in memory a number stands, so that tensors may be joined
    """

    forward: Callable[[th.Tensor, th.Tensor], Any]
    backward: Callable[[th.Tensor, th.Tensor], Any]
    in_place: bool = False
    anywhere: bool = False


ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)
"""Modules that :func:`activation` knows."""


def is_critics(name: str) -> bool:
    """Whether a parameter of SB3's MLP policy is the critic's alone, by its name."""
    return name.startswith(("mlp_extractor.value_net.", "value_net."))


def activation(module: nn.Module) -> Activation | None:
    """A module's function, ``None`` if it is none of those known; a subclass is a user's own."""
    settings = vars(module)
    known: dict[type[nn.Module], Callable[[], Activation]] = {
        nn.Tanh: lambda: TANH,
        nn.ReLU: lambda: RELU,
        nn.Sigmoid: lambda: SIGMOID,
        nn.LeakyReLU: lambda: _leaky_relu(settings["negative_slope"]),
        nn.ELU: lambda: _elu(settings["alpha"]),
        nn.GELU: lambda: _gelu(settings["approximate"]),
        nn.SiLU: lambda: SILU,
        nn.Softplus: lambda: _softplus(settings["beta"], settings["threshold"]),
    }
    return None if settings.get("inplace") or type(module) not in known else known[type(module)]()


TANH = Activation(
    lambda x, out: th.tanh(x, out=out),
    lambda grad, y: ATEN.tanh_backward.grad_input(grad, y, grad_input=grad),
    in_place=True,
    anywhere=True,
)
RELU = Activation(
    lambda x, out: th.clamp_min(x, 0, out=out),
    lambda grad, y: ATEN.threshold_backward.grad_input(grad, y, 0, grad_input=grad),
    in_place=True,
    anywhere=True,
)
SIGMOID = Activation(
    lambda x, out: th.sigmoid(x, out=out),
    lambda grad, y: ATEN.sigmoid_backward.grad_input(grad, y, grad_input=grad),
    in_place=True,
)
SILU = Activation(
    lambda x, out: ATEN.silu.out(x, out=out),
    lambda grad, x: ATEN.silu_backward.grad_input(grad, x, grad_input=grad),
)


def _leaky_relu(slope: float) -> Activation:
    return Activation(
        lambda x, out: ATEN.leaky_relu.out(x, slope, out=out),
        lambda grad, x: ATEN.leaky_relu_backward.grad_input(grad, x, slope, False, grad_input=grad),
    )


def _elu(alpha: float) -> Activation:
    return Activation(
        lambda x, out: ATEN.elu.out(x, alpha, out=out),
        lambda grad, x: ATEN.elu_backward.grad_input(grad, alpha, 1, 1, False, x, grad_input=grad),
    )


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x, out: ATEN.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x: ATEN.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=grad),
    )


def _softplus(beta: float, threshold: float) -> Activation:
    return Activation(
        lambda x, out: ATEN.softplus.out(x, beta, threshold, out=out),
        lambda grad, x: ATEN.softplus_backward.grad_input(grad, x, beta, threshold, grad_input=grad),
    )


class Layer(NamedTuple):
    """
    An affine layer, and the activation behind it: y = f(x W^T + b).

    :param weight: W, shape (n_out, n_in)
    :param weight_t: a view of W^T
    :param bias: b, shape (n_out,)
    :param activation: f, ``None`` for the identity
    :param weight_grad: where the gradient at W is written, if there is one
    :param bias_grad: where the gradient at b is written, if there is one
    """

    weight: th.Tensor
    weight_t: th.Tensor
    bias: th.Tensor
    activation: Activation | None
    weight_grad: th.Tensor | None
    bias_grad: th.Tensor | None


class Workspace:
    """
    Networks at work on ``b`` samples, in memory that torch and NumPy share.

    :param stacks: of layers, from input to output; the last one of each has no activation
    :param flat_grad: of which all gradients are views, ``None`` if there are none
    :param n_samples: b
    """

    inputs: th.Tensor
    """To be written before :meth:`forward`, shape (b, n_in)."""
    outputs: list[np.ndarray]
    """Of each stack, shape (b, n_out), until the next :meth:`forward`."""
    d_outputs: list[np.ndarray]
    """The loss's gradients at the outputs, to be written before :meth:`backward`."""

    def __init__(self, stacks: Sequence[list[Layer]], flat_grad: th.Tensor | None, n_samples: int) -> None:
        self._stacks = stacks
        self._flat_grad = flat_grad
        self._n_samples = n_samples
        self._forward: list[Callable[[], Any]] = []
        self._backward: list[Callable[[], Any]] = []
        self.inputs = th.empty(n_samples, stacks[0][0].weight.shape[1], dtype=th.float32)
        self._below: list[tuple[th.Tensor, th.Tensor | None]] = [(self.inputs, None) for _ in stacks]
        for depth in range(max(map(len, stacks)) - 1):
            self._add_hidden_layers(depth)
        self.outputs, self.d_outputs = [], []
        for index, stack in enumerate(stacks):
            self._add_output_layer(index, stack[-1])

    def forward(self) -> list[np.ndarray]:
        """Write the outputs, and return them."""
        for operation in self._forward:
            operation()
        return self.outputs

    def backward(self) -> None:
        """Write the gradients of weights and biases."""
        for operation in self._backward:
            operation()

    def _add_hidden_layers(self, depth: int) -> None:
        affine, activate = [], []
        through_activation: list[Callable[[], Any]] = []
        through_affine: list[Callable[[], Any]] = []
        for indices in self._joined(depth):
            layers = [self._stacks[index][depth] for index in indices]
            function, shape = layers[0].activation, (len(layers), self._n_samples, len(layers[0].bias))
            assert function is not None
            d_shape = shape if self._flat_grad is not None else (len(layers), 0)
            x, d_y = th.empty(shape, dtype=th.float32), th.empty(d_shape, dtype=th.float32)
            y = x if function.in_place else th.empty(shape, dtype=th.float32)
            activate.append(partial(function.forward, x, y))
            if self._flat_grad is not None:
                through_activation.append(partial(function.backward, d_y, y if function.in_place else x))
                bias_grads = _join(self._flat_grad, [layer.bias_grad for layer in layers])
                through_activation.append(partial(th.sum, d_y, 1, out=bias_grads))
            for index, layer, out, d_out, below in zip(indices, layers, x, d_y, y, strict=True):
                affine.append(partial(th.addmm, layer.bias, self._below[index][0], layer.weight_t, out=out))
                through_affine += self._through_affine(index, layer, d_out)
                self._below[index] = below, d_out
        self._forward += [*affine, *activate]
        self._backward = [*through_activation, *through_affine, *self._backward]

    def _add_output_layer(self, index: int, layer: Layer) -> None:
        out, d_out = (th.empty(self._n_samples, len(layer.bias), dtype=th.float32) for _ in range(2))
        self.outputs.append(out.numpy())
        self.d_outputs.append(d_out.numpy())
        self._forward.append(partial(th.addmm, layer.bias, self._below[index][0], layer.weight_t, out=out))
        if self._flat_grad is not None:
            through_bias = partial(th.sum, d_out, 0, out=layer.bias_grad)
            self._backward = [through_bias, *self._through_affine(index, layer, d_out), *self._backward]

    def _through_affine(self, index: int, layer: Layer, d_out: th.Tensor) -> list[Callable[[], Any]]:
        """For Y = X W^T + b: dW = dY^T X, and dX = dY W if there is a layer below; db, the sum of dY, stands elsewhere."""
        if self._flat_grad is None:
            return []
        x, d_x = self._below[index]
        operations: list[Callable[[], Any]] = [partial(th.mm, d_out.t(), x, out=layer.weight_grad)]
        if d_x is not None:
            operations.append(partial(th.mm, d_out, layer.weight, out=d_x))
        return operations

    def _joined(self, depth: int) -> list[list[int]]:
        """Which stacks' hidden layers at a depth go together."""
        indices = [index for index, stack in enumerate(self._stacks) if depth < len(stack) - 1]
        layers = [self._stacks[index][depth] for index in indices]
        alike = len({(len(layer.bias), layer.activation) for layer in layers}) == 1
        anywhere = all(layer.activation is not None and layer.activation.anywhere for layer in layers)
        # Some processors' kernels round otherwise where a matrix doesn't start where SB3's do.
        aligned = self._n_samples * len(layers[0].bias) % ALIGNMENT == 0
        return [indices] if alike and anywhere and aligned else [[index] for index in indices]


class Networks:
    """
    Stacks of layers on one input.

    :param stacks: of layers, from input to output; the last one of each has no activation
    :param flat_grad: of which all gradients are views, ``None`` if there are none
    """

    def __init__(self, stacks: Sequence[list[Layer]], flat_grad: th.Tensor | None = None) -> None:
        self._stacks = stacks
        self._flat_grad = flat_grad
        self._workspaces: dict[int, Workspace] = {}

    def at_work(self, n_samples: int) -> Workspace:
        """The workspace for so many samples."""
        if n_samples not in self._workspaces:
            self._workspaces[n_samples] = Workspace(self._stacks, self._flat_grad, n_samples)
        return self._workspaces[n_samples]


def _join(flat: th.Tensor, parts: list[Any]) -> th.Tensor:
    """Equally long parts of a flat vector, as rows of one view."""
    first, last = parts[0].storage_offset(), parts[-1].storage_offset()
    return flat.as_strided((len(parts), len(parts[0])), (max(last - first, 1), 1), first)


def actor_and_critic(
    policy: ActorCriticPolicy, values: dict[str, th.Tensor], grads: dict[str, th.Tensor] | None = None
) -> tuple[list[Layer], list[Layer]]:
    """
    The layers of a policy's networks.

    :param policy: with SB3's ``MlpExtractor``
    :param values: weights and biases by their names in the policy
    :param grads: where their gradients are written, ``None`` if there will be none
    """

    def layer(name: str, function: Activation | None) -> Layer:
        weight, bias = f"{name}.weight", f"{name}.bias"
        value = values[weight].detach()
        grad = (None, None) if grads is None else (grads[weight], grads[bias])
        return Layer(value, value.t(), values[bias].detach(), function, *grad)

    def stack(hidden: str, output: str) -> list[Layer]:
        modules = list(getattr(policy.mlp_extractor, hidden))
        names = [f"mlp_extractor.{hidden}.{index}" for index in range(0, len(modules), 2)]
        functions = map(activation, modules[1::2])
        return [*(layer(*pair) for pair in zip(names, functions, strict=True)), layer(output, None)]

    return stack("policy_net", "action_net"), stack("value_net", "value_net")


def input_writer(policy: ActorCriticPolicy) -> Callable[[np.ndarray, th.Tensor], None]:
    """
    What SB3's ``FlattenExtractor`` makes of observations.

    :param policy: that they are for
    :return: a function of observations as the environments return them, shape (b, *obs_shape), and of where the inputs of
        the networks go, shape (b, n_in)
    """
    space, normalize_images = policy.observation_space, policy.normalize_images

    def write_numbers(observations: np.ndarray, inputs: th.Tensor) -> None:
        inputs.numpy()[:] = observations.reshape(len(observations), -1)

    def write_preprocessed(observations: np.ndarray, inputs: th.Tensor) -> None:
        features: Any = preprocess_obs(th.as_tensor(observations), space, normalize_images)
        inputs.copy_(features.flatten(start_dim=1))

    return write_numbers if takes_plain_numbers(policy) else write_preprocessed


def takes_plain_numbers(policy: ActorCriticPolicy) -> bool:
    """Whether observations are inputs as they are, but for their type."""
    return isinstance(policy.observation_space, spaces.Box) and not is_image_space(policy.observation_space)
