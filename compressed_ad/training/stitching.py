"""Sequences composed of episodes of several streams, for the transforms ``stitch`` and ``prolong``.

Operations are vectorised over sequences and candidate episodes; only the episodes of a sequence are chosen
one after another.
"""

from __future__ import annotations

import numpy as np

from compressed_ad.errors import UsageError
from compressed_ad.tasks.base import RewardFunction, rewards_of
from compressed_ad.training.sequences import Sequences, TaskRows, expand
from compressed_ad.types import AnyArray, BoolArray, IntArray


class Composer:
    """Extends many sequences at once by the drawn episode with most unseen observations."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        if sequences.next_states.dtype.kind == "f" or sequences.next_states.ndim > 2:
            raise UsageError("stitch and prolong need Discrete or MultiDiscrete observations")
        flat = sequences.next_states.reshape(len(sequences.next_states), -1).astype(np.int64)
        self.place: IntArray = np.asarray(np.ravel_multi_index(tuple(flat.T), tuple(flat.max(axis=0) + 1)))
        self.seen = np.zeros((len(sequences), self.place.max() + 1), bool)
        self.rows: list[IntArray] = []
        self.owner: list[IntArray] = []

    def add(self, active: IntArray, drawn: IntArray) -> tuple[IntArray, IntArray]:
        """Append to each of the sequences ``active`` (A,) the most novel of its ``drawn`` (A, C) episodes.

        Returns the flat transitions of the chosen episodes, and for each the index into ``active``.
        """
        n_place = self.seen.shape[1]
        steps, candidate = self._steps(drawn.ravel())
        unseen = ~self.seen[active[candidate // drawn.shape[1]], self.place[steps]]
        key = candidate[unseen] * n_place + self.place[steps[unseen]]
        novelty = np.bincount(np.unique(key) // n_place, minlength=drawn.size).reshape(drawn.shape)
        chosen = drawn[np.arange(len(active)), novelty.argmax(axis=1)]
        steps, index = self._steps(chosen)
        self.seen[active[index], self.place[steps]] = True
        self.rows.append(chosen)
        self.owner.append(active)
        return steps, index

    def _steps(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Flat transitions of the episodes ``rows``, and for each the index into ``rows``."""
        episodes = self.sequences.episodes
        length = episodes.length[rows]
        return expand(episodes.start[rows], length), np.repeat(np.arange(len(rows)), length)

    def finish(self, kept: IntArray) -> tuple[Sequences, IntArray]:
        """Each sequence's added episodes followed by those of ``kept`` that are its own.

        Also returns, for each transition of the result, its place among those of all added episodes, in the
        order of addition, followed by those of ``kept``.
        """
        episodes, n = self.sequences.episodes, len(self.sequences)
        rows = np.concatenate([*self.rows, kept])
        owner = np.concatenate([*self.owner, episodes.sequence[kept]])
        order = np.argsort(owner, kind="stable")
        length = episodes.length[rows]
        steps = expand((np.cumsum(length) - length)[order], length[order])
        return self.sequences.take_episodes(rows[order], owner[order], n, np.arange(n)), steps


def stitched(
    sequences: Sequences,
    random: np.random.Generator,
    family: RewardFunction,
    tasks: TaskRows,
    candidates: int,
    longest: int,
    late: float,
    skill: float,
) -> Sequences:
    """Episodes of other tasks until a reward is met, then the sequence's own skilled ones: see ``stitch``."""
    s, episodes, composer = sequences, sequences.episodes, Composer(sequences)
    count = np.bincount(episodes.sequence, minlength=len(s))
    recent = episodes.ordinal >= (1 - late) * count[episodes.sequence]
    pool = np.flatnonzero(recent & episodes.complete)
    if len(np.unique(s.task[episodes.sequence[pool]])) < 2:
        raise UsageError("stitch needs episodes of at least two training tasks")
    active, found = np.arange(len(s)), np.zeros(len(s), bool)
    rewards: list[AnyArray] = []
    for _ in range(longest):
        steps, index = composer.add(active, _of_other_tasks(s, active, pool, candidates, random))
        task, first = tasks[s.task[active[index]]], np.concatenate([[True], s.ended[steps[:-1]]])
        reward = rewards_of(family, task, s.states[steps], s.actions[steps], s.next_states[steps], first)
        rewards.append(reward)
        met = np.bincount(index, weights=rewards[-1] > 0, minlength=len(active)) > 0
        found[active[met]] = True
        active = active[~met]
        if len(active) == 0:
            break
    kept = np.flatnonzero(found[episodes.sequence] & episodes.complete & _after_learning(s, skill))
    rewards.append(s.rewards[expand(episodes.start[kept], episodes.length[kept])])
    result, steps = composer.finish(kept)
    return result.with_columns(rewards=np.concatenate(rewards)[steps].astype(np.float32))


def _of_other_tasks(
    sequences: Sequences, active: IntArray, pool: IntArray, candidates: int, random: np.random.Generator
) -> IntArray:
    """(A, candidates) episodes of ``pool``, of other tasks than those of the sequences ``active`` (A,)."""
    task, owner = sequences.task, sequences.episodes.sequence
    drawn: IntArray = np.asarray(random.choice(pool, size=(len(active), candidates)))
    for _ in range(100):
        same = task[owner[drawn]] == task[active][:, None]
        if not same.any():
            return drawn
        drawn[same] = random.choice(pool, size=int(same.sum()))
    raise UsageError("stitch: too few episodes of other training tasks to draw from")


def _after_learning(sequences: Sequences, skill: float) -> BoolArray:
    """(K,) episodes not before the first of their sequence that earns the share ``skill`` of its best."""
    episodes = sequences.episodes
    earned = np.add.reduceat(sequences.rewards, episodes.start)
    best = np.zeros(len(sequences))
    np.maximum.at(best, episodes.sequence, earned)
    able = episodes.rewarded & (earned >= skill * best[episodes.sequence])
    first = np.full(len(sequences), np.iinfo(np.int64).max)
    np.minimum.at(first, episodes.sequence[able], episodes.ordinal[able])
    return np.asarray(episodes.ordinal >= first[episodes.sequence])


def prolonged(
    sequences: Sequences, random: np.random.Generator, pool: IntArray, candidates: int, longest: int
) -> Sequences:
    """Episodes of the same task, from ``pool``, before those of each sequence: see ``prolong``.

    A task without an episode in the pool keeps its sequences unchanged.
    """
    episodes, task, composer = sequences.episodes, sequences.task, Composer(sequences)
    by_task = pool[np.argsort(task[episodes.sequence[pool]], kind="stable")]
    sorted_tasks = task[episodes.sequence[by_task]]
    first = np.searchsorted(sorted_tasks, task)
    count = np.searchsorted(sorted_tasks, task, side="right") - first
    wanted = random.integers(longest + 1, size=len(task)) * (count > 0)
    for k in range(wanted.max()):
        active = np.flatnonzero(wanted > k)
        pick = random.random((len(active), candidates)) * count[active][:, None]
        composer.add(active, by_task[first[active][:, None] + pick.astype(np.int64)])
    return composer.finish(np.arange(len(episodes.start)))[0]
