"""Studies end to end: what a file asks for, what is run, what is shared, what comes out."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from compressed_ad.cli.main import main
from compressed_ad.cli.study import check_names
from compressed_ad.errors import ConfigError, RunError, UsageError
from compressed_ad.files import locked
from compressed_ad.report.rows import Row, read_rows
from compressed_ad.report.study_report import power_lines
from compressed_ad.runs import study_run as study
from compressed_ad.runs.config import load_config
from compressed_ad.runs.job import Job
from compressed_ad.runs.judge import evaluate_run
from compressed_ad.runs.layers import Request
from compressed_ad.runs.study import load_study
from compressed_ad.tasks.limits import shipped_limit
from compressed_ad.training.checkpoints import digest, load
from compressed_ad.workers import WorkerPool, silent

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))

TINY = """
question: Does it work?
preset: smoke
runs: {room: 2, permuted: 1}
spread: 0.1
settings:
  env: {n_task: 16, validation: 2, heldout: 3}
  model: {steps: 10, validations: 2, validation_episodes: 2}
  evaluation: {episodes: 3, rollouts: 1, training_tasks: 2}
families:
  room: {}
  permuted: {env: {family: darkroom_permuted, kwargs: {size: 5, horizon: 10}}, model: {n_transit: 30}}
variants:
  AD: {model: {model: AD}}
  CompressedAD: {}
  random: {marker: {marker: random, params: {on_policy_threshold: 0.2, compression_window: 3}}}
  self: {weights: CompressedAD, evaluation: {marks: self}}
  short: {model: {model: AD, n_transit: 10}}
compare:
  - [random, CompressedAD]
curves:
  plain: [short, AD]
"""


def written(folder: Path, text: str, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    file = written(folder, TINY)
    with redirect_stderr(StringIO()) as progress:
        assert main(["study", str(file), "--out", str(folder / "out"), "--process", "1"]) == 0
    (folder / "progress.txt").write_text(progress.getvalue())
    return folder


def test_a_study_tells_of_each_source_that_did_not_learn(finished: Path) -> None:
    told = [line for line in (finished / "progress.txt").read_text().splitlines() if line[:6] == "note: "]
    names = sorted(path.name for path in (finished / "out" / "histories").rglob("*.hdf5"))
    assert sorted(line.split(": ")[1] for line in told) == names and len(names) == 3
    assert all("the last tenth of the source's histories earns " in line for line in told)


def test_a_study_leaves_rows_tables_and_a_page(finished: Path) -> None:
    own = finished / "out" / "tiny"
    rows = read_rows(own / "table.csv")
    assert len({(row.family, row.variant, row.run) for row in rows}) == 3 * 5
    assert all(np.isfinite(row["final"]) and np.isfinite(row["generalisation"]) for row in rows)
    for row in rows:  # the limit is known for the default parameters, which only one family has
        known = row["auc"] / shipped_limit("darkroom").area(3) if row.family == "room" else math.nan
        assert row["share_of_limit"] == pytest.approx(known, nan_ok=True, rel=1e-4)
    page = (own / "index.html").read_text()
    assert "Does it work?" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert {p.stem for p in (own / "figures").glob("*.png")} >= {
        "differences",
        "runs",
        "convergence",
        "costs",
    }
    assert "Share of the limit" in (own / "tables" / "means.md").read_text()
    text = (own / "tables" / "difference_of_final_return.md").read_text()
    assert "CompressedAD − AD" in text and "CompressedAD − random" in text
    text = (own / "tables" / "costs.md").read_text()
    contexts = [line.split(" | ")[2:4] for line in text.splitlines() if line.startswith("| room | plain")]
    assert contexts == [["short", "10"], ["AD", "60"]]


def test_weights_are_shared_and_only_how_they_play_differs(finished: Path) -> None:
    loaded = load_study(finished / "tiny.yaml")
    parts = study.groups(loaded, finished / "out")
    assert len(loaded.cells) == 15 and len(parts) == 12
    runs = sorted(p.name for p in (finished / "out" / "runs").iterdir())
    assert len(runs) == 12
    shared = [g for g in parts if len(g.plays) == 2]
    assert all({c.variant for c, _, _ in g.plays} == {"CompressedAD", "self"} for g in shared)
    assert len({path for g in shared for _, _, path in g.plays}) == 6
    for _, _, path in shared[0].plays:
        kept = path.rename(path.with_suffix(".kept"))
        assert not shared[0].finished
        kept.rename(path)
    assert shared[0].finished


def test_variants_of_a_run_share_histories_and_split_and_runs_do_not(finished: Path) -> None:
    loaded = load_study(finished / "tiny.yaml")
    keys = {(c.family, c.run): set() for c in loaded.cells}
    for cell in loaded.cells:
        keys[cell.family, cell.run].add(cell.data_key)
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == 3
    splits = set()
    for folder in (finished / "out" / "runs").glob("AD-darkroom-*"):
        facts = json.loads((folder / "environment.json").read_text())["history"]
        splits.add(tuple(facts["split"]["heldout"]))
    assert len(splits) == 2


def test_each_key_names_what_determines_the_files_and_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path, TINY)

    def keys(*words: tuple[str, str]) -> tuple[str, ...]:
        cell = load_study(path, families=["room"], variants=["self"], overrides=words).cells[-1]
        return cell.data_key, cell.training_key, cell.playing_key

    usual = keys()
    for key, value, kept in (
        ("device", "cpu", (True, True, True)),
        ("algorithm.n_process", "3", (True, True, True)),
        ("algorithm.timeout", "60", (True, True, True)),
        ("env.split_seed", "9", (False, False, True)),
        ("algorithm.n_stream", "7", (False, False, True)),
        ("env.training_tasks", "[0, 1]", (True, False, True)),
        ("model.steps", "11", (True, False, True)),
        ("evaluation.temperature", "0.5", (True, False, False)),  # validation plays with it, too
        ("evaluation.rollouts", "2", (True, True, False)),
    ):
        same = tuple(a == b for a, b in zip(usual, keys((key, value)), strict=True))
        assert same == kept, key


def test_marks_are_the_variants_own(finished: Path) -> None:
    found = {}
    for folder in (finished / "out" / "runs").glob("CompressedAD-darkroom-seed0-*"):
        history = json.loads((folder / "environment.json").read_text())["history"]
        found[history["marker"]] = history["marker_parameters"]
    assert set(found) == {"threshold", "random"}


def test_the_same_command_again_trains_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    table = (out / "tiny" / "table.csv").read_bytes()
    assert main(["study", str(finished / "tiny.yaml"), "--out", str(out), "--process", "1"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert (out / "tiny" / "table.csv").read_bytes() == table
    capsys.readouterr()
    assert main(["study", str(finished / "tiny.yaml"), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "12 runs are finished" in said and "4 of 5 such studies would detect" in said


def test_a_damaged_evaluation_is_told_and_made_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    table = (out / "tiny" / "table.csv").read_bytes()
    path = sorted(out.glob("runs/*/evaluation-*.npz"))[0]
    path.write_bytes(path.read_bytes()[:100])
    assert main(["study", str(finished / "tiny.yaml"), "--out", str(out), "--process", "1"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "damaged" in line] == [f"note: {path} is damaged; it will be made again"]
    assert sum("(12 of 12 finished)" in line for line in said) >= 1
    assert (out / "tiny" / "table.csv").read_bytes() == table


def test_the_curves_are_not_taken_for_the_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = finished / "out" / "tiny" / "curves.csv"
    assert main(["study", str(finished / "tiny.yaml"), "--tables", str(curves)]) == 2
    assert f"{curves}: holds a study's curves; name its table" in capsys.readouterr().err


def test_kept_results_give_the_same_tables(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = finished / "out" / "tiny"
    assert main(["study", str(finished / "tiny.yaml"), "--tables", str(own / "table.csv")]) == 0
    shown = capsys.readouterr().out
    assert "CompressedAD − random" in shown and "Steps to reach it" in shown
    for line in "\n".join(p.read_text() for p in (own / "tables").glob("*.md")).splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell for cell in line.strip("|").split(" | ") if cell.strip("- :")]
        assert all(cell.strip() in shown for cell in cells)


def test_tables_of_a_part_show_that_part_and_say_so(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", str(finished / "tiny.yaml"), "--tables", str(finished / "out" / "tiny" / "table.csv")]
    assert main([*command, "--variants", "CompressedAD"]) == 0
    shown = capsys.readouterr().out
    assert "CompressedAD − AD" in shown and "random" not in shown
    assert "This is not the study tiny as its file describes it: --variants CompressedAD." in shown
    assert main([*command, "--variants", ""]) == 2
    assert "--variants: unknown ''" in capsys.readouterr().err


def test_rows_that_the_study_does_not_have_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, path = (finished / "out" / "tiny" / "table.csv").read_text(), tmp_path / "table.csv"
    # Of earlier versions, and edited by hand: only the names can be compared.
    old = "".join(f"{line.rpartition(',')[0]}\n" for line in kept.splitlines())
    path.write_text(old)
    loaded = load_study(finished / "tiny.yaml")
    check_names(path, loaded, read_rows(path))
    for before, after, message in (
        ("room,", "roam,", "table.csv: .*has no family 'roam' .did you mean 'room'.*; it has"),
        (",CompressedAD,", ",CompressEdAD,", "table.csv: .*has no variant 'CompressEdAD' .did you mean"),
        ("AD,1,", "AD,7,", "run 7: .*has 2 runs of AD on room; say --runs if there are more"),
    ):
        path.write_text(old.replace(before, after, 1))
        with pytest.raises(UsageError, match=message):
            check_names(path, loaded, read_rows(path))
    assert main(["study", str(finished / "tiny.yaml"), "--tables", str(path)]) == 2
    path.write_text(kept.replace("room,", "roam,"))
    assert main(["study", str(finished / "tiny.yaml"), "--tables", str(path)]) == 2
    said = capsys.readouterr().err
    assert "table.csv: run 7" in said and "table.csv: was changed after it was written" in said


def test_a_second_study_does_not_collect_what_another_collects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_study(written(tmp_path, TINY), small=True)
    path = study.history_of(loaded.cells[0], tmp_path / "out")
    with locked(path, file=True):
        words = ["study", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--small"]
        assert main([*words, "--process", "1"]) == 1
    assert f"{path}: another process works here (process {os.getpid()})" in capsys.readouterr().err
    assert not path.exists() and not list(path.parent.iterdir())


def test_a_lost_evaluation_is_played_again_with_the_same_result(finished: Path, tmp_path: Path) -> None:
    loaded = load_study(finished / "tiny.yaml", families=["room"], runs=1, variants=["CompressedAD"])
    (group,) = [
        g
        for g in study.groups(loaded, finished / "out")
        if len(g.plays) == 1 and g.plays[0][0].variant != "AD"
    ]
    path = group.plays[0][2]
    kept = dict(np.load(path))
    assert study._seconds(group) == {"train": 0, path.name: 0}
    path.write_bytes(path.read_bytes()[:100])
    assert study.rows([group]) == []
    left = study._seconds(group)
    assert left["train"] == 0 < left[path.name]
    (fresh,) = (g for g in study.groups(loaded, tmp_path) if g.job.name == group.job.name)
    assert study._seconds(fresh)[path.name] == left[path.name] and study._seconds(fresh)["train"] > 0
    path.unlink()
    assert not group.finished and study.rows([group]) == []
    told: list[tuple[float, float, str]] = []
    outcome = study.run_group(group, report=lambda *words: told.append(words), should_stop=lambda: False)
    assert outcome.failure is None
    played = [share for share, total, text in told if total == 1 and text.endswith(" in-context steps")]
    assert played[0] < 0.5 and played[-1] == 1 and played == sorted(played)  # what was trained is not counted
    again = dict(np.load(path))
    for name, value in kept.items():
        np.testing.assert_array_equal(again[name], value)


def test_an_evaluation_tells_the_share_of_what_it_plays(finished: Path, tmp_path: Path) -> None:
    """The last weights are played, too, but only where they are not those that validation chose."""
    group = study.groups(load_study(finished / "tiny.yaml", families=["room"]), finished / "out")[0]
    same = tmp_path / "same"
    shutil.copytree(group.job.path, same)
    shutil.copy(same / "last_model.pt", same / "best_model.pt")
    for job, plays in ((group.job, 2), (replace(group.job, path=same), 1)):
        shares: list[float] = []
        path = evaluate_run(
            job,
            tmp_path / f"{plays}.npz",
            report=lambda done, total, text, to=shares: to.append(done / total),
        )
        with np.load(path) as found:
            assert 1 + (found["step"] != found["step_last"]) == plays
        assert shares == sorted(shares) and shares[-1] == 1


def test_none_is_plain_ad_bit_for_bit(tmp_path: Path) -> None:
    """A CompressedAD that sees no marks has AD's weights and returns: both share all else."""
    text = TINY.replace(
        "  random: {marker: {marker: random, params: {on_policy_threshold: 0.2, compression_window: 3}}}\n",
        "  none: {marker: {marker: none}}\n",
    ).replace("  - [random, CompressedAD]\n", "  - [none, AD]\n")
    file = written(tmp_path, text)
    loaded = load_study(file, families=["room"], runs=1, variants=["none"])
    study.collect_histories(loaded, tmp_path / "out", silent)
    shares: list[tuple[float, float, str]] = []
    with WorkerPool(1) as pool:
        done = study.run_study(
            loaded,
            tmp_path / "out",
            pool,
            report=lambda *words: shares.append(words),
            should_stop=lambda: False,
        )
    assert [share for share, _, _ in shares] == sorted(share for share, _, _ in shares)
    assert shares[-1][:2] == (1, 1) and all(text.startswith("now ") for _, _, text in shares if text)
    told = {name: outcome.notes for name, outcome in done.items() if outcome.notes}
    ((name, (note,)),) = told.items()
    assert name.startswith("CompressedAD") and "no step of its histories is marked" in note
    found = {row.variant: row for row in study.rows(study.groups(loaded, tmp_path / "out"))}
    assert set(found) == {"AD", "none"}
    assert found["AD"]["final"] == found["none"]["final"] and found["AD"]["auc"] == found["none"]["auc"]
    assert found["AD"]["excess_cross_entropy"] == found["none"]["excess_cross_entropy"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_is_valid_and_can_be_made_small(path: Path) -> None:
    loaded = load_study(path)
    assert loaded.question and loaded.spread
    assert len({c.training_key for c in loaded.cells}) >= len(loaded.variants) - sum(
        "weights" in line for line in path.read_text().splitlines()
    )
    small = load_study(path, small=True)
    assert all(cell.trained.model.steps <= 60 for cell in small.cells)
    assert {n for of in small.runs.values() for n in of.values()} == {2}
    assert {family: [*of] for family, of in small.runs.items()} == {
        family: [*of] for family, of in loaded.runs.items()
    }


def test_a_variant_may_have_fewer_runs_and_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace("CompressedAD: {}", "CompressedAD: {runs: {room: 1}}").replace(
        "short: {", "short: {runs: 1, "
    )
    file = written(tmp_path, text)

    def cells(**part: Any) -> list[tuple[str, str, int]]:
        return [(c.family, c.variant, c.run) for c in load_study(file, **part).cells]

    named = ["AD", "CompressedAD", "random", "self", "short"]  # self plays the weights of CompressedAD
    first = [*(("room", name, 0) for name in named), *(("permuted", v, 0) for v in ("AD", "random", "short"))]
    assert cells() == [*first, ("room", "AD", 1), ("room", "random", 1)]
    assert cells(families=["permuted"]) == first[5:]
    assert cells(runs=1) == first
    assert len(cells(runs=3)) == len(cells(small=True, runs=3)) == 3 * len(first)
    assert len(cells(small=True)) == 2 * len(first)
    assert load_study(file, runs=3).options == ("--runs 3",)
    nowhere = text.replace("  AD: {model: {model: AD}}\n", "").replace("[short, AD]", "[short]")
    with pytest.raises(ConfigError, match="nothing to run on permuted: CompressedAD only on room;"):
        load_study(written(tmp_path, nowhere, "nowhere.yaml"), families=["permuted"], variants=["self"])
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "room: 2 runs each of AD, random\nroom: 1 run each of CompressedAD, self, short\n" in plan
    assert "permuted: 1 run each of AD, random, short\n" in plan and "10 cells of 9 trained runs" in plan
    assert "permuted/CompressedAD" not in plan and "permuted: with" not in plan
    kept = Row("permuted", "CompressedAD", 0, {}, "a/b/c")
    with pytest.raises(UsageError, match=r"tiny.yaml has no runs of CompressedAD on permuted"):
        check_names(tmp_path / "table.csv", load_study(file), [kept])


def test_a_later_family_may_have_more_runs_and_power_goes_by_pairs(tmp_path: Path) -> None:
    text = TINY.replace("self: {weights", "self: {runs: {permuted: 4}, weights")
    loaded = load_study(written(tmp_path, text.replace("short: {", "short: {runs: {room: 5}, ")))
    counted = Counter((cell.family, cell.variant) for cell in loaded.cells)
    assert counted == {(f, v): n for f, of in loaded.runs.items() for v, n in of.items()}
    assert counted["permuted", "self"] == 4 and counted["room", "short"] == 5
    (line,) = power_lines(loaded)  # no comparison has more runs than AD, which has 2 and 1
    assert line.startswith("room: with 2 runs")
    only = TINY.replace("CompressedAD: {}", "CompressedAD: {runs: {room: 1}}")
    only = only.replace("self: {weights", "self: {runs: {permuted: 1}, weights")
    playing = load_study(written(tmp_path, only))
    assert [c.trained.model.model for c in playing.cells if c.variant == "self"] == ["CompressedAD"]


def test_what_a_family_would_make_of_a_variant_that_it_does_not_have_is_not_asked(tmp_path: Path) -> None:
    """A context of 10 steps is too short for this memory; only room has one of 200."""
    recurrent = "recurrent: {model: {model: RecurrentAD, memory_steps: 50}"
    everywhere = TINY.replace("  short:", f"  {recurrent}}}\n  short:")
    with pytest.raises(ConfigError, match="memory_steps 50; with n_transit 30"):
        load_study(written(tmp_path, everywhere))
    only = everywhere.replace(f"{recurrent}}}", f"{recurrent}, runs: {{room: 1}}}}")
    assert "recurrent" not in load_study(written(tmp_path, only)).runs["permuted"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_kept_rows_are_the_cells_of_their_study(path: Path) -> None:
    """So that ``cad study NAME`` repeats the tables, and nothing but them."""
    kept = path.parents[1] / "results" / f"{path.stem}.csv"
    rows = [(row.family, row.variant, row.run) for row in read_rows(kept)]
    assert sorted(rows) == sorted((c.family, c.variant, c.run) for c in load_study(path).cells)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "runs: {room: 2, permuted: 1}",
            "runs: none",
            r"tiny.yaml:4: runs must be a whole number between 1 and 10000, .*got 'none'",
        ),
        ("runs: {room: 2, permuted: 1}", "runs: {room: 2}", r"runs does not say how many for permuted"),
        (
            "CompressedAD: {}",
            "CompressedAD: {runs: {romo: 2}}",
            r"tiny.yaml:\d+: runs of CompressedAD: unknown 'romo' \(did you mean 'room'",
        ),
        (
            "CompressedAD: {}",
            "CompressedAD: {runs: {room: 0}}",
            r"tiny.yaml:\d+: runs of CompressedAD must be a whole number between 1 and 10000, .*; got 0",
        ),
        ("CompressedAD: {}", "CompressedAD: {runs: true}", r"runs of CompressedAD must be .*; got True"),
        ("CompressedAD: {}", "CompressedAD: {runs: 10001}", r"runs of CompressedAD must be .*; got 10001"),
        ("CompressedAD: {}", "CompressedAD: {runs: {}}", r"CompressedAD must name at least one family"),
        ("runs: {room: 2, permuted: 1}", "runs: 10001", r"tiny.yaml:4: runs must be .* got 10001"),
        ("room: {}", "room: {runs: 3}", r"tiny.yaml:11: unknown key 'runs'"),
        ("CompressedAD: {}", "CompressedAD: {in: {romo: {}}}", r"in of CompressedAD: unknown 'romo'"),
        (
            "CompressedAD: {}",
            "CompressedAD: {runs: {room: 1}, in: {permuted: {model: {steps: 3}}}}",
            r"tiny.yaml:\d+: in of CompressedAD: it has no runs on permuted",
        ),
        (
            "AD: {model: {model: AD}}\n  CompressedAD: {}\n  random: {",
            "AD: {model: {model: AD}}\n  CompressedAD: {runs: {room: 1}}\n  random: {runs: {permuted: 1}, ",
            r"tiny.yaml:\d+: compare: random and CompressedAD have no family in common",
        ),
        (
            "CompressedAD: {}",
            "CompressedAD: {in: room}",
            r"in of CompressedAD must name families.*got 'room'",
        ),
        (
            "CompressedAD: {}",
            "CompressedAD: {in: {room: 3}}",
            r"in of CompressedAD: room must have settings; g",
        ),
        (
            "CompressedAD: {}",
            "CompressedAD: {seed: 7}",
            r"tiny.yaml:\d+: seed is no setting of a study: its runs",
        ),
        ("room: {}", "room: {comparison: {runs: 7}}", r"tiny.yaml:\d+: comparison is no setting of a study"),
        (
            "CompressedAD: {}",
            "CompressedAD: {in: {room: {seed: 7}}}",
            r"tiny.yaml:\d+: seed is no setting of a study",
        ),
        ("CompressedAD: {}", "CompressedAD: {marker: nope}", r"tiny.yaml:\d+: marker: unknown marker 'nope'"),
        ("room: {}", "room: {env: nope}", r"tiny.yaml:\d+: env: unknown task family 'nope'"),
        ("CompressedAD: {}", "CompressedAD: {runs: many}", r"runs of CompressedAD must be .*; got 'many'"),
        ("preset: smoke", "preset: smok", r"unknown preset 'smok' \(did you mean 'smoke'\?\)"),
        ("question:", "qestion:", r"tiny.yaml:2: unknown key 'qestion' \(did you mean 'question'\?\)"),
        ("{marks: self}", "{marsk: self}", r"tiny.yaml:\d+: unknown key 'evaluation.marsk'"),
        ("weights: CompressedAD", "weights: Compressed", r"tiny.yaml:\d+: .*unknown 'Compressed'"),
        ("{weights: CompressedAD, evaluation", "{weights: AD, model", r"can only set evaluation, not model"),
        ("marker: random", "marker: radnom", r"unknown marker 'radnom' \(did you mean 'random'\?\)"),
        ("[random, CompressedAD]", "[random]", r"tiny.yaml:\d+: compare.0 must be a list of 2 values"),
        (
            "plain: [short, AD]",
            "plain: [shrot, AD]",
            r"tiny.yaml:\d+: curves: unknown 'shrot' \(did you mean",
        ),
        ("plain: [short, AD]", "plain: short", r"tiny.yaml:\d+: curves.plain must be a list of values"),
        ("plain: [short, AD]", "[short, AD]", r"tiny.yaml:\d+: curves must be keys with values"),
        ("  self: {weights", '  "a\\rb": {}\n  self: {weights', r"names of one line, not 'a\\rb'"),
        ("spread: 0.1", "spread: wide", r"tiny.yaml:5: spread must be a number above 0"),
        ("env: {family: darkroom_permuted", "env: {family: drkroom_permuted", r"unknown task family"),
        ("heldout: 3", "heldout: 300", r"300"),
        ("room: {}", "room: {config: benchmark/dark}", r"tiny.yaml:11: config benchmark/dark: no such file"),
        ("room: {}", "room: {config: 3}", r"tiny.yaml:11: config 3: no such file"),
    ],
)
def test_each_mistake_is_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    with pytest.raises(ConfigError, match=message):
        load_study(written(tmp_path, TINY.replace(old, new)))


def test_settings_need_only_fit_the_model_of_their_variant(tmp_path: Path) -> None:
    gist = "AD: {model: {model: AD}}\n  gist: {model: {model: GistAD, segment_every: 4}}"
    loaded = load_study(written(tmp_path, TINY.replace("AD: {model: {model: AD}}", gist)))
    assert {c.trained.model.segment_every for c in loaded.cells if c.variant == "gist"} == {4}


def test_a_family_may_be_a_whole_configuration(tmp_path: Path) -> None:
    text = TINY.replace("room: {}", "room: {config: benchmark/darkroom_large, model: {n_transit: 77}}")
    by_name, plain = load_study(written(tmp_path, text)), load_study(written(tmp_path, TINY, "plain.yaml"))
    cell = by_name.cells[0]
    whole = load_config(Request("smoke", files=(Path("benchmark/darkroom_large"),)))
    assert cell.data.algorithm == whole.algorithm
    assert cell.trained.evaluation == whole.evaluation.model_copy(update={"training_tasks": 2})
    assert cell.trained.model.steps == whole.model.steps != plain.cells[0].trained.model.steps
    assert (cell.trained.env.family, cell.trained.model.n_transit) == ("darkroom_large", 77)
    small = load_study(written(tmp_path, text), small=True).cells[0]
    assert small.trained.model.steps <= 60


def test_parts_of_a_study_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, TINY)
    loaded = load_study(file, families=["permuted"], variants=["self"], runs=1)
    assert {c.family for c in loaded.cells} == {"permuted"}
    assert loaded.variants == ("AD", "CompressedAD", "self")
    assert main(["study", str(file), "--families", "romo", "--dry-run"]) == 2
    assert "unknown 'romo' (did you mean 'room'?)" in capsys.readouterr().err
    assert main(["study", str(file), "--seed", "3", "--dry-run"]) == 2
    assert main(["study", str(file), "--model.lr", "-1", "--dry-run"]) == 2
    assert "--model.lr" in capsys.readouterr().err
    assert main(["study", str(file), "--runs", "0", "--dry-run"]) == 2
    assert main(["study", str(file), "--device", "tpu", "--dry-run"]) == 2
    assert "--device: device must be one of auto, cpu, cuda" in capsys.readouterr().err
    assert main(["study", str(file), "--device", "cpu", "--dry-run"]) == 0
    assert "This is not the study" not in capsys.readouterr().out, "where it computes changes no setting"
    assert main(["study", str(tmp_path / "none.yaml"), "--dry-run"]) == 2


def test_a_family_that_no_variant_has_is_a_mistake(tmp_path: Path) -> None:
    text = written(tmp_path, TINY).read_text()
    for name in ("AD", "CompressedAD", "random", "short"):  # self has the runs of CompressedAD
        text = text.replace(f"  {name}: {{", f"  {name}: {{runs: {{room: 1}}, ")
    with pytest.raises(ConfigError, match=r"tiny.yaml:\d+: no variant has runs on permuted$"):
        load_study(written(tmp_path, text))
    text = text.replace("random: {runs: {room: 1}", "random: {runs: {romo: 1}")
    with pytest.raises(ConfigError, match=r"unknown 'romo'") as caught:
        load_study(written(tmp_path, text))
    assert "no variant" not in str(caught.value), "it may be a consequence of the other mistake"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_one_cell_that_needs_a_gpu_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, TINY)
    file.write_text(
        file.read_text().replace("  CompressedAD: {}", "  CompressedAD: {}\n  other: {device: cuda}")
    )
    assert main(["study", str(file), "--variants", "AD", "--dry-run"]) == 0
    assert main(["study", str(file), "--dry-run"]) == 2
    assert "device cuda: no CUDA device was found" in capsys.readouterr().err
    kept = STUDIES[0].parents[1] / "results" / "strength.csv"
    assert main(["study", "strength", "--device", "cuda", "--tables", str(kept)]) == 0, "nothing is computed"


@pytest.mark.parametrize(
    ("small", "given", "expected"), [(False, 200, 200), (True, 200, 10), (True, 5, 5), (True, None, None)]
)
def test_small_shortens_schedules_that_count_episodes(
    tmp_path: Path, small: bool, given: int | None, expected: int | None
) -> None:
    algorithm = {"learner": "tabular", "n_stream": 1, "n_timesteps": 4000}
    algorithm["learner_kwargs"] = {"episodes": given, "epsilon_final": 0.0}
    text = yaml.safe_dump({"families": {"darkroom": {"algorithm": algorithm}}, "variants": {"AD": {}}})
    cell = load_study(written(tmp_path, text), small=small).cells[0]
    assert cell.data.algorithm.learner_kwargs["episodes"] == expected


@pytest.mark.parametrize(
    ("part", "folder"),
    [
        ({}, "tiny"),
        ({"families": ["permuted", "room"], "variants": ["CompressedAD", "random", "self", "short"]}, "tiny"),
        (
            {"runs": 1, "families": ["permuted"], "overrides": [("algorithm.timeout", "9")]},
            "tiny-families=permuted",
        ),
        ({"runs": 3}, "tiny-runs=3"),
        ({"small": True}, "tiny-small"),
        ({"variants": ["short"], "overrides": [("model.lr", "0.1")]}, "tiny-variants=short-model.lr=0.1"),
        ({"overrides": [("env.kwargs", "{size: 5}")]}, r"tiny-env\.kwargs=_size__5_-[0-9a-f]{6}"),
    ],
)
def test_what_is_not_the_whole_study_is_written_elsewhere(tmp_path: Path, part: dict, folder: str) -> None:
    loaded = load_study(written(tmp_path, TINY), **part)
    assert re.fullmatch(folder, loaded.folder)
    assert bool(loaded.note) == (folder != "tiny")
    assert all(option in loaded.note for option in loaded.options)


def test_a_failing_cell_is_told_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace("  random:", "  broken: {model: {lr: 1.0e+30}}\n  random:")
    file = written(tmp_path, text)
    arguments = ["study", str(file), "--out", str(tmp_path / "out"), "--families", "room", "--runs", "1"]
    assert main([*arguments, "--variants", "broken", "--process", "1"]) == 1
    said = capsys.readouterr()
    assert "loss is nan" in said.err
    part = "tiny-runs=1-families=room-variants=broken"
    rows = read_rows(tmp_path / "out" / part / "table.csv")
    assert {row.variant for row in rows} == {"AD"}


def test_a_study_of_which_nothing_works_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TINY.replace("AD: {model: {model: AD}}", "AD: {model: {model: AD, lr: 1.0e+30}}")
    words = ["--families", "room", "--runs", "1", "--variants", "AD", "--process", "1"]
    assert main(["study", str(written(tmp_path, text)), "--out", str(tmp_path / "out"), *words]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cad: error")]
    assert re.match(r"cad: error: AD-\S+-seed0-\w+: .*loss is nan", error)
    assert not list((tmp_path / "out").rglob("*.csv"))


@pytest.mark.parametrize(
    ("family", "cause"),
    [
        (
            "room: {env: {family: 'gymnasium:CartPole-v1', kwargs: {params: {length: '0.3:1'}}}}",
            "room: a study compares shares of the optimal return, which gymnasium:CartPole-v1 does not know;"
            " give it as env.kwargs.best_return",
        ),
        (
            "room: {env: {n_task: 2, validation: null, heldout: null, train: null}}",
            "too few tasks to hold one",
        ),
    ],
)
def test_what_could_not_be_compared_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, cause: str
) -> None:
    file = written(tmp_path, TINY.replace("room: {}", family))
    for dry in ([], ["--dry-run"]):
        words = ["study", str(file), "--families", "room", "--out", str(tmp_path / "out"), *dry]
        assert main(words) == 2
        assert cause in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_study_goes_on_without_its_histories(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are collected again, byte for byte, so that nothing is trained or played again."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    shutil.rmtree(out / "histories")
    words = ["study", str(finished / "tiny.yaml"), "--out", str(out), "--process", "1"]
    assert main([*words, "--dry-run"]) == 0
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*.*")}
    assert main(words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*.*")}
    tables = [(place / "out" / "tiny" / "table.csv").read_bytes() for place in (finished, tmp_path)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("fails", "played"), [("self", "AD CompressedAD random short"), ("off", "self")])
def test_the_row_of_what_was_played_is_written_whatever_else_its_weights_lack(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
    played: str,
) -> None:
    play = study.evaluate_run

    def most(job: Job, *arguments: Any, **options: Any) -> Path:
        if job.config.evaluation.marks == fails:
            raise RunError("no")
        return play(job, *arguments, **options)

    monkeypatch.setattr(study, "evaluate_run", most)
    words = ["--families", "room", "--runs", "1", "--process", "1", "--out", str(tmp_path / "out")]
    assert main(["study", str(written(tmp_path, TINY)), *words]) == 1
    name = "self" if fails == "self" else "CompressedAD"
    assert re.search(rf"failed: CompressedAD-\S+: {name}: no\n", capsys.readouterr().err)
    (table,) = (tmp_path / "out").glob("tiny*/table.csv")
    assert [row.variant for row in read_rows(table)] == played.split()


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    file = written(tmp_path, TINY.replace("steps: 10", "steps: 4000"))
    words = ["study", str(file), "--out", str(tmp_path / "out"), "--families", "room", "--process", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from compressed_ad.cli.main import main; raise SystemExit(main({words!r}))"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "study" in line and "loss" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list((tmp_path / "out" / "runs").glob("AD-*/checkpoints/*"))


def test_a_shipped_study_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one command that reproduces a table in minutes, on a part of it."""
    file = next(path for path in STUDIES if path.stem == "frontier")
    words = ["--small", "--runs", "1", "--families", "darkroom", "--variants", "prolong,prolong_random"]
    assert main(["study", str(file), *words, "--out", str(tmp_path / "out")]) == 0
    said, progress = capsys.readouterr()
    assert "note: history_" not in progress  # the source learned
    assert "prolong − AD" in said and "prolong_random − AD" in said and "too few runs" in said
    (own,) = tmp_path.glob("out/frontier*")
    assert own.name == "frontier-small-runs=1-families=darkroom"
    assert {r.variant for r in read_rows(own / "table.csv")} == {"AD", "prolong", "prolong_random"}
    assert "its numbers mean nothing" in said
    for file in (own / "index.html", own / "tables" / "means.md", own / "tables" / "means.tex"):
        assert "its numbers mean nothing" in file.read_text()
    assert "Nothing is concluded" in (own / "index.html").read_text()


def test_mistakes_of_a_study_are_told_together(tmp_path: Path) -> None:
    text = TINY.replace("spread: 0.1", "spread: wide") + "baseline: nosuch\nstrange: 1\n"
    with pytest.raises(ConfigError) as caught:
        load_study(written(tmp_path, text))
    found = "\n".join(caught.value.problems)
    for cause in ("unknown key 'strange'", "baseline: unknown 'nosuch'", "spread must be a number above 0"):
        assert cause in found


# ---------------------------------------------------------------- on a Ray cluster


def ray_workers() -> list[int]:
    """Processes that compute a unit of a local Ray, which this process has started."""
    parents, found = dict[int, int](), list[int]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            pid, status = int(place.name), (place / "stat").read_text().rpartition(")")[2].split()
            parents[pid] = int(status[1])
            if (place / "cmdline").read_text().startswith("ray::_call"):
                found.append(pid)
        except OSError:  # it has just ended
            continue

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid in found if ours(pid)]


@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_study_on_ray_is_the_same_in_spite_of_a_killed_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    small = TINY.replace("steps: 10", "steps: 100, checkpoint_every: 5")
    words = ["study", str(written(tmp_path, small)), "--families", "room", "--runs", "1"]
    words += ["--variants", "AD,CompressedAD"]
    killed, done = list[int](), threading.Event()

    def kill_one() -> None:
        while not killed and not done.wait(0.02):
            if any((tmp_path / "ray").rglob("step-*.pt")):
                killed.extend(ray_workers()[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        ray_words = ["--ray", "local", "--process", "2", "--out", str(tmp_path / "ray")]
        assert main([*words, *ray_words]) == 0
    finally:
        done.set()
        killer.join()
    assert killed
    assert main([*words, "--process", "1", "--out", str(tmp_path / "here")]) == 0
    (there,), (here,) = (list((tmp_path / name).glob("tiny*/table.csv")) for name in ("ray", "here"))
    for a, b in zip(read_rows(there), read_rows(here), strict=True):
        assert (a.family, a.variant, a.run) == (b.family, b.variant, b.run)
        for key in a.values.keys() - {"seconds"}:
            np.testing.assert_equal(a[key], b[key])
    for path in (tmp_path / "here" / "runs").rglob("last_model.pt"):
        ours = load(path)["model_state_dict"]
        theirs = load(tmp_path / "ray" / path.relative_to(tmp_path / "here"))["model_state_dict"]
        assert digest(ours) == digest(theirs)
