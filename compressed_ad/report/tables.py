"""Tables of results, described once: as text for a terminal, as Markdown, as LaTeX and as CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressed_ad.files import write_atomically
from compressed_ad.report.rows import csv_text, text_cell

Rows = Sequence[Sequence[str]]
"""Lines of text, the header first."""
_NUMBER = re.compile(r"[+−]*(\d+\.?\d*|\.\d+)|–?")


@dataclass(frozen=True)
class Table:
    """A table as it is shown; ``name`` is that of its files."""

    name: str
    rows: Rows
    caption: str

    @property
    def title(self) -> str:
        return self.name.replace("_", " ").capitalize()

    @property
    def right(self) -> list[bool]:
        """By column: whether it holds numbers, intervals or nothing, which stand on the right."""
        shown = re.compile(r"[+−]?\.?\d.*|–|never|")
        head, *body = self.rows
        return [k > 0 and all(shown.fullmatch(line[k]) for line in body) for k in range(len(head))]


def plain(rows: Rows) -> str:
    """As text: the first two columns left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    form = "  ".join(f"{{:{'<' if k < 2 else '>'}{width}}}" for k, width in enumerate(widths))
    return "\n".join(form.format(*line).rstrip() for line in lines)


def markdown(rows: Rows) -> str:
    """As Markdown: the first column left, the rest right where they are numbers."""
    head, *body = rows
    right = [k > 0 and all(_NUMBER.fullmatch(line[k]) for line in body) for k in range(len(head))]
    rule = ["---:" if numbers else "---" for numbers in right]
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, rule, *body])


def latex(table: Table) -> str:
    """As a LaTeX ``table`` of the package booktabs, with its caption and the label ``tab:NAME``."""
    head, *body = ([_escaped(cell) for cell in line] for line in table.rows)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_escaped(table.caption)}}}",
        f"\\label{{tab:{table.name.replace('_', '-')}}}",
        f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in table.right)}}}",
        "\\toprule",
        f"{' & '.join(head)} \\\\",
        "\\midrule",
        *(f"{' & '.join(line)} \\\\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "−": "$-$",
    "–": "--",
    "×": "$\\times$",
    "†": "\\dag{}",
}


def _escaped(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def comma_separated(rows: Rows) -> str:
    """As CSV: numbers as programs read them, and no text that a spreadsheet would take for a formula."""
    return csv_text([_cell(cell) for cell in line] for line in rows)


def _cell(text: str) -> str:
    text = re.sub(r"[\r\n]+", " ", text)  # a line is a row
    if text == "–":
        return ""
    if _NUMBER.fullmatch(text):
        return text.removeprefix("+").replace("−", "-")
    return text_cell(re.sub(r"\+(?=[.\d])", "", text))


FORMATS: dict[str, Callable[[Table], str]] = {
    "text": lambda table: f"{plain(table.rows)}\n",
    "markdown": lambda table: markdown(table.rows),
    "latex": latex,
    "csv": lambda table: comma_separated(table.rows),
}
_FILES = {".csv": "csv", ".md": "markdown", ".tex": "latex"}


def as_text(tables: Iterable[Table], form: str = "text") -> str:
    """All ``tables`` in one of ``FORMATS``, an empty line between them."""
    return "\n".join(FORMATS[form](table) for table in tables)


def write_tables(folder: Path, tables: Iterable[Table], note: str = "") -> None:
    """Every table as ``NAME.csv``, ``NAME.md`` and ``NAME.tex``; ``note`` goes before each caption."""
    for table in tables:
        noted = Table(table.name, table.rows, f"{note} {table.caption}".strip())
        for ending, form in _FILES.items():
            caption = f"{noted.caption}\n\n" if form == "markdown" else ""
            write_atomically(folder / f"{table.name}{ending}", f"{caption}{FORMATS[form](noted)}".encode())
