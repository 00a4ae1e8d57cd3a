"""What the marks of a study's models do, what the models explore, and how much each setting marks.

python results/inside.py [runs/study]    writes results/inside.csv, exploration.csv, marked.csv
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from evidence import study_folder, write

from compressed_ad.histories.file import HistoryFile
from compressed_ad.marking.apply import mark_all
from compressed_ad.runs.explore import play
from compressed_ad.runs.look_inside import examine_model
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import Group, groups, history_of

ROOT = Path(__file__).parents[1]
RUNS = 6


def finished(name: str, variant: str, out: Path) -> list[Group]:
    """The first runs of a variant on Darkroom."""
    study = load_study(ROOT / "studies" / f"{name}.yaml", families=["darkroom"])
    parts = [g for g in groups(study, out) if g.plays[0][0].variant == variant and g.job.trained]
    return parts[:RUNS]


def marks(out: Path) -> Iterable[list[object]]:
    """Size of the border embeddings, and what becomes of the prediction without the marks."""
    for name, variant in (("guide", "CompressedAD"), ("why", "dropout"), ("controls", "random")):
        for group in finished(name, variant, out):
            found = examine_model(group.job)
            effects, geometry = found.effects, found.geometry[-1]
            assert effects is not None
            ratio = found.shares.ratio[found.shares.kinds.index("marked")]
            yield [
                variant,
                group.job.config.seed,
                geometry.norm_start / geometry.norm_token,
                geometry.norm_end / geometry.norm_token,
                *(
                    float(values[effects.changes.index(change), -1, 0])
                    for change in ("no marks", "another window's marks")
                    for values in (effects.divergence, effects.cross_entropy)
                ),
                float(np.exp(np.log(ratio).mean())),
            ]


def exploration(out: Path) -> Iterable[list[object]]:
    """When the reward is met, and what is seen, by episode."""
    for variant in ("AD", "prolong"):
        for group in finished("frontier", variant, out):
            ids = HistoryFile(group.job.history).split.heldout
            seen = play(group.job, ids)
            curve, walk = seen.model.first.found_by().mean(axis=0), seen.walk_found
            assert walk is not None
            for e in (0, 4, 9, 19, 49):
                yield [
                    variant,
                    group.job.config.seed,
                    e + 1,
                    float(curve[e]),
                    float(walk.mean(axis=0)[e]),
                    float(seen.model.searched[e]),
                    float(seen.walk.searched[e]) if seen.walk else float("nan"),
                ]


def marked(out: Path) -> Iterable[list[object]]:
    """Share of marked steps for thresholds and windows, on the training histories."""
    study = load_study(ROOT / "studies" / "guide.yaml", families=["darkroom"], runs=RUNS)
    for path in dict.fromkeys(history_of(cell, out) for cell in study.cells):
        file = HistoryFile(path)
        histories = file.load(file.split.train.tolist())
        for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
            for window in (5, 10, 20):
                done = mark_all(
                    "threshold", histories, on_policy_threshold=threshold, compression_window=window
                )
                share = np.mean([h.compression_mask.mean() for h in done.values()])  # type: ignore[union-attr]
                yield [file.info.seed, threshold, window, float(share)]


if __name__ == "__main__":
    folder = study_folder()
    write("marked.csv", ["seed", "threshold", "window", "marked"], marked(folder))
    head = ["variant", "seed", "start_size", "end_size"]
    head += ["kl_no_marks", "loss_no_marks", "kl_transplant", "loss_transplant", "attention_ratio"]
    write("inside.csv", head, marks(folder))
    head = ["variant", "seed", "episode", "met", "met_random_walk", "seen_searching", "seen_random_walk"]
    write("exploration.csv", head, exploration(folder))
