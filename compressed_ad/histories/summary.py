"""Summary of a history file: learning curves and marks, as ``cad inspect`` and reports show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import HistoryInfo
from compressed_ad.marking.markers import segments
from compressed_ad.marking.statistics import N_PHASE, MarkingStatistics, marking_statistics, total_marking
from compressed_ad.registry import call_text
from compressed_ad.types import AnyArray, FloatArray, History, IntArray

LEARNED, FORGOTTEN = 0.8, 0.1
"""A source that learned ends at least here, normalised, and at most this much below its own best tenth."""


@dataclass(frozen=True)
class Marks:
    """The marks of one task, or of all tasks of a file."""

    statistics: MarkingStatistics
    lengths: IntArray  # (G,) steps of each segment
    n_crossing: int  # segments that continue after an episode's end
    n_rewarded: int  # marked steps whose reward is not 0


@dataclass(frozen=True)
class TaskSummary:
    """What remains of one task's histories once their arrays are dropped."""

    task: int
    n_learner: int
    n_episode: IntArray  # (10,) finished episodes that end in each tenth of training
    total_return: FloatArray  # (10,) undiscounted, of these episodes
    curve: FloatArray  # (E,) mean return over the streams of each episode that all streams finished
    marks: Marks | None  # None if the task is not marked
    optimal: FloatArray | None  # (10,) share of the steps with the optimal action; None if that is unknown
    probable: bool  # whether the probability of every action is known


@dataclass(frozen=True)
class Overview:
    """Contents of a history file. Curves have one value for each tenth of training, NaN without episodes."""

    path: Path
    info: HistoryInfo
    versions: dict[str, str]
    digest: str
    split: dict[str, int]  # tasks of each part
    n_stream: int  # per task
    n_learner: int  # per task
    n_step: int  # per stream
    n_episode: int  # finished, of all tasks
    learning_curve: tuple[float, ...]  # (10,) mean episode return
    normalised_curve: tuple[float, ...] | None  # (10,) normalised per task; None if the optimum is unknown
    optimal_return: float | None  # mean over the tasks of the file
    random_return: float
    marking: dict[str, Any] | None  # how it was marked
    marks: Marks | None  # None if it is not marked
    optimal: tuple[float, ...] | None  # (10,) share of the steps with the optimal action; None: not recorded
    probable: bool  # whether the probability of every action is known

    @property
    def total_steps(self) -> int:
        return sum(self.split.values()) * self.n_stream * self.n_step

    @property
    def shortfall(self) -> str:
        return shortfall(self.learning_curve, self.normalised_curve, self.random_return)

    def text(self) -> str:
        def numbers(values: tuple[float, ...]) -> str:
            return " ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values)

        info, parts = self.info, ", ".join(f"{count} {name}" for name, count in self.split.items())
        kept = info.keep_every
        spaces = ", ".join(f"{name} {_space(info.spaces[name])}" for name in ("observation", "action"))
        config = {name: value for name, value in info.config.items() if name != "told"}
        optimum = "unknown" if self.optimal_return is None else f"{self.optimal_return:.3f}"
        lines = [
            str(self.path),
            f"  Task family: {call_text(info.family, info.family_kwargs)}, horizon {info.horizon}, {spaces}",
            f"  Source algorithm: {call_text(info.learner, config)}, seed {info.seed}",
            *([f"  The source was told: {info.config['told']}"] if "told" in info.config else []),
            f"  Tasks: {sum(self.split.values())} ({parts})",
            f"  Streams per task: {self.n_stream} of {self.n_learner} learner(s), {self.n_step} steps each",
            f"  Steps: {self.total_steps}, in {self.n_episode} finished episodes",
            *([f"  Kept: about one of {kept} episodes; all that follows is of these"] if kept > 1 else []),
            "Learning, by tenth of training:",
            f"  Mean episode return: {numbers(self.learning_curve)}"
            f" (random {self.random_return:.3f}, optimal {optimum})",
        ]
        if self.normalised_curve is not None:
            lines.append(f"  Normalised per task:  {numbers(self.normalised_curve)}")
        if self.optimal is not None:
            lines.append(f"  Optimal action taken: {numbers(self.optimal)} (of all steps; optimal_actions)")
        lines += [f"  Note: {self.shortfall}"] if self.shortfall else []
        marks, made = self.marks, self.marking
        if marks is None:
            able = "" if self.probable else " --marker none (or another that needs no probabilities)"
            lines.append(f"Not marked yet; mark it with: cad mark {self.path}{able}")
        else:
            lines.append(marks.statistics.text((made or {}).get("parameters", {})))
            count = len(marks.lengths)
            if count:
                lengths = "/".join(f"{at:g}" for at in np.quantile(marks.lengths, (0, 0.25, 0.5, 0.75, 1)))
                rewarded = marks.n_rewarded / max(marks.statistics.compressed_steps, 1)
                lines += [
                    f"  Segments: {count}, lengths {lengths} (minimum, quartiles, maximum)",
                    f"  Segments that cross an episode's end: {100 * (marks.n_crossing / count):.1f}%",
                    f"  Marked steps with reward: {100 * rewarded:.1f}%",
                ]
            if made is not None:
                call = call_text(made["marker"], made["parameters"])
                lines.append(f"  Marked by {call}, seed {made['seed']}, {made['time']}")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, f"Made with {versions}", f"SHA-256 {self.digest}"])


def task_summaries(file: HistoryFile) -> Iterator[TaskSummary]:
    """A summary of every task of ``file``, in order; one task is in memory at a time."""
    for task in file.task_ids.tolist():
        history = file.load([task])[task]
        stream, last, returns = finished_episodes(history)
        phase = last * N_PHASE // history.n_step
        mask, marks = history.compression_mask, None
        if mask is not None:
            row, start, stop = segments(mask)
            ended = np.pad(np.cumsum(history.episode_end, axis=1), ((0, 0), (1, 0)))  # episodes before a step
            marks = Marks(
                statistics=marking_statistics([mask]),
                lengths=stop - start,
                n_crossing=int((ended[row, stop - 1] > ended[row, start]).sum()),
                n_rewarded=int(np.count_nonzero(history.rewards[mask])),
            )
        yield TaskSummary(
            task=task,
            n_learner=len(np.unique(history.learner)),
            n_episode=np.bincount(phase, minlength=N_PHASE),
            total_return=np.bincount(phase, returns, N_PHASE).astype(np.float64),
            curve=_by_stream(stream, returns, history.n_stream).mean(axis=0),
            marks=marks,
            optimal=_optimal(history),
            probable=not bool(np.isnan(history.action_probs).any()),
        )


def _optimal(history: History) -> FloatArray | None:
    """(10,) share of the steps of each tenth of training on which the source took the optimal action."""
    if history.optimal_actions is None:
        return None
    same = np.asarray(history.actions == history.optimal_actions)
    both = np.asarray(same.all(axis=tuple(range(2, same.ndim))))
    return np.array(marking_statistics([both]).ratio_by_phase, np.float64)


def describe(path: str | Path) -> Overview:
    """Overview of the history file at ``path``; errors as those of ``HistoryFile``."""
    file = HistoryFile(path)
    tasks = list(task_summaries(file))
    curve, normalised = learning_by_tenth(file, tasks)
    optimal = None if file.optimal_return is None else file.optimal_return[file.task_ids]
    marks = [task.marks for task in tasks if task.marks is not None]
    marked = (
        Marks(
            statistics=total_marking(task.statistics for task in marks),
            lengths=np.concatenate([task.lengths for task in marks]),
            n_crossing=sum(task.n_crossing for task in marks),
            n_rewarded=sum(task.n_rewarded for task in marks),
        )
        if marks
        else None
    )
    shares = [task.optimal for task in tasks if task.optimal is not None]
    return Overview(
        path=file.path,
        info=file.info,
        versions=file.versions,
        digest=file.digest(),
        split={name: len(ids) for name, ids in vars(file.split).items()},
        n_stream=file.n_stream,
        n_learner=tasks[-1].n_learner,
        n_step=file.n_step,
        n_episode=sum(int(task.n_episode.sum()) for task in tasks),
        learning_curve=curve,
        normalised_curve=normalised,
        optimal_return=None if optimal is None else float(optimal.mean()),
        random_return=float(file.random_return[file.task_ids].mean()),
        marking=file.marking,
        marks=marked,
        optimal=tuple(np.mean(shares, axis=0).tolist()) if len(shares) == len(tasks) else None,
        probable=all(task.probable for task in tasks),
    )


def learning_by_tenth(
    file: HistoryFile, tasks: Sequence[TaskSummary]
) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """(10,) mean episode return of ``tasks`` of ``file``; the same normalised, None without an optimum."""
    count = np.array([task.n_episode for task in tasks])  # (N, 10)
    total = np.array([task.total_return for task in tasks])
    curve = _mean(total.sum(axis=0), count.sum(axis=0))
    if file.optimal_return is None:
        return curve, None
    random, optimal = file.random_return[file.task_ids], file.optimal_return[file.task_ids]
    has_scale = optimal > random
    count, total, low, high = (
        values[has_scale] for values in (count, total, random[:, None], optimal[:, None])
    )
    return curve, _mean(((total - count * low) / (high - low)).sum(axis=0), count.sum(axis=0))


def shortfall(curve: Sequence[float], normalised: Sequence[float] | None, random: float) -> str:
    """What is wrong with the end of a source's learning curve, in one line; empty if it learned.

    The first two as of ``learning_by_tenth``; ``random`` is the mean return of random play. Without a known
    optimum, the best tenth stands for it.
    """
    ends = [value for value in (curve if normalised is None else normalised) if not np.isnan(value)]
    if normalised is None:
        gain = max(random, *ends) - random if ends else 0.0
        ends = [(value - random) / (gain or np.inf) for value in ends]
    if not ends:
        return ""
    last, best, of = ends[-1], max(ends), "the optimum"
    if normalised is None:
        best, of = 1.0, "its best tenth"
    if last >= LEARNED and best - last <= FORGOTTEN:
        return ""
    before = f", after {best:.2f}" if best - last > FORGOTTEN and normalised is not None else ""
    return (
        f"the last tenth of the source's histories earns {last:.2f} of {of}{before} (0 is random play);"
        " a model that imitates them hardly earns more"
    )


def finished_episodes(history: History) -> tuple[IntArray, IntArray, FloatArray]:
    """Stream, last step and undiscounted return of every finished episode, ordered by stream and time."""
    stream, last = np.nonzero(history.episode_end)
    total = np.cumsum(history.rewards, axis=1, dtype=np.float64)[stream, last]
    same_stream = np.concatenate([[False], stream[1:] == stream[:-1]])
    return stream, last, total - np.where(same_stream, np.roll(total, 1), 0)


def episode_returns(history: History) -> FloatArray:
    """(S, E) return of each finished episode, cut to the number that every stream finished."""
    stream, _, returns = finished_episodes(history)
    return _by_stream(stream, returns, history.n_stream)


def _by_stream(stream: IntArray, returns: FloatArray, n_stream: int) -> FloatArray:
    counts = np.bincount(stream, minlength=n_stream)
    number = np.arange(len(stream)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept: FloatArray = returns[number < counts.min()].reshape(n_stream, counts.min())
    return kept


def _mean(sums: AnyArray, counts: IntArray) -> tuple[float, ...]:
    return tuple(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist())


def _space(spec: dict[str, Any]) -> str:
    if spec["kind"] == "box":
        return f"Box{tuple(spec['shape'])}"
    return f"Discrete({spec['n']})" if spec["kind"] == "discrete" else f"MultiDiscrete({spec['nvec']})"
