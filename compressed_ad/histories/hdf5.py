"""HDF5 files written atomically, with a checksum, and read as untrusted input.

The first 512 bytes (HDF5's user block) hold the format version and the SHA-256 of everything after them, so
that damage is found before HDF5 sees it. Files are replaced atomically, because HDF5 leaves no readable file
behind when it is killed. It crashes when the disk is full, so room is reserved before it writes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from compressed_ad.errors import CompressedADError, ConfigError, HistoryError, RunError
from compressed_ad.files import json_object, replacing
from compressed_ad.types import AnyArray

FORMAT_VERSION = 1

Group: TypeAlias = h5py.Group
Dataset: TypeAlias = h5py.Dataset

_BLOCK = 512
_MAGIC = b"compressed_ad history"
_CHUNK_BYTES = 1 << 16
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
_FILTERS |= {h5py.h5z.FILTER_LZF}  # in other programs' files; it cannot expand as much as deflate


def attribute(file: Group, name: str, kind: type) -> Any:
    """The attribute ``name`` of type ``kind``; ``HistoryError`` if it is missing or of another type."""
    value = file.attrs.get(name)
    if not isinstance(value, (int, np.integer) if kind is int else kind):
        raise HistoryError(f"attribute {name!r} is missing or not of type {kind.__name__}")
    return value


def json_attribute(file: Group, name: str) -> dict[str, Any]:
    """The dictionary that the attribute ``name`` holds as JSON."""
    try:
        return json_object(attribute(file, name, str))
    except ValueError as error:
        raise HistoryError(f"attribute {name!r} is not a JSON object ({error})") from error


def child(parent: Group, name: str, kind: type) -> Any:
    """The group or dataset (``kind``) ``name`` of ``parent``, never what lies behind a link."""
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise HistoryError(f"{parent.name}: {name!r} is missing or a link")
    found = parent[name]
    if not isinstance(found, kind):
        raise HistoryError(f"{parent.name}: {name!r} is not a {kind.__name__.lower()}")
    return found


def read(parent: Group, name: str, kinds: str, part: tuple[slice, ...] = ()) -> AnyArray:
    """The array of a dataset with a dtype of ``kinds``, if its stored bytes can hold that many values.

    Only its ``part`` is read from the disk, given as one slice for each of its first dimensions.
    """
    data = child(parent, name, h5py.Dataset)
    if data.dtype.kind not in kinds or data.dtype.itemsize > 8:
        raise HistoryError(f"{data.name}: dtype {data.dtype} is not one of a history file")
    plist = data.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    if data.is_virtual or data.external or not filters <= _FILTERS:
        raise HistoryError(f"{data.name}: is stored in a way that history files never use")
    stored = data.id.get_storage_size()
    if data.size * data.dtype.itemsize > 1100 * stored:  # deflate shrinks by a factor of at most 1032
        raise HistoryError(f"{data.name}: shape {data.shape} does not fit its {stored} stored bytes")
    array: AnyArray = data[part[: data.ndim]]
    return array


@contextmanager
def opened(path: Path, *, check: bool = True, digest: str | None = None) -> Iterator[h5py.File]:
    """An open history file; every error inside becomes a ``HistoryError`` that names ``path``.

    ``check`` verifies the checksum first, which reads the whole file. ``digest`` is the one that the file had
    when it was first opened, and must still have.
    """
    source = _source(path)
    # HDF5 reads the open file, not the path: so it locks nothing, another handle of this process does not
    # matter, and what is read is what was verified, even if the file is replaced meanwhile.
    with source, _named(path, "a history file"):
        stated = _digest_in(path, source)
        if digest is not None and stated != digest:
            what_to_do = "open it again (while a file is in use, mark a copy: --output)"
            raise HistoryError(f"{path}: has changed since it was opened; {what_to_do}")
        source.seek(_BLOCK)
        if check and hashlib.file_digest(source, "sha256").hexdigest() != stated:
            raise HistoryError(f"{path}: is damaged, or was changed by another program (checksum differs)")
        with h5py.File(source, "r") as file:
            if (version := attribute(file, "format_version", int)) != FORMAT_VERSION:
                raise HistoryError(f"format version {version}; this version reads {FORMAT_VERSION}")
            yield file


@contextmanager
def foreign(path: Path) -> Iterator[h5py.File]:
    """An open HDF5 file of another program; every error inside becomes a ``HistoryError``."""
    source = _source(path)
    with source, _named(path, "an HDF5 file"):
        block = _first_block(path, source)
        if block.startswith(_MAGIC):
            raise HistoryError(f"{path}: is a history file of compressed_ad already")
        if not h5py.is_hdf5(path):
            raise HistoryError(f"{path}: is not an HDF5 file")
        with h5py.File(source, "r") as file:
            yield file


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except HistoryError as error:
        if str(error).startswith(str(path)):
            raise
        raise HistoryError(f"{path}: {error}") from error
    except CompressedADError:
        raise
    except MemoryError as error:
        raise HistoryError(f"{path}: does not fit in memory") from error
    # What HDF5 and the conversions of its values raise on files that are not what they seem.
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise HistoryError(f"{path}: cannot be read as {kind} ({error})") from error


def stored_digest(path: Path) -> str:
    """The digest in the user block of a history file, once the block has proved sound."""
    source = _source(path)
    with source, _named(path, "a history file"):
        return _digest_in(path, source)


def _digest_in(path: Path, source: BufferedReader) -> str:
    block = _first_block(path, source)
    if not block.startswith(_MAGIC):
        if block.startswith(b"\x89HDF\r\n\x1a\n"):
            raise HistoryError(f"{path}: is an HDF5 file, but not one of compressed_ad; try: cad import")
        raise HistoryError(f"{path}: is not a history file")
    version, _, rest = block[len(_MAGIC) :].partition(b" sha256 ")
    if version.strip() != str(FORMAT_VERSION).encode():
        stated = version.strip()[:20].decode(errors="replace")
        raise HistoryError(f"{path}: format version {stated}; this version reads {FORMAT_VERSION}")
    digest = rest.rstrip(b"\0\n").decode(errors="replace")
    if block != _block(digest):
        raise HistoryError(f"{path}: is damaged (its first {_BLOCK} bytes)")
    return digest


def _first_block(path: Path, source: BufferedReader) -> bytes:
    if block := source.read(_BLOCK):
        return block
    raise HistoryError(f"{path}: is empty")


def _source(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        inside = sorted(map(str, path.glob("*.hdf5")))
        more = f"; in it lies {inside[0]}" if inside else ""
        raise HistoryError(f"{path}: is a folder, not a history file{more}") from error
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror or error}") from error


def _block(digest: str) -> bytes:
    return f"{_MAGIC.decode()} {FORMAT_VERSION} sha256 {digest}\n".encode().ljust(_BLOCK, b"\0")[:_BLOCK]


def write_file(path: Path, fill: Callable[[h5py.File], None], *, plain: bool = False) -> None:
    """Replace ``path`` atomically by what ``fill`` writes; ``plain`` leaves out our user block.

    ``fill`` adds groups, attributes and small arrays at will, and others with ``write_array`` and ``copy``.
    ``HistoryError`` if it cannot be written, on a full disk for instance; the old file is then untouched.
    """
    with replacing(path, error=HistoryError) as target:
        try:
            _reserve(target.fileno(), _ROOM)  # or HDF5 could not even close what it opens
            # No lock: the open file has one, for the process that cleans up after killed ones.
            with h5py.File(target.name, "w", userblock_size=None if plain else _BLOCK, locking=False) as file:
                make_room(file, 0)
                fill(file)
                file.flush()
                size = file.id.get_filesize()
            target.truncate(size)
            if not plain:
                target.seek(_BLOCK)
                block = _block(hashlib.file_digest(target, "sha256").hexdigest())
                target.seek(0)
                target.write(block)
        except (OSError, RuntimeError, MemoryError, _NoRoomError) as error:
            raise HistoryError(f"{path}: cannot be written ({error}); what was there is untouched") from error


_ROOM = 1 << 20
"""Bytes that HDF5 may write without asking: attributes, small arrays, and its own tables."""


def make_room(file: Group, size: int) -> None:
    """Reserve room on the disk for ``size`` bytes more of data."""
    handle = file.file.id
    _reserve(handle.get_vfd_handle(), handle.get_filesize() + size + size // 64 + _ROOM)  # 1 kB a chunk more


class _NoRoomError(RunError):
    """The disk is full: an error that ``opened`` does not take for one of the file that is read."""


def _reserve(descriptor: int, size: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
            raise _NoRoomError(error.strerror) from error


def write_array(group: Group, name: str, array: AnyArray) -> None:
    """Store ``array`` (S, T, ...) compressed; a chunk holds whole streams, or a stretch of one."""
    make_room(group, array.nbytes)
    if array.size == 0:
        group[name] = array
        return
    step_bytes = array.itemsize * int(np.prod(array.shape[2:]))
    n_step = min(array.shape[1], max(_CHUNK_BYTES // step_bytes, 1))
    n_stream = min(array.shape[0], max(_CHUNK_BYTES // (step_bytes * n_step), 1))
    chunks = (n_stream, n_step, *array.shape[2:])
    # Level 4 takes 1.4 times as long and saves 2 %.
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
    group.create_dataset(name, data=array, chunks=chunks, **options)


def copy(source: Group, name: str, target: Group) -> None:
    """Copy ``name``, a dataset or a group of datasets, as it is stored."""
    found = source[name]
    parts = [found] if isinstance(found, h5py.Dataset) else found.values()
    make_room(target, sum(part.id.get_storage_size() + part.nbytes // 64 for part in parts))
    source.copy(name, target)


def json_text(what: str, value: Any) -> str:
    """``value`` as JSON; ``ConfigError`` naming ``what`` if it is not plain data."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: only plain data can be stored in a history file ({error})") from error
