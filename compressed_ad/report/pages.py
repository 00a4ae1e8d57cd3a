"""What all pages share: HTML that works offline, figure files, provenance."""

from __future__ import annotations

import base64
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Rendered:
    """A figure of a page in the form of its files, which travels between processes."""

    name: str
    caption: str
    width: float  # inches
    files: Mapping[str, bytes]  # by ending, SVG among them


def rendered(drawn: Iterable[Drawn], formats: Collection[str]) -> list[Rendered]:
    """Every figure in ``formats``, and as the SVG that pages show."""
    return [
        Rendered(
            name,
            caption,
            figure.get_figwidth(),
            {**style.forms(figure, ["svg"]), **style.forms(figure, {*formats} - {"svg"})},
        )
        for name, caption, figure in drawn
    ]


def keep_figures(folder: Path, figures: Iterable[Rendered], formats: Collection[str]) -> list[dict[str, Any]]:
    """Write every figure in ``formats`` into ``folder``, and what a page shows of each.

    ``image`` is a URL with SVG inside, ``least`` the width in pixels below which its text is too small.
    """
    shown, taken = list[dict[str, Any]](), set[str]()
    for figure in figures:
        stem = "".join(c if c.isalnum() or c in "_-" else "_" for c in figure.name)[:80]
        stem = f"{stem}_{len(taken) + 1}" if stem in taken else stem
        taken.add(stem)
        kept = {form: content for form, content in figure.files.items() if form in formats}
        write_figure(folder / stem, kept)
        image = base64.b64encode(figure.files["svg"]).decode()
        shown.append(
            {
                "name": stem,
                "caption": figure.caption,
                "image": f"data:image/svg+xml;base64,{image}",
                "formats": [form for form in style.FORMATS if form in kept],
                "least": round(LEAST_SCALE * 96 * figure.width),
            }
        )
    return shown


def write_figure(path: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write a figure to ``path`` with the endings of ``files``; the names of these files.

    What is there in another format is of an earlier call and removed.
    """
    for form in style.FORMATS:
        if form not in files:
            path.with_name(f"{path.name}.{form}").unlink(missing_ok=True)
    names = {form: f"{path.name}.{form}" for form in files}
    for form, name in names.items():
        write_atomically(path.with_name(name), files[form])
    return list(names.values())


def provenance(facts: Mapping[str, Any]) -> dict[str, str]:
    """``environment()`` of ``runs.directory`` as lines of a page."""
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "hardware": ", ".join(f"{key} {value}" for key, value in facts["hardware"].items()),
        "numerics": ", ".join(f"{key} {value}" for key, value in facts["numerics"].items()),
        "revision": str(facts["revision"]),
    }
