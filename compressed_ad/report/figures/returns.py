"""Figures of in-context returns on the held-out tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from compressed_ad.report.figures import style
from compressed_ad.report.figures.style import Figure
from compressed_ad.types import AnyArray, BoolArray

NEVER_SOLVED = 0.1
"""A task counts as never solved if no method's normalised final return, averaged over runs, reaches this."""


@style.styled
def in_context_curves(
    bands: Mapping[str, ArrayLike],
    *,
    source: ArrayLike | None = None,
    source_name: str = "source",
    limit: ArrayLike | None = None,
    references: Mapping[str, ArrayLike] | None = None,
    episodes: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Normalised return per in-context episode: bands (3, E) of mean, low and high per method.

    ``source`` (E',) is the source algorithm's normalised return per episode, from scratch, on the same
    tasks; it is cut to the episodes shown. ``limit`` (E,) is the best that an agent can do that knows the
    family, but not the task. ``references`` (E,) are those of known algorithms. ``episodes``
    (E,) numbers the episodes, by default from 1.
    """
    figure, axes = style.canvas(ax, 7.6, 4.4)
    drawn = {name: style.numbers(f"bands[{name!r}]", curve, 3, "E") for name, curve in bands.items()}
    n_episode = max(curve.shape[1] for curve in drawn.values())
    numbers = np.arange(1, n_episode + 1) if episodes is None else np.asarray(episodes)
    labels = [style.level(axes, 0.0, "random"), style.level(axes, 1.0, "optimal")]
    if source is not None:
        learning = style.numbers("source", source, "E")[:n_episode]
        name = f"{source_name}, learning"
        labels.append(style.curve(axes, numbers, learning, name, style.SOURCE, linewidth=1.5))
    if limit is not None:
        labels.append(
            style.curve(axes, numbers, limit, "limit", style.INK, linestyle=style.DASHED, linewidth=1.2)
        )
    labels += _by_episode(axes, numbers, drawn, references or {})
    axes.set_ylabel("normalised return")
    axes.set_ylim(min(-0.08, axes.get_ylim()[0]), max(1.08, min(1.6, axes.get_ylim()[1])))
    style.end_labels(axes, labels)
    return figure


@style.styled
def cumulative_regret(
    bands: Mapping[str, ArrayLike], *, references: Mapping[str, ArrayLike], episodes: ArrayLike
) -> Figure:
    """Regret summed over the in-context episodes so far: bands (3, K) of mean, low and high per method.

    ``references`` (K,) are the means of known algorithms, ``episodes`` (K,) the episodes shown.
    """
    figure, ((axes,),) = style.panels(7.6, 4.4)
    labels = _by_episode(axes, np.asarray(episodes), bands, references)
    axes.set_ylabel("cumulative regret")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    style.end_labels(axes, labels)
    return figure


def _by_episode(
    axes: Axes, numbers: AnyArray, bands: Mapping[str, ArrayLike], references: Mapping[str, ArrayLike]
) -> list[style.Label]:
    """Draw curves over the episodes ``numbers`` (E,); their labels."""
    labels = []
    for i, (name, values) in enumerate(references.items()):
        colour = style.REFERENCES[i % len(style.REFERENCES)]
        labels.append(style.curve(axes, numbers, values, name, colour, linestyle=(0, (1, 1)), linewidth=1.8))
    for name, look in style.looks(bands).items():
        labels.append(style.band(axes, numbers, bands[name], look, name))
    style.episode_axis(axes, numbers[-1])
    axes.set_title("Held-out tasks: mean, band: 95 % interval")
    return labels


@style.styled
def per_task_scatter(scores: Mapping[str, ArrayLike], labels: Sequence[str]) -> Figure:
    """Final normalised return per held-out task: scores (R, N) of each method, ``labels`` (N,).

    Left: the second method against the first. Right: every task by name, hardest first; small dots are
    runs, large ones their mean. Tasks that no method solves are hollow and named.
    """
    names = list(scores)
    values = [style.numbers(f"scores[{name!r}]", score, "R", "N") for name, score in scores.items()]
    means = np.array([v.mean(axis=0) for v in values])
    never: BoolArray = np.all(means < NEVER_SOLVED, axis=0)
    n_task, paired = means.shape[1], len(names) > 1
    height = max(4.2, 0.24 * n_task + 1.5)
    figure, (row,) = style.panels(9.2 if paired else 5.2, height, 1, 1 + paired)
    edge = (min(-0.05, float(np.nanmin(means)) - 0.05), max(1.05, float(np.nanmax(means)) + 0.05))
    if paired:
        axes = row[0]
        axes.plot(edge, edge, color=style.MUTED, linewidth=1)
        axes.scatter(*means[:2, ~never], s=46, c=style.INK, alpha=0.6, edgecolor="white", linewidth=0.6)
        axes.scatter(*means[:2, never], s=46, c="white", edgecolor=style.INK)
        axes.set(xlabel=f"{names[0]}: final normalised return", ylabel=names[1], xlim=edge, ylim=edge)
        axes.set_aspect("equal", anchor="N")
        axes.set_title("One point per held-out task")
        axes.text(0.04, 0.95, f"{names[1]} higher", transform=axes.transAxes, color=style.MUTED, va="top")
        axes.text(0.96, 0.05, f"{names[0]} higher", transform=axes.transAxes, color=style.MUTED, ha="right")
    axes = row[-1]
    order = np.argsort(-means.mean(axis=0), kind="stable")
    shift = np.linspace(0.16, -0.16, len(names)) if paired else np.zeros(1)
    handles = []
    for (name, look), value, mean, aside in zip(
        style.looks(names).items(), values, means, shift, strict=True
    ):
        at = np.arange(n_task) + aside
        dot: dict[str, Any] = {"color": look.color, "marker": look.marker}
        axes.scatter(value[:, order], np.tile(at, (len(value), 1)), s=9, color=look.color, alpha=0.45)
        axes.scatter(mean[order], at, s=44, **dot)
        handles.append(Line2D([], [], linestyle="none", label=name, **dot))
    shown = [f"{name}  never solved" if hard else name for name, hard in zip(labels, never, strict=True)]
    axes.set_yticks(np.arange(n_task), [shown[k] for k in order])
    for k, text in zip(order, axes.get_yticklabels(), strict=True):
        text.set_fontweight("bold" if never[k] else "normal")
    axes.set(xlabel="final normalised return", ylim=(-0.7, n_task - 0.3), xlim=edge)
    axes.set_title("By task, hardest on top")
    figure.legend(handles=handles, loc="outside upper right", ncols=len(names))
    return figure


@style.styled
def goal_map(tasks: AnyArray, maps: Mapping[str, ArrayLike], kinds: Sequence[str]) -> Figure:
    """Normalised final return per goal on the grid, one panel for each title: values (N,), NaN not evaluated.

    ``tasks`` (N, 2) are grid cells (x, y); ``kinds`` (N,) are "train", "validation" or "heldout":
    held-out goals have a thick frame, validation goals a dashed one.
    """
    cells = np.asarray(tasks, dtype=np.int64)
    width, height = (int(n) for n in cells.max(axis=0) + 1)
    n_column = min(2, len(maps))
    n_row = -(-len(maps) // n_column)
    figure, grid_of_axes = style.panels(3.8 * n_column + 1.0, 3.9 * n_row + 0.3, n_row, n_column)
    row = grid_of_axes.ravel()
    for axes in row[len(maps) :]:
        axes.set_axis_off()
    colours = LinearSegmentedColormap.from_list("return", ["#fff3d6", "#E69F00", "#0072B2", "#08306b"])
    images = []
    for axes, (title, values) in zip(row[: len(maps)], maps.items(), strict=True):
        grid = np.full((height, width), np.nan)
        grid[cells[:, 1], cells[:, 0]] = np.asarray(values, dtype=np.float64)
        axes.imshow(np.zeros_like(grid), cmap=ListedColormap([style.FAINT]), origin="lower")
        images.append(axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=1, origin="lower"))
        for (x, y), kind in zip(cells, kinds, strict=True):
            if kind == "train":
                continue
            line: Any = {"lw": 2.2} if kind == "heldout" else {"lw": 1.4, "ls": (0, (2, 1))}
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, **line))
            value = grid[y, x]
            if np.isfinite(value) and max(width, height) <= 12:
                ink = "white" if value > 0.55 else "black"
                axes.text(x, y, f"{value:z.1f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set(xlabel="goal x", ylabel="goal y", xticks=range(0, width, 2), yticks=range(0, height, 2))
        axes.grid(visible=False)
        axes.set_title(title)
    figure.colorbar(images[-1], ax=list(row), label="final normalised return", shrink=0.7, aspect=25)
    return figure


@style.styled
def performance_profile(
    profiles: Mapping[str, ArrayLike], levels: ArrayLike, *, ax: Axes | None = None
) -> Figure:
    """Share of runs x tasks above each level (K,): profiles (3, K) of share, low and high per method."""
    figure, axes = style.canvas(ax, 6.4, 3.8)
    for name, look in style.looks(profiles).items():
        profile = style.numbers(f"profiles[{name!r}]", profiles[name], 3, "K")
        style.band(axes, levels, profile, look, name)
    axes.set(xlabel="final normalised return", ylabel="share of runs × tasks above it", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0)
    axes.set_title("Band: 95 % interval")
    axes.legend(loc="lower left")
    return figure
