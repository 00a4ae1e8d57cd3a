"""What pages show of the learning histories: how the source learned, its marks, a stretch of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.summary import (
    TaskSummary,
    learning_by_tenth,
    shortfall,
    task_summaries,
)
from compressed_ad.marking.statistics import MarkingStatistics, total_marking
from compressed_ad.types import AnyArray, BoolArray, FloatArray, History, IntArray


@dataclass(frozen=True)
class Trace:
    """T consecutive steps of one stream, for the guide's plot."""

    label: str
    first_step: int
    probs: FloatArray  # (T,)
    mask: BoolArray  # (T,)
    episode_end: BoolArray  # (T,)


@dataclass(frozen=True)
class SourceSummary:
    """What a report shows of the learning histories: N tasks of all parts of the split."""

    name: str
    task_ids: IntArray  # (N,)
    tasks: AnyArray  # (N, P)
    kinds: tuple[str, ...]  # (N,) "train", "validation" or "heldout"
    random: FloatArray  # (N,)
    optimal: FloatArray  # (N,) NaN where unknown
    returns: FloatArray  # (N, E) of each episode of a stream, mean over the streams
    marking: MarkingStatistics | None = None
    marked_by_phase: FloatArray | None = None  # (N, phases)
    trace: Trace | None = None
    threshold: float | None = None  # of the marker, if it has one
    marker: Mapping[str, Any] = field(default_factory=dict)  # its settings
    shortfall: str = ""  # what is wrong with the end of the learning curve


def summarise_source(file: HistoryFile) -> SourceSummary:
    """Learning curves, marks and a trace of all tasks of a history file; reads one task at a time."""
    kept, ids = file.info.keep_every, file.task_ids
    name = file.info.learner + (f", one of {kept} episodes" if kept > 1 else "")
    tasks = list(task_summaries(file))
    marked = file.marking is not None and file.marking["marker"] != "none"
    marks = [task.marks for task in tasks if task.marks is not None and marked]
    n_episode = min(len(task.curve) for task in tasks)
    trace = None
    if marks:
        shown = half_marked(tasks)
        trace = trace_of(file.load([shown])[shown], f"{name}, task {shown}")
    parts = {"validation": set(file.split.validation.tolist()), "heldout": set(file.split.heldout.tolist())}
    return SourceSummary(
        name=name,
        task_ids=ids,
        tasks=file.tasks[ids],
        kinds=tuple(next((kind for kind, of in parts.items() if i in of), "train") for i in ids.tolist()),
        random=file.random_return[ids],
        optimal=np.full(len(ids), np.nan) if file.optimal_return is None else file.optimal_return[ids],
        returns=np.stack([task.curve[:n_episode] for task in tasks]),
        marking=total_marking(task.statistics for task in marks) if marks else None,
        marked_by_phase=np.array([task.statistics.ratio_by_phase for task in marks]) if marks else None,
        trace=trace,
        threshold=file.threshold,
        marker=(file.marking or {}).get("parameters", {}),
        shortfall=shortfall(*learning_by_tenth(file, tasks), float(file.random_return[ids].mean())),
    )


def half_marked(tasks: Sequence[TaskSummary]) -> int:
    """The task whose marked share is closest to one half, so that both kinds of steps are seen."""
    shares = [(abs(t.marks.statistics.compression_ratio - 0.5), t.task) for t in tasks if t.marks is not None]
    return min(shares, default=(0.0, tasks[0].task))[1]


def trace_of(
    history: History, label: str, *, stream: int = 0, first: int | None = None, length: int = 200
) -> Trace:
    """``length`` steps of a marked ``stream`` from ``first``, by default those marked most nearly by half."""
    assert history.compression_mask is not None
    mask = history.compression_mask[stream]
    if first is None:
        length = min(length, len(mask))
        before = np.concatenate([[0], np.cumsum(mask)])
        share = (before[length:] - before[:-length]) / length
        first = int(np.argmin(np.abs(share - 0.5)))
    part = slice(first, first + length)
    probs, ends = history.action_probs[stream, part], history.episode_end[stream, part]
    return Trace(f"{label}, stream {stream}", first, probs, mask[part], ends)
