"""The RL Zoo's experiment manager, with what our algorithms need beyond it."""

import difflib
import inspect
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.arguments import is_pair
from sb3_ppo_variants.kl_coef import KLCoefController, parse_kl_coef
from sb3_ppo_variants.ppo import PPO
from sb3_ppo_variants.zoo import ALGORITHMS

OF_THE_ZOO = (
    *("n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper"),
    *("env_kwargs", "monitor_kwargs", "callback"),
)
"""Hyperparameters that the Zoo keeps for itself."""
FROM_COMMAND_LINE = ("env", "tensorboard_log", "verbose", "seed", "device")
"""Arguments that the Zoo passes to the algorithm on its own account."""


class Manager(ExperimentManager):
    """
    The RL Zoo's ``ExperimentManager``, except that

    - without ``--conf-file``, our algorithms have the defaults in :mod:`sb3_ppo_variants.zoo.hyperparams`;
    - a hyperparameter that none of our algorithms has is an error before anything is created (the Zoo fails in the
      constructor, and ignores it if it continues a trained agent);
    - ``null`` is allowed for ``clip_range`` and ``clip_range_vf``, and a pair for ``clip_range``;
    - a trained agent goes on with the objective of ``--algo``, whatever it was trained with.

    Parameters are those of ``ExperimentManager``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        default = Path(__file__).with_name("hyperparams") / f"{self.algo}.py"
        if kwargs.get("config") is None and default.exists():
            self.config = str(default)  # a path, as the Zoo changes what it reads: an imported module would stay changed

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        The Zoo's.

        :raises ValueError: if one of our algorithms is given a hyperparameter that it hasn't got
        """
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if self.algo in ALGORITHMS:
            self._check_names(hyperparams)
        return hyperparams, saved_hyperparams

    def _check_names(self, hyperparams: dict[str, Any]) -> None:
        arguments = [name for name in inspect.signature(PPO).parameters if not name.startswith("_")]
        allowed = [*(name for name in arguments if name not in FROM_COMMAND_LINE), *OF_THE_ZOO]
        for name in hyperparams:
            if name not in allowed:
                source = "--hyperparams" if name in (self.custom_hyperparams or ()) else self.config
                nearest = difflib.get_close_matches(str(name), allowed, n=3) or allowed
                raise ValueError(
                    f"`{name}` (for {self.env_name.gym_id}, from {source}) is no hyperparameter of {self.algo}; the nearest: "
                    + ", ".join(f"`{other}`" for other in nearest)
                )

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        clip_ranges = {name: hyperparams[name] for name in ("clip_range", "clip_range_vf") if name in hyperparams}
        ours: dict[str, Any] = {name: value for name, value in clip_ranges.items() if value is None or is_pair(value)}
        others = {name: value for name, value in hyperparams.items() if name not in ours}
        return {**ExperimentManager._preprocess_schedules(others), **ours}

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if self.algo in ALGORITHMS:
            saved = load_from_zip_file(self.trained_agent, device="cpu")[0] or {}
            for name in ("clip_range", "kl_coef", "surrogate", "dual_clip", "kl_rollback"):
                default = _default(ALGORITHMS[self.algo], name)
                if _kind(name, saved.get(name, _default(PPO, name))) != _kind(name, default):
                    hyperparams.setdefault(name, default)
        return super()._load_pretrained_agent(hyperparams, env)


def _kind(name: str, value: Any) -> Any:
    """What of an argument makes an objective another one: clipping or none; no penalty, a fixed or an adaptive one."""
    if name == "clip_range":
        return value is None
    if name == "kl_coef":
        return isinstance(parse_kl_coef(value), KLCoefController), bool(value)
    return value


def _default(algorithm: type[BaseAlgorithm], argument: str) -> Any:
    """An argument's default; subclasses list only those that they change."""
    signatures = (inspect.signature(cls).parameters for cls in algorithm.__mro__)
    return next(parameters[argument].default for parameters in signatures if argument in parameters)
