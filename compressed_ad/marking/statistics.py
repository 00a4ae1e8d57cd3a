"""How much of histories is marked, overall and over the course of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressed_ad.types import AnyArray

N_PHASE = 10
GUIDE: Mapping[str, Any] = {"on_policy_threshold": 0.7, "compression_window": 10}
"""The guide's settings of the marker."""


@dataclass(frozen=True)
class MarkingStatistics:
    total_by_phase: tuple[int, ...]  # (10,) steps
    compressed_by_phase: tuple[int, ...]  # (10,) marked steps

    @property
    def total_steps(self) -> int:
        return sum(self.total_by_phase)

    @property
    def compressed_steps(self) -> int:
        return sum(self.compressed_by_phase)

    @property
    def compression_ratio(self) -> float:
        """Marked fraction of all steps; 0 if there are none."""
        return self.compressed_steps / max(self.total_steps, 1)

    @property
    def ratio_by_phase(self) -> list[float]:
        """Marked fraction of each tenth of training; NaN for a tenth without steps."""
        pairs = zip(self.compressed_by_phase, self.total_by_phase, strict=True)
        return [marked / total if total else float("nan") for marked, total in pairs]

    def advice(self, settings: Mapping[str, Any] = GUIDE) -> list[str]:
        """The guide's advice if the ratio is below 10 % or above 80 %, otherwise empty.

        ``settings`` are the marker's: what it lacks is not advised, nor a number that it has passed already.
        """
        given = (settings.get(key) for key in ("on_policy_threshold", "compression_window"))
        # Markers of one's own may mean something else by these names.
        threshold, window = (value if isinstance(value, int | float) else None for value in given)
        if threshold is None and window is None:
            return []

        def change(how: str, key: str, value: Any, tried: str, better: bool) -> list[str]:
            return [] if value is None else [f"  {how} {key}{f' (try {tried})' * better}"]

        if self.total_steps and self.compression_ratio < 0.1:
            return [
                "Few steps are marked (< 10%). What helps:",
                *change("lower", "on_policy_threshold", threshold, "0.5-0.6", (threshold or 0) > 0.6),
                *change("reduce", "compression_window", window, "5", (window or 0) > 5),
                "  train the source algorithm longer (more confident policies)",
                "  check that the source algorithm learns (its learning curve: cad inspect)",
            ]
        if self.compression_ratio > 0.8:
            return [
                "Most steps are marked (> 80%). What helps:",
                *change("raise", "on_policy_threshold", threshold, "0.8-0.9", (threshold or 0) < 0.8),
                *change("increase", "compression_window", window, "15-20", (window or 0) < 15),
                "  check that the source algorithm has not overfit (diverse behavior is good)",
            ]
        return []

    def text(self, settings: Mapping[str, Any] = GUIDE) -> str:
        """The statistics in the guide's form, the tenths of training, and the advice if any applies.

        ``settings`` are those of the marker.
        """
        phases = " ".join("-" if np.isnan(r) else f"{100 * r:.0f}%" for r in self.ratio_by_phase)
        lines = [
            "Compression Statistics:",
            f"  Total steps: {self.total_steps}",
            f"  Compressed steps: {self.compressed_steps}",
            f"  Compression ratio: {100 * self.compression_ratio:.1f}%",
            f"  By tenth of training: {phases}",
        ]
        return "\n".join([*lines, *self.advice(settings)])


def marking_statistics(masks: Iterable[AnyArray]) -> MarkingStatistics:
    """Statistics of the masks (..., T) of any number of tasks, whose T may differ."""
    total, marked = np.zeros(N_PHASE, dtype=np.int64), np.zeros(N_PHASE, dtype=np.int64)
    for mask in masks:
        n_step = mask.shape[-1]
        phases = np.broadcast_to(np.arange(n_step) * N_PHASE // max(n_step, 1), mask.shape)
        total += np.bincount(phases.ravel(), minlength=N_PHASE)
        marked += np.bincount(phases[mask], minlength=N_PHASE)
    return MarkingStatistics(tuple(total.tolist()), tuple(marked.tolist()))


def total_marking(statistics: Iterable[MarkingStatistics]) -> MarkingStatistics:
    """Statistics of several tasks together."""
    pairs = [(task.total_by_phase, task.compressed_by_phase) for task in statistics]
    total, compressed = np.sum(pairs, axis=0).tolist()
    return MarkingStatistics(tuple(total), tuple(compressed))
