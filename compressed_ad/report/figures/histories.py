"""Figures of the learning histories and of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from compressed_ad.evaluation.intervals import mean
from compressed_ad.marking.markers import borders, segments
from compressed_ad.report.figures import style
from compressed_ad.report.figures.style import Figure
from compressed_ad.report.measures import series
from compressed_ad.types import BoolArray


@style.styled
def learning_curves(
    returns: ArrayLike,
    *,
    name: str,
    optimal: ArrayLike | None = None,
    random: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Return per episode of a source algorithm: returns (N, E), mean and 10-90 % band over tasks.

    ``optimal`` and ``random`` (N,) are drawn as the means over the same tasks; NaN are left out.
    """
    values = style.numbers("returns", returns, "N", "E")
    figure, axes = style.canvas(ax, 7.2, 3.6)
    episodes = np.arange(1, values.shape[1] + 1)
    axes.fill_between(
        episodes, *np.quantile(values, [0.1, 0.9], axis=0), color=style.SOURCE, alpha=0.18, linewidth=0
    )
    labels = [style.curve(axes, episodes, values.mean(axis=0), name, style.SOURCE)]
    for height, word in ((optimal, "optimal"), (random, "random")):
        known = np.asarray([] if height is None else height, dtype=np.float64)
        if known.size and np.isfinite(known).all():
            labels.append(style.level(axes, float(known.mean()), word))
    axes.set(xlabel="episode of the source run", ylabel="return per episode", xlim=(1, max(2, len(episodes))))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_title(f"{name}: mean over {len(values)} tasks, band: 10 % to 90 % of tasks")
    style.end_labels(axes, labels)
    return figure


@style.styled
def probability_trace(
    probs: ArrayLike,
    mask: BoolArray,
    *,
    threshold: float | None = None,
    episode_end: BoolArray | None = None,
    first_step: int = 0,
    title: str = "Action probability with marked segments",
    ax: Axes | None = None,
) -> Figure:
    """One stream's action probability (T,) with its marked segments (T,) shaded and their borders shown."""
    values = style.numbers("probs", probs, "T")
    marked = style.numbers("mask", mask, len(values)) != 0
    figure, axes = style.canvas(ax, 9.0, 3.4)
    steps = first_step + np.arange(len(values))
    for edges in zip(*segments(marked)[1:], strict=True):
        axes.axvspan(*(first_step + edge - 0.5 for edge in edges), color=style.MARKS, alpha=0.28, linewidth=0)
    if episode_end is not None:
        for step in steps[np.asarray(episode_end, dtype=bool)]:
            axes.axvline(step + 0.5, ymax=0.04, color=style.MUTED, linewidth=1)
    axes.plot(steps, values, color=style.SOURCE, linewidth=1.1, marker=".", markersize=3)
    starts, ends = borders(marked)
    for places, symbol, label in ((starts, ">", r"<compress>"), (ends, "<", r"\compress>")):
        height = np.full(int(places.sum()), 1.07)
        axes.plot(steps[places], height, symbol, color=style.INK, markersize=6, label=label)
    if threshold is not None:
        axes.axhline(threshold, color=style.INK, linestyle=(0, (4, 3)), linewidth=1)
        style.beside(axes, threshold, f"threshold {threshold:g}")
    axes.set(
        xlabel="step of the stream" + ("" if episode_end is None else " (ticks inside: episode ends)"),
        ylabel="probability of the action",
        ylim=(0, 1.14),
        xlim=(steps[0] - 0.5, steps[-1] + 0.5),
        yticks=np.linspace(0, 1, 6),
    )
    axes.set_title(title)
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.1, handletextpad=0.2)
    return figure


@style.styled
def marked_by_tenth(fractions: Mapping[str, Mapping[str, ArrayLike]], among: Sequence[str] = ()) -> Figure:
    """Share of marked steps by tenth of the source's training, by family (a panel) and method (a line).

    Each line is the mean over the rows of an array (n, 10), of n tasks or runs; one that is alone in its
    panel has bands that hold the middle 50 % and 80 % of the rows.
    """
    figure, (row,) = style.panels(min(12.0, 2.6 + 3.4 * len(fractions)), 3.6, 1, len(fractions), sharey=True)
    middle = (np.arange(10) + 0.5) / 10
    look = style.looks((name for lines in fractions.values() for name in lines), among)
    for axes, (family, lines) in zip(row, fractions.items(), strict=True):
        alone: Any = {"color": style.INK, "marker": "o", "markersize": 4} if len(lines) == 1 else None
        for name, values in lines.items():
            table = np.asarray(values, dtype=np.float64)
            for edges in ([0.1, 0.9], [0.25, 0.75]) if alone and len(table) > 1 else ():
                low, high = np.nanquantile(table, edges, axis=0)
                axes.fill_between(middle, low, high, color=style.MARKS, alpha=0.2, linewidth=0)
            axes.plot(middle, mean(table, axis=0), label=name, **(alone or look[name].line))
        axes.set(xlabel="training of the source", xlim=(0, 1), ylim=(0, 1), title=family)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    row[0].set_ylabel("marked steps")
    if any(len(lines) > 1 for lines in fractions.values()):
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
    return figure


@style.styled
def training_curves(
    metrics: Mapping[str, Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]], among: Sequence[str] = ()
) -> Figure:
    """Training loss and validation by gradient step, by family, method and run: rows of ``metrics.jsonl``.

    Thin lines are runs, thick ones their mean where all runs recorded the same steps; of the loss, whose runs
    hide each other, the mean alone. What no run recorded is left out. Families share the scale of a quantity.
    """
    labels = {
        "loss": "training loss (nats)",
        "validation_return": "validation return in context\n(normalised)",
        "validation_accuracy": "validation accuracy",
        "validation_excess_cross_entropy": "validation cross-entropy above\nthe source's entropy (nats)",
    }
    every = [row for methods in metrics.values() for runs in methods.values() for run in runs for row in run]
    keys = [key for key in labels if len(series(every, key)[0])] or ["loss"]
    cells = [(key, family) for key in keys for family in metrics]
    alone = len(metrics) == 1
    n_column = (2 if len(keys) == 4 else len(keys)) if alone else len(metrics)
    n_row = len(cells) // n_column
    size = (min(9.3 if alone else 12.5, 3.7 * n_column + 0.6), 0.5 + 2.8 * n_row)
    figure, grid = style.panels(*size, n_row, n_column, sharey=False if alone else "row")
    look = style.looks((name for methods in metrics.values() for name in methods), among)
    for axes, (key, family) in zip(grid.ravel(), cells, strict=True):
        for name, runs in metrics[family].items():
            lines = [series(run, key) for run in runs]
            shared = len(lines) > 1 and all(np.array_equal(line[0], lines[0][0]) for line in lines)
            for steps, values in [] if shared and key == "loss" else lines:
                axes.plot(steps, values, **look[name].line | ({"lw": 0.8, "alpha": 0.5} if shared else {}))
            if shared:
                axes.plot(lines[0][0], np.mean([line[1] for line in lines], axis=0), **look[name].line)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(family)
        if family == next(iter(metrics)):
            axes.set_ylabel(labels[key])
    for axes in grid[-1]:
        axes.set_xlabel("gradient step")
    handles = [Line2D([], [], label=name, **one.line) for name, one in look.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(4, len(handles))))
    return figure
