"""Writes what you recorded yourself, with the callback for Stable-Baselines3 say, to a history file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compressed_ad.errors import HistoryError, UsageError
from compressed_ad.files import locked
from compressed_ad.histories.file import HistoryFile, HistoryInfo, marking_provenance
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.learners.conformance import first_stream_problem
from compressed_ad.marking.apply import mark_task
from compressed_ad.marking.markers import Marker
from compressed_ad.tasks.base import family_specs
from compressed_ad.tasks.select import make_family
from compressed_ad.tasks.split import split_family
from compressed_ad.types import History, Split


class Recording(Protocol):
    """A ``CompressedHistoryCallback`` that has recorded a run."""

    on_policy_threshold: float
    compression_window: int

    def history(self) -> History:
        """What it has recorded."""


def save_histories(
    recorded: Mapping[int, Recording | History],
    path: str | Path,
    *,
    family: str,
    family_kwargs: Mapping[str, Any] | None = None,
    learner: str,
    config: Mapping[str, Any] | None = None,
    split: Split | None = None,
    validation: int | None = None,
    heldout: int | None = None,
    marker: str | Marker | None = "threshold",
    marker_params: Mapping[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> HistoryFile:
    """Write the histories of several tasks to the history file ``path``: for ``cad train``, or ``train``.

    Args:
        recorded: by the index of the task in ``make_family(family, family_kwargs).tasks()``: the callback
            that recorded it, or its ``history()``. All have as many streams and steps.
        family: the name of the task family, such as ``gymnasium:MyEnv-v0``, and its arguments: whoever
            evaluates on the file makes the same environments with them.
        learner: what you call the algorithm; ``config`` are its hyper-parameters, for the record.
        split: indices of ``recorded`` in order of their keys, which the file numbers from 0. Without it,
            ``seed`` draws ``heldout`` and ``validation`` tasks, by default a tenth each.
        marker: marks all histories; None: no marks. ``marker_params`` are by default those of the callbacks.
        overwrite: replace a file at ``path``, which is refused otherwise.

    Raises ``HistoryError`` or ``MarkerError`` naming the task: its history has another shape, is not of this
    task, or does not hold what the marker needs.
    """
    if not recorded:
        raise UsageError("save_histories: no task was recorded")
    made = make_family(family, dict(family_kwargs or {}))
    rows, ids = made.tasks(), sorted(int(task) for task in recorded)
    if ids[0] < 0 or ids[-1] >= len(rows):
        raise UsageError(f"save_histories: {family} has tasks 0..{len(rows) - 1}, not {ids[0]}..{ids[-1]}")
    if split is None:
        split = split_family(made, np.array(ids), seed, validation=validation, heldout=heldout)
    params = _marker_params(recorded) if marker_params is None and marker == "threshold" else marker_params
    tasks, first = rows[ids], _history(recorded[ids[0]])
    sizes = {"n_timesteps": first.n_step, "n_learner": len(np.unique(first.learner))}
    sizes["n_stream"] = first.n_stream // sizes["n_learner"]
    info = HistoryInfo(
        family=family,
        family_kwargs=dict(family_kwargs or {}),
        spaces=family_specs(made),
        horizon=int(made.horizon),
        learner=learner,
        config={**(config or {}), **sizes, "task_ids": ids},
        seed=seed,
    )
    returns = made.optimal_return(tasks), made.random_return(tasks)
    with locked(Path(path), file=True, error=HistoryError):
        writer = HistoryWriter(path, info, split, tasks, *returns, overwrite=overwrite)
        try:
            for number, task in enumerate(ids):
                history = replace(_history(recorded[task]), compression_mask=None)
                if problem := first_stream_problem(made, tasks[number], history):
                    raise HistoryError(f"save_histories: task {task}: {problem}")
                if marker is not None:
                    mask = mark_task(marker, history, number, seed=seed, **(params or {}))
                    history = history.with_mask(mask)
                writer.append(number, history)
        except BaseException:
            shutil.rmtree(writer.shards, ignore_errors=True)  # it is called again, not resumed
            raise
        writer.finish(None if marker is None else marking_provenance(marker, params or {}, seed))
    return HistoryFile(path)


def _history(recorded: Recording | History) -> History:
    return recorded if isinstance(recorded, History) else recorded.history()


def _marker_params(recorded: Mapping[int, Recording | History]) -> dict[str, Any]:
    """Those of the callbacks, which must agree; none where histories were given."""
    found: dict[tuple[float, int], int] = {}
    for task, one in recorded.items():
        if not isinstance(one, History):
            found.setdefault((one.on_policy_threshold, one.compression_window), task)
    if len(found) > 1:
        first, other, *_ = found.values()
        raise UsageError(
            f"save_histories: the callbacks of tasks {first} and {other} differ in on_policy_threshold or"
            " compression_window; say with marker_params how the whole file is marked"
        )
    return dict(zip(("on_policy_threshold", "compression_window"), next(iter(found), ()), strict=False))
