"""Figures of a model's inside: attention by kind of token, maps of one context, and the border embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, StrMethodFormatter

from compressed_ad.evaluation.attention import Context, Shares
from compressed_ad.evaluation.border_embeddings import Effects, Geometry
from compressed_ad.marking.markers import segments
from compressed_ad.report.figures.style import (
    END,
    INK,
    MARKS,
    MUTED,
    START,
    Figure,
    names_down,
    panels,
    styled,
)
from compressed_ad.types import FloatArray, IntArray


def head_names(n_layer: int, n_head: int) -> list[str]:
    """Layers and heads are counted from 1 wherever a reader sees them."""
    return [f"layer {layer + 1}, head {head + 1}" for layer in range(n_layer) for head in range(n_head)]


@styled
def attention_summary(shares: Shares, title: str) -> Figure:
    """Attention on each kind of tokens by head, above; divided by what lag alone gives, below.

    Intervals that exclude 1 are filled. A head without a ratio (no such token) has no mark.
    """
    n_kind, n_layer, n_head = shares.share.shape
    names = head_names(n_layer, n_head)
    titles = {
        "marked": "on marked tokens",
        "rewarded": "on rewarded tokens",
        "current episode": "on the current episode",
        "border": "on border marks",
    }
    places = -np.arange(len(names))
    size = (2 * n_kind + 1.3, 2 * (0.23 * len(names) + 0.8) + 0.9)
    figure, grid = panels(*size, 2, n_kind, sharey=True)
    for k, kind in enumerate(shares.kinds):
        above, below = grid[:, k]
        share, matched = shares.share[k].ravel(), shares.matched[k].ravel()
        above.axvline(shares.uniform[k], color=INK, linestyle=(0, (2, 2)), linewidth=1.2, label="uniform")
        above.hlines(places, share, matched, color="#b9b9b9", linewidth=1.2, zorder=1)
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 5, "zorder": 2}
        above.plot(matched, places, "s", color=INK, label="lag alone", **hollow)
        above.plot(share, places, "o", color=INK, markersize=5.5, label="attention", zorder=3)
        above.set_xlim(0, 1.12 * max(1e-3, *share, *matched, shares.uniform[k]))
        above.xaxis.set_major_locator(MaxNLocator(3))
        above.xaxis.set_major_formatter(FuncFormatter(lambda x, place: f"{100 * x:.3g} %"))
        above.set_title(titles.get(kind, kind), fontsize=10)
        above.set_xlabel("share of attention")
        _ratios(below, places, *(x[k].ravel() for x in (shares.ratio, shares.low, shares.high)))
    for axes in grid.ravel():
        axes.grid(axis="y", visible=False)
        for row in range(1, n_layer):
            axes.axhline(-row * n_head + 0.5, color="#d0d0d0", linewidth=0.8)
    for first in grid[:, 0]:
        names_down(first, names)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=3)
    return figure


def _ratios(axes: Axes, places: IntArray, ratio: FloatArray, low: FloatArray, high: FloatArray) -> None:
    axes.axvline(1, color=INK, linewidth=1)
    for y, middle, begin, end in zip(places, ratio, low, high, strict=True):
        if np.isfinite([middle, begin, end]).all() and middle > 0:
            face = INK if begin > 1 or end < 1 else "white"
            axes.hlines(y, begin, end, color=INK, linewidth=2)
            axes.plot(middle, y, "o", color=INK, markerfacecolor=face, markersize=5.5)
    known = np.concatenate([ratio, low, high])
    known = known[np.isfinite(known) & (known > 0)]
    reach = 1.1 * max(1.5, *(float(max(x, 1 / x)) for x in known)) if len(known) else 2.0
    axes.set_xscale("log")
    axes.set_xlim(1 / reach, reach)
    ticks = [0.5, 1, 2] if reach < 3 else [0.01, 0.1, 0.3, 1, 3, 10, 100]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.set_xlabel("attention / lag alone")


@styled
def attention_map(context: Context, title: str) -> Figure:
    """Where every head looks in one context: query downwards, token to the right, darker for more.

    Beside both axes: marked segments (bars), rewarded steps (dots), episode starts (ticks across both).
    """
    n_layer, n_head, length, _ = context.maps.shape
    side = min(3.1, 12.5 / n_head)
    size = (side * n_head + 1.0, side * n_layer + 1.0)
    figure, grid = panels(*size, n_layer, n_head, sharex=True, sharey=True)
    shown = np.ma.masked_array(context.maps, np.broadcast_to(~np.tri(length, dtype=bool), context.maps.shape))
    # Near the top there is little to look at, and much attention on it; later rows decide on the scale.
    top = float(np.quantile(context.maps[:, :, length // 4 :].max(axis=-1), 0.9))
    norm = PowerNorm(0.5, vmin=0, vmax=max(top, 1e-6))
    names = head_names(n_layer, n_head)
    for axes, seen, name in zip(grid.ravel(), shown.reshape(-1, length, length), names, strict=True):
        image = axes.imshow(seen, cmap="Greys", norm=norm, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.grid(visible=False)
        _beside_both(axes, context, length)
    for axes in grid[-1]:
        axes.set_xlabel("token")
    for axes in grid[:, 0]:
        axes.set_ylabel("query")
    figure.colorbar(image, ax=grid, label="attention", shrink=0.6, aspect=30, extend="max")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def _beside_both(axes: Axes, context: Context, length: int) -> None:
    """The strips above and left of a map, outside of it."""
    unit = length / 100
    starts = np.flatnonzero(context.episode_start) - 0.5
    axes.vlines(starts, -9.5 * unit, -0.5, color=MUTED, linewidth=0.7, label="episode start")
    axes.hlines(starts, -9.5 * unit, -0.5, color=MUTED, linewidth=0.7)
    line: dict[str, Any] = {"color": MARKS, "linewidth": 3.2, "solid_capstyle": "butt"}
    for k, (begin, end) in enumerate(zip(*segments(context.marked)[1:], strict=True)):
        axes.plot([begin - 0.5, end - 0.5], [-3 * unit] * 2, **line, label="marked" if k == 0 else None)
        axes.plot([-3 * unit] * 2, [begin - 0.5, end - 0.5], **line)
    rewarded = np.flatnonzero(context.rewarded)
    dot: dict[str, Any] = {"marker": ".", "linestyle": "none", "color": INK, "markersize": 2.2}
    axes.plot(rewarded, np.full(len(rewarded), -7 * unit), **dot, label="rewarded")
    axes.plot(np.full(len(rewarded), -7 * unit), rewarded, **dot)
    axes.set_xlim(-10 * unit, length - 0.5)
    axes.set_ylim(length - 0.5, -10 * unit)
    for edge in ("left", "bottom"):
        axes.spines[edge].set_visible(False)


@styled
def border_embeddings(geometries: Sequence[Geometry], effects: Effects, step: int, title: str) -> Figure:
    """The border embeddings: size over training, direction, and what taking or changing marks does.

    Direction and ``effects`` are of the weights at gradient step ``step``, one of ``geometries``.
    """
    figure, ((sizes, directions), (divergence, loss)) = panels(9.3, 7.4, 2, 2)
    start: dict[str, Any] = {"color": START, "marker": "o", "markersize": 5}
    end: dict[str, Any] = {"color": END, "marker": "s", "markersize": 5, "fillstyle": "none"}
    steps, shown = [g.step for g in geometries], next(g for g in geometries if g.step == step)
    sizes.plot(steps, [g.norm_start / g.norm_token for g in geometries], label="<compress>", **start)
    norms = [g.norm_end / g.norm_token for g in geometries]
    sizes.plot(steps, norms, linestyle=(0, (6, 1.5)), label="\\compress>", **end)
    sizes.set(xlabel="gradient step", ylabel="norm / median norm of a token", ylim=(0, None), title="Size")
    sizes.axvline(step, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2, label=f"step {step}, shown beside")
    sizes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    sizes.margins(x=0.1)
    places = -np.arange(len(shown.cosine_start))
    directions.axvline(0, color=INK, linewidth=1)
    for cosines, mark in ((shown.cosine_start, start), (shown.cosine_end, end)):
        directions.plot(list(cosines.values()), places, linestyle="none", **mark)
    directions.set_yticks(places, list(shown.cosine_start))
    between = f"{shown.cosine:.2f}".replace("-", "−")
    directions.set(xlim=(-1.05, 1.05), xlabel="cosine", title=f"Direction; with each other {between}")
    directions.grid(axis="y", visible=False)
    _changes(divergence, effects, effects.divergence, "KL divergence (nats)", "Change of the prediction")
    _changes(loss, effects, effects.cross_entropy, "added cross-entropy (nats)", "Change of the loss")
    loss.set_yticklabels([])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.legend(*divergence.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return figure


def _changes(axes: Axes, effects: Effects, values: FloatArray, label: str, title: str) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    places = -np.arange(len(effects.changes), dtype=float)
    labels = {"inside": "query in a segment", "outside": "query outside", "all": "all queries"}
    # Places of a query are no methods, hence greys.
    for k, (place, grey) in enumerate(zip(effects.places, (INK, "#7c7c7c", "#b4b4b4"), strict=True)):
        middle, low, high = values[:, k].T
        shifted = places + 0.22 * (1 - k)
        axes.hlines(shifted, low, high, color=grey, linewidth=1.8)
        axes.plot(middle, shifted, "osD"[k], color=grey, markersize=5, label=labels[place])
    names_down(axes, effects.changes)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set(xlabel=label, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(3))  # four labels of small numbers overlap
