"""What finished runs and histories left behind, read into the arrays that reports are made of."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.marking.apply import MarkingStatistics, marking_statistics
from compressed_ad.types import AnyArray, BoolArray, FloatArray, History, IntArray

TRACE_STEPS = 200
REFERENCE = "reference_"
"""Before the names of reference algorithms in an evaluation file."""
PAYS_ALWAYS = 0.25
"""With a larger share of paying steps than this before anything is learned, no reward has to be found."""


@dataclass(frozen=True)
class MethodRuns:
    """All runs of one method: R training seeds, N held-out tasks, M rollouts, E in-context episodes."""

    name: str
    seeds: tuple[int, ...]  # (R,)
    task_ids: IntArray  # (N,)
    returns: FloatArray  # (R, N, M, E) undiscounted
    random: FloatArray  # (N,)
    optimal: FloatArray  # (N,) NaN where unknown
    accuracy: FloatArray  # (R,) NaN where not measured, as the two below
    cross_entropy: FloatArray  # (R,) nats
    behaviour_entropy: FloatArray  # (R,) nats
    metrics: Sequence[Sequence[Mapping[str, Any]]]  # (R,) rows of metrics.jsonl
    references: Mapping[str, FloatArray] = field(default_factory=dict)  # (N, M, E) by name, undiscounted
    horizon: int | None = None  # of the family; None where not known
    paying: float | None = None  # share of paying steps before anything is learned: see ``searches``

    @property
    def searches(self) -> bool:
        """Whether there is a reward to be met: where every step pays, or is an episode, there is none.

        Told by the share of steps with a reward other than 0 in the first episodes of the training histories.
        """
        return self.horizon != 1 and (self.paying is None or self.paying <= PAYS_ALWAYS)


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


# ---------------------------------------------------------------- run directories


def load_runs(run_dirs: Sequence[str | Path], name: str | None = None) -> MethodRuns:
    """The runs of one method, one run directory per training seed.

    Each directory holds ``evaluation.npz`` and ``metrics.jsonl``. The method is called ``name``, or as the
    directories are up to the first "-"; the seed is the number after the last "seed" in a directory's name.

    Raises ``RunDirectoryError`` naming the file, and the key, that is missing, damaged, or that does not
    fit the other runs.
    """
    if not run_dirs:
        raise UsageError("no run directory given")
    ordered = sorted((_seed(path, i), Path(path)) for i, path in enumerate(run_dirs))
    seeds = tuple(seed for seed, _ in ordered)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"two run directories of one seed: {', '.join(str(path) for _, path in ordered)}")
    runs = [load_evaluation(path / "evaluation.npz") for _, path in ordered]
    for run, (_, path) in zip(runs, ordered, strict=True):
        for key in ("returns", "task_ids", "optimal", "random"):
            ours, first = run[key], runs[0][key]
            if ours.shape != first.shape or (
                key != "returns" and not np.allclose(ours, first, equal_nan=True)
            ):
                raise RunDirectoryError(
                    f"{path / 'evaluation.npz'}: {key} differs from {ordered[0][1] / 'evaluation.npz'}; "
                    "only runs evaluated on the same tasks in the same way can be put together"
                )
    scalars = {key: np.array([float(run[key]) for run in runs]) for key in _SCALARS}
    return MethodRuns(
        name=ordered[0][1].name.split("-")[0] if name is None else name,
        seeds=seeds,
        task_ids=runs[0]["task_ids"].astype(np.int64),
        returns=np.stack([run["returns"] for run in runs]),
        random=runs[0]["random"].astype(np.float64),
        optimal=runs[0]["optimal"].astype(np.float64),
        metrics=[load_metrics(path / "metrics.jsonl") for _, path in ordered],
        references={
            key.removeprefix(REFERENCE): array for key, array in runs[0].items() if key.startswith(REFERENCE)
        },
        horizon=int(runs[0]["horizon"]) if "horizon" in runs[0] else None,
        paying=float(runs[0]["paying"]) if "paying" in runs[0] else None,
        **scalars,
    )


_SCALARS = ("accuracy", "cross_entropy", "behaviour_entropy")


def _seed(path: str | Path, place: int) -> int:
    found = re.findall(r"seed(\d+)", Path(path).name)
    return int(found[-1]) if found else place


def load_evaluation(path: Path) -> dict[str, AnyArray]:
    """The arrays of one ``evaluation.npz``; those that every report needs are checked."""
    if not path.is_file():
        raise RunDirectoryError(f"{path}: not found; evaluate this run first")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise RunDirectoryError(f"{path}: a single array, not an evaluation file")
            arrays = {key: np.asarray(loaded[key]) for key in loaded.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise RunDirectoryError(f"{path}: damaged or not an evaluation file ({error})") from error
    needed = ("returns", "task_ids", "optimal", "random", *_SCALARS)
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise RunDirectoryError(f"{path}: has no {', '.join(missing)}")
    strange = [key for key in needed if arrays[key].dtype.kind not in "fiu"]
    if strange:
        raise RunDirectoryError(f"{path}: {', '.join(strange)} must be numbers")
    returns = arrays["returns"]
    if returns.ndim != 3 or 0 in returns.shape:
        raise RunDirectoryError(f"{path}: returns: expected (tasks, rollouts, episodes), got {returns.shape}")
    for key in ("task_ids", "optimal", "random"):
        if arrays[key].shape != returns.shape[:1]:
            raise RunDirectoryError(f"{path}: {key}: expected {returns.shape[:1]}, got {arrays[key].shape}")
    for key in _SCALARS:
        if arrays[key].size != 1:
            raise RunDirectoryError(f"{path}: {key}: expected one number, got shape {arrays[key].shape}")
    if not np.isfinite(returns).all():
        raise RunDirectoryError(f"{path}: returns has NaN or infinity")
    for key in (key for key in arrays if key.startswith(REFERENCE)):
        if arrays[key].shape != returns.shape:
            raise RunDirectoryError(f"{path}: {key}: expected {returns.shape}, got {arrays[key].shape}")
    return arrays | {key: arrays[key].reshape(()) for key in _SCALARS}


def load_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of one ``metrics.jsonl``, without a last line that was never completed (no newline)."""
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path}: not found; train this run first") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunDirectoryError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RunDirectoryError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


# ---------------------------------------------------------------- histories


def summarise_source(file: HistoryFile) -> SourceSummary:
    """Learning curves, marks and a trace of all tasks of a history file; reads one task at a time."""
    name, ids = file.info.learner, file.task_ids
    curves: list[FloatArray] = []
    statistics: list[MarkingStatistics] = []
    shown: tuple[float, int] = (np.inf, -1)
    for task in ids.tolist():
        history = file.load([task])[task]
        curves.append(episode_returns(history).mean(axis=0))
        if history.compression_mask is not None:
            statistics.append(marking_statistics([history.compression_mask]))
            # Shown is the task that is marked most nearly by half, so that both kinds of steps are seen.
            shown = min(shown, (abs(statistics[-1].compression_ratio - 0.5), task))
    n_episode = min(len(curve) for curve in curves)
    parts = {"validation": set(file.split.validation.tolist()), "heldout": set(file.split.heldout.tolist())}
    marked = bool(statistics)
    parameters = {} if file.marking is None else file.marking["parameters"]
    return SourceSummary(
        name=name,
        task_ids=ids,
        tasks=file.tasks[ids],
        kinds=tuple(next((kind for kind, of in parts.items() if i in of), "train") for i in ids.tolist()),
        random=file.random_return[ids],
        optimal=np.full(len(ids), np.nan) if file.optimal_return is None else file.optimal_return[ids],
        returns=np.stack([curve[:n_episode] for curve in curves]),
        marking=_sum(statistics) if marked else None,
        marked_by_phase=np.array([s.ratio_by_phase for s in statistics]) if marked else None,
        trace=_trace(file.load([shown[1]])[shown[1]], f"{name}, task {shown[1]}") if marked else None,
        threshold=parameters.get("on_policy_threshold"),
    )


def episode_returns(history: History) -> FloatArray:
    """(S, E) return of each complete episode, cut to the number that every stream completed."""
    stream, step = np.nonzero(history.episode_end)
    so_far = np.cumsum(history.rewards, axis=1, dtype=np.float64)[stream, step]
    counts = np.bincount(stream, minlength=history.n_stream)
    n_episode = int(counts.min())
    number = np.arange(len(stream)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = number < n_episode
    totals = so_far[kept].reshape(history.n_stream, n_episode)
    return np.diff(totals, axis=1, prepend=0.0)


def _sum(statistics: Sequence[MarkingStatistics]) -> MarkingStatistics:
    total = np.sum([s.total_by_phase for s in statistics], axis=0)
    marked = np.sum([s.compressed_by_phase for s in statistics], axis=0)
    return MarkingStatistics(tuple(total.tolist()), tuple(marked.tolist()))


def _trace(history: History, label: str) -> Trace:
    """The stretch of the first stream that is marked most nearly by half."""
    assert history.compression_mask is not None
    mask = history.compression_mask[0]
    length = min(TRACE_STEPS, len(mask))
    before = np.concatenate([[0], np.cumsum(mask)])
    share = (before[length:] - before[:-length]) / length
    first = int(np.argmin(np.abs(share - 0.5)))
    part = slice(first, first + length)
    return Trace(
        label=f"{label}, stream 0",
        first_step=first,
        probs=history.action_probs[0, part],
        mask=mask[part],
        episode_end=history.episode_end[0, part],
    )
