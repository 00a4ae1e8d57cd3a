"""Probe environments: each can only be learned if one particular part of a learner works.

The set is that of rejax's and SB3's own tests; which probe fails tells what is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from compressed_ad.types import AnyArray, IntArray, Step


@dataclass
class Probe:
    """Episodes of ``horizon`` steps; ``draw(generator, t)`` observes, ``pay(obs, action, t)`` rewards."""

    name: str
    draw: Callable[[np.random.Generator, int], Any]
    pay: Callable[[Any, int, int], float]
    horizon: int = 1
    truncates: bool = False
    observation_space: Any = field(default_factory=lambda: spaces.Box(-1.0, 1.0, (1,), np.float32))
    action_space: Any = field(default_factory=lambda: spaces.Discrete(2))

    def tasks(self) -> IntArray:
        return np.zeros((4, 1), np.int64)

    def make(self, tasks: AnyArray, seeds: IntArray) -> ProbeEnv:
        return ProbeEnv(self, seeds)

    def optimal_return(self, tasks: AnyArray) -> None:
        return None

    def random_return(self, tasks: AnyArray) -> AnyArray:
        return np.zeros(len(tasks))


class ProbeEnv:
    def __init__(self, probe: Probe, seeds: IntArray) -> None:
        self.probe, self.num_envs = probe, len(seeds)
        self.generators = [np.random.default_rng(s) for s in seeds]
        self.time = 0

    def _draw(self) -> AnyArray:
        dtype = self.probe.observation_space.dtype
        return np.array([self.probe.draw(g, self.time) for g in self.generators], dtype)

    def reset(self) -> AnyArray:
        self.time, self.obs = 0, None
        self.obs = self._draw()
        return self.obs

    def step(self, actions: AnyArray) -> Step:
        seen = zip(self.obs, actions, strict=True)
        reward = np.array([self.probe.pay(o, int(a), self.time) for o, a in seen], np.float32)
        self.time += 1
        next_obs = self._draw()
        end = np.full(self.num_envs, self.time == self.probe.horizon)
        if end[0]:
            self.time = 0
        self.obs = self._draw() if end[0] else next_obs
        nothing = np.zeros_like(end)
        ended = (nothing, end) if self.probe.truncates else (end, nothing)
        return Step(next_obs, reward, *ended, self.obs)


def _sign(generator: np.random.Generator, t: int) -> list[float]:
    return [generator.choice([-1.0, 1.0])]


VALUE = Probe("value", lambda g, t: [1.0], lambda o, a, t: 1.0)
OBSERVATION_VALUE = Probe("observation_value", _sign, lambda o, a, t: float(o[0]))
DISCOUNT = Probe("discount", lambda g, t: [float(t % 2)], lambda o, a, t: float(t == 1), horizon=2)
ACTION = Probe("action", lambda g, t: [0.0], lambda o, a, t: 1.0 - 2.0 * a)
OBSERVATION_ACTION = Probe("observation_action", _sign, lambda o, a, t: 1.0 if (o[0] > 0) == a else -1.0)
TIME_LIMIT = Probe("time_limit", lambda g, t: [1.0], lambda o, a, t: 1.0, truncates=True)
DISCRETE = Probe(
    "discrete",
    lambda g, t: g.integers(3),
    lambda o, a, t: 1.0 if (o > 0) == a else -1.0,
    observation_space=spaces.Discrete(3),
)


@dataclass
class Aim:
    """Continuous control that can be cloned: the best action is ``gain`` times a component of what is seen.

    Observations are two numbers of very different size, of which the first, up to 1000, tells the action;
    rewards are minus the squared error, times 10. Tasks differ in nothing.
    """

    name: str = "aim"
    horizon: int = 5
    gain: float = -1.5e-3
    observation_space: Any = field(
        default_factory=lambda: spaces.Box(
            np.array([-1000.0, -0.1], np.float32), np.array([1000.0, 0.1], np.float32)
        )
    )
    action_space: Any = field(default_factory=lambda: spaces.Box(-2.0, 2.0, (1,), np.float32))

    def tasks(self) -> IntArray:
        return np.arange(6)[:, None]

    def make(self, tasks: AnyArray, seeds: IntArray) -> AimEnv:
        return AimEnv(self, seeds)

    def optimal_return(self, tasks: AnyArray) -> None:
        return None

    def random_return(self, tasks: AnyArray) -> AnyArray:
        """The mean squared difference of two independent uniform numbers, from [-2, 2] and [-1.5, 1.5]."""
        return np.full(len(tasks), -10.0 * self.horizon * (16 + 9) / 12)

    def best(self, obs: AnyArray) -> AnyArray:
        return (self.gain * obs[..., :1]).astype(np.float32)


class AimEnv:
    def __init__(self, family: Aim, seeds: IntArray) -> None:
        self.family, self.num_envs, self.time = family, len(seeds), 0
        self.generators = [np.random.default_rng(s) for s in seeds]

    def _draw(self) -> AnyArray:
        space = self.family.observation_space
        return np.stack([g.uniform(space.low, space.high) for g in self.generators]).astype(np.float32)

    def reset(self) -> AnyArray:
        self.time, self.obs = 0, self._draw()
        return self.obs

    def step(self, actions: AnyArray) -> Step:
        reward = -10 * ((actions - self.family.best(self.obs)) ** 2)[:, 0].astype(np.float32)
        self.time += 1
        next_obs = self._draw()
        end = np.full(self.num_envs, self.time == self.family.horizon)
        if end[0]:
            self.time = 0
        self.obs = self._draw() if end[0] else next_obs
        return Step(next_obs, reward, np.zeros_like(end), end, self.obs)
