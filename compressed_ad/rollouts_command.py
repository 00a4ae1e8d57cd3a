"""``cad rollouts``: a trained run's in-context episodes, what it explored, and when it met the reward."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad import runs
from compressed_ad.commands import Call, judged
from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.files import write_atomically
from compressed_ad.histories import HistoryFile
from compressed_ad.pipeline import call_text
from compressed_ad.progress import print_lines
from compressed_ad.run_directory import locked
from compressed_ad.runs import Job
from compressed_ad.study_tables import plain
from compressed_ad.types import FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressed_ad.rollouts import FirstReward, Rollouts
    from compressed_ad.tasks.base import TaskFamily

FILE = "rollouts.json"
RANDOM_ROLLOUTS = 64
"""Of the random walk on each task, at least: it costs little, and a reference should not be noisy."""
SHOWN_TASKS = 3


def run(call: Call) -> None:
    """``cad rollouts``."""
    config = call.config()
    if call.only_shows(config):
        return
    options, explicit = call.options, call.explicit()
    chosen = {key.partition(".")[2] for key in explicit if key.startswith("evaluation.")}
    job = judged(options.run, options.history, config, chosen)
    given = {key: getattr(options, key) for key in ("episodes", "rollouts") if getattr(options, key)}
    evaluation = job.config.evaluation.model_copy(update=given)
    seed = config.seed if "seed" in explicit else job.config.seed
    job = Job(
        job.config.model_copy(update={"evaluation": evaluation, "seed": seed}),
        job.history,
        job.path,
        job.remark,
    )
    ids = _tasks(options.tasks, HistoryFile(job.history))
    out: Path = options.out or job.path / "rollouts"
    if out.exists() and not (out / FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out}: exists and has no {FILE}; choose another --out")
    size = f"{len(ids)} tasks x {evaluation.rollouts} rollouts x {evaluation.episodes} episodes"
    if options.dry_run:
        print_lines(f"Would play {size} of {job.path} into {out}")
        return
    played = _play(call, job, ids)
    figures = list(_figures(played))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for old in out.glob("*.png"):
            old.unlink()
        _write(out, played, figures)
    files = ", ".join([FILE, *(f"{name}.png" for name, _ in figures)])
    print_lines(f"{job.path}: {size} on {played.description}\n")
    print_lines("\n".join([plain(_table(played)), "", *_sentences(played), f"{out}: {files}"]))


def _tasks(given: str | None, file: HistoryFile) -> IntArray:
    """Indices of the tasks asked for, the held-out ones if there is no wish."""
    if given is None:
        if not len(file.split.heldout):
            raise UsageError(f"{file.path}: has no held-out tasks; choose some with --tasks")
        return file.split.heldout
    words = [word.strip() for word in given.split(",")]
    known = len(file.tasks)
    wrong = [word for word in words if not word.isdecimal() or int(word) >= known]
    if wrong:
        raise UsageError(
            f"--tasks: expected numbers from 0 to {known - 1}, got {', '.join(map(repr, wrong))}"
        )
    return np.array(list(dict.fromkeys(int(word) for word in words)), np.int64)


# ---------------------------------------------------------------- playing


@dataclass(frozen=True)
class _Side:
    """The model, or the random walk."""

    record: Rollouts
    first: FirstReward
    coverage: FloatArray  # (E,) places seen by the end of each episode, mean over tasks and rollouts
    searched: FloatArray  # (E,) the same up to the first reward
    explored: FloatArray  # (N,) places seen by the end


@dataclass(frozen=True)
class _Played:
    job: Job
    ids: IntArray  # (N,)
    parts: list[str]  # (N,) of the split
    family: TaskFamily
    description: str
    step: int
    options: dict[str, Any]
    model: _Side
    walk: _Side | None
    walk_found: FloatArray | None  # (N, E), exact where it can be computed
    exact: bool
    n_place: int | None
    distance: FloatArray | None  # (N,)
    notes: list[str]


def _play(call: Call, job: Job, ids: IntArray) -> _Played:
    from compressed_ad import rollouts

    player = runs.player(job)
    family, tasks, evaluation = player.family, player.file.tasks[ids], job.config.evaluation
    size = {"episodes": evaluation.episodes, "seed": job.config.seed}
    with call.display.stage("rollouts") as report:
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
    return _Played(
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
            *(["actions are not discrete: no random walk"] if reference is None else []),
            *(["the family tells no distance to its rewards"] if distance is None else []),
            *(["all rewards are equally far"] if distance is not None and np.ptp(distance) == 0 else []),
        ],
    )


def _side(record: Rollouts, places: int | None) -> _Side:
    from compressed_ad.rollouts import coverage, first_reward

    scale = 1 if places is None else places
    seen, searched = (coverage(record, until_reward=until) / scale for until in (False, True))
    return _Side(
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


# ---------------------------------------------------------------- in words


def _first_episode(found_by: FloatArray) -> float:
    """The first episode (from 1) by whose end half of the rollouts had met the reward, or infinity."""
    # What is computed exactly may miss one half by a rounding error.
    late = found_by < 0.5 - 1e-12
    return math.inf if late.all() else float(late.argmin() + 1)


def _number(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:,.0f}"


def _table(played: _Played) -> list[list[str]]:
    first, n_task = played.model.first, len(played.ids)
    labels = [_label(played, k) for k in range(n_task)]
    columns = [
        ["Task", *labels],
        ["Part", *played.parts],
        ["Found", *(f"{share:.0%}" for share in first.found.mean(axis=1))],
        ["Median step", *map(_number, first.median("steps"))],
        ["Median episode", *map(_number, first.median("episodes"))],
    ]
    if played.distance is not None:
        columns.insert(2, ["Fewest steps", *map(_number, played.distance)])
    if played.walk_found is not None:
        columns.append(["Random walk", *(f"{share:.0%}" for share in played.walk_found[:, -1])])
        columns.append(["Median episode", *(_number(_first_episode(line)) for line in played.walk_found)])
    if played.n_place is None:
        columns.append(["Observations", *(f"{number:,.0f}" for number in played.model.explored)])
    else:
        columns.append(["Cells visited", *(f"{share:.0%}" for share in played.model.explored)])
    return [list(line) for line in zip(*columns, strict=True)]


def _label(played: _Played, k: int) -> str:
    parameters = played.model.record.tasks[k]
    shown = f" ({', '.join(f'{p:g}' for p in parameters)})" if len(parameters) <= 5 else ""
    return f"{played.ids[k]}{shown}"


def _sentences(played: _Played) -> list[str]:
    first, n_episode = played.model.first, played.model.first.n_episode
    times, walk = first.found_by().mean(axis=0), played.walk_found
    met, count = int(first.found.sum()), first.found.size

    def half(curve: FloatArray) -> str:
        when = _first_episode(curve)
        return f"within {n_episode} episodes not" if math.isinf(when) else f"by episode {when:.0f}"

    model = f"Half of the model's rollouts had met the reward: {half(times)}"
    lines = [
        f"{model}." if walk is None else f"{model}; of the uniform random walk's: {half(walk.mean(axis=0))}.",
        f"Met the reward in {n_episode} episodes: {met} of {count} rollouts ({met / count:.0%})"
        + ("" if walk is None else f", random walk {walk[:, -1].mean():.0%}")
        + f"; {count - met} never did and count as later than all others.",
        f"Tasks never found: {', '.join(str(k) for k in played.ids[first.never]) or 'none'}.",
    ]
    if played.distance is not None and (rank := _correlation(played, played.model)) is not None:
        theirs = None if played.walk is None else _correlation(played, played.walk)
        lines.append(
            f"Rank correlation of the fewest steps to the reward with the steps it took: {rank:.2f}"
            + ("." if theirs is None else f", random walk {theirs:.2f}.")
        )
    lines.append(_seen("Seen by the end", played, "coverage"))
    lines.append(_seen("Seen until the first reward", played, "searched"))
    return [*lines, *(f"Note: {note}." for note in played.notes)]


def _seen(what: str, played: _Played, key: str) -> str:
    def text(side: _Side) -> str:
        value = float(getattr(side, key)[-1])
        return f"{value:,.1f} observations" if played.n_place is None else f"{value:.0%} of the cells"

    return f"{what}: {text(played.model)}" + (f", random walk {text(played.walk)}." if played.walk else ".")


def _correlation(played: _Played, side: _Side) -> float | None:
    from compressed_ad.rollouts import rank_correlation

    assert played.distance is not None
    return _known(rank_correlation(played.distance, side.first.times()))


# ---------------------------------------------------------------- files


def _known(value: float) -> float | None:
    """None for what JSON cannot hold: unknown, or never."""
    return round(float(value), 6) if math.isfinite(value) else None


def _list(values: Iterable[float]) -> list[float | None]:
    return [_known(value) for value in values]


def _write(out: Path, played: _Played, figures: list[tuple[str, Figure]]) -> None:
    from compressed_ad.plots import figure_to_png

    for name, figure in figures:
        write_atomically(out / f"{name}.png", figure_to_png(figure))
    content = json.dumps(_summary(played), indent=2, allow_nan=False) + "\n"
    write_atomically(out / FILE, content.encode())


def _summary(played: _Played) -> dict[str, Any]:
    job, first, distance = played.job, played.model.first, played.distance
    evaluation = job.config.evaluation
    walk_found = played.walk_found
    per_task = [
        {
            "task": int(task),
            "parameters": played.model.record.tasks[k].tolist(),
            "part": played.parts[k],
            "fewest_steps": None if distance is None else _known(distance[k]),
            "found": float(first.found[k].mean()),
            "median_steps": _known(first.median("steps")[k]),
            "median_episode": _known(first.median("episodes")[k]),
            "explored": _known(played.model.explored[k]),
            "random_found": None if walk_found is None else _known(walk_found[k, -1]),
            "random_median_episode": None if walk_found is None else _known(_first_episode(walk_found[k])),
        }
        for k, task in enumerate(played.ids)
    ]
    return {
        "run": job.path.name,
        "model": job.config.model.model,
        "step": played.step,
        "history": str(job.history),
        "family": played.description,
        "playing": {
            "episodes": evaluation.episodes,
            "rollouts": evaluation.rollouts,
            "seed": job.config.seed,
            "checkpoint": evaluation.checkpoint,
            **played.options,
        },
        "places": played.n_place,
        "notes": played.notes,
        "tasks": per_task,
        "never_found": played.ids[first.never].tolist(),
        "in_context": _curves(played, played.model),
        "random_walk": None if played.walk is None else _curves(played, played.walk),
        "random_walk_exact_found_by": _list(walk_found.mean(axis=0))
        if walk_found is not None and played.exact
        else None,
    }


def _curves(played: _Played, side: _Side) -> dict[str, Any]:
    """Means over tasks and rollouts, by in-context episode."""
    return {
        "rollouts": int(side.first.found.size),
        "censored": int((~side.first.found).sum()),
        "found_by": _list(side.first.found_by().mean(axis=0)),
        "coverage": _list(side.coverage),
        "coverage_until_reward": _list(side.searched),
        "rank_correlation_with_fewest_steps": None if played.distance is None else _correlation(played, side),
    }


def _figures(played: _Played) -> Iterable[tuple[str, Figure]]:
    from compressed_ad import plots_rollouts as draw

    name, model, walk = played.job.config.model.model, played.model, played.walk
    if played.n_place is not None:
        yield "paths", draw.paths(_rows(played), math.isqrt(played.n_place))
    yield (
        "found",
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
        draw.coverage_curves(
            {label: (side.coverage, side.searched) for label, side in sides.items()},
            share=played.n_place is not None,
            title=f"Seen by the end of each episode: mean over {len(played.ids)} tasks and their rollouts",
        ),
    )
    if played.distance is not None and np.ptp(played.distance) > 0:
        yield (
            "first_reward",
            draw.first_reward_by_distance(
                played.distance,
                model.first.times(),
                None if walk is None else walk.first.times(),
                name=name,
            ),
        )


def _rows(played: _Played) -> list[Any]:
    """The first rollout of the nearest, a middle and the farthest task: early, middle and late episode."""
    from compressed_ad.plots_rollouts import Path as Drawn
    from compressed_ad.plots_rollouts import PathRow
    from compressed_ad.rollouts import optimal_rollouts

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
        rows.append(PathRow(f"task {_label(played, int(k))}, rollout 1", goals, drawn))
    return rows
