"""The report on simulated runs: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console

from compressed_ad.errors import RunDirectoryError, UsageError
from compressed_ad.evaluation import intervals
from compressed_ad.histories.file import HistoryFile, remark
from compressed_ad.histories.header import HistoryInfo
from compressed_ad.histories.summary import episode_returns
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.marking.statistics import marking_statistics
from compressed_ad.report.comparison import (
    IQM,
    MIN_RUNS,
    Analysis,
    Difference,
    analyse,
    convergence,
    convergence_table,
)
from compressed_ad.report.figures import comparison, histories, style
from compressed_ad.report.learning import learning, learning_sentence
from compressed_ad.report.measures import MEASURES
from compressed_ad.report.results import MethodRuns, content_digest, load_evaluation, load_runs
from compressed_ad.report.rows import validations
from compressed_ad.report.run_report import Experiment, WrittenReport, build_report
from compressed_ad.report.run_tables import terminal_table
from compressed_ad.report.source import SourceSummary, Trace, summarise_source
from compressed_ad.runs.judge import stored_evaluation
from compressed_ad.types import History, Split

GRID = np.array([(x, y) for x in range(4) for y in range(4)])
HELD = np.array([3, 5, 10])
OPTIMAL = np.linspace(10, 14, 16)
RANDOM = np.full(16, 0.25)
EXPERIMENT = Experiment(
    family="Darkroom 4x4",
    split={"train": list(range(11, 16)), "validation": [0], "heldout": HELD.tolist()},
    transforms=["subsample(every=8)"],
    budget={"steps": 100, "batch_size": np.int64(16)},
)


def metrics(level: float = 0.6) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (10, 20, 30)]
    validation = {"validation_return": level, "validation_excess_cross_entropy": 0.2 - level / 10}
    return [*rows, {"step": 15, **{k: v / 2 for k, v in validation.items()}}, {"step": 30, **validation}]


def method(name: str = "AD", level: float = 0.6, n_run: int = 3, seed: int = 0) -> MethodRuns:
    generator = np.random.default_rng(seed)
    learned = np.minimum(np.arange(20) / 8, 1) * level
    noise = 0.02 * generator.normal(size=(n_run, 3, 4, 20))
    return MethodRuns(
        name=name,
        seeds=tuple(range(n_run)),
        task_ids=HELD,
        returns=((learned + noise) * OPTIMAL[HELD, None, None]).astype(np.float32),
        random=RANDOM[HELD],
        optimal=OPTIMAL[HELD],
        accuracy=np.full(n_run, 0.7) + 0.01 * generator.normal(size=n_run),
        cross_entropy=np.full(n_run, 0.6),
        behaviour_entropy=np.full(n_run, 0.55),
        metrics=[metrics(level) for _ in range(n_run)],
    )


def source() -> SourceSummary:
    mask = np.random.default_rng(0).random((16, 2, 100)) < np.linspace(0, 1, 100)
    return SourceSummary(
        name="PPO",
        task_ids=np.arange(16),
        tasks=GRID,
        kinds=tuple("heldout" if i in HELD else "validation" if i == 0 else "train" for i in range(16)),
        random=RANDOM,
        optimal=OPTIMAL,
        returns=OPTIMAL[:, None] * np.linspace(0, 0.9, 25),
        marking=marking_statistics([mask]),
        marked_by_phase=np.array([marking_statistics([m]).ratio_by_phase for m in mask]),
        trace=Trace("PPO, task 1", 40, np.linspace(0.2, 1, 60), np.arange(60) > 40, np.arange(60) % 20 == 19),
        threshold=0.7,
    )


class Page(HTMLParser):
    """Collects what a page would load, and the text it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "data", "action")]
        self.links += [v or "" for k, v in attrs if k == "href"]
        self.places += [v or "" for k, v in attrs if k == "id"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module", params=[3, 1], ids=["three runs", "one run"])
def report(request, tmp_path_factory) -> WrittenReport:
    n_run = request.param
    return build_report(
        tmp_path_factory.mktemp("out") / "report",
        [method(n_run=n_run), method("CompressedAD", 0.9, n_run, seed=1)],
        experiment=EXPERIMENT,
        source=source(),
        seconds={"collect": 2.0, "train": 3.5},
        commands=["cad run --preset smoke"],
        provenance={"python": "3.11"},
        notes=["A further note."],
    )


def test_report_is_complete_and_self_contained(report: WrittenReport) -> None:
    page = Page(report.index.read_text("utf-8"))
    n_run = report.analysis.pairs["CompressedAD-AD"]["final"].n_run
    begins = "CompressedAD is better than AD." if n_run == 3 else "Too few runs to compare"
    assert report.summary["verdict"].startswith(begins)
    learned = report.summary["learning"]
    assert learned.startswith("Both models learned in context: AD from ")
    assert page.text.index(learned) < page.text.index(begins) < page.text.index("Final return")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.loads and all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    for load in page.loads:
        assert b"</svg>" in base64.b64decode(load.split(",")[1])
    folder = report.index.parent
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        *("in_context", "difference_CompressedAD", "per_task", "goal_map", "performance_profile"),
        *("training", "source_learning", "probability_trace", "marked_fraction"),
    }
    assert len(page.loads) == 9
    for phrase in ("cad run --preset smoke", "not on-policyness", "A further note.", "subsample(every=8)"):
        assert phrase in page.text
    assert not list(folder.rglob("*.tmp"))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.places) and {"results", "protocol", "in_context"} <= inside
    files = {link for link in page.links if not link.startswith("#")}
    assert all((folder / link).is_file() for link in files)
    assert {"table.csv", "summary.json", "tables/comparison.tex", "figures/in_context.svg"} <= files


def test_captions_say_what_the_figures_show(report: WrittenReport) -> None:
    text = Page(report.index.read_text("utf-8")).text
    final = {name: row["final"].value for name, row in report.analysis.methods.items()}
    said = ", ".join(f"{name} {value:.3f}" for name, value in final.items())
    assert f"In the last tenth of the episodes: {said}." in text
    assert "Never solved, below 0.1 for every method: none of 3." in text
    some = [d for key, d in report.analysis.pairs["CompressedAD-AD"].items() if key != IQM and d.decided]
    assert ("Filled: it excludes 0 (final return" in text) == bool(some)
    assert ("3 runs are needed to judge" in text) == (not some)


def test_summary_has_the_promised_keys(report: WrittenReport) -> None:
    folder = report.index.parent
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == report.summary
    keys = {
        "learning",
        "verdict",
        "methods",
        "differences",
        "regret",
        "references",
        "marking",
        "seconds",
        "protocol",
    }
    assert set(summary) == keys | {"iqm_of_differences"}
    metrics = {
        "final",
        "auc",
        "accuracy",
        "excess_cross_entropy",
        "found_by_10",
        "found",
        "success_given_found",
    }
    for table in (*summary["methods"].values(), *summary["differences"].values()):
        assert set(table) == {*MEASURES, IQM} > metrics
        assert all(set(row) == {"mean", "iqm", "low", "high", "interval_of"} for row in table.values())
        assert all(row["interval_of"] == ("iqm" if key == IQM else "mean") for key, row in table.items())
    assert set(summary["methods"]) == {"AD", "CompressedAD"}
    assert set(summary["differences"]) == {"CompressedAD-AD"}
    assert summary["differences"]["CompressedAD-AD"]["final"]["mean"] == pytest.approx(0.3, abs=0.03)
    assert summary["methods"]["AD"]["excess_cross_entropy"]["mean"] == pytest.approx(0.05)
    assert set(summary["marking"]) == {"total_steps", "compressed_steps", "compression_ratio"}
    assert set(summary["seconds"]) == {"collect", "mark", "train", "evaluate", "report", "total"}
    assert summary["seconds"]["mark"] is None
    assert summary["seconds"]["total"] == pytest.approx(5.5 + summary["seconds"]["report"])
    seeds = list(report.analysis.seeds["AD"])
    assert summary["protocol"]["seeds"] == {"AD": seeds, "CompressedAD": seeds}
    assert summary["protocol"]["episodes"] == 20
    assert summary["protocol"]["budget"] == {"steps": 100, "batch_size": 16}

    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert len(rows) == 3 * (len(MEASURES) + 1)
    final = next(r for r in rows if r["kind"] == "difference" and r["metric"] == "final")
    assert float(final["mean"]) == summary["differences"]["CompressedAD-AD"]["final"]["mean"]
    assert final["iqm"] == "" and final["interval_of"] == "mean"
    middle = next(r for r in rows if r["kind"] == "iqm of differences")
    assert float(middle["iqm"]) == summary["differences"]["CompressedAD-AD"][IQM]["iqm"]


def test_what_stands_beside_each_other_subtracts(report: WrittenReport) -> None:
    """In the summary, on the page and in the terminal; where it need not, a sentence says so."""
    methods, (gap,) = report.summary["methods"], report.summary["differences"].values()
    for key in MEASURES:
        one, other = (methods[name][key]["mean"] for name in ("AD", "CompressedAD"))
        if one is not None:
            assert gap[key]["mean"] == pytest.approx(other - one, abs=1e-12), key
    page, terminal = Page(report.index.read_text("utf-8")).text, in_terminal(report.analysis)
    sentence = "the interquartile mean of the paired differences, which need not be the difference of"
    for shown in (page, terminal):
        assert sentence in shown and "mean over runs and tasks" in shown
    number = intervals.number(gap["final"]["mean"], "+")
    assert number in page and number in terminal
    d = report.analysis.pairs["CompressedAD-AD"]["final"]
    assert ("better" in d.verdict) == (d.n_run >= MIN_RUNS and d.estimate.excludes_zero())


def test_columns_that_cannot_subtract_are_marked() -> None:
    """The second method never meets the reward on one task, so it has no final return if met there."""
    lost = method("B", seed=1)
    lost = replace(lost, returns=np.concatenate([lost.returns[:, :2], 0 * lost.returns[:, 2:]], axis=1))
    analysis = analyse([method(), lost])
    assert analysis.pairs["B-AD"]["found"].estimate.low >= -1.0  # shares differ by 1 at most
    shown = in_terminal(analysis)
    assert "Final if met†" in shown and "† The difference is over the runs and tasks of which both" in shown
    assert "Final return†" not in shown and "†" not in in_terminal(analyse([method(), method("B", seed=1)]))


def test_two_columns_of_skewed_scores_subtract() -> None:
    """Interquartile means of columns and of paired differences disagree here, even in their sign."""
    a, b = method(), method("B", seed=1)
    scores = np.repeat([[0.9, 0.9, 0.0]], 3, axis=0) + np.linspace(0, 0.02, 3)[:, None]
    turned = np.repeat([[0.8, 0.95, 0.7]], 3, axis=0)
    a, b = (
        replace(
            m,
            returns=np.broadcast_to(s[..., None, None], (3, 3, 4, 20)),
            random=np.zeros(3),
            optimal=np.ones(3),
        )
        for m, s in ((a, scores), (b, turned))
    )
    analysis = analyse([a, b])
    one, other = (analysis.methods[name]["final"].value for name in ("AD", "B"))
    assert analysis.pairs["B-AD"]["final"].estimate.value == pytest.approx(other - one)
    middles = [analysis.methods[name][IQM].value for name in ("AD", "B")]
    assert abs(analysis.pairs["B-AD"][IQM].estimate.value - (middles[1] - middles[0])) > 0.02


@pytest.mark.parametrize(
    ("level", "n_run", "verdict", "words"),
    [
        (0.8, 4, "better", "B is better than AD."),
        (0.4, 4, "worse", "B is worse than AD."),
        (0.6, 4, "no difference found", "No difference found between B and AD."),
        (0.8, 2, "too few runs", "Too few runs to compare B with AD"),
        (0.8, 1, "too few runs", "1 run each"),
    ],
)
def test_verdict(level: float, n_run: int, verdict: str, words: str) -> None:
    analysis = analyse([method(n_run=n_run), method("B", level, n_run, seed=1)])
    (row,), (said,) = analysis.pairs.values(), analysis.verdicts
    assert (row["final"].verdict, row["final"].n_run) == (verdict, n_run)
    assert (
        words in said
        and "Mean paired difference of the final return: " in said
        and "3 held-out tasks" in said
    )
    assert ("better" in said or "worse" in said) == (verdict in ("better", "worse"))


def test_without_any_scale_the_verdict_says_what_is_missing() -> None:
    unknown = [replace(m, optimal=np.full(3, np.nan)) for m in (method(), method("B", seed=1))]
    assert analyse(unknown).verdicts == ["B and AD cannot be compared: no final return was measured."]


@pytest.mark.parametrize(
    ("scaled", "words"),
    [
        (0, "B and AD cannot be compared: no final return was measured."),
        (1, "Too few tasks to compare B with AD: at least 2 must count."),
        (2, "B is better than AD."),
    ],
)
def test_tasks_without_a_scale_do_not_count(scaled: int, words: str) -> None:
    """The random policy is as good as the optimum in all tasks but the first ``scaled``, of 3."""
    low = np.where(np.arange(3) < scaled, RANDOM[HELD], OPTIMAL[HELD])
    analysis = analyse([replace(m, random=low) for m in (method(), method("B", 0.9, seed=1))])
    (said,) = analysis.verdicts
    assert said.startswith(words)
    if scaled == 0:
        assert "0 of 3 held-out tasks count (the others have no scale: " in said
    else:
        verb = "counts" if scaled == 1 else "count"
        why = "the random policy does as well as the best return known, or none is known"
        assert f"3 runs each, {scaled} of 3 held-out tasks {verb} (the others have no scale: {why})." in said
    if scaled < 2:
        estimate = analysis.pairs["B-AD"]["final"].estimate
        assert np.isnan([estimate.low, estimate.high, analysis.methods["B"]["final"].low]).all()
        assert np.isfinite(analysis.methods["B"]["accuracy"].low)  # a measure of whole runs
    assert "nan" not in in_terminal(analysis)


def test_no_table_shows_nan_and_each_line_counts_its_tasks(tmp_path: Path) -> None:
    low = np.where(np.arange(3) < 2, RANDOM[HELD], OPTIMAL[HELD])
    both = [
        replace(m, random=low, accuracy=m.accuracy * np.nan) for m in (method(), method("B", 0.9, seed=1))
    ]
    written = build_report(tmp_path, both, experiment=EXPERIMENT)
    table = (tmp_path / "table.csv").read_text()
    assert "nan" not in table and "nan" not in Page(written.index.read_text("utf-8")).text
    tasks = {row["metric"]: row["tasks"] for row in csv.DictReader(table.splitlines())}
    assert (tasks["final"], tasks["found"]) == ("2", "3")


def test_a_worse_method_is_called_worse() -> None:
    assert analyse([method(), method("B", 0.3, seed=1)]).verdicts[0].startswith("B is worse than AD.")


def test_what_is_unknown_is_null_and_the_rest_stands(tmp_path: Path) -> None:
    """No optimum, no source, no imitation figures, no metrics, one method, one rollout, one episode."""
    bare = method()
    bare = replace(
        bare,
        returns=bare.returns[:1, :, :1, :1] * 0,
        seeds=(4,),
        optimal=np.full(3, np.nan),
        accuracy=np.array([np.nan]),
        cross_entropy=np.array([np.nan]),
        behaviour_entropy=np.array([np.nan]),
        metrics=[[]],
    )
    summary = build_report(tmp_path, [bare], experiment=EXPERIMENT).summary
    nothing = {"mean": None, "iqm": None, "low": None, "high": None, "interval_of": "mean"}
    assert summary["methods"]["AD"]["final"] == nothing
    assert summary["methods"]["AD"]["accuracy"] == nothing
    assert summary["methods"]["AD"]["found"] == nothing | dict.fromkeys(("mean", "iqm", "low", "high"), 0.0)
    assert summary["differences"] == {}
    assert summary["marking"] is None
    assert "nothing to compare" in summary["verdict"]


def test_without_an_optimum_the_source_sets_the_scale() -> None:
    unknown = replace(method(), optimal=np.full(3, np.nan))
    analysis = analyse([unknown], source())
    assert np.allclose(analysis.optimal, 0.9 * OPTIMAL[HELD])
    assert "source" in analysis.scale
    assert analysis.methods["AD"]["final"].value > analyse([method()]).methods["AD"]["final"].value
    weak = analyse([unknown], replace(source(), returns=source().returns * 0.3)).methods["AD"]["final"]
    assert 1 < weak.value < weak.high  # a method may do better than its source
    said = "1 is the best episode of the source algorithm (the optimal return is unknown)."
    assert said in in_terminal(analysis)
    assert "the best episode" not in in_terminal(analyse([method()], source()))


# ---------------------------------------------------------------- learning in context


def noisy(*levels: float, noise: float = 0.05, n_task: int = 12) -> np.ndarray:
    """Curves (4, n_task, 20) around straight lines between ``levels`` at even distances."""
    line = np.interp(np.linspace(0, 1, 20), np.linspace(0, 1, len(levels)), levels)
    return line + noise * np.random.default_rng(len(levels)).normal(size=(4, n_task, 20))


def test_models_that_learned_in_context_are_said_to_have_with_their_gain() -> None:
    steps = np.repeat([0.0, 0.25, 0.75, 1.0], 5)
    early = np.where(np.arange(20) < 3, 0.2, 0.8)
    curves = {"AD": np.broadcast_to(steps, (2, 3, 20)), "B": np.broadcast_to(early, (2, 3, 20))}
    assert learning_sentence(learning(curves)) == (
        "Both models learned in context: AD from 0.000 in the first episode to 1.000 in the last tenth, with"
        " half of the gain by episode 11; B from 0.200 in the first episode to 0.800 in the last tenth, with"
        " half of the gain by episode 4."
    )
    rising = np.broadcast_to(np.linspace(0, 1, 21)[1:], (2, 3, 20))
    (one,) = learning({"AD": rising})
    assert (one.first, one.last, one.halfway) == (pytest.approx(0.05), pytest.approx(0.975), 11)
    assert one.gain.value == pytest.approx(0.925)
    uneven = np.concatenate([rising, np.broadcast_to(rising[:, :, -1:], rising.shape)])  # runs differ
    (half,) = learning({"AD": uneven})
    assert (half.first, half.halfway) == (pytest.approx(0.525), 11)
    two = learning_sentence(learning({**curves, "C": np.zeros((2, 3, 20))}))
    assert two.startswith("AD and B learned in context: ") and " C did not learn in context: " in two
    three = learning_sentence(learning({**curves, "C": curves["B"]}))
    assert three.startswith("All 3 models learned in context: AD from ")


@pytest.mark.parametrize("levels", [(0.3, 0.3), (0.6, 0.2)])
def test_a_model_that_gains_nothing_did_not_learn(levels: tuple[float, float]) -> None:
    (one,) = learning({"AD": noisy(*levels)})
    assert one.verdict == "did not learn" and one.last == pytest.approx(levels[1], abs=0.02)
    said = learning_sentence([one])
    span = one.gain.span("+")
    assert said.startswith("AD did not learn in context: from ") and said.endswith(
        f" (95 % interval of the gain {span})."
    )


def test_a_gain_that_tasks_do_not_agree_on_is_none() -> None:
    curves = np.zeros((2, 12, 20))
    curves[:, :7, 1:], curves[:, 7:, 1:] = 1.0, -0.8
    (one,) = learning({"AD": curves})
    assert one.gain.value > 0.2 and one.verdict == "did not learn"


def test_where_one_of_two_models_did_not_learn_the_comparison_is_said_to_tell_little() -> None:
    warning = "A comparison with a model that did not learn in context says little."
    one = learning_sentence(learning({"AD": noisy(0.1, 0.8), "B": noisy(0.1, 0.1)}))
    assert one.startswith("AD learned in context: from ") and " B did not learn in context: from " in one
    both = learning_sentence(learning({"AD": noisy(0.1, 0.1), "B": noisy(0.1, 0.1)}))
    assert both.startswith("AD and B did not learn in context: AD from ")
    assert one.endswith(warning) and both.endswith(warning)
    assert warning not in learning_sentence(learning({"AD": noisy(0.1, 0.8), "B": noisy(0.1, 0.7)}))
    assert warning not in learning_sentence(learning({"AD": noisy(0.1, 0.1)}))  # nothing is compared


def test_whether_one_task_is_learned_says_nothing_of_others() -> None:
    said = learning_sentence(learning({"AD": noisy(0.1, 0.9, n_task=1)}))
    assert said.startswith("AD cannot be said to learn in context or not, since one task tells nothing of")
    assert "nan" not in said and "95 %" not in said


def test_episodes_of_one_noisy_step_are_judged_as_all_others() -> None:
    """As of bandits: every return is 0 or 1, and the first episode is one pull of each rollout."""
    chance = np.linspace(0.5, 0.9, 100)
    pulls = np.random.default_rng(0).random((3, 20, 4, 100)) < chance
    (one,) = learning({"AD": pulls.mean(axis=2)})
    assert one.verdict == "learned" and one.last == pytest.approx(0.88, abs=0.03) and 1 < one.halfway < 80
    flat = np.random.default_rng(0).random((3, 20, 4, 100)) < 0.5
    assert learning({"AD": flat.mean(axis=2)})[0].verdict == "did not learn"


def test_nothing_is_said_of_learning_without_a_scale_or_with_one_episode() -> None:
    unknown = noisy(0.1, 0.9) * np.nan
    assert learning({"AD": unknown}) == learning({"AD": noisy(0.1, 0.9)[..., :1]}) == []
    assert learning_sentence([]) == ""
    some = noisy(0.1, 0.9)
    some[:, 4:] = np.nan  # tasks without a scale do not count
    assert learning({"AD": some})[0] == replace(
        learning({"AD": some[:, :4]})[0], gain=learning({"AD": some})[0].gain
    )


@pytest.mark.parametrize(
    ("change", "searches"),
    [({"horizon": 1}, False), ({"paying": 1.0}, False), ({"paying": 0.02, "horizon": 20}, True), ({}, True)],
)
def test_where_every_step_pays_nothing_is_said_of_meeting_the_reward(
    change: dict[str, float], searches: bool
) -> None:
    analysis = analyse([replace(method(), **change), replace(method("B", seed=1), **change)])
    shown = in_terminal(analysis)
    for key in ("found", "found_by_10", "success_given_found"):
        assert (MEASURES[key].label in shown) == searches
        assert np.isfinite(analysis.methods["AD"][key].value) == searches
    assert MEASURES["final"].label in shown
    assert np.isfinite(analysis.pairs["B-AD"]["final"].estimate.value)


def test_the_page_says_that_no_reward_has_to_be_met(tmp_path: Path) -> None:
    methods = [replace(method(), paying=1.0), replace(method("B", seed=1), paying=1.0)]
    report = build_report(tmp_path, methods, experiment=EXPERIMENT)
    page = Page(report.index.read_text("utf-8")).text
    assert MEASURES["found"].label not in page and MEASURES["success_given_found"].label not in page
    sentence = page[page.index("The table leaves out measures that need") :].split(".")[0]
    assert "a reward that must be found by exploration" in sentence
    assert report.summary["methods"]["AD"]["found"]["mean"] is None


def in_terminal(analysis: Analysis) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal_table(analysis))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


HOSTILE = '<script>alert(1)</script>"$^{_[red]x/../../y'


def test_hostile_names_are_shown_not_obeyed(tmp_path: Path) -> None:
    methods = [method("AD"), method(HOSTILE, seed=1)]
    shown = replace(source(), name=HOSTILE)
    report = build_report(
        tmp_path / "r",
        methods,
        experiment=replace(EXPERIMENT, family=HOSTILE),
        source=shown,
        commands=[HOSTILE],
        provenance={HOSTILE: HOSTILE},
        title=HOSTILE,
    )
    text = report.index.read_text("utf-8")
    assert "<script>" not in text
    assert HOSTILE in Page(text).text
    assert {path.name for path in tmp_path.iterdir()} == {"r"}
    console = Console(file=io.StringIO(), width=300)
    console.print(terminal_table(report.analysis))
    assert "[red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_table_names_everything() -> None:
    console = Console(file=io.StringIO(), width=100)
    analysis = analyse([method(), method("CompressedAD", 0.9, seed=1)])
    console.print(terminal_table(analysis))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("AD", "CompressedAD", "Accuracy", "Area under the curve", "CompressedAD is better than AD"):
        assert word in text
    assert f"{analysis.methods['AD']['final'].value:.3f}" in text and "Paired differences" not in text


def test_three_methods_and_their_differences_fit_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=79)
    three = [method(), method("CompressedAD", 0.9, seed=1), method("GistAD", 0.7, seed=2)]
    console.print(terminal_table(analyse(three)))
    scores, differences = console.file.getvalue().split("Paired differences")  # type: ignore[attr-defined]
    assert "CompressedAD − AD" not in scores and "CompressedAD − AD" in differences
    for text in (scores, differences):
        assert "Area under the curve" in text


def test_methods_are_paired_by_seed() -> None:
    """Swapped seeds of one method must not change the paired difference."""
    a, b = method(), method("B", 0.9, seed=1)
    turned = replace(b, seeds=b.seeds[::-1], returns=b.returns[::-1], accuracy=b.accuracy[::-1])
    for key, d in analyse([a, b]).pairs["B-AD"].items():
        other = analyse([a, turned]).pairs["B-AD"][key]
        assert str(d) == str(other)
    fewer = replace(b, seeds=(1, 2, 7))
    assert analyse([a, fewer]).pairs["B-AD"]["final"].n_run == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_ids": HELD + 1}, "different tasks"),
        ({"seeds": (7, 8, 9)}, "share no training seed"),
        ({"name": "AD"}, "same name"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        analyse([method(), replace(method("B"), **change)])
    with pytest.raises(UsageError, match="at least one"):
        analyse([])


def test_convergence_counts_runs_that_never_get_there_as_infinitely_late() -> None:
    def table(*levels: float) -> list[list[str]]:
        slow = [metrics(level) for level in levels]
        points = [
            p
            for name, runs in (("AD", [metrics()] * 3), ("B", slow))
            for p in validations(name, runs, range(3))
        ]
        return convergence_table(convergence(points, "AD"))

    rows = table(0.5, 0.6, 2.0)
    assert rows[0] == ["Variant", "Measure", "Baseline's last", "Steps to reach it, median", "Runs that do"]
    assert ["AD", "return", "0.600", "30", "3 of 3"] in rows
    assert ["B", "return", "0.600", "30", "2 of 3"] in rows
    assert ["B", "return", "0.600", "never", "1 of 3"] in table(0.5, 0.5, 2.0)
    assert ["B", "excess cross-entropy", "0.140", "15", "3 of 3"] in table(0.1, 0.1, 0.1)
    assert ["B", "return", "0.600", "never", "0 of 3"] in table(0.1, 0.1, 0.1)


# ---------------------------------------------------------------- reading


def save_run(folder: Path, seed: int, **change: object) -> Path:
    run = folder / f"CompressedAD-darkroom-seed{seed}"
    run.mkdir(parents=True)
    whole = method(seed=seed)
    arrays = {
        "returns": whole.returns[0],
        "task_ids": HELD,
        "optimal": OPTIMAL[HELD],
        "random": RANDOM[HELD],
        "accuracy": 0.7 + seed / 100,
        "cross_entropy": 0.6,
        "behaviour_entropy": 0.55,
    }
    arrays = {key: value for key, value in {**arrays, **change}.items() if value is not None}
    np.savez(run / "evaluation.npz", **arrays)  # type: ignore[arg-type]
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    return run


def test_load_runs_orders_by_seed(tmp_path: Path) -> None:
    runs = load_runs([save_run(tmp_path, 10), save_run(tmp_path, 2)])
    assert runs.name == "CompressedAD"
    assert runs.seeds == (2, 10)
    assert runs.accuracy.tolist() == pytest.approx([0.72, 0.8])
    assert runs.returns.shape == (2, 3, 4, 20)
    assert [row["step"] for row in runs.metrics[0]] == [1, 2]
    assert load_runs([tmp_path / "CompressedAD-darkroom-seed2"], name="other").name == "other"


def test_metrics_that_were_cut_are_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path, 0, step_last=np.int64(3))
    path = run / "metrics.jsonl"
    with pytest.raises(
        RunDirectoryError, match=r"metrics\.jsonl: ends at step 2, but .* trained to 3; remove"
    ):
        load_runs([run])
    path.write_bytes(b"")
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: ends at step none"):
        load_runs([run])
    path.write_text('{"step": 3, "loss": 0.5}\n')
    assert load_runs([run]).metrics == [[{"step": 3, "loss": 0.5}]]


def test_whatever_a_changed_byte_raises_the_evaluation_is_named(tmp_path: Path) -> None:
    path = save_run(tmp_path, 0) / "evaluation.npz"
    sound, right = path.read_bytes(), load_evaluation(path)
    draw = np.random.default_rng(0)
    for _ in range(300):
        place, bit = int(draw.integers(len(sound))), 1 << int(draw.integers(8))
        path.write_bytes(sound[:place] + bytes([sound[place] ^ bit]) + sound[place + 1 :])
        assert stored_evaluation(path) is None  # it has no settings
        try:
            found = load_evaluation(path)
        except RunDirectoryError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert all(np.array_equal(found[key], right[key]) for key in right)


def test_arrays_that_are_missing_or_called_otherwise_do_not_match_the_digest(tmp_path: Path) -> None:
    path = save_run(tmp_path, 0) / "evaluation.npz"
    arrays = load_evaluation(path) | {"horizon": np.array(20)}
    digest = content_digest(arrays)
    np.savez(path, **arrays, digest=digest)
    assert load_evaluation(path).keys() == arrays.keys()
    others = {k: v for k, v in arrays.items() if k != "horizon"}
    for changed in (
        others,
        {**arrays, "extra": np.zeros(1)},
        {**others, "horizons": arrays["horizon"]},
        {**arrays, "horizon": arrays["horizon"].view(np.uint64)},
        {**arrays, "returns": arrays["returns"].swapaxes(0, 1).reshape(arrays["returns"].shape)},
        {**arrays, "returns": arrays["returns"].reshape(3, 2, 40)},
    ):
        np.savez(path, **changed, digest=digest)
        with pytest.raises(RunDirectoryError, match="its arrays do not match its digest"):
            load_evaluation(path)


def test_load_runs_names_what_is_wrong(tmp_path: Path) -> None:
    good = save_run(tmp_path / "good", 0)

    def refused(words: str, *runs: Path) -> None:
        with pytest.raises(RunDirectoryError, match=words):
            load_runs([good, *runs])

    refused("evaluation.npz: not found", tmp_path / "nowhere-seed1")
    refused("has no optimal, accuracy", save_run(tmp_path / "a", 1, optimal=None, accuracy=None))
    refused("judged otherwise than .*task_ids: ", save_run(tmp_path / "b", 1, task_ids=HELD + 1))
    refused("returns: expected", save_run(tmp_path / "c", 1, returns=np.zeros((3, 4))))
    refused("random: expected", save_run(tmp_path / "d", 1, random=np.zeros(2)))
    refused("accuracy: expected one number", save_run(tmp_path / "e", 1, accuracy=np.zeros(2)))
    refused("returns has NaN", save_run(tmp_path / "f", 1, returns=np.full((3, 4, 20), np.nan)))
    for k, (key, value) in enumerate(
        {
            "random": np.full(3, np.nan),
            "optimal": np.full(3, np.inf),
            "accuracy": np.inf,
            "cross_entropy": np.nan,
            "paying": np.nan,
            "returns_last": np.full((3, 4, 20), np.nan),
            "reference_ucb": np.full((3, 4, 20), np.inf),
            "training_random": np.full(2, np.nan),
            "returns": np.full((3, 4, 20), 1e300),
        }.items()
    ):
        refused(f"{key} has NaN, infinity", save_run(tmp_path / f"nan{k}", 1, **{key: value}))
    refused("horizon must be numbers", save_run(tmp_path / "word", 1, horizon="twenty"))
    refused("horizon is -5, but episodes have", save_run(tmp_path / "negative", 1, horizon=-5))
    refused("settings is not a JSON object", save_run(tmp_path / "text", 1, settings="marks: self"))
    refused("settings is not a JSON object", save_run(tmp_path / "list", 1, settings="[]"))
    refused("judged is not a JSON object", save_run(tmp_path / "nan", 1, judged='{"learner": NaN}'))
    refused("split in judged must list", save_run(tmp_path / "split", 1, judged='{"split": {"train": 3}}'))
    load_runs([good, save_run(tmp_path / "path", 1, settings='{"../x.pt": 1}')])
    refused("paying: expected one number", save_run(tmp_path / "vector", 1, paying=np.zeros(3)))
    refused("random must be numbers", save_run(tmp_path / "g", 1, random=np.array(["a", "b", "c"])))
    refused("damaged", save_run(tmp_path / "h", 1, returns=np.array([object()])))  # a pickle: never opened
    cut = save_run(tmp_path / "i", 1)
    whole = (cut / "evaluation.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        (cut / "evaluation.npz").write_bytes(content)
        refused("damaged", cut)
    with (cut / "evaluation.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused("single array", cut)
    bad = save_run(tmp_path / "j", 1)
    (bad / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    refused("line 2 is not a JSON object", bad)
    (bad / "metrics.jsonl").write_text("[1]\n")
    refused("line 1 is not a JSON object", bad)
    (bad / "metrics.jsonl").unlink()
    refused("metrics.jsonl: not found", bad)
    with pytest.raises(UsageError, match="two run directories of one seed"):
        load_runs([good, good])
    with pytest.raises(UsageError, match="no run directory"):
        load_runs([])


@settings(max_examples=50)
@given(st.data())
def test_episode_returns_against_a_loop(data: st.DataObject) -> None:
    n_stream, n_step = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    record = history(n_stream, n_step, generator)
    wanted = []
    for rewards, ends in zip(record.rewards, record.episode_end, strict=True):
        totals, running = [], 0.0
        for reward, end in zip(rewards, ends, strict=True):
            running += float(reward)
            if end:
                totals.append(running)
                running = 0.0
        wanted.append(totals)
    shortest = min(map(len, wanted))
    got = episode_returns(record)
    assert got.shape == (n_stream, shortest)
    assert np.allclose(got, np.array([totals[:shortest] for totals in wanted]).reshape(got.shape), atol=1e-5)


def history(n_stream: int, n_step: int, generator: np.random.Generator) -> History:
    shape = (n_stream, n_step)
    return History(
        states=np.zeros((*shape, 2), np.int64),
        actions=np.zeros(shape, np.int64),
        rewards=generator.random(shape).astype(np.float32),
        next_states=np.zeros((*shape, 2), np.int64),
        terminated=generator.random(shape) < 0.1,
        truncated=generator.random(shape) < 0.2,
        action_probs=generator.random(shape).astype(np.float32),
        update=np.zeros(shape, np.int32),
        learner=np.zeros(n_stream, np.int32),
    )


def history_file(path: Path, marked: bool, optimal: np.ndarray | None = OPTIMAL) -> HistoryFile:
    """Histories of four of the sixteen tasks of a family."""
    spaces = {
        "observation": {"kind": "multidiscrete", "nvec": [4, 4]},
        "action": {"kind": "discrete", "n": 5},
    }
    info = HistoryInfo("darkroom", {}, spaces, 20, "PPO", {}, 0)
    split = Split(train=np.array([1, 7]), validation=np.array([2]), heldout=np.array([4]))
    writer = HistoryWriter(path, info, split, GRID, optimal, np.minimum(np.arange(16.0), 9.0))
    for task in (1, 2, 4, 7):
        writer.append(task, history(3, 300, np.random.default_rng(task)))
    writer.finish()
    if marked:
        remark(path, "threshold", {"on_policy_threshold": 0.4, "compression_window": 3})
    return HistoryFile(path)


def test_summarise_source_reads_what_the_report_shows(tmp_path: Path) -> None:
    file = history_file(tmp_path / "a.hdf5", marked=True)
    summary = summarise_source(file)
    content = file.load().values()
    assert summary.name == "PPO"
    assert summary.task_ids.tolist() == [1, 2, 4, 7]
    assert summary.kinds == ("train", "validation", "heldout", "train")
    assert summary.tasks.tolist() == GRID[[1, 2, 4, 7]].tolist()
    assert summary.random.tolist() == [1.0, 2.0, 4.0, 7.0]
    assert summary.optimal.tolist() == OPTIMAL[[1, 2, 4, 7]].tolist()
    assert summary.returns.shape == (4, min(episode_returns(h).shape[1] for h in content))
    assert summary.returns[1, 0] == pytest.approx(episode_returns(file.load([2])[2])[:, 0].mean())
    assert summary.marking == file.statistics()
    assert summary.marked_by_phase is not None and summary.marked_by_phase.shape == (4, 10)
    assert summary.threshold == 0.4
    assert summary.trace is not None and len(summary.trace.probs) == 200
    assert 0 < summary.trace.mask.mean() < 1


def test_summarise_source_without_marks_and_optimum(tmp_path: Path) -> None:
    summary = summarise_source(history_file(tmp_path / "b.hdf5", marked=False, optimal=None))
    assert (summary.marking, summary.trace, summary.threshold) == (None, None, None)
    assert np.isnan(summary.optimal).all()


def test_figures_do_not_depend_on_global_state_and_are_reproducible() -> None:
    curves = np.random.default_rng(0).random((3, 5))
    first, second = (style.figure_to_svg(histories.learning_curves(curves, name="PPO")) for _ in "ab")
    assert first == second
    assert style.figure_to_png(histories.learning_curves(curves, name="PPO")).startswith(b"\x89PNG")


def test_a_trace_without_marks_and_all_marked_can_be_drawn() -> None:
    for mask in (np.zeros(5, bool), np.ones(5, bool)):
        assert style.figure_to_svg(histories.probability_trace(np.full(5, 0.5), mask))


def test_an_undefined_interval_is_drawn_as_such() -> None:
    undefined = [intervals.Interval(x, np.nan, np.nan, 1) for x in (0.1, np.nan)]
    lines = [(str(k), Difference("", "a", "b", "final", i, 1)) for k, i in enumerate(undefined)]
    assert style.figure_to_svg(comparison.forest({"none": lines}, "difference"))


def test_a_method_has_one_look_in_every_figure() -> None:
    alone, among = style.looks(["CompressedAD"]), style.looks(["AD", "other", "CompressedAD", "more"])
    assert (
        alone["CompressedAD"] == among["CompressedAD"] and len({look.color for look in among.values()}) == 4
    )
    many = style.looks([f"variant {k}" for k in range(30)])
    assert len({(look.color, str(look.linestyle)) for look in many.values()}) == 30
    some = style.looks(["c", "a"], among=["a", "b", "c"])
    assert list(some) == ["c", "a"] and some.items() <= style.looks(["a", "b", "c"]).items()
    fixed = {style.RANDOM, style.SOURCE, style.START, style.END, *style.REFERENCES}
    assert len(fixed) == 7 and not fixed & {look.color for look in many.values()}
