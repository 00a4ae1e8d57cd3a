"""Shared by the gridworlds: cells, moves, the random walk, and N slots that step together.

A cell is (x, y) with 0 <= x, y < ``size``; observations are int64 (N, 2). Actions are 0 stay, 1 up (y + 1),
2 down (y - 1), 3 left (x - 1), 4 right (x + 1); walls stop a move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.settings import Count
from compressed_ad.tasks.base import OneLineRepr
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray, Step

N_ACTION = 5
_STEPS = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]])

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

Size = Annotated[int, Ge(2)]


@lru_cache(maxsize=16)
def all_cells(size: int) -> Int64Array:
    """(size * size, 2) coordinates of every cell; cell (x, y) has index x * size + y."""
    return np.stack(np.divmod(np.arange(size * size), size), axis=1)


@lru_cache(maxsize=16)
def successors(size: int) -> Int64Array:
    """(5, size * size) index of the cell that each move leads to."""
    target = np.clip(all_cells(size) + _STEPS[:, None], 0, size - 1)
    return np.asarray(target @ np.array([size, 1]))


@lru_cache(maxsize=16)
def random_walk(size: int) -> Float64Array:
    """(cells, cells) transition matrix of the uniformly random policy."""
    chances = np.zeros((size * size, size * size))
    for successor in successors(size):
        chances[np.arange(size * size), successor] += 1 / N_ACTION
    return chances


def first_hits(size: int, horizon: int) -> Iterator[Float64Array]:
    """For each step, (cells s, cells g): chance that the random walk from s *first* steps onto g then."""
    walk, elsewhere = random_walk(size), 1 - np.eye(size * size)
    hits = walk
    for _ in range(horizon):
        yield hits
        hits = walk @ (hits * elsewhere)


@lru_cache(maxsize=16)
def hit_chance(size: int, horizon: int, start: int) -> Float64Array:
    """(cells,) chance that the random walk from ``start`` steps onto each cell within ``horizon`` steps."""
    return np.asarray(sum(hits[start] for hits in first_hits(size, horizon)))


@lru_cache(maxsize=16)
def visits(size: int, horizon: int, start: int) -> Float64Array:
    """(cells,) expected number of steps on which the random walk from ``start`` steps onto each cell."""
    chance, total = np.eye(size * size)[start], np.zeros(size * size)
    for _ in range(horizon):
        chance = chance @ random_walk(size)
        total += chance
    return total


def first_in_episode(flag: BoolArray, start: BoolArray) -> BoolArray:
    """(T,) True on the first True of ``flag`` within each episode."""
    count = np.cumsum(flag)
    before = np.maximum.accumulate(np.where(start, count - flag, 0))
    return flag & (count - before == 1)


def distance(a: IntArray, b: ArrayLike) -> Int64Array:
    """(N,) Manhattan distance between cells."""
    return np.asarray(np.abs(a - np.asarray(b)).sum(-1))


def towards(obs: IntArray, target: IntArray) -> Int64Array:
    """(N,) a move on a shortest path from ``obs`` (N, 2) to ``target`` (N, 2): x first, then y, then stay."""
    dx, dy = (target - obs).T
    vertical = np.where(dy > 0, 1, np.where(dy < 0, 2, 0))
    move: Int64Array = np.where(dx > 0, 4, np.where(dx < 0, 3, vertical))
    return move


@dataclass(frozen=True, repr=False)
class Grid(OneLineRepr, ABC):
    """A square room with ``size`` cells a side and episodes of at most ``horizon`` steps."""

    name: ClassVar[str]
    size: Size
    horizon: Count

    @cached_property
    def observation_space(self) -> spaces.MultiDiscrete:
        """The agent's cell, (x, y)."""
        return spaces.MultiDiscrete([self.size, self.size])

    @cached_property
    def action_space(self) -> spaces.Discrete:
        return spaces.Discrete(N_ACTION)

    @property
    def start(self) -> tuple[int, int]:
        """The cell where every episode starts: the centre."""
        return self.size // 2, self.size // 2

    @abstractmethod
    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array: ...

    def index(self, cells: ArrayLike) -> Int64Array:
        """Number x * size + y of cells (..., 2)."""
        x, y = np.moveaxis(np.asarray(cells, np.int64), -1, 0)
        return np.asarray(x * self.size + y)

    def random_hit(self, cells: ArrayLike) -> Float64Array:
        """(N,) chance that random actions step onto each of ``cells`` (N, 2) within an episode."""
        return hit_chance(self.size, self.horizon, int(self.index(self.start)))[self.index(cells)]

    def random_visits(self, cells: ArrayLike) -> Float64Array:
        """(N,) expected number of steps of an episode of random actions onto each of ``cells`` (N, 2)."""
        return visits(self.size, self.horizon, int(self.index(self.start)))[self.index(cells)]

    def check(self, tasks: AnyArray, width: int) -> Int64Array:
        """``tasks`` (N, ``width``) as int64; ``UsageError`` unless they are coordinates of cells."""
        tasks = np.asarray(tasks)
        if tasks.ndim != 2 or tasks.shape[1] != width:
            raise UsageError(f"{self.name}: expected tasks of shape (N, {width}), got {tasks.shape}")
        if tasks.dtype.kind not in "iu" or (tasks < 0).any() or (tasks >= self.size).any():
            raise UsageError(f"{self.name}: tasks must be integer cells in 0..{self.size - 1}")
        return np.asarray(tasks, np.int64)


class GridEnv:
    """N slots of one room that step together.

    ``judge`` gives rewards (N,) float32 and terminations (N,) for stepping onto cells (N,), given the returns
    (N,) of the episodes so far. ``moves`` translates actions (N,) into moves.
    """

    def __init__(
        self,
        family: Grid,
        tasks: Int64Array,
        judge: Callable[[Int64Array, Float32Array], tuple[Float32Array, BoolArray]],
        moves: Callable[[AnyArray], AnyArray] = lambda actions: actions,
    ) -> None:
        self.num_envs = num_envs = len(tasks)
        self._family, self._tasks, self._judge, self._moves = family, tasks, judge, moves
        self._n_cell = family.size**2
        self._cells = all_cells(family.size)
        self._successors = successors(family.size).ravel()
        self._start = int(family.index(family.start))
        self._cell = np.full(num_envs, self._start)
        self._time = np.zeros(num_envs, np.int64)
        self._return = np.zeros(num_envs, np.float32)

    def reset(self) -> Int64Array:
        self._cell[:] = self._start
        self._time[:] = 0
        self._return[:] = 0
        return self._cells.take(self._cell, axis=0)

    def step(self, actions: AnyArray) -> Step:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise SpaceError(
                f"{self._family.name}: expected ({self.num_envs},) integer actions, "
                f"got {actions.dtype} {actions.shape}"
            )
        if self.num_envs and (actions.min() < 0 or actions.max() >= N_ACTION):
            raise SpaceError(f"{self._family.name}: actions must lie in 0..{N_ACTION - 1}")
        cell = self._successors.take(self._moves(actions) * self._n_cell + self._cell)
        self._time += 1
        reward, terminated = self._judge(cell, self._return)
        self._return += reward
        truncated = (self._time >= self._family.horizon) & ~terminated
        next_obs = obs = self._cells.take(cell, axis=0)
        self._cell = cell
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            cell[ended] = self._start
            self._time[ended] = 0
            self._return[ended] = 0
            obs = self._cells.take(cell, axis=0)
        return Step(next_obs, reward, terminated, truncated, obs)

    def optimal_actions(self) -> Int64Array:
        """(N,) an optimal action in the current state of every slot."""
        return self._family.optimal_action(self._tasks, self._cells.take(self._cell, axis=0), self._return)
