"""Files that at every moment are absent, the old or the whole new content; locks, strict JSON, digests."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from compressed_ad.errors import RunDirectoryError, RunError

LOCK = ".lock"
UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, MemoryError, EOFError, BadZipFile, zlib.error)
"""What reading a damaged or foreign archive of NumPy may raise."""


def write_atomically(path: Path, *content: bytes, error: type[RunError] = RunError) -> None:
    """Replace ``path`` by ``content`` in one step that survives a crash; ``error`` if that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as cause:
        aside.unlink(missing_ok=True)
        reason = cause.strerror or str(cause)
        raise error(f"{path}: cannot be written ({reason}); what was there is untouched") from cause
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, error: type[RunError] = RunError) -> None:
    """Replace ``path`` by ``value`` as indented strict JSON, see ``json_value``."""
    text = json.dumps(json_value(value), indent=2, allow_nan=False)
    write_atomically(path, text.encode() + b"\n", error=error)


def json_value(value: Any) -> Any:
    """``value`` as strict JSON can hold it: NaN and infinity as None, arrays and tuples as lists."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def file_digest(path: Path, start: int = 0) -> str:
    """SHA-256 of the bytes of ``path`` from ``start`` on."""
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the directory ``path``; ``RunDirectoryError`` if another process holds it.

    The operating system drops the lock when the process ends, however it ends.
    """
    try:
        file = (path / LOCK).open("a+")
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise RunDirectoryError(f"{path}: another process works here (process {holder})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
