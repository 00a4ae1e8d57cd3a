"""What the borders of episodes hold of the inside, in models of the study ``compression_full``.

A linear probe reads where the agent stood some steps before the end of the episode, and where it met the
first reward, from what the first layer has made of the border. Of what lies inside, the second layer of later
steps sees nothing else. Probes are fitted on histories of training tasks, and judged on those of held-out
tasks.

python results/probes.py [runs/study]    writes results/probes.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from evidence import study_folder, write

from compressed_ad.evaluation.intervals import Floats
from compressed_ad.models import MODEL
from compressed_ad.models.ad import AD
from compressed_ad.models.segments import NEVER, in_windows
from compressed_ad.runs.data import RunData
from compressed_ad.runs.judge import make_player
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups
from compressed_ad.types import IntArray

ROOT = Path(__file__).parents[1]
BACK = (1, 2, 4, 8, 16)
FIRST_REWARD = "first reward"
WINDOWS, BATCHES = 32, {"train": 12, "heldout": 6}
RIDGE = 1.0


def borders(model: AD, data: RunData, ids: IntArray, batches: int) -> tuple[Floats, dict[str, Floats]]:
    """(N, D) what the first layer makes of N borders, and places (N, 2) to be read from each; NaN: none."""
    sampler, _ = data.sampler(ids, data.file.info.seed, WINDOWS)
    first: list[torch.Tensor] = []
    handle = model.transformer.blocks[0].register_forward_hook(lambda *found: first.append(found[-1]))
    inside: list[Floats] = []
    places: dict[str, list[Floats]] = {name: [] for name in (*map(str, BACK), FIRST_REWARD)}
    for k in range(batches):
        batch = sampler.batch(k)
        with torch.no_grad():
            model(batch.tokens)
        events, _ = in_windows(model.config, batch.tokens)
        assert events is not None
        row, at = (x.numpy() for x in torch.nonzero(events.closes & batch.valid, as_tuple=True))
        time = np.arange(events.closes.shape[1])
        begun = np.maximum.accumulate(np.where(events.closes.numpy(), time, 0), axis=1)[row, at - 1]
        inside.append(first.pop()[row, at].numpy())
        states = batch.tokens.state.numpy().astype(float)[..., -2:]  # of the recall rooms, without the cue
        for back in BACK:
            then = at - back
            found = states[row, np.maximum(then, 0)]
            found[then < begun] = np.nan
            places[str(back)].append(found)
        # Token t shows the reward of transition t - 1, which led to the place that next_state tells.
        paid = np.append(batch.tokens.reward.numpy() > 0, np.ones((WINDOWS, 1), bool), axis=1)
        next_paid = np.minimum.accumulate(np.where(paid, np.arange(paid.shape[1]), NEVER)[:, ::-1], axis=1)
        met = next_paid[:, ::-1][row, begun + 1]
        after = batch.tokens.next_state.numpy().astype(float)[..., -2:]
        found = after[row, np.minimum(met, at)]
        found[met > at] = np.nan
        places[FIRST_REWARD].append(found)
    handle.remove()
    return np.concatenate(inside), {name: np.concatenate(part) for name, part in places.items()}


def explained(fit: tuple[Floats, Floats], judge: tuple[Floats, Floats]) -> float:
    """R2 of a ridge regression on standardised inputs, over both coordinates, on the borders to be judged."""
    (x, y), (other, truth) = ((a[known := ~np.isnan(b[:, 0])], b[known]) for a, b in (fit, judge))
    mean, scale, level = x.mean(axis=0), x.std(axis=0) + 1e-6, y.mean(axis=0)
    x, other = (x - mean) / scale, (other - mean) / scale
    weight = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (y - level))
    error = truth - level - other @ weight
    return float(1 - (error**2).sum() / ((truth - truth.mean(axis=0)) ** 2).sum())


def lines(out: Path) -> Iterator[list[object]]:
    """Rows of the file: family, variant, seed, which place, and how much of its variance is explained."""
    study = load_study(ROOT / "studies" / "compression_full.yaml")
    for group in (group for group in groups(study, out) if group.job.trained):
        cell = group.plays[0][0]
        if cell.variant == "AD":
            continue
        player, seed = make_player(group.job), group.job.config.seed
        models = {cell.variant: player.model}
        if cell.variant == "gist":
            torch.manual_seed(seed)
            models["untrained"] = MODEL[player.model.config.model](player.model.config).eval()
        for name, model in models.items():
            split = player.data.file.split
            fit, judge = (borders(model, player.data, ids, BATCHES[part]) for part, ids in (
                ("train", split.train), ("heldout", split.heldout)))  # fmt: skip
            for what in fit[1]:
                if (
                    min(np.isfinite(places[what][:, 0]).sum() for _, places in (fit, judge))
                    > 10 * fit[0].shape[1]
                ):
                    yield [
                        cell.family,
                        name,
                        seed,
                        what,
                        explained((fit[0], fit[1][what]), (judge[0], judge[1][what])),
                    ]


if __name__ == "__main__":
    write("probes.csv", ["family", "variant", "seed", "place", "explained"], lines(study_folder()))
