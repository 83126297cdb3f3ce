"""
Default hyperparameters of our algorithms, a module each, for all environments that the RL Zoo has some for with PPO.

They are read from the installed Zoo, so that they are its own and stay so. Each module works as the Zoo's ``--conf-file``.
"""

from pathlib import Path
from typing import Any

import rl_zoo3
import yaml


def of_zoo_ppo(clipped: bool, **objective: Any) -> dict[str, dict[str, Any]]:
    """
    The Zoo's hyperparameters for PPO with another objective.

    :param clipped: whether to keep ``clip_range``
    :param objective: arguments of the algorithm to add
    :return: hyperparameters by environment
    """
    package = Path(rl_zoo3.__file__).parent
    # A checkout of the Zoo has them beside its package.
    path = next(path for path in (package / "hyperparams/ppo.yml", package.parent / "hyperparams/ppo.yml") if path.exists())
    dropped = () if clipped else ("clip_range",)
    return {
        environment: {name: value for name, value in hyperparams.items() if name not in dropped} | objective
        for environment, hyperparams in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }
