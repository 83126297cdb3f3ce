"""Evaluating a policy on states of a rollout: a plain one, one with masked actions, one with hidden states."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_variants.rollout import flat_observations


class States(NamedTuple):
    """
    States, and what else a policy has to know there; minibatches have these attributes too.

    :param observations: ``b`` of them
    :param action_masks: which actions are allowed, shape (b, n_actions); ``None`` for all
    :param lstm_states: what an actor (``pi``) and a critic (``vf``) remember at the first state of each sequence, each a pair
        of shape (n_layers, n_sequences, hidden_size); ``None`` if they don't remember
    :param episode_starts: where that is forgotten, shape (b,), where ``lstm_states`` is given
    """

    observations: Any
    action_masks: th.Tensor | None = None
    lstm_states: Any = None
    episode_starts: th.Tensor | None = None


def act(policy: ActorCriticPolicy, states: Any) -> th.Tensor:
    """Actions of the policy, shape (b, ...)."""
    return policy(states.observations, **_context(states))[0]  # type: ignore[no-any-return]


def evaluate_actions(
    policy: ActorCriticPolicy, samples: Any, actions: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
    """``policy.evaluate_actions`` on a minibatch: values, log-probabilities, entropies, with those of padded samples."""
    return policy.evaluate_actions(samples.observations, actions, **_context(samples))


def get_distribution(policy: ActorCriticPolicy, states: Any) -> Distribution:
    """``policy.get_distribution``."""
    context = _context(states)
    if "lstm_states" in context:
        context["lstm_states"] = context["lstm_states"].pi
        return policy.get_distribution(states.observations, **context)[0]  # type: ignore[index, no-any-return]
    return policy.get_distribution(states.observations, **context)


def predict_values(policy: ActorCriticPolicy, states: Any) -> th.Tensor:
    """``policy.predict_values``, shape (b,)."""
    context = _context(states)
    context.pop("action_masks", None)
    if "lstm_states" in context:
        context["lstm_states"] = context["lstm_states"].vf
    return policy.predict_values(states.observations, **context).flatten()


def _context(states: Any) -> dict[str, Any]:
    """Arguments beside the observations."""
    names = ("action_masks", "lstm_states", "episode_starts")
    given = {name: getattr(states, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def unpadded(samples: Any) -> th.Tensor | None:
    """Which samples of a minibatch are no padding of sequences, shape (b,), of type bool; ``None`` for all."""
    mask: th.Tensor | None = getattr(samples, "mask", None)
    return None if mask is None else mask > 1e-8


def state_chunks(buffer: RolloutBuffer, chunk_size: int) -> Iterator[tuple[slice, States]]:
    """
    The states of a rollout, chunk by chunk, in the order of the minibatches' indices; in one chunk if they are sequences.

    Sequences are those of whole rollouts: a policy remembers what it has seen since its own first state there.

    :param buffer: a full rollout buffer, whether or not ``get`` has been called
    :param chunk_size: states a chunk, the last one may have fewer
    :return: where each chunk stands among all states, and the chunk
    """
    observations: Any = flat_observations(buffer)
    n_states = buffer.buffer_size * buffer.n_envs
    lstm_states, episode_starts = _first_lstm_states(buffer), None
    if lstm_states is not None:
        chunk_size = n_states
        episode_starts = buffer.to_torch(_by_sequence(buffer, buffer.episode_starts).flatten())
    masks: np.ndarray | None = getattr(buffer, "action_masks", None)
    masks = None if masks is None else _by_sequence(buffer, masks)
    for start in range(0, n_states, chunk_size):
        rows = slice(start, start + chunk_size)
        chunk: Any
        if isinstance(observations, dict):
            chunk = {key: buffer.to_torch(array[rows]) for key, array in observations.items()}
        else:
            chunk = buffer.to_torch(observations[rows])
        yield rows, States(chunk, None if masks is None else buffer.to_torch(masks[rows]), lstm_states, episode_starts)


def _by_sequence(buffer: RolloutBuffer, array: np.ndarray) -> np.ndarray:
    """In the order of the minibatches' indices, in which ``get`` may already have put it."""
    return buffer.swap_and_flatten(array) if array.shape[:2] == (buffer.buffer_size, buffer.n_envs) else array


def _first_lstm_states(buffer: Any) -> Any:
    """What actor and critic remembered at the rollout's first states, one for each environment."""
    if not hasattr(buffer, "hidden_states_pi"):
        return None

    def first(name: str) -> th.Tensor:
        array = getattr(buffer, name)
        # (n_steps, n_layers, n_envs, hidden_size), or after `get` (n_envs * n_steps, n_layers, hidden_size).
        at_first = array[0] if array.ndim == 4 else array[:: buffer.buffer_size].swapaxes(0, 1)
        return buffer.to_torch(at_first).contiguous()  # type: ignore[no-any-return]

    kinds = {kind: (first(f"hidden_states_{kind}"), first(f"cell_states_{kind}")) for kind in ("pi", "vf")}
    return SimpleNamespace(**kinds)


def any_state(policy: ActorCriticPolicy) -> States:
    """Some state, for what is the same for all states."""
    observation = policy.obs_to_tensor(_zeros(policy.observation_space))[0]
    shape = getattr(policy, "lstm_hidden_state_shape", None)
    if shape is None:
        return States(observation)
    zeros = (th.zeros(shape, device=policy.device),) * 2
    return States(observation, None, SimpleNamespace(pi=zeros, vf=zeros), th.zeros(1, device=policy.device))


def _zeros(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _zeros(child) for key, child in space.spaces.items()}
    return np.zeros(space.shape or (), dtype=space.dtype)
