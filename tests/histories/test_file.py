"""The history file: round trip, crashes at every point, damage, hostile content, marking."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from compressed_ad import files
from compressed_ad.errors import (
    CompressedADError,
    ConfigError,
    HistoryError,
    MarkerError,
    NumericalError,
    UnknownNameError,
)
from compressed_ad.histories import hdf5, writer as histories
from compressed_ad.histories.file import HistoryFile, HistoryInfo, remark
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.marking import markers
from compressed_ad.seeding import rng
from compressed_ad.types import History, Split

INFO = HistoryInfo(
    family="darkroom",
    family_kwargs={"size": 9},
    spaces={
        "observation": {"kind": "multidiscrete", "nvec": [9, 9]},
        "action": {"kind": "discrete", "n": 5},
    },
    horizon=20,
    learner="PPO",
    config={"n_steps": 20, "policy": {"width": 64}},
    seed=0,
)
SPLIT = Split(np.array([0, 2]), np.array([3]), np.array([4]))
TASKS = np.stack(np.divmod(np.arange(6), 3), 1)


def make_history(task, n_stream=3, n_step=250, obs_shape=(2,), info=INFO):
    draw = rng(task, "test history")
    shape = (n_stream, n_step)
    probs = np.clip(np.linspace(0.3, 1, n_step) + draw.normal(0, 0.1, shape), 0.05, 1).astype(np.float32)
    if info.spaces["observation"]["kind"] == "box":
        states = draw.normal(size=(*shape, *obs_shape)).astype(np.float32)
    else:
        states = draw.integers(0, 9, (*shape, *obs_shape))
    return History(
        states=states,
        actions=draw.integers(0, 5, shape),
        rewards=(draw.random(shape) < 0.3).astype(np.float32),
        next_states=np.roll(states, -1, axis=1),
        terminated=draw.random(shape) < 0.02,
        truncated=np.broadcast_to(np.arange(n_step) % 20 == 19, shape),
        action_probs=probs,
        update=np.broadcast_to(np.arange(n_step, dtype=np.int32) // 20, shape),
        learner=np.arange(n_stream, dtype=np.int32) // 2,
        entropy=(1 - probs).astype(np.float32),
        log_prob_next=np.log(probs) - 0.01,
    )


def writer(path, info=INFO, split=SPLIT, **options):
    return HistoryWriter(path, info, split, TASKS, np.full(6, 16.5), np.full(6, 0.25), **options)


def collect(path, **options):
    target = writer(path, **options)
    for task in sorted({0, 2, 3, 4} - target.done_tasks()):
        target.append(task, make_history(task))
    target.finish()
    return path


@pytest.fixture
def path(tmp_path):
    return collect(tmp_path / "histories" / "h.hdf5")


def assert_same(a: History, b: History) -> None:
    for field in fields(History):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x is None or y is None:
            assert x is y, field.name
        else:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


def arrays_of(path):
    """Every dataset but the masks, as stored."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    return {name: array for name, array in found.items() if "compression_mask" not in name}


def assert_same_arrays(a, b):
    a, b = arrays_of(a), arrays_of(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---------------------------------------------------------------- round trip and layout


def test_round_trip(path):
    file = HistoryFile(path)
    assert file.info == INFO
    assert (file.n_stream, file.n_step) == (3, 250)
    assert file.task_ids.tolist() == [0, 2, 3, 4]
    for part in ("train", "validation", "heldout"):
        np.testing.assert_array_equal(getattr(file.split, part), getattr(SPLIT, part))
    np.testing.assert_array_equal(file.tasks, TASKS)
    np.testing.assert_array_equal(file.optimal_return, np.full(6, 16.5))
    np.testing.assert_array_equal(file.random_return, np.full(6, 0.25))
    assert file.marking is None and "numpy" in file.versions
    loaded = file.load()
    assert list(loaded) == [0, 2, 3, 4]
    for task, history in loaded.items():
        assert_same(history, make_history(task))
    assert loaded[0].states.dtype == np.uint8 and loaded[0].actions.dtype == np.uint8
    assert not path.with_name("h.hdf5.shards").exists()
    assert [p.name for p in path.parent.iterdir()] == ["h.hdf5"]


def test_layout_as_documented(path):
    remark(path, "threshold", {"on_policy_threshold": 0.6, "compression_window": 5})
    with h5py.File(path) as file:
        assert file.attrs["format_version"] == 1
        assert file.attrs["family"] == "darkroom" and file.attrs["learner"] == "PPO"
        assert json.loads(file.attrs["config"]) == INFO.config
        assert file.attrs["total_steps"] == 4 * 3 * 250
        marked = sum(int(file[str(t)]["compression_mask"][()].sum()) for t in (0, 2, 3, 4))
        assert file.attrs["compressed_steps"] == marked > 0
        assert file.attrs["compression_ratio"] == marked / 3000
        assert (file.attrs["on_policy_threshold"], file.attrs["compression_window"]) == (0.6, 5)
        assert file["split/heldout"][()].tolist() == [4]
        group = file["2"]
        assert group.attrs["task"].tolist() == [0, 2] and group.attrs["optimal_return"] == 16.5
        for name in ("states", "rewards", "action_probs", "compression_mask"):
            data = group[name]
            assert data.shape[:2] == (3, 250)
            assert data.fletcher32 and data.shuffle and data.compression == "gzip"
        assert group["learner"][()].tolist() == [0, 0, 1]
        assert group["compression_mask"].dtype == bool


def test_a_file_has_the_bytes_that_hdf5_writes_in_memory(tmp_path):
    """So files are those of versions that put them together in memory."""

    def fill(file):
        file.attrs["text"] = "x" * 5000
        for task in range(3):
            group = file.create_group(str(task))
            for name, array in make_history(task, 20, 2000).per_step():
                hdf5.write_array(group, name, array)
        del file["1/update"]

    with (
        pytest.MonkeyPatch.context() as patch,
        h5py.File("memory", "w", driver="core", backing_store=False, userblock_size=512) as file,
    ):
        patch.setattr(hdf5, "make_room", lambda file, size: None)
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    hdf5.write_file(tmp_path / "h", fill)
    assert (tmp_path / "h").read_bytes() == hdf5._block(hashlib.sha256(image).hexdigest()) + image


def test_same_histories_give_the_same_digest(path, tmp_path):
    again = HistoryFile(collect(tmp_path / "again.hdf5"))
    assert HistoryFile(path).digest() == again.digest()
    remark(tmp_path / "again.hdf5", "all")
    assert HistoryFile(path).digest() != HistoryFile(tmp_path / "again.hdf5").digest()


@pytest.mark.parametrize("chunk", [1 << 16, 300])
def test_box_observations_one_step_and_missing_optional_arrays(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(hdf5, "_CHUNK_BYTES", chunk)
    box = {"kind": "box", "shape": [4], "dtype": "float32", "low": None, "high": None}
    info = replace(INFO, spaces={**INFO.spaces, "observation": box})
    for n_stream, n_step in ((1, 1), (2, 77)):
        path = tmp_path / f"box{n_step}.hdf5"
        target = HistoryWriter(path, info, Split([0], [], []), TASKS[:1], None, np.zeros(1))
        history = make_history(0, n_stream, n_step, (4,), info)
        history = replace(history, entropy=None, log_prob_next=None)
        target.append(0, history)
        target.finish()
        assert_same(HistoryFile(path).load()[0], history)
        assert HistoryFile(path).optimal_return is None


def test_unknown_probabilities_may_be_stored(tmp_path):
    target = HistoryWriter(tmp_path / "h", INFO, Split([0], [], []), TASKS, None, np.zeros(6))
    history = make_history(0)
    history.action_probs[1, 2] = np.nan
    target.append(0, history)
    target.finish()
    assert_same(HistoryFile(tmp_path / "h").load()[0], history)
    with pytest.raises(MarkerError, match="unknown"):
        remark(tmp_path / "h", "threshold")


def test_large_discrete_spaces_get_wider_dtypes(tmp_path):
    for n, dtype in ((256, np.uint8), (257, np.int16), (40000, np.int32)):
        info = replace(INFO, spaces={**INFO.spaces, "observation": {"kind": "discrete", "n": n}})
        history = make_history(0, obs_shape=())
        states = history.states.copy()
        states[0, 0] = n - 1
        target = HistoryWriter(tmp_path / str(n), info, Split([0], [], []), TASKS, None, np.zeros(6))
        target.append(0, replace(history, states=states))
        target.finish()
        loaded = HistoryFile(tmp_path / str(n)).load()[0]
        assert loaded.states.dtype == dtype
        np.testing.assert_array_equal(loaded.states, states)


def test_what_cannot_be_stored_without_loss_is_refused(tmp_path):
    target = writer(tmp_path / "h")
    good = make_history(0)
    outside = good.states.copy()
    outside[1, 7, 0] = 9
    bad = {
        r"task 0: states\[1, 7, 0\] is 9, outside": replace(good, states=outside),
        r"actions of dtype float64": replace(good, actions=good.actions + 0.5),
        r"elements of shape \(\)": replace(good, next_states=good.states[..., 0]),
        r"action_probs reach": replace(good, action_probs=good.action_probs + 1),
    }
    for message, history in bad.items():
        with pytest.raises(HistoryError, match=message):
            target.append(0, history)
    rewards = good.rewards.copy()
    rewards[2, 9] = np.inf
    with pytest.raises(NumericalError, match=r"task 0: rewards\[2, 9\] is inf"):
        target.append(0, replace(good, rewards=rewards))
    with pytest.raises(HistoryError, match="task 1 is in no part of the split"):
        target.append(1, good)
    with pytest.raises(HistoryError, match="only 6 tasks"):
        writer(tmp_path / "h", split=Split([0], [], [6]))
    with pytest.raises(ConfigError, match="plain data"):
        writer(tmp_path / "h", info=replace(INFO, config={"f": len})).append(0, good)
    assert target.done_tasks() == set()


def test_histories_of_different_lengths_are_refused(tmp_path):
    target = HistoryWriter(tmp_path / "h", INFO, Split([0, 2], [], []), TASKS, None, np.zeros(6))
    target.append(0, make_history(0))
    with pytest.raises(HistoryError, match=r"task 2 has .* \(3, 100\), task 0 has \(3, 250\)"):
        target.append(2, make_history(2, n_step=100))
    assert target.done_tasks() == {0}


def test_masks_collected_with_the_histories_are_kept(tmp_path):
    target = HistoryWriter(tmp_path / "h", INFO, Split([0], [], []), TASKS, None, np.zeros(6))
    history = make_history(0)
    history = history.with_mask(markers.threshold(history.action_probs))
    target.append(0, history)
    marking = {"marker": "threshold", "parameters": {"compression_window": 10}, "seed": 0, "time": "now"}
    target.finish(marking)
    file = HistoryFile(tmp_path / "h")
    assert file.marking == marking
    assert_same(file.load()[0], history)
    assert file.statistics().compressed_steps == history.compression_mask.sum()


def test_a_collection_marked_in_part_is_not_marked(tmp_path):
    target = HistoryWriter(tmp_path / "h", INFO, Split([0, 2], [], []), TASKS, None, np.zeros(6))
    target.append(0, make_history(0))
    marked = make_history(2).with_mask(np.ones((3, 250), dtype=bool))
    target.append(2, marked)
    target.finish({"marker": "all", "parameters": {}, "seed": 0, "time": "now"})
    file = HistoryFile(tmp_path / "h")
    assert file.marking is None
    assert_same(file.load()[2], make_history(2))
    remark(tmp_path / "h", "all")
    assert HistoryFile(tmp_path / "h").statistics().compression_ratio == 1


# ---------------------------------------------------------------- resume


class Killed(BaseException):
    """The process is gone."""


def kill_at(monkeypatch, count):
    """Stop the process, as it were, at the ``count``-th step that changes what is on disk."""
    left = [count]

    def stopping(function, after):
        def call(*args, **kwargs):
            if not after:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            result = function(*args, **kwargs)
            if after:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            return result

        return call

    monkeypatch.setattr(files.os, "fsync", stopping(files.os.fsync, after=False))
    monkeypatch.setattr(Path, "replace", stopping(Path.replace, after=True))
    monkeypatch.setattr(histories.shutil, "rmtree", stopping(histories.shutil.rmtree, after=False))
    return left


def test_killed_at_any_point_a_rerun_ends_with_the_same_file(path, tmp_path):
    points = 0
    while True:
        points += 1
        victim = tmp_path / f"victim{points}.hdf5"
        with pytest.MonkeyPatch.context() as patch:
            left = kill_at(patch, points)
            try:
                collect(victim)
                break
            except Killed:
                done = points // 3  # three steps each: sync the file, rename it, sync the directory
            assert left[0] == 0
        resumed = writer(victim, resume=True)
        assert len(resumed.done_tasks()) >= min(done, 4)
        collect(victim, resume=True)
        assert victim.read_bytes() == path.read_bytes()
        assert not list(tmp_path.glob("*.shards"))
    assert points == 4 * 3 + 3 + 1 + 1


def test_a_process_that_really_dies_leaves_what_it_finished(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_file as t
target = t.writer({str(tmp_path / "h")!r})
target.append(0, t.make_history(0))
target.append(3, t.make_history(3))
os._exit(137)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 137
    resumed = writer(tmp_path / "h", resume=True)
    assert resumed.done_tasks() == {0, 3}
    with pytest.raises(HistoryError, match=r"no histories yet of 2 tasks: \[2, 4\]"):
        resumed.finish()


def test_nothing_is_overwritten_unasked(path):
    before = path.read_bytes()
    with pytest.raises(HistoryError, match="exists; resume it, overwrite it"):
        writer(path)
    assert writer(path, resume=True).done_tasks() == {0, 2, 3, 4}
    collect(path, resume=True)
    assert path.read_bytes() == before
    other = collect(path, info=replace(INFO, seed=1), overwrite=True)
    assert HistoryFile(other).info.seed == 1


def test_an_unfinished_collection_is_not_overwritten_unasked(tmp_path):
    writer(tmp_path / "h").append(0, make_history(0))
    with pytest.raises(HistoryError, match="unfinished collection"):
        writer(tmp_path / "h")
    assert writer(tmp_path / "h", resume=True).done_tasks() == {0}
    assert writer(tmp_path / "h", overwrite=True).done_tasks() == set()


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path, finished):
    path = tmp_path / "h"
    if finished:
        collect(path)
    else:
        writer(path).append(0, make_history(0))
    config = {"n_steps": 40, "policy": {"width": 64}, "gamma": 0.9}
    with pytest.raises(HistoryError) as error:
        writer(path, info=replace(INFO, config=config, seed=3), resume=True)
    text = str(error.value)
    assert "config.n_steps: 20 there, 40 asked for; config.gamma: not set there, 0.9 asked for" in text
    assert "seed: 0 there, 3 asked for" in text and "width" not in text
    with pytest.raises(HistoryError, match=r"split.heldout: \[4\] there, \[5\] asked for"):
        writer(path, split=Split([0, 2], [3], [5]), resume=True)
    assert writer(path, resume=True).done_tasks() == ({0, 2, 3, 4} if finished else {0})


def test_a_damaged_shard_is_dropped_and_named(tmp_path, caplog):
    target = writer(tmp_path / "h")
    for task in (0, 2):
        target.append(task, make_history(task))
    shard = tmp_path / "h.shards" / "2.h5"
    shard.write_bytes(shard.read_bytes()[:-100])
    resumed = writer(tmp_path / "h", resume=True)
    assert resumed.done_tasks() == {0}
    assert "2.h5: is damaged" in resumed.dropped[0] and "task 2 is collected again" in caplog.text


def test_a_shard_of_another_configuration_is_not_merged(tmp_path):
    target = writer(tmp_path / "h")
    other = writer(tmp_path / "h", replace(INFO, config={"n_steps": 40}), overwrite=True)
    for task in (0, 2, 3, 4):
        (target if task < 3 else other).append(task, make_history(task))
    with pytest.raises(HistoryError, match=r"3\.h5 was collected with another .*config\.n_steps: 40 there"):
        target.finish()
    assert not (tmp_path / "h").exists()


def test_an_overwrite_by_another_collection_leaves_the_file_to_its_own(path):
    before = path.read_bytes()
    writer(path, replace(INFO, seed=7), overwrite=True)  # killed before its first task
    late = writer(path, resume=True)
    assert late.done_tasks() == {0, 2, 3, 4}
    late.finish()
    assert path.read_bytes() == before and not late.shards.exists()


def dies_after_one(folder: Path) -> None:
    (folder / "0.h5").unlink()
    raise KeyboardInterrupt


@pytest.mark.parametrize("seed", [0, 1])
def test_an_overwrite_that_was_interrupted_goes_on(path, seed, monkeypatch):
    info = replace(INFO, seed=seed)
    old = path.read_bytes()
    target = writer(path, info, overwrite=True)
    assert writer(path, info, resume=True).done_tasks() == set()  # killed before the first task
    for task in (0, 2):
        target.append(task, make_history(task + 10))
    os.utime(path)  # whichever of them is newer
    assert path.read_bytes() == old
    resumed = writer(path, info, resume=True)
    assert resumed.done_tasks() == {0, 2}
    for task in (3, 4):
        resumed.append(task, make_history(task + 10))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(shutil, "rmtree", dies_after_one)
        resumed.finish()
    late = writer(path, info, resume=True)
    assert late.done_tasks() == {0, 2, 3, 4}
    late.finish()
    assert not late.shards.exists()
    file = HistoryFile(path)
    assert file.info == info and all(map(np.array_equal, file.load([0])[0].states, make_history(10).states))
    # Killed while its shards are removed, after the new file is in place: the file counts.
    late = writer(path, info, resume=True)
    late.shards.mkdir()
    (late.shards / "0.h5").write_bytes(collect(path.with_name("other")).read_bytes())
    with pytest.raises(HistoryError, match="seed: 0 there, 1 asked for") if seed else nullcontext():
        assert writer(path, info, resume=True).done_tasks() == {0, 2, 3, 4}


def test_one_collection_or_marking_at_a_time(path):
    before = path.read_bytes()
    with (
        files.locked(path, file=True),
        pytest.raises(HistoryError, match=rf"another process .*{os.getpid()}"),
    ):
        remark(path, "all")
    with (
        files.locked(path.with_name("copy"), file=True),
        pytest.raises(HistoryError, match="copy: another process works here"),
    ):
        remark(path, "all", output=path.with_name("copy"))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@contextmanager
def largest_file(size):
    """No file can become larger than ``size`` bytes: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_error_and_loses_nothing(path):
    before = path.read_bytes()
    room = hdf5._ROOM
    for size in (500, 4096, room, room + 3000, room + 10_000, room + len(before)):
        with largest_file(size):
            with pytest.raises(HistoryError, match=rf"^{path}: cannot be written .*untouched"):
                remark(path, "all")
            if size <= room:
                with pytest.raises(HistoryError, match=r"0\.h5: cannot be written"):
                    writer(path.with_name("new"), overwrite=True).append(0, make_history(0))
        assert path.read_bytes() == before
        assert not list(path.parent.rglob("*.partial"))


# ---------------------------------------------------------------- damage and hostility


def test_truncated_anywhere(path, tmp_path):
    content, victim = path.read_bytes(), tmp_path / "cut"
    for size in sorted({0, 1, 20, 100, 511, 512, 513, len(content) - 1, *range(600, len(content), 4001)}):
        victim.write_bytes(content[:size])
        with pytest.raises(HistoryError, match=re.escape(str(victim))):
            HistoryFile(victim)


def test_a_flipped_bit_anywhere(path, tmp_path):
    content, victim = bytearray(path.read_bytes()), tmp_path / "flipped"
    draw = rng(0, "flips")
    places = [*range(0, 100, 7), 300, 511, *draw.integers(512, len(content), 60).tolist()]
    for place in places:
        content[place] ^= 1 << int(draw.integers(8))
        victim.write_bytes(content)
        with pytest.raises(HistoryError, match=re.escape(str(victim))):
            HistoryFile(victim)
        content = bytearray(path.read_bytes())


def test_a_flipped_bit_of_data_is_found_even_without_the_checksum_of_the_whole(path):
    with h5py.File(path) as file:
        place = file["0/states"].id.get_chunk_info(0).byte_offset + 512
    content = bytearray(path.read_bytes())
    content[place + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(HistoryError, match=r"cannot be read"):
        HistoryFile(path, verify=False).load([0])


def foreign_hdf5(path):
    with h5py.File(path, "w") as file:
        file["x"] = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "is a folder, not a history file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_text("hello"), "is not a history file"),
        (foreign_hdf5, "is an HDF5 file, but not one of compressed_ad; try: cad import"),
        (
            lambda p: p.write_bytes(b"compressed_ad history 7 sha256 00\n"),
            "format version 7; this version reads 1",
        ),
    ],
)
def test_what_is_no_history_file(tmp_path, make, message):
    path = tmp_path / "file"
    make(path)
    with pytest.raises(HistoryError, match=message) as error:
        HistoryFile(path)
    assert str(path) in str(error.value)


def tamper(path, edit):
    """Change the content as an attacker would: with a checksum that fits."""
    with h5py.File(path, "r+") as file:
        edit(file)
    content = path.read_bytes()
    path.write_bytes(hdf5._block(hashlib.sha256(content[512:]).hexdigest()) + content[512:])


def replaced(name, **dataset):
    def edit(file):
        del file[name]
        file.create_dataset(name, **dataset)

    return edit


def linked(link):
    def edit(file):
        del file["0/rewards"]
        file["0/rewards"] = link

    return edit


def attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def value(name, index, to):
    return lambda file: file[name].__setitem__(index, to)


def virtual(file):
    del file["0/rewards"]
    layout = h5py.VirtualLayout((3, 250), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (3, 250))
    file.create_virtual_dataset("0/rewards", layout)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            replaced("0/rewards", shape=(10**9, 10**9), dtype="f4", chunks=(1, 1000)),
            "does not fit its 0 stored",
        ),
        (replaced("0/states", shape=(3, 250, 2), dtype="u1", chunks=(1, 9, 2), fillvalue=1), "does not fit"),
        (replaced("0/rewards", data=np.zeros((3, 9), "f4")), "has .streams, steps. .3, 9., others|expected"),
        (replaced("0/rewards", data=np.zeros(3, "f4")), r"rewards: expected .stream, time., got shape .3,."),
        (replaced("0/rewards", data=np.zeros((3, 250), "i4")), "dtype int32"),
        (replaced("0/rewards", data=np.zeros((3, 250), "f2")), "rewards of dtype float16, not float32"),
        (replaced("0/rewards", data=np.full((3, 250), 1e300)), "rewards of dtype float64, not float32"),
        (replaced("0/states", data=np.array([["a"]], h5py.string_dtype())), "dtype object"),
        (replaced("0/actions", data=np.zeros((3, 250), [("x", "i4")])), "dtype"),
        (replaced("0/rewards", shape=(3, 250), dtype="f4", external="secret.bin"), "never use"),
        (replaced("0/rewards", data=np.ones((3, 250), "f4"), chunks=(3, 250), scaleoffset=2), "never use"),
        (virtual, "never use"),
        (linked(h5py.SoftLink("/2/rewards")), "missing or a link"),
        (linked(h5py.ExternalLink("other.h5", "/x")), "missing or a link"),
        (lambda file: file.__delitem__("2"), "'2' is missing"),
        (lambda file: file["0"].__delitem__("learner"), "'learner' is missing"),
        (value("0/actions", (0, 0), 5), r"actions\[0, 0\] is 5, outside"),
        (value("0/action_probs", (0, 0), np.inf), "action_probs reach"),
        (attribute("format_version", 2), "format version 2; this version reads 1"),
        (attribute("config", "{"), "not a JSON object"),
        (attribute("config", '{"told": NaN}'), "'config' is not a JSON object .NaN is no number"),
        (attribute("family_kwargs", '{"size": Infinity}'), "'family_kwargs' is not a JSON object"),
        (attribute("learner", "a\nb"), r"one line of printable letters, not 'a\\nb'"),
        (attribute("family", "\x1b[31m"), "one line of printable letters"),
        (value("0/rewards", (0, 0), 3e38), r"h\.hdf5: task 0: rewards reach 3e\+38"),
        (value("optimal_return", 0, 1e300), "optimal_return of task 0 is 1e.300"),
        (attribute("config", "[1]"), "not a JSON object"),
        (attribute("seed", "0"), "'seed' is missing or not of type int"),
        (attribute("spaces", '{"observation": {}}'), "does not describe"),
        (attribute("spaces", '{"observation": {}, "action": {}}'), "describes no space"),
        (replaced("split/heldout", data=np.array([0])), "more than one part"),
        (replaced("split/heldout", data=np.array([99])), "only 6 tasks"),
        (replaced("random_return", data=np.zeros(3)), "random_return: expected"),
    ],
)
def test_hostile_content_is_refused(path, edit, message):
    tamper(path, edit)
    with pytest.raises(CompressedADError, match=message):
        HistoryFile(path).load()


@pytest.mark.parametrize(("name", "wrong"), [("rewards", np.nan), ("rewards", np.inf), ("entropy", np.inf)])
def test_nan_in_a_file_is_named(path, name, wrong):
    tamper(path, value(f"3/{name}", (1, 5), wrong))
    with pytest.raises(NumericalError, match=rf"task 3: {name}\[1, 5\] is {wrong}"):
        HistoryFile(path).load()
    assert HistoryFile(path).load([0])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("random_return", np.nan),
        ("random_return", np.inf),
        ("optimal_return", np.inf),
        ("optimal_return", -np.inf),
    ],
)
def test_returns_that_are_no_numbers_stop_at_opening(path, name, number):
    tamper(path, value(name, (2,), number))
    with pytest.raises(HistoryError, match=rf"^{path}: {name} of task 2 is {number}$"):
        HistoryFile(path)


@pytest.mark.parametrize("number", [np.nan, 0.25], ids=["unknown", "that of random play"])
def test_an_optimum_that_gives_no_scale_does_not_stop(path, number):
    tamper(path, value("optimal_return", (2,), number))
    assert HistoryFile(path).optimal_return[2] == pytest.approx(number, nan_ok=True)


@pytest.mark.parametrize(("number", "shown"), [(-1e9, r"-1e\+09"), (0.2499, "0.2499")])
def test_an_optimum_below_random_is_refused(path, number, shown):
    tamper(path, value("optimal_return", (2,), number))
    with pytest.raises(HistoryError, match=f"optimal_return of task 2 is {shown}, but its random"):
        HistoryFile(path)


@pytest.mark.parametrize("reward", [np.nan, np.inf, 0.0, -1.0])
def test_scales_that_are_no_scales_are_named(path, reward):
    tamper(path, replaced("scales/reward", data=reward))
    with pytest.raises(HistoryError, match=rf"^{path}: scales/reward is {reward}; it must be"):
        HistoryFile(path).training_scales()


def test_an_unknown_task_is_refused(path):
    with pytest.raises(HistoryError, match=r"has no task \[1, 7\]"):
        HistoryFile(path).load([0, 1, 7])


# ---------------------------------------------------------------- marking


def test_remark_rewrites_the_masks_and_nothing_else(path, tmp_path):
    plain = collect(tmp_path / "plain.hdf5")
    with pytest.raises(HistoryError, match="not marked yet; mark it with: cad mark"):
        HistoryFile(path).statistics()
    ticks = []
    statistics = remark(path, "threshold", {"compression_window": 5}, progress=ticks.append)
    assert sum(ticks) == 4
    assert_same_arrays(path, plain)
    file = HistoryFile(path)
    assert file.statistics() == statistics
    assert file.marking["marker"] == "threshold"
    assert file.marking["parameters"] == {
        "compression_window": 5,
        "on_policy_threshold": 0.7,
        "within_episode": False,
        "causal": False,
    }
    for task, history in file.load().items():
        np.testing.assert_array_equal(
            history.compression_mask, markers.threshold(make_history(task).action_probs, 0.7, 5)
        )
    size = path.stat().st_size
    for _ in range(3):
        remark(path, "threshold", {"compression_window": 5})
    assert path.stat().st_size == size
    remark(path, "none")
    with h5py.File(path) as raw:
        assert "on_policy_threshold" not in raw.attrs and raw.attrs["compressed_steps"] == 0
    assert_same_arrays(path, plain)


READS = {
    "load": lambda file: file.load([0]),
    "statistics": HistoryFile.statistics,
    "training_scales": HistoryFile.training_scales,
    "digest": HistoryFile.digest,
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_file_that_has_changed_says_so_at_the_next_read(path, read, verify):
    remark(path, "all")
    file = HistoryFile(path, verify=verify)
    read(file)
    digest = file.digest()
    remark(path, "none")
    for stale in (lambda: read(file), lambda: HistoryFile(path, verify=verify, digest=digest)):
        with pytest.raises(HistoryError, match=r"h\.hdf5: has changed since it was opened; open it again"):
            stale()
    read(HistoryFile(path, verify=verify))


def test_another_handle_of_this_process_does_not_matter(path):
    with h5py.File(path) as handle:
        assert_same(HistoryFile(path).load([0])[0], make_history(0))
        remark(path, "all")
        assert HistoryFile(path).statistics().compression_ratio == 1
        assert "compression_mask" not in handle["0"]


def test_a_link_stays_and_permissions_too(path, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "h.hdf5"
    link.symlink_to(path)
    path.chmod(0o664)
    remark(link, "all")
    assert link.is_symlink() and HistoryFile(path).marking["marker"] == "all"
    assert path.stat().st_mode & 0o777 == 0o664
    assert [p.name for p in (*path.parent.iterdir(), *link.parent.iterdir())] == ["h.hdf5", "h.hdf5"]


def test_remark_into_another_file(path, tmp_path):
    before = path.read_bytes()
    remark(path, "all", output=tmp_path / "all.hdf5")
    assert path.read_bytes() == before
    assert HistoryFile(tmp_path / "all.hdf5").statistics().compression_ratio == 1
    with pytest.raises(HistoryError, match="exists"):
        remark(path, "none", output=tmp_path / "all.hdf5")


def test_random_marks_depend_on_seed_and_task(path):
    remark(path, "random", seed=1)
    first = HistoryFile(path).load()
    remark(path, "random", seed=1)
    for task, history in HistoryFile(path).load().items():
        assert_same(history, first[task])
    remark(path, "random", seed=2)
    assert (HistoryFile(path).load()[0].compression_mask != first[0].compression_mask).any()


@pytest.mark.parametrize("point", [1, 2, 3])
def test_killed_while_marking_the_file_is_old_or_new(path, tmp_path, point):
    old = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, point)
        with pytest.raises(Killed):
            remark(path, "all")
    if point == 1:
        assert path.read_bytes() == old
    else:
        assert HistoryFile(path).statistics().compression_ratio == 1
    remark(path, "all")
    assert_same_arrays(path, collect(tmp_path / "plain.hdf5"))


@pytest.mark.parametrize(
    ("marker", "params", "error"),
    [
        ("treshold", {}, UnknownNameError),
        ("threshold", {"windw": 3}, ConfigError),
        ("threshold", {"compression_window": 0}, ConfigError),
        (lambda probs: probs, {}, MarkerError),
    ],
)
def test_a_wrong_marker_leaves_the_file_alone(path, marker, params, error):
    before = path.read_bytes()
    with pytest.raises(error):
        remark(path, marker, params)
    assert path.read_bytes() == before
