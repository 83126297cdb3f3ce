"""One training run of a comparison, in plain data."""

import importlib
from typing import Annotated, Any

import gymnasium as gym
from pydantic import AfterValidator, BaseModel, ConfigDict


def _storable(value: Any) -> Any:
    """YAML has more types than JSON, which keeps results."""
    if isinstance(value, dict):
        return {_storable(key): _storable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_storable(each) for each in value]
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"must be made of numbers, texts, lists and mappings, and {value!r} is a {type(value).__name__}")
    return value


Arguments = Annotated[dict[str, Any], AfterValidator(_storable)]
"""Of an algorithm, a callback or an environment."""


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
