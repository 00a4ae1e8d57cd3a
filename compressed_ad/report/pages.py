"""HTML pages that work offline: everything they show is inside the file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from compressed_ad.files import write_atomically
from compressed_ad.report.figures import style
from compressed_ad.report.figures.style import Figure

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("compressed_ad.report"),
    autoescape=jinja2.select_autoescape(default=True, disabled_extensions=("css",)),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **content: Any) -> str:
    """The page made of a file in ``templates``."""
    return _ENVIRONMENT.get_template(template).render(**content)


def image(figure: Figure) -> str:
    """``figure`` as a URL that holds its SVG."""
    return f"data:image/svg+xml;base64,{base64.b64encode(style.figure_to_svg(figure)).decode()}"


def save_figure(folder: Path, name: str, figure: Figure, taken: set[str]) -> str:
    """Write ``figure`` as a PNG of a plain file name that is not among those ``taken``; the name."""
    plain = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:80]
    file = f"{plain}.png" if f"{plain}.png" not in taken else f"{plain}_{len(taken) + 1}.png"
    taken.add(file)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / file, style.figure_to_png(figure))
    return file
