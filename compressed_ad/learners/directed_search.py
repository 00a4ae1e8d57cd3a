"""Directed search: R-max that is told the moves, as an agent that plays beside models."""

from __future__ import annotations

import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.learners.finite_players import Row, number
from compressed_ad.learners.rmax import RMax
from compressed_ad.seeding import seed64
from compressed_ad.tasks.base import HiddenProgress, TaskFamily
from compressed_ad.types import AnyArray, Step


class DirectedSearch:
    """Knows where actions lead, but not what pays: it tries the nearest places until it meets a reward.

    ``tasks`` (N, P) are those of the slots; the slots of a task are adjacent, as in ``evaluate_tasks``. Each
    slot learns on its own. Raises ``UsageError`` without a successor table, and what ``RMax.check`` raises.
    """

    def __init__(self, family: TaskFamily, tasks: AnyArray, seed: int = 0) -> None:
        memory = family.rewards_to_remember if isinstance(family, HiddenProgress) else 0
        self._learner = RMax("given", memory=memory, epsilon=0.0)
        self._learner.check(family, n_timesteps=1, n_stream=len(tasks))
        self._observations, actions = self._learner.spaces(family)
        self._actions = actions.elements.astype(np.int64)
        self._family, self._tasks, self._seed = family, np.asarray(tasks), seed

    def reset(self, n_env: int) -> None:
        """Forget everything and start in ``n_env`` slots, a multiple of the number of tasks."""
        if n_env == 0 or n_env % len(self._tasks):
            raise UsageError(f"{n_env} slots cannot be shared equally by {len(self._tasks)} tasks")
        random = np.array([seed64(self._seed, "directed search", k) for k in range(n_env)], np.uint64)
        self._player = self._learner.player(self._family, self._tasks, n_env // len(self._tasks), random)
        self._epsilon = np.zeros(n_env)
        self._row: Row = {name: np.zeros(n_env, np.int64) for name in ("states", "actions", "next_states")}
        self._row |= {name: np.zeros(n_env, np.float32) for name in ("action_probs", "entropy")}

    def act(self, obs: AnyArray) -> AnyArray:
        number(self._observations, obs, self._row["states"])
        self._player.act(self._row, self._epsilon)
        return self._actions.take(self._row["actions"], axis=0)

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Learn what pays."""
        number(self._observations, step.next_obs, self._row["next_states"])
        row = {**self._row, "rewards": np.asarray(step.reward), "terminated": np.asarray(step.terminated)}
        self._player.learn(row, self._epsilon, step.terminated | step.truncated)
