"""How the scripts of this folder find a study's runs, write what they measured, and read it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "darkroom": "Darkroom",
    "key_to_door": "Key-to-Door",
    "permuted": "Darkroom-Permuted",
    "large": "Darkroom-Large",
    "hard": "Darkroom-Hard",
    "recall": "Darkroom-Recall",
    "switching": "Darkroom-Switching",
    "bandit": "Bernoulli bandits",
    "point_mass": "Point mass",
    "wide": "Darkroom, 11x11",
}
"""Families of studies by their names on pages."""


def study_folder() -> Path:
    """The output folder of the studies: the first argument, or ``runs/study``."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "study"


def write(name: str, head: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """A CSV file of this folder, which replaces the kept one when all lines are known; without any, exit."""
    kept = ROOT / "results" / name
    unfinished = kept.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        found = False
        for line in lines:
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in line])
            file.flush()
            found = True
    if not found:
        unfinished.unlink()
        sys.exit(f"no trained run was found in {study_folder()}, so {kept} stays as it is")
    unfinished.replace(kept)


def lines_of(name: str) -> list[dict[str, str]]:
    """What ``write`` wrote."""
    with (ROOT / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
