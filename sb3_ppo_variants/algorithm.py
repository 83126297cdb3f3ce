"""What all algorithms of this package share: the update, its arguments, and what is saved of them."""

import inspect
import io
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants import safe_file
from sb3_ppo_variants.agreement import check_agreement, check_equal, check_supported
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
from sb3_ppo_variants.blame import add_note, stepped_environment
from sb3_ppo_variants.callbacks import StepsOfAllRanks, UpdateHooks, on_rank
from sb3_ppo_variants.collection import renew_advantages
from sb3_ppo_variants.critic import critic_parameters, shares_parameters
from sb3_ppo_variants.distributed import ALONE, Ranks, draw_apart, to_bytes, written_by_all
from sb3_ppo_variants.engines import ENGINES, Engine, EngineChoice
from sb3_ppo_variants.episode_statistics import Episodes
from sb3_ppo_variants.kl import k3
from sb3_ppo_variants.kl_coef import KLCoef, KLCoefController, KLCoefState, parse_kl_coef
from sb3_ppo_variants.logs import log_update, tensorboard_writers
from sb3_ppo_variants.losses import SURROGATES, Coefficients
from sb3_ppo_variants.nonfinite import (
    ON_NONFINITE,
    NonFiniteError,
    check_parameters,
    is_torchs_refusal,
    nonfinite_in_rollout,
    nonfinite_observation,
)
from sb3_ppo_variants.normalization import SharedStatistics
from sb3_ppo_variants.resume import check_algorithm, go_on, model_of, read_by_first
from sb3_ppo_variants.safe_checks import LAST_SEEN, UntrustedFileError
from sb3_ppo_variants.transaction import Attempt, Transaction, checked
from sb3_ppo_variants.trust_region import TrustRegion, check_exact_kl
from sb3_ppo_variants.update import UpdateStats
from sb3_ppo_variants.vec_env import GymnasiumVecEnv, Infos, resets_in_next_step

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="PPOBase")
T = TypeVar("T")
ClipRange: TypeAlias = "float | str | Schedule | Sequence[float | str | Schedule] | None"
NEW_ARGUMENTS = (
    *("ent_coef", "vf_coef", "kl_coef", "kl_target", "n_value_epochs", "value_learning_rate", "critic_first"),
    *("n_episodes", "surrogate", "dual_clip", "kl_rollback", "on_nonfinite", "max_kl", "engine"),
)
"""Arguments that SB3's PPO hasn't got, or takes fewer values for."""
SET_UP_LATER = ("observation_space", "action_space", "n_envs", "lr_schedule")
"""Attributes that a model has only after it was set up."""


class PPOBase(OnPolicyAlgorithm):
    """
    To be inherited before an algorithm such as SB3's PPO, whose rollouts it takes and whose update it replaces.

    Parameters are that algorithm's, and those of :class:`~sb3_ppo_variants.ppo.PPO` that are keyword-only.
    """

    clip_range: Any
    clip_range_vf: Any
    normalize_advantage: bool
    batch_size: Any
    n_epochs: int
    target_kl: float | None
    _kl_coef: FloatSchedule | KLCoefController
    kl_coef_state: KLCoefState | None
    """Beta in the next update, under an adaptive penalty; else ``None``."""
    value_optimizer: th.optim.Optimizer | None
    """The critic's own optimiser, if ``n_value_epochs`` is given; else ``None``."""

    def __init__(
        self,
        *args: Any,
        kl_coef: KLCoef = 0.0,
        kl_target: float = 0.01,
        n_value_epochs: int | None = None,
        value_learning_rate: float | str | Schedule | None = None,
        critic_first: bool = False,
        surrogate: str = "clip",
        dual_clip: float | None = None,
        kl_rollback: float | None = None,
        on_nonfinite: str = "raise",
        max_kl: float | None = None,
        engine: str = "auto",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        self.kl_coef = kl_coef
        self.kl_target = kl_target
        self.n_value_epochs = n_value_epochs
        self.value_learning_rate = value_learning_rate
        self.critic_first = critic_first
        self.surrogate = surrogate
        self.dual_clip = dual_clip
        self.kl_rollback = kl_rollback
        self.on_nonfinite = on_nonfinite
        self.max_kl = max_kl
        self.engine = engine
        self.kl_coef_state = None
        self.value_optimizer = None
        self._kl_coef_source = kl_coef
        self._value_optimizer_policy: ActorCriticPolicy | None = None
        self._update_hooks = UpdateHooks()
        self._exact_kl_known = True
        self._engine_choice = EngineChoice()
        self._learn_arguments: dict[str, Any] = {}
        self._iteration = 0
        self._is_learning = False
        self._kl_per_epoch: list[tuple[float, int]] = []
        self._callback: BaseCallback | None = None
        self._ranks = Ranks.present()
        self._ranks.choose_device()
        self._statistics: SharedStatistics | None = None
        self._episodes = Episodes()
        self._rank_of_seeds = self._ranks.rank
        kwargs["_init_setup_model"] = False
        super().__init__(*args, **kwargs)
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
        check_choice("engine", self.engine, ENGINES)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if self.max_kl is not None:
            check_positive("max_kl", self.max_kl)
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
                raise ValueError(
                    f"`clip_range` must be a number > 0, or a schedule that stays above 0, for `surrogate='spo'`, "
                    f"not {clip_range!r}"
                )
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

    def _read_of_kl_coef(self) -> dict[str, Any]:
        """What ``kl_coef`` has been read to."""
        return {name: vars(self)[name] for name in ("_kl_coef", "kl_coef_state", "_kl_coef_source")}

    def _setup_model(self) -> None:
        self._read_arguments()
        clip_range = self.clip_range
        ours = clip_range is None or is_pair(clip_range)
        if ours:
            self.clip_range = 0.0  # SB3 turns it into a schedule
        super()._setup_model()
        if ours:
            self.clip_range = clip_range
        if self._may_penalize_kl() or self.max_kl is not None:
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
            lr=max(self._value_learning_rate(), 0.0),  # type: ignore[call-arg]  # SB3's schedules may end below 0
            **self.policy.optimizer_kwargs,
        )
        self._value_optimizer_policy = self.policy

    def _new_arguments(self) -> list[Any]:
        return [vars(self).get(name) for name in NEW_ARGUMENTS]

    def _follow_changes(self) -> None:
        """Take over what a callback has assigned to the new arguments since the last update."""
        if any(new is not read for new, read in zip(self._new_arguments(), self._arguments_read, strict=True)):
            before = {**dict(zip(NEW_ARGUMENTS, self._arguments_read, strict=True)), **self._read_of_kl_coef()}
            known = {name: value for name, value in before.items() if name in vars(self)}
            try:
                self._read_arguments()
                if self._ranks.several:
                    check_supported(self)
            except (TypeError, ValueError):
                vars(self).update(known)  # so that what is saved now can be loaded
                raise
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
        space = getattr(env, "observation_space", None)
        if isinstance(space, spaces.Space) and space.shape is None and not isinstance(space, (spaces.Dict, spaces.Tuple)):
            raise ValueError(f"`env` must have observations that are arrays, or dicts of these, not {space}")
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's; environments have seeds as if those of all ranks stood in one vector environment."""
        self._rank_of_seeds = self._ranks.rank
        super().set_random_seed(None if seed is None else seed + self._ranks.rank * self.n_envs)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._ranks = Ranks.present()
        if not self._ranks.several:
            return super()._setup_learn(*args, **kwargs)
        self._join_ranks(*args, **kwargs)
        tensorboard_log = self.tensorboard_log
        if not self._ranks.is_first:
            self.verbose, self.tensorboard_log = 0, None
        try:
            return super()._setup_learn(*args, **kwargs)
        finally:
            self.tensorboard_log = tensorboard_log

    def _join_ranks(self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any) -> None:
        """
        All ranks have the same settings and parameters, and environments and random numbers of their own.

        :raises RanksDifferError: if their settings differ
        :raises ValueError: if something is asked for that several ranks can't do together
        """
        ranks = self._ranks
        ranks.connect()
        check_agreement(ranks, self, self._learn_arguments, callback)
        check_supported(self)
        if self.seed is None and self._last_obs is None:
            assert self.env is not None
            draw_apart(ranks, self.env)
        elif self.seed is not None and self._rank_of_seeds != ranks.rank:  # the group was made behind the model
            self.set_random_seed(self.seed)
        self._statistics, self._episodes = SharedStatistics(self), Episodes()
        self._statistics.take_firsts(ranks)
        parameters = ranks.broadcast(to_bytes(self.get_parameters()) if ranks.is_first else None)
        if not ranks.is_first:
            # An optimiser's settings may be of any type; they come from this very job.
            of_first = th.load(io.BytesIO(parameters), map_location=self.device, weights_only=False)
            self.set_parameters(of_first, device=self.device)
            for logger in filter(None, [getattr(self, "_logger", None)]):
                logger.output_formats = []

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # `learn` keeps the callback to itself, and containers don't hand on hooks that they don't know: callbacks with
        # hooks register when they are initialised.
        self._update_hooks = UpdateHooks()
        if self._ranks.several:
            callback, progress_bar = on_rank(self._ranks, callback, progress_bar), False
        self._callback = super()._init_callback(callback, progress_bar)
        self._update_hooks.on_ready()
        return self._callback

    def _update_info_buffer(self, infos: Any, dones: np.ndarray | None = None) -> None:
        # Only of ended episodes there is something to tell: no need to look at thousands of environments at each step.
        if isinstance(infos, Infos) and dones is not None:
            infos, dones = [infos[index] for index in infos.ended], np.asarray(dones)[infos.ended]
        super()._update_info_buffer(infos, dones)
        if self._ranks.several:
            self._episodes.add(self.rollout_buffer.pos, infos, dones)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> bool:
        """
        That of the algorithm.

        :raises NonFiniteError: if the policy can't act on an observation, as it is NaN or infinite
        :raises ValueError: if the environments reset in a step of their own, which would be learned from
        """
        if resets_in_next_step(env):
            raise ValueError(
                f"`env` must reset in the same step for {type(self).__name__}: make it with "
                "`autoreset_mode=AutoresetMode.SAME_STEP`"
            )
        self._ranks.arrive()
        of_all: Any = StepsOfAllRanks(callback) if self._ranks.several else callback
        with self._naming_culprits():
            goes_on = super().collect_rollouts(env, of_all, *args, **kwargs)
        return self._after_rollout(goes_on)

    def _after_rollout(self, goes_on: bool) -> bool:
        """What ranks have seen is put together; if training ends on one of them, it does on all."""
        if not self._ranks.several:
            return goes_on
        assert self._statistics is not None
        self._statistics.merge(self._ranks)
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        self._episodes.share(self._ranks, self.ep_info_buffer, self.ep_success_buffer)
        self.num_timesteps = max(self._ranks.gather(self.num_timesteps))  # fewer where training has ended on the way
        return not self._ranks.any(not goes_on)

    @contextmanager
    def _naming_culprits(self) -> Iterator[None]:
        """What goes wrong in a rollout is said to be of which environment, in which step."""
        try:
            yield
        except Exception as error:
            place = f"step {self.rollout_buffer.pos} of the rollout before update {self._iteration + 1}"
            stepped = stepped_environment(error)
            if stepped is not None:
                add_note(error, f"in the step of environment {stepped}, at {place}")
            if not is_torchs_refusal(error):
                raise
            culprit = nonfinite_observation(self._last_obs) or "what the policy makes of finite observations isn't finite"
            raise NonFiniteError(f"{culprit} at {place}: {error}") from error

    def train(self) -> None:
        """
        One update: ``n_epochs`` passes over the rollout, behind or before them the critic's own, then the adaptation of beta.

        What is computed stands in ``losses.py`` (loss), ``engines/`` (gradient) and ``kl_coef.py`` (beta).

        :raises NonFiniteError: if something is NaN or infinite, and ``on_nonfinite`` is ``"raise"``
        """
        if self.n_epochs < 1:
            raise ValueError(f"`n_epochs` must be an integer >= 1, not {self.n_epochs!r}")
        self._iteration += 1
        self._ranks.arrive()
        self._follow_changes()
        if not self._rollout_is_finite():
            self._update_hooks.on_update_settled()
            return
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        coefs = self._current_coefficients()
        trust_region = self._if_exact_kl_is_known(coefs, partial(self._make_trust_region, coefs))
        watched = self._ranks.any(bool(self._update_hooks) or bool(tensorboard_writers(self.logger)))
        stats = UpdateStats(coefs, trust_region, keep_kls=watched and trust_region is not None)
        self._update_hooks.on_update_start(self.num_timesteps)
        engine = self._engine_choice.engine(self, coefs, trust_region)

        with Transaction(self) as transaction:
            attempt = Attempt(self, stats)
            try:
                self._train_critic(engine, stats, before_policy=True)
                while stats.epochs_completed < self.n_epochs and not stats.policy_stopped:
                    for number, minibatch in enumerate(engine.minibatches(self._minibatch_size)):
                        with attempt.at("epoch", stats.epochs_completed, number):
                            stats.add_minibatch(minibatch, engine.forward(minibatch))
                            if not self._within_target_kl(stats):
                                break
                            stats.add(checked(engine.backward()))
                        if attempt.failed:
                            continue
                        engine = self._call_hooks(engine, stats, "_on_minibatch")
                        if stats.policy_stopped:
                            break  # type: ignore[unreachable]  # hooks set it
                        engine.step()
                        stats.gradient_steps += 1
                    else:
                        stats.epochs_completed += 1
                        engine = self._call_hooks(engine, stats, "_on_epoch_end")
                    self._n_updates += 1
                if stats.policy_stopped:
                    engine = self._call_hooks(engine, stats, "_on_policy_stopped")
                self._train_critic(engine, stats, before_policy=False)
            finally:
                engine.publish()
            check_parameters(self.policy)
            check_equal(self._ranks, self.policy)
            self._measure_displacement(stats, trust_region, transaction)

        stats.restored = transaction.undone
        log_update(self, stats)
        self._adapt_kl_coef(stats)
        self._update_hooks.on_update_end(stats)

    def _rollout_is_finite(self) -> bool:
        """
        Whether there is an update to be made: not of a rollout with NaN, which is left out if updates are to be restored.

        Where single minibatches are to be skipped, they show themselves by their gradients.
        """
        if self.on_nonfinite == "skip":
            return True
        culprits = self._ranks.gather(nonfinite_in_rollout(self.rollout_buffer))
        rank, culprit = next(((rank, each) for rank, each in enumerate(culprits) if each is not None), (0, None))
        if culprit is None:
            return True
        if self._ranks.several:
            culprit += f" on rank {rank}"
        if self.on_nonfinite == "raise":
            raise NonFiniteError(f"{culprit} in update {self._iteration}")
        # VecNormalize, for one, makes NaN of all that comes after it: nothing would be learned any more.
        warnings.warn(f"update {self._iteration} is left out: {culprit}", stacklevel=3)
        self.logger.record("train/restored", 1)
        self._kl_per_epoch = []
        return False

    def _measure_displacement(self, stats: UpdateStats, trust_region: TrustRegion | None, transaction: Transaction) -> None:
        """How far the update has moved the policy, and no further than it may."""
        if trust_region is None:
            return
        displacement = self._if_exact_kl_is_known(stats.coefs, trust_region.measure)
        if displacement is None:
            return
        kl: float = self._ranks.mean(displacement.kl.mean().item())
        if not math.isfinite(kl):
            raise NonFiniteError(f"the KL divergence is {kl} after update {self._iteration}")
        stats.displacement = displacement
        if stats.whole_step_kl is None:
            stats.whole_step_kl = kl
        if self.max_kl is not None:
            stats.displacement, stats.n_halvings = transaction.backtrack(displacement, trust_region.measure, self.max_kl)

    def _call_hooks(self, engine: Engine, stats: UpdateStats, hook: str) -> Engine:
        """
        Call a hook between two steps, which sees and may change the policy and its optimiser, where anybody has written it.

        :return: the engine that goes on
        """
        if hook not in self._update_hooks.written:
            return engine
        engine.publish()
        stats.minibatch.gather()
        try:
            self._update_hooks.call(hook, stats)
        finally:
            obstacle = engine.fetch()
        if self._ranks.several:
            obstacle = self._agree(stats, obstacle)
        return engine if obstacle is None else self._engine_choice.engine_after(engine, obstacle, self)

    def _agree(self, stats: UpdateStats, obstacle: str | None) -> str | None:
        """What a callback has ended on one rank ends on all, and where one can't go on by its engine none does."""
        seen = self._ranks.gather((stats.policy_stopped, stats.critic_stopped, obstacle))
        stats.policy_stopped = any(policy_stopped for policy_stopped, _, _ in seen)
        stats.critic_stopped = any(critic_stopped for _, critic_stopped, _ in seen)
        return next((why for _, _, why in seen if why is not None), None)

    def _train_critic(self, engine: Engine, stats: UpdateStats, before_policy: bool) -> None:
        """The critic's passes of its own; in a joint update those that are left if the policy alone was stopped."""
        if stats.critic_stopped or before_policy != self.critic_first:
            return
        vf_coef, optimizer, n_passes = stats.coefs.vf_coef, self.policy.optimizer, self.n_epochs - stats.epochs_completed
        if vf_coef is None:
            assert self.value_optimizer is not None
            assert self.n_value_epochs is not None
            vf_coef, optimizer, n_passes = 1.0, self.value_optimizer, self.n_value_epochs
        attempt = Attempt(self, stats)
        for n_pass in range(n_passes):
            for number, minibatch in enumerate(engine.minibatches(self._minibatch_size)):
                with attempt.at("the critic's pass", n_pass, number):
                    metrics = engine.critic_forward(minibatch, vf_coef)
                    checked(engine.backward())
                    stats.add(metrics)
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
        approx_kl = self._ranks.mean(k3(stats.log_ratio).mean().cpu().numpy())
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
        rates = [float(group["lr"]) for group in self.policy.optimizer.param_groups]
        if not all(map(math.isfinite, rates)):
            raise NonFiniteError(f"`learning_rate` must be finite, not {rates[0]} as in update {self._iteration}")
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
            clip_range_vf=None if self.clip_range_vf is None else self.clip_range_vf(progress_remaining),
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
        if self.surrogate == "spo":
            return (current_value("clip_range", self.clip_range, progress_remaining, check_positive),) * 2
        return (self.clip_range(progress_remaining),) * 2

    def _make_trust_region(self, coefs: Coefficients) -> TrustRegion:
        if coefs.penalizes_kl or self.max_kl is not None:
            check_exact_kl(self.policy, self.rollout_buffer)
        return TrustRegion(self.policy, self.rollout_buffer, self.action_space, self._minibatch_size)

    def _if_exact_kl_is_known(self, coefs: Coefficients, compute: Callable[[], T]) -> T | None:
        """
        What ``compute`` returns; without a KL penalty ``None``, and one warning, where it fails.

        A policy or a buffer that SB3 trains with must train here too, even if it can't tell its exact KL.
        """
        if coefs.penalizes_kl or self.max_kl is not None:
            return compute()
        if not self._exact_kl_known:
            return None
        result = None
        try:
            result = compute()
        except Exception as error:
            if is_torchs_refusal(error):
                raise
            self._exact_kl_known = False
            warnings.warn(f"the exact KL is not logged: {error}", stacklevel=3)
        self._exact_kl_known = not self._ranks.any(not self._exact_kl_known)
        return result if self._exact_kl_known else None

    def _adapt_kl_coef(self, stats: UpdateStats) -> None:
        """From the KL of the whole step: what takes part of it back is no reason for a smaller penalty."""
        moved = stats.gradient_steps > 0 and not stats.restored
        if isinstance(self._kl_coef, KLCoefController) and moved:
            assert self.kl_coef_state is not None
            assert stats.whole_step_kl is not None
            self.kl_coef_state = self._kl_coef.update(self.kl_coef_state, kl=stats.whole_step_kl, kl_target=self.kl_target)

    def learn(self: SelfAlgorithm, *args: Any, **kwargs: Any) -> SelfAlgorithm:
        """
        That of the algorithm.

        :raises ValueError: if ``engine`` is ``"fused"`` and that isn't possible
        """
        arguments = inspect.signature(super().learn).bind(*args, **kwargs)
        arguments.apply_defaults()
        with self._left_in_order():
            self._learn_arguments = {name: value for name, value in arguments.arguments.items() if name != "callback"}
            self._iteration = 0
            return super().learn(*args, **kwargs)

    @contextmanager
    def _left_in_order(self) -> Iterator[None]:
        """Whatever ends training: logs are on the disk, and callbacks have put back what they have changed."""
        self._engine_choice.check(self)
        self._exact_kl_known = True  # what has failed before may have been mended since
        names = ("_update_hooks", "_callback", "_learn_arguments", "_iteration", "_is_learning")
        verbose = self.verbose  # which all ranks but the first do without
        outer = {name: vars(self)[name] for name in names}  # the `learn` whose callback may have called this one
        ended, self._is_learning = False, True
        try:
            yield
            ended = True
        finally:
            for writer in tensorboard_writers(getattr(self, "_logger", None)):
                writer.flush()
            hooks, self._is_learning, self.verbose = self._update_hooks, False, verbose
            if outer["_is_learning"]:
                vars(self).update(outer)
            self._update_hooks = outer["_update_hooks"]
            if hooks is not self._update_hooks:
                hooks.on_leaving(ended)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model in training is no part of that training, and callbacks can't be copied.
        alone = {"_ranks": ALONE, "_statistics": None}
        return {**self.__dict__, "_update_hooks": UpdateHooks(), "_callback": None, "_is_learning": False, **alone}

    def _excluded_save_params(self) -> list[str]:
        # Whatever is left must be readable without this package, for SB3's PPO to load what was trained in clip mode.
        own = [
            "_kl_coef",
            "_arguments_read",
            "_update_hooks",
            "_exact_kl_known",
            "_engine_choice",
            "_learn_arguments",
            "_iteration",
            "_callback",
            "_is_learning",
            "_ranks",
            "_statistics",
            "_episodes",
            "_rank_of_seeds",
            "_kl_per_epoch",
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
        cls: type[SelfAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | VectorEnv[Any, Any, Any] | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        safe: bool = False,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """
        SB3's, for files of SB3's PPO too, and checkpoints of a :class:`ResumableCheckpointCallback`.

        What is not among ``kwargs`` is as it was saved: :class:`PPOKL` keeps the ``clip_range`` of SB3's PPO, too. An
        adapted beta is kept unless ``kl_coef`` is given and differs from the saved one.

        :param safe: for files from others: whether to execute no code from the file, which has to be saved with
            ``safe=True``, or to have all that SB3 has pickled given in ``custom_objects``. What a training can't go on
            with is refused then, such as NaN, and ``tensorboard_log`` isn't taken from it
        :raises UntrustedFileError: if a file can't be loaded so
        """
        if "n_value_epochs" in kwargs and kwargs["n_value_epochs"] is None:
            kwargs = {"value_learning_rate": None, "critic_first": False, **kwargs}
        if not safe:
            path = model_of(path) or path
        if not safe and not safe_file.is_plain(path):
            settings = (device, custom_objects, print_system_info, force_reset)
            return super().load(path, env, *settings, **kwargs)  # type: ignore[arg-type]  # `_wrap_env` takes it

        blank: Any = cls(next(iter(cls.policy_aliases)), None, _init_setup_model=False)
        state_dicts, tensors = blank._get_torch_save_params()
        attributes = {*vars(blank), *SET_UP_LATER} - set(blank._excluded_save_params())
        own = custom_objects or {}
        policies = cls.policy_aliases.values()
        state_dicts = [*state_dicts, "value_optimizer"]
        rest, objects = safe_file.read(path, state_dicts, tensors, attributes, policies, own, kwargs.keys(), trusted=not safe)
        settings = (device, objects, print_system_info, force_reset)
        if not safe:
            return super().load(rest, env, *settings, **kwargs)  # type: ignore[arg-type]
        objects["tensorboard_log"] = own.get("tensorboard_log")  # a file from others isn't to say where files are written
        try:
            model = super().load(rest, env, *settings, **kwargs)  # type: ignore[arg-type]
            safe_file.check_loaded(model.policy, filter(None, (model.policy.optimizer, model.value_optimizer)))
            return model
        except Exception as error:
            reason = f"its parts don't fit together, or not with the arguments: {error}"
            raise UntrustedFileError(f"{safe_file.name_of(path)} can't be loaded safely, as {reason}") from error

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        *,
        safe: bool = False,
    ) -> None:
        """
        SB3's.

        :param safe: whether to write plain data and tensors only, which ``load(..., safe=True)`` reads without executing code;
            this package reads it, SB3 doesn't
        :raises ValueError: if that isn't possible; the message names the attribute
        """
        if self._ranks.several and isinstance(path, (str, pathlib.Path)):
            with written_by_all(path, self._ranks) as own:  # a script that is started on all ranks saves on all of them
                self._save(own, exclude, include, safe)
        else:
            self._save(path, exclude, include, safe)

    def _save(self, path: Any, exclude: Iterable[str] | None, include: Iterable[str] | None, safe: bool) -> None:
        if not safe:
            super().save(path, exclude, include)
            return
        state_dicts, tensors = self._get_torch_save_params()
        apart = {*self._excluded_save_params(), *LAST_SEEN, *(name.partition(".")[0] for name in [*state_dicts, *tensors])}
        asked, wanted = set(exclude or ()), set(include or ())
        derived = {name for name, source in safe_file.DERIVED.items() if source in asked}
        left_out = (apart | asked | derived) - wanted
        data = {name: safe_file.to_plain(name, value) for name, value in vars(self).items() if name not in left_out}
        data[safe_file.LEFT_OUT] = safe_file.left_out(sorted(asked - apart - wanted), vars(self))
        variables = {name: recursive_getattr(self, name) for name in tensors}
        save_to_zip_file(path, data, self.get_parameters(), variables)

    @classmethod
    def resume(
        cls: type[SelfAlgorithm],
        path: str | pathlib.Path,
        env: GymEnv | VectorEnv[Any, Any, Any] | str,
        callback: MaybeCallback = None,
        device: th.device | str = "auto",
        progress_bar: bool = False,
    ) -> SelfAlgorithm:
        """
        Go on with a training that a :class:`ResumableCheckpointCallback` has saved, to its end, to the bits of one that was
        never interrupted.

        :param path: a checkpoint, or the folder of the checkpoints, of which the newest whole one is taken
        :param env: environments that are built as those before, with the same wrappers; or an id, as before
        :param callback: callbacks of the same kinds as before, which go on with their own state
        :param device: as in ``load``
        :param progress_bar: as in ``learn``
        :return: the trained model
        :raises DamagedCheckpointError: if the file is none, or damaged
        :raises FileNotFoundError: if the folder has no whole checkpoint
        :raises ValueError: if the environments are built in another way, or it is a checkpoint of another algorithm or number
            of ranks
        """
        ranks = Ranks.present()
        ranks.connect()
        saved, state = read_by_first(ranks, pathlib.Path(path))
        check_algorithm(cls, state)
        if not isinstance(env, VectorEnv):
            env = maybe_make_env(env, 0)
        model = cls.load(io.BytesIO(saved), env, device, force_reset=False)
        go_on(model, state, callback, progress_bar)
        return model
