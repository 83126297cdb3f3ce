"""
Actor and critic as multi-layer perceptrons, with their gradients, operation by operation as autograd would run them.

Both run side by side, layer by layer, in memory of their own that serves every minibatch: where their layers are equally
wide, one operation applies the activation function to both, or adds up the gradients of both biases.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import nn

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


class _Output(NamedTuple):
    """An output layer at work on ``b`` samples: its input, and where the gradient there goes, ``None`` for nowhere."""

    layer: Layer
    x: th.Tensor
    d_x: th.Tensor | None


class _Plan(NamedTuple):
    """
    All layers at work on ``b`` samples.

    :param inputs: shape (b, n_in)
    :param forward: the operations of the hidden layers' forward pass, in order
    :param outputs: the output layers
    :param backward: the operations of the hidden layers' backward pass, in order
    """

    inputs: th.Tensor
    forward: list[Callable[[], Any]]
    outputs: list[_Output]
    backward: list[Callable[[], Any]]


class Networks:
    """
    Stacks of layers on one input, which remember their latest forward pass.

    :param stacks: of layers, from input to output; the last one of each has no activation
    :param flat_grad: of which all gradients are views, ``None`` if there are none
    """

    def __init__(self, stacks: Sequence[list[Layer]], flat_grad: th.Tensor | None = None) -> None:
        self._stacks = stacks
        self._flat_grad = flat_grad
        self._plans: dict[int, _Plan] = {}
        self._plan: _Plan

    def inputs(self, n_samples: int) -> th.Tensor:
        """Where the inputs of the next :meth:`forward` are to be written, shape (n_samples, n_in)."""
        if n_samples not in self._plans:
            self._plans[n_samples] = self._make_plan(n_samples)
        self._plan = self._plans[n_samples]
        return self._plan.inputs

    def forward(self) -> list[th.Tensor]:
        """The outputs, each of shape (n_samples, n_out)."""
        for operation in self._plan.forward:
            operation()
        return [th.addmm(layer.bias, x, layer.weight_t) for layer, x, _ in self._plan.outputs]

    def backward(self, grads: Sequence[th.Tensor]) -> None:
        """
        Write the gradients of weights and biases.

        :param grads: of the loss at the outputs, each of shape (n_samples, n_out)
        """
        for (layer, x, d_x), d_out in zip(self._plan.outputs, grads, strict=True):
            th.sum(d_out, 0, out=layer.bias_grad)
            th.mm(d_out.t(), x, out=layer.weight_grad)
            if d_x is not None:
                th.mm(d_out, layer.weight, out=d_x)
        for operation in self._plan.backward:
            operation()

    def _make_plan(self, n_samples: int) -> _Plan:
        inputs = th.empty(n_samples, self._stacks[0][0].weight.shape[1])
        below: list[tuple[th.Tensor, th.Tensor | None]] = [(inputs, None) for _ in self._stacks]
        forward: list[Callable[[], Any]] = []
        backward: list[Callable[[], Any]] = []
        for depth in range(max(map(len, self._stacks)) - 1):
            affine, activate, through_activation, through_affine = [], [], [], []
            for indices in self._joined(depth):
                layers = [self._stacks[index][depth] for index in indices]
                function, shape = layers[0].activation, (len(layers), n_samples, len(layers[0].bias))
                assert function is not None
                affines, d_outputs = th.empty(shape), th.empty(shape)
                outputs = affines if function.in_place else th.empty(shape)
                activate.append(partial(function.forward, affines, outputs))
                if self._flat_grad is not None:
                    bias_grads = _join(self._flat_grad, [layer.bias_grad for layer in layers])
                    through_activation.append(partial(function.backward, d_outputs, outputs if function.in_place else affines))
                    through_activation.append(partial(th.sum, d_outputs, 1, out=bias_grads))
                for index, layer, out, y, d_y in zip(indices, layers, affines, outputs, d_outputs, strict=True):
                    x, d_x = below[index]
                    affine.append(partial(th.addmm, layer.bias, x, layer.weight_t, out=out))
                    through_affine.append(partial(th.mm, d_y.t(), x, out=layer.weight_grad))
                    if d_x is not None:
                        through_affine.append(partial(th.mm, d_y, layer.weight, out=d_x))
                    below[index] = y, d_y
            forward += [*affine, *activate]
            backward = [*through_activation, *through_affine, *backward]
        outputs_at_work = [_Output(stack[-1], *inputs_of) for stack, inputs_of in zip(self._stacks, below, strict=True)]
        return _Plan(inputs, forward, outputs_at_work, backward)

    def _joined(self, depth: int) -> list[list[int]]:
        """Which stacks' hidden layers at a depth go together."""
        indices = [index for index, stack in enumerate(self._stacks) if depth < len(stack) - 1]
        layers = [self._stacks[index][depth] for index in indices]
        alike = len({(len(layer.bias), layer.activation) for layer in layers}) == 1
        anywhere = all(layer.activation is not None and layer.activation.anywhere for layer in layers)
        return [indices] if alike and anywhere else [[index] for index in indices]


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
