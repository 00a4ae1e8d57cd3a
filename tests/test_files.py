"""JSON, digests and locks; writing atomically is tested with history files."""

import hashlib
import json

import numpy as np
import pytest

from compressed_ad.errors import RunDirectoryError, RunError, one_line
from compressed_ad.files import file_digest, json_value, locked, write_json


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
            pass
    with locked(tmp_path / "new"), locked(tmp_path / "new" / "a", file=True):
        assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock", ".a.lock"}
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunDirectoryError, match=f"{place}: cannot be written to"), locked(place):
            pass


def test_errors_in_one_line():
    assert one_line(RunError("\nfirst\nsecond")) == "first"
    assert one_line(RunError("long"), 2) == "lo"
    assert one_line(KeyError()) == "KeyError"
