"""The history file: learning histories of many tasks, their split and their marks, in one HDF5 file.

    attrs   format_version family family_kwargs spaces horizon learner config seed versions total_steps
            [compressed_steps compression_ratio marker marker_parameters marker_seed marked_at
             on_policy_threshold compression_window]       (dictionaries as JSON)
    /split/{train,validation,heldout}                      task indices
    /tasks (N, P)  /optimal_return (N,)  /random_return (N,)
    /scales/{reward[,observation_mean,observation_std]}    of the training tasks: see ``header.Scales``
    /<task index>/{states,actions,rewards,next_states,terminated,truncated,action_probs,update
                   [,entropy,log_prob_next,optimal_actions,compression_mask]} (S, T, ...)  and  learner (S,)

``hdf5`` has the checksum and the rules of reading.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, NumericalError, SplitError
from compressed_ad.files import locked
from compressed_ad.histories import hdf5, header as head
from compressed_ad.histories.hdf5 import Group, child, opened, read, write_array
from compressed_ad.histories.header import Header, HistoryInfo, short
from compressed_ad.marking.apply import REQUIRED, mark_task, marker_name, marker_parameters
from compressed_ad.marking.markers import Marker
from compressed_ad.marking.statistics import MarkingStatistics, marking_statistics, total_marking
from compressed_ad.types import (
    AnyArray,
    History,
    IntArray,
    SpaceSpec,
    Split,
    shape_of,
    sizes,
    starts,
)

__all__ = ["HistoryFile", "HistoryInfo", "HistoryWriter", "remark"]

COLUMNS: Mapping[str, str | type[np.generic]] = {
    "states": "observation",
    "next_states": "observation",
    "actions": "action",
    "optimal_actions": "action",
    "rewards": np.float32,
    "action_probs": np.float32,
    "entropy": np.float32,
    "log_prob_next": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "compression_mask": np.bool_,
    "update": np.int32,
}
"""The stored arrays (S, T, ...) of ``History``: the dtype of each, or the space that it has elements of."""
OPTIONAL = tuple(field.name for field in fields(History) if field.default is None)


class HistoryWriter:
    """Collects histories task by task in ``<path>.shards/``, and finally merges them into ``path``.

    ``split``, ``tasks`` (N, P), ``optimal_return`` (N,) or None and ``random_return`` (N,) describe all tasks
    of the family; histories are expected for the tasks of the split. A collection that exists at ``path``,
    finished or not, is continued with ``resume`` and replaced with ``overwrite``; otherwise it is refused
    with ``HistoryError``. The old file stays until the new one is whole, and ``resume`` continues an
    ``overwrite`` that was interrupted. ``resume`` also refuses a collection of another configuration. It
    drops damaged shards and lists them in ``dropped``.
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
        self._shape: tuple[int, int] | None = None  # (streams, steps) of the tasks on disk
        optimal = None if optimal_return is None else np.asarray(optimal_return, dtype=np.float64)
        random = np.asarray(random_return, dtype=np.float64)
        self._header = Header(info, split, np.asarray(tasks), optimal, random)
        if optimal is not None and np.isnan(optimal).any():  # an unknown optimum is None
            raise HistoryError(f"{info.family}: optimal_return of task {np.isnan(optimal).argmax()} is nan")
        self._plain = self._header.plain()
        self._finished = resume and self.path.exists() and not self._replacing()
        if resume:
            if self._finished:
                with opened(self.path) as file:
                    self._require_same_header(self.path, file)
            damaged = []
            for shard in self._shard_files():
                try:
                    with opened(shard) as file:
                        self._require_same_header(shard, file)
                except _OtherHeaderError:
                    raise
                except HistoryError as error:
                    damaged.append((shard, str(error)))
            for shard, cause in damaged:
                self.dropped.append(f"{cause}: dropped, task {shard.stem} is collected again")
                logging.getLogger(__name__).warning(self.dropped[-1])
                shard.unlink()
        elif not overwrite:
            for existing, state in ((self.path, "exists"), (self.shards, "holds an unfinished collection")):
                if existing.exists():
                    raise HistoryError(f"{existing} {state}; resume it, overwrite it, or choose another path")
        elif self.shards.exists():
            shutil.rmtree(self.shards)

    def __repr__(self) -> str:
        done, wanted = len(self.done_tasks()), len(self._header.task_ids)
        return f"<HistoryWriter {self.path}: {done} of {wanted} tasks of {self._header.info.family} stored>"

    def done_tasks(self) -> set[int]:
        """Indices of the tasks whose histories are on disk."""
        if self._finished:
            return set(self._header.task_ids.tolist())
        return {int(shard.stem) for shard in self._shard_files()}

    def append(self, task_id: int, history: History) -> None:
        """Store the histories of one task. They survive kill -9 once this has returned.

        Raises ``NumericalError`` for NaN or infinity in observations or rewards, ``HistoryError`` for values
        outside the spaces or a full disk.
        """
        if task_id not in self._header.task_ids:
            raise HistoryError(f"{self.path}: task {task_id} is in no part of the split")
        where = f"{self.path}: task {task_id}"
        _check_history(where, history, self._header.info)
        other = next((shard for shard in self._shard_files() if shard.stem != str(task_id)), None)
        if other is not None:
            if self._shape is None:
                with opened(other, check=False) as shard:
                    self._shape = child(shard, other.stem, Group)["rewards"].shape
            if history.rewards.shape != self._shape:
                got = f"(streams, steps) {history.rewards.shape}, task {other.stem} has {self._shape}"
                raise HistoryError(f"{where} has {got}; all tasks of a file must have the same")

        def fill(file: Group) -> None:
            self._header.write(file)
            group = file.create_group(str(task_id))
            group.attrs["task"] = self._header.tasks[task_id]
            group.attrs["random_return"] = self._header.random_return[task_id]
            if self._header.optimal_return is not None:
                group.attrs["optimal_return"] = self._header.optimal_return[task_id]
            group["learner"] = history.learner.astype(np.int32)
            for name, array in history.per_step():
                write_array(group, name, array.astype(_dtype(name, self._header.info.spaces), copy=False))

        hdf5.write_file(self.shards / f"{task_id}.h5", fill)

    def finish(self, marking: Mapping[str, Any] | None = None) -> None:
        """Merge all shards into the final file and remove them.

        ``marking`` is the provenance of the masks that the appended histories carry, as
        ``HistoryFile.marking`` returns it: ``marker``, ``parameters``, ``seed`` and ``time``. If only some
        histories carry a mask, these masks are left out, and the file counts as not marked.
        """
        if not self._finished:
            missing = sorted(set(self._header.task_ids.tolist()) - self.done_tasks())
            if missing:
                raise HistoryError(f"{self.path}: no histories yet of {len(missing)} tasks: {short(missing)}")
            hdf5.write_file(self.path, lambda file: self._merge(file, marking))
            self._finished = True
        if self.shards.exists():
            shutil.rmtree(self.shards)

    def _merge(self, file: Group, marking: Mapping[str, Any] | None) -> None:
        self._header.write(file)
        tasks = self._header.task_ids.tolist()
        shapes: dict[tuple[int, ...], int] = {}
        for task in tasks:
            path = self.shards / f"{task}.h5"
            with opened(path) as shard:
                self._require_same_header(path, shard)
                hdf5.copy(shard, str(task), file)
            shapes.setdefault(file[str(task)]["rewards"].shape, task)
        if len(shapes) > 1:
            raise HistoryError(f"{self.path}: tasks differ in (streams, steps): {shapes}")
        training = [file[str(task)] for task in self._header.split.train.tolist()]
        scales = head.measure_scales(training, self._header.info.spaces["observation"])
        for name, value in vars(scales).items():
            if value is not None:
                file[f"{head.SCALES}/{name}"] = value
        file.attrs["total_steps"] = int(np.prod(next(iter(shapes)))) * len(tasks)
        marked = [file[str(task)] for task in tasks if "compression_mask" in file[str(task)]]
        if len(marked) == len(tasks):
            statistics = marking_statistics(group["compression_mask"][()] for group in marked)
            head.write_marking(file, statistics, marking)
        else:
            for group in marked:
                del group["compression_mask"]

    def _shard_files(self) -> Iterator[Path]:
        return (shard for shard in self.shards.glob("*.h5") if shard.stem.isdecimal())

    def _replacing(self) -> bool:
        """Whether the finished file is to be replaced by shards that were begun after it."""
        newest = max((shard.stat().st_mtime_ns for shard in self._shard_files()), default=0)
        return newest > self.path.stat().st_mtime_ns

    def _require_same_header(self, path: Path, file: Group) -> None:
        differing = head.differences(Header.read(file).plain(), self._plain)
        if differing:
            raise _OtherHeaderError(
                f"{path} was collected with another configuration and is left alone ({'; '.join(differing)})"
            )


class _OtherHeaderError(HistoryError):
    """A file of another configuration."""


class HistoryFile:
    """A finished history file, for reading.

    What it reads belongs together: once the file has changed, every later read is a ``HistoryError``.

    Opening it verifies its checksum. ``verify=False`` skips that; use it only for a file that was just
    written or verified, because HDF5 itself may crash on damaged metadata. ``digest`` is that of an earlier
    opening, if the file must not have changed since.

    Raises ``HistoryError``, naming file and cause, for a file that is missing, empty, truncated, changed,
    foreign, of another format version, or of a shape that its size rules out. Nothing in it is executed.
    """

    def __init__(self, path: str | Path, *, verify: bool = True, digest: str | None = None) -> None:
        self.path = Path(path)
        self._digest = hdf5.stored_digest(self.path) if digest is None else digest
        with self.opened(check=verify) as file:
            header = Header.read(file)
            if verify:
                head.refuse_copies(file, header.split)
            self.versions: dict[str, str] = hdf5.json_attribute(file, "versions")
            self.marking = head.read_marking(file)
            shape = read(child(file, str(header.task_ids[0]), Group), "rewards", "f").shape
        if len(shape) != 2 or 0 in shape:
            raise HistoryError(f"{self.path}: rewards: expected (stream, time), got shape {shape}")
        self.n_stream, self.n_step = shape
        self.info, self.split, self.task_ids = header.info, header.split, header.task_ids
        self.tasks, self.optimal_return = header.tasks, header.optimal_return
        self.random_return = header.random_return

    def heldout_tasks(self) -> IntArray:
        """Indices (N,) of the held-out tasks; ``SplitError`` if there are none."""
        if not len(self.split.heldout):
            raise SplitError(f"{self.path}: holds no held-out task, so nothing can be evaluated on it")
        return self.split.heldout

    @property
    def threshold(self) -> float | None:
        """The threshold of the probability that the marker used, if it has one."""
        found = (self.marking or {}).get("parameters", {}).get("on_policy_threshold")
        return found if isinstance(found, int | float) else None

    def __repr__(self) -> str:
        marked = "no marker" if self.marking is None else f"marked by {self.marking['marker']}"
        return (
            f"<HistoryFile {self.path.name}: {len(self.task_ids)} tasks of {self.info.family},"
            f" {self.n_stream} streams x {self.n_step} steps of {self.info.learner}, {marked}>"
        )

    def opened(self, *, check: bool = False) -> AbstractContextManager[Group]:
        """The open HDF5 file, if it is still the one that was opened first."""
        return opened(self.path, check=check, digest=self._digest)

    def load(self, task_ids: Iterable[int] | None = None) -> dict[int, History]:
        """Histories by task index; all tasks if ``task_ids`` is None: see ``each``."""
        return dict(self.each(task_ids))

    def each(self, task_ids: Iterable[int] | None = None) -> Iterator[tuple[int, History]]:
        """Task indices and histories, read one by one; all tasks if ``task_ids`` is None.

        Observations and actions of discrete spaces have compact dtypes (uint8, int16, ...): cast before
        arithmetic. Raises ``NumericalError`` for NaN or infinity in observations or rewards.
        """
        chosen = self.task_ids.tolist() if task_ids is None else [int(task) for task in task_ids]
        unknown = sorted(set(chosen) - set(self.task_ids.tolist()))
        if unknown:
            has = f"it has {len(self.task_ids)} tasks"
            raise HistoryError(f"{self.path}: has no task {short(unknown)}; {has}")
        with self.opened() as file:
            for task in chosen:
                yield task, self._load(file, task)

    def statistics(self) -> MarkingStatistics:
        """Marked steps in all and by tenth of training; ``HistoryError`` if the file is not marked."""

        def masks(file: Group) -> Iterator[AnyArray]:
            for task in self.task_ids.tolist():
                group = child(file, str(task), Group)
                if "compression_mask" not in group:
                    raise HistoryError(f"is not marked yet; mark it with: cad mark {self.path}")
                yield read(group, "compression_mask", "b")

        with self.opened() as file:
            return marking_statistics(masks(file))

    def n_episode(self, task_ids: Iterable[int]) -> int:
        """The number of episodes of these tasks; the last one of a stream counts if it is not finished."""
        count = 0
        with self.opened() as file:
            for task in task_ids:
                group = child(file, str(task), Group)
                ended = read(group, "terminated", "b") | read(group, "truncated", "b")
                count += int(ended.sum() + (~ended[:, -1]).sum())
        return count

    def training_scales(self, *, stored: bool = True) -> head.Scales:
        """The scales that models standardise by: the ``stored`` ones if there are any, else measured."""
        with self.opened() as file:
            if stored and head.SCALES in file:
                group, names = child(file, head.SCALES, Group), ("observation_mean", "observation_std")
                mean, std = (read(group, name, "f") if name in group else None for name in names)
                return head.Scales(mean, std, float(read(group, "reward", "f")))
            training = (child(file, str(task), Group) for task in self.split.train.tolist())
            return head.measure_scales(training, self.info.spaces["observation"])

    def digest(self) -> str:
        """SHA-256 of the file's content (hex), for the provenance of results."""
        with self.opened():
            return self._digest

    def _load(self, file: Group, task: int) -> History:
        group = child(file, str(task), Group)
        arrays = {
            name: read(group, name, "iuf" if isinstance(column, str) else np.dtype(column).kind)
            for name, column in COLUMNS.items()
            if name not in OPTIONAL or name in group
        }
        for name, array in arrays.items():
            if not isinstance(COLUMNS[name], str) and array.dtype != COLUMNS[name]:
                kind = np.dtype(COLUMNS[name]).name
                raise HistoryError(f"{self.path}: task {task}: {name} of dtype {array.dtype}, not {kind}")
        history = History(**arrays, learner=read(group, "learner", "i"))
        if (history.n_stream, history.n_step) != (self.n_stream, self.n_step):
            shapes = f"{(history.n_stream, history.n_step)}, others {(self.n_stream, self.n_step)}"
            raise HistoryError(f"{self.path}: task {task} has (streams, steps) {shapes}")
        _check_history(f"{self.path}: task {task}", history, self.info)
        return history


def remark(
    path: str | Path,
    marker: str | Marker,
    params: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    output: str | Path | None = None,
    progress: Callable[[int], None] = lambda tasks: None,
) -> MarkingStatistics:
    """Replace the marks of a history file by those of ``marker``, in place or into the new file ``output``.

    The file is replaced atomically once all tasks are marked: after kill -9 the old one is whole.
    ``progress`` is called with the number of tasks done since its last call.
    """
    source, target, params = HistoryFile(path), Path(path if output is None else output), dict(params or {})
    marked = list[MarkingStatistics]()

    def fill(file: Group) -> None:
        with source.opened() as old:
            for name, value in old.attrs.items():
                if name not in head.MARKING_ATTRIBUTES:
                    file.attrs[name] = value
            for name in old:
                if not name.isdecimal():
                    hdf5.copy(old, name, file)
            for task, history in source.each():
                mask = mark_task(marker, history, task, seed=seed, **params)
                marked.append(marking_statistics([mask]))
                group = file.create_group(str(task))
                for name, value in old[str(task)].attrs.items():
                    group.attrs[name] = value
                for name in old[str(task)]:
                    if name != "compression_mask":
                        hdf5.copy(old[str(task)], name, group)
                write_array(group, "compression_mask", mask)
                progress(1)
        head.write_marking(file, total_marking(marked), marking)

    with locked(target, file=True, error=HistoryError):
        if output is not None and target.exists():
            raise HistoryError(f"{output} exists; choose another path")
        marking = marking_provenance(marker, params, seed)
        hdf5.write_file(target, fill)
    return total_marking(marked)


def marking_provenance(marker: str | Marker, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What a history file states of its marks; ``ConfigError`` if the parameters are not plain data."""
    defaults = {name: value for name, value in marker_parameters(marker).items() if value is not REQUIRED}
    parameters = {**defaults, **params}
    hdf5.json_text(f"parameters of marker {marker_name(marker)!r}", parameters)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"marker": marker_name(marker), "parameters": parameters, "seed": seed, "time": now}


def transition_bytes(spaces: Mapping[str, SpaceSpec]) -> int:
    """Bytes that the arrays of a history have for each transition, at most."""
    size = {name: int(np.prod(shape_of(spec))) for name, spec in spaces.items()}
    return sum(
        _dtype(name, spaces).itemsize * (size[column] if isinstance(column, str) else 1)
        for name, column in COLUMNS.items()
    )


def _dtype(name: str, spaces: Mapping[str, SpaceSpec]) -> np.dtype[Any]:
    column = COLUMNS[name]
    if not isinstance(column, str):
        return np.dtype(column)
    spec = spaces[column]
    if spec["kind"] == "box":
        # Models compute in float32: they would not see the other half of the bytes.
        return np.dtype(np.float32 if spec["dtype"] == "float64" else spec["dtype"])
    low, high = _limits(spec)
    for small in (np.uint8, np.int16):
        if np.iinfo(small).min <= low.min() and high.max() <= np.iinfo(small).max:
            return np.dtype(small)
    return np.dtype(np.int32)


def _check_history(where: str, history: History, info: HistoryInfo) -> None:
    """Raise ``HistoryError`` or ``NumericalError`` unless the file can hold ``history`` without loss."""
    history.check_finite(where)
    for name, column in COLUMNS.items():
        if not isinstance(column, str):
            continue
        array, spec = getattr(history, name), info.spaces[column]
        if array is None:
            continue
        box, shape = spec["kind"] == "box", shape_of(spec)
        dtype = _dtype(name, info.spaces) if box else np.dtype(np.int64)
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise HistoryError(f"{where}: {name} of dtype {array.dtype} does not fit the space {spec}")
        if array.shape[2:] != shape:
            raise HistoryError(f"{where}: {name} has elements of shape {array.shape[2:]}, the space {shape}")
        if box and array.dtype.itemsize <= dtype.itemsize:
            continue
        if box:
            most: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
            low, high = most.min, most.max
        else:
            low, high = _limits(spec)
        outside = (array < low) | (array > high)
        if outside.any():
            place = np.argwhere(outside)[0]
            raise HistoryError(f"{where}: {name}{place.tolist()} is {array[tuple(place)]}, outside {spec}")
    most = float(np.abs(history.rewards).max(initial=0))
    if most * info.horizon > head.LARGEST_RETURN:
        raise NumericalError(f"{where}: rewards reach {most:g}: returns would be beyond float32; scale them")
    if (history.learner < 0).any() or (history.update < 0).any():
        raise HistoryError(f"{where}: learner and update are numbers from 0 on")
    probs = history.action_probs
    if ((probs < 0) | (probs > 1 + 1e-5)).any():
        raise HistoryError(f"{where}: action_probs reach from {np.nanmin(probs)} to {np.nanmax(probs)}")


def _limits(spec: SpaceSpec) -> tuple[AnyArray, AnyArray]:
    """Minimum and maximum of each component of a Discrete or MultiDiscrete space."""
    low = np.asarray(starts(spec)).reshape(shape_of(spec))
    return low, low + np.asarray(sizes(spec)).reshape(low.shape) - 1
