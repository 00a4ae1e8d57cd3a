"""Plays the in-context episodes of a run and measures what it explores and when it meets the reward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.registry import call_text
from compressed_ad.report.results import PAYS_ALWAYS
from compressed_ad.runs.data import PARTS
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import make_player
from compressed_ad.types import FloatArray, IntArray
from compressed_ad.workers import Report, silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressed_ad.evaluation.rollouts import FirstReward, Rollouts
    from compressed_ad.tasks.base import TaskFamily

FIGURES = ("paths", "found", "coverage", "first_reward")
WALKED = 4_000_000
"""Steps that all random walks take together, at most, unless the model itself takes more."""


@dataclass(frozen=True)
class Explorer:
    """What one player, the model or the random walk, explores: M rollouts of E episodes on N tasks."""

    record: Rollouts
    first: FirstReward
    coverage: FloatArray  # (E,) places visited by the end of each episode, mean over tasks and rollouts
    searched: FloatArray  # (E,) the same, of steps up to the first reward
    explored: FloatArray  # (N,) places visited by the last episode
    correlation: float  # rank correlation of the fewest steps to the first reward with those taken, or NaN


@dataclass(frozen=True)
class Exploration:
    """The rollouts of a run on N tasks, measured, beside those of a random walk.

    Places are the cells of a grid, and ``n_place`` is their number; without a grid they are distinct
    observations.
    """

    job: Job
    ids: IntArray  # (N,)
    parts: list[str]  # (N,) of the split
    family: TaskFamily
    description: str  # of the family
    step: int  # gradient steps of the weights
    options: dict[str, Any]  # of ``InContextAgent``
    model: Explorer
    walk: Explorer | None
    walk_found: FloatArray | None  # (N, E) share of random walks that met the reward by each episode
    exact: bool  # whether ``walk_found`` is computed, not sampled
    n_place: int | None
    distance: FloatArray | None  # (N,) fewest steps to the first reward
    notes: list[str]


def play(job: Job, ids: IntArray, report: Report = silent) -> Exploration:
    """Play ``job`` on the tasks ``ids`` (N,) as its evaluation does, and random walks on the same tasks."""
    from compressed_ad.evaluation import rollouts

    player = make_player(job)
    family, file, evaluation = player.data.family, player.data.file, job.config.evaluation
    tasks = file.tasks[ids]
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
    # A reference should not be noisy, but many long walks cost more than the model's own rollouts.
    walks = min(64, WALKED // (len(ids) * evaluation.episodes * family.horizon))
    reference = rollouts.random_rollouts(family, tasks, rollouts=max(evaluation.rollouts, walks), **size)
    places = rollouts.n_place(family)
    distance = rollouts.shortest(family, tasks)
    walk = None if reference is None else _measured(reference, places, distance)
    exact = rollouts.random_found_by(family, tasks, evaluation.episodes)
    paid = None if reference is None else (reference.rewards[reference.episode == 0] != 0).mean()
    notes = {
        "no grid: distinct observations are counted, and no paths drawn": places is None,
        "actions have no bounds: no random walk": reference is None,
        "the family tells no distance to its rewards": distance is None,
        "all rewards are equally far": distance is not None and np.ptp(distance) == 0,
        "random actions are paid as well: meeting a reward says nothing": paid is not None
        and paid > PAYS_ALWAYS,
    }
    return Exploration(
        job=job,
        ids=ids,
        parts=[
            next((words for part, words in PARTS.items() if k in getattr(file.split, part)), "unused")
            for k in ids
        ],
        family=family,
        description=call_text(file.info.family, file.info.family_kwargs),
        step=player.step,
        options=player.options,
        model=_measured(record, places, distance),
        walk=walk,
        walk_found=exact if exact is not None or walk is None else walk.first.found_by(),
        exact=exact is not None,
        n_place=places,
        distance=distance,
        notes=[*player.notes, *(note for note, holds in notes.items() if holds)],
    )


def _measured(record: Rollouts, places: int | None, distance: FloatArray | None) -> Explorer:
    from compressed_ad.evaluation.rollouts import coverage, first_reward, rank_correlation

    seen, searched = (coverage(record, until_reward=until) / (places or 1) for until in (False, True))
    first = first_reward(record)
    return Explorer(
        record=record,
        first=first,
        coverage=seen.mean(axis=(0, 1)),
        searched=searched.mean(axis=(0, 1)),
        explored=seen[..., -1].mean(axis=1),
        correlation=math.nan if distance is None else rank_correlation(distance, first.times()),
    )


def task_label(played: Exploration, k: int) -> str:
    """Index and parameters of the k-th task."""
    parameters = played.model.record.tasks[k]
    shown = f" ({', '.join(f'{p:g}' for p in parameters)})" if len(parameters) <= 5 else ""
    return f"{played.ids[k]}{shown}"


def figures(played: Exploration) -> Iterable[tuple[str, str, Figure]]:
    """(file name, caption, figure) of those ``FIGURES`` that there is data for."""
    from compressed_ad.report.figures import rollouts as draw

    name, model, walk = played.job.config.model.model, played.model, played.walk
    if played.n_place is not None:
        yield (
            "paths",
            f"{name}: the first rollout on the nearest, a middle and the farthest task, in its first, middle"
            " and last episode.",
            draw.paths(_path_rows(played), math.isqrt(played.n_place)),
        )
    met = model.first.found_by().mean(axis=0)[-1]
    walked = "" if played.walk_found is None else f", {played.walk_found[:, -1].mean():.0%} of the walks"
    yield (
        "found",
        f"{name}: share of rollouts that met the reward by each episode, and that of a uniform random walk."
        f" At the end: {met:.0%} of the rollouts{walked}.",
        draw.found_curves(
            model.first.found_by().mean(axis=0),
            None if played.walk_found is None else played.walk_found.mean(axis=0),
            name=name,
            exact=played.exact,
            n_rollout=model.first.found.size,
        ),
    )
    explorers = {name: model} | ({} if walk is None else {"random walk": walk})
    yield (
        "coverage",
        f"{name}: what was visited by the end of each episode, in total and before the first reward.",
        draw.coverage_curves(
            {label: (each.coverage, each.searched) for label, each in explorers.items()},
            share=played.n_place is not None,
            title=f"Visited by the end of each episode: mean over {len(played.ids)} tasks and their rollouts",
        ),
    )
    if played.distance is not None and np.ptp(played.distance) > 0:
        yield (
            "first_reward",
            f"{name}: steps to the first reward against the fewest possible; rollouts without a reward rank"
            " last.",
            draw.first_reward_by_distance(
                played.distance, model.first.times(), None if walk is None else walk.first.times(), name=name
            ),
        )


def _path_rows(played: Exploration) -> list[Any]:
    """What ``paths`` shows: a row for the nearest, a middle and the farthest task."""
    from compressed_ad.evaluation.rollouts import optimal_rollouts
    from compressed_ad.report.figures.rollouts import Path as Drawn, PathRow

    record, returns = played.model.record, played.model.record.returns
    optimal = optimal_rollouts(played.family, record.tasks)
    n_task, n_episode = len(played.ids), record.n_episode
    order = np.arange(n_task) if played.distance is None else np.argsort(played.distance, kind="stable")
    shown = order[np.unique(np.linspace(0, n_task - 1, min(3, n_task)).round().astype(int))]
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
        rows.append(PathRow(f"task {task_label(played, int(k))}, rollout 1", goals, drawn))
    return rows
