"""Dark rooms: gridworlds whose agent sees only its own cell and must find out where the reward is.

All families share one layout. A cell is (x, y) with 0 <= x, y < ``size``; observations are int64 (N, 2).
Actions are 0 stay, 1 up (y + 1), 2 down (y - 1), 3 left (x - 1), 4 right (x + 1); walls stop a move.
Rewards look at the *successor* of the action: standing on a goal and staying pays. The time limit truncates;
an episode that terminates on its last step counts as terminated only. Everything is deterministic, so the
``seeds`` of ``make`` have no effect.

Source: Laskin et al., "In-context Reinforcement Learning with Algorithm Distillation", 2022, section 4 and
appendix (Dark Room, Dark Room Hard, Dark Key-to-Door); the larger and permuted rooms are those of Son et al.,
"Distilling Reinforcement Learning Algorithms for In-Context Model-Based Planning", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations
from typing import ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.tasks.base import TASK_FAMILY
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray, Step

N_ACTION = 5
_MOVES = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]])

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


@lru_cache(maxsize=16)
def _cells(size: int) -> Int64Array:
    """(size * size, 2) coordinates of every cell; cell (x, y) has index x * size + y."""
    return np.stack(np.divmod(np.arange(size * size), size), axis=1)


@lru_cache(maxsize=16)
def _successors(size: int) -> Int64Array:
    """(5, size * size) index of the cell that each move leads to."""
    target = np.clip(_cells(size) + _MOVES[:, None], 0, size - 1)
    return np.asarray(target @ np.array([size, 1]))


@lru_cache(maxsize=16)
def _random_walk(size: int) -> Float64Array:
    """(cells, cells) transition matrix of the uniformly random policy."""
    chances = np.zeros((size * size, size * size))
    for successor in _successors(size):
        chances[np.arange(size * size), successor] += 1 / N_ACTION
    return chances


def _first_hits(size: int, horizon: int) -> Iterator[Float64Array]:
    """For each step, (cells s, cells g): chance that the random walk from s *first* steps onto g then."""
    walk, elsewhere = _random_walk(size), 1 - np.eye(size * size)
    hits = walk
    for _ in range(horizon):
        yield hits
        hits = walk @ (hits * elsewhere)


@lru_cache(maxsize=16)
def _hit_chance(size: int, horizon: int, start: int) -> Float64Array:
    """(cells,) chance that the random walk from ``start`` steps onto each cell within ``horizon`` steps."""
    return np.asarray(sum(hits[start] for hits in _first_hits(size, horizon)))


@lru_cache(maxsize=16)
def _visits(size: int, horizon: int, start: int) -> Float64Array:
    """(cells,) expected number of steps on which the random walk from ``start`` steps onto each cell."""
    chance, total = np.eye(size * size)[start], np.zeros(size * size)
    for _ in range(horizon):
        chance = chance @ _random_walk(size)
        total += chance
    return total


def _first_in_episode(flag: BoolArray, start: BoolArray) -> BoolArray:
    """(T,) True on the first True of ``flag`` within each episode."""
    count = np.cumsum(flag)
    before = np.maximum.accumulate(np.where(start, count - flag, 0))
    return flag & (count - before == 1)


def _distance(a: IntArray, b: ArrayLike) -> Int64Array:
    """(N,) Manhattan distance between cells."""
    return np.asarray(np.abs(a - np.asarray(b)).sum(-1))


def _towards(obs: IntArray, target: IntArray) -> Int64Array:
    """(N,) a move on a shortest path from ``obs`` (N, 2) to ``target`` (N, 2): x first, then y, then stay."""
    dx, dy = (target - obs).T
    vertical = np.where(dy > 0, 1, np.where(dy < 0, 2, 0))
    move: Int64Array = np.where(dx > 0, 4, np.where(dx < 0, 3, vertical))
    return move


@dataclass(frozen=True)
class _Grid:
    """What the rooms have in common; ``size`` cells a side, episodes of at most ``horizon`` steps."""

    name: ClassVar[str]
    size: int
    horizon: int

    def __post_init__(self) -> None:
        for key, least in (("size", 2), ("horizon", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{self.name}: {key} must be an integer >= {least}, got {value!r}")

    @cached_property
    def observation_space(self) -> spaces.MultiDiscrete:
        """The agent's own cell, (x, y)."""
        return spaces.MultiDiscrete([self.size, self.size])

    @cached_property
    def action_space(self) -> spaces.Discrete:
        """Stay, up, down, left, right."""
        return spaces.Discrete(N_ACTION)

    @property
    def start(self) -> tuple[int, int]:
        """The cell where every episode starts: the centre."""
        return self.size // 2, self.size // 2

    def _index(self, cells: ArrayLike) -> Int64Array:
        x, y = np.moveaxis(np.asarray(cells, np.int64), -1, 0)
        return np.asarray(x * self.size + y)

    def _check(self, tasks: AnyArray, width: int) -> Int64Array:
        tasks = np.asarray(tasks)
        if tasks.ndim != 2 or tasks.shape[1] != width:
            raise UsageError(f"{self.name}: expected tasks of shape (N, {width}), got {tasks.shape}")
        if tasks.dtype.kind not in "iu" or (tasks < 0).any() or (tasks >= self.size).any():
            raise UsageError(f"{self.name}: tasks must be integer cells in 0..{self.size - 1}")
        return np.asarray(tasks, np.int64)


class _GridEnv:
    """N slots of one room, stepped together; subclasses judge the cells stepped onto."""

    def __init__(self, family: _Grid, num_envs: int) -> None:
        self.num_envs = num_envs
        self._family = family
        self._n_cell = family.size**2
        self._cells = _cells(family.size)
        self._successors = _successors(family.size).ravel()
        self._start = int(family._index(family.start))
        self._cell = np.full(num_envs, self._start)
        self._time = np.zeros(num_envs, np.int64)
        self._return = np.zeros(num_envs, np.float32)

    def reset(self) -> Int64Array:
        """Start an episode in every slot; observations (N, 2) int64."""
        self._cell[:] = self._start
        self._time[:] = 0
        self._return[:] = 0
        return self._cells.take(self._cell, axis=0)

    def step(self, actions: AnyArray) -> Step:
        """Advance every slot by one action (N,); slots whose episode ends are reset at once."""
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
        reward, terminated = self._judge(cell)
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

    def _moves(self, actions: AnyArray) -> AnyArray:
        return actions

    def _judge(self, cell: Int64Array) -> tuple[NDArray[np.float32], BoolArray]:
        raise NotImplementedError


@TASK_FAMILY.register("darkroom")
@dataclass(frozen=True)
class Darkroom(_Grid):
    """A room with one invisible goal cell; +1 for every step that ends on it (Laskin et al. 2022).

    Tasks are the goal cells, rows (x, y), all of them, the start (the centre) included.
    """

    name: ClassVar[str] = "darkroom"
    terminates: ClassVar[bool] = False
    size: int = 9
    horizon: int = 20

    def tasks(self) -> Int64Array:
        """(size**2, 2) goal cells, y running fastest."""
        return _cells(self.size).copy()

    def make(self, tasks: AnyArray, seeds: IntArray) -> _DarkroomEnv:
        """One slot per row of ``tasks`` (N, 2)."""
        return _DarkroomEnv(self, self._check(tasks, 2))

    def goal_distance(self, tasks: AnyArray) -> Int64Array:
        """(N,) steps from the start to the goal (Manhattan distance)."""
        return _distance(self._check(tasks, 2), self.start)

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) walk to the goal and stay; on a goal at distance 0 every step pays."""
        arrival = np.maximum(self.goal_distance(tasks), 1)
        pay = self.horizon - arrival + 1
        return np.asarray(np.clip(pay, 0, 1 if self.terminates else None), np.float64)

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact, from the occupancy (or first hits, if the goal ends the episode) of a random walk."""
        start, goal = int(self._index(self.start)), self._index(self._check(tasks, 2))
        if self.terminates:
            return np.asarray(_hit_chance(self.size, self.horizon, start)[goal])
        return np.asarray(_visits(self.size, self.horizon, start)[goal])

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        """(N,) an optimal action in ``obs`` (N, 2); ``episode_return`` is not needed here."""
        return _towards(obs, self._check(tasks, 2))

    def reward(
        self, task: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> NDArray[np.float32]:
        """(T,) rewards of recorded transitions had ``task`` (2,) been the goal."""
        on_goal = (np.asarray(next_states) == task).all(-1)
        return (_first_in_episode(on_goal, start) if self.terminates else on_goal).astype(np.float32)


class _DarkroomEnv(_GridEnv):
    def __init__(self, family: Darkroom, tasks: Int64Array) -> None:
        super().__init__(family, len(tasks))
        self._room, self._tasks = family, tasks
        self._goal = family._index(tasks)
        self._never = np.zeros(len(tasks), bool)

    def _judge(self, cell: Int64Array) -> tuple[NDArray[np.float32], BoolArray]:
        on_goal = cell == self._goal
        return on_goal.astype(np.float32), on_goal if self._room.terminates else self._never.copy()

    def optimal_actions(self) -> Int64Array:
        """(N,) an optimal action in the present state of every slot."""
        return self._room.optimal_action(self._tasks, self._cells[self._cell], self._return)


@TASK_FAMILY.register("darkroom_large")
@dataclass(frozen=True)
class DarkroomLarge(Darkroom):
    """Darkroom with 15x15 cells and 50 steps (Son et al. 2025)."""

    name: ClassVar[str] = "darkroom_large"
    size: int = 15
    horizon: int = 50


@TASK_FAMILY.register("darkroom_hard")
@dataclass(frozen=True)
class DarkroomHard(Darkroom):
    """Dark Room Hard: 17x17 cells, 20 steps, +1 exactly once, on reaching the goal (Laskin et al. 2022).

    The paper says "r = 1 exactly once"; what follows it cannot pay, so the episode terminates there, which
    also keeps the cell a sufficient observation. The farthest goals are 16 steps away. A goal on the start
    cell pays on the first step that ends there.
    """

    name: ClassVar[str] = "darkroom_hard"
    terminates: ClassVar[bool] = True
    size: int = 17
    horizon: int = 20


@TASK_FAMILY.register("darkroom_permuted")
@dataclass(frozen=True)
class DarkroomPermuted(_Grid):
    """From one corner to the opposite one with permuted actions; +1 for every step that ends on the goal.

    Tasks are the 120 permutations of the five actions in lexicographic order: action ``a`` makes the move
    ``task[a]``. The tasks differ in dynamics, not in reward, so there is no ``reward`` to recompute.
    """

    name: ClassVar[str] = "darkroom_permuted"
    size: int = 9
    horizon: int = 50

    @property
    def start(self) -> tuple[int, int]:
        """The cell where every episode starts: the corner (0, 0)."""
        return 0, 0

    @property
    def goal(self) -> tuple[int, int]:
        """The opposite corner."""
        return self.size - 1, self.size - 1

    def tasks(self) -> Int64Array:
        """(120, 5) permutations."""
        return np.array(list(permutations(range(N_ACTION))), np.int64)

    def make(self, tasks: AnyArray, seeds: IntArray) -> _PermutedEnv:
        """One slot per row of ``tasks`` (N, 5)."""
        return _PermutedEnv(self, self._permutations(tasks))

    def goal_distance(self, tasks: AnyArray) -> Int64Array:
        """(N,) steps from corner to corner, the same for all tasks."""
        return np.full(len(tasks), 2 * (self.size - 1))

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) walk to the goal and stay; the same for all tasks."""
        return np.asarray(np.maximum(self.horizon - self.goal_distance(tasks) + 1.0, 0.0))

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact; a uniformly random policy does not notice the permutation."""
        visits = _visits(self.size, self.horizon, int(self._index(self.start)))
        return np.full(len(tasks), visits[self._index(self.goal)])

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        """(N,) an optimal action in ``obs`` (N, 2); ``episode_return`` is not needed here."""
        move = _towards(obs, np.broadcast_to(self.goal, np.shape(obs)))
        inverse = np.argsort(self._permutations(tasks), axis=1)
        return np.take_along_axis(inverse, move[:, None], 1)[:, 0]

    def _permutations(self, tasks: AnyArray) -> Int64Array:
        tasks = np.asarray(tasks)
        if tasks.ndim != 2 or tasks.shape[1] != N_ACTION or (np.sort(tasks, 1) != np.arange(N_ACTION)).any():
            raise UsageError(
                f"{self.name}: expected tasks (N, {N_ACTION}), permutations of 0..{N_ACTION - 1}"
            )
        return np.asarray(tasks, np.int64)


class _PermutedEnv(_GridEnv):
    def __init__(self, family: DarkroomPermuted, tasks: Int64Array) -> None:
        super().__init__(family, len(tasks))
        self._room, self._tasks = family, tasks
        self._goal = family._index(family.goal)
        self._flat, self._row = tasks.ravel(), np.arange(len(tasks)) * N_ACTION

    def _moves(self, actions: AnyArray) -> AnyArray:
        return self._flat.take(self._row + actions)

    def _judge(self, cell: Int64Array) -> tuple[NDArray[np.float32], BoolArray]:
        return (cell == self._goal).astype(np.float32), np.zeros(self.num_envs, bool)

    def optimal_actions(self) -> Int64Array:
        """(N,) an optimal action in the present state of every slot."""
        return self._room.optimal_action(self._tasks, self._cells[self._cell], self._return)


@TASK_FAMILY.register("key_to_door")
@dataclass(frozen=True)
class KeyToDoor(_Grid):
    """Dark Key-to-Door: +1 once for stepping onto the key, +1 for then stepping onto the door, which ends
    the episode (Laskin et al. 2022). Neither the cells nor whether the key is held can be seen.

    Tasks are all pairs of key and door cells, rows (key_x, key_y, door_x, door_y). The two coincidences:
    a key on the start cell is not held at the start, but picked up by any step that ends there; a key on the
    door opens it at once, so one step pays 2 and ends the episode. Hence the optimum is 2 for every task.
    """

    name: ClassVar[str] = "key_to_door"
    size: int = 9
    horizon: int = 50

    def tasks(self) -> Int64Array:
        """(size**4, 4) key and door cells, the door running fastest."""
        cells = _cells(self.size)
        return np.concatenate([np.repeat(cells, len(cells), 0), np.tile(cells, (len(cells), 1))], 1)

    def make(self, tasks: AnyArray, seeds: IntArray) -> _KeyToDoorEnv:
        """One slot per row of ``tasks`` (N, 4)."""
        return _KeyToDoorEnv(self, self._check(tasks, 4))

    def goal_distance(self, tasks: AnyArray) -> Int64Array:
        """(N,) steps from the start to the key and from there to the door (Manhattan distances)."""
        tasks = self._check(tasks, 4)
        return _distance(tasks[:, :2], self.start) + _distance(tasks[:, 2:], tasks[:, :2])

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) 2 where both cells can be reached in time."""
        tasks = self._check(tasks, 4)
        key = np.maximum(_distance(tasks[:, :2], self.start), 1)
        door = key + _distance(tasks[:, 2:], tasks[:, :2])
        return np.add(key <= self.horizon, door <= self.horizon, dtype=np.float64)

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact, from the first-hit times of a random walk: start to key, then key to door."""
        tasks = self._check(tasks, 4)
        table = _key_to_door_random(self.size, self.horizon, int(self._index(self.start)))
        return table[self._index(tasks[:, :2]), self._index(tasks[:, 2:])]

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        """(N,) an optimal action; ``episode_return`` (N,) so far tells whether the key is held."""
        tasks = self._check(tasks, 4)
        held = np.asarray(episode_return)[:, None] > 0
        return _towards(obs, np.where(held, tasks[:, 2:], tasks[:, :2]))

    def reward(
        self, task: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> NDArray[np.float32]:
        """(T,) rewards of recorded transitions under ``task`` (4,); an opened door pays nothing more."""
        next_states, task = np.asarray(next_states), np.asarray(task)
        key = _first_in_episode((next_states == task[:2]).all(-1), start)
        # Episodes with the key in hand: picked up at or before this step, since the episode began.
        episode = np.cumsum(start)
        held_from = np.full(int(episode[-1]) + 1 if len(episode) else 1, len(key))
        held_from[episode[key]] = np.flatnonzero(key)
        held = np.arange(len(key)) >= held_from[episode]
        door = _first_in_episode((next_states == task[2:]).all(-1) & held, start)
        return key.astype(np.float32) + door.astype(np.float32)


@lru_cache(maxsize=16)
def _key_to_door_random(size: int, horizon: int, start: int) -> Float64Array:
    """(key cells, door cells) expected return of the random policy."""
    hits = np.stack(list(_first_hits(size, horizon)))  # (horizon, from, to)
    from_start = hits[:, start]  # (horizon, key)
    reached = np.cumsum(hits, axis=0)  # (horizon, key, door): door reached within t + 1 steps of the key
    both = np.einsum("tk,tkd->kd", from_start[:-1], reached[-2::-1])
    key = from_start.sum(0)
    np.fill_diagonal(both, key)
    return np.asarray(key[:, None] + both)


class _KeyToDoorEnv(_GridEnv):
    def __init__(self, family: KeyToDoor, tasks: Int64Array) -> None:
        super().__init__(family, len(tasks))
        self._room, self._tasks = family, tasks
        self._key, self._door = family._index(tasks[:, :2]), family._index(tasks[:, 2:])

    def _judge(self, cell: Int64Array) -> tuple[NDArray[np.float32], BoolArray]:
        had = self._return > 0
        found = (cell == self._key) & ~had
        opened = (cell == self._door) & (had | found)
        return found.astype(np.float32) + opened, opened

    def optimal_actions(self) -> Int64Array:
        """(N,) an optimal action in the present state of every slot."""
        return self._room.optimal_action(self._tasks, self._cells[self._cell], self._return)
