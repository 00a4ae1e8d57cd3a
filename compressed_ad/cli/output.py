"""Writes what a command found, figures and JSON, into a folder that holds nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressed_ad.errors import RunDirectoryError
from compressed_ad.files import locked, write_atomically, write_json

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
        write_json(out / file, content)
    drawn = [f"{name}.png" for name, figure in figures.items() if figure is not None]
    return f"{out}: {', '.join([file, *drawn])}"
