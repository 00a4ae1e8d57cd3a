"""What a study's rows say: means, paired differences with intervals, what could have been seen, verdicts.

Every run has its own histories, split and training seed, so runs are independent replicates and the paired
difference of two variants, averaged over a run's held-out tasks, is one observation. Intervals are Student's
t over runs: they cover new data, new tasks and new seeds together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy

from compressed_ad.report.study_rows import Point, Row
from compressed_ad.training.flops import action_flops, training_flops
from compressed_ad.types import FloatArray

if TYPE_CHECKING:
    from compressed_ad.runs.study import Study

MEASURES = {
    "final": "Final return",
    "auc": "Area under the curve",
    "found_by_10": "Met by episode 10",
    "found": "Met at all",
    "success_given_found": "Final if met",
    "accuracy": "Accuracy",
    "excess_cross_entropy": "Excess cross-entropy",
    "training_final": "Final, training tasks",
    "generalisation": "Held-out − training",
    "validation_return": "Validation return",
    "marked": "Marked",
}
"""Columns of a study's table; keys are fields of ``Row``."""

POWER = 0.8
LEVEL = 0.95
MIN_RUNS = 3
POOLED = "all families"


@dataclass(frozen=True)
class Mean:
    """A mean over n runs with its 95 % interval (NaN for one run) and the spread between runs."""

    mean: float
    low: float
    high: float
    spread: float
    n: int


@dataclass(frozen=True)
class Difference:
    """One comparison in one family: other minus one, paired by run."""

    family: str
    one: str
    other: str
    measure: str
    estimate: Mean
    detectable: float  # the true difference that this many runs of this spread show with 80 % power
    p: float  # two-sided t-test
    fewest: int  # runs in the family with the fewest
    p_holm: float = math.nan  # adjusted for all comparisons of the study on this measure

    @property
    def verdict(self) -> str:
        """What the interval says; "before adjustment" if Holm's p does not agree."""
        if self.fewest < MIN_RUNS:
            return "too few runs"
        if self.estimate.low <= 0 <= self.estimate.high:
            return "no difference found"
        said = "better" if self.estimate.low > 0 else "worse"
        return said if not self.p_holm >= 1 - LEVEL else f"{said} before adjustment"


def mean_of(values: Sequence[float] | FloatArray) -> Mean:
    """Mean of independent runs (R,); NaN are left out."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    n = len(known)
    if n == 0:
        return Mean(math.nan, math.nan, math.nan, math.nan, 0)
    middle = float(known.mean())
    if n == 1:
        return Mean(middle, math.nan, math.nan, math.nan, 1)
    spread = float(known.std(ddof=1))
    half = float(scipy.special.stdtrit(n - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(n)
    return Mean(middle, middle - half, middle + half, spread, n)


def detectable(spread: float, n: int) -> float:
    """The true mean difference that a paired t-test on ``n`` runs finds with 80 % power at level .05.

    (t(.975) + t(.8)) * spread / sqrt(n), Student's t with n - 1 degrees of freedom: the usual approximation
    (Cohen 1988, chapter 2), within 2 % of the noncentral t from n = 5 on.
    """
    if n < 2:
        return math.nan
    quantiles = scipy.special.stdtrit(n - 1, (1 + LEVEL) / 2) + scipy.special.stdtrit(n - 1, POWER)
    return float(quantiles) * spread / math.sqrt(n)


def means(rows: Sequence[Row], measure: str) -> dict[tuple[str, str], Mean]:
    """Mean of ``measure`` by (family, variant)."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.family, row.variant), []).append(getattr(row, measure))
    return {key: mean_of(values) for key, values in found.items()}


def differences(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], measure: str) -> list[Difference]:
    """Every pair (one, other) in every family, and over all families if there are several; Holm-adjusted."""
    values = {row.key: float(getattr(row, measure)) for row in rows}
    families = list(dict.fromkeys(row.family for row in rows))
    found = []
    for one, other in pairs:
        estimates = []
        for family in families:
            runs = sorted({run for f, v, run in values if f == family and v == one})
            gaps = [
                values[family, other, run] - values[family, one, run]
                for run in runs
                if (family, other, run) in values
            ]
            estimate = mean_of(gaps)
            if estimate.n == 0:
                continue
            estimates.append(estimate)
            found.append(_difference(family, one, other, measure, estimate, estimate.n))
        if len(estimates) > 1 and all(e.n > 1 for e in estimates):
            fewest = min(e.n for e in estimates)
            found.append(_difference(POOLED, one, other, measure, _pooled(estimates), fewest))
    return _holm(found)


def _difference(family: str, one: str, other: str, measure: str, estimate: Mean, fewest: int) -> Difference:
    p = math.nan
    if estimate.n > 1:
        half = estimate.high - estimate.mean
        quantile = float(scipy.special.stdtrit(estimate.n - 1, (1 + LEVEL) / 2))
        p = 1.0 if estimate.mean == 0 else 0.0
        if half > 0:
            p = 2 * float(scipy.special.stdtr(estimate.n - 1, -abs(estimate.mean) * quantile / half))
    seen = detectable(estimate.spread, estimate.n)
    return Difference(family, one, other, measure, estimate, seen, p, fewest)


def _pooled(estimates: Sequence[Mean]) -> Mean:
    """The mean over families, each counting the same; Welch's degrees of freedom give the whole n."""
    parts = np.array([e.spread**2 / e.n for e in estimates]) / len(estimates) ** 2
    middle, total = float(np.mean([e.mean for e in estimates])), float(parts.sum())
    n = sum(e.n for e in estimates)
    if total == 0:
        return Mean(middle, middle, middle, 0.0, n)
    freedom = total**2 / float((parts**2 / (np.array([e.n for e in estimates]) - 1)).sum())
    whole = max(2, math.floor(freedom) + 1)
    half = float(scipy.special.stdtrit(whole - 1, (1 + LEVEL) / 2)) * math.sqrt(total)
    return Mean(middle, middle - half, middle + half, math.sqrt(total * whole), whole)


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down adjustment (Holm 1979) over the single families; the pooled ones stay out of it."""
    single = [i for i, d in enumerate(found) if d.family != POOLED and not math.isnan(d.p)]
    ordered = sorted(single, key=lambda i: found[i].p)
    adjusted: dict[int, float] = {}
    largest = 0.0
    for rank, i in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * found[i].p))
        adjusted[i] = largest
    return [Difference(**{**vars(d), "p_holm": adjusted.get(i, math.nan)}) for i, d in enumerate(found)]


# ---------------------------------------------------------------- convergence


@dataclass(frozen=True)
class Convergence:
    """How soon the runs of a variant validate as well as the baseline does at its end."""

    family: str
    variant: str
    measure: str
    level: float
    steps: Mean  # over the runs that get there
    reached: int
    runs: int


def convergence(points: Sequence[Point], baseline: str) -> list[Convergence]:
    """The guide's "convergence speed", by return and by accuracy on the validation tasks.

    The level of a run is the last value of the baseline's run on the same data; the step is interpolated
    linearly between validations.
    """
    found = []
    for measure in ("validation_return", "validation_accuracy"):
        curves: dict[tuple[str, str], dict[int, list[tuple[int, float]]]] = {}
        for point in points:
            runs = curves.setdefault((point.family, point.variant), {})
            if not math.isnan(getattr(point, measure)):
                runs.setdefault(point.run, []).append((point.step, getattr(point, measure)))
        for (family, variant), runs in curves.items():
            base = curves.get((family, baseline), {})
            shared = [run for run in runs if run in base and len(base[run]) > 1]
            if not shared:
                continue
            levels = [sorted(base[run])[-1][1] for run in shared]
            steps = [_crossing(sorted(runs[run]), level) for run, level in zip(shared, levels, strict=True)]
            reached = [step for step in steps if not math.isnan(step)]
            level = float(np.mean(levels))
            found.append(
                Convergence(family, variant, measure, level, mean_of(reached), len(reached), len(shared))
            )
    return found


def _crossing(curve: Sequence[tuple[int, float]], level: float) -> float:
    """Where a curve of (step, value) first reaches ``level``, between its points; NaN if it does not."""
    previous: tuple[int, float] | None = None
    for step, value in curve:
        if value >= level:
            if previous is None or value == previous[1]:
                return float(step)
            return previous[0] + (step - previous[0]) * (level - previous[1]) / (value - previous[1])
        previous = (step, value)
    return math.nan


# ---------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """A point of a cost curve: what a variant's model costs in a family, and how it does."""

    family: str
    curve: str
    variant: str
    context: int  # steps
    action: float  # FLOPs of one in-context step
    training: float  # FLOPs of all gradient steps
    value: Mean  # of the study's metric over runs


def costs(study: Study, rows: Sequence[Row]) -> list[Cost]:
    """The points of the study's cost curves that have results, each curve from its cheapest model on."""
    models = {(cell.family, cell.variant): cell.trained.model for cell in study.cells}
    values = means(rows, study.metric)
    found = [
        Cost(
            family,
            curve,
            variant,
            (model := models[family, variant]).n_transit,
            action_flops(model),
            training_flops(model),
            values[family, variant],
        )
        for family in study.families
        for curve, variants in study.curves.items()
        for variant in variants
        if (family, variant) in values
    ]
    places = {name: k for k, name in enumerate([*study.families, *study.curves])}
    return sorted(found, key=lambda c: (places[c.family], places[c.curve], c.action))


# ---------------------------------------------------------------- as text


def means_table(rows: Sequence[Row], variants: Sequence[str]) -> list[list[str]]:
    """Header and one line per family and variant: means over runs, the spread of the final return."""
    shown = [key for key in MEASURES if any(not math.isnan(getattr(row, key)) for row in rows)]
    table = [["Family", "Variant", "Runs", *(MEASURES[key] for key in shown), "Spread of final"]]
    by_measure = {key: means(rows, key) for key in shown}
    for family in dict.fromkeys(row.family for row in rows):
        for variant in variants:
            if (family, variant) not in by_measure["final"]:
                continue
            final = by_measure["final"][family, variant]
            cells = [_share(by_measure[key][family, variant].mean) for key in shown]
            table.append([family, variant, str(final.n), *cells, _share(final.spread)])
    return table


def difference_table(found: Sequence[Difference]) -> list[list[str]]:
    """Header and one line per comparison and family."""
    table = [
        [
            "Family",
            f"Difference of {MEASURES[found[0].measure].lower()}" if found else "Difference",
            "Runs",
            "Mean",
            "95 % interval",
            "Seen with 80 % power",
            "p",
            "p, Holm",
            "Verdict",
        ]
    ]
    for d in found:
        e = d.estimate
        table.append(
            [
                d.family,
                f"{d.other} − {d.one}",
                "" if d.family == POOLED else str(e.n),
                _signed(e.mean),
                f"{_signed(e.low)} to {_signed(e.high)}",
                _share(d.detectable),
                _share(d.p),
                "" if d.family == POOLED else _share(d.p_holm),
                d.verdict,
            ]
        )
    return table


def convergence_table(found: Sequence[Convergence]) -> list[list[str]]:
    """Header and one line per family, variant and measure."""
    table = [["Family", "Variant", "Measure", "Baseline's last", "Steps to reach it", "Runs that do"]]
    for c in found:
        steps = "never" if c.reached == 0 else f"{c.steps.mean:.0f}"
        name = {"validation_return": "return", "validation_accuracy": "accuracy"}[c.measure]
        table.append([c.family, c.variant, name, _share(c.level), steps, f"{c.reached} of {c.runs}"])
    return table


def cost_table(found: Sequence[Cost], measure: str) -> list[list[str]]:
    """Header and one line per point of a cost curve."""
    head = ["Family", "Curve", "Variant", "Context", "MFLOP per step", "TFLOP of training", "Runs"]
    table = [[*head, MEASURES[measure], "95 % interval"]]
    for c in found:
        cost = [str(c.context), f"{c.action / 1e6:.3f}", f"{c.training / 1e12:.2f}", str(c.value.n)]
        span = f"{_share(c.value.low)} to {_share(c.value.high)}"
        table.append([c.family, c.curve, c.variant, *cost, _share(c.value.mean), span])
    return table


def tables(study: Study, rows: Sequence[Row], points: Sequence[Point]) -> list[list[list[str]]]:
    """All tables of a study: means, differences by measure, cost curves if any, convergence if recorded."""
    measures = dict.fromkeys((study.metric, "final", "auc"))
    found = [means_table(rows, study.variants)]
    found += [difference_table(differences(rows, study.comparisons, measure)) for measure in measures]
    if points_of_curves := costs(study, rows):
        found.append(cost_table(points_of_curves, study.metric))
    reached = convergence(points, study.baseline)
    return [*found, convergence_table(reached)] if reached else found


def plain(table: Sequence[Sequence[str]]) -> str:
    """A table as aligned text."""
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if k < 2 else text.rjust(w)
            for k, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table as Markdown: the first column left, the rest right where they are numbers."""
    head, *body = table
    numeric = [k > 0 and all(_looks_numeric(line[k]) for line in body) for k in range(len(head))]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, rule, *body])


def _looks_numeric(text: str) -> bool:
    return text.lstrip("+−").replace(".", "", 1).isdigit() or text in ("", "–")


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:z.3f}".replace("-", "−")


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+z.3f}".replace("-", "−")


def power_lines(runs: Mapping[str, int], spread: float | None) -> list[str]:
    """What a study can be expected to see, said before it is run."""
    if spread is None:
        return []
    return [
        f"{family}: {n} runs see a paired difference of {detectable(spread, n):.3f} with 80 % power"
        f" if it varies by {spread:g} between runs"
        for family, n in runs.items()
        if n > 1
    ]
