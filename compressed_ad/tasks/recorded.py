"""A family that stands for an environment which is not here: its histories can be used, but nothing plays it.

With ``recorded:NAME``, whoever has a data set but no environment for it can import, inspect, mark and export
its histories, and train on them. Evaluation in context plays tasks, so it needs the environment itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

import gymnasium
import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.registry import checked
from compressed_ad.settings import Count
from compressed_ad.types import AnyArray, FloatArray, IntArray, check_spec, from_spec


@checked
class RecordedFamily:
    """The tasks 0..``n_task`` - 1 of an environment that is known by its recorded histories alone.

    ``observation`` and ``action`` describe the spaces as history files do: ``{kind: discrete, n: 5}``,
    ``{kind: multidiscrete, nvec: [9, 9]}`` or ``{kind: box, shape: [4], dtype: float32, low: 0, high: 1}``
    (``low: null`` if unbounded). ``random_return`` is what uniformly random actions earn in an episode of at
    most ``horizon`` steps, ``best_return`` what optimal ones earn: nobody can measure them here. Playing a
    task is a ``UsageError``.
    """

    def __init__(
        self, env_id: str, observation: dict[str, Any], action: dict[str, Any], horizon: Count, n_task: Count,
        random_return: float, best_return: float | None = None,
    ) -> None:  # fmt: skip
        self.name, self.horizon, self.n_task = f"recorded:{env_id}", horizon, n_task
        self._random, self.best_return = random_return, best_return
        for spec in (observation, action):
            check_spec(spec)
        self.observation_space: gymnasium.Space[Any] = from_spec(observation)
        self.action_space: gymnasium.Space[Any] = from_spec(action)

    def __repr__(self) -> str:
        return f"RecordedFamily({self.name}, horizon={self.horizon}): {self.n_task:,} tasks"

    def tasks(self) -> IntArray:
        """(n_task, 1): the number of each task."""
        return np.arange(self.n_task)[:, None]

    def make(self, tasks: AnyArray, seeds: IntArray) -> NoReturn:
        raise UsageError(
            f"{self.name} has no environment, so its tasks cannot be played; name the family itself:"
            " --family module:attribute"
        )

    def optimal_return(self, tasks: AnyArray) -> FloatArray | None:
        return None if self.best_return is None else np.full(len(tasks), self.best_return)

    def random_return(self, tasks: AnyArray) -> FloatArray:
        return np.full(len(tasks), self._random)
