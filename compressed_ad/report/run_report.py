"""The comparison of trained methods as one self-contained page, a table, and a summary for scripts.

``load_runs`` and ``summarise_source`` (``results``) read what training and collection left behind,
``analyse`` turns it into intervals and verdicts, ``build_report`` writes them down, ``terminal_table``
prints them. Every method is compared with the first one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Interval
from compressed_ad.files import write_atomically
from compressed_ad.report.comparison import (
    IMITATION,
    METRICS,
    OPTIMUM,
    SEARCH,
    Analysis,
    analyse,
    convergence,
)
from compressed_ad.report.figures import style
from compressed_ad.report.figures.regret import cumulative_regret
from compressed_ad.report.figures.style import Figure
from compressed_ad.report.pages import image, render, save_figure
from compressed_ad.report.results import MethodRuns, SourceSummary

Floats = NDArray[np.float64]

IN_CONTEXT = ("final", "auc", "found_by_10", "found", "success_given_found")
STAGES = ("collect", "mark", "train", "evaluate", "report")


@dataclass(frozen=True)
class Protocol:
    """How the methods were trained and judged, as far as the runs do not tell it themselves."""

    family: str
    split: Mapping[str, Sequence[int]]  # "train", "validation", "heldout": task ids
    transforms: Sequence[str]
    budget: Mapping[str, Any]  # gradient steps, batch size, ... the same for all methods


@dataclass(frozen=True)
class Report:
    """Where the report lies, and what it says."""

    index: Path
    summary: dict[str, Any]
    analysis: Analysis


# ---------------------------------------------------------------- figures


def _figures(
    methods: Sequence[MethodRuns], analysis: Analysis, source: SourceSummary | None, seed: int
) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) in the order of the page."""
    final = {name: intervals.final_return(curves) for name, curves in analysis.curves.items()}
    if all(np.isfinite(values).any() for values in final.values()):
        yield from _result_figures(methods[0], analysis, final, source, seed)
    if any(run for m in methods for run in m.metrics):
        yield (
            "training",
            "Training and validation. Thin lines are runs, thick lines their mean.",
            style.training_curves({m.name: m.metrics for m in methods}),
        )
    if source is not None:
        yield from _history_figures(source)


def _result_figures(
    base: MethodRuns, analysis: Analysis, final: dict[str, Floats], source: SourceSummary | None, seed: int
) -> Iterator[tuple[str, str, Figure]]:
    learning, rows = None, _rows(source, base.task_ids)
    if source is not None and rows is not None:
        own = intervals.normalise(source.returns[rows], base.random, analysis.optimal)
        learning = intervals.mean(own[:, : base.returns.shape[-1]], axis=0)
    source_name = source.name if source is not None else "source"
    blocks = {name: intervals.in_blocks(curves) for name, curves in analysis.curves.items()}
    bands = {name: intervals.bootstrap_curve(means, seed=seed) for name, (means, _) in blocks.items()}
    _, episodes = blocks[base.name]
    size = -(-base.returns.shape[-1] // len(episodes))
    references = {
        name: intervals.iqm(intervals.in_blocks(curves)[0][0], axis=0)
        for name, curves in analysis.references.items()
    }
    yield (
        "in_context",
        "In-context return on the held-out tasks. The weights are frozen; what improves is what the model "
        f"makes of its growing context. 0 is the uniformly random policy, 1 is {analysis.scale}. The band "
        f"covers {'new training seeds and ' if len(base.seeds) > 1 else ''}new tasks. The source algorithm "
        "is shown as it learns the same tasks from scratch (mean over its streams and the tasks)."
        + (" Dotted: known algorithms, which play the same tasks." if references else "")
        + (f" Points are means of {size} consecutive episodes." if size > 1 else ""),
        style.in_context_curves(
            bands,
            source=None if learning is None else intervals.in_blocks(learning)[0],
            source_name=source_name,
            references=references,
            episodes=episodes,
        ),
    )
    if analysis.regret:
        yield _regret_figure(analysis, seed)
    for key, comparison in zip(analysis.differences, analysis.comparisons, strict=True):
        enough = comparison.n_run >= intervals.MIN_RUNS
        yield (
            f"difference_{comparison.b}",
            f"{comparison.b} minus {comparison.a}, paired by seed and task: interquartile mean and 95 % "
            + ("interval, orange where it excludes 0." if enough else "interval (too few runs to judge)."),
            style.difference_intervals(
                [(METRICS[m], analysis.differences[key][m]) for m in IN_CONTEXT if _defined(m, analysis)],
                title=f"{comparison.b} minus {comparison.a}",
                highlight=enough,
            ),
        )
    labels = [_task_label(source, int(task)) for task in base.task_ids]
    yield (
        "per_task",
        f"Final return of every held-out task. Never solved: below {style.NEVER_SOLVED:g} for every method.",
        style.per_task_scatter(final, labels),
    )
    if source is not None and rows is not None and _is_grid(source.tasks):
        panels: dict[str, Floats] = {f"{source.name} at the end of training": _final_source(source)}
        for name, values in final.items():
            panels[name] = np.full(len(source.task_ids), np.nan)
            panels[name][rows] = values.mean(axis=0)
        yield (
            "goal_map",
            "Final return by goal. Thick frames: held-out goals; dashed: validation goals; grey: not judged.",
            style.goal_map(source.tasks, panels, source.kinds),
        )
    levels = np.linspace(0, 1, 51)
    yield (
        "performance_profile",
        "How many runs and tasks end above each level.",
        style.performance_profile(
            {name: intervals.performance_profile(v, levels, seed=seed) for name, v in final.items()}, levels
        ),
    )


def _regret_figure(analysis: Analysis, seed: int) -> tuple[str, str, Figure]:
    n_episode = next(iter(analysis.regret.values())).shape[-1]
    shown = np.unique(np.linspace(0, n_episode - 1, 60).round().astype(np.int64))
    curves = {name: values[..., shown] for name, values in analysis.regret.items()}
    return (
        "regret",
        "Cumulative regret on the held-out tasks: what the best policy would have earned more in all "
        "episodes so far, mean over runs, tasks and rollouts."
        + (" Dotted: known algorithms, which play the same tasks." if analysis.references else ""),
        cumulative_regret(
            {n: intervals.bootstrap_curve(curves[n], intervals.mean, seed=seed) for n in analysis.curves},
            references={name: curves[name].mean(axis=(0, 1)) for name in analysis.references},
            episodes=shown + 1,
        ),
    )


def _history_figures(source: SourceSummary) -> Iterator[tuple[str, str, Figure]]:
    if source.returns.shape[1]:
        yield (
            "source_learning",
            "The learning histories that the models imitate, all tasks of all parts of the split.",
            style.learning_curves(
                source.returns, name=source.name, optimal=source.optimal, random=source.random
            ),
        )
    if source.trace is not None and np.isfinite(source.trace.probs).any():
        trace = source.trace
        yield (
            "probability_trace",
            "Probability of the executed action under the policy that chose it, and the marked segments: the "
            "stretch of one stream that is marked most nearly by half.",
            style.probability_trace(
                trace.probs,
                trace.mask,
                threshold=source.threshold,
                episode_end=trace.episode_end,
                first_step=trace.first_step,
                title=trace.label,
            ),
        )
    if source.marked_by_phase is not None:
        yield (
            "marked_fraction",
            "Share of marked steps by tenth of the source algorithm's training.",
            style.marked_fraction(source.marked_by_phase),
        )


def _rows(source: SourceSummary | None, task_ids: NDArray[Any]) -> list[int] | None:
    """Where ``task_ids`` stand among the source's tasks; None unless each has a learning curve there."""
    if source is None or source.returns.shape[1] == 0 or not np.isin(task_ids, source.task_ids).all():
        return None
    place = {int(task): row for row, task in enumerate(source.task_ids)}
    return [place[int(task)] for task in task_ids]


def _final_source(source: SourceSummary) -> Floats:
    known = np.where(np.isnan(source.optimal), source.returns.max(axis=1), source.optimal)
    return intervals.final_return(intervals.normalise(source.returns, source.random, known))


def _is_grid(tasks: NDArray[Any]) -> bool:
    whole = tasks.ndim == 2 and tasks.shape[1] == 2 and tasks.dtype.kind in "iu" and (tasks >= 0).all()
    return bool(whole and tasks.max(initial=0) < 64)


def _task_label(source: SourceSummary | None, task: int) -> str:
    if source is None or source.tasks.shape[1] > 4 or task not in source.task_ids:
        return f"task {task}"
    parameters = source.tasks[np.flatnonzero(source.task_ids == task)[0]]
    return "(" + ", ".join(f"{p:g}" for p in parameters) + ")"


# ---------------------------------------------------------------- the report


def build_report(
    out: Path,
    methods: Sequence[MethodRuns],
    *,
    protocol: Protocol,
    source: SourceSummary | None = None,
    seconds: Mapping[str, float] | None = None,
    commands: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    sights: Iterable[tuple[str, str, Figure]] = (),
    title: str = "AD and Compressed AD",
    seed: int = 0,
) -> Report:
    """Write ``index.html``, ``table.csv``, ``summary.json`` and ``figures/*.png`` into the folder ``out``.

    Args:
        methods: the first one is what the others are compared with.
        protocol: what was held equal; printed, and part of the summary.
        source: what the page shows of the histories; left out if None.
        seconds: wall time of the stages "collect", "mark", "train", "evaluate".
        commands: that made these results, in order.
        provenance: versions, hardware, revision, hashes.
        notes: further caveats, one sentence each.
        seed: of the resampling.
        sights: further figures, (file name, caption, figure).
    """
    started = time.perf_counter()
    analysis = analyse(methods, source, seed=seed)
    shown, files = [], set[str]()
    drawn = chain(_figures(methods, analysis, source, seed), sights)
    for number, (name, caption, figure) in enumerate(drawn, start=1):
        save_figure(out / "figures", name, figure, files)
        shown.append({"number": number, "caption": caption, "image": image(figure)})
    times: dict[str, float | None] = {stage: (seconds or {}).get(stage) for stage in STAGES}
    times["report"] = time.perf_counter() - started
    times["total"] = sum(value for value in times.values() if value is not None)
    summary = _summary(methods, analysis, source, protocol, times)
    page = render(
        "report.html.j2",
        title=title,
        analysis=analysis,
        header=_header(analysis),
        table=_cells(analysis),
        regret=_regret_rows(analysis),
        convergence=convergence(methods),
        figures=shown,
        marking=source.marking if source is not None else None,
        protocol=_protocol_rows(protocol, methods, analysis),
        seconds=[(stage, f"{value:,.1f} s") for stage, value in times.items() if value is not None],
        commands=commands,
        provenance=provenance or {},
        fewest=min(len(m.seeds) for m in methods),
        min_runs=intervals.MIN_RUNS,
        transforms=protocol.transforms,
        notes=notes,
    )
    write_atomically(out / "table.csv", _csv(analysis).encode())
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    write_atomically(out / "index.html", page.encode())
    return Report(out / "index.html", summary, analysis)


def _summary(
    methods: Sequence[MethodRuns],
    analysis: Analysis,
    source: SourceSummary | None,
    protocol: Protocol,
    seconds: Mapping[str, float | None],
) -> dict[str, Any]:
    marking = None
    if source is not None and source.marking is not None:
        names = ("total_steps", "compressed_steps", "compression_ratio")
        marking = {name: getattr(source.marking, name) for name in names}

    def plain(table: dict[str, dict[str, Interval]]) -> dict[str, Any]:
        return {name: {key: vars(interval) for key, interval in row.items()} for name, row in table.items()}

    content: dict[str, Any] = {
        "verdict": analysis.verdict,
        "methods": plain(analysis.methods),
        "differences": plain(analysis.differences),
        "regret": {name: vars(interval) for name, interval in analysis.total_regret.items()},
        "references": {name: {"final": _final(curves)} for name, curves in analysis.references.items()},
        "marking": marking,
        "seconds": dict(seconds),
        "protocol": {
            "family": protocol.family,
            "split": {part: [int(i) for i in ids] for part, ids in protocol.split.items()},
            "seeds": {name: list(seeds) for name, seeds in analysis.seeds.items()},
            "episodes": int(methods[0].returns.shape[-1]),
            "rollouts": int(methods[0].returns.shape[2]),
            "transforms": list(protocol.transforms),
            "budget": dict(protocol.budget),
        },
    }
    return _strict(content)  # type: ignore[no-any-return]


def _strict(value: Any) -> Any:
    """``value`` with NaN and infinity as None, arrays and tuples as lists: what strict JSON can hold."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _cells(analysis: Analysis) -> list[tuple[str, list[tuple[str, str]]]]:
    """(metric, [(value, interval) per method and difference]) as text; what is not defined is left out."""
    rows = []
    for key, label in METRICS.items():
        if not _defined(key, analysis):
            continue
        cells = [(_number(row[key].iqm), _span(row[key])) for row in analysis.methods.values()]
        cells += [(_number(row[key].iqm, "+"), _span(row[key], "+")) for row in analysis.differences.values()]
        rows.append((label, cells))
    mean = [(_number(row["final"]), "") for row in analysis.means.values()]
    mean += [(_number(c.final_mean.iqm, "+"), _span(c.final_mean, "+")) for c in analysis.comparisons]
    rows.insert(1, ("Final normalised return, plain mean over runs and tasks", mean))
    return rows


def _defined(key: str, analysis: Analysis) -> bool:
    """Whether a metric means something for these methods and this family."""
    if key in SEARCH:
        return analysis.searches
    return key not in IMITATION or any(math.isfinite(row[key].iqm) for row in analysis.methods.values())


def _final(curves: Floats) -> float:
    """Final normalised return, interquartile mean over runs and tasks."""
    return float(intervals.iqm(intervals.final_return(curves).ravel()))


def _regret_rows(analysis: Analysis) -> list[tuple[str, str, str, str]]:
    """(method or reference, final normalised return, total regret, its interval) as text."""
    curves = {**analysis.curves, **analysis.references}
    return [
        (name, _number(_final(curves[name])), _regret_number(total.iqm), _regret_span(total))
        for name, total in analysis.total_regret.items()
    ]


def _regret_number(value: float) -> str:
    return f"{value:z.2f}"


def _regret_span(interval: Interval) -> str:
    low, high = interval.low, interval.high
    return f"{_regret_number(low)} to {_regret_number(high)}" if math.isfinite(low) else ""


def _header(analysis: Analysis) -> list[str]:
    return [*analysis.methods, *(f"{c.b} − {c.a}" for c in analysis.comparisons)]


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}z.3f}" if math.isfinite(value) else "–"


def _span(interval: Interval, sign: str = "") -> str:
    low, high = interval.low, interval.high
    return f"{_number(low, sign)} to {_number(high, sign)}" if math.isfinite(low) else ""


def _csv(analysis: Analysis) -> str:
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["kind", "name", "metric", "iqm", "low", "high", "mean", "runs", "tasks"])
    n_task = len(analysis.optimal)
    for name, row in analysis.methods.items():
        for key, i in row.items():
            n_run = len(analysis.seeds[name])
            write(["method", name, key, i.iqm, i.low, i.high, analysis.means[name][key], n_run, n_task])
    for name, total in analysis.total_regret.items():
        n_run = len(analysis.regret[name])
        write(["regret", name, "regret", "", total.low, total.high, total.iqm, n_run, n_task])
    for (name, row), comparison in zip(analysis.differences.items(), analysis.comparisons, strict=True):
        for key, i in row.items():
            average = comparison.final_mean.iqm if key == "final" else ""
            write(["difference", name, key, i.iqm, i.low, i.high, average, comparison.n_run, n_task])
    return text.getvalue()


def _protocol_rows(
    protocol: Protocol, methods: Sequence[MethodRuns], analysis: Analysis
) -> list[tuple[str, str]]:
    _, n_task, n_rollout, n_episode = methods[0].returns.shape
    split = ", ".join(f"{len(ids)} {part}" for part, ids in protocol.split.items())
    held = ", ".join(str(int(i)) for i in methods[0].task_ids)
    return [
        ("Task family", protocol.family),
        ("Split (tasks)", split),
        ("Judged on tasks", held if n_task <= 40 else f"{n_task} tasks"),
        ("Training seeds", "; ".join(f"{m}: {', '.join(map(str, s))}" for m, s in analysis.seeds.items())),
        ("In-context evaluation", f"{n_episode} episodes, {n_rollout} rollouts per task and run"),
        ("Final", f"mean of the last {intervals.final_episodes(n_episode)} of {n_episode} episodes"),
        ("History transforms", ", ".join(protocol.transforms) or "none"),
        *((key.replace("_", " ").capitalize(), str(value)) for key, value in protocol.budget.items()),
    ]


def terminal_table(analysis: Analysis) -> Group:
    """The comparison for the end of ``cad run``: IQM with interval, paired differences, the verdict."""
    table = Table(title="Held-out tasks: interquartile mean, 95 % interval", title_justify="left")
    table.add_column("", min_width=20)
    for name in _header(analysis):
        table.add_column(Text(name, justify="right"), justify="right", overflow="fold")
    for label, cells in _cells(analysis):
        table.add_row(Text(label), *(Text(f"{value}\n{span}".rstrip()) for value, span in cells))
    parts: list[Table | Text] = [table]
    if analysis.total_regret:
        n_episode = next(iter(analysis.regret.values())).shape[-1]
        regret = Table(title=f"Cumulative regret over {n_episode} episodes: mean", title_justify="left")
        for heading in ("", "regret", "95 % interval", "final normalised return"):
            regret.add_column(Text(heading), justify="right" if heading else "left")
        for name, final, total, span in _regret_rows(analysis):
            regret.add_row(Text(name), total, span, final)
        parts.append(regret)
    if analysis.scale != OPTIMUM:
        scale = f"Normalised return: 0 is the uniformly random policy, 1 is {analysis.scale}."
        parts.append(Text(scale))
    return Group(*parts, Text(analysis.verdict))
