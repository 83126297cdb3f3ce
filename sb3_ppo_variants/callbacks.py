"""Callbacks with hooks inside the update, and those that this package brings along."""

import copy
import math
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule

from sb3_ppo_variants.arguments import check_bool, check_choice, check_positive, check_positive_int, check_real
from sb3_ppo_variants.critic import critic_parameters
from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.kl import ESTIMATORS
from sb3_ppo_variants.logs import tensorboard_writers
from sb3_ppo_variants.snapshot import Snapshot
from sb3_ppo_variants.trust_region import Displacement, check_exact_kl
from sb3_ppo_variants.update import UpdateStats

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase


UNKNOWN_KL = (
    "{} needs the exact KL of each minibatch, which is not known: this policy fails in evaluation, or its `evaluate_actions` "
    "leaves no distribution in `action_dist`"
)


class UpdateCallback(BaseCallback):
    """
    An SB3 callback with hooks inside the update, for the algorithms of this package.

    It works wherever an SB3 callback does, alone or nested. The hooks are called in every update; a parent such as
    ``EveryNTimesteps`` decides about ``_on_step`` only, as it does in SB3.

    Two return values must not be mixed up: ``False`` from ``_on_minibatch`` or ``_on_epoch_end`` ends **this update**,
    ``False`` from SB3's ``_on_step`` ends **training**.
    """

    model: "PPOBase"

    def init_callback(self, model: BaseAlgorithm) -> None:
        """
        SB3's.

        :raises TypeError: if the algorithm would never call the hooks
        """
        if not hasattr(model, "_update_hooks"):
            algorithm = f"{type(model).__module__}.{type(model).__qualname__}"
            raise TypeError(f"{type(self).__name__} needs an algorithm of sb3_ppo_variants, not {algorithm}")
        model._update_hooks.register(self)
        super().init_callback(model)

    def _on_step(self) -> bool:
        """
        Called after each step of the environments.

        :return: ``False`` ends training (not the update)
        """
        return True

    def _on_update_start(self) -> None:
        """Called before an update's first minibatch: the policy is still the one that has collected the rollout."""

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        """
        Called for each of the policy's minibatches when its gradient stands in ``parameter.grad``, clipped, before the
        optimiser's step.

        :param stats: the update so far, with this minibatch
        :return: ``False`` ends this update (not training), without the step
        """
        return True

    def _on_epoch_end(self, stats: UpdateStats) -> bool:
        """
        Called after each complete pass of the policy over the rollout.

        :param stats: the update so far
        :return: ``False`` ends this update (not training)
        """
        return True

    def _on_update_end(self, stats: UpdateStats) -> None:
        """
        Called after the update; what is recorded here is logged with the update's own values.

        :param stats: the whole update
        """

    def _on_policy_stopped(self, stats: UpdateStats) -> None:
        """
        Called after the policy's passes if they were ended early, by whatever it was, also amid an epoch.

        :param stats: the update so far; its latest minibatch may be one that ``_on_minibatch`` hasn't been called for
        """

    def mean_over_ranks(self, samples: th.Tensor) -> float:
        """
        The mean of all ranks' samples; for all ranks to call, so that they decide alike.

        :param samples: of this rank's minibatch, such as ``stats.kl``
        """
        return float(self.model._ranks.mean(samples.mean().item()))

    def _on_update_settled(self) -> None:
        """Called after all callbacks' ``_on_update_end``: what the update leaves behind is as it stays."""

    def _on_ready(self) -> None:
        """Called when all callbacks have been initialised, wherever they stand among others."""

    def _on_leaving(self, ended: bool) -> None:
        """
        Called when training ends.

        :param ended: whether it does so without an exception
        """


ENDING_HOOKS = ("_on_minibatch", "_on_epoch_end")
"""Those that may end the update."""


class UpdateHooks:
    """Calls the hooks of the callbacks that have registered."""

    written: frozenset[str]
    """The hooks within an update's passes that any callback has of its own: calling them costs time."""

    def __init__(self) -> None:
        self._callbacks: list[UpdateCallback] = []
        self.written = frozenset()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def register(self, callback: UpdateCallback) -> None:
        """Add a callback; one that stands in several places is called once."""
        if callback not in self._callbacks:
            self._callbacks.append(callback)

    def _is_written(self, hook: str) -> bool:
        inherited = getattr(UpdateCallback, hook)
        return any(getattr(getattr(callback, hook), "__func__", None) is not inherited for callback in self._callbacks)

    def on_update_start(self, num_timesteps: int) -> None:
        """Before the first minibatch."""
        for callback in self._callbacks:
            callback.num_timesteps = num_timesteps
            callback._on_update_start()
        self.written = frozenset(filter(self._is_written, (*ENDING_HOOKS, "_on_policy_stopped")))

    def call(self, hook: str, stats: UpdateStats) -> None:
        """
        Call a hook within the update's passes, and stop the update if it may, and says so.

        :param hook: its name
        :param stats: the update so far
        """
        for callback in self._callbacks:
            result = getattr(callback, hook)(stats)
            if hook in ENDING_HOOKS:
                _stop_unless(result, stats, callback, hook)

    def on_update_end(self, stats: UpdateStats) -> None:
        """After the update."""
        for callback in self._callbacks:
            callback._on_update_end(stats)
        self.on_update_settled()

    def on_update_settled(self) -> None:
        """After an update, or after one that was left out."""
        with ExitStack() as stack:  # each is called, also where one before it, such as Ctrl-C's, ends training
            for callback in reversed(self._callbacks):
                stack.callback(callback._on_update_settled)

    def on_ready(self) -> None:
        """When all callbacks are initialised."""
        for callback in self._callbacks:
            callback._on_ready()

    def on_leaving(self, ended: bool) -> None:
        """When training ends, whatever ends it."""
        with ExitStack() as stack:  # the last first, as they may have put something in each other's place
            for callback in self._callbacks:
                stack.callback(callback._on_leaving, ended)


OF_FIRST = (EvalCallback, CheckpointCallback, ProgressBarCallback)
"""What rank 0 alone does."""


def on_rank(ranks: Ranks, callback: MaybeCallback, progress_bar: bool) -> list[BaseCallback] | None:
    """
    What a rank has to do of what its script asks for: rank 0 alone evaluates, writes checkpoints and shows progress.

    :param ranks: the ranks
    :param callback: as ``learn`` takes it
    :param progress_bar: as ``learn`` takes it
    :return: for ``learn``, which is to show no progress bar
    """
    callbacks: list[Any] = callback if isinstance(callback, list) else [] if callback is None else [callback]
    callbacks = [each if isinstance(each, BaseCallback) else ConvertCallback(each) for each in callbacks]
    if progress_bar:
        callbacks.append(ProgressBarCallback())
    return [each for each in (_on_rank(ranks, each) for each in callbacks) if each is not None] or None


def _on_rank(ranks: Ranks, callback: BaseCallback) -> BaseCallback | None:
    """What is left of a callback, ``None`` for nothing."""
    if ranks.is_first and type(callback) is ProgressBarCallback:
        return _ProgressOfAll()
    if not ranks.is_first and isinstance(callback, OF_FIRST):
        hooked = hooked_within(callback)
        return _HooksOnly(hooked) if hooked else None
    if isinstance(callback, CallbackList):
        own = copy.copy(callback)  # of its class, which may do something itself
        own.callbacks = [each for each in (_on_rank(ranks, each) for each in callback.callbacks) if each is not None]
        return own
    if isinstance(callback, EventCallback) and callback.callback is not None:
        callback.callback = _on_rank(ranks, callback.callback)
    return callback


def hooked_within(callback: BaseCallback) -> list[UpdateCallback]:
    """The callbacks with hooks, whose hooks run on all ranks, in a callback and what it calls, itself included."""
    inner = [each for value in vars(callback).values() for each in (value if isinstance(value, list) else [value])]
    within = [each for each in inner if isinstance(each, BaseCallback) and each is not callback.parent]
    own = [callback] if isinstance(callback, UpdateCallback) else []
    return [*own, *(hooked for each in within for hooked in hooked_within(each))]


class _HooksOnly(BaseCallback):
    """Callbacks that are called inside updates, but not by what calls them on rank 0."""

    def __init__(self, callbacks: list[UpdateCallback]) -> None:
        super().__init__()
        self._hooked = callbacks

    def _init_callback(self) -> None:
        for callback in self._hooked:
            callback.init_callback(self.model)

    def _on_step(self) -> bool:
        return True


class StepsOfAllRanks:
    """
    A callback that finds the steps of all ranks in ``num_timesteps``, where a rollout counts its own environments' only.

    :param callback: the callback
    """

    def __init__(self, callback: BaseCallback) -> None:
        self._callback = callback

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def on_step(self) -> bool:
        """Count, and then call the callback."""
        model: Any = self._callback.model
        model.num_timesteps += (model._ranks.size - 1) * model.n_envs
        return self._callback.on_step()


class _ProgressOfAll(ProgressBarCallback):
    def _on_step(self) -> bool:
        self.pbar.update((self.model._ranks.size - 1) * self.training_env.num_envs)  # type: ignore[attr-defined]
        return super()._on_step()


def _stop_unless(result: Any, stats: UpdateStats, callback: UpdateCallback, hook: str) -> None:
    if isinstance(result, th.Tensor) and result.dtype == th.bool and result.numel() == 1:
        result = result.item()
    if not isinstance(result, (bool, np.bool_)):
        raise TypeError(f"`{type(callback).__name__}.{hook}` must return True or False (ends this update), not {result!r}")
    if not result:
        stats.stop()


class KLEarlyStoppingCallback(UpdateCallback):
    """
    Ends an update when the policy has moved further than ``factor`` x ``target`` from the old one.

    :param target: the KL(old || new) that an update may cause, in nats
    :param factor: how far beyond the target it may go
    :param per: ``"minibatch"``: checked on each minibatch, before its step; ``"epoch"``: checked after each epoch, on the
        whole rollout
    :param estimator: ``"exact"``, or the sample estimate ``"k1"``, ``"k2"`` or ``"k3"`` (``"k3"`` is SB3's ``approx_kl``)
    :param stop: ``"both"``: policy and critic, as SB3's ``target_kl`` (not the passes of the critic's own that
        ``n_value_epochs`` gives it); ``"policy"``: the critic goes on to the last epoch (OpenAI Spinning Up's scheme), by
        steps on its own parameters alone
    :param restore: whether to go back to the parameters and optimiser state after the last epoch that was within
        ``factor`` x ``target`` (before the update if none was), whatever has ended the update; with ``stop="policy"`` the
        critic's are left as they are. An adaptive beta follows the KL before that, which is logged as
        ``train/kl_whole_step``
    :param verbose: 1 to print when an update is ended
    :raises TypeError: if an argument is of the wrong type
    :raises ValueError: if an argument has a value that is not allowed
    """

    def __init__(
        self,
        target: float = 0.01,
        factor: float = 1.5,
        per: str = "minibatch",
        estimator: str = "exact",
        stop: str = "both",
        restore: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.limit = check_positive("factor", factor) * check_positive("target", target)
        self.per = check_choice("per", per, ("minibatch", "epoch"))
        self.estimator = check_choice("estimator", estimator, ("exact", *ESTIMATORS))
        self.stop = check_choice("stop", stop, ("both", "policy"))
        self.restore = check_bool("restore", restore)
        self._snapshot: Snapshot | None = None

    def _init_callback(self) -> None:
        if self.estimator == "exact" or self.per == "epoch" or self.restore:
            check_exact_kl(self.model.policy, self.model.rollout_buffer)
        if self.stop == "policy":
            critic_parameters(self.model.policy)

    def _on_update_start(self) -> None:
        self._take_snapshot()

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        if self.per == "epoch":
            return True
        kl = self._estimate(stats.kl, stats.log_ratio)
        return kl <= self.limit or self._end_update(stats, kl)

    def _on_epoch_end(self, stats: UpdateStats) -> bool:
        if self.per == "minibatch" and not self.restore:
            return True
        if self._check_rollout(stats):
            self._take_snapshot()
        return True

    def _on_policy_stopped(self, stats: UpdateStats) -> None:
        if self._snapshot is not None:  # something else has ended the update, perhaps amid an epoch
            self._check_rollout(stats)

    def _check_rollout(self, stats: UpdateStats) -> bool:
        """End the update if the policy is beyond the limit on the whole rollout; return whether it is within."""
        displacement = stats.measure()
        kl = self._estimate(*displacement)
        is_within = kl <= self.limit
        if not is_within:
            self._end_update(stats, kl, displacement)
        return is_within

    def _on_update_end(self, stats: UpdateStats) -> None:
        self._snapshot = None
        if self.restore and stats.whole_step_kl is not None:
            self.logger.record("train/kl_whole_step", stats.whole_step_kl)

    def _estimate(self, kl: th.Tensor | None, log_ratio: th.Tensor) -> float:
        if self.estimator != "exact":
            return self.mean_over_ranks(ESTIMATORS[self.estimator](log_ratio))
        if kl is None:
            raise ValueError(UNKNOWN_KL.format("`estimator` 'exact'") + ". It must be 'k1', 'k2' or 'k3'")
        return self.mean_over_ranks(kl)

    def _take_snapshot(self) -> None:
        if self.restore:
            policy = self.model.policy
            # With passes of its own, before the policy's or behind them, the critic has no part in this.
            apart = self.stop == "policy" or self.model.n_value_epochs is not None
            critics_own = set(critic_parameters(policy)) if apart else set()
            parameters = [parameter for parameter in policy.parameters() if parameter not in critics_own]
            self._snapshot = Snapshot(policy, parameters, policy.optimizer)

    def _end_update(self, stats: UpdateStats, kl: float, displacement: Displacement | None = None) -> bool:
        if not math.isfinite(kl):
            warnings.warn(f"the KL divergence is {kl}: the update is ended in epoch {stats.epochs_completed}", stacklevel=2)
        elif self.verbose >= 1:
            print(f"Ending the update in epoch {stats.epochs_completed}: KL {kl:.2g} exceeds {self.limit:.2g}")
        if self._snapshot is not None:
            whole_step_kl = self.mean_over_ranks((displacement or stats.measure()).kl)
            if stats.whole_step_kl is None and math.isfinite(whole_step_kl):
                stats.whole_step_kl = whole_step_kl
            self._snapshot.restore()
            self._snapshot = None
        if self.stop == "policy":
            stats.stop_policy()
        else:
            stats.stop_policy_phase()
        return True


class KLAdaptiveLearningRateCallback(UpdateCallback):
    """
    A learning rate that follows the exact KL(old || new), minibatch by minibatch, as in rsl_rl (Rudin et al. 2022, arXiv
    2109.11978, appendix A.2).

    Before each gradient step the rate is divided by ``factor`` where the minibatch's KL exceeds ``band`` x ``target``, and
    multiplied by it where the KL is between 0 and ``target`` / ``band``. It starts from the algorithm's ``learning_rate``,
    which it replaces, so that a saved model goes on with it. Hooks at every minibatch cost the fused engine part of its speed.

    :param target: the KL that is wanted, in nats
    :param factor: of one change, greater than 1
    :param band: how far from the target the KL may be, as a ratio, greater than 1
    :param minimum: the learning rate never falls below it
    :param maximum: the learning rate never rises above it
    :param verbose: as in SB3
    :raises TypeError: if an argument is no number
    :raises ValueError: if an argument is out of range
    """

    def __init__(
        self,
        target: float = 0.01,
        factor: float = 1.5,
        band: float = 2.0,
        minimum: float = 1e-5,
        maximum: float = 1e-2,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.target = check_positive("target", target)
        self.factor = check_real("factor", factor, "a number > 1", lambda number: number > 1)
        self.band = check_real("band", band, "a number > 1", lambda number: number > 1)
        self.minimum, self.maximum = check_positive("minimum", minimum), check_positive("maximum", maximum)
        if minimum > maximum:
            raise ValueError(f"`minimum` must not be greater than `maximum`, not {minimum!r} > {maximum!r}")
        self._n_minibatches = 0
        """Seen in the update so far."""

    def _init_callback(self) -> None:
        check_exact_kl(self.model.policy, self.model.rollout_buffer)

    def _on_update_start(self) -> None:
        self._n_minibatches = 0

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        if stats.kl is None:
            raise ValueError(UNKNOWN_KL.format("KLAdaptiveLearningRateCallback"))
        self._n_minibatches = stats.n_minibatches
        kl = self.mean_over_ranks(stats.kl)
        for group in self.model.policy.optimizer.param_groups:
            group["lr"] = self._next(group["lr"], kl)
        return True

    def _on_policy_stopped(self, stats: UpdateStats) -> None:
        if stats.n_minibatches > self._n_minibatches:  # that which has tripped `target_kl`
            self._on_minibatch(stats)

    def _next(self, learning_rate: float, kl: float) -> float:
        if kl > self.band * self.target:
            return max(learning_rate / self.factor, self.minimum)
        if 0 < kl < self.target / self.band:
            return min(learning_rate * self.factor, self.maximum)
        return learning_rate

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.model.learning_rate = self.model.policy.optimizer.param_groups[0]["lr"]
        self.model._setup_lr_schedule()
        self.logger.record("train/learning_rate", self.model.learning_rate)


class TrustRegionLoggingCallback(UpdateCallback):
    """
    Shows in TensorBoard how the policy moves within its trust region.

    - Histograms of the ratio pi_new(a|s) / pi_old(a|s) and of the exact KL by state, over the whole rollout (of rank 0, where
      several ranks train), after the update: ``trust_region/ratio`` and ``trust_region/kl``;
    - a layout for the Custom Scalars tab, with the categories "trust region", "losses" and "return";
    - hyperparameters, with return and KL as metrics, for the HParams tab.

    :param histogram_freq: updates between two histograms
    :param verbose: as in SB3
    :raises TypeError: if ``histogram_freq`` is no integer
    :raises ValueError: if ``histogram_freq`` is less than 1
    """

    LAYOUT: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "trust region": {
            "KL(old || new) after the update": ("train/kl", "train/approx_kl"),
            "KL(old || new) after the update, largest of all states": ("train/kl_max",),
            "KL(old || new) epoch by epoch": ("train/kl_per_epoch",),
            "KL coefficient": ("train/kl_coef",),
            "clip fraction": ("train/clip_fraction",),
            "gradient norm": ("train/grad_norm",),
            "epochs completed": ("train/stopped_epoch",),
            "gradient steps": ("train/gradient_steps",),
        },
        "losses": {
            "policy": ("train/policy_gradient_loss",),
            "value": ("train/value_loss",),
            "entropy": ("train/entropy_loss",),
            "KL penalty": ("train/kl_penalty_loss",),
            "sum": ("train/loss",),
            "explained variance": ("train/explained_variance",),
        },
        "return": {
            "episode return": ("rollout/ep_rew_mean", "eval/mean_reward"),
            "episode length": ("rollout/ep_len_mean", "eval/mean_ep_length"),
        },
    }
    HYPERPARAMETERS: ClassVar[tuple[str, ...]] = (
        *("learning_rate", "n_steps", "n_envs", "batch_size", "n_epochs", "gamma", "gae_lambda"),
        *("clip_range", "clip_range_vf", "normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "target_kl"),
        *("surrogate", "dual_clip", "kl_coef", "kl_target", "kl_rollback"),
        *("n_value_epochs", "value_learning_rate", "critic_first", "n_episodes", "seed"),
    )
    METRICS: ClassVar[tuple[str, ...]] = ("rollout/ep_rew_mean", "train/kl", "train/kl_coef", "train/value_loss")
    TENSORBOARD_ONLY: ClassVar[tuple[str, ...]] = ("stdout", "log", "json", "csv")

    def __init__(self, histogram_freq: int = 1, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.histogram_freq = check_positive_int("histogram_freq", histogram_freq)
        self._n_updates = 0

    def _init_callback(self) -> None:
        # Not in `_on_training_start`, which SB3 doesn't hand on to `EvalCallback(callback_on_new_best=...)`.
        writers = tensorboard_writers(self.logger)
        if not writers:
            return
        layout = {
            # TensorBoard takes the keys for regular expressions, and `train/kl` would find `train/kl_coef` too.
            category: {title: ["Multiline", [f"^{key}$" for key in keys]] for title, keys in charts.items()}
            for category, charts in self.LAYOUT.items()
        }
        for writer in writers:
            writer.add_custom_scalars(layout)
        hyperparameters = {"algorithm": type(self.model).__name__, "policy": self.model.policy_class.__name__}
        values = {name: _hyperparameter(getattr(self.model, name, None)) for name in self.HYPERPARAMETERS}
        hparam = HParam({**hyperparameters, **values}, dict.fromkeys(self.METRICS, 0.0))
        self.logger.record("hparams", hparam, exclude=self.TENSORBOARD_ONLY)

    def _on_update_end(self, stats: UpdateStats) -> None:
        self._n_updates += 1
        if self._n_updates % self.histogram_freq != 0 or stats.displacement is None or not tensorboard_writers(self.logger):
            return
        for name, values in (("ratio", stats.displacement.log_ratio.exp()), ("kl", stats.displacement.kl)):
            if th.isfinite(values).all():
                self.logger.record(f"trust_region/{name}", values, exclude=self.TENSORBOARD_ONLY)


def _hyperparameter(value: Any) -> bool | str | float | None:
    """A value that the HParams tab can show: constants as numbers, everything else in words."""
    if isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        value = value.val
    return value if value is None or isinstance(value, (bool, str, int, float)) else str(value)


class GradientNoiseScaleCallback(UpdateCallback):
    """
    Estimates which minibatch size would be worth its samples.

    The simple noise scale B = tr(Sigma) / |G|^2 of McCandlish et al. 2018, "An Empirical Model of Large-Batch Training",
    arXiv 1812.06162, eqs. 2.9 and A.2 to A.4: with minibatches much smaller than B, twice as many samples buy twice the
    progress a step; with much larger ones the extra samples are wasted. Minibatches of the first epoch, in which the
    parameters have hardly moved, serve as independent estimates of one gradient G; the numerator and the denominator
    are averaged over updates, as each is unbiased but their ratio is not.

    Logs ``train/gradient_noise_scale``, in samples; it needs at least two full minibatches an epoch.

    :param decay: weight of the past in the moving averages over updates, from 0 to less than 1
    :param verbose: as in SB3
    :raises TypeError: if ``decay`` is no number
    :raises ValueError: if ``decay`` is out of range
    """

    def __init__(self, decay: float = 0.9, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.decay = check_real("decay", decay, "a number from 0 to less than 1", lambda number: 0 <= number < 1)
        self._averages = np.zeros(2)
        self._n_minibatches = 0
        self._sum_of_gradients = th.zeros(())
        self._sum_of_squared_norms = 0.0

    def _on_update_start(self) -> None:
        self._n_minibatches = 0
        self._sum_of_gradients = th.zeros(())
        self._sum_of_squared_norms = 0.0

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        full = len(stats.log_ratio) == self.model._minibatch_size
        # The scaling of torch's clip_grad_norm_, to be undone.
        scale = min(1.0, self.model.max_grad_norm / (stats.latest("grad_norm") + 1e-6))
        if stats.epochs_completed == 0 and full and scale > 0:
            gradients = (parameter.grad for parameter in self.model.policy.parameters())
            gradient = th.cat([grad.flatten() for grad in gradients if grad is not None]).double() / scale
            self._n_minibatches += 1
            self._sum_of_gradients = self._sum_of_gradients + gradient
            self._sum_of_squared_norms += gradient.pow(2).sum().item()
        return True

    def _on_update_end(self, stats: UpdateStats) -> None:
        if self._n_minibatches < 2:
            return
        small = self.model._minibatch_size * self.model._ranks.size
        big = small * self._n_minibatches
        small_norm = self._sum_of_squared_norms / self._n_minibatches
        big_norm = (self._sum_of_gradients / self._n_minibatches).pow(2).sum().item()
        squared_gradient = (big * big_norm - small * small_norm) / (big - small)
        trace = (small_norm - big_norm) / (1 / small - 1 / big)
        self._averages = self.decay * self._averages + (1 - self.decay) * np.array([trace, squared_gradient])
        trace, squared_gradient = self._averages
        if squared_gradient > 0:
            self.logger.record("train/gradient_noise_scale", float(trace / squared_gradient))
