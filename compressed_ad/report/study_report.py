"""A study as one self-contained page: the answer first, then tables, figures, protocol and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressed_ad.files import write_atomically
from compressed_ad.report.figures import comparison as plots_study
from compressed_ad.report.figures.style import Figure
from compressed_ad.report.pages import image, render, save_figure
from compressed_ad.report.study_rows import Point, Row
from compressed_ad.report.study_tables import (
    MEASURES,
    POOLED,
    Difference,
    costs,
    differences,
    power_lines,
    tables,
)

if TYPE_CHECKING:
    from compressed_ad.runs.study import Study

CAPTIONS = {
    "Family Variant": "Means over runs. Returns are normalised per task: 0 is the uniformly random policy, 1"
    " the optimal one.",
    "Family Difference": "Paired differences over runs: each run has its own histories, split and training"
    " seed. The verdict goes by the 95 % interval; Holm's adjustment counts all comparisons of this table.",
    "Family Curve": "What a model costs and how it does: floating-point operations of one in-context step,"
    " and of all gradient steps.",
    "Measure": "Gradient steps until a run validates as the baseline's run on the same data does at its end.",
}


def write_page(
    folder: Path,
    study: Study,
    rows: Sequence[Row],
    points: Sequence[Point],
    *,
    command: str,
    config: str,
    facts: Mapping[str, Any],
) -> Path:
    """``index.html`` in ``folder``, and its figures as PNG files in ``folder/figures``."""
    found = differences(rows, study.comparisons, study.metric)
    shown, taken = [], set[str]()
    for name, caption, figure in _figures(study, rows, points, found):
        save_figure(folder / "figures", name, figure, taken)
        shown.append({"caption": caption, "image": image(figure)})
    page = render(
        "study.html.j2",
        title=f"Study: {study.name}",
        question=study.question,
        answers=answers(found, MEASURES[study.metric].lower()),
        tables=[(table, _caption(table[0])) for table in tables(study, rows, points)],
        figures=shown,
        power=power_lines(study.runs, study.spread),
        source=study.path.read_text("utf-8"),
        config=config,
        command=command,
        seconds=sum({row.parameters.rpartition("/")[0]: row.seconds for row in rows}.values()),
        provenance={
            "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
            "hardware": ", ".join(f"{key} {value}" for key, value in facts["hardware"].items()),
            "revision": str(facts["revision"]),
        },
    )
    path = folder / "index.html"
    write_atomically(path, page.encode())
    return path


def _caption(head: Sequence[str]) -> str:
    kind = "Measure" if "Measure" in head else " ".join(head[:2]).split(" of ")[0]
    return CAPTIONS[kind]


def answers(found: Sequence[Difference], label: str) -> list[str]:
    """What was found, a sentence each; then in one what was not, and what would have been seen."""
    lines = []
    nothing = [d for d in found if d.verdict == "no difference found"]
    few = [d for d in found if d.verdict == "too few runs"]
    for d in found:
        if d in nothing or d in few:
            continue
        e, where = d.estimate, "over all families" if d.family == POOLED else f"on {d.family}"
        said, _, adjustment = d.verdict.partition(" ")
        figures = f"{label} {e.mean:+z.3f} (95 % {e.low:+z.3f} to {e.high:+z.3f})"
        note = f", {adjustment} for the number of comparisons" if adjustment else ""
        lines.append(f"{d.other} is {said} than {d.one} {where}{note}: {figures}.")
    if nothing:
        seen = [d.detectable for d in nothing]
        whole = "this comparison" if len(nothing) == 1 else f"{len(nothing)} comparisons"
        span = f"{min(seen):.3f} to {max(seen):.3f}" if len(seen) > 1 else f"{seen[0]:.3f}"
        lines.append(
            f"No difference found in {whole} of the {label}; true differences of {span} would have been seen"
            " in 4 of 5 such studies."
        )
    if few:
        lines.append(f"Too few runs for a verdict in {len(few)} comparison{'s' * (len(few) > 1)}.")
    return lines


def _figures(
    study: Study, rows: Sequence[Row], points: Sequence[Point], found: Sequence[Difference]
) -> list[tuple[str, str, Figure]]:
    label = MEASURES[study.metric].lower()
    figures = []
    if found:
        figures.append(
            (
                "differences",
                "Paired differences, 95 % intervals; filled where they exclude 0. Within the grey band lie"
                " true differences that this many runs would miss more often than in 1 of 5 studies.",
                plots_study.forest(found, label),
            )
        )
    figures.append(
        (
            "runs",
            "Every run (dots, joined where they share their data) and the mean over runs (bars).",
            plots_study.dots(rows, study.variants, study.metric, label),
        )
    )
    if any(row.marked > 0 for row in rows):
        figures.append(
            (
                "marked",
                "Marked steps of the training histories by tenth of the source's training.",
                plots_study.marked_by_tenth(rows, study.variants),
            )
        )
    if by_cost := costs(study, rows):
        caption = "The result by what it costs: means over runs with 95 % intervals."
        figures.append(("costs", caption, plots_study.cost_curves(by_cost, label)))
    if len({point.step for point in points}) > 1:
        figures.append(
            ("convergence", "Validation while training.", plots_study.convergence(points, study.variants))
        )
    return figures
