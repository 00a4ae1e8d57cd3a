"""The comparison of trained methods as one self-contained page, and in files for scripts.

``load_runs`` and ``summarise_source`` (``results``) read what training and collection left behind,
``analyse`` turns it into intervals and verdicts, ``build_report`` writes them down. Every method is compared
with the first one.
"""

from __future__ import annotations

import csv
import io
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
from compressed_ad.report.comparison import IQM, MIN_RUNS, Analysis, Difference, analyse
from compressed_ad.report.figures import histories, returns
from compressed_ad.report.figures.comparison import forest
from compressed_ad.report.heldout import draw_in_context, source_learning, source_rows
from compressed_ad.report.learning import learning_sentence
from compressed_ad.report.measures import MEASURES, final_episodes, final_return, in_blocks, normalise
from compressed_ad.report.pages import Drawn, Rendered, keep_figures, rendered, write_page
from compressed_ad.report.results import MethodRuns
from compressed_ad.report.rows import text_cell
from compressed_ad.report.run_tables import caption, header, lines, notes_below, tables
from compressed_ad.report.source import SourceSummary
from compressed_ad.report.tables import write_tables
from compressed_ad.tasks.limits import Limit
from compressed_ad.workers import Parts, Pool, Report, ShouldStop, WorkerPool, silent


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
    parts = {"results": partial(_figures, methods, analysis, source, seed), **(further or {})}
    drawn = (pool or WorkerPool(1)).run(
        _draw,
        {name: (part, formats) for name, part in parts.items()},
        progress=Parts(progress, dict.fromkeys(parts, 1), unit=100),
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


# ---------------------------------------------------------------- figures


def _draw(
    part: Callable[[Report], Iterable[Drawn]],
    formats: Collection[str],
    *,
    report: Report,
    should_stop: ShouldStop,
) -> list[Rendered]:
    return rendered(part(report), formats)


def _figures(
    methods: Sequence[MethodRuns],
    analysis: Analysis,
    source: SourceSummary | None,
    seed: int,
    report: Report,
) -> Iterator[Drawn]:
    if all(np.isfinite(row[analysis.metric]).any() for row in analysis.scores.values()):
        yield from _result_figures(methods[0], analysis, source, seed)
    if any(run for m in methods for run in m.metrics):
        validated = _by_method(analysis, "validation_return")
        yield (
            "training",
            "Training, and validation on the validation tasks. Of validations, thin lines are runs, thick"
            " lines their mean; of the loss, the mean."
            + (f" At the end they return, normalised, {validated}." if validated else ""),
            histories.training_curves({"": {m.name: m.metrics for m in methods}}),
        )
    if source is None:
        return
    if source.returns.shape[1]:
        levels: Any = {"optimal": source.optimal, "random": source.random}
        tenth = final_episodes(source.returns.shape[1])
        begins, ends = source.returns[:, :tenth].mean(), source.returns[:, -tenth:].mean()
        yield (
            "source_learning",
            "The learning histories that the models imitate: all tasks of all parts of the split. The mean"
            f" return is {begins:.2f} in the first tenth of the episodes and {ends:.2f} in the last.",
            histories.learning_curves(source.returns, name=source.name, **levels),
        )
    if (t := source.trace) is not None and np.isfinite(t.probs).any():
        places: Any = {"episode_end": t.episode_end, "first_step": t.first_step, "title": t.label}
        yield (
            "probability_trace",
            f"Probability of the executed action under the policy that chose it: {len(t.probs)} steps of "
            f"one stream, of which {t.mask.mean():.0%} are marked (shaded).",
            histories.probability_trace(t.probs, t.mask, threshold=source.threshold, **places),
        )
    if source.marked_by_phase is not None:
        first, *_, last = intervals.mean(source.marked_by_phase, axis=0)
        yield (
            "marked_fraction",
            "Share of marked steps by tenth of the source's training: mean over all tasks; the bands hold "
            f"the middle 50 % and 80 % of the tasks. It is {first:.0%} in the first tenth, {last:.0%} in the"
            " last.",
            histories.marked_by_tenth({"": {source.name: source.marked_by_phase}}),
        )


def _result_figures(
    base: MethodRuns, analysis: Analysis, source: SourceSummary | None, seed: int
) -> Iterator[Drawn]:
    places = {task: k for k, task in enumerate([] if source is None else source.task_ids.tolist())}
    tasks: list[int] = base.task_ids.tolist()
    rows = source_rows(base, source)
    labels = [f"task {task}" for task in tasks]
    if source is not None and source.tasks.shape[1] <= 4:
        words = [", ".join(f"{p:g}" for p in parameters) for parameters in source.tasks]
        labels = [f"({words[places[t]]})" if t in places else f"task {t}" for t in tasks]
    scores = {name: row[analysis.metric] for name, row in analysis.scores.items()}
    n_episode = base.returns.shape[-1]
    _, episodes = in_blocks(np.zeros(n_episode))
    size, limit = -(-n_episode // len(episodes)), base.limit
    learning = source_learning(base, analysis, source)
    yield (
        "in_context",
        "In-context return on the held-out tasks: mean over runs and tasks. The weights are frozen: a model "
        "can improve only by what its context holds. 0 is the uniformly random policy, 1 is "
        f"{analysis.scale}. In the last tenth of the episodes: {_by_method(analysis, 'final')}."
        + f" The band covers {'new training seeds and ' * (len(base.seeds) > 1)}new tasks."
        + (" Dashed: the limit, of an agent that knows the room, but not the task." if limit else "")
        + ("" if learning is None else _from_scratch(learning, episodes))
        + (" Dotted: known algorithms on the same tasks." if analysis.references else "")
        + (f" Points are means of {size} consecutive episodes." if size > 1 else ""),
        draw_in_context(base, analysis, source, seed=seed),
    )
    if analysis.regret:
        yield _regret_figure(analysis, seed)
    for row in analysis.pairs.values():
        d = row[analysis.metric]
        shown = [(MEASURES[key].label, row[key]) for key in analysis.shown if key != IQM]
        yield (
            f"difference_{d.other}",
            f"{d.other} minus {d.one}, paired by training seed and task: mean and 95 % interval. "
            + (_excluding(shown) if d.n_run >= MIN_RUNS else f"{MIN_RUNS} runs are needed to judge."),
            forest({d.label: shown}, "mean paired difference"),
        )
    # As the figure counts them.
    never = int(np.all([v.mean(axis=0) < returns.NEVER_SOLVED for v in scores.values()], axis=0).sum())
    yield (
        "per_task",
        f"Final return by held-out task. Never solved, below {returns.NEVER_SOLVED:g} for every method:"
        f" {never or 'none'} of {len(tasks)}.",
        returns.per_task_scatter(scores, labels),
    )
    cells = np.empty(0) if source is None else source.tasks
    on_grid = cells.shape[1:] == (2,) and cells.dtype.kind in "iu" and cells.min() >= 0 and cells.max() < 64
    if source is not None and rows is not None and on_grid:
        top = np.where(np.isnan(source.optimal), source.returns.max(axis=1), source.optimal)
        learned = final_return(normalise(source.returns, source.random, top))
        maps: dict[str, Floats] = {f"{source.name} at the end of training": learned}
        for name, values in scores.items():
            maps[name] = np.full(len(source.task_ids), np.nan)
            maps[name][rows] = values.mean(axis=0)
        yield (
            "goal_map",
            "Final return by goal. Thick frames: held-out goals; dashed: validation goals; grey: not judged.",
            returns.goal_map(source.tasks, maps, source.kinds),
        )
    levels = np.linspace(0, 1, 51)
    profiles = {name: intervals.performance_profile(v, levels, seed=seed) for name, v in scores.items()}
    half = ", ".join(f"{name} {(v > 0.5).sum() / np.isfinite(v).sum():.0%}" for name, v in scores.items())
    caption = f"Share of runs and tasks whose final return is above each level; above one half: {half}."
    yield "performance_profile", caption, returns.performance_profile(profiles, levels)


def _by_method(analysis: Analysis, key: str) -> str:
    """``AD 0.867, CompressedAD 0.902`` for a measure; empty if it was not measured."""
    known = {name: row[key].value for name, row in analysis.methods.items() if math.isfinite(row[key].value)}
    return ", ".join(f"{name} {intervals.number(value)}" for name, value in known.items())


def _from_scratch(learning: Floats, episodes: Floats) -> str:
    last = len(learning) - 1
    return (
        " The source algorithm learns the same tasks from scratch: it is at"
        f" {intervals.number(float(learning[last]))} by episode {episodes[last]:.0f}."
    )


def _excluding(shown: Sequence[tuple[str, Difference]]) -> str:
    decided = [label.lower() for label, d in shown if d.decided]
    return f"Filled: it excludes 0 ({', '.join(decided)})." if decided else "None excludes 0."


def _regret_figure(analysis: Analysis, seed: int) -> Drawn:
    n_episode = next(iter(analysis.regret.values())).shape[-1]
    shown = np.unique(np.linspace(0, n_episode - 1, 60).round().astype(np.int64))
    curves = {name: values[..., shown] for name, values in analysis.regret.items()}
    return (
        "regret",
        "Cumulative regret on the held-out tasks: what the best policy would have earned more in all "
        "episodes so far, mean over runs, tasks and rollouts."
        + (" Dotted: known algorithms on the same tasks." if analysis.references else ""),
        returns.cumulative_regret(
            {name: intervals.bootstrap_curve(curves[name], seed=seed) for name in analysis.curves},
            references={name: curves[name].mean(axis=(0, 1)) for name in analysis.references},
            episodes=shown + 1,
        ),
    )


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
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["kind", "name", "metric", "mean", "low", "high", "iqm", "runs", "tasks", "interval_of"])
    for kind, name, key, i, scores in _estimates(analysis):
        of_mean = i.of == "mean"
        # The interquartile mean of paired differences stands only where the line says what it is.
        middle = "" if kind == "difference" and of_mean else float(intervals.iqm(scores.ravel()))
        kind = "iqm of differences" if kind == "difference" and not of_mean else kind
        n_task = intervals.counted(scores)[1].sum() if scores.ndim == 2 else len(analysis.optimal)
        numbers = [i.value if of_mean else "", i.low, i.high, middle, i.n, n_task]
        shown = ["" if x == "" or math.isnan(float(x)) else x for x in numbers]
        write([kind, text_cell(name), analysis.metric if key == IQM else key, *shown, i.of])
    return text.getvalue()
