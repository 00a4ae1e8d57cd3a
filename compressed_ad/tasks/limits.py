"""The limit of a family: the best that an agent can do that knows the rooms but not which task it plays.

The limits of built-in families with their default parameters are kept in ``limits.json``, which
``python -m benchmarks.limits`` writes. ``limit_search`` finds those of other families.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("limits.json")


@dataclass(frozen=True)
class Limit:
    """Normalised returns by episode, mean over all tasks; the last value holds for all later episodes."""

    reached: tuple[float, ...]  # of an agent that was found, exact
    bound: tuple[float, ...]  # no agent does better in this episode
    bound_total: tuple[float, ...]  # nor over all episodes so far, in sum

    def curve(self, n_episode: int) -> NDArray[np.float64]:
        """(E,) what was reached in each of the first episodes."""
        return _prolonged(self.reached, n_episode)

    def area(self, n_episode: int) -> float:
        """Mean of what was reached in the first episodes."""
        return float(self.curve(n_episode).mean())

    def bound_curve(self, n_episode: int) -> NDArray[np.float64]:
        """(E,) what no agent can exceed in each of the first episodes."""
        return _prolonged(self.bound, n_episode)

    def bound_area(self, n_episode: int) -> float:
        """What the mean of the first episodes of no agent can exceed."""
        known = min(n_episode, len(self.bound_total))
        return (self.bound_total[known - 1] + (n_episode - known) * self.bound[-1]) / n_episode


def _prolonged(values: tuple[float, ...], n: int) -> NDArray[np.float64]:
    return np.array([*values, *[values[-1]] * n][:n])


def shipped_limit(family: str) -> Limit | None:
    """The kept limit of a family as ``call_text`` writes it, such as ``darkroom(size=9)``; None if unknown.

    Known are the built-in families with the parameters of the file, be they given or left out.
    """
    name, _, given = family.partition("(")
    kept = _kept().get(name, {"parameters": {}})
    known = {f"{key}={value}" for key, value in kept["parameters"].items()}
    if "reached" not in kept or not set(given.removesuffix(")").split(", ")) - {""} <= known:
        return None
    return Limit(*(tuple(kept[part]) for part in ("reached", "bound", "bound_total")))


@cache
def _kept() -> dict[str, Any]:
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]
