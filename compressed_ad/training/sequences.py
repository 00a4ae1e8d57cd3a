"""Learning histories as sequences of transitions, for transforms and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from compressed_ad.errors import HistoryError, SplitError, nearest
from compressed_ad.types import AnyArray, BoolArray, History, IntArray

_OPTIONAL = ("entropy", "action_probs")
COLUMNS = ("states", "actions", "rewards", "next_states", "ended", "mask", "update", *_OPTIONAL)
_BLOCK = 1 << 20  # transitions that are looked up at a time, because their rows take 8 bytes each


@dataclass(frozen=True)
class Episodes:
    """The K episodes of some sequences, in order; ``start`` counts transitions from the first sequence on."""

    start: IntArray  # (K,)
    length: IntArray  # (K,)
    sequence: IntArray  # (K,)
    ordinal: IntArray  # (K,) 0, 1, ... within its sequence
    rewarded: BoolArray  # (K,) some reward above 0
    complete: BoolArray  # (K,) ends with an episode end, not with the end of the record


def _gathered(name: str, doc: str) -> Any:
    def gathered(self: Sequences) -> AnyArray | None:
        if name in _OPTIONAL and name not in self.store:
            return None
        values = self._column(name).view()
        values.flags.writeable = False  # other sequences may show the same rows
        return values

    return property(gathered, doc=doc)


@dataclass(frozen=True, repr=False)
class Sequences:
    """Time-ordered runs of transitions, one after another: M transitions in all.

    Sequence q, one stream of one learner, is ``[offsets[q], offsets[q + 1])``. Transforms choose and reorder
    transitions without copying them: the M transitions are *pieces*, runs of consecutive rows of ``store``,
    which holds the histories as they were read. A property such as ``states`` gathers its M values anew each
    time, unless they are one piece; ``gather`` reads some of them.
    """

    store: Mapping[str, AnyArray]  # name -> (N, ...), as in ``COLUMNS``; the optional ones may be missing
    row: IntArray  # (P,) row of the store with which each piece begins
    at: IntArray  # (P + 1,) piece p is the transitions [at[p], at[p + 1])
    offsets: IntArray  # (Q + 1,)
    task: IntArray  # (Q,) index of the task in the history file
    learner: IntArray  # (Q,) learner within the task

    @classmethod
    def of(
        cls, store: Mapping[str, AnyArray], offsets: IntArray, task: IntArray, learner: IntArray
    ) -> Sequences:
        """All rows of ``store`` in order, as one piece."""
        return cls(store, np.zeros(1, np.int64), np.array([0, offsets[-1]]), offsets, task, learner)

    def __len__(self) -> int:
        return len(self.task)

    def __repr__(self) -> str:
        return f"<Sequences: {len(self)} of {self.at[-1]:,} transitions in all>"

    states = _gathered("states", "(M, ...)")
    actions = _gathered("actions", "(M, ...)")
    rewards = _gathered("rewards", "(M,) float32")
    next_states = _gathered("next_states", "(M, ...)")
    ended = _gathered("ended", "(M,) last transition of an episode")
    mask = _gathered("mask", "(M,) compression mask")
    update = _gathered("update", "(M,) number of the source policy's version")
    entropy = _gathered("entropy", "(M,) nats, of the acting policy; None where a history lacks it")
    action_probs = _gathered(
        "action_probs", "(M,) of the action taken, NaN where unknown; None where a history lacks it"
    )

    def _column(self, name: str) -> AnyArray:
        array = self.store[name]
        if len(self.row) == 1:
            return array[self.row[0] : self.row[0] + self.at[-1]]
        values = np.empty((self.at[-1], *array.shape[1:]), array.dtype)
        for first, part in self.parts(name):
            values[first : first + len(part)] = part
        return values

    def parts(self, name: str) -> Iterator[tuple[int, AnyArray]]:
        """The values of a column in order, about a million at a time, and how many come before them."""
        array, length = self.store[name], np.diff(self.at)
        if len(self.row) == 1:
            for first in range(0, self.at[-1], _BLOCK):
                yield first, array[self.row[0] + first : self.row[0] + min(first + _BLOCK, self.at[-1])]
            return
        cuts = np.unique(np.searchsorted(self.at, np.arange(0, self.at[-1] + _BLOCK, _BLOCK)))
        for p, q in pairwise(np.minimum(cuts, len(self.row)).tolist()):  # a piece is not cut
            yield int(self.at[p]), array[expand(self.row[p:q], length[p:q])]

    def rows(self, steps: IntArray) -> IntArray:
        """The row in the store of each of the transitions ``steps``, of any shape."""
        piece = np.searchsorted(self.at, steps, side="right") - 1
        return np.asarray(self.row[piece] + steps - self.at[piece])

    def gather(self, name: str, steps: IntArray) -> AnyArray:
        """The values of one column at the transitions ``steps``, of any shape."""
        values: AnyArray = self.store[name][self.rows(steps)]
        return values

    def with_columns(self, **columns: AnyArray) -> Sequences:
        """The same sequences with other values (M, ...) in some columns. This copies all columns.

        ``HistoryError`` for unknown columns, wrong lengths, and NaN or infinity where they mean nothing.
        """
        for name, values in columns.items():
            if name not in COLUMNS:
                raise HistoryError(f"with_columns: unknown column {name!r}{nearest(name, COLUMNS)}")
            if np.shape(values)[:1] != (self.at[-1],):
                shape = f"{name} of shape {np.shape(values)}"
                raise HistoryError(f"with_columns: {shape}: {self.at[-1]} transitions need as many rows")
            if name not in _OPTIONAL and not np.isfinite(values).all():
                raise HistoryError(f"with_columns: {name} holds NaN or infinity")
        store = {name: self._column(name) for name in self.store} | columns
        store = {name: np.require(values, requirements="W") for name, values in store.items()}
        return Sequences.of(store, self.offsets, self.task, self.learner)

    @property
    def lengths(self) -> IntArray:
        """(Q,) number of transitions of each sequence."""
        return np.diff(self.offsets)

    def sequence_of(self, steps: IntArray) -> IntArray:
        """The sequence to which each of the transitions ``steps`` belongs."""
        return np.searchsorted(self.offsets, steps, side="right") - 1

    @cached_property
    def episodes(self) -> Episodes:
        """The episodes of all sequences; the last one of a sequence may be incomplete."""
        stops = [first + np.flatnonzero(ended) + 1 for first, ended in self.parts("ended")]
        stop = np.unique(np.concatenate([self.offsets[1:], *stops]))
        start = np.concatenate([[0], stop])[:-1].astype(np.int64)
        sequence = self.sequence_of(start)
        first = np.searchsorted(sequence, np.arange(len(self)))
        rewarded = np.zeros(len(start), bool)
        for before, rewards in self.parts("rewards"):
            rewarded[np.searchsorted(start, before + np.flatnonzero(rewards > 0), side="right") - 1] = True
        return Episodes(
            start=start,
            length=stop - start,
            sequence=sequence,
            ordinal=np.arange(len(start)) - first[sequence],
            rewarded=rewarded,
            complete=self.gather("ended", stop - 1),
        )

    def full_windows(self, n_transit: int) -> BoolArray:
        """(K,) episodes whose start leaves at least ``n_transit`` transitions of their sequence."""
        episodes = self.episodes
        return np.asarray(episodes.start + n_transit <= self.offsets[episodes.sequence + 1])

    @cached_property
    def first_reward(self) -> IntArray:
        """(Q,) the first transition of each sequence with a reward above 0; M where there is none."""
        first = np.full(len(self), self.at[-1])
        for before, rewards in self.parts("rewards"):
            paid = before + np.flatnonzero(rewards > 0)
            np.minimum.at(first, self.sequence_of(paid), paid)
        return first

    def take(self, steps: IntArray, lengths: IntArray, task: IntArray, learner: IntArray) -> Sequences:
        """New sequences of the given ``lengths``, made of the transitions ``steps`` in that order."""
        begins = np.flatnonzero(np.diff(steps, prepend=-2) != 1)
        return self.runs(steps[begins], np.diff(begins, append=len(steps)), lengths, task, learner)

    def take_episodes(self, rows: IntArray, group: IntArray, n_group: int, source: IntArray) -> Sequences:
        """New sequences made of whole episodes: ``rows`` of ``episodes``, sorted by ``group`` (new sequence).

        New sequence i has the task and learner of old sequence ``source[i]``.
        """
        length = self.episodes.length[rows]
        lengths = np.bincount(group, weights=length, minlength=n_group).astype(np.int64)
        return self.runs(self.episodes.start[rows], length, lengths, self.task[source], self.learner[source])

    def runs(
        self, start: IntArray, length: IntArray, lengths: IntArray, task: IntArray, learner: IntArray
    ) -> Sequences:
        """New sequences of the given ``lengths``, made of runs of transitions, none of them empty.

        Run i is the transitions ``start[i]`` to ``start[i] + length[i] - 1``.
        """
        first = np.searchsorted(self.at, start, side="right") - 1
        count = np.searchsorted(self.at, start + length) - first  # pieces that each run touches
        piece, run = expand(first, count), np.repeat(np.arange(len(start)), count)
        begin = np.maximum(start[run], self.at[piece])
        end = np.minimum(start[run] + length[run], self.at[piece + 1])
        row = self.row[piece] + begin - self.at[piece]
        fresh = np.append(True, row[1:] != row[:-1] + (end - begin)[:-1])[: len(row)]  # not what comes next
        at = np.concatenate([[0], np.cumsum(end - begin)])
        keep = lengths > 0
        return Sequences(
            self.store,
            row[fresh],
            np.append(at[:-1][fresh], at[-1]),
            np.concatenate([[0], np.cumsum(lengths[keep])]),
            task[keep],
            learner[keep],
        )


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


class Column(Protocol):
    """Takes the values of an array (M, ...) part by part."""

    def append(self, values: AnyArray) -> None: ...
    def whole(self) -> AnyArray:
        """All of them; called once, at the end."""


class MemoryColumn:
    """An array that grows at its end; what it has in reserve takes no memory until it is filled."""

    def __init__(self, name: str, values: AnyArray) -> None:
        self.array, self.n = values, len(values)

    def append(self, values: AnyArray) -> None:
        end, dtype = self.n + len(values), np.result_type(self.array, values)
        if end > len(self.array) or dtype != self.array.dtype:
            grown = np.empty((max(end, 2 * len(self.array)), *self.array.shape[1:]), dtype)
            grown[: self.n] = self.array[: self.n]
            self.array = grown
        self.array[self.n : end] = values
        self.n = end

    def whole(self) -> AnyArray:
        return self.array[: self.n]


def from_histories(histories: Mapping[int, History] | Iterable[tuple[int, History]]) -> Sequences:
    """All streams of ``histories`` (task index -> history) as sequences; without a mask, none is marked.

    Pairs that come one by one, as from ``HistoryFile.each``, are not all in memory at once.
    """
    return in_columns(histories.items() if isinstance(histories, Mapping) else histories, MemoryColumn)


def in_columns(
    histories: Iterable[tuple[int, History]], new_column: Callable[[str, AnyArray], Column]
) -> Sequences:
    """``from_histories`` with columns that ``new_column`` makes of a name and the first values."""
    columns: dict[str, Column] = {}
    first: dict[str, AnyArray] = {}  # no values of each column, but their kind and shape
    lengths, task, learner = [], [], []
    for n, (index, history) in enumerate(histories):
        mask = history.compression_mask
        mask = np.zeros(history.rewards.shape, bool) if mask is None else mask
        arrays = {"ended": history.episode_end, "mask": mask}
        arrays |= {name: getattr(history, name) for name in COLUMNS if name not in arrays}
        for name, array in arrays.items():
            if array is None:
                columns.pop(name, None)
                continue
            values = array.reshape(-1, *array.shape[2:])
            if n == 0:
                columns[name], first[name] = new_column(name, values), values[:0]
            elif name in columns:
                both = np.result_type(values, first[name])
                floats = {dtype.kind == "f" for dtype in (values.dtype, first[name].dtype, both)}
                if values.shape[1:] != first[name].shape[1:] or len(floats) > 1:
                    now, before = (f"{x.dtype} of shape {(..., *x.shape[1:])}" for x in (values, first[name]))
                    text = f"task {index}: {name} are {now}, those before {before}"
                    raise HistoryError(text.replace("Ellipsis", "..."))
                columns[name].append(values)
        lengths += [history.n_step] * history.n_stream
        task += [index] * history.n_stream
        learner += history.learner.tolist()
    if not task:
        raise HistoryError("no histories to train on")
    return Sequences.of(
        {name: column.whole() for name, column in columns.items()},
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        task=np.array(task, np.int64),
        learner=np.array(learner, np.int64),
    )
