"""The RL Zoo's commands with our algorithms."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import stable_baselines3
import yaml
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_ppo_variants import PPO, PPOKL
from tests.test_parity import assert_same_tensors

# The Zoo is imported within tests only, as it changes gymnasium for the whole process.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="needs the extra `zoo`")]

OBJECTIVES = {  # whether it clips, and its kl_coef
    "ppo": (True, 0.0),
    "ppo_clip": (True, 0.0),
    "ppo_kl": (False, "auto"),
    "ppo_kl_fixed": (False, 3.0),
    "ppo_clip_kl": (True, "auto"),
}
SHORT = ["--env", "CartPole-v1", "--device", "cpu", "--num-threads", "1", "--seed", "0", "--eval-freq", "-1"]
SMALL = ["-n", "128", "-params", "n_envs:2", "n_steps:32", "batch_size:32", "n_epochs:2"]
AGENT = "CartPole-v1_{}/CartPole-v1.zip"

Command = Callable[..., None]


@pytest.fixture(autouse=True, scope="module")
def _gymnasium_as_it_was() -> Iterator[None]:
    import rl_zoo3.gym_patches

    patched = rl_zoo3.gym_patches.PatchedTimeLimit
    yield
    for module in (gymnasium.wrappers, gymnasium.wrappers.common, gymnasium.envs.registration):
        if getattr(module, "TimeLimit", None) is patched:
            module.TimeLimit = patched.__base__


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Command:
    import rl_zoo3.train

    from sb3_ppo_variants.train import main

    # What the command leaves in the process is taken back after the test.
    monkeypatch.setattr(rl_zoo3.train, "ExperimentManager", rl_zoo3.train.ExperimentManager)

    def run(algo: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", "--algo", algo, *SHORT, *arguments])
        main()

    return run


@pytest.fixture
def enjoy(monkeypatch: pytest.MonkeyPatch) -> Command:
    from sb3_ppo_variants.enjoy import main

    def run(algo: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["enjoy", "--algo", algo, "-f", "logs", "--no-render", "--device", "cpu", *arguments])
        main()

    return run


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where the Zoo looks for `python`
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)


def objective(path: str | Path) -> tuple[bool, Any]:
    model = PPO.load(path, device="cpu")
    return model.clip_range is not None, model.kl_coef


@pytest.mark.parametrize("algo", OBJECTIVES)
def test_train_and_enjoy(
    algo: str, train: Command, enjoy: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(algo, *SMALL, "-tb", str(tmp_path / "tensorboard"))
    folder = Path("logs", algo)
    assert objective(folder / AGENT.format(1)) == OBJECTIVES[algo]
    saved = yaml.load((folder / "CartPole-v1_1/CartPole-v1/config.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert (saved["n_steps"], saved["gae_lambda"], saved["learning_rate"]) == (32, 0.8, "lin_0.001")  # given, the Zoo's
    name = {"ppo_kl": "PPOKL", "ppo_kl_fixed": "PPOKLFixed", "ppo_clip_kl": "PPOClipKL"}.get(algo, "PPO")
    assert [path.name for path in (tmp_path / "tensorboard/CartPole-v1").iterdir()] == [f"{name}_1"]

    capsys.readouterr()
    enjoy(algo, "-n", "600")
    printed = capsys.readouterr().out
    assert f"Loading logs/{algo}/{AGENT.format(1)}" in printed
    assert re.search(r"^[1-9]\d* Episodes$", printed, re.M)


def test_ppo_is_the_zoos_to_the_last_bit(train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import rl_zoo3.train

    arguments = [*SHORT, *SMALL, "--eval-freq", "64", "--save-freq", "64"]
    monkeypatch.setattr(sys, "argv", ["train", "--algo", "ppo", "-f", "theirs", *arguments])
    with monkeypatch.context() as context:
        context.setitem(rl_zoo3.ALGOS, "ppo", stable_baselines3.PPO)
        rl_zoo3.train.train()
    train("ppo", "-f", "ours", *arguments)
    names = {file.relative_to("theirs") for file in Path("theirs").rglob("*.zip")}
    checkpoints = {"rl_model_64_steps.zip", "rl_model_128_steps.zip"}
    assert {name.name for name in names} == {"CartPole-v1.zip", "best_model.zip", *checkpoints}
    for name in names:
        assert_same_tensors(*(load_from_zip_file(folder / name)[1] for folder in (Path("ours"), Path("theirs"))))


def test_given_hyperparameters_win(train: Command) -> None:
    train("ppo_kl_fixed", *SMALL, "clip_range:0.3", "kl_coef:'lin_0.5'", "ent_coef:'lin_0.25'")
    model = PPO.load(f"logs/ppo_kl_fixed/{AGENT.format(1)}", device="cpu")
    assert model.clip_range(1.0) == 0.3
    assert model.kl_coef == "lin_0.5"
    assert model.ent_coef(0.5) == 0.125


@pytest.mark.parametrize(
    ("before", "arguments", "after", "expected"),
    [
        ("ppo", ["surrogate:'spo'"], "ppo_kl", {"surrogate": "clip", "clip_range": None}),
        ("ppo", ["surrogate:'spo'"], "ppo", {"surrogate": "clip"}),
        ("ppo", ["dual_clip:3.0"], "ppo_kl", {"dual_clip": None, "clip_range": None}),
        ("ppo_kl_fixed", ["kl_rollback:0.03"], "ppo_kl", {"kl_rollback": None, "kl_coef": "auto"}),
        ("ppo_kl", ["kl_coef:'auto_0.3'"], "ppo_kl", {"kl_coef": "auto_0.3"}),
        ("ppo_kl_fixed", ["kl_coef:0.5"], "ppo_kl_fixed", {"kl_coef": 0.5}),
    ],
)
def test_the_objective_when_training_is_resumed(
    train: Command, before: str, arguments: list[str], after: str, expected: dict[str, Any]
) -> None:
    """That of ``--algo``, with the settings of the file where that has the same one."""
    Path("own.yml").write_text("CartPole-v1: {policy: MlpPolicy, n_timesteps: 64, n_steps: 64}")
    train(before, "--conf-file", "own.yml", "-params", *arguments)
    train(after, "--conf-file", "own.yml", "-i", f"logs/{before}/{AGENT.format(1)}")
    model = PPO.load(f"logs/{after}/{AGENT.format(1 + (before == after))}", device="cpu")
    assert {name: getattr(model, name) for name in expected} == expected


def test_a_pair_as_clip_range(train: Command) -> None:
    train("ppo_clip", *SMALL, "clip_range:(0.1, 'lin_0.3')")
    low, high = PPO.load(f"logs/ppo_clip/{AGENT.format(1)}", device="cpu").clip_range  # type: ignore[misc]
    assert (low, high(0.5)) == (0.1, 0.15)  # type: ignore[operator]


def test_null_is_no_clipping(train: Command) -> None:
    Path("own.yml").write_text(
        "CartPole-v1: {policy: MlpPolicy, n_timesteps: 64, n_steps: 64, clip_range: null, clip_range_vf: null}"
    )
    train("ppo", "--conf-file", "own.yml")
    assert objective(f"logs/ppo/{AGENT.format(1)}") == (False, 0.0)


def test_beta_goes_on_when_training_is_resumed(train: Command) -> None:
    train("ppo_kl", *SMALL, "kl_target:10.0")  # never reached: beta is halved in each of two updates
    path = f"logs/ppo_kl/{AGENT}"
    assert PPO.load(path.format(1), device="cpu").kl_coef_state == (1 / 4,)
    train("ppo_kl", *SMALL, "kl_target:10.0", "-i", path.format(1))
    model = PPO.load(path.format(2), device="cpu")
    assert model.kl_coef_state == (1 / 16,)
    assert model._n_updates == 8


@pytest.mark.parametrize("trained", [stable_baselines3.PPO, PPOKL])
@pytest.mark.parametrize("algo", OBJECTIVES)
def test_an_agent_goes_on_with_the_objective_of_the_command(algo: str, trained: type[PPO], train: Command) -> None:
    trained("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu").save("agent.zip")
    assert objective("agent.zip") == ((False, "auto") if trained is PPOKL else (True, 0.0))
    Path("own.yml").write_text("CartPole-v1: {policy: MlpPolicy, n_timesteps: 32}")  # says nothing about the objective
    train(algo, "--conf-file", "own.yml", "-i", "agent.zip")
    assert objective(f"logs/{algo}/{AGENT.format(1)}") == OBJECTIVES[algo]


def test_the_readmes_yaml(train: Command) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    Path("own.yml").write_text(block, encoding="utf-8")
    train("ppo", "--conf-file", "own.yml", "-n", "512")
    assert objective(f"logs/ppo/{AGENT.format(1)}") == (False, {"rule": "tf_agents", "initial": 0.5})


def test_callbacks_from_yaml(train: Command, capsys: pytest.CaptureFixture[str]) -> None:
    configuration = "CartPole-v1: {policy: MlpPolicy, n_timesteps: 256, n_steps: 128, n_epochs: 50, learning_rate: 0.01"
    callback = "callback: [sb3_ppo_variants.KLEarlyStoppingCallback: {target: 0.02, verbose: 1}]"
    for name, text in (("without", f"{configuration}}}"), ("with", f"{configuration}, {callback}}}")):
        Path(f"{name}.yml").write_text(text)
        train("ppo", "--conf-file", f"{name}.yml")
        printed = capsys.readouterr().out
        assert ("exceeds 0.03" in printed) == (name == "with")


@pytest.mark.parametrize("command", [[], ["-optimize"], ["-i", "agent.zip"]])
@pytest.mark.parametrize("algo", ["ppo", "ppo_kl"])
def test_unknown_key(algo: str, command: list[str], train: Command) -> None:
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save("agent.zip")
    Path("own.yml").write_text("CartPole-v1: {policy: MlpPolicy, n_timesteps: 32, kl_tarket: 0.1}")
    with pytest.raises(ValueError, match=rf"^`kl_tarket` \(.*, from own.yml\) .* of {algo}; the nearest: `kl_target`"):
        train(algo, "--conf-file", "own.yml", *command)
    with pytest.raises(ValueError, match=r"^`n_env` \(.*, from --hyperparams\) .* the nearest: `n_envs`"):
        train(algo, "-params", "n_env:3", *command)
    with pytest.raises(ValueError, match=r"^`seed` "):  # the command line's
        train(algo, "-params", "seed:3", *command)
    assert not Path("logs").exists()


def test_the_zoos_own_keys_are_known() -> None:
    """Those which it takes out before it passes the rest to the algorithm."""
    import inspect

    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_ppo_variants.zoo.manager import OF_THE_ZOO

    taken_out = set(re.findall(r'del hyperparams\["(\w+)"\]', inspect.getsource(ExperimentManager)))
    others = {"policy", "policy_kwargs", "noise_type", "noise_std"}  # arguments, and what only off-policy algorithms have
    assert set(OF_THE_ZOO) == taken_out - others


@pytest.mark.parametrize("algo", ["ppo_clip", "ppo_kl", "ppo_kl_fixed", "ppo_clip_kl"])
def test_defaults_are_the_zoos(algo: str) -> None:
    from importlib import import_module

    import rl_zoo3

    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams/ppo.yml").read_text())
    ours = import_module(f"sb3_ppo_variants.zoo.hyperparams.{algo}").hyperparams
    clips, kl_coef = OBJECTIVES[algo]
    objective = {"ppo_clip": {}, "ppo_kl_fixed": {"kl_coef": kl_coef}}.get(algo, {"kl_coef": kl_coef, "kl_target": 0.01})
    assert len(theirs) > 30
    assert ours.keys() == theirs.keys()
    for environment, hyperparams in theirs.items():
        if not clips:
            hyperparams.pop("clip_range", None)
        assert ours[environment] == {**hyperparams, **objective}


SEARCHED = {
    "ppo_kl": {"kl_target", "kl_coef_initial", "kl_coef_rule"},
    "ppo_kl_fixed": {"kl_coef"},
    "ppo_clip_kl": {"clip_range", "kl_target", "kl_coef_initial", "kl_coef_rule"},
}


@pytest.mark.parametrize("algo", SEARCHED)
def test_search(algo: str, train: Command, enjoy: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna
    import pandas as pd

    suggest_int = optuna.Trial.suggest_int  # powers of two, that would make long rollouts
    monkeypatch.setattr(optuna.Trial, "suggest_int", lambda trial, name, low, high: suggest_int(trial, name, 5, 5))
    study = ["--storage", "journal.log", "--study-name", "study"]
    search = ["-optimize", "--n-trials", "2", "-n", "64", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    train(algo, *search, *study, "-params", "n_envs:1")
    (report,) = Path("logs", algo).glob("report_*.csv")
    trials = pd.read_csv(report)
    assert list(trials["state"]) == ["COMPLETE"] * 2
    ours = {name.removeprefix("params_") for name in trials if re.match(r"params_(clip|kl)", name)}
    assert ours == SEARCHED[algo]
    assert {"params_learning_rate", "params_net_arch", "params_n_epochs"} < set(trials)  # the Zoo's for PPO

    train(algo, "-n", "32", *study, "--trial-id", "1", "-params", "n_envs:1")
    (config,) = Path("logs", algo).glob("*/CartPole-v1/config.yml")
    trained = PPO.load(config.parents[1] / "CartPole-v1.zip", device="cpu")
    trial = trials.iloc[1]
    if algo == "ppo_kl_fixed":
        assert trained.kl_coef == pytest.approx(trial["params_kl_coef"], rel=1e-12)
    else:
        assert trained.kl_target == pytest.approx(trial["params_kl_target"], rel=1e-12)
        assert trained.kl_coef["initial"] == pytest.approx(trial["params_kl_coef_initial"], rel=1e-12)
        assert trained.kl_coef["rule"] == trial["params_kl_coef_rule"]
    assert (trained.clip_range is None) == ("clip_range" not in SEARCHED[algo])
    enjoy(algo, "-n", "1")  # reads the configuration


def test_ranges_of_the_search() -> None:
    import optuna

    from sb3_ppo_variants.zoo.tuning import SAMPLERS

    distributions = {}
    for algo in ("ppo_kl", "ppo_kl_fixed"):
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        SAMPLERS[algo](trial, 1, 1, {})
        distributions |= {name: value for name, value in trial.distributions.items() if name.startswith("kl_")}
    assert distributions.pop("kl_coef_rule").choices == ("ppo", "tf_agents", "rllib")
    assert {name: (value.low, value.high, value.log) for name, value in distributions.items()} == {
        "kl_target": (0.001, 0.1, True),
        "kl_coef_initial": (0.1, 30.0, True),
        "kl_coef": (0.1, 30.0, True),
    }


def test_registration() -> None:
    import rl_zoo3
    import rl_zoo3.enjoy
    import rl_zoo3.exp_manager
    import rl_zoo3.train

    from sb3_ppo_variants.zoo import register

    def names() -> list[tuple[str, type]]:
        return list(rl_zoo3.exp_manager.ALGOS.items())

    once = names()
    register()
    assert names() == once
    assert dict(once)["ppo"] is PPO
    assert set(OBJECTIVES) < dict(once).keys() == rl_zoo3.train.ALGOS.keys() == rl_zoo3.enjoy.ALGOS.keys()
    assert set(OBJECTIVES) < rl_zoo3.exp_manager.HYPERPARAMS_SAMPLER.keys()
    assert set(OBJECTIVES) < rl_zoo3.exp_manager.HYPERPARAMS_CONVERTER.keys()
    for algo in OBJECTIVES:
        assert pickle.loads(pickle.dumps(rl_zoo3.ALGOS[algo])) is rl_zoo3.ALGOS[algo]


@pytest.mark.parametrize("command", ["train", "enjoy"])
def test_help_names_the_algorithms(command: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        request.getfixturevalue(command)("ppo_kl", "--help")
    assert ",ppo_clip,ppo_kl,ppo_kl_fixed,ppo_clip_kl}" in capsys.readouterr().out


def test_the_zoos_own_commands() -> None:
    arguments = ["--algo", "ppo", *SHORT, *SMALL, "kl_coef:'auto'"]
    done = python("-m", "rl_zoo3.train", "--gym-packages", "sb3_ppo_variants.zoo", *arguments)
    assert done.returncode == 0, done.stderr
    assert objective(f"logs/ppo/{AGENT.format(1)}") == (True, "auto")

    Path("custom_envs.py").write_text("import sb3_ppo_variants.zoo\n")
    arguments = ["--algo", "ppo_kl", "--conf-file", "sb3_ppo_variants.zoo.hyperparams.ppo_kl", *SHORT, *SMALL]
    done = python("-m", "rl_zoo3.train", *arguments)
    assert done.returncode == 0, done.stderr
    assert objective(f"logs/ppo_kl/{AGENT.format(1)}") == OBJECTIVES["ppo_kl"]


def test_the_zoos_benchmark(train: Command) -> None:
    import sb3_ppo_variants.enjoy

    train("ppo_kl", *SMALL)
    shutil.copy(sb3_ppo_variants.enjoy.__file__, "enjoy.py")
    done = python("-m", "rl_zoo3.benchmark", "--log-dir", "logs", "--no-hub", "--num-threads", "1", "-n", "600")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|ppo_kl\|CartPole-v1\| +[\d.]+\|", Path("benchmark.md").read_text(), re.M), done.stdout


def test_without_the_zoo() -> None:
    script = """
import sys
import sb3_ppo_variants
assert not {"rl_zoo3", "optuna", "yaml"} & sys.modules.keys()
sys.modules["rl_zoo3"] = None  # as if it weren't installed
try:
    import sb3_ppo_variants.train
except ImportError as error:
    print(error)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert 'pip install "sb3-ppo-variants[zoo]"' in done.stdout
