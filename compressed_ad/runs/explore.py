"""The in-context episodes of a run: what it explores and when it meets the reward."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.evaluation import rollouts
from compressed_ad.evaluation.rollouts import FirstReward, Rollouts
from compressed_ad.histories.file import HistoryFile
from compressed_ad.registry import call_text
from compressed_ad.report.results import PAYS_ALWAYS
from compressed_ad.runs.data import PARTS
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import Player, evaluated_rollouts, make_player
from compressed_ad.types import FloatArray, IntArray
from compressed_ad.workers import Report, silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressed_ad.tasks.base import TaskFamily

FIGURES = ("paths", "found", "coverage", "first_reward")
WALKED = 4_000_000
"""Steps that all random walks take together, at most, unless the model itself takes more."""


@dataclass(frozen=True)
class Explorer:
    """What one player, the model or the random walk, explores: M rollouts of E episodes on N tasks."""

    record: Rollouts
    n_place: int | None
    distance: FloatArray | None  # (N,) fewest steps to the first reward

    @cached_property
    def first(self) -> FirstReward:
        return rollouts.first_reward(self.record)

    @cached_property
    def coverage(self) -> FloatArray:
        """(E,) places visited by the end of each episode, mean over tasks and rollouts."""
        return np.asarray(self._visited.mean(axis=(0, 1)))

    @cached_property
    def searched(self) -> FloatArray:
        """(E,) the same, of steps up to the first reward."""
        searched = rollouts.coverage(self.record, until_reward=True) / (self.n_place or 1)
        return np.asarray(searched.mean(axis=(0, 1)))

    @property
    def explored(self) -> FloatArray:
        """(N,) places visited by the last episode."""
        return np.asarray(self._visited[..., -1].mean(axis=1))

    @cached_property
    def _visited(self) -> FloatArray:
        return rollouts.coverage(self.record) / (self.n_place or 1)

    @cached_property
    def correlation(self) -> float:
        """Rank correlation of the fewest steps to the first reward with those taken, or NaN."""
        if self.distance is None:
            return math.nan
        return rollouts.rank_correlation(self.distance, self.first.times())


@dataclass(frozen=True)
class Exploration:
    """The rollouts of a run on N tasks beside those of a random walk, measured once they are asked for.

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
    exact: FloatArray | None  # (N, E) probability that a random walk has met the reward by each episode
    player_notes: list[str]

    @property
    def n_place(self) -> int | None:
        return self.model.n_place

    @property
    def distance(self) -> FloatArray | None:
        """(N,) fewest steps to the first reward."""
        return self.model.distance

    @cached_property
    def walk(self) -> Explorer | None:
        """Random walks on the same tasks; None where actions have no bounds."""
        asked, n_episode = self.job.config.evaluation, self.model.record.n_episode
        # A reference should not be noisy, but many long walks cost more than the model's own rollouts.
        walks = max(asked.rollouts, min(64, WALKED // (len(self.ids) * n_episode * self.family.horizon)))
        size: Any = {"rollouts": walks, "episodes": n_episode, "seed": self.job.config.seed}
        record = rollouts.random_rollouts(self.family, self.model.record.tasks, **size)
        return None if record is None else Explorer(record, self.n_place, self.distance)

    @property
    def walk_found(self) -> FloatArray | None:
        """(N, E) share of random walks that met the reward by each episode, exact where that is known."""
        if self.exact is not None or self.walk is None:
            return self.exact
        return self.walk.first.found_by()

    def label(self, k: int) -> str:
        """Index and parameters of the k-th task."""
        parameters = self.model.record.tasks[k]
        shown = f" ({', '.join(f'{p:g}' for p in parameters)})" if len(parameters) <= 5 else ""
        return f"{self.ids[k]}{shown}"

    @property
    def notes(self) -> list[str]:
        walked, distance = None if self.walk is None else self.walk.record, self.distance
        paid = None if walked is None else (walked.rewards[walked.episode == 0] != 0).mean()
        notes = {
            "no grid: distinct observations are counted, and no paths drawn": self.n_place is None,
            "actions have no bounds: no random walk": walked is None,
            "the family tells no distance to its rewards": distance is None,
            "all rewards are equally far": distance is not None and np.ptp(distance) == 0,
            "random actions are paid as well: meeting a reward says nothing": paid is not None
            and paid > PAYS_ALWAYS,
        }
        return [*self.player_notes, *(note for note, holds in notes.items() if holds)]


def play(job: Job, ids: IntArray, report: Report = silent) -> Exploration:
    """Play ``job`` on the tasks ``ids`` (N,) as its evaluation does."""
    player, evaluation = make_player(job), job.config.evaluation
    record = rollouts.record_rollouts(
        player.model,
        player.data.family,
        player.data.file.tasks[ids],
        rollouts=evaluation.rollouts,
        episodes=evaluation.episodes,
        seed=job.config.seed,
        progress=lambda done, total: report(done, total, "in-context steps"),
        **player.options,
    )
    return _exploration(player, ids, record)


def evaluated(job: Job, report: Report = silent) -> Exploration:
    """The episodes of the evaluation of ``job`` on the held-out tasks; played again only if it has to be."""
    ids, record = HistoryFile(job.history).split.heldout, evaluated_rollouts(job)
    return play(job, ids, report) if record is None else _exploration(make_player(job), ids, record)


def _exploration(player: Player, ids: IntArray, record: Rollouts) -> Exploration:
    job, family, file = player.data.job, player.data.family, player.data.file
    distance = rollouts.shortest(family, record.tasks)
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
        model=Explorer(record, rollouts.n_place(family), distance),
        exact=rollouts.random_found_by(family, record.tasks, record.n_episode),
        player_notes=player.notes,
    )


def figures(played: Exploration, names: Collection[str] = FIGURES) -> Iterable[tuple[str, str, Figure]]:
    """(file name, caption, figure) of those ``names`` of ``FIGURES`` that there is data for."""
    from compressed_ad.report.figures import rollouts as draw

    name, model = played.job.config.model.model, played.model
    if "paths" in names and played.n_place is not None:
        yield (
            "paths",
            f"{name}: the first rollout on the nearest, a middle and the farthest task, in its first, middle"
            " and last episode.",
            draw.paths(_path_rows(played), math.isqrt(played.n_place)),
        )
    if "found" in names:
        by, walked = model.first.found_by().mean(axis=0), played.walk_found
        beside = "" if walked is None else f", {walked[:, -1].mean():.0%} of the walks"
        yield (
            "found",
            f"{name}: share of rollouts that met the reward by each episode, and that of a uniform random"
            f" walk. At the end: {by[-1]:.0%} of the rollouts{beside}.",
            draw.found_curves(
                by,
                None if walked is None else walked.mean(axis=0),
                name=name,
                exact=played.exact is not None,
                n_rollout=model.first.found.size,
            ),
        )
    if "coverage" in names:
        explorers = {name: model} | ({} if played.walk is None else {"random walk": played.walk})
        yield (
            "coverage",
            f"{name}: what was visited by the end of each episode, in total and before the first reward.",
            draw.coverage_curves(
                {label: (each.coverage, each.searched) for label, each in explorers.items()},
                share=played.n_place is not None,
                title=f"Visited by the end of each episode: mean over {len(played.ids)} tasks and their"
                " rollouts",
            ),
        )
    if "first_reward" in names and played.distance is not None and np.ptp(played.distance) > 0:
        yield (
            "first_reward",
            f"{name}: steps to the first reward against the fewest possible; rollouts without a reward rank"
            " last.",
            draw.first_reward_by_distance(
                played.distance,
                model.first.times(),
                None if played.walk is None else played.walk.first.times(),
                name=name,
            ),
        )


def _path_rows(played: Exploration) -> list[Any]:
    """What ``paths`` shows: a row for the nearest, a middle and the farthest task."""
    from compressed_ad.report.figures.rollouts import Path as Drawn, PathRow

    record, returns = played.model.record, played.model.record.returns
    optimal = rollouts.optimal_rollouts(played.family, record.tasks)
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
        rows.append(PathRow(f"task {played.label(int(k))}, rollout 1", goals, drawn))
    return rows
