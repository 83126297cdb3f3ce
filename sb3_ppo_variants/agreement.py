"""What ranks must have in common to train one model together."""

import inspect
import platform
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from sb3_ppo_variants.buffers import RewardsToGoRolloutBuffer
from sb3_ppo_variants.callbacks import OF_FIRST, hooked_within
from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.vec_env import resets_in_next_step
from sb3_ppo_variants.version import __version__

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase

HYPERPARAMETERS = (
    *("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "learning_rate", "clip_range", "clip_range_vf"),
    *("normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "target_kl", "use_sde", "sde_sample_freq"),
    *("rollout_buffer_class", "rollout_buffer_kwargs", "kl_coef", "kl_coef_state", "kl_target", "n_value_epochs"),
    *("value_learning_rate", "critic_first", "n_episodes", "surrogate", "dual_clip", "kl_rollback", "on_nonfinite"),
    *("max_kl", "engine", "seed", "policy_kwargs"),
)


class RanksDifferError(ValueError):
    """Ranks can't train one model together; the message names what differs, and the ranks."""


def check_agreement(ranks: Ranks, model: "PPOBase", arguments: Mapping[str, Any], callback: Any) -> None:
    """
    Check that all ranks are about to do the same; for all to call.

    :param ranks: the ranks
    :param model: the algorithm
    :param arguments: of ``learn``
    :param callback: as ``learn`` takes it
    :raises RanksDifferError: on all ranks, if they are not
    """
    if not ranks.several:
        return
    difference = first_difference(ranks.gather(describe(model, arguments, callback)))
    if difference is not None:
        raise RanksDifferError(difference)


def check_supported(model: "PPOBase") -> None:
    """
    Check that all rollouts will have the same size, as ranks take their gradient steps together, and the same scale.

    :param model: the algorithm
    :raises ValueError: if they may not
    """
    assert model.env is not None
    n_episodes = getattr(model, "n_episodes", None)
    if n_episodes is not None:
        raise ValueError(f"`n_episodes` must be None where several ranks train, not {n_episodes}")
    if resets_in_next_step(model.env):
        raise ValueError(
            "`env` must reset in the same step where several ranks train: make it with "
            "`autoreset_mode=AutoresetMode.SAME_STEP`"
        )
    buffer = model.rollout_buffer
    if isinstance(buffer, RewardsToGoRolloutBuffer) and buffer.standardize:
        raise ValueError(
            "`rollout_buffer_kwargs['standardize']` must be False where several ranks train, not True: each would scale its "
            "own returns"
        )


def check_equal(ranks: Ranks, policy: th.nn.Module) -> None:
    """
    Check that parameters are the same to the bit, and make buffers so, such as BatchNorm's statistics; for all to call.

    :param ranks: the ranks
    :param policy: the policy
    :raises RanksDifferError: on all ranks, if they are not
    """
    if not ranks.several:
        return
    for buffer in policy.buffers():
        if buffer.is_floating_point():
            ranks.average(buffer)
    difference = first_difference([{"the policy's parameters": name} for name in ranks.gather(_checksum(policy))])
    if difference is not None:
        raise RanksDifferError(f"{difference} (checksums): does a callback change them on one of the ranks only?")


def _checksum(policy: th.nn.Module) -> str:
    checksum = 0
    for value in policy.state_dict().values():
        checksum = zlib.crc32(value.cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def first_difference(descriptions: Sequence[Mapping[str, str]]) -> str | None:
    """
    What differs between ranks.

    :param descriptions: of all ranks, in order
    :return: the first thing, in words; ``None`` if all are equal
    """
    for name in dict.fromkeys(name for description in descriptions for name in description):
        values: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            values.setdefault(description.get(name, "missing"), []).append(rank)
        if len(values) > 1:
            told = ", ".join(f"{value} on {_names(ranks)}" for value, ranks in values.items())
            return f"{name} must be the same on all ranks, not {told}"
    return None


def describe(model: "PPOBase", arguments: Mapping[str, Any], callback: Any) -> dict[str, str]:
    """
    What all ranks must have in common, in words.

    :param model: the algorithm
    :param arguments: of ``learn``
    :param callback: as ``learn`` takes it
    """
    versions = {
        "sb3_ppo_variants": __version__,
        "stable_baselines3": stable_baselines3.__version__,
        "torch": th.__version__,
        "gymnasium": gymnasium.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
    }
    assert model.env is not None
    shapes = [tuple(parameter.shape) for parameter in model.policy.parameters()]
    return {
        **{f"the version of {name}": version for name, version in versions.items()},
        "the algorithm": type(model).__name__,
        "`env`'s observation space": str(model.observation_space),
        "`env`'s action space": str(model.action_space),
        "the number of environments in `env`": str(model.n_envs),
        "`env`": _environment(model.env),
        **{f"`{name}`": _in_words(vars(model)[name]) for name in HYPERPARAMETERS if name in vars(model)},
        "`policy`": f"{model.policy_class.__name__} with parameters of shapes {shapes}",
        "`device`": model.device.type,
        "the number of time steps so far": "any" if arguments["reset_num_timesteps"] else str(model.num_timesteps),
        **{f"`{name}` of `learn`": _in_words(arguments[name]) for name in ("total_timesteps", "reset_num_timesteps")},
        "`log_interval` of `learn`": _in_words(arguments["log_interval"]),
        "`callback`": ", ".join(kinds(callback)) or "none",
    }


def kinds(callback: Any) -> list[str]:
    """The classes of what runs on all ranks of a callback, or of a list of callbacks, as ``learn`` takes them."""
    if isinstance(callback, list):
        return [kind for each in callback for kind in kinds(each)]
    if isinstance(callback, CallbackList):
        return kinds(callback.callbacks)
    if isinstance(callback, OF_FIRST):
        return kinds(hooked_within(callback))
    return [] if callback is None else [type(callback).__qualname__]


def _environment(env: VecEnv) -> str:
    wrappers = []
    while isinstance(env, VecEnvWrapper):
        # What it was made with, as far as it keeps that: other attributes may count, or tell the time.
        settings = {name: vars(env)[name] for name in inspect.signature(type(env)).parameters if name in vars(env)}
        flags = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
        wrappers.append(f"{type(env).__name__} with {flags}")
        env = env.venv
    try:
        spec = env.get_attr("spec", 0)[0]
        inner = "an unknown environment" if spec is None else f"{spec.id} with {_in_words(spec.kwargs)}"
    except (AttributeError, NotImplementedError):
        inner = "an unknown environment"
    return " of ".join([*wrappers, type(env).__name__, inner])


def _in_words(value: Any) -> str:
    """Functions by some of their values, as they have no other names; objects without their addresses."""
    if callable(value) and not isinstance(value, type):
        try:
            return "a schedule with " + ", ".join(f"{value(progress)} at {progress}" for progress in (1.0, 0.5))
        except Exception:
            return "a function"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_in_words, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_in_words(each)}' for key, each in value.items())}}}"
    return value.__qualname__ if isinstance(value, type) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
