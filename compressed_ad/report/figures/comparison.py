"""Figures of a study: every run as a dot, every comparison as an interval, marks by phase, convergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from compressed_ad.report.figures.style import COLOURS, LINES, styled
from compressed_ad.report.study_rows import Point, Row
from compressed_ad.report.study_tables import Cost, Difference


@styled
def forest(found: Sequence[Difference], label: str) -> Figure:
    """Paired differences with their intervals, one line per comparison, one panel per family.

    A grey band shows what the runs could have seen with 80 % power; filled marks exclude 0.
    """
    families = list(dict.fromkeys(d.family for d in found))
    pairs = list(dict.fromkeys((d.one, d.other) for d in found))
    height = 0.34 * len(pairs) + 1.4
    figure = Figure(figsize=(min(12.0, 3.0 + 2.6 * len(families)), height))
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    places = {pair: -k for k, pair in enumerate(pairs)}
    for axes, family in zip(panels, families, strict=True):
        axes.axvline(0, color="#202020", linewidth=1)
        for d in (d for d in found if d.family == family):
            y, e = places[d.one, d.other], d.estimate
            colour = COLOURS[1] if d.verdict.startswith(("better", "worse")) else COLOURS[0]
            if not math.isnan(d.detectable):
                axes.barh(y, 2 * d.detectable, left=-d.detectable, height=0.62, color="#e9e9e9", zorder=0)
            if not math.isnan(e.low):
                axes.hlines(y, e.low, e.high, color=colour, linewidth=2.2)
            filled = colour == COLOURS[1]
            axes.plot(
                e.mean, y, "o", color=colour, markersize=6.5, markerfacecolor=colour if filled else "white"
            )
        axes.set_title(family)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"difference of {label}")
        axes.use_sticky_edges = False
        axes.margins(x=0.06)
    panels[0].set_yticks(list(places.values()), [f"{other} − {one}" for one, other in pairs])
    panels[0].set_ylim(-len(pairs) + 0.4, 0.6)
    return figure


@styled
def dots(rows: Sequence[Row], variants: Sequence[str], measure: str, label: str) -> Figure:
    """Every run of every variant as a dot, their mean as a line; runs on the same data are joined."""
    families = list(dict.fromkeys(row.family for row in rows))
    width = min(12.0, 1.2 + len(families) * (0.9 + 0.36 * len(variants)))
    figure = Figure(figsize=(max(width, 4.5), 4.4))
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axes, family in zip(panels, families, strict=True):
        values = {(r.variant, r.run): float(getattr(r, measure)) for r in rows if r.family == family}
        shown = [v for v in variants if any(name == v for name, _ in values)]
        for run in sorted({run for _, run in values}):
            line = [values.get((v, run), math.nan) for v in shown]
            axes.plot(range(len(shown)), line, color="#c4c4c4", linewidth=0.7, zorder=1)
        for k, variant in enumerate(shown):
            own = [value for (name, _), value in values.items() if name == variant]
            axes.plot([k] * len(own), own, "o", color=COLOURS[0], markersize=3.8, alpha=0.75, zorder=2)
            axes.hlines(np.nanmean(own), k - 0.3, k + 0.3, color=COLOURS[1], linewidth=2.6, zorder=3)
        axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_title(family)
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel(label)
    return figure


@styled
def marked_by_tenth(rows: Sequence[Row], variants: Sequence[str]) -> Figure:
    """Share of marked steps by tenth of the source's training, mean over runs, one line per variant."""
    families = list(dict.fromkeys(row.family for row in rows))
    figure = Figure(figsize=(min(12.0, 2.2 + 3.2 * len(families)), 3.6))
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    middle = (np.arange(10) + 0.5) / 10
    for axes, family in zip(panels, families, strict=True):
        seen: list[tuple[float, ...]] = []
        for k, variant in enumerate(variants):
            own = [row.marked_by_tenth for row in rows if row.family == family and row.variant == variant]
            if not own:
                continue
            curve = tuple(np.round(np.array(own).mean(axis=0), 4).tolist())
            if curve in seen:
                continue
            seen.append(curve)
            style = {"color": COLOURS[k % 6], "linestyle": LINES[k % 6], "linewidth": 1.8}
            axes.plot(middle, curve, label=variant, **style)
        axes.set_title(family)
        axes.set(xlabel="training of the source", xlim=(0, 1), ylim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel("marked steps")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
    return figure


@styled
def cost_curves(found: Sequence[Cost], label: str) -> Figure:
    """The result by context length and by FLOPs of an in-context step, one row of panels per family.

    Bars are 95 % intervals of the means over runs.
    """
    families = list(dict.fromkeys(c.family for c in found))
    figure = Figure(figsize=(8.4, 0.5 + 3.1 * len(families)))
    panels = figure.subplots(len(families), 2, sharex="col", sharey="row", squeeze=False)
    for row, family in zip(panels, families, strict=True):
        curves = list(dict.fromkeys(c.curve for c in found if c.family == family))
        for k, curve in enumerate(curves):
            own = [c for c in found if (c.family, c.curve) == (family, curve)]
            bars = [
                [c.value.mean - c.value.low for c in own],
                [c.value.high - c.value.mean for c in own],
            ]
            style = {"color": COLOURS[k % 6], "linestyle": LINES[k % 6], "marker": "o", "markersize": 4}
            for axes, cost in zip(
                row, ([c.context for c in own], [c.action / 1e6 for c in own]), strict=True
            ):
                nudged = np.array(cost) * (1 + 0.012 * (k - (len(curves) - 1) / 2))
                axes.errorbar(nudged, [c.value.mean for c in own], bars, label=curve, elinewidth=1, **style)
        row[0].set_title(family)
        row[0].set_ylabel(label)
        for axes in row:
            axes.locator_params(axis="x", nbins=6)
    panels[-1][0].set_xlabel("context in steps")
    panels[-1][1].set_xlabel("MFLOP per in-context step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


@styled
def convergence(points: Sequence[Point], variants: Sequence[str]) -> Figure:
    """Validation return and accuracy by gradient step: mean over runs, thin lines are runs."""
    families = list(dict.fromkeys(point.family for point in points))
    measures = {"validation_return": "validation return"}
    if any(np.isfinite(point.validation_accuracy) for point in points):
        measures["validation_accuracy"] = "validation accuracy"
    figure = Figure(figsize=(min(12.0, 1.4 + 3.2 * len(families)), 0.4 + 2.5 * len(measures)))
    panels = figure.subplots(len(measures), len(families), sharex="col", squeeze=False)
    for column, family in enumerate(families):
        for row, (measure, label) in enumerate(measures.items()):
            axes = panels[row][column]
            for k, variant in enumerate(variants):
                runs = _curves(points, family, variant, measure)
                for curve in runs.values():
                    axes.plot(*zip(*curve, strict=True), color=COLOURS[k % 6], linewidth=0.6, alpha=0.35)
                steps = sorted({step for curve in runs.values() for step, _ in curve})
                means = [np.mean([dict(c)[s] for c in runs.values() if s in dict(c)]) for s in steps]
                axes.plot(steps, means, color=COLOURS[k % 6], linestyle=LINES[k % 6], label=variant)
            if row == 0:
                axes.set_title(family)
            if column == 0:
                axes.set_ylabel(label)
        panels[-1][column].set_xlabel("gradient step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _curves(
    points: Sequence[Point], family: str, variant: str, measure: str
) -> Mapping[int, list[tuple[int, float]]]:
    runs: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        if (point.family, point.variant) == (family, variant) and np.isfinite(getattr(point, measure)):
            runs.setdefault(point.run, []).append((point.step, float(getattr(point, measure))))
    return {run: sorted(curve) for run, curve in runs.items()}
