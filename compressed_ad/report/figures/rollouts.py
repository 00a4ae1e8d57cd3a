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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter
from numpy.typing import ArrayLike

from compressed_ad.report.figures.style import DASHED, FAINT, INK, RANDOM, end_labels, looks, panels, styled
from compressed_ad.types import FloatArray, IntArray

TIME = LinearSegmentedColormap.from_list("time", ["#a9cbe4", "#3f8fc4", "#08306b"])
_REACH = 0.26
"""How far, in cells, a path moves aside between its first and its last step."""


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


@styled
def paths(rows: Sequence[PathRow], size: int) -> Figure:
    """Episodes on a ``size`` x ``size`` grid, one row per task; arrows darken with time.

    Dots are steps in place. A path moves slightly to the upper right as it goes on, so that what is walked
    twice is seen twice.
    """
    n_row, n_column = len(rows), max(len(row.paths) for row in rows)
    figure, grid = panels(2.75 * n_column + 0.5, 2.95 * n_row + 0.75, n_row, n_column)
    for row, line in zip(rows, grid, strict=True):
        for path, axes in zip(row.paths, line, strict=True):
            _grid(axes, size)
            _goals(axes, row.goals, size)
            _walked(axes, path.cells)
            axes.set_title(path.title, fontsize=10)
        line[0].set_ylabel(row.label)
    figure.legend(handles=_path_legend(), loc="outside lower center", ncols=5, handletextpad=0.4, fontsize=9)
    return figure


def _grid(axes: Axes, size: int) -> None:
    axes.set(xlim=(-0.5, size - 0.5), ylim=(-0.5, size - 0.5), xticks=[], yticks=[])
    axes.set_aspect("equal")
    edges = np.arange(size + 1) - 0.5
    axes.hlines(edges, -0.5, size - 0.5, color=FAINT, linewidth=0.8, zorder=0)
    axes.vlines(edges, -0.5, size - 0.5, color=FAINT, linewidth=0.8, zorder=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


def _goals(axes: Axes, goals: IntArray, size: int) -> None:
    width = min(19.0, 150 / size)
    for number, (x, y) in enumerate(goals):
        axes.plot(x, y, "*", markersize=width, markeredgewidth=1.1, zorder=2, clip_on=False, **_GOAL)
        if len(goals) > 1:
            axes.text(x, y, f"{number + 1}", ha="center", va="center", fontsize=7, zorder=6)


def _walked(axes: Axes, cells: IntArray) -> None:
    """Arrows between ``cells`` (K + 1, 2), each from where the one before it ended."""
    n_step = len(cells) - 1
    aside = np.linspace(-_REACH, _REACH, n_step + 1)[:, None]
    x, y = (cells + aside).T
    shade = np.arange(n_step) / max(n_step - 1, 1)
    moved = (np.diff(cells, axis=0) != 0).any(axis=1)
    if moved.any():
        axes.quiver(
            *(x[:-1][moved], y[:-1][moved], np.diff(x)[moved], np.diff(y)[moved], shade[moved]),
            cmap=TIME, clim=(0, 1), angles="xy", scale_units="xy", scale=1, units="dots", width=3.2,
            headwidth=3.4, headlength=4, headaxislength=3.6, zorder=4,
        )  # fmt: skip
    axes.scatter(x[1:][~moved], y[1:][~moved], s=8, c=shade[~moved], cmap=TIME, vmin=0, vmax=1, zorder=4)
    axes.plot(x[0], y[0], "s", markersize=7, markeredgewidth=1.4, zorder=5, **_START)


_GOAL: dict[str, Any] = {"markerfacecolor": "#ffd873", "markeredgecolor": "black"}
_START: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": "black"}


def _path_legend() -> list[Line2D]:
    plain: dict[str, Any] = {"linestyle": "none"}
    return [
        Line2D([], [], marker="s", markersize=7, label="start", **_START, **plain),
        Line2D([], [], marker="*", markersize=13, label="reward", **_GOAL, **plain),
        Line2D([], [], color=TIME(0.0), linewidth=3, label="first steps"),
        Line2D([], [], color=TIME(1.0), linewidth=3, label="last steps"),
        Line2D([], [], marker=".", color=TIME(0.6), label="step in place", **plain),
    ]


@styled
def found_curves(
    model: ArrayLike, walk: ArrayLike | None, *, name: str, exact: bool, n_rollout: int
) -> Figure:
    """Share of rollouts that had met the reward by each episode, (E,), of the model and the random walk.

    ``exact``: the random walk's is computed, not played. ``n_rollout``: how many the model's share is of.
    """
    figure, ((axes,),) = panels(7.2, 3.8)
    colour = looks([name])[name].color
    curve = np.asarray(model, np.float64)
    episodes = np.arange(1, len(curve) + 1)
    labels = [(float(curve[-1]), name, colour)]
    axes.step(episodes, curve, where="post", color=colour)
    if walk is not None:
        reference = np.asarray(walk, np.float64)
        labels.append((float(reference[-1]), "random walk" + (", exact" if exact else ""), RANDOM))
        axes.step(episodes, reference, where="post", color=RANDOM, linestyle=DASHED, linewidth=1.6)
    axes.set(xlabel="in-context episode", ylabel="rollouts that met the reward", xlim=(1, max(2, len(curve))))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_title(f"By the end of each episode, {n_rollout} rollouts")
    end_labels(axes, labels)
    return figure


@styled
def coverage_curves(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, share: bool, title: str) -> Figure:
    """Distinct places seen by the end of each episode: (E,) overall and (E,) up to the first reward, by name.

    The first name is the model's, the second the random walk's. ``share``: of all cells, else a number.
    """
    figure, (columns,) = panels(8.6, 3.8, 1, 2, sharey=True)
    for column, (axes, title_above) in enumerate(
        zip(columns, ("overall", "until the first reward"), strict=True)
    ):
        labels, top = [], 0.0
        for k, (name, pair) in enumerate(curves.items()):
            values = np.asarray(pair[column], np.float64)
            colour, line = (looks([name])[name].color, "-") if k == 0 else (RANDOM, DASHED)
            axes.plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=line)
            labels.append((float(values[-1]), name, colour))
            top = max(top, len(values))
        axes.set(xlabel="in-context episode", xlim=(1, max(2, top)), title=title_above)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if column == 1:
            axes.set_ylim(bottom=0)
            end_labels(axes, labels)
    columns[0].set_ylabel("cells visited" if share else "distinct observations")
    if share:
        columns[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


@styled
def first_reward_by_distance(
    distance: ArrayLike, model: ArrayLike, walk: ArrayLike | None, *, name: str
) -> Figure:
    """Steps to the first reward by the fewest steps it could take (N,): medians and quartiles of each task.

    ``model`` (N, M) and ``walk`` (N, M') are infinite where the reward was never met; a median or a quartile
    that is infinite stands at "not reached".
    """
    near = np.asarray(distance, np.float64)
    groups: dict[str, tuple[FloatArray, float, dict[str, Any]]]
    groups = {
        name: (np.asarray(model, np.float64), -0.22, {"marker": "o", "color": looks([name])[name].color})
    }
    if walk is not None:
        hollow = {"marker": "D", "color": RANDOM, "markerfacecolor": "white"}
        groups["random walk"] = (np.asarray(walk, np.float64), 0.22, hollow)
    known = np.concatenate([times[np.isfinite(times)] for times, _, _ in groups.values()])
    highest = float(max(known.max(initial=1.0), near[np.isfinite(near)].max(initial=1.0)))
    never = 2.2 * highest
    figure, ((axes,),) = panels(7.2, 4.2)
    way = np.linspace(1.0, near[np.isfinite(near)].max(initial=1.0), 50)
    axes.plot(way, way, color=INK, linestyle=(0, (2, 2)), linewidth=1.2, label="shortest way")
    for label, (times, side, style) in groups.items():
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75], axis=1, method="inverted_cdf")
        place = near + side + _apart(near)
        low, middle, high = (np.minimum(value, never) for value in (low, middle, high))
        axes.vlines(place, low, high, color=style["color"], linewidth=1.4, alpha=0.75)
        axes.plot(place, middle, linestyle="none", markersize=6, label=label, zorder=3, **style)
    axes.set_yscale("log")
    axes.set_ylim(0.8, 1.35 * never)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if t <= highest]
    axes.yaxis.set_major_locator(FixedLocator([*ticks, never]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_yticks([*ticks, never], [*(f"{t:,}" for t in ticks), "not\nreached"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhspan(1.45 * highest, 1.35 * never, color=FAINT, alpha=0.5, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="fewest steps to the reward", ylabel="steps until the first reward")
    axes.set_title("One mark per task: median over its rollouts, bar: middle half")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _apart(near: FloatArray) -> FloatArray:
    """(N,) small shifts that part tasks at one distance."""
    shift = np.zeros(len(near))
    for value in np.unique(near):
        same = np.flatnonzero(near == value)
        shift[same] = (np.arange(len(same)) - (len(same) - 1) / 2) * min(0.09, 0.34 / len(same))
    return shift
