"""JSON, digests and locks; writing atomically is tested with history files."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from compressed_ad.errors import RunDirectoryError, RunError, one_line
from compressed_ad.files import file_digest, is_free, json_value, locked, write_atomically, write_json


def test_json_holds_what_is_finite(tmp_path):
    value = {1: np.array([1.5, np.nan]), "b": (np.float32(2), float("inf"), None, True), "c": tmp_path}
    assert json_value(value) == {"1": [1.5, None], "b": [2.0, None, None, True], "c": str(tmp_path)}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == json_value(value)


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"head and content")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"head and content").hexdigest()
    assert file_digest(tmp_path / "a", 9) == hashlib.sha256(b"content").hexdigest()


def test_a_lock_is_held_by_one_and_dropped(tmp_path):
    for _ in range(2):
        with (
            locked(tmp_path),
            pytest.raises(RunDirectoryError, match="another process works here"),
            locked(tmp_path),
        ):
            pytest.fail("a second lock was given")
    with locked(tmp_path / "new"), locked(tmp_path / "new" / "a", file=True):
        assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock", ".a.lock"}
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunDirectoryError, match=f"{place}: cannot be written to"), locked(place):
            pytest.fail("a lock was given where none can be")


def test_a_lock_file_that_is_removed_while_another_waits_locks_nobody_out(tmp_path, monkeypatch):
    real, first = fcntl.flock, [True]

    def flock(file, how):
        if first.pop() if first else False:
            (tmp_path / ".lock").unlink()  # by its holder, who ends just now
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(RunDirectoryError, match="another process"), locked(tmp_path):
            pytest.fail("a second lock was given")


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".a.json.{gone.pid}-0123abcd.partial"
    held = tmp_path / f".b.json.{gone.pid}-0123abcd.partial"  # a writer on another machine
    others = [
        tmp_path / f".a.json.{os.getpid()}-0123abcd.partial",
        tmp_path / f"a.json.{gone.pid}-0123abcd.partial",
        tmp_path / f".a.json.{gone.pid}.partial",
        held,
    ]
    for path in (left, *others):
        path.write_text("half")
    with held.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_json(tmp_path / "new.json", {})
    assert not left.exists() and all(path.read_text() == "half" for path in others)


def test_an_error_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("a/b", "Not a directory|exists"),
        ("loop", "symbolic links"),
        ("folder", "directory"),
    ):
        with pytest.raises(RunError, match=rf"{tmp_path / name}: cannot be written \(.*({reason})"):
            write_atomically(tmp_path / name, b"new")
    for name in ("fsync", "fchmod"):
        for error in (OSError(errno.EROFS, "Read-only file system"), KeyboardInterrupt()):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, Mock(side_effect=error))
                patch.setattr(Path, "unlink", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
                with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
                    write_atomically(tmp_path / "a", b"new")
            assert (tmp_path / "a").read_text() == "old"


def test_output_goes_on_where_a_killed_process_left_it(tmp_path):
    parts = ("figures", "table.csv", "summary.json")
    assert is_free(tmp_path / "new", "index.html", parts) and is_free(tmp_path, "index.html", parts)
    (tmp_path / ".lock").touch()
    assert is_free(tmp_path, "index.html", parts)
    (tmp_path / "table.csv").touch()  # not ours: figures come first
    assert not is_free(tmp_path, "index.html", parts) and not is_free(tmp_path / "table.csv", "index.html")
    (tmp_path / "figures").mkdir()
    assert is_free(tmp_path, "index.html", parts)
    (tmp_path / "letter.txt").touch()
    assert not is_free(tmp_path, "index.html", parts)
    (tmp_path / "index.html").touch()
    assert is_free(tmp_path, "index.html", parts)


def test_errors_in_one_line():
    assert one_line(RunError("\nfirst\nsecond")) == "first"
    assert one_line(RunError("long"), 2) == "lo"
    assert one_line(KeyError()) == "KeyError"
