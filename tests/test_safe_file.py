"""Files from others: what is saved with ``safe=True`` comes back to the bit, and no hostile file executes anything."""

import base64
import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_variants import PPO, PPOKL, KLCoefController, RewardsToGoRolloutBuffer, UntrustedFileError, safe_file
from tests.environments import RandomEnv

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "schedules": {"learning_rate": "lin_1e-3", "clip_range": LinearSchedule(0.2, 0.1, 0.5), "ent_coef": 0.01},
    "pair": {"clip_range": (0.2, 0.28)},
    "adaptive": {"clip_range": None, "kl_coef": KLCoefController(initial=0.5, hinge_coef=1000.0)},
    "critic": {"n_value_epochs": 2, "rollout_buffer_class": RewardsToGoRolloutBuffer},
    "policy": {
        "policy_kwargs": {
            "net_arch": {"pi": [8], "vf": [8, 8]},
            "activation_fn": th.nn.ReLU,
            "optimizer_class": th.optim.AdamW,
            "optimizer_kwargs": {"eps": 1e-7, "betas": (0.9, 0.99)},
        }
    },
}
SMALL = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 1}


def trained(**kwargs: Any) -> PPO:
    return PPO("MlpPolicy", "CartPole-v1", **SMALL, **kwargs).learn(32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    trained().save(tmp_path / "model.zip", safe=True)
    return tmp_path / "model.zip"


def load(path: Any, **kwargs: Any) -> PPO:
    return PPO.load(path, device="cpu", safe=True, **kwargs)


@pytest.mark.parametrize("name", CONFIGS)
def test_goes_on_as_after_sb3s_file(name: str, tmp_path: Path) -> None:
    models = []
    for safe in (False, True):
        trained(**CONFIGS[name]).save(tmp_path / f"{safe}", safe=safe)
        model = PPO.load(tmp_path / f"{safe}", env=gym.make("CartPole-v1"), device="cpu", safe=safe)
        model.set_random_seed(3)
        models.append(model.learn(32, reset_num_timesteps=False))
    theirs, ours = (model.get_parameters() for model in models)
    assert ours["policy.optimizer"]["state"].keys() == theirs["policy.optimizer"]["state"].keys()
    assert all(th.equal(ours["policy"][key], value) for key, value in theirs["policy"].items())
    assert models[0].num_timesteps == models[1].num_timesteps
    assert models[0].kl_coef_state == models[1].kl_coef_state


SPACES = {
    "box": spaces.Box(np.float32(-1), np.array([1, np.inf], np.float32)),
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"a": spaces.Box(0, 255, (3,), np.uint8), "b": spaces.Discrete(4)}),
}


@pytest.mark.parametrize("name", SPACES)
def test_spaces_come_back(name: str) -> None:
    plain = json.loads(json.dumps(safe_file.to_plain("space", SPACES[name])))
    assert safe_file.from_plain(plain) == SPACES[name]


@pytest.mark.parametrize(
    "value",
    [
        1,
        0.1,
        True,
        None,
        "text",
        [1, [2.5]],
        (1, (2,)),
        {"a": (1,)},
        np.float32(0.1),
        np.arange(3.0),
        LinearSchedule(1.0, 0.5, 0.1),
    ],
)
def test_values_come_back(value: Any) -> None:
    again = safe_file.from_plain(json.loads(json.dumps(safe_file.to_plain("value", value))))
    assert type(again) is type(value)
    if isinstance(value, LinearSchedule):
        assert vars(again) == vars(value)
    else:
        np.testing.assert_equal(again, value)


def test_load_reads_such_files_without_being_asked(file: Path) -> None:
    assert PPOKL.load(file, device="cpu").n_steps == 16


def test_dict_observations(tmp_path: Path) -> None:
    env = RandomEnv("dict")
    PPO("MultiInputPolicy", env, **SMALL).save(tmp_path / "dict", safe=True)
    assert load(tmp_path / "dict", env=env).observation_space == env.observation_space


@pytest.mark.parametrize("name", ["MaskablePPO", "RecurrentPPO"])
def test_contribs(name: str, tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_ppo_variants.contrib")
    policy = "MlpPolicy" if name == "MaskablePPO" else "MlpLstmPolicy"
    model = getattr(contrib, name)(policy, "CartPole-v1", n_steps=16, batch_size=8, device="cpu")
    model.save(tmp_path / "model", safe=True)
    loaded = type(model).load(tmp_path / "model", device="cpu", safe=True)
    for key, value in model.policy.state_dict().items():
        assert th.equal(loaded.policy.state_dict()[key], value)


def test_what_is_no_plain_data_is_named_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`learning_rate` can't be saved as plain data, as it is a builtins.function: leave it"
    ):
        trained(learning_rate=lambda progress: 1e-3).save(tmp_path / "model.zip", safe=True)
    assert not (tmp_path / "model.zip").exists()


def test_custom_objects_take_the_place_of_what_was_left_out(tmp_path: Path) -> None:
    def constant(progress: float) -> float:
        return 1e-3

    names = ("learning_rate", "lr_schedule")
    trained(learning_rate=constant).save(tmp_path / "model.zip", exclude=names, safe=True)
    assert load(tmp_path / "model.zip", custom_objects=dict.fromkeys(names, constant)).lr_schedule(1.0) == 1e-3


def test_a_file_of_sb3_names_what_would_be_unpickled(tmp_path: Path) -> None:
    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "sb3")
    with pytest.raises(
        UntrustedFileError, match=r"policy_class, .*observation_space, .* would have to be unpickled: save with"
    ):
        load(tmp_path / "sb3")


def test_a_file_does_not_say_where_logs_are_written(tmp_path: Path) -> None:
    trained(tensorboard_log=str(tmp_path / "logs")).save(tmp_path / "model", safe=True)
    assert load(tmp_path / "model").tensorboard_log is None
    assert load(tmp_path / "model", tensorboard_log="here").tensorboard_log == "here"


class Bomb:
    """Leaves a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def bomb_in_json() -> str:
    return base64.b64encode(pickle.dumps(Bomb())).decode()


def replaced(file: Path, name: str, content: bytes | None) -> None:
    """An entry with other content, a new one, or none."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    entries.pop(name, None)
    if content is not None:
        entries[name] = content
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, each in entries.items():
            archive.writestr(entry, each)


def edited(**changes: Any) -> Callable[[Path], None]:
    """Other attributes; ``None`` drops one."""

    def edit(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data"))
        data = {key: value for key, value in {**data, **changes}.items() if value is not None}
        replaced(file, "data", json.dumps(data).encode())

    return edit


def with_entry(name: str, content: bytes | None) -> Callable[[Path], None]:
    return lambda file: replaced(file, name, content)


def with_tensors(change: Callable[[dict[str, Any]], Any], entry: str = "policy.pth") -> Callable[[Path], None]:
    """Other parameters."""

    def edit(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            tensors = th.load(io.BytesIO(archive.read(entry)), weights_only=True)
        change(tensors)
        content = io.BytesIO()
        th.save(tensors, content)
        replaced(file, entry, content.getvalue())

    return edit


def with_moments(change: Callable[[dict[str, th.Tensor]], Any]) -> Callable[[Path], None]:
    """Others of the first parameter."""
    return with_tensors(lambda optimizer: change(optimizer["state"][0]), "policy.optimizer.pth")


def pickled_tensors() -> bytes:
    content = io.BytesIO()
    th.save(Bomb(), content)
    return content.getvalue()


def zip_bomb(file: Path) -> None:
    replaced(file, "system_info.txt", None)
    with (
        zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("system_info.txt", "w", force_zip64=True) as entry,
    ):
        for _ in range(33):
            entry.write(bytes(2**26))


def inner_zip_bomb(file: Path) -> None:
    inner = io.BytesIO()
    with (
        zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("data.pkl", "w", force_zip64=True) as entry,
    ):
        for _ in range(33):
            entry.write(bytes(2**26))
    replaced(file, "policy.pth", inner.getvalue())


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def of_sac(file: Path) -> None:
    stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10).save(file)


def duplicate(file: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("data", "{}")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle in an attribute": (
        edited(seed={":type:": "int", ":serialized:": bomb_in_json()}),
        "seed would have to be",
    ),
    "pickle for parameters": (with_entry("policy.pth", pickled_tensors()), "Weights only load failed"),
    "bare pickle for parameters": (with_entry("policy.pth", pickle.dumps(Bomb())), "not a zip file"),
    "another class": (
        edited(policy_class={":safe:": "class", "content": ["os", "system"]}),
        "os.system is no class",
    ),
    "a class that isn't imported": (
        edited(policy_class={":safe:": "class", "content": ["sb3_contrib.nowhere", "Policy"]}),
        "no class that a file may name",
    ),
    "a class that is no policy": (
        edited(policy_class={":safe:": "class", "content": ["torch.nn.modules.activation", "Tanh"]}),
        "damaged one",
    ),
    "an unknown kind of value": (edited(seed={":safe:": "eval", "content": "1"}), "damaged one: 'eval'"),
    "an array of objects": (edited(seed={":safe:": "array", "content": ["|O", [1], ""]}), "arrays must be of numbers"),
    "an environment": (edited(env="os:system"), "`env`, which this algorithm hasn't"),
    "a path": (with_entry("../../evil.pth", b""), "holds '../../evil.pth', which no file of this algorithm has"),
    "an absolute path": (with_entry("/etc/evil", b""), "holds '/etc/evil'"),
    "an entry twice": (duplicate, "an entry twice"),
    "a zip bomb": (zip_bomb, "2 GiB unpacked, more than 2 GiB"),
    "a zip bomb within": (inner_zip_bomb, "2 GiB unpacked, more than 2 GiB"),
    "a truncated file": (truncated, "which no file of this algorithm has: damaged"),
    "a flipped bit": (flipped, "no file of a model, or a damaged one"),
    "no zip": (lambda file: file.write_bytes(b"hello"), "damaged one: File is not a zip file"),
    "an empty file": (lambda file: file.write_bytes(b""), "damaged one: File is not a zip file"),
    "no attributes": (with_entry("data", None), "damaged one: 'data'"),
    "no JSON": (with_entry("data", b"{"), "damaged one: Expecting"),
    "JSON that is deeply nested": (with_entry("data", b'{"seed": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "damaged one"),
    "JSON that is a list": (with_entry("data", b"[]"), "damaged one"),
    "no parameters": (with_entry("policy.pth", None), "damaged one: 'policy.pth'"),
    "NaN in the parameters": (
        with_tensors(lambda tensors: tensors["value_net.bias"].fill_(np.nan)),
        "policy.pth holds numbers",
    ),
    "another shape": (
        with_tensors(lambda tensors: tensors.update({"value_net.bias": th.zeros(7)})),
        "of the policy differ in value_net.bias",
    ),
    "a parameter too many": (
        with_tensors(lambda tensors: tensors.update(more=th.zeros(1))),
        "of the policy differ in more",
    ),
    "a parameter too few": (
        with_tensors(lambda tensors: tensors.pop("value_net.bias")),
        "of the policy differ in value_net.bias",
    ),
    "moments of other shapes": (
        with_moments(lambda moments: moments.update(exp_avg=th.zeros(7))),
        r"`exp_avg` of an optimiser must have shape \[64, 4\], not \[7\]",
    ),
    "NaN among the attributes": (edited(gamma=np.nan), "`gamma` holds numbers that are NaN or infinite"),
    "infinity in beta": (
        edited(kl_coef_state={":safe:": "KLCoefState", "content": [np.inf, 1.0]}),
        "`kl_coef_state` holds numbers",
    ),
    "layers beyond memory": (
        edited(policy_kwargs={"net_arch": [10**9]}),
        "of the policy differ in action_net.weight",
    ),
    "rollouts beyond memory": (edited(n_steps=10**12), "its rollouts would take 52154 GiB"),
    "spaces missing": (edited(observation_space=None), "no spaces of observations"),
    "a space that is none": (edited(observation_space={":safe:": "Box", "content": [1, 0]}), "damaged one"),
    "text for a number": (edited(n_steps="many"), "damaged one"),
    "another algorithm's": (of_sac, "which no file of this algorithm has: damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    make_hostile, message = HOSTILE[name]
    make_hostile(file)
    before = sorted(path.name for path in file.parent.rglob("*"))
    with pytest.raises((UntrustedFileError, ValueError), match=message):
        load(file)
    assert sorted(path.name for path in file.parent.rglob("*")) == before


def test_the_bomb_would_have_worked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In SB3's ``load``."""
    monkeypatch.chdir(file.parent)
    HOSTILE["pickle in an attribute"][0](file)
    with contextlib.suppress(Exception):
        stable_baselines3.PPO.load(file, device="cpu")
    assert (file.parent / "exploded").exists()


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
