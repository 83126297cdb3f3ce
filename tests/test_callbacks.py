"""Hooks inside the update: when they are called, what they see, what they stop; and the callbacks built on them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_ppo_variants import (
    PPO,
    PPOKL,
    GradientNoiseScaleCallback,
    KLAdaptiveLearningRateCallback,
    KLEarlyStoppingCallback,
    TrustRegionLoggingCallback,
    UpdateCallback,
    UpdateStats,
)
from sb3_ppo_variants.callbacks import UpdateHooks
from sb3_ppo_variants.critic import critic_parameters
from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.kl import k1, k2, k3
from tests.environments import RandomEnv
from tests.test_parity import assert_same_tensors
from tests.test_ppo import Watch, make

ROLLOUT = 48


class Journal(UpdateCallback):
    """Writes down each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def _on_rollout_end(self) -> None:
        self.calls.append("rollout end")

    def _on_update_start(self) -> None:
        self.calls.append("start")

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        self.calls.append(f"minibatch {stats.epochs_completed}.{stats.gradient_steps}")
        return True

    def _on_epoch_end(self, stats: UpdateStats) -> bool:
        self.calls.append(f"epoch {stats.epochs_completed}")
        return True

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.calls.append("end")


UPDATE = ["start", "minibatch 0.0", "minibatch 0.1", "epoch 1", "minibatch 1.2", "minibatch 1.3", "epoch 2", "end"]


def small(algorithm: type[PPO] = PPO, **kwargs: Any) -> PPO:
    return make(algorithm, **{"batch_size": 24, "n_epochs": 2, **kwargs})


def test_order_of_the_hooks() -> None:
    journal = Journal()
    small().learn(2 * ROLLOUT, callback=journal)
    assert journal.calls == ["rollout end", *UPDATE, "rollout end", *UPDATE]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda callback: callback,
        lambda callback: [callback],
        lambda callback: CallbackList([callback]),
        lambda callback: CallbackList([CallbackList([callback, StopTrainingOnMaxEpisodes(1000)])]),
        lambda callback: EveryNTimesteps(10, callback),
        lambda callback: [EveryNTimesteps(10, CallbackList([callback]))],
        lambda callback: EvalCallback(small().env, callback_on_new_best=callback, eval_freq=10, verbose=0),
        lambda callback: EvalCallback(small().env, callback_after_eval=callback, eval_freq=10, verbose=0),
    ],
)
@pytest.mark.parametrize("progress_bar", [False, True])
@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_works_wherever_a_callback_does(wrap: Callable[[BaseCallback], Any], progress_bar: bool) -> None:
    journal = Journal()
    small().learn(ROLLOUT, callback=wrap(journal), progress_bar=progress_bar)
    assert [call for call in journal.calls if call != "rollout end"] == UPDATE
    assert journal.num_timesteps == ROLLOUT


class Container(BaseCallback):
    """A user's own container, which keeps its children in a dict."""

    def __init__(self, child: BaseCallback) -> None:
        super().__init__()
        self.children = {"child": child}
        self.not_mine = Journal()

    def _init_callback(self) -> None:
        self.children["child"].init_callback(self.model)

    def _on_step(self) -> bool:
        return self.children["child"].on_step()


def test_works_in_containers_of_users() -> None:
    """And a callback that is only kept somewhere, without being initialised, is not called."""
    journal = Journal()
    container = Container(journal)
    small().learn(ROLLOUT, callback=container)
    assert journal.calls == UPDATE
    assert container.not_mine.calls == []


def test_learning_inside_a_callback_leaves_the_hooks_as_they_were() -> None:
    class Nested(Journal):
        def _on_rollout_end(self) -> None:
            if self.model.num_timesteps == ROLLOUT:
                small().learn(ROLLOUT, callback=Journal())

    nested = Nested()
    small().learn(2 * ROLLOUT, callback=nested)
    assert nested.calls == UPDATE * 2


def test_a_model_can_be_copied_in_training() -> None:
    class Copy(BaseCallback):
        def _on_step(self) -> bool:
            self.copied = copy.deepcopy(self.model.policy), copy.copy(self.model)
            self.pickled = cloudpickle.dumps({**self.model.__getstate__(), "_logger": None, "env": None})
            return True

    callback = Copy()
    small().learn(ROLLOUT, callback=[Journal(), callback])
    assert callback.copied[1].num_timesteps > 0


def test_is_called_once_where_it_stands_twice() -> None:
    journal = Journal()
    small().learn(ROLLOUT, callback=[journal, CallbackList([journal])])
    assert journal.calls.count("end") == 1


def test_hooks_that_nobody_has_written_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyAtTheEnd(UpdateCallback):
        def _on_update_end(self, stats: UpdateStats) -> None:
            self.logger.record("test/steps", stats.gradient_steps)

    class BetweenEpochs(UpdateCallback):
        def _on_epoch_end(self, stats: UpdateStats) -> bool:
            return True

    calls = []
    original = UpdateHooks.call
    monkeypatch.setattr(UpdateHooks, "call", lambda self, *args: calls.append(1) or original(self, *args))
    small(n_epochs=3).learn(64, callback=OnlyAtTheEnd())
    assert not calls
    small(n_epochs=3).learn(64, callback=[OnlyAtTheEnd(), BetweenEpochs()])
    n_updates = len(calls) / 3
    assert n_updates >= 1
    callback = OnlyAtTheEnd()
    callback._on_minibatch = lambda stats: True  # type: ignore[method-assign]
    calls.clear()
    small(n_epochs=3).learn(64, callback=callback)
    assert len(calls) > 3 * n_updates


def test_works_beside_a_function() -> None:
    steps = []
    small().learn(ROLLOUT, callback=lambda locals_, globals_: steps.append(1) is None)
    assert len(steps) == ROLLOUT / 2


def test_ends_with_learn() -> None:
    """A later ``learn`` without the callback doesn't call it, and a saved model doesn't contain it."""
    journal = Journal()
    model = small().learn(ROLLOUT, callback=journal)
    n_calls = len(journal.calls)
    model.learn(ROLLOUT)
    assert len(journal.calls) == n_calls


def test_checkpoints_do_not_contain_the_callbacks(tmp_path: Path) -> None:
    class Unpicklable(Journal):
        def __reduce__(self) -> Any:
            raise TypeError("must not be pickled")

    small().learn(ROLLOUT, callback=[Unpicklable(), CheckpointCallback(10, str(tmp_path))])
    assert len(list(tmp_path.glob("*.zip"))) == 2
    PPO.load(sorted(tmp_path.glob("*.zip"))[0])


def test_false_ends_this_update_and_not_training() -> None:
    class Stop(Journal):
        def __init__(self, hook: str) -> None:
            super().__init__()
            self.hook = hook

        def _on_minibatch(self, stats: UpdateStats) -> bool:
            super()._on_minibatch(stats)
            return self.hook != "minibatch" or stats.gradient_steps < 1

        def _on_epoch_end(self, stats: UpdateStats) -> bool:
            super()._on_epoch_end(stats)
            return self.hook != "epoch"

    by_minibatch, by_epoch = Stop("minibatch"), Stop("epoch")
    model = small().learn(2 * ROLLOUT, callback=by_minibatch)
    assert by_minibatch.calls == ["rollout end", "start", "minibatch 0.0", "minibatch 0.1", "end"] * 2
    assert model.num_timesteps == 2 * ROLLOUT
    assert model.logger.name_to_value["train/gradient_steps"] == 1
    assert model.logger.name_to_value["train/stopped_epoch"] == 0

    model = small().learn(2 * ROLLOUT, callback=by_epoch)
    assert by_epoch.calls == ["rollout end", "start", "minibatch 0.0", "minibatch 0.1", "epoch 1", "end"] * 2
    assert model.logger.name_to_value["train/stopped_epoch"] == 1


def test_a_step_that_is_refused_is_not_taken() -> None:
    class Refuse(UpdateCallback):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            return False

    model = small()
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(ROLLOUT, callback=Refuse())
    assert_same_tensors(dict(model.policy.state_dict()), before)


def test_false_ends_the_critics_own_passes_too() -> None:
    class Refuse(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            return False

    watch = Refuse()
    small(n_value_epochs=3).learn(ROLLOUT, callback=watch)
    assert "value_loss" not in watch.updates[0]
    assert "train/value_loss" not in watch.logged[0]


@pytest.mark.parametrize("true", [True, np.True_, th.tensor(True)])
def test_any_kind_of_bool_is_a_bool(true: Any) -> None:
    callback = type("Any", (UpdateCallback,), {"_on_minibatch": lambda self, stats: true})()
    assert small().learn(ROLLOUT, callback=callback).logger.name_to_value["train/gradient_steps"] == 4


@pytest.mark.parametrize("hook", ["_on_minibatch", "_on_epoch_end"])
def test_a_forgotten_return_is_an_error(hook: str) -> None:
    callback = type("Forgetful", (UpdateCallback,), {hook: lambda self, stats: None})()
    with pytest.raises(TypeError, match=rf"`Forgetful.{hook}` must return True or False \(ends this update\), not None"):
        small().learn(ROLLOUT, callback=callback)


def test_needs_an_algorithm_of_this_package() -> None:
    model = stable_baselines3.PPO("MlpPolicy", RandomEnv(), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(TypeError, match=r"Journal needs an algorithm of sb3_ppo_variants, not stable_baselines3.ppo.ppo.PPO"):
        model.learn(8, callback=Journal())


def test_hooks_do_not_disturb_parity() -> None:
    class Look(UpdateCallback):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            stats.measure()
            return True

    states = []
    for callback in (
        None,
        [Look(), TrustRegionLoggingCallback(), GradientNoiseScaleCallback(), KLEarlyStoppingCallback(99.0)],
    ):
        model = small(learning_rate=1e-2)
        model.learn(2 * ROLLOUT, callback=callback)
        states.append(dict(model.policy.state_dict()))
    assert_same_tensors(*states)


def test_an_error_in_a_hook_leaves_the_buffer_as_it_was() -> None:
    class Fail(UpdateCallback):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            raise RuntimeError("on purpose")

    model = small()
    with pytest.raises(RuntimeError, match="on purpose"):
        model.learn(ROLLOUT, callback=Fail())
    model.learn(ROLLOUT)
    assert "_get_samples" not in vars(model.rollout_buffer)


FAST: dict[str, Any] = {"clip_range": None, "learning_rate": 3e-2, "n_epochs": 8, "batch_size": 24}


SLOWER: dict[str, Any] = {**FAST, "learning_rate": 1e-2}


def stopped(**arguments: Any) -> Watch:
    watch = Watch()
    kwargs = SLOWER if arguments.get("per") == "epoch" else FAST
    make(**kwargs).learn(ROLLOUT, callback=[KLEarlyStoppingCallback(**arguments), watch])
    return watch


def test_early_stopping_by_minibatch() -> None:
    """Replayed on an unstopped run: the step of the first minibatch beyond factor x target is not taken."""
    watch = Watch()
    make(**FAST).learn(ROLLOUT, callback=watch)
    kls = watch.updates[0].kl_series()
    expected = int(np.argmax(kls > 2 * 0.05))
    assert 0 < expected < 16
    stats = stopped(target=0.05, factor=2).updates[0]
    assert stats.gradient_steps == expected
    assert stats.epochs_completed == expected // 2


@pytest.mark.parametrize(("name", "estimator"), [("k1", k1), ("k2", k2), ("k3", k3)])
def test_early_stopping_by_estimates(name: str, estimator: Callable[[th.Tensor], th.Tensor]) -> None:
    class Estimates(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            self.estimates = [*getattr(self, "estimates", []), estimator(stats.log_ratio).mean().item()]
            return True

    estimates = Estimates()
    make(**FAST).learn(ROLLOUT, callback=estimates)
    expected = int(np.argmax(np.array(estimates.estimates) > 0.05))
    assert 0 < expected < 16
    assert stopped(target=0.05, factor=1.0, estimator=name).updates[0].gradient_steps == expected


def test_k3_stops_where_sb3s_target_kl_does() -> None:
    states = []
    for kwargs, callback in (({"target_kl": 0.03}, None), ({}, KLEarlyStoppingCallback(0.03, estimator="k3"))):
        model = make(**FAST, **kwargs)
        model.learn(2 * ROLLOUT, callback=callback)
        assert model.logger.name_to_value["train/gradient_steps"] < 16
        states.append(dict(model.policy.state_dict()))
    assert_same_tensors(*states)


@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_early_stopping_by_epoch(estimator: str) -> None:
    """On the whole rollout, after the epoch's last step."""

    class Epochs(Watch):
        def _on_epoch_end(self, stats: UpdateStats) -> bool:
            displacement = stats.measure()
            values = displacement.kl if estimator == "exact" else k3(displacement.log_ratio)
            self.epoch_kls = [*getattr(self, "epoch_kls", []), values.mean().item()]
            return True

    epochs = Epochs()
    make(**SLOWER).learn(ROLLOUT, callback=epochs)
    expected = int(np.argmax(np.array(epochs.epoch_kls) > 0.05)) + 1
    assert 1 < expected < 8
    stats = stopped(target=0.05, factor=1.0, per="epoch", estimator=estimator).updates[0]
    assert stats.epochs_completed == expected
    assert stats.gradient_steps == 2 * expected


@pytest.mark.parametrize("per", ["minibatch", "epoch"])
def test_restoring_goes_back_to_the_last_epoch_within_the_target(per: str) -> None:
    """Parameters and optimiser state are those of an update that ended there."""

    class Keep(Watch):
        def _on_epoch_end(self, stats: UpdateStats) -> bool:
            kl = stats.measure().kl.mean().item()
            if kl <= 0.05:
                self.kept = self.model.get_parameters()
                self.kept = {name: th.utils._pytree.tree_map(copied, state) for name, state in self.kept.items()}
            return True

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, th.Tensor) else leaf

    keep = Keep()
    model = make(**SLOWER)
    model.learn(ROLLOUT, callback=[keep, KLEarlyStoppingCallback(0.05, 1.0, per=per, restore=True)])
    assert 0 < keep.kls[0] <= 0.05
    assert_same_tensors(
        {name: dict(state) for name, state in model.get_parameters().items()},
        {name: dict(state) for name, state in keep.kept.items()},
    )


def test_restoring_goes_back_to_the_start_if_no_epoch_was_within_the_target() -> None:
    watch = Watch()
    model = make(**FAST)
    model.learn(ROLLOUT, callback=[KLEarlyStoppingCallback(1e-6, per="epoch", restore=True), watch])
    assert watch.kls == [0.0]
    assert_same_tensors(dict(model.policy.state_dict()), watch.old_policies[0])
    assert not model.policy.optimizer.state


class StopAt(UpdateCallback):
    """Ends each update before its so manieth step."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self._n_steps = n_steps

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        return stats.gradient_steps < self._n_steps


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("per", ["minibatch", "epoch"])
@pytest.mark.parametrize("other", [{}, {"target_kl": 0.04}])
def test_restoring_bounds_updates_that_something_else_ends_amid_an_epoch(per: str, other: dict[str, Any], engine: str) -> None:
    """The first epoch's two steps stay within 0.085, a third one doesn't, as the fourth minibatch, which ends it, hides."""
    watch, bounded = Watch(), Watch()
    ends = [] if other else [StopAt(3)]
    make(**SLOWER, **other, engine=engine).learn(ROLLOUT, callback=[watch, *ends])
    assert watch.kls[0] > 0.085
    model = make(**SLOWER, **other, engine=engine)
    model.learn(ROLLOUT, callback=[KLEarlyStoppingCallback(0.085, 1.0, per=per, restore=True), *ends, bounded])
    assert bounded.updates[0].gradient_steps == watch.updates[0].gradient_steps == 3
    assert 0 < bounded.kls[0] <= 0.085
    assert model.logger.name_to_value["train/kl_whole_step"] == pytest.approx(watch.kls[0], rel=1e-6)


def test_beta_rises_where_an_update_is_restored_as_it_went_too_far() -> None:
    """Else what bounds the updates would lower the penalty, from each one that is too large."""
    model, watch = make(**FAST, kl_coef="auto"), Watch()
    model.learn(ROLLOUT, callback=[KLEarlyStoppingCallback(0.01, per="epoch", restore=True), watch])
    assert watch.kls == [0.0]
    assert model.logger.name_to_value["train/kl_whole_step"] > 1.5 * 0.01
    assert model.kl_coef_state is not None
    assert model.kl_coef_state.kl_coef == 2.0


def test_stopping_the_policy_alone_leaves_the_critic_its_epochs() -> None:
    class AtStop(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            self.state = {name: tensor.clone() for name, tensor in self.model.policy.state_dict().items()}
            return True

    watch = AtStop()
    model = make(**FAST)
    model.learn(ROLLOUT, callback=[watch, KLEarlyStoppingCallback(0.05, stop="policy")])
    stats = watch.updates[0]
    assert 0 < stats.epochs_completed < 8
    # The interrupted epoch is repeated for the critic, two minibatches each.
    assert len(stats.series("value_loss")) == len(stats.series("policy_loss")) + 2 * (8 - stats.epochs_completed)
    critics = {id(parameter) for parameter in critic_parameters(model.policy)}
    for name, parameter in model.policy.named_parameters():
        assert th.equal(parameter, watch.state[name]) == (id(parameter) not in critics)


def test_stopping_the_policy_alone_restores_the_policy_alone() -> None:
    kwargs = {"target": 0.05, "per": "epoch", "factor": 1.0}
    watch, restored = Watch(), Watch()
    model, restored_model = make(**FAST), make(**FAST)
    critic_after: list[dict[str, th.Tensor]] = []
    for run, callback, keeper in (
        (model, KLEarlyStoppingCallback(**kwargs, stop="policy"), watch),
        (restored_model, KLEarlyStoppingCallback(**kwargs, stop="policy", restore=True), restored),
    ):
        run.set_random_seed(5)
        run.learn(ROLLOUT, callback=[callback, keeper])
        own = {id(parameter) for parameter in critic_parameters(run.policy)}
        critic_after.append({name: p.detach() for name, p in run.policy.named_parameters() if id(p) in own})
    assert restored.kls[0] <= 0.05 < watch.kls[0]
    assert_same_tensors(*critic_after)


def test_the_critics_part_after_the_policys_stop_weighs_the_value_loss() -> None:
    """By ``vf_coef``, as the joint loss does: with 0 the critic stands still."""

    class AtStop(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            stats.stop_policy()
            return True

    for vf_coef, moves in ((0.5, True), (0.0, False)):
        model = make(vf_coef=vf_coef)
        before = model.policy.value_net.weight.clone()
        model.learn(ROLLOUT, callback=AtStop())
        assert th.equal(before, model.policy.value_net.weight) != moves


@pytest.mark.parametrize("stop", ["both", "policy"])
def test_early_stopping_leaves_the_critics_own_passes_alone(stop: str) -> None:
    """As ``target_kl`` does."""
    watch = Watch()
    make(n_value_epochs=4).learn(ROLLOUT, callback=[KLEarlyStoppingCallback(1e-9, stop=stop), watch])
    assert watch.updates[0].epochs_completed == 0
    assert len(watch.updates[0].series("value_loss")) == 4 * 3


def test_kl_adaptive_learning_rate_by_hand() -> None:
    """Of KLs 0, 0.004, 0.004, 0.03, 0.015, and so on, with target 0.01: outside 0.005 to 0.02, a factor of 1.5."""
    callback = KLAdaptiveLearningRateCallback(0.01, minimum=1e-4, maximum=2e-3)
    rates, rate = [], 1e-3
    for kl in (0.0, 0.004, 0.004, 0.03, 0.015, 0.005, 0.02, math.nan, 1.0, *[9.0] * 9):
        rate = callback._next(rate, kl)
        rates.append(rate)
    up, down = 1.5e-3, 2e-3 / 1.5
    assert rates[:9] == pytest.approx([1e-3, up, 2e-3, down, down, down, down, down, down / 1.5])
    assert rates[-1] == 1e-4


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_kl_adaptive_learning_rate(engine: str, tmp_path: Path) -> None:
    """Each step is taken, each update logged, and a loaded model goes on, with the rate that the minibatches' KLs lead to."""
    model, callback = make(learning_rate=1e-3, engine=engine), KLAdaptiveLearningRateCallback(1e-3)
    taken: list[float] = []
    expected: list[float] = []

    class Look(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            assert stats.kl is not None
            expected.append(callback._next(expected[-1] if expected else 1e-3, stats.kl.mean().item()))
            taken.append(model.policy.optimizer.param_groups[0]["lr"])
            return True

        def _on_update_end(self, stats: UpdateStats) -> None:
            self.logged.append(dict(model.logger.name_to_value))

    look = Look()
    model.learn(2 * ROLLOUT, callback=[callback, look])
    assert taken == expected
    assert len(set(taken)) > 3
    assert [logged["train/learning_rate"] for logged in look.logged] == [taken[len(taken) // 2 - 1], taken[-1]]
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model").learning_rate == taken[-1]


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_the_minibatch_that_trips_target_kl_lowers_the_learning_rate(engine: str) -> None:
    """Though no step is taken at it: else the rate would only ever rise."""

    class Look(Watch):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            self.rate = self.model.policy.optimizer.param_groups[0]["lr"]
            return True

    look, callback = Look(), KLAdaptiveLearningRateCallback(1e-4, minimum=1e-9)
    model = make(**FAST, engine=engine, target_kl=0.01)
    model.learn(ROLLOUT, callback=[callback, look])
    assert look.updates[0].policy_stopped
    assert look.updates[0].n_minibatches == look.updates[0].gradient_steps + 1
    assert model.learning_rate == look.rate / 1.5


def test_a_learning_rate_that_waits_for_a_kl_out_of_reach_stays_at_its_bound() -> None:
    for target, bound in ((1e-9, 1e-5), (1e3, 1e-2)):
        model = make()
        model.learn(ROLLOUT * 2, callback=KLAdaptiveLearningRateCallback(target))
        assert model.learning_rate == bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, r"`target` must be a finite number > 0, not 0\.0"),
        ({"factor": 1.0}, r"`factor` must be a number > 1, not 1\.0"),
        ({"band": 0.5}, r"`band` must be a number > 1, not 0\.5"),
        ({"minimum": 1.0, "maximum": 0.1}, r"`minimum` must not be greater than `maximum`, not 1\.0 > 0\.1"),
    ],
)
def test_bad_arguments_of_the_learning_rate(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLAdaptiveLearningRateCallback(**arguments)


class BatchNormExtractor(FlattenExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


@pytest.mark.parametrize(("stop", "critics_passes"), [("both", 0), ("policy", 8)])
def test_restoring_takes_modules_buffers_along(stop: str, critics_passes: int) -> None:
    """BatchNorm counts its minibatches: the restored ones are forgotten, but not the critic's if the policy stops alone."""
    kwargs = {"features_extractor_class": BatchNormExtractor, "share_features_extractor": False}
    model = make(**FAST, policy_kwargs=kwargs)
    model.learn(ROLLOUT, callback=KLEarlyStoppingCallback(1e-9, per="epoch", stop=stop, restore=True))
    assert model.policy.pi_features_extractor.norm.num_batches_tracked == 0
    # Two minibatches in the epoch that was taken back for the policy, and two in each of the seven that were left.
    assert model.policy.vf_features_extractor.norm.num_batches_tracked == (2 + 14 if critics_passes else 0)


def test_a_kl_that_is_not_a_number_ends_the_update_and_says_so() -> None:
    class Spoil(UpdateCallback):
        def _on_epoch_end(self, stats: UpdateStats) -> bool:
            self.model.rollout_buffer.log_probs[0] = np.nan
            return True

    with pytest.warns(UserWarning, match="the KL divergence is nan: the update is ended in epoch 1"):
        make(batch_size=48).learn(ROLLOUT, callback=[Spoil(), KLEarlyStoppingCallback(estimator="k3", per="epoch")])


def test_early_stopping_says_so_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    stopped(target=1e-6, verbose=1)
    assert "Ending the update in epoch 0: KL" in capsys.readouterr().out


def test_an_exact_early_stop_needs_an_exact_kl() -> None:
    class NoRolloutBuffer:
        pass

    for arguments in ({}, {"estimator": "k1", "per": "epoch"}, {"estimator": "k1", "restore": True}):
        model = small()
        model.rollout_buffer = NoRolloutBuffer()  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"must be a subclass of RolloutBuffer .*, not NoRolloutBuffer"):
            model.learn(ROLLOUT, callback=KLEarlyStoppingCallback(**arguments))


def test_an_exact_early_stop_by_minibatch_needs_their_distributions() -> None:
    from tests.test_parity import OwnEvaluation

    def build() -> PPO:
        return PPO(OwnEvaluation, RandomEnv(), n_steps=8, batch_size=8, device="cpu")

    with pytest.raises(ValueError, match="`estimator` 'exact' needs the exact KL of each minibatch"):
        build().learn(8, callback=KLEarlyStoppingCallback())
    build().learn(8, callback=KLEarlyStoppingCallback(per="epoch"))
    build().learn(8, callback=KLEarlyStoppingCallback(estimator="k2"))


def test_unknown_metrics_are_errors_and_leave_the_logs_alone() -> None:
    class Ask(UpdateCallback):
        def _on_minibatch(self, stats: UpdateStats) -> bool:
            assert "kl_penalty_loss" not in stats
            for ask in (stats.latest, stats.mean, stats.series):
                with pytest.raises(KeyError, match=r"there is no metric 'kl_penalty_loss' in this update so far, only .*loss"):
                    ask("kl_penalty_loss")
            return True

    model = small().learn(ROLLOUT, callback=Ask())
    assert model.logger.name_to_value["train/kl_penalty_loss"] == 0.0


def test_gradient_noise_scale_of_known_gradients() -> None:
    """Gradients g_i = G + noise of known covariance: B = tr(Sigma) / |G|^2 comes back, from clipped gradients too."""
    batch_size, n_minibatches, n_updates, noise = 8, 16, 60, 1.0
    callback = GradientNoiseScaleCallback(decay=0.99)
    rng = th.Generator().manual_seed(0)
    parameter = th.nn.Parameter(th.zeros(100))
    recorded: dict[str, float] = {}

    class Policy:
        @staticmethod
        def parameters() -> list[th.nn.Parameter]:
            return [parameter, th.nn.Parameter(th.zeros(1))]  # one without a gradient

    class Logger:
        @staticmethod
        def record(key: str, value: float) -> None:
            recorded[key] = value

    class Model:
        policy, logger, max_grad_norm, _ranks = Policy, Logger, 0.5, Ranks()

    Model._minibatch_size = batch_size  # type: ignore[attr-defined]
    callback.model = Model  # type: ignore[assignment]

    class Stats:
        epochs_completed = 0
        grad_norm = 0.0

        log_ratio = th.zeros(batch_size)

        def latest(self, name: str) -> float:
            return self.grad_norm

    for _ in range(n_updates):
        callback._on_update_start()
        for _ in range(n_minibatches):
            # The mean of `batch_size` samples, each with standard deviation `noise` in each of 100 dimensions.
            gradient = th.full((100,), 0.1) + noise * th.randn(batch_size, 100, generator=rng).mean(dim=0)
            stats = Stats()
            stats.grad_norm = float(gradient.norm())
            parameter.grad = gradient * min(1.0, 0.5 / (stats.grad_norm + 1e-6))
            assert callback._on_minibatch(stats)  # type: ignore[arg-type]
        callback._on_update_end(stats)  # type: ignore[arg-type]
    # tr(Sigma) = 100 * 1, |G|^2 = 100 * 0.01
    assert recorded["train/gradient_noise_scale"] == pytest.approx(100, rel=0.1)


def test_gradient_noise_scale_takes_full_minibatches_of_the_first_epoch() -> None:
    class Count(GradientNoiseScaleCallback):
        def _on_update_end(self, stats: UpdateStats) -> None:
            super()._on_update_end(stats)
            self.counted = self._n_minibatches

    count = Count()
    with pytest.warns(UserWarning, match="truncated mini-batch"):
        model = make(batch_size=20, n_epochs=3)
    model.learn(ROLLOUT, callback=count)
    assert count.counted == 2


def test_gradient_noise_scale_is_logged() -> None:
    model = make(batch_size=8)
    model.learn(3 * ROLLOUT, callback=GradientNoiseScaleCallback())
    assert model.logger.name_to_value["train/gradient_noise_scale"] > 0


@pytest.mark.filterwarnings("ignore:kl_coef is saturated")
def test_all_together() -> None:
    callbacks = [KLEarlyStoppingCallback(restore=True), TrustRegionLoggingCallback(), GradientNoiseScaleCallback()]
    model = small(PPOKL, n_value_epochs=2)
    model.learn(4 * ROLLOUT, callback=callbacks)
    assert model.logger.name_to_value["train/kl"] <= 1.5 * 0.01
