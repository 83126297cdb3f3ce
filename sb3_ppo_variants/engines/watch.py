"""Whether a policy is still built as it was."""

import operator

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.utils.hooks import RemovableHandle

SETTINGS = ("negative_slope", "alpha", "approximate", "beta", "threshold", "inplace")
"""Of activation functions."""


class Watch:
    """
    Remembers how a policy is built; values of parameters may change.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy, self._kind = policy, type(policy)
        modules = [vars(module) for module in policy.modules()]
        self._n_hooks_ever = RemovableHandle.next_id
        contents = [module[kind] for module in modules for kind in ("_parameters", "_modules")]
        self._sized, self._action_dist = [*modules, *contents], vars(policy.action_dist)
        self._size = self._count()
        pairs = [(content, name) for content in contents for name in content]
        pairs += [(module, name) for module in modules for name in SETTINGS if name in module]
        pairs += [(vars(policy), name) for name in ("action_dist", "normalize_images", "_squash_output")]
        self._contents, self._names = zip(*pairs, strict=True)
        self._found = list(map(dict.get, self._contents, self._names))
        self._parameters = list(policy.parameters())
        self._addresses = list(map(th.Tensor.data_ptr, self._parameters))

    def _count(self) -> int:
        """How many attributes, parameters and modules there are, but for the distribution that SB3 leaves behind."""
        return sum(map(len, self._sized)) + len(self._action_dist) - ("distribution" in self._action_dist)

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether a policy is the one that was found, with its parameters and modules, and neither hooks nor methods more."""
        return (
            policy is self._policy
            and type(policy) is self._kind
            and RemovableHandle.next_id == self._n_hooks_ever
            and self._count() == self._size
            and all(map(operator.is_, map(dict.get, self._contents, self._names), self._found))
            and list(map(th.Tensor.data_ptr, self._parameters)) == self._addresses
        )
