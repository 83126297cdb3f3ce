"""PPO with a clipped surrogate, a fixed or an adaptive KL penalty, both or neither, as a drop-in for SB3's PPO."""

from typing import Any, ClassVar, TypeVar

import stable_baselines3
import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.algorithm import ClipRange, PPOBase
from sb3_ppo_variants.arguments import (
    check_positive_int,
)
from sb3_ppo_variants.collection import collect_rollouts
from sb3_ppo_variants.kl_coef import KLCoef
from sb3_ppo_variants.policies import ZeroHeadsPolicy
from sb3_ppo_variants.rollout import lengthen
from sb3_ppo_variants.vec_env import resets_in_next_step

SelfPPO = TypeVar("SelfPPO", bound="PPO")


class PPO(PPOBase, stable_baselines3.PPO):
    """
    Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347).

    With its defaults it is ``stable_baselines3.PPO``, to the last bit on CPU. ``clip_range`` and ``kl_coef`` choose the
    objective: clipped surrogate (eq. 7), KL penalty (eq. 8) with a fixed or an adaptive coefficient, both, or neither.

    ``env`` may also be a ``gymnasium.vector.VectorEnv`` (:class:`GymnasiumVecEnv` tells how it is taken).

    All arguments of ``stable_baselines3.PPO`` stand in its order and mean the same; listed here are those that take
    more values, and, keyword-only, the new ones. Wherever a schedule is allowed, so is a string: ``"lin_0.2"`` falls
    linearly from 0.2 to 0.

    :param clip_range: epsilon of the clipped surrogate, a number or a schedule; a pair of these for the ratio's range below 1
        and above (DAPO's "clip-higher"); ``None`` for no clipping
    :param ent_coef: weight of the entropy bonus, a number or a schedule
    :param vf_coef: weight of the value loss, a number or a schedule; without effect if ``n_value_epochs`` is given
    :param kl_coef: beta, weight of the KL penalty: a number or a schedule for a fixed penalty (0 for none); ``"auto"``
        or ``"auto_0.5"`` for an adaptive one by the paper's rule (from the initial value 0.5 on); a dict of arguments
        for :meth:`KLCoefController.from_rule`, or a :class:`KLCoefController`, for any other rule
    :param kl_target: the exact KL(old || new) an update is to cause, in nats, summed over action dimensions and averaged
        over states; the target of the adaptive penalty
    :param n_value_epochs: ``None`` for SB3's joint update; else the number of passes over the rollout in which the
        critic is trained, with an optimiser of its own, after the policy's ``n_epochs`` (OpenAI Spinning Up's scheme)
    :param value_learning_rate: learning rate in those passes, a number or a schedule; ``None`` for ``learning_rate``
    :param critic_first: whether those passes come before the policy's, whose advantages are then those of the critic as it
        is after them; what the rollout holds for the ends of truncated episodes stays the old critic's
    :param n_episodes: ``None`` for rollouts of ``n_steps`` steps; else a rollout ends as soon as that many episodes have
        ended, counted over all environments, and ``n_steps`` is the most it may have
    :param surrogate: ``"clip"``; or ``"spo"`` for a quadratic penalty on the ratio in place of clipping, which leaves the
        optimum where clipping would begin (Simple Policy Optimization, arXiv 2401.16025)
    :param dual_clip: the multiple of a negative advantage that the clipped surrogate doesn't fall below, a number > 1 (Ye et
        al. 2020, arXiv 1912.09729); ``None`` for no such bound
    :param kl_rollback: the KL in nats from which on the KL penalty acts on a sample, and then only if the surrogate would lead
        the policy further away (Truly PPO, arXiv 1903.07940); ``None`` for a penalty on all samples
    :param on_nonfinite: what is done where something is NaN or infinite, before it reaches the parameters: ``"raise"`` a
        :class:`NonFiniteError` that names it; ``"skip"`` the minibatch, and count it; ``"restore"`` what was there before the
        update, and go on with the next rollout
    :param max_kl: the exact KL(old || new) that no update may exceed, in nats: if it does, its whole step is halved until it
        doesn't, as in TRPO's line search (arXiv 1502.05477, appendix C), or taken back after ten times; ``None`` for no bound
    :param engine: how gradients are computed: ``"eager"`` by autograd; ``"fused"`` by hand, in the same bits, with rollouts
        free of distribution objects, for SB3's MLP policies on the CPU with Adam (checked at each update); ``"auto"``: fused
        where that is possible and the bits are seen to agree, else eager, with the reason printed at ``verbose=1``
    :raises TypeError: if one of the new arguments is of the wrong type
    :raises ValueError: if one of the new arguments has a value that is not allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        **stable_baselines3.PPO.policy_aliases,
        "ZeroHeadsMlpPolicy": ZeroHeadsPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | VectorEnv[Any, Any, Any] | str,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: ClipRange = 0.2,
        clip_range_vf: float | str | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | str | Schedule = 0.0,
        vf_coef: float | str | Schedule = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        kl_coef: KLCoef = 0.0,
        kl_target: float = 0.01,
        n_value_epochs: int | None = None,
        value_learning_rate: float | str | Schedule | None = None,
        critic_first: bool = False,
        n_episodes: int | None = None,
        surrogate: str = "clip",
        dual_clip: float | None = None,
        kl_rollback: float | None = None,
        on_nonfinite: str = "raise",
        max_kl: float | None = None,
        engine: str = "auto",
    ) -> None:
        self.n_episodes = n_episodes
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            kl_coef=kl_coef,
            kl_target=kl_target,
            n_value_epochs=n_value_epochs,
            value_learning_rate=value_learning_rate,
            critic_first=critic_first,
            surrogate=surrogate,
            dual_clip=dual_clip,
            kl_rollback=kl_rollback,
            on_nonfinite=on_nonfinite,
            max_kl=max_kl,
            engine=engine,
            _init_setup_model=_init_setup_model,
        )

    def _read_arguments(self) -> None:
        super()._read_arguments()
        if self.n_episodes is not None:
            check_positive_int("n_episodes", self.n_episodes)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """SB3's, or its lean equivalent where the engine isn't ``"eager"`` and all it has to do is known."""
        self._follow_changes()  # of `n_episodes`
        lengthen(rollout_buffer)
        lean_policy = self._engine_choice.lean_policy(self, rollout_buffer)
        if lean_policy is None and self.n_episodes is None and not resets_in_next_step(env) and not self._ranks.several:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self._ranks.arrive()
        with self._naming_culprits():
            while goes_on := collect_rollouts(self, env, callback, rollout_buffer, n_rollout_steps, lean_policy):
                if rollout_buffer.buffer_size > 0:
                    break
                lengthen(rollout_buffer)  # it had nothing but resets
        return self._after_rollout(goes_on)

    def learn(
        self: SelfPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPO:
        """
        SB3's.

        :raises ValueError: if ``engine`` is ``"fused"`` and that isn't possible
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


class PPOKL(PPO):
    """
    :class:`PPO` with other defaults: no clipping, adaptive KL penalty (``clip_range=None, kl_coef="auto"``).

    Parameters are those of :class:`PPO`, in its order.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | VectorEnv[Any, Any, Any] | str,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: ClipRange = None,
        *args: Any,
        kl_coef: KLCoef = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps,
            batch_size,
            n_epochs,
            gamma,
            gae_lambda,
            clip_range,
            *args,
            kl_coef=kl_coef,
            **kwargs,
        )

    def learn(
        self: SelfPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOKL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPO:
        """SB3's."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
