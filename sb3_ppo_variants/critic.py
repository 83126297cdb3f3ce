"""Which of a policy's parameters are the critic's alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_variants.evaluation import act, any_state, evaluate_actions, predict_values
from sb3_ppo_variants.isolation import undisturbed
from sb3_ppo_variants.rollout import policy_actions


def critic_parameters(policy: ActorCriticPolicy) -> list[nn.Parameter]:
    """
    The parameters that the values depend on and the actions don't, also those that are frozen for now.

    :param policy: any policy of SB3's PPO
    :return: the parameters, in the order of ``policy.parameters()``
    :raises ValueError: if there are none
    """
    own = _reached(policy, by_values=True) - _reached(policy, by_values=False)
    parameters = [parameter for name, parameter in policy.named_parameters() if name in own]
    if not parameters:
        raise ValueError(f"`policy` must have parameters of the critic's own to train them apart, not {type(policy).__name__}")
    return parameters


def shares_parameters(policy: ActorCriticPolicy) -> bool:
    """Whether actor and critic have parameters in common, such as those of a shared features extractor."""
    return bool(_reached(policy, by_values=True) & _reached(policy, by_values=False))


def _reached(policy: ActorCriticPolicy, by_values: bool) -> set[str]:
    """Names of the parameters that the values, or else the actions' log-probabilities, have gradients for."""
    with undisturbed(policy), _unfrozen(policy), th.enable_grad():
        state = any_state(policy)  # as only the graph matters
        if by_values:
            output = predict_values(policy, state)
        else:
            with th.no_grad():
                actions = act(policy, state).reshape(1, -1)
            output = evaluate_actions(policy, state, policy_actions(actions, policy.action_space))[1]
        if not output.requires_grad:
            return set()
        parameters = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
        gradients = th.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


@contextmanager
def _unfrozen(policy: ActorCriticPolicy) -> Iterator[None]:
    frozen = [each for each in policy.parameters() if not each.requires_grad and each.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
