"""The values that an update leaves in SB3's logger, all under ``train/``."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import explained_variance
from torch.utils.tensorboard.writer import SummaryWriter

from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.update import UpdateStats

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase


def log_update(model: "PPOBase", stats: UpdateStats) -> None:
    """
    Record an update, of all ranks.

    :param model: the algorithm
    :param stats: its update
    """
    values = _sb3_values(model, stats) if "loss" in stats else {}
    values |= _faults(model, stats)
    values["train/kl_coef"] = stats.coefs.kl_coef
    values["train/kl_penalty_loss"] = stats.mean("kl_penalty_loss") if "kl_penalty_loss" in stats else 0.0
    if "grad_norm" in stats:
        values["train/grad_norm"] = stats.mean("grad_norm")
    values["train/gradient_steps"] = stats.gradient_steps
    values["train/stopped_epoch"] = stats.epochs_completed
    if stats.displacement is not None:
        values["train/kl"] = stats.displacement.kl.mean().item()
        values["train/kl_max"] = max(model._ranks.gather(stats.displacement.kl.max().item()))
    for key, value in model._ranks.means(values).items():
        model.logger.record(key, value, exclude="tensorboard" if key == "train/n_updates" else None)
    if model._ranks.any(bool(tensorboard_writers(model.logger))):
        _log_kl_per_epoch(model, stats)


def _faults(model: "PPOBase", stats: UpdateStats) -> dict[str, Any]:
    """What was done about numbers that aren't finite, and about a KL beyond its bound, where either was asked for."""
    faults: dict[str, Any] = {}
    if model.on_nonfinite == "skip":
        faults["train/skipped_minibatches"] = stats.n_skipped
    if model.on_nonfinite != "raise":
        faults["train/restored"] = int(stats.restored)
    if stats.n_halvings is not None:
        faults["train/halvings"] = stats.n_halvings
        faults["train/kl_whole_step"] = stats.whole_step_kl
    return faults


def tensorboard_writers(logger: Logger | None) -> list[SummaryWriter]:
    """The logger's TensorBoard writers, none if it doesn't log there."""
    outputs = getattr(logger, "output_formats", [])  # a user's own logger may have none
    return [output.writer for output in outputs if isinstance(output, TensorBoardOutputFormat)]


def _sb3_values(model: "PPOBase", stats: UpdateStats) -> dict[str, Any]:
    """SB3's keys with SB3's values, in SB3's precision: means in float64, but the one of ``approx_kl`` in its own."""
    buffer = model.rollout_buffer
    values: dict[str, Any] = {
        "train/entropy_loss": stats.mean("entropy_loss"),
        "train/policy_gradient_loss": stats.mean("policy_loss"),
    }
    if "value_loss" in stats:
        values["train/value_loss"] = stats.mean("value_loss")
    values["train/approx_kl"] = stats.last_epoch("approx_kl").mean()
    values["train/loss"] = stats.latest("loss")
    values["train/explained_variance"] = _explained_variance(model._ranks, buffer.values.flatten(), buffer.returns.flatten())
    if hasattr(model.policy, "log_std"):
        values["train/std"] = th.exp(model.policy.log_std).mean().item()
    values["train/n_updates"] = model._n_updates
    if stats.coefs.clip_range is not None:
        values["train/clip_fraction"] = stats.mean("clip_fraction")
        low, high = stats.coefs.clip_range
        values["train/clip_range"] = low
        if high != low:
            values["train/clip_range_high"] = high
    if stats.coefs.clip_range_vf is not None:
        values["train/clip_range_vf"] = stats.coefs.clip_range_vf
    return values


def _explained_variance(ranks: Ranks, values: np.ndarray, returns: np.ndarray) -> Any:
    """SB3's 1 - Var(returns - values) / Var(returns), over all ranks by their moments."""
    if not ranks.several:
        return explained_variance(values, returns)
    parts = {"returns": returns.astype(np.float64), "errors": returns.astype(np.float64) - values}
    means = ranks.means({name: part.mean() for name, part in parts.items()})
    variances = ranks.means({name: np.square(part - means[name]).mean() for name, part in parts.items()})
    return 1 - variances["errors"] / variances["returns"] if variances["returns"] > 0 else np.nan


def _log_kl_per_epoch(model: "PPOBase", stats: UpdateStats) -> None:
    """
    One point an epoch, spread evenly over the time steps to the next update, where ``train/kl`` will be logged.

    SB3's logger keeps one value a key from one dump to the next, so the points go to TensorBoard directly.
    """
    rollout_size = model.rollout_buffer.buffer_size * model.rollout_buffer.n_envs * model._ranks.size
    kls = model._ranks.means({str(epoch): kl for epoch, kl in enumerate(stats.kl_per_epoch())})
    model._kl_per_epoch = [
        (kl, model.num_timesteps + rollout_size * (epoch + 1) // model.n_epochs) for epoch, kl in enumerate(kls.values())
    ]
    write_kl_per_epoch(model)


def write_kl_per_epoch(model: "PPOBase") -> None:
    """
    Write the points of the last update, which are later than its time step.

    :param model: the algorithm
    """
    for kl, step in model._kl_per_epoch:
        for writer in tensorboard_writers(model.logger):
            writer.add_scalar("train/kl_per_epoch", kl, step)
