"""Square rooms: their cells and moves, the random walk in them, and the environment of all families of rooms.

A cell is (x, y) with 0 <= x, y < ``size``; observations are int64 (N, 2). Actions are 0 stay, 1 up (y + 1),
2 down (y - 1), 3 left (x - 1), 4 right (x + 1); walls stop a move. The *successor* of an action decides its
reward. The time limit truncates; an episode that terminates on its last step counts as terminated only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from compressed_ad.errors import UsageError
from compressed_ad.settings import Count
from compressed_ad.tasks.base import OneLineRepr, discrete_actions
from compressed_ad.types import AnyArray, BoolArray, IntArray, Step

N_ACTION = 5

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
Judge = Callable[[Int64Array, Float32Array], tuple[Float32Array, BoolArray]]
Size = Annotated[int, Ge(2), Le(1000)]


@lru_cache(maxsize=16)
def all_cells(size: int) -> Int64Array:
    """(size * size, 2) coordinates of every cell; cell (x, y) has index x * size + y."""
    return np.stack(np.divmod(np.arange(size * size), size), axis=1)


@lru_cache(maxsize=16)
def successors(size: int) -> Int64Array:
    """(5, size * size) index of the cell that each move leads to."""
    steps = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]])
    target = np.clip(all_cells(size) + steps[:, None], 0, size - 1)
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
def hit_chances(size: int, horizon: int, start: int | None) -> Float64Array:
    """(horizon, cells) chance that the random walk first steps onto each cell at each step.

    It begins in the cell ``start``, or without one in a random cell other than the one that is hit.
    """
    if start is not None:
        return np.stack([hits[start] for hits in first_hits(size, horizon)])
    elsewhere = [hits.sum(0) - hits.diagonal() for hits in first_hits(size, horizon)]
    return np.stack(elsewhere) / (size**2 - 1)


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
class Grid(OneLineRepr):
    """A square room with ``size`` cells a side and episodes of at most ``horizon`` steps."""

    name: ClassVar[str]
    size: Size
    horizon: Count

    @cached_property
    def observation_space(self) -> spaces.MultiDiscrete:
        return spaces.MultiDiscrete([self.size, self.size])

    @cached_property
    def action_space(self) -> spaces.Discrete:
        return spaces.Discrete(N_ACTION)

    @property
    def cells(self) -> Int64Array:
        """(O, ...) the observation of each cell, in the order of their numbers."""
        return all_cells(self.size)

    @property
    def moves(self) -> Int64Array:
        """(5, O) number of the cell that each move leads to."""
        return successors(self.size)

    @property
    def start_cell(self) -> tuple[int, int]:
        """The cell where every episode starts: the centre."""
        return self.size // 2, self.size // 2

    @property
    def fixed_start(self) -> int | None:
        """Index of that cell, or None if it is another one in every episode."""
        return int(self.index(self.start_cell))

    def successor_table(self, tasks: AnyArray) -> Int64Array:
        """(N, cells, 5) index of the cell that each action leads to."""
        return np.broadcast_to(self.moves.T, (len(tasks), self.moves.shape[1], N_ACTION))

    def index(self, cells: ArrayLike) -> Int64Array:
        """Number x * size + y of cells (..., 2)."""
        x, y = np.moveaxis(np.asarray(cells, np.int64), -1, 0)
        return np.asarray(x * self.size + y)

    def random_hit(self, cells: ArrayLike) -> Float64Array:
        """(N,) chance that random actions step onto each of ``cells`` (N, 2) within an episode."""
        hits = hit_chances(self.size, self.horizon, self.fixed_start)
        return np.asarray(hits.sum(0)[self.index(cells)])

    def random_visits(self, cells: ArrayLike) -> Float64Array:
        """(N,) expected number of steps of an episode of random actions onto each of ``cells`` (N, 2)."""
        return visits(self.size, self.horizon, int(self.index(self.start_cell)))[self.index(cells)]

    def check(self, tasks: AnyArray, width: int) -> Int64Array:
        """``tasks`` (N, ``width``) as int64; ``UsageError`` unless they are coordinates of cells."""
        tasks = np.asarray(tasks)
        if tasks.ndim != 2 or tasks.shape[1] != width:
            raise UsageError(f"{self.name}: expected tasks of shape (N, {width}), got {tasks.shape}")
        if tasks.dtype.kind not in "iu" or (tasks < 0).any() or (tasks >= self.size).any():
            raise UsageError(f"{self.name}: tasks must be integer cells in 0..{self.size - 1}")
        return np.asarray(tasks, np.int64)


def paying(pays: Callable[[Int64Array], BoolArray], ends: bool = False) -> Judge:
    """The judge of a room in which a step onto a cell (N,) that ``pays`` earns 1, and may end the episode."""

    def judge(cell: Int64Array, episode_return: Float32Array) -> tuple[Float32Array, BoolArray]:
        paid = pays(cell)
        return paid.astype(np.float32), paid if ends else np.zeros(len(cell), bool)

    return judge


class GridEnv:
    """N slots of one room that step together.

    ``judge`` gives rewards (N,) float32 and terminations (N,) for stepping onto cells (N,), given the returns
    (N,) of the episodes so far. ``moves`` translates actions (N,) into moves, and ``starts`` gives the cells
    where the next episodes of slots (K,) start, by default the family's.
    """

    def __init__(
        self,
        family: Grid,
        num_envs: int,
        judge: Judge,
        moves: Callable[[AnyArray], AnyArray] = np.asarray,
        starts: Callable[[IntArray], AnyArray] | None = None,
    ) -> None:
        self.num_envs, self._family, self._judge, self._moves = num_envs, family, judge, moves
        self._cells, self._successors = family.cells, family.moves.ravel()
        start = int(family.index(family.start_cell))
        self._starts = starts or (lambda slots: np.full(len(slots), start))
        self._cell = np.full(num_envs, start)
        self._time = np.zeros(num_envs, np.int64)
        self._return = np.zeros(num_envs, np.float32)

    def reset(self) -> Int64Array:
        self._cell[:] = self._starts(np.arange(self.num_envs))
        self._time[:] = 0
        self._return[:] = 0
        return self._cells.take(self._cell, axis=0)

    def step(self, actions: AnyArray) -> Step:
        actions = discrete_actions(self._family.name, actions, self.num_envs, N_ACTION)
        cell = self._successors.take(self._moves(actions) * len(self._cells) + self._cell)
        self._time += 1
        reward, terminated = self._judge(cell, self._return)
        self._return += reward
        truncated = (self._time >= self._family.horizon) & ~terminated
        next_obs = obs = self._cells.take(cell, axis=0)
        self._cell = cell
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            cell[ended] = self._starts(ended)
            self._time[ended] = 0
            self._return[ended] = 0
            obs = self._cells.take(cell, axis=0)
        return Step(next_obs, reward, terminated, truncated, obs)
