"""Dark rooms: gridworlds whose agent sees only its own cell and must find the reward.

A cell is (x, y) with 0 <= x, y < ``size``; observations are int64 (N, 2). Actions are 0 stay, 1 up (y + 1),
2 down (y - 1), 3 left (x - 1), 4 right (x + 1); walls stop a move. The *successor* of an action decides its
reward: staying on a goal pays. The time limit truncates; an episode that terminates on its last step counts
as terminated only. Everything but the random start of ``KeyToDoor`` is deterministic, so the ``seeds`` of
``make`` have no other effect.

Source: Laskin et al., "In-context Reinforcement Learning with Algorithm Distillation", 2022, section 4 and
appendix (Dark Room, Dark Room Hard, Dark Key-to-Door); the permuted room as in Son et al., "Distilling
Reinforcement Learning Algorithms for In-Context Model-Based Planning", ICLR 2025; the large room as in Chen
et al., "Filtering Learning Histories Enhances In-Context Reinforcement Learning", 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from compressed_ad.errors import UsageError
from compressed_ad.registry import checked
from compressed_ad.settings import Count
from compressed_ad.tasks.base import OneLineRepr, OptimalPolicy, discrete_actions
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray, Step

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


class GridEnv:
    """N slots of one room that step together.

    ``judge`` gives rewards (N,) float32 and terminations (N,) for stepping onto cells (N,), given the returns
    (N,) of the episodes so far. ``moves`` translates actions (N,) into moves, and ``starts`` gives the cells
    where the next episodes of slots (K,) start, by default the family's.
    """

    def __init__(
        self,
        family: Grid,
        tasks: Int64Array,
        judge: Judge,
        moves: Callable[[AnyArray], AnyArray] = np.asarray,
        starts: Callable[[IntArray], AnyArray] | None = None,
    ) -> None:
        self.num_envs = num_envs = len(tasks)
        self._family, self._tasks, self._judge, self._moves = family, tasks, judge, moves
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

    def optimal_actions(self) -> Int64Array:
        """(N,) an optimal action in the current state of every slot, where the family knows one."""
        obs = self._cells.take(self._cell, axis=0)
        assert isinstance(self._family, OptimalPolicy)
        return np.asarray(self._family.optimal_action(self._tasks, obs, self._return))


@checked
@dataclass(frozen=True, repr=False)
class Darkroom(Grid):
    """A room with one invisible goal cell; +1 for every step that ends on it (Laskin et al. 2022).

    Tasks are the goal cells, rows (x, y), all of them, the start (the centre) included.
    """

    name: ClassVar[str] = "darkroom"
    terminates: ClassVar[bool] = False
    size: Size = 9
    horizon: Count = 20

    @property
    def pays_on(self) -> bool:
        """Whether every step on the goal pays; if not, the first one ends the episode."""
        return not self.terminates

    def rewarded_places(self, tasks: AnyArray) -> Int64Array:
        return self.index(self.check(tasks, 2))[:, None]

    def tasks(self) -> Int64Array:
        """(size**2, 2) goal cells; y changes fastest."""
        return all_cells(self.size).copy()

    def make(self, tasks: AnyArray, seeds: IntArray) -> GridEnv:
        goal, never = self.index(self.check(tasks, 2)), np.zeros(len(tasks), bool)

        def judge(cell: Int64Array, episode_return: FloatArray) -> tuple[Float32Array, BoolArray]:
            on_goal = cell == goal
            return on_goal.astype(np.float32), on_goal if self.terminates else never.copy()

        return GridEnv(self, np.asarray(tasks), judge)

    def goal_distance(self, tasks: AnyArray) -> Int64Array:
        return distance(self.check(tasks, 2), self.start_cell)

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) walking to the goal and staying there; at distance 0 every step pays."""
        arrival = np.maximum(self.goal_distance(tasks), 1)
        pay = self.horizon - arrival + 1
        return np.asarray(np.clip(pay, 0, 1 if self.terminates else None), np.float64)

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact: expected visits of a random walk, or its chance to hit a goal that ends the episode."""
        goals = self.check(tasks, 2)
        return self.random_hit(goals) if self.terminates else self.random_visits(goals)

    def random_found(self, tasks: AnyArray) -> Float64Array:
        return self.random_hit(self.check(tasks, 2))

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        return towards(obs, self.check(tasks, 2))

    def reward(
        self, task: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> Float32Array:
        on_goal = (np.asarray(next_states) == task).all(-1)
        return (first_in_episode(on_goal, start) if self.terminates else on_goal).astype(np.float32)


@checked
@dataclass(frozen=True, repr=False)
class DarkroomLarge(Darkroom):
    """Darkroom with 15x15 cells and 50 steps (Chen et al. 2025)."""

    name: ClassVar[str] = "darkroom_large"
    size: Size = 15
    horizon: Count = 50


@checked
@dataclass(frozen=True, repr=False)
class DarkroomHard(Darkroom):
    """Dark Room Hard: 17x17 cells, 20 steps, +1 exactly once, on reaching the goal (Laskin et al. 2022).

    The paper says "r = 1 exactly once". No later step could pay, so the episode terminates there; the cell
    then also remains a sufficient observation. The farthest goals are 16 steps away. A goal on the start
    cell pays on the first step that ends there.
    """

    name: ClassVar[str] = "darkroom_hard"
    terminates: ClassVar[bool] = True
    size: Size = 17
    horizon: Count = 20


@checked
@dataclass(frozen=True, repr=False)
class DarkroomPermuted(Grid):
    """From one corner to the opposite one with permuted actions; +1 for every step that ends on the goal.

    Tasks are the 120 permutations of the five actions in lexicographic order: action ``a`` makes the move
    ``task[a]``. The tasks differ in dynamics, not in reward, so there is no ``reward`` to recompute.
    """

    name: ClassVar[str] = "darkroom_permuted"
    pays_on: ClassVar[bool] = True
    size: Size = 9
    horizon: Count = 50

    @property
    def start_cell(self) -> tuple[int, int]:
        return 0, 0

    @property
    def goal(self) -> tuple[int, int]:
        return self.size - 1, self.size - 1

    def tasks(self) -> Int64Array:
        """(120, 5) permutations."""
        return np.array(list(permutations(range(N_ACTION))), np.int64)

    def make(self, tasks: AnyArray, seeds: IntArray) -> GridEnv:
        permutations, goal = self._permutations(tasks), int(self.index(self.goal))
        moves, row = permutations.ravel(), np.arange(len(tasks)) * N_ACTION

        def judge(cell: Int64Array, episode_return: FloatArray) -> tuple[Float32Array, BoolArray]:
            return (cell == goal).astype(np.float32), np.zeros(len(cell), bool)

        return GridEnv(self, permutations, judge, lambda actions: moves.take(row + actions))

    def goal_distance(self, tasks: AnyArray) -> Int64Array:
        return np.full(len(tasks), 2 * (self.size - 1))

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) walking to the goal and staying there; the same for all tasks."""
        return np.asarray(np.maximum(self.horizon - self.goal_distance(tasks) + 1.0, 0.0))

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact; permuting its actions does not change the uniformly random policy."""
        return np.full(len(tasks), self.random_visits(self.goal))

    def random_found(self, tasks: AnyArray) -> Float64Array:
        return np.full(len(tasks), self.random_hit(self.goal))

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        move = towards(obs, np.broadcast_to(self.goal, np.shape(obs)))
        inverse = np.argsort(self._permutations(tasks), axis=1)
        return np.take_along_axis(inverse, move[:, None], 1)[:, 0]

    def successor_table(self, tasks: AnyArray) -> Int64Array:
        return successors(self.size)[self._permutations(tasks)].swapaxes(1, 2)

    def rewarded_places(self, tasks: AnyArray) -> Int64Array:
        return np.full((len(tasks), 1), self.index(self.goal))

    def _permutations(self, tasks: AnyArray) -> Int64Array:
        tasks = np.asarray(tasks)
        if tasks.ndim != 2 or tasks.shape[1] != N_ACTION or (np.sort(tasks, 1) != np.arange(N_ACTION)).any():
            wanted = f"tasks (N, {N_ACTION}), permutations of 0..{N_ACTION - 1}"
            raise UsageError(f"{self.name}: expected {wanted}")
        return np.asarray(tasks, np.int64)


@checked
@dataclass(frozen=True, repr=False)
class KeyToDoor(Grid):
    """Dark Key-to-Door: +1 once for stepping onto the key, +1 for then stepping onto the door, which ends
    the episode. Neither the cells nor whether the key is held can be seen.

    Papers mean different rules by this name. An episode starts in the centre, or with ``start="random"`` in
    any cell but the key's. With ``ends=False`` the door pays, but does not end the episode. Laskin et al.
    2022 and Tarasov et al. 2025 have a random start; Zisman et al. 2024 that and 40 steps; Son et al. 2025
    ``ends=False``. The sources of Tarasov et al. see whether the key is held.

    Tasks are all pairs of key and door cells, rows (key_x, key_y, door_x, door_y). Two special cases: a key
    on the start cell is not held at the start, but picked up by any step that ends there; a key on the door
    opens it at once, so one step pays 2 and ends the episode. Hence the optimum is 2 for every task.
    """

    name: ClassVar[str] = "key_to_door"
    pays_on: ClassVar[bool] = False
    size: Size = 9
    horizon: Count = 50
    start: Literal["centre", "random"] = "centre"
    ends: bool = True

    def tasks(self) -> Int64Array:
        """(size**4, 4) key and door cells; the door changes fastest."""
        cells = all_cells(self.size)
        return np.concatenate([np.repeat(cells, len(cells), 0), np.tile(cells, (len(cells), 1))], 1)

    def rewarded_places(self, tasks: AnyArray) -> Int64Array:
        tasks = self.check(tasks, 4)
        return np.stack([self.index(tasks[:, :2]), self.index(tasks[:, 2:])], axis=1)

    def make(self, tasks: AnyArray, seeds: IntArray) -> GridEnv:
        tasks = self.check(tasks, 4)
        key, door = self.index(tasks[:, :2]), self.index(tasks[:, 2:])

        def judge(cell: Int64Array, episode_return: FloatArray) -> tuple[Float32Array, BoolArray]:
            held = episode_return > 0
            found = (cell == key) & ~held
            opened = (cell == door) & (held | found) & (episode_return < 2)
            return found.astype(np.float32) + opened, opened & self.ends

        return GridEnv(self, tasks, judge, starts=self._draws(key, seeds) if self.start == "random" else None)

    def _draws(self, key: Int64Array, seeds: IntArray) -> Callable[[IntArray], AnyArray]:
        """Draws the next start of slots, each from its own seed."""
        cells, rngs = self._starts(key), [np.random.default_rng(seed) for seed in seeds.tolist()]
        return lambda slots: np.array([cells[rngs[k].integers(len(cells)), k] for k in slots.tolist()])

    @property
    def fixed_start(self) -> int | None:
        return super().fixed_start if self.start == "centre" else None

    def _starts(self, key: Int64Array) -> Int64Array:
        """(S, N) equally likely cells where an episode starts, for keys (N,)."""
        if self.fixed_start is not None:
            return np.full((1, len(key)), self.fixed_start)
        other = np.arange(self.size**2 - 1)[:, None]
        return np.asarray(other + (other >= key))

    def _to_key(self, tasks: Int64Array) -> Int64Array:
        """(S, N) steps to the key from each start."""
        return distance(all_cells(self.size)[self._starts(self.index(tasks[:, :2]))], tasks[:, :2])

    def goal_distance(self, tasks: AnyArray) -> Int64Array:
        """(N,) whole steps from the start (the mean of all) to the key and from there to the door."""
        tasks = self.check(tasks, 4)
        steps = self._to_key(tasks).mean(0) + distance(tasks[:, 2:], tasks[:, :2])
        return np.asarray(np.rint(steps), np.int64)

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) 1 for the key and 1 for the door, if they can be reached in time; the mean of all starts."""
        tasks = self.check(tasks, 4)
        key = np.maximum(self._to_key(tasks), 1)
        door = key + distance(tasks[:, 2:], tasks[:, :2])
        return np.asarray(np.add(key <= self.horizon, door <= self.horizon, dtype=np.float64).mean(0))

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact, from the first-hit times of a random walk: start to key, then key to door."""
        tasks = self.check(tasks, 4)
        table = _key_to_door_random(self.size, self.horizon, self.fixed_start)
        return table[self.index(tasks[:, :2]), self.index(tasks[:, 2:])]

    def random_found(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact chance that random actions find the key, which pays first."""
        return self.random_hit(self.check(tasks, 4)[:, :2])

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        tasks = self.check(tasks, 4)
        held = np.asarray(episode_return)[:, None] > 0  # the key has paid
        return towards(obs, np.where(held, tasks[:, 2:], tasks[:, :2]))

    def reward(
        self, task: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> Float32Array:
        next_states, task = np.asarray(next_states), np.asarray(task)
        key = first_in_episode((next_states == task[:2]).all(-1), start)
        # Episodes with the key in hand: picked up at or before this step, since the episode began.
        episode = np.cumsum(start)
        held_from = np.full(int(episode[-1]) + 1 if len(episode) else 1, len(key))
        held_from[episode[key]] = np.flatnonzero(key)
        held = np.arange(len(key)) >= held_from[episode]
        door = first_in_episode((next_states == task[2:]).all(-1) & held, start)
        return key.astype(np.float32) + door.astype(np.float32)


@lru_cache(maxsize=16)
def _key_to_door_random(size: int, horizon: int, start: int | None) -> Float64Array:
    """(key cells, door cells) expected return of the random policy."""
    hits = np.stack(list(first_hits(size, horizon)))  # (horizon, from, to)
    from_start = hit_chances(size, horizon, start)  # (horizon, key)
    reached = np.cumsum(hits, axis=0)  # (horizon, key, door): door reached within t + 1 steps of the key
    both = np.einsum("tk,tkd->kd", from_start[:-1], reached[-2::-1])
    key = from_start.sum(0)
    np.fill_diagonal(both, key)
    return np.asarray(key[:, None] + both)
