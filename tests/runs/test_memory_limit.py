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
from compressed_ad.runs.config import load_config
from compressed_ad.runs.layers import Request
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


def test_a_limit_makes_workers_and_blocks_fewer() -> None:
    need = memory_limit.Need(200, 100, "one task", beside=50)
    assert [need.workers(4, limit) for limit in (None, 10_000, 1250, 1249, 650, 649, 300)] == [
        4,
        4,
        4,
        3,
        2,
        1,
        1,
    ]
    assert [need.workers(1, limit) for limit in (None, 10_000, 300)] == [1, 1, 1]
    config = load_config(Request("smoke", overrides=[("algorithm.learner", "noise")]))
    need = memory_limit.collecting(config)
    two = need.beside + 2 * need.total
    assert memory_limit.tasks_within(need.total, config, 1) == memory_limit.tasks_within(two, config, 2) == 1
    assert memory_limit.tasks_within(two + 8 * need.grows, config, 2) == 5


@pytest.fixture(params=["run", "study"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command that does every stage in two processes, into the folder ``out``, which does not exist."""
    out = ["--out", str(tmp_path / "out")]
    if request.param == "run":
        return ["run", *TINY, *out]
    file = tmp_path / "tiny.yaml"
    file.write_text("{preset: smoke, runs: 1, families: {room: {}}, variants: {AD: {model: {model: AD}}}}")
    return ["study", str(file), "--process", "2", *out]


def test_runs_and_studies_tell_what_they_need_and_refuse_less_before_they_start(
    whole: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit, told in (("2GB", "2 processes work, each"), ("800MB", "One process works, which")):
        assert main([*whole, "--dry-run", "--memory-limit", limit]) == 0
        assert f"{told} needs about" in capsys.readouterr().out
    for dry in (["--dry-run"], []):
        assert main([*whole, *dry, "--memory-limit", "50MB"]) == 2
        assert "50 MB is too little: a process needs about" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_stages_of_runs_and_studies_work_in_the_pool_that_keeps_the_limit(
    whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_pool(*given: object) -> None:
        opened.append(given)
        raise UsageError("enough")

    monkeypatch.setattr(f"compressed_ad.cli.{whole[0]}.open_pool", open_pool)
    for limit in ("800MB", "2GB"):
        assert main([*whole, "--memory-limit", limit]) == 2
    assert opened == [(None, 1, 8 * 10**8), (None, 2, 2 * 10**9)]


def test_more_episodes_than_a_plan_can_know_are_refused_once_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HistoryFile, "n_episode", lambda file, task_ids: 10**8)
    out = ["--algorithm.n_process", "1", "--out", str(tmp_path)]
    assert main(["run", *TINY, *out, "--memory-limit", "1GB"]) == 2
    assert "of it for lists of 100,000,000 episodes" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.glob("*[0-9]*")] == [".hdf5"]  # no run has begun


def test_histories_that_no_disk_has_room_for_count(smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (history,) = smoke.out.glob("*.hdf5")
    file = HistoryFile(history)
    histories, config = memory_limit.Histories.of(file), load_config(Request("smoke"))
    shared = memory_limit.judging(histories, config)
    beside = history.absolute().parent
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=10 if path == beside else 1e9)
    )
    assert str(memory_limit.judging(histories, config)) == str(shared)  # there is room in the other place
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    alone = memory_limit.judging(histories, config)
    steps = len(file.split.train) * file.n_stream * file.n_step
    assert alone.grows - shared.grows >= 2 * 23 * steps and "the disk has no room" in str(alone)
