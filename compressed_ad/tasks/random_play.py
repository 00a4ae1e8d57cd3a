"""The uniformly random policy: its actions, and its return in families that know no formula for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from compressed_ad.errors import SpaceError
from compressed_ad.types import AnyArray, FloatArray


class UniformActions:
    """Uniformly random actions of a Discrete, MultiDiscrete or bounded Box space; ``SpaceError`` for others.

    ``count`` is the number of actions, None for a Box; ``n_part`` the components of one.
    """

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        bounded: Any = space
        self.count: float | None = None
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
            self._low, self._size = np.asarray(space.start), np.asarray(sizes)
            self.count = float(np.prod(self._size.astype(np.float64)))
        elif isinstance(space, spaces.Box) and space.is_bounded():
            self._low, self._high, self._size = space.low, space.high, space.high - space.low
        else:
            wanted = "Discrete, MultiDiscrete or a bounded Box"
            raise SpaceError(f"actions {space} cannot be drawn uniformly; they must be {wanted}")
        self.shape, self.dtype = tuple(bounded.shape), bounded.dtype
        self.n_part = math.prod(self.shape)

    def draw(self, random: np.random.Generator, n: int) -> AnyArray:
        """Actions (n, ...)."""
        shape = (n, *self.shape)
        if self.count is not None:
            return np.asarray(self._low + random.integers(self._size, size=shape))
        if self.dtype.kind == "f":
            return random.uniform(self._low, self._high, shape).astype(self.dtype)
        return random.integers(self._low, self._high, shape, endpoint=True).astype(self.dtype)

    def scaled(self, uniform: FloatArray) -> AnyArray:
        """Actions (N, ...) made of numbers in [0, 1), ``uniform`` (N, n_part)."""
        scaled = uniform.reshape(-1, *self.shape) * self._size
        return np.asarray(self._low + (scaled if self.count is None else np.floor(scaled)), self.dtype)


class MeasuredReturns(ABC):
    """Returns of a family for which there is no formula: the random policy's are measured."""

    best_return: float | None

    @abstractmethod
    def tasks(self) -> AnyArray: ...

    def optimal_return(self, tasks: AnyArray) -> FloatArray | None:
        """(N,) ``best_return`` for every task, or None if it was not given."""
        return None if self.best_return is None else np.full(len(tasks), float(self.best_return))

    @cached_property
    def _measured(self) -> dict[bytes, float]:
        return {}

    def random_return(self, tasks: AnyArray) -> FloatArray:
        """(N,) mean return of seeded episodes of uniformly random actions, measured once for each task."""
        rows = np.asarray(tasks, self.tasks().dtype)
        keys = [row.tobytes() for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._measured}
        if new:
            returns = self.play_randomly(np.stack(list(new.values()))).tolist()
            self._measured.update(zip(new, returns, strict=True))
        return np.array([self._measured[key] for key in keys])

    @abstractmethod
    def play_randomly(self, tasks: AnyArray) -> FloatArray:
        """(N,) mean return of seeded episodes of uniformly random actions."""
