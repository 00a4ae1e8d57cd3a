"""What all figures share: colours, style, rendering, curves with labels at their ends, axes.

Every plotting function takes arrays and returns a matplotlib ``Figure``, which notebooks show; no global
state is touched. Some with one panel also draw on ``ax``, axes of yours, and return their figure. Colours are
those of Okabe and Ito (told apart with any colour vision); methods also differ by line style, so that a print
in grey stays readable.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from compressed_ad.errors import UsageError

Label = tuple[float, str, str]
"""Height, text and colour of a label at the right edge."""
P = ParamSpec("P")


class NotebookFigure(Figure):
    """A matplotlib figure that notebooks show, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        return figure_to_png(self, dpi=100)


INK = "#202020"
MUTED = "#6b6b6b"
FAINT = "#e4e4e4"
SOURCE = "#009E73"
MARKS = "#E69F00"
RANDOM = "#8c8c8c"
DASHED: Any = (0, (5, 2))
START, END = MARKS, "#8c6200"
REFERENCES = ("#000000", "#8a5a2b", "#7f7f00")
_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#7a4fa3", "#a6761d")
_DASHES = ((6, 1.5), (3, 1, 1, 1), (1.5, 1), (8, 2, 2, 2), (4, 3))
_LINES: tuple[Any, ...] = ("-", *((0, dashes) for dashes in _DASHES))
_MARKERS = "oDs^vP"
_PLACES = {"AD": 0, "CompressedAD": 1, "CompressedADv2": 1, "MarkedAttentionAD": 2}


@dataclass(frozen=True)
class Look:
    """How one method is drawn, in every figure alike."""

    color: str
    linestyle: Any
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.linestyle}


def looks(methods: Iterable[str], among: Iterable[str] = ()) -> dict[str, Look]:
    """How ``methods`` are drawn: the built-in ones always alike, others by their order.

    Figures that show different methods ``among`` the same ones draw each alike.
    """
    shown = list(dict.fromkeys(methods))
    names = list(dict.fromkeys([*among, *shown]))
    free = [k for k in (2, 3, 4, 5, 1, 0) if k not in {_PLACES.get(name) for name in names}]
    others = [name for name in names if name not in _PLACES]
    found = {}
    for name in names:
        again, place = (0, 0) if name in _PLACES else divmod(others.index(name), len(free))
        k = _PLACES.get(name, free[place])
        found[name] = Look(_COLOURS[k], _LINES[(k + again) % 6], _MARKERS[(k + again) % 6])
    return {name: found[name] for name in shown}


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
    "pdf.fonttype": 42,
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
    return _render(figure, "png", dpi=dpi)


def figure_to_pdf(figure: Figure) -> bytes:
    """The figure as PDF, text as text with its font; equal figures give equal bytes."""
    return _render(figure, "pdf", metadata={"CreationDate": None})


FORMATS: dict[str, Callable[[Figure], bytes]] = {
    "png": figure_to_png,
    "svg": figure_to_svg,
    "pdf": figure_to_pdf,
}
"""What figures are written as, by the ending of the file."""


def forms(figure: Figure | None, formats: Collection[str]) -> dict[str, bytes]:
    """The figure in those ``formats``, drawn once for each; nothing of a figure that is None."""
    return {} if figure is None else {form: FORMATS[form](figure) for form in FORMATS if form in formats}


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, **options)
    figure.set_layout_engine("none")  # what was laid out once need not be laid out again
    return buffer.getvalue()


def panels(
    width: float, height: float, n_row: int = 1, n_column: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes (n_row, n_column); one of them by default."""
    figure = NotebookFigure(figsize=(width, height))
    return figure, figure.subplots(n_row, n_column, squeeze=False, **options)


def canvas(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The axes ``ax`` and their figure, or those of a new figure."""
    if ax is None:
        figure, ((axes,),) = panels(width, height)
        return figure, axes
    found = ax.get_figure(root=True)
    assert found is not None  # axes are made by a figure
    return found, ax


def numbers(name: str, values: ArrayLike, *shape: str | int) -> NDArray[np.float64]:
    """``values`` as an array, of as many dimensions as ``shape`` has; ``UsageError`` says which it must have.

    A number in ``shape`` is the length of that dimension; letters stand for any.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.asarray(values, object)
    fits = array.dtype != object and array.ndim == len(shape)
    if not fits or any(
        n != want for n, want in zip(array.shape, shape, strict=True) if isinstance(want, int)
    ):
        wanted = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
        found = "rows of different lengths" if array.dtype == object else f"shape {array.shape}"
        raise UsageError(f"{name}: expected numbers of shape ({wanted}), got {found}")
    return array


def curve(axes: Axes, x: ArrayLike, values: ArrayLike, name: str, colour: str, **line: Any) -> Label:
    """Draw ``values`` (E,) over the first E of ``x``; the label for their end."""
    heights = np.asarray(values, dtype=np.float64)
    axes.plot(np.asarray(x)[: len(heights)], heights, color=colour, **line)
    return float(heights[-1]), name, colour


def band(axes: Axes, x: ArrayLike, values: ArrayLike, look: Look, name: str) -> Label:
    """Draw middle, low and high (3, E) over the first E of ``x``; the label for their end."""
    middle, low, high = np.asarray(values, dtype=np.float64)
    area: Any = {"facecolor": (look.color, 0.13), "edgecolor": (look.color, 0.6), "linewidth": 0.7}
    axes.fill_between(np.asarray(x)[: len(low)], low, high, **area)
    return curve(axes, x, middle, name, look.color, linestyle=look.linestyle, label=name)


def level(axes: Axes, height: float, name: str) -> Label:
    """A known return as a faint line; its label."""
    axes.axhline(height, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
    return height, name, MUTED


def episode_axis(axes: Axes, last: float, n_tick: int = 8) -> None:
    axes.set(xlabel="in-context episode", xlim=(1, max(2, last)))
    axes.xaxis.set_major_locator(MaxNLocator(n_tick, integer=True, min_n_ticks=1))


def names_down(axes: Axes, names: Sequence[str]) -> None:
    """One line of the figure for each name, at the heights 0, -1, ..."""
    axes.set_yticks(-np.arange(len(names)), names)
    axes.set_ylim(-len(names) + 0.4, 0.6)


def end_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each (height, text, colour) at the right edge, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    shown = sorted((label for label in labels if np.isfinite(label[0])), key=lambda label: label[0])
    points = axes.get_window_extent().height * 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
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
        beside(axes, float(height), text, colour)


def beside(axes: Axes, height: float, text: str, colour: str = "black") -> None:
    axes.text(1.012, height, text, color=colour, transform=axes.get_yaxis_transform(), va="center")
