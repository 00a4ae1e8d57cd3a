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
    """The K episodes of some sequences, in order. Only what is stored takes memory: 10 bytes for each."""

    edge: IntArray  # (K + 1,) episode k is the transitions [edge[k], edge[k + 1])
    first: IntArray  # (Q + 1,) the episodes of sequence q are [first[q], first[q + 1])
    rewarded: BoolArray  # (K,) some reward above 0
    complete: BoolArray  # (K,) ends with an episode end, not with the end of the record

    @property
    def start(self) -> IntArray:
        """(K,) transitions before each, from the first sequence on."""
        return self.edge[:-1]

    @property
    def length(self) -> IntArray:
        """(K,)"""
        return np.diff(self.edge)

    @property
    def sequence(self) -> IntArray:
        """(K,)"""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @property
    def ordinal(self) -> IntArray:
        """(K,) 0, 1, ... within its sequence."""
        return np.arange(len(self.edge) - 1) - np.repeat(self.first[:-1], np.diff(self.first))

    def parts(self) -> Iterator[tuple[slice, slice, Episodes]]:
        """Some sequences at a time, a hundred thousand episodes: which ones, which episodes, and these."""
        n, n_seq, size = len(self.complete), len(self.first) - 1, max(1, _BLOCK // 8)
        cuts = np.unique(np.minimum(np.searchsorted(self.first, np.arange(0, n + size, size)), n_seq))
        for q, next_q in pairwise(cuts.tolist()):  # a sequence is not cut
            k, next_k = self.first[[q, next_q]].tolist()
            part = slice(k, next_k)
            edge, first = self.edge[k : next_k + 1], self.first[q : next_q + 1] - k
            yield slice(q, next_q), part, Episodes(edge, first, self.rewarded[part], self.complete[part])


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
        last = self.offsets[1:] - 1
        edges, whole = [np.zeros(1, np.int64)], [np.zeros(0, bool)]
        for before, ended in self.parts("ended"):
            stops = ended.copy()
            stops[last[slice(*np.searchsorted(last, (before, before + len(ended))))] - before] = True
            rows = np.flatnonzero(stops)
            edges.append(before + rows + 1)
            whole.append(ended[rows])
        edge, complete = np.concatenate(edges), np.concatenate(whole)
        rewarded = np.zeros(len(complete), bool)
        for before, rewards in self.parts("rewards"):
            rewarded[np.searchsorted(edge, before + np.flatnonzero(rewards > 0), side="right") - 1] = True
        return Episodes(edge, np.searchsorted(edge, self.offsets), rewarded, complete)

    def full_windows(self, n_transit: int) -> BoolArray:
        """(K,) episodes whose start leaves at least ``n_transit`` transitions of their sequence."""
        episodes = self.episodes
        return np.asarray(episodes.start <= np.repeat(self.offsets[1:] - n_transit, np.diff(episodes.first)))

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
        blocks = ((rows[block], group[block]) for block in _blocks(len(rows)))
        return self.take_blocks(blocks, n_group, source)

    def take_blocks(
        self, blocks: Iterable[tuple[IntArray, IntArray]], n_group: int, source: IntArray
    ) -> Sequences:
        """``take_episodes`` with pairs of ``rows`` and ``group`` that come one by one, and none is kept."""
        edge, lengths = self.episodes.edge, np.zeros(n_group, np.int64)

        def runs() -> Iterator[tuple[IntArray, IntArray]]:
            for rows, group in blocks:
                length = edge[rows + 1] - edge[rows]
                np.add.at(lengths, group, length)
                yield edge[rows], length

        return self._of_runs(runs(), lengths, self.task[source], self.learner[source])

    def runs(
        self, start: IntArray, length: IntArray, lengths: IntArray, task: IntArray, learner: IntArray
    ) -> Sequences:
        """New sequences of the given ``lengths``, made of runs of transitions, none of them empty.

        Run i is the transitions ``start[i]`` to ``start[i] + length[i] - 1``.
        """
        blocks = ((start[block], length[block]) for block in _blocks(len(start)))
        return self._of_runs(blocks, lengths, task, learner)

    def _of_runs(
        self,
        blocks: Iterable[tuple[IntArray, IntArray]],
        lengths: IntArray,
        task: IntArray,
        learner: IntArray,
    ) -> Sequences:
        """``runs`` whose starts and lengths come in ``blocks``; after the last, ``lengths`` must be right."""
        rows, at, total, following = [], [], 0, -1
        for start, length in blocks:
            first = np.searchsorted(self.at, start, side="right") - 1
            count = np.searchsorted(self.at, start + length) - first  # pieces that each run touches
            piece, run = expand(first, count), np.repeat(np.arange(len(start)), count)
            begin = np.maximum(start[run], self.at[piece])
            size = np.minimum(start[run] + length[run], self.at[piece + 1]) - begin
            row = self.row[piece] + begin - self.at[piece]
            after = row + size
            fresh = row != np.concatenate([[following], after])[: len(row)]  # not what comes next
            before = total + np.cumsum(size) - size
            rows.append(row[fresh])
            at.append(before[fresh])
            total, following = total + int(size.sum()), after[-1] if len(after) else following
        keep, begins = lengths > 0, np.concatenate([np.zeros(0, np.int64), *rows])
        del rows  # before the next copy is made
        return Sequences(
            self.store,
            begins,
            np.concatenate([*at, [total]]),
            np.concatenate([[0], np.cumsum(lengths[keep])]),
            task[keep],
            learner[keep],
        )


def _blocks(n: int) -> Iterator[slice]:
    """The rows 0, ..., n - 1, about a million at a time."""
    return (slice(k, min(k + _BLOCK, n)) for k in range(0, n, _BLOCK))


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
