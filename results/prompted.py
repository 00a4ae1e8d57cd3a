"""Success of models of the study ``compression_tabular`` on the held-out tasks of Darkroom-Hard, after 1000
steps of their own and after the first 1000 of the source.

python results/prompted.py [runs/study]    writes results/prompted.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evidence import study_folder, write
from forgetting import after_first_steps

from compressed_ad.runs.judge import make_player
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups

ROOT = Path(__file__).parents[1]


def lines(out: Path) -> Iterator[list[object]]:
    """Rows of the file: variant, seed, whose steps came first, success, share that knew the goal."""
    study = load_study(ROOT / "studies" / "compression_tabular.yaml", families=["hard"])
    for group in (group for group in groups(study, out) if group.job.trained):
        variant, seed = group.plays[0][0].variant, group.job.config.seed
        for row in after_first_steps(make_player(group.job), 1000, 900, seed):
            yield [variant, seed, *row]


if __name__ == "__main__":
    write("prompted.csv", ["variant", "seed", "what", "success", "knew"], lines(study_folder()))
