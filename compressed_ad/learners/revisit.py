"""A learner for rooms that change: it goes where it was paid, and back to where it was paid before."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.learners.finite import Numbering
from compressed_ad.learners.scripted import MakeAgent, ScriptedLearner
from compressed_ad.registry import checked
from compressed_ad.settings import Whole
from compressed_ad.tasks.bandit import Floats, Generators, Rule
from compressed_ad.tasks.base import TaskFamily, has_successors, successors_of
from compressed_ad.tasks.limit_search import distances
from compressed_ad.types import AnyArray, IntArray, Step

UNKNOWN, PAYS, FAILED = range(3)


@checked
class Revisit(ScriptedLearner):
    """Searches for the place that pays, and notices when it is moved; every stream is a run of its own.

    It heads for the place that paid when it was last there; else for the nearest place that paid at any time
    and was not tried since the last change; else for the nearest place that was not tried since. A change is
    noticed when a place no longer pays. Equally good moves are equally likely. What pays is learned for each
    number of rewards met in the episode, up to ``memory``: with 1, for the key and for the door.
    """

    name = "Revisit"
    told = (
        "nothing of the task; of the family, where each action leads from each place, and that one place "
        "pays until another one does"
    )

    def __init__(self, memory: Whole = 0) -> None:
        self.memory = memory

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """As ``Checks.check``: places must be numbered, and moves known and the same in all tasks."""
        if not has_successors(family) or not isinstance(family.action_space, spaces.Discrete):
            raise SpaceError(f"revisit: {family.name} needs a successor_table, numbered places and actions")
        table = successors_of(family, family.tasks()[:64])
        if table.min() < 0 or (table != table[0]).any():
            raise UsageError(f"revisit: moves of {family.name} must be the same in all tasks, and all known")

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        self.check(family, n_timesteps=n_timesteps, n_stream=1)
        return lambda tasks, generators: RevisitAgent(family, self.memory, generators)


class RevisitAgent(Rule):
    """The learner in N slots."""

    def __init__(self, family: TaskFamily, memory: int, generators: Generators) -> None:
        super().__init__(generators)
        self._numbering, self._memory = Numbering(family.observation_space), memory
        self._moves = successors_of(family, family.tasks()[:1])[0]
        self._steps = distances(self._moves)

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        shape = (n_env, self._memory + 1, self._numbering.n)
        self._state, self._paid = np.full(shape, UNKNOWN, np.int8), np.zeros(shape, bool)
        self._slot, self._met = np.arange(n_env), np.zeros(n_env, np.int64)

    def act(self, obs: AnyArray) -> IntArray:
        self._place = self._number(obs)
        return super().act(obs)

    def policy(self) -> Floats:
        state, paid = self._state[self._slot, self._met], self._paid[self._slot, self._met]
        # The farthest place of a better kind comes before the nearest of a worse one.
        rank = np.select([state == PAYS, state == FAILED, paid], [0, 3, 1], 2) * (self._steps.max() + 1)
        cost = (self._steps[self._moves[self._place]] + rank[:, None]).min(axis=2)
        best = cost == cost.min(axis=1, keepdims=True)
        return np.asarray(best / best.sum(axis=1, keepdims=True))

    def observe(self, actions: IntArray, step: Step) -> None:
        at = self._slot, self._met, self._number(step.next_obs)
        paid = step.reward > 0
        moved = (self._state[at] == PAYS) & ~paid
        state = self._state[self._slot, self._met]
        self._state[self._slot, self._met] = np.where(moved[:, None] & (state == FAILED), UNKNOWN, state)
        self._state[at] = np.where(paid, PAYS, FAILED)
        self._paid[at] |= paid
        state = self._state[self._slot, self._met]
        vain = (state == FAILED).all(axis=1)  # it must have been moved to where it was not before
        self._state[self._slot, self._met] = np.where(vain[:, None], UNKNOWN, state)
        self._met = np.where(step.ended, 0, np.minimum(self._met + paid, self._memory))

    def _number(self, obs: AnyArray) -> IntArray:
        digits: Any = np.asarray(obs, np.int64).reshape(len(obs), -1) - self._numbering.first
        return np.asarray(np.ravel_multi_index(tuple(digits.T), tuple(self._numbering.sizes)))
