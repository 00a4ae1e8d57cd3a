"""The figure of cumulative regret."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from compressed_ad.report.figures.style import COLOURS, LINES, end_labels, reference_lines, styled


@styled
def cumulative_regret(
    bands: Mapping[str, ArrayLike], *, references: Mapping[str, ArrayLike], episodes: ArrayLike
) -> Figure:
    """Regret summed over the in-context episodes so far: bands (3, K) of mean, low and high per method.

    ``references`` (K,) are the means of known algorithms, ``episodes`` (K,) the episodes shown.
    """
    figure = Figure(figsize=(7.6, 4.4))
    axes = figure.subplots()
    numbers = np.asarray(episodes)
    labels = reference_lines(axes, numbers, references)
    for i, (name, band) in enumerate(bands.items()):
        middle, low, high = np.asarray(band, dtype=np.float64)
        axes.fill_between(numbers, low, high, color=COLOURS[i % 6], alpha=0.15, linewidth=0)
        axes.plot(numbers, middle, color=COLOURS[i % 6], linestyle=LINES[i % 6])
        labels.append((float(middle[-1]), name, COLOURS[i % 6]))
    axes.set(xlabel="in-context episode", ylabel="cumulative regret", xlim=(1, max(2, numbers[-1])))
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    axes.set_title("Held-out tasks: mean, band: 95 % interval")
    end_labels(axes, labels)
    return figure
