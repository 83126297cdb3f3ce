"""
CartPoleSwingUp-v0: a pole that hangs from a cart is to be swung up and balanced by a continuous force.

The task of the package gym-cartpole-swingup (A. G. Lovatto), which gymnasium can't load: its constants, starting states,
reward and time limit. The equations of motion are those of the cart and pole in Deisenroth 2010, "Efficient Reinforcement
Learning using Gaussian Processes", appendix C.2 (there the angle is 0 when the pole hangs), with Euler's method.
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

CART_MASS, POLE_MASS = 0.5, 0.5
"""In kg."""
POLE_LENGTH = 0.6
"""In m; the pole is a uniform rod."""
GRAVITY = 9.82
"""In m/s^2."""
MAX_FORCE = 10.0
"""In N."""
FRICTION = 0.1
"""Between cart and track, in N s/m."""
TIME_STEP = 0.01
"""In s."""
TRACK = 2.4
"""The episode ends when the cart is further than this from the centre, in m."""
START_STD = 0.2
"""Standard deviation of each coordinate of the starting state around the pole hanging still in the centre."""


def accelerations(velocity: float, angle: float, angular_velocity: float, force: float) -> tuple[float, float]:
    """
    The equations of motion.

    :param velocity: of the cart, in m/s
    :param angle: of the pole, 0 when it stands upright, in rad
    :param angular_velocity: in rad/s
    :param force: on the cart, in N
    :return: of the cart, in m/s^2, and of the angle, in rad/s^2
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    mass, moment = CART_MASS + POLE_MASS, POLE_MASS * POLE_LENGTH
    push = force - FRICTION * velocity
    cart = (-2 * moment * angular_velocity**2 * sine + 3 * POLE_MASS * GRAVITY * sine * cosine + 4 * push) / (
        4 * mass - 3 * POLE_MASS * cosine**2
    )
    pole = (-3 * moment * angular_velocity**2 * sine * cosine + 6 * mass * GRAVITY * sine + 6 * push * cosine) / (
        4 * POLE_LENGTH * mass - 3 * moment * cosine**2
    )
    return cart, pole


class CartPoleSwingUp(gym.Env[np.ndarray, np.ndarray]):
    """
    Observations: position, velocity, cosine and sine of the angle, angular velocity. Action: the force, from -1 to 1.

    The reward of a step is the cosine of the angle behind it: 1 upright, -1 hanging.

    :param render_mode: ``"rgb_array"`` or ``None``
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # gymnasium's declaration
        "render_modes": ["rgb_array"],
        "render_fps": 100,
    }

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The pole hangs, all but still."""
        super().reset(seed=seed)
        start = self.np_random.normal((0.0, 0.0, math.pi, 0.0), START_STD)
        self._position, self._velocity, self._angle, self._angular_velocity = start.tolist()
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step of Euler's method: positions move by the old velocities."""
        force = MAX_FORCE * min(max(float(action[0]), -1.0), 1.0)
        acceleration, angular_acceleration = accelerations(self._velocity, self._angle, self._angular_velocity, force)
        self._position += TIME_STEP * self._velocity
        self._angle += TIME_STEP * self._angular_velocity
        self._velocity += TIME_STEP * acceleration
        self._angular_velocity += TIME_STEP * angular_acceleration
        return self._observation(), math.cos(self._angle), abs(self._position) > TRACK, False, {}

    def _observation(self) -> np.ndarray:
        angle = self._angle
        numbers = (self._position, self._velocity, math.cos(angle), math.sin(angle), self._angular_velocity)
        return np.array(numbers, dtype=np.float32)

    def render(self) -> np.ndarray:
        """A picture, shape (400, 600, 3)."""
        import pygame

        surface = pygame.Surface((600, 400))
        surface.fill("white")
        scale, height = 600 / 5, 240
        x = 300 + scale * self._position
        tip = (x - scale * POLE_LENGTH * math.sin(self._angle), height - scale * POLE_LENGTH * math.cos(self._angle))
        pygame.draw.line(surface, "black", (0, height + 10), (600, height + 10))
        pygame.draw.rect(surface, "firebrick", pygame.Rect(int(x) - 20, height - 10, 40, 20))
        pygame.draw.line(surface, "royalblue", (x, height), tip, width=6)
        return np.transpose(pygame.surfarray.array3d(surface), (1, 0, 2))


def register() -> None:
    """Make ``gymnasium.make("CartPoleSwingUp-v0")`` possible."""
    if "CartPoleSwingUp-v0" not in gym.registry:
        gym.register("CartPoleSwingUp-v0", entry_point="benchmarks.cartpole_swingup:CartPoleSwingUp", max_episode_steps=500)
