"""Round trips, and files that travel between SB3's PPO and ours."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.common.utils import FloatSchedule

from sb3_ppo_variants import PPO, PPOKL, KLCoefController
from tests.test_parity import assert_same_tensors
from tests.test_ppo import learn, make

ROLLOUT = 48


def continued(model: PPO) -> dict[str, Any]:
    """Parameters after two more updates, from the same random state."""
    model.set_random_seed(3)
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    return {name: dict(state) for name, state in model.get_parameters().items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "no-clip": {"clip_range": None},
    "fixed-kl": {"clip_range": None, "kl_coef": 3.0},
    "scheduled-kl": {"kl_coef": "lin_3.0"},
    "adaptive-kl": {"kl_coef": "auto_0.3", "clip_range": None},
    "rule": {"kl_coef": {"rule": "rllib", "initial": 0.2}},
    "controller": {"kl_coef": KLCoefController(hinge_coef=10.0)},
    "critic-apart": {"n_value_epochs": 2, "value_learning_rate": "lin_0.01"},
    "schedules": {"ent_coef": "lin_0.01", "vf_coef": lambda progress: 0.5 + progress},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    """Parameters, optimisers' states, beta and arguments come back, and training goes on as in the saved model."""
    model = make(learning_rate=3e-3, **VARIANTS[variant])
    learn(model, 3)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=make().env, device="cpu")

    assert loaded.kl_coef_state == model.kl_coef_state
    assert type(loaded.kl_coef_state) is type(model.kl_coef_state)
    assert (loaded.clip_range is None) == (model.clip_range is None)
    assert (loaded.kl_target, loaded.n_value_epochs, loaded.engine) == (model.kl_target, model.n_value_epochs, model.engine)
    assert_same_tensors(
        {name: dict(state) for name, state in loaded.get_parameters().items()},
        {name: dict(state) for name, state in model.get_parameters().items()},
    )
    model.set_env(make().env)
    assert_same_tensors(continued(loaded), continued(model))
    assert loaded.kl_coef_state == model.kl_coef_state


def test_beta_is_saved_as_a_plain_number(tmp_path: Path) -> None:
    model = make(PPOKL)
    learn(model)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    assert model.kl_coef_state is not None
    assert data["kl_coef_state"] == [model.kl_coef_state.kl_coef]
    assert data["kl_coef"] == "auto"


def test_another_kl_coef_starts_anew(tmp_path: Path) -> None:
    model = make(PPOKL)
    learn(model, 3)
    model.save(tmp_path / "model.zip")
    assert model.kl_coef_state != (5.0,)
    for arguments in ({"kl_coef": "auto_5.0"}, {"custom_objects": {"kl_coef": "auto_5.0"}}):
        assert PPOKL.load(tmp_path / "model.zip", **arguments).kl_coef_state == (5.0,)
    # The RL Zoo hands all hyperparameters to `load` again: what hasn't changed goes on.
    for unchanged in ("auto", "auto_1.0", {"rule": "ppo"}):
        assert PPOKL.load(tmp_path / "model.zip", kl_coef=unchanged).kl_coef_state == model.kl_coef_state
    assert PPOKL.load(tmp_path / "model.zip", kl_coef=2.0).kl_coef_state is None


@pytest.mark.parametrize("algorithm", [PPO, PPOKL])
def test_loads_what_sb3_saved_and_goes_on(algorithm: type[PPO], tmp_path: Path) -> None:
    env = make().env
    theirs = stable_baselines3.PPO("MlpPolicy", env, n_steps=24, batch_size=16, n_epochs=2, seed=0, device="cpu")
    theirs.learn(ROLLOUT)
    theirs.save(tmp_path / "theirs.zip")

    ours = algorithm.load(tmp_path / "theirs.zip", env=make().env)
    assert_same_tensors(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))
    assert_same_tensors(ours.policy.optimizer.state_dict(), theirs.policy.optimizer.state_dict())
    assert isinstance(ours.clip_range, FloatSchedule)
    ours.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert ours.num_timesteps == 3 * ROLLOUT

    penalized = algorithm.load(tmp_path / "theirs.zip", env=make().env, clip_range=None, kl_coef="auto_0.5", n_value_epochs=2)
    assert penalized.kl_coef_state == (0.5,)
    assert penalized.clip_range is None
    penalized.learn(ROLLOUT)


def test_the_critics_optimiser_may_come_and_go(tmp_path: Path) -> None:
    joint, apart = make(), make(n_value_epochs=2, value_learning_rate=1e-3)
    learn(joint)
    learn(apart)
    joint.save(tmp_path / "joint.zip")
    apart.save(tmp_path / "apart.zip")
    assert PPO.load(tmp_path / "joint.zip", n_value_epochs=2).value_optimizer is not None
    assert PPO.load(tmp_path / "apart.zip", n_value_epochs=None).value_optimizer is None
    apart.set_parameters(str(tmp_path / "joint.zip"))
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        joint.set_parameters({"policy": joint.policy.state_dict()})


def test_sb3_loads_a_clip_model_where_this_package_is_missing(tmp_path: Path) -> None:
    """In another interpreter, in which importing the package fails."""
    model = make(learning_rate="lin_0.001", clip_range="lin_0.2")
    learn(model, 2)
    model.save(tmp_path / "ours.zip")
    script = f"""
import sys
sys.modules["sb3_ppo_variants"] = None  # importing it raises ImportError
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
try:
    import sb3_ppo_variants
except ImportError:
    pass
else:
    raise AssertionError
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.environments import RandomEnv
model = PPO.load({str(tmp_path / "ours.zip")!r}, env=DummyVecEnv([RandomEnv, RandomEnv]), device="cpu")
assert type(model) is PPO and model.num_timesteps == {2 * ROLLOUT}
model.learn(48, reset_num_timesteps=False)
assert model.num_timesteps == {3 * ROLLOUT}
print(float(model.clip_range(0.5)), float(model.lr_schedule(0.5)))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert output.stdout.split() == ["0.1", "0.0005"]
