"""A learner for places that pay by distance: it searches around the best place so far."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.learners.scripted import MakeAgent, ScriptedLearner
from compressed_ad.registry import checked
from compressed_ad.seeding import SlotDraws
from compressed_ad.settings import NonNegative, Positive
from compressed_ad.tasks.bandit import Generators
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, FloatArray, Step


@checked
class Homing(ScriptedLearner):
    """Searches around the best place so far, the nearer the more it paid; every stream is a run of its own.

    A random search with steps that adapt, as in evolution strategies (Rechenberg 1973). Each action heads for
    a place drawn from a normal distribution around the place that paid most in this history. Its standard
    deviation is ``width`` times the distance that this place was paid for, which is how far the goal still
    is. So every choice rests on one event of the history. The distance counts as at least ``floor``: it never
    stops searching. Without a floor it becomes the better learner and a much worse source, since a model of
    the density of actions then learns to repeat the last ones exactly, and little else.
    """

    name = "Homing"
    told = (
        "nothing of the task; of the family, that an observation is a place, that an action moves it in the "
        "action's own direction by at most a constant, and that the reward is minus the distance to a hidden "
        "place"
    )

    def __init__(self, width: Positive = 0.7, floor: NonNegative = 0.05) -> None:
        self.width, self.floor = width, floor

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """As ``Checks.check``: places and moves must be vectors of floats of the same length."""
        places: Any = family.observation_space
        moves: Any = family.action_space
        if not (
            _is_vector(places) and places.is_bounded() and _is_vector(moves) and places.shape == moves.shape
        ):
            wanted = "a bounded Box of places and a Box of moves, vectors of the same length"
            raise SpaceError(f"homing: {family.name} needs {wanted}, not {places} and {moves}")

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        self.check(family, n_timesteps=n_timesteps, n_stream=1)
        return lambda tasks, generators: HomingAgent(family, self.width, self.floor, generators)


class HomingAgent:
    """The learner in N slots. ``probability`` is the density of the place drawn, relative to the highest."""

    entropy: FloatArray | None = None

    def __init__(self, family: TaskFamily, width: float, floor: float, generators: Generators) -> None:
        self.family, self.width, self.floor = family, width, floor
        self._places: Any = family.observation_space
        self._moves: Any = family.action_space
        self._generators = generators

    def reset(self, n_env: int) -> None:
        """Know nothing: the first place is drawn around the centre, half the range of places away."""
        low, high = np.asarray(self._places.low, np.float64), np.asarray(self._places.high, np.float64)
        self._draws = SlotDraws(self._generators(n_env), "standard_normal", shape=low.shape)
        self._best, self._paid = np.tile((low + high) / 2, (n_env, 1)), np.full(n_env, -np.inf)
        self._unknown = float((high - low).max()) / 2
        self._reach = np.zeros(n_env)  # the longest move so far, per length of its action

    def act(self, obs: AnyArray) -> AnyArray:
        self._place, normal = np.asarray(obs, np.float64), self._draws()
        far = np.where(np.isinf(self._paid), self._unknown, np.maximum(-self._paid, self.floor))
        way = self._best + self.width * far[:, None] * normal - self._place
        length = np.linalg.norm(way, axis=1)
        reached = np.divide(length, self._reach, out=np.ones_like(length), where=self._reach > 0)
        action = way * (np.minimum(1.0, reached) / np.maximum(length, 1e-12))[:, None]
        self.probability = np.exp(-0.5 * (normal**2).mean(axis=1))
        return np.asarray(np.clip(action, self._moves.low, self._moves.high), self._moves.dtype)

    def observe(self, actions: AnyArray, step: Step) -> None:
        if (step.reward > 0).any():
            raise UsageError(f"homing: {self.family.name} pays more than 0, which is not minus a distance")
        better = step.reward > self._paid
        self._paid = np.where(better, step.reward, self._paid)
        self._best = np.where(better[:, None], step.next_obs, self._best)
        moved = np.linalg.norm(np.asarray(step.next_obs, np.float64) - self._place, axis=1)
        length = np.linalg.norm(np.asarray(actions, np.float64), axis=1)
        told = length > 0.5  # rounding has no say in it
        self._reach = np.maximum(self._reach, np.divide(moved, length, out=np.zeros_like(moved), where=told))


def _is_vector(space: Any) -> bool:
    return hasattr(space, "is_bounded") and len(space.shape) == 1 and space.dtype.kind == "f"
