"""A run's in-context episodes, played once more and measured: what it explored, when it met the reward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.histories.file import HistoryFile
from compressed_ad.registry import call_text
from compressed_ad.report.results import PAYS_ALWAYS
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import make_player
from compressed_ad.types import FloatArray, IntArray
from compressed_ad.workers import Report, silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressed_ad.evaluation.rollouts import FirstReward, Rollouts
    from compressed_ad.tasks.base import TaskFamily

RANDOM_ROLLOUTS = 64
"""Of the random walk on each task, at least: it costs little, and a reference should not be noisy."""
SHOWN_TASKS = 3


@dataclass(frozen=True)
class Side:
    """The model, or the random walk."""

    record: Rollouts
    first: FirstReward
    coverage: FloatArray  # (E,) places seen by the end of each episode, mean over tasks and rollouts
    searched: FloatArray  # (E,) the same up to the first reward
    explored: FloatArray  # (N,) places seen by the end


@dataclass(frozen=True)
class Played:
    """A run's rollouts on N tasks, measured."""

    job: Job
    ids: IntArray  # (N,)
    parts: list[str]  # (N,) of the split
    family: TaskFamily
    description: str
    step: int
    options: dict[str, Any]
    model: Side
    walk: Side | None
    walk_found: FloatArray | None  # (N, E), exact where it can be computed
    exact: bool
    n_place: int | None
    distance: FloatArray | None  # (N,)
    notes: list[str]


def play(job: Job, ids: IntArray, report: Report = silent) -> Played:
    """Play ``job`` on the tasks ``ids`` (N,) as its evaluation does, and a random walk beside it."""
    from compressed_ad.evaluation import rollouts

    player = make_player(job)
    family, tasks, evaluation = player.family, player.file.tasks[ids], job.config.evaluation
    size = {"episodes": evaluation.episodes, "seed": job.config.seed}
    record = rollouts.record_rollouts(
        player.model,
        family,
        tasks,
        rollouts=evaluation.rollouts,
        progress=lambda done, total: report(done, total, "in-context steps"),
        **size,
        **player.options,
    )
    reference = rollouts.random_rollouts(
        family, tasks, rollouts=max(evaluation.rollouts, RANDOM_ROLLOUTS), **size
    )
    places = rollouts.n_place(family)
    distance = rollouts.shortest(family, tasks)
    walk = None if reference is None else _side(reference, places)
    exact = rollouts.random_found_by(family, tasks, evaluation.episodes)
    found = exact if exact is not None or walk is None else walk.first.found_by()
    info = player.file.info
    return Played(
        job=job,
        ids=ids,
        parts=_parts(ids, player.file),
        family=family,
        description=call_text(info.family, info.family_kwargs),
        step=player.step,
        options=player.options,
        model=_side(record, places),
        walk=walk,
        walk_found=found,
        exact=exact is not None,
        n_place=places,
        distance=distance,
        notes=[
            *(["no grid: distinct observations are counted, and no paths drawn"] if places is None else []),
            *(["actions have no bounds: no random walk"] if reference is None else []),
            *(["the family tells no distance to its rewards"] if distance is None else []),
            *(["all rewards are equally far"] if distance is not None and np.ptp(distance) == 0 else []),
            *(["random actions are paid as well: meeting a reward says nothing"] if _pays(reference) else []),
        ],
    )


def _pays(walk: Rollouts | None) -> bool:
    """Whether a random walk is paid nearly from the start."""
    if walk is None:
        return False
    first = walk.rewards[walk.episode == 0]
    return bool((first != 0).mean() > PAYS_ALWAYS)


def _side(record: Rollouts, places: int | None) -> Side:
    from compressed_ad.evaluation.rollouts import coverage, first_reward

    scale = 1 if places is None else places
    seen, searched = (coverage(record, until_reward=until) / scale for until in (False, True))
    return Side(
        record=record,
        first=first_reward(record),
        coverage=seen.mean(axis=(0, 1)),
        searched=searched.mean(axis=(0, 1)),
        explored=seen[..., -1].mean(axis=1),
    )


def _parts(ids: IntArray, file: HistoryFile) -> list[str]:
    names = {"heldout": "held-out", "validation": "validation", "train": "training"}
    return [
        next((word for name, word in names.items() if k in getattr(file.split, name)), "unused") for k in ids
    ]


def label(played: Played, k: int) -> str:
    """The k-th task's index and parameters."""
    parameters = played.model.record.tasks[k]
    shown = f" ({', '.join(f'{p:g}' for p in parameters)})" if len(parameters) <= 5 else ""
    return f"{played.ids[k]}{shown}"


# ---------------------------------------------------------------- figures


def figures(played: Played) -> Iterable[tuple[str, str, Figure]]:
    """(file name, caption, figure): paths on a grid, when the reward was met, what was explored."""
    from compressed_ad.report.figures import rollouts as draw

    name, model, walk = played.job.config.model.model, played.model, played.walk
    if played.n_place is not None:
        yield (
            "paths",
            f"{name}: the first rollout on the nearest, a middle and the farthest held-out task, early, in"
            " the middle and late. What was not known in the first episode is used in the last.",
            draw.paths(_rows(played), math.isqrt(played.n_place)),
        )
    yield (
        "found",
        f"{name}: share of rollouts that had met the reward by each episode, beside a uniform random walk.",
        draw.found_curves(
            model.first.found_by().mean(axis=0),
            None if played.walk_found is None else played.walk_found.mean(axis=0),
            name=name,
            exact=played.exact,
            n_rollout=model.first.found.size,
        ),
    )
    sides = {name: model} | ({} if walk is None else {"random walk": walk})
    yield (
        "coverage",
        f"{name}: what was explored by each episode, in all and until the first reward.",
        draw.coverage_curves(
            {label: (side.coverage, side.searched) for label, side in sides.items()},
            share=played.n_place is not None,
            title=f"Seen by the end of each episode: mean over {len(played.ids)} tasks and their rollouts",
        ),
    )
    if played.distance is not None and np.ptp(played.distance) > 0:
        yield (
            "first_reward",
            f"{name}: steps until the first reward against the fewest possible; those that never met it count"
            " as later than all others.",
            draw.first_reward_by_distance(
                played.distance,
                model.first.times(),
                None if walk is None else walk.first.times(),
                name=name,
            ),
        )


def _rows(played: Played) -> list[Any]:
    """The first rollout of the nearest, a middle and the farthest task: early, middle and late episode."""
    from compressed_ad.evaluation.rollouts import optimal_rollouts
    from compressed_ad.report.figures.rollouts import Path as Drawn, PathRow

    record, returns = played.model.record, played.model.record.returns
    optimal = optimal_rollouts(played.family, record.tasks)
    n_task, n_episode = len(played.ids), record.n_episode
    order = np.arange(n_task) if played.distance is None else np.argsort(played.distance, kind="stable")
    shown = order[np.unique(np.linspace(0, n_task - 1, min(SHOWN_TASKS, n_task)).round().astype(int))]
    rows = []
    for k in shown:
        drawn = []
        for e in sorted({0, (n_episode - 1) // 2, n_episode - 1}):
            steps = np.flatnonzero(record.episode[k, 0] == e)
            cells = np.concatenate([record.observations[k, 0, steps[:1]], record.successors[k, 0, steps]])
            drawn.append(Drawn(f"episode {e + 1}: return {returns[k, 0, e]:g}", cells.astype(np.int64)))
        goals = np.zeros((0, 2), np.int64)
        if optimal is not None:
            paid = optimal.successors[k, 0][optimal.rewards[k, 0] > 0].astype(np.int64)
            _, place = np.unique(paid, axis=0, return_index=True)
            goals = paid[np.sort(place)]
        rows.append(PathRow(f"task {label(played, int(k))}, rollout 1", goals, drawn))
    return rows
