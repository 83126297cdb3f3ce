"""Files from others: what is saved with ``safe=True`` comes back to the bit, and no hostile file executes anything."""

import base64
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_variants import PPO, PPOKL, KLCoefController, RewardsToGoRolloutBuffer, UntrustedFileError, safe_file
from sb3_ppo_variants.kl_coef import KLCoefState
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
    "bounds that are none": {"clip_range": np.inf, "max_grad_norm": np.inf, "target_kl": np.inf},
    "numbers of NumPy": {"n_epochs": np.int64(3)},
}
SMALL = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 1}


def trained(**kwargs: Any) -> PPO:
    return PPO("MlpPolicy", "CartPole-v1", **{**SMALL, **kwargs}).learn(32)


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


OPTIMIZERS = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_all_of_torchs_optimizers_come_back(name: str, tmp_path: Path) -> None:
    model = trained(policy_kwargs={"optimizer_class": getattr(th.optim, name)})
    model.save(tmp_path / "model", safe=True)
    loaded = load(tmp_path / "model").policy.optimizer
    assert type(loaded) is getattr(th.optim, name)
    for parameter, theirs in zip(
        loaded.param_groups[0]["params"], model.policy.optimizer.param_groups[0]["params"], strict=True
    ):
        expected = model.policy.optimizer.state[theirs]
        assert loaded.state[parameter].keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_equal(np.asarray(loaded.state[parameter][key]), np.asarray(value))


def test_an_optimizer_that_needs_a_closure_is_named(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL, policy_kwargs={"optimizer_class": th.optim.LBFGS})
    with pytest.raises(ValueError, match=r"`policy_kwargs` can't be .*, as it is the class torch.optim.lbfgs.LBFGS: leave"):
        model.save(tmp_path / "model", safe=True)


def test_sb3s_optimizer_in_a_process_that_has_not_imported_it(tmp_path: Path) -> None:
    code = (
        "import sys; from sb3_ppo_variants import PPO; print(PPO.load(sys.argv[1], device='cpu', safe=True).policy.optimizer)"
    )
    trained(policy_kwargs={"optimizer_class": RMSpropTFLike}).save(tmp_path / "model", safe=True)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("RMSpropTFLike"), done.stderr


GSDE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "use_expln": {"use_expln": True},
    "one deviation for all actions": {"full_std": False},
    "squashed": {"squash_output": True},
}


@pytest.mark.parametrize("name", GSDE)
def test_gsde(name: str, tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "Pendulum-v1", **SMALL, use_sde=True, policy_kwargs=GSDE[name]).learn(16)
    model.save(tmp_path / "model", safe=True)
    assert_same_policy(load(tmp_path / "model"), model)


def test_gsde_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    PPO("MlpPolicy", "Pendulum-v1", **SMALL, use_sde=True).save(path, safe=True)
    with_tensors(lambda tensors: tensors.update(log_std=th.zeros(64, 2)))(path)
    with pytest.raises(UntrustedFileError, match="of the policy differ in log_std"):
        load(path)


def assert_same_policy(loaded: PPO, model: PPO) -> None:
    expected = model.policy.state_dict()
    assert loaded.policy.state_dict().keys() == expected.keys()
    for key, value in expected.items():
        assert th.equal(loaded.policy.state_dict()[key], value)


SPACES = {
    "image": spaces.Box(0, 255, (480, 640, 3), np.uint8),
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
        np.full((2, 3), -0.0),
        np.array([0.0, -0.0]),
        np.zeros((0, 3), np.int8),
        np.array(1.5),
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
    if isinstance(value, np.ndarray):
        assert (again.dtype, again.shape, again.tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_the_bounds_of_images_take_no_space() -> None:
    assert len(json.dumps(safe_file.to_plain("space", SPACES["image"]))) < 1000
    each_another = np.random.default_rng(1).random((480, 640, 3), np.float32)
    plain = safe_file.to_plain("space", spaces.Box(each_another - 1, each_another + 1))
    assert len(json.dumps(plain)) < safe_file.MAX_DATA_BYTES


def test_load_reads_such_files_without_being_asked(file: Path) -> None:
    assert PPOKL.load(file, device="cpu").n_steps == 16


def test_what_is_refused_of_others_is_taken_of_ones_own(file: Path) -> None:
    with_tensors(lambda tensors: tensors["value_net.bias"].fill_(np.nan))(file)
    edited(gamma=1.01, notes="mine")(file)
    loaded: Any = PPO.load(file, device="cpu")
    assert (loaded.gamma, loaded.notes) == (1.01, "mine")
    assert loaded.policy.state_dict()["value_net.bias"].isnan().all()


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
    assert_same_policy(loaded, model)


def test_recurrent_gsde(tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_ppo_variants.contrib")
    kwargs = {"lstm_hidden_size": 4, "n_lstm_layers": 2, "full_std": False}
    model = contrib.RecurrentPPO("MlpLstmPolicy", "Pendulum-v1", **SMALL, use_sde=True, policy_kwargs=kwargs)
    model.save(tmp_path / "model", safe=True)
    assert_same_policy(contrib.RecurrentPPO.load(tmp_path / "model", device="cpu", safe=True), model)


def test_layers_of_an_lstm_beyond_what_is_stored(tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_ppo_variants.contrib")
    path = tmp_path / "model.zip"
    contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", **SMALL).save(path, safe=True)
    edited(policy_kwargs={"n_lstm_layers": 20_000})(path)
    with pytest.raises(UntrustedFileError, match="`policy_kwargs` names more layers than there are parameters"):
        contrib.RecurrentPPO.load(path, device="cpu", safe=True)


class Counter(BaseFeaturesExtractor):
    """A module that needs memory to be built."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, int(th.full((), 4.0).item()))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations


def test_modules_of_the_callers_own(tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": Counter}
    model = trained(policy_kwargs=kwargs)
    model.save(tmp_path / "model", exclude=["policy_kwargs"], safe=True)
    assert_same_policy(load(tmp_path / "model", custom_objects={"policy_kwargs": kwargs}), model)


def test_what_is_no_plain_data_is_named_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`learning_rate` can't be saved as plain data, as it is a builtins.function: leave it"
    ):
        trained(learning_rate=lambda progress: 1e-3).save(tmp_path / "model.zip", safe=True)
    assert not (tmp_path / "model.zip").exists()


def test_custom_objects_take_the_place_of_what_was_left_out(tmp_path: Path) -> None:
    def constant(progress: float) -> float:
        return 1e-3

    trained(learning_rate=constant).save(tmp_path / "model.zip", exclude=iter(["learning_rate"]), safe=True)
    for safe in (True, False):
        for where in ({"custom_objects": {"learning_rate": constant}}, {"learning_rate": constant}):
            loaded: PPO = PPO.load(tmp_path / "model.zip", device="cpu", safe=safe, **where)  # type: ignore[arg-type]
            assert loaded.lr_schedule(1.0) == 1e-3
        with pytest.raises(UntrustedFileError, match="`learning_rate` couldn't be saved as plain data, and must be given in"):
            PPO.load(tmp_path / "model.zip", device="cpu", safe=safe)


class Slow(KLCoefController):
    """A rule of one's own."""

    def update(self, state: KLCoefState, kl: float, kl_target: float) -> KLCoefState:
        return KLCoefState(state.kl_coef * 1.1, *state[1:])


def test_a_beta_that_a_rule_of_ones_own_has_adapted_goes_on(tmp_path: Path) -> None:
    model = trained(clip_range=None, kl_coef=Slow())
    model.save(tmp_path / "model", exclude=["kl_coef"], safe=True)
    loaded = load(tmp_path / "model", custom_objects={"kl_coef": Slow()})
    assert loaded.kl_coef_state == model.kl_coef_state
    assert loaded.kl_coef_state is not None
    assert loaded.kl_coef_state.kl_coef == pytest.approx(1.1**2)


class Policy(ActorCriticPolicy):
    """The caller's own."""


def test_what_is_plain_data_may_be_left_out_for_good(tmp_path: Path) -> None:
    """As from SB3's files."""
    trained(target_kl=0.1).save(tmp_path / "model", exclude=["target_kl", "rollout_buffer"], safe=True)
    assert load(tmp_path / "model").target_kl is None


def test_a_policy_of_ones_own_has_to_be_given(tmp_path: Path) -> None:
    model = PPO(Policy, "CartPole-v1", **SMALL)
    model.save(tmp_path / "model", exclude=["policy_class"], safe=True)
    assert_same_policy(load(tmp_path / "model", custom_objects={"policy_class": Policy}), model)
    for safe in (True, False):
        with pytest.raises(UntrustedFileError, match="`policy_class` couldn't be saved as plain data, and must be given"):
            PPO.load(tmp_path / "model", device="cpu", safe=safe)


class Warm(LinearSchedule):
    def __call__(self, progress_remaining: float) -> float:
        return 1e-5 if progress_remaining > 0.9 else super().__call__(progress_remaining)


class Padded(spaces.Box):
    pass


class Keyed(spaces.Dict):
    pass


@pytest.mark.parametrize(
    "value", [Slow(), Warm(1e-3, 0.0, 1.0), Padded(-1, 1, (2,)), Keyed({"a": spaces.Discrete(2)}), np.ma.masked_array([1.0])]
)
def test_a_subclass_is_not_saved_as_what_it_derives_from(value: Any) -> None:
    with pytest.raises(ValueError, match=f"`name` can't be saved as plain data, as it is a .*{type(value).__name__}: leave"):
        safe_file.to_plain("name", value)


@pytest.mark.parametrize("algorithm", ["RecurrentPPO", "MaskablePPO"])
def test_a_file_of_another_algorithms_policy_is_refused(algorithm: str, tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_ppo_variants.contrib")
    policy = "MlpLstmPolicy" if algorithm == "RecurrentPPO" else "MlpPolicy"
    getattr(contrib, algorithm)(policy, "CartPole-v1", **SMALL).save(tmp_path / "model", safe=True)
    with pytest.raises(
        UntrustedFileError, match=r"`policy_class` must be one of ActorCriticPolicy, .* is it another algorithm's"
    ):
        load(tmp_path / "model")


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


def with_settings(**settings: Any) -> Callable[[Path], None]:
    """Others of the optimiser."""
    return with_tensors(lambda optimizer: optimizer["param_groups"][0].update(settings), "policy.optimizer.pth")


def number(value: float) -> Any:
    """As NumPy has it, in base64."""
    return safe_file.to_plain("number", np.float64(value))


def named(module: str, name: str) -> Any:
    return {":safe:": "class", "content": [module, name]}


def disguised(tensors: dict[str, Any]) -> None:
    """NaN in a tensor that says of itself that it consists of integers."""
    parameter = th.nn.Parameter(tensors["value_net.bias"].fill_(np.nan))
    parameter.is_floating_point = OrderedDict  # type: ignore[method-assign, assignment]
    tensors["value_net.bias"] = parameter


def with_pickle(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other instructions for the making of parameters."""

    def edit(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            content = archive.read("policy.pth")
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(changed, "w") as other:
            for name in archive.namelist():
                entry = archive.read(name)
                other.writestr(name, change(entry) if name.endswith("data.pkl") else entry)
        replaced(file, "policy.pth", changed.getvalue())

    return edit


def hidden(file: Path) -> None:
    """NaN in a dict that says of itself that it is empty."""

    def hide(tensors: dict[str, Any]) -> None:
        tensors["value_net.bias"].fill_(np.nan)
        vars(tensors)["jtems"] = OrderedDict

    with_tensors(hide)(file)
    with_pickle(lambda content: content.replace(b"jtems", b"items"))(file)


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    th.save(value, content)
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
    "pickle for parameters": (with_entry("policy.pth", saved(Bomb())), "Weights only load failed"),
    "bare pickle for parameters": (with_entry("policy.pth", pickle.dumps(Bomb())), "not a zip file"),
    "another class": (
        edited(policy_class=named("os", "system")),
        "os.system is no class",
    ),
    "a class that isn't imported": (
        edited(policy_class=named("sb3_contrib.nowhere", "Policy")),
        "sb3_contrib.nowhere isn't imported, and a file can't have it imported: import it first",
    ),
    "a module's import": (edited(policy_class=named("torch.optim.adam", "torch")), "torch.optim.adam.torch is no class"),
    "a class that is no policy": (
        edited(policy_class=named("torch.nn.modules.activation", "Tanh")),
        "`policy_class` must be a policy's class, not .*Tanh",
    ),
    "a class for a schedule": (
        edited(learning_rate=named("torch.nn.modules.linear", "Linear")),
        "`learning_rate` can't be the class Linear",
    ),
    "an optimizer that needs a closure": (
        edited(policy_kwargs={"optimizer_class": named("torch.optim.lbfgs", "LBFGS")}),
        "torch.optim.lbfgs.LBFGS is no class that a file may name",
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
    "JSON that is deeply nested": (with_entry("data", b'{"seed": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "damaged one"),
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
    "numbers that are infinite in fewer bits": (
        with_tensors(lambda tensors: tensors.update({"value_net.bias": th.full((1,), 1e300, dtype=th.float64)})),
        "of the policy differ in value_net.bias",
    ),
    "complex numbers": (
        with_tensors(lambda tensors: tensors.update({"value_net.bias": th.full((1,), complex(np.nan, 0))})),
        "policy.pth holds a tensor that is not of real numbers: torch.complex64",
    ),
    "a sparse tensor": (
        with_tensors(lambda tensors: tensors.update({"value_net.bias": th.zeros(1).to_sparse()})),
        "policy.pth holds a tensor that is not of real numbers: .*sparse",
    ),
    "a tensor without memory": (
        with_tensors(lambda tensors: tensors.update({"value_net.bias": th.zeros(1, device="meta")})),
        "policy.pth holds a tensor that is not of real numbers",
    ),
    "one number for many": (
        with_tensors(lambda tensors: tensors.update({"value_net.bias": th.zeros(1).expand(2**20)})),
        "policy.pth holds tensors that are larger than what is stored",
    ),
    "NaN in a tensor with methods of the file's": (with_tensors(disguised), "policy.pth holds numbers that are NaN"),
    "NaN in a dict with methods of the file's": (hidden, "policy.pth holds numbers that are NaN"),
    "a tensor for a name": (
        with_tensors(lambda tensors: tensors.update({(1, 2): th.zeros(1)})),
        "policy.pth holds a key that is a tuple",
    ),
    "tensors that take others' place": (
        with_entry("pytorch_variables.pth", saved({"policy.log_std": th.zeros(1)})),
        "'policy.log_std' among its tensors, which this algorithm hasn't",
    ),
    "parameters that are lists": (
        with_pickle(lambda content: b"\x80\x02](" + b"]" * 2**21 + b"e."),
        "policy.pth describes more tensors than 512 KiB can",
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
        r"`exp_avg` of an optimiser must be torch.float32 \[64, 4\], not torch.float32 \[7\]",
    ),
    "moments that are infinite in fewer bits": (
        with_moments(lambda moments: moments.update(exp_avg=moments["exp_avg"].double() + 1e300)),
        "`exp_avg` of an optimiser holds numbers that can't be",
    ),
    "squares that are negative": (
        with_moments(lambda moments: moments["exp_avg_sq"].fill_(-1.0)),
        "`exp_avg_sq` of an optimiser holds numbers that can't be",
    ),
    "steps that are NaN": (
        with_moments(lambda moments: moments.update(step=np.nan)),
        "`step` of an optimiser holds numbers that can't be",
    ),
    "steps that are negative": (
        with_moments(lambda moments: moments["step"].fill_(-5.0)),
        "`step` of an optimiser holds numbers that can't be",
    ),
    "moments of another optimizer": (
        with_moments(lambda moments: moments.update(square_avg=moments.pop("exp_avg_sq"))),
        r"an optimiser remembers \['exp_avg', 'square_avg', 'step'\], not \['exp_avg', 'exp_avg_sq', 'step'\]",
    ),
    "moments of no parameter": (
        with_tensors(lambda optimizer: optimizer["state"].update({99: {}}), "policy.optimizer.pth"),
        "moments of parameters that there aren't",
    ),
    "a learning rate that is NaN": (with_settings(lr=np.nan), "`lr` of an optimiser must be finite, not nan"),
    "an infinite decay": (with_settings(weight_decay=np.inf), "`weight_decay` of an optimiser must be finite, not inf"),
    "a NaN in a pair": (with_settings(betas=(np.nan, 0.9)), "`betas` of an optimiser must be finite, not nan"),
    "a decay of one": (with_settings(betas=(1.0, 0.9)), "Invalid beta parameter"),
    "a negative epsilon": (with_settings(eps=-1.0), "Invalid epsilon value: -1.0"),
    "a text for an epsilon": (with_settings(eps="1"), "not supported between"),
    "a tensor for a learning rate": (with_settings(lr=th.tensor(1.0)), "`lr` of an optimiser must be finite, not 1.0"),
    "NaN among the attributes": (edited(gamma=np.nan), "`gamma` holds numbers that are NaN or infinite"),
    "NaN among NumPy's numbers": (edited(gamma=number(np.nan)), "`gamma` holds numbers that are NaN or infinite"),
    "NaN for a bound": (edited(max_grad_norm=np.nan), "`max_grad_norm` holds numbers that are NaN"),
    "infinity in beta": (
        edited(kl_coef_state={":safe:": "KLCoefState", "content": [np.inf]}),
        "`kl_coef_state` holds numbers",
    ),
    "layers beyond memory": (
        edited(policy_kwargs={"net_arch": [10**9]}),
        "of the policy differ in action_net.weight",
    ),
    "rollouts beyond memory": (edited(n_steps=10**12), "its rollouts would take 48429 GiB"),
    "many small lists": (
        with_entry("data", b'{"seed": [' + b"[]," * 2**16 + b"[]]}"),
        "its attributes take 0 MiB, with 131075 values, more than 16 MiB or 131072 values",
    ),
    "a long text": (with_entry("data", b'{"seed": "' + bytes(2**24) + b'"}'), "its attributes take 16 MiB, with 1 values"),
    "an array of one number for many": (
        edited(seed={":safe:": "array", "content": ["<f8", [2**30], base64.b64encode(bytes(8)).decode()]}),
        "its attributes hold arrays of 8192 MiB, more than 256 MiB",
    ),
    "spaces missing": (edited(observation_space=None), "no spaces of observations"),
    "a space that is none": (edited(observation_space={":safe:": "Box", "content": [1, 0]}), "damaged one"),
    "text for a number": (edited(n_steps="many"), r"`n_steps` must be an integer >= 1, not 'many' \(str\)"),
    "a number in text": (edited(gamma="0.9"), r"`gamma` must be a number from 0 to 1, not '0.9' \(str\)"),
    "a number of 400 digits": (edited(gamma=10**400), "`gamma` holds an integer of more than 64 bits"),
    "a number beyond one": (edited(gae_lambda=3.0), "`gae_lambda` must be a number from 0 to 1, not 3.0"),
    "steps below zero": (edited(n_steps=-5), "`n_steps` must be an integer >= 1, not -5"),
    "half a step": (edited(n_steps=2.5), "`n_steps` must be an integer >= 1, not 2.5"),
    "no environments": (edited(n_envs=0), "`n_envs` must be an integer >= 1, not 0"),
    "a minibatch below zero": (edited(batch_size=-1), "`batch_size` must be None or an integer >= 1, not -1"),
    "a tuple for a number": (
        edited(n_epochs={":safe:": "tuple", "content": []}),
        r"`n_epochs` must be an integer >= 1, not \(\) \(tuple\)",
    ),
    "a seed beyond 32 bits": (edited(seed=2**40), r"`seed` must be None or an integer from 0 to 2\*\*32 - 1, not 1099"),
    "a seed beyond 64 bits": (edited(seed=2**70), "`seed` holds an integer of more than 64 bits"),
    "a window beyond memory": (edited(_stats_window_size=2**63), "`_stats_window_size` must be an integer >= 1, not 92"),
    "episodes that are none": (
        edited(ep_info_buffer={":safe:": "deque", "content": [[1], 100]}),
        "`ep_info_buffer` must be None or a deque of episodes",
    ),
    "a beta below zero": (
        edited(kl_coef_state={":safe:": "KLCoefState", "content": [-1.0]}),
        "`kl_coef_state` must be None or a number >= 0",
    ),
    "an optimizer": (edited(value_optimizer=1), "`value_optimizer` must be None, not 1"),
    "an observation": (edited(_last_obs=[1, 2]), "`_last_obs` must be None, not"),
    "arguments that are given twice": (
        edited(rollout_buffer_kwargs={"gae_lambda": 0.9}),
        "its parts don't fit together, or not with the arguments: .* multiple values",
    ),
    "another algorithm's": (of_sac, "which no file of this algorithm has: damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    make_hostile, message = HOSTILE[name]
    make_hostile(file)
    before = sorted(path.name for path in file.parent.rglob("*"))
    with pytest.raises(UntrustedFileError, match=message):
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
