"""Figures of a comparison: every run as a dot, every difference as an interval, results by cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from compressed_ad.evaluation.intervals import mean, number
from compressed_ad.report.figures.style import FAINT, INK, Figure, beside, looks, names_down, panels, styled

if TYPE_CHECKING:
    from compressed_ad.report.comparison import Difference
    from compressed_ad.report.rows import Row
    from compressed_ad.report.study_report import Cost


_SMALL: Any = {
    "textcoords": "offset points",
    "fontsize": 8.5,
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
}


@styled
def forest(found: Mapping[str, Sequence[tuple[str, Difference]]], label: str) -> Figure:
    """Paired differences with their intervals: a panel by title, a line by name, one scale for all panels.

    Filled marks: the interval excludes 0 and there are enough runs. Within a grey band lie true differences
    that the runs would miss more often than in one of five studies, where that is known.
    """
    names = list(dict.fromkeys(name for lines in found.values() for name, _ in lines))
    width = min(12.0, 3.0 + 2.6 * len(found)) if len(found) > 1 else 8.8
    height = (0.4 if len(found) == 1 else 0.55) * len(names) + 1.4
    figure, (row,) = panels(width, height, 1, len(found), sharex=True, sharey=True)
    for axes, (title, lines) in zip(row, found.items(), strict=True):
        axes.axvline(0, color=INK, linewidth=1)
        for name, d in lines:
            y, e = -names.index(name), d.estimate
            if math.isfinite(d.detectable):
                axes.barh(y, 2 * d.detectable, left=-d.detectable, height=0.62, color=FAINT, zorder=0)
            if math.isfinite(e.low):
                axes.hlines(y, e.low, e.high, color=INK, linewidth=2.2)
            axes.plot(e.value, y, "o", color=INK, markersize=6.5, mfc=INK if d.decided else "white")
            if len(found) == 1:
                beside(axes, y, e.text("+"))
            elif math.isfinite(e.value):
                axes.annotate(number(e.value, "+"), (e.value, y), (0, 5), ha="center", **_SMALL)
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5 if len(found) == 1 else 2))
    if len(found) == 1:
        row[0].set_xlabel(label)
    else:
        figure.supxlabel(label, fontsize=10)
    every = [d for lines in found.values() for _, d in lines]
    ends = [x for d in every for x in (d.estimate.value, d.estimate.low, d.estimate.high, d.detectable)]
    reach = 1.08 * max(0.02, *(abs(x) for x in ends if math.isfinite(x)))
    row[0].set_xlim(-reach, reach)
    names_down(row[0], names)
    return figure


@styled
def dots(rows: Sequence[Row], variants: Sequence[str], measure: str, label: str) -> Figure:
    """Every run of every variant as a dot, their mean as a line; runs on the same data are joined."""
    families = list(dict.fromkeys(row.family for row in rows))
    width = min(12.0, 1.2 + len(families) * (0.9 + 0.36 * len(variants)))
    figure, (grid,) = panels(max(width, 4.5), 4.4, 1, len(families), sharey=True)
    look = looks(variants)
    for axes, family in zip(grid, families, strict=True):
        values = {(r.variant, r.run): r[measure] for r in rows if r.family == family}
        shown = [v for v in variants if any(name == v for name, _ in values)]
        for run in sorted({run for _, run in values}):
            line = [values.get((v, run), math.nan) for v in shown]
            axes.plot(range(len(shown)), line, color="#c4c4c4", linewidth=0.7, zorder=1)
        for k, variant in enumerate(shown):
            each = [value for (name, _), value in values.items() if name == variant]
            axes.plot([k] * len(each), each, "o", color=look[variant].color, markersize=3.8, zorder=2)
            axes.hlines(mean(each), k - 0.3, k + 0.3, color=INK, linewidth=2.6, zorder=3)
        axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_title(family)
        axes.grid(axis="x", visible=False)
    grid[0].set_ylabel(label)
    return figure


@styled
def cost_curves(found: Sequence[Cost], label: str, variants: Sequence[str] = ()) -> Figure:
    """The result by context length and by FLOPs of an in-context step, one row of panels per family.

    A curve that is called as one of the study's ``variants`` is drawn as that. Bars are 95 % intervals of the
    means over runs.
    """
    families = list(dict.fromkeys(c.family for c in found))
    size = (8.4, 0.5 + 3.1 * len(families))
    figure, grid = panels(*size, len(families), 2, sharex="col", sharey="row")
    for row, family in zip(grid, families, strict=True):
        curves = looks((c.curve for c in found if c.family == family), variants)
        for k, (curve, look) in enumerate(curves.items()):
            points = [c for c in found if (c.family, c.curve) == (family, curve)]
            middle, low, high = np.array([(c.value.value, c.value.low, c.value.high) for c in points]).T
            nudge = 1 + 0.012 * (k - (len(curves) - 1) / 2)
            drawn = {"label": curve, "elinewidth": 1, "marker": "o", "markersize": 4} | look.line
            costs = np.array([(c.context, c.action / 1e6) for c in points]).T
            for axes, cost in zip(row, costs, strict=True):
                axes.errorbar(cost * nudge, middle, [middle - low, high - middle], **drawn)
        row[0].set(title=family, ylabel=label)
        for axes in row:
            axes.locator_params(axis="x", nbins=6)
    grid[-1][0].set_xlabel("context in steps")
    grid[-1][1].set_xlabel("MFLOP per in-context step")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure
