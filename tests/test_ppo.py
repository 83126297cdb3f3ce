"""The variants inside ``train()``: which KL, which beta when, the critic's own passes, and what each variant learns."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_variants import PPO, PPOKL, KLCoefController, KLEarlyStoppingCallback, UpdateCallback, UpdateStats
from sb3_ppo_variants.critic import critic_parameters
from tests.environments import ACTION_SPACES, RandomEnv
from tests.test_parity import assert_same_tensors


class Watch(UpdateCallback):
    """Keeps the old policy, and each update's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[UpdateStats] = []
        self.old_policies: list[dict[str, th.Tensor]] = []
        self.kls: list[float] = []
        self.logged: list[dict[str, Any]] = []

    def _on_update_start(self) -> None:
        self.old_policies.append({name: tensor.clone() for name, tensor in self.model.policy.state_dict().items()})

    def _on_update_end(self, stats: UpdateStats) -> None:
        assert stats.displacement is not None
        self.updates.append(stats)
        self.kls.append(stats.displacement.kl.mean().item())
        self.logged.append(dict(self.model.logger.name_to_value))


def make(algorithm: type[PPO] = PPO, observation: str = "box", action: str = "box", **kwargs: Any) -> PPO:
    policy = "MultiInputPolicy" if observation == "dict" else "MlpPolicy"
    env = make_vec_env(lambda: RandomEnv(observation, action), 2, seed=0)
    return algorithm(policy, env, **{"n_steps": 24, "batch_size": 16, "n_epochs": 3, "seed": 0, "device": "cpu", **kwargs})


def learn(model: PPO, n_updates: int = 1) -> Watch:
    watch = Watch()
    model.learn(n_updates * model.n_steps * model.n_envs, callback=watch)
    return watch


def trained(**kwargs: Any) -> dict[str, th.Tensor]:
    """The policy's state after two updates."""
    model = make(**kwargs)
    learn(model, 2)
    return dict(model.policy.state_dict())


@pytest.mark.parametrize("observation", ["box", "discrete", "dict"])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_kl_is_exact_post_update_and_over_the_whole_rollout(observation: str, action: str) -> None:
    """By an independent route: both policies evaluated on the whole rollout by torch's own kl_divergence."""
    model = make(PPOKL, observation, action)
    watch = learn(model)
    observations = model.rollout_buffer.observations
    tensors = (
        {key: th.as_tensor(array) for key, array in observations.items()}
        if isinstance(observations, dict)
        else th.as_tensor(observations)
    )
    new_policy = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    with th.no_grad():
        params = []
        for state in (watch.old_policies[0], new_policy):
            model.policy.load_state_dict(state)
            distribution = model.policy.get_distribution(tensors)
            # A new object with its own inner distribution: the policy reuses one.
            params.append(type(distribution).__new__(type(distribution)))
            params[-1].__dict__.update(distribution.__dict__)
        expected = kl_divergence(*params)
    expected = expected.sum(dim=1) if expected.ndim == 2 else expected
    displacement = watch.updates[0].displacement
    assert displacement is not None
    assert expected.mean() > 1e-5
    th.testing.assert_close(displacement.kl, expected, rtol=1e-4, atol=1e-6)
    assert watch.logged[0]["train/kl"] == displacement.kl.mean().item()
    assert watch.logged[0]["train/kl_max"] == displacement.kl.max().item()


@pytest.mark.parametrize("squash_output", [False, True])
def test_kl_with_gsde(squash_output: bool) -> None:
    model = make(PPOKL, use_sde=True, policy_kwargs={"squash_output": squash_output})
    watch = learn(model, 2)
    assert all(math.isfinite(kl) and kl > 0 for kl in watch.kls)
    assert watch.updates[0].series("kl_penalty_loss").max() > 0


@pytest.mark.parametrize("kwargs", [{}, {"kl_coef": 3.0}, {"clip_range": None}])
def test_the_displacement_is_in_the_order_of_the_rollout(kwargs: dict[str, Any]) -> None:
    """The log-ratios belong to the buffer's own actions and log-probabilities."""
    model = make(**kwargs)
    watch = learn(model)
    buffer = model.rollout_buffer
    with th.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(th.as_tensor(buffer.observations), th.as_tensor(buffer.actions))
    displacement = watch.updates[0].displacement
    assert displacement is not None
    expected = log_prob - th.as_tensor(buffer.log_probs.flatten())
    th.testing.assert_close(displacement.log_ratio, expected, rtol=1e-4, atol=1e-6)


def test_minibatches_know_where_they_come_from() -> None:
    class Check(Watch):
        n_checked = 0

        def _on_minibatch(self, stats: UpdateStats) -> bool:
            samples, indices = stats.minibatch.samples, stats.minibatch.indices
            assert indices is not None
            buffer = self.model.rollout_buffer
            np.testing.assert_array_equal(buffer.observations[indices], samples.observations)
            np.testing.assert_array_equal(buffer.log_probs.flatten()[indices], samples.old_log_prob)
            self.n_checked += 1
            return True

    check = Check()
    make().learn(48, callback=check)
    assert check.n_checked == 9


def test_kl_of_the_first_minibatch_is_zero() -> None:
    """Before the first step the policy is the old one; its parameters are evaluated in batches of another size."""
    assert learn(make(PPOKL)).updates[0].kl_series()[0] == pytest.approx(0, abs=1e-10)


def test_beta_of_an_update_comes_from_the_updates_before_it() -> None:
    """The paper's rule, replayed by hand on the logged KLs: in effect in update n + 1, not in n."""
    model = make(PPOKL, learning_rate=3e-3)
    watch = learn(model, 6)
    beta = 1.0
    for kl, logged in zip(watch.kls, watch.logged, strict=True):
        assert logged["train/kl_coef"] == beta
        if kl < 0.01 / 1.5:
            beta /= 2
        elif kl > 0.01 * 1.5:
            beta *= 2
    assert model.kl_coef_state == (beta,)
    assert len({logged["train/kl_coef"] for logged in watch.logged}) > 1


@pytest.mark.parametrize(("kl_target", "expected"), [(1e-6, 2.0), (10.0, 0.5)])
def test_beta_follows_the_target_that_is_given(kl_target: float, expected: float) -> None:
    model = make(PPOKL, kl_target=kl_target)
    learn(model)
    assert model.kl_coef_state == (expected,)


def test_the_hinge_follows_the_target_that_is_given() -> None:
    coefs = learn(make(kl_coef={"hinge_coef": 7.0, "hinge_threshold": 3.0}, kl_target=0.5)).updates[0].coefs
    assert (coefs.hinge_coef, coefs.hinge_kl) == (7.0, 1.5)


def test_arguments_may_change_during_training() -> None:
    """As SB3's own may: from the next update on."""
    model = make(value_learning_rate=None)
    learn(model)
    model.kl_coef = 2.0
    assert learn(model).logged[0]["train/kl_coef"] == 2.0
    model.kl_coef = "auto_4.0"
    assert learn(model).logged[0]["train/kl_coef"] == 4.0
    assert model.kl_coef_state is not None
    model.n_value_epochs = 3
    stats = learn(model).updates[0]
    assert len(stats.series("value_loss")) == 3 * 3
    other = make(seed=9).policy
    model.policy = other
    before = other.value_net.weight.clone()
    learn(model)
    assert not th.equal(other.value_net.weight, before)
    model.n_value_epochs = None
    model.ent_coef = "lin_0.1"
    assert learn(model).updates[0].coefs.vf_coef == 0.5
    assert model.value_optimizer is None


@pytest.mark.parametrize(("name", "value"), [("kl_target", -1.0), ("n_value_epochs", 0), ("engine", "x"), ("kl_coef", "x")])
def test_what_is_assigned_during_training_is_checked_too(name: str, value: Any) -> None:
    model = make(PPOKL)
    learn(model)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        learn(model)


def test_what_is_refused_leaves_the_penalty_as_it_was() -> None:
    model = make(PPOKL, kl_rollback=0.03)
    learn(model, 2)
    state = model.kl_coef_state
    assert state is not None
    assert state.kl_coef != 1
    model.kl_coef = 0.0
    with pytest.raises(ValueError, match="`kl_rollback` must be None unless `kl_coef` is given"):
        learn(model)
    assert (model.kl_coef, model.kl_coef_state) == ("auto", state)
    assert learn(model).updates[0].coefs.kl_coef == state.kl_coef


def test_logged_penalty_is_beta_times_kl() -> None:
    stats = learn(make(clip_range=None, kl_coef=3.0)).updates[0]
    np.testing.assert_allclose(stats.series("kl_penalty_loss"), 3 * stats.kl_series(), rtol=1e-5, atol=1e-9)
    assert stats.kl_series()[1:].min() > 0


def test_a_fixed_beta_can_follow_a_schedule() -> None:
    watch = learn(make(kl_coef="lin_4.0"), 4)
    assert [logged["train/kl_coef"] for logged in watch.logged] == [3.0, 2.0, 1.0, 0.0]


def test_entropy_and_value_coefficients_can_follow_schedules() -> None:
    watch = learn(make(ent_coef="lin_0.4", vf_coef=lambda progress: 1 + progress), 2)
    assert [(update.coefs.ent_coef, update.coefs.vf_coef) for update in watch.updates] == [(0.2, 1.5), (0.0, 1.0)]


def test_a_larger_beta_keeps_the_policy_closer() -> None:
    kls = [learn(make(clip_range=None, kl_coef=beta, learning_rate=1e-2, n_epochs=10)).kls[0] for beta in (0.0, 1.0, 10.0)]
    assert kls[0] > 1.5 * kls[1] > 1.5 * 1.5 * kls[2]


def test_a_zero_beta_and_no_penalty_train_the_same_bits() -> None:
    states = [trained(kl_coef=beta) for beta in (0.0, lambda progress: 0.0)]
    assert_same_tensors(*states)


def test_an_infinite_clip_range_and_none_train_the_same_bits() -> None:
    states = [trained(clip_range=clip_range, learning_rate=1e-2) for clip_range in (math.inf, None)]
    assert_same_tensors(*states)


def test_without_clipping_nothing_about_clipping_is_logged() -> None:
    logged = learn(make(clip_range=None)).logged[0]
    assert not {"train/clip_range", "train/clip_fraction"} & logged.keys()


def test_the_hinge_acts_beyond_its_threshold() -> None:
    kwargs: dict[str, Any] = {"clip_range": None, "learning_rate": 1e-2, "n_epochs": 10}
    without = learn(make(kl_coef=KLCoefController(initial=1e-6), **kwargs)).kls[0]
    hinged = learn(make(kl_coef=KLCoefController(initial=1e-6, hinge_coef=1000.0), **kwargs)).kls[0]
    assert without > 0.04
    assert hinged < without / 1.5


def test_saturated_beta_warns_and_training_goes_on() -> None:
    model = make(PPOKL, kl_coef={"initial": 1.0, "maximum": 1.5}, kl_target=1e-9)
    with pytest.warns(UserWarning, match=r"kl_coef is saturated at its maximum, 1\.5"):
        watch = learn(model, 3)
    assert [logged["train/kl_coef"] for logged in watch.logged] == [1.0, 1.5, 1.5]


def test_the_critics_own_passes() -> None:
    """In the policy's passes the critic stands still, in its own passes only it moves, by its own optimiser."""

    class Phases(Watch):
        def _on_epoch_end(self, stats: UpdateStats) -> bool:
            self.after_policy = {name: tensor.clone() for name, tensor in self.model.policy.state_dict().items()}
            return True

    model = make(n_value_epochs=5, value_learning_rate=1e-2)
    critics = {"value_net.weight", "value_net.bias"} | {
        name for name in model.policy.state_dict() if "mlp_extractor.value_net" in name
    }
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    assert {name for name, parameter in model.policy.named_parameters() if id(parameter) in own} == critics

    phases = Phases()
    model.learn(48, callback=phases)
    for name, after in model.policy.state_dict().items():
        before, between = phases.old_policies[0][name], phases.after_policy[name]
        assert th.equal(before, between) == (name in critics)
        assert th.equal(between, after) == (name not in critics)

    assert model.value_optimizer is not None
    steps = {int(state["step"]) for state in model.value_optimizer.state.values()}
    assert steps == {5 * 3}
    assert model.value_optimizer.param_groups[0]["lr"] == 1e-2
    assert model.value_optimizer.param_groups[0]["eps"] == 1e-5
    assert phases.logged[0]["train/value_learning_rate"] == 1e-2
    assert len(phases.updates[0].series("value_loss")) == 5 * 3
    assert len(phases.updates[0].series("policy_loss")) == 3 * 3


@pytest.mark.parametrize("observation", ["box", "discrete", "multi_discrete", "dict"])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_the_critics_own_passes_in_all_spaces(observation: str, action: str) -> None:
    model = make(PPO, observation, action, n_value_epochs=2)
    assert len(critic_parameters(model.policy)) == 6
    learn(model)


@pytest.mark.parametrize("kl_coef", [0.0, "auto"])
def test_an_actor_that_is_frozen_lets_the_critic_train_by_itself(kl_coef: Any) -> None:
    """To warm the critic up; the actor learns when it is free again."""
    model = make(n_value_epochs=2, kl_coef=kl_coef)
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    actors = [parameter for parameter in model.policy.parameters() if id(parameter) not in own]
    for free in (False, True):
        before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
        for parameter in actors:
            parameter.requires_grad_(free)
        learn(model)
        for name, parameter in model.policy.named_parameters():
            assert th.equal(parameter, before[name]) == (not free and id(parameter) not in own)


def test_a_critic_that_is_frozen_stays_as_it_is() -> None:
    model = make(n_value_epochs=2)
    for parameter in critic_parameters(model.policy):
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    assert own
    learn(model)
    for name, parameter in model.policy.named_parameters():
        assert th.equal(parameter, before[name]) == (id(parameter) in own)


def test_passes_for_a_critic_of_which_a_part_is_frozen_can_be_loaded(tmp_path: Path) -> None:
    model = make()
    model.policy.value_net.requires_grad_(False)
    model.n_value_epochs = 2
    learn(model)
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model", device="cpu").n_value_epochs == 2


def test_the_critics_own_passes_lower_its_loss() -> None:
    losses = learn(make(n_value_epochs=40, batch_size=48, value_learning_rate=1e-2)).updates[0].series("value_loss")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kl_coef": lambda progress: 3 * progress},
        {"clip_range": (lambda progress: 0.2 * progress, 0.3)},
        {"n_value_epochs": 1, "value_learning_rate": lambda progress: 1e-3 * progress},
        {"surrogate": "spo", "clip_range": lambda progress: 0.2 * progress + 0.01},
    ],
)
def test_schedules_beyond_the_planned_end_stay_at_their_last_value(kwargs: dict[str, Any]) -> None:
    """The last rollout goes beyond it, and SB3's progress below 0."""
    model = make(**kwargs).learn(60)
    assert model._current_progress_remaining < 0


def test_a_range_of_spo_that_falls_to_0_on_the_way_is_an_error() -> None:
    model = make(surrogate="spo", clip_range=lambda progress: 0.2 if progress in (0, 1) else 0.0)
    with pytest.raises(ValueError, match=r"`clip_range\(progress_remaining=0\.\d+\)` must be a finite number > 0, not 0\.0"):
        model.learn(480)


def test_a_learning_rate_that_has_fallen_below_0_can_be_loaded(tmp_path: Path) -> None:
    make(n_value_epochs=2, learning_rate=lambda progress: 3e-4 * progress).learn(60).save(tmp_path / "model")
    PPO.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("per", ["minibatch", "epoch"])
def test_restoring_the_policy_leaves_a_critic_alone_that_came_first(per: str) -> None:
    model = make(n_value_epochs=5, critic_first=True, value_learning_rate=1e-2)
    before = {name: tensor.clone() for name, tensor in model.policy.named_parameters()}
    model.learn(48, callback=KLEarlyStoppingCallback(1e-12, per=per, restore=True))
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    for name, parameter in model.policy.named_parameters():
        assert th.equal(parameter, before[name]) == (id(parameter) not in own)


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_critic_first(engine: str, observation: str) -> None:
    """Only the critic moves in the passes before the policy's, whose advantages are those of SB3's GAE with its new values."""
    if engine == "fused" and observation == "dict":
        pytest.skip("not for Dict observations")
    model = make(PPO, observation, engine=engine, n_epochs=1, n_value_epochs=5, value_learning_rate=1e-2, critic_first=True)

    class Recomputed(Watch):
        def _on_update_start(self) -> None:
            super()._on_update_start()
            self.buffer = copy.deepcopy(model.rollout_buffer)

        def _on_minibatch(self, stats: UpdateStats) -> bool:
            if stats.gradient_steps == 0:
                self.check()
            return True

        def check(self) -> None:
            own = {id(parameter) for parameter in critic_parameters(model.policy)}
            for name, parameter in model.policy.named_parameters():
                assert th.equal(parameter, self.old_policies[-1][name]) == (id(parameter) not in own)
            buffer, flat = self.buffer, model.rollout_buffer
            assert np.array_equal(flat.values, buffer.swap_and_flatten(buffer.values))
            assert np.array_equal(flat.returns, buffer.swap_and_flatten(buffer.returns))
            with th.no_grad():
                for step in range(buffer.buffer_size):
                    observations: Any = buffer.observations
                    now = {k: v[step] for k, v in observations.items()} if observation == "dict" else observations[step]
                    buffer.values[step] = model.policy.predict_values(obs_as_tensor(now, model.device)).numpy().flatten()
                last = model.policy.predict_values(obs_as_tensor(model._last_obs, model.device))  # type: ignore[arg-type]
            old = buffer.swap_and_flatten(buffer.advantages)
            buffer.compute_returns_and_advantage(last, model._last_episode_starts)  # type: ignore[arg-type]
            np.testing.assert_allclose(flat.advantages, buffer.swap_and_flatten(buffer.advantages), rtol=1e-4, atol=1e-6)
            assert np.abs(flat.advantages - old).max() > 0.01
            self.checked = True

    watch = Recomputed()
    model.learn(96, callback=watch)
    assert watch.checked
    assert len(watch.updates[0].series("value_loss")) == 5 * 3


def test_the_critics_learning_rate_is_the_policys_unless_given() -> None:
    model = make(n_value_epochs=1, learning_rate="lin_0.1")
    learn(model, 2)
    assert model.value_optimizer is not None
    assert model.value_optimizer.param_groups[0]["lr"] == model.policy.optimizer.param_groups[0]["lr"] == 0.0


def test_target_kl_stops_the_policy_but_not_the_critics_own_passes() -> None:
    stats = learn(make(n_value_epochs=4, target_kl=1e-9, n_epochs=3)).updates[0]
    assert stats.epochs_completed == 0
    assert len(stats.series("value_loss")) == 4 * 3


def critics_gradients(model: PPO, n_updates: int = 1) -> list[float]:
    """Norms of the critic's gradients in its own passes, as its optimiser sees them."""
    assert model.value_optimizer is not None
    norms = []
    step = model.value_optimizer.step

    def watched_step() -> None:
        gradients = [parameter.grad.flatten() for parameter in critic_parameters(model.policy) if parameter.grad is not None]
        norms.append(th.cat(gradients).norm().item())
        step()

    model.value_optimizer.step = watched_step  # type: ignore[method-assign]
    learn(model, n_updates)
    return norms


def test_the_critics_own_passes_clip_the_gradients_norm() -> None:
    assert max(critics_gradients(make(n_value_epochs=1, max_grad_norm=100.0))) > 0.1
    assert max(critics_gradients(make(n_value_epochs=1, max_grad_norm=0.01))) == pytest.approx(0.01, rel=1e-3)


def test_the_critics_own_passes_clip_values() -> None:
    """With next to no room, the clipped value is the old one: a loss that stays where it is, and next to no gradient."""
    kwargs: dict[str, Any] = {"n_value_epochs": 10, "value_learning_rate": 1e-2, "batch_size": 48}
    losses = learn(make(clip_range_vf=1e-9, **kwargs)).updates[0].series("value_loss")
    assert losses[-1] == pytest.approx(losses[0], rel=1e-4)
    assert learn(make(**kwargs)).updates[0].series("value_loss")[-1] < 0.9 * losses[0]


class TrunkPolicy(ActorCriticPolicy):
    """Actor and critic share a hidden layer; the critic's head stands where no SB3 policy has it."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.value_net[0] = self.mlp_extractor.policy_net[0]

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.head = th.nn.Linear(1, 1)
        self.optimizer = th.optim.Adam(self.parameters(), lr=lr_schedule(1))

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.head(super().predict_values(obs))


def test_the_critics_parameters_are_those_that_only_values_depend_on() -> None:
    env = make_vec_env(RandomEnv, 2, seed=0)
    with pytest.warns(UserWarning, match="parameters that actor and critic share"):
        model = PPO(TrunkPolicy, env, n_steps=24, batch_size=16, n_value_epochs=2, device="cpu")
    own = {id(parameter) for parameter in critic_parameters(model.policy)}
    names = [name for name, parameter in model.policy.named_parameters() if id(parameter) in own]
    hidden = ["mlp_extractor.value_net.2.weight", "mlp_extractor.value_net.2.bias"]
    assert names == [*hidden, "value_net.weight", "value_net.bias", "head.weight", "head.bias"]


def test_a_shared_extractor_is_warned_about_and_left_to_the_policy() -> None:
    kwargs: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "n_value_epochs": 2}
    with pytest.warns(UserWarning, match="parameters that actor and critic share, .* are trained by the policy's loss alone"):
        model = PPO("CnnPolicy", RandomEnv("image", "discrete"), **kwargs)
    extractor = {id(parameter) for parameter in model.policy.features_extractor.parameters()}
    assert not extractor & {id(parameter) for parameter in critic_parameters(model.policy)}
    model.learn(16)

    apart = PPO("CnnPolicy", RandomEnv("image", "discrete"), policy_kwargs={"share_features_extractor": False}, **kwargs)
    own = {id(parameter) for parameter in critic_parameters(apart.policy)}
    assert {id(parameter) for parameter in apart.policy.vf_features_extractor.parameters()} < own
    apart.learn(16)


def test_an_exact_kl_that_fails_in_clip_mode_is_a_warning_once() -> None:
    model = make()

    def no_distribution(observations: Any) -> Any:
        raise NotImplementedError("not for this policy")

    model.policy.get_distribution = no_distribution  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="the exact KL is not logged: not for this policy") as warnings:
        model.learn(96)
    assert len(warnings) == 1
    assert "train/kl" not in model.logger.name_to_value
    assert "train/approx_kl" in model.logger.name_to_value

    penalized = make(PPOKL)
    penalized.policy.get_distribution = no_distribution  # type: ignore[method-assign]
    with pytest.raises(NotImplementedError, match="not for this policy"):
        penalized.learn(48)


@pytest.mark.parametrize("own_policy", ["OwnEvaluation", "SecondThoughts"])
def test_an_evaluation_of_ones_own_is_asked_for_its_distribution(own_policy: str) -> None:
    """
    The KL is that of the states in the loss, as with a policy that leaves their distribution in ``action_dist``.

    The one leaves ``action_dist`` alone, the other leaves a distribution for other states there.
    """
    from tests import test_parity

    series = []
    for policy in (getattr(test_parity, own_policy), "MlpPolicy"):
        env = make_vec_env(RandomEnv, 2, seed=0)
        model = PPOKL(policy, env, n_steps=24, batch_size=16, n_epochs=3, seed=0, device="cpu")
        series.append(learn(model).updates[0].kl_series())
    np.testing.assert_array_equal(series[0], series[1])


def test_a_policy_that_overrides_its_distribution_only_is_asked_for_it() -> None:
    """Of the distribution that is kept for the old policy and the one of the loss, neither may be another's."""

    class Sharper(ActorCriticPolicy):
        def get_distribution(self, obs: Any) -> Any:
            distribution = super().get_distribution(obs)
            return distribution.proba_distribution(3 * distribution.distribution.mean, self.log_std)

    env = make_vec_env(RandomEnv, 2, seed=0)
    model = PPOKL(Sharper, env, n_steps=24, batch_size=16, n_epochs=3, learning_rate=0.0, device="cpu")
    assert learn(model).updates[0].kl_series().tolist() == pytest.approx([0] * 9, abs=1e-9)


def test_a_network_that_keeps_what_it_has_computed_can_be_penalized() -> None:
    class Keeps(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            self.last = 2 * super().forward(observations).requires_grad_()
            return self.last

    model = make(PPOKL, n_value_epochs=1, policy_kwargs={"features_extractor_class": Keeps})
    assert learn(model, 2).kls[1] > 0


def test_a_new_model_can_be_copied() -> None:
    copied = copy.deepcopy(make(PPOKL, n_value_epochs=2).policy)
    assert len(list(copied.parameters())) == 13


def test_kl_is_measured_in_evaluation_mode() -> None:
    """Dropout would show the policy far from itself."""

    class Dropout(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return th.nn.functional.dropout(super().forward(observations), 0.5, self.training)

    watch = learn(make(policy_kwargs={"features_extractor_class": Dropout}, learning_rate=0.0))
    assert watch.kls == [pytest.approx(0, abs=1e-9)]


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:You are trying to run PPO")
@pytest.mark.parametrize("kwargs", [{}, {"clip_range": None, "kl_coef": "auto"}, {"n_value_epochs": 2}])
def test_trains_on_a_gpu(kwargs: dict[str, Any]) -> None:
    watch = learn(make(device="cuda", **kwargs), 2)
    assert all(math.isfinite(kl) and kl > 0 for kl in watch.kls)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_numbers_of_steps_and_epochs() -> None:
    watch = learn(make(batch_size=20, n_epochs=4), 2)  # minibatches of 20, 20 and 8
    assert [logged["train/gradient_steps"] for logged in watch.logged] == [12, 12]
    assert [logged["train/stopped_epoch"] for logged in watch.logged] == [4, 4]
    assert watch.logged[-1]["train/n_updates"] == 8


def test_gradient_norm_is_the_one_before_clipping() -> None:
    class Norms(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            norms = [parameter.grad.norm() for parameter in self.model.policy.parameters() if parameter.grad is not None]
            clipped = float(th.stack(norms).norm())
            assert clipped == pytest.approx(min(stats.latest("grad_norm"), 0.01), rel=1e-3)
            return True

    norms = Norms()
    make(max_grad_norm=0.01).learn(48, callback=norms)
    assert norms.logged[0]["train/grad_norm"] > 0.01


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "fixed-kl": {"clip_range": None, "kl_coef": 3.0},
    "adaptive-kl": {"clip_range": None, "kl_coef": "auto"},
    "clip-and-adaptive-kl": {"kl_coef": "auto"},
    "critic-apart": {"n_value_epochs": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:kl_coef is saturated")
def test_solves_cartpole(variant: str) -> None:
    """Mean return of at least 475 over 20 episodes, gymnasium's definition of solved, after 70,000 steps."""
    env = make_vec_env("CartPole-v1", 8, seed=1)
    kwargs = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "learning_rate": "lin_0.002", **VARIANTS[variant]}
    model = PPO("MlpPolicy", env, seed=1, device="cpu", **kwargs).learn(70_000)
    mean_return, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 1, seed=2), n_eval_episodes=20)
    assert mean_return >= 475


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:kl_coef is saturated")
def test_improves_on_pendulum(variant: str) -> None:
    """From about -1200 for a random policy to better than -700, after 50,000 steps."""
    env = make_vec_env("Pendulum-v1", 8, seed=1)
    kwargs = {"n_steps": 256, "batch_size": 256, "gamma": 0.9, "learning_rate": 2e-3, **VARIANTS[variant]}
    model = PPO("MlpPolicy", env, seed=1, device="cpu", **kwargs)
    eval_env = make_vec_env("Pendulum-v1", 1, seed=2)
    before, _ = evaluate_policy(model, eval_env, n_eval_episodes=10)
    model.learn(50_000)
    after, _ = evaluate_policy(model, eval_env, n_eval_episodes=10)
    assert before < -900
    assert after > -700
