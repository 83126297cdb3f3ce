"""Gymnasium's vector environments as SB3's."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

SUPPORTED_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Whose observations SB3's buffers keep, also in a Dict."""


class GymnasiumVecEnv(VecEnv):
    """
    A ``gymnasium.vector.VectorEnv`` as a ``VecEnv``, with episode statistics such as ``Monitor`` gives.

    What becomes of an ended episode is up to the environment's ``metadata["autoreset_mode"]``:

    - ``SAME_STEP``: the next one starts in the same step, as in SB3's own vector environments;
    - ``DISABLED``, and ``NEXT_STEP`` of gymnasium's ``SyncVectorEnv`` and ``AsyncVectorEnv`` (with shared memory): the same,
      by ``reset(options={"reset_mask": dones})``;
    - ``NEXT_STEP`` of others: the step behind an episode's last one ignores its action, and leads from the last state to the
      next episode's first. :attr:`resetting` tells where. This package's PPO keeps these transitions out of its rollouts and
      doesn't count them; SB3's own algorithms would learn from them, and policies with memory, ``VecFrameStack`` and
      ``VecMonitor`` would take them for steps. ``VecNormalize`` sees a reward of 0.

    :param env: the environments
    :raises TypeError: if they are no ``VectorEnv``
    :raises ValueError: if their autoreset mode is not known, or SB3 can't keep their observations
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, VectorEnv):
            raise TypeError(f"`env` must be a gymnasium.vector.VectorEnv, not {env!r} ({type(env).__name__})")
        _check_space(env.single_observation_space)
        self.env = env
        self.autoreset_mode = _autoreset_mode(env)
        in_next_step = self.autoreset_mode == AutoresetMode.NEXT_STEP
        self._resets_at_once = self.autoreset_mode == AutoresetMode.SAME_STEP
        self.resets_by_mask = self.autoreset_mode == AutoresetMode.DISABLED or (in_next_step and _takes_reset_masks(env))
        self.resets_in_next_step = in_next_step and not self.resets_by_mask
        self.resetting = np.zeros(env.num_envs, dtype=bool)
        """Where the next step does nothing but reset, shape (n_envs,), of the moment."""
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)
        self._start = time.time()
        self._actions: np.ndarray
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """
        Start an episode in every environment.

        :raises ValueError: if ``set_options`` has been given different options for different environments, if not all
            environments are reset at once, or if infos are not gymnasium's
        """
        if any(options != self._options[0] for options in self._options):
            raise ValueError(f"`options` must be the same for all environments of a VectorEnv, not {self._options!r}")
        observations, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        if not isinstance(infos, dict):
            raise ValueError(
                f"`env` must return infos as a dict of arrays, without DictInfoToList, not {type(infos).__name__}"
            )
        n_reset = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
        if n_reset != self.num_envs:
            raise ValueError(f"`env` must step all its {self.num_envs} environments at once, not {n_reset} of them")
        self.reset_infos = [_info_at(infos, index, self.num_envs) for index in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        for array in (self.resetting, self._returns, self._lengths):
            array[:] = 0
        return _copy(observations)  # type: ignore[no-any-return]

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """One step in all environments."""
        observations, rewards, terminations, truncations, infos = self.env.step(self._actions)
        observations = _copy(observations)
        dones = np.logical_or(terminations, truncations)
        if (dones & self.resetting).any():
            number = int(np.flatnonzero(dones & self.resetting)[0])
            raise ValueError(
                f"`env` ends an episode of environment {number} in the step that only resets it: "
                f"`env.metadata['autoreset_mode']` must be another than {self.autoreset_mode}"
            )
        self._returns += np.where(self.resetting, 0.0, rewards)
        self._lengths += ~self.resetting
        final_infos: dict[int, dict[str, Any]] = {}
        if dones.any():
            last_observations = self._final_observations(infos) if self._resets_at_once else observations
            for index in map(int, np.flatnonzero(dones)):
                final_infos[index] = self._episode_info(index)
                final_infos[index]["TimeLimit.truncated"] = bool(truncations[index] and not terminations[index])
                final_infos[index]["terminal_observation"] = _copy(_at(last_observations, index))
            self._returns[dones], self._lengths[dones] = 0.0, 0
            infos_of_reset = self._reset_ended(observations, dones) if self.resets_by_mask else infos
            for index in final_infos:
                self.reset_infos[index] = _info_at(infos_of_reset, index, self.num_envs)
        if self.resets_in_next_step:
            self.resetting[:] = dones
        # Copies, as rewards and observations are written to, here and by the environment.
        return observations, np.array(rewards, np.float32), dones, Infos(infos, self.num_envs, final_infos)  # type: ignore[return-value]

    def _final_observations(self, infos: dict[str, Any]) -> Any:
        if "final_obs" not in infos:
            raise ValueError(
                f"`env` must tell the last observations of ended episodes as `final_obs` in its infos, "
                f"as its autoreset mode is {self.autoreset_mode}"
            )
        return infos["final_obs"]

    def _episode_info(self, index: int) -> dict[str, Any]:
        """As ``Monitor`` tells it."""
        seconds = round(time.time() - self._start, 6)
        return {"episode": {"r": round(float(self._returns[index]), 6), "l": int(self._lengths[index]), "t": seconds}}

    def _reset_ended(self, observations: Any, dones: np.ndarray) -> dict[str, Any]:
        """Put the first observations of the next episodes in the place of last ones; returns the reset's infos."""
        first, infos = self.env.reset(options={"reset_mask": dones.copy()})
        pairs = [(observations[key], first[key]) for key in first] if isinstance(first, dict) else [(observations, first)]
        for array, reset in pairs:
            array[dones] = reset[dones]
        return infos

    def close(self) -> None:
        """Close all environments."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Of each environment; of the vector environment itself, as often, where it doesn't consist of single ones."""
        inner, chosen = self.env.unwrapped, list(self._get_indices(indices))
        if attr_name == "render_mode" or not isinstance(inner, SyncVectorEnv | AsyncVectorEnv):
            owner = self.env if hasattr(self.env, attr_name) else inner
            return [getattr(owner, attr_name) for _ in chosen]
        if isinstance(inner, SyncVectorEnv):
            return [inner.envs[index].get_wrapper_attr(attr_name) for index in chosen]
        if not all(inner.call("has_wrapper_attr", attr_name)):  # asked for what it hasn't got, a process would end
            raise AttributeError(f"the environments of {inner} have no attribute {attr_name!r}")
        values = inner.call("get_wrapper_attr", attr_name)
        return [values[index] for index in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        The counterpart of :meth:`get_attr`.

        :raises ValueError: if only some environments are meant, which a vector environment can't do
        """
        self._check_all(indices)
        inner = self.env.unwrapped
        if isinstance(inner, SyncVectorEnv | AsyncVectorEnv):
            inner.set_attr(attr_name, [value] * self.num_envs)
        else:
            setattr(inner, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """
        Call a method of every environment.

        :raises ValueError: if only some environments are meant, or the vector environment doesn't consist of single ones
        """
        self._check_all(indices)
        inner = self.env.unwrapped
        if not isinstance(inner, SyncVectorEnv | AsyncVectorEnv):
            raise ValueError(f"`env_method` must be called on {inner} itself, which has no single environments")
        return list(inner.call(method_name, *args, **kwargs))

    def _check_all(self, indices: VecEnvIndices) -> None:
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"`indices` must be None, or all of a VectorEnv's {self.num_envs} environments, not {indices!r}")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether each environment is; ``Monitor`` always, as its statistics are there."""
        inner, chosen = self.env.unwrapped, list(self._get_indices(indices))
        if wrapper_class is Monitor:
            return [True] * len(chosen)
        if isinstance(inner, SyncVectorEnv):
            return [is_wrapped(inner.envs[index], wrapper_class) for index in chosen]
        return [False] * len(chosen)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Of each environment, if the vector environment's ``render_mode`` is ``"rgb_array"``."""
        frames: Any = self.env.render()
        return list(frames or [None] * self.num_envs)


class Infos(Sequence[dict[str, Any]]):
    """
    Gymnasium's infos, a dict of arrays, as SB3's, a dict for each environment: built where somebody looks.

    :param infos: gymnasium's, with a mask at ``"_key"`` that tells which environments have the ``"key"``
    :param n_envs: number of environments
    :param final_infos: what is to be added for those whose episode has ended, where ``infos`` may already tell of the next
    """

    def __init__(self, infos: Mapping[str, Any], n_envs: int, final_infos: Mapping[int, dict[str, Any]] | None = None) -> None:
        self._infos = infos
        self._n_envs = n_envs
        self._final_infos = final_infos or {}
        self._built: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self._n_envs

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        chosen = range(self._n_envs)[index]
        if isinstance(chosen, range):
            return [self[each] for each in chosen]
        if chosen not in self._built:
            self._built[chosen] = self._build(chosen)
        return self._built[chosen]

    @property
    def ended(self) -> list[int]:
        """Environments whose episode has ended."""
        return list(self._final_infos)

    def _build(self, index: int) -> dict[str, Any]:
        ended = index in self._final_infos
        source = self._infos["final_info"] if ended and "final_info" in self._infos else self._infos
        info = _info_at(source, index, self._n_envs)
        return {"TimeLimit.truncated": False, **info, **self._final_infos.get(index, {})}


def resets_in_next_step(env: VecEnv) -> bool:
    """
    Whether the environment has steps that do nothing but reset.

    :param env: any, also one wrapped by SB3's wrappers
    """
    inner = env.unwrapped
    return isinstance(inner, GymnasiumVecEnv) and inner.resets_in_next_step


def resets_ahead(env: VecEnv) -> np.ndarray:
    """
    Where the next step of an environment does nothing but reset.

    :param env: any, also one wrapped by SB3's wrappers
    :return: shape (n_envs,), of the moment, also after other steps
    :raises ValueError: if a wrapper would carry observations over such a reset
    """
    if not resets_in_next_step(env):
        return np.zeros(env.num_envs, dtype=bool)
    resetting: np.ndarray = env.unwrapped.resetting  # type: ignore[attr-defined]
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, (VecFrameStack, VecMonitor)):
            raise ValueError(
                f"`env` must not be a {type(env).__name__} of an environment that resets in the next step, as it would take "
                "that step for one of the episode: make it with `autoreset_mode=AutoresetMode.SAME_STEP`"
            )
        env = env.venv
    return resetting


def _autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    mode = (env.metadata or {}).get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        allowed = ", ".join(str(each) for each in AutoresetMode)
        raise ValueError(f"`env.metadata['autoreset_mode']` must be one of {allowed}, not {mode!r}")
    return mode


def _takes_reset_masks(env: VectorEnv[Any, Any, Any]) -> bool:
    """Whether environments that would reset in the next step can be told to do so at once; wrappers may not bear that."""
    return isinstance(env, SyncVectorEnv) or (isinstance(env, AsyncVectorEnv) and bool(env.shared_memory))


def _check_space(space: spaces.Space[Any]) -> None:
    parts: Iterable[spaces.Space[Any]] = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    if not all(isinstance(part, SUPPORTED_SPACES) for part in parts):
        allowed = ", ".join(kind.__name__ for kind in SUPPORTED_SPACES)
        raise ValueError(f"`env.single_observation_space` must be a {allowed}, or a Dict of these, not {space}")


def _copy(observations: Any) -> Any:
    """As environments may write the next observations to the same place; in C's order, as SB3's, whose bits depend on it."""
    if isinstance(observations, dict):
        return {key: np.array(array, order="C") for key, array in observations.items()}
    return np.array(observations, order="C")


def _at(observations: Any, index: int) -> Any:
    if isinstance(observations, dict):
        return {key: array[index] for key, array in observations.items()}
    return observations[index]


def _info_at(infos: Mapping[str, Any], index: int, n_envs: int) -> dict[str, Any]:
    info: dict[str, Any] = {}
    for key, values in infos.items():
        hidden = key.startswith("_") or key in ("final_obs", "final_info")
        if hidden or (f"_{key}" in infos and not infos[f"_{key}"][index]):
            continue
        if isinstance(values, dict):
            info[key] = _info_at(values, index, n_envs)
        else:
            info[key] = values[index] if np.shape(values)[:1] == (n_envs,) else values
    return info
