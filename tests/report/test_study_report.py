"""What a study concludes, against arithmetic done another way."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats as scipy_stats

from compressed_ad.errors import UsageError
from compressed_ad.report.comparison import POOLED, convergence, convergence_table, differences
from compressed_ad.report.rows import POINT_COLUMNS, Row, read_rows, result_columns, write_rows
from compressed_ad.report.study_report import _marked, answers, difference_table, means_table, tables
from compressed_ad.report.tables import markdown, plain
from compressed_ad.runs.study import load_study

NAN = math.nan


def row(variant: str, run: int, final: float, family: str = "room", **values: float) -> Row:
    rest = dict.fromkeys(
        ("auc", "found_by_10", "found", "success_given_found", "accuracy", "excess_cross_entropy"), 0.5
    )
    rest |= dict.fromkeys(("final_last", "validation_return", "marked", "seconds"), 0.25)
    rest |= {f"marked_{k}": k / 10 for k in range(10)}
    return Row(family, variant, run, rest | {"seed": run, "final": final} | values, f"a/{variant}/c")


def rows(a: list[float], b: list[float], family: str = "room") -> list[Row]:
    return [row("a", k, x, family) for k, x in enumerate(a)] + [
        row("b", k, x, family) for k, x in enumerate(b)
    ]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=12))
def test_differences_are_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    gaps = np.subtract(b, a)
    if gaps.std() < 1e-6:
        return
    (found,) = differences(rows(a, b), [("a", "b")], "final")
    reference = scipy_stats.ttest_rel(b, a)
    interval = reference.confidence_interval(0.95)
    assert found.estimate.value == pytest.approx(gaps.mean(), abs=1e-12)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.p == pytest.approx(reference.pvalue, abs=1e-9)
    assert found.p_holm == found.p  # one comparison only
    assert found.verdict == (
        "better" if interval.low > 0 else "worse" if interval.high < 0 else "no difference found"
    )


def test_a_verdict_says_when_it_does_not_survive_the_adjustment() -> None:
    noise = np.array([0.1, -0.1, 0.05, -0.05, 0.02, -0.02])
    table = rows([0.0] * 6, list(noise + 0.08))
    for name in "cdefgh":
        table += [row(name, k, x) for k, x in enumerate(noise)]
    alone = differences(table, [("a", "b")], "final")
    among = differences(table, [("a", name) for name in "bcdefgh"], "final")
    assert alone[0].verdict == "better" and among[0].verdict == "better before adjustment"
    assert alone[0].estimate == among[0].estimate


def test_holm_against_the_textbook() -> None:
    """Three comparisons with known p: the smallest counts three times, never below one before it."""
    base = [0.0] * 6
    noise = np.array([0.1, -0.1, 0.05, -0.05, 0.02, -0.02])
    table = rows(base, list(noise + 0.15))
    table += [row("c", k, x) for k, x in enumerate(noise + 0.08)]
    table += [row("d", k, x) for k, x in enumerate(noise)]
    found = differences(table, [("a", "b"), ("a", "c"), ("a", "d")], "final")
    p = [d.p for d in found]
    assert p[0] < p[1] < p[2]
    expected = [3 * p[0], max(3 * p[0], 2 * p[1]), max(2 * p[1], p[2])]
    assert [d.p_holm for d in found] == pytest.approx(np.minimum(expected, 1.0))


def test_runs_without_a_partner_are_left_out_and_few_runs_give_no_verdict() -> None:
    table = rows([0.0, 0.0, 0.0], [0.5, 0.5])
    (found,) = differences(table, [("a", "b")], "final")
    assert found.estimate.n == 2 and found.verdict == "too few runs"
    assert differences(table, [("a", "x")], "final") == []


def test_families_count_the_same_however_many_runs_they_have() -> None:
    one = rows([0.0] * 4, [0.1, 0.2, 0.3, 0.4], "one")
    two = rows([0.0] * 8, [0.8, 0.9, 1.0, 1.1, 0.8, 0.9, 1.0, 1.1], "two")
    found = differences(one + two, [("a", "b")], "final")
    assert [d.family for d in found] == ["one", "two", POOLED]
    assert found[-1].estimate.value == pytest.approx((0.25 + 0.95) / 2)
    # Welch: the standard error of the mean of two independent means, halved.
    expected = 0.5 * math.sqrt(sum(d.estimate.spread**2 / d.estimate.n for d in found[:2]))
    half = found[-1].estimate.high - found[-1].estimate.value
    quantile = scipy_stats.t.ppf(0.975, found[-1].estimate.n - 1)
    assert half / quantile == pytest.approx(expected)
    assert found[-1].verdict == "better" and found[-1].p_holm == found[-1].p  # the only one over all
    pooled = dict(zip(*(difference_table(found, "final")[k] for k in (0, -1)), strict=True))
    assert pooled["Runs"] == "" and pooled["p, Holm"] == pooled["p"] != ""
    other = [row("c", k, 0.5, "two") for k in range(8)]
    assert [d.family for d in differences(one + two + other, [("a", "c")], "final")] == ["two"]  # not all
    few = differences(rows([0.0] * 2, [0.1, 0.2], "few") + two, [("a", "b")], "final")
    assert few[-1].verdict == "too few runs"
    single = differences(rows([0.0], [0.1], "single") + two, [("a", "b")], "final")
    assert [d.family for d in single] == ["single", "two"]  # one run has no spread to pool


def test_what_is_said_over_all_families_is_adjusted_apart() -> None:
    """By the number of pairs that are compared over all families, and without effect on the others."""
    noise = np.array([0.1, -0.1, 0.05, -0.05, 0.02, -0.02])

    def table(name: str) -> list[Row]:
        found = rows([0.0] * 6, list(noise + 0.15), name)
        for variant, mean in (("c", 0.05), ("d", 0.0)):
            found += [row(variant, k, x, name) for k, x in enumerate(noise + mean)]
        return found

    pairs = [("a", "b"), ("a", "c"), ("a", "d")]
    found = differences(table("one") + table("two"), pairs, "final")
    whole, single = [[d for d in found if (d.family == POOLED) == pooled] for pooled in (True, False)]
    p = [d.p for d in whole]
    assert p[0] < p[1] < 0.05 < p[2]
    expected = [3 * p[0], max(3 * p[0], 2 * p[1]), max(2 * p[1], p[2])]
    assert [d.p_holm for d in whole] == pytest.approx(expected)
    assert whole[0].verdict == "better" and whole[1].verdict == "better before adjustment"
    assert min(d.p_holm for d in single) == pytest.approx(6 * min(d.p for d in single))


def test_all_families_together_are_no_further_comparison() -> None:
    same = [0.1, -0.1, 0.05, -0.05]
    one, two = rows([0.0] * 4, same, "one"), rows([0.0] * 4, same, "two")
    (line,) = answers(differences(one + two, [("a", "b")], "final"))
    assert line.startswith("No difference found in 2 comparisons of the final return, nor over all families;")
    few = rows([0.0] * 2, [0.1, 0.2], "one") + rows([0.0] * 2, [0.1, 0.2], "two")
    assert answers(differences(few, [("a", "b")], "final")) == [
        "Too few runs for a verdict in 2 comparisons."
    ]


def test_a_study_says_how_much_of_the_spread_is_chance_in_play_and_when_that_is_most_of_it() -> None:
    ends = [0.0, 0.3, 0.1, -0.2]
    told = [
        row(variant, run, x, "room", final_chance=chance)
        for variant, xs, chance in (("a", [0.0] * 4, 0.06), ("b", ends, 0.08))
        for run, x in enumerate(xs)
    ]
    untold = rows([0.0] * 4, ends, "hall")
    found = differences(told + untold, [("a", "b")], "final")
    head, *lines = difference_table(found, "final")
    spread = f"{np.std(ends, ddof=1):.3f}"
    shown = [dict(zip(head, line, strict=True)) for line in lines]
    assert [(line["Family"], line["Spread"], line["By chance in play, at most"]) for line in shown] == [
        ("room", spread, "0.100"),
        ("hall", spread, "–"),
        (POOLED, "–", "–"),
    ]
    assert not any("evaluation.rollouts" in line for line in answers(found))  # .1 of .208
    more = [replace(r, values={**r.values, "final_chance": 2 * r["final_chance"]}) for r in told]
    assert answers(differences(more + untold, [("a", "b")], "final"))[-1] == (
        "Half of the variance between runs or more may be chance in play for b − a on room: more"
        " evaluation.rollouts may narrow these intervals without further training."
    )
    unknown = {"final_chance": NAN}
    older = [r if r.run else replace(r, values={**r.values, **unknown}) for r in told]
    assert differences(older, [("a", "b")], "final")[0].chance == pytest.approx(0.1)  # of the runs that know
    still = [replace(r, values={**r.values, "final": 0.5}) for r in more]
    assert not any(
        "evaluation.rollouts" in line for line in answers(differences(still, [("a", "b")], "final"))
    )
    same = [replace(r, parameters="a/b/c") for r in told]  # one model, played in two ways
    assert math.isnan(differences(same, [("a", "b")], "final")[0].chance)
    assert "Spread" not in difference_table(differences(untold, [("a", "b")], "final"), "final")[0]


def test_no_line_of_marked_steps_is_called_after_a_model_that_ignores_marks(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    variants = "{AD: {model: {model: AD}}, CompressedAD: {}, plain: {model: {model: AD}, marker: all}}"
    file.write_text(f"families: {{darkroom: {{}}}}\nvariants: {variants}\n")
    study = load_study(file)
    own = {f"marked_{k}": 1.0 for k in range(10)}
    both = [row(name, run, 0.5, "darkroom") for name in ("AD", "CompressedAD") for run in range(2)]
    found = _marked(study, [*both, *(row("plain", run, 0.5, "darkroom", **own) for run in range(2))])
    assert list(found["darkroom"]) == ["CompressedAD", "all"]


def test_a_study_of_one_variant_has_no_empty_table(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("families: {darkroom: {}}\nvariants: {AD: {}}\n")
    found = tables(load_study(file), [row("AD", k, 0.5, "darkroom") for k in range(3)], [])
    assert [table.rows[0][:3] for table in found] == [["Family", "Variant", "Runs"]]


def test_convergence_is_interpolated_to_the_level_of_the_paired_baseline() -> None:
    def curve(variant: str, run: int, values: list[float]) -> list[Row]:
        keys = ("step", "validation_return", "validation_accuracy")
        return [
            Row("room", variant, run, dict(zip(keys, (100 * (k + 1), x, x / 2), strict=True)))
            for k, x in enumerate(values)
        ]

    points = curve("a", 0, [0.1, 0.3, 0.5]) + curve("b", 0, [0.2, 0.6, 0.7])
    points += curve("a", 1, [0.1, 0.2, 0.9]) + curve("b", 1, [0.2, 0.6, 0.7])
    points += curve("a", 2, [0.1, 0.2, 0.6]) + curve("b", 2, [0.2, 0.5, 0.7])
    found = {(c.method, c.measure): c for c in convergence(points, "a")}
    base, other = found["a", "validation_return"], found["b", "validation_return"]
    assert base.steps == 300 and base.reached == 3 and base.level == pytest.approx(2 / 3)
    between = [100 + 100 * (0.5 - 0.2) / 0.4, 200 + 100 * (0.6 - 0.5) / 0.2]
    assert other.reached == 2 and other.steps == pytest.approx(max(between))
    assert convergence_table([other])[1][-2:] == ["250", "2 of 3"]


finite = st.floats(-2, 2).map(lambda x: float(f"{x:.6g}"))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), finite), unique_by=lambda t: t[:2]))
def test_rows_read_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, cells: list) -> None:
    path = tmp_path_factory.mktemp("rows") / "table.csv"
    table = [row(variant, run, x) for variant, run, x in cells]
    write_rows(path, table, result_columns())
    for before, after in zip(table, read_rows(path), strict=True):
        known = {key: value for key, value in after.values.items() if not math.isnan(value)}
        assert replace(after, values=known) == before
    points = [
        Row("room", v, run, dict(zip(POINT_COLUMNS, (run, x, x, x), strict=True))) for v, run, x in cells
    ]
    write_rows(path, points, POINT_COLUMNS)
    assert read_rows(path) == points


def test_a_damaged_table_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_rows(path, [row("a", 0, 0.5), row("b", 0, 0.5)], result_columns())
    whole = path.read_text()
    for text, message in [
        (whole.replace("a,0,0,0.5", "a,0,0,half"), r"table.csv:2: final: not a number: 'half'"),
        (whole.replace("room,b", "room,a"), "two lines of one cell"),
        ("x,y\n", "its first line must name family"),
        (whole.replace("a,0,0,0.5", "a,0.5,0,0.5"), r"table.csv:2: run: not a whole number: '0.5'"),
        (
            whole + "room\n",
            f"table.csv:4: expected {whole.partition(chr(10))[0].count(chr(44)) + 1} values, got 1",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_rows(path)


def test_no_changed_digit_of_a_table_passes(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_rows(path, [row("a", k, 0.5 + k / 64, marked=0.25) for k in range(3)], result_columns())
    sound = path.read_bytes()

    def content_of() -> str:
        return str(
            [(row.family, row.variant, row.run, sorted(row.values.items())) for row in read_rows(path)]
        )

    before = content_of()
    lines = sound.splitlines(keepends=True)
    damaged = [b"".join(lines[:k] + lines[k + 1 :]) for k in range(1, len(lines))]
    damaged += [
        sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :] for place in range(0, len(sound), 3)
    ]
    for content in damaged:
        path.write_bytes(content)
        try:
            assert content_of() == before, content  # the name of a column that is not read
        except UsageError as error:
            assert str(path) in str(error)
    write_rows(path, [], result_columns())
    assert read_rows(path) == []
    path.write_bytes(sound.replace(b"0.5,", b"0.7,", 1))
    with pytest.raises(UsageError, match=r"table\.csv: was changed after it was written"):
        read_rows(path)
    head, *rest = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join([head, *rest]) + "\n")  # as earlier versions wrote it, or by hand
    assert len(read_rows(path)) == 3


NAMES = st.text("='+-@\t\n\",a1", max_size=4)


@settings(max_examples=60)
@given(NAMES, NAMES)
def test_no_name_is_a_formula_and_all_come_back(
    tmp_path_factory: pytest.TempPathFactory, family: str, variant: str
) -> None:
    path = tmp_path_factory.mktemp("formula") / "table.csv"
    write_rows(path, [replace(row(variant, 0, -0.5, family), parameters=variant)], result_columns())
    (found,) = read_rows(path)
    assert (found.family, found.variant, found.parameters) == (family, variant, variant)
    assert found["final"] == -0.5
    for cells in csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")):
        texts = [cells[name] for name in ("family", "variant", "parameters")]
        assert not [text for text in texts if text[:1] and text[0] in "=+-@\t\r"]


def test_tables_say_what_they_found() -> None:
    table = rows([0.5, 0.6, 0.55, 0.52], [0.7, 0.8, 0.74, 0.73])
    text = markdown(difference_table(differences(table, [("a", "b")], "final"), "final"))
    assert "| room | b − a | 4 | +0.200 |" in text and "| better |" in text
    head, line, *_ = means_table(table, ["a", "b"])
    assert dict(zip(head, line, strict=True))["Final return"] == "0.542"
    assert "Held-out − training" not in head  # nothing measured, no column
    lines = plain([head, line]).splitlines()
    assert len(lines) == 3 and set(lines[1]) == {"-", " "}
