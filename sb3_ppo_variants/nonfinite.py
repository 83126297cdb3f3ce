"""NaN and infinity: found before they reach the parameters, and named."""

import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_variants.evaluation import unpadded
from sb3_ppo_variants.rollout import places
from sb3_ppo_variants.update import UpdateStats

ON_NONFINITE = ("raise", "skip", "restore")
"""What an update may do about them."""

ROLLOUT = (
    ("observations", "observation"),
    ("actions", "action"),
    ("rewards", "reward (with the value of what follows a time limit)"),
    ("values", "value"),
    ("log_probs", "log-probability"),
    ("advantages", "advantage"),
    ("returns", "return"),
)
"""What a rollout buffer holds, causes before effects."""

LOSSES = ("value_loss", "policy_loss", "entropy_loss", "kl_penalty_loss", "loss")


REFUSALS = ("Expected parameter ", "probability tensor contains either")
"""How messages of torch start that are about parameters of a distribution."""


class NonFiniteError(ValueError):
    """Training has met a number that is NaN or infinite; the parameters are those before the update."""


def is_torchs_refusal(error: BaseException) -> bool:
    """
    Whether torch's distributions have refused parameters that are NaN, or its sampling where they don't check.

    It has no class of error for either.
    """
    return isinstance(error, (ValueError, RuntimeError)) and str(error).startswith(REFUSALS)


def check_parameters(policy: th.nn.Module) -> None:
    """
    Check what no gradient has shown, such as the result of the last step.

    :param policy: the policy
    :raises NonFiniteError: if a parameter isn't finite, or its square is too large for its dtype
    """
    if not th.isfinite(th.nn.utils.get_total_norm([parameter.detach() for parameter in policy.parameters()])):
        names = [name for name, parameter in policy.named_parameters() if not th.isfinite(parameter.norm())]
        raise NonFiniteError(f"the parameter {', '.join(names)} isn't finite, or too large, behind the update")


def nonfinite_in_rollout(buffer: RolloutBuffer) -> str | None:
    """
    The first number of a rollout that isn't finite.

    :param buffer: the full rollout buffer, its arrays of shape (n_steps, n_envs, ...)
    :return: what and where it is, ``None`` if all are finite
    """
    # Observations that the policy can deal with are no fault: they only explain one.
    if all(_all_finite(getattr(buffer, attribute, np.zeros(0))) for attribute, _ in ROLLOUT[2:]):
        return None
    causes = ROLLOUT if _all_finite(buffer.rewards) else ROLLOUT[2:]
    for attribute, name in causes:
        for of_dict, array in _parts(getattr(buffer, attribute, None)):
            if isinstance(array, np.ndarray) and not _all_finite(array):
                envs, steps = places(buffer)
                samples = array.swapaxes(0, 1).reshape(len(steps), -1)
                bad = np.flatnonzero(~np.isfinite(samples).all(axis=1))
                # The first step of all, not the first environment: what it has made of later ones follows from it.
                step = steps[bad].min()
                bad = bad[steps[bad] == step]
                numbers = f"environment{'s' if len(bad) > 1 else ''} {', '.join(map(str, envs[bad[:5]]))}"
                return f"the {name}{of_dict} of {numbers} at step {step} of the rollout is {_first(samples[bad[0]])}"
    return None


def nonfinite_observation(observations: Any) -> str | None:
    """
    The first environment whose observation isn't finite.

    :param observations: of all environments, or a dict of these
    :return: what and where it is, ``None`` if all are finite
    """
    for of_dict, array in _parts(observations):
        if isinstance(array, np.ndarray) and not _all_finite(array):
            env = np.argwhere(~np.isfinite(array))[0][0]
            return f"the observation{of_dict} of environment {env} is {_first(array[env])}"
    return None


def nonfinite_in_minibatch(stats: UpdateStats, buffer: RolloutBuffer) -> str | None:
    """
    What has made a minibatch's gradient NaN or infinite.

    :param stats: the running update, whose latest minibatch it is
    :param buffer: the rollout buffer
    :return: what it is, and where the sample stands in the rollout if it is known; ``None`` if only the gradient tells
    """
    samples, kept = stats.minibatch.samples, unpadded(stats.minibatch.samples)
    columns = {
        **{
            f"observation{of_dict}": part.flatten(1).sum(dim=1)
            for of_dict, part in _parts(samples.observations)
            if part.is_floating_point()
        },
        "return": samples.returns,
        "advantage": samples.advantages,
        "log-probability": samples.old_log_prob,
    }
    if kept is not None:
        columns = {name: column[kept] for name, column in columns.items()}
    columns["log-ratio"] = stats.log_ratio
    if stats.kl is not None:
        columns["KL divergence"] = stats.kl
    for name, column in columns.items():
        bad = ~th.isfinite(column.flatten())
        if bad.any():
            position = int(bad.nonzero()[0])
            return f"the {name}{_where(stats, position, buffer)} is {column.flatten()[position].item()}"
    for name in LOSSES:
        if name in stats and not math.isfinite(stats.latest(name)):
            return f"`{name}` is {stats.latest(name)}"
    return None


def _where(stats: UpdateStats, position: int, buffer: RolloutBuffer) -> str:
    indices = stats.minibatch.indices
    if indices is None:
        return ""
    envs, steps = places(buffer)
    index = int(indices[position])
    return f" of environment {envs[index]} at step {steps[index]} of the rollout"


def _parts(content: Any) -> list[tuple[str, Any]]:
    """Of a dict, its keys, as they are shown behind the name of the whole, and its values; else the content itself."""
    return [(f" {key!r}", part) for key, part in content.items()] if isinstance(content, dict) else [("", content)]


def _all_finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _first(array: Any) -> float:
    flat = np.ravel(array)
    return float(flat[~np.isfinite(flat)][0])
