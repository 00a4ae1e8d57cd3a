"""Which tasks of a family are used, and which of them train, validate and are held out."""

from __future__ import annotations

import numpy as np

from compressed_ad.errors import SplitError, UsageError
from compressed_ad.seeding import rng
from compressed_ad.tasks.base import FixedSplit, TaskFamily
from compressed_ad.types import IntArray, Split


def split_tasks(
    n_tasks: int, seed: int, *, train: int | None = None, validation: int | None = None,
    heldout: int | None = None,
) -> Split:  # fmt: skip
    """A random split of task indices ``0 .. n_tasks - 1`` into parts of the given sizes.

    By default a tenth (rounded) is held out, another tenth validates and the rest trains: 65/8/8 for the 81
    goals of Darkroom. The held-out tasks of a seed do not depend on the size of the other parts. Raises
    ``SplitError`` if the sizes do not add up to ``n_tasks`` or leave no training task.
    """
    tenth = round(n_tasks / 10) if n_tasks >= 10 else min(1, max(n_tasks - 2, 0))
    n_heldout = tenth if heldout is None else heldout
    n_validation = tenth if validation is None else validation
    n_train = n_tasks - n_heldout - n_validation if train is None else train
    if train is None and n_train < 1:
        raise SplitError(
            f"{n_validation} validation and {n_heldout} held-out tasks and one to train on cannot be made of "
            f"{n_tasks} tasks; choose smaller validation and heldout, or more tasks (n_task)"
        )
    if min(n_heldout, n_validation) < 0 or n_train < 1 or n_train + n_validation + n_heldout != n_tasks:
        raise SplitError(
            f"{n_train} training, {n_validation} validation and {n_heldout} held-out tasks cannot be made of "
            f"{n_tasks} tasks; leave train out to train on the rest, or choose the number of tasks (n_task)"
        )
    heldout_ids, validation_ids, train_ids = np.split(
        rng(seed, "split").permutation(n_tasks), [n_heldout, n_heldout + n_validation]
    )
    return Split(train_ids, validation_ids, heldout_ids)


def split_family(
    family: TaskFamily, task_ids: IntArray, seed: int, *, train: int | None = None,
    validation: int | None = None, heldout: int | None = None,
) -> Split:  # fmt: skip
    """The split of the tasks ``task_ids`` of ``family``, as indices into ``task_ids``.

    ``split_tasks`` draws it. If the family has fixed held-out tasks (``FixedSplit``), exactly those are held
    out, and only the others are drawn to validate and train. ``SplitError`` if one task is in two parts.
    """
    split = _drawn(family, task_ids, seed, train, validation, heldout)
    if problem := split.shared_task(family.tasks()[task_ids]):
        raise SplitError(f"{family.name}: {problem}; tasks() must have different rows")
    return split


def _drawn(
    family: TaskFamily, task_ids: IntArray, seed: int, train: int | None, validation: int | None,
    heldout: int | None,
) -> Split:  # fmt: skip
    if not isinstance(family, FixedSplit):
        return split_tasks(len(task_ids), seed, train=train, validation=validation, heldout=heldout)
    given = np.isin(task_ids, family.heldout_tasks())
    if heldout not in (None, int(given.sum())):
        raise SplitError(
            f"{family.name} has held-out tasks of its own, {given.sum()} of the {len(task_ids)} chosen; "
            f"heldout must be left out (null), not {heldout}"
        )
    others = np.flatnonzero(~given)
    drawn = split_tasks(len(others), seed, train=train, validation=validation, heldout=0)
    return Split(others[drawn.train], others[drawn.validation], np.flatnonzero(given))


def choose_tasks(n_tasks: int, seed: int, n_task: int | None) -> IntArray:
    """Ids into the family of the tasks to collect, ascending: all, or a random ``n_task`` of them."""
    if n_task is None:
        return np.arange(n_tasks)
    if not 1 <= n_task <= n_tasks:
        raise UsageError(f"n_task must lie in 1..{n_tasks}, the number of the family's tasks; got {n_task}")
    return np.sort(rng(seed, "choose_tasks").permutation(n_tasks)[:n_task])
