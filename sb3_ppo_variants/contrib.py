"""Drop-ins for sb3-contrib's MaskablePPO and RecurrentPPO, with this package's objectives, callbacks and logs."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from sb3_ppo_variants.algorithm import PPOBase
from sb3_ppo_variants.kl import categorical_params, distribution_params, multi_categorical_params
from sb3_ppo_variants.rollout import STANDARD_BUFFERS

try:
    import sb3_contrib
    from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
    from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution, MaskableMultiCategoricalDistribution
    from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME, is_masking_supported
    from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
except ImportError as error:
    raise ImportError(
        f'sb3-contrib can\'t be imported ({error}); it is installed by: pip install "sb3-ppo-variants[contrib]"'
    ) from error

distribution_params.register(MaskableCategoricalDistribution, categorical_params)
distribution_params.register(MaskableMultiCategoricalDistribution, multi_categorical_params)
STANDARD_BUFFERS += [
    *(MaskableRolloutBuffer, MaskableDictRolloutBuffer),
    *(RecurrentRolloutBuffer, RecurrentDictRolloutBuffer),
]


class MaskablePPO(PPOBase, sb3_contrib.MaskablePPO):
    """
    PPO with invalid actions masked (Huang and Ontañón 2020, arXiv 2006.14171).

    With its defaults it is ``sb3_contrib.MaskablePPO``, to the last bit on CPU. A KL penalty is that of the masked
    distributions: between actions that are allowed.

    Parameters are those of ``sb3_contrib.MaskablePPO``, and the keyword-only ones of :class:`~sb3_ppo_variants.ppo.PPO` but
    ``n_episodes``; ``clip_range``, ``ent_coef`` and ``vf_coef`` take what they take there.
    """

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool = True,
    ) -> bool:
        """
        Contrib's.

        :raises ValueError: if the environment has no ``action_masks``, or they have a wrong shape or allow no action at all
        """
        if use_masking and not is_masking_supported(env):
            raise ValueError(
                f"`env` must have a method `{EXPECTED_METHOD_NAME}`, or be wrapped in sb3-contrib's ActionMasker; without it "
                "there is `learn(..., use_masking=False)`"
            )
        return super().collect_rollouts(_CheckedMasks(env), callback, rollout_buffer, n_rollout_steps, use_masking)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> Any:
        """
        Contrib's.

        :raises ValueError: if the masks have a wrong shape or allow no action at all
        """
        if action_masks is not None:
            masks, n_actions = np.asarray(action_masks), sum(_sizes(self.action_space))
            several = masks.reshape(-1, n_actions) if masks.size % n_actions == 0 else masks[None]
            for number, each in enumerate(several):
                _check_masks(each, number, self.action_space)
        return super().predict(observation, state, episode_start, deterministic, action_masks)


class RecurrentPPO(PPOBase, sb3_contrib.RecurrentPPO):
    """
    PPO with a policy that remembers, by an LSTM.

    With its defaults it is ``sb3_contrib.RecurrentPPO``, to the last bit on CPU. Exact KLs are those of the distributions
    along sequences: in a minibatch from what the old policy remembered at a sequence's start, over a whole rollout from what
    it remembered at the rollout's start.

    Parameters are those of ``sb3_contrib.RecurrentPPO``, and the keyword-only ones of :class:`~sb3_ppo_variants.ppo.PPO` but
    ``n_episodes``; ``clip_range``, ``ent_coef`` and ``vf_coef`` take what they take there.
    """


class _CheckedMasks(VecEnvWrapper):
    """Refuses masks that torch would take for something else, before an action is drawn by them."""

    def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        results = self.venv.env_method(method_name, *args, **kwargs)
        if method_name == EXPECTED_METHOD_NAME:
            for number, masks in enumerate(results):
                _check_masks(np.asarray(masks), number, self.action_space)
        return results

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


def _check_masks(masks: np.ndarray, number: int, action_space: spaces.Space[Any]) -> None:
    sizes = _sizes(action_space)
    if masks.size != sum(sizes):
        raise ValueError(
            f"`{EXPECTED_METHOD_NAME}` of environment {number} must have {sum(sizes)} elements for {action_space}, not "
            f"{masks.size} (shape {masks.shape})"
        )
    allowed = np.add.reduceat(masks.astype(bool).flatten(), np.cumsum([0, *sizes[:-1]]))
    if not allowed.all():
        choice = "" if len(sizes) == 1 else f" in dimension {int(np.argmin(allowed))}"
        raise ValueError(f"`{EXPECTED_METHOD_NAME}` of environment {number} must allow an action, not forbid all{choice}")


def _sizes(action_space: spaces.Space[Any]) -> list[int]:
    """Numbers of actions that a mask tells of, one for each choice that is made."""
    match action_space:
        case spaces.Discrete():
            return [int(action_space.n)]
        case spaces.MultiDiscrete():
            return [int(n) for n in action_space.nvec]
        case _:
            assert isinstance(action_space, spaces.MultiBinary)
            return [2] * int(action_space.shape[0])
