"""Why the fused engine can't stand in for the eager one: everything has to be SB3's own, for its operations to be known."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn.modules import module as th_module
from torch.optim import optimizer as th_optimizer

from sb3_ppo_variants.buffers import RewardsToGoRolloutBuffer
from sb3_ppo_variants.engines.network import ACTIVATIONS, activation, is_critics
from sb3_ppo_variants.policies import ZeroHeadsPolicy


def _original(kind: type, name: str) -> Any:
    """A class's method, ``None`` if it doesn't come from the class's own package: somebody was here before this import."""
    method = vars(kind)[name]
    package = Path(sys.modules[kind.__module__.partition(".")[0]].__file__ or "").parent
    return method if Path(method.__code__.co_filename).is_relative_to(package) else None


def _methods(kind: type) -> list[tuple[type, str, Any]]:
    """
    The methods of a class and its bases, as they were when this package was imported.

    Not those that build or copy objects, as what they have built is looked at; ``torch.compile`` replaces some for good.
    """
    return [
        (base, name, _original(base, name))
        for base in kind.__mro__
        if base.__module__.startswith(("stable_baselines3.", "sb3_ppo_variants.", "torch."))
        for name, method in vars(base).items()
        if isinstance(method, FunctionType) and not hasattr(method, "__deprecated__")
        if not name.startswith("__") or name in ("__call__", "__getattr__")
    ]


HEADED = (DiagGaussianDistribution, CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution)
"""Action distributions whose gradients are known."""
DISTRIBUTIONS = (th.distributions.Normal, th.distributions.Categorical, th.distributions.Bernoulli)
KNOWN: tuple[type, ...] = (
    *(ActorCriticPolicy, ZeroHeadsPolicy, RolloutBuffer, RewardsToGoRolloutBuffer),
    *(MlpExtractor, FlattenExtractor, nn.Sequential, nn.Linear, *ACTIVATIONS),
    *(*HEADED, *DISTRIBUTIONS),
)
"""Classes of which every detail is known."""
METHODS = {kind: _methods(kind) for kind in KNOWN}
ADAM_STEP = _original(th.optim.Adam, "step")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_lean(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> str | None:
    """
    Why rollouts can't be collected without SB3's distributions.

    :param policy: the policy
    :param buffer: the rollout buffer
    :return: the first reason that is found, ``None`` if there is none
    """
    return next(_objections(policy, buffer), None)


def why_not_fused(
    policy: ActorCriticPolicy, buffer: RolloutBuffer, optimizers: Sequence[th.optim.Optimizer] = ()
) -> str | None:
    """
    Why the gradients can't be computed by hand.

    :param policy: the policy
    :param buffer: the rollout buffer
    :param optimizers: of the policy's parameters, beside its own
    :return: the first reason that is found, ``None`` if there is none
    """
    reason = why_not_lean(policy, buffer)
    if reason is not None:
        return reason
    arrays = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
    if any(array.dtype != np.float32 for array in arrays):
        return "the rollout buffer's arrays are not of type float32"
    if th.is_anomaly_enabled():
        return "autograd is to detect anomalies"
    return next(_objections_to_optimizers(policy, [policy.optimizer, *optimizers]), None)


def why_not_these_actions(buffer: RolloutBuffer, action_space: spaces.Space[Any]) -> str | None:
    """
    Why SB3's distributions wouldn't take a rollout's actions, which a callback may have changed.

    :param buffer: a full rollout buffer
    :param action_space: of the environment
    :return: the reason, ``None`` if there is none
    """
    if isinstance(action_space, spaces.Box):
        return None
    actions = buffer.actions.reshape(-1, buffer.action_dim)
    match action_space:
        case spaces.MultiBinary():
            inside = (actions == 0) | (actions == 1)
        case spaces.MultiDiscrete():
            inside = (actions >= 0) & (actions < action_space.nvec.reshape(-1))
        case _:
            inside = (actions >= 0) & (actions < getattr(action_space, "n", 0))
    return None if inside.all() else "the rollout has actions that are none"


def _objections(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> Iterator[str]:
    if not _is_known(policy):
        yield f"the policy, a {type(policy).__name__}, is not SB3's ActorCriticPolicy as it is"
        return
    if not _is_known(buffer):
        yield f"the rollout buffer, a {type(buffer).__name__}, is not SB3's RolloutBuffer as it is"
    if policy.device.type != "cpu":
        yield f"the device is {policy.device}, not the CPU"
    if type(policy.action_dist) not in HEADED:
        yield f"the action distribution is a {type(policy.action_dist).__name__}"
    if policy.squash_output:
        yield "the policy squashes its output"
    modules = next(_objections_to_modules(policy), None)
    if modules is not None:
        yield modules
        return
    yield from _objections_to_parameters(policy)
    yield from _objections_to_methods(policy)
    if th.is_autocast_enabled("cpu"):
        yield "autocast is enabled"


def _is_torchs_adam_step(method: Any) -> bool:
    """Whether a method is Adam's own, or what torch has made of that at the first optimiser's construction."""
    wrapped = getattr(method, "hooked", False) and getattr(method, "__wrapped__", None) is ADAM_STEP
    return method is ADAM_STEP or (wrapped and not hasattr(ADAM_STEP, "hooked"))


def _is_known(thing: object) -> bool:
    """Whether it is of a known class, and nobody has put other methods into that or into the instance."""
    kind, own = type(thing), vars(thing)
    return kind in METHODS and _is_unpatched(kind) and not any(name in own for _, name, _ in METHODS[kind])


def _is_unpatched(kind: type) -> bool:
    """Whether nobody has put other methods into a known class."""
    return all(method is not None and vars(base).get(name) is method for base, name, method in METHODS.get(kind, ()))


def _has_methods_of_its_own(thing: object) -> bool:
    """Whether somebody has put a function into the instance, in place of a method of its class."""
    return any(callable(getattr(type(thing), name, None)) for name in vars(thing))


def _objections_to_modules(policy: ActorCriticPolicy) -> Iterator[str]:
    if {type(policy.pi_features_extractor), type(policy.vf_features_extractor)} != {FlattenExtractor}:
        yield "the features extractor is not SB3's FlattenExtractor"
    if type(policy.mlp_extractor) is not MlpExtractor:
        yield f"the MLP extractor is a {type(policy.mlp_extractor).__name__}"
        return
    networks = (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net)
    if {*map(type, networks)} != {nn.Sequential}:
        yield f"the networks are {' and '.join(type(network).__name__ for network in networks)}"
        return
    for network in networks:
        layers = list(network)
        alternating = len(layers) % 2 == 0 and all(type(layer) is nn.Linear for layer in layers[::2])
        if not alternating or not all(map(activation, layers[1::2])):
            yield f"the layers are {', '.join(type(layer).__name__ for layer in layers)}"
    if {type(policy.action_net), type(policy.value_net)} != {nn.Linear}:
        yield "the output layers are not Linear"


def _objections_to_parameters(policy: ActorCriticPolicy) -> Iterator[str]:
    parameters = dict(policy.named_parameters(remove_duplicate=False))
    extractor = policy.mlp_extractor
    networks = {"policy_net": extractor.policy_net, "value_net": extractor.value_net}
    layers = [f"mlp_extractor.{name}.{index}" for name, network in networks.items() for index in range(0, len(network), 2)]
    expected = {f"{layer}.{kind}" for layer in (*layers, "action_net", "value_net") for kind in ("weight", "bias")}
    if isinstance(policy.action_dist, DiagGaussianDistribution):
        expected.add("log_std")
    if parameters.keys() != expected:
        yield f"these parameters are missing, or not SB3's: {', '.join(sorted(parameters.keys() ^ expected))}"
    elif "log_std" in expected and parameters["log_std"].shape != parameters["action_net.bias"].shape:
        yield f"`log_std` has the shape {tuple(parameters['log_std'].shape)}"
    if any(parameter.dtype != th.float32 or not parameter.is_contiguous() for parameter in parameters.values()):
        yield "a parameter is not of type float32, or not contiguous"
    if len({parameter.data_ptr() for parameter in parameters.values()}) < len(parameters):
        yield "parameters share memory"


def _objections_to_methods(policy: ActorCriticPolicy) -> Iterator[str]:
    """The policy's own have been looked at."""
    parts = [policy.action_dist, *list(policy.modules())[1:]]
    if any(getattr(module, hooks) for module in policy.modules() for hooks in HOOKS) or th_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        yield "a module of the policy has hooks"
    if any(map(_has_methods_of_its_own, parts)):
        yield "a module of the policy, or its action distribution, has methods of its own"
    patched = [kind.__name__ for kind in {*map(type, parts), *DISTRIBUTIONS} if not _is_unpatched(kind)]
    if patched:
        yield f"somebody has put other methods into {', '.join(patched)}"


def _objections_to_optimizers(policy: ActorCriticPolicy, optimizers: Sequence[th.optim.Optimizer]) -> Iterator[str]:
    parameters = list(policy.parameters())
    if any(not parameter.requires_grad for parameter in parameters):
        yield "a parameter is frozen"
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        yield "a parameter has hooks"
    if not _is_torchs_adam_step(th.optim.Adam.step):
        yield "somebody has put another method into Adam"
    if th_optimizer._global_optimizer_pre_hooks or th_optimizer._global_optimizer_post_hooks:
        yield "all optimisers have hooks"
    for optimizer in optimizers:
        if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
            yield f"the optimiser, a {type(optimizer).__name__}, is not Adam with one group of parameters"
            return
        yield from _objections_to_settings(optimizer)
    critics = [parameter for name, parameter in policy.named_parameters() if is_critics(name)]
    for optimizer, own in zip(optimizers, [parameters, *[critics] * (len(optimizers) - 1)], strict=True):
        if list(map(id, optimizer.param_groups[0]["params"])) != list(map(id, own)):
            yield f"an optimiser's parameters are not those of the {'policy' if own is parameters else 'critic'}"


def _objections_to_settings(optimizer: th.optim.Optimizer) -> Iterator[str]:
    group = optimizer.param_groups[0]
    if any(group.get(name) for name in ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")):
        yield "Adam has other than its plain settings"
    if not all(isinstance(number, float | int) for number in (group["lr"], *group["betas"])):
        yield "Adam has tensors for settings"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        yield "the optimiser has hooks"
