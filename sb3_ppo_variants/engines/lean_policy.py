"""An MLP policy's forward pass in a rollout, without distribution objects and copies."""

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.engines.heads import any_nan, make_head
from sb3_ppo_variants.engines.network import Networks, actor_and_critic, input_writer
from sb3_ppo_variants.engines.watch import Watch
from sb3_ppo_variants.isolation import undisturbed


class LeanPolicy:
    """
    An MLP policy's ``forward``, on its parameters, for as long as nobody rebuilds it.

    :param policy: one for which :func:`~sb3_ppo_variants.engines.reasons.why_not_lean` finds no reason
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        parameters: dict[str, th.Tensor] = dict(policy.named_parameters())
        self._policy = policy
        self._action_shape = (-1, *(policy.action_space.shape or ()))
        self._write_inputs = input_writer(policy)
        self._networks = Networks(actor_and_critic(policy, parameters))
        self._head = make_head(policy.action_dist, parameters)
        self.is_current = Watch(policy).is_current

    @np.errstate(all="ignore")
    def forward(self, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Actions drawn from the policy, their states' values, their log-probabilities.

        :param observations: of the environments, shape (n_envs, *obs_shape)
        :return: of shapes (n_envs, *action_shape), (n_envs, 1), (n_envs,)
        """
        at_work = self._networks.at_work(len(observations))
        self._write_inputs(observations, at_work.inputs)
        output, values = at_work.forward()
        self._head.forward(output)
        self._policy.action_dist.distribution = self._head.distribution()
        actions = self._head.sample()
        log_probs = self._head.log_prob(actions)
        if any_nan(log_probs):
            self._raise_what_sb3_raises(observations)
        return actions.reshape(self._action_shape), values.copy(), log_probs

    def _raise_what_sb3_raises(self, observations: np.ndarray) -> None:
        """SB3's distributions refuse NaN, unless they have been told not to."""
        with undisturbed(self._policy), th.no_grad():
            self._policy(th.from_numpy(observations))
