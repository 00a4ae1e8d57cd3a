"""``cad study``: a study from its file to its tables and its page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from compressed_ad.cli.call import Call, Command
from compressed_ad.cli.display import duration, print_lines
from compressed_ad.cli.options import count, option
from compressed_ad.errors import RunError, UsageError
from compressed_ad.files import write_atomically
from compressed_ad.report import study_tables
from compressed_ad.report.study_rows import Point, Row, read_points, read_rows, write_points, write_rows
from compressed_ad.runs import study_run as study
from compressed_ad.runs.config_text import dump
from compressed_ad.runs.directory import environment, locked
from compressed_ad.runs.stages import n_process
from compressed_ad.runs.study import Study, load_study
from compressed_ad.workers import RayPool, WorkerPool

TABLE, CURVES = "table.csv", "curves.csv"


def run(call: Call) -> None:
    """``cad study``."""
    options = call.options
    loaded = load_study(
        options.file,
        runs=options.runs,
        families=_names(options.families),
        variants=_names(options.variants),
        overrides=call.request.overrides if call.request else (),
        small=options.small,
    )
    if options.tables:
        points = _points_beside(options.tables)
        print_lines(text(loaded, read_rows(options.tables), points, markdown=options.markdown))
        return
    out: Path = options.out
    processes = options.process or n_process(loaded.cells[0].data)
    if options.dry_run:
        print_lines(plan(loaded, out, processes))
        return
    from compressed_ad.report.study_report import write_page

    own = out / loaded.name
    own.mkdir(parents=True, exist_ok=True)
    with locked(own):
        failures = _work(call, loaded, out, processes)
        rows, points = _keep_results(loaded, out, own)
        write_atomically(own / "table.md", text(loaded, rows, points, markdown=True).encode())
        written = write_page(
            own,
            loaded,
            rows,
            points,
            command=call.typed(),
            config=dump(loaded.cells[0].trained),
            facts=environment(),
        )
    print_lines(text(loaded, rows, points))
    print_lines(f"\nPage: {written}")
    if failures:
        raise RunError("\n".join(f"{name}: {problem}" for name, problem in failures.items()))


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in given.split(",")] if given else []


def _points_beside(table: Path) -> list[Point]:
    beside = table.with_name(table.name.replace(".csv", "_curves.csv"))
    beside = table.with_name(CURVES) if table.name == TABLE else beside
    return read_points(beside) if beside.exists() else []


def _work(call: Call, loaded: Study, out: Path, processes: int) -> dict[str, str]:
    """Do what is missing; failures by the name of the run."""
    display = call.display
    with display.stage("collect") as report:
        study.collect_histories(loaded, out, report)
    parts = study.groups(loaded, out)
    done = {group.job.name: study.rows([group]) for group in parts if group.finished}
    failures: dict[str, str] = {}

    def table() -> list[list[str]]:
        rows = [row for some in done.values() for row in some]
        return study_tables.means_table(rows, loaded.variants) if rows else [["Family", "Variant"]]

    with (
        call.stop.politely(),
        _pool(call.options.ray, processes) as pool,
        display.filling("study") as (report, show),
    ):
        show(table())

        def finished(group: study.Group, outcome: study.Outcome) -> None:
            for note in outcome.notes:
                display.note(f"note: {note}")
            if outcome.failure:
                failures[group.job.name] = outcome.failure
                display.note(f"failed: {group.job.name}: {outcome.failure}")
                return
            done[group.job.name] = study.rows([group])
            for row in done[group.job.name]:
                display.note(
                    f"{row.family}, {row.variant}, run {row.run}: {loaded.metric}"
                    f" {getattr(row, loaded.metric):.3f}  ({len(done)} of {len(parts)} trained)"
                )
            show(table())

        study.run_study(loaded, out, pool, report=report, should_stop=call.stop, finished=finished)
    return failures


def _pool(address: str | None, processes: int) -> WorkerPool | RayPool:
    return WorkerPool(processes) if address is None else RayPool(address, processes)


def _keep_results(loaded: Study, out: Path, own: Path) -> tuple[list[Row], list[Point]]:
    """Write what is finished, and go on with what the files say: kept results then give the same tables."""
    parts = [group for group in study.groups(loaded, out) if group.finished]
    write_rows(own / TABLE, study.rows(parts))
    write_points(own / CURVES, study.points(parts))
    return read_rows(own / TABLE), read_points(own / CURVES)


def plan(loaded: Study, out: Path, processes: int) -> str:
    """The cells, what is finished, the expected time and what could be seen."""
    parts = study.groups(loaded, out)
    lines = [f"study {loaded.name}: {loaded.question}", ""]
    for family in loaded.families:
        lines.append(f"{family}: {loaded.runs[family]} runs each of {', '.join(loaded.variants)}")
    finished = sum(group.finished for group in parts)
    seconds = study.expected(loaded, out, processes)
    known = [value for value in seconds.values() if value is not None]
    lines += [
        "",
        f"{len(loaded.cells)} cells of {len(parts)} trained runs; {finished} runs are finished",
        f"about {duration(sum(known))} in {processes} processes"
        + ("" if len(known) == len(seconds) else ", and the collection, whose time cannot be told"),
        *study_tables.power_lines(loaded.runs, loaded.spread),
        f"output: {out / loaded.name}",
    ]
    for group in parts:
        names = ", ".join(f"{cell.family}/{cell.variant}/{cell.run}" for cell, _, _ in group.plays)
        lines.append(f"  {'finished' if group.finished else 'to do   '}  {names}  {group.job.path}")
    return "\n".join(lines)


def text(loaded: Study, rows: Sequence[Row], points: Sequence[Point], *, markdown: bool = False) -> str:
    """The tables of a study: means, differences on its metric, convergence."""
    if not rows:
        raise UsageError(f"{loaded.path}: nothing of this study is finished")
    parts = study_tables.tables(loaded, rows, points)
    if markdown:
        return "\n".join(study_tables.markdown(table) for table in parts)
    return "\n\n".join(study_tables.plain(table) for table in parts)


# ---------------------------------------------------------------- options


def _options(parser: argparse.ArgumentParser) -> None:
    option(parser, "file", "STUDY.yaml", "what is compared, on which families, how often", Path)
    out = "output folder; studies in one folder share histories and runs"
    option(parser, "--out", "DIR", out, Path, default=Path("runs/study"))
    option(parser, "--runs", "N", "this many runs of each variant instead", count)
    option(parser, "--families", "A,B", "only these families")
    option(parser, "--variants", "A,B", "only these variants, and the baseline")
    small = "tiny histories and models: shows that it works, not what is true"
    parser.add_argument("--small", action="store_true", help=small)
    option(parser, "--process", "N", "cells at once (default: all cores)", count)
    option(parser, "--ray", "ADDRESS", "train on a Ray cluster: its address, or auto")
    option(parser, "--tables", "CSV", "only print the tables of stored results", Path)
    parser.add_argument("--markdown", action="store_true", help="print those tables as Markdown")


STUDY = Command(
    run,
    _options,
    text=(
        "Every cell goes through the same stages as the single commands and is kept: the same command "
        "again continues. Any setting of all cells may be given as --section.key VALUE."
    ),
    common=("dry-run",),
    overrides=True,
)
