"""Bad arguments of PPO are found on construction; each error names the argument, the value and what is allowed."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from sb3_ppo_variants import PPO, PPOKL, GradientNoiseScaleCallback, KLEarlyStoppingCallback, TrustRegionLoggingCallback
from sb3_ppo_variants.arguments import current_value, parse_schedule
from tests.environments import RandomEnv


def make(algorithm: type[PPO] = PPO, **kwargs: Any) -> PPO:
    return algorithm("MlpPolicy", RandomEnv(), **{"n_steps": 8, "batch_size": 8, "device": "cpu", **kwargs})


class NoRolloutBuffer:
    """Takes what a rollout buffer takes, and is none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kl_coef": -1.0}, ValueError, r"`kl_coef` must be a finite number >= 0, not -1\.0"),
        ({"kl_coef": math.nan}, ValueError, "`kl_coef` must be a finite number >= 0, not nan"),
        ({"kl_coef": "auto_x"}, ValueError, "`kl_coef` must be 'auto' or 'auto_' and a finite number > 0, not 'auto_x'"),
        ({"kl_coef": lambda _: math.nan}, ValueError, r"`kl_coef\(progress_remaining=1\.0\)` must be .*, not nan"),
        ({"kl_target": 0.0}, ValueError, r"`kl_target` must be a finite number > 0, not 0\.0"),
        ({"kl_target": -0.01}, ValueError, r"`kl_target` must be a finite number > 0, not -0\.01"),
        ({"kl_target": math.inf}, ValueError, "`kl_target` must be a finite number > 0, not inf"),
        ({"kl_target": math.nan}, ValueError, "`kl_target` must be a finite number > 0, not nan"),
        ({"kl_target": None}, TypeError, r"`kl_target` must be a finite number > 0, not None \(NoneType\)"),
        ({"n_value_epochs": 0}, ValueError, "`n_value_epochs` must be an integer >= 1, not 0"),
        ({"n_value_epochs": -3}, ValueError, "`n_value_epochs` must be an integer >= 1, not -3"),
        ({"n_value_epochs": 2.0}, TypeError, r"`n_value_epochs` must be an integer >= 1, not 2\.0 \(float\)"),
        ({"n_value_epochs": True}, TypeError, r"`n_value_epochs` must be an integer >= 1, not True \(bool\)"),
        (
            {"clip_range": (0.1,)},
            ValueError,
            r"`clip_range` must be None, a number, a schedule or a pair of these, not \(0\.1,\)",
        ),
        ({"clip_range": [0.1, -0.2]}, ValueError, r"`clip_range\[1\]` must be a finite number >= 0, not -0\.2"),
        ({"clip_range": [0.1, None]}, TypeError, r"`clip_range\[1\]` must be a finite number >= 0, not None"),
        ({"clip_range": ["lin_x", 0.1]}, ValueError, r"`clip_range\[0\]` must be 'lin_' and a finite number"),
        ({"surrogate": "trpo"}, ValueError, "`surrogate` must be one of 'clip', 'spo', not 'trpo'"),
        (
            {"surrogate": "spo", "clip_range": None},
            ValueError,
            "`clip_range` must be a number > 0, or a schedule .*, not None",
        ),
        (
            {"surrogate": "spo", "clip_range": (0.1, 0.2)},
            ValueError,
            "`clip_range` must be a number > 0, or a schedule that stays above 0, for",
        ),
        ({"surrogate": "spo", "clip_range": "lin_0.2"}, ValueError, r"`clip_range\(progress_remaining=0\.0\)` must be .* > 0"),
        ({"dual_clip": 1.0}, ValueError, r"`dual_clip` must be None or a number > 1, not 1\.0"),
        (
            {"dual_clip": 3.0, "clip_range": None},
            ValueError,
            r"`dual_clip` must be None unless the surrogate is clipped, not 3\.0",
        ),
        ({"dual_clip": 3.0, "surrogate": "spo"}, ValueError, "`dual_clip` must be None unless the surrogate is clipped"),
        ({"kl_rollback": 0.0, "kl_coef": 1.0}, ValueError, r"`kl_rollback` must be a finite number > 0, not 0\.0"),
        ({"kl_rollback": 0.02}, ValueError, r"`kl_rollback` must be None unless `kl_coef` is given, not 0\.02"),
        ({"critic_first": True}, ValueError, "`critic_first` must be False unless `n_value_epochs` is given, not True"),
        ({"critic_first": 1, "n_value_epochs": 1}, TypeError, r"`critic_first` must be True or False, not 1 \(int\)"),
        ({"value_learning_rate": 1e-3}, ValueError, "`value_learning_rate` must be None unless `n_value_epochs` is given"),
        (
            {"value_learning_rate": -1e-3, "n_value_epochs": 1},
            ValueError,
            r"`value_learning_rate` must be a finite number >= 0, not -0\.001",
        ),
        ({"engine": "jit"}, ValueError, "`engine` must be one of 'auto', 'eager', 'fused', not 'jit'"),
        ({"engine": None}, TypeError, "`engine` must be one of 'auto', 'eager', 'fused', not None"),
        (
            {"ent_coef": "lin_x"},
            ValueError,
            "`ent_coef` must be 'lin_' and a finite number >= 0 if it is a string, not 'lin_x'",
        ),
        (
            {"ent_coef": "0.1"},
            TypeError,
            r"`ent_coef` must be a finite number, not '0\.1' \(str\) \(YAML reads",
        ),
        ({"kl_coef": [1.0]}, TypeError, r"`kl_coef` must be a number >= 0, a schedule, 'lin_3\.0', 'auto', .*, not \[1\.0\]"),
        ({"kl_coef": lambda progress: progress - 0.5}, ValueError, r"`kl_coef\(progress_remaining=0\.0\)` .*, not -0\.5"),
        (
            {"ent_coef": lambda _: math.nan},
            ValueError,
            r"`ent_coef\(progress_remaining=1\.0\)` must be .*, not nan",
        ),
        ({"vf_coef": None}, TypeError, r"`vf_coef` must be a finite number, not None \(NoneType\)"),
        ({"vf_coef": lambda _: None}, TypeError, r"`vf_coef\(progress_remaining=1\.0\)` must be a finite number, not None"),
        ({"clip_range_vf": "lin_"}, ValueError, "`clip_range_vf` must be 'lin_' and a finite number >= 0 if .*, not 'lin_'"),
        (
            {"learning_rate": "lin_-1"},
            ValueError,
            "`learning_rate` must be 'lin_' and a .* >= 0 if .*, not 'lin_-1'",
        ),
        (
            {"kl_coef": 1.0, "rollout_buffer_class": NoRolloutBuffer},
            ValueError,
            "`rollout_buffer_class` lacks what .* needs: it must be a subclass of RolloutBuffer .*, not NoRolloutBuffer",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("callback", "kwargs", "error", "message"),
    [
        (KLEarlyStoppingCallback, {"target": 0}, ValueError, "`target` must be a finite number > 0, not 0"),
        (KLEarlyStoppingCallback, {"target": "0.01"}, TypeError, r"`target` must be a finite number > 0, not '0\.01' \(str\)"),
        (KLEarlyStoppingCallback, {"factor": math.inf}, ValueError, "`factor` must be a finite number > 0, not inf"),
        (KLEarlyStoppingCallback, {"per": "step"}, ValueError, "`per` must be one of 'minibatch', 'epoch', not 'step'"),
        (
            KLEarlyStoppingCallback,
            {"estimator": "k4"},
            ValueError,
            "`estimator` must be one of 'exact', 'k1', 'k2', 'k3', not 'k4'",
        ),
        (KLEarlyStoppingCallback, {"stop": "critic"}, ValueError, "`stop` must be one of 'both', 'policy', not 'critic'"),
        (KLEarlyStoppingCallback, {"restore": 1}, TypeError, r"`restore` must be True or False, not 1 \(int\)"),
        (TrustRegionLoggingCallback, {"histogram_freq": 0}, ValueError, "`histogram_freq` must be an integer >= 1, not 0"),
        (GradientNoiseScaleCallback, {"decay": 1.0}, ValueError, r"`decay` must be a number from 0 to less than 1, not 1\.0"),
    ],
)
def test_bad_arguments_of_callbacks(callback: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        callback(**kwargs)


def test_a_policy_without_an_exact_kl_is_refused_for_a_kl_penalty_only() -> None:
    class Opaque(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.action_dist = object()  # type: ignore[assignment]

    def build(**kwargs: Any) -> PPO:
        return PPO(Opaque, RandomEnv(), n_steps=8, batch_size=8, device="cpu", **kwargs)

    build()
    with pytest.raises(ValueError, match=r"`policy` lacks what the exact KL needs: .* not Opaque"):
        build(kl_coef="auto")


def test_a_policy_without_a_critic_of_its_own_is_refused_for_passes_of_its_own_only() -> None:
    class Mean(th.nn.Module):
        def forward(self, latent: th.Tensor) -> th.Tensor:
            return latent.mean(dim=1, keepdim=True)

    class Fixed(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.value_net = Mean()  # type: ignore[assignment]

    def build(**kwargs: Any) -> PPO:
        arch = {"net_arch": {"pi": [8], "vf": []}}
        return PPO(Fixed, RandomEnv(), n_steps=8, batch_size=8, device="cpu", policy_kwargs=arch, **kwargs)

    build().learn(8)
    with pytest.raises(ValueError, match="`policy` must have parameters of the critic's own to train them apart, not Fixed"):
        build(n_value_epochs=1)


class OwnGet(RolloutBuffer):
    def get(self, batch_size: int | None = None) -> Any:
        yield from super().get(batch_size)


class OwnSamples(RolloutBuffer):
    def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
        return super()._get_samples(batch_inds, env)


@pytest.mark.parametrize("buffer", [OwnGet, OwnSamples])
def test_a_buffer_with_minibatches_of_its_own_is_refused_for_a_kl_penalty_only(buffer: type[RolloutBuffer]) -> None:
    make(rollout_buffer_class=buffer).learn(8)
    message = (
        f"`rollout_buffer_class` lacks what the exact KL needs: .* leaves `get` and `_get_samples` .*, not {buffer.__name__}"
    )
    for kwargs in ({"kl_coef": "auto"}, {"kl_coef": 1.0}, {"kl_coef": "lin_1.0"}):
        with pytest.raises(ValueError, match=message):
            make(rollout_buffer_class=buffer, **kwargs)


@pytest.mark.parametrize("name", ["ent_coef", "vf_coef", "kl_coef", "value_learning_rate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_schedule_that_goes_wrong_on_the_way_is_found_before_any_step(name: str, bad: float) -> None:
    kwargs = {"n_value_epochs": 1} if name == "value_learning_rate" else {}
    model = make(**{name: lambda progress: 0.1 if progress in (0.0, 1.0) else bad}, **kwargs)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.raises(ValueError, match=rf"`{name}\(progress_remaining=0\.5\)` must be .*, not {bad}"):
        model.learn(16)  # the first update is at half of it
    assert all(map(th.equal, before, model.policy.parameters()))


def test_arguments_given_to_load_are_checked_too(tmp_path: Any) -> None:
    make().save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="`kl_coef` must be a finite number >= 0, not -1"):
        PPO.load(tmp_path / "model.zip", kl_coef=-1)
    loaded = PPO.load(tmp_path / "model.zip", learning_rate="lin_0.5", clip_range=None, kl_coef="auto_2.0")
    assert loaded.lr_schedule(0.5) == 0.25
    assert loaded.clip_range is None
    assert loaded.kl_coef_state == (2.0,)


def test_zero_epochs_are_refused_by_the_update() -> None:
    with pytest.raises(ValueError, match="`n_epochs` must be an integer >= 1, not 0"):
        make(n_epochs=0).learn(8)


@pytest.mark.parametrize("number", [1, 1.0, np.float32(1), np.float64(1), np.int64(1)])
def test_numpy_numbers_are_numbers(number: Any) -> None:
    make(kl_coef=number, kl_target=number)
    make(n_value_epochs=np.int64(1))


def test_what_sb3_accepts_is_accepted() -> None:
    """Values that SB3 doesn't check, and that train in some way there, are no errors here."""
    for kwargs in (
        {"clip_range": math.inf},
        {"clip_range": math.nan},
        {"clip_range_vf": lambda progress: math.nan},
        {"ent_coef": -0.1},
        {"ent_coef": th.tensor([0.1])},
        {"target_kl": -1.0},
        {"vf_coef": 0},
        {"max_grad_norm": 1},
        {"n_epochs": True},
    ):
        make(**kwargs).learn(8)


def test_linear_schedules_fall_to_zero_and_are_sb3s_own() -> None:
    schedule = parse_schedule("clip_range", "lin_0.2")
    assert isinstance(schedule, LinearSchedule)
    assert [schedule(1.0), schedule(0.5), schedule(0.0)] == [0.2, 0.1, 0.0]
    model = make(learning_rate="lin_1e-3", clip_range="lin_0.2", clip_range_vf="lin_0.4", ent_coef="lin_0.01", vf_coef="lin_1")
    assert model.lr_schedule(0.5) == 5e-4
    assert isinstance(model.clip_range, FloatSchedule)
    assert model.clip_range(0.5) == 0.1


def test_current_value_of_numbers_and_schedules() -> None:
    assert current_value("ent_coef", 0.5, 0.25) == 0.5
    assert current_value("ent_coef", lambda progress: 2 * progress, 0.25) == 0.5


def test_positional_arguments_are_sb3s() -> None:
    """All of them, in SB3's order; the new ones are keyword-only."""
    import inspect

    import stable_baselines3

    theirs = inspect.signature(stable_baselines3.PPO.__init__).parameters
    ours = inspect.signature(PPO.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: parameter.default for name, parameter in theirs.items()} == {name: ours[name].default for name in theirs}
    added = [parameter for name, parameter in ours.items() if name not in theirs]
    assert {parameter.kind for parameter in added} == {inspect.Parameter.KEYWORD_ONLY}


def test_ppokl_only_changes_defaults() -> None:
    model = PPOKL("MlpPolicy", RandomEnv(), 1e-3, 16, 8, 3, 0.9, 0.8, 0.3, 0.4, False, 0.1, 0.7, device="cpu")
    assert (model.learning_rate, model.n_steps, model.batch_size, model.n_epochs) == (1e-3, 16, 8, 3)
    assert (model.gamma, model.gae_lambda, model.normalize_advantage) == (0.9, 0.8, False)
    assert (model.ent_coef, model.vf_coef) == (0.1, 0.7)
    assert isinstance(model.clip_range, FloatSchedule)
    assert model.clip_range(1.0) == 0.3

    default = make(PPOKL)
    assert default.clip_range is None
    assert default.kl_coef == "auto"
    assert default.kl_target == 0.01
    assert isinstance(default, PPO)
