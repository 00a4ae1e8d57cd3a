"""The history file: learning histories of many tasks, their split and their marks, in one HDF5 file.

    attrs   format_version family family_kwargs spaces horizon learner config seed versions total_steps
            [compressed_steps compression_ratio marker marker_parameters marker_seed marked_at
             on_policy_threshold compression_window]       (dictionaries as JSON)
    /split/{train,validation,heldout}                      task indices
    /tasks (N, P)  /optimal_return (N,)  /random_return (N,)
    /<task index>/{states,actions,rewards,next_states,terminated,truncated,action_probs,update
                   [,entropy,log_prob_next,compression_mask]} (S, T, ...)  and  learner (S,)

The first 512 bytes (HDF5's user block) hold the format and the SHA-256 of everything after them, so that
damage is found before anything is read. Files are built in memory and written aside, synced and renamed:
HDF5 itself neither survives a full disk nor leaves a readable file behind when killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from compressed_ad.errors import CompressedADError, ConfigError, HistoryError
from compressed_ad.markers import Marker
from compressed_ad.marking import (
    REQUIRED,
    MarkingStatistics,
    apply_marker,
    marker_name,
    marker_parameters,
    marking_statistics,
    task_seed,
)
from compressed_ad.spaces import SpaceSpec
from compressed_ad.types import AnyArray, BoolArray, FloatArray, History, IntArray, Split

FORMAT_VERSION = 1

_BLOCK = 512
_MAGIC = b"compressed_ad history"
_FLAGS = ("terminated", "truncated", "compression_mask")
_FLOATS = ("rewards", "action_probs", "entropy", "log_prob_next")
_SPACED = {"states": "observation", "next_states": "observation", "actions": "action"}
_OPTIONAL = ("entropy", "log_prob_next", "compression_mask")
_PER_STEP = (*_SPACED, *_FLOATS, *_FLAGS, "update")
_CHUNK_BYTES = 1 << 16
_DEFLATE_LIMIT = 1100  # deflate cannot shrink anything by more than a factor of 1032
_FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HistoryInfo:
    """What was collected and how: everything that determines the content of a history file."""

    family: str
    family_kwargs: dict[str, Any]
    spaces: dict[str, SpaceSpec]  # "observation" and "action"
    horizon: int
    learner: str
    config: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class _Head:
    """What a history file holds besides the histories; shards hold it too."""

    info: HistoryInfo
    split: Split
    tasks: AnyArray  # (N, P)
    optimal_return: FloatArray | None  # (N,)
    random_return: FloatArray  # (N,)

    def __post_init__(self) -> None:
        count = len(self.tasks)
        for name in ("optimal_return", "random_return"):
            array = getattr(self, name)
            if array is not None and array.shape != (count,):
                raise HistoryError(f"{name}: expected ({count},) as there are tasks, got {array.shape}")
        if self.task_ids[0] < 0 or self.task_ids[-1] >= count:
            raise HistoryError(f"the split names task {self.task_ids[-1]}, but there are only {count} tasks")

    @property
    def task_ids(self) -> IntArray:
        return np.sort(np.concatenate([self.split.train, self.split.validation, self.split.heldout]))

    def plain(self) -> dict[str, Any]:
        """As JSON would give it back, so that a stored head and a new one can be compared."""
        arrays = {
            "split": {name: ids.tolist() for name, ids in vars(self.split).items()},
            "tasks": self.tasks.tolist(),
            "optimal_return": None if self.optimal_return is None else self.optimal_return.tolist(),
            "random_return": self.random_return.tolist(),
        }
        plain: dict[str, Any] = json.loads(_json("info", {**asdict(self.info), **arrays}))
        return plain

    def require(self, path: Path, stored: _Head) -> None:
        """Raise ``HistoryError`` naming every key in which the ``stored`` head of ``path`` differs."""
        old, new = _flat("", stored.plain()), _flat("", self.plain())
        differing = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
        if differing:
            listed = "; ".join(
                f"{k}: {_short(old.get(k))} there, {_short(new.get(k))} asked for" for k in differing
            )
            raise HistoryError(
                f"{path} was collected with another configuration and is left alone ({listed})"
            )

    def write(self, file: h5py.File) -> None:
        info = asdict(self.info)
        file.attrs["format_version"] = FORMAT_VERSION
        for name, value in info.items():
            file.attrs[name] = _json(name, value) if isinstance(value, dict) else value
        file.attrs["versions"] = _json("versions", _versions())
        for name, ids in vars(self.split).items():
            file[f"split/{name}"] = ids
        file["tasks"] = self.tasks
        file["random_return"] = self.random_return
        if self.optimal_return is not None:
            file["optimal_return"] = self.optimal_return

    @classmethod
    def read(cls, file: h5py.File) -> _Head:
        info = HistoryInfo(
            family=_attribute(file, "family", str),
            family_kwargs=_json_attribute(file, "family_kwargs"),
            spaces=_json_attribute(file, "spaces"),
            horizon=int(_attribute(file, "horizon", int)),
            learner=_attribute(file, "learner", str),
            config=_json_attribute(file, "config"),
            seed=int(_attribute(file, "seed", int)),
        )
        if set(info.spaces) != {"observation", "action"}:
            raise HistoryError("attribute 'spaces' does not describe 'observation' and 'action'")
        parts = _child(file, "split", h5py.Group)
        return cls(
            info,
            Split(*(_read(parts, name, "i") for name in ("train", "validation", "heldout"))),
            _read(file, "tasks", "iuf"),
            _read(file, "optimal_return", "f") if "optimal_return" in file else None,
            _read(file, "random_return", "f"),
        )


class HistoryWriter:
    """Collects histories task by task into ``<path>.shards/`` and at last merges them into ``path``.

    ``split``, ``tasks`` (N, P), ``optimal_return`` (N,) or None and ``random_return`` (N,) describe all tasks
    of the family; histories are expected for the tasks of the split. An unfinished or finished collection at
    ``path`` is continued with ``resume``, replaced with ``overwrite``, else refused with ``HistoryError``; so
    is, in spite of ``resume``, one of another configuration. A damaged shard is dropped; ``dropped`` says so.
    """

    def __init__(
        self,
        path: str | Path,
        info: HistoryInfo,
        split: Split,
        tasks: AnyArray,
        optimal_return: AnyArray | None,
        random_return: AnyArray,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.shards = self.path.with_name(self.path.name + ".shards")
        self.dropped: list[str] = []
        optimal = None if optimal_return is None else np.asarray(optimal_return, dtype=np.float64)
        self._head = _Head(
            info, split, np.asarray(tasks), optimal, np.asarray(random_return, dtype=np.float64)
        )
        self._finished = False
        if resume:
            self._finished = self.path.exists() and self._is_mine(self.path)
            self._check_shards()
        elif not overwrite:
            for there, state in ((self.path, "exists"), (self.shards, "holds an unfinished collection")):
                if there.exists():
                    raise HistoryError(f"{there} {state}; resume it, overwrite it, or choose another path")
        elif self.shards.exists():
            shutil.rmtree(self.shards)

    def done_tasks(self) -> set[int]:
        """Indices of the tasks whose histories are safely on disk."""
        if self._finished:
            return set(self._head.task_ids.tolist())
        return {int(shard.stem) for shard in self._shard_files()}

    def append(self, task_id: int, history: History) -> None:
        """Store the histories of one task; when this returns they survive kill -9.

        Raises ``NumericalError`` for NaN or infinity in observations or rewards, ``HistoryError`` for values
        outside the spaces or a full disk.
        """
        if task_id not in self._head.task_ids:
            raise HistoryError(f"{self.path}: task {task_id} is in no part of the split")
        _check_history(f"{self.path}: task {task_id}", history, self._head.info)

        def fill(file: h5py.File) -> None:
            self._head.write(file)
            _write_history(file, task_id, history, self._head)

        self.shards.mkdir(parents=True, exist_ok=True)
        _publish(self.shards / f"{task_id}.h5", _build(self.path, fill))

    def finish(self, marking: Mapping[str, Any] | None = None) -> None:
        """Merge all shards into the final file and remove them.

        ``marking`` is the provenance of masks that the appended histories already carry: ``marker``,
        ``parameters``, ``seed`` and ``time``, as ``HistoryFile.marking`` gives it back.
        """
        if not self._finished:
            missing = sorted(set(self._head.task_ids.tolist()) - self.done_tasks())
            if missing:
                raise HistoryError(
                    f"{self.path}: no histories yet of {len(missing)} tasks: {_short(missing)}"
                )
            _publish(self.path, _build(self.path, lambda file: self._merge(file, marking)))
            self._finished = True
        if self.shards.exists():
            shutil.rmtree(self.shards)

    def _merge(self, file: h5py.File, marking: Mapping[str, Any] | None) -> None:
        self._head.write(file)
        shapes: dict[tuple[int, ...], int] = {}
        masks = []
        for task in self._head.task_ids.tolist():
            with _opened(self.shards / f"{task}.h5") as shard:
                shard.copy(str(task), file)
            group = file[str(task)]
            shapes.setdefault(group["rewards"].shape, task)
            if "compression_mask" in group:
                masks.append(group["compression_mask"][()])
        if len(shapes) > 1:
            raise HistoryError(f"{self.path}: tasks differ in (streams, steps): {shapes}")
        if masks and len(masks) < len(self._head.task_ids):
            raise HistoryError(
                f"{self.path}: only {len(masks)} of {len(self._head.task_ids)} tasks are marked"
            )
        file.attrs["total_steps"] = int(np.prod(next(iter(shapes)))) * len(self._head.task_ids)
        if masks:
            _write_marking(file, marking_statistics(masks), marking)

    def _shard_files(self) -> Iterator[Path]:
        return (shard for shard in self.shards.glob("*.h5") if shard.stem.isdecimal())

    def _is_mine(self, path: Path) -> bool:
        with _opened(path) as file:
            self._head.require(path, _Head.read(file))
        return True

    def _check_shards(self) -> None:
        damaged = []
        for shard in self._shard_files():
            try:
                _verify(shard)
            except HistoryError as error:
                damaged.append((shard, str(error)))
            else:
                self._is_mine(shard)
        for shard, cause in damaged:
            self.dropped.append(f"{cause}: dropped, task {shard.stem} is collected again")
            _log.warning(self.dropped[-1])
            shard.unlink()


def is_complete(path: str | Path, info: HistoryInfo) -> bool:
    """Whether a finished history file of ``info`` stands at ``path``.

    False if there is no file; ``HistoryError`` if there is one that is damaged or of another configuration.
    """
    path = Path(path)
    if not path.exists():
        return False
    with _opened(path) as file:
        stored = _Head.read(file)
    _Head(info, stored.split, stored.tasks, stored.optimal_return, stored.random_return).require(path, stored)
    return True


class HistoryFile:
    """A finished history file, for reading. Opening it verifies its checksum unless ``verify`` is False.

    Every error is a ``HistoryError`` that names file and cause: missing, empty, truncated, changed, foreign,
    of another format version, or of a shape that its size rules out. Nothing in a file is ever executed.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        with _opened(self.path, verify) as file:
            head = _Head.read(file)
            self.versions: dict[str, str] = _json_attribute(file, "versions")
            self.marking = _read_marking(file)
            first = _child(file, str(head.task_ids[0]), h5py.Group)
            self.n_stream, self.n_step = _read(first, "rewards", "f").shape
        self.info, self.split, self.task_ids = head.info, head.split, head.task_ids
        self.tasks, self.optimal_return, self.random_return = (
            head.tasks,
            head.optimal_return,
            head.random_return,
        )

    def load(self, task_ids: Iterable[int] | None = None) -> dict[int, History]:
        """Histories by task index (all tasks if None).

        Observations and actions of discrete spaces have compact dtypes (uint8, int16, ...): cast before
        arithmetic. Raises ``NumericalError`` for NaN or infinity in observations or rewards.
        """
        wanted = self.task_ids.tolist() if task_ids is None else [int(task) for task in task_ids]
        unknown = sorted(set(wanted) - set(self.task_ids.tolist()))
        if unknown:
            raise HistoryError(
                f"{self.path}: has no task {_short(unknown)}; it has {len(self.task_ids)} tasks"
            )
        with _opened(self.path, verify=False) as file:
            return {task: self._load(file, task) for task in wanted}

    def statistics(self) -> MarkingStatistics:
        """Marked steps in all and by tenth of training; ``HistoryError`` if the file is not marked."""
        with _opened(self.path, verify=False) as file:
            return marking_statistics([self._mask(file, task) for task in self.task_ids.tolist()])

    def digest(self) -> str:
        """SHA-256 of the file's content (hex), to name it in the provenance of what is made from it."""
        return _stored_digest(self.path)

    def _load(self, file: h5py.File, task: int) -> History:
        group = _child(file, str(task), h5py.Group)
        arrays = {name: _read(group, name, _kind(name)) for name in _PER_STEP if _present(group, name)}
        history = History(**arrays, learner=_read(group, "learner", "i"))
        if (history.n_stream, history.n_step) != (self.n_stream, self.n_step):
            shapes = f"{(history.n_stream, history.n_step)}, others {(self.n_stream, self.n_step)}"
            raise HistoryError(f"{self.path}: task {task} has (streams, steps) {shapes}")
        _check_history(f"{self.path}: task {task}", history, self.info)
        return history

    def _mask(self, file: h5py.File, task: int) -> BoolArray:
        group = _child(file, str(task), h5py.Group)
        if "compression_mask" not in group:
            raise HistoryError(f"{self.path}: is not marked yet; mark it with: cad mark {self.path}")
        return _read(group, "compression_mask", "b")


def remark(
    path: str | Path,
    marker: str | Marker,
    params: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    output: str | Path | None = None,
    progress: Callable[[int], None] = lambda tasks: None,
) -> MarkingStatistics:
    """Mark every task of a history file anew, from the stored arrays, in place or into ``output``.

    The file is replaced in one step when all is done; until then, and after kill -9, the old one stands.
    ``progress`` is called with the number of tasks done since its last call.
    """
    source, params = HistoryFile(path), dict(params or {})
    if output is not None and Path(output).exists():
        raise HistoryError(f"{output} exists; choose another path")
    defaults = {name: value for name, value in marker_parameters(marker).items() if value is not REQUIRED}
    parameters = {**defaults, **params}
    _json(f"parameters of marker {marker_name(marker)!r}", parameters)
    masks: dict[int, BoolArray] = {}
    for task in source.task_ids.tolist():
        history = source.load([task])[task]
        masks[task] = apply_marker(marker, history, seed=task_seed(seed, task), **params)
        progress(1)
    statistics = marking_statistics(masks.values())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    marking = {"marker": marker_name(marker), "parameters": parameters, "seed": seed, "time": now}

    def fill(file: h5py.File) -> None:
        with _opened(source.path, verify=False) as old:
            for name, value in old.attrs.items():
                if name not in _MARKING_ATTRIBUTES:
                    file.attrs[name] = value
            for name in old:
                if not name.isdecimal():
                    old.copy(name, file)
            for task, mask in masks.items():
                group = file.create_group(str(task))
                for name, value in old[str(task)].attrs.items():
                    group.attrs[name] = value
                for name in old[str(task)]:
                    if name != "compression_mask":
                        old[str(task)].copy(name, group)
                _write_array(group, "compression_mask", mask)
        _write_marking(file, statistics, marking)

    _publish(source.path if output is None else Path(output), _build(source.path, fill))
    return statistics


# ---------------------------------------------------------------- one history


def _dtype(name: str, info: HistoryInfo) -> np.dtype[Any]:
    if name not in _SPACED:
        return np.dtype(np.float32 if name in _FLOATS else np.bool_ if name in _FLAGS else np.int32)
    spec = info.spaces[_SPACED[name]]
    if spec["kind"] == "box":
        return np.dtype(spec["dtype"])
    largest = spec["n"] if spec["kind"] == "discrete" else max(spec["nvec"])
    return np.dtype(np.uint8 if largest <= 1 << 8 else np.int16 if largest <= 1 << 15 else np.int32)


def _kind(name: str) -> str:
    return "f" if name in _FLOATS else "b" if name in _FLAGS else "iuf" if name in _SPACED else "i"


def _present(group: h5py.Group, name: str) -> bool:
    return name not in _OPTIONAL or name in group


def _check_history(where: str, history: History, info: HistoryInfo) -> None:
    history.check_finite(where)
    for name, kind in _SPACED.items():
        array, spec = getattr(history, name), info.spaces[kind]
        if spec["kind"] == "box":
            shape, limit = tuple(spec["shape"]), None
        else:
            limit = np.asarray(spec["n"] if spec["kind"] == "discrete" else spec["nvec"])
            shape = limit.shape
        if array.shape[2:] != shape:
            raise HistoryError(f"{where}: {name} has elements of shape {array.shape[2:]}, the space {shape}")
        if limit is not None and ((array < 0) | (array >= limit)).any():
            place = np.argwhere((array < 0) | (array >= limit))[0]
            raise HistoryError(f"{where}: {name}{place.tolist()} is {array[tuple(place)]}, outside {spec}")
    probs = history.action_probs
    if ((probs < 0) | (probs > 1 + 1e-5)).any():
        raise HistoryError(f"{where}: action_probs reach from {np.nanmin(probs)} to {np.nanmax(probs)}")


def _write_history(file: h5py.File, task: int, history: History, head: _Head) -> None:
    group = file.create_group(str(task))
    group.attrs["task"] = head.tasks[task]
    group.attrs["random_return"] = head.random_return[task]
    if head.optimal_return is not None:
        group.attrs["optimal_return"] = head.optimal_return[task]
    group["learner"] = history.learner.astype(np.int32)
    for name, array in history.per_step():
        _write_array(group, name, array.astype(_dtype(name, head.info), copy=False))


def _write_array(group: h5py.Group, name: str, array: AnyArray) -> None:
    if array.size == 0:
        group[name] = array
        return
    # Whole streams per chunk, or a stretch of one stream: always contiguous in time.
    step_bytes = array.itemsize * int(np.prod(array.shape[2:]))
    n_step = min(array.shape[1], max(_CHUNK_BYTES // step_bytes, 1))
    n_stream = min(array.shape[0], max(_CHUNK_BYTES // (step_bytes * n_step), 1))
    group.create_dataset(
        name,
        data=array,
        chunks=(n_stream, n_step, *array.shape[2:]),
        compression="gzip",
        compression_opts=1,  # level 4 takes 1.4 times as long and saves 2 %
        shuffle=True,
        fletcher32=True,
    )


# ---------------------------------------------------------------- provenance

_MARKING_ATTRIBUTES = (
    *("compressed_steps", "compression_ratio", "marker", "marker_parameters", "marker_seed", "marked_at"),
    *("on_policy_threshold", "compression_window"),
)


def _write_marking(file: h5py.File, statistics: MarkingStatistics, marking: Mapping[str, Any] | None) -> None:
    file.attrs["compressed_steps"] = statistics.compressed_steps
    file.attrs["compression_ratio"] = statistics.compression_ratio
    if marking is None:
        return
    file.attrs["marker"], file.attrs["marker_seed"] = marking["marker"], marking["seed"]
    file.attrs["marker_parameters"] = _json("marker parameters", marking["parameters"])
    file.attrs["marked_at"] = marking["time"]
    for name in ("on_policy_threshold", "compression_window"):
        if name in marking["parameters"]:
            file.attrs[name] = marking["parameters"][name]


def _read_marking(file: h5py.File) -> dict[str, Any] | None:
    if "marker" not in file.attrs:
        return None
    return {
        "marker": _attribute(file, "marker", str),
        "parameters": _json_attribute(file, "marker_parameters"),
        "seed": int(_attribute(file, "marker_seed", int)),
        "time": _attribute(file, "marked_at", str),
    }


def _versions() -> dict[str, str]:
    packages = ("compressed-ad", "numpy", "h5py", "numba", "gymnasium", "torch", "stable-baselines3")
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: only plain data can be stored in a history file ({error})") from error


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(f"{prefix}.{key}" if prefix else key, part)
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- reading with suspicion


def _attribute(file: h5py.File, name: str, kind: type) -> Any:
    value = file.attrs.get(name)
    if not isinstance(value, (int, np.integer) if kind is int else kind):
        raise HistoryError(f"attribute {name!r} is missing or not of type {kind.__name__}")
    return value


def _json_attribute(file: h5py.File, name: str) -> dict[str, Any]:
    value = json.loads(_attribute(file, name, str))
    if not isinstance(value, dict):
        raise HistoryError(f"attribute {name!r} is not a JSON object")
    return value


def _child(parent: h5py.Group, name: str, kind: type) -> Any:
    # A link could lead into another file.
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise HistoryError(f"{parent.name}: {name!r} is missing or a link")
    child = parent[name]
    if not isinstance(child, kind):
        raise HistoryError(f"{parent.name}: {name!r} is not a {kind.__name__.lower()}")
    return child


def _read(parent: h5py.Group, name: str, kinds: str) -> AnyArray:
    """The array of a dataset whose dtype is one of ``kinds``, after checking that its size can be true."""
    data = _child(parent, name, h5py.Dataset)
    if data.dtype.kind not in kinds or data.dtype.itemsize > 8:
        raise HistoryError(f"{data.name}: dtype {data.dtype} is not one of a history file")
    plist = data.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    if data.is_virtual or data.external or not filters <= set(_FILTERS):
        raise HistoryError(f"{data.name}: is stored in a way that history files never use")
    if data.size * data.dtype.itemsize > _DEFLATE_LIMIT * data.id.get_storage_size():
        stored = f"{data.id.get_storage_size()} stored bytes"
        raise HistoryError(f"{data.name}: shape {data.shape} does not fit its {stored}")
    array: AnyArray = data[()]
    return array


@contextmanager
def _opened(path: Path, verify: bool = True) -> Iterator[h5py.File]:
    """An open file of our format; whatever goes wrong inside becomes a ``HistoryError`` naming ``path``."""
    _verify(path, content=verify)
    try:
        # No lock: files are never written in place, and some network file systems cannot lock.
        with h5py.File(path, "r", locking=False) as file:
            version = _attribute(file, "format_version", int)
            if version != FORMAT_VERSION:
                raise HistoryError(f"format version {version}; this version reads {FORMAT_VERSION}")
            yield file
    except HistoryError as error:
        text = str(error)
        raise HistoryError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except CompressedADError:
        raise
    except MemoryError as error:
        raise HistoryError(f"{path}: does not fit in memory") from error
    # What HDF5 and the conversions of its values raise on files that are not what they seem.
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise HistoryError(f"{path}: cannot be read as a history file ({error})") from error


def _stored_digest(path: Path) -> str:
    """The digest that the user block states, after checking that the block is ours."""
    try:
        with path.open("rb") as file:
            block = file.read(_BLOCK)
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror or error}") from error
    if not block:
        raise HistoryError(f"{path}: is empty")
    if not block.startswith(_MAGIC):
        if h5py.h5f.is_hdf5(os.fsencode(path)):
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


def _verify(path: Path, content: bool = True) -> None:
    stated = _stored_digest(path)
    if not content:
        return
    with path.open("rb") as file:
        file.seek(_BLOCK)
        if hashlib.file_digest(file, "sha256").hexdigest() != stated:
            raise HistoryError(f"{path}: is damaged, or was changed by another program (checksum differs)")


# ---------------------------------------------------------------- writing


def _block(digest: str) -> bytes:
    return f"{_MAGIC.decode()} {FORMAT_VERSION} sha256 {digest}\n".encode().ljust(_BLOCK, b"\0")[:_BLOCK]


def _build(path: Path, fill: Callable[[h5py.File], None]) -> bytes:
    """What follows the user block in the file that ``fill`` writes; ``path`` is for messages only."""
    try:
        with h5py.File(
            "memory", "w", driver="core", backing_store=False, block_size=1 << 22, userblock_size=_BLOCK
        ) as file:
            fill(file)
            file.flush()
            image: bytes = file.id.get_file_image()
    except (OSError, RuntimeError, MemoryError) as error:
        raise HistoryError(f"{path}: cannot be written ({error})") from error
    return image


def _publish(path: Path, image: bytes) -> None:
    """Make user block and ``image`` the file at ``path``, in one step that survives a crash."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(_block(hashlib.sha256(image).hexdigest()))
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise HistoryError(
            f"{path}: cannot be written ({error.strerror or error}); what was there is untouched"
        ) from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
