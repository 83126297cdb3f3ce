"""What a comparison consists of: read from the command line or a YAML file, checked, and spelled out as jobs."""

import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, StringConstraints, ValidationError

from benchmarks.claims import Claim
from benchmarks.job import Arguments, Job, Model
from benchmarks.variants import ALGORITHMS, VARIANTS

FOLDERS = {"preset": Path(__file__).parent / "presets", "study": Path(__file__).parent / "studies"}
"""Grids that come with the package."""


RESERVED = {"policy", "env", "seed", "device", "tensorboard_log", "verbose", "_init_setup_model"}
"""Arguments of the algorithms that a grid sets by other means, or can't set."""
VARIANT_NAME = r"[A-Za-z0-9][\w.+-]*"
"""It becomes the name of a folder."""


class GridError(Exception):
    """Something in a grid is wrong; the message says what, and what it may be."""


class Task(Model):
    """
    An environment, and what is set for all variants there.

    :param timesteps: a run's, of all environments together; training ends after the rollout that reaches them
    :param n_envs: number of environments
    :param normalize: whether observations and rewards are normalised (``VecNormalize``)
    :param terminal_time_limits: whether time limits end episodes for good (``TimeLimitAsTermination``)
    :param env_kwargs: of the environment
    :param policy: name of the policy
    :param threshold: the mean return of 100 episodes that counts as solved, if it isn't gymnasium's; ``"baseline"`` for
        most of what the baseline reaches
    :param arguments: of the algorithm
    """

    timesteps: PositiveInt | None = None
    n_envs: PositiveInt | None = None
    normalize: bool | None = None
    terminal_time_limits: bool | None = None
    env_kwargs: Arguments = Field(default_factory=dict)
    policy: str | None = None
    threshold: FiniteFloat | Literal["baseline"] | None = None
    arguments: Arguments = Field(default_factory=dict)


class Change(Model):
    """
    A variant: one of :data:`~benchmarks.variants.VARIANTS`, with other arguments.

    :param of: which one, by default that of the same name
    :param arguments: of the algorithm
    :param callbacks: arguments of this package's callbacks, by their names
    """

    of: str | None = None
    arguments: Arguments = Field(default_factory=dict)
    callbacks: dict[str, Arguments] = Field(default_factory=dict)


class Grid(Model):
    """
    Environments x variants x seeds.

    :param title: of the report
    :param envs: tasks by the environments' names
    :param variants: changes by the variants' names
    :param seeds: how many, from 0 on
    :param timesteps: for tasks that don't say
    :param n_envs: for tasks that don't say
    :param normalize: for tasks that don't say
    :param terminal_time_limits: for tasks that don't say
    :param policy: for tasks that don't say
    :param arguments: for all tasks and variants; a task's stand before them, a variant's before these
    :param claims: what the results are to show
    """

    title: str | None = None
    envs: dict[str, Task] = Field(min_length=1)
    variants: dict[Annotated[str, StringConstraints(pattern=f"^{VARIANT_NAME}$")], Change] = Field(min_length=1)
    seeds: PositiveInt = 5
    timesteps: PositiveInt = 100_000
    n_envs: PositiveInt = 1
    normalize: bool = False
    terminal_time_limits: bool = False
    policy: str = "MlpPolicy"
    arguments: Arguments = Field(default_factory=dict)
    claims: list[Claim] = Field(default_factory=list)

    def jobs(self) -> list[Job]:
        """
        All jobs, seed by seed.

        :raises GridError: if a variant or an argument is unknown
        """
        return [
            self._job(env, task, name, change, seed)
            for seed in range(self.seeds)
            for env, task in self.envs.items()
            for name, change in self.variants.items()
        ]

    def check_claims(self) -> None:
        """
        Look whether all claims are of something here.

        :raises GridError: if an environment or a variant of theirs is unknown
        """
        for claim in self.claims:
            one_of("env in claims", claim.env, self.envs)
            one_of("variant in claims", claim.variant, self.variants)

    def _job(self, env: str, task: Task, name: str, change: Change, seed: int) -> Job:
        variant = VARIANTS[one_of("variant", change.of or name, VARIANTS)]
        parameters = _parameters(variant.algorithm)
        shared = {**self.arguments, **task.arguments}
        for arguments, allowed in ((shared, set().union(*map(_parameters, ALGORITHMS))), (change.arguments, parameters)):
            for argument in arguments:
                one_of(f"argument of {name}", argument, allowed)
        defining = [argument for argument in shared if argument in variant.arguments and variant.algorithm == "ppo"]
        if defining:
            raise GridError(f"`{defining[0]}` makes {name} what it is: set it for a variant, not for all")
        unknown = [argument for argument in shared if argument not in parameters and variant.algorithm == "sb3_ppo"]
        if unknown:
            raise GridError(
                f"`{unknown[0]}` is unknown to {name}, which would be no control: set it for other variants, not for all"
            )
        # What is set for all holds for those that know it: A2C has no clip range.
        known = {argument: value for argument, value in shared.items() if argument in parameters}
        return Job(
            env=env,
            variant=name,
            seed=seed,
            algorithm=variant.algorithm,
            policy=task.policy or self.policy,
            timesteps=task.timesteps or self.timesteps,
            n_envs=task.n_envs or self.n_envs,
            normalize=self.normalize if task.normalize is None else task.normalize,
            terminal_time_limits=(
                self.terminal_time_limits if task.terminal_time_limits is None else task.terminal_time_limits
            ),
            env_kwargs=task.env_kwargs,
            threshold=task.threshold,
            arguments={**known, **variant.arguments, **change.arguments},
            callbacks={**variant.callbacks, **change.callbacks},
        )


@functools.cache
def _parameters(algorithm: str) -> set[str]:
    return set(inspect.signature(ALGORITHMS[algorithm]).parameters) - RESERVED


def one_of(what: str, name: str, allowed: Iterable[str]) -> str:
    """
    Return a name that is allowed.

    :param what: it is the name of
    :param name: the name
    :param allowed: names
    :raises GridError: if it isn't; the message suggests another
    """
    names = sorted(allowed)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(names)}"
    raise GridError(f"unknown {what}: {name!r}; {hint}")


class _Loader(yaml.SafeLoader):
    """With YAML's rule that a key stands once, which PyYAML doesn't enforce, and YAML 1.2's numbers, such as 3e-4."""

    def compose_mapping_node(self, anchor: dict[Any, Any]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.composer.ComposerError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return node


NUMBER = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def _parse(text: str) -> Any:
    """
    Read YAML.

    :raises ValueError: if it isn't
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("too many levels") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read_grid(path: Path) -> dict[str, Any]:
    """
    The content of a YAML file, not yet checked.

    :param path: of the file
    :raises GridError: if there is no such file, or it isn't a YAML mapping
    """
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GridError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise GridError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise GridError(f"{path}: must be a mapping with the keys {', '.join(Grid.model_fields)}")
    return content


def make_grid(content: Mapping[str, Any], source: str) -> Grid:
    """
    A checked grid.

    :param content: as :func:`read_grid` returns it; ``envs`` and ``variants`` may also be lists of names
    :param source: where it comes from, for messages
    :raises GridError: if anything is wrong with it
    """
    for key in ("envs", "variants"):
        value = content.get(key)
        if isinstance(value, list) and not all(isinstance(name, str) for name in value):
            raise GridError(f"{source}: `{key}` must be a list of names, or a mapping, not {value!r}")
    named = {
        key: dict.fromkeys(value) if key in ("envs", "variants") and isinstance(value, list) else value
        for key, value in content.items()
    }
    for key in ("envs", "variants"):
        if isinstance(named.get(key), dict):
            named[key] = {name: value if value is not None else {} for name, value in named[key].items()}
    try:
        return Grid.model_validate(named)
    except RecursionError as error:
        raise GridError(f"{source}: something contains itself") from error
    except ValidationError as error:
        raise GridError("\n".join(f"{source}: {_in_words(each)}" for each in error.errors())) from error


def _in_words(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"envs": Task, "variants": Change, "claims": Claim}
        model = Grid if len(error["loc"]) == 1 else parts[error["loc"][0]]
        try:
            one_of("key", error["loc"][-1], model.model_fields)
        except GridError as unknown:
            return f"`{place}`: {unknown}"
    if error["type"] == "missing":
        return f"`{place}` is missing"
    return f"`{place}`: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def included(kind: str) -> dict[str, Path]:
    """
    The grids that come with the package, by name.

    :param kind: key of :data:`FOLDERS`
    """
    return {path.stem: path for path in sorted(FOLDERS[kind].glob("*.yaml"))}


def override(content: dict[str, Any], settings: Iterable[str]) -> None:
    """
    Write arguments from the command line into a grid's content.

    :param content: as :func:`read_grid` returns it, with its environments and variants as mappings of mappings
    :param settings: ``n_steps=128``, for all, or ``adaptive_kl:kl_target=0.02``, for one variant
    :raises GridError: if one is not of this form, or names a variant that doesn't take part
    """
    for setting in settings:
        target, equals, value = setting.partition("=")
        variant, colon, argument = target.rpartition(":")
        if not equals or not argument:
            raise GridError(f"--set {setting}: must be of the form argument=value or variant:argument=value")
        place: dict[str, Any] = content
        if colon:
            one_of("variant in --set", variant, content["variants"])
            place = content["variants"][variant]
        else:
            for task in content["envs"].values():
                task["arguments"] = {name: said for name, said in (task.get("arguments") or {}).items() if name != argument}
        try:
            place["arguments"] = {**(place.get("arguments") or {}), argument: _parse(value)}
        except ValueError as error:
            raise GridError(f"--set {setting}: the value is no YAML") from error
