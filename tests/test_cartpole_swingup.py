"""CartPoleSwingUp-v0: mechanics from first principles, and gymnasium's rules."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import benchmarks  # noqa: F401  # registers the environment
from benchmarks import cartpole_swingup
from benchmarks.cartpole_swingup import CART_MASS, FRICTION, GRAVITY, POLE_LENGTH, POLE_MASS, accelerations


@pytest.mark.filterwarnings("ignore:.*observation space (min|max)imum value is -?infinity")
@pytest.mark.filterwarnings("ignore:.*is not within the observation space|.*env checker")
def test_is_an_environment() -> None:
    check_env(gym.make("CartPoleSwingUp-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("velocity", [0.0, 1.3])
@pytest.mark.parametrize("angle", [0.0, 0.7, 3.0, -2.0])
@pytest.mark.parametrize("angular_velocity", [0.0, -2.1])
@pytest.mark.parametrize("force", [0.0, 10.0])
def test_accelerations_are_those_of_lagrange(velocity: float, angle: float, angular_velocity: float, force: float) -> None:
    """
    A uniform rod on a cart: T = M v^2 / 2 + m (v^2 - v w l cos a + w^2 l^2 / 3) / 2, V = m g l cos(a) / 2.

    The rod's centre is at x - l sin(a) / 2: the angle is counted against the clock.
    """
    mass, length = POLE_MASS, POLE_LENGTH
    cosine, sine = np.cos(angle), np.sin(angle)
    inertia = np.array([[CART_MASS + mass, -mass * length * cosine / 2], [-mass * length * cosine / 2, mass * length**2 / 3]])
    forces = np.array(
        [force - FRICTION * velocity - mass * length * sine * angular_velocity**2 / 2, mass * GRAVITY * length * sine / 2]
    )
    cart, pole = np.linalg.solve(inertia, forces)
    assert accelerations(velocity, angle, angular_velocity, force) == pytest.approx((cart, pole))


def test_reward_is_the_cosine_and_the_track_ends() -> None:
    env = gym.make("CartPoleSwingUp-v0")
    observation, _ = env.reset(seed=0)
    assert observation[2] == pytest.approx(-1, abs=0.2)
    n_steps, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, _ = env.step(np.ones(1, np.float32))
        n_steps += 1
        assert reward == pytest.approx(observation[2], abs=1e-6)
    assert terminated
    assert observation[0] > cartpole_swingup.TRACK
    env.reset(seed=0)
    for _ in range(500):
        *_, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
    assert (terminated, truncated) == (False, True)


def test_actions_beyond_the_bounds_are_clipped() -> None:
    ends = []
    for force in (1.0, 7.0):
        env = cartpole_swingup.CartPoleSwingUp()
        env.reset(seed=0)
        env.step(np.array([force]))
        ends.append(env.step(np.array([force]))[0])
    np.testing.assert_array_equal(*ends)


def test_can_be_drawn() -> None:
    env = gym.make("CartPoleSwingUp-v0", render_mode="rgb_array")
    env.reset(seed=0)
    picture = np.asarray(env.render())
    assert picture.shape == (400, 600, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 4
