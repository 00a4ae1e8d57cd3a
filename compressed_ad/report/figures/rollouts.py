"""Figures of in-context episodes: paths on the grid, how much of it is seen, when the reward is met.

The model has the colour of its method, the random walk beside it is grey, dashed and hollow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike

from compressed_ad.report.figures import style
from compressed_ad.report.figures.style import Figure
from compressed_ad.types import IntArray

TIME = LinearSegmentedColormap.from_list("time", ["#a9cbe4", "#3f8fc4", "#08306b"])
_MARK: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black"}
_START: dict[str, Any] = {**_MARK, "marker": "s", "markerfacecolor": "white"}


@dataclass(frozen=True)
class Path:
    """One in-context episode on a grid, its successive cells (K + 1, 2) from the start on."""

    title: str
    cells: IntArray


@dataclass(frozen=True)
class PathRow:
    """A task's episodes from early to late, and its rewarded cells (G, 2) in the order in which they pay."""

    label: str
    goals: IntArray
    paths: Sequence[Path]


@style.styled
def paths(rows: Sequence[PathRow], size: int) -> Figure:
    """Episodes on a ``size`` x ``size`` grid, one row per task; arrows darken with time.

    Dots are steps in place. A path moves slightly to the upper right as it goes on, so that what is walked
    twice is seen twice.
    """
    n_row, n_column = len(rows), max(len(row.paths) for row in rows)
    figure, grid = style.panels(2.75 * n_column + 0.5, 2.95 * n_row + 0.75, n_row, n_column)
    star = {**_MARK, "marker": "*", "markerfacecolor": "#ffd873"}
    edges = np.arange(size + 1) - 0.5
    for axes in grid.ravel():
        axes.set(xlim=(-0.5, size - 0.5), ylim=(-0.5, size - 0.5), xticks=[], yticks=[])
        axes.set_aspect("equal")
        axes.hlines(edges, -0.5, size - 0.5, color=style.FAINT, linewidth=0.8, zorder=0)
        axes.vlines(edges, -0.5, size - 0.5, color=style.FAINT, linewidth=0.8, zorder=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
    for row, line in zip(rows, grid, strict=True):
        for path, axes in zip(row.paths, line, strict=True):
            for number, (x, y) in enumerate(row.goals):
                width = min(19.0, 150 / size)
                axes.plot(x, y, markersize=width, markeredgewidth=1.1, zorder=2, clip_on=False, **star)
                if len(row.goals) > 1:
                    axes.text(x, y, f"{number + 1}", ha="center", va="center", fontsize=7, zorder=6)
            _walked(axes, path.cells)
            axes.set_title(path.title, fontsize=10)
        line[0].set_ylabel(row.label)
    handles = [
        Line2D([], [], markersize=7, label="start", **_START),
        Line2D([], [], markersize=13, label="reward", **star),
        Line2D([], [], color=TIME(0.0), linewidth=3, label="first steps"),
        Line2D([], [], color=TIME(1.0), linewidth=3, label="last steps"),
        Line2D([], [], linestyle="none", marker=".", color=TIME(0.6), label="step in place"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, handletextpad=0.4, fontsize=9)
    return figure


def _walked(axes: Axes, cells: IntArray) -> None:
    """Arrows between ``cells`` (K + 1, 2), each from where the one before it ended."""
    n_step = len(cells) - 1
    x, y = (cells + np.linspace(-0.26, 0.26, n_step + 1)[:, None]).T
    shade = np.arange(n_step) / max(n_step - 1, 1)
    moved = (np.diff(cells, axis=0) != 0).any(axis=1)
    if moved.any():
        axes.quiver(
            *(x[:-1][moved], y[:-1][moved], np.diff(x)[moved], np.diff(y)[moved], shade[moved]),
            cmap=TIME, clim=(0, 1), angles="xy", scale_units="xy", scale=1, units="dots", width=3.2,
            headwidth=3.4, headlength=4, headaxislength=3.6, zorder=4,
        )  # fmt: skip
    axes.scatter(x[1:][~moved], y[1:][~moved], s=8, c=shade[~moved], cmap=TIME, vmin=0, vmax=1, zorder=4)
    axes.plot(x[0], y[0], markersize=7, markeredgewidth=1.4, zorder=5, **_START)


@style.styled
def found_curves(
    model: ArrayLike, walk: ArrayLike | None, *, name: str, exact: bool, n_rollout: int
) -> Figure:
    """Share of rollouts that had met the reward by each episode, (E,), of the model and the random walk.

    ``exact``: the random walk's is computed, not played. ``n_rollout``: how many the model's share is of.
    """
    figure, ((axes,),) = style.panels(7.2, 3.8)
    n_episode = np.size(model)
    episodes = np.arange(1, n_episode + 1)
    labels = [style.curve(axes, episodes, model, name, style.looks([name])[name].color)]
    if walk is not None:
        line = {"linestyle": style.DASHED, "linewidth": 1.6}
        label = "random walk" + ", exact" * exact
        labels.append(style.curve(axes, episodes, walk, label, style.RANDOM, **line))
    style.episode_axis(axes, n_episode)
    axes.set(ylabel="rollouts that met the reward", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"By the end of each episode, {n_rollout} rollouts")
    style.end_labels(axes, labels)
    return figure


@style.styled
def coverage_curves(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, share: bool, title: str) -> Figure:
    """Distinct places seen by the end of each episode: (E,) overall and (E,) up to the first reward, by name.

    The first name is the model's, the second the random walk's. ``share``: of all cells, else a number.
    """
    figure, (columns,) = style.panels(8.6, 3.8, 1, 2, sharey=True)
    n_episode = max(np.size(overall) for overall, _ in curves.values())
    episodes = np.arange(1, n_episode + 1)
    for column, axes in enumerate(columns):
        labels = []
        for k, (name, pair) in enumerate(curves.items()):
            colour, line = (style.looks([name])[name].color, "-") if k == 0 else (style.RANDOM, style.DASHED)
            labels.append(style.curve(axes, episodes, pair[column], name, colour, linestyle=line))
        axes.set_title(("overall", "until the first reward")[column])
        style.episode_axis(axes, n_episode, 6)
    columns[1].set_ylim(bottom=0)
    style.end_labels(columns[1], labels)
    columns[0].set_ylabel("cells visited" if share else "distinct observations")
    if share:
        columns[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


@style.styled
def first_reward_by_distance(
    distance: ArrayLike, model: ArrayLike, walk: ArrayLike | None, *, name: str
) -> Figure:
    """Steps to the first reward by the fewest steps it could take (N,): medians and quartiles of each task.

    ``model`` (N, M) and ``walk`` (N, M') are infinite where the reward was never met; a median or a quartile
    that is infinite stands at "not reached".
    """
    near = np.asarray(distance, np.float64)
    plain = {"marker": "o", "color": style.looks([name])[name].color}
    groups = [(name, np.asarray(model, np.float64), -0.22, plain)]
    if walk is not None:
        hollow = {"marker": "D", "color": style.RANDOM, "markerfacecolor": "white"}
        groups.append(("random walk", np.asarray(walk, np.float64), 0.22, hollow))
    apart = np.zeros(len(near))  # small shifts part tasks at one distance
    for value in np.unique(near):
        same = np.flatnonzero(near == value)
        apart[same] = (np.arange(len(same)) - (len(same) - 1) / 2) * min(0.09, 0.34 / len(same))
    known = np.concatenate([times[np.isfinite(times)] for _, times, _, _ in groups])
    farthest = near[np.isfinite(near)].max(initial=1.0)
    highest = float(known.max(initial=farthest))
    never = 2.2 * highest
    figure, ((axes,),) = style.panels(7.2, 4.2)
    way = np.linspace(1.0, farthest, 50)
    axes.plot(way, way, color=style.INK, linestyle=(0, (2, 2)), linewidth=1.2, label="shortest way")
    for label, times, side, mark in groups:
        quartiles = np.quantile(times, [0.25, 0.5, 0.75], axis=1, method="inverted_cdf")
        low, middle, high = np.minimum(quartiles, never)
        place = near + side + apart
        axes.vlines(place, low, high, color=mark["color"], linewidth=1.4, alpha=0.75)
        axes.plot(place, middle, linestyle="none", markersize=6, label=label, zorder=3, **mark)
    axes.set_yscale("log")
    axes.set_ylim(0.8, 1.35 * never)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if t <= highest]
    axes.set_yticks([*ticks, never], [*(f"{t:,}" for t in ticks), "not\nreached"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhspan(1.45 * highest, 1.35 * never, color=style.FAINT, alpha=0.5, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="fewest steps to the reward", ylabel="steps until the first reward")
    axes.set_title("One mark per task: median over its rollouts, bar: middle half")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
