"""Measures against closed forms, and a further measure from one row to every place that shows measures."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from compressed_ad.evaluation.intervals import Interval
from compressed_ad.report import measures
from compressed_ad.report.comparison import Difference, analyse, differences
from compressed_ad.report.figures.returns import in_context_curves
from compressed_ad.report.measures import MEASURES, NEEDS, Measure
from compressed_ad.report.rows import Row, read_rows, result_columns, write_rows
from compressed_ad.report.run_report import build_report
from compressed_ad.report.study_report import answers, difference_table, means_table
from compressed_ad.runs.study import load_study
from compressed_ad.tasks.base import DIRECTED_SEARCH
from compressed_ad.tasks.limits import shipped_limit
from tests.report.test_run_report import EXPERIMENT, in_terminal, method

FINITE = st.floats(-100, 100, allow_nan=False, width=32)


def test_normalise_is_per_task() -> None:
    scores = measures.normalise([[[1.0], [3.0]], [[10.0], [0.0]]], random=[1.0, 0.0], optimal=[3.0, 10.0])
    assert scores.tolist() == [[[0.0], [1.0]], [[1.0], [0.0]]]
    assert np.isnan(measures.normalise([[1.0], [1.0]], random=[0.0, 2.0], optimal=[np.nan, 2.0])).all()
    with pytest.raises(ValueError, match="each of 2 tasks"):
        measures.normalise(np.zeros((2, 3)), random=[0.0], optimal=[1.0, 1.0])


@pytest.mark.parametrize(("episodes", "last"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (50, 5)])
def test_final_return_is_the_last_tenth(episodes: int, last: int) -> None:
    curve = np.arange(episodes, dtype=np.float64)
    assert measures.final_return(curve) == curve[-last:].mean()
    assert measures.area_under_curve(curve) == curve.mean()


def test_found_and_success_given_found() -> None:
    returns = np.zeros((1, 4, 20))
    returns[0, 0, 3:] = 5.0  # found in episode 4 and kept
    returns[0, 1, 10] = 5.0  # found in episode 11 and lost again
    returns[0, 2, 18:] = 5.0  # found only in the last tenth: no time to exploit
    assert measures.found_by(returns, 3).tolist() == [0.0]
    assert measures.found_by(returns, 4).tolist() == [0.25]
    assert measures.found_by(returns, 11).tolist() == [0.5]
    assert measures.found_by(returns).tolist() == [0.75]
    assert measures.success_given_found(returns, returns / 10).tolist() == [0.25]
    assert np.isnan(measures.success_given_found(np.zeros((1, 4, 20)), returns)).all()
    assert np.isnan(measures.success_given_found(np.ones((2, 1)), np.ones((2, 1))))


@given(arrays(np.float64, st.integers(1, 30), elements=FINITE), FINITE)
def test_step_to_reach_is_between_the_points_around_the_level(curve: np.ndarray, level: float) -> None:
    steps = 100 * np.arange(1, len(curve) + 1)
    got = measures.step_to_reach(steps, curve, level)
    first = next((k for k, value in enumerate(curve) if value >= level), None)
    if first is None:
        assert got == math.inf
    elif first == 0:
        assert got == steps[0]
    else:
        assert steps[first - 1] <= got <= steps[first]
        assert np.interp(got, steps, curve) == pytest.approx(level, abs=1e-6)


def test_step_to_reach_in_small_cases() -> None:
    assert measures.step_to_reach([100, 200, 300], [0.1, 0.5, 0.4], 0.4) == pytest.approx(175)
    assert measures.step_to_reach([100, 200], [0.1, np.nan], 0.4) == math.inf
    assert measures.step_to_reach([], [], 0.4) == math.inf


# ---------------------------------------------------------------- the rows


def test_every_measure_is_one_well_formed_row() -> None:
    runs = method()
    for key, measure in MEASURES.items():
        assert key == measure.key and measure.label and measure.meaning and measure.better in (-1, 0, 1)
        assert not measure.needs or measure.needs in NEEDS
        scores = measure.scores(runs)
        assert scores.shape in ((3,), (3, 3))
        inside = (scores >= measure.limits[0]) & (scores <= measure.limits[1] + 0.2) | np.isnan(scores)
        assert inside.all(), key
    assert np.isnan(MEASURES["found"].scores(replace(runs, horizon=1))).all()


@pytest.mark.parametrize("episodes", [49, 50, 120])
def test_measures_of_single_episodes_count_from_1_and_end_with_the_curve(episodes: int) -> None:
    base = method()
    returns = np.broadcast_to(np.arange(1, episodes + 1, dtype=np.float64), (3, 3, 4, episodes))
    runs = replace(base, returns=returns, random=np.zeros(3), optimal=np.ones(3))
    for key in (key for key in MEASURES if key.startswith("episode_")):
        number = int(key.removeprefix("episode_"))
        scores = MEASURES[key].scores(runs)
        assert (scores == number).all() if number <= episodes else np.isnan(scores).all(), key
    area = MEASURES["auc_50"].scores(runs)
    assert (area == 25.5).all() if episodes >= 50 else np.isnan(area).all()


@pytest.mark.parametrize("horizon", [1, 20])
def test_regret_is_what_the_best_policy_earns_more_beside_the_best_reference(horizon: int) -> None:
    base = method()
    returns = np.random.default_rng(0).uniform(0, 1, base.returns.shape)
    lost = np.array([0.5, 0.25, 1.0])  # of each task, in every episode
    known = {name: np.ones(returns.shape[1:]) - k * lost[:, None, None] for name, k in (("A", 2), ("B", 1))}
    runs = replace(base, returns=returns, optimal=np.ones(3), references=known, horizon=horizon)
    episodes = returns.shape[-1]
    wanted = episodes - returns.mean(axis=2).sum(axis=-1)
    assert MEASURES["regret"].scores(runs) == pytest.approx(wanted)
    ratio = wanted.mean(axis=1) / (lost.mean() * episodes)
    assert MEASURES["regret_ratio"].scores(runs) == pytest.approx(ratio)
    alone = replace(runs, references={})
    assert np.isnan(MEASURES["regret"].scores(alone)).all() == (horizon > 1)
    assert np.isnan(MEASURES["regret_ratio"].scores(alone)).all()
    searched = replace(runs, references={DIRECTED_SEARCH: known["A"]})  # of rooms, which have no regret
    assert np.isnan(MEASURES["regret"].scores(searched)).all() == (horizon > 1)
    unknown = replace(runs, optimal=np.array([1.0, np.nan, 1.0]))
    assert np.isnan(MEASURES["regret"].scores(unknown)).all()
    best = np.array([1.0, 2.0, 3.0])
    wanted = best * episodes - returns.mean(axis=2).sum(axis=-1)
    assert MEASURES["regret"].scores(replace(runs, optimal=best)) == pytest.approx(wanted)


def test_chance_in_play_is_how_much_a_mean_varies_when_its_tasks_are_played_again() -> None:
    """4000 plays of the same models: their spread is known to 1.1 %, so 5 % is 4.5 standard errors."""
    rates = np.array([0.1, 0.5, 0.9])[:, None]
    again = np.random.default_rng(0).binomial(1, rates, size=(4000, 3, 4)).astype(np.float64)
    chances = [measures.chance_in_play(scores) for scores in again]
    assert np.sqrt(np.mean(np.square(chances))) == pytest.approx(again.mean(axis=(1, 2)).std(), rel=0.05)
    scaleless = np.concatenate([again[0], np.full((2, 4), np.nan)])
    assert measures.chance_in_play(scaleless) == pytest.approx(chances[0]) != 0
    assert measures.chance_in_play(np.repeat(again[0, :, :1], 4, axis=1)) == 0  # as if nothing were drawn
    assert math.isnan(measures.chance_in_play(again[0, :, :1]))
    assert math.isnan(measures.chance_in_play(scaleless[3:]))


def first_episode(runs: object) -> np.ndarray:
    return np.asarray(runs.curves[..., 0])  # type: ignore[attr-defined]


@pytest.fixture
def further(monkeypatch: pytest.MonkeyPatch) -> str:
    """A measure that this library does not have, added in one place."""
    row = Measure("first", "First return", "return of the first episode", first_episode)
    monkeypatch.setitem(MEASURES, "first", row)
    return "first"


def test_a_further_measure_is_in_the_report_of_a_run(further: str, tmp_path: Path) -> None:
    methods = [method(), method("B", 0.9, seed=1)]
    report = build_report(tmp_path, methods, experiment=EXPERIMENT)
    wanted = methods[0].curves[..., 0].mean()
    assert report.summary["methods"]["AD"][further]["mean"] == pytest.approx(wanted)
    assert "First return" in report.index.read_text() and "First return" in in_terminal(report.analysis)
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["metric"] == further]
    assert {line["kind"] for line in lines} == {"method", "difference"}
    assert float(lines[0]["mean"]) == pytest.approx(wanted)
    said = analyse(methods, metric=further).verdicts[0]
    assert "Mean paired difference of the first return:" in said


def test_a_further_measure_is_in_the_tables_and_verdicts_of_a_study(further: str, tmp_path: Path) -> None:
    values = {"a": [0.1, 0.2, 0.3, 0.15], "b": [0.5, 0.6, 0.7, 0.56]}
    rows = [
        Row("room", variant, run, {"seed": run, further: x, "final": 0.5})
        for variant, xs in values.items()
        for run, x in enumerate(xs)
    ]
    assert further in result_columns()
    write_rows(tmp_path / "table.csv", rows, result_columns())
    back = read_rows(tmp_path / "table.csv")
    assert [row[further] for row in back] == [row[further] for row in rows]
    head, line, _ = means_table(back, ["a", "b"])
    assert dict(zip(head, line, strict=True))["First return"] == "0.188"
    found = differences(back, [("a", "b")], further)
    assert "Difference of first return" in difference_table(found, further)[0]
    assert answers(found)[0].startswith("b is better than a on room: first return +0.4")
    file = tmp_path / "study.yaml"
    file.write_text(f"metric: {further}\nfamilies: {{darkroom: {{}}}}\nvariants: {{AD: {{}}, B: {{}}}}\n")
    assert load_study(file).metric == further


def test_a_table_of_before_the_measure_is_still_read(further: str, tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("family,variant,run,seed,final,unheard_of\nroom,a,0,0,0.5,7\n")
    (row,) = read_rows(path)
    assert row["final"] == 0.5 and math.isnan(row[further]) and "unheard_of" not in row.values
    head, line = means_table([row], ["a"])
    assert "First return" not in head and line[3] == "0.500"


# ---------------------------------------------------------------- the limit


def test_the_limit_is_drawn_and_printed_where_it_is_known(tmp_path: Path) -> None:
    judged = {"family": "darkroom(horizon=20, size=9)"}
    methods = [replace(method(name, level), judged=judged) for name, level in (("AD", 0.6), ("B", 0.9))]
    limit = shipped_limit("darkroom")
    assert limit is not None
    report = build_report(tmp_path, methods, experiment=EXPERIMENT)
    for runs in methods:
        share = report.summary["methods"][runs.name]["share_of_limit"]["mean"]
        assert share == pytest.approx(runs.curves.mean() / limit.area(20))
    page = report.index.read_text()
    assert "Share of the limit" in page and "Dashed: the limit, of an agent that knows the room" in page
    assert f"{limit.area(20):.4f}, the area under the curve of an agent" in page
    assert f"none exceeds {limit.bound_area(20):.4f}" in page
    assert "Share of the limit" in in_terminal(report.analysis)
    assert [line for line in (tmp_path / "table.csv").read_text().splitlines() if ",share_of_limit," in line]


@pytest.mark.parametrize("judged", [{}, {"family": "darkroom(horizon=20, size=8)"}, {"family": "mine:Room"}])
def test_nothing_is_said_of_a_limit_that_is_unknown(judged: dict[str, str], tmp_path: Path) -> None:
    report = build_report(tmp_path, [replace(method(), judged=judged)], experiment=EXPERIMENT)
    page = report.index.read_text()
    assert report.summary["methods"]["AD"]["share_of_limit"]["mean"] is None
    assert "Share of the limit" not in page + in_terminal(report.analysis) and "none exceeds" not in page
    assert "Dashed: the limit" not in page and "a family whose limit is known" in page


def test_the_first_figure_has_a_curve_of_the_limit() -> None:
    bands = {"AD": np.tile(np.linspace(0, 0.8, 4), (3, 1))}
    (axes,) = in_context_curves(bands, limit=[0.2, 0.6, 1, 1]).axes
    assert "limit" in [text.get_text() for text in axes.texts]
    assert [0.2, 0.6, 1, 1] in [list(line.get_ydata()) for line in axes.lines]
    (axes,) = in_context_curves(bands).axes
    assert "limit" not in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("measure", "low", "verdict", "sentence"),
    [
        ("final", 0.1, "better", "B is better than A on room"),
        ("final", -0.3, "worse", "B is worse than A on room"),
        ("excess_cross_entropy", 0.1, "worse", "B is worse than A on room"),
        ("excess_cross_entropy", -0.3, "better", "B is better than A on room"),
        ("marked", 0.1, "higher", "Marked: higher with B than with A on room"),
        ("final", -0.1, "no difference found", "No difference found between B and A on room"),
        (
            "final",
            math.nan,
            "not measured",
            "B and A cannot be compared on room: no final return was measured",
        ),
    ],
)
def test_verdicts_know_which_direction_is_better(
    measure: str, low: float, verdict: str, sentence: str
) -> None:
    found = Difference("room", "A", "B", measure, Interval(low + 0.1, low, low + 0.2, 4), 4)
    assert (found.verdict, found.sentence()) == (verdict, sentence)
    few = replace(found, n_run=2)
    assert few.verdict == "not measured" if math.isnan(low) else few.verdict == "too few runs"
