"""Reads and writes the file formats of other programs.

A *layout* is a name with a reader, a writer or both. A reader (``LAYOUT``) takes a path and returns the tasks
in it as a mapping, which may read each task on access. A writer (``EXPORT``) takes a ``HistoryFile``, a path
and whether it may overwrite it, and returns the path that it wrote.

- ``ancestor``: HDF5 as the research codes of Algorithm Distillation write it. A group for each task, named by
  its index, with ``states``, ``actions``, ``rewards`` and optionally ``next_states``, ``dones`` and
  ``action_probs``, all (T, stream, ...): time comes first.
- ``npz``: NumPy's own format. Arrays ``<task>/<name>`` named and shaped as in our files, (stream, T, ...); an
  exported file also holds ``tasks``, ``random_return``, ``optimal_return``, ``split/...`` and, as JSON text,
  ``info``.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, one_line
from compressed_ad.files import write_atomically
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.hdf5 import Group, child, foreign, read, write_array, write_file
from compressed_ad.histories.header import short
from compressed_ad.registry import Registry, takes
from compressed_ad.types import AnyArray, BoolArray

Progress = Callable[[int], None]
"""Called with the number of tasks done since its last call."""


@dataclass(frozen=True)
class Recorded:
    """One task's learning histories as another program recorded them; None for what it did not record."""

    states: AnyArray  # (S, T, ...)
    actions: AnyArray  # (S, T, ...)
    rewards: AnyArray  # (S, T)
    next_states: AnyArray | None = None  # (S, T, ...) at an episode's end often the state after the reset
    dones: BoolArray | None = None  # (S, T) an episode ended, terminated or truncated
    terminated: BoolArray | None = None  # (S, T) only together with truncated
    truncated: BoolArray | None = None  # (S, T)
    action_probs: AnyArray | None = None  # (S, T)
    update: AnyArray | None = None  # (S, T)
    learner: AnyArray | None = None  # (S,)
    entropy: AnyArray | None = None  # (S, T)
    log_prob_next: AnyArray | None = None  # (S, T)

    def __post_init__(self) -> None:
        shape = self.rewards.shape
        for field in fields(self):
            array, expected = getattr(self, field.name), shape[:1] if field.name == "learner" else shape
            if array is not None and (len(shape) != 2 or array.shape[: len(expected)] != expected):
                got = f"{field.name} have {array.shape} while rewards have {shape}"
                raise HistoryError(f"{got}, counted (stream, time, ...)")
        if (self.terminated is None) != (self.truncated is None):
            raise HistoryError("has one of terminated and truncated without the other")


Reader = Callable[[Path], Mapping[int, Recorded]]
Writer = Callable[[HistoryFile, str | Path, bool, Progress], Path]

LAYOUT: Registry[Reader] = Registry("layout", fits=takes("path"))
_HERE = "compressed_ad.histories.exchange"
_WRITERS = {"ancestor": "formats:write_ancestor", "npz": "formats:write_npz", "minari": "minari:write_minari"}
EXPORT: Registry[Writer] = Registry(
    "export format",
    {k: f"{_HERE}.{at}" for k, at in _WRITERS.items()},
    takes("file", "path", "overwrite", "progress"),
)


class _Tasks(Mapping[int, Recorded]):
    """The ``tasks`` of the file ``path``; ``read`` returns the arrays of one, and is called on access."""

    def __init__(self, path: Path, tasks: Iterable[int], read: Callable[[int], dict[str, AnyArray]]) -> None:
        self._path, self._tasks, self._read = path, sorted(tasks), read

    def __iter__(self) -> Iterator[int]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, task: int) -> Recorded:
        arrays = self._read(task)
        for name, array in arrays.items():
            if name not in ("states", "actions", "next_states") and array.shape[2:] == (1,):
                array = array[..., 0]  # some programs write one number per step as (S, T, 1)
            arrays[name] = array != 0 if name in ("dones", "terminated", "truncated") else array
        try:
            return Recorded(**arrays)
        except HistoryError as error:
            raise HistoryError(f"{self._path}: task {task}: {error}") from error


def _task_number(path: Path, name: str) -> int:
    # One way to write each number: "00" and "٠" would be further names of task 0.
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", name):
        raise HistoryError(f"{path}: {short(name)} is not the index of a task; expected '0', '1', ...")
    return int(name)


def check_free(file: HistoryFile, path: str | Path, overwrite: bool) -> Path:
    """``path``; ``HistoryError`` unless a file may be written there."""
    path = Path(path)
    if path.resolve() == file.path.resolve():
        raise HistoryError(f"{path} is the file that is exported; choose another --out")
    if path.is_dir():
        raise HistoryError(f"{path} is a folder; --out must be the name of a file here")
    if path.exists() and not overwrite:
        raise HistoryError(f"{path} exists; replace it with --overwrite, or choose another --out")
    return path


_NEEDED = {"states": "iuf", "actions": "iuf", "rewards": "biuf"}
_ANCESTOR = {**_NEEDED, "next_states": "iuf"}


@LAYOUT.register("ancestor")
def read_ancestor(path: Path) -> Mapping[int, Recorded]:
    """HDF5 of the AD research codes: a group per task, arrays (time, stream, ...), no split."""
    with foreign(path) as file:
        names = {_task_number(path, name): name for name in file}
    if not names:
        raise HistoryError(f"{path}: has no groups '0', '1', ... of tasks")

    def read_task(task: int) -> dict[str, AnyArray]:
        arrays = {}
        with foreign(path) as file:
            group = child(file, names[task], Group)
            for name, kinds in {**_ANCESTOR, "dones": "biuf", "action_probs": "f"}.items():
                if name in _NEEDED or name in group:
                    array = read(group, name, kinds)
                    if array.ndim < 2:
                        text = f"expected (time, stream, ...), got shape {array.shape}"
                        raise HistoryError(f"{group.name}/{name}: {text}")
                    arrays[name] = array.swapaxes(0, 1)
        return arrays

    return _Tasks(path, names, read_task)


def write_ancestor(file: HistoryFile, path: str | Path, overwrite: bool, progress: Progress) -> Path:
    """HDF5 of the AD research codes: a group per task, arrays (time, stream, ...), no split, no marks."""
    path = check_free(file, path, overwrite)

    def fill(target: Group) -> None:
        for task in file.task_ids.tolist():
            history, group = file.load([task])[task], target.create_group(str(task))
            arrays = {name: getattr(history, name) for name in _ANCESTOR}
            arrays |= {"dones": history.episode_end, "action_probs": history.action_probs}
            for name, array in arrays.items():
                write_array(group, name, array.swapaxes(0, 1))
            progress(1)

    write_file(path, fill, plain=True)
    return path


@LAYOUT.register("npz")
def read_npz(path: Path) -> Mapping[int, Recorded]:
    """NumPy's npz: arrays <task>/<name>, named and shaped (stream, time, ...) as in our own files."""
    names: dict[int, list[str]] = {}
    with _npz(path) as file:
        for key in file.files:
            task, slash, name = key.partition("/")
            if slash and task != "split":
                names.setdefault(_task_number(path, task), []).append(name)
    if not names:
        raise HistoryError(f"{path}: has no arrays '<task>/states' and so on")

    def read_task(task: int) -> dict[str, AnyArray]:
        missing = [name for name in _NEEDED if name not in names[task]]
        if missing:
            raise HistoryError(f"{path}: task {task} lacks {', '.join(missing)}")
        with _npz(path) as file:
            try:
                return {f.name: file[f"{task}/{f.name}"] for f in fields(Recorded) if f.name in names[task]}
            except Exception as error:  # a changed byte can make zipfile and NumPy raise anything
                raise HistoryError(f"{path}: task {task}: cannot be read ({one_line(error)})") from error

    return _Tasks(path, names, read_task)


@contextmanager
def _npz(path: Path) -> Iterator[Any]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror or error}") from error
    with raw:
        try:
            file = np.load(raw, allow_pickle=False)
        except Exception as error:  # as above
            raise HistoryError(f"{path}: is not an npz file") from error
        if not hasattr(file, "files"):
            raise HistoryError(f"{path}: holds a single array; expected an npz file")
        yield file


def write_npz(file: HistoryFile, path: str | Path, overwrite: bool, progress: Progress) -> Path:
    """NumPy's npz: every array of the file as <task>/<name>, its split, tasks and, as JSON text, info."""
    path = check_free(file, path, overwrite)

    def arrays() -> Iterator[tuple[str, AnyArray | None]]:
        for name in ("tasks", "random_return", "optimal_return"):
            yield name, getattr(file, name)
        yield "info", np.array(json.dumps({**asdict(file.info), "marking": file.marking}))
        for part, ids in vars(file.split).items():
            yield f"split/{part}", ids
        for task in file.task_ids.tolist():
            history = file.load([task])[task]
            for name, array in (*history.per_step(), ("learner", history.learner)):
                yield f"{task}/{name}", array
            progress(1)

    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays():
            if array is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    write_atomically(path, image.getvalue(), error=HistoryError)
    return path


def check_tasks(tasks: Iterable[Any], wanted: Mapping[str, Iterable[int]]) -> None:
    """Raise ``HistoryError`` if ``tasks`` are not whole numbers of 0..10^9, or lack one of ``wanted``."""
    there = list(tasks)
    for task in there:
        if isinstance(task, bool) or not isinstance(task, int | np.integer) or not 0 <= task < 10**9:
            raise HistoryError(f"{short(task)} is not the index of a task; expected 0, 1, ...")
    for part, ids in wanted.items():
        if unknown := sorted(set(map(int, ids)) - set(there)):
            raise HistoryError(f"has no task {short(unknown)} ({part}); it has {short(there)}")
