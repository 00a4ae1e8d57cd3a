"""What all pages share: HTML that works offline, figure files, tables as text, provenance, strict JSON."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from compressed_ad.files import write_atomically
from compressed_ad.report.figures import style
from compressed_ad.report.figures.style import Figure

Drawn = tuple[str, str, Figure]
"""File name, caption, figure."""

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("compressed_ad.report"),
    autoescape=jinja2.select_autoescape(default=True, disabled_extensions=("css",)),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Make a page of a file in ``templates``; everything that it shows is inside the page."""
    write_atomically(path, _ENVIRONMENT.get_template(template).render(**content).encode())


def keep_figures(folder: Path, drawn: Iterable[Drawn]) -> list[dict[str, str]]:
    """Write every figure as a PNG file into ``folder``; captions and images (URLs of SVG) for a page."""
    shown, taken = [], set[str]()
    for name, caption, figure in drawn:
        stem = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:80]
        stem = f"{stem}_{len(taken) + 1}" if stem in taken else stem
        taken.add(stem)
        write_atomically(folder / f"{stem}.png", style.figure_to_png(figure))
        image = base64.b64encode(style.figure_to_svg(figure)).decode()
        shown.append({"caption": caption, "image": f"data:image/svg+xml;base64,{image}"})
    return shown


def provenance(facts: Mapping[str, Any]) -> dict[str, str]:
    """``environment()`` of ``runs.directory`` as lines of a page."""
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "hardware": ", ".join(f"{key} {value}" for key, value in facts["hardware"].items()),
        "revision": str(facts["revision"]),
    }


# ---------------------------------------------------------------- as text


def plain(table: Sequence[Sequence[str]]) -> str:
    """A table as text: its first two columns left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    form = "  ".join(f"{{:{'<' if k < 2 else '>'}{width}}}" for k, width in enumerate(widths))
    return "\n".join(form.format(*line).rstrip() for line in lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table as Markdown: the first column left, the rest right where they are numbers."""
    head, *body = table
    number = re.compile(r"[+−]*(\d+\.?\d*|\.\d+)|–?")
    right = [k > 0 and all(number.fullmatch(line[k]) for line in body) for k in range(len(head))]
    rule = ["---:" if numbers else "---" for numbers in right]
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, rule, *body])
