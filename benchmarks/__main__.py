"""All benchmarks: ``python -m benchmarks`` (a few minutes; ``--quick`` only checks that they run).

A table at the end holds what was measured against goals and floors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks import (
    collection,
    compression,
    growth,
    loop,
    memory,
    model,
    published_histories,
    source_algorithms,
    table_learners,
)
from benchmarks.measuring import RESULTS, quick_from_command_line
from compressed_ad.report.tables import plain

GOALS = (
    ("training, default model: share of the matmul peak", "training.share_of_peak", ">= 0.50", "1"),
    ("training, large rooms: share of the matmul peak", "training_rooms.share_of_peak", ">= 0.50", "1"),
    ("training: speed beside PyTorch's kernels", "training.ratio_pytorch", "", ""),
    ("in-context step, 8 environments: ms", "playing.ms_8", "<= 0.6", "playing.ms_8_reading"),
    ("in-context step, 32 environments: ms", "playing.ms_32", "<= 1.2", "playing.ms_32_reading"),
    ("in-context step, 1024 environments: ms", "playing.ms_1024", "", "playing.ms_1024_reading"),
    ("in-context step: speed beside no cache", "evaluation.ratio", "", ""),
    ("collection: times its floor", "collection.gradient_step.times_floor", "<= 1.6", "1"),
    ("collection: speed beside SB3's", "collection.ratio", "", ""),
    ("smoke preset: seconds", "loop.wall_s", "<= 60", ""),
    ("smoke preset, training: cores busy", "loop.train_cores_busy", "", ""),
    ("smoke preset, report: seconds", "loop.report_s", "<= 12", ""),
    ("cad --help: CPU seconds", "loop.help_cpu_s", "<= 0.6", "loop.bare_python_cpu_s"),
)
"""What is measured, where among the results, its goal, and its floor, a number or its place."""


def main() -> None:
    quick = quick_from_command_line(__doc__)
    RESULTS.mkdir(exist_ok=True)
    results: dict[str, Any] = {"collection": collection.run(quick), **model.run(quick)}
    (RESULTS / "collection.json").write_text(json.dumps(results["collection"], indent=2) + "\n")
    compression.run(quick)
    memory.run(quick)
    growth.run(quick)
    source_algorithms.run(quick)
    table_learners.run(quick)
    published_histories.run(quick)
    results["loop"] = loop.run(quick)
    print(f"\n{plain(summary(results))}")


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """The table of ``GOALS``."""

    def number(place: str) -> str:
        found: Any = results
        for key in place.split("."):
            if key not in found:
                return place if place.replace(".", "").isdecimal() else "-"
            found = found[key]
        return f"{found:.3g}"

    rows = [[what, number(place), goal, number(floor)] for what, place, goal, floor in GOALS]
    return [["", "measured", "goal", "floor"], *rows]


if __name__ == "__main__":
    main()
