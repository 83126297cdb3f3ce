"""An MLP policy's forward pass in a rollout, without distribution objects and copies."""

import math
import operator

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch.utils.hooks import RemovableHandle

from sb3_ppo_variants.engines.heads import make_head
from sb3_ppo_variants.engines.network import Networks, actor_and_critic, policy_inputs


class LeanPolicy:
    """
    An MLP policy's ``forward``, on its parameters, for as long as nobody rebuilds it.

    :param policy: one for which :func:`~sb3_ppo_variants.engines.reasons.why_not_lean` finds no reason
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        parameters: dict[str, th.Tensor] = dict(policy.named_parameters())
        self._policy = policy
        self._action_shape = (-1, *(policy.action_space.shape or ()))
        self._plain = isinstance(policy.observation_space, spaces.Box) and not is_image_space(policy.observation_space)
        self._networks = Networks(actor_and_critic(policy, parameters))
        self._head = make_head(policy.action_dist, parameters)
        modules = [vars(module) for module in policy.modules()]
        self._modules, self._size = modules, sum(map(len, modules))
        self._n_hooks_ever = RemovableHandle.next_id
        contents = [module[kind] for module in modules for kind in ("_parameters", "_modules")]
        pairs = [(content, name) for content in contents for name in content]
        self._contents, self._names = zip(*pairs, (vars(policy), "action_dist"), strict=True)
        self._found = list(map(dict.get, self._contents, self._names))
        self._parameters = list(policy.parameters())
        self._addresses = list(map(th.Tensor.data_ptr, self._parameters))

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether a policy is the one that was found, with its parameters and modules, and neither hooks nor methods more."""
        return (
            policy is self._policy
            and RemovableHandle.next_id == self._n_hooks_ever
            and sum(map(len, self._modules)) == self._size
            and all(map(operator.is_, map(dict.get, self._contents, self._names), self._found))
            and list(map(th.Tensor.data_ptr, self._parameters)) == self._addresses
        )

    @np.errstate(all="ignore")
    def forward(self, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Actions drawn from the policy, their states' values, their log-probabilities.

        :param observations: of the environments, shape (n_envs, *obs_shape)
        :return: of shapes (n_envs, *action_shape), (n_envs, 1), (n_envs,)
        """
        at_work = self._networks.at_work(len(observations))
        if self._plain:
            at_work.inputs.numpy()[:] = observations.reshape(len(observations), -1)
        else:
            at_work.inputs.copy_(policy_inputs(self._policy, th.from_numpy(observations)))
        output, values = at_work.forward()
        self._head.forward(output)
        actions = self._head.sample()
        log_probs = self._head.log_prob(actions)
        if math.isnan(log_probs.dot(log_probs)):  # the fastest way to ask whether any is NaN, which SB3 refuses
            with th.no_grad():
                self._policy(th.from_numpy(observations))
        return actions.reshape(self._action_shape), values.copy(), log_probs
