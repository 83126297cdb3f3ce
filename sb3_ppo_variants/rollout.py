"""Reading SB3's rollout buffers in the order in which they hand out minibatches."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

Observations: TypeAlias = np.ndarray | dict[str, np.ndarray]

STANDARD_BUFFERS: list[type[RolloutBuffer]] = [RolloutBuffer, DictRolloutBuffer]
"""Whose ``get`` hands out minibatches by indices of the flattened rollout."""
SHAPE_WHEN_EMPTY = "shape_when_empty"
"""Attribute of a buffer that has been cut to a part of itself: ``buffer_size`` and ``n_envs`` that it had before."""
KEPT = "kept"
"""Attribute of a buffer that doesn't keep all transitions of its rollout: which, shape (n_steps, n_envs)."""


class Minibatch:
    """
    One minibatch of ``b`` samples.

    :param indices: as the property
    :param gather: returns them as ``RolloutBuffer.get`` yields them
    """

    def __init__(self, indices: th.Tensor | None, gather: Callable[[], RolloutBufferSamples]) -> None:
        self._indices = indices
        self._gather = gather

    @property
    def indices(self) -> th.Tensor | None:
        """Where the samples stand in the flattened rollout, shape (b,), ``None`` if the buffer doesn't tell."""
        return self._indices

    @functools.cached_property
    def samples(self) -> RolloutBufferSamples:
        """Gathered when they are first asked for."""
        return self._gather()

    def gather(self) -> None:
        """Gather the samples, before somebody changes the rollout."""
        self.samples  # noqa: B018


def gathers_by_index(buffer: RolloutBuffer) -> bool:
    """Whether a buffer hands out minibatches as SB3's do: rows of the flattened rollout, just as they stand there."""
    kind = type(buffer)
    return (
        isinstance(buffer, RolloutBuffer)
        and kind.get in [base.get for base in STANDARD_BUFFERS]
        and kind._get_samples in [base._get_samples for base in STANDARD_BUFFERS]
        and not {"get", "_get_samples"} & vars(buffer).keys()
    )


def minibatches(buffer: RolloutBuffer, batch_size: int) -> Iterator[Minibatch]:
    """
    ``buffer.get(batch_size)``, and where each minibatch comes from.

    SB3's ``get`` draws the permutation and keeps it to itself, but gathers each minibatch through ``_get_samples``: that
    is listened to here. A user's own way of making minibatches is left alone, its indices are not known.

    :param buffer: a full rollout buffer
    :param batch_size: samples a minibatch, the last one may have fewer
    """
    if not gathers_by_index(buffer):
        for samples in buffer.get(batch_size):
            yield _gathered(samples, None)
        return
    gathered: list[np.ndarray] = []
    get_samples = buffer._get_samples

    def listening_get_samples(batch_inds: np.ndarray, *args: Any) -> RolloutBufferSamples:
        gathered.append(batch_inds)
        return get_samples(batch_inds, *args)

    buffer._get_samples = listening_get_samples  # type: ignore[method-assign, assignment]
    try:
        for samples in buffer.get(batch_size):
            yield _gathered(samples, th.as_tensor(gathered.pop(), device=buffer.device))
    finally:
        vars(buffer).pop("_get_samples", None)


def places(buffer: RolloutBuffer) -> tuple[np.ndarray, np.ndarray]:
    """
    Where the samples come from, in the order of flat indices.

    :param buffer: a full rollout buffer, whether or not it has dropped transitions
    :return: their environments and their steps in the rollout, each of shape (n_samples,)
    """
    envs, steps = np.nonzero(_kept(buffer).T)
    return envs, steps


def _kept(buffer: RolloutBuffer) -> np.ndarray:
    """Which transitions of its rollout a buffer keeps, shape (n_steps, n_envs)."""
    kept: np.ndarray = vars(buffer).get(KEPT, np.ones((buffer.buffer_size, buffer.n_envs), dtype=bool))
    return kept


def flatten(buffer: RolloutBuffer) -> None:
    """
    Give a buffer's arrays the order of the minibatches' indices, as ``RolloutBuffer.get`` does when it is first called.

    :param buffer: a full rollout buffer
    """
    assert buffer.full, ""
    if not buffer.generator_ready:
        for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
            vars(buffer)[name] = buffer.swap_and_flatten(vars(buffer)[name])
        buffer.generator_ready = True


def shorten(buffer: RolloutBuffer) -> None:
    """
    Make a buffer a full one of the steps that it has, for a rollout that has ended early.

    :param buffer: that may not be full; :func:`lengthen` gives it its size back
    """
    _cut(buffer, lambda array: array[: buffer.pos], (buffer.pos, buffer.n_envs))


def drop_others(buffer: RolloutBuffer) -> None:
    """
    Make a buffer one of the transitions that it is to keep, as if of a single environment, in the order of flat indices.

    :param buffer: a full one, with advantages and returns, and :data:`KEPT`; :func:`lengthen` gives it its shape back
    """
    rows = np.flatnonzero(vars(buffer)[KEPT].swapaxes(0, 1))
    _cut(buffer, lambda array: array.swapaxes(0, 1).reshape(-1, 1, *array.shape[2:])[rows], (len(rows), 1))


def recompute_advantages(buffer: RolloutBuffer, values: np.ndarray, last_values: th.Tensor, dones: np.ndarray) -> None:
    """
    Replace a rollout's advantages by those of other values; old values and returns stay.

    :param buffer: a full one, whether or not it has dropped transitions
    :param values: of its states, in the order of flat indices, shape (n_samples,)
    :param last_values: of the states behind the last step, shape (n_envs, 1)
    :param dones: whether episodes have ended in the last step, shape (n_envs,)
    """
    kept = _kept(buffer).T
    whole = copy.copy(buffer)
    whole.n_envs, whole.buffer_size = kept.shape
    rewards, episode_starts = buffer.swap_and_flatten(buffer.rewards), buffer.episode_starts
    if episode_starts.shape == buffer.rewards.shape:  # else they have been flattened, as values have
        episode_starts = buffer.swap_and_flatten(episode_starts)
    columns = {"values": values, "rewards": rewards, "episode_starts": episode_starts}
    for name, column in columns.items():
        # Dropped transitions lie behind an episode's end: as a start of another, nothing flows back from them.
        array = np.full(kept.shape, float(name == "episode_starts"), dtype=np.float32)
        array[kept] = column.flatten()
        vars(whole)[name] = array.swapaxes(0, 1)
    whole.advantages = np.zeros_like(whole.values)
    whole.compute_returns_and_advantage(last_values, dones)
    buffer.advantages = whole.advantages.swapaxes(0, 1)[kept].reshape(buffer.advantages.shape[::-1]).swapaxes(0, 1)


def _cut(buffer: RolloutBuffer, cut: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int]) -> None:
    def is_of_transitions(value: Any) -> bool:
        return isinstance(value, np.ndarray) and value.shape[:2] == (buffer.buffer_size, buffer.n_envs)

    for name, value in list(vars(buffer).items()):  # also what a user's buffer keeps beside SB3's
        if is_of_transitions(value) and name != KEPT:
            vars(buffer)[name] = cut(value)
        elif isinstance(value, dict) and value and all(map(is_of_transitions, value.values())):
            vars(buffer)[name] = {key: cut(array) for key, array in value.items()}
    vars(buffer).setdefault(SHAPE_WHEN_EMPTY, (buffer.buffer_size, buffer.n_envs))
    buffer.buffer_size, buffer.n_envs = shape
    buffer.full = True


def lengthen(buffer: RolloutBuffer) -> None:
    """
    Give a buffer the shape back that it had before :func:`shorten` and :func:`keep`, if they were called.

    :param buffer: about to be reset
    """
    buffer.buffer_size, buffer.n_envs = vars(buffer).pop(SHAPE_WHEN_EMPTY, (buffer.buffer_size, buffer.n_envs))
    vars(buffer).pop(KEPT, None)


def _gathered(samples: RolloutBufferSamples, indices: th.Tensor | None) -> Minibatch:
    return Minibatch(indices, lambda: samples)


def flat_observations(buffer: RolloutBuffer) -> Observations:
    """
    The observations in the order of the minibatches' indices.

    :param buffer: a full rollout buffer, whether or not ``get`` has been called
    :return: shape (n_steps * n_envs, *obs_shape), a dict of such arrays for Dict observations
    """
    if isinstance(buffer.observations, dict):
        return {key: _flat(buffer, observations) for key, observations in buffer.observations.items()}
    return _flat(buffer, buffer.observations)


def flat_actions(buffer: RolloutBuffer, action_space: spaces.Space[Any]) -> th.Tensor:
    """
    The actions in the order of the minibatches' indices, as the policy takes them (:func:`policy_actions`).

    :param buffer: a full rollout buffer, whether or not ``get`` has been called
    :param action_space: of the environment
    :return: shape (n_steps * n_envs, action_dim), without the last axis for Discrete
    """
    return policy_actions(buffer.to_torch(_flat(buffer, buffer.actions).astype(np.float32, copy=False)), action_space)


def flat_log_probs(buffer: RolloutBuffer) -> th.Tensor:
    """
    The old policy's log-probabilities in the order of the minibatches' indices.

    :param buffer: a full rollout buffer, whether or not ``get`` has been called
    :return: shape (n_steps * n_envs,)
    """
    return buffer.to_torch(_flat(buffer, buffer.log_probs).flatten())


def policy_actions(actions: th.Tensor, action_space: spaces.Space[Any]) -> th.Tensor:
    """Actions as ``policy.evaluate_actions`` takes them: the buffer keeps Discrete ones as floats of shape (b, 1)."""
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions


def _flat(buffer: RolloutBuffer, array: np.ndarray) -> np.ndarray:
    return array if buffer.generator_ready else buffer.swap_and_flatten(array)
