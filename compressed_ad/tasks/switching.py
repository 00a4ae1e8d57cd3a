"""Rooms that change while they are learned, and change back: what was learned before is worth remembering.

Every slot counts its episodes, from when it is made. Observations show neither the count nor that anything
has changed; but changes come every ``period`` episodes, in a fixed cycle, so an agent can count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike

from compressed_ad.registry import checked
from compressed_ad.seeding import SlotDraws, rng
from compressed_ad.settings import Count, Positive, Seed, TaskCount
from compressed_ad.tasks.bandit import (
    BanditEnv,
    Floats,
    GaussianBandit,
    Generators,
    NormalPosterior,
    Rule,
    Thompson,
    seeded,
)
from compressed_ad.tasks.grid import Float64Array, GridEnv, Int64Array, Size, paying
from compressed_ad.tasks.gridworld import KeyToDoor, key_to_door_judge
from compressed_ad.tasks.several_goals import SeveralGoals
from compressed_ad.types import Agent, AnyArray, IntArray, Step

HAZARD = 1e-3
"""Chance of a change at each pull, in Thompson's eyes. More would blur which unknown set a pull was of."""


class Phases:
    """The phase (N,) of the current episode of N slots: it changes every ``period`` episodes, in a cycle."""

    def __init__(self, n: int, n_phase: int, period: int, start: int) -> None:
        self._count, self._n_phase, self._period, self._start = np.full(n, -1), n_phase, period, start

    @property
    def now(self) -> Int64Array:
        return np.asarray(np.maximum(self._count, 0) // self._period % self._n_phase)

    def begin(self, slots: IntArray) -> Int64Array:
        """Count a new episode of ``slots`` (K,); the cells (K,) where it starts."""
        self._count[slots] += 1
        return np.full(len(slots), self._start)


@checked
@dataclass(frozen=True, repr=False)
class DarkroomSwitching(SeveralGoals):
    """A dark room with ``n_goal`` hidden goals, of which one pays: another one every ``period`` episodes.

    +1 for every step that ends on the goal that pays. Goals take turns in the order of the task's row
    (x, y, x, y, ...). They are drawn independently from all cells, so two may be in one cell.
    """

    name: ClassVar[str] = "darkroom_switching"
    paying_places: ClassVar[int] = 1
    size: Size = 7
    horizon: Count = 12
    n_goal: Annotated[int, Ge(2), Le(100)] = 3
    period: Count = 6
    n_task: TaskCount = 600
    task_seed: Seed = 0

    @property
    def goals_of_task(self) -> int:
        return self.n_goal

    def make(self, tasks: AnyArray, seeds: IntArray) -> GridEnv:
        goal, slot = self.index(self.goals(tasks)), np.arange(len(tasks))
        phases = Phases(len(tasks), self.n_goal, self.period, int(self.index(self.start_cell)))
        judge = paying(lambda cell: cell == goal[slot, phases.now])
        return GridEnv(self, len(tasks), judge, starts=phases.begin)


@checked
@dataclass(frozen=True, repr=False)
class KeyToDoorSwitching(SeveralGoals):
    """``KeyToDoor`` whose key lies in one of ``n_key`` cells: the next one every ``period`` episodes.

    The door stays. Episodes start in the centre and end at the door. Tasks are rows (x, y, ..., x, y) of the
    keys' cells in the order of their turns, and the door's.
    """

    name: ClassVar[str] = "key_to_door_switching"
    paying_places: ClassVar[int] = 2
    size: Size = 7
    horizon: Count = 30
    n_key: Annotated[int, Ge(2), Le(100)] = 3
    period: Count = 6
    n_task: TaskCount = 600
    task_seed: Seed = 0

    @property
    def goals_of_task(self) -> int:
        return self.n_key + 1

    def make(self, tasks: AnyArray, seeds: IntArray) -> GridEnv:
        cell, slot = self.index(self.goals(tasks)), np.arange(len(tasks))
        phases = Phases(len(tasks), self.n_key, self.period, int(self.index(self.start_cell)))
        judge = key_to_door_judge(lambda: cell[slot, phases.now], cell[:, -1], ends=True)
        return GridEnv(self, len(tasks), judge, starts=phases.begin)

    def optimal_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) the key and the door, if they can be reached in time, for one who knows whose turn it is."""
        return self._mean_over_keys(KeyToDoor.optimal_return, tasks)

    def random_return(self, tasks: AnyArray) -> Float64Array:
        """(N,) exact."""
        return self._mean_over_keys(KeyToDoor.random_return, tasks)

    def _mean_over_keys(self, worth: Callable[..., Float64Array], tasks: AnyArray) -> Float64Array:
        """(N,) the mean ``worth`` of the rooms with one key that take turns."""
        cells = self.goals(tasks)
        keys, door = cells[:, :-1], np.broadcast_to(cells[:, -1:], cells[:, :-1].shape)
        pairs = np.concatenate([keys, door], axis=2).reshape(-1, 4)
        room = KeyToDoor(size=self.size, horizon=self.horizon)
        return np.asarray(worth(room, pairs).reshape(len(cells), self.n_key).mean(1))


def switching_value(
    worth: ArrayLike, n_goal: int, period: int, n_episode: int, memory: int | None = None
) -> Float64Array:
    """(E,) what an agent earns in each episode if ``worth[v]`` is its v-th of a goal that it remembers.

    ``worth`` (V,) goes on with its last value. The curve of ``find_limit`` for the room with one goal gives
    that of the best agent that knows the rules: it counts episodes, and goals say nothing of each other. With
    a ``memory`` of that many episodes, it remembers a goal only if its last turn is not further back.
    """
    worth = np.asarray(worth, np.float64)
    cycle = np.arange(n_episode) // (n_goal * period)
    before = np.arange(n_episode) % period  # episodes of this turn
    if memory is None or memory > (n_goal - 1) * period:
        before = before + cycle * period
    elif memory == 0:
        before = np.zeros(n_episode, np.int64)
    return np.asarray(worth[np.minimum(before, len(worth) - 1)])


@checked
@dataclass(frozen=True, repr=False)
class SwitchingBandit(GaussianBandit):
    """A Gaussian bandit whose arms get other means after ``period`` pulls, and later the first ones back.

    A task is a row of ``n_set`` sets of ``n_arm`` means, drawn independently, which take turns.
    """

    name: ClassVar[str] = "switching_bandit"
    sigma: Positive = 0.1
    n_set: Annotated[int, Ge(2), Le(100)] = 3
    period: Count = 40
    optimal_action: ClassVar[None] = None  # type: ignore[assignment]  # nothing that is seen tells the set

    def draw(self, random: np.random.Generator) -> Floats:
        many = replace(self, n_arm=self.n_set * self.n_arm)
        return GaussianBandit.draw(many, random)

    def make(self, tasks: AnyArray, seeds: IntArray) -> SwitchingBanditEnv:
        noise = SlotDraws([rng(int(seed), "bandit") for seed in seeds], "standard_normal")
        return SwitchingBanditEnv(self, self._sets(tasks), lambda mean: mean + self.sigma * noise())

    def optimal_return(self, tasks: AnyArray) -> Floats:
        """(N,) always the best arm, the mean over a cycle."""
        return np.asarray(self.horizon * self._sets(tasks).max(2).mean(1))

    def check(self, tasks: AnyArray) -> Floats:
        return GaussianBandit.check(replace(self, n_arm=self.n_set * self.n_arm), tasks)

    def thompson(self, generators: Generators, prior: tuple[float, float] | None = None) -> Rule:
        """Thompson sampling that knows that ``n_set`` sets take turns, but not when they change."""
        return SetsThompson([self.posterior(prior) for _ in range(self.n_set)], generators)

    def references(self, tasks: AnyArray) -> Mapping[str, Callable[[int], Agent]]:
        """Thompson sampling that must notice changes of the means, and one that is told but starts anew."""

        def anew(seed: int) -> Rule:
            return RestartedThompson(self.posterior(), self.period, seeded(seed, "reference", "restarted"))

        return {
            "Thompson sampling": lambda seed: self.thompson(seeded(seed, "reference", "thompson")),
            "Thompson sampling, started anew at each change": anew,
        }

    def _sets(self, tasks: AnyArray) -> Floats:
        """(N, n_set, n_arm) means."""
        return self.check(tasks).reshape(len(tasks), self.n_set, self.n_arm)


class SwitchingBanditEnv(BanditEnv):
    """``BanditEnv`` with ``sets`` (N, n_set, K) of means; pulls are counted from when it is made."""

    def __init__(self, family: SwitchingBandit, sets: Floats, pay: Callable[[Floats], Floats]) -> None:
        super().__init__(family, sets[:, 0], pay)
        self._sets, self._period, self._count = sets, family.period, 0

    def step(self, actions: AnyArray) -> Step:
        self._means = self._sets[:, self._count // self._period % self._sets.shape[1]]
        self._count += 1
        return super().step(actions)


class SetsThompson(Rule):
    """Thompson sampling from a belief for each set of means, and a belief which set it is.

    Sets take turns; one ends with the chance ``HAZARD`` at each pull. A pull counts for each set with the
    chance that the set is the current one, given the rewards up to this pull (assumed-density filtering).
    """

    def __init__(self, sets: Sequence[NormalPosterior], generators: Generators) -> None:
        super().__init__(generators)
        self.sets = sets

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        for posterior in self.sets:
            posterior.reset(n_env)
        self.current = np.zeros((n_env, len(self.sets)))  # chance of each set to be the current one
        self.current[:, 0] = 1

    def policy(self) -> Floats:
        chances = np.stack([posterior.best() for posterior in self.sets], axis=1)
        return np.asarray((self.current[:, :, None] * chances).sum(axis=1))

    def observe(self, actions: IntArray, step: Step) -> None:
        slot = np.arange(len(actions))
        mean = np.stack([p.mean[slot, actions] for p in self.sets], axis=1)
        width = np.stack([np.hypot(p.spread[slot, actions], p.sigma) for p in self.sets], axis=1)
        with np.errstate(divide="ignore"):
            log = np.log(self.current) - np.log(width) - 0.5 * ((step.reward[:, None] - mean) / width) ** 2
        likely = np.exp(log - log.max(axis=1, keepdims=True))
        likely /= likely.sum(axis=1, keepdims=True)
        for posterior, share in zip(self.sets, likely.T, strict=True):
            posterior.update(actions, step.reward, share)
        self.current = (1 - HAZARD) * likely + HAZARD * np.roll(likely, 1, axis=1)


class RestartedThompson(Thompson):
    """Thompson sampling that forgets everything after each ``period`` pulls."""

    def __init__(self, posterior: NormalPosterior, period: int, generators: Generators) -> None:
        super().__init__(posterior, generators)
        self.period = period

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        self._count = 0

    def observe(self, actions: IntArray, step: Step) -> None:
        super().observe(actions, step)
        self._count += 1
        if self._count % self.period == 0:
            self.posterior.reset(len(actions))
