"""An environment goes on from a captured state as the one that it was taken from."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_ppo_variants import GymnasiumVecEnv
from sb3_ppo_variants.env_state import (
    ResumableWrapper,
    UncapturedStateError,
    capture,
    capture_vec_env,
    restore,
    restore_vec_env,
)
from tests.environments import OBSERVATION_SPACES, RandomEnv


def play(env: gym.Env[Any, Any], n_steps: int, seed: int) -> list[Any]:
    """What random actions lead to, over ends of episodes."""
    actions = env.action_space
    actions.seed(seed)
    seen: list[Any] = []
    for _ in range(n_steps):
        observation, reward, terminated, truncated, info = env.step(actions.sample())
        seen.append((observation, reward, terminated, truncated, info.get("episode", {}).get("r")))
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


ENVIRONMENTS = [
    *("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"),
    *("HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Ant-v5", "Reacher-v5", "FrozenLake-v1"),
]


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_goes_on_as_if_nothing_had_happened(env_id: str) -> None:
    env, other = (Monitor(gym.make(env_id)) for _ in range(2))
    env.reset(seed=1)
    play(env, 50, seed=2)
    state = capture(env)
    expected = play(env, 250, seed=3)
    other.reset(seed=9)
    play(other, 7, seed=8)
    restore(other, state)
    np.testing.assert_equal(play(other, 250, seed=3), expected)
    restore(env, state)  # and again, from the same state
    np.testing.assert_equal(play(env, 250, seed=3), expected)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_random_states_of_spaces_belong_to_the_state(observation: str) -> None:
    """Those of all parts of a Dict, too; the space itself stays the object that it is."""
    env, other = RandomEnv(observation), RandomEnv(observation)
    env.reset(seed=1)
    state = capture(env)
    expected = play(env, 30, seed=3)
    other.reset(seed=2)
    space = other.observation_space
    restore(other, state)
    assert other.observation_space is space
    np.testing.assert_equal(play(other, 30, seed=3), expected)


def test_wrappers_have_state_too() -> None:
    def build() -> gym.Env[Any, Any]:
        env = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
        return gym.wrappers.TransformReward(gym.wrappers.FrameStackObservation(env, 3), lambda reward: 2 * reward)

    env, other = build(), build()
    env.reset(seed=1)
    play(env, 30, seed=2)
    state = capture(env)
    expected = play(env, 300, seed=3)
    other.reset()
    restore(other, state)
    np.testing.assert_equal(play(other, 300, seed=3), expected)


def test_what_cannot_be_captured_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Box2D's import doesn't survive an error
        env = gym.make("LunarLander-v3")
    env.reset(seed=0)
    with pytest.raises(UncapturedStateError, match=r"`world`, `moon`, `lander`.* of gymnasium.*LunarLander can't be pickled"):
        capture(env)


def test_other_environments_are_refused() -> None:
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="`env` must have 4 layers as when it was saved, not 5"):
        restore(Monitor(gym.make("CartPole-v1")), capture(env))
    with pytest.raises(
        ValueError, match=r"`env` must have a gymnasium.*CartPoleEnv as when it was saved, not a .*PendulumEnv"
    ):
        restore(gym.make("Pendulum-v1"), capture(env))


def vec_envs() -> dict[str, Callable[[], VecEnv]]:
    half: dict[str, Any] = {"n_envs": 2, "seed": 3}
    sync = [lambda: gym.make("Pendulum-v1")] * 2
    return {
        "dummy": lambda: make_vec_env("CartPole-v1", **half),
        "normalized": lambda: VecNormalize(make_vec_env("HalfCheetah-v5", **half)),
        "stacked": lambda: VecMonitor(VecFrameStack(DummyVecEnv(sync), 3)),
        "processes": lambda: make_vec_env("Pendulum-v1", **half, wrapper_class=ResumableWrapper, vec_env_cls=SubprocVecEnv),
        "sync": lambda: VecNormalize(GymnasiumVecEnv(SyncVectorEnv(sync))),
        "native": lambda: GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")),
    }


def play_vec_env(env: VecEnv, n_steps: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    seen: list[Any] = []
    for _ in range(n_steps):
        box = isinstance(env.action_space, gym.spaces.Box)
        shape = (env.num_envs, *(env.action_space.shape or ()))
        actions = rng.uniform(-1, 1, shape).astype(np.float32) if box else rng.integers(2, size=shape)
        observations, rewards, dones, infos = env.step(actions)
        seen.append((observations, rewards, dones, [info.get("episode", {}).get("r") for info in infos]))
    return seen


@pytest.mark.parametrize("kind", vec_envs())
def test_vector_environments_go_on(kind: str) -> None:
    env, other = vec_envs()[kind](), vec_envs()[kind]()
    env.seed(1)
    env.reset()
    play_vec_env(env, 40, seed=2)
    state = pickle.loads(pickle.dumps(capture_vec_env(env)))
    expected = play_vec_env(env, 250, seed=3)
    other.reset()
    assert restore_vec_env(other, state)
    np.testing.assert_equal(play_vec_env(other, 250, seed=3), expected)
    env.close()
    other.close()


def test_wrappers_of_environments_that_cannot_be_captured() -> None:
    """What has been normalised so far is kept; the environments have to start anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env, other = (VecNormalize(make_vec_env("LunarLander-v3", 1)) for _ in range(2))
    env.reset()
    play_vec_env(env, 20, seed=1)
    state = capture_vec_env(env)
    assert "`world`" in str(state.envs)
    other.reset()
    assert not restore_vec_env(other, state)
    np.testing.assert_equal(vars(other.obs_rms), vars(env.obs_rms))


def test_processes_need_a_wrapper() -> None:
    env = make_vec_env("CartPole-v1", 1, vec_env_cls=SubprocVecEnv)
    env.reset()
    assert "can only be reached in a ResumableWrapper" in str(capture_vec_env(env).envs)
    env.close()


class Counting(gym.Wrapper[Any, Any, Any, Any]):
    """Has state of its own."""

    n_steps = 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        return self.env.step(action)


def test_wrappers_outside_of_the_one_that_reaches_into_processes_are_not_lost_in_silence() -> None:
    env = make_vec_env(
        "CartPole-v1", 1, vec_env_cls=SubprocVecEnv, wrapper_class=lambda inner: Counting(ResumableWrapper(inner))
    )
    env.reset()
    assert "the ResumableWrapper of environments in a SubprocVecEnv must be their outermost wrapper" in str(
        capture_vec_env(env).envs
    )
    env.close()


class Adapter(VecEnvWrapper):
    """As for simulators that step all their environments at once: there is nothing to be asked of single ones."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    @property
    def unwrapped(self) -> VecEnv:
        return self

    def has_attr(self, attr_name: str) -> bool:
        raise NotImplementedError


def test_vector_environments_that_tell_nothing_of_their_environments() -> None:
    adapter = Adapter(make_vec_env("CartPole-v1", 2))
    assert "environments in a Adapter can't be reached: NotImplementedError()" in str(capture_vec_env(adapter).envs)


def test_vector_environments_of_another_size_are_refused() -> None:
    state = capture_vec_env(vec_envs()["native"]())
    other = GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode="vector_entry_point"))
    with pytest.raises(ValueError, match="`env` must have 3 environments as when it was saved, not 4"):
        restore_vec_env(other, state)


def test_vector_environments_built_in_another_way_are_refused() -> None:
    state = capture_vec_env(vec_envs()["dummy"]())
    with pytest.raises(ValueError, match="`env` must have 1 layers as when it was saved, not 2"):
        restore_vec_env(vec_envs()["normalized"](), state)


class Composed(gym.Env[np.ndarray, int]):
    """Passes everything on to an environment within, and has an object that knows it."""

    class Task:
        def __init__(self, env: "Composed") -> None:
            self.env, self.n_steps = env, 0

    def __init__(self) -> None:
        self.inner = gym.make("CartPole-v1")
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space
        self.task = Composed.Task(self)
        self.clock = 0.0

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        self.clock = 0.0
        return self.inner.reset(**kwargs)

    def step(self, action: int) -> Any:
        self.task.env.clock += 0.1
        return self.inner.step(action)


def test_environments_within_objects_that_know_them_and_clocks_that_draw_nothing() -> None:
    env, other = Composed(), Composed()
    env.reset(seed=1)
    env.step(0)
    restore(other, capture(env))
    assert other.task.env is other
    assert other.clock == 0.1
    observation, *_ = env.step(1)
    np.testing.assert_array_equal(other.step(1)[0], observation)
    assert other.clock == 0.2


class Drawn(RandomEnv):
    """What each episode draws decides about its rewards; ``draw`` says how that is kept."""

    def __init__(self) -> None:
        super().__init__(action="discrete")

    def reset(self, **kwargs: Any) -> Any:
        result = super().reset(**kwargs)
        self.begin()
        return result

    def begin(self) -> None:
        raise NotImplementedError

    def reward(self) -> float:
        raise NotImplementedError

    def step(self, action: Any) -> Any:
        observation, _, *rest = super().step(action)
        return observation, self.reward(), *rest


class MethodOfItsOwn(Drawn):
    def begin(self) -> None:
        self.reward_function = self.one if self.np_random.random() < 0.5 else self.two

    def one(self) -> float:
        return 1.0

    def two(self) -> float:
        return 2.0

    def reward(self) -> float:
        return self.reward_function()


class MethodOfAGenerator(Drawn):
    def __init__(self) -> None:
        super().__init__()
        self.draw = np.random.default_rng(0).normal

    def begin(self) -> None:
        pass

    def reward(self) -> float:
        return self.draw()


class Slots(Drawn):
    __slots__ = ("__private", "public")

    def begin(self) -> None:
        self.__private = self.public = self.np_random.random()

    def reward(self) -> float:
        self.public += 1
        return self.public + self.__private


class SharedGenerator(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps the generator of the environment within."""

    def reset(self, **kwargs: Any) -> Any:
        result = self.env.reset(**kwargs)
        self.generator = self.unwrapped.np_random
        return result

    def step(self, action: Any) -> Any:
        observation, _, *rest = self.env.step(action)
        return observation, self.generator.random() + self.unwrapped.np_random.random(), *rest


class SeveralWithin(Drawn):
    """One of two environments is played: which, its first observations depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.all = [RandomEnv(), RandomEnv()]

    def begin(self) -> None:
        self.current = self.all[int(self.np_random.integers(2))]
        for number, env in enumerate(self.all):
            env.reset(seed=number)

    def reward(self) -> float:
        return self.current.step(np.zeros(3, np.float32))[1]


class Masses(gym.Wrapper[Any, Any, Any, Any]):
    """Draws masses and gravity for each episode."""

    def reset(self, **kwargs: Any) -> Any:
        result = self.env.reset(**kwargs)
        model: Any = self.unwrapped.model  # type: ignore[attr-defined]
        model.body_mass[1] = self.unwrapped.np_random.uniform(0.5, 5)
        model.opt.gravity[2] = -self.unwrapped.np_random.uniform(5, 15)
        model.opt.timestep = self.unwrapped.np_random.uniform(0.001, 0.01)
        return result


@pytest.mark.parametrize(
    "make",
    [
        *(MethodOfItsOwn, MethodOfAGenerator, Slots, SeveralWithin),
        lambda: SharedGenerator(RandomEnv(action="discrete")),
        lambda: Masses(gym.make("InvertedPendulum-v5")),
    ],
)
def test_state_that_is_more_than_numbers(make: Callable[[], gym.Env[Any, Any]]) -> None:
    env, other = make(), make()
    env.reset(seed=1)
    play(env, 30, seed=2)
    state = pickle.loads(pickle.dumps(capture(env)))
    expected = play(env, 60, seed=3)
    for seed in range(3):  # which are other episodes
        other.reset(seed=seed)
        restore(other, state)
        np.testing.assert_equal(play(other, 60, seed=3), expected)


def test_a_method_that_another_one_hides_stays_as_it_was_built() -> None:
    def build() -> Any:
        env: Any = gym.make("CartPole-v1").unwrapped
        env.hidden = env.step
        env.step = lambda action: env.hidden(int(action))
        return env

    env, other = build(), build()
    env.reset(seed=1)
    other.reset(seed=2)
    restore(other, capture(env))
    np.testing.assert_array_equal(other.step(1)[0], env.step(1)[0])


class Curriculum:
    n_steps = 0


def test_environments_go_on_sharing_what_they_shared() -> None:
    def build() -> DummyVecEnv:
        curriculum = Curriculum()
        envs = [Counting(gym.make("CartPole-v1")) for _ in range(2)]
        for env in envs:
            env.curriculum = curriculum  # type: ignore[attr-defined]
        return DummyVecEnv([lambda: envs[0], lambda: envs[1]])

    env, other = build(), build()
    env.reset()
    env.envs[0].curriculum.n_steps = 5
    other.reset()
    assert restore_vec_env(other, capture_vec_env(env))
    first, second = (each.curriculum for each in other.envs)
    assert first is second
    assert first.n_steps == 5


class Held:
    def __init__(self) -> None:
        self.env = gym.make("CartPole-v1")


def uncapturable() -> dict[str, tuple[str, Any]]:
    """What becomes an attribute of an environment, and what is said of it."""
    state = np.zeros(4)
    return {
        "view": ("`state` of .*CartPoleEnv shares its memory with another array, as NumPy's views do", (state, state[:2])),
        "views": ("an array in it shares its memory", ([state[1:3]], [state[2:]])),
        "held": (
            "`state` of .*CartPoleEnv can't be pickled: a .* in it can't be reached: it would have to be an attr",
            (Held(),),
        ),
    }


@pytest.mark.parametrize("kind", uncapturable())
def test_what_would_not_be_the_same_is_not_captured(kind: str) -> None:
    message, values = uncapturable()[kind]
    env: Any = gym.make("CartPole-v1")
    env.reset(seed=0)
    for name, value in zip(("state", "other"), values, strict=False):
        setattr(env.unwrapped, name, value)
    with pytest.raises(UncapturedStateError, match=message):
        capture(env)


def test_views_of_what_mujoco_keeps_are_not_captured() -> None:
    env: Any = gym.make("InvertedPendulum-v5")
    env.reset(seed=0)
    env.unwrapped.positions = env.unwrapped.data.qpos
    with pytest.raises(UncapturedStateError, match=r"`positions` of .* shares its memory"):
        capture(env)


def test_arrays_side_by_side_share_nothing() -> None:
    env: Any = gym.make("CartPole-v1")
    env.reset(seed=0)
    both = np.arange(6.0)
    env.unwrapped.left, env.unwrapped.right, env.unwrapped.again = both[:3], both[3:], env.unwrapped.state
    capture(env)


def test_a_model_of_another_size_takes_the_place_of_the_one_that_is_there() -> None:
    """As where each episode builds a robot of its own."""
    env, other = (gym.make("InvertedPendulum-v5") for _ in range(2))
    double = gym.make("InvertedDoublePendulum-v5")
    for each in (env, other, double):
        each.reset(seed=0)
    for name in ("model", "data"):
        setattr(env.unwrapped, name, getattr(double.unwrapped, name))
    restore(other, capture(env))
    there: Any = other.unwrapped
    assert there.model is there.data.model
    np.testing.assert_array_equal(there.data.qpos, double.unwrapped.data.qpos)  # type: ignore[attr-defined]
