"""Collect learning histories: a learner learns the tasks of a family, and a file stores what it did.

Workers learn blocks of tasks. A task's history depends on the seed and the task alone, not on its block or on
the process that learns it. Finished tasks are on disk at once: whatever ends a collection, the next one with
``resume=True`` continues after them and gives the same arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad import registry
from compressed_ad.errors import ConfigError, HistoryError, RunError, UsageError, users_code
from compressed_ad.files import locked
from compressed_ad.histories.file import HistoryFile, HistoryInfo, marking_provenance, remark
from compressed_ad.histories.thinning import keep_episodes, kept_steps
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.learners.base import Blocks, Checks, SourceLearner, Told, prepared
from compressed_ad.learners.conformance import first_stream_problem, return_problem
from compressed_ad.marking.apply import find_marker, mark_task, marker_name
from compressed_ad.marking.conformance import marker_faults
from compressed_ad.marking.markers import Marker
from compressed_ad.settings import Count
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.tasks.conformance import static_problems
from compressed_ad.tasks.split import choose_tasks, split_family
from compressed_ad.types import AnyArray, IntArray, Split
from compressed_ad.workers import Parts, Pool, Report, ShouldStop, WorkerPool

MAX_BLOCK = 8
"""Tasks learned together unless the learner says how many: few enough that a crash loses little."""


def history_path(directory: str | Path, family_name: str, learner_name: str, seed: int) -> Path:
    """The path of a collection, e.g. ``datasets/history_darkroom_PPO_alg-seed0_compressed.hdf5``."""
    for kind, name in (("task family", family_name), ("learner", learner_name)):
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]{1,100}", name) or not name.isprintable():
            raise UsageError(f"the {kind}'s name must fit a file name (1 to 100 letters, no /), not {name!r}")
    return Path(directory) / f"history_{family_name}_{learner_name}_alg-seed{seed}_compressed.hdf5"


@registry.checked
def collect(
    family: TaskFamily,
    learner: SourceLearner,
    path: str | Path,
    *,
    family_name: str,
    family_kwargs: Mapping[str, Any] | None = None,
    learner_config: Mapping[str, Any] | None = None,
    n_timesteps: Count,
    n_learner: Count = 1,
    n_stream: Count = 100,
    keep_every: Count = 1,
    n_task: int | None = None,
    train: int | None = None,
    validation: int | None = None,
    heldout: int | None = None,
    marker: str | Marker | None = "threshold",
    marker_params: Mapping[str, Any] | None = None,
    seed: int = 0,
    split_seed: int | None = None,
    task_ids: IntArray | None = None,
    split: Split | None = None,
    checked: bool = False,
    n_process: Count = 1,
    timeout: float | None = None,
    pool: Pool | None = None,
    block_size: Count | None = None,
    most_tasks: Count | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Let ``learner`` learn tasks of ``family`` and write their histories to ``path``, which is returned.

    Each task gets ``n_learner * n_stream`` streams of ``n_timesteps`` transitions, marked by ``marker``
    (None: no mask). With ``keep_every`` k, the file holds about one of k episodes, as ``keep_episodes``
    chooses them; marks are those of what it holds, and whole histories are in memory a block at a time.
    All tasks are collected, or a random ``n_task`` of them; the file numbers them from 0
    and keeps the family's ids in its config (``task_ids``). ``split_family`` splits them with ``split_seed``
    (``seed`` if None). A caller that has chosen and split the tasks already passes ``task_ids`` and ``split``
    instead, and ``checked`` if learner and marker are known to fit. ``family_name``, ``family_kwargs`` and
    ``learner_config`` are stored so that family and learner can be built again.
    A file that exists at ``path`` is continued with ``resume`` (a finished one is left as it is, marks
    included), replaced with ``overwrite``, else refused with ``HistoryError``; so is a second collection into
    ``path`` while one is at work.

    With ``n_process > 1`` worker processes of one thread each learn blocks of ``block_size`` tasks, or of as
    many as suit the learner, but of no more than ``most_tasks``; they are spawned, so a script must call this
    under ``if __name__ == "__main__":``. Or ``pool`` has the workers. A block whose worker dies is tried
    once more, alone; one without progress for ``timeout`` seconds is ended with a ``RunError``. ``progress``
    is called with the environment steps done so far and their total, all tasks and streams together.

    Raises ``UsageError`` before anything is started, ``RunError`` when a worker dies twice, and whatever the
    learner or the marker raises. Finished tasks are kept.
    """
    sizes = {"n_timesteps": n_timesteps, "n_learner": n_learner, "n_stream": n_stream}
    params = dict(marker_params or {})
    if marker is not None and not checked:
        problems = marker_faults(find_marker(marker), **params)
        if problems:
            raise ConfigError(f"marker {marker_name(marker)!r}: {problem}" for problem in problems)
    n_kept = kept_steps(family, n_timesteps, keep_every)
    if isinstance(learner, Checks) and not checked:
        learner.check(family, n_timesteps=n_timesteps, n_stream=n_stream)
    with users_code(f"task family {family_name!r}"):
        if problems := list(static_problems(family)):
            raise UsageError(f"{family.name}: {'; '.join(problems)}")
        all_tasks = family.tasks()
        if task_ids is None:
            task_ids = choose_tasks(len(all_tasks), seed, n_task)
        if split is None:
            parts = {"train": train, "validation": validation, "heldout": heldout}
            split = split_family(family, task_ids, seed if split_seed is None else split_seed, **parts)
        tasks = all_tasks[task_ids]
        returns = family.optimal_return(tasks), family.random_return(tasks)
        spaces, horizon = family_specs(family), family.horizon
    learner = prepared(learner, family, tasks[split.train], seed)
    facts: dict[str, Any] = {"told": learner.told} if isinstance(learner, Told) else {}
    facts |= {"keep_every": keep_every} if keep_every > 1 else {}
    most = max(1, learner.block_size(family, **sizes)) if isinstance(learner, Blocks) else MAX_BLOCK
    most = min(most, most_tasks or most)
    info = HistoryInfo(
        family=family_name,
        family_kwargs=dict(family_kwargs or {}),
        spaces=spaces,
        horizon=horizon,
        learner=learner.name,
        config={**(learner_config or {}), **sizes, "task_ids": task_ids.tolist(), **facts},
        seed=seed,
    )
    with (
        locked(Path(path), file=True, error=HistoryError),
        WorkerPool(n_process) if pool is None else nullcontext(pool) as workers,
    ):
        writer = HistoryWriter(path, info, split, tasks, *returns, resume=resume, overwrite=overwrite)
        job = _Job(family, learner, writer, tasks, task_ids, sizes, keep_every, n_kept, seed, marker, params)
        done = writer.done_tasks()
        left = np.setdiff1d(np.arange(len(tasks)), sorted(done))
        blocks = _blocks(left, workers.n_process, block_size, most)
        units = {f"tasks {block.tolist()}": (block,) for block in blocks}
        total = Parts(
            lambda done, total, text: progress(round(done), round(total)),
            {name: len(block) for name, (block,) in units.items()},
            unit=math.prod(sizes.values()),
            before=len(done),
        )
        # What a block has not stored cannot be saved, so none is waited for.
        workers.run(job.learn, units, progress=total, retry=True, patience=0.0, timeout=timeout)
        # Tasks finished earlier may carry the masks of another marker: then all are marked again, at the end.
        writer.finish(None if done or marker is None else marking_provenance(marker, params, seed))
    if marker is not None and HistoryFile(path, verify=False).marking is None:
        remark(path, marker, params, seed=seed)
    return Path(path)


def _blocks(todo: IntArray, n_process: int, block_size: int | None, most: int) -> list[IntArray]:
    """``todo`` in blocks of ``block_size``, or of nearly equal sizes up to ``most`` for all processes."""
    if len(todo) == 0:
        return []
    if block_size is not None:
        return [todo[i : i + block_size] for i in range(0, len(todo), block_size)]
    rounds = -(-len(todo) // (most * n_process))
    return np.array_split(todo, min(rounds * n_process, len(todo)))


@dataclass(frozen=True)
class _Job:
    family: TaskFamily
    learner: SourceLearner
    writer: HistoryWriter
    tasks: AnyArray  # (N, P)
    task_ids: IntArray  # (N,) into the family
    sizes: dict[str, int]  # n_timesteps, n_learner, n_stream
    keep_every: int
    n_kept: int  # steps of each stream
    seed: int
    marker: str | Marker | None
    marker_params: dict[str, Any]

    def learn(self, block: IntArray, *, report: Report, should_stop: ShouldStop) -> None:
        """Learn and store those tasks of ``block`` (indices into the file) that are not on disk yet."""
        todo = np.setdiff1d(block, sorted(self.writer.done_tasks()))
        if len(todo) == 0:
            return
        steps_per_task, name = math.prod(self.sizes.values()), self.learner.name
        done = steps_per_task * (len(block) - len(todo))

        def progress(steps: int) -> None:
            nonlocal done
            done += steps
            report(done, steps_per_task * len(block), "environment steps")
            if should_stop():
                raise KeyboardInterrupt  # what a block has not stored cannot be saved

        with users_code(f"learner {name!r}, tasks {todo.tolist()}"):
            histories = self.learner.learn(
                self.family, self.task_ids[todo], self.tasks[todo],
                **self.sizes, seed=self.seed, progress=progress,
            )  # fmt: skip
        if problem := return_problem(histories, len(todo)):
            raise RunError(f"learner {name!r}, tasks {todo.tolist()}: {problem}")
        shape = (self.sizes["n_learner"] * self.sizes["n_stream"], self.sizes["n_timesteps"])
        for index, history in zip(todo.tolist(), histories, strict=True):
            got, marker = history.rewards.shape, self.marker
            if got != shape:
                raise RunError(f"{name}, task {index}: expected (stream, time) {shape}, got {got}")
            history.check_finite(f"{name}, task {index}")
            if problem := first_stream_problem(self.family, self.tasks[index], history):
                raise RunError(f"{name} on {self.family.name}, task {index}: {problem}")
            if self.keep_every > 1:
                history = keep_episodes(history, self.keep_every, self.n_kept)
            if marker is not None:
                mask = mark_task(marker, history, index, seed=self.seed, **self.marker_params)
                history = history.with_mask(mask)
            self.writer.append(index, history)
