"""The arrays that a history file has for each task: their dtypes, and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, NumericalError
from compressed_ad.histories import header as head
from compressed_ad.histories.header import HistoryInfo
from compressed_ad.types import AnyArray, History, SpaceSpec, shape_of, sizes, starts

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


def transition_bytes(spaces: Mapping[str, SpaceSpec]) -> int:
    """Bytes that the arrays of a history have for each transition, at most."""
    size = {name: int(np.prod(shape_of(spec))) for name, spec in spaces.items()}
    return sum(
        stored_dtype(name, spaces).itemsize * (size[column] if isinstance(column, str) else 1)
        for name, column in COLUMNS.items()
    )


def stored_dtype(name: str, spaces: Mapping[str, SpaceSpec]) -> np.dtype[Any]:
    """That of the array ``name``, whose elements are of one of ``spaces``."""
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


def check_history(where: str, history: History, info: HistoryInfo) -> None:
    """Raise ``HistoryError`` or ``NumericalError`` unless the file can hold ``history`` without loss."""
    history.check_finite(where)
    for name, column in COLUMNS.items():
        if not isinstance(column, str):
            continue
        array, spec = getattr(history, name), info.spaces[column]
        if array is None:
            continue
        box, shape = spec["kind"] == "box", shape_of(spec)
        dtype = stored_dtype(name, info.spaces) if box else np.dtype(np.int64)
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
