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
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

from sb3_ppo_variants.arguments import check_positive_int
from sb3_ppo_variants.callbacks import UpdateCallback
from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.env_state import VecEnvState, capture_vec_env, restore_vec_env
from sb3_ppo_variants.isolation import undisturbed
from sb3_ppo_variants.logs import tensorboard_writers, write_kl_per_epoch
from sb3_ppo_variants.rollout import KEPT, SHAPE_WHEN_EMPTY

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
SB3S_IN_BUFFERS = frozenset(
    (
        *("buffer_size", "observation_space", "action_space", "obs_shape", "action_dim", "pos", "full", "device", "n_envs"),
        *("gae_lambda", "gamma", "observations", "actions", "rewards", "advantages", "returns", "episode_starts", "log_probs"),
        *("values", "generator_ready", "action_masks", "mask_dims", "hidden_state_shape"),
        *("hidden_states_pi", "cell_states_pi"),
        *("hidden_states_vf", "cell_states_vf", "seq_start_indices", "seq_end_indices", SHAPE_WHEN_EMPTY, KEPT),
    )
)
"""Attributes of rollout buffers that each rollout sets anew, or that are settings."""

MAX_FINGERPRINT = 2**20
"""Bytes of a pickle: larger objects are only told apart by which they are."""


class DamagedCheckpointError(Exception):
    """A file is no checkpoint, or not a whole one."""


PARTS = ("model.zip", "states.pkl")
"""Entries of a checkpoint's file, beside their checksums."""


class Checkpoint(NamedTuple):
    """
    Between two updates.

    :param model: as ``model.save`` writes it
    :param states: everything else, see :func:`state_of`, of each rank
    """

    model: bytes
    states: list[dict[str, Any]]


OF_A_RANK = (
    *("_last_obs", "_last_original_obs", "_last_episode_starts", "_last_lstm_states"),
    *("ep_info_buffer", "ep_success_buffer"),
)
"""Attributes of a model that depend on its environments."""


def state_of(model: "PPOBase", at_start: dict[int, dict[str, bytes]]) -> dict[str, Any]:
    """
    What the rest of a training depends on but for the model itself, behind an update.

    :param model: the model
    :param at_start: its callbacks' plain attributes when training started, by the callbacks' ids
    """
    assert model.env is not None
    logger = model.logger
    return {
        "algorithm": (type(model).__qualname__, _family(type(model))),
        "frozen": [name for name, parameter in model.policy.named_parameters() if not parameter.requires_grad],
        "buffer": {
            name: value
            for name, value in vars(model.rollout_buffer).items()
            if name not in SB3S_IN_BUFFERS and _is_plain(value)
        },
        "tensorboard": (None if model._custom_logger else logger.get_dir(), model._kl_per_epoch),
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
    parts = _parts(path)
    return Checkpoint(parts["model.zip"], pickle.loads(parts["states.pkl"]))


def model_of(path: Any) -> io.BytesIO | None:
    """
    The model in a checkpoint, as ``model.save`` writes it.

    :param path: of any file
    :return: ``None`` if it isn't a checkpoint
    :raises DamagedCheckpointError: if it is a damaged one
    """
    if not isinstance(path, (str, Path)) or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if not set(PARTS) <= set(archive.namelist()):
            return None
    return io.BytesIO(_parts(Path(path))["model.zip"])


def _parts(path: Path) -> dict[str, bytes]:
    """What a checkpoint consists of, whose checksums are right."""
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a checkpoint, or a folder of checkpoints, not {path}, which doesn't exist")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in PARTS}
            sums = json.loads(archive.read("sha256.json"))
        if any(hashlib.sha256(content).hexdigest() != sums[name] for name, content in parts.items()):
            raise ValueError("a checksum differs")
    except PermissionError:
        raise
    except Exception as error:  # of many kinds: modules for decompression have their own
        raise DamagedCheckpointError(f"{path} is no checkpoint, or a damaged one: {error}") from error
    return parts


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
        except Exception as refusal:  # which all ranks are to raise
            error = refusal
    error = ranks.broadcast(error)
    if error is not None:
        raise error
    model = ranks.broadcast(None if checkpoint is None else checkpoint.model)
    return model, ranks.scatter(None if checkpoint is None else checkpoint.states)


def in_order(folder: Path, name_prefix: str | None = None) -> list[Path]:
    """A folder's checkpoints, those after the fewest time steps first."""
    paths = [path for path in folder.glob(f"*{SUFFIX}") if _steps(path, name_prefix) is not None and path.is_file()]
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
    :raises ValueError: if one of them is less than 1, or if training starts where the folder has a checkpoint from later on,
        or with an optimiser that a policy like the model's wouldn't have
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
        self._told: set[str] = set()
        self._told_lost = False
        self._at_start: dict[int, dict[str, bytes]] = {}
        self._objects: dict[int, dict[str, tuple[Any, bytes | None]]] = {}
        self._stopping = False
        self._handler: Any = None

    def _init_callback(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)

    def _on_ready(self) -> None:
        _check_optimizer(self.model)
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
        if isinstance(getattr(self._handler, "__self__", None), ResumableCheckpointCallback):
            self._handler(number, frame)  # another of them saves too, and the second Ctrl-C isn't for it either
        else:
            signal.signal(signal.SIGINT, self._handler)

    def _on_leaving(self, ended: bool) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
        if ended and self._stopping:
            raise KeyboardInterrupt

    def _on_update_start(self) -> None:
        if not self._objects:  # what training needs, such as a progress bar, is there by now
            self._objects = {id(each): _objects(each, self.model) for each in _callbacks(self.model._callback)}

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
        self._tell(state)
        self._tell_what_is_lost()
        self.save_path.mkdir(parents=True, exist_ok=True)  # somebody may have cleared up
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

    def _tell(self, state: dict[str, Any]) -> None:
        of_callbacks = [
            (f"the environments in `{name}` of {kind}", value)
            for kind, attributes in state["callbacks"]
            for name, value in attributes.items()
        ]
        for owner, venv in [("environments", state["env"]), *of_callbacks]:
            if isinstance(venv, VecEnvState) and isinstance(venv.envs, str) and owner not in self._told:
                self._told.add(owner)
                warnings.warn(f"{owner} will start a new episode on resume, as {venv.envs}", stacklevel=3)

    def _tell_what_is_lost(self) -> None:
        if self._told_lost:
            return
        for callback in _callbacks(self.model._callback):
            before = self._objects.get(id(callback), {})
            for name, (value, fingerprint) in _objects(callback, self.model).items():
                value_before, fingerprint_before = before.get(name, (None, None))
                if (value is not value_before or fingerprint != fingerprint_before) and not self._told_lost:
                    self._told_lost = True
                    kind, owner = type(value).__qualname__, type(callback).__qualname__
                    warnings.warn(f"`{name}` of {owner} will be lost on resume: a {kind} is no plain data", stacklevel=3)


def _check_optimizer(model: "PPOBase") -> None:
    """
    Check that a policy like the model's has an optimiser like its: else no checkpoint could be resumed.

    :param model: the model
    :raises ValueError: if it has another one
    """
    expected = model.policy.optimizer_class, [len(list(model.policy.parameters()))]
    if _structure(model.policy.optimizer) == expected:
        return
    with undisturbed(model.policy):  # of a class of its own, whose optimiser may be any
        arguments = model.observation_space, model.action_space, model.lr_schedule
        use_sde = {"use_sde": True} if model.use_sde else {}  # contrib's policies don't know the argument
        policy: Any = model.policy_class(*arguments, **use_sde, **model.policy_kwargs)
    if _structure(model.policy.optimizer) != _structure(policy.optimizer):
        kind, sizes = _structure(model.policy.optimizer)
        raise ValueError(
            f"`policy.optimizer` must be built as {model.policy_class.__name__} builds it, for checkpoints to be resumed, not "
            f"a {kind.__name__} of {len(sizes)} group(s) with {sum(sizes)} parameters: give `optimizer_class` and "
            "`optimizer_kwargs` in `policy_kwargs`, or build it in a policy class"
        )


def _structure(optimizer: th.optim.Optimizer) -> tuple[type, list[int]]:
    return type(optimizer), [len(group["params"]) for group in optimizer.param_groups]


def _family(algorithm: type) -> str:
    """The algorithm of SB3, or of contrib, that one is a variant of: PPO and PPOKL go on with each other's checkpoints."""
    bases = (base for base in algorithm.__mro__ if base.__module__.startswith(("stable_baselines3.", "sb3_contrib.")))
    return next(f"{base.__module__}.{base.__qualname__}" for base in bases)


def check_algorithm(algorithm: type, state: dict[str, Any]) -> None:
    """
    Check that a checkpoint is one of an algorithm's.

    :param algorithm: the algorithm
    :param state: the checkpoint's
    :raises ValueError: if it is another one's
    """
    name, family = state["algorithm"]
    if family != _family(algorithm):
        raise ValueError(f"`path` must have checkpoints of {algorithm.__name__}, not of {name}: use `{name}.resume`")


def go_on(model: "PPOBase", state: dict[str, Any], callback: Any, progress_bar: bool) -> None:
    """
    Continue a training.

    :param model: as it was loaded from the checkpoint
    :param state: the checkpoint's, of this rank
    :param callback: as ``learn`` takes it, of the same kinds as before
    :param progress_bar: as ``learn`` takes it
    """
    assert model.env is not None
    _adopt_spaces(model)
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])
    vars(model.rollout_buffer).update(state["buffer"])
    learning = state["learning"]
    total_timesteps, log_interval = learning["total_timesteps"], learning["log_interval"]
    vars(model).update(state["of_rank"])
    if not restore_vec_env(model.env, state["env"]):
        model._last_obs = None
    model._learn_arguments, model._iteration = learning, state["iteration"]
    extra = {"use_masking": learning["use_masking"]} if "use_masking" in learning else {}
    with model._left_in_order():
        more = total_timesteps - model.num_timesteps
        folder, model._kl_per_epoch = state["tensorboard"]
        with _logging_to(model, folder):
            _, root = model._setup_learn(more, callback, False, learning["tb_log_name"], progress_bar)
        for name, logged in zip(("name_to_value", "name_to_count", "name_to_excluded"), state["logged"], strict=True):
            getattr(model.logger, name).update(logged)
        names_in_learn = {"self": model, "callback": root, "progress_bar": progress_bar, "iteration": model._iteration}
        root.on_training_start({**learning, **names_in_learn}, globals())
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


def _adopt_spaces(model: "PPOBase") -> None:
    """The environments' own spaces are the model's, with the same random states, as in a training that has gone on."""
    assert model.env is not None
    own = {id(model.observation_space): model.env.observation_space, id(model.action_space): model.env.action_space}
    for owner in (model, model.rollout_buffer, *model.policy.modules()):
        vars(owner).update({name: own[id(value)] for name, value in vars(owner).items() if id(value) in own})


@contextmanager
def _logging_to(model: "PPOBase", folder: str | None) -> Iterator[None]:
    """
    Go on in TensorBoard where the training has logged to, not where the latest one does, and with no step twice.

    :param model: the model, whose ``_setup_learn`` is called within
    :param folder: where the training has logged to
    """
    if model.tensorboard_log is None or folder is None or not model._ranks.is_first:
        yield
        return
    model._logger = configure(folder, ["stdout", "tensorboard"] if model.verbose >= 1 else ["tensorboard"])
    for writer in tensorboard_writers(model.logger):
        # What `SummaryWriter(purge_step=...)` writes: what was logged from this step on, before the crash, is not shown.
        restart = Event(step=model.num_timesteps + 1, session_log=SessionLog(status=SessionLog.START))
        writer._get_file_writer().add_event(restart)  # type: ignore[no-untyped-call]
    write_kl_per_epoch(model)
    model._custom_logger = True
    try:
        yield
    finally:
        model._custom_logger = False


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


def _objects(callback: BaseCallback, model: "PPOBase") -> dict[str, tuple[Any, bytes | None]]:
    """A callback's other attributes, but for what is dealt with apart, with what tells whether their contents have changed."""
    apart = (BaseCallback, VecEnv)
    objects = {name: value for name, value in _own(callback).items() if not _is_plain(value) and not isinstance(value, apart)}
    return {name: (value, _fingerprint(value, model)) for name, value in objects.items()}


def _fingerprint(value: Any, model: "PPOBase") -> bytes | None:
    """A checksum of an object without what is the model's; ``None`` if it can't be pickled, or is too large."""
    pickler = _Fingerprinter(model)
    try:
        pickler.dump(value)
    except Exception:  # of any kind: it is somebody's object
        return None
    return pickler.sum.digest()


class _Fingerprinter(pickle.Pickler):
    """
    Computes a checksum of what it pickles.

    :param model: which is left out, with all that is saved anyway
    """

    def __init__(self, model: "PPOBase") -> None:
        super().__init__(self)
        self.sum = hashlib.sha256()
        self._n_bytes = 0
        policy = model.policy
        parts = (model, model.rollout_buffer, *policy.modules(), *policy.parameters(), policy.optimizer, model.value_optimizer)
        self._saved = {id(part) for part in (*parts, model.logger)}

    def write(self, content: bytes) -> int:
        self._n_bytes += len(content)
        if self._n_bytes > MAX_FINGERPRINT:
            raise ValueError("too large")
        self.sum.update(content)
        return len(content)

    def persistent_id(self, obj: Any) -> str | None:
        apart = id(obj) in self._saved or isinstance(obj, (BaseCallback, VecEnv))
        return type(obj).__qualname__ if apart else None


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
            env = vars(callback).get(name)
            if isinstance(env, VecEnv):
                if not restore_vec_env(env, value):
                    env.reset()
            else:
                vars(callback)[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    generators = (np.random.Generator, np.random.RandomState, random.Random, th.Generator)
    return value is None or isinstance(value, (bool, int, float, str, bytes, np.ndarray, np.generic, th.Tensor, *generators))
