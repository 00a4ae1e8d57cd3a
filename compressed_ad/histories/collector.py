"""Learn every task of a family and store the learning histories: family + learner + split -> file.

Blocks of tasks are the unit of work. What a task's history holds depends on the seed and the task alone, not
on the block it is learned in or the process that learns it. Finished tasks are on disk at once; whatever ends
a collection, the next one with ``resume=True`` goes on after them and arrives at the same arrays.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import ConfigError, RunError, UsageError
from compressed_ad.histories.file import HistoryFile, HistoryInfo, HistoryWriter, remark
from compressed_ad.learners.base import Checks, Progress, SourceLearner
from compressed_ad.marking.apply import (
    REQUIRED,
    apply_marker,
    find_marker,
    marker_name,
    marker_parameters,
    task_seed,
)
from compressed_ad.marking.conformance import marker_faults
from compressed_ad.marking.markers import Marker
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.tasks.split import choose_tasks, split_family
from compressed_ad.types import AnyArray, History, IntArray

TotalProgress = Callable[[int, int], None]
"""Called with the environment steps done so far and their total, all tasks and streams together."""

MAX_BLOCK = 8
"""Tasks learned together: enough to fill a batched learner, few enough that a crash loses little."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_POLL_S = 0.2


def history_path(directory: str | Path, family_name: str, learner_name: str, seed: int) -> Path:
    """Where a collection is stored, e.g. ``datasets/history_darkroom_PPO_alg-seed0_compressed.hdf5``."""
    return Path(directory) / f"history_{family_name}_{learner_name}_alg-seed{seed}_compressed.hdf5"


def collect(
    family: TaskFamily,
    learner: SourceLearner,
    path: str | Path,
    *,
    family_name: str,
    family_kwargs: Mapping[str, Any] | None = None,
    learner_config: Mapping[str, Any] | None = None,
    n_timesteps: int,
    n_learner: int = 1,
    n_stream: int = 100,
    n_task: int | None = None,
    train: int | None = None,
    validation: int | None = None,
    heldout: int | None = None,
    marker: str | Marker | None = "threshold",
    marker_params: Mapping[str, Any] | None = None,
    seed: int = 0,
    split_seed: int | None = None,
    n_process: int = 1,
    block_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: TotalProgress = lambda done, total: None,
) -> Path:
    """Let ``learner`` learn tasks of ``family`` and write their histories to ``path``, which is returned.

    Each task gets ``n_learner * n_stream`` streams of ``n_timesteps`` transitions, marked by ``marker``
    (None: no mask). All tasks are collected, or a random ``n_task`` of them; the file numbers them from 0
    and keeps the family's ids in its config (``task_ids``). They are split by ``split_family``
    with ``split_seed`` (``seed`` if None).
    ``family_name``, ``family_kwargs`` and ``learner_config`` are stored so that both can be made again.
    What stands at ``path`` already is continued with ``resume`` (a finished file is left as it is, marks
    included), replaced with ``overwrite``, else refused with ``HistoryError``.

    With ``n_process > 1`` blocks of ``block_size`` tasks are learned in spawned worker processes of one
    thread each, so a script must call this under ``if __name__ == "__main__":``. Workers end with the parent.
    A block whose worker died is tried once more, alone. Raises ``UsageError`` before anything is started;
    ``RunError`` when a worker dies twice; whatever the learner or the marker raises. Finished tasks are kept.
    """
    for name, count in (("n_timesteps", n_timesteps), ("n_learner", n_learner), ("n_stream", n_stream)):
        _at_least_one(name, count)
    _at_least_one("n_process", n_process)
    _at_least_one("block_size", 1 if block_size is None else block_size)
    params = dict(marker_params or {})
    if marker is not None:
        problems = marker_faults(find_marker(marker), **params)
        if problems:
            raise ConfigError(f"marker {marker_name(marker)!r}: {problem}" for problem in problems)
    if isinstance(learner, Checks):
        learner.check(family, n_timesteps=n_timesteps, n_stream=n_stream)
    all_tasks = family.tasks()
    task_ids = choose_tasks(len(all_tasks), seed, n_task)
    tasks = all_tasks[task_ids]
    info = HistoryInfo(
        family=family_name,
        family_kwargs=dict(family_kwargs or {}),
        spaces=family_specs(family),
        horizon=family.horizon,
        learner=learner.name,
        config={
            **(learner_config or {}),
            "n_timesteps": n_timesteps,
            "n_learner": n_learner,
            "n_stream": n_stream,
            "task_ids": task_ids.tolist(),
        },
        seed=seed,
    )
    split = split_family(
        family, task_ids, seed if split_seed is None else split_seed,
        train=train, validation=validation, heldout=heldout,
    )  # fmt: skip
    writer = HistoryWriter(
        path, info, split, tasks, family.optimal_return(tasks), family.random_return(tasks),
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    job = _Job(
        family, learner, writer, tasks, task_ids, n_timesteps, n_learner, n_stream, seed, marker, params
    )
    done = sorted(writer.done_tasks())
    todo = np.setdiff1d(np.arange(len(tasks)), done)
    meter = _Meter(progress, job.steps_per_task, len(tasks), len(done))
    blocks = _blocks(todo, n_process, block_size)
    if n_process == 1 or len(blocks) <= 1:
        for block in blocks:
            job.run(block, meter.add)
            meter.finish(block)
    else:
        _run_in_workers(job, blocks, n_process, meter)
    # Earlier shards may carry the masks of another marker: then all are marked once more, at the end.
    writer.finish(None if done or marker is None else _provenance(marker, params, seed))
    if marker is not None and HistoryFile(path, verify=False).marking is None:
        remark(path, marker, params, seed=seed)
    return Path(path)


def _provenance(marker: str | Marker, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    defaults = {name: value for name, value in marker_parameters(marker).items() if value is not REQUIRED}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"marker": marker_name(marker), "parameters": {**defaults, **params}, "seed": seed, "time": now}


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UsageError(f"{name} must be an integer >= 1, got {value!r}")


def _blocks(todo: IntArray, n_process: int, block_size: int | None) -> list[IntArray]:
    """``todo`` in blocks of ``block_size``, or of nearly equal sizes that keep every process busy."""
    if len(todo) == 0:
        return []
    if block_size is not None:
        return [todo[i : i + block_size] for i in range(0, len(todo), block_size)]
    rounds = -(-len(todo) // (MAX_BLOCK * n_process))
    return np.array_split(todo, min(rounds * n_process, len(todo)))


class _Meter:
    """Adds up progress: whole tasks on disk, and what running blocks report (lost if their worker dies)."""

    def __init__(self, progress: TotalProgress, steps_per_task: int, n_task: int, n_done: int) -> None:
        self._progress, self._per_task, self._total = progress, steps_per_task, steps_per_task * n_task
        self._before = n_done
        self.restart(0)

    def restart(self, n_done: int) -> None:
        """``n_done`` tasks are on disk that were not there at first, and nothing runs."""
        self._done = self._per_task * (self._before + n_done)
        self.show(0)

    def add(self, steps: int) -> None:
        """``steps`` more of the running blocks."""
        self.show(self._running + steps)

    def show(self, running: int) -> None:
        """``running`` steps of the running blocks in all."""
        self._running = running
        self._progress(min(self._done + running, self._total), self._total)

    def finish(self, block: IntArray, running: int = 0) -> None:
        """A block is on disk; the others that run have done ``running`` steps."""
        self._done += self._per_task * len(block)
        self.show(running)


@dataclass(frozen=True)
class _Job:
    """Everything that learning a block needs; sent to every worker once."""

    family: TaskFamily
    learner: SourceLearner
    writer: HistoryWriter
    tasks: AnyArray  # (N, P)
    task_ids: IntArray  # (N,) into the family
    n_timesteps: int
    n_learner: int
    n_stream: int
    seed: int
    marker: str | Marker | None
    marker_params: dict[str, Any]

    @property
    def steps_per_task(self) -> int:
        return self.n_timesteps * self.n_learner * self.n_stream

    def run(self, block: IntArray, progress: Progress) -> None:
        """Learn the tasks of ``block`` (indices into the file) and store each."""
        histories = self.learner.learn(
            self.family, self.task_ids[block], self.tasks[block],
            n_timesteps=self.n_timesteps, n_learner=self.n_learner, n_stream=self.n_stream,
            seed=self.seed, progress=progress,
        )  # fmt: skip
        if len(histories) != len(block):
            raise RunError(f"{self.learner.name} gave {len(histories)} histories of {len(block)} tasks")
        for index, history in zip(block.tolist(), histories, strict=True):
            self.writer.append(index, self._marked(index, history))

    def _marked(self, index: int, history: History) -> History:
        shape = (self.n_learner * self.n_stream, self.n_timesteps)
        if history.rewards.shape != shape:
            raise RunError(
                f"{self.learner.name}, task {index}: expected (stream, time) {shape}, "
                f"got {history.rewards.shape}"
            )
        history.check_finite(f"{self.learner.name}, task {index}")
        if self.marker is None:
            return history
        seed = task_seed(self.seed, index)
        return history.with_mask(apply_marker(self.marker, history, seed=seed, **self.marker_params))


# ---------------------------------------------------------------- worker processes


def _run_in_workers(job: _Job, blocks: Sequence[IntArray], n_process: int, meter: _Meter) -> None:
    try:
        pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(f"cannot be sent to worker processes ({error}); use n_process=1") from error
    lost = _pool(job, blocks, n_process, meter)
    while lost:
        # One death takes down the whole pool: only alone does a block show whether it is the cause.
        for block in lost:
            left = _unfinished(job, [block])
            meter.restart(_count(blocks) - _count(_unfinished(job, blocks)))
            if left and _pool(job, left, 1, meter):
                raise RunError(
                    f"the worker process of tasks {left[0].tolist()} died twice without an error (killed? "
                    "out of memory?); finished tasks are kept: resume, perhaps with fewer streams. "
                    "A script must call collect under if __name__ == '__main__'"
                )
        left = _unfinished(job, blocks)
        lost = _pool(job, left, n_process, meter) if left else []


def _unfinished(job: _Job, blocks: Sequence[IntArray]) -> list[IntArray]:
    """``blocks`` without the tasks that are on disk."""
    done = sorted(job.writer.done_tasks())
    left = [np.setdiff1d(block, done) for block in blocks]
    return [block for block in left if len(block)]


def _count(blocks: Sequence[IntArray]) -> int:
    return sum(len(block) for block in blocks)


def _pool(job: _Job, blocks: Sequence[IntArray], n_process: int, meter: _Meter) -> list[IntArray]:
    """Learn ``blocks`` in worker processes; the blocks that were running when a worker died, if one did."""
    context = multiprocessing.get_context("spawn")
    # Plain shared memory without locks: a worker may die at any moment.
    steps = context.RawArray(ctypes.c_int64, n_process)
    stop = context.RawValue(ctypes.c_bool, False)
    waiting, free = deque(blocks), list(range(n_process))
    running: dict[Future[None], tuple[int, IntArray]] = {}
    with _one_thread_each():
        pool = ProcessPoolExecutor(
            min(n_process, len(blocks)), context, initializer=_start_worker, initargs=(job, steps, stop)
        )
        try:
            while waiting or running:
                while waiting and free:
                    steps[free[-1]] = 0
                    future = pool.submit(_learn_block, free[-1], waiting[0])
                    running[future] = free.pop(), waiting.popleft()
                for future in wait(running, _POLL_S, FIRST_COMPLETED).done:
                    future.result()
                    slot, block = running.pop(future)
                    free.append(slot)
                    meter.finish(block, sum(steps[slot] for slot, _ in running.values()))
                meter.show(sum(steps[slot] for slot, _ in running.values()))
        except BrokenProcessPool:
            return [block for _, block in running.values()] or [waiting[0]]
        except BaseException:
            stop.value = True
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return []


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes spawned inside compute with one thread, unless the environment says otherwise."""
    added = [name for name in _THREAD_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _Worker:
    """What a worker process keeps between its blocks."""

    current: _Worker

    def __init__(self, job: _Job, steps: Any) -> None:
        self.job, self.steps = job, steps


def _start_worker(job: _Job, steps: Any, stop: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent decides, and stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(stop,), daemon=True).start()
    _Worker.current = _Worker(job, steps)


def _end_with_parent(stop: Any) -> None:
    parent = multiprocessing.parent_process()
    gone = parent is None
    while parent is not None and not gone and not stop.value:
        gone = bool(wait_for([parent.sentinel], timeout=_POLL_S))
    os._exit(1)


def _learn_block(slot: int, block: IntArray) -> None:
    worker = _Worker.current

    def progress(steps: int) -> None:
        worker.steps[slot] += steps

    worker.job.run(block, progress)
