"""The files of a study: ``table.csv`` with the result of each run, ``curves.csv`` with its validations."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressed_ad.errors import UsageError
from compressed_ad.files import write_atomically
from compressed_ad.marking.statistics import N_PHASE
from compressed_ad.report.measures import MEASURES, SCORES, VALIDATED


@dataclass(frozen=True)
class Row:
    """A line of a study's file: what one run of one variant in one family has at its end, or at one step.

    ``values`` by the columns of ``result_columns``, means over held-out tasks and rollouts, or of
    ``POINT_COLUMNS``; NaN: not measured.
    """

    family: str
    variant: str
    run: int
    values: Mapping[str, float]
    parameters: str = ""  # what decides the cell, in short: the names of its files

    @property
    def weights(self) -> str:
        """What decides the weights that are judged: ``parameters`` without how they play."""
        return self.parameters.rpartition("/")[0]

    def __getitem__(self, column: str) -> float:
        return self.values.get(column, math.nan)


TENTHS = tuple(f"marked_{k}" for k in range(N_PHASE))
"""Marked shares by tenth of the training histories."""
CHANCES = {key: f"{key}_chance" for key in SCORES}
"""How much a measure of a run varies by chance in play: its ``chance_in_play``."""
POINT_COLUMNS = ("step", *VALIDATED)
_CELL = ("family", "variant", "run")


def result_columns() -> list[str]:
    return ["seed", *MEASURES, *CHANCES.values(), "seconds", "parameters", *TENTHS]


def validations(
    name: str, metrics: Sequence[Sequence[Mapping[str, Any]]], runs: Sequence[int], family: str = ""
) -> list[Row]:
    """Every validation of a method's ``runs`` while they were trained, from their ``metrics.jsonl``."""
    return [
        Row(family, name, run, {key: row.get(key, math.nan) for key in POINT_COLUMNS})
        for run, rows in zip(runs, metrics, strict=True)
        for row in rows
        if "validation_return" in row
    ]


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """One line per row, six digits; read back by ``read_rows``."""

    def text(row: Row, column: str) -> str:
        if column == "parameters":
            return text_cell(row.parameters)
        value = row[column]
        return str(value) if isinstance(value, int) else "" if math.isnan(value) else f"{value:.6g}"

    table = [[*_CELL, *columns]]
    for row in rows:
        names = (text_cell(row.family), text_cell(row.variant), str(row.run))
        table.append([*names, *(text(row, column) for column in columns)])
    if rows:  # a head with a check and no rows was cut
        whole = _check(table)
        table = [[*line, whole if k else CHECK] for k, line in enumerate(table)]
    write_atomically(path, csv_text(table).encode())


def csv_text(lines: Iterable[Iterable[Any]]) -> str:
    """Lines of cells as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


CHECK = "check"
"""The last column of a study's files: a digest of all others, the same in each line."""


def _check(table: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()[:12]


def text_cell(text: str) -> str:
    """``text`` for a CSV file: with an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{text}" if re.match(r"'*[=+@\t\r-]", text) else text


def _cell_text(cell: str) -> str:
    return cell[1:] if re.match(r"'+[=+@\t\r-]", cell) else cell


def read_rows(path: Path) -> list[Row]:
    """Rows written by ``write_rows``, of any version: unknown columns are ignored, missing ones are NaN.

    ``UsageError`` names the file and the line that is not a row, or says that the file was changed.
    """
    try:
        text = io.StringIO(path.read_bytes().decode(), newline="")
        head, *lines = list(csv.reader(text)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if not text.getvalue().endswith("\n"):
        raise UsageError(f"{path}: its last line is cut off")
    if not set(_CELL) <= set(head):
        raise UsageError(f"{path}: not such a table; its first line must name {', '.join(_CELL)}")
    numbers = {*_CELL[2:], *result_columns(), *POINT_COLUMNS} - {"parameters"}
    found: dict[tuple[Any, ...], Row] = {}
    for place, values in enumerate(lines, start=2):
        if len(values) != len(head):
            raise UsageError(f"{path}:{place}: expected {len(head)} values, got {len(values)}")
        line = dict(zip(head, values, strict=True))
        known: dict[str, float] = {}
        for column in numbers & set(head):
            try:
                known[column] = float(line[column] or "nan")
            except ValueError:
                raise UsageError(f"{path}:{place}: {column}: not a number: {line[column]!r}") from None
        run = known.pop("run")
        if not run.is_integer():
            raise UsageError(f"{path}:{place}: run: not a whole number: {line['run']!r}")
        family, variant, more = (_cell_text(line.get(k, "")) for k in (*_CELL[:2], "parameters"))
        row = Row(family, variant, int(run), known, more)
        if found.setdefault((row.family, row.variant, run, known.get("step")), row) is not row:
            raise UsageError(f"{path}:{place}: two lines of one cell")
    if CHECK in head:  # earlier versions wrote none
        place = head.index(CHECK)
        whole = _check([[*line[:place], *line[place + 1 :]] for line in (head, *lines)])
        if not lines or any(line[place] != whole for line in lines):
            raise UsageError(
                f"{path}: was changed after it was written; have cad study write it again,"
                f" or delete its column {CHECK} to use it as it is"
            )
    return list(found.values())
