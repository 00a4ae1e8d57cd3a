"""A point on a square that must find its goal: continuous control with hidden goals.

Positions lie in [-1, 1]^2, every episode starts at (0, 0), and an action, shortened to length 1 if it is
longer, moves the point by ``speed`` times the action. Only the position is observed. Since the square is
convex, a straight line to the goal is optimal at every step, so optimal returns are exact.

The setting is the point robot of meta-RL (Finn et al. 2017, "Model-Agnostic Meta-Learning", section 5.3),
with a reward that can also be sparse (Gupta et al. 2018, "Meta-Reinforcement Learning of Structured
Exploration Strategies").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Gt, Le
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.registry import checked
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Seed, TaskCount
from compressed_ad.tasks.base import OneLineRepr
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray, Step

Float32Array = NDArray[np.float32]
Distance = Annotated[float, Gt(0), Le(2)]


@checked
@dataclass(frozen=True, repr=False)
class PointMass(OneLineRepr):
    """A point with a hidden goal in the unit disc; it pays minus its distance (dense) or 1 near it (sparse).

    Tasks are ``n_task`` goals, rows (x, y), drawn uniformly from the disc with ``task_seed``. The distance is
    that of the successor; near means at most ``radius``.
    """

    name: ClassVar[str] = "point_mass"
    reward_kind: Literal["dense", "sparse"] = "dense"
    horizon: Count = 20
    speed: Distance = 0.15
    radius: Distance = 0.2
    n_task: TaskCount = 64
    task_seed: Seed = 0

    @cached_property
    def observation_space(self) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    @cached_property
    def action_space(self) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (2,), np.float32)

    def tasks(self) -> FloatArray:
        random = rng(self.task_seed, "point mass goals")
        angle, share = random.uniform(0, 2 * np.pi, self.n_task), random.random(self.n_task)
        return np.asarray(np.sqrt(share)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))

    def make(self, tasks: AnyArray, seeds: IntArray) -> PointMassEnv:
        """One slot for each row of ``tasks`` (N, 2). Everything is deterministic: ``seeds`` do nothing."""
        return PointMassEnv(self, self.check(tasks))

    def check(self, tasks: AnyArray) -> FloatArray:
        """``tasks`` (N, 2) as float64; ``UsageError`` unless they are points of the square."""
        tasks = np.asarray(tasks, np.float64)
        if tasks.ndim != 2 or tasks.shape[1] != 2 or not (np.abs(tasks) <= 1).all():
            raise UsageError(f"{self.name}: tasks must be goals (N, 2) in [-1, 1], got shape {tasks.shape}")
        return tasks

    def optimal_return(self, tasks: AnyArray) -> FloatArray:
        """(N,) exact: on a straight line to the goal, the point is as near as possible at every step."""
        start = np.linalg.norm(self.check(tasks), axis=1)
        step = np.arange(1, self.horizon + 1)
        pay = self.pay(np.maximum(start[:, None] - self.speed * step, 0), 1e-6)
        return np.asarray(pay.sum(axis=1, dtype=np.float64))

    def random_return(self, tasks: AnyArray) -> FloatArray:
        """(N,) mean over 4000 seeded episodes of uniform actions; dense: standard error below 0.1."""
        walk = _random_walk(self.horizon, self.speed)
        return np.array([self.pay(_distance(walk, goal)).sum(axis=0).mean() for goal in self.check(tasks)])

    def optimal_action(self, tasks: AnyArray, obs: AnyArray, episode_return: FloatArray) -> Float32Array:
        """(N, 2) straight to the goal and no further."""
        way = (self.check(tasks) - np.asarray(obs, np.float64)) / self.speed
        return shortened(way).astype(np.float32)

    def reward(
        self, tasks: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> Float32Array:
        """(T,) rewards of recorded transitions if ``tasks``, (2,) or (T, 2), had been the goal."""
        return self.pay(_distance(next_states, tasks))

    def pay(self, distance: FloatArray, slack: float = 0.0) -> Float32Array:
        """Rewards (...) at ``distance`` (...) from the goal; ``slack`` allows for rounding."""
        if self.reward_kind == "dense":
            return (-distance).astype(np.float32)
        return (distance <= self.radius + slack).astype(np.float32)


class PointMassEnv:
    """N points that step together."""

    def __init__(self, family: PointMass, goals: FloatArray) -> None:
        self.num_envs = len(goals)
        self._family, self._goals = family, goals
        self.reset()

    def reset(self) -> Float32Array:
        self._place = np.zeros((self.num_envs, 2), np.float32)
        self._time = 0
        return self._place.copy()

    def step(self, actions: AnyArray) -> Step:
        """Advance every slot by one action (N, 2). The time limit ends all episodes together."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 2) or actions.dtype.kind != "f":
            raise SpaceError(
                f"{self._family.name}: expected ({self.num_envs}, 2) float actions, "
                f"got {actions.dtype} {actions.shape}"
            )
        following = moved(self._place, actions, self._family.speed)
        self._place, self._time = following, self._time + 1
        over = self._time >= self._family.horizon
        reward = self._family.pay(_distance(following, self._goals))
        never, truncated = np.zeros(self.num_envs, bool), np.full(self.num_envs, over)
        obs = self.reset() if over else following.copy()
        return Step(following.copy(), reward, never, truncated, obs)


def shortened(actions: FloatArray) -> FloatArray:
    """``actions`` (..., 2), those longer than 1 shortened to length 1."""
    return np.asarray(actions / np.maximum(np.linalg.norm(actions, axis=-1, keepdims=True), 1.0))


def moved(place: Float32Array, actions: AnyArray, speed: float) -> Float32Array:
    """(..., 2) the positions that ``actions`` lead to from ``place``."""
    way = speed * shortened(np.asarray(actions, np.float64))
    return np.clip(place + way, -1.0, 1.0).astype(np.float32)


def _distance(place: AnyArray, goals: FloatArray) -> FloatArray:
    return np.asarray(np.linalg.norm(np.asarray(place, np.float64) - goals, axis=-1))


@lru_cache(maxsize=4)
def _random_walk(horizon: int, speed: float) -> Float32Array:
    """(horizon, 4000, 2) positions of episodes of uniformly random actions, the same ones for every goal."""
    random, place, places = rng(0, "point mass walk"), np.zeros((4000, 2), np.float32), []
    for _ in range(horizon):
        place = moved(place, random.uniform(-1, 1, place.shape), speed)
        places.append(place)
    return np.stack(places)
