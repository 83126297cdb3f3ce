"""One training run of a comparison, in plain data."""

import importlib
from typing import Annotated, Any

import gymnasium as gym
from pydantic import BaseModel, BeforeValidator, ConfigDict


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as a string: it wants 3.0e-4."""
    if isinstance(value, dict):
        return {key: _number(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_number(each) for each in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Arguments = Annotated[dict[str, Any], BeforeValidator(_number)]
"""Of an algorithm or a callback."""


class Model(BaseModel):
    """Strict about names and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Job(Model):
    """One training run; its parts are as in :class:`~benchmarks.grid.Task` and :class:`~benchmarks.grid.Change`."""

    env: str
    variant: str
    seed: int
    algorithm: str
    policy: str
    timesteps: int
    n_envs: int
    normalize: bool
    terminal_time_limits: bool
    env_kwargs: dict[str, Any]
    threshold: float | str | None
    arguments: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]

    @property
    def reward_threshold(self) -> float | None:
        """Gymnasium's, of the environment."""
        module, _, name = self.env.rpartition(":")
        if module:
            importlib.import_module(module)
        return gym.spec(name).reward_threshold

    @property
    def name(self) -> str:
        """Its name among others, also in TensorBoard."""
        return f"{self.env}/{self.variant}/seed_{self.seed}"
