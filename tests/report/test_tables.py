"""Tables in every form: the same cells, and nothing in them that LaTeX or a spreadsheet would obey."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from compressed_ad.cli.call import FIGURE_FORMATS, TABLE_FORMATS
from compressed_ad.evaluation.intervals import number
from compressed_ad.report.figures import style
from compressed_ad.report.tables import FORMATS, Table, as_text, write_tables

TABLE = Table(
    "means",
    [
        ["Family", "Variant", "Final", "95 % interval", "Verdict"],
        ["room", "a_b", "−0.100", "−0.2 to +0.3", "–"],
    ],
    "Means of A & B: 5 % of <all>.",
)


def test_the_command_line_names_the_formats_that_there_are() -> None:
    assert tuple(FORMATS) == TABLE_FORMATS and tuple(style.FORMATS) == FIGURE_FORMATS


def test_a_booktabs_table() -> None:
    lines = FORMATS["latex"](TABLE).splitlines()
    assert lines[1:] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{Means of A \& B: 5 \% of \textless{}all\textgreater{}.}",
        r"\label{tab:means}",
        r"\begin{tabular}{llrrr}",
        r"\toprule",
        r"Family & Variant & Final & 95 \% interval & Verdict \\",
        r"\midrule",
        r"room & a\_b & $-$0.100 & $-$0.2 to +0.3 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


@given(st.lists(st.text(max_size=8), min_size=3, max_size=3))
def test_no_text_is_a_command_of_latex(cells: list[str]) -> None:
    latex = FORMATS["latex"](Table("t", [["a", "b", "c"], cells], ""))
    line = latex.split("\\midrule\n")[1].split("\n\\bottomrule")[0]
    bare = re.sub(r"\\(text\w+|dag)\{\}|\$(-|\\times)\$|\\[&%$#_{}]", "", line)
    assert bare.endswith(" \\\\") and "\n" not in line
    assert bare.count("&") == 2 and not set(bare[:-2]) & set("\\%$#_{}~^")


@given(st.floats(-1e4, 1e4), st.sampled_from(["", "+"]))
def test_numbers_come_back_from_csv(value: float, sign: str) -> None:
    shown = number(value, sign)
    ((_, cell),) = csv.reader(io.StringIO(FORMATS["csv"](Table("t", [["x", shown]], ""))))
    assert float(cell) == pytest.approx(value, abs=0.0005)


@given(st.text(max_size=6))
def test_no_text_is_a_formula_of_a_spreadsheet(text: str) -> None:
    ((cell,),) = csv.reader(io.StringIO(FORMATS["csv"](Table("t", [[f"{text}x"]], "")), newline=""))
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")


def test_a_span_of_csv_has_no_signs_that_begin_a_formula() -> None:
    ((*_, span, _),) = list(csv.reader(io.StringIO(FORMATS["csv"](TABLE))))[1:]
    assert span == "−0.2 to 0.3"
    assert FORMATS["csv"](Table("t", [["+0.1 to +0.3"]], "")) == "0.1 to 0.3\n"


def test_every_table_is_a_file_in_each_form_with_the_note_before_its_caption(tmp_path: Path) -> None:
    write_tables(tmp_path, [TABLE], "This means nothing.")
    assert {path.name for path in tmp_path.iterdir()} == {"means.csv", "means.md", "means.tex"}
    assert (tmp_path / "means.md").read_text().startswith("This means nothing. Means of A & B")
    assert r"\caption{This means nothing. Means of A \& B" in (tmp_path / "means.tex").read_text()
    assert as_text([TABLE, TABLE], "csv").split("\n\n")[0] + "\n" == (tmp_path / "means.csv").read_text()
