"""Dark rooms whose tasks are several hidden cells."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.seeding import rng
from compressed_ad.settings import Seed, TaskCount
from compressed_ad.tasks.grid import Float64Array, Grid, Int64Array, all_cells, distance
from compressed_ad.types import AnyArray


class SeveralGoals(Grid):
    """Tasks are rows (x, y, x, y, ...) of goals, each drawn independently from all cells, the start included.

    ``n_task`` different tasks are drawn with ``task_seed``. Unless a family says otherwise, every step pays 1
    that ends on the goal whose turn it is. Each has as many turns as the others, so returns are means.
    """

    # Not fields here, so that each family keeps the order of its own.
    n_task: TaskCount
    task_seed: Seed

    @property
    @abstractmethod
    def goals_of_task(self) -> int:
        """How many goals a task has."""

    @cached_property
    def _tasks(self) -> Int64Array:
        # More than half of what is drawn is new, unless almost all are asked for.
        size = (2 * self.n_task, self.goals_of_task)
        drawn = rng(self.task_seed, self.name).integers(self.size**2, size=size)
        _, first = np.unique(drawn, axis=0, return_index=True)
        if len(first) < self.n_task:
            raise UsageError(f"{self.name}: too few different tasks for n_task {self.n_task}; lower it")
        return all_cells(self.size)[drawn[np.sort(first)[: self.n_task]]].reshape(self.n_task, -1)

    def tasks(self) -> Int64Array:
        """(n_task, 2 n_goal) goal cells. With the same seed, a larger ``n_task`` only appends tasks."""
        return self._tasks.copy()

    def goals(self, tasks: AnyArray) -> Int64Array:
        """(N, n_goal, 2) the goals of ``tasks`` (N, 2 n_goal)."""
        return self.check(tasks, 2 * self.goals_of_task).reshape(len(tasks), self.goals_of_task, 2)

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) walking to the goal that pays and staying there."""
        arrival = np.maximum(distance(self.goals(tasks), self.start_cell), 1)
        return np.asarray(np.maximum(self.horizon - arrival + 1.0, 0.0).mean(1))

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact."""
        return np.asarray(self.random_visits(self.goals(tasks)).mean(1))
