"""What all pages share: HTML that works offline, figure files, provenance."""

from __future__ import annotations

import base64
import time
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2

from compressed_ad.files import write_atomically
from compressed_ad.report.figures import style
from compressed_ad.report.figures.style import Figure

Drawn = tuple[str, str, Figure]
"""File name, caption, figure."""
LEAST_SCALE = 0.62
"""Of a figure on a page: letters of 10 points are 8 pixels high."""

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("compressed_ad.report"),
    autoescape=jinja2.select_autoescape(default=True, disabled_extensions=("css",)),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Make a page of a file in ``templates``; everything that it shows is inside the page."""
    made = {"date": time.strftime("%Y-%m-%d"), "version": metadata.version("compressed-ad")}
    write_atomically(path, _ENVIRONMENT.get_template(template).render(**made, **content).encode())


def keep_figures(
    folder: Path, drawn: Iterable[Drawn], formats: Collection[str] = ("png", "svg")
) -> list[dict[str, Any]]:
    """Write every figure in ``formats`` into ``folder``, and what a page shows of each.

    ``image`` is a URL with SVG inside, ``least`` the width in pixels below which its text is too small.
    """
    shown, taken = list[dict[str, Any]](), set[str]()
    for name, caption, figure in drawn:
        stem = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:80]
        stem = f"{stem}_{len(taken) + 1}" if stem in taken else stem
        taken.add(stem)
        svg = style.figure_to_svg(figure)
        write_figure(folder / stem, figure, formats, svg)
        image = base64.b64encode(svg).decode()
        shown.append(
            {
                "name": stem,
                "caption": caption,
                "image": f"data:image/svg+xml;base64,{image}",
                "formats": [form for form in style.FORMATS if form in formats],
                "least": round(LEAST_SCALE * 96 * figure.get_figwidth()),
            }
        )
    return shown


def write_figure(
    path: Path, figure: Figure | None, formats: Collection[str], svg: bytes | None = None
) -> list[str]:
    """Write ``figure`` to ``path`` with the ending of each of ``formats``; the names of these files.

    What is there in another format, or of a figure that is None, is of an earlier call and removed.
    """
    written = []
    for form, render in style.FORMATS.items():
        file = path.with_name(f"{path.name}.{form}")
        if figure is None or form not in formats:
            file.unlink(missing_ok=True)
            continue
        write_atomically(file, svg if svg is not None and form == "svg" else render(figure))
        written.append(file.name)
    return written


def provenance(facts: Mapping[str, Any]) -> dict[str, str]:
    """``environment()`` of ``runs.directory`` as lines of a page."""
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "hardware": ", ".join(f"{key} {value}" for key, value in facts["hardware"].items()),
        "numerics": ", ".join(f"{key} {value}" for key, value in facts["numerics"].items()),
        "revision": str(facts["revision"]),
    }
