"""Each script in examples/ runs, shortened where it takes long, and does what it says."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch as th
import yaml
from stable_baselines3.common import callbacks
from stable_baselines3.common.env_util import make_vec_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sb3_ppo_variants

pytestmark = pytest.mark.slow

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


def test_kl_early_stopping_keeps_every_update_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch's KL divergence of the policies before and after each update says; without the bound most would exceed it."""
    kls = []

    class Watched(sb3_ppo_variants.PPO):
        def train(self) -> None:
            observations = th.as_tensor(self.rollout_buffer.observations.reshape(-1, 4))
            with th.no_grad():
                old = self.policy.get_distribution(observations).distribution
            super().train()
            with th.no_grad():
                new = self.policy.get_distribution(observations).distribution
            kls.append(th.distributions.kl_divergence(old, new).mean().item())

    script = load("kl_early_stopping")
    monkeypatch.setattr(script, "PPO", Watched)
    assert script.main(timesteps=8192) > 22  # what random actions give
    assert len(kls) == 8
    assert 0 < max(kls) <= 0.03
    assert capsys.readouterr().out.count("exceeds 0.03") > 8 / 2


def test_update_callback_ends_the_updates_that_clip_too_much(tmp_path: Path) -> None:
    gradient_steps = load("update_callback").main(timesteps=8192)
    assert len(gradient_steps) == 8
    whole = 20 * 4  # epochs x minibatches
    assert min(gradient_steps) < whole == max(gradient_steps)

    (folder,) = (tmp_path / "runs/update_callback").iterdir()
    log = EventAccumulator(str(folder)).Reload()
    logged, clipped = (
        [event.value for event in log.Scalars(f"train/{key}")] for key in ("gradient_steps", "largest_clip_fraction")
    )
    assert logged == gradient_steps[:-1]  # the last update's is written by the next rollout, which there isn't
    for steps, largest in zip(logged, clipped, strict=True):
        assert (steps < whole) == (largest > 0.1)


def test_mujoco_normalized_evaluates_with_the_statistics_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    script = load("mujoco_normalized")
    trained, evaluated = [], []
    save, evaluate_policy = script.VecNormalize.save, script.evaluate_policy

    def watched_save(env: Any, path: str) -> None:
        trained.append(env)
        save(env, path)

    def watched_evaluation(model: Any, env: Any, n_eval_episodes: int) -> Any:
        evaluated.append((model, env, env.training, env.norm_reward))
        return evaluate_policy(model, env, n_eval_episodes=1)

    monkeypatch.setattr(script.VecNormalize, "save", watched_save)
    monkeypatch.setattr(script, "evaluate_policy", watched_evaluation)
    assert abs(script.main(timesteps=2048)) < 2000

    (env,), ((model, eval_env, training, norm_reward),) = trained, evaluated
    assert (training, norm_reward) == (False, False)
    assert eval_env is not env
    assert eval_env.obs_rms.count > 2048  # each of its steps, and what the count starts from
    for name in ("mean", "var", "count"):  # as they are after the evaluation
        np.testing.assert_array_equal(getattr(eval_env.obs_rms, name), getattr(env.obs_rms, name))
    assert model.num_timesteps == 2048


def test_masked_actions_never_draws_an_invalid_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sb3_contrib")
    script = load("masked_actions")
    valid = []

    class Watched(script.InvalidActionEnvDiscrete):
        def step(self, action: Any) -> Any:
            valid.append(self.action_masks()[int(action)])
            return super().step(action)

    monkeypatch.setattr(script, "InvalidActionEnvDiscrete", Watched)
    mean_return = script.main(timesteps=1024)
    assert len(valid) == 1024 + 20 * 100  # in training, and in the evaluation's episodes
    assert all(valid)
    assert mean_return > 10  # what guessing among the valid ones would give


class FakeTrial:
    """Keeps what it is told, and wants to be pruned at the report of that number."""

    def __init__(self, pruned_at: int) -> None:
        self.pruned_at = pruned_at
        self.reports: list[tuple[int, float]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((step, value))

    def should_prune(self) -> bool:
        return len(self.reports) == self.pruned_at


@pytest.fixture
def learn_with_pruning(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeTrial], Any]:
    """A training of 24 steps in 2 environments, evaluated at every fourth call, where mean returns are 10, 20 and 60."""
    pytest.importorskip("optuna")
    script = load("optuna_search")
    returns = iter((10.0, 20.0, 60.0))
    monkeypatch.setattr(callbacks, "evaluate_policy", lambda *args, **kwargs: ([next(returns)], [1]))

    def learn(trial: FakeTrial) -> Any:
        env, eval_env = (make_vec_env("CartPole-v1", 2) for _ in range(2))
        callback = script.PruningCallback(trial, eval_env, eval_freq=4)
        sb3_ppo_variants.PPO("MlpPolicy", env, n_steps=4, batch_size=8, device="cpu").learn(24, callback)
        return callback

    return learn


def test_pruning_callback_reports_the_mean_of_the_evaluations_so_far(learn_with_pruning: Callable[[FakeTrial], Any]) -> None:
    """10, (10 + 20) / 2 and (10 + 20 + 60) / 3, every 4 calls x 2 environments."""
    trial = FakeTrial(pruned_at=0)
    callback = learn_with_pruning(trial)
    assert trial.reports == [(8, 10.0), (16, 15.0), (24, 30.0)]
    assert callback.value == 30.0


def test_pruning_callback_ends_a_trial_that_says_so(learn_with_pruning: Callable[[FakeTrial], Any]) -> None:
    import optuna

    trial = FakeTrial(pruned_at=2)
    with pytest.raises(optuna.TrialPruned):
        learn_with_pruning(trial)
    assert trial.reports == [(8, 10.0), (16, 15.0)]


def test_optuna_search_evaluates_ten_times_and_closes_what_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two trials the second is pruned at once."""
    optuna = pytest.importorskip("optuna")
    script = load("optuna_search")
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
    opened, closed = [], []

    def watched_make_vec_env(*args: Any, **kwargs: Any) -> Any:
        env = make_vec_env(*args, **kwargs)
        opened.append(env)
        env.close = lambda: closed.append(env)
        return env

    monkeypatch.setattr(script, "make_vec_env", watched_make_vec_env)
    study = script.main(n_trials=2, timesteps=2048)
    completed, pruned = study.trials
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert list(completed.intermediate_values) == [200 * number for number in range(1, 11)]  # each 25 calls x 8 environments
    assert list(pruned.intermediate_values) == [200]
    assert study.best_value == completed.value == completed.intermediate_values[2000]
    assert len(opened) == 4
    assert {id(env) for env in opened} == {id(env) for env in closed}


def test_optuna_search_evaluates_however_short_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call of the 64 in the one rollout."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(callbacks, "evaluate_policy", lambda *args, **kwargs: ([1.0], [1]))
    (trial,) = load("optuna_search").main(n_trials=1, timesteps=1).trials
    assert len(trial.intermediate_values) == 64


def test_rl_zoo_trains_the_variants_that_it_names(tmp_path: Path) -> None:
    """Each as it is by itself, with the file's settings."""
    pytest.importorskip("rl_zoo3")
    objectives = {"ppo_clip": (0.2, 0.0), "ppo_kl_fixed": (None, 3.0)}
    returns = load("rl_zoo").main(list(objectives), timesteps=512)
    assert list(returns) == list(objectives)
    settings = yaml.safe_load((EXAMPLES / "rl_zoo.yml").read_text())["CartPole-v1"]
    for name, (clip_range, kl_coef) in objectives.items():
        assert 0 < returns[name] <= 500
        path = tmp_path / f"runs/rl_zoo/{name}/CartPole-v1_1/CartPole-v1.zip"
        model = sb3_ppo_variants.PPO.load(path, device="cpu")
        assert (model.clip_range and model.clip_range(1.0), model.kl_coef) == (clip_range, kl_coef)
        for key in ("n_envs", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda"):
            assert getattr(model, key) == settings[key], key
        assert [model.lr_schedule(remaining) for remaining in (1.0, 0.5)] == [0.001, 0.0005]


def test_several_ranks_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    """Alone; that several ranks train one model, see `test_torchrun.py`."""
    pytest.importorskip("mujoco")
    script = load("several_ranks")
    mean_return = script.main(timesteps=10 * 1024)
    folder = tmp_path / "runs/several_ranks"
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "model.zip", "vecnormalize.pkl"}
    assert script.main(timesteps=10 * 1024) == mean_return  # there is nothing left to do


def test_vector_environment_is_solved() -> None:
    assert load("vector_environment").main() >= 475


def test_readme_names_every_example() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(examples/(\w+\.\w+)\)", readme))
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} <= named
    assert all((EXAMPLES / name).exists() for name in named)
