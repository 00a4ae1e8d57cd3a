"""Returns of models of the study ``compression_full`` on the held-out tasks of Darkroom-Switching over 32
cycles, each of which moves the goal three times and ends where it began; they were trained on 30 episodes of
histories of three cycles.

python results/switches.py [runs/study]    writes results/switches.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from evidence import study_folder, write

from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.report.measures import normalise
from compressed_ad.runs.judge import make_player
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups

ROOT = Path(__file__).parents[1]
N_CYCLE, CYCLE = 32, 18  # cycles, and episodes of one


def lines(out: Path) -> Iterator[list[object]]:
    """Rows of the file: variant, seed, cycle from 1, and its mean normalised return."""
    study = load_study(ROOT / "studies" / "compression_full.yaml", families=["switching"])
    for group in (group for group in groups(study, out) if group.job.trained):
        variant, seed, player = group.plays[0][0].variant, group.job.config.seed, make_player(group.job)
        file, ids = player.data.file, player.data.file.split.heldout
        size: dict[str, Any] = {"rollouts": 2, "episodes": N_CYCLE * CYCLE, "seed": seed}
        played = evaluate_tasks(player.model, player.data.family, file.tasks[ids], **size, **player.options)
        curve = normalise(played, *player.data.scale(ids)).mean(axis=(0, 1))
        for cycle, value in enumerate(np.reshape(curve, (N_CYCLE, CYCLE)).mean(axis=1)):
            yield [variant, seed, cycle + 1, value]


if __name__ == "__main__":
    write("switches.csv", ["variant", "seed", "cycle", "return"], lines(study_folder()))
