"""Whether models learned in context, and how far: what a comparison of them rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressed_ad.errors import listed
from compressed_ad.evaluation import intervals
from compressed_ad.evaluation.intervals import Floats, Interval
from compressed_ad.report.measures import final_return


@dataclass(frozen=True)
class Learning:
    """What a method gains in context: its normalised return in the first episode and in the last tenth."""

    method: str
    first: float
    last: float
    gain: Interval  # last minus first, paired by run and task
    halfway: int  # first episode, counted from 1, whose mean return is at least halfway from first to last

    @property
    def verdict(self) -> str:
        """A method learned if the whole interval of its gain is above 0."""
        if math.isnan(self.gain.low):
            return "too few tasks"
        return "learned" if self.gain.low > 0 else "did not learn"

    def __str__(self) -> str:
        said = f"from {intervals.number(self.first)} in the first episode"
        said += f" to {intervals.number(self.last)} in the last tenth"
        if self.verdict == "learned":
            return f"{said}, with half of the gain by episode {self.halfway}"
        return f"{said} (95 % interval of the gain {self.gain.span('+')})" if self.gain.span() else said


def learning(curves: Mapping[str, Floats], *, seed: int = 0) -> list[Learning]:
    """By method, of normalised ``curves`` (R, N, E); without those of one episode or without any scale."""
    found = []
    for name, values in curves.items():
        first, last = values[..., 0], final_return(values)
        gain = intervals.crossed_bootstrap(last - first, seed=seed)
        if values.shape[-1] > 1 and math.isfinite(gain.value):
            start, end = (float(intervals.mean(scores.ravel())) for scores in (first, last))
            by_episode = intervals.mean(np.moveaxis(values, -1, 0).reshape(values.shape[-1], -1))
            halfway = int(np.argmax(by_episode >= (start + end) / 2)) + 1
            found.append(Learning(name, start, end, gain, halfway))
    return found


def learning_sentence(found: Sequence[Learning]) -> str:
    """Which methods learned in context and how far, in words; empty if nothing is known."""
    words = {
        "learned": "learned in context",
        "did not learn": "did not learn in context",
        "too few tasks": "cannot be said to learn in context or not, since one task tells nothing of others",
    }
    said = []
    for verdict, what in words.items():
        group = [one for one in found if one.verdict == verdict]
        if group:
            names = listed(one.method for one in group)
            if verdict == "learned" and 1 < len(group) == len(found):
                names = "Both models" if len(found) == 2 else f"All {len(found)} models"
            details = "; ".join(f"{one.method} {one}" if len(group) > 1 else str(one) for one in group)
            said.append(f"{names} {what}: {details}.")
    if len(found) > 1 and any(one.verdict == "did not learn" for one in found):
        said.append("A comparison with a model that did not learn in context says little.")
    return " ".join(said)
