"""Benchmarks that no machine of the tests can measure run there at tiny sizes."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


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
