"""What is in a history file: ``cad inspect`` as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.header import HistoryInfo
from compressed_ad.marking.markers import segments
from compressed_ad.marking.statistics import N_PHASE, MarkingStatistics, marking_statistics
from compressed_ad.types import AnyArray, BoolArray, FloatArray, History, IntArray

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class MarkedSegments:
    """The segments of all streams and tasks of a history file."""

    statistics: MarkingStatistics
    count: int
    length_quantiles: tuple[float, ...]  # at QUANTILES, in steps; NaN without segments
    crossing_share: float  # share of segments that go on after an episode's end
    reward_share: float  # share of marked steps whose reward is not 0


@dataclass(frozen=True)
class Overview:
    """What a history file holds. Curves have one value for each tenth of training, NaN without episodes."""

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
    segments: MarkedSegments | None  # None if it is not marked

    @property
    def total_steps(self) -> int:
        """Steps of all streams and tasks."""
        return sum(self.split.values()) * self.n_stream * self.n_step

    def text(self) -> str:
        """Everything as lines for a terminal."""
        info, parts = self.info, ", ".join(f"{count} {name}" for name, count in self.split.items())
        spaces = ", ".join(f"{name} {_space(info.spaces[name])}" for name in ("observation", "action"))
        optimum = "unknown" if self.optimal_return is None else f"{self.optimal_return:.3f}"
        lines = [
            str(self.path),
            f"  Task family: {_call(info.family, info.family_kwargs)}, horizon {info.horizon}, {spaces}",
            f"  Source algorithm: {_call(info.learner, info.config)}, seed {info.seed}",
            f"  Tasks: {sum(self.split.values())} ({parts})",
            f"  Streams per task: {self.n_stream} of {self.n_learner} learner(s), {self.n_step} steps each",
            f"  Steps: {self.total_steps}, in {self.n_episode} finished episodes",
            "Learning, by tenth of training:",
            f"  Mean episode return: {_numbers(self.learning_curve)}"
            f" (random {self.random_return:.3f}, optimal {optimum})",
        ]
        if self.normalised_curve is not None:
            lines.append(f"  Normalised per task:  {_numbers(self.normalised_curve)}")
        lines += self._marking_lines()
        lines.append(f"Made with {', '.join(f'{name} {v}' for name, v in self.versions.items())}")
        lines.append(f"SHA-256 {self.digest}")
        return "\n".join(lines)

    def _marking_lines(self) -> list[str]:
        if self.segments is None:
            return [f"Not marked yet; mark it with: cad mark {self.path}"]
        marked = self.segments
        lines = marked.statistics.text().splitlines()
        if marked.count:
            lengths = "/".join(f"{length:g}" for length in marked.length_quantiles)
            lines += [
                f"  Segments: {marked.count}, lengths {lengths} (least, quartiles, most)",
                f"  Segments that cross an episode's end: {100 * marked.crossing_share:.1f}%",
                f"  Marked steps with reward: {100 * marked.reward_share:.1f}%",
            ]
        if self.marking is not None:
            call = _call(self.marking["marker"], self.marking["parameters"])
            lines.append(f"  Marked by {call}, seed {self.marking['seed']}, {self.marking['time']}")
        return lines


def describe(path: str | Path) -> Overview:
    """What is in the history file at ``path``; errors as those of ``HistoryFile``."""
    file = HistoryFile(path)
    sums, normalised, counts = np.zeros(N_PHASE), np.zeros(N_PHASE), np.zeros(N_PHASE, dtype=np.int64)
    masks: list[BoolArray] = []
    lengths: list[IntArray] = []
    crossing = rewarded = n_learner = 0
    random = file.random_return[file.task_ids]
    optimal = None if file.optimal_return is None else file.optimal_return[file.task_ids]
    # A task on which random play is optimal has no normalised return.
    gap = None if optimal is None else np.where(optimal == random, np.nan, optimal - random)
    for place, task in enumerate(file.task_ids.tolist()):
        history = file.load([task])[task]
        n_learner = len(np.unique(history.learner))
        last, returns = finished_episodes(history)
        phase = last * N_PHASE // history.n_step
        count, total = np.bincount(phase, minlength=N_PHASE), np.bincount(phase, returns, N_PHASE)
        counts, sums = counts + count, sums + total
        if gap is not None:
            normalised += (total - count * random[place]) / gap[place]
        if history.compression_mask is not None:
            mask = history.compression_mask
            row, start, stop = segments(mask)
            before = np.pad(np.cumsum(history.episode_end, axis=1), ((0, 0), (1, 0)))
            masks.append(mask)
            lengths.append(stop - start)
            crossing += int((before[row, stop - 1] > before[row, start]).sum())
            rewarded += int(np.count_nonzero(history.rewards[mask]))
    return Overview(
        path=file.path,
        info=file.info,
        versions=file.versions,
        digest=file.digest(),
        split={name: len(ids) for name, ids in vars(file.split).items()},
        n_stream=file.n_stream,
        n_learner=n_learner,
        n_step=file.n_step,
        n_episode=int(counts.sum()),
        learning_curve=_mean(sums, counts),
        normalised_curve=None if optimal is None else _mean(normalised, counts),
        optimal_return=None if optimal is None else float(optimal.mean()),
        random_return=float(random.mean()),
        marking=file.marking,
        segments=_segments(masks, np.concatenate(lengths), crossing, rewarded) if masks else None,
    )


def finished_episodes(history: History) -> tuple[IntArray, FloatArray]:
    """Last step and undiscounted return of every finished episode, ordered by stream and time."""
    row, last = np.nonzero(history.episode_end)
    total = np.cumsum(history.rewards, axis=1, dtype=np.float64)[row, last]
    same_stream = np.concatenate([[False], row[1:] == row[:-1]])
    return last, total - np.where(same_stream, np.roll(total, 1), 0)


def _segments(masks: list[BoolArray], lengths: IntArray, crossing: int, rewarded: int) -> MarkedSegments:
    statistics, count = marking_statistics(masks), len(lengths)
    quantiles = np.quantile(lengths, QUANTILES) if count else np.full(len(QUANTILES), np.nan)
    return MarkedSegments(
        statistics=statistics,
        count=count,
        length_quantiles=tuple(quantiles.tolist()),
        crossing_share=crossing / max(count, 1),
        reward_share=rewarded / max(statistics.compressed_steps, 1),
    )


def _mean(sums: AnyArray, counts: IntArray) -> tuple[float, ...]:
    return tuple(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist())


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values)


def _call(name: str, arguments: dict[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}({listed})" if listed else name


def _space(spec: dict[str, Any]) -> str:
    if spec["kind"] == "box":
        return f"Box{tuple(spec['shape'])}"
    return f"Discrete({spec['n']})" if spec["kind"] == "discrete" else f"MultiDiscrete({spec['nvec']})"
