"""Gymnasium's vector environments: the same training as with SB3's, and no transition across a reset in any rollout."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_ppo_variants import PPO, PPOKL, GymnasiumVecEnv, NonFiniteError, RewardsToGoRolloutBuffer
from sb3_ppo_variants.rollout import KEPT, drop_others, places
from sb3_ppo_variants.vec_env import Infos
from tests.environments import RandomEnv
from tests.test_parity import assert_same_tensors

SAME, NEXT, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
N_ENVS = 3


def vector(observation: str = "box", action: str = "box", mode: AutoresetMode = SAME) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: RandomEnv(observation, action)] * N_ENVS, autoreset_mode=mode)


def make(env: Any, algorithm: type[PPO] = PPO, **kwargs: Any) -> PPO:
    policy = "MultiInputPolicy" if isinstance(getattr(env, "single_observation_space", None), spaces.Dict) else "MlpPolicy"
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else policy
    return algorithm(policy, env, **{"n_steps": 24, "batch_size": 12, "n_epochs": 2, "seed": 5, "device": "cpu", **kwargs})


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(
    ("observation", "action"),
    [("box", "box"), ("box", "discrete"), ("discrete", "multi_discrete"), ("dict", "multi_binary"), ("image", "box")],
)
def test_trains_what_dummy_vec_env_trains(mode: AutoresetMode, observation: str, action: str) -> None:
    ours = make(vector(observation, action, mode)).learn(200)
    sb3s = make(make_vec_env(lambda: RandomEnv(observation, action), N_ENVS)).learn(200)
    assert_same_tensors(ours.policy.state_dict(), sb3s.policy.state_dict())
    assert ours.num_timesteps == sb3s.num_timesteps
    told, expected = ([(info["r"], info["l"]) for info in model.ep_info_buffer or []] for model in (ours, sb3s))
    assert told == expected
    assert len(told) > 5


def test_trains_the_same_beneath_sb3s_wrappers() -> None:
    ours = make(VecNormalize(VecFrameStack(GymnasiumVecEnv(vector()), 2))).learn(200)
    sb3s = make(VecNormalize(VecFrameStack(make_vec_env(RandomEnv, N_ENVS), 2))).learn(200)
    assert_same_tensors(ours.policy.state_dict(), sb3s.policy.state_dict())


@pytest.mark.parametrize("mode", AutoresetMode)
def test_trains_the_same_in_processes(mode: AutoresetMode) -> None:
    env = AsyncVectorEnv([RandomEnv] * 2, autoreset_mode=mode)
    ours, sb3s = (make(each).learn(100).policy.state_dict() for each in (env, make_vec_env(RandomEnv, 2)))
    env.close()
    assert_same_tensors(ours, sb3s)


class Clock(gym.Env[Any, Any]):
    """
    Nothing that happens depends on the actions: states can be foreseen.

    The observation is (number of the environment, of the episode, of the step); the 7th state of an episode is its last,
    reached by termination in even episodes and by truncation in odd ones; in environment 1 the 4th state already.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, number: int) -> None:
        self.number, self.episode = number, -1
        self.last = 3 if number == 1 else 6

    def state(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.step_number], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self.state(), {"reset": self.episode}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        ended, even = self.step_number == self.last, self.episode % 2 == 0
        return self.state(), self.reward(), ended and even, ended and not even, {"step": self.step_number}

    def reward(self) -> float:
        return float(np.sin(self.number + self.episode + self.step_number))


class Native(VectorWrapper[Any, Any, Any, Any, Any]):
    """Hides that the environments could be reset by a mask, as those that are written as vectors can't."""


def clocks(mode: AutoresetMode) -> VectorEnv[Any, Any, Any]:
    env = SyncVectorEnv([lambda number=number: Clock(number) for number in range(N_ENVS)], autoreset_mode=mode)  # type: ignore[misc]
    return Native(env) if mode == NEXT else env


class Rollouts(BaseCallback):
    """Keeps each rollout's states, rewards, values, advantages and returns, and the time steps at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, np.ndarray]] = []
        self.timesteps: list[int] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        names = ("observations", "rewards", "values", "advantages", "returns", "episode_starts")
        self.rollouts.append({name: buffer.swap_and_flatten(getattr(buffer, name)).copy() for name in names})
        self.timesteps.append(self.model.num_timesteps)


def values_of(model: PPO, states: list[np.ndarray]) -> np.ndarray:
    with th.no_grad():
        return model.policy.predict_values(th.as_tensor(np.array(states))).numpy().flatten()


def expected_advantages(model: PPO, states: np.ndarray, rewards: np.ndarray, last: np.ndarray) -> np.ndarray:
    """
    GAE, going back step by step from state to state of one environment.

    :param last: the state behind the last one
    """
    values = values_of(model, [*states, last])
    result, advantage = np.zeros(len(states)), 0.0
    following = [*states[1:], last]
    for step in reversed(range(len(states))):
        ends = following[step][1] != states[step][1]
        delta = rewards[step] + (0.0 if ends else model.gamma * values[step + 1]) - values[step]
        advantage = delta + (0.0 if ends else model.gamma * model.gae_lambda * advantage)
        result[step] = advantage
    return result


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_no_transition_across_a_reset_is_learned_from(engine: str) -> None:
    """Every state but the last of each episode, once, in order; advantages as worked out from these alone."""
    model, rollouts = make(clocks(NEXT), engine=engine, learning_rate=0.0, n_steps=19, batch_size=19), Rollouts()
    model.learn(3 * 19 * N_ENVS - 40, rollouts)
    assert len(rollouts.rollouts) == 3
    seen: dict[int, list[tuple[int, int]]] = {number: [] for number in range(N_ENVS)}
    for rollout in rollouts.rollouts:
        states = rollout["observations"]
        for number in range(N_ENVS):
            mine = states[:, 0] == number
            seen[number] += [(int(episode), int(step)) for _, episode, step in states[mine]]
            rewards = []
            for _, episode, step in states[mine]:
                clock = Clock(number)
                clock.episode, clock.step_number = int(episode), int(step) + 1
                cut_off = clock.step_number == clock.last and clock.episode % 2 == 1
                rewards.append(clock.reward() + model.gamma * float(values_of(model, [clock.state()])[0]) * cut_off)
            np.testing.assert_allclose(rollout["rewards"][mine].flatten(), rewards, rtol=1e-5, atol=1e-6)
            episode, step = states[mine][-1][1:]
            ended = step == clock.last - 1
            starts = rollout["episode_starts"][mine].flatten()
            np.testing.assert_array_equal(starts, states[mine][:, 2] == 0)
            behind = np.array([number, episode + 1, 0] if ended else [number, episode, step + 1], dtype=np.float32)
            expected = expected_advantages(model, states[mine], np.array(rewards), behind)
            np.testing.assert_allclose(rollout["advantages"][mine].flatten(), expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                rollout["returns"][mine].flatten(), expected + values_of(model, list(states[mine])), rtol=1e-4, atol=1e-5
            )
    for number, steps in seen.items():
        last = Clock(number).last
        assert steps == [(index // last, index % last) for index in range(len(steps))]
    assert model.num_timesteps == sum(map(len, seen.values())) == rollouts.timesteps[-1]
    assert model.num_timesteps < 3 * 19 * N_ENVS


@pytest.mark.parametrize("mode", AutoresetMode)
def test_episode_statistics(mode: AutoresetMode) -> None:
    """Those of Monitor, for each environment in the same order."""
    env, dummy = GymnasiumVecEnv(clocks(mode)), DummyVecEnv([lambda n=n: Monitor(Clock(n)) for n in range(N_ENVS)])  # type: ignore[misc]
    told: list[list[Any]] = []
    for each in (env, dummy):
        each.reset()
        episodes: list[Any] = [[] for _ in range(N_ENVS)]
        for _ in range(40):
            _, rewards, dones, infos = each.step(np.zeros(N_ENVS, dtype=np.int64))
            assert rewards.dtype == np.float32
            for number, info in enumerate(infos):
                assert ("episode" in info) == dones[number]
                if dones[number]:
                    last = info["terminal_observation"]
                    episodes[number].append((info["episode"]["r"], info["episode"]["l"], info["TimeLimit.truncated"], *last))
        told.append(episodes)
    for ours, monitors in zip(*told, strict=True):
        assert len(ours) >= 5
        assert ours == monitors[: len(ours)]


@pytest.mark.parametrize("mode", [SAME, DISABLED])
def test_infos_are_those_of_dummy_vec_env(mode: AutoresetMode) -> None:
    env, dummy = GymnasiumVecEnv(clocks(mode)), DummyVecEnv([lambda n=n: Clock(n) for n in range(N_ENVS)])  # type: ignore[misc]
    env.reset()
    dummy.reset()
    for _ in range(20):
        infos, expected = (each.step(np.zeros(N_ENVS, dtype=np.int64))[3] for each in (env, dummy))
        for info, other in zip(infos, expected, strict=True):
            info.pop("episode", None)
            assert info.keys() == other.keys()
            assert all(np.array_equal(info[key], other[key]) for key in info)
        assert env.reset_infos == dummy.reset_infos
    assert len(infos[1:]) == N_ENVS - 1
    assert infos[-1] is infos[N_ENVS - 1]


def test_infos_of_gymnasium() -> None:
    """Arrays with masks, arrays without, dicts of arrays, and what is the same for all."""
    infos = Infos({"a": np.array([1, 0]), "_a": np.array([True, False]), "b": np.array([3, 4]), "c": {"d": [5, 6]}, "e": 7}, 2)
    flag = {"TimeLimit.truncated": False}
    assert list(infos) == [{**flag, "a": 1, "b": 3, "c": {"d": 5}, "e": 7}, {**flag, "b": 4, "c": {"d": 6}, "e": 7}]
    with pytest.raises(IndexError):
        infos[2]


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_episodes": 3},
        {"rollout_buffer_class": RewardsToGoRolloutBuffer, "rollout_buffer_kwargs": {"standardize": True}},
        {"n_value_epochs": 2, "critic_first": True},
        {"kl_coef": "auto", "target_kl": 0.01},
    ],
)
def test_resets_in_the_next_step_go_with(kwargs: dict[str, Any], engine: str) -> None:
    """Each rollout's size is its kept transitions', and both engines train the same."""
    rollouts = Rollouts()
    model = make(clocks(NEXT), engine=engine, **kwargs).learn(200, rollouts)
    sizes = np.diff([0, *rollouts.timesteps])
    assert [len(rollout["rewards"]) for rollout in rollouts.rollouts] == list(sizes)
    assert model.rollout_buffer.buffer_size == sizes[-1]
    reference = make(clocks(NEXT), engine="eager", **kwargs).learn(200)
    assert_same_tensors(model.policy.state_dict(), reference.policy.state_dict())


def test_standardized_returns_are_those_of_kept_transitions() -> None:
    rollouts = Rollouts()
    kwargs = {"rollout_buffer_class": RewardsToGoRolloutBuffer, "rollout_buffer_kwargs": {"standardize": True}}
    make(clocks(NEXT), **kwargs).learn(100, rollouts)
    for rollout in rollouts.rollouts:
        assert rollout["returns"].mean() == pytest.approx(0, abs=1e-6)
        assert rollout["returns"].std() == pytest.approx(1, abs=1e-5)


def test_recomputed_advantages_leave_resets_out() -> None:
    """A critic that doesn't move tells the same advantages again."""
    model, rollouts = make(clocks(NEXT), n_value_epochs=1, value_learning_rate=0.0, critic_first=True), Rollouts()
    model.learn(60, rollouts)
    np.testing.assert_allclose(model.rollout_buffer.advantages, rollouts.rollouts[-1]["advantages"], rtol=1e-4, atol=1e-5)


class FaultyClock(Clock):
    def reward(self) -> float:
        return np.nan if (self.number, self.episode, self.step_number) == (1, 2, 2) else 0.0


def test_nan_is_told_where_it_was_although_resets_are_left_out() -> None:
    """Environment 1 resets in steps 3 and 7, so that its third episode's second reward comes in step 9."""
    env = Native(SyncVectorEnv([lambda number=number: FaultyClock(number) for number in range(N_ENVS)], autoreset_mode=NEXT))  # type: ignore[misc]
    with pytest.raises(NonFiniteError, match="of environment 1 at step 9 of the rollout is nan in update 1"):
        make(env).learn(60)


def test_samples_are_known_by_environment_and_step() -> None:
    buffer = RolloutBuffer(3, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), n_envs=2)
    envs, steps = places(buffer)
    assert (envs.tolist(), steps.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    vars(buffer)[KEPT] = np.array([[True, True], [False, True], [True, False]])
    drop_others(buffer)
    envs, steps = places(buffer)
    assert (envs.tolist(), steps.tolist()) == ([0, 0, 1, 1], [0, 2, 0, 1])


@pytest.mark.parametrize("mode", AutoresetMode)
def test_observations_stand_in_memory_as_sb3s(mode: AutoresetMode) -> None:
    """Bits of products depend on it: gymnasium's vectorised CartPole hands out a transposed array."""

    class Transposed(VectorWrapper[Any, Any, Any, Any, Any]):
        def reset(self, **kwargs: Any) -> Any:
            observations, infos = super().reset(**kwargs)
            return np.asfortranarray(observations), infos

        def step(self, actions: Any) -> Any:
            observations, *rest = super().step(actions)
            return np.asfortranarray(observations), *rest

    env = GymnasiumVecEnv(Transposed(clocks(mode)))
    assert env.reset().flags.c_contiguous  # type: ignore[union-attr]
    assert env.step(np.zeros(N_ENVS, dtype=np.int64))[0].flags.c_contiguous  # type: ignore[union-attr]


def test_a_rollout_without_resets_stays_as_it_is() -> None:
    model = make(clocks(NEXT), n_steps=3, batch_size=9).learn(9)
    assert (model.rollout_buffer.buffer_size, model.rollout_buffer.n_envs) == (3, N_ENVS)


@pytest.mark.parametrize("algorithm", [PPO, PPOKL])
def test_cart_pole(algorithm: type[PPO]) -> None:
    env = gym.make_vec("CartPole-v1", num_envs=16, vectorization_mode="vector_entry_point")
    model = make(env, algorithm, n_steps=64, batch_size=256, learning_rate=3e-3, gamma=0.98, n_epochs=8).learn(40_000)
    evaluated = GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=5, vectorization_mode="vector_entry_point"))
    assert evaluate_policy(model, evaluated, 10)[0] > 150  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting")  # EnvPool's own spaces
def test_envpool() -> None:
    envpool = pytest.importorskip("envpool")
    env = envpool.make("CartPole-v1", env_type="gymnasium", num_envs=8)
    rollouts = Rollouts()
    model = make(env, seed=None).learn(1000, rollouts)
    assert model.num_timesteps == sum(len(rollout["rewards"]) for rollout in rollouts.rollouts)
    assert (model.rollout_buffer.rewards > 0).all()  # a step that only resets has a reward of 0


@pytest.mark.parametrize("mode", AutoresetMode)
def test_evaluation(mode: AutoresetMode) -> None:
    model = make(clocks(SAME))
    returns, lengths = evaluate_policy(model, GymnasiumVecEnv(clocks(mode)), 9, return_episode_rewards=True)
    expected = evaluate_policy(model, make_clocks(), 9, return_episode_rewards=True)
    assert sorted(zip(returns, lengths, strict=True)) == sorted(zip(*expected, strict=True))  # type: ignore[arg-type]


def make_clocks() -> VecEnv:
    return DummyVecEnv([lambda n=n: Monitor(Clock(n)) for n in range(N_ENVS)])  # type: ignore[misc]


def test_evaluation_by_callback() -> None:
    evaluation = EvalCallback(GymnasiumVecEnv(clocks(NEXT)), eval_freq=24, n_eval_episodes=3, verbose=0)
    make(clocks(SAME)).learn(100, evaluation)
    assert np.isfinite(evaluation.best_mean_reward)


def test_save_load_and_set_env(tmp_path: Any) -> None:
    model = make(clocks(NEXT)).learn(50)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", clocks(NEXT))
    assert isinstance(loaded.get_env(), GymnasiumVecEnv)
    loaded.learn(50)
    loaded.set_env(clocks(SAME))  # type: ignore[arg-type]
    assert loaded.learn(50).num_timesteps == 24 * N_ENVS


def test_seeds() -> None:
    """Of the model: the same each time; each environment has one of its own."""
    first, again, other = map(first_states, (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(state) for state in first}) == N_ENVS


def first_states(seed: int) -> np.ndarray:
    env = make(vector(), seed=seed).get_env()
    assert env is not None
    return np.asarray(env.reset())


def test_options() -> None:
    class Told(RandomEnv):
        told: Any = None

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            self.told = options
            return super().reset(seed=seed, options=options)

    env = GymnasiumVecEnv(SyncVectorEnv([Told] * 2, autoreset_mode=SAME))
    env.set_options({"low": 1})
    env.reset()
    assert env.get_attr("told") == [{"low": 1}] * 2
    env.reset()
    assert env.get_attr("told") == [None] * 2
    env.set_options([{"low": 1}, {"low": 2}])
    with pytest.raises(ValueError, match="`options` must be the same for all environments of a VectorEnv, not"):
        env.reset()


def test_attributes_and_methods() -> None:
    env = GymnasiumVecEnv(clocks(SAME))
    env.reset()
    assert env.get_attr("number") == [0, 1, 2]
    assert env.get_attr("number", [2, 0]) == [2, 0]
    env.set_attr("episode", 8)
    assert env.get_attr("episode") == [8] * 3
    assert [state.tolist() for state in env.env_method("state")] == [[0, 8, 0], [1, 8, 0], [2, 8, 0]]
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, 0) == [False]
    assert env.has_attr("number")
    assert not env.has_attr("nothing")
    before = env.get_attr("step_number")
    assert env.has_attr("reset")  # without calling it
    assert env.get_attr("step_number") == before
    processes = GymnasiumVecEnv(AsyncVectorEnv([RandomEnv] * 2, autoreset_mode=SAME))
    processes.reset()
    assert not processes.has_attr("nothing")
    processes.step(np.zeros((2, 3), dtype=np.float32))  # they are still there
    processes.close()
    wrapped = GymnasiumVecEnv(gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", num_envs=2)))
    assert wrapped.get_attr("gravity") == [9.8, 9.8]
    with pytest.raises(ValueError, match="`indices` must be None, or all of a VectorEnv's 3 environments, not 1"):
        env.set_attr("episode", 8, 1)
    native = GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point"))
    assert native.get_attr("gravity") == [9.8, 9.8]
    native.set_attr("gravity", 5.0)
    assert native.get_attr("gravity") == [5.0, 5.0]
    with pytest.raises(ValueError, match=r"`env_method` must be called on CartPoleVectorEnv.* itself"):
        native.env_method("anything")


def test_wrapped_in_a_monitor_too(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env = VecMonitor(GymnasiumVecEnv(clocks(SAME)), str(tmp_path / "log"))
    make(env).learn(100)
    env.close()
    assert len((tmp_path / "log.monitor.csv").read_text().splitlines()) > 10


def test_images() -> None:
    env = GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync", render_mode="rgb_array"))
    assert env.render_mode == "rgb_array"
    env.reset()
    image = env.render()
    assert image is not None
    assert image.shape == (800, 600, 3)
    env.close()


class Reusing(gym.vector.VectorEnv[Any, Any, Any]):
    """Writes to the same arrays at each step, and truncates every 6th."""

    num_envs = 2
    metadata: dict[str, Any] = {"autoreset_mode": NEXT}  # noqa: RUF012  # gymnasium's declaration
    single_observation_space = observation_space = spaces.Box(-1, 1, (2,))
    single_action_space = spaces.Discrete(2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.rewards, self.state, self.n_steps = np.ones(2, np.float32), np.zeros((2, 2), np.float32), 0
        return self.state, {}

    def step(self, actions: Any) -> Any:
        self.n_steps += 1
        self.state[:] = self.n_steps / 1000
        truncated = np.full(2, self.n_steps % 7 == 6)
        return self.state, self.rewards, np.zeros(2, bool), truncated, {}


def test_the_environments_own_arrays_are_left_alone() -> None:
    env, rollouts = Reusing(), Rollouts()
    make(env).learn(100, rollouts)
    assert env.rewards.tolist() == [1, 1]
    first = rollouts.rollouts[0]["observations"][:10, 0] * 1000
    assert first.tolist() == pytest.approx([0, 1, 2, 3, 4, 5, 7, 8, 9, 10])  # the 6th is a last state, left out


def test_a_rollout_of_nothing_but_resets_is_followed_by_another() -> None:
    model = make(Reusing(), n_steps=1, batch_size=2, normalize_advantage=False).learn(20)
    assert model.num_timesteps == 20


class WithExtra(RolloutBuffer):
    """Keeps something beside each transition: here the same as its observation."""

    def reset(self) -> None:
        super().reset()
        self.extra = np.zeros_like(self.observations)

    def add(self, obs: Any, *args: Any) -> None:
        self.extra[self.pos] = obs
        super().add(obs, *args)


def test_what_buffers_of_users_keep_is_cut_too() -> None:
    model = make(clocks(NEXT), rollout_buffer_class=WithExtra).learn(72)
    buffer: Any = model.rollout_buffer
    assert np.array_equal(buffer.swap_and_flatten(buffer.extra), buffer.observations)
    assert len(buffer.observations) < 72


class Odd(VectorEnv[Any, Any, Any]):
    """Whatever a user's own may be."""

    num_envs = 2
    metadata: dict[str, Any] = {"autoreset_mode": NEXT}  # noqa: RUF012  # gymnasium's declaration
    single_observation_space: Any = spaces.Box(-1, 1, (2,))
    single_action_space = spaces.Discrete(2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return np.zeros((1, 2), dtype=np.float32), {}


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("metadata", {}, r"`env\.metadata\['autoreset_mode'\]` must be one of AutoresetMode\.NEXT_STEP, .*, not None"),
        ("metadata", {"autoreset_mode": "later"}, "not 'later'"),
        ("single_observation_space", spaces.Text(3), "`env.single_observation_space` must be a Box, .*, not Text"),
        ("single_observation_space", spaces.Tuple([spaces.Discrete(2)]), "must be a Box, Discrete, .*, not Tuple"),
        ("single_observation_space", spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2))), "must be a Box, Discrete"),
    ],
)
def test_what_is_not_supported(attribute: str, value: Any, message: str) -> None:
    env = Odd()
    setattr(env, attribute, value)
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", env)


def test_unsupported_action_space() -> None:
    env = Odd()
    env.single_action_space = spaces.Text(3)  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="The algorithm only supports"):
        PPO("MlpPolicy", env)


def test_environments_that_come_in_parts() -> None:
    with pytest.raises(ValueError, match="`env` must step all its 2 environments at once, not 1 of them"):
        PPO("MlpPolicy", Odd(), n_steps=8, batch_size=8).learn(8)


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize(("kind", "arguments"), [(VecFrameStack, (2,)), (VecMonitor, ())])
def test_no_wrapper_that_takes_resets_for_steps(kind: Any, arguments: Any) -> None:
    wrapped = kind(GymnasiumVecEnv(clocks(NEXT)), *arguments)
    message = f"`env` must not be a {kind.__name__} of an environment that resets in the next step"
    with pytest.raises(ValueError, match=message):
        make(wrapped).learn(50)


def test_a_reward_of_the_step_that_resets_is_none_of_an_episode() -> None:
    env = GymnasiumVecEnv(gym.wrappers.vector.TransformReward(clocks(NEXT), lambda rewards: rewards * 0 - 1))
    env.reset()
    told = [info["episode"] for _ in range(30) for info in env.step(np.zeros(N_ENVS, int))[3] if "episode" in info]
    assert len(told) > 10
    assert all(episode["r"] == -episode["l"] for episode in told)


def test_an_episode_that_ends_in_the_step_that_resets() -> None:
    class Sticky(Reusing):
        def step(self, actions: Any) -> Any:
            return self.state, self.rewards, np.ones(2, bool), np.zeros(2, bool), {}

    with pytest.raises(ValueError, match="`env` ends an episode of environment 0 in the step that only resets it"):
        make(Sticky()).learn(20)


def test_infos_as_lists() -> None:
    env = gym.wrappers.vector.DictInfoToList(gym.make_vec("CartPole-v1", num_envs=2))
    with pytest.raises(ValueError, match="`env` must return infos as a dict of arrays, without DictInfoToList, not list"):
        make(env).learn(20)


def test_not_a_vector_env() -> None:
    with pytest.raises(TypeError, match=r"`env` must be a gymnasium\.vector\.VectorEnv, not <.*> \(RandomEnv\)"):
        GymnasiumVecEnv(RandomEnv())  # type: ignore[arg-type]
