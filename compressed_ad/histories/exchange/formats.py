"""Reads and writes the file formats of other programs.

A *layout* is a name with a reader, a writer or both. A reader (``LAYOUT``) takes a path and returns the tasks
in it as a mapping, which may read each task on access. A writer (``EXPORT``) takes a ``HistoryFile``, a path
and whether it may overwrite it, and returns the path that it wrote.

- ``ancestor``: HDF5 as the research codes of Algorithm Distillation write it. A group for each task, named by
  its index, with ``states``, ``actions``, ``rewards`` and optionally ``next_states``, ``dones``,
  ``optimal_actions`` and ``action_probs``, all (T, stream, ...): time comes first.
- ``npz``: NumPy's own format. Arrays ``<task>/<name>`` named and shaped as in our files, (stream, T, ...); an
  exported file also holds ``tasks``, ``random_return``, ``optimal_return``, ``split/...`` and, as JSON text,
  ``info``.
- ``minari`` is in a file of its own, and the layouts of published data sets are in ``published``.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, one_line
from compressed_ad.files import replacing
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.hdf5 import Group, child, foreign, read, write_array, write_file
from compressed_ad.histories.header import short
from compressed_ad.registry import Registry, takes
from compressed_ad.types import AnyArray, BoolArray, Split

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
    optimal_actions: AnyArray | None = None  # (S, T, ...)
    task: AnyArray | None = None  # (P,) the parameters of the task, as a row of the family's tasks

    def __post_init__(self) -> None:
        shape = self.rewards.shape
        for field in fields(self)[:-1]:
            array, expected = getattr(self, field.name), shape[:1] if field.name == "learner" else shape
            if array is not None and (len(shape) != 2 or array.shape[: len(expected)] != expected):
                got = f"{field.name} have {array.shape} while rewards have {shape}"
                raise HistoryError(f"{got}, counted (stream, time, ...)")
        if (self.terminated is None) != (self.truncated is None):
            raise HistoryError("has one of terminated and truncated without the other")


Reader = Callable[[Path], Mapping[int, Recorded]]
Writer = Callable[[HistoryFile, str | Path, bool, Progress], Path]

_HERE = "compressed_ad.histories.exchange"
_READERS = {
    "ad_eps": "published:read_ad_eps",
    "headless_ad": "published:read_ad_eps",
    "minari": "minari:read_minari",
    "ra_dt": "published:read_ra_dt",
    "xland_100b": "published:read_xland_100b",
}
LAYOUT: Registry[Reader] = Registry(
    "layout", {k: f"{_HERE}.{at}" for k, at in _READERS.items()}, takes("path")
)
_WRITERS = {"ancestor": "formats:write_ancestor", "npz": "formats:write_npz", "minari": "minari:write_minari"}
EXPORT: Registry[Writer] = Registry(
    "export format",
    {k: f"{_HERE}.{at}" for k, at in _WRITERS.items()},
    takes("file", "path", "overwrite", "progress"),
)


Part = tuple[slice, slice]
"""The streams and the steps of a task that are wanted."""
WHOLE: Part = slice(None), slice(None)


class Tasks(Mapping[int, Recorded]):
    """The ``tasks`` of ``path``, and their ``split`` if the file has one.

    ``read`` is called on access with a task and the ``Part`` of it that it is to return.
    """

    def __init__(
        self,
        path: Path,
        tasks: Iterable[int],
        read: Callable[[int, Part], dict[str, AnyArray]],
        split: Split | None = None,
    ) -> None:
        self.path, self.split, self._tasks, self._read = path, split, sorted(tasks), read

    def __iter__(self) -> Iterator[int]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, task: int) -> Recorded:
        return self.part(task, WHOLE)

    def part(self, task: int, part: Part) -> Recorded:
        """What ``self[task]`` holds of some streams and steps; HDF5 reads no more than these."""
        arrays = self._read(task, part)
        for name, array in arrays.items():
            if name not in _WIDE and array.shape[2:] == (1,):
                array = array[..., 0]  # some programs write one number per step as (S, T, 1)
            arrays[name] = array != 0 if name in ("dones", "terminated", "truncated") else array
        try:
            return Recorded(**arrays)
        except HistoryError as error:
            raise HistoryError(f"{self.path}: task {task}: {error}") from error


class Selected(Mapping[int, Recorded]):
    """Of ``tasks`` those in ``only`` (None: all), of each the ``part``; ``HistoryError`` if it has less."""

    def __init__(self, tasks: Mapping[int, Recorded], only: Iterable[int] | None, part: Part) -> None:
        self._tasks, self._part = tasks, part
        self._only = list(tasks) if only is None else sorted(set(only))
        check_tasks(tasks, {"--only": self._only})
        split = getattr(tasks, "split", None)
        parts = () if split is None else (np.intersect1d(ids, self._only) for ids in vars(split).values())
        self.split = None if split is None else Split(*parts)

    def __iter__(self) -> Iterator[int]:
        return iter(self._only)

    def __len__(self) -> int:
        return len(self._only)

    def __getitem__(self, task: int) -> Recorded:
        if isinstance(self._tasks, Tasks):
            found = self._tasks.part(task, self._part)
        else:
            found = self._tasks[task]
            if isinstance(found, Recorded):
                found = Recorded(**cut(vars(found), self._part))
        for what, axis, wanted in (("streams", 0, self._part[0]), ("steps", 1, self._part[1])):
            count = (wanted.stop or 0) - (wanted.start or 0)
            if isinstance(found, Recorded) and found.rewards.shape[axis] < count:
                asked = f"{what} {wanted.start or 0} to {wanted.stop - 1}"
                raise HistoryError(f"task {task} does not have all of the {asked} that --{what} asks for")
        return found


def cut(arrays: Mapping[str, AnyArray | None], part: Part) -> dict[str, AnyArray]:
    """The ``part`` of the fields of ``Recorded`` that are there."""
    axes = {"learner": 1, "task": 0}
    found = {name: array for name, array in arrays.items() if array is not None}
    return {name: array[part[: axes.get(name, 2)][: array.ndim]] for name, array in found.items()}


def task_number(path: Path, name: str) -> int:
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


NEEDED = {"states": "iuf", "actions": "iuf", "rewards": "biuf"}
"""The arrays that every recording has, and the kinds of dtype that each may have."""
_ANCESTOR = {**NEEDED, "next_states": "iuf", "optimal_actions": "iuf", "dones": "biuf", "action_probs": "f"}
_WIDE = ("states", "actions", "next_states", "optimal_actions", "task")
"""The fields that may have several numbers per step."""


@LAYOUT.register("ancestor")
def read_ancestor(path: Path) -> Mapping[int, Recorded]:
    """HDF5 of the AD research codes: a group per task, arrays (time, stream, ...), no split."""
    with foreign(path) as file:
        names = {task_number(path, name): name for name in file}
    if not names:
        raise HistoryError(f"{path}: has no groups '0', '1', ... of tasks")

    def read_task(task: int, part: Part) -> dict[str, AnyArray]:
        arrays = {}
        with foreign(path) as file:
            group = child(file, names[task], Group)
            if "ruleset-id" in group.attrs:
                raise HistoryError(f"{group.name}: has the attribute 'ruleset-id', so streams come first")
            for name, kinds in _ANCESTOR.items():
                if name in NEEDED or name in group:
                    array = read(group, name, kinds, part[::-1])
                    if array.ndim < 2:
                        text = f"expected (time, stream, ...), got shape {array.shape}"
                        raise HistoryError(f"{group.name}/{name}: {text}")
                    arrays[name] = array.swapaxes(0, 1)
        return arrays

    return Tasks(path, names, read_task)


def write_ancestor(file: HistoryFile, path: str | Path, overwrite: bool, progress: Progress) -> Path:
    """HDF5 of the AD research codes: a group per task, arrays (time, stream, ...), no split, no marks."""
    path = check_free(file, path, overwrite)

    def fill(target: Group) -> None:
        for task in file.task_ids.tolist():
            history, group = file.load([task])[task], target.create_group(str(task))
            arrays = {**dict(history.per_step()), "dones": history.episode_end}
            for name in _ANCESTOR:
                if name in arrays:
                    write_array(group, name, arrays[name].swapaxes(0, 1))
            progress(1)

    write_file(path, fill, plain=True)
    return path


@LAYOUT.register("npz")
def read_npz(path: Path) -> Mapping[int, Recorded]:
    """NumPy's npz: arrays <task>/<name>, named and shaped (stream, time, ...) as in our own files."""
    names: dict[int, list[str]] = {}
    with NPZ(path) as file:
        for key in file.keys:
            task, slash, name = key.partition("/")
            if slash and task != "split":
                names.setdefault(task_number(path, task), []).append(name)
        if not names:
            raise HistoryError(f"{path}: has no arrays '<task>/states' and so on")
        split, rows = None, None
        if "info" in file.keys:  # written by us
            split = Split(*(file[f"split/{part.name}"] for part in fields(Split)))
            rows = file["tasks"]
            if rows.ndim != 2 or len(rows) <= max(names):
                raise HistoryError(f"{path}: tasks have shape {rows.shape}; expected a row for each task")

    def read_task(task: int, part: Part) -> dict[str, AnyArray]:
        missing = [name for name in NEEDED if name not in names[task]]
        if missing:
            raise HistoryError(f"{path}: task {task} lacks {', '.join(missing)}")
        with NPZ(path) as file:
            arrays = {f.name: file[f"{task}/{f.name}"] for f in fields(Recorded) if f.name in names[task]}
        return {**cut(arrays, part), **({} if rows is None else {"task": rows[task]})}

    return Tasks(path, names, read_task, split)


class NPZ:
    """An npz file of another program: its ``keys``, and its arrays by key. Nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> NPZ:
        try:
            self._raw = self.path.open("rb")
        except OSError as error:
            raise HistoryError(f"{self.path}: {error.strerror or error}") from error
        try:
            self._file = np.load(self._raw, allow_pickle=False)
        except Exception as error:  # a changed byte can make zipfile and NumPy raise anything
            self._raw.close()
            raise HistoryError(f"{self.path}: is not an npz file") from error
        if not hasattr(self._file, "files"):
            self._raw.close()
            raise HistoryError(f"{self.path}: holds a single array; expected an npz file")
        self.keys: Collection[str] = self._file.files
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()

    def __getitem__(self, key: str) -> AnyArray:
        if key not in self.keys:
            raise HistoryError(f"{self.path}: has no array {key!r}; it has {short(sorted(self.keys))}")
        try:
            array: AnyArray = self._file[key]
        except Exception as error:  # a changed byte can make zipfile and NumPy raise anything
            text = "holds pickled Python objects, which can run code and are never loaded"
            text = text if "pickle" in str(error) else f"cannot be read ({one_line(error)})"
            raise HistoryError(f"{self.path}: {key} {text}") from error
        return array


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

    with (
        replacing(path, error=HistoryError) as target,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name, array in arrays():
            if array is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
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


def other_layouts(path: Path, named: str) -> list[str]:
    """The layouts that read the first task of ``path``; none if the layout ``named`` does."""

    def reads(name: str) -> bool:
        try:
            tasks = LAYOUT[name](path)
            Selected(tasks, None, (slice(1), slice(1)))[next(iter(tasks))]
        except Exception:  # a reader of a user may raise anything
            return False
        return True

    if named not in LAYOUT or reads(named):
        return []
    return [name for name in LAYOUT if name != named and reads(name)]
