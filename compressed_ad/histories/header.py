"""What a history file says about itself: what was collected and how, split, tasks, scales, marking."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import HistoryError, SpaceError
from compressed_ad.histories import hdf5
from compressed_ad.histories.hdf5 import Dataset, Group, attribute, json_attribute, json_text
from compressed_ad.marking.statistics import MarkingStatistics
from compressed_ad.types import (
    LONGEST,
    AnyArray,
    FloatArray,
    IntArray,
    SpaceSpec,
    Split,
    check_spec,
    features,
)

LARGEST_RETURN = float(np.finfo(np.float32).max)


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

    @property
    def keep_every(self) -> int:
        """The file holds one of so many episodes."""
        kept = self.config.get("keep_every", 1)
        return kept if isinstance(kept, int) and kept > 1 else 1


@dataclass(frozen=True)
class Header:
    """What a history file holds besides the histories; each shard of a collection holds it too."""

    info: HistoryInfo
    split: Split
    tasks: AnyArray  # (N, P)
    optimal_return: FloatArray | None  # (N,)
    random_return: FloatArray  # (N,)

    def __post_init__(self) -> None:
        info, count = self.info, len(self.tasks)
        if not 1 <= info.horizon <= LONGEST or info.seed < 0:
            raise HistoryError(f"horizon {info.horizon} or seed {info.seed} is out of range")
        names = (info.family, info.learner, json_text("family_kwargs", info.family_kwargs))
        if any(len(text) > most for text, most in zip(names, (300, 300, 1 << 16), strict=True)):
            raise HistoryError("the task family, its parameters or the learner are longer than any real ones")
        if wrong_name := next((text for text in names if not text.isprintable()), None):
            raise HistoryError(f"a name must be one line of printable letters, not {short(wrong_name)}")
        for name, spec in info.spaces.items():
            try:
                check_spec(spec)
            except SpaceError as error:
                raise HistoryError(f"{name} space: {error}") from error
        if self.tasks.ndim != 2 or not np.isfinite(self.tasks).all():
            raise HistoryError(f"tasks: expected rows of finite numbers, got shape {self.tasks.shape}")
        for name in ("optimal_return", "random_return"):
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != (count,):
                raise HistoryError(f"{name}: expected ({count},) as there are tasks, got {array.shape}")
            known = ~np.isnan(array) | (name == "random_return")  # an optimum of NaN is unknown
            wrong = np.flatnonzero(known & ~(np.abs(array) <= LARGEST_RETURN))
            if len(wrong):
                raise HistoryError(f"{name} of task {wrong[0]} is {array[wrong[0]]}")
        optimal, random = self.optimal_return, self.random_return
        if optimal is not None and (below := optimal < random - 1e-9).any():
            i = int(below.argmax())
            problem = f"optimal_return of task {i} is {optimal[i]:g}, but its random_return is {random[i]:g}"
            raise HistoryError(f"{info.family}: {problem}; no policy may earn more than the optimal one")
        if self.task_ids[0] < 0 or self.task_ids[-1] >= count:
            raise HistoryError(f"the split names task {self.task_ids[-1]}, but there are only {count} tasks")
        if shared := self.split.shared_task(self.tasks):
            raise HistoryError(shared)

    @property
    def task_ids(self) -> IntArray:
        """Indices of the tasks with histories, those of the split, in ascending order."""
        return np.sort(np.concatenate([self.split.train, self.split.validation, self.split.heldout]))

    def plain(self) -> dict[str, Any]:
        """As JSON returns it, so that stored and new headers compare equal."""
        arrays: dict[str, Any] = {"split": {name: ids.tolist() for name, ids in vars(self.split).items()}}
        for name in ("tasks", "optimal_return", "random_return"):
            array = getattr(self, name)
            arrays[name] = None if array is None else array.tolist()
        plain: dict[str, Any] = json.loads(json_text("info", {**asdict(self.info), **arrays}))
        return plain

    def write(self, file: Group) -> None:
        """Store the header, and the versions of the packages that produce the file."""
        file.attrs["format_version"] = hdf5.FORMAT_VERSION
        for name, value in asdict(self.info).items():
            file.attrs[name] = json_text(name, value) if isinstance(value, dict) else value
        packages = ("compressed-ad", "numpy", "h5py", "numba", "gymnasium", "torch", "stable-baselines3")
        file.attrs["versions"] = json_text("versions", installed(packages))
        for name, ids in vars(self.split).items():
            file[f"split/{name}"] = ids
        file["tasks"] = self.tasks
        file["random_return"] = self.random_return
        if self.optimal_return is not None:
            file["optimal_return"] = self.optimal_return

    @classmethod
    def read(cls, file: Group) -> Header:
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
        parts = hdf5.child(file, "split", Group)
        split = Split(*(hdf5.read(parts, name, "i") for name in ("train", "validation", "heldout")))
        tasks, random = hdf5.read(file, "tasks", "iuf"), hdf5.read(file, "random_return", "f")
        optimal = hdf5.read(file, "optimal_return", "f") if "optimal_return" in file else None
        return cls(info, split, tasks, optimal, random)


_TOLD_BY = ("actions", "rewards", "states")
"""The arrays that tell whether two histories are one."""
FEW_STEPS = 64
"""Fewer steps than these may agree by chance."""


def refuse_copies(file: Group, split: Split) -> None:
    """Raise ``HistoryError`` if tasks of different parts of ``split`` have the same recorded steps.

    Hard links are one object. Copies are equal in content, which is only read where as many bytes are stored.
    """
    stored: dict[tuple[int, ...], list[tuple[str, int, list[Any]]]] = {}
    seen: dict[Any, tuple[str, int]] = {}

    def meet(key: Any, part: str, task: int) -> None:
        of, other = seen.setdefault(key, (part, task))
        if of != part:
            raise HistoryError(f"task {task} ({part}) has the histories of task {other} ({of})")

    for part, ids in vars(split).items():
        for task in ids.tolist():
            group = hdf5.child(file, str(task), Group)
            data = [hdf5.child(group, name, Dataset) for name in _TOLD_BY]
            for one in data:
                meet(one, part, task)
            stored.setdefault(tuple(one.id.get_storage_size() for one in data), []).append((part, task, data))
    for alike in stored.values():
        for part, task, data in alike if len({part for part, _, _ in alike}) > 1 else ():
            meet(same_steps(*(one[()] for one in data)) or task, part, task)


def same_steps(actions: AnyArray, *arrays: AnyArray) -> bytes | None:
    """A digest that only copies share; None where steps may agree by chance: of few steps or one action."""
    if actions.size < FEW_STEPS or (actions == actions.flat[0]).all():
        return None
    parts = [np.ascontiguousarray(array).tobytes() for array in (actions, *arrays)]
    return hashlib.sha256(b"".join(parts)).digest()


SCALES = "scales"
"""The group of the scales in a file."""

_ROWS = 1 << 14  # converted to float64 at a time, so that images need not be in memory as floats


@dataclass(frozen=True)
class Scales:
    """What models standardise by: mean and standard deviation of observations, and the unit of rewards.

    They are measured on the training tasks alone. ``reward`` is the root mean square of the nonzero rewards,
    or 1 without any: exactly 1 where rewards are 0 or 1, however rare, elsewhere the size of a typical one.
    """

    observation_mean: NDArray[np.float64] | None  # (D,) by component, (C,) by channel; None: not a Box
    observation_std: NDArray[np.float64] | None
    reward: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.reward) and self.reward > 0):
            raise HistoryError(f"scales/reward is {self.reward}; it must be a number above 0")
        for name in ("observation_mean", "observation_std"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise HistoryError(f"scales/{name} holds NaN or infinity")


def measure_scales(tasks: Iterable[Group], observation: SpaceSpec) -> Scales:
    """The scales of the histories in the groups ``tasks``, of which one is in memory at a time."""
    box = observation["kind"] == "box"
    count, mean, spread = 0, np.zeros(1), np.zeros(1)
    paid, squares = 0, 0.0
    for group in tasks:
        rewards = hdf5.read(group, "rewards", "f").astype(np.float64)
        paid, squares = paid + int(np.count_nonzero(rewards)), squares + float((rewards**2).sum())
        rows = features(observation, hdf5.read(group, "states", "iuf")) if box else np.empty((0, 1))
        for first in range(0, len(rows), _ROWS):
            # Chan, Golub & LeVeque 1983: exact updates of mean and sum of squared deviations.
            part = rows[first : first + _ROWS].astype(np.float64)
            n, part_mean = len(part), part.mean(axis=0)
            step, total = part_mean - mean, count + n
            spread = spread + ((part - part_mean) ** 2).sum(axis=0) + step**2 * (count * n / total)
            count, mean = total, mean + step * (n / total)
    reward = math.sqrt(squares / paid) if paid else 1.0
    return Scales(mean, np.sqrt(spread / max(count, 1)), reward) if box else Scales(None, None, reward)


_GUIDE = ("on_policy_threshold", "compression_window")  # also attributes of their own, as in the guide
MARKING_ATTRIBUTES = (
    *("compressed_steps", "compression_ratio", "marker", "marker_parameters", "marker_seed", "marked_at"),
    *_GUIDE,
)


def write_marking(file: Group, statistics: MarkingStatistics, marking: Mapping[str, Any] | None) -> None:
    """Store how much is marked and, if known, how: ``marker``, ``parameters``, ``seed``, ``time``."""
    file.attrs["compressed_steps"] = statistics.compressed_steps
    file.attrs["compression_ratio"] = statistics.compression_ratio
    if marking is None:
        return
    parameters = marking["parameters"]
    file.attrs["marker"], file.attrs["marker_seed"] = marking["marker"], marking["seed"]
    file.attrs["marker_parameters"] = json_text("marker parameters", parameters)
    file.attrs["marked_at"] = marking["time"]
    for name in _GUIDE:
        if parameters.get(name) is not None:
            file.attrs[name] = parameters[name]


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


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those ``packages`` that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = _version(package)
    return found


@cache
def _version(package: str) -> str:  # it is read from disk, and every shard of a collection asks for it
    return metadata.version(package)


def differences(stored: Any, wanted: Any, prefix: str = "", *, shared: bool = False) -> list[str]:
    """``key: old there, new asked for`` for every key in which two nested values differ.

    With ``shared``, keys that only one of them has do not count: earlier versions stored less.
    """
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        lines: list[str] = []
        for key in dict.fromkeys([*stored, *wanted]):
            if shared and not (key in stored and key in wanted):
                continue
            inner = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(stored.get(key), wanted.get(key), inner)
        return lines
    if stored == wanted:
        return []
    there, asked = ("not set" if value is None else short(value) for value in (stored, wanted))
    return [f"{prefix}: {there} there, {asked} asked for"]


def short(value: Any) -> str:
    """``repr(value)``, cut for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
