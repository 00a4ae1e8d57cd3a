"""Methods compared: measures with their intervals, paired differences, verdicts, convergence.

A run of the main job and a study are the same experiment with two designs. ``SHARED_DATA``: all runs learn
from one data set and meet the same tasks. ``OWN_DATA``: every run has its own histories, split and seed, so
that the paired difference of two methods, averaged over a run's tasks, is one independent observation. The
design decides the interval, ``crossed_bootstrap`` or ``over_runs``; everything else is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from compressed_ad.errors import UsageError
from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Floats, Interval
from compressed_ad.report.learning import Learning, learning
from compressed_ad.report.measures import (
    ANY,
    MEASURES,
    RETURN,
    VALIDATED,
    cumulative_regret,
    normalise,
    step_to_reach,
)
from compressed_ad.report.results import MethodRuns
from compressed_ad.report.rows import CHANCES, Row
from compressed_ad.report.source import SourceSummary

MIN_RUNS = 3
"""Fewer runs than this never support the word "better"."""
POOLED = "all families"
IQM = "iqm"
OPTIMUM = "the optimal return"
"""What a normalised return of 1 stands for where that is known."""


@dataclass(frozen=True)
class Design:
    """How the runs of an experiment came about; ``interval`` takes scores (R, N) or (R,): runs, tasks."""

    about: str
    interval: Callable[[Floats], Interval]


SHARED_DATA = Design(
    "All runs learn from the same histories and are judged on the same tasks. Intervals resample runs and"
    " tasks together (a crossed bootstrap, widened for their small number): they cover new training seeds and"
    " new tasks, but not other histories or another split.",
    intervals.crossed_bootstrap,
)
OWN_DATA = Design(
    "Each run has its own histories, split and training seed. Intervals are Student's t over runs: they cover"
    " new data, new tasks and new seeds together.",
    intervals.over_runs,
)


# ---------------------------------------------------------------- one comparison


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of two methods on one measure in one family: other minus one."""

    family: str
    one: str
    other: str
    measure: str
    estimate: Interval
    n_run: int  # of a comparison over several families: in the family with the fewest
    p: float = math.nan  # two-sided t-test; NaN for runs that share their data
    p_holm: float = math.nan  # adjusted for all comparisons on this measure; see ``compare``
    gaps: Floats | None = field(default=None, compare=False, repr=False)  # (R, N) or (R,): estimated from
    chance: float = math.nan  # at most, what the spread would be if the same models played again; or unknown

    @property
    def label(self) -> str:
        return f"{self.other} − {self.one}"

    @property
    def detectable(self) -> float:
        """The true difference that this many runs of this spread show with 80 % power; NaN if unknown."""
        return intervals.detectable(self.estimate.spread, self.estimate.n)

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0, with enough runs to say so."""
        return self.n_run >= MIN_RUNS and self.estimate.excludes_zero()

    @property
    def verdict(self) -> str:
        """What the interval says; "before adjustment" if Holm's p does not agree."""
        if math.isnan(self.estimate.value):
            return "not measured"
        if self.n_run < MIN_RUNS:
            return "too few runs"
        if math.isnan(self.estimate.low):
            return "too few tasks"
        if not self.decided:
            return "no difference found"
        better, higher = MEASURES[self.measure].better, self.estimate.low > 0
        words = ("better", "worse") if better else ("higher", "lower")
        said = words[0] if higher == (better >= 0) else words[1]
        return f"{said} before adjustment" if self.p_holm >= 1 - intervals.CONFIDENCE else said

    def sentence(self) -> str:
        """The verdict in words, without its figures."""
        where = f" {'over' if self.family == POOLED else 'on'} {self.family}" if self.family else ""
        measure, verdict, one, other = MEASURES[self.measure], self.verdict, self.one, self.other
        if verdict == "not measured":
            return f"{other} and {one} cannot be compared{where}: no {measure.label.lower()} was measured"
        if verdict == "too few runs":
            needed = f"at least {MIN_RUNS} of each are needed"
            return f"Too few runs to compare {other} with {one}{where}: {needed}"
        if verdict == "too few tasks":
            return f"Too few tasks to compare {other} with {one}{where}: at least 2 must count"
        if verdict == "no difference found":
            return f"No difference found between {other} and {one}{where}"
        said, _, adjustment = verdict.partition(" ")
        where += f", {adjustment} for the number of comparisons" if adjustment else ""
        if measure.better:
            return f"{other} is {said} than {one}{where}"
        return f"{measure.label}: {said} with {other} than with {one}{where}"


Scores = Mapping[tuple[str, str], Mapping[int, ArrayLike]]
"""By (family, method) and run: a number, or (N,) by task. Runs of one number are paired."""


def compare(
    scores: Scores, pairs: Sequence[tuple[str, str]], measure: str, design: Design
) -> list[Difference]:
    """Every pair (one, other) in every family, and over all families if there are several.

    Holm's adjustment is for the number of pairs and families. What is said over all families rests on the
    same runs, and is adjusted for the number of pairs that it is said of: those that every family has.
    """
    found, families = [], dict.fromkeys(family for family, _ in scores)
    for one, other in pairs:
        parts = []
        for family in families:
            a, b = scores.get((family, one), {}), scores.get((family, other), {})
            gaps = np.array([np.subtract(b[run], a[run]) for run in sorted(a) if run in b], np.float64)
            if len(gaps) and (estimate := design.interval(gaps)).n:
                p = intervals.p_value(estimate)
                parts.append(Difference(family, one, other, measure, estimate, estimate.n, p, gaps=gaps))
        found += parts
        if len(parts) == len(families) > 1 and all(part.n_run > 1 for part in parts):
            whole = intervals.pooled([part.estimate for part in parts])
            n_run = min(part.n_run for part in parts)
            found.append(Difference(POOLED, one, other, measure, whole, n_run, intervals.p_value(whole)))
    for pooled in (False, True):
        adjusted = intervals.holm([d.p if (d.family == POOLED) == pooled else math.nan for d in found])
        found = [d if math.isnan(p) else replace(d, p_holm=p) for d, p in zip(found, adjusted, strict=True)]
    return found


def scores_of(rows: Sequence[Row], measure: str) -> Scores:
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row.family, row.variant), {})[row.run] = row[measure]
    return found


def differences(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], measure: str) -> list[Difference]:
    """Every pair (one, other) of variants of a study in every family, and over all families."""
    cells: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        cells.setdefault((row.family, row.variant), {})[row.run] = row

    def chance(d: Difference) -> float:
        one, other = (cells.get((d.family, name), {}) for name in (d.one, d.other))
        shared = [(one[run], other[run]) for run in one if run in other]
        if any(a.weights == b.weights for a, b in shared):
            return math.nan  # the same weights with the same seed have the same luck
        column = CHANCES.get(measure, "")
        # An upper bound: rollouts of the same number share their seed, and so do a little alike.
        return math.sqrt(intervals.mean([a[column] ** 2 + b[column] ** 2 for a, b in shared]))

    found = compare(scores_of(rows, measure), pairs, measure, OWN_DATA)
    return [replace(d, chance=chance(d)) for d in found]


def means(rows: Sequence[Row], measure: str) -> dict[tuple[str, str], Interval]:
    """Mean of ``measure`` over the runs of each (family, variant) of a study."""
    scores = scores_of(rows, measure)
    return {key: intervals.over_runs(np.array([*runs.values()])) for key, runs in scores.items()}


# ---------------------------------------------------------------- the methods of one run


@dataclass(frozen=True)
class Analysis:
    """All statistics of a report, of every method and of every method against the first one.

    Keys of the inner mappings are those of ``MEASURES``, for means over runs and tasks, and ``IQM``, for the
    interquartile mean of the measure that the verdict rests on.
    """

    metric: str  # the measure that the verdict rests on
    methods: dict[str, dict[str, Interval]]
    pairs: dict[str, dict[str, Difference]]  # by "B-A"
    improvement: dict[str, Interval]  # by "B-A": probability that a run of B beats one of A on a random task
    scores: dict[str, dict[str, Floats]]  # (R, N), or (R,) for measures of whole runs
    curves: dict[str, Floats]  # (R, N, E) normalised, mean over rollouts
    seeds: dict[str, tuple[int, ...]]
    learning: list[Learning]  # in context, by method
    scale: str  # what a normalised return of 1 stands for
    optimal: Floats  # (N,) the return that 1 stands for
    references: dict[str, Floats]  # (1, N, E) of known algorithms, normalised as ``curves``
    regret: dict[str, Floats]  # (R, N, E) see ``cumulative_regret``: methods, then references
    total_regret: dict[str, Interval]  # mean over runs and tasks, at the end

    @property
    def verdicts(self) -> list[str]:
        """What is said of each compared method, and the figures that it rests on."""
        said = []
        for row in self.pairs.values():
            d = row[self.metric]
            figures = (
                f" Mean paired difference of the {MEASURES[d.measure].label.lower()}: {d.estimate.text('+')};"
                f" {d.n_run} run{'s' * (d.n_run != 1)} each, {self._tasks(d)}."
            )
            if math.isnan(d.estimate.value):
                figures = f" {self._tasks(d)}." if np.isfinite(self.optimal).any() else ""
            said.append(f"{d.sentence()}.{figures}")
        n_run, n_task, _ = next(iter(self.curves.values())).shape
        size = f"{n_run} run{'s' * (n_run != 1)}, {n_task} held-out task{'s' * (n_task != 1)}"
        return said or [f"Only one method was evaluated ({size}), so there is nothing to compare."]

    def _tasks(self, d: Difference) -> str:
        """How many tasks ``d`` rests on, and why the others do not count."""
        n_task = n_counted = len(self.optimal)
        if d.gaps is not None and d.gaps.ndim == 2:
            n_counted = int(intervals.counted(d.gaps)[1].sum())
        if n_counted == n_task:
            return f"{n_task} held-out task{'s' * (n_task != 1)}"
        verb = "counts" if n_counted == 1 else "count"
        why = "the random policy does as well as the best return known, or none is known"
        return f"{n_counted} of {n_task} held-out tasks {verb} (the others have no scale: {why})"

    @property
    def shown(self) -> list[str]:
        """Keys for a table: the verdict's, and all others that have a value."""
        measured = {k for row in self.methods.values() for k, i in row.items() if math.isfinite(i.value)}
        keys = [k for k, m in MEASURES.items() if k == self.metric or (m.listed and k in measured)]
        place = keys.index(self.metric) + 1
        return [*keys[:place], IQM, *keys[place:]]


def analyse(
    methods: Sequence[MethodRuns],
    source: SourceSummary | None = None,
    *,
    metric: str = "final",
    seed: int = 0,
) -> Analysis:
    """Compare every method with the first one, over the seeds they share, on the same tasks.

    Where the optimal return of a task is unknown, a normalised return of 1 stands for the best episode
    (mean over streams) of the source algorithm on that task. ``seed`` is that of the resampling.
    """
    _check_methods(methods)
    base = methods[0]
    optimal, scale = np.array(base.optimal, dtype=np.float64), OPTIMUM
    if (unknown := np.isnan(optimal)).any():
        scale = "the best episode of the source algorithm (the optimal return is unknown)"
        if source is not None and source.returns.shape[1]:
            best = dict(zip(source.task_ids.tolist(), source.returns.max(axis=1), strict=True))
            optimal[unknown] = [best.get(task, math.nan) for task in base.task_ids[unknown].tolist()]
    scaled = {m.name: replace(m, optimal=optimal) for m in methods}
    scores: dict[str, dict[str, Floats]] = {name: {} for name in scaled}
    found: dict[str, dict[str, Interval]] = {name: {} for name in scaled}
    pairs: dict[str, dict[str, Difference]] = {f"{m.name}-{base.name}": {} for m in methods[1:]}
    for key, statistic in [*((key, intervals.mean) for key in MEASURES), (IQM, intervals.iqm)]:
        measure = MEASURES[metric if key == IQM else key]
        limits = ANY if measure.limits == RETURN and scale != OPTIMUM else measure.limits
        estimate = partial(intervals.crossed_bootstrap, statistic=statistic, seed=seed)
        for name, m in scaled.items():
            # Runs that share their data cannot differ in what is a property of the data.
            nothing = np.full(len(m.seeds), np.nan)
            scores[name][key] = nothing if measure.needs == "own data" else measure.scores(m)
            found[name][key] = estimate(scores[name][key], limits=limits)
        by_run = {("", m.name): dict(zip(m.seeds, scores[m.name][key], strict=True)) for m in methods}
        others = [(base.name, m.name) for m in methods[1:]]
        reach = (limits[0] - limits[1], limits[1] - limits[0])  # of a difference
        design = replace(SHARED_DATA, interval=partial(estimate, limits=reach))
        for d in compare(by_run, others, measure.key, design):
            pairs[f"{d.other}-{d.one}"][key] = d
    improvement = {}
    for method in methods[1:]:
        shared = [seed for seed in base.seeds if seed in method.seeds]
        ends = (scores[m.name][metric][[m.seeds.index(k) for k in shared]] for m in (base, method))
        improvement[f"{method.name}-{base.name}"] = intervals.probability_of_improvement(*ends, seed=seed)
    regret = cumulative_regret(methods)
    curves = {name: m.curves for name, m in scaled.items()}
    return Analysis(
        metric=metric,
        methods=found,
        pairs=pairs,
        improvement=improvement,
        scores=scores,
        curves=curves,
        seeds={m.name: m.seeds for m in methods},
        learning=learning(curves, seed=seed),
        scale=scale,
        optimal=optimal,
        references={
            name: normalise(returns, base.random, optimal).mean(axis=1)[None]
            for name, returns in base.references.items()
        },
        regret=regret,
        total_regret={name: intervals.crossed_bootstrap(x[..., -1], seed=seed) for name, x in regret.items()},
    )


def _check_methods(methods: Sequence[MethodRuns]) -> None:
    if not methods:
        raise UsageError("a report needs at least one method")
    base, names = methods[0], [m.name for m in methods]
    if len(set(names)) < len(names):
        raise UsageError(f"two methods have the same name: {', '.join(names)}")
    for method in methods[1:]:
        both = f"{method.name} and {base.name} were evaluated"
        if not np.array_equal(method.task_ids, base.task_ids):
            raise UsageError(f"{both} on different tasks: not comparable")
        if method.returns.shape[-1] != base.returns.shape[-1]:
            raise UsageError(f"{both} for different numbers of episodes")
        if not set(method.seeds) & set(base.seeds):
            seeds = " and ".join(f"{m.name} (seeds {m.seeds})" for m in (base, method))
            raise UsageError(f"{seeds} share no training seed")


# ---------------------------------------------------------------- convergence


@dataclass(frozen=True)
class Convergence:
    """How soon the runs of a method validate as well as the baseline does at its end."""

    family: str
    method: str
    measure: str
    level: float  # mean over runs of the baseline's last value
    steps: float  # median over runs; infinity if the median run never gets there
    reached: int
    runs: int

    @property
    def when(self) -> str:
        return f"{self.steps:.0f}" if math.isfinite(self.steps) else "never"


def convergence(
    points: Sequence[Row], baseline: str, measures: Sequence[str] = tuple(VALIDATED)
) -> list[Convergence]:
    """The guide's "convergence speed": gradient steps until a run is as good as the baseline at its end.

    The level of a run is the last value of the baseline's run with which it is paired. A run that never gets
    there counts as infinitely late, so that methods of which different runs get there can be compared.
    """
    found = []
    for measure in measures:
        sign = -1.0 if measure == "validation_excess_cross_entropy" else 1.0
        curves: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
        for point in points:
            runs = curves.setdefault((point.family, point.variant), {})
            if not math.isnan(point[measure]):
                runs.setdefault(point.run, []).append((point["step"], sign * point[measure]))
        for (family, method), runs in curves.items():
            base = {run: sorted(curve) for run, curve in curves.get((family, baseline), {}).items()}
            shared = [run for run in runs if len(base.get(run, ())) > 1]
            if not shared:
                continue
            levels = [base[run][-1][1] for run in shared]
            by_run = [np.array(sorted(runs[run])).T for run in shared]
            steps = [step_to_reach(x, y, level) for (x, y), level in zip(by_run, levels, strict=True)]
            reached = int(np.isfinite(steps).sum())
            level, median = sign * float(np.mean(levels)), float(np.median(steps))
            found.append(Convergence(family, method, measure, level, median, reached, len(shared)))
    return found


def convergence_table(found: Sequence[Convergence]) -> list[list[str]]:
    """Header and one line per family, method and measure; empty if nothing was recorded."""
    head = ["Family", "Variant", "Measure", "Baseline's last", "Steps to reach it, median", "Runs that do"]
    lines = []
    for c in found:
        cells = [VALIDATED[c.measure], intervals.number(c.level), c.when, f"{c.reached} of {c.runs}"]
        lines.append([c.family, c.method, *cells])
    first = 0 if any(c.family for c in found) else 1
    return [line[first:] for line in [head, *lines]] if lines else []
