"""Histories in files that processes share: the same batches, made once, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compressed_ad.training.sequences import Sequences, from_histories
from compressed_ad.training.shared_arrays import shared_sequences
from compressed_ad.training.transforms import apply_transforms
from compressed_ad.training.windows import WindowSampler
from compressed_ad.types import History
from tests.training.test_transforms import history
from tests.training.test_windows import same

SUBSAMPLE = [("subsample", {"every": [2, 3], "copies": 2})]


def histories() -> dict[int, History]:
    return {0: history(3, 60), 4: history(2, 44, seed=1)}


def shared(folder: Path, what: str = "these") -> Sequences:
    return shared_sequences(folder / "h.hdf5", what, lambda: histories().items())


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert folders(folder) == []


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def assert_same(a: Sequences, b: Sequences) -> None:
    for name in ("offsets", "task", "learner"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.store.keys() == b.store.keys()
    for name, values in a.store.items():
        assert values.dtype == b.store[name].dtype
        np.testing.assert_array_equal(values, b.store[name])


def test_batches_are_those_of_histories_in_memory(data: Path) -> None:
    here, there = from_histories(histories()), shared(data)
    assert_same(here, there)
    assert all(isinstance(array, np.memmap) for array in there.store.values())
    a, b = (
        WindowSampler(
            apply_transforms(s, SUBSAMPLE, seed=3), 12, 8, seed=5, weight_unproven=0.5, min_probability=0.1
        )
        for s in (here, there)
    )
    assert all(same(a.batch(step), b.batch(step)) for step in range(20))


def test_processes_share_one_copy_and_the_last_removes_it(data: Path) -> None:
    first, made = shared(data), []

    def never() -> Iterator[tuple[int, History]]:
        made.append("again")
        yield from histories().items()

    second = shared_sequences(data / "h.hdf5", "these", never)
    other = shared(data, "others")
    assert len(folders(data)) == 2 and not made
    assert_same(first, second)
    del first, other
    (folder,) = folders(data)
    windows = apply_transforms(second, SUBSAMPLE, seed=0)
    del second
    assert folders(data) == [folder]
    np.testing.assert_array_equal(np.unique(windows.states), np.unique(windows.store["states"]))
    del windows
    assert folders(data) == []


@pytest.mark.parametrize("during", [True, False])
def test_what_a_killed_process_left_is_made_again_and_removed(data: Path, during: bool) -> None:
    def dying() -> Iterator[tuple[int, History]]:
        for task, one in histories().items():
            yield task, one.with_mask(np.ones_like(one.terminated))  # so that nobody may believe it
            if during:
                os.kill(os.getpid(), signal.SIGKILL)

    for what in ("these", "others"):
        process = os.fork()
        if process == 0:
            kept = shared_sequences(data / "h.hdf5", what, dying)
            os.kill(os.getpid(), signal.SIGKILL if kept else 0)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert len(folders(data)) >= 1
    found = shared(data)
    assert len(folders(data)) == 1
    assert_same(found, from_histories(histories()))


def test_who_waited_for_one_that_was_killed_makes_the_arrays_anew(data: Path) -> None:
    begun, tell = os.pipe()

    def dying() -> Iterator[tuple[int, History]]:
        yield 0, histories()[0]
        os.write(tell, b"1")
        time.sleep(0.5)  # meanwhile the other has come to wait
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        shared_sequences(data / "h.hdf5", "these", dying)
    assert os.read(begun, 1) == b"1"
    found = shared(data)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert_same(found, from_histories(histories()))


def test_a_forked_process_takes_nothing_away(data: Path) -> None:
    found = shared(data)
    process = os.fork()
    if process == 0:
        del found
        os._exit(0)
    os.waitpid(process, 0)
    assert len(folders(data)) == 1 and len(found.states) == 268


def test_many_at_once(data: Path) -> None:
    expected, wrong = from_histories(histories()), list[BaseException]()

    def use() -> None:
        try:
            for _ in range(20):
                assert_same(shared(data), expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and folders(data) == []


def test_a_failure_while_reading_leaves_nothing(data: Path) -> None:
    def broken() -> Iterator[tuple[int, History]]:
        yield from histories().items()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared_sequences(data / "h.hdf5", "these", broken)
    assert folders(data) == []


def test_on_a_full_disk_the_arrays_are_in_memory(data: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        found = shared(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(found, from_histories(histories()))
    assert folders(data) == [] and not isinstance(found.store["states"], np.memmap)


def test_machines_that_see_one_disk_leave_each_other_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks of one machine may mean nothing on another."""
    ours = shared(data)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename="another machine"))
    theirs = shared(data)
    assert len(folders(data)) == 2
    assert_same(ours, theirs)
    del ours, theirs
    assert folders(data) == []


def test_a_folder_of_somebody_else_is_not_trusted(data: Path, own_temporary_folder: Path) -> None:
    name = folders(data)[0] if (kept := shared(data)) else ""
    del kept
    elsewhere = data / "elsewhere"
    elsewhere.mkdir()
    (data / name).symlink_to(elsewhere)
    found = shared(data)
    assert folders(elsewhere) == [] and folders(own_temporary_folder) == [name]
    assert_same(found, from_histories(histories()))
    del found


def test_histories_that_need_a_wider_dtype_than_the_first_are_in_memory(data: Path) -> None:
    some = histories()
    some[4] = replace(some[4], states=some[4].states.astype(np.int64) + 1000)
    assert some[0].states.dtype != np.int64
    found = shared_sequences(data / "h.hdf5", "these", lambda: some.items())
    assert_same(found, from_histories(some))
    assert found.states.max() >= 1000 and folders(data) == []


def test_what_some_histories_lack_is_left_out(data: Path) -> None:
    some = {k: replace(one, action_probs=None if k else one.action_probs) for k, one in histories().items()}
    found = shared_sequences(data / "h.hdf5", "these", some.items)
    assert_same(found, from_histories(some))
    assert "action_probs" not in found.store
