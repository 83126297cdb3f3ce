"""PPO with a clipped surrogate, a fixed or an adaptive KL penalty, both or neither, as a drop-in for SB3's PPO."""

import io
import pathlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar

import stable_baselines3
import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.arguments import (
    check_bool,
    check_choice,
    check_coefficient,
    check_finite,
    check_positive,
    check_positive_int,
    check_real,
    current_value,
    is_pair,
    parse_clip_range,
    parse_schedule,
)
from sb3_ppo_variants.callbacks import UpdateHooks
from sb3_ppo_variants.collection import collect_rollouts, renew_advantages
from sb3_ppo_variants.critic import critic_parameters, shares_parameters
from sb3_ppo_variants.engines import ENGINES, Engine, EngineChoice
from sb3_ppo_variants.kl import k3
from sb3_ppo_variants.kl_coef import KLCoef, KLCoefController, KLCoefState, parse_kl_coef
from sb3_ppo_variants.logs import log_update, tensorboard_writers
from sb3_ppo_variants.losses import SURROGATES, Coefficients
from sb3_ppo_variants.policies import ZeroHeadsPolicy
from sb3_ppo_variants.rollout import lengthen
from sb3_ppo_variants.trust_region import TrustRegion, check_exact_kl
from sb3_ppo_variants.update import UpdateStats
from sb3_ppo_variants.vec_env import GymnasiumVecEnv, resets_in_next_step

SelfPPO = TypeVar("SelfPPO", bound="PPO")
T = TypeVar("T")
ClipRange: TypeAlias = "float | str | Schedule | Sequence[float | str | Schedule] | None"
NEW_ARGUMENTS = (
    *("ent_coef", "vf_coef", "kl_coef", "kl_target", "n_value_epochs", "value_learning_rate", "critic_first"),
    *("n_episodes", "surrogate", "dual_clip", "kl_rollback", "engine"),
)
"""Arguments that SB3's PPO hasn't got, or takes fewer values for."""


class PPO(stable_baselines3.PPO):
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
    clip_range: FloatSchedule | tuple[float | Schedule, float | Schedule] | None  # type: ignore[assignment]
    _kl_coef: FloatSchedule | KLCoefController
    kl_coef_state: KLCoefState | None
    """Beta in the next update, under an adaptive penalty; else ``None``."""
    value_optimizer: th.optim.Optimizer | None
    """The critic's own optimiser, if ``n_value_epochs`` is given; else ``None``."""

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
        engine: str = "auto",
    ) -> None:
        self.kl_coef = kl_coef
        self.kl_target = kl_target
        self.n_value_epochs = n_value_epochs
        self.value_learning_rate = value_learning_rate
        self.critic_first = critic_first
        self.n_episodes = n_episodes
        self.surrogate = surrogate
        self.dual_clip = dual_clip
        self.kl_rollback = kl_rollback
        self.engine = engine
        self.kl_coef_state = None
        self.value_optimizer = None
        self._kl_coef_source = kl_coef
        self._value_optimizer_policy: ActorCriticPolicy | None = None
        self._update_hooks = UpdateHooks()
        self._exact_kl_known = True
        self._engine_choice = EngineChoice()
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # `_wrap_env` takes it
            learning_rate=learning_rate,  # type: ignore[arg-type]  # parsed below
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,  # type: ignore[arg-type]  # parsed below
            clip_range_vf=clip_range_vf,  # type: ignore[arg-type]  # parsed below
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,  # type: ignore[arg-type]  # parsed below
            vf_coef=vf_coef,  # type: ignore[arg-type]  # parsed below
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
            _init_setup_model=False,
        )
        self._read_arguments()
        if _init_setup_model:
            self._setup_model()

    def _read_arguments(self) -> None:
        """Parse strings and check what is new; again after ``load``, which sets attributes without asking."""
        if "clip_range" in vars(self):
            self.clip_range = parse_clip_range(self.clip_range)
        for name in ("learning_rate", "clip_range_vf", "ent_coef", "vf_coef", "value_learning_rate"):
            value = vars(self).get(name)  # a subclass may have made a property of it
            if isinstance(value, str):
                setattr(self, name, parse_schedule(name, value))
        for name in ("ent_coef", "vf_coef"):
            value = vars(self).get(name)
            if callable(value) or isinstance(value, str) or (value is None and name in vars(self)):
                check_coefficient(name, value, check_finite)
        check_positive("kl_target", self.kl_target)
        if self.n_episodes is not None:
            check_positive_int("n_episodes", self.n_episodes)
        check_choice("engine", self.engine, ENGINES)
        self._check_critics_passes()
        self._read_kl_coef()
        self._check_objective()
        self._arguments_read = self._new_arguments()

    def _check_critics_passes(self) -> None:
        if self.n_value_epochs is not None:
            check_positive_int("n_value_epochs", self.n_value_epochs)
        if self.value_learning_rate is not None:
            check_coefficient("value_learning_rate", self.value_learning_rate)
            if self.n_value_epochs is None:
                raise ValueError(
                    f"`value_learning_rate` must be None unless `n_value_epochs` is given, not {self.value_learning_rate!r}"
                )
        if check_bool("critic_first", self.critic_first) and self.n_value_epochs is None:
            raise ValueError("`critic_first` must be False unless `n_value_epochs` is given, not True")

    def _check_objective(self) -> None:
        """Check what is new of the surrogate objective and of the penalty, and that all of it has an effect."""
        clip_range = vars(self).get("clip_range")
        if check_choice("surrogate", self.surrogate, SURROGATES) == "spo":
            if clip_range is None or is_pair(clip_range):
                raise ValueError(f"`clip_range` must be a number > 0 or a schedule for `surrogate='spo'`, not {clip_range!r}")
            check_coefficient("clip_range", clip_range, check_positive)
        if self.dual_clip is not None:
            check_real("dual_clip", self.dual_clip, "None or a number > 1", lambda number: number > 1)
            if clip_range is None or self.surrogate != "clip":
                raise ValueError(f"`dual_clip` must be None unless the surrogate is clipped, not {self.dual_clip!r}")
        if self.kl_rollback is not None:
            check_positive("kl_rollback", self.kl_rollback)
            if not self._may_penalize_kl():
                raise ValueError(f"`kl_rollback` must be None unless `kl_coef` is given, not {self.kl_rollback!r}")

    def _may_penalize_kl(self) -> bool:
        return isinstance(self._kl_coef, KLCoefController) or callable(self.kl_coef) or bool(self.kl_coef)

    def _read_kl_coef(self) -> None:
        """Parse ``kl_coef``; a beta that has been adapted is kept unless it belongs to another rule."""
        self._kl_coef = parse_kl_coef(self.kl_coef)
        if not isinstance(self._kl_coef, KLCoefController):
            self.kl_coef_state = None
        elif self.kl_coef_state is None or parse_kl_coef(self._kl_coef_source) != self._kl_coef:
            self.kl_coef_state = self._kl_coef.init()
        else:
            self.kl_coef_state = KLCoefState(*self.kl_coef_state)  # a saved one comes back as a plain list
        self._kl_coef_source = self.kl_coef

    def _setup_model(self) -> None:
        self._read_arguments()
        clip_range = self.clip_range
        ours = clip_range is None or is_pair(clip_range)
        if ours:
            self.clip_range = 0.0  # type: ignore[assignment]  # SB3 turns it into a schedule
        super()._setup_model()
        if ours:
            self.clip_range = clip_range
        if self._may_penalize_kl():
            check_exact_kl(self.policy, self.rollout_buffer)
        if self.n_value_epochs is None:
            self._drop_value_optimizer()
        else:
            self._setup_value_optimizer()

    def _setup_value_optimizer(self) -> None:
        parameters = critic_parameters(self.policy)
        if shares_parameters(self.policy):
            warnings.warn(
                "`n_value_epochs` with parameters that actor and critic share, such as a features extractor: they are trained "
                "by the policy's loss alone. Pass `policy_kwargs=dict(share_features_extractor=False)` for an extractor of "
                "the critic's own.",
                stacklevel=2,
            )
        self.value_optimizer = self.policy.optimizer_class(
            parameters,
            lr=self._value_learning_rate(),  # type: ignore[call-arg]
            **self.policy.optimizer_kwargs,
        )
        self._value_optimizer_policy = self.policy

    def _new_arguments(self) -> list[Any]:
        return [vars(self).get(name) for name in NEW_ARGUMENTS]

    def _follow_changes(self) -> None:
        """Take over what a callback has assigned to the new arguments since the last update."""
        if any(new is not read for new, read in zip(self._new_arguments(), self._arguments_read, strict=True)):
            self._read_arguments()
        if self.n_value_epochs is None:
            self._drop_value_optimizer()
        elif self._value_optimizer_policy is not self.policy:
            self._setup_value_optimizer()

    def _drop_value_optimizer(self) -> None:
        if self._value_optimizer_policy is not None:  # else it is a subclass's own, if there is one
            self.value_optimizer, self._value_optimizer_policy = None, None

    @staticmethod
    def _wrap_env(env: GymEnv | VectorEnv[Any, Any, Any], verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            if verbose >= 1:
                print("Wrapping the env in a GymnasiumVecEnv.")
            env = GymnasiumVecEnv(env)
        return stable_baselines3.PPO._wrap_env(env, verbose, monitor_wrapper)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # `learn` keeps the callback to itself, and containers don't hand on hooks that they don't know: callbacks with
        # hooks register when they are initialised.
        self._update_hooks = UpdateHooks()
        return super()._init_callback(callback, progress_bar)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """SB3's, or its lean equivalent where the engine isn't ``"eager"`` and all it has to do is known."""
        lengthen(rollout_buffer)
        lean_policy = self._engine_choice.lean_policy(self, rollout_buffer)
        if lean_policy is None and self.n_episodes is None and not resets_in_next_step(env):
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        return collect_rollouts(self, env, callback, rollout_buffer, n_rollout_steps, lean_policy)

    def train(self) -> None:
        """
        One update: ``n_epochs`` passes over the rollout, behind or before them the critic's own, then the adaptation of beta.

        What is computed stands in ``losses.py`` (loss), ``engines/`` (gradient) and ``kl_coef.py`` (beta).
        """
        if self.n_epochs < 1:
            raise ValueError(f"`n_epochs` must be an integer >= 1, not {self.n_epochs!r}")
        self._follow_changes()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        coefs = self._current_coefficients()
        trust_region = self._if_exact_kl_is_known(coefs, partial(self._make_trust_region, coefs))
        watched = bool(self._update_hooks) or bool(tensorboard_writers(self.logger))
        stats = UpdateStats(coefs, trust_region, keep_kls=watched and trust_region is not None)
        self._update_hooks.on_update_start(self.num_timesteps)
        engine = self._engine_choice.engine(self, coefs, trust_region)
        hooked, hooked_between_epochs = map(self._update_hooks.ask, ("_on_minibatch", "_on_epoch_end"))

        try:
            self._train_critic(engine, stats, before_policy=True)
            while stats.epochs_completed < self.n_epochs and not stats.policy_stopped:
                for minibatch in engine.minibatches(self._minibatch_size):
                    stats.add_minibatch(minibatch, engine.forward(minibatch))
                    if not self._within_target_kl(stats):
                        break
                    stats.add(engine.backward())
                    if hooked:
                        engine = self._call_hooks(engine, stats, self._update_hooks.on_minibatch)
                    if stats.policy_stopped:
                        break  # type: ignore[unreachable]  # hooks set it
                    engine.step()
                    stats.gradient_steps += 1
                else:
                    stats.epochs_completed += 1
                    if hooked_between_epochs:
                        engine = self._call_hooks(engine, stats, self._update_hooks.on_epoch_end)
                self._n_updates += 1
            self._train_critic(engine, stats, before_policy=False)
        finally:
            engine.publish()

        if trust_region is not None:
            stats.displacement = self._if_exact_kl_is_known(coefs, trust_region.measure)
        log_update(self, stats)
        self._adapt_kl_coef(stats)
        self._update_hooks.on_update_end(stats)

    def _call_hooks(self, engine: Engine, stats: UpdateStats, hooks: Callable[[UpdateStats], Any]) -> Engine:
        """
        Call hooks between two steps, which see and may change the policy and its optimiser.

        :return: the engine that goes on
        """
        engine.publish()
        stats.minibatch.gather()
        try:
            hooks(stats)
        finally:
            obstacle = engine.fetch()
        return engine if obstacle is None else self._engine_choice.engine_after(engine, obstacle, self)

    def _train_critic(self, engine: Engine, stats: UpdateStats, before_policy: bool) -> None:
        """The critic's passes of its own; in a joint update those that are left if the policy alone was stopped."""
        if stats.critic_stopped or before_policy != self.critic_first:
            return
        vf_coef, optimizer, n_passes = stats.coefs.vf_coef, self.policy.optimizer, self.n_epochs - stats.epochs_completed
        if vf_coef is None:
            assert self.value_optimizer is not None
            assert self.n_value_epochs is not None
            vf_coef, optimizer, n_passes = 1.0, self.value_optimizer, self.n_value_epochs
        for _ in range(n_passes):
            for minibatch in engine.minibatches(self._minibatch_size):
                stats.add(engine.critic_forward(minibatch, vf_coef))
                engine.backward()
                engine.step(optimizer)
        if before_policy:
            engine.publish()
            renew_advantages(self)

    def _within_target_kl(self, stats: UpdateStats) -> bool:
        """
        SB3's early stop, before the step of the minibatch that trips it: its estimate, its factor, its message.

        In a joint update it stops the critic too, as in SB3; the critic's own passes go on, as in Spinning Up.
        """
        if self.target_kl is None:
            return True
        approx_kl = k3(stats.log_ratio).mean().cpu().numpy()
        if not approx_kl > 1.5 * self.target_kl:
            return True
        if self.verbose >= 1:
            print(f"Early stopping at step {stats.epochs_completed} due to reaching max kl: {approx_kl:.2f}")
        stats.stop_policy_phase()
        return False

    @property
    def _minibatch_size(self) -> int:
        """``None`` is the whole rollout, as in SB3's buffers."""
        n_samples = self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        return n_samples if self.batch_size is None else self.batch_size

    def _update_learning_rates(self) -> None:
        self._update_learning_rate(self.policy.optimizer)
        if self.n_value_epochs is not None:
            assert self.value_optimizer is not None
            update_learning_rate(self.value_optimizer, self._value_learning_rate())
            self.logger.record("train/value_learning_rate", self._value_learning_rate())

    def _value_learning_rate(self) -> float:
        progress_remaining = self._current_progress_remaining
        if self.value_learning_rate is None:
            return self.lr_schedule(progress_remaining)
        return float(current_value("value_learning_rate", self.value_learning_rate, progress_remaining))

    def _current_coefficients(self) -> Coefficients:
        """
        The coefficients in effect in this update.

        :raises TypeError: if a schedule returns no number
        :raises ValueError: if a schedule returns what is not allowed
        """
        progress_remaining = self._current_progress_remaining
        hinge_coef, hinge_kl = 0.0, 0.0
        if isinstance(self._kl_coef, KLCoefController):
            assert self.kl_coef_state is not None
            kl_coef = self.kl_coef_state.kl_coef
            hinge_coef, hinge_kl = self._kl_coef.hinge_coef, self._kl_coef.hinge_threshold * self.kl_target
        else:
            kl_coef = current_value("kl_coef", self._kl_coef, progress_remaining)
        return Coefficients(
            clip_range=self._current_clip_range(),
            clip_range_vf=None if self.clip_range_vf is None else self.clip_range_vf(progress_remaining),  # type: ignore[operator]
            normalize_advantage=self.normalize_advantage,
            ent_coef=current_value("ent_coef", self.ent_coef, progress_remaining, check_finite),
            vf_coef=None
            if self.n_value_epochs is not None
            else current_value("vf_coef", self.vf_coef, progress_remaining, check_finite),
            kl_coef=kl_coef,
            hinge_coef=hinge_coef,
            hinge_kl=hinge_kl,
            surrogate=self.surrogate,
            dual_clip=self.dual_clip,
            kl_rollback=self.kl_rollback,
        )

    def _current_clip_range(self) -> tuple[float, float] | None:
        progress_remaining = self._current_progress_remaining
        if self.clip_range is None:
            return None
        if isinstance(self.clip_range, (tuple, list)):
            low, high = self.clip_range
            names = ("clip_range[0]", "clip_range[1]")
            return current_value(names[0], low, progress_remaining), current_value(names[1], high, progress_remaining)
        return (self.clip_range(progress_remaining),) * 2

    def _make_trust_region(self, coefs: Coefficients) -> TrustRegion:
        if coefs.penalizes_kl:
            check_exact_kl(self.policy, self.rollout_buffer)
        return TrustRegion(self.policy, self.rollout_buffer, self.action_space, self._minibatch_size)

    def _if_exact_kl_is_known(self, coefs: Coefficients, compute: Callable[[], T]) -> T | None:
        """
        What ``compute`` returns; without a KL penalty ``None``, and one warning, where it fails.

        A policy or a buffer that SB3 trains with must train here too, even if it can't tell its exact KL.
        """
        if coefs.penalizes_kl:
            return compute()
        if not self._exact_kl_known:
            return None
        try:
            return compute()
        except Exception as error:
            self._exact_kl_known = False
            warnings.warn(f"the exact KL is not logged: {error}", stacklevel=3)
            return None

    def _adapt_kl_coef(self, stats: UpdateStats) -> None:
        if isinstance(self._kl_coef, KLCoefController):
            assert self.kl_coef_state is not None
            assert stats.displacement is not None
            kl = stats.displacement.kl.mean().item()
            self.kl_coef_state = self._kl_coef.update(self.kl_coef_state, kl=kl, kl_target=self.kl_target)

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
        self._engine_choice.check(self)
        self._exact_kl_known = True  # what has failed before may have been mended since
        outer = self._update_hooks  # of the `learn` whose callback may have called this one
        try:
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        finally:
            self._update_hooks = outer

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model in training is no part of that training, and callbacks can't be copied.
        return {**self.__dict__, "_update_hooks": UpdateHooks()}

    def _excluded_save_params(self) -> list[str]:
        # Whatever is left must be readable without this package, for SB3's PPO to load what was trained in clip mode.
        own = [
            "_kl_coef",
            "_arguments_read",
            "_update_hooks",
            "_exact_kl_known",
            "_engine_choice",
            "_value_optimizer_policy",
        ]
        return [*super()._excluded_save_params(), *own, *self._own_optimizers()]

    def _own_optimizers(self) -> list[str]:
        return ["value_optimizer"] if self._value_optimizer_policy is not None else []

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, *self._own_optimizers()], tensors

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        SB3's, except that the critic's own optimiser may be missing (it starts anew) or superfluous (it is left out).

        So a model that was saved with a joint update can go on with passes for the critic, and the other way round.
        """
        if isinstance(load_path_or_dict, dict):
            params = dict(load_path_or_dict)
        else:
            params = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
        if self._value_optimizer_policy is not None:
            assert self.value_optimizer is not None
            params.setdefault("value_optimizer", self.value_optimizer.state_dict())  # type: ignore[arg-type]
        elif "value_optimizer" not in self._get_torch_save_params()[0]:
            params.pop("value_optimizer", None)
        super().set_parameters(params, exact_match=exact_match, device=device)

    @classmethod
    def load(
        cls: type[SelfPPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | VectorEnv[Any, Any, Any] | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfPPO:
        """
        SB3's, for files of SB3's PPO too.

        What is not among ``kwargs`` is as it was saved: :class:`PPOKL` keeps the ``clip_range`` of SB3's PPO, too. An
        adapted beta is kept unless ``kl_coef`` is given and differs from the saved one.
        """
        if "n_value_epochs" in kwargs and kwargs["n_value_epochs"] is None:
            kwargs = {"value_learning_rate": None, "critic_first": False, **kwargs}
        settings = (device, custom_objects, print_system_info, force_reset)
        return super().load(path, env, *settings, **kwargs)  # type: ignore[arg-type]  # `_wrap_env` takes it


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
