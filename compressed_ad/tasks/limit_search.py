"""Finds the limit of a family: the best return of an agent that knows the rooms but not which task it plays.

Two kinds of families are understood. Where all tasks share their moves, the places that pay are hidden: until
a reward comes an agent can only step onto one place after the other, so it follows a plan made beforehand.
Beam search finds good plans, which are improved by planning two or three of their episodes anew. Where all
tasks share the place that pays, the moves are hidden: what an agent knows is the set of tasks that are still
possible, and branch and bound over places and such sets finds the best first episode exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import UsageError
from compressed_ad.tasks.base import RewardedPlaces, TaskFamily, successors_of
from compressed_ad.tasks.limits import Limit
from compressed_ad.types import BoolArray, IntArray

Floats = NDArray[np.float64]
Plan = list[IntArray]
"""The places that are stepped onto, episode by episode."""
Tasks = tuple[int, ...]

WIDTH = 200
"""Walks that a beam keeps."""
ROUNDS = 1000
"""Tries to improve a plan."""
DONE = 1 - 1e-9


def find_limit(family: TaskFamily, seed: int = 0) -> Limit:
    """The limit of ``family`` for tasks drawn uniformly from ``family.tasks()``; takes up to a minute.

    The family must know where actions lead and which places pay (``RewardedPlaces``), and begin every episode
    in one place: otherwise ``UsageError``. ``seed`` is that of the search for plans.
    """
    if not isinstance(family, RewardedPlaces) or family.fixed_start is None:
        raise UsageError(f"{family.name}: a limit needs known moves, places that pay, and one place to start")
    tasks = family.tasks()
    moves, places = successors_of(family, tasks), np.asarray(family.rewarded_places(tasks))
    inside = range(moves.shape[1])
    if moves.min() < 0 or family.fixed_start not in inside or not np.isin(places, inside).all():
        raise UsageError(f"{family.name}: a limit needs all moves, from places to places; -1 stands for none")
    if places.shape not in ((len(tasks), 1), (len(tasks), 2)):
        raise UsageError(
            f"{family.name}: rewarded_places must give one or two places for each task, not {places.shape}"
        )
    optimal, random = np.asarray(family.optimal_return(tasks), np.float64), family.random_return(tasks)
    scaled = optimal > random  # as in ``measures.normalise``: other tasks have no scale
    if not scaled.any():
        raise UsageError(f"{family.name}: no task pays more than random actions earn; there is no limit")
    weight = 1 / (optimal - random)[scaled] / scaled.sum()
    room: Any = {
        "start": family.fixed_start,
        "horizon": family.horizon,
        "pays_on": family.pays_on,
        "optimal": optimal[scaled],
        "weight": weight,
    }
    if (moves == moves[0]).all():
        unpaid = -float(weight @ random[scaled])
        return HiddenPlaces(moves=moves[0], places=places[scaled], unpaid=unpaid, **room).limit(seed)
    if (places == places[0]).all() and places.shape[1] == 1:
        return HiddenMoves(moves=moves[scaled], place=int(places[0, 0]), **room).limit()
    raise UsageError(f"{family.name}: tasks differ in moves and in rewarded places; one must be known")


def distances(moves: IntArray) -> IntArray:
    """(O, O) fewest steps from one place to another by ``moves`` (O, K); O where there is no way."""
    steps = np.where(np.eye(len(moves), dtype=bool), 0, len(moves))
    while (nearer := np.minimum(steps, steps[moves].min(1) + 1)).sum() < steps.sum():
        steps = nearer
    return steps


@dataclass(frozen=True)
class _Room:
    """What both kinds share: N tasks in O places, with K actions."""

    start: int
    horizon: int
    pays_on: bool
    optimal: Floats  # (N,)
    weight: Floats  # (N,) of a return in the mean of the normalised returns
    moves: IntArray


# ---------------------------------------------------------------- hidden places


@dataclass(frozen=True)
class HiddenPlaces(_Room):
    """All tasks share their ``moves`` (O, K); ``places`` (N, 1) or (N, 2) pay in turn."""

    places: IntArray
    unpaid: float  # mean normalised return of an episode without a reward

    def limit(self, seed: int) -> Limit:
        return Limit(self.reached(np.random.default_rng(seed)), *self.bounds())

    @cached_property
    def steps(self) -> IntArray:
        return distances(self.moves)

    @cached_property
    def earliest(self) -> IntArray:
        """(O,) the first step of an episode that can lead to each place."""
        return np.asarray(np.maximum(self.steps[self.start], 1))

    @property
    def pairs(self) -> bool:
        return bool(self.places.shape[1] == 2)

    @cached_property
    def last_pay(self) -> Floats:
        """(N,) normalised pay of the last place in an episode that goes for it at once."""
        return self.weight * np.maximum(self.optimal - self.pairs, 0)

    @cached_property
    def gains(self) -> Floats:
        """(O, horizon, A) the most that it is worth, A episodes later, to have met a first place at a step.

        In normalised return, summed over tasks. Second places are counted: by then, as many can have been
        stepped onto with the first reward in hand as there were steps, and the first place itself.
        """
        n, steps = len(self.moves), np.arange(1, self.horizon + 1)
        gains = np.zeros((n, self.horizon, n + 1 if self.pairs else 2))
        for place, earliest in enumerate(self.earliest):
            here = self.places[:, 0] == place
            if self.pairs:
                best = np.cumsum([0, *np.sort(self.last_pay[here])[::-1]])
                later = np.arange(n + 1) * max(0, self.horizon - earliest)
                searched = 1 + self.horizon - steps[:, None] + later
                gains[place] = self.weight[here].sum() + best[np.minimum(searched, len(best) - 1)]
            else:
                gains[place] = self.last_pay[here].sum()
                pay = self.horizon - steps + 1 if self.pays_on else np.ones(self.horizon)
                gains[place, :, 0] = self.weight[here].sum() * pay
            gains[place, : earliest - 1] = 0
        return gains

    def bounds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What no agent exceeds: in each episode, and in the sum of all episodes so far.

        Until the first reward all tasks look alike, so an agent (a random one is a mixture of others) steps
        onto one sequence of places, which matches each place with another step, none before its distance from
        the start. No such matching earns more than the best one, which is found here with the most that each
        place can be worth from its step on.
        """
        from scipy.optimize import linear_sum_assignment

        gains, sums, last = self.gains, np.cumsum(self.gains, axis=2), self.gains.shape[2] - 1

        def best(worth: Sequence[Floats]) -> float:
            table = np.concatenate(worth, axis=1)
            return float(table[linear_sum_assignment(table, maximize=True)].sum())

        curve, totals = list[float](), list[float]()
        while not curve or (curve[-1] < DONE and len(curve) <= len(gains)):
            ages = range(len(curve), -1, -1)  # of what is met in each episode so far
            curve.append(round(self.unpaid + best([gains[:, :, min(age, last)] for age in ages]), 12))
            worth = [sums[:, :, min(age, last)] + max(0, age - last) * gains[:, :, last] for age in ages]
            totals.append(self.unpaid * len(ages) + best(worth))
        return tuple(curve), tuple(totals)

    def reached(self, random: np.random.Generator) -> tuple[float, ...]:
        """The return in each episode of an agent that follows good plans, exact over all tasks."""
        episodes, gains = np.array([*self._events(random)]).T
        gained = np.bincount(episodes[gains > 0].astype(np.int64), gains[gains > 0])
        return tuple((self.unpaid + np.cumsum(gained)).round(12).tolist())

    def _events(self, random: np.random.Generator) -> Iterator[tuple[int, float]]:
        """(episode, by how much more its return is than that of the episode before)."""
        full = self.gains[:, -1, -1]
        late = (full[:, None, None] - self.gains).sum(axis=2)
        plan = self.plan([(self.start, self.horizon)], full, late, random, ROUNDS)
        for place, (episode, step) in enumerate(met(plan, len(full)).tolist()):
            here = self.places[:, 0] == place
            if not self.pairs:
                now = self.gains[place, step, 0]
                yield from ((episode, now), (episode + 1, full[place] - now))
                continue
            yield episode, self.weight[here].sum()
            worth = np.bincount(self.places[here, 1], self.last_pay[here], len(full)).astype(np.float64)
            yield episode, worth[place]
            worth[place] = 0
            begins = [(place, self.horizon - n) for n in (step + 1, int(self.earliest[place]))]
            second = self.plan(begins, worth, np.zeros_like(late), random)
            later = met(second, len(full))[:, 0]
            yield from zip((episode + later).tolist(), worth.tolist(), strict=True)

    def plan(
        self,
        begins: Sequence[tuple[int, int]],
        full: Floats,
        late: Floats,
        random: np.random.Generator,
        rounds: int = 0,
    ) -> Plan:
        """A plan that steps onto every place that is worth something, and loses little.

        A place is worth ``full`` (O,) in each episode after that in which it is met. There it is worth less
        by ``late`` (O, horizon), which depends on the step. ``begins``: (place, steps left) from which on
        episodes search, one after the other; the last holds for all further ones. ``rounds`` of improvement
        need a single one.
        """
        far = self.steps[begins[0][0]] / len(full)

        def complete(plan: Plan, bonus: float, width: int) -> Plan:
            """``plan`` with more episodes, until all is met, with a bonus for what is far from the start."""
            plan = list(plan)
            while not (seen := (met(plan, len(full))[:, 0] >= 0) | (full <= 0)).all():
                worth = np.maximum(full * (1 + bonus * far) - late.T, 1e-9 * full.max())
                begin = begins[min(len(plan), len(begins) - 1)]
                plan.append(self._walk(*begin, seen, worth, width, random))
            return plan

        def loss(plan: Plan) -> float:
            episode, step = met(plan, len(full)).T
            return float((full * episode + late[np.arange(len(full)), step])[full > 0].sum())

        best = min((complete([], bonus, WIDTH) for bonus in (0, 5, 10, 20, 50)), key=loss)
        for _ in range(rounds if len(best) > 1 else 0):
            dropped = random.choice(len(best), min(len(best), int(random.integers(2, 4))), replace=False)
            kept = [walk for k, walk in enumerate(best) if k not in dropped]
            new = complete(kept, random.choice([0, 2, 5, 10, 20]), random.choice([50, WIDTH]))
            episode = met(new, len(full))[:, 0]
            order = np.argsort([-full[episode == k].sum() for k in range(len(new))], kind="stable")
            best = min([new[k] for k in order], new, best, key=loss)
        return best

    def _walk(
        self, start: int, length: int, seen: BoolArray, worth: Floats, width: int, random: np.random.Generator
    ) -> IntArray:
        """(length,) places of a walk from ``start`` that is worth much, by beam search.

        ``worth`` (horizon, O) of places not yet ``seen`` (O,), by step. Those with few neighbours that are
        not seen have a bonus: they might be cut off. A walk that has nothing new at hand heads for it.
        """
        n, n_action = self.moves.shape
        way_off = self.steps[:, ~seen].min(axis=1) * 0.3 * worth.max()
        codes, here_codes = random.integers(1 << 62, size=(2, n))  # of sets of places
        here, score, code, new = np.array([start]), np.zeros(1), np.zeros(1, np.int64), np.zeros((1, n), bool)
        trail = []
        for step in range(length):
            parent, place = np.repeat(np.arange(len(here)), n_action), self.moves[here].ravel()
            fresh = ~(seen[place] | new[parent, place])
            around, before = self.moves[place[fresh]], parent[fresh, None]
            closed = (seen[around] | new[before, around]).mean(axis=1)
            score = score[parent] + 1e-9 * worth.max() * random.random(len(place))
            score[fresh] += worth[step, place[fresh]] + 0.5 * worth.mean() * closed
            code = code[parent] ^ np.where(fresh, codes[place], 0)
            order = np.argsort(way_off[place] - score, kind="stable")
            _, first = np.unique((code ^ here_codes[place])[order], return_index=True)
            kept = order[np.sort(first)[:width]]  # the best of each place and set
            trail.append((parent[kept], place[kept]))
            here, score, code, new = place[kept], score[kept], code[kept], new[parent[kept]]
            new[np.flatnonzero(fresh[kept]), here[fresh[kept]]] = True
        k, walk = int(np.argmax(score)), list[int]()
        for parent, place in reversed(trail):
            walk.append(place[k])
            k = parent[k]
        return np.array(walk[::-1], np.int64)


def met(plan: Plan, n: int) -> IntArray:
    """(n, 2) episode and step, from 0, in which each place is first stepped onto; -1 if never."""
    when = np.full((n, 2), -1)
    for episode, walk in reversed([*enumerate(plan)]):
        for step, place in reversed([*enumerate(walk.tolist())]):
            when[place] = episode, step
    return when


# ---------------------------------------------------------------- hidden moves


@dataclass(frozen=True)
class HiddenMoves(_Room):
    """One ``place`` pays in all tasks; their ``moves`` (N, O, K) differ."""

    place: int

    def limit(self) -> Limit:
        """That of an agent that plays every episode as well as it can; the bound is exact for the first."""
        reached, known = list[float](), [tuple(range(len(self.weight)))]
        while len(reached) < 2 or DONE > reached[-1] > reached[-2]:
            reached.append(1 - sum(self.loss(self.horizon, self.start, tasks) for tasks in known))
            ends = [end for tasks in known for end in self.ends(self.horizon, self.start, tasks)]
            known = list(dict.fromkeys(ends))
        return Limit(tuple(reached), (reached[0], 1.0), (reached[0], reached[0] + 1))

    @cached_property
    def to_go(self) -> Floats:
        """(horizon + 1, N, O) what is still to be earned of a known task, by the steps that are left."""
        steps = np.array([distances(moves)[:, self.place] for moves in self.moves])
        pay = np.maximum(np.arange(self.horizon + 1)[:, None, None] - np.maximum(steps, 1) + 1, 0)
        return np.asarray((pay if self.pays_on else np.minimum(pay, 1)) * self.weight[:, None])

    @cached_property
    def choices(self) -> dict[tuple[int, int, Tasks], tuple[float, int | None]]:
        """(loss, action) of the states that were searched; without an action, the loss is at least this."""
        return {}

    def outcomes(
        self, left: int, place: int, action: int, tasks: Tasks
    ) -> tuple[float, dict[tuple[int, int], Tasks]]:
        """What an action loses at once, and the tasks that remain possible by (steps left, place) then."""
        rows = np.array(tasks)
        to = self.moves[rows, place, action]
        paid = to == self.place
        then = np.where(paid & (not self.pays_on), 0, left - 1)
        lost = self.to_go[left, rows, place] - self.weight[rows] * paid - self.to_go[then, rows, to]
        groups: dict[tuple[int, int], list[int]] = {}
        for task, *state in zip(tasks, then.tolist(), to.tolist(), strict=True):
            groups.setdefault((state[0], state[1]), []).append(task)
        return float(lost.sum().round(12)), {state: tuple(group) for state, group in groups.items()}

    def loss(self, left: int, place: int, tasks: Tasks, budget: float = math.inf) -> float:
        """The least that must be lost until the episode ends; if not below ``budget``, a part of it."""
        best, action = self.choices.get((left, place, tasks), (0.0, None))
        if left == 0 or action is not None or best >= budget:
            return best
        best, options = budget, [self.outcomes(left, place, a, tasks) for a in range(self.moves.shape[2])]
        for a in sorted(range(len(options)), key=lambda a: (options[a][0], -len(options[a][1]))):
            lost, groups = options[a]
            for (then, to), group in groups.items():
                if lost < best:
                    lost += self.loss(then, to, group, best - lost)
            if lost < best:
                best, action = lost, a
        self.choices[left, place, tasks] = best, action
        return best

    def ends(self, left: int, place: int, tasks: Tasks) -> list[Tasks]:
        """What an agent that loses least knows at the end of the episode, by the course that it took."""
        self.loss(left, place, tasks)
        _, action = self.choices.get((left, place, tasks), (0.0, None))
        if action is None:
            return [tasks]
        _, groups = self.outcomes(left, place, action, tasks)
        return [end for (then, to), group in groups.items() for end in self.ends(then, to, group)]
