"""``cad study``: a study from its file to its tables and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compressed_ad.cli.call import (
    FIGURES,
    MEMORY_LIMIT,
    RAY,
    TABLE_FORMAT,
    Call,
    Command,
    count,
    flag,
    option,
)
from compressed_ad.cli.display import duration, print_lines
from compressed_ad.errors import RunError, UsageError, nearest
from compressed_ad.files import locked
from compressed_ad.report.rows import POINT_COLUMNS, Row, read_rows, result_columns, write_rows
from compressed_ad.report.tables import Rows
from compressed_ad.runs import study_run
from compressed_ad.runs.directory import environment
from compressed_ad.runs.job import device
from compressed_ad.runs.layers import study_file
from compressed_ad.runs.memory_limit import Need, of_runs
from compressed_ad.runs.stages import n_process
from compressed_ad.runs.study import Study, load_study
from compressed_ad.runs.yaml_file import dump
from compressed_ad.workers import Pool, open_pool

TABLE, CURVES = "table.csv", "curves.csv"


def run(call: Call) -> None:
    options = call.options
    file = study_file(options.file)
    study = load_study(
        file,
        runs=options.runs,
        families=options.families or (),
        variants=options.variants or (),
        overrides=call.request.overrides,
        small=options.small,
        own=not options.dry_run,
    )
    call.leave_untried(cell.trained for cell in study.cells)
    from compressed_ad.report import study_report

    if options.tables:
        if not options.tables.is_file():
            raise UsageError(f"--tables {options.tables}: no such file; name a study's {TABLE}")
        name = CURVES if options.tables.name == TABLE else options.tables.name.replace(".csv", "_curves.csv")
        beside = options.tables.with_name(name)
        rows, points = read_rows(options.tables), read_rows(beside) if beside.exists() else []
        if any("step" in row.values for row in rows):
            raise UsageError(f"{options.tables}: holds a study's curves; name its table")
        whole = load_study(file, runs=options.runs)
        check_names(options.tables, whole, rows)
        check_names(beside, whole, points)
        rows, points = _of_part(study, rows), _of_part(study, points)
        print_lines(study_report.text(study, rows, points, options.format))
        if study.note:
            print_lines(f"\n{study.note}")
        return
    study_run.check_judged(study)
    for config in (cell.trained for cell in study.cells if cell.trained.device == "cuda"):
        device(config)  # raises before anything is started if there is none
    out: Path = options.out
    processes = options.process or n_process(study.cells[0].data)
    processes = call.within(_need(study, out), processes)
    if options.dry_run:
        print_lines(_plan(study, out, processes))
        return
    call.note_compiling(*(cell.trained.algorithm.learner for cell in study.cells))
    folder = out / study.folder
    pool = open_pool(options.ray, processes, options.memory_limit)
    with pool, locked(folder):
        failures = _work(call, study, out, pool)
        parts = study_run.groups(study, out)
        if not (played := study_run.rows(parts)):
            _raise(failures)  # there is nothing to show
        write_rows(folder / TABLE, played, result_columns())
        write_rows(folder / CURVES, study_run.points(parts), POINT_COLUMNS)
        # What the files say is shown, so that kept results give the same tables.
        rows, points = read_rows(folder / TABLE), read_rows(folder / CURVES)
        page = study_report.write_study(
            folder,
            study,
            rows,
            points,
            command=call.typed,
            config=dump(study.cells[0].trained),
            facts=environment(),
            formats=options.figures,
        )
    print_lines(study_report.text(study, rows, points, options.format))
    print_lines(f"\n{study.note}\nPage: {page}" if study.note else f"\nPage: {page}")
    _raise(failures)


def _raise(failures: Mapping[str, str]) -> None:
    """``RunError`` with a line for each failed run, if there are any."""
    if failures:
        raise RunError("\n".join(f"{name}: {problem}" for name, problem in failures.items()))


def check_names(path: Path, study: Study, rows: Sequence[Row]) -> None:
    """Raise ``UsageError`` if a row is of a family, variant or run that the study does not have."""
    for row in rows:
        for what, known in (("family", study.families), ("variant", study.variants)):
            if (name := getattr(row, what)) not in known:
                hint = f"{nearest(name, known)}; it has {', '.join(known)}"
                raise UsageError(f"{path}: {study.path} has no {what} {name!r}{hint}")
        n = study.runs[row.family].get(row.variant)
        if n is None:
            raise UsageError(f"{path}: {study.path} has no runs of {row.variant} on {row.family}")
        if not 0 <= row.run < n:
            runs = f"{n} run{'s' * (n > 1)} of {row.variant} on {row.family}; say --runs if there are more"
            raise UsageError(f"{path}: run {row.run}: {study.path} has {runs}")


def _of_part(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The rows of families and variants that ``study``, which may be a part of its file's, has."""
    return [row for row in rows if row.family in study.families and row.variant in study.variants]


def _need(study: Study, out: Path) -> Need:
    left = [group for group in study_run.groups(study, out) if not group.finished]
    return of_runs(job for group in left for _, job, _ in group.plays)


def _work(call: Call, study: Study, out: Path, pool: Pool) -> dict[str, str]:
    """Do what is missing; failures by the name of the run."""
    from compressed_ad.report import study_report

    display = call.display
    with display.stage("collect") as report:
        collected = study_run.collect_histories(study, out, report, pool)
    for history in collected:
        call.note_shortfall(history)
    if pool.memory_limit is not None:  # now episodes can be counted
        pool.n_process = call.within(_need(study, out), pool.n_process)
    parts = study_run.groups(study, out)
    done = {group.job.name: study_run.rows([group]) for group in parts if group.finished}
    failures: dict[str, str] = {}
    call.note_damaged(path for group in parts for _, _, path in group.plays)

    def table() -> Rows:
        rows = [row for some in done.values() for row in some]
        return study_report.means_table(rows, study.variants) if rows else [["Family", "Variant"]]

    with call.stop.politely(), display.stage_with_table("study") as (report, show):
        show(table())

        def finished(group: study_run.Group, outcome: study_run.Outcome) -> None:
            for note in outcome.notes:
                display.note(f"note: {note}")
            if outcome.failure:
                failures[group.job.name] = outcome.failure
                display.note(f"failed: {group.job.name}: {outcome.failure}")
                return
            done[group.job.name] = study_run.rows([group])
            for row in done[group.job.name]:
                display.note(
                    f"{row.family}, {row.variant}, run {row.run}: {study.metric} {row[study.metric]:.3f}"
                    f"  ({len(done)} of {len(parts)} finished)"
                )
            show(table())

        study_run.run_study(study, out, pool, report=report, should_stop=call.stop, finished=finished)
    return failures


def _plan(study: Study, out: Path, processes: int) -> str:
    """The cells, what is finished, the expected time and what could be seen."""
    from compressed_ad.report import study_report

    parts = study_run.groups(study, out)
    seconds = study_run.expected(study, out, processes)
    known = [value for value in seconds.values() if value is not None]
    unknown = "" if len(known) == len(seconds) else ", and the collection, whose time cannot be told"
    lines = []
    for group in parts:
        names = ", ".join(f"{cell.family}/{cell.variant}/{cell.run}" for cell, _, _ in group.plays)
        lines.append(f"  {'finished' if group.finished else 'to do   '}  {names}  {group.job.path}")
    lines += [
        "",
        f"study {study.name}: {study.question}",
        *filter(None, [study.note]),
        "",
        *(
            f"{family}: {n} run{'s' * (n > 1)} each of {', '.join(v for v in of if of[v] == n)}"
            for family, of in study.runs.items()
            for n in sorted(set(of.values()), reverse=True)
        ),
        "",
        f"{len(study.cells)} cells of {len(parts)} trained runs;"
        f" {sum(group.finished for group in parts)} runs are finished",
        f"about {duration(sum(known))} in {processes} processes{unknown}",
        *study_report.power_lines(study),
        f"output: {out / study.folder}",
    ]
    return "\n".join(lines)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


STUDY = Command(
    run,
    [
        option("file", "STUDY", "a study file, or a shipped one by name (cad list studies)", Path),
        option(
            "--out",
            "DIR",
            "output folder; studies in one folder share histories and runs",
            Path,
            default=Path("runs/study"),
        ),
        option("--runs", "N", "this many runs of each variant instead", count),
        option("--families", "A,B", "only these families", _names),
        option("--variants", "A,B", "only these variants, and the baseline", _names),
        flag("--small", "tiny histories and models: shows that it works, not what is true"),
        option("--process", "N", "cells at once (default: all cores)", count),
        MEMORY_LIMIT,
        RAY,
        option("--tables", "CSV", "only print the tables of stored results", Path),
        TABLE_FORMAT,
        FIGURES,
    ],
    text=(
        "Every cell goes through the same stages as the single commands and is kept: the same command "
        "again continues. Any setting of all cells may be given as --section.key VALUE. A part of a "
        "study, or one with other settings, is written to a folder of its own."
    ),
    common=("device", "dry-run"),
    overrides=True,
    continued="the same command continues",
)
