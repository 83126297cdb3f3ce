"""Each script in examples/ runs, shortened where it takes long, and does what it says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import stable_baselines3
import torch as th

import sb3_ppo_variants

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(name: str) -> ModuleType:
    """The script as a module: its ``main`` doesn't run by itself."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swap_in_trains_what_sb3_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("swap_in")
    mean_returns, best_models = [], []
    for algorithm in (sb3_ppo_variants.PPO, stable_baselines3.PPO):
        monkeypatch.setattr(script, "PPO", algorithm)
        mean_returns.append(script.main(timesteps=8192))
        best = stable_baselines3.PPO.load(tmp_path / "runs/swap_in/best_model", device="cpu")
        best_models.append(best.policy.state_dict())
    assert mean_returns[0] == mean_returns[1]
    for name, values in best_models[0].items():
        assert th.equal(values, best_models[1][name])


def test_kl_early_stopping_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("kl_early_stopping").main(timesteps=8192) > 22  # what random actions give
    assert "exceeds 0.03" in capsys.readouterr().out


def test_update_callback_ends_some_updates() -> None:
    gradient_steps = load("update_callback").main(timesteps=8192)
    assert len(gradient_steps) == 8
    assert min(gradient_steps) < 20 * 4  # epochs x minibatches of a whole update
    assert max(gradient_steps) <= 20 * 4


def test_mujoco_normalized_writes_what_an_evaluation_needs(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    assert abs(load("mujoco_normalized").main(timesteps=2048)) < 2000
    assert (tmp_path / "runs/mujoco_normalized/model.zip").exists()
    assert (tmp_path / "runs/mujoco_normalized/vecnormalize.pkl").exists()


def test_masked_actions_never_draws_an_invalid_one() -> None:
    pytest.importorskip("sb3_contrib")
    assert load("masked_actions").main(timesteps=1024) > 100 / 60  # what guessing among all would give


def test_optuna_search_tells_the_best_trial() -> None:
    pytest.importorskip("optuna")
    study = load("optuna_search").main(n_trials=2, timesteps=2048)
    assert len(study.trials) == 2
    assert study.best_value == max(trial.value for trial in study.trials)


def test_rl_zoo_trains_the_variants_that_it_names(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    returns = load("rl_zoo").main(["ppo_kl_fixed"], timesteps=1024)
    assert 0 < returns["ppo_kl_fixed"] <= 500
    model = sb3_ppo_variants.PPO.load(tmp_path / "runs/rl_zoo/ppo_kl_fixed/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert (model.clip_range, model.kl_coef, model.n_epochs) == (None, 3.0, 20)


def test_vector_environment_is_solved() -> None:
    assert load("vector_environment").main() >= 475


def test_readme_names_every_example() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(examples/(\w+\.\w+)\)", readme))
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} <= named
    assert all((EXAMPLES / name).exists() for name in named)
