"""What models of the study ``compression_full`` do on Darkroom-Hard without sight, with other numbers of
borders, over 500 episodes, and after the source's first steps: their held-out tasks.

python results/forgetting.py [runs/study]    writes results/forgetting.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.evaluation.prompted import success_after
from compressed_ad.models import MODEL
from compressed_ad.report.measures import normalise
from compressed_ad.runs.judge import make_player
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups

ROOT = Path(__file__).parents[1]
CHANGES: dict[str, dict[str, Any]] = {
    "as trained": {},
    "borders that see no inside": {"segment_gist": False},
    "1 border": {"kept_tokens": 1},
    "10 borders": {"kept_tokens": 10},
    "100 borders": {"kept_tokens": 100},
}
FIRST, STEPS = 300, 390


def lines(out: Path) -> Iterator[list[object]]:
    study = load_study(ROOT / "studies" / "compression_full.yaml", families=["hard"])
    for group in groups(study, out):
        variant, seed = group.plays[0][0].variant, group.job.config.seed
        if not group.job.trained:
            continue
        player = make_player(group.job)
        file, family, options = player.data.file, player.data.family, player.options
        ids = file.split.heldout
        tasks, scale = file.tasks[ids], (file.random_return[ids], file.optimal_return[ids])

        def curve(
            change: dict[str, Any],
            rollouts: int,
            episodes: int,
            seed: int = seed,
            player: Any = player,
            tasks: Any = tasks,
            scale: Any = scale,
            family: Any = family,
            options: Any = options,
        ) -> Any:
            config = player.model.config.model_copy(update=change)
            model = MODEL[config.model](config)
            model.load_state_dict(player.model.state_dict())
            played = evaluate_tasks(
                model, family, tasks, rollouts=rollouts, episodes=episodes, seed=seed, **options
            )
            return normalise(played, *scale).mean(axis=(0, 1))

        for name, change in CHANGES.items() if variant == "gist" else ():
            found = curve(change, 2, 100)
            yield [variant, seed, name, found.mean(), found[-10:].mean()]
        found = curve({}, 1, 500)
        yield [variant, seed, "500 episodes", found.mean(), found[-100:].mean()]
        recorded = np.stack([file.load([int(i)])[int(i)].actions[:2] for i in ids])
        for name, actions in (("own", None), ("source's", recorded)):
            after = success_after(
                player.model,
                family,
                tasks,
                actions,
                first=FIRST,
                steps=STEPS,
                rollouts=2,
                seed=seed,
                **options,
            )
            yield [variant, seed, f"after {name} first steps", after.success, after.knew]


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "study"
    with (ROOT / "results" / "forgetting.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "seed", "what", "area", "final"])
        for line in lines(out):
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in line])
            file.flush()


if __name__ == "__main__":
    main()
