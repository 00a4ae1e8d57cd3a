"""The tables of a report: measures by method, regret, known algorithms, convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table as Shown
from rich.text import Text

from compressed_ad.evaluation import intervals
from compressed_ad.report import comparison
from compressed_ad.report.comparison import IQM, Analysis
from compressed_ad.report.learning import learning_sentence
from compressed_ad.report.measures import MEASURES, NEEDS, final_return
from compressed_ad.report.results import MethodRuns
from compressed_ad.report.rows import validations
from compressed_ad.report.tables import Table


def header(analysis: Analysis) -> list[str]:
    """Names of the columns: the methods, and their differences."""
    return [*analysis.methods, *(row[analysis.metric].label for row in analysis.pairs.values())]


def lines(analysis: Analysis) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(label, meaning, (value, interval) per method and difference) as text, for each measure."""
    found, uneven = [], _uneven(analysis)
    for key in analysis.shown:
        measure = MEASURES[analysis.metric if key == IQM else key]
        cells = [(intervals.number(row[key].value), row[key].span()) for row in analysis.methods.values()]
        gaps = [row[key].estimate for row in analysis.pairs.values()]
        cells += [(intervals.number(gap.value, "+"), gap.span("+")) for gap in gaps]
        label = (
            f"{measure.label}, interquartile mean*" if key == IQM else measure.label + "†" * (key in uneven)
        )
        found.append((label, "" if key == IQM else measure.meaning, cells))
    return found


def caption(analysis: Analysis, interval: str) -> str:
    """What the main table shows; ``interval``: where it has its intervals."""
    paired = "Differences are means of the paired differences (same training seed, same task)."
    parts = (
        f"Held-out tasks: mean over runs and tasks, 95 % interval {interval}.",
        paired if analysis.pairs else "",
        f"Returns are normalised per task: 0 is the uniformly random policy, 1 is {analysis.scale}.",
        left_out(analysis.shown),
    )
    return " ".join(filter(None, parts))


def tables(analysis: Analysis, methods: Sequence[MethodRuns]) -> list[Table]:
    """The comparison, and what else there is of regret, known algorithms and convergence."""
    played = "Known algorithms play the same tasks, once for all runs." if analysis.references else ""
    points = [p for m in methods for p in validations(m.name, m.metrics, m.seeds) if len(methods) > 1]
    comparison_rows = [["", *header(analysis)]] + [
        [label, *(f"{value} ({span})" if span else value for value, span in cells)]
        for label, _, cells in lines(analysis)
    ]
    about = " ".join([caption(analysis, "in brackets"), *notes_below(analysis)])
    found = [
        Table("comparison", comparison_rows, about),
        Table(
            "cumulative_regret",
            regret_table(analysis),
            "What the best policy would have earned more over all in-context episodes: mean over runs,"
            f" held-out tasks and rollouts. {played}".rstrip(),
        ),
        Table(
            "known_algorithms",
            reference_table(analysis),
            "Normalised returns on the held-out tasks, played once for all runs.",
        ),
        Table(
            "convergence_speed",
            comparison.convergence_table(comparison.convergence(points, methods[0].name)),
            f"Gradient steps until a run validates as well as the run of {methods[0].name} with the same seed"
            " does at its end. A run that never does counts as infinitely late. Every gradient step sees the"
            " same number of samples.",
        ),
    ]
    return [table for table in found if table.rows]


def _uneven(analysis: Analysis) -> set[str]:
    """Measures that some run or task has of one method only, so that the columns of means do not subtract."""
    means = {name: {key: i.value for key, i in row.items()} for name, row in analysis.methods.items()}
    return {
        key
        for row in analysis.pairs.values()
        for key, d in row.items()
        if key != IQM and abs(means[d.other][key] - means[d.one][key] - d.estimate.value) > 5e-4
    }


def notes_below(analysis: Analysis) -> list[str]:
    """What is to be known of the lines whose columns need not subtract."""
    middle = (
        "* The interquartile mean leaves out the highest and the lowest quarter of the scores of all runs and"
        " tasks."
    )
    if not analysis.pairs:
        return [middle]
    middle += (
        " Its difference is the interquartile mean of the paired differences, which need not be the"
        " difference of the two columns."
    )
    pairs = (
        "† The difference is over the runs and tasks of which both methods have a value, the columns over all"
        " of which each has one."
    )
    return [middle, pairs] if _uneven(analysis) & set(analysis.shown) else [middle]


def left_out(shown: Sequence[str]) -> str:
    """Which measures a table has no values of, in a sentence; empty if it has all."""
    missing = dict.fromkeys(
        NEEDS[m.needs] for key, m in MEASURES.items() if m.listed and m.needs and key not in shown
    )
    return f"The table leaves out measures that need {', or '.join(missing)}." if missing else ""


def regret_table(analysis: Analysis) -> list[list[str]]:
    """Header and one line for each method and reference; empty without regret."""
    curves = {**analysis.curves, **analysis.references}
    table = [["", "Regret", "95 % interval", "Final return"]]
    for name, total in analysis.total_regret.items():
        middle, low, high = (f"{x:z.2f}".replace("-", "−") for x in (total.value, total.low, total.high))
        span = f"{low} to {high}" if math.isfinite(total.low) else ""
        final = float(intervals.mean(final_return(curves[name]).ravel()))
        table.append([name, middle, span, intervals.number(final)])
    return table if len(table) > 1 else []


def reference_table(analysis: Analysis) -> list[list[str]]:
    """Header and one line for each known algorithm; empty where the table of regret has them."""
    table = [["", MEASURES["final"].label, MEASURES["auc"].label]]
    for name, curves in analysis.references.items() if not analysis.regret else ():
        both = (intervals.mean(values.ravel()) for values in (final_return(curves), curves))
        table.append([name, *(intervals.number(float(value)) for value in both)])
    return table if len(table) > 1 else []


def _terminal(title: str, rows: Sequence[Sequence[str]]) -> Shown:
    """``rows``, the first of which is the header, with numbers in all columns but the first."""
    table = Shown(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(Text(heading), justify="right" if heading else "left")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def terminal_table(analysis: Analysis, marks: str = "") -> Group:
    """The comparison for the end of ``cad run``: whether anything was learned, ``marks``, means, verdict."""
    above = (learning_sentence(analysis.learning), marks)
    title, n_method = "Held-out tasks: mean over runs and tasks, 95 % interval", len(analysis.methods)
    halves = {title: slice(None)}  # three methods and their differences are too wide for a terminal
    if n_method > 2:
        halves = {title: slice(n_method), "Paired differences": slice(n_method, None)}
    parts: list[Shown | Text] = [Text(f"{text}\n") for text in above if text]
    for heading, columns in halves.items():
        table = Shown(title=heading, title_justify="left", min_width=len(title))
        table.add_column("", min_width=20)
        for name in header(analysis)[columns]:
            table.add_column(Text(name, justify="right"), justify="right", overflow="fold")
        for label, _, cells in lines(analysis):
            table.add_row(Text(label), *(Text(f"{value}\n{span}".rstrip()) for value, span in cells[columns]))
        parts.append(table)
    parts += map(Text, notes_below(analysis))
    if regret_lines := regret_table(analysis):
        n_episode = next(iter(analysis.regret.values())).shape[-1]
        parts.append(_terminal(f"Cumulative regret over {n_episode} episodes: mean", regret_lines))
    if known := reference_table(analysis):
        parts.append(_terminal("Known algorithms on the same tasks: mean", known))
    if analysis.scale != comparison.OPTIMUM:
        parts.append(Text(f"Normalised return: 0 is the uniformly random policy, 1 is {analysis.scale}."))
    return Group(*parts, Text(" ".join(analysis.verdicts)))
