"""A learner that works out where its goal lies from the distances that it was paid."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.learners.scripted import MakeAgent, ScriptedLearner
from compressed_ad.registry import checked
from compressed_ad.seeding import SlotDraws
from compressed_ad.settings import Positive
from compressed_ad.tasks.bandit import Generators
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, FloatArray, Step


@checked
class Homing(ScriptedLearner):
    """Goes where the distances paid so far say that its goal lies; every stream is a run of its own.

    Posterior sampling (Thompson 1933; Osband et al. 2013, "(More) Efficient Reinforcement Learning via
    Posterior Sampling") for rewards that are minus the distance to a hidden place g. The squares of a paid
    distance r at place s give an equation that is linear in g and |g|^2, r^2 = |s|^2 - 2 s g + |g|^2, so a
    Bayesian linear regression gives a normal distribution of both. Every action goes to a place drawn from
    it. ``noise`` is the standard deviation that the learner assumes in these equations: the larger, the more
    slowly it becomes sure.
    """

    name = "Homing"
    told = (
        "nothing of the task; of the family, that an observation is a place, that an action moves it in the "
        "action's own direction by at most a constant, and that the reward is minus the distance to a hidden "
        "place"
    )

    def __init__(self, noise: Positive = 0.1) -> None:
        self.noise = noise

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """As ``Checks.check``: observations and actions must be vectors of the same length."""
        places: Any = family.observation_space
        actions: Any = family.action_space
        if not (_is_vector(places) and places.is_bounded() and _is_vector(actions)):
            raise SpaceError(
                f"homing: {family.name} needs a bounded Box of places and a Box of moves, not {places}, {actions}"
            )
        if places.shape != actions.shape:
            raise SpaceError(f"homing: {family.name}: places have shape {places.shape}, moves {actions.shape}")

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        self.check(family, n_timesteps=n_timesteps, n_stream=1)
        places: Any = family.observation_space
        spread = float((places.high - places.low).max()) / 2
        return lambda tasks, generators: HomingAgent(family, spread, self.noise, generators)


class HomingAgent:
    """The learner in N slots. ``probability`` is that of the drawn goal, relative to the likeliest one."""

    entropy: FloatArray | None = None

    def __init__(self, family: TaskFamily, spread: float, noise: float, generators: Generators) -> None:
        self.family, self.spread, self.noise = family, spread, noise
        self._generators = generators

    def reset(self, n_env: int) -> None:
        places: Any = self.family.observation_space
        n_known = places.shape[0] + 1
        self._draws = SlotDraws(self._generators(n_env), "standard_normal", shape=(n_known,))
        self._precision = np.tile(np.eye(n_known) / self.spread**2, (n_env, 1, 1))  # (N, d + 1, d + 1)
        self._weighted = np.zeros((n_env, n_known))  # precision times mean of (g, |g|^2)
        self._reach = np.zeros(n_env)  # the longest move per length of an action so far
        self._opens = np.ones(n_env, bool)
        self._goal, self.probability = np.zeros((n_env, n_known - 1)), np.zeros(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        self._place, normal = np.asarray(obs, np.float64), self._draws()
        new, normal = self._opens, normal[self._opens]
        mean = np.linalg.solve(self._precision[new], self._weighted[new, :, None])
        half = np.linalg.cholesky(self._precision[new]).swapaxes(1, 2)
        self._goal[new] = (mean + np.linalg.solve(half, normal[..., None]))[:, :-1, 0]
        self.probability[new] = np.exp(-0.5 * (normal**2).mean(axis=1))
        way = self._goal - self._place
        far = np.linalg.norm(way, axis=1)
        length = np.minimum(1.0, np.divide(far, self._reach, out=np.ones_like(far), where=self._reach > 0))
        actions: Any = self.family.action_space
        action = way * (length / np.maximum(far, 1e-12))[:, None]
        return np.clip(action, actions.low, actions.high).astype(actions.dtype)

    def observe(self, actions: AnyArray, step: Step) -> None:
        if (step.reward > 0).any():
            raise UsageError(f"homing: {self.family.name} pays more than 0, which is not minus a distance")
        place, paid = np.asarray(step.next_obs, np.float64), np.asarray(step.reward, np.float64)
        known = np.concatenate([2 * place, -np.ones((len(place), 1))], axis=1)
        seen = (place**2).sum(axis=1) - paid**2
        self._precision += known[:, :, None] * known[:, None] / self.noise**2
        self._weighted += known * seen[:, None] / self.noise**2
        self._opens = step.terminated | step.truncated
        moved = np.linalg.norm(place - self._place, axis=1)
        length = np.linalg.norm(np.asarray(actions, np.float64), axis=1)
        self._reach = np.maximum(self._reach, moved / np.maximum(length, 1e-6))


def _is_vector(space: Any) -> bool:
    return len(getattr(space, "low", np.zeros(())).shape) == 1 and space.dtype.kind == "f"
