"""The comparison of trained methods as one self-contained page, and in files for scripts.

``load_runs`` and ``summarise_source`` (``results``) read what training and collection left behind,
``analyse`` turns it into intervals and verdicts, ``build_report`` writes them down. Every method is compared
with the first one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import listed
from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Floats, Interval
from compressed_ad.files import json_value, write_atomically, write_json
from compressed_ad.report import comparison
from compressed_ad.report.comparison import IQM, MIN_RUNS, Analysis, analyse
from compressed_ad.report.learning import learning_sentence
from compressed_ad.report.measures import final_episodes, final_return
from compressed_ad.report.pages import Drawn, Rendered, keep_figures, rendered, write_page
from compressed_ad.report.results import MethodRuns
from compressed_ad.report.rows import csv_text, text_cell
from compressed_ad.report.run_figures import comparison_figures
from compressed_ad.report.run_tables import caption, header, lines, notes_below, tables
from compressed_ad.report.source import SourceSummary
from compressed_ad.report.tables import write_tables
from compressed_ad.tasks.limits import Limit
from compressed_ad.workers import Pool, Report, ShouldStop, TimedParts, WorkerPool, silent


@dataclass(frozen=True)
class Experiment:
    """How the methods were trained and judged, as far as the runs do not tell it themselves."""

    family: str
    split: Mapping[str, Sequence[int]]  # "train", "validation", "heldout": task ids
    transforms: Sequence[str]
    budget: Mapping[str, Any]  # gradient steps, batch size, ... the same for all methods


@dataclass(frozen=True)
class WrittenReport:
    """Where the report lies, and what it says."""

    index: Path
    summary: dict[str, Any]
    analysis: Analysis


def build_report(
    out: Path,
    methods: Sequence[MethodRuns],
    *,
    experiment: Experiment,
    source: SourceSummary | None = None,
    seconds: Mapping[str, float] | None = None,
    commands: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    further: Mapping[str, Callable[[Report], Iterable[Drawn]]] | None = None,
    title: str | None = None,
    formats: Collection[str] = ("png", "svg"),
    seed: int = 0,
    pool: Pool | None = None,
    progress: Report = silent,
) -> WrittenReport:
    """Write ``index.html``, ``table.csv``, ``summary.json``, ``figures/`` and ``tables/`` into ``out``.

    Args:
        methods: the first one is what the others are compared with.
        experiment: what was held equal; printed, and part of the summary.
        source: what the page shows of the histories; left out if None.
        seconds: wall time of the stages "collect", "mark", "train", "evaluate".
        commands: that made these results, in order.
        provenance: versions, hardware, revision, hashes.
        notes: further caveats, one sentence each.
        further: figures of single runs, (file name, caption, figure), by what the progress calls them.
        formats: of the files in ``figures``, of ``png``, ``svg``, ``pdf``.
        seed: of the resampling.
        pool: draws the figures, those of ``further`` beside the others; by default this process.
        progress: told how much is drawn.
    """
    started = time.perf_counter()
    analysis = analyse(methods, source, seed=seed)
    parts = {"results": partial(comparison_figures, methods, analysis, source, seed), **(further or {})}
    drawn = (pool or WorkerPool(1)).run(
        _draw,
        {name: (part, formats) for name, part in parts.items()},
        progress=TimedParts(progress, dict.fromkeys(parts, 1)),
        retry=True,
    )
    shown = keep_figures(out / "figures", chain.from_iterable(drawn[name] for name in parts), formats)
    shown_tables = tables(analysis, methods)
    write_tables(out / "tables", shown_tables)
    stages = ("collect", "mark", "train", "evaluate")
    times: dict[str, float | None] = {stage: (seconds or {}).get(stage) for stage in stages}
    times["report"] = time.perf_counter() - started
    times["total"] = sum(value for value in times.values() if value is not None)
    summary = _summary(methods, analysis, source, experiment, times)
    write_atomically(out / "table.csv", _csv(analysis).encode())
    write_json(out / "summary.json", summary)
    write_page(
        out / "index.html",
        "report.html.j2",
        title=title or f"{listed(analysis.methods)} on {experiment.family}",
        sections=[
            ("results", "results"),
            *((table.name, table.title.lower()) for table in shown_tables[1:]),
            ("protocol", "protocol"),
            ("limits", "what to keep in mind"),
            ("time", "time and versions"),
        ],
        analysis=analysis,
        learning=summary["learning"],
        design=comparison.SHARED_DATA.about,
        header=header(analysis),
        table=lines(analysis),
        notes_below=notes_below(analysis),
        caption=caption(analysis, "below it"),
        tables=shown_tables[1:],
        figures=shown,
        marking=source.marking.text(source.marker) if source is not None and source.marking else None,
        experiment=_experiment_rows(experiment, methods, analysis),
        seconds=[(stage, f"{value:,.1f} s") for stage, value in times.items() if value is not None],
        commands=commands,
        provenance=provenance or {},
        shortfall="" if source is None else source.shortfall,
        fewest=min(len(m.seeds) for m in methods),
        min_runs=MIN_RUNS,
        transforms=experiment.transforms,
        notes=notes,
    )
    return WrittenReport(out / "index.html", summary, analysis)


def _draw(
    part: Callable[[Report], Iterable[Drawn]],
    formats: Collection[str],
    *,
    report: Report,
    should_stop: ShouldStop,
) -> list[Rendered]:
    return rendered(part(report), formats)


# ---------------------------------------------------------------- facts


def _experiment_rows(
    experiment: Experiment, methods: Sequence[MethodRuns], analysis: Analysis
) -> list[tuple[str, str]]:
    _, n_task, n_rollout, n_episode = methods[0].returns.shape
    split = ", ".join(f"{len(ids)} {part}" for part, ids in experiment.split.items())
    held = ", ".join(str(int(i)) for i in methods[0].task_ids)
    return [
        ("Task family", experiment.family),
        ("Split (tasks)", split),
        ("Judged on tasks", held if n_task <= 40 else f"{n_task} tasks"),
        ("Training seeds", "; ".join(f"{m}: {', '.join(map(str, s))}" for m, s in analysis.seeds.items())),
        ("In-context evaluation", f"{n_episode} episodes, {n_rollout} rollouts per task and run"),
        ("Final", f"mean of the last {final_episodes(n_episode)} of {n_episode} episodes"),
        *_limit_row(methods[0].limit, n_episode),
        ("History transforms", ", ".join(experiment.transforms) or "none"),
        *(
            (key.replace("_", " ").capitalize(), f"{n:,}" if isinstance(n, int | np.integer) else str(n))
            for key, n in experiment.budget.items()
        ),
    ]


def _limit_row(limit: Limit | None, n_episode: int) -> list[tuple[str, str]]:
    if limit is None:
        return []
    reached, bound = (f"{x(n_episode):.4f}" for x in (limit.area, limit.bound_area))
    about = "area under the curve of an agent that knows the family, but not which of its tasks it plays"
    return [("Limit", f"{reached}, the {about}; none exceeds {bound}")]


# ---------------------------------------------------------------- files for scripts


def _summary(
    methods: Sequence[MethodRuns],
    analysis: Analysis,
    source: SourceSummary | None,
    experiment: Experiment,
    seconds: Mapping[str, float | None],
) -> dict[str, Any]:
    marking = None
    if source is not None and source.marking is not None:
        names = ("total_steps", "compressed_steps", "compression_ratio")
        marking = {name: getattr(source.marking, name) for name in names}
    found: dict[str, dict[str, dict[str, Any]]] = {"method": {}, "difference": {}, "regret": {}}
    for kind, name, key, i, scores in _estimates(analysis):
        middles = {"mean": float(intervals.mean(scores.ravel())), "iqm": float(intervals.iqm(scores.ravel()))}
        entry = {**middles, "low": i.low, "high": i.high, "interval_of": i.of}
        found[kind].setdefault(name, {})[key] = entry
    content: dict[str, Any] = {
        "learning": learning_sentence(analysis.learning),
        "verdict": " ".join(analysis.verdicts),
        "methods": found["method"],
        "differences": found["difference"],
        "iqm_of_differences": "the interquartile mean of the paired differences, which need not be the"
        " difference of the methods' interquartile means",
        "regret": {name: row["regret"] for name, row in found["regret"].items()},
        "references": {
            name: {
                "final": float(intervals.mean(final_return(curves).ravel())),
                "auc": float(intervals.mean(curves.ravel())),
            }
            for name, curves in analysis.references.items()
        },
        "marking": marking,
        "seconds": dict(seconds),
        "protocol": {
            "family": experiment.family,
            "split": {part: [int(i) for i in ids] for part, ids in experiment.split.items()},
            "seeds": {name: list(seeds) for name, seeds in analysis.seeds.items()},
            "episodes": int(methods[0].returns.shape[-1]),
            "rollouts": int(methods[0].returns.shape[2]),
            "transforms": list(experiment.transforms),
            "budget": dict(experiment.budget),
        },
    }
    return json_value(content)  # type: ignore[no-any-return]


def _estimates(analysis: Analysis) -> Iterator[tuple[str, str, str, Interval, Floats]]:
    """(kind, name, measure, interval, the scores that it is of)."""
    for name, row in analysis.methods.items():
        for key, i in row.items():
            yield "method", name, key, i, analysis.scores[name][key]
    for name, differences in analysis.pairs.items():
        for key, d in differences.items():
            yield "difference", name, key, d.estimate, np.asarray(d.gaps)
    for name, i in analysis.total_regret.items():
        yield "regret", name, "regret", i, analysis.regret[name][..., -1]


def _csv(analysis: Analysis) -> str:
    table: list[list[Any]] = [
        ["kind", "name", "metric", "mean", "low", "high", "iqm", "runs", "tasks", "interval_of"]
    ]
    for kind, name, key, i, scores in _estimates(analysis):
        of_mean = i.of == "mean"
        # The interquartile mean of paired differences stands only where the line says what it is.
        middle = "" if kind == "difference" and of_mean else float(intervals.iqm(scores.ravel()))
        kind = "iqm of differences" if kind == "difference" and not of_mean else kind
        n_task = intervals.counted(scores)[1].sum() if scores.ndim == 2 else len(analysis.optimal)
        numbers = [i.value if of_mean else "", i.low, i.high, middle, i.n, n_task]
        shown = ["" if x == "" or math.isnan(float(x)) else x for x in numbers]
        table.append([kind, text_cell(name), analysis.metric if key == IQM else key, *shown, i.of])
    return csv_text(table)
