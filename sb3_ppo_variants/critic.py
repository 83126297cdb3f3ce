"""Which of a policy's parameters are the critic's alone."""

from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn


def critic_parameters(policy: ActorCriticPolicy) -> list[nn.Parameter]:
    """
    The parameters that the values depend on and the actions don't.

    :param policy: with the modules ``mlp_extractor.value_net``, ``value_net`` and, unless the features extractor is
        shared, ``vf_features_extractor``, as every policy of SB3's PPO
    :return: the parameters, in the order of ``policy.parameters()``
    :raises ValueError: if the policy lacks one of the modules
    """
    try:
        modules: list[nn.Module] = [policy.mlp_extractor.value_net, policy.value_net]
        if not policy.share_features_extractor:
            modules.append(policy.vf_features_extractor)
    except AttributeError as error:
        raise ValueError(f"which parameters are the critic's can't be told from {type(policy).__name__}: {error}") from error
    own = {parameter for module in modules for parameter in module.parameters()}
    return [parameter for parameter in policy.parameters() if parameter in own]


def shares_parameters(policy: ActorCriticPolicy) -> bool:
    """Whether actor and critic have parameters in common, in a shared features extractor."""
    return policy.share_features_extractor and any(True for _ in policy.features_extractor.parameters())
