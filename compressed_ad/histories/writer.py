"""Writing a history file: task by task, kept in shards until all are there, then merged into one file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError
from compressed_ad.files import write_atomically
from compressed_ad.histories import hdf5, header as head
from compressed_ad.histories.columns import check_history, stored_dtype
from compressed_ad.histories.hdf5 import Group, child, opened, write_array
from compressed_ad.histories.header import Header, HistoryInfo, short
from compressed_ad.marking.statistics import marking_statistics
from compressed_ad.types import AnyArray, History, Split


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
        self._replaces = self.shards / "replaces"  # tells of the collection that shall replace the file
        self.dropped: list[str] = []
        self._shape: tuple[int, int] | None = None  # (streams, steps) of the tasks on disk
        optimal = None if optimal_return is None else np.asarray(optimal_return, dtype=np.float64)
        random = np.asarray(random_return, dtype=np.float64)
        self._header = Header(info, split, np.asarray(tasks), optimal, random)
        if optimal is not None and np.isnan(optimal).any():  # an unknown optimum is None
            raise HistoryError(f"{info.family}: optimal_return of task {np.isnan(optimal).argmax()} is nan")
        self._plain = self._header.plain()
        self._told = hashlib.sha256(json.dumps(self._plain, sort_keys=True).encode()).hexdigest().encode()
        replacing = self._replaces.exists() and self._replaces.read_bytes() == self._told
        self._finished = resume and self.path.exists() and not replacing
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
        else:
            if self.shards.exists():
                shutil.rmtree(self.shards)
            if self.path.exists():
                write_atomically(self._replaces, self._told, error=HistoryError)

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
        check_history(where, history, self._header.info)
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
                write_array(
                    group, name, array.astype(stored_dtype(name, self._header.info.spaces), copy=False)
                )

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
        self._replaces.unlink(missing_ok=True)  # before the shards, which are complete with it
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

    def _require_same_header(self, path: Path, file: Group) -> None:
        differing = head.differences(Header.read(file).plain(), self._plain)
        if differing:
            raise _OtherHeaderError(
                f"{path} was collected with another configuration and is left alone ({'; '.join(differing)})"
            )


class _OtherHeaderError(HistoryError):
    """A file of another configuration."""
