"""A study's tables, and its page: the answer first, then tables, figures, how it was done."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import UsageError, listed
from compressed_ad.evaluation.intervals import Floats, Interval, detectable, number
from compressed_ad.report import comparison
from compressed_ad.report.comparison import POOLED, Difference, differences, means
from compressed_ad.report.figures import histories
from compressed_ad.report.figures.comparison import cost_curves, dots, forest
from compressed_ad.report.measures import MEASURES
from compressed_ad.report.pages import Drawn, keep_figures, provenance, rendered, write_page
from compressed_ad.report.rows import TENTHS, Row
from compressed_ad.report.tables import Rows, Table, as_text, write_tables
from compressed_ad.training.flops import action_flops, training_flops

if TYPE_CHECKING:
    from compressed_ad.runs.study import Study


CHANCE = (
    " Spread is the standard deviation of the paired differences between runs. Chance in play is what it"
    " would be if the same models played again, the two of a run independently. It is unknown where tasks"
    " were played once, where two variants share their weights, and for rows of earlier versions."
)


@dataclass(frozen=True)
class Cost:
    """A point of a cost curve: what a variant's model costs in a family, and what it achieves."""

    family: str
    curve: str
    variant: str
    context: int  # steps
    action: float  # FLOPs of one in-context step
    training: float  # FLOPs of all gradient steps
    value: Interval  # of the study's metric over runs


def costs(study: Study, rows: Sequence[Row]) -> list[Cost]:
    """The points of the study's cost curves that have results, each curve from its cheapest model on."""
    models = {(cell.family, cell.variant): cell.trained.model for cell in study.cells}
    values, visible = means(rows, study.metric), means(rows, "visible")
    found = []
    for family in study.families:
        for curve, variants in study.curves.items():
            points = []
            for variant in variants:
                if value := values.get((family, variant)):
                    model = models[family, variant]
                    seen = visible[family, variant].value
                    tokens = None if math.isnan(seen) else seen
                    cost = (model.n_transit, action_flops(model, tokens), training_flops(model, tokens))
                    points.append(Cost(family, curve, variant, *cost, value))
            found += sorted(points, key=lambda point: point.action)
    return found


# ---------------------------------------------------------------- tables


def tables(study: Study, rows: Sequence[Row], points: Sequence[Row]) -> list[Table]:
    """All tables of a study.

    Means, differences by measure and cost curves if there are any, convergence if it was recorded.
    """
    scale = "Returns are normalised per task: 0 is the uniformly random policy, 1 the optimal one."
    found = [Table("means", means_table(rows, study.variants), f"Means over runs. {scale}")]
    caption = (
        f"Means of the paired differences over runs. {comparison.OWN_DATA.about} The verdict goes by the 95 %"
        " interval; Holm's adjustment counts all comparisons of this table, those over all families apart."
    )
    for measure in dict.fromkeys((study.metric, "final", "auc")):
        if gaps := differences(rows, study.comparisons, measure):
            told = any(not math.isnan(d.chance) for d in gaps)
            name = f"difference_of_{MEASURES[measure].label.lower().replace(' ', '_')}"
            found.append(Table(name, difference_table(gaps, measure), caption + CHANCE * told))
    if by_cost := costs(study, rows):
        caption = (
            "What a model costs and what it achieves: floating-point operations of one in-context step, and"
            " of all gradient steps."
        )
        found.append(Table("costs", cost_table(by_cost, study.metric), caption))
    measures = ("validation_return", "validation_accuracy")
    if reached := comparison.convergence(points, study.baseline, measures):
        caption = (
            "Gradient steps until a run validates as well as the baseline's run on the same data does at its"
            " end. A run that never does counts as infinitely late."
        )
        found.append(Table("convergence", comparison.convergence_table(reached), caption))
    return found


def text(study: Study, rows: Sequence[Row], points: Sequence[Row], form: str = "text") -> str:
    """The tables of a study in one of ``tables.FORMATS``."""
    if not rows:
        raise UsageError(f"{study.path}: nothing of this study is finished")
    return as_text(tables(study, rows, points), form)


def means_table(rows: Sequence[Row], variants: Sequence[str]) -> Rows:
    """Header and one line per family and variant: means over runs, the spread of the final return."""
    shown = [key for key, m in MEASURES.items() if m.listed and any(not math.isnan(r[key]) for r in rows)]
    table = [["Family", "Variant", "Runs", *(MEASURES[key].label for key in shown), "Spread of final"]]
    by_measure = {key: means(rows, key) for key in dict.fromkeys((*shown, "final"))}
    for family in dict.fromkeys(row.family for row in rows):
        for variant in variants:
            if (family, variant) in by_measure["final"]:
                final = by_measure["final"][family, variant]
                cells = [number(by_measure[key][family, variant].value) for key in shown]
                table.append([family, variant, str(final.n), *cells, number(final.spread)])
    return table


def difference_table(found: Sequence[Difference], measure: str) -> Rows:
    """Header and one line per comparison and family; the spread only where chance in play is known."""
    head = ["Family", f"Difference of {MEASURES[measure].label.lower()}", "Runs", "Mean", "95 % interval"]
    told = any(not math.isnan(d.chance) for d in found)
    spread = ["Spread", "By chance in play, at most"] if told else []
    table = [[*head, *spread, "Seen with 80 % power", "p", "p, Holm", "Verdict"]]
    for d in found:
        e = d.estimate
        span = f"{number(e.low, '+')} to {number(e.high, '+')}"
        n = "" if d.family == POOLED else str(e.n)
        spread = [number(x if d.family != POOLED else math.nan) for x in (e.spread, d.chance)] if told else []
        cells = [n, number(e.value, "+"), span, *spread, number(d.detectable), number(d.p), number(d.p_holm)]
        table.append([d.family, d.label, *cells, d.verdict])
    return table


def cost_table(found: Sequence[Cost], measure: str) -> Rows:
    """Header and one line per point of a cost curve."""
    head = ["Family", "Curve", "Variant", "Context", "MFLOP per step", "TFLOP of training", "Runs"]
    table = [[*head, MEASURES[measure].label, "95 % interval"]]
    for c in found:
        cost = [str(c.context), f"{c.action / 1e6:.3f}", f"{c.training / 1e12:.2f}", str(c.value.n)]
        span = f"{number(c.value.low)} to {number(c.value.high)}"
        table.append([c.family, c.curve, c.variant, *cost, number(c.value.value), span])
    return table


# ---------------------------------------------------------------- the page


def write_study(
    folder: Path,
    study: Study,
    rows: Sequence[Row],
    points: Sequence[Row],
    *,
    command: str,
    config: str,
    facts: Mapping[str, Any],
    formats: Collection[str] = ("png", "svg"),
) -> Path:
    """``index.html`` in ``folder``, its figures in ``folder/figures``, its tables in ``folder/tables``."""
    found, shown = differences(rows, study.comparisons, study.metric), tables(study, rows, points)
    write_tables(folder / "tables", shown, study.note)
    write_page(
        path := folder / "index.html",
        "study.html.j2",
        title=f"Study: {study.name}",
        sections=[
            ("results", "answer"),
            *((table.name, table.title.lower()) for table in shown),
            ("figures", "figures"),
            ("how", "how it was done"),
        ],
        question=study.question,
        note=study.note,
        answers=[] if study.small else answers(found),
        tables=shown,
        figures=keep_figures(
            folder / "figures", rendered(_figures(study, rows, points, found), formats), formats
        ),
        power=power_lines(study),
        source=study.path.read_text("utf-8"),
        config=config,
        command=command,
        seconds=sum({row.weights: row["seconds"] for row in rows}.values()),
        provenance=provenance(facts),
    )
    return path


def answers(found: Sequence[Difference]) -> list[str]:
    """What was found, a sentence each; then in one what was not, and what would have been seen."""
    unsaid = ("no difference found", "too few runs")
    lines = [
        f"{d.sentence()}: {MEASURES[d.measure].label.lower()} {d.estimate.text('+')}."
        for d in found
        if d.verdict not in unsaid
    ]
    # All families together are no comparison beside those that they are made of.
    nothing, few = ([d for d in found if (d.verdict, d.family == POOLED) == (word, False)] for word in unsaid)
    pooled = [d.verdict == unsaid[0] for d in found if d.family == POOLED]
    if nothing:
        seen = [d.detectable for d in nothing]
        whole = "this comparison" if len(nothing) == 1 else f"{len(nothing)} comparisons"
        span = f"{min(seen):.3f} to {max(seen):.3f}" if len(seen) > 1 else f"{seen[0]:.3f}"
        label = MEASURES[nothing[0].measure].label.lower()
        over = (
            "" if not any(pooled) else f", nor {'' if all(pooled) else f'in {sum(pooled)} '}over all families"
        )
        lines.append(
            f"No difference found in {whole} of the {label}{over}; true differences of {span} would have been"
            " seen in 4 of 5 such studies."
        )
    # Chance is never less than half of nothing.
    varying = [d for d in found if d.n_run >= comparison.MIN_RUNS and d.estimate.spread > 0]
    if half := [d for d in varying if d.chance**2 > d.estimate.spread**2 / 2]:
        where = listed(f"{d.label} on {d.family}" for d in half)
        lines.append(
            f"Half of the variance between runs or more may be chance in play for {where}: more"
            " evaluation.rollouts may narrow these intervals without further training."
        )
    if few:
        lines.append(f"Too few runs for a verdict in {len(few)} comparison{'s' * (len(few) > 1)}.")
    return lines


def power_lines(study: Study) -> list[str]:
    """What a study can be expected to see, said before it is run: by the runs that its comparisons have."""
    if study.spread is None:
        return []
    lines = []
    for family, of in study.runs.items():
        pairs = {min(of[one], of[other]) for one, other in study.comparisons if {one, other} <= of.keys()}
        lines += [
            f"{family}: with {n} runs, 4 of 5 such studies would detect a true difference of"
            f" {detectable(study.spread, n):.3f}, if paired differences vary by {study.spread:g} between runs"
            for n in sorted(pairs - {1}, reverse=True)
        ]
    return lines


def _figures(
    study: Study, rows: Sequence[Row], points: Sequence[Row], found: Sequence[Difference]
) -> Iterator[Drawn]:
    label = MEASURES[study.metric].label.lower()
    if found:
        panels: dict[str, list[tuple[str, Difference]]] = {}
        for d in found:
            panels.setdefault(d.family, []).append((d.label, d))
        yield (
            "differences",
            "Means of the paired differences with 95 % intervals; filled where they exclude 0 and there are"
            " enough runs. Within the grey band lie true differences that this many runs would miss more"
            " often than in 1 of 5 studies.",
            forest(panels, f"difference of {label}"),
        )
    yield (
        "runs",
        "Every run (dots, joined where they share their data) and the mean over runs (bars).",
        dots(rows, study.variants, study.metric, label),
    )
    if any(row["marked"] > 0 for row in rows):
        yield (
            "marked",
            "Marked steps of the training histories by tenth of the source's training, mean over runs."
            " Variants with the same marks are one line.",
            histories.marked_by_tenth(_marked(study, rows), among=study.variants),
        )
    if by_cost := costs(study, rows):
        caption = "The result by what it costs: means over runs with 95 % intervals."
        yield "costs", caption, cost_curves(by_cost, label, study.variants)
    if len({point["step"] for point in points}) > 1:
        yield (
            "convergence",
            "Validation while training. Thin lines are runs, thick lines their mean.",
            histories.training_curves(_curves(points, study.variants), among=study.variants),
        )


def _curves(points: Sequence[Row], variants: Sequence[str]) -> dict[str, dict[str, list[list[Any]]]]:
    """The validations of each run, by family and variant, as rows of a ``metrics.jsonl``."""
    found: dict[str, dict[str, dict[int, list[Any]]]] = {}
    for p in sorted(points, key=lambda p: (variants.index(p.variant), p["step"])):
        found.setdefault(p.family, {}).setdefault(p.variant, {}).setdefault(p.run, []).append(p.values)
    return {f: {v: list(runs.values()) for v, runs in lines.items()} for f, lines in found.items()}


def _marked(study: Study, rows: Sequence[Row]) -> dict[str, dict[str, Floats]]:
    """Marked shares (R, 10) by family and variant.

    Variants with the same marks are one line, called after the first whose model reads them, or else after
    the marker: plain AD ignores marks.
    """
    cells = {(cell.family, cell.variant): cell.trained for cell in study.cells}
    by_cell: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        shares = by_cell.setdefault(row.family, {}).setdefault(row.variant, [])
        shares.append([row[column] for column in TENTHS])
    found: dict[str, dict[str, Floats]] = {}
    for family, lines in by_cell.items():
        same: dict[bytes, list[str]] = {}
        for variant, shares in lines.items():
            same.setdefault(np.round(shares, 4).tobytes(), []).append(variant)
        found[family] = {}
        for names in same.values():
            readers = [name for name in names if cells[family, name].model.model != "AD"]
            called = readers[0] if readers else cells[family, names[0]].marker.marker
            found[family][called] = np.array(lines[names[0]])
    return found
