"""Checkpoints of everything that the rest of a training depends on, and how it goes on from them."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import threading
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants.arguments import check_positive_int
from sb3_ppo_variants.callbacks import UpdateCallback
from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.env_state import capture_vec_env, restore_vec_env

if TYPE_CHECKING:
    from sb3_ppo_variants.algorithm import PPOBase

SUFFIX = ".checkpoint"
NOT_CALLBACKS_OWN = (
    "model",
    "logger",
    "locals",
    "globals",
    "parent",
    "training_env",
    "_handler",
    "_stopping",
    "_at_start",
    "_objects",
)
"""Attributes that a callback is given, or that belong to one process's training."""
UNREADABLE = (zipfile.BadZipFile, KeyError, EOFError, ValueError, NotImplementedError, zlib.error, pickle.UnpicklingError)
"""What a damaged file makes of reading it."""


class DamagedCheckpointError(Exception):
    """A file is no checkpoint, or not a whole one."""


class Checkpoint(NamedTuple):
    """
    Between two updates.

    :param model: as ``model.save`` writes it
    :param states: everything else, see :func:`state_of`, of each rank
    """

    model: bytes
    states: list[dict[str, Any]]


OF_A_RANK = (
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "_last_lstm_states",
    "ep_info_buffer",
    "ep_success_buffer",
)
"""Attributes of a model that depend on its environments."""


def state_of(model: "PPOBase", at_start: dict[int, dict[str, bytes]]) -> dict[str, Any]:
    """
    What the rest of a training depends on but for the model itself, behind an update.

    :param model: the model
    :param at_start: its callbacks' plain attributes when training started, by the callbacks' ids
    :raises UncapturedStateError: if an environment's wrapper can't be pickled
    """
    assert model.env is not None
    logger = model.logger
    return {
        "env": capture_vec_env(model.env),
        "of_rank": {name: value for name, value in vars(model).items() if name in OF_A_RANK},
        "logged": (dict(logger.name_to_value), dict(logger.name_to_count), dict(logger.name_to_excluded)),
        "learning": {**model._learn_arguments, "total_timesteps": model._total_timesteps},
        "iteration": model._iteration,
        "callbacks": [_callback_state(each, at_start.get(id(each), {})) for each in _callbacks(model._callback)],
        "random": _random_states(),
    }


def _random_states() -> dict[str, Any]:
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state(), "cuda": cuda}


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if states["cuda"]:
        th.cuda.set_rng_state_all(states["cuda"])


def write(checkpoint: Checkpoint, path: Path) -> None:
    """
    Write a checkpoint, whole or not at all.

    :param checkpoint: the checkpoint
    :param path: of the file
    """
    parts = {"model.zip": checkpoint.model, "states.pkl": pickle.dumps(checkpoint.states)}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in parts.items():
                    archive.writestr(name, content)
                archive.writestr("sha256.json", json.dumps(sums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, is to outlast a power cut
        os.close(folder)


def read(path: Path) -> Checkpoint:
    """
    Read a checkpoint.

    :param path: of the file
    :raises DamagedCheckpointError: if it is none, or damaged
    :raises FileNotFoundError: if there is none
    """
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a checkpoint, or a folder of checkpoints, not {path}, which doesn't exist")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in ("model.zip", "states.pkl")}
            sums = json.loads(archive.read("sha256.json"))
        if any(hashlib.sha256(content).hexdigest() != sums[name] for name, content in parts.items()):
            raise ValueError("a checksum differs")
        return Checkpoint(parts["model.zip"], pickle.loads(parts["states.pkl"]))
    except UNREADABLE as error:
        raise DamagedCheckpointError(f"{path} is no checkpoint, or a damaged one: {error}") from error


def newest(folder: Path, name_prefix: str | None = None) -> Checkpoint:
    """
    The newest checkpoint of a folder that is whole; a warning names those that aren't.

    :param folder: of the checkpoints
    :param name_prefix: of their names, ``None`` for any
    :raises DamagedCheckpointError: if none is whole
    :raises FileNotFoundError: if there is none
    """
    paths = in_order(folder, name_prefix)
    for path in reversed(paths):
        try:
            return read(path)
        except DamagedCheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=3)
    if paths:
        raise DamagedCheckpointError(f"none of the {len(paths)} checkpoints in {folder} is whole")
    raise FileNotFoundError(f"`path` must be a checkpoint, or a folder of checkpoints, not {folder}")


def read_by_first(ranks: Ranks, path: Path) -> tuple[bytes, dict[str, Any]]:
    """
    What a rank needs of a checkpoint, which only rank 0 has to have; for all to call.

    :param ranks: the ranks
    :param path: of the checkpoint, or of a folder, of which the newest whole one is taken
    :return: the model, as ``model.save`` writes it, and the rank's state
    :raises DamagedCheckpointError: if it is none, or damaged
    :raises FileNotFoundError: if there is none
    :raises ValueError: if it is of another number of ranks
    """
    checkpoint, error = None, None
    if ranks.is_first:
        try:
            checkpoint = newest(path) if path.is_dir() else read(path)
            if len(checkpoint.states) != ranks.size:
                raise ValueError(f"`path` must be a checkpoint of {ranks.size} ranks, not of {len(checkpoint.states)}: {path}")
        except (DamagedCheckpointError, OSError, ValueError) as refusal:
            error = refusal
    error = ranks.broadcast(error)
    if error is not None:
        raise error
    model = ranks.broadcast(None if checkpoint is None else checkpoint.model)
    return model, ranks.scatter(None if checkpoint is None else checkpoint.states)


def in_order(folder: Path, name_prefix: str | None = None) -> list[Path]:
    """A folder's checkpoints, those after the fewest time steps first."""
    paths = [path for path in folder.glob(f"*{SUFFIX}") if _steps(path, name_prefix) is not None]
    return sorted(paths, key=lambda path: _steps(path, name_prefix) or 0)


def _steps(path: Path, name_prefix: str | None) -> int | None:
    prefix = ".*" if name_prefix is None else re.escape(name_prefix)
    match = re.fullmatch(rf"{prefix}_(\d+)_steps", path.stem)
    return None if match is None else int(match[1])


class ResumableCheckpointCallback(UpdateCallback):
    """
    Saves, behind updates, all that the rest of the training depends on; ``PPO.resume`` goes on from there, to the same bits.

    Saved are model, optimisers, beta, schedules' progress, counters, episode statistics, values not yet logged, random states
    of Python, NumPy and torch, ``VecNormalize``, the callbacks' plain attributes, and environments with their random states.
    Where these can't be captured, a warning says so once, and they start a new episode on resume.

    The first Ctrl-C (SIGINT) lets the rollout and its update end, saves, and then raises ``KeyboardInterrupt``; the second one
    does so at once.

    :param save_path: folder, which is created; of one training, or of several whose files have other prefixes
    :param save_freq: updates between two checkpoints
    :param name_prefix: of the files' names
    :param keep: how many checkpoints stay, the newest ones
    :param verbose: 1 to tell of each
    :raises TypeError: if ``save_freq`` or ``keep`` is no integer
    :raises ValueError: if one of them is less than 1, or if training starts where the folder has a checkpoint from later on
    """

    def __init__(
        self, save_path: str | Path, save_freq: int = 1, name_prefix: str = "ppo", keep: int = 3, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.save_path = Path(save_path)
        self.save_freq = check_positive_int("save_freq", save_freq)
        self.name_prefix = name_prefix
        self.keep = check_positive_int("keep", keep)
        self.n_updates = 0
        self._told = False
        self._told_lost = False
        self._at_start: dict[int, dict[str, bytes]] = {}
        self._objects: dict[int, dict[str, Any]] = {}
        self._stopping = False
        self._handler: Any = None

    def _init_callback(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)

    def _on_ready(self) -> None:
        for path in in_order(self.save_path, self.name_prefix) if self.model._ranks.is_first else []:
            if (_steps(path, self.name_prefix) or 0) > self.model.num_timesteps and _is_whole(path):
                raise ValueError(
                    f"`save_path` must not have checkpoints of another training, such as {path}, which is further than this "
                    f"one with {self.model.num_timesteps} time steps: resume it, or give another folder or `name_prefix`"
                )
        for callback in _callbacks(self.model._callback):  # those of an earlier `learn` have changed since then
            self._at_start.setdefault(id(callback), _pickled(callback))
        self._objects = {}
        self._stopping = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN):
            self._handler = signal.signal(signal.SIGINT, self._stop_behind_the_update)

    def _stop_behind_the_update(self, number: int, frame: Any) -> None:
        # Nothing is printed here, as something may just be being printed.
        self._stopping = True
        signal.signal(signal.SIGINT, self._handler)

    def _on_leaving(self, ended: bool) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
        if ended and self._stopping:
            raise KeyboardInterrupt

    def _on_update_start(self) -> None:
        if not self._objects:  # what training needs, such as a progress bar, is there by now
            self._objects = {id(callback): _objects(callback) for callback in _callbacks(self.model._callback)}

    def _on_update_settled(self) -> None:
        self.n_updates += 1
        self._stopping = self.model._ranks.any(self._stopping)
        if self._stopping or self.n_updates % self.save_freq == 0:
            self.save()
        if self._stopping:
            print("Ctrl-C: training ends behind the update, with a checkpoint")
            raise KeyboardInterrupt

    def save(self) -> Path:
        """Write a checkpoint now, behind an update; for all ranks to call."""
        state = state_of(self.model, self._at_start)
        self._tell(state["env"].envs)
        self._tell_what_is_lost()
        path = self.save_path / f"{self.name_prefix}_{self.model.num_timesteps}_steps{SUFFIX}"
        states = self.model._ranks.gather_at_first(state)
        if states is None:
            return path
        model = io.BytesIO()
        self.model.save(model)
        write(Checkpoint(model.getvalue(), states), path)
        paths = in_order(self.save_path, self.name_prefix)
        for old in paths[: max(paths.index(path) + 1 - self.keep, 0)]:  # later ones, if any, are damaged
            old.unlink()
        if self.verbose >= 1:
            print(f"Saved {path}")
        return path

    def _tell(self, envs: Any) -> None:
        if isinstance(envs, str) and not self._told:
            self._told = True
            warnings.warn(f"environments will start a new episode on resume, as {envs}", stacklevel=4)

    def _tell_what_is_lost(self) -> None:
        for callback in _callbacks(self.model._callback):
            before = self._objects.get(id(callback), {})
            for name, value in _objects(callback).items():
                if value is not before.get(name) and not self._told_lost:
                    self._told_lost = True
                    kind, owner = type(value).__qualname__, type(callback).__qualname__
                    warnings.warn(f"`{name}` of {owner} will be lost on resume: a {kind} is no plain data", stacklevel=4)


def go_on(model: "PPOBase", state: dict[str, Any], callback: Any, progress_bar: bool) -> None:
    """
    Continue a training.

    :param model: as it was loaded from the checkpoint
    :param state: the checkpoint's, of this rank
    :param callback: as ``learn`` takes it, of the same kinds as before
    :param progress_bar: as ``learn`` takes it
    """
    assert model.env is not None
    learning = state["learning"]
    total_timesteps, log_interval = learning["total_timesteps"], learning["log_interval"]
    vars(model).update(state["of_rank"])
    if not restore_vec_env(model.env, state["env"]):
        model._last_obs = None
    model._learn_arguments, model._iteration = learning, state["iteration"]
    extra = {"use_masking": learning["use_masking"]} if "use_masking" in learning else {}
    with model._left_in_order():
        more = total_timesteps - model.num_timesteps
        _, root = model._setup_learn(more, callback, False, learning["tb_log_name"], progress_bar)
        for name, logged in zip(("name_to_value", "name_to_count", "name_to_excluded"), state["logged"], strict=True):
            getattr(model.logger, name).update(logged)
        root.on_training_start(locals(), globals())
        _restore_callbacks(_callbacks(root), state["callbacks"])
        _set_random_states(state["random"])

        while model.num_timesteps < total_timesteps:
            if not model.collect_rollouts(model.env, root, model.rollout_buffer, model.n_steps, **extra):
                break
            model._update_current_progress_remaining(model.num_timesteps, total_timesteps)
            if log_interval is not None and (model._iteration + 1) % log_interval == 0:
                model.dump_logs(model._iteration + 1)
            model.train()
        root.on_training_end()


def _callbacks(root: BaseCallback | None) -> list[BaseCallback]:
    """A callback and those within, in a fixed order."""
    found = [] if root is None else [root]
    for callback in found:  # which grows
        for value in vars(callback).values():
            inner = value if isinstance(value, list) else [value]
            found.extend(each for each in inner if isinstance(each, BaseCallback) and each not in found)
    return found


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except DamagedCheckpointError:
        return False
    return True


def _own(callback: BaseCallback) -> dict[str, Any]:
    return {name: value for name, value in vars(callback).items() if name not in NOT_CALLBACKS_OWN}


def _pickled(callback: BaseCallback) -> dict[str, bytes]:
    """A callback's plain attributes."""
    return {name: pickle.dumps(value) for name, value in _own(callback).items() if _is_plain(value)}


def _objects(callback: BaseCallback) -> dict[str, Any]:
    """A callback's other attributes, but for what is dealt with apart."""
    apart = (BaseCallback, VecEnv)
    return {name: value for name, value in _own(callback).items() if not _is_plain(value) and not isinstance(value, apart)}


def _callback_state(callback: BaseCallback, at_start: dict[str, bytes]) -> tuple[str, dict[str, Any]]:
    """What has changed since training started (the rest is settings, which may be others on resume), and environments."""
    own = _own(callback)
    changed = {name: own[name] for name, pickled in _pickled(callback).items() if at_start.get(name) != pickled}
    envs = {name: capture_vec_env(value) for name, value in own.items() if isinstance(value, VecEnv)}
    return type(callback).__qualname__, {**changed, **envs}


def _restore_callbacks(callbacks: list[BaseCallback], states: list[tuple[str, dict[str, Any]]]) -> None:
    """Each state goes to the next callback of its kind."""
    for kind, attributes in states:
        callback = next((each for each in callbacks if type(each).__qualname__ == kind), None)
        if callback is None:
            if attributes.keys() - {"n_calls", "num_timesteps", "n_updates", "_told", "_told_lost"}:
                warnings.warn(f"`callback` has no {kind} as when it was saved: what that has seen is lost", stacklevel=4)
            continue
        callbacks.remove(callback)
        for name, value in attributes.items():
            if isinstance(vars(callback).get(name), VecEnv):
                restore_vec_env(vars(callback)[name], value)
            else:
                vars(callback)[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return value is None or isinstance(value, (bool, int, float, str, bytes, np.ndarray, np.generic, th.Tensor))
