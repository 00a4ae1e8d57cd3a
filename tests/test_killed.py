"""Every writer, killed before each change of a file: nothing is lost, mixed or left behind."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from compressed_ad.errors import HistoryError
from compressed_ad.files import is_free, locked, write_json
from compressed_ad.histories.file import HistoryFile, remark
from compressed_ad.report import run_report
from compressed_ad.report.results import load_metrics
from compressed_ad.report.rows import Row, read_rows, write_rows
from compressed_ad.training.checkpoints import digest, load
from compressed_ad.training.loop import train
from tests.histories.test_collector import assert_same, contents, gather
from tests.report.test_run_report import EXPERIMENT, method
from tests.training.test_loop import config, sampler, validate

DIED = 77
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def dies_at(step: int, folder: Path, work: Callable[[], object]) -> bool:
    """Whether ``work`` comes to its ``step``-th change of a file in ``folder``, before which it dies."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, DIED), "see the traceback above"
        return code == DIED
    left = [step]

    def change() -> None:
        left[0] -= 1
        if left[0] == 0:
            os._exit(DIED)

    def seen(event: str, args: tuple[Any, ...]) -> None:
        opens = event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if (opens or event in CHANGES) and str(args[0]).startswith(str(folder)):
            change()

    def sync(descriptor: int) -> None:
        change()
        fsync(descriptor)

    code, fsync = 1, os.fsync
    os.fsync = sync  # type: ignore[assignment]
    sys.addaudithook(seen)
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def everywhere(folder: Path, work: Callable[[], object], check: Callable[[], None], *, every: int = 1) -> int:
    """Kill ``work`` before every change, each time on what the last one left; then ``check``.

    How often it died.
    """
    step, died = 1, 0
    while dies_at(step, folder, work):
        step, died = step + every, died + 1
        check()
    check()
    left = [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert not left, left
    return died


def test_json_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    seen = []
    died = everywhere(
        tmp_path, lambda: write_json(path, {"new": 2}), lambda: seen.append(json.loads(path.read_text()))
    )
    assert died == 5 and seen[0] == {"old": 1} and seen[-1] == {"new": 2}  # mkdir, open, fsync, rename, fsync
    assert all(content in ({"old": 1}, {"new": 2}) for content in seen)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gather(tmp_path_factory.mktemp("killed") / "h.hdf5", n_timesteps=8, marker=None)


def test_a_collection_goes_on(reference: Path, tmp_path: Path) -> None:
    path, kept = tmp_path / "h.hdf5", 0

    def check() -> None:
        nonlocal kept
        shards = len(list((tmp_path / "h.hdf5.shards").glob("*.h5")))
        assert path.exists() or shards >= kept, "a finished task is lost"
        kept = shards
        with locked(path, file=True, error=HistoryError):
            pass  # the dead hold no lock

    def work() -> None:
        gather(
            path, n_timesteps=8, marker=None, resume=path.with_name("h.hdf5.shards").exists() or path.exists()
        )

    assert everywhere(tmp_path, work, check) >= 10
    assert_same(reference, path)
    assert [file.name for file in tmp_path.iterdir()] == ["h.hdf5"]


def test_an_overwrite_goes_on_with_resume(reference: Path, tmp_path: Path) -> None:
    options = {"n_timesteps": 8, "marker": None, "seed": 1}
    new = contents(gather(tmp_path / "new.hdf5", **options))
    for step in (3, 20, 48, 51, 54):
        path = tmp_path / str(step) / "h.hdf5"
        path.parent.mkdir()
        path.write_bytes(reference.read_bytes())
        died = dies_at(
            step, path.parent, lambda path=path: gather(path, overwrite=True, block_size=1, **options)
        )
        assert died
        if path.read_bytes() == reference.read_bytes() and not list(path.parent.glob("*.shards/replaces")):
            with pytest.raises(
                HistoryError, match="another configuration"
            ):  # nothing of the new one is there
                gather(path, resume=True, **options)
            continue
        gather(path, resume=True, **options)
        assert str(contents(path)) == str(new)
        assert [file.name for file in path.parent.iterdir()] == ["h.hdf5"]


def test_a_marking_is_old_or_new(reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "h.hdf5"
    path.write_bytes(reference.read_bytes())
    remark(path, "none")

    def check() -> None:
        file = HistoryFile(path)
        assert (file.marking or {})["marker"] in ("none", "all")
        assert file.statistics().compression_ratio == ((file.marking or {})["marker"] == "all")

    assert everywhere(tmp_path, lambda: remark(path, "all"), check) >= 5
    assert (HistoryFile(path).marking or {})["marker"] == "all"


def test_a_training_goes_on_and_keeps_its_metrics(tmp_path: Path) -> None:
    c = config(steps=6, checkpoint_every=2, validations=3)
    train(c, sampler(c), tmp_path / "whole", validate=validate)
    run, passed = tmp_path / "run", 0

    def check() -> None:
        nonlocal passed
        if (run / "metrics.jsonl").exists():
            rows = load_metrics(run / "metrics.jsonl")
            steps = [int(file.stem[5:]) for file in run.glob("checkpoints/step-*.pt")]
            passed = max([passed, *steps])
            judged = [row["step"] for row in rows if "validation_return" in row]
            assert judged[: passed // 2] == [2, 4, 6][: passed // 2]

    assert everywhere(run, lambda: train(c, sampler(c), run, validate=validate), check, every=3) >= 8
    whole = tmp_path / "whole"
    for name in ("last_model.pt", "best_model.pt"):
        assert digest(load(run / name)) == digest(load(whole / name))
    rows = [load_metrics(folder / "metrics.jsonl") for folder in (run, whole)]
    for row in (*rows[0], *rows[1]):
        row.pop("targets_per_second", None)
    assert rows[0] == rows[1]


def test_a_report_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [("one", "caption", Figure()), ("two", "caption", Figure())]
    monkeypatch.setattr(run_report, "comparison_figures", lambda *_: iter(drawn))
    out = tmp_path / "report"

    def work() -> None:
        with locked(out):
            run_report.build_report(out, [method(n_run=1)], experiment=EXPERIMENT)

    def check() -> None:
        assert is_free(out, "index.html", ("figures", "tables", "table.csv", "summary.json"))

    assert everywhere(tmp_path, work, check, every=5) >= 3
    assert "<html" in (out / "index.html").read_text()


def test_the_rows_of_a_study_are_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    old, new = ([Row("room", "a", k, {"final": k / 8}) for k in range(n)] for n in (2, 3))
    write_rows(path, old, ["final"])
    seen: list[int] = []
    everywhere(tmp_path, lambda: write_rows(path, new, ["final"]), lambda: seen.append(len(read_rows(path))))
    assert seen[0] == 2 and seen[-1] == 3 and set(seen) == {2, 3}
