"""Collecting rollouts: SB3's loop, to the last bit, without distribution objects and copies on every step."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.engines import LeanPolicy

if TYPE_CHECKING:
    from sb3_ppo_variants.ppo import PPO


def collect_rollouts(
    self: "PPO",
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
    lean_policy: LeanPolicy,
) -> bool:
    """
    ``OnPolicyAlgorithm.collect_rollouts``, with its names, as callbacks find them in ``self.locals``.

    :param lean_policy: stands in for ``self.policy`` until somebody changes that
    """
    assert self._last_obs is not None, "No previous observation was provided"
    self.policy.set_training_mode(False)
    n_steps = 0
    rollout_buffer.reset()
    n_attributes = len(vars(rollout_buffer))
    callback.on_rollout_start()

    while n_steps < n_rollout_steps:
        obs_tensor: Any = th.from_numpy(self._last_obs)
        if lean_policy.is_current(self.policy):
            actions, value_array, log_prob_array = lean_policy.forward(self._last_obs)  # type: ignore[arg-type]
            values, log_probs = th.from_numpy(value_array), th.from_numpy(log_prob_array)
        else:
            with th.no_grad():
                action_tensor, values, log_probs = self.policy(obs_tensor)
            actions, value_array, log_prob_array = (each.cpu().numpy() for each in (action_tensor, values, log_probs))
        clipped_actions: Any = actions
        if isinstance(self.action_space, spaces.Box):
            # What `np.clip` does in three times the time.
            clipped_actions = np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)

        new_obs, rewards, dones, infos = env.step(clipped_actions)

        self.num_timesteps += env.num_envs
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        self._update_info_buffer(infos, dones)
        n_steps += 1
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.reshape(-1, 1)

        # Where an episode was cut off, its last state's value stands for the rest of the return (SB3 issue #633).
        for idx, done in enumerate(dones):
            if done and infos[idx].get("terminal_observation") is not None and infos[idx].get("TimeLimit.truncated", False):
                terminal_obs: Any = self.policy.obs_to_tensor(infos[idx]["terminal_observation"])[0]
                with th.no_grad():
                    terminal_value = self.policy.predict_values(terminal_obs)[0]
                rewards[idx] += self.gamma * terminal_value

        sample = (self._last_obs, actions, rewards, self._last_episode_starts)
        if len(vars(rollout_buffer)) == n_attributes:
            _add(rollout_buffer, *sample, value_array, log_prob_array)
        else:  # a callback has put a method of its own into the buffer
            rollout_buffer.add(*sample, values, log_probs)  # type: ignore[arg-type]
        self._last_obs = new_obs  # type: ignore[assignment]
        self._last_episode_starts = dones

    with th.no_grad():
        values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
    if len(vars(rollout_buffer)) == n_attributes:
        compute_returns_and_advantage(rollout_buffer, values, dones)
    else:
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
    callback.update_locals(locals())
    callback.on_rollout_end()
    return True


def _add(
    buffer: RolloutBuffer, obs: Any, actions: Any, rewards: Any, episode_starts: Any, values: Any, log_probs: Any
) -> None:
    """``RolloutBuffer.add``, without copies of what is copied into the buffer."""
    position, observations = buffer.pos, buffer.observations
    observations[position] = obs if obs.ndim == observations.ndim - 1 else obs[:, None]  # Discrete
    buffer.actions[position] = actions.reshape(buffer.n_envs, buffer.action_dim)
    buffer.rewards[position] = rewards
    buffer.episode_starts[position] = episode_starts
    buffer.values[position] = values[:, 0]
    buffer.log_probs[position] = log_probs
    buffer.pos = position + 1
    buffer.full = buffer.pos == buffer.buffer_size


def compute_returns_and_advantage(buffer: RolloutBuffer, last_values: th.Tensor, dones: np.ndarray) -> None:
    """
    ``RolloutBuffer.compute_returns_and_advantage``: GAE, eqs. 11 and 12 of Schulman et al. 2016, arXiv 1506.02438.

    The sum over time runs backwards, step by step, as its bits depend on that order; all else is done at once.

    :param buffer: full
    :param last_values: of the states behind the last step, shape (n_envs, 1)
    :param dones: whether episodes have ended in the last step, shape (n_envs,)
    """
    next_values = np.concatenate([buffer.values[1:], last_values.numpy().reshape(1, -1)])
    next_non_terminal = 1.0 - np.concatenate([buffer.episode_starts[1:], dones.astype(np.float32)[None]])
    deltas = buffer.rewards + buffer.gamma * next_values * next_non_terminal - buffer.values
    discounts = buffer.gamma * buffer.gae_lambda * next_non_terminal
    advantage = np.zeros(buffer.n_envs, dtype=np.result_type(deltas, discounts))
    for delta, discount, row in zip(deltas[::-1], discounts[::-1], buffer.advantages[::-1], strict=True):
        np.add(delta, np.multiply(discount, advantage, out=advantage), out=advantage)
        row[:] = advantage
    buffer.returns = buffer.advantages + buffer.values
