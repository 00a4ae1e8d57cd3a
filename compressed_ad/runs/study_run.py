"""A study is run: histories, then every cell trained and evaluated, several at once, each resumable.

Histories, trained runs and evaluations are named by everything that determines them, so studies in one
output folder share them: a baseline is trained once however many studies compare with it.

    OUT/histories/<family>-<key>/history_....hdf5
    OUT/runs/<Model>-<family>-seed<k>-<key>/evaluation-<key>.npz
    OUT/<study>/            table.csv, curves.csv, table.md, index.html

torch is imported only where a cell is trained or evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compressed_ad.errors import CompressedADError, UsageError, one_line, users_code
from compressed_ad.report.results import cell_row, load_metrics
from compressed_ad.report.rows import Row, validations
from compressed_ad.runs.config import own_code, plan
from compressed_ad.runs.directory import run_name
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import evaluate_run, is_evaluated
from compressed_ad.runs.stages import (
    check_heldout,
    check_recipe,
    collect_stage,
    default_history,
    expected_seconds,
    source_steps,
)
from compressed_ad.runs.study import Cell, Study
from compressed_ad.runs.trainer import train_run
from compressed_ad.workers import Pool, Report, ShouldStop, TimedParts, silent


@dataclass(frozen=True)
class Group:
    """One trained run and all that is played with its weights."""

    job: Job
    plays: tuple[tuple[Cell, Job, Path], ...]  # cell, how it plays, its evaluation file

    @property
    def finished(self) -> bool:
        """Whether everything has been played with the present weights."""
        return all(is_evaluated(job, path) for _, job, path in self.plays)


def history_of(cell: Cell, out: Path) -> Path:
    return default_history(cell.data, out / "histories" / f"{cell.data.env.short_name}-{cell.data_key}")


def groups(study: Study, out: Path) -> list[Group]:
    """The trained runs of a study in the order of its cells, each with all that is played with it."""
    by_weights: dict[str, list[Cell]] = {}
    for cell in study.cells:
        by_weights.setdefault(cell.training_key, []).append(cell)
    found = []
    for key, cells in by_weights.items():
        config, history = cells[0].trained, history_of(cells[0], out)
        trust = frozenset().union(*own_code(config).values())
        path = out / "runs" / f"{run_name(config.model.model, config.env.short_name, config.seed)}-{key}"
        plays = tuple(
            (cell, Job(cell.played, history, path, True, trust), path / f"evaluation-{cell.playing_key}.npz")
            for cell in cells
        )
        found.append(Group(Job(config, history, path, True, trust), plays))
    return found


def check_judged(study: Study) -> None:
    """``UsageError`` if a family of ``study`` has no task to judge models on, or none whose optimum is known.

    It names the first; nothing is collected that could not be compared.
    """
    for cell in {repr(cell.data.env): cell for cell in study.cells}.values():
        check_heldout(cell.data)
        planned = plan(cell.data)
        with users_code(f"{study.path}: {cell.family}: optimal_return"):
            known = planned.family.optimal_return(planned.family.tasks()[planned.task_ids[:1]])
        if known is None:
            say = "give it as env.kwargs.best_return; " if hasattr(planned.family, "best_return") else ""
            raise UsageError(
                f"{study.path}: {cell.family}: a study compares shares of the optimal return, which"
                f" {cell.data.env.family} does not know; {say}cad run and cad compare need none"
            )


def _missing(study: Study, out: Path) -> list[Cell]:
    """A cell for each history file that is still to be collected."""
    by_data = {cell.data_key: cell for cell in study.cells}
    return [cell for cell in by_data.values() if not history_of(cell, out).exists()]


def collect_histories(study: Study, out: Path, report: Report, pool: Pool | None = None) -> list[Path]:
    """Collect the histories that are missing, unmarked; their files."""
    missing = _missing(study, out)
    for cell in missing:
        check_recipe(cell.trained, history_of(cell, out))
    steps = {cell.data_key: float(source_steps(cell.data)) for cell in missing}
    parts = TimedParts(report, _collect_seconds(missing) or steps)
    for cell in missing:
        progress = partial(parts.advance, cell.data_key, who=cell.family)
        collect_stage(cell.data, history_of(cell, out), mark=False, report=progress, pool=pool)
    return [history_of(cell, out) for cell in missing]


@dataclass(frozen=True)
class Outcome:
    """Of one group: notes of its training, or why it failed."""

    notes: tuple[str, ...] = ()
    failure: str | None = None


def run_group(group: Group, *, report: Report = silent, should_stop: ShouldStop) -> Outcome:
    """Train the run of ``group`` and play everything with it; a failure is returned, not raised."""
    parts, failures = TimedParts(report, _seconds(group)), list[str]()
    try:
        notes = train_run(group.job, report=partial(parts.advance, "train"), should_stop=should_stop)
    except CompressedADError as error:
        return Outcome(failure=one_line(error))
    parts.set("train", 1)
    for cell, job, path in group.plays:
        try:
            evaluate_run(job, path, report=partial(parts.advance, path.name), should_stop=should_stop)
        except CompressedADError as error:  # the others may be played all the same
            failures.append(f"{cell.variant}: {one_line(error)}")
        parts.set(path.name, 1)
    return Outcome(tuple(notes), "; ".join(failures) or None)


def run_study(
    study: Study,
    out: Path,
    pool: Pool,
    *,
    report: Report = silent,
    should_stop: ShouldStop,
    finished: Callable[[Group, Outcome], None] = lambda group, outcome: None,
) -> dict[str, Outcome]:
    """Train and play every cell that is not finished; outcomes by run name. Histories must exist already."""
    todo = {group.job.name: group for group in groups(study, out) if not group.finished}
    return pool.run(
        run_group,
        {name: (group,) for name, group in todo.items()},
        progress=TimedParts(report, {name: sum(_seconds(group).values()) for name, group in todo.items()}),
        should_stop=should_stop,
        finished=lambda name, outcome: finished(todo[name], outcome),
    )


def expected(study: Study, out: Path, n_process: int) -> dict[str, float | None]:
    """Seconds that what is missing will roughly take, by stage; None where it cannot be told."""
    collections = _collect_seconds(_missing(study, out))
    train = play = 0.0
    for group in groups(study, out):
        seconds = _seconds(group)
        train += seconds.pop("train")
        play += sum(seconds.values())
    collect = None if collections is None else sum(collections.values())
    return {"collect": collect, "train": train / n_process, "evaluate": play / n_process}


def _collect_seconds(missing: Sequence[Cell]) -> dict[str, float] | None:
    """Rough seconds that each missing history file takes, by its key; None if one cannot be told."""
    seconds = {cell.data_key: expected_seconds(cell.data)["collect"] for cell in missing}
    known = {key: value for key, value in seconds.items() if value is not None}
    return known if len(known) == len(seconds) else None


def _seconds(group: Group) -> dict[str, float]:
    """Rough seconds of what ``group`` lacks: ``train``, and each evaluation by the name of its file."""

    def of(job: Job, stage: str) -> float:
        comparison = job.config.comparison.model_copy(update={"methods": ("AD",), "runs": 1})
        return expected_seconds(job.config.model_copy(update={"comparison": comparison}))[stage] or 0.0

    seconds = {"train": 0.0 if group.job.trained else of(group.job, "train")}
    for _, job, path in group.plays:
        seconds[path.name] = 0.0 if is_evaluated(job, path) else of(job, "evaluate")
    return seconds


def rows(parts: Iterable[Group]) -> list[Row]:
    """The results of everything that has been played so far, by family, variant and run."""
    played = (play for group in parts for play in group.plays)
    found = [cell_row(cell, job.path, path) for cell, job, path in played if is_evaluated(job, path)]
    return sorted(found, key=lambda row: (row.family, row.variant, row.run))


def points(parts: Iterable[Group]) -> list[Row]:
    """The validations of everything that has been trained so far, once for each variant that plays it."""
    found: list[Row] = []
    for group in parts:
        job = group.job
        metrics = load_metrics(job.path / "metrics.jsonl", job.config.model.steps) if job.trained else []
        for cell, _, _ in group.plays:
            found += validations(cell.variant, [metrics], [cell.run], cell.family)
    return found
