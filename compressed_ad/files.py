"""Files that at every moment are absent, the old or the whole new content; locks, strict JSON, digests."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

import numpy as np

from compressed_ad.errors import RunDirectoryError, RunError

LOCK = ".lock"
_LEFTOVER = re.compile(r"\..+\.(\d{1,9})-[0-9a-f]{8}\.partial")


def write_atomically(path: Path, *content: bytes, error: type[RunError] = RunError) -> None:
    """Replace ``path`` by ``content`` in one step that survives a crash; ``error`` if that fails.

    A link stays, and what it points to is replaced. Group and permissions of the old file are kept.
    """
    with replacing(path, error=error) as file:
        for part in content:
            file.write(part)


@contextmanager
def replacing(path: Path, *, error: type[RunError] = RunError) -> Iterator[BufferedRandom]:
    """``write_atomically`` of what is written inside to the file that this yields; its ``name`` is a path."""
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    state = "what was there is untouched"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target.parent)
        with aside.open("x+b") as file:
            try_lock(file)  # tells others that its writer lives
            yield file
            file.flush()
            with suppress(FileNotFoundError, PermissionError):  # some file systems have one mode for all
                old = target.stat()
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
                os.fchown(file.fileno(), -1, old.st_gid)
            os.fsync(file.fileno())
        aside.replace(target)
        state = "it is written, but may not survive a power failure"
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as cause:
        with suppress(OSError):
            aside.unlink()
        if isinstance(cause, OSError):
            raise error(f"{path}: cannot be written ({cause.strerror or cause}); {state}") from cause
        raise


def _clean(folder: Path) -> None:
    """Remove what killed writers left in ``folder``: files whose process is gone and that nobody holds."""
    for path in folder.iterdir():
        if (found := _LEFTOVER.fullmatch(path.name)) and not lives(int(found[1])):
            with suppress(OSError), path.open("r+b") as file:
                if try_lock(file):
                    path.unlink()


def lives(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def try_lock(file: IO[Any]) -> bool:
    """Whether the lock of ``file`` is ours now; False if it is another's, or files cannot be locked here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_free(folder: Path, file: str, parts: Sequence[str] = ()) -> bool:
    """Whether output may go to ``folder``: it is not there, it has ``file``, or it is begun output.

    Begun output, of a process that was killed, has hidden files, ``parts`` in the order in which they are
    written, and nothing else.
    """
    if not folder.exists() or (folder / file).exists():
        return True
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else {""}
    return names == set(parts[: len(names)])


def chained(row: Mapping[str, Any], before: str) -> str:
    """A digest of ``row`` and of the one ``before`` it: no line of a log can change or go unnoticed."""
    return hashlib.sha256(f"{before}{json.dumps(row)}".encode()).hexdigest()[:12]


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


def json_object(text: str) -> dict[str, Any]:
    """The dictionary that ``text`` is as strict JSON; ``ValueError`` for NaN and infinity, too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    value = json.loads(text, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def file_digest(path: Path, start: int = 0) -> str:
    """SHA-256 of the bytes of ``path`` from ``start`` on."""
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, file: bool = False, error: type[RunError] = RunDirectoryError) -> Iterator[None]:
    """Hold the lock of the folder ``path``, which is made if missing; ``error`` if another process does.

    With ``file``, ``path`` is a file, there or not. The operating system drops the lock when the process
    ends, however it ends.
    """
    target = Path(os.path.realpath(path))
    lock = target.with_name(f".{target.name}{LOCK}") if file else target / LOCK
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            opened = lock.open("a+b", buffering=0)
        except OSError as cause:
            raise error(f"{path}: cannot be written to ({cause.strerror})") from cause
        with opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                opened.seek(0)
                holder = opened.read(20).strip().decode(errors="replace") or "unknown"
                raise error(f"{path}: another process works here (process {holder})") from None
            except OSError as cause:
                raise error(f"{path}: cannot be locked ({cause.strerror})") from cause
            if not is_at(opened, lock):  # its holder has removed it since it was opened
                continue
            try:
                with suppress(OSError):  # on a full disk the lock holds, too
                    opened.truncate(0)
                    opened.write(str(os.getpid()).encode())
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
            return


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether ``path`` is still the open ``file``."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
