"""A dark room that must be remembered: each episode shows a cue, and each cue has a hidden goal of its own.

The cue is the first component of the observation, (cue, x, y), in every step of an episode. Room, moves and
reward are those of ``Darkroom``. In every block of ``n_cue`` episodes each cue comes once, in an order drawn
from the seed of the slot. So a cue returns after ``n_cue`` episodes on average, and after ``2 n_cue - 1`` at
most. What happens under the other cues says nothing of its goal: an agent that remembers fewer episodes must
search again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces
from numpy.typing import ArrayLike

from compressed_ad.registry import checked
from compressed_ad.seeding import rng
from compressed_ad.settings import Count, Seed, TaskCount
from compressed_ad.tasks.grid import (
    N_ACTION,
    Float32Array,
    Float64Array,
    GridEnv,
    Int64Array,
    Size,
    all_cells,
    paying,
    successors,
    towards,
)
from compressed_ad.tasks.several_goals import SeveralGoals
from compressed_ad.types import AnyArray, BoolArray, FloatArray, IntArray


@checked
@dataclass(frozen=True, repr=False)
class DarkroomRecall(SeveralGoals):
    """A dark room whose goal depends on the cue of the episode; +1 for every step that ends on it.

    Tasks are rows (x, y, x, y, ...) with the goal of each cue, drawn independently from all cells, the start
    (the centre) included. ``n_task`` different ones are drawn with ``task_seed``.
    """

    name: ClassVar[str] = "darkroom_recall"
    size: Size = 5
    horizon: Count = 10
    n_cue: Annotated[int, Ge(2), Le(100)] = 6
    n_task: TaskCount = 600
    task_seed: Seed = 0

    @cached_property
    def observation_space(self) -> spaces.MultiDiscrete:
        return spaces.MultiDiscrete([self.n_cue, self.size, self.size])

    @property
    def goals_of_task(self) -> int:
        return self.n_cue

    @property
    def fixed_start(self) -> None:
        return None

    @cached_property
    def cells(self) -> Int64Array:
        """(n_cue * size**2, 3) a copy of the room for each cue."""
        room = all_cells(self.size)
        return np.column_stack([np.repeat(np.arange(self.n_cue), len(room)), np.tile(room, (self.n_cue, 1))])

    @cached_property
    def moves(self) -> Int64Array:
        first = np.arange(self.n_cue)[:, None] * self.size**2
        return np.asarray((successors(self.size)[:, None] + first).reshape(N_ACTION, -1))

    def make(self, tasks: AnyArray, seeds: IntArray) -> GridEnv:
        """One slot for each row of ``tasks``; the seed of a slot draws the order of its cues."""
        goal, n_cell, slot = self.index(self.goals(tasks)), self.size**2, np.arange(len(tasks))
        cue, start = cue_order(self.n_cue, seeds), int(self.index(self.start_cell))
        judge = paying(lambda cell: cell % n_cell == goal[slot, cell // n_cell])
        return GridEnv(self, len(tasks), judge, starts=lambda some: cue(some) * n_cell + start)

    def optimal_action(self, tasks: AnyArray, obs: IntArray, episode_return: FloatArray) -> Int64Array:
        goal = self.goals(tasks)[np.arange(len(obs)), obs[:, 0]]
        return towards(obs[:, 1:], goal)

    def reward(
        self, tasks: AnyArray, states: AnyArray, actions: AnyArray, next_states: AnyArray, start: BoolArray
    ) -> Float32Array:
        next_states = np.asarray(next_states)
        goal = self.goals(tasks)[np.arange(len(next_states)), next_states[:, 0]]
        return np.asarray((next_states[:, 1:] == goal).all(-1), np.float32)


def cue_order(n_cue: int, seeds: IntArray) -> Callable[[IntArray], Int64Array]:
    """Gives the cue (K,) of the next episode of slots (K,), each slot's from its own seed."""
    random = [rng(int(seed), "cues") for seed in seeds]
    order, count = np.zeros((len(random), n_cue), np.int64), np.zeros(len(random), np.int64)

    def following(slots: IntArray) -> Int64Array:
        at = count[slots] % n_cue
        for slot in slots[at == 0]:
            order[slot] = random[slot].permutation(n_cue)
        count[slots] += 1
        return order[slots, at]

    return following


def recall_value(worth: ArrayLike, n_cue: int, n_episode: int, memory: int | None = None) -> Float64Array:
    """(E,) what an agent earns in each episode if ``worth[v]`` is its v-th of a cue that it remembers.

    ``worth`` (V,) goes on with its last value: the curve of ``find_limit`` for the room with one goal,
    ``Darkroom(size, horizon)``, gives that of the best agent, as cues say nothing of each other. With a
    ``memory`` of that many episodes, an agent remembers a cue only as long as it returns soon enough; then it
    still knows all that it knew before. No agent whose context holds only the last ``memory`` episodes does
    better, unless it hides notes to itself in what it does under other cues. Exact, the mean over all orders.
    """
    worth = np.asarray(worth, np.float64)
    place = np.arange(n_cue)
    # A cue is at a random place of each block: gaps[i, j] from place i to place j of the next block.
    kept = n_cue - place[:, None] + place <= (2 * n_cue if memory is None else memory)
    chance = np.zeros((n_cue, len(worth)))  # of having seen this many episodes of the cue, by its place
    chance[:, 0] = 1
    value = list[Float64Array]()
    for _ in range(-(-n_episode // n_cue)):
        value.append(chance @ worth)
        more = np.column_stack([np.zeros(n_cue), chance[:, :-2], chance[:, -2:].sum(1)])
        chance = kept.T @ more / n_cue
        chance[:, 0] = 1 - chance.sum(1)
    return np.concatenate(value)[:n_episode]
