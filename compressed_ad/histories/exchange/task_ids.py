"""Which tasks of the family the recorded ones are, and which parts of the split they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compressed_ad.errors import ConfigError, HistoryError, UsageError
from compressed_ad.histories.exchange.formats import Recorded, check_tasks
from compressed_ad.histories.exchange.replaying import fitted, played_in
from compressed_ad.histories.header import short
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.tasks.replay import differ
from compressed_ad.types import AnyArray, IntArray, Split, as_compared

MATCH = "match"
"""Value of ``task_ids`` that finds each task by its rewards."""


def ids_in_family(
    tasks: Mapping[int, Recorded],
    numbers: Sequence[int],
    family: TaskFamily,
    task_ids: Sequence[int] | str | None,
    named: Sequence[AnyArray | None],
    actions: Sequence[int] | None,
    seed: int,
) -> list[int]:
    """Ids in the family of the tasks ``numbers``, in their order; ``named`` are the parameters of each."""
    rows, spaces = family.tasks(), family_specs(family)
    count = len(rows)
    if isinstance(task_ids, str):
        if task_ids != MATCH:
            raise UsageError(f"task_ids must be numbers or {MATCH!r}, got {task_ids!r}")
        recordings = ((f"task {i}", fitted(f"task {i}", tasks[i], spaces, actions)) for i in numbers)
        ids = [_match(where, recorded, family, seed) for where, recorded in recordings]
    elif task_ids is not None:
        ids = [int(i) for i in task_ids]
    elif all(row is not None and row.shape == rows.shape[1:] for row in named):
        ids = [_with_parameters(i, row, rows, family.name) for i, row in zip(numbers, named, strict=True)]
    else:
        ids = list(numbers)
    if len(ids) != len(numbers):
        raise ConfigError(f"--task-ids: {len(numbers)} tasks are imported, but {len(ids)} ids are given")
    beyond = [i for i in ids if not 0 <= i < count]
    if beyond:
        raise ConfigError(
            f"--task-ids: {family.name} has tasks 0..{count - 1}, not {short(beyond)}; give the id of each "
            "task of the file in the family"
        )
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ConfigError(f"--task-ids: tasks {short(twice)} of {family.name} are given twice")
    return ids


def _with_parameters(number: int, row: Any, rows: AnyArray, family: str) -> int:
    found = np.flatnonzero((as_compared(rows) == as_compared(row)).all(axis=1))
    if not len(found):
        raise ConfigError(
            f"--task-ids: task {number} has the parameters {row.tolist()}, which no task of {family} has; set"
            " --env.kwargs, or give the id of each task of the file in the family"
        )
    return int(found[0])


def _match(where: str, recorded: Recorded, family: TaskFamily, seed: int) -> int:
    """The id of the only task of ``family`` in which the actions of all streams earn their rewards."""
    try:
        left = playing(recorded, family, family.tasks(), seed, least=1)
    except HistoryError as error:
        raise HistoryError(f"{where}: {error}") from error
    if len(left) != 1:
        what = f"tasks {short(left.tolist())} all do" if len(left) else "none does"
        raise HistoryError(
            f"{where}: no single task of {family.name} reproduces the recording ({what}); give --task-ids"
        )
    return int(left[0])


def playing(recorded: Recorded, family: TaskFamily, rows: AnyArray, seed: int, least: int = 0) -> IntArray:
    """Which of ``rows`` (N, P) the actions of all streams earn their rewards in; stops at ``least`` rows."""
    left = np.arange(len(rows))
    for stream in range(recorded.rewards.shape[0]):
        arrays = (recorded.states, recorded.actions, recorded.rewards)
        states, actions, rewards = (np.repeat(a[[stream]], len(left), axis=0) for a in arrays)
        played = played_in(family, rows[left], actions, seed)
        wrong = differ(states, played.states) | differ(rewards, played.rewards)
        left = left[~wrong.any(axis=1)]
        if len(left) <= least:
            break
    return left


def named_split(
    tasks: Sequence[int],
    heldout: Sequence[int] | None,
    validation: Sequence[int] | None,
    drawn: Callable[[int], Split] | None,
) -> Split:
    """The split of the recorded ``tasks`` by the named ``heldout`` and ``validation`` tasks, or as ``drawn``.

    ``drawn`` takes the number of tasks and splits their positions. ``ConfigError`` if neither is given.
    """
    check_tasks(tasks, {"heldout": heldout or (), "validation": validation or ()})
    if heldout is not None:
        validation = list(validation or ())
        train = sorted(set(tasks) - set(heldout) - set(validation))
        return Split(*(np.array(part, np.int64) for part in (train, validation, heldout)))
    if validation is not None:
        raise ConfigError("--validation without --heldout; name both, or draw the split with --split-seed")
    if drawn is None:
        raise ConfigError(
            "the file has no split: name its parts (--heldout K,K,... --validation K,K,...), or draw them "
            "(--split-seed N, sizes --env.heldout and --env.validation)"
        )
    ids = np.array(sorted(tasks), np.int64)
    return Split(*(ids[part] for part in vars(drawn(len(ids))).values()))
