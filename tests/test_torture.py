"""The torture harness can fail: it finds a fault that is planted."""

import signal

import pytest

from torture import same, table, trials
from torture.trials import Ended, Trial, Verdict


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (0, "fine", "accepted"),
        (2, "cad: error: env.name: unknown", "named"),
        (1, "cad: error: internal error: KeyError: 3", "internal error"),
        (1, "Traceback (most recent call last):\n  ...", "traceback"),
        (1, "", "no word"),
        (3, "cad: error: gone", "no word"),
        (-signal.SIGSEGV, "", "crash"),
        (None, "", "hang"),
    ],
)
def test_a_command_is_judged_by_its_end(code, text, kind):
    verdict = Ended(code, text).verdict()
    assert verdict.kind == kind
    assert verdict.good == (kind == "named")


def test_contents_differ_where_a_number_does(tmp_path):
    for name, number in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.csv").write_text(f"family,final,seconds\ndarkroom,{number},{number}\n")
        (tmp_path / name / ".x.csv.7.partial").write_text("half")
    a, b = same.contents(tmp_path / "a"), same.contents(tmp_path / "b")
    assert same.differences(a, a) == []
    assert same.differences(a, b) == ["table.csv: differs in line 1"]
    assert same.differences(a, {}) == ["table.csv: missing"]


def test_trials_run_side_by_side_and_their_faults_are_counted(tmp_path):
    def dies(folder):
        raise SystemExit  # ends the process without verdicts

    def fails(folder):
        raise RuntimeError("no such stage")

    def hangs(folder):
        signal.pause()

    todo = [
        Trial("a", "sound", lambda folder: [Verdict("same"), Verdict("recovered")]),
        Trial("a", "planted", lambda folder: [Verdict("silent", "0.5 became 0.25")]),
        Trial("b", "dies", dies),
        Trial("b", "fails", fails),
        Trial("b", "hangs", hangs, limit=0.5),
    ]
    rows = {name: table.Row(name) for name in "ab"}
    for trial, verdicts in trials.run(todo, tmp_path, 2):
        rows[trial.row].add(trial.name, verdicts)
    assert rows["a"].cells() == ("a", "3", "1", "1", "1", "planted: silent: 0.5 became 0.25")
    assert rows["b"].wrong == 3
    assert sorted(e.split(": ")[1] for e in rows["b"].examples) == ["crash", "hang", "the trial failed"]
    assert table.total(rows.values()).wrong == 4
    assert not (tmp_path / "0").exists()  # of a trial without a fault
    assert "| a | 3 | 1 | 1 | 1 |" in table.markdown(list(rows.values()), "python -m torture", "now")
