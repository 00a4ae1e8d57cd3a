"""Figures. Every function takes arrays and returns a matplotlib ``Figure``; no global state is touched.

Colours are those of Okabe and Ito (told apart with any colour vision); methods also differ by line style,
so that a print in grey stays readable. Curves are labelled at their end instead of in a legend.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure as Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from compressed_ad.evaluation.intervals import Interval, series
from compressed_ad.marking.markers import borders
from compressed_ad.types import AnyArray, BoolArray

P = ParamSpec("P")

COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES: tuple[Any, ...] = (
    "-",
    (0, (6, 1.5)),
    (0, (3, 1, 1, 1)),
    (0, (1.5, 1)),
    (0, (8, 2, 2, 2)),
    (0, (4, 3)),
)
SOURCE = "#009E73"
REFERENCES = ("#000000", "#8a5a2b", "#7a4fa3")
MUTED = "#6b6b6b"
FAINT = "#e4e4e4"
NEVER_SOLVED = 0.1
"""A task counts as never solved if no method's normalised final return, averaged over runs, reaches this."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#404040",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "xtick.color": "#404040",
    "ytick.color": "#404040",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "compressed_ad",
    "text.parse_math": False,  # names may hold any character
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw inside this library's style, whatever the caller has set."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def figure_to_svg(figure: Figure) -> bytes:
    """The figure as SVG, text as outlines; equal figures give equal bytes."""
    return _render(figure, "svg", metadata={"Date": None})


def figure_to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG."""
    return _render(figure, "png", dpi=dpi)


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, **options)
    figure.set_layout_engine("none")  # what was laid out once need not be laid out again
    return buffer.getvalue()


# ---------------------------------------------------------------- the histories


@styled
def learning_curves(
    returns: ArrayLike, *, name: str, optimal: ArrayLike | None = None, random: ArrayLike | None = None
) -> Figure:
    """Return per episode of a source algorithm: returns (N, E), mean and 10-90 % band over tasks.

    ``optimal`` and ``random`` (N,) are drawn as the means over the same tasks; NaN are left out.
    """
    values = np.asarray(returns, dtype=np.float64)
    figure, axes = _axes(7.2, 3.6)
    episodes = np.arange(1, values.shape[1] + 1)
    middle = values.mean(axis=0)
    axes.fill_between(
        episodes, *np.quantile(values, [0.1, 0.9], axis=0), color=SOURCE, alpha=0.18, linewidth=0
    )
    axes.plot(episodes, middle, color=SOURCE)
    labels = [(float(middle[-1]), name, SOURCE)]
    for level, word in ((optimal, "optimal"), (random, "random")):
        known = np.asarray([] if level is None else level, dtype=np.float64)
        if known.size and np.isfinite(known).all():
            labels.append((float(known.mean()), word, MUTED))
            axes.axhline(known.mean(), color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
    axes.set(xlabel="episode of the source run", ylabel="return per episode", xlim=(1, max(2, len(episodes))))
    axes.set_title(f"{name} learns: mean over {len(values)} tasks, band: 10 % to 90 % of tasks")
    end_labels(axes, labels)
    return figure


@styled
def probability_trace(
    probs: ArrayLike,
    mask: BoolArray,
    *,
    threshold: float | None = None,
    episode_end: BoolArray | None = None,
    first_step: int = 0,
    title: str = "Action probability with marked segments",
) -> Figure:
    """One stream's action probability (T,) with its marked segments (T,) shaded and their borders shown."""
    values, marked = np.asarray(probs, dtype=np.float64), np.asarray(mask, dtype=bool)
    figure, axes = _axes(9.0, 3.4)
    steps = first_step + np.arange(len(values))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked, [0]])))
    for start, end in edges.reshape(-1, 2) + first_step - 0.5:
        axes.axvspan(start, end, color=COLOURS[4], alpha=0.28, linewidth=0)
    if episode_end is not None:
        for step in steps[np.asarray(episode_end, dtype=bool)]:
            axes.axvline(step + 0.5, ymax=0.04, color=MUTED, linewidth=1)
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.1, marker=".", markersize=3)
    starts, ends = borders(marked)
    for places, symbol, label in ((starts, ">", r"<compress>"), (ends, "<", r"\compress>")):
        height = np.full(int(places.sum()), 1.07)
        axes.plot(steps[places], height, symbol, color=COLOURS[1], markersize=6, label=label)
    if threshold is not None:
        axes.axhline(threshold, color=COLOURS[5], linestyle=(0, (4, 3)), linewidth=1)
        _beside(axes, threshold, f"threshold {threshold:g}")
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


@styled
def marked_fraction(fractions: ArrayLike) -> Figure:
    """Share of marked steps by phase of training: fractions (N, K) of N tasks in K equal parts."""
    values = np.asarray(fractions, dtype=np.float64)
    figure, axes = _axes(7.2, 3.4)
    n_phase = values.shape[1]
    middle = (np.arange(n_phase) + 0.5) / n_phase
    for (low, high), shade in zip(((0.1, 0.9), (0.25, 0.75)), (0.16, 0.3), strict=True):
        band = np.nanquantile(values, [low, high], axis=0)
        axes.fill_between(middle, *band, color=COLOURS[4], alpha=shade, linewidth=0)
    axes.plot(middle, np.nanmedian(values, axis=0), color=COLOURS[1], marker="o", markersize=4)
    axes.set(xlabel="training of the source algorithm", ylabel="marked steps", xlim=(0, 1), ylim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"Median over {len(values)} tasks; bands: middle half and 10 % to 90 % of tasks")
    return figure


# ---------------------------------------------------------------- training


@styled
def training_curves(metrics: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Training loss, validation excess cross-entropy and validation return of several runs per method.

    ``metrics`` holds, per method, the rows of each run's ``metrics.jsonl``. Thin lines are runs, thick
    ones their mean where all runs recorded the same steps. Panels without data are left out.
    """
    panels = {
        "loss": "training loss (nats)",
        "validation_excess_cross_entropy": "validation cross-entropy above\nthe source's entropy (nats)",
        "validation_return": "validation return in context\n(normalised)",
    }
    rows = [row for runs in metrics.values() for run in runs for row in run]
    present = [key for key in panels if len(series(rows, key)[0])] or ["loss"]
    figure = Figure(figsize=(3.7 * len(present) + 0.6, 3.5))
    for axes, key in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        for i, (name, runs) in enumerate(metrics.items()):
            lines = [series(run, key) for run in runs]
            shared = len(lines) > 1 and all(np.array_equal(line[0], lines[0][0]) for line in lines)
            for steps, values in lines:
                thin = {"linewidth": 0.8, "alpha": 0.5} if shared else {}
                axes.plot(steps, values, color=COLOURS[i % 6], linestyle=LINES[i % 6], **thin)
            if shared:
                mean = np.mean([line[1] for line in lines], axis=0)
                axes.plot(lines[0][0], mean, color=COLOURS[i % 6], linestyle=LINES[i % 6])
            axes.plot([], [], color=COLOURS[i % 6], linestyle=LINES[i % 6], label=name)
        axes.set(xlabel="gradient step", ylabel=panels[key])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper left", ncols=max(1, len(metrics)))
    return figure


# ---------------------------------------------------------------- in-context behaviour


@styled
def in_context_curves(
    bands: Mapping[str, ArrayLike],
    *,
    source: ArrayLike | None = None,
    source_name: str = "source",
    references: Mapping[str, ArrayLike] | None = None,
    episodes: ArrayLike | None = None,
) -> Figure:
    """Normalised return per in-context episode: bands (3, E) of IQM, low and high per method.

    ``source`` (E',) is the source algorithm's normalised return per episode, from scratch, on the same
    tasks; it is cut to the episodes shown. ``references`` (E,) are those of known algorithms. ``episodes``
    (E,) numbers the episodes, by default from 1.
    """
    figure, axes = _axes(7.6, 4.4)
    n_episode = max(np.shape(band)[1] for band in bands.values())
    numbers = np.arange(1, n_episode + 1) if episodes is None else np.asarray(episodes)
    labels = [(1.0, "optimal", MUTED), (0.0, "random", MUTED)]
    for level in (0.0, 1.0):
        axes.axhline(level, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
    if source is not None:
        curve = np.asarray(source, dtype=np.float64)[:n_episode]
        axes.plot(numbers[: len(curve)], curve, color=SOURCE, linewidth=1.5)
        labels.append((float(curve[-1]), f"{source_name}, learning", SOURCE))
    labels += reference_lines(axes, numbers, references or {})
    for i, (name, band) in enumerate(bands.items()):
        middle, low, high = np.asarray(band, dtype=np.float64)
        at = numbers[: len(middle)]
        axes.fill_between(at, low, high, color=COLOURS[i % 6], alpha=0.15, linewidth=0)
        axes.plot(at, middle, color=COLOURS[i % 6], linestyle=LINES[i % 6])
        labels.append((float(middle[-1]), name, COLOURS[i % 6]))
    axes.set(xlabel="in-context episode", ylabel="normalised return", xlim=(1, max(2, numbers[-1])))
    axes.set_ylim(min(-0.08, axes.get_ylim()[0]), max(1.08, min(1.6, axes.get_ylim()[1])))
    axes.set_title("Held-out tasks: interquartile mean, band: 95 % interval")
    end_labels(axes, labels)
    return figure


@styled
def per_task_scatter(scores: Mapping[str, ArrayLike], labels: Sequence[str]) -> Figure:
    """Final normalised return per held-out task: scores (R, N) of each method, ``labels`` (N,).

    Left: the second method against the first. Right: every task by name, hardest first; small dots are
    runs, large ones their mean. Tasks that no method solves are named in orange.
    """
    names = list(scores)
    values = [np.asarray(score, dtype=np.float64) for score in scores.values()]
    means = np.array([v.mean(axis=0) for v in values])
    never: BoolArray = np.all(means < NEVER_SOLVED, axis=0)
    n_task = means.shape[1]
    paired = len(names) > 1
    figure = Figure(figsize=(9.2 if paired else 5.2, max(4.2, 0.24 * n_task + 1.5)))
    panels = figure.subplots(1, 2 if paired else 1, squeeze=False)[0]
    edge = (min(-0.05, float(np.nanmin(means)) - 0.05), max(1.05, float(np.nanmax(means)) + 0.05))
    if paired:
        axes = panels[0]
        axes.plot(edge, edge, color=MUTED, linewidth=1)
        axes.scatter(means[0], means[1], s=46, c=COLOURS[0], alpha=0.7, edgecolor="white", linewidth=0.6)
        axes.scatter(means[0][never], means[1][never], s=46, c=COLOURS[1], edgecolor="white", linewidth=0.6)
        axes.set(xlabel=f"{names[0]}: final normalised return", ylabel=f"{names[1]}", xlim=edge, ylim=edge)
        axes.set_aspect("equal", anchor="N")
        axes.set_title("One point per held-out task")
        axes.text(0.04, 0.95, f"{names[1]} higher", transform=axes.transAxes, color=MUTED, va="top")
        axes.text(0.96, 0.05, f"{names[0]} higher", transform=axes.transAxes, color=MUTED, ha="right")
    axes = panels[-1]
    order = np.argsort(-means.mean(axis=0), kind="stable")
    shift = np.linspace(0.16, -0.16, len(names)) if paired else np.zeros(1)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        rows = np.arange(n_task) + shift[i]
        axes.scatter(value[:, order], np.tile(rows, (len(value), 1)), s=9, color=COLOURS[i % 6], alpha=0.45)
        axes.scatter(means[i][order], rows, s=44, color=COLOURS[i % 6], marker="oDs^vP"[i % 6], label=name)
    ticks = [f"{labels[k]}  never solved" if never[k] else labels[k] for k in order]
    axes.set_yticks(np.arange(n_task), ticks)
    for k, text in zip(order, axes.get_yticklabels(), strict=True):
        text.set_color(COLOURS[1] if never[k] else "#202020")
    axes.set(xlabel="final normalised return", ylim=(-0.7, n_task - 0.3), xlim=edge)
    axes.set_title("By task, hardest on top")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(names))
    return figure


@styled
def goal_map(tasks: AnyArray, panels: Mapping[str, ArrayLike], kinds: Sequence[str]) -> Figure:
    """Normalised final return per goal on the grid, one panel for each title: values (N,), NaN not evaluated.

    ``tasks`` (N, 2) are grid cells (x, y); ``kinds`` (N,) are "train", "validation" or "heldout":
    held-out goals have a thick frame, validation goals a dashed one.
    """
    cells = np.asarray(tasks, dtype=np.int64)
    width, height = (int(n) for n in cells.max(axis=0) + 1)
    figure = Figure(figsize=(min(12.0, 3.6 * len(panels) + 1.0), 4.3))
    colours = LinearSegmentedColormap.from_list("return", ["#fff3d6", "#E69F00", "#0072B2", "#08306b"])
    images = []
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        grid = np.full((height, width), np.nan)
        grid[cells[:, 1], cells[:, 0]] = np.asarray(values, dtype=np.float64)
        axes.imshow(np.zeros_like(grid), cmap=ListedColormap([FAINT]), origin="lower")
        images.append(axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=1, origin="lower"))
        for (x, y), kind in zip(cells, kinds, strict=True):
            if kind == "train":
                continue
            line: Any = (2.2, "-") if kind == "heldout" else (1.4, (0, (2, 1)))
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, lw=line[0], ls=line[1]))
            value = grid[y, x]
            if np.isfinite(value) and max(width, height) <= 12:
                ink = "white" if value > 0.55 else "black"
                axes.text(x, y, f"{value:z.1f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set(xlabel="goal x", xticks=range(0, width, 2), yticks=range(0, height, 2))
        axes.grid(visible=False)
        axes.set_title(title)
    all_axes[0].set_ylabel("goal y")
    figure.colorbar(images[-1], ax=list(all_axes), label="final normalised return", shrink=0.7, aspect=25)
    return figure


@styled
def performance_profile(profiles: Mapping[str, ArrayLike], levels: ArrayLike) -> Figure:
    """Share of runs x tasks above each level (K,): profiles (3, K) of share, low and high per method."""
    figure, axes = _axes(6.4, 3.8)
    for i, (name, profile) in enumerate(profiles.items()):
        share, low, high = np.asarray(profile, dtype=np.float64)
        axes.fill_between(levels, low, high, color=COLOURS[i % 6], alpha=0.15, linewidth=0)
        axes.plot(levels, share, color=COLOURS[i % 6], linestyle=LINES[i % 6], label=name)
    axes.set(xlabel="final normalised return", ylabel="share of runs × tasks above it", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0)
    axes.set_title("Band: 95 % interval")
    axes.legend(loc="lower left")
    return figure


@styled
def difference_intervals(
    rows: Sequence[tuple[str, Interval]], *, title: str, highlight: bool = True
) -> Figure:
    """Forest plot: a labelled paired difference per row, its 95 % interval, the line of no effect.

    ``highlight`` colours the intervals that exclude 0.
    """
    figure, axes = _axes(8.8, 0.42 * len(rows) + 1.3)
    places = np.arange(len(rows))[::-1]
    axes.axvline(0, color="#202020", linewidth=1)
    for y, (_, interval) in zip(places, rows, strict=True):
        colour = COLOURS[1] if highlight and interval.excludes_zero() else COLOURS[0]
        if np.isfinite(interval.low):
            axes.hlines(y, interval.low, interval.high, color=colour, linewidth=2.4)
            text = f"{interval.iqm:+z.3f}  ({interval.low:+z.3f} to {interval.high:+z.3f})"
        else:
            text = f"{interval.iqm:+z.3f}" if np.isfinite(interval.iqm) else "not available"
        if np.isfinite(interval.iqm):
            axes.plot(interval.iqm, y, "o", color=colour, markersize=7)
        _beside(axes, y, text)
    axes.set_yticks(places, [label for label, _ in rows])
    reach = max([0.05, *(abs(x) for _, i in rows for x in (i.iqm, i.low, i.high) if np.isfinite(x))])
    axes.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(-0.6, len(rows) - 0.4), xlabel="paired difference")
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return figure


# ---------------------------------------------------------------- shared pieces


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def reference_lines(
    axes: Axes, numbers: AnyArray, references: Mapping[str, ArrayLike]
) -> list[tuple[float, str, str]]:
    """Draw the curves (E,) of known algorithms over ``numbers`` (E,); their labels for ``end_labels``."""
    labels = []
    for i, (name, values) in enumerate(references.items()):
        curve, colour = np.asarray(values, dtype=np.float64), REFERENCES[i % len(REFERENCES)]
        axes.plot(numbers[: len(curve)], curve, color=colour, linestyle=(0, (1, 1)), linewidth=1.8)
        labels.append((float(curve[-1]), name, colour))
    return labels


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each (height, text, colour) at the right edge, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    shown = sorted((label for label in labels if np.isfinite(label[0])), key=lambda label: label[0])
    points = axes.figure.get_figheight() * 72 * 0.75  # type: ignore[union-attr]
    gap = 12 / points * (top - bottom)
    heights = np.array([label[0] for label in shown])
    for _ in range(100):
        close = gap - np.diff(heights)
        if not (close > 1e-9).any():
            break
        for i in np.flatnonzero(close > 0):
            heights[i] -= close[i] / 2
            heights[i + 1] += close[i] / 2
    for height, (_, text, colour) in zip(heights, shown, strict=True):
        _beside(axes, float(height), text, colour)


def _beside(axes: Axes, height: float, text: str, colour: str = "black") -> None:
    """Write ``text`` right of the axes."""
    axes.text(1.012, height, text, color=colour, transform=axes.get_yaxis_transform(), va="center")
