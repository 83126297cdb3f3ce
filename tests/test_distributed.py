"""Two ranks train what one process trains that has the environments of both."""

import copy
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_ppo_variants import (
    PPO,
    KLAdaptiveLearningRateCallback,
    KLCoefController,
    KLEarlyStoppingCallback,
    RewardsToGoRolloutBuffer,
    UpdateCallback,
    UpdateStats,
    is_first_rank,
)
from sb3_ppo_variants.agreement import first_difference
from sb3_ppo_variants.callbacks import on_rank
from sb3_ppo_variants.distributed import Ranks
from sb3_ppo_variants.episode_statistics import Episodes
from sb3_ppo_variants.losses import normalize, normalize_over_ranks
from sb3_ppo_variants.normalization import news
from tests.ranks import SIZE, TwoRanks, two_ranks

N_ENVS, N_STEPS, BATCH, N_EPOCHS = 2, 32, 16, 3
SAMPLES = N_ENVS * N_STEPS


@pytest.fixture(scope="module")
def ranks() -> Iterator[TwoRanks]:
    with two_ranks() as both:
        yield both


# What ranks can tell each other


def talk() -> Any:
    ranks = Ranks.present()
    ranks.connect()
    tensor = th.tensor([1.0, 2.0]) * (1 + ranks.rank)
    ranks.average(tensor)
    numbers = {"a": float(ranks.rank), "whole": 3}
    objects = ranks.gather({"rank": ranks.rank}), ranks.broadcast(f"of {ranks.rank}")
    mine = ranks.scatter(["for 0", "for 1"] if ranks.is_first else None)
    return tensor.tolist(), ranks.means(numbers), objects, mine, ranks.any(ranks.rank == 1), ranks.any(False)


def test_what_ranks_tell_each_other(ranks: TwoRanks) -> None:
    for rank, result in enumerate(ranks.run(talk)):
        tensor, means, (gathered, sent), mine, any_set, none_set = result
        assert tensor == [1.5, 3.0]
        assert means == {"a": 0.5, "whole": 3}
        assert (gathered, sent) == ([{"rank": 0}, {"rank": 1}], "of 0")
        assert mine == f"for {rank}"
        assert (any_set, none_set) == (True, False)


def test_a_process_alone_is_rank_0_of_1() -> None:
    ranks = Ranks.present()
    assert (ranks.rank, ranks.size, ranks.several, ranks.is_first) == (0, 1, False, True)
    assert (ranks.mean(2.0), ranks.any(True), ranks.gather("a"), ranks.broadcast("b"), ranks.scatter(["c"])) == (
        *(2.0, True, ["a"], "b", "c"),
    )


def test_processes_that_something_else_than_torchrun_has_started_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks.present()
    assert (ranks.rank, ranks.size) == (2, 4)
    assert not is_first_rank()


def test_a_timeout_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_PPO_VARIANTS_TIMEOUT", "never")
    with pytest.raises(ValueError, match="SB3_PPO_VARIANTS_TIMEOUT must be a number of seconds > 0, not 'never'"):
        Ranks(0, 2).connect()


# Advantages


def normalized(advantages: np.ndarray, batch_size: int) -> np.ndarray:
    ranks = Ranks.present()
    ranks.connect()
    return normalize_over_ranks(th.from_numpy(advantages[ranks.rank]), batch_size, ranks).numpy()


def test_advantages_are_normalised_over_each_whole_minibatch(ranks: TwoRanks) -> None:
    advantages = np.random.default_rng(0).normal(3, 2, (SIZE, 20)).astype(np.float32)
    results = np.array(ranks.run(normalized, advantages, 8))
    for start in (0, 8, 16):  # the last has four samples on each
        whole = th.from_numpy(advantages[:, start : start + 8].flatten())
        np.testing.assert_allclose(results[:, start : start + 8].flatten(), normalize(whole).numpy(), rtol=1e-5, atol=1e-6)


# One update


class Recorder(UpdateCallback):
    """What training has seen and made, update by update."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Any] = []
        self.rollouts: list[Any] = []
        self.permutations: list[np.ndarray] = []
        self.after: list[Any] = []
        self.logged: list[dict[str, float]] = []
        self.steps: list[tuple[int, int]] = []

    def _on_update_start(self) -> None:
        self.before.append(copy.deepcopy(self.model.get_parameters()))
        buffer = self.model.rollout_buffer
        names = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")
        self.rollouts.append({name: vars(buffer)[name].copy() for name in names})

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.after.append({name: value.clone() for name, value in self.model.policy.state_dict().items()})
        values = self.model.logger.name_to_value
        self.logged.append({key: value for key, value in values.items() if key.startswith("train/")})
        self.steps.append((stats.gradient_steps, stats.epochs_completed))


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "value clip": {"clip_range_vf": 0.2, "ent_coef": 0.01},
    "no normalisation": {"normalize_advantage": False},
    "fixed KL": {"clip_range": None, "kl_coef": 3.0},
    "adaptive KL": {"clip_range": None, "kl_coef": "auto", "kl_target": 1e-4},
    "hinge": {"clip_range": None, "kl_coef": KLCoefController(hinge_coef=1000.0), "kl_target": 1e-4},
    "spo": {"surrogate": "spo"},
    "dual clip": {"dual_clip": 1.1},
    "rollback": {"kl_coef": 1.0, "kl_rollback": 1e-4},
    "critic apart": {"n_value_epochs": 2, "critic_first": True},
    "target_kl": {"target_kl": 3e-4, "learning_rate": 3e-3},
    "max_kl": {"max_kl": 1e-4, "learning_rate": 3e-3},
}
ENVS = {"discrete": "CartPole-v1", "continuous": "Pendulum-v1"}


def make(env: Any, **kwargs: Any) -> PPO:
    arguments = {"n_steps": N_STEPS, "batch_size": BATCH, "n_epochs": N_EPOCHS, "seed": 5, "device": "cpu"}
    return PPO("MlpPolicy", env, **{**arguments, **kwargs})


def callbacks_of(variant: str) -> list[BaseCallback]:
    return {
        "early stop": [KLEarlyStoppingCallback(1e-4, stop="policy")],
        "early stop by epoch": [KLEarlyStoppingCallback(1e-4, per="epoch", restore=True)],
        "adaptive rate": [KLAdaptiveLearningRateCallback(1e-3)],
    }.get(variant, [])


def train(env: str, variant: str, engine: str, n_updates: int = 1) -> Any:
    """On a rank: what the recorder has seen, and the orders of its epochs."""
    recorder, orders = Recorder(), []
    permutation = np.random.permutation

    def watched(n: Any) -> Any:
        order = permutation(n)
        if n == SAMPLES:
            orders.append(order)
        return order

    np.random.permutation = watched
    try:
        model = make(make_vec_env(env, N_ENVS), engine=engine, **VARIANTS.get(variant, {}))
        model.learn(n_updates * SAMPLES * SIZE, [*callbacks_of(variant), recorder])
    finally:
        np.random.permutation = permutation
    seen = {name: value for name, value in vars(recorder).items() if isinstance(value, list)}
    return {**seen, "orders": orders, "beta": model.kl_coef_state, "num_timesteps": model.num_timesteps}


def joined_order(orders: list[np.ndarray]) -> np.ndarray:
    """That of one process: each of its minibatches is those of the ranks, one behind the other."""
    of_all = [order + rank * SAMPLES for rank, order in enumerate(orders)]
    return np.concatenate([order[start : start + BATCH] for start in range(0, SAMPLES, BATCH) for order in of_all])


def train_at_once(seen: list[Any], env: str, variant: str) -> Any:
    """In one process: an update on what both ranks have collected, in their order."""
    model = make(make_vec_env(env, SIZE * N_ENVS), batch_size=SIZE * BATCH, engine="eager", **VARIANTS.get(variant, {}))
    recorder = Recorder()
    model._setup_learn(SIZE * SAMPLES, [*callbacks_of(variant), recorder])
    model._is_learning = True
    model.set_parameters(seen[0]["before"][0])
    buffer = model.rollout_buffer
    buffer.reset()
    for name in seen[0]["rollouts"][0]:
        vars(buffer)[name] = np.concatenate([each["rollouts"][0][name] for each in seen], axis=1)
    buffer.full = True
    orders = iter([joined_order(list(each)) for each in zip(*(each["orders"] for each in seen), strict=True)])
    model._last_obs = np.zeros_like(model._last_obs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_ppo_variants.algorithm.renew_advantages", lambda model: None)
        patch.setattr("numpy.random.permutation", lambda n: next(orders))
        model._update_current_progress_remaining(model.num_timesteps, SIZE * SAMPLES)
        model.train()
    return recorder, model


def train_without_new_advantages(*arguments: Any) -> Any:
    """As the states behind the rollouts aren't recorded, from which ``critic_first`` computes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_ppo_variants.algorithm.renew_advantages", lambda model: None)
        return train(*arguments)


EARLY = ("early stop", "early stop by epoch", "adaptive rate")
CASES = [("discrete", variant) for variant in (*VARIANTS, *EARLY)] + [("continuous", "clip"), ("continuous", "hinge")]


@pytest.mark.parametrize("engine", ["fused", "eager"])
@pytest.mark.parametrize(("env", "variant"), CASES)
def test_an_update_is_that_of_one_process(env: str, variant: str, engine: str, ranks: TwoRanks) -> None:
    """On the same samples, in the same minibatches; to the tolerance of float32, as sums have other orders."""
    seen = ranks.run(train_without_new_advantages, ENVS[env], variant, engine)
    for name, value in seen[0]["after"][0].items():
        assert th.equal(value, seen[1]["after"][0][name])
    recorder, model = train_at_once(seen, ENVS[env], variant)
    assert seen[0]["steps"] == seen[1]["steps"] == recorder.steps
    for name, value in recorder.after[0].items():
        th.testing.assert_close(seen[0]["after"][0][name], value, rtol=1e-4, atol=2e-6)
    assert seen[0]["beta"] == seen[1]["beta"] == model.kl_coef_state
    assert seen[0]["logged"][0].keys() == recorder.logged[0].keys()
    for name, logged in recorder.logged[0].items():
        assert seen[0]["logged"][0][name] == pytest.approx(logged, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("variant", ["clip", "adaptive KL", "critic apart", "early stop"])
def test_engines_agree_to_the_bit(variant: str, ranks: TwoRanks) -> None:
    fused, eager = (ranks.run(train, "CartPole-v1", variant, engine, 3)[0] for engine in ("fused", "eager"))
    for name, value in fused["after"][-1].items():
        assert th.equal(value, eager["after"][-1][name])


def test_all_ranks_steps_count(ranks: TwoRanks) -> None:
    results = ranks.run(train, "CartPole-v1", "clip", "auto", 3)
    assert [each["num_timesteps"] for each in results] == [3 * SIZE * SAMPLES] * SIZE


def test_environments_have_the_seeds_of_one_vector_environment(ranks: TwoRanks) -> None:
    """Of environments with seed 5 to 8, each rank has two; and the first observation depends on the seed alone."""
    seen = ranks.run(train, "CartPole-v1", "clip", "auto")
    env = make_vec_env("CartPole-v1", SIZE * N_ENVS)
    env.seed(5)
    first = [each["rollouts"][0]["observations"][0] for each in seen]
    np.testing.assert_array_equal(np.concatenate(first), env.reset())


def first_observations(env_seed: int | None) -> Any:
    th.manual_seed(0)
    np.random.seed(0)
    recorder = Recorder()
    make(make_vec_env("CartPole-v1", N_ENVS, seed=env_seed), seed=None).learn(SAMPLES * SIZE, recorder)
    rollout = recorder.rollouts[0]
    return rollout["observations"][0], rollout["actions"]


@pytest.mark.parametrize("env_seed", [None, 3])
def test_a_script_that_seeds_all_ranks_alike_still_collects_different_samples(env_seed: int | None, ranks: TwoRanks) -> None:
    (observations, actions), (others, others_actions) = ranks.run(first_observations, env_seed)
    assert not np.intersect1d(observations, others).size
    assert (actions != others_actions).any()


# What is put together


def test_news_are_what_came_since_then() -> None:
    first, second = np.random.default_rng(0).normal(2, 3, (2, 50, 4))
    statistics = RunningMeanStd(shape=(4,))
    statistics.update(first)
    before = statistics.mean, statistics.var, statistics.count
    statistics.update(second)
    mean, var, count = news((statistics.mean, statistics.var, statistics.count), before)
    np.testing.assert_allclose(mean, second.mean(axis=0))
    np.testing.assert_allclose(var, second.var(axis=0))
    assert count == pytest.approx(50)


class Kept(gym.ObservationWrapper[Any, Any, Any]):
    """Keeps what it has shown."""

    seen: list[np.ndarray] = []  # noqa: RUF012

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.seen.append(observation)
        return observation


def normalized_training() -> Any:
    Kept.seen = []
    env = VecNormalize(make_vec_env("Pendulum-v1", N_ENVS, wrapper_class=Kept))
    model = make(env)
    model.learn(3 * SIZE * SAMPLES)
    return env.obs_rms.mean, env.obs_rms.var, env.obs_rms.count, env.ret_rms.mean, Kept.seen


def test_statistics_of_observations_are_those_of_all_ranks(ranks: TwoRanks) -> None:
    results = ranks.run(normalized_training)
    # SB3 starts from a mean of 0 and a variance of 1, with a weight of 1e-4.
    expected = RunningMeanStd(shape=(3,))
    expected.update(np.concatenate([seen for *_, seen in results]).astype(float))
    for mean, var, count, *_ in results:
        np.testing.assert_allclose(mean, expected.mean, rtol=1e-5)
        np.testing.assert_allclose(var, expected.var, rtol=1e-5)
        assert count == pytest.approx(expected.count)
    assert results[0][3] == results[1][3]


class SwitchesOn(BaseCallback):
    """Lets the second rollout be learned from, too."""

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > 0:
            self.training_env.training = True  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


def switched_on() -> Any:
    env = VecNormalize(make_vec_env("Pendulum-v1", N_ENVS), training=False)
    make(env).learn(2 * SIZE * SAMPLES, SwitchesOn())
    return env.obs_rms.mean.tolist(), env.obs_rms.count


def test_statistics_that_are_switched_on_in_training(ranks: TwoRanks) -> None:
    first, second = ranks.run(switched_on)
    assert first == second
    assert first[1] == pytest.approx(1e-4 + SIZE * SAMPLES)  # of the second rollout; the first observation was made before


def episodes_of_training() -> Any:
    model = make(make_vec_env("CartPole-v1", N_ENVS))
    model.learn(2 * SIZE * SAMPLES)
    assert model.ep_info_buffer is not None
    return list(model.ep_info_buffer)


def test_all_ranks_keep_the_episodes_of_all(ranks: TwoRanks) -> None:
    ours, theirs = ranks.run(episodes_of_training)
    assert ours == theirs
    assert len(ours) > 2


def merged_episodes() -> Any:
    """Of four episodes a buffer keeps three: one from before, and two of three that this rank has ended."""
    ranks, episodes, kept = Ranks.present(), deque(["old"], maxlen=4), Episodes()
    ranks.connect()
    for step in (1, 2, 3)[: 2 + ranks.rank]:
        infos = [{"episode": f"rank {ranks.rank}, step {step}"}, {}]
        kept.add(step, infos, np.array([True, False]))
        episodes.append(infos[0]["episode"])
    kept.share(ranks, episodes, deque(maxlen=4))
    return list(episodes)


def test_episodes_stand_in_the_order_of_their_ends(ranks: TwoRanks) -> None:
    """The last four, of five."""
    expected = ["rank 1, step 1", "rank 0, step 2", "rank 1, step 2", "rank 1, step 3"]
    assert ranks.run(merged_episodes) == [expected] * SIZE


# Who does what


class CountsSteps(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def _on_step(self) -> bool:
        self.seen.append(self.num_timesteps)
        return True


def with_evaluation(folder: str) -> Any:
    counts = CountsSteps()
    evaluation = EvalCallback(make_vec_env("CartPole-v1", 1), log_path=folder, eval_freq=16, n_eval_episodes=1, verbose=0)
    model = make(make_vec_env("CartPole-v1", N_ENVS), tensorboard_log=folder, verbose=1)
    model.learn(SIZE * SAMPLES, [evaluation, counts])
    formats = [type(each).__name__ for each in model.logger.output_formats]
    return evaluation.n_calls, counts.seen, formats, model.tensorboard_log == folder


def test_rank_0_alone_evaluates_and_logs(ranks: TwoRanks, tmp_path: Any) -> None:
    first, second = ranks.run(with_evaluation, str(tmp_path))
    steps = [SIZE * N_ENVS * number for number in range(1, N_STEPS + 1)]
    assert first == (N_STEPS, steps, ["HumanOutputFormat", "TensorBoardOutputFormat"], True)
    assert second == (0, steps, [], True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PPO_1", "evaluations.npz"]


def test_callbacks_of_other_ranks(tmp_path: Any) -> None:
    """What only rank 0 has to do is left out, wherever it stands; the rest stays."""
    counts, checkpoints = CountsSteps(), CheckpointCallback(1, str(tmp_path))
    nested = EveryNTimesteps(8, callback=CheckpointCallback(1, str(tmp_path)))
    several = CallbackList([counts, checkpoints])
    first = on_rank(Ranks(0, 2), [checkpoints, several, nested], progress_bar=False)
    assert first is not None
    assert [first[0], *first[1].callbacks, first[2]] == [checkpoints, counts, checkpoints, nested]  # type: ignore[attr-defined]
    second = on_rank(Ranks(1, 2), [checkpoints, several, nested], progress_bar=True)
    assert second is not None
    assert [type(each) for each in second] == [CallbackList, EveryNTimesteps]
    assert second[0].callbacks == [counts]  # type: ignore[attr-defined]
    assert nested.callback is None
    assert on_rank(Ranks(1, 2), checkpoints, progress_bar=True) is None
    assert on_rank(Ranks(1, 2), [ProgressBarCallback()], progress_bar=False) is None


class StopsItself(CallbackList):
    """A list that does something of its own."""

    def _on_step(self) -> bool:
        return super()._on_step() and self.n_calls < 3


def in_a_list_of_its_own() -> int:
    model = make(make_vec_env("CartPole-v1", N_ENVS))
    model.learn(SIZE * SAMPLES, StopsItself([]))
    return model.num_timesteps


def test_a_list_of_a_class_of_its_own_stays_one(ranks: TwoRanks) -> None:
    assert ranks.run(in_a_list_of_its_own) == [3 * SIZE * N_ENVS] * 2


def steps_of_contrib() -> list[int]:
    from sb3_ppo_variants.contrib import RecurrentPPO

    counts = CountsSteps()
    model = RecurrentPPO(
        "MlpLstmPolicy", make_vec_env("CartPole-v1", N_ENVS), n_steps=8, batch_size=16, n_epochs=1, device="cpu"
    )
    model.learn(2 * SIZE * N_ENVS * 8, counts)
    return counts.seen


def test_contribs_algorithms_count_the_steps_of_all_ranks(ranks: TwoRanks) -> None:
    assert ranks.run(steps_of_contrib) == [list(range(SIZE * N_ENVS, 2 * SIZE * N_ENVS * 8 + 1, SIZE * N_ENVS))] * 2


def with_hooks_within(folder: str) -> Any:
    """A callback that stops updates, which an evaluation calls."""
    early_stop = KLEarlyStoppingCallback(1e-6)
    evaluation = EvalCallback(make_vec_env("CartPole-v1", 1), callback_on_new_best=early_stop, eval_freq=16, verbose=0)
    recorder = Recorder()
    make(make_vec_env("CartPole-v1", N_ENVS)).learn(SIZE * SAMPLES, [evaluation, recorder])
    return recorder.steps


def test_hooks_within_an_evaluation_are_called_on_all_ranks(ranks: TwoRanks, tmp_path: Any) -> None:
    ((first,), (second,)) = ranks.run(with_hooks_within, str(tmp_path))
    assert first == second
    assert first[0] < N_EPOCHS * SAMPLES / BATCH


def evaluated_by_first() -> Any:
    env = VecNormalize(make_vec_env("Pendulum-v1", N_ENVS))
    model = make(env).learn(SIZE * SAMPLES)
    if is_first_rank():
        evaluate_policy(model, env, 1)
    model.learn(SIZE * SAMPLES, reset_num_timesteps=False)
    return env.obs_rms.mean.tolist(), env.obs_rms.count


def test_statistics_stay_the_same_on_all_ranks(ranks: TwoRanks) -> None:
    """Also if one of them has stepped through its environments in between."""
    first, second = ranks.run(evaluated_by_first)
    assert first == second


class Normalizes(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 4)
        self.norm = th.nn.BatchNorm1d(4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(observations)


def with_buffers() -> Any:
    model = make(make_vec_env("CartPole-v1", N_ENVS), policy_kwargs={"features_extractor_class": Normalizes})
    model.learn(SIZE * SAMPLES)
    return {name: value.tolist() for name, value in model.policy.state_dict().items()}


def test_buffers_of_policies_are_the_same_on_all_ranks(ranks: TwoRanks) -> None:
    first, second = ranks.run(with_buffers)
    assert first == second


def kl_steps(folder: str) -> list[int]:
    make(make_vec_env("CartPole-v1", N_ENVS), tensorboard_log=folder).learn(SIZE * SAMPLES)
    if not is_first_rank():
        return []
    log = EventAccumulator(f"{folder}/PPO_1").Reload()
    return [event.step for event in log.Scalars("train/kl_per_epoch")]


def test_epochs_kls_are_spread_over_the_steps_of_all_ranks(ranks: TwoRanks, tmp_path: Any) -> None:
    steps, _ = ranks.run(kl_steps, str(tmp_path))
    assert steps == [SIZE * SAMPLES + SIZE * SAMPLES * epoch // N_EPOCHS for epoch in (1, 2, 3)]


def with_contrib(name: str) -> Any:
    from sb3_ppo_variants import contrib

    policy, kwargs = {
        "MaskablePPO": ("MlpPolicy", {}),
        "RecurrentPPO": ("MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 8}}),
    }[name]
    wrapper = {"MaskablePPO": AnyAction}.get(name)
    env = make_vec_env("CartPole-v1", N_ENVS, wrapper_class=wrapper)
    settings = {"n_steps": N_STEPS, "batch_size": BATCH, "n_epochs": 2, "seed": 5, "device": "cpu", "kl_coef": "auto"}
    model = getattr(contrib, name)(policy, env, **settings, **kwargs).learn(3 * SIZE * SAMPLES)
    return model.num_timesteps, [parameter.detach().clone() for parameter in model.policy.parameters()]


class AnyAction(gym.Wrapper[Any, Any, Any, Any]):
    """Allows all of them."""

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


@pytest.mark.parametrize("name", ["MaskablePPO", "RecurrentPPO"])
def test_contribs_algorithms(name: str, ranks: TwoRanks) -> None:
    pytest.importorskip("sb3_contrib")
    (timesteps, parameters), (others_timesteps, others_parameters) = ranks.run(with_contrib, name)
    assert timesteps == others_timesteps == 3 * SIZE * SAMPLES
    assert all(map(th.equal, parameters, others_parameters))


class Stops(BaseCallback):
    """Ends training on rank 1."""

    def _on_step(self) -> bool:
        return not (self.model._ranks.rank == 1 and self.num_timesteps > SIZE * SAMPLES)


def stopped() -> tuple[int, int]:
    model = make(make_vec_env("CartPole-v1", N_ENVS)).learn(10**6, Stops())
    first = model.num_timesteps
    return first, model.learn(SIZE * SAMPLES, reset_num_timesteps=False).num_timesteps


def test_a_callback_that_ends_training_on_one_rank_ends_it_on_all(ranks: TwoRanks) -> None:
    """And they can go on."""
    assert ranks.run(stopped) == [(2 * SIZE * SAMPLES, 3 * SIZE * SAMPLES)] * SIZE


class EndsUpdate(UpdateCallback):
    """Ends each update on rank 1 at its third minibatch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def _on_minibatch(self, stats: UpdateStats) -> bool:
        return not (self.model._ranks.rank == 1 and stats.gradient_steps == 2)

    def _on_update_end(self, stats: UpdateStats) -> None:
        self.steps.append(stats.gradient_steps)


def ended_updates(engine: str) -> list[int]:
    ends = EndsUpdate()
    make(make_vec_env("CartPole-v1", N_ENVS), engine=engine).learn(2 * SIZE * SAMPLES, ends)
    return ends.steps


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_a_callback_that_ends_an_update_on_one_rank_ends_it_on_all(engine: str, ranks: TwoRanks) -> None:
    assert ranks.run(ended_updates, engine) == [[2, 2], [2, 2]]


def saved(path: str) -> Any:
    model = make(make_vec_env("CartPole-v1", N_ENVS), verbose=1).learn(SIZE * SAMPLES)
    model.save(path)
    loaded = PPO.load(path, device="cpu")
    values = [value.sum().item() for value in loaded.policy.state_dict().values()]
    return values, loaded.num_timesteps, loaded.verbose, list(loaded.ep_info_buffer or [])


def test_all_ranks_may_save_to_one_file(ranks: TwoRanks, tmp_path: Any) -> None:
    ours, theirs = ranks.run(saved, str(tmp_path / "model"))
    assert ours == theirs
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


# What goes wrong


def test_first_difference_names_the_ranks() -> None:
    descriptions = [{"`n_steps`": "64", "`env`": "a"}, {"`n_steps`": "64", "`env`": "b"}, {"`n_steps`": "64", "`env`": "a"}]
    assert first_difference(descriptions) == "`env` must be the same on all ranks, not a on ranks 0, 2, b on rank 1"
    assert first_difference(descriptions[::2]) is None


def differing(what: str) -> None:
    rank = Ranks.present().rank
    env = "CartPole-v1" if what != "env" or rank == 0 else "Acrobot-v1"
    n_envs = N_ENVS + (rank if what == "n_envs" else 0)
    kwargs: dict[str, Any] = {}
    if what == "n_steps":
        kwargs["n_steps"] = N_STEPS * (1 + rank)
    if what == "schedule":
        kwargs["learning_rate"] = lambda progress: progress * (1 + rank)
    if what == "policy":
        kwargs["policy_kwargs"] = {"net_arch": [8 + rank]}
    if what == "activation":
        kwargs["policy_kwargs"] = {"activation_fn": (th.nn.Tanh, th.nn.ReLU)[rank]}
    callback = KLEarlyStoppingCallback() if what == "callback" and rank == 1 else None
    with pytest.MonkeyPatch.context() as patch:
        if what == "version":
            patch.setattr("sb3_ppo_variants.agreement.__version__", f"1.{rank}")
        make(make_vec_env(env, n_envs), **kwargs).learn(10 * (1 + rank) if what == "total_timesteps" else 10, callback)


DIFFERENCES = {
    "env": "`env`'s observation space must be the same on all ranks, not Box",
    "n_envs": "the number of environments in `env` must be the same on all ranks, not 2 on rank 0, 3 on rank 1",
    "n_steps": "`n_steps` must be the same on all ranks, not 32 on rank 0, 64 on rank 1",
    "schedule": "`learning_rate` must be the same on all ranks, not a schedule with 1.0 at 1.0, 0.5 at 0.5 on rank 0",
    "policy": "`policy_kwargs` must be the same on all ranks, not {net_arch: (8)} on rank 0, {net_arch: (9)} on rank 1",
    "activation": "`policy_kwargs` must be the same on all ranks, not {activation_fn: Tanh} on rank 0, {activation_fn: ReLU}",
    "callback": "`callback` must be the same on all ranks, not none on rank 0, KLEarlyStoppingCallback on rank 1",
    "total_timesteps": "`total_timesteps` of `learn` must be the same on all ranks, not 10 on rank 0, 20 on rank 1",
    "version": "the version of sb3_ppo_variants must be the same on all ranks, not 1.0 on rank 0, 1.1 on rank 1",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ_are_told_at_the_start(what: str, ranks: TwoRanks) -> None:
    for ended_well, error in ranks.outcomes(differing, what):
        assert not ended_well
        kind, message = error
        assert kind == "RanksDifferError"
        assert DIFFERENCES[what] in message


class Config:
    """Something without a text of its own."""


class Counts(VecEnvWrapper):
    """Counts what differs between ranks."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.sum = 0.0

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        step = self.venv.step_wait()
        self.sum += float(step[0].sum())
        return step


class Extractor(FlattenExtractor):
    def __init__(self, observation_space: gym.Space[Any], config: Config) -> None:
        super().__init__(observation_space)


def alike(what: str) -> int:
    env: VecEnv = make_vec_env("CartPole-v1", N_ENVS)
    kwargs: dict[str, Any] = {}
    match what:
        case "wrapper that tells the time":
            env = VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * N_ENVS))
        case "wrapper that counts":
            env = Counts(env)
        case "NumPy's numbers":
            kwargs = {"optimizer_kwargs": {"weight_decay": np.float64(1e-4)}}
        case "objects at other addresses":
            kwargs = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"config": Config()}}
    model = make(env, policy_kwargs=kwargs)
    model.learn(SIZE * SAMPLES)
    model.learn(SIZE * SAMPLES, reset_num_timesteps=False)
    return model.num_timesteps


@pytest.mark.parametrize(
    "what", ["wrapper that tells the time", "wrapper that counts", "NumPy's numbers", "objects at other addresses"]
)
def test_what_makes_no_difference(what: str, ranks: TwoRanks) -> None:
    assert ranks.run(alike, what) == [2 * SIZE * SAMPLES] * 2


class Meddles(UpdateCallback):
    """Changes a parameter on rank 1."""

    def _on_update_start(self) -> None:
        if self.model._ranks.rank == 1:
            self.model.policy.value_net.bias.data += 1e-6


def meddled() -> None:
    make(make_vec_env("CartPole-v1", N_ENVS), engine="eager").learn(SIZE * SAMPLES, Meddles())


def test_parameters_that_drift_apart_are_an_error(ranks: TwoRanks) -> None:
    for ended_well, (kind, message) in ranks.outcomes(meddled):
        assert (ended_well, kind) == (False, "RanksDifferError")
        assert "the policy's parameters must be the same on all ranks" in message


class Faulty(gym.RewardWrapper[Any, Any]):
    """Gives NaN on rank 1."""

    def reward(self, reward: Any) -> float:
        return np.nan if Ranks.present().rank == 1 else reward


def faulty(mode: str) -> Any:
    model = make(make_vec_env("CartPole-v1", N_ENVS, wrapper_class=Faulty), on_nonfinite=mode)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(SIZE * SAMPLES)
    return model.num_timesteps, [parameter.detach().clone() for parameter in model.policy.parameters()], before


def test_a_reward_that_is_nan_on_one_rank_is_an_error_on_all(ranks: TwoRanks) -> None:
    for ended_well, (kind, message) in ranks.outcomes(faulty, "raise"):
        assert (ended_well, kind) == (False, "NonFiniteError")
        assert message.startswith("the reward")
        assert message.endswith("on rank 1 in update 1")


@pytest.mark.parametrize("mode", ["skip", "restore"])
def test_a_reward_that_is_nan_on_one_rank_is_left_out_on_all(mode: str, ranks: TwoRanks) -> None:
    (timesteps, after, before), (others_timesteps, others_after, _) = ranks.run(faulty, mode)
    assert timesteps == others_timesteps == SIZE * SAMPLES
    assert all(map(th.equal, after, before))
    assert all(map(th.equal, after, others_after))


def with_episodes() -> None:
    make(make_vec_env("CartPole-v1", N_ENVS), n_episodes=2).learn(10)


class MoreEpisodes(UpdateCallback):
    def _on_update_end(self, stats: UpdateStats) -> None:
        self.model.n_episodes = 2


def with_episodes_later() -> None:
    make(make_vec_env("CartPole-v1", N_ENVS)).learn(10_000, callback=MoreEpisodes())


def with_returns_of_its_own_scale() -> None:
    arguments = {"rollout_buffer_class": RewardsToGoRolloutBuffer, "rollout_buffer_kwargs": {"standardize": True}}
    make(make_vec_env("CartPole-v1", N_ENVS), **arguments).learn(10)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (with_episodes, "`n_episodes` must be None where several ranks train, not 2"),
        (with_episodes_later, "`n_episodes` must be None where several ranks train, not 2"),
        (
            with_returns_of_its_own_scale,
            "`rollout_buffer_kwargs['standardize']` must be False where several ranks train, not True: each would scale its "
            "own returns",
        ),
    ],
)
def test_what_ranks_cannot_do_together_is_refused(train: Any, expected: str, ranks: TwoRanks) -> None:
    for ended_well, (kind, message) in ranks.outcomes(train):
        assert (ended_well, kind) == (False, "ValueError")
        assert message == expected
