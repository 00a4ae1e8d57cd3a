"""``--memory-limit``: said before it starts, refused in one line, or kept with the same results."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from compressed_ad.cli.main import main
from compressed_ad.errors import UsageError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.runs import memory_limit
from tests.conftest import SmokeRun

TINY = ["--preset", "smoke", "--algorithm.learner", "noise", "--algorithm.learner_kwargs", "{}"]
TINY += ["--env.n_task", "6", "--env.validation", "1", "--env.heldout", "1", "--algorithm.n_process", "2"]


def test_sizes() -> None:
    sizes = {"1GB": 10**9, "1.5gb": 15 * 10**8, "500 MB": 5 * 10**8, "2GiB": 2**31, "1K": 1000, "7": 7}
    assert {text: memory_limit.size(text) for text in sizes} == sizes
    for wrong in ("", "GB", "-1GB", "1 PB", "0MB", "1e9"):
        with pytest.raises(UsageError, match=r"like 500MB or 1\.5GB"):
            memory_limit.size(wrong)
    assert memory_limit.size_text(1_540_000_000) == "1.5 GB" and memory_limit.size_text(1_000_001) == "2 MB"


def test_every_command_tells_what_it_needs_and_refuses_less(
    smoke: SmokeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (history,) = smoke.out.glob("*.hdf5")
    run = smoke.out / "CompressedAD-darkroom-seed0"
    exported = tmp_path / "x.npz"
    assert main(["export", str(history), "--to", "npz", "--out", str(exported)]) == 0
    commands = {
        "collect": ["collect", *TINY, "--out", str(tmp_path)],
        "mark": ["mark", str(history)],
        "import": [
            "import",
            str(exported),
            "--layout",
            "npz",
            "--family",
            "darkroom",
            "--out",
            str(tmp_path),
        ],
        "train": ["train", "--preset", "smoke", "--history", str(history), "--out", str(tmp_path)],
        "evaluate": ["evaluate", str(run)],
    }
    for words in commands.values():
        assert main([*words, "--dry-run"]) == 0
        assert "needs about" in capsys.readouterr().out
        for dry in (["--dry-run"], []):
            assert main([*words, *dry, "--memory-limit", "50MB"]) == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert "--memory-limit 50 MB is too little: a process needs about" in said
        assert main([*words, "--dry-run", "--memory-limit", "1GB"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [exported.name]
    assert main(["mark", str(history), "--memory-limit", "lots"]) == 2
    assert "like 500MB" in capsys.readouterr().err


def test_within_a_limit_collections_are_the_same(tmp_path: Path) -> None:
    digests = []
    for limit in ([], ["--memory-limit", "300MB"]):
        assert main(["collect", *TINY, "--out", str(tmp_path / "out"), *limit]) == 0
        (path,) = (tmp_path / "out").glob("*.hdf5")
        digests.append({k: v.tobytes() for k, v in HistoryFile(path).load([0])[0].per_step()})
        shutil.rmtree(tmp_path / "out")
    assert digests[0] == digests[1]


def test_a_limit_makes_blocks_and_workers_fewer() -> None:
    need = memory_limit.Need(200, 100, "one task")
    assert memory_limit.tasks_within(need, 1400, 2) == 5
    assert memory_limit.tasks_within(need, 600, 2) == 1


def test_histories_that_no_disk_has_room_for_count(smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (history,) = smoke.out.glob("*.hdf5")
    file = HistoryFile(history)
    shared = memory_limit.judging(file)
    beside = history.absolute().parent
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=10 if path == beside else 1e9)
    )
    assert str(memory_limit.judging(file)) == str(shared)  # there is room in the other place
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    alone = memory_limit.judging(file)
    steps = len(file.split.train) * file.n_stream * file.n_step
    assert alone.grows - shared.grows >= 2 * 23 * steps and "the disk has no room" in str(alone)
