"""How much memory a command needs for its histories, said before it starts, and kept within a limit.

What a process has for itself was measured (``benchmarks.memory``). Histories that it maps are not counted,
because the operating system takes that memory back when it is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressed_ad.errors import UsageError

if TYPE_CHECKING:
    from compressed_ad.histories.file import HistoryFile
    from compressed_ad.runs.settings import Config

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_READING, _COLLECTING, _COMPUTING = 150_000_000, 200_000_000, 450_000_000  # of a process without histories
# Copies of the arrays of one task that a process has at most: while it is marked, learned, imported.
_MARKED, _LEARNED, _IMPORTED = 3, 4, 8
_PER_EPISODE = 40  # bytes in lists of episodes; twice while they are chosen


@dataclass(frozen=True)
class Need:
    """Bytes of memory that a process needs."""

    fixed: int
    grows: int  # what its histories add
    why: str  # what that is for

    @property
    def total(self) -> int:
        return self.fixed + self.grows

    def __str__(self) -> str:
        return f"about {size_text(self.total)} of memory, {size_text(self.grows)} of it for {self.why}"


def size(text: str) -> int:
    """The bytes that ``text`` names: 1GB, 500 MB, 1.5GiB; ``UsageError`` if it names none."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    unit = _UNITS[found[2]] if found else 0
    if found is None or not (number := float(found[1]) * unit):
        raise UsageError(f"a size must be like 500MB or 1.5GB, not {text!r}")
    return int(number if not found[3] else float(found[1]) * 1024 ** round(math.log(unit, 1000)))


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def marking(file: HistoryFile) -> Need:
    from compressed_ad.histories.columns import transition_bytes

    grows = _MARKED * file.n_stream * file.n_step * transition_bytes(file.info.spaces)
    return Need(_READING, grows, "one task")


def importing(task_bytes: int) -> Need:
    """``task_bytes`` are those of the arrays of one task."""
    return Need(_READING, _IMPORTED * task_bytes, "one task")


def collecting(config: Config) -> Need:
    """What a worker needs that learns one task at a time."""
    from compressed_ad.histories.columns import transition_bytes
    from compressed_ad.runs.config import plan
    from compressed_ad.tasks.base import family_specs

    algorithm, spaces = config.algorithm, family_specs(plan(config).family)
    steps = algorithm.n_timesteps * algorithm.n_learner * algorithm.n_stream
    return Need(_COLLECTING, _LEARNED * steps * transition_bytes(spaces), "one task")


def tasks_within(need: Need, limit: int, n_process: int) -> int:
    """How many tasks each of ``n_process`` workers may learn at a time, if one takes ``need``."""
    return max(1, (limit // n_process - need.fixed) // need.grows)


def training(file: HistoryFile, config: Config) -> Need:
    """What training needs on the training tasks of ``file``."""
    from compressed_ad.runs.config import transform_pairs

    return _of_episodes(file, transform_pairs(config.model))


def judging(file: HistoryFile) -> Need:
    """What evaluation needs on ``file``."""
    return _of_episodes(file, ())


def _of_episodes(file: HistoryFile, transforms: Sequence[tuple[str, Mapping[str, Any]]]) -> Need:
    from compressed_ad.histories.columns import transition_bytes
    from compressed_ad.training.shared_arrays import has_room

    ids = file.split.train
    n_episode = file.n_episode(ids)
    arrays = len(ids) * file.n_stream * file.n_step * transition_bytes(file.info.spaces)
    why, kept, grows = f"lists of {n_episode:,} episodes", float(n_episode), 2 * _PER_EPISODE * n_episode
    for name, params in transforms:
        if name in ("subsample", "thin"):
            kept *= params.get("copies", 1) * _shares(params)
            grows += 2 * _PER_EPISODE * int(kept)
        elif name in ("stitch", "prolong"):
            grows += 2 * arrays  # these compose new histories
            why = f"the histories that {name} composes"
    if not has_room(file.path, arrays):
        grows += 2 * arrays
        why = f"histories, since the disk has no room for {size_text(arrays)}"
    return Need(_COMPUTING, grows, why)


def _shares(params: Mapping[str, Any]) -> float:
    """How many times the episodes of a history are kept in each copy of it."""
    every = params.get(
        "every", [value for name in ("marked_every", "unmarked_every") if (value := params.get(name))]
    )
    strides: Sequence[int] = every if isinstance(every, Sequence) else [every]
    return sum(1 / stride for stride in strides)
