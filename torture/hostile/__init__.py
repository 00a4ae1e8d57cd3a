"""Hostile and absurd input: nothing runs, nothing hangs, nothing is taken for a number."""

from __future__ import annotations

from collections.abc import Iterator

from torture.hostile import histories, runs, configs, imports, names  # isort: skip  # in the order of their cases
from torture.hostile.case import CASES, Case, trial
from torture.stages import Base
from torture.trials import Trial

__all__ = ["configs", "histories", "imports", "names", "runs", "trials"]


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    base("evaluated")
    for number, case in enumerate(CASES):
        readers = case.readers if long else tuple(r for r in case.readers if r not in ("report", "train"))
        if long or (number % 8 == seed % 8) or "os:system" in case.name:
            yield trial(base, Case(case.kind, case.name, case.make, readers, case.commands, case.fine))
