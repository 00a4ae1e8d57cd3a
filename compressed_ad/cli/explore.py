"""``cad rollouts``: a trained run's in-context episodes, what it explored, and when it met the reward."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.cli.call import Call
from compressed_ad.cli.display import print_lines
from compressed_ad.cli.models import judged
from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.files import write_atomically
from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.pages import plain
from compressed_ad.runs.directory import locked
from compressed_ad.runs.explore import Played, Side, figures, label, play
from compressed_ad.runs.job import Job
from compressed_ad.types import FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FILE = "rollouts.json"


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
    with call.display.stage("rollouts") as report:
        played = play(job, ids, report)
    drawn = list(figures(played))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for old in out.glob("*.png"):
            old.unlink()
        _write(out, played, drawn)
    files = ", ".join([FILE, *(f"{name}.png" for name, _, _ in drawn)])
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


# ---------------------------------------------------------------- in words


def _first_episode(found_by: FloatArray) -> float:
    """The first episode (from 1) by whose end half of the rollouts had met the reward, or infinity."""
    # What is computed exactly may miss one half by a rounding error.
    late = found_by < 0.5 - 1e-12
    return math.inf if late.all() else float(late.argmin() + 1)


def _number(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:,.0f}"


def _table(played: Played) -> list[list[str]]:
    first, n_task = played.model.first, len(played.ids)
    labels = [label(played, k) for k in range(n_task)]
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


def _sentences(played: Played) -> list[str]:
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


def _seen(what: str, played: Played, key: str) -> str:
    def text(side: Side) -> str:
        value = float(getattr(side, key)[-1])
        return f"{value:,.1f} observations" if played.n_place is None else f"{value:.0%} of the cells"

    return f"{what}: {text(played.model)}" + (f", random walk {text(played.walk)}." if played.walk else ".")


def _correlation(played: Played, side: Side) -> float | None:
    from compressed_ad.evaluation.rollouts import rank_correlation

    assert played.distance is not None
    return _known(rank_correlation(played.distance, side.first.times()))


# ---------------------------------------------------------------- files


def _known(value: float) -> float | None:
    """None for what JSON cannot hold: unknown, or never."""
    return round(float(value), 6) if math.isfinite(value) else None


def _list(values: Iterable[float]) -> list[float | None]:
    return [_known(value) for value in values]


def _write(out: Path, played: Played, drawn: list[tuple[str, str, Figure]]) -> None:
    from compressed_ad.report.figures.style import figure_to_png

    for name, _, figure in drawn:
        write_atomically(out / f"{name}.png", figure_to_png(figure))
    content = json.dumps(_summary(played), indent=2, allow_nan=False) + "\n"
    write_atomically(out / FILE, content.encode())


def _summary(played: Played) -> dict[str, Any]:
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


def _curves(played: Played, side: Side) -> dict[str, Any]:
    """Means over tasks and rollouts, by in-context episode."""
    return {
        "rollouts": int(side.first.found.size),
        "censored": int((~side.first.found).sum()),
        "found_by": _list(side.first.found_by().mean(axis=0)),
        "coverage": _list(side.coverage),
        "coverage_until_reward": _list(side.searched),
        "rank_correlation_with_fewest_steps": None if played.distance is None else _correlation(played, side),
    }
