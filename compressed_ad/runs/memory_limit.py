"""How much memory a command needs, said before it starts, and kept within a limit.

These are estimates from measured processes (``benchmarks.memory``, ``benchmarks.model``). Histories that a
process maps are not counted, because the operating system takes that memory back when it is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressed_ad.errors import UsageError

if TYPE_CHECKING:
    from compressed_ad.histories.file import HistoryFile
    from compressed_ad.models.settings import ModelConfig
    from compressed_ad.runs.job import Job
    from compressed_ad.runs.settings import Config
    from compressed_ad.types import Split

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_READING, _COLLECTING, _COMPUTING = 150_000_000, 200_000_000, 400_000_000  # of a process without histories
_WAITING = 120_000_000  # of one that waits for its workers
# Copies of the arrays of one task that a process has at most: while it is marked, learned, imported.
_MARKED, _LEARNED, _IMPORTED = 3, 4, 8
_LISTED, _CHOSEN = 30, 50  # bytes for each episode: that is listed, and that was chosen from a list
_CHOOSING = {"subsample": 30, "thin": 70}  # bytes for each of which some are chosen
_STEP, _WEIGHT = 115, 16  # bytes of a gradient step for each token, unit and layer; of a weight


@dataclass(frozen=True)
class Need:
    """Bytes of memory that a process needs."""

    fixed: int
    grows: int  # what its histories add
    why: str  # what that is for
    beside: int = _WAITING  # of the process that waits, if there are workers

    @property
    def total(self) -> int:
        return self.fixed + self.grows

    def workers(self, wanted: int, limit: int | None) -> int:
        """How many of ``wanted`` processes fit within ``limit``; one alone needs none that waits."""
        return (
            wanted
            if limit is None or wanted == 1
            else max(1, min(wanted, (limit - self.beside) // self.total))
        )

    def __str__(self) -> str:
        return f"about {size_text(self.total)} of memory, {size_text(self.grows)} of it for {self.why}"


@dataclass(frozen=True)
class Histories:
    """How much there is of them: in a file, or in the one that a configuration will collect."""

    path: Path
    task: int  # bytes of the arrays of one task
    split: Split
    n_episode: int  # of all training tasks

    @classmethod
    def of(cls, file: HistoryFile) -> Histories:
        return cls(file.path, task_bytes(file), file.split, file.n_episode(file.split.train))

    @classmethod
    def planned(cls, config: Config, path: Path) -> Histories:
        """Those of ``config``; episodes are as long as the horizon, since it is unknown which end before."""
        from compressed_ad.histories.columns import transition_bytes
        from compressed_ad.histories.thinning import kept_steps
        from compressed_ad.runs.config import plan
        from compressed_ad.tasks.base import family_specs

        made, algorithm = plan(config), config.algorithm
        n_step = kept_steps(made.family, algorithm.n_timesteps, algorithm.keep_every)
        n_stream = algorithm.n_learner * algorithm.n_stream
        task = n_stream * n_step * transition_bytes(family_specs(made.family))
        n_episode = len(made.split.train) * n_stream * -(-n_step // made.family.horizon)
        there = next(folder for folder in path.absolute().parents if folder.exists())
        return cls(there / path.name, task, made.split, n_episode)


def size(text: str) -> int:
    """The bytes that ``text`` names: 1GB, 500 MB, 1.5GiB; ``UsageError`` if it names none."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    unit = _UNITS[found[2]] if found else 0
    if found is None or not (number := float(found[1]) * unit):
        raise UsageError(f"a size must be like 500MB or 1.5GB, not {text!r}")
    return int(number if not found[3] else float(found[1]) * 1024 ** round(math.log(unit, 1000)))


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def task_bytes(file: HistoryFile) -> int:
    """Bytes of the arrays of one task of ``file``."""
    from compressed_ad.histories.columns import transition_bytes

    steps: int = file.n_stream * file.n_step
    return steps * transition_bytes(file.info.spaces)


def marking(task_bytes: int) -> Need:
    return Need(_READING, _MARKED * task_bytes, "one task")


def importing(task_bytes: int) -> Need:
    return Need(_READING, _IMPORTED * task_bytes, "one task")


def collecting(config: Config) -> Need:
    """What a worker needs that learns one task at a time."""
    from compressed_ad.histories.columns import transition_bytes
    from compressed_ad.runs.config import plan
    from compressed_ad.tasks.base import family_specs

    algorithm, spaces = config.algorithm, family_specs(plan(config).family)
    steps = algorithm.n_timesteps * algorithm.n_learner * algorithm.n_stream
    return Need(_COLLECTING, _LEARNED * steps * transition_bytes(spaces), "one task")


def tasks_within(limit: int, config: Config, n_process: int) -> int:
    """How many tasks each of ``n_process`` workers may learn at a time."""
    need = collecting(config)
    left = (limit - need.beside) // n_process if n_process > 1 else limit
    return max(1, (left - need.fixed) // need.grows)


def training(histories: Histories, config: Config) -> Need:
    """What training needs on the training tasks."""
    from compressed_ad.runs.config import transform_pairs

    model = config.model
    tokens = -(-model.batch_size // model.accumulate) * model.n_transit
    step = _STEP * tokens * model.tf_n_embd * model.tf_n_layer
    play = _playing(model, len(histories.split.validation) * model.validation_rollouts)
    return _of_episodes(histories, transform_pairs(model), model, max(step, play))


def judging(histories: Histories, config: Config) -> Need:
    """What evaluation needs."""
    play = _playing(config.model, len(histories.split.heldout) * config.evaluation.rollouts)
    return _of_episodes(histories, (), config.model, play)


def of_runs(jobs: Iterable[Job]) -> Need:
    """What a process needs that does any stage of ``jobs``, and the one that marks for it beside it."""
    from compressed_ad.histories.file import HistoryFile

    known: dict[Path, Histories] = {}
    needs, beside = [Need(_READING, 0, "histories")], _WAITING
    for job in jobs:
        config, path = job.config, job.history
        if path not in known and path.exists():
            known[path] = Histories.of(HistoryFile(path, verify=False))
        elif path not in known:
            known[path] = Histories.planned(config, path)
            needs.append(collecting(config))
        beside = max(beside, marking(known[path].task).total)
        needs += [training(known[path], config), judging(known[path], config)]
    return replace(max(needs, key=lambda need: need.total), beside=beside)


def _playing(model: ModelConfig, n_environment: int) -> int:
    from compressed_ad.training.flops import cache_bytes

    return round(n_environment * cache_bytes(model))


def _of_episodes(
    histories: Histories,
    transforms: Sequence[tuple[str, Mapping[str, Any]]],
    model: ModelConfig,
    computing: int,
) -> Need:
    from compressed_ad.training.shared_arrays import has_room

    n_episode, arrays = histories.n_episode, len(histories.split.train) * histories.task
    why, kept, grows = f"lists of {n_episode:,} episodes", float(n_episode), _LISTED * n_episode
    for name, params in transforms:
        if name in _CHOOSING:
            before, kept = kept, kept * params.get("copies", 1) * _shares(params)
            grows = max(grows, int(_CHOOSING[name] * before), int(_CHOSEN * kept))
        elif name in ("stitch", "prolong"):
            grows += 2 * arrays  # these compose new histories
            why = f"the histories that {name} composes"
    if not has_room(histories.path, arrays):
        grows += 2 * arrays
        why = f"histories, since the disk has no room for {size_text(arrays)}"
    weights = 12 * model.tf_n_embd**2 * model.tf_n_layer
    return Need(_COMPUTING + _WEIGHT * weights + computing, grows, why)


def _shares(params: Mapping[str, Any]) -> float:
    """How many times the episodes of a history are kept in each copy of it."""
    every = params.get(
        "every", [value for name in ("marked_every", "unmarked_every") if (value := params.get(name))]
    )
    strides: Sequence[int] = every if isinstance(every, Sequence) else [every]
    return sum(1 / stride for stride in strides)
