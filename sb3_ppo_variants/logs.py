"""The values that an update leaves in SB3's logger, all under ``train/``."""

from typing import TYPE_CHECKING

import torch as th
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import explained_variance
from torch.utils.tensorboard.writer import SummaryWriter

from sb3_ppo_variants.update import UpdateStats

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase


def log_update(model: "PPOBase", stats: UpdateStats) -> None:
    """
    Record an update.

    :param model: the algorithm
    :param stats: its update
    """
    record = model.logger.record
    if "loss" in stats:
        _record_sb3_keys(model, stats)
    _record_faults(model, stats)
    record("train/kl_coef", stats.coefs.kl_coef)
    record("train/kl_penalty_loss", stats.mean("kl_penalty_loss") if "kl_penalty_loss" in stats else 0.0)
    if "grad_norm" in stats:
        record("train/grad_norm", stats.mean("grad_norm"))
    record("train/gradient_steps", stats.gradient_steps)
    record("train/stopped_epoch", stats.epochs_completed)
    if stats.displacement is not None:
        record("train/kl", stats.displacement.kl.mean().item())
        record("train/kl_max", stats.displacement.kl.max().item())
    if tensorboard_writers(model.logger):
        _log_kl_per_epoch(model, stats)


def _record_faults(model: "PPOBase", stats: UpdateStats) -> None:
    """What was done about numbers that aren't finite, and about a KL beyond its bound, where either was asked for."""
    if model.on_nonfinite == "skip":
        model.logger.record("train/skipped_minibatches", stats.n_skipped)
    if model.on_nonfinite != "raise":
        model.logger.record("train/restored", int(stats.restored))
    if stats.n_halvings is not None:
        model.logger.record("train/halvings", stats.n_halvings)


def tensorboard_writers(logger: Logger | None) -> list[SummaryWriter]:
    """The logger's TensorBoard writers, none if it doesn't log there."""
    outputs = getattr(logger, "output_formats", [])  # a user's own logger may have none
    return [output.writer for output in outputs if isinstance(output, TensorBoardOutputFormat)]


def _record_sb3_keys(model: "PPOBase", stats: UpdateStats) -> None:
    """SB3's keys with SB3's values, in SB3's precision: means in float64, but the one of ``approx_kl`` in its own."""
    record = model.logger.record
    buffer = model.rollout_buffer
    record("train/entropy_loss", stats.mean("entropy_loss"))
    record("train/policy_gradient_loss", stats.mean("policy_loss"))
    if "value_loss" in stats:
        record("train/value_loss", stats.mean("value_loss"))
    record("train/approx_kl", stats.last_epoch("approx_kl").mean())
    record("train/loss", stats.latest("loss"))
    record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
    if hasattr(model.policy, "log_std"):
        record("train/std", th.exp(model.policy.log_std).mean().item())
    record("train/n_updates", model._n_updates, exclude="tensorboard")
    if stats.coefs.clip_range is not None:
        record("train/clip_fraction", stats.mean("clip_fraction"))
        low, high = stats.coefs.clip_range
        record("train/clip_range", low)
        if high != low:
            record("train/clip_range_high", high)
    if stats.coefs.clip_range_vf is not None:
        record("train/clip_range_vf", stats.coefs.clip_range_vf)


def _log_kl_per_epoch(model: "PPOBase", stats: UpdateStats) -> None:
    """
    One point an epoch, spread evenly over the time steps to the next update, where ``train/kl`` will be logged.

    SB3's logger keeps one value a key from one dump to the next, so the points go to TensorBoard directly.
    """
    rollout_size = model.rollout_buffer.buffer_size * model.rollout_buffer.n_envs
    model._kl_per_epoch = [
        (kl, model.num_timesteps + rollout_size * (epoch + 1) // model.n_epochs)
        for epoch, kl in enumerate(stats.kl_per_epoch())
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
