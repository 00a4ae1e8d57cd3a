"""Learning histories as flat sequences of transitions, for transforms and windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from compressed_ad.errors import HistoryError, SplitError
from compressed_ad.types import AnyArray, BoolArray, History, IntArray

_OPTIONAL = ("entropy", "action_probs")
_PER_STEP = ("states", "actions", "rewards", "next_states", "ended", "mask", "update", *_OPTIONAL)


@dataclass(frozen=True)
class Episodes:
    """The K episodes of some sequences, in order; ``start`` points into the flat arrays."""

    start: IntArray  # (K,)
    length: IntArray  # (K,)
    sequence: IntArray  # (K,)
    ordinal: IntArray  # (K,) 0, 1, ... within its sequence
    rewarded: BoolArray  # (K,) some reward above 0
    complete: BoolArray  # (K,) ends with an episode end, not with the end of the record


@dataclass(frozen=True)
class Sequences:
    """Time-ordered runs of transitions, one after another in flat arrays of M transitions.

    Sequence q, one stream of one learner, is ``[offsets[q], offsets[q + 1])``.
    """

    states: AnyArray  # (M, ...)
    actions: AnyArray  # (M, ...)
    rewards: AnyArray  # (M,) float32
    next_states: AnyArray  # (M, ...)
    ended: BoolArray  # (M,) last transition of an episode
    mask: BoolArray  # (M,) compression mask
    update: IntArray  # (M,)
    offsets: IntArray  # (Q + 1,)
    task: IntArray  # (Q,) index of the task in the history file
    learner: IntArray  # (Q,) learner within the task
    entropy: AnyArray | None = None  # (M,) nats, of the acting policy; None where a history lacks it
    action_probs: AnyArray | None = None  # (M,) of the action taken, NaN where unknown; None likewise

    def __len__(self) -> int:
        return len(self.task)

    @property
    def lengths(self) -> IntArray:
        """(Q,) number of transitions of each sequence."""
        return np.diff(self.offsets)

    @cached_property
    def episodes(self) -> Episodes:
        """The episodes of all sequences; the last one of a sequence may be incomplete."""
        last = self.ended.copy()
        last[self.offsets[1:] - 1] = True
        stop = np.flatnonzero(last) + 1
        start = np.concatenate([[0], stop[:-1]]).astype(np.int64)
        sequence = np.searchsorted(self.offsets, start, side="right") - 1
        first = np.searchsorted(sequence, np.arange(len(self)))
        rewarded = np.maximum.reduceat(self.rewards, start) > 0 if len(start) else np.zeros(0, bool)
        return Episodes(
            start=start,
            length=stop - start,
            sequence=sequence,
            ordinal=np.arange(len(start)) - first[sequence],
            rewarded=rewarded,
            complete=self.ended[stop - 1],
        )

    def full_windows(self, n_transit: int) -> BoolArray:
        """(K,) episodes whose start leaves at least ``n_transit`` transitions of their sequence."""
        episodes = self.episodes
        return np.asarray(episodes.start + n_transit <= self.offsets[episodes.sequence + 1])

    @cached_property
    def rewarded_before(self) -> BoolArray:
        """(M,) whether the sequence has met a reward above 0 before this step."""
        met = np.cumsum(self.rewards > 0)
        before: IntArray = met - (self.rewards > 0)
        at_start = np.concatenate([[0], met])[self.offsets[:-1]]
        return np.asarray(before > np.repeat(at_start, self.lengths))

    def take(self, steps: IntArray, lengths: IntArray, task: IntArray, learner: IntArray) -> Sequences:
        """New sequences of the given ``lengths``, made of the flat transitions ``steps`` in that order."""
        keep = lengths > 0
        per_step = {name: getattr(self, name) for name in _PER_STEP}
        taken = {name: array[steps] for name, array in per_step.items() if array is not None}
        offsets = np.concatenate([[0], np.cumsum(lengths[keep])])
        return Sequences(**taken, offsets=offsets, task=task[keep], learner=learner[keep])

    def take_episodes(self, rows: IntArray, group: IntArray, n_group: int, source: IntArray) -> Sequences:
        """New sequences made of whole episodes: ``rows`` of ``episodes``, sorted by ``group`` (new sequence).

        New sequence i has the task and learner of old sequence ``source[i]``.
        """
        length = self.episodes.length[rows]
        lengths = np.bincount(group, weights=length, minlength=n_group).astype(np.int64)
        steps = expand(self.episodes.start[rows], length)
        return self.take(steps, lengths, self.task[source], self.learner[source])


def expand(start: IntArray, length: IntArray) -> IntArray:
    """Concatenation of ``arange(start[i], start[i] + length[i])`` over i."""
    before = np.cumsum(length) - length
    steps: IntArray = np.arange(length.sum()) + np.repeat(start - before, length)
    return steps


@dataclass(frozen=True)
class TaskRows:
    """Parameters of the tasks ``ids`` (K,) ascending, and of no others, by index in the history file."""

    ids: IntArray
    rows: AnyArray  # (K, P)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, tasks: IntArray | int) -> AnyArray:
        """Rows of ``tasks``; ``SplitError`` for a task whose histories are not among the sequences."""
        place = np.searchsorted(self.ids, tasks)
        unknown = self.ids[np.minimum(place, len(self.ids) - 1)] != tasks
        if np.any(unknown):
            wrong = np.unique(np.asarray(tasks)[unknown]).tolist()
            raise SplitError(f"a transform may know the tasks of its sequences only, not {wrong}")
        rows: AnyArray = self.rows[place]
        return rows


def from_histories(histories: Mapping[int, History]) -> Sequences:
    """All streams of ``histories`` (task index -> history) as sequences; without a mask, none is marked."""
    if not histories:
        raise HistoryError("no histories to train on")
    parts: dict[str, list[AnyArray]] = {}
    lengths, task, learner = [], [], []
    for index, history in histories.items():
        mask = history.compression_mask
        mask = np.zeros(history.rewards.shape, bool) if mask is None else mask
        arrays = {"ended": history.episode_end, "mask": mask}
        arrays |= {name: getattr(history, name) for name in _PER_STEP if name not in arrays}
        for name, array in arrays.items():
            if array is not None:
                parts.setdefault(name, []).append(array.reshape(-1, *array.shape[2:]))
        lengths += [history.n_step] * history.n_stream
        task += [index] * history.n_stream
        learner += history.learner.tolist()
    for name in _OPTIONAL:
        if len(parts.get(name, ())) < len(histories):
            parts.pop(name, None)
    return Sequences(
        **{name: np.concatenate(arrays) for name, arrays in parts.items()},
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        task=np.array(task, np.int64),
        learner=np.array(learner, np.int64),
    )
