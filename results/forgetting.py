"""What models of the study ``compression_full`` do on the held-out tasks of Darkroom-Hard if borders see no
inside, with other numbers of borders, over 500 episodes, and after the first steps of the source.

python results/forgetting.py [runs/study]    writes results/forgetting.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from evidence import study_folder, write

from compressed_ad.evaluation.evaluate import evaluate_tasks
from compressed_ad.evaluation.intervals import Floats
from compressed_ad.evaluation.prompted import success_after
from compressed_ad.models import MODEL
from compressed_ad.report.measures import normalise
from compressed_ad.runs.judge import Player, make_player
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups

ROOT = Path(__file__).parents[1]
CHANGES: dict[str, dict[str, Any]] = {
    "as trained": {},
    "borders that see no inside": {"segment_gist": False},
    "1 border": {"kept_tokens": 1},
    "10 borders": {"kept_tokens": 10},
}
FIRST, STEPS = 300, 390


def curve(player: Player, change: dict[str, Any], rollouts: int, episodes: int, seed: int) -> Floats:
    """(E,) normalised return of the model on its held-out tasks, with ``change`` of its settings."""
    file, ids = player.data.file, player.data.file.split.heldout
    model = MODEL[player.model.config.model](player.model.config.model_copy(update=change))
    model.load_state_dict(player.model.state_dict())
    size: dict[str, Any] = {"rollouts": rollouts, "episodes": episodes, "seed": seed}
    played = evaluate_tasks(model, player.data.family, file.tasks[ids], **size, **player.options)
    return normalise(played, *player.data.scale(ids)).mean(axis=(0, 1))


def lines(out: Path) -> Iterator[list[object]]:
    """Rows of the file: variant, seed, what was done, and two figures."""
    study = load_study(ROOT / "studies" / "compression_full.yaml", families=["hard"])
    for group in (group for group in groups(study, out) if group.job.trained):
        variant, seed, player = group.plays[0][0].variant, group.job.config.seed, make_player(group.job)
        for name, change in CHANGES.items() if variant == "gist" else ():
            found = curve(player, change, 2, 100, seed)
            yield [variant, seed, name, found.mean(), found[-10:].mean()]
        found = curve(player, {}, 1, 500, seed)
        yield [variant, seed, "500 episodes", found.mean(), found[-100:].mean()]
        yield from ([variant, seed, *row] for row in after_first_steps(player, FIRST, STEPS, seed))


def after_first_steps(player: Player, first: int, steps: int, seed: int) -> Iterator[list[object]]:
    """Success in ``steps`` steps after the ``first``, its own or the source's, and how many knew the goal."""
    file, ids = player.data.file, player.data.file.split.heldout
    recorded = np.stack([file.load([int(i)])[int(i)].actions[:2] for i in ids])
    size: dict[str, Any] = {"first": first, "steps": steps, "rollouts": 2, "seed": seed}
    for name, actions in (("own", None), ("source's", recorded)):
        tasks = file.tasks[ids]
        after = success_after(player.model, player.data.family, tasks, actions, **size, **player.options)
        yield [f"after {name} first steps", after.success, after.knew]


if __name__ == "__main__":
    write("forgetting.csv", ["variant", "seed", "what", "area", "final"], lines(study_folder()))
