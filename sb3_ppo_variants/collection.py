"""Collecting rollouts: SB3's loop, to the last bit, without distribution objects and copies on every step."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.engines import LeanPolicy
from sb3_ppo_variants.evaluation import States, predict_values, state_chunks
from sb3_ppo_variants.isolation import undisturbed
from sb3_ppo_variants.rollout import KEPT, drop_others, recompute_advantages, shorten
from sb3_ppo_variants.vec_env import resets_ahead

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase
    from sb3_ppo_variants.ppo import PPO


def collect_rollouts(
    self: "PPO",
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
    lean_policy: LeanPolicy | None,
) -> bool:
    """
    ``OnPolicyAlgorithm.collect_rollouts``, with its names, as callbacks find them in ``self.locals``.

    It ends earlier if ``self.n_episodes`` have ended.

    :param lean_policy: stands in for ``self.policy`` until somebody changes that; ``None`` if nothing can
    """
    assert self._last_obs is not None, "No previous observation was provided"
    self.policy.set_training_mode(False)
    n_steps, n_episodes = 0, 0
    enough_episodes = math.inf if self.n_episodes is None else self.n_episodes
    rollout_buffer.reset()
    n_attributes = len(vars(rollout_buffer))
    if self.use_sde:
        self.policy.reset_noise(env.num_envs)
    callback.on_rollout_start()
    watched = not _is_nobody(callback)
    is_current = lean_policy is not None and lean_policy.is_current(self.policy)
    resets = resets_ahead(env)
    kept: list[np.ndarray] = []

    while n_steps < n_rollout_steps and n_episodes < enough_episodes:
        _renew_noise(self, env, n_steps)
        obs_tensor: Any = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
        if watched:
            is_current = lean_policy is not None and lean_policy.is_current(self.policy)
        actions, values, log_probs, value_array, log_prob_array = _act(self, lean_policy if is_current else None, obs_tensor)
        clipped_actions: Any = _executable(self, actions)

        kept.append(~resets)

        new_obs, rewards, dones, infos = env.step(clipped_actions)

        self.num_timesteps += int(np.count_nonzero(kept[-1])) * self._ranks.size
        if watched:
            callback.update_locals(locals())
        if not callback.on_step():
            return False
        self._update_info_buffer(infos, dones)
        n_steps += 1
        n_episodes += int(np.count_nonzero(dones))
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
        if lean_policy is not None and len(vars(rollout_buffer)) == n_attributes:
            _add(rollout_buffer, *sample, value_array, log_prob_array)
        else:  # of a kind of its own, or a callback has put a method of its own into it
            rollout_buffer.add(*sample, values, log_probs)  # type: ignore[arg-type]
        self._last_obs = new_obs  # type: ignore[assignment]
        self._last_episode_starts = np.logical_or(dones, ~kept[-1])

    with th.no_grad():
        values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
    as_it_was = lean_policy is not None and len(vars(rollout_buffer)) == n_attributes
    _finish(rollout_buffer, values, dones, as_it_was, np.array(kept), ended_early=n_steps < n_rollout_steps)
    callback.update_locals(locals())
    callback.on_rollout_end()
    return True


def _is_nobody(callback: BaseCallback) -> bool:
    """Whether it is what SB3 makes of no callback: then nobody looks at the rollout, or changes the policy, on the way."""
    return type(callback) is ConvertCallback and callback.callback is None


def _renew_noise(self: "PPO", env: VecEnv, n_steps: int) -> None:
    """GSDE's, every so many steps."""
    if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
        self.policy.reset_noise(env.num_envs)


def _act(self: "PPO", lean_policy: LeanPolicy | None, obs_tensor: Any) -> tuple[Any, th.Tensor, th.Tensor, Any, Any]:
    """Actions as an array, values and log-probabilities as tensors and as arrays."""
    if lean_policy is not None:
        actions, value_array, log_prob_array = lean_policy.forward(self._last_obs)  # type: ignore[arg-type]
        return actions, th.from_numpy(value_array), th.from_numpy(log_prob_array), value_array, log_prob_array
    with th.no_grad():
        action_tensor, values, log_probs = self.policy(obs_tensor)
    return action_tensor.cpu().numpy(), values, log_probs, values.cpu().numpy(), log_probs.cpu().numpy()


def _executable(self: "PPO", actions: Any) -> Any:
    """Actions within the space's bounds."""
    if not isinstance(self.action_space, spaces.Box):
        return actions
    if self.policy.squash_output:
        return self.policy.unscale_action(actions)
    # What `np.clip` does in three times the time.
    return np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)


def _finish(
    buffer: RolloutBuffer, last_values: th.Tensor, dones: np.ndarray, as_it_was: bool, kept: np.ndarray, ended_early: bool
) -> None:
    """
    Returns and advantages of a rollout that has ended.

    :param as_it_was: whether nobody has put a method of its own into a known buffer
    :param kept: which transitions are to be kept, shape (n_steps, n_envs)
    :param ended_early: whether it has fewer steps than the buffer holds
    """
    if ended_early:
        shorten(buffer)
    if not kept.all():
        vars(buffer)[KEPT] = kept
    if as_it_was and type(buffer) is RolloutBuffer:
        compute_returns_and_advantage(buffer, last_values, dones)
    else:
        buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
    if not kept.all():
        drop_others(buffer)


@th.no_grad()
def renew_advantages(model: "PPOBase") -> None:
    """
    Replace the rollout's advantages by those of the critic as it is now; values and returns stay those of the old one.

    :param model: whose rollout has just ended
    """
    buffer, policy = model.rollout_buffer, model.policy
    observations: Any = obs_as_tensor(model._last_obs, model.device)  # type: ignore[arg-type]
    lstm_states = getattr(model, "_last_lstm_states", None)
    episode_starts = None
    if lstm_states is not None:
        episode_starts = th.as_tensor(model._last_episode_starts, dtype=th.float32, device=model.device)
    with undisturbed(policy):
        chunks = state_chunks(buffer, buffer.buffer_size)
        values = th.cat([predict_values(policy, states) for _, states in chunks])
        last_values = predict_values(policy, States(observations, None, lstm_states, episode_starts))
    recompute_advantages(buffer, values.cpu().numpy(), last_values, model._last_episode_starts)  # type: ignore[arg-type]


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
