"""How much of the spread of the study ``headroom`` is chance in play: from rollouts of one model on one task.

python results/rollouts.py [runs/study]    writes results/rollouts.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evidence import ROOT, study_folder, write

from compressed_ad.report.measures import area_under_curve, final_return, normalise
from compressed_ad.report.results import load_evaluation
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups
from compressed_ad.types import FloatArray


def variance(scores: FloatArray) -> float:
    """Variance of the mean of ``scores`` (task, rollout), if the tasks stay and all is played again."""
    n_task, n_rollout = scores.shape
    return float(scores.var(axis=1, ddof=1).mean() / (n_task * n_rollout))


def lines(out: Path) -> Iterator[list[object]]:
    """Rows of the file: family, variant, seed, rollouts on a task, variance of final return and of area."""
    study = load_study(ROOT / "studies" / "headroom.yaml", families=["hard", "large"])
    for group in groups(study, out):
        for cell, _, path in group.plays:
            if path.exists():
                found = load_evaluation(path)
                played = normalise(found["returns_last"], found["random"], found["optimal"])
                scores = final_return(played), area_under_curve(played)
                seed, n_rollout = group.job.config.seed, played.shape[1]
                yield [cell.family, cell.variant, seed, n_rollout, *map(variance, scores)]


if __name__ == "__main__":
    write("rollouts.csv", ["family", "variant", "seed", "rollouts", "final", "auc"], lines(study_folder()))
