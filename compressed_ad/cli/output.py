"""Writes what a command found, figures and JSON, into a folder that holds nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import RunDirectoryError
from compressed_ad.files import write_atomically
from compressed_ad.runs.directory import locked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_output(out: Path, file: str) -> None:
    """Raise ``RunDirectoryError`` unless the folder ``out`` is new, empty, or holds ``file`` from before."""
    if out.exists() and not (out / file).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out}: exists and has no {file}; choose another --out")


def write_output(
    out: Path, file: str, content: Mapping[str, Any], figures: Mapping[str, Figure | None]
) -> str:
    """Write PNG files, then ``content`` as JSON to ``file``; return the folder and the names as a line.

    The figures go by their names without ``.png``; files of those that are None are removed.
    """
    from compressed_ad.report.figures.style import figure_to_png

    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for name, figure in figures.items():
            if figure is None:
                (out / f"{name}.png").unlink(missing_ok=True)
            else:
                write_atomically(out / f"{name}.png", figure_to_png(figure))
        write_atomically(
            out / file, json.dumps(json_value(content), indent=2, allow_nan=False).encode() + b"\n"
        )
    drawn = [f"{name}.png" for name, figure in figures.items() if figure is not None]
    return f"{out}: {', '.join([file, *drawn])}"


def json_value(value: Any) -> Any:
    """Nested data with arrays as JSON has it: numbers that are NaN or infinite become null."""
    if isinstance(value, np.ndarray | np.generic):
        return json_value(value.tolist())
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
