"""A recording held against the task family: in its numbers and dtypes, and replayed in one of its tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from compressed_ad.errors import CompressedADError, HistoryError
from compressed_ad.histories.columns import COLUMNS
from compressed_ad.histories.exchange.formats import Recorded
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.replay import Played, differ, play
from compressed_ad.types import AnyArray, BoolArray, IntArray, SpaceSpec, from_spec, sizes, starts


def fitted(
    where: str, recorded: Recorded, spaces: Mapping[str, SpaceSpec], actions: Sequence[int] | None = None
) -> Recorded:
    """``recorded`` in the numbers, dtypes and shapes of the spaces; ``HistoryError`` if a value has none."""
    changed: dict[str, Any] = {}
    for name, column in COLUMNS.items():
        array = getattr(recorded, name, None)
        if array is None or not isinstance(column, str):
            continue
        spec, space = spaces[column], from_spec(spaces[column])
        if column == "action" and actions is not None:
            array = np.asarray(actions)[_indices(f"{where}: {name}", array, len(actions))]
        if spec["kind"] == "multidiscrete" and math.prod(array.shape[2:]) == 1 < len(sizes(spec)):
            index = _indices(f"{where}: {name}", array, math.prod(sizes(spec))).reshape(array.shape[:2])
            array = np.stack(np.unravel_index(index, sizes(spec)), axis=-1) + starts(spec)
        if space.shape == () and array.shape[2:] == (1,):
            array = array[..., 0]
        with np.errstate(invalid="ignore"):  # the comparison below finds NaN
            fitted = array.astype(space.dtype, copy=False)
        if np.dtype(space.dtype).kind in "iu" and not np.array_equal(fitted, array):
            raise HistoryError(f"{where}: {name} of dtype {array.dtype} are not whole numbers, as in {space}")
        changed[name] = fitted
    return replace(recorded, **changed, rewards=recorded.rewards.astype(np.float32))


def _indices(what: str, array: AnyArray, count: int) -> IntArray:
    """``array`` as whole numbers of 0..count-1; ``HistoryError`` for others."""
    with np.errstate(invalid="ignore"):  # the comparison finds NaN
        index = array.astype(np.int64)
    wrong = (index != array) | (index < 0) | (index >= count)
    if wrong.any():
        raise HistoryError(f"{what} hold {array[wrong][0]}, which is none of 0..{count - 1}")
    return index


def outer(episode_end: BoolArray) -> BoolArray:
    """(S, T) steps whose successor is not the next recorded state: the last of episodes and of the record."""
    outer = episode_end.copy()
    outer[:, -1] = True
    return outer


def turned(recorded: Recorded) -> Recorded:
    """``recorded`` as it is if its first two axes were exchanged; of long ones the first 1024 streams."""
    arrays = {name: array for name, array in vars(recorded).items() if array is not None and array.ndim > 1}
    return Recorded(**{name: array.swapaxes(0, 1)[:1024] for name, array in arrays.items()})


def replayed(recorded: Recorded, family: TaskFamily, task: AnyArray, seed: int) -> Played | str:
    """What ``task`` gives for the recorded actions if it reproduces the recording; else where it does not."""
    try:
        tasks = np.repeat(task[None], len(recorded.rewards), axis=0)
        played = played_in(family, tasks, recorded.actions, seed)
    except HistoryError as error:
        return str(error)
    return _first_difference(recorded, played) or played


def played_in(family: TaskFamily, tasks: AnyArray, actions: AnyArray, seed: int) -> Played:
    try:
        return play(family, tasks, actions, seed)
    except (CompressedADError, ValueError, IndexError, TypeError) as error:
        raise HistoryError(f"its actions cannot be played in {family.name} ({error})") from error


def _first_difference(recorded: Recorded, played: Played) -> str | None:
    """Array, stream and step of the first difference; None if there is none.

    Successors at the ends of episodes and of the record are left out: many programs make them up.
    """
    pairs = {name: differ(getattr(recorded, name), getattr(played, name)) for name in ("states", "rewards")}
    if recorded.next_states is not None:
        pairs["next_states"] = differ(recorded.next_states, played.next_states) & ~outer(played.episode_end)
    if recorded.dones is not None:
        pairs["dones"] = recorded.dones != played.episode_end
    if recorded.terminated is not None and recorded.truncated is not None:
        pairs["terminated"] = recorded.terminated != played.terminated
        pairs["truncated"] = recorded.truncated != played.truncated
    for name, wrong in pairs.items():
        if wrong.any():
            stream, step = np.argwhere(wrong)[0]
            return f"{name} differ first in stream {stream} at step {step}"
    return None
