"""What a history file says about itself: what was collected and how, the split, the tasks, the marking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError
from compressed_ad.histories.hdf5 import (
    FORMAT_VERSION,
    Group,
    attribute,
    child,
    json_attribute,
    json_text,
    read,
)
from compressed_ad.marking.statistics import MarkingStatistics
from compressed_ad.types import AnyArray, FloatArray, IntArray, SpaceSpec, Split


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
class Header:
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
        """Indices of the tasks of the split, in ascending order: those with histories."""
        return np.sort(np.concatenate([self.split.train, self.split.validation, self.split.heldout]))

    def plain(self) -> dict[str, Any]:
        """As JSON would give it back, so that a stored head and a new one can be compared."""
        arrays = {
            "split": {name: ids.tolist() for name, ids in vars(self.split).items()},
            "tasks": self.tasks.tolist(),
            "optimal_return": None if self.optimal_return is None else self.optimal_return.tolist(),
            "random_return": self.random_return.tolist(),
        }
        plain: dict[str, Any] = json.loads(json_text("info", {**asdict(self.info), **arrays}))
        return plain

    def require(self, path: Path, stored: Header) -> None:
        """Raise ``HistoryError`` naming every key in which the ``stored`` head of ``path`` differs."""
        old, new = _flat("", stored.plain()), _flat("", self.plain())
        differing = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
        if differing:
            listed = "; ".join(
                f"{k}: {short(old.get(k))} there, {short(new.get(k))} asked for" for k in differing
            )
            raise HistoryError(
                f"{path} was collected with another configuration and is left alone ({listed})"
            )

    def write(self, file: Group) -> None:
        """Store the header, and the versions of what produces the file, in ``file``."""
        info = asdict(self.info)
        file.attrs["format_version"] = FORMAT_VERSION
        for name, value in info.items():
            file.attrs[name] = json_text(name, value) if isinstance(value, dict) else value
        file.attrs["versions"] = json_text("versions", _versions())
        for name, ids in vars(self.split).items():
            file[f"split/{name}"] = ids
        file["tasks"] = self.tasks
        file["random_return"] = self.random_return
        if self.optimal_return is not None:
            file["optimal_return"] = self.optimal_return

    @classmethod
    def read(cls, file: Group) -> Header:
        """The header stored in ``file``."""
        info = HistoryInfo(
            family=attribute(file, "family", str),
            family_kwargs=json_attribute(file, "family_kwargs"),
            spaces=json_attribute(file, "spaces"),
            horizon=int(attribute(file, "horizon", int)),
            learner=attribute(file, "learner", str),
            config=json_attribute(file, "config"),
            seed=int(attribute(file, "seed", int)),
        )
        if set(info.spaces) != {"observation", "action"}:
            raise HistoryError("attribute 'spaces' does not describe 'observation' and 'action'")
        parts = child(file, "split", Group)
        return cls(
            info,
            Split(*(read(parts, name, "i") for name in ("train", "validation", "heldout"))),
            read(file, "tasks", "iuf"),
            read(file, "optimal_return", "f") if "optimal_return" in file else None,
            read(file, "random_return", "f"),
        )


MARKING_ATTRIBUTES = (
    *("compressed_steps", "compression_ratio", "marker", "marker_parameters", "marker_seed", "marked_at"),
    *("on_policy_threshold", "compression_window"),
)


def write_marking(file: Group, statistics: MarkingStatistics, marking: Mapping[str, Any] | None) -> None:
    """Store how much is marked and, if known, how: ``marker``, ``parameters``, ``seed``, ``time``."""
    file.attrs["compressed_steps"] = statistics.compressed_steps
    file.attrs["compression_ratio"] = statistics.compression_ratio
    if marking is None:
        return
    file.attrs["marker"], file.attrs["marker_seed"] = marking["marker"], marking["seed"]
    file.attrs["marker_parameters"] = json_text("marker parameters", marking["parameters"])
    file.attrs["marked_at"] = marking["time"]
    for name in ("on_policy_threshold", "compression_window"):
        if name in marking["parameters"]:
            file.attrs[name] = marking["parameters"][name]


def read_marking(file: Group) -> dict[str, Any] | None:
    """How ``file`` was marked, or None if it does not say."""
    if "marker" not in file.attrs:
        return None
    return {
        "marker": attribute(file, "marker", str),
        "parameters": json_attribute(file, "marker_parameters"),
        "seed": int(attribute(file, "marker_seed", int)),
        "time": attribute(file, "marked_at", str),
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


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(f"{prefix}.{key}" if prefix else key, part)
    return flat


def short(value: Any) -> str:
    """``repr(value)``, cut for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
