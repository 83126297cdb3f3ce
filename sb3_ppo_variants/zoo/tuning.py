"""
What the RL Zoo's hyperparameter search samples for the algorithms with a KL penalty: what it samples for PPO, and ours.

Ranges are about a factor of three wider on either side than the values in the PPO paper's Table 1.
"""

from typing import Any, cast

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_params

from sb3_ppo_variants.kl_coef import RULES


class _WithoutClipping:
    """A trial that is not asked for ``clip_range``: samples without effect would mislead the search and its report."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return None if name == "clip_range" else self._trial.suggest_categorical(name, choices)


def sample_ppo_kl(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample for ``ppo_kl``; parameters and result are those of the Zoo's samplers, as in all three."""
    sample_ppo_params(cast(optuna.Trial, _WithoutClipping(trial)), n_actions, n_envs, additional_args)
    _suggest_adaptive_penalty(trial)
    return convert(trial.params)


def sample_ppo_kl_fixed(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample for ``ppo_kl_fixed``."""
    sample_ppo_params(cast(optuna.Trial, _WithoutClipping(trial)), n_actions, n_envs, additional_args)
    trial.suggest_float("kl_coef", 0.1, 30.0, log=True)
    return convert(trial.params)


def sample_ppo_clip_kl(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample for ``ppo_clip_kl``."""
    sample_ppo_params(trial, n_actions, n_envs, additional_args)
    _suggest_adaptive_penalty(trial)
    return convert(trial.params)


def _suggest_adaptive_penalty(trial: optuna.Trial) -> None:
    trial.suggest_float("kl_target", 0.001, 0.1, log=True)
    trial.suggest_float("kl_coef_initial", 0.1, 30.0, log=True)
    trial.suggest_categorical("kl_coef_rule", list(RULES))


def convert(params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn the parameters of a trial, which Optuna keeps flat, into hyperparameters.

    :param params: what a sampler has asked for, by name
    :return: arguments of the algorithm
    """
    hyperparams: dict[str, Any] = convert_onpolicy_params(params)
    if "kl_coef_rule" in hyperparams:
        hyperparams["kl_coef"] = {"rule": hyperparams.pop("kl_coef_rule"), "initial": hyperparams.pop("kl_coef_initial")}
    return hyperparams


SAMPLERS = {
    "ppo_clip": sample_ppo_params,
    "ppo_kl": sample_ppo_kl,
    "ppo_kl_fixed": sample_ppo_kl_fixed,
    "ppo_clip_kl": sample_ppo_clip_kl,
}
CONVERTERS = dict.fromkeys(SAMPLERS, convert)
