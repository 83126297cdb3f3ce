"""Why the fused engine can't stand in for the eager one: everything has to be SB3's own, for its operations to be known."""

from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch as th
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

from sb3_ppo_variants.engines.network import activation

HEADED = (DiagGaussianDistribution, CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution)
"""Action distributions whose gradients are known."""


def _methods_of_sb3(kind: type) -> list[tuple[type, str, FunctionType]]:
    """The methods of a class and its bases in SB3, as they were when this package was imported."""
    return [
        (base, name, method)
        for base in kind.__mro__
        if base.__module__.startswith("stable_baselines3.")
        for name, method in vars(base).items()
        if isinstance(method, FunctionType)
    ]


METHODS: dict[type, list[tuple[type, str, FunctionType]]] = {
    kind: _methods_of_sb3(kind) for kind in (ActorCriticPolicy, RolloutBuffer)
}
ADAM_STEP = th.optim.Adam.step
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
    return next(_objections_to_optimizers(policy, [policy.optimizer, *optimizers]), None)


def _objections(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> Iterator[str]:
    if not _is_as_sb3_has_it(policy, ActorCriticPolicy):
        yield f"the policy, a {type(policy).__name__}, is not SB3's ActorCriticPolicy as it is"
        return
    if not _is_as_sb3_has_it(buffer, RolloutBuffer):
        yield f"the rollout buffer, a {type(buffer).__name__}, is not SB3's RolloutBuffer as it is"
    if policy.device.type != "cpu":
        yield f"the device is {policy.device}, not the CPU"
    if type(policy.action_dist) not in HEADED:
        yield f"the action distribution is a {type(policy.action_dist).__name__}"
    yield from _objections_to_modules(policy)
    parameters = [parameter for _, parameter in policy.named_parameters(remove_duplicate=False)]
    if any(parameter.dtype != th.float32 or not parameter.is_contiguous() for parameter in parameters):
        yield "a parameter is not of type float32, or not contiguous"
    if len({parameter.data_ptr() for parameter in parameters}) < len(parameters):
        yield "parameters share memory"
    if th.is_autocast_enabled("cpu"):
        yield "autocast is enabled"


def _is_torchs_adam_step(method: Any) -> bool:
    """Whether a method is Adam's own, or what torch has made of that at the first optimiser's construction."""
    wrapped = getattr(method, "hooked", False) and getattr(method, "__wrapped__", None) is ADAM_STEP
    return method is ADAM_STEP or (wrapped and not hasattr(ADAM_STEP, "hooked"))


def _is_as_sb3_has_it(thing: object, kind: type) -> bool:
    """Whether nobody has derived from the class, or put other methods into it or into the instance."""
    own = vars(thing)
    return type(thing) is kind and all(
        vars(base).get(name) is method and name not in own for base, name, method in METHODS[kind]
    )


def _has_methods_of_its_own(thing: object) -> bool:
    """Whether somebody has put a function into the instance, in place of a method of its class."""
    return any(callable(getattr(type(thing), name, None)) for name in vars(thing))


def _objections_to_modules(policy: ActorCriticPolicy) -> Iterator[str]:
    if {type(policy.pi_features_extractor), type(policy.vf_features_extractor)} != {FlattenExtractor}:
        yield "the features extractor is not SB3's FlattenExtractor"
    if type(policy.mlp_extractor) is not MlpExtractor:
        yield f"the MLP extractor is a {type(policy.mlp_extractor).__name__}"
        return
    for network in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net):
        layers = list(network)
        if any(type(layer) is not nn.Linear for layer in layers[::2]) or not all(map(activation, layers[1::2])):
            yield f"the layers are {', '.join(type(layer).__name__ for layer in layers)}"
    if {type(policy.action_net), type(policy.value_net)} != {nn.Linear}:
        yield "the output layers are not Linear"
    hooked = any(getattr(module, hooks) for module in policy.modules() for hooks in HOOKS)
    if hooked or th_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        yield "a module of the policy has hooks"
    if any(map(_has_methods_of_its_own, [policy.action_dist, *list(policy.modules())[1:]])):
        yield "a module of the policy, or its action distribution, has methods of its own"


def _objections_to_optimizers(policy: ActorCriticPolicy, optimizers: Sequence[th.optim.Optimizer]) -> Iterator[str]:
    parameters = list(policy.parameters())
    if any(not parameter.requires_grad for parameter in parameters):
        yield "a parameter is frozen"
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        yield "a parameter has hooks"
    for optimizer in optimizers:
        if not _is_torchs_adam_step(th.optim.Adam.step):
            yield "somebody has put another method into Adam"
        if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
            yield f"the optimiser, a {type(optimizer).__name__}, is not Adam with one group of parameters"
            return
        group = optimizer.param_groups[0]
        if any(group.get(name) for name in ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")):
            yield "Adam has other than its plain settings"
        if not all(isinstance(number, float | int) for number in (group["lr"], *group["betas"])):
            yield "Adam has tensors for settings"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
            yield "the optimiser has hooks"
    if list(map(id, policy.optimizer.param_groups[0]["params"])) != list(map(id, parameters)):
        yield "the optimiser's parameters are not the policy's"
