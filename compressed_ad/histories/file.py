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

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, SplitError
from compressed_ad.files import locked
from compressed_ad.histories import hdf5, header as head
from compressed_ad.histories.columns import COLUMNS, OPTIONAL, check_history
from compressed_ad.histories.hdf5 import Group, child, opened, read, write_array
from compressed_ad.histories.header import Header, HistoryInfo, short
from compressed_ad.marking.apply import REQUIRED, mark_task, marker_name, marker_parameters
from compressed_ad.marking.markers import Marker
from compressed_ad.marking.statistics import MarkingStatistics, marking_statistics, total_marking
from compressed_ad.types import (
    AnyArray,
    History,
    IntArray,
)

__all__ = ["HistoryFile", "HistoryInfo", "remark"]


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
        check_history(f"{self.path}: task {task}", history, self.info)
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
