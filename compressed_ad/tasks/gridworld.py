"""Dark rooms: gridworlds whose agent sees only its own cell and must find the reward.

Cells, moves and episodes are those of ``grid``: staying on a goal pays. Everything but the random start of
``KeyToDoor`` is deterministic, so the ``seeds`` of ``make`` have no other effect.

Source: Laskin et al., "In-context Reinforcement Learning with Algorithm Distillation", 2022, section 4 and
appendix (Dark Room, Dark Room Hard, Dark Key-to-Door); the permuted room as in Son et al., "Distilling
Reinforcement Learning Algorithms for In-Context Model-Based Planning", ICLR 2025; the large room as in Chen
et al., "Filtering Learning Histories Enhances In-Context Reinforcement Learning", 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import ClassVar, Literal

import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.registry import checked
from compressed_ad.settings import Count
from compressed_ad.tasks.grid import (
    N_ACTION,
    Float32Array,
    Float64Array,
    Grid,
    GridEnv,
    Int64Array,
    Judge,
    Size,
    all_cells,
    distance,
    first_hits,
    first_in_episode,
    hit_chances,
    paying,
    successors,
    towards,
)
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray


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
        goal = self.index(self.check(tasks, 2))
        return GridEnv(self, len(tasks), paying(lambda cell: cell == goal, self.terminates))

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
        self, tasks: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> Float32Array:
        on_goal = (np.asarray(next_states) == tasks).all(-1)
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
        judge = paying(lambda cell: cell == goal)
        return GridEnv(self, len(tasks), judge, lambda actions: moves.take(row + actions))

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
        judge = key_to_door_judge(lambda: key, door, self.ends)
        starts = self._draws(key, seeds) if self.start == "random" else None
        return GridEnv(self, len(tasks), judge, starts=starts)

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
        self, tasks: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> Float32Array:
        next_states, tasks = np.asarray(next_states), np.asarray(tasks)
        key = first_in_episode((next_states == tasks[..., :2]).all(-1), start)
        # Episodes with the key in hand: picked up at or before this step, since the episode began.
        episode = np.cumsum(start)
        held_from = np.full(int(episode[-1]) + 1 if len(episode) else 1, len(key))
        held_from[episode[key]] = np.flatnonzero(key)
        held = np.arange(len(key)) >= held_from[episode]
        door = first_in_episode((next_states == tasks[..., 2:]).all(-1) & held, start)
        return key.astype(np.float32) + door.astype(np.float32)


def key_to_door_judge(key: Callable[[], IntArray], door: IntArray, ends: bool) -> Judge:
    """Rewards and ends of Key-to-Door; ``key()`` (N,) and ``door`` (N,) are cells."""

    def judge(cell: Int64Array, episode_return: FloatArray) -> tuple[Float32Array, BoolArray]:
        held = episode_return > 0
        found = (cell == key()) & ~held
        opened = (cell == door) & (held | found) & (episode_return < 2)
        return found.astype(np.float32) + opened, opened & ends

    return judge


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
