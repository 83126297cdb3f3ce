"""NaN and infinity are named, and never reach the parameters; no update exceeds ``max_kl``."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_variants import PPO, NonFiniteError, UpdateCallback, UpdateStats
from sb3_ppo_variants.trust_region import TrustRegion

N_STEPS, N_ENVS = 16, 3
ROLLOUT = N_STEPS * N_ENVS
ENGINES = ("eager", "fused")


class Faulty(gym.Env[np.ndarray, np.ndarray]):
    """
    Gives ``fault`` as the reward, or as an observation's first number, in one of its steps.

    :param step: in which, from 0; ``None`` for never
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, step: int | None = None, quantity: str = "reward", fault: float = math.nan) -> None:
        self._faulty_step, self._quantity, self._fault = step, quantity, fault
        self._n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=3).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward = self._observe(), float(self.np_random.normal())
        if self._n_steps == self._faulty_step:
            if self._quantity == "reward":
                reward = self._fault
            else:
                observation[0] = self._fault
        self._n_steps += 1
        return observation, reward, self._n_steps % 7 == 0, False, {}


def make(*faults: Any, engine: str = "fused", **kwargs: Any) -> PPO:
    """Three environments, the second of which is faulty; ``faults`` are its arguments."""
    env = DummyVecEnv([Faulty, lambda: Faulty(*faults), Faulty])
    arguments = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", "engine": engine}
    return PPO("MlpPolicy", env, **{**arguments, **kwargs})


def state_of(model: PPO) -> dict[str, Any]:
    optimizers = [model.policy.optimizer] + ([model.value_optimizer] if model.value_optimizer is not None else [])
    return copy.deepcopy(
        {"policy": model.policy.state_dict(), "optimizers": [each.state_dict()["state"] for each in optimizers]}
    )


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, (list, tuple)):
        for each, same in zip(one, other, strict=True):
            assert_equal(each, same)
    elif isinstance(one, th.Tensor):
        assert th.equal(one, other)
    else:
        assert one == other


class AtMinibatch(UpdateCallback):
    """Calls ``do`` with the model at one minibatch of one update, and keeps what each update has started from."""

    def __init__(self, do: Callable[[PPO], Any] | None = None, update: int = 1, minibatch: int = 4) -> None:
        super().__init__()
        self.do, self.update, self.minibatch = do, update, minibatch
        self.starts: list[dict[str, Any]] = []
        self.stats: list[UpdateStats] = []

    def _on_update_start(self) -> None:
        self.starts.append(state_of(self.model))
        self.n_minibatches = 0

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        if self.do is not None and (len(self.starts), self.n_minibatches) == (self.update, self.minibatch):
            self.do(self.model)
        self.n_minibatches += 1
        return True

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.stats.append(stats)


def overflow(model: PPO) -> None:
    """The step that comes next leaves parameters that are finite, and outputs that aren't."""
    for group in model.policy.optimizer.param_groups:
        group["lr"] = 1e30


def spoil_gradient(model: PPO) -> None:
    model.policy.action_net.weight.grad[0, 0] = math.nan


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in SB3's GAE, where rewards are infinite
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_reward_is_named_before_the_update(fault: float, engine: str) -> None:
    model = make(N_STEPS + 5, "reward", fault, engine=engine)
    watch = AtMinibatch()
    name = f"the reward (with the value of what follows a time limit) of environment 1 at step 5 of the rollout is {fault}"
    with pytest.raises(NonFiniteError, match=re.escape(f"{name} in update 2")):
        model.learn(3 * ROLLOUT, callback=watch)
    assert len(watch.stats) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_an_observation_that_the_policy_cannot_act_on_is_named(engine: str) -> None:
    with pytest.raises(
        NonFiniteError, match="the observation of environment 1 is nan at step 6 of the rollout before update 1"
    ):
        make(5, "observation", engine=engine).learn(ROLLOUT)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_observation_is_named_too(engine: str) -> None:
    """Tanh makes a finite action of it, and NaN of the gradient."""
    with pytest.raises(NonFiniteError, match="the observation of environment 1 at step 6 of the rollout is inf in update 1"):
        make(5, "observation", math.inf, engine=engine).learn(ROLLOUT)


def test_the_observation_that_ends_a_rollout_is_named_too() -> None:
    with pytest.raises(NonFiniteError, match="environment 1"):
        make(N_STEPS - 1, "observation").learn(ROLLOUT)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("critic", [{}, {"n_value_epochs": 2}, {"n_value_epochs": 2, "critic_first": True}])
def test_an_update_that_raises_is_taken_back(critic: dict[str, Any], engine: str) -> None:
    model, watch = make(engine=engine, **critic), AtMinibatch(overflow, update=2)
    place = r"in update 2, epoch 1, minibatch 2 \(epochs and minibatches from 0\)"
    with pytest.raises(NonFiniteError, match=place):
        model.learn(3 * ROLLOUT, callback=watch)
    assert_equal(state_of(model), watch.starts[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("mode", ["raise", "restore"])
def test_whatever_ends_an_update_takes_it_back(mode: str, error: type[BaseException], engine: str) -> None:
    def fail(model: PPO) -> None:
        raise error("of a callback")

    model, watch = make(engine=engine, on_nonfinite=mode), AtMinibatch(fail, update=2)
    with pytest.raises(error, match="of a callback"):
        model.learn(3 * ROLLOUT, callback=watch)
    assert_equal(state_of(model), watch.starts[1])


@pytest.fixture
def _unchecked_distributions() -> Iterator[None]:
    th.distributions.Distribution.set_default_validate_args(False)
    yield
    th.distributions.Distribution.set_default_validate_args(__debug__)


@pytest.mark.usefixtures("_unchecked_distributions")
@pytest.mark.parametrize("engine", ENGINES)
def test_what_sampling_refuses_is_named_where_distributions_do_not_check(engine: str) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", engine=engine)
    with th.no_grad():
        model.policy.action_net.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="what the policy makes of finite observations isn't finite at step 0"):
        model.learn(8)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_training_can_be_saved_and_goes_on(engine: str, tmp_path: Any) -> None:
    model = make(engine=engine)
    with pytest.raises(NonFiniteError):
        model.learn(3 * ROLLOUT, callback=AtMinibatch(overflow, update=2))
    model.save(tmp_path / "good")
    loaded = PPO.load(tmp_path / "good", env=model.get_env(), device="cpu")
    loaded.learn(ROLLOUT)
    assert all(th.isfinite(parameter).all() for parameter in loaded.policy.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_restore_goes_on_with_the_next_rollout(engine: str) -> None:
    model = make(engine=engine, on_nonfinite="restore", kl_coef="auto")
    watch = AtMinibatch(overflow, update=2)
    model.learn(3 * ROLLOUT, callback=watch)
    assert [stats.restored for stats in watch.stats] == [False, True, False]
    assert_equal(watch.starts[2], watch.starts[1])
    assert watch.stats[2].coefs.kl_coef == watch.stats[1].coefs.kl_coef  # which nothing was learned for
    assert watch.stats[1].displacement is None
    assert model.logger.name_to_value["train/restored"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_restore_leaves_out_a_rollout_that_is_not_finite(engine: str) -> None:
    model, watch = make(5, engine=engine, on_nonfinite="restore"), AtMinibatch()
    with pytest.warns(UserWarning, match="update 1 is left out: the reward"):
        model.learn(2 * ROLLOUT, callback=watch)
    assert len(watch.stats) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_skip_drops_the_minibatches_with_it_and_learns_from_the_others(engine: str) -> None:
    """
    Each of the two passes has three minibatches. NaN as the reward of step 0 spoils the advantage of that sample alone: one
    minibatch a pass, as advantages are normalised within each.
    """
    model, watch = make(0, engine=engine, on_nonfinite="skip"), AtMinibatch()
    model.learn(ROLLOUT, callback=watch)
    (stats,) = watch.stats
    assert (stats.n_skipped, stats.gradient_steps) == (2, 4)
    assert model.logger.name_to_value["train/skipped_minibatches"] == 2
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert all(np.isfinite(stats.series(name)).all() for name in ("loss", "value_loss", "grad_norm"))
    assert len(stats.series("loss")) == len(stats.kl_series()) == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_skip_with_passes_of_the_critic(engine: str) -> None:
    model, watch = make(0, engine=engine, on_nonfinite="skip", n_value_epochs=3), AtMinibatch()
    model.learn(ROLLOUT, callback=watch)
    assert watch.stats[0].n_skipped == 2 + 3
    assert len(watch.stats[0].series("value_loss")) == 3 * 2


class Normalized(BaseFeaturesExtractor):
    """Takes infinity for a number, except to normalise by."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 3)
        self.norm = th.nn.BatchNorm1d(3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.norm(observations))


def test_skip_keeps_the_statistics_of_batches_finite() -> None:
    """The forward pass changes them before a gradient shows that something is wrong."""
    policy_kwargs = {"features_extractor_class": Normalized}
    model, watch = (
        make(3, "observation", math.inf, engine="eager", on_nonfinite="skip", policy_kwargs=policy_kwargs),
        AtMinibatch(),
    )
    model.learn(ROLLOUT, callback=watch)
    assert watch.stats[0].n_skipped == 2
    norm = model.policy.features_extractor.norm
    assert th.isfinite(norm.running_mean).all()
    assert th.isfinite(norm.running_var).all()
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_of_which_nothing_is_left(engine: str) -> None:
    model, watch = make(0, engine=engine, on_nonfinite="skip", batch_size=ROLLOUT), AtMinibatch()
    model.learn(ROLLOUT, callback=watch)
    assert (watch.stats[0].n_skipped, watch.stats[0].gradient_steps) == (2, 0)
    assert_equal(state_of(model), watch.starts[0])


@pytest.mark.filterwarnings("ignore:update 1 is left out")
@pytest.mark.parametrize("mode", ["skip", "restore"])
def test_engines_agree_to_the_bit(mode: str) -> None:
    states = []
    for engine in ENGINES:
        model, watch = make(2, engine=engine, on_nonfinite=mode, kl_coef="auto"), AtMinibatch(spoil_gradient, update=2)
        model.learn(4 * ROLLOUT, callback=watch)
        states.append([state_of(model), [(stats.n_skipped, stats.restored, stats.gradient_steps) for stats in watch.stats]])
    assert_equal(*states)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_a_callback_has_spoiled_is_found_behind_the_update(engine: str) -> None:
    model, watch = make(engine=engine), AtMinibatch(spoil_gradient)
    with pytest.raises(NonFiniteError):
        model.learn(ROLLOUT, callback=watch)
    assert_equal(state_of(model), watch.starts[0])


@pytest.mark.parametrize("mode", ["raise", "skip", "restore"])
def test_a_learning_rate_that_is_not_finite_is_an_error_always(mode: str) -> None:
    model = make(learning_rate=lambda progress: 1e-3 if progress == 1 else math.nan, on_nonfinite=mode)
    with pytest.raises(NonFiniteError, match="`learning_rate` must be finite, not nan"):
        model.learn(ROLLOUT)


def test_dict_observations_name_their_key() -> None:
    class Nested(gym.ObservationWrapper[Any, Any, Any]):
        observation_space = spaces.Dict({"place": Faulty.observation_space})

        def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
            return {"place": observation}

    model = PPO("MultiInputPolicy", Nested(Faulty(3, "observation")), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(NonFiniteError, match="the observation 'place' of environment 0 is nan"):
        model.learn(8)


def test_vec_normalize_hands_it_on() -> None:
    env = VecNormalize(DummyVecEnv([lambda: Faulty(5)]))
    with pytest.raises(NonFiniteError, match="the reward"):
        PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu").learn(8)


def without_bound(**kwargs: Any) -> float:
    watch = AtMinibatch()
    make(**kwargs).learn(ROLLOUT, callback=watch)
    assert watch.stats[0].displacement is not None
    return watch.stats[0].displacement.kl.mean().item()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.9, 0.1, 1e-4])
def test_no_update_exceeds_max_kl(share: float, engine: str) -> None:
    """The policy's step is the whole one, 2^-n times; the critic's isn't changed."""
    kwargs: dict[str, Any] = {"engine": engine, "learning_rate": 3e-3, "clip_range": None}
    bound = share * without_bound(**kwargs)
    free, watch = make(**kwargs), AtMinibatch()
    free.learn(ROLLOUT, callback=watch)
    bounded, bounded_watch = make(**kwargs, max_kl=bound), AtMinibatch()
    bounded.learn(ROLLOUT, callback=bounded_watch)

    (stats,) = bounded_watch.stats
    assert stats.n_halvings is not None
    assert stats.n_halvings >= 1
    assert stats.displacement is not None
    assert stats.displacement.kl.mean().item() <= bound
    assert bounded.logger.name_to_value["train/halvings"] == stats.n_halvings
    assert bounded.logger.name_to_value["train/kl"] == stats.displacement.kl.mean().item()
    start, theirs, ours = watch.starts[0]["policy"], free.policy.state_dict(), bounded.policy.state_dict()
    for name in ours:
        is_critics = "value" in name
        wanted = theirs[name] if is_critics else start[name] + (theirs[name] - start[name]) * 0.5**stats.n_halvings
        th.testing.assert_close(ours[name], wanted)


def test_a_step_that_is_within_max_kl_keeps_its_bits() -> None:
    free = make().learn(2 * ROLLOUT)
    bounded = make(max_kl=1.0).learn(2 * ROLLOUT)
    assert_equal(state_of(free), state_of(bounded))
    assert bounded.logger.name_to_value["train/halvings"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_cannot_be_shortened_enough_is_taken_back(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the KL doesn't fall with the step: here it is 1 wherever the policy isn't the old one."""
    measure = TrustRegion.measure

    def far(self: TrustRegion) -> Any:
        displacement = measure(self)
        return displacement._replace(kl=(displacement.kl > 0).float())

    monkeypatch.setattr(TrustRegion, "measure", far)
    model, watch = make(engine=engine, max_kl=0.01), AtMinibatch()
    model.learn(ROLLOUT, callback=watch)
    assert watch.stats[0].n_halvings == 11
    start, now = watch.starts[0]["policy"], model.policy.state_dict()
    assert all(th.equal(now[name], start[name]) for name in now if "value" not in name)
    assert not th.equal(now["value_net.weight"], start["value_net.weight"])


def test_max_kl_needs_an_exact_kl() -> None:
    class Own(type(make().rollout_buffer)):  # type: ignore[misc]
        def get(self, batch_size: int | None = None) -> Any:
            return super().get(batch_size)

    with pytest.raises(ValueError, match="`rollout_buffer_class` lacks what the exact KL needs"):
        make(max_kl=0.01, rollout_buffer_class=Own)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["value_net.weight", "action_net.weight"])
def test_the_last_steps_result_is_checked_too(name: str, engine: str) -> None:
    def spoil(model: PPO) -> None:
        gradient = dict(model.policy.named_parameters())[name].grad
        assert gradient is not None
        gradient[0, 0] = math.nan

    model, watch = make(engine=engine), AtMinibatch(spoil, minibatch=5)
    with pytest.raises(NonFiniteError, match=f"the parameter {name} isn't finite"):
        model.learn(ROLLOUT, callback=watch)
    assert_equal(state_of(model), watch.starts[0])


class Deaf(BaseFeaturesExtractor):
    """Takes NaN for a number that is missing."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.nan_to_num(observations)


def test_observations_with_nan_are_no_fault_where_the_policy_deals_with_them() -> None:
    model = make(5, "observation", engine="auto", policy_kwargs={"features_extractor_class": Deaf})
    model.learn(2 * ROLLOUT)
    assert model.num_timesteps == 2 * ROLLOUT


def test_beta_follows_the_whole_step_not_what_max_kl_leaves_of_it() -> None:
    """Else a step that is too large would lower the penalty."""
    kwargs: dict[str, Any] = {"learning_rate": 3e-3, "clip_range": None, "kl_coef": "auto", "kl_target": 1e-4}
    assert without_bound(**kwargs) > 1.5e-4
    model = make(**kwargs, max_kl=1e-5).learn(ROLLOUT)
    assert model.kl_coef_state is not None
    assert model.kl_coef_state.kl_coef == 2.0


def test_an_update_that_has_learned_nothing_leaves_beta_as_it_was() -> None:
    model, watch = make(2, on_nonfinite="skip", batch_size=ROLLOUT, kl_coef="auto"), AtMinibatch()
    model.learn(ROLLOUT, callback=watch)
    assert watch.stats[0].gradient_steps == 0
    assert model.kl_coef_state is not None
    assert model.kl_coef_state.kl_coef == 1.0
