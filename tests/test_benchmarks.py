"""Benchmarks that no machine of the tests can measure run there at tiny sizes."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import GOALS, summary


def test_the_benchmark_of_gpus_runs_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    rows = gpu.run("cpu", quick=True)
    assert [row[:4] for row in rows[:5]] == [
        ["targets", "float32", "16", "20"],
        ["targets", "float32", "16", "40"],
        ["targets", "float32", "32", "20"],
        ["targets", "float32", "32", "40"],
        ["targets", "bfloat16", "16", "20"],
    ]
    assert len(rows) == 10 and all(float(row[4].replace(",", "")) > 0 for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + 2 + len(rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.run() == []
    assert capsys.readouterr().out.startswith("no CUDA device was found")


def test_the_last_table_of_all_benchmarks_has_what_was_measured() -> None:
    results = {
        "playing": {"ms_8": 0.51234, "ms_8_reading": 0.02},
        "collection": {"gradient_step": {"times_floor": 2.0}},
    }
    head, *rows = summary(results)
    assert head == ["", "measured", "goal", "floor"] and len(rows) == len(GOALS)
    found = {row[0]: row[1:] for row in rows}
    assert found["in-context step, 8 environments: ms"] == ["0.512", "<= 0.6", "0.02"]
    assert found["collection: times its floor"] == ["2", "<= 1.6", "1"]
    assert found["in-context step, 32 environments: ms"] == ["-", "<= 1.2", "-"]
    assert found["collection: speed beside SB3's"] == ["-", "", "-"]
