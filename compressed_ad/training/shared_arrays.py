"""Histories as arrays in files that several processes map, so that a machine holds one copy of them.

The arrays lie in a hidden folder beside the history file, or in the folder for temporary files if nothing
can be written there. Its name is a digest of what they are. Each process that uses them holds a shared lock
in the folder, and the last one removes it. What no living process holds was left by one that was killed: it
is never read, and the next process that makes such a folder removes it. So all that is read was written in
full, just now, by a process of this user.

Mapped memory belongs to the operating system: it takes back what is not in use when others need it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from compressed_ad.files import is_at, try_lock
from compressed_ad.training.sequences import COLUMNS, Column, Sequences, from_histories, in_columns
from compressed_ad.types import AnyArray, History

_NAME = ".compressed_ad-{}-{}.arrays"
_LOCK, _WHOLE = ".lock", ".whole"
_INDEX = ("offsets", "task", "learner")


class _Store(dict[str, AnyArray]):
    """The columns of ``Sequences``; once none is left that has it, this process leaves the folder."""


def shared_sequences(
    beside: Path, what: str, histories: Callable[[], Iterable[tuple[int, History]]]
) -> Sequences:
    """``from_histories(histories())`` in files that all processes share that ask for the same ``what``.

    ``what`` tells all that the histories depend on. The files lie beside the file ``beside``. Where none can
    be written, the disk is full, or later histories need a wider dtype than the first, the arrays are in the
    memory of this process alone.
    """
    name = _NAME.format(_digest(what), _digest(_us())[:8])
    for parent in _places(beside):
        with suppress(OSError):
            arrays, lock = _opened(parent / name, lambda folder: _write(folder, histories()))
            store = _Store({column: arrays[column] for column in COLUMNS if column in arrays})
            weakref.finalize(store, _leave, parent / name, lock, os.getpid())
            return Sequences.of(store, *(np.array(arrays[index]) for index in _INDEX))
    return from_histories(histories())


def has_room(beside: Path, size: int) -> bool:
    """Whether ``size`` bytes of arrays can be shared, as far as the disk tells; else they are in memory."""
    return any(os.access(p, os.W_OK) and shutil.disk_usage(p).free > size for p in _places(beside))


def _places(beside: Path) -> tuple[Path, Path]:
    return beside.absolute().parent, Path(tempfile.gettempdir())


def _opened(folder: Path, make: Callable[[Path], None]) -> tuple[dict[str, AnyArray], IO[Any]]:
    """The arrays in ``folder``, made if no process uses it, and the lock that keeps it; or ``OSError``."""
    _clean(folder.parent)
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        _check_owner(folder)
        try:
            lock = (folder / _LOCK).open("a+b")
        except FileNotFoundError:  # the folder was removed just now
            continue
        first = try_lock(lock)
        try:
            if not first:
                fcntl.flock(lock, fcntl.LOCK_SH)  # waits while another process makes them
            if is_at(lock, folder / _LOCK) and (first or (folder / _WHOLE).exists()):
                if first:
                    for left in (folder / _WHOLE, *folder.glob("*.np*")):  # by a process that was killed
                        left.unlink(missing_ok=True)
                    make(folder)
                    (folder / _WHOLE).touch()
                files = {path.stem: path for path in folder.glob("*.npy")}
                arrays = {name: _mapped(path) for name, path in files.items()}
                fcntl.flock(lock, fcntl.LOCK_SH)
                return arrays, lock
        except BaseException:
            if first and is_at(lock, folder / _LOCK):
                _remove(folder)
            lock.close()
            raise
        lock.close()


def _mapped(path: Path) -> AnyArray:
    array: AnyArray = np.load(path, mmap_mode="r")
    return array


def _leave(folder: Path, lock: IO[Any], process: int) -> None:
    """Give up the lock; the last process that does removes the folder. Forked processes only have a copy."""
    if os.getpid() == process:
        with lock:
            if try_lock(lock) and is_at(lock, folder / _LOCK):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder whose lock is ours, first its name: from then on it is no longer found."""
    with suppress(OSError):
        gone = folder.with_name(f"{folder.name}{secrets.token_hex(4)}")
        folder.rename(gone)
        shutil.rmtree(gone)


def _clean(parent: Path) -> None:
    """Remove what killed processes left in ``parent``."""
    for folder in parent.glob(_NAME.format("*", _digest(_us())[:8]) + "*"):
        with suppress(OSError):
            _check_owner(folder)
            _leave(folder, (folder / _LOCK).open("a+b"), os.getpid())


def _us() -> str:
    """The user and the machine: locks of one machine may mean nothing on another that sees the same disk."""
    return f"{os.geteuid()} {os.uname().nodename}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_owner(folder: Path) -> None:
    """``PermissionError`` if ``folder`` is somebody else's, or a link."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        raise PermissionError(f"{folder}: is somebody else's")


def _write(folder: Path, histories: Iterable[tuple[int, History]]) -> None:
    with ExitStack() as opened:

        def column(name: str, values: AnyArray) -> Column:
            file = (folder / f"{name}.npy-part").open("wb", buffering=0)
            return _FileColumn(folder / f"{name}.npy", opened.enter_context(file), values)

        sequences = in_columns(histories, column)
    for name in _INDEX:
        np.save(folder / f"{name}.npy", getattr(sequences, name))


class _WiderError(OSError):
    """A file cannot change the dtype of what it has; an array in memory can."""


class _FileColumn:
    """A ``Column`` in an open file, which is renamed to ``path`` once it is whole."""

    def __init__(self, path: Path, file: FileIO, values: AnyArray) -> None:
        self.path, self.file = path, file
        self.n, self.dtype, self.shape = 0, values.dtype, values.shape[1:]
        self._write_header()
        self.append(values)

    def _write_header(self) -> None:
        about = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.n, *self.shape),
        }
        npy.write_array_header_1_0(
            self.file, about
        )  # has room for another length, so that it can be replaced

    def append(self, values: AnyArray) -> None:
        if not np.can_cast(values.dtype, self.dtype):
            raise _WiderError(f"{self.path.stem} are {values.dtype}, those before {self.dtype}")
        left = np.ascontiguousarray(values, self.dtype).reshape(-1).data.cast("B")
        while left:
            left = left[self.file.write(left) :]
        self.n += len(values)

    def whole(self) -> AnyArray:
        self.file.seek(0)
        self._write_header()
        Path(self.file.name).rename(self.path)
        return _mapped(self.path)
