"""The results of a study's cells as rows of a table, in files that outlive the runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.evaluation import intervals
from compressed_ad.files import write_atomically
from compressed_ad.report.results import load_evaluation, load_metrics
from compressed_ad.types import AnyArray, FloatArray

if TYPE_CHECKING:
    from compressed_ad.runs.study import Cell

TENTHS = tuple(f"marked_{k}" for k in range(10))


@dataclass(frozen=True)
class Row:
    """One variant, one run, one family: means over its held-out tasks and rollouts.

    Returns are normalised per task (0 random, 1 optimal). NaN: not measured.
    """

    family: str
    variant: str
    run: int
    seed: int
    final: float  # mean of the last 10 % of the episodes
    auc: float  # mean of all episodes
    found_by_10: float  # share of rollouts
    found: float
    success_given_found: float
    accuracy: float
    excess_cross_entropy: float  # nats above the source's entropy
    final_last: float  # ``final`` with the last weights instead of those chosen on validation tasks
    training_final: float  # ``final`` on training tasks
    generalisation: float  # held-out minus training ``final``
    validation_return: float  # the last one
    marked: float  # share of the training histories' steps
    seconds: float  # of training, by the rate of its targets
    parameters: str  # what decides the cell, in short: the names of its files

    marked_by_tenth: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What no two rows share."""
        return self.family, self.variant, self.run


@dataclass(frozen=True)
class Point:
    """One validation of one cell while it was trained."""

    family: str
    variant: str
    run: int
    step: int
    validation_return: float
    validation_accuracy: float
    validation_excess_cross_entropy: float


def cell_row(cell: Cell, run_dir: Path, evaluation: Path) -> Row:
    """What ``cell`` left behind; ``RunDirectoryError`` names the file that is missing or damaged."""
    found = load_evaluation(evaluation)
    optimal = found["optimal"].astype(np.float64)
    if np.isnan(optimal).any():
        raise RunDirectoryError(f"{evaluation}: a study needs families whose optimal return is known")
    held = _scores(found["returns"], found["random"], optimal)
    last = _scores(found["returns_last"], found["random"], optimal)
    training = math.nan
    if "returns_training" in found:
        training = _scores(found["returns_training"], found["training_random"], found["training_optimal"])[
            "final"
        ]
    metrics = load_metrics(run_dir / "metrics.jsonl")
    returns, rates = (
        intervals.series(metrics, "validation_return")[1],
        intervals.series(metrics, "targets_per_second"),
    )
    model = cell.trained.model
    targets = model.batch_size * model.n_transit * np.diff(rates[0], prepend=0.0)
    return Row(
        family=cell.family,
        variant=cell.variant,
        run=cell.run,
        seed=cell.trained.seed,
        **held,
        accuracy=float(found["accuracy"]),
        excess_cross_entropy=float(found["cross_entropy"] - found["behaviour_entropy"]),
        final_last=last["final"],
        training_final=training,
        generalisation=held["final"] - training,
        validation_return=float(returns[-1]) if len(returns) else math.nan,
        marked=float(found["marked"].mean()),
        seconds=float((targets / rates[1]).sum()),
        parameters=f"{cell.data_key}/{cell.training_key}/{cell.playing_key}",
        marked_by_tenth=tuple(float(x) for x in found["marked"]),
    )


def _scores(returns: AnyArray, random: AnyArray, optimal: AnyArray) -> dict[str, float]:
    """Means over tasks of returns (N, M, E)."""
    normalised = intervals.normalise(returns, random, optimal)
    curves = normalised.mean(axis=1)
    values: dict[str, FloatArray] = {
        "final": intervals.final_return(curves),
        "auc": intervals.area_under_curve(curves),
        "found_by_10": intervals.found_by(returns, 10),
        "found": intervals.found_by(returns),
        "success_given_found": intervals.success_given_found(returns, normalised),
    }
    return {name: float(intervals.mean(value)) for name, value in values.items()}


def cell_points(cell: Cell, run_dir: Path) -> list[Point]:
    """The validations of the run that ``cell`` plays."""
    keys = ("validation_return", "validation_accuracy", "validation_excess_cross_entropy")
    judged = [row for row in load_metrics(run_dir / "metrics.jsonl") if keys[0] in row]
    return [
        Point(
            cell.family,
            cell.variant,
            cell.run,
            int(row["step"]),
            *(float(row.get(key, math.nan)) for key in keys),
        )
        for row in judged
    ]


# ---------------------------------------------------------------- files


def write_rows(path: Path, table: Sequence[Row]) -> None:
    """One line per row, six digits; read back by ``read_rows``."""
    names = [f.name for f in fields(Row) if f.name != "marked_by_tenth"]
    lines = [
        [_text(getattr(row, name)) for name in names] + [_text(x) for x in row.marked_by_tenth]
        for row in sorted(table, key=lambda row: row.key)
    ]
    _write(path, [[*names, *TENTHS], *lines])


def write_points(path: Path, points: Sequence[Point]) -> None:
    """One line per validation."""
    names = [f.name for f in fields(Point)]
    _write(path, [names, *([_text(getattr(point, name)) for name in names] for point in points)])


def read_rows(path: Path) -> list[Row]:
    """Rows written by ``write_rows``; ``UsageError`` names the file and line that is not one."""
    lines = _read(path, [f.name for f in fields(Row) if f.name != "marked_by_tenth"] + list(TENTHS))
    table = []
    for number, line in lines:
        tenths = tuple(_number(path, number, name, line.pop(name)) for name in TENTHS)
        table.append(Row(**_typed(path, number, line, Row), marked_by_tenth=tenths))
    if len({row.key for row in table}) < len(table):
        raise UsageError(f"{path}: two lines of one cell")
    return table


def read_points(path: Path) -> list[Point]:
    """Points written by ``write_points``."""
    lines = _read(path, [f.name for f in fields(Point)])
    return [Point(**_typed(path, number, line, Point)) for number, line in lines]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _write(path: Path, lines: Sequence[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def _read(path: Path, names: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    lines = list(csv.reader(io.StringIO(text)))
    if not lines or lines[0] != list(names):
        raise UsageError(f"{path}: not such a table; its first line must be {','.join(names)}")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(names):
            raise UsageError(f"{path}:{number}: expected {len(names)} values, got {len(line)}")
    return [(n, dict(zip(names, line, strict=True))) for n, line in enumerate(lines[1:], start=2)]


def _typed(path: Path, number: int, line: dict[str, str], kind: type) -> dict[str, Any]:
    types = {f.name: f.type for f in fields(kind)}
    return {
        name: text if types[name] == "str" else _number(path, number, name, text, whole=types[name] == "int")
        for name, text in line.items()
    }


def _number(path: Path, number: int, name: str, text: str, *, whole: bool = False) -> Any:
    try:
        return int(text) if whole else float(text or "nan")
    except ValueError:
        raise UsageError(f"{path}:{number}: {name}: not a number: {text!r}") from None
