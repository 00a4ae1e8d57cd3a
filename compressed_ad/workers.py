"""Work in several processes, here or on a Ray cluster: one progress, a polite stop, a retry after a death.

Workers live for several runs, so that each pays for its imports once. They ignore Ctrl-C and SIGTERM, which
reach the whole process group: the parent decides. They end at once when the parent is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, Self

from compressed_ad.errors import MissingExtraError, RunError, UsageError, one_line, raised, users_code

Report = Callable[[int, int, str], None]
"""Called with units done, units expected, and a short text."""

ShouldStop = Callable[[], bool]
"""True once work should stop: it then saves and raises ``KeyboardInterrupt``."""

Event = tuple[str, str, Any]
"""The name of a unit; "progress", "result", "error" or "died"; and the content that goes with it."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_RAY_POLL_S = 0.5
_MOVE = (
    "; classes and functions of a notebook or of __main__ must be moved into a module, a file that"
    " can be imported, or use n_process=1"
)


def silent(done: int, total: int, text: str) -> None:
    """A ``Report`` that shows nothing."""


def never() -> bool:
    """A ``ShouldStop`` that never comes."""
    return False


class Parts:
    """Adds up the progress of many parts, each on its own scale, into one report.

    ``weights`` says how much each part counts, ``before`` how much was done earlier. A weight of 1 is
    shown as ``unit`` units; if that is None, as the largest total of any part.
    """

    def __init__(
        self, report: Report, weights: Mapping[str, float], *, unit: int | None = None, before: float = 0
    ) -> None:
        self.report, self.weights, self.before = report, weights, before
        self.unit, self.fixed = unit or 0, unit is not None
        self.shares = dict.fromkeys(weights, 0.0)
        self.text = ""
        self._show()

    def advance(self, name: str, done: int, total: int, text: str) -> None:
        """A ``Report`` of the part ``name``, once that is bound."""
        if not self.fixed:
            self.unit = max(self.unit, total)
        self.text = text
        self.set(name, min(done / max(total, 1), 1.0))

    def set(self, name: str, share: float) -> None:
        """A ``share`` of the part ``name`` is done: 1 when it is finished, 0 when it was lost."""
        self.shares[name] = share
        self._show()

    def _show(self) -> None:
        if self.unit:
            done = self.before + sum(self.weights[name] * share for name, share in self.shares.items())
            total = self.before + sum(self.weights.values())
            self.report(round(done * self.unit), round(total * self.unit), self.text)


class Pool(Protocol):
    """Runs units of work in at most ``n_process`` processes; a context manager that leaves none behind."""

    n_process: int
    timeout: float | None
    memory_limit: int | None = None  # bytes of all processes together
    elsewhere: bool = False  # whether even a single unit must not run in this process

    def __enter__(self) -> Self:
        return self

    def run(
        self,
        function: Callable[..., Any],
        units: Mapping[str, Sequence[Any]],
        *,
        progress: Parts | None = None,
        should_stop: ShouldStop = never,
        finished: Callable[[str, Any], None] = lambda name, result: None,
        retry: bool = False,
        patience: float = 120.0,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Results of ``function(*arguments, report=..., should_stop=...)`` for the arguments of every unit.

        ``function`` is sent to each worker once, so data that all units share belongs to it (as a bound
        method, say). A single unit, and all units if ``n_process`` is 1, run in this process. ``finished`` is
        called with each result as it comes.

        Once ``should_stop()`` is true, units get ``patience`` seconds to save, then ``KeyboardInterrupt`` is
        raised. The first error of a unit stops the others in the same way and is raised, with its traceback
        as a note. The death of a worker is a ``RunError``; with ``retry`` its unit is first tried once more,
        alone. With ``timeout``, all units run in workers of this machine, and one that tells of no progress
        for so many seconds is ended, with a ``RunError``.
        """
        parts = Parts(silent, dict.fromkeys(units, 1)) if progress is None else progress
        results: dict[str, Any] = {}
        self.timeout = timeout
        if min(self.n_process, len(units)) <= 1 and not self.elsewhere and timeout is None:
            for name, arguments in units.items():
                report = partial(parts.advance, name)
                results[name] = function(*arguments, report=report, should_stop=should_stop)
                parts.set(name, 1)
                finished(name, results[name])
                if should_stop():
                    raise KeyboardInterrupt
            return results
        waiting, lost, running, died = list(units), list[str](), set[str](), set[str]()
        failure: BaseException | None = None
        deadline = float("inf")
        self._begin(function, len(units))
        while True:
            if failure is None and should_stop():
                failure = KeyboardInterrupt()
            if failure is not None and deadline == float("inf"):
                deadline = time.monotonic() + patience
                self._ask_to_stop()
            # Only alone does a lost unit show whether it is the cause: memory may have run out.
            while failure is None and (waiting or lost) and len(running) < (self.n_process if waiting else 1):
                name = (waiting or lost).pop(0)
                running.add(name)
                self._start(name, units[name])
            if not running or time.monotonic() > deadline:
                break
            for name, kind, content in self._events():
                if kind == "progress":
                    done, total, text = content
                    parts.advance(name, done, total, f"{name} {text}")
                    continue
                running.remove(name)
                if kind == "result":
                    results[name] = content
                    parts.set(name, 1)
                    finished(name, content)
                elif kind == "error":
                    failure = failure or content
                elif retry and name not in died:
                    died.add(name)
                    lost.append(name)
                    parts.set(name, 0)
                else:
                    failure = failure or RunError(
                        f"the process of {name} died{' twice' if name in died else ''} ({content});"
                        " what it had saved is kept: give the same command again, or resume it"
                    )
        if failure is not None:
            raise failure
        return results

    # What the two kinds of pool do differently:
    def __exit__(self, *exception: object) -> None: ...
    def _begin(self, function: Callable[..., Any], n_unit: int) -> None: ...
    def _start(self, name: str, arguments: Sequence[Any]) -> None: ...
    def _events(self) -> Iterator[Event]: ...  # of running units, after a short wait if there are none
    def _ask_to_stop(self) -> None: ...


def open_pool(ray_address: str | None, n_process: int, memory_limit: int | None = None) -> Pool:
    """Workers on this machine, or on the Ray cluster at ``ray_address``, for work within ``memory_limit``."""
    pool = WorkerPool(n_process) if ray_address is None else RayPool(ray_address, n_process)
    pool.memory_limit = memory_limit
    return pool


def _outcome(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """("result" | "error", content), in a form that can travel between processes."""
    try:
        return "result", function(*arguments)
    except KeyboardInterrupt:
        return "error", KeyboardInterrupt()
    except BaseException as error:
        try:
            if isinstance(error, SystemExit):  # it would end the parent
                raise ValueError
            copy: BaseException = pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a foreign exception does when it is pickled
            copy = RunError(raised(error))
        copy.add_note("".join(traceback.format_exception(error)))
        return "error", copy


# ---------------------------------------------------------------- this machine


class WorkerPool(Pool):
    """Processes of this machine, with one computing thread each."""

    def __init__(self, n_process: int) -> None:
        self.n_process = n_process
        self.context = multiprocessing.get_context("spawn")
        # Plain shared memory without a lock: a worker may die at any moment.
        self.stop = self.context.RawValue(ctypes.c_bool, False)
        self.workers: list[_Worker] = []
        self.function = b""

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.dismiss()  # all at once
        for worker in self.workers:
            worker.end()

    def _begin(self, function: Callable[..., Any], n_unit: int) -> None:
        try:
            self.function = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(f"cannot be sent to worker processes ({error}); use n_process=1") from error
        self.stop.value = False
        while len(self.workers) < min(self.n_process, n_unit):
            self.workers.append(_Worker(self.context, self.stop))

    def _start(self, name: str, arguments: Sequence[Any]) -> None:
        free = [worker for worker in self.workers if worker.unit is None and worker.process.is_alive()]
        if not free:  # one has died
            free = [_Worker(self.context, self.stop)]
            self.workers += free
        free[0].start(name, self.function, arguments)

    def _events(self) -> Iterator[Event]:
        busy = {worker: worker.unit for worker in self.workers if worker.unit is not None}
        ready = wait([end for worker in busy for end in worker.ends], 0.2)
        for worker, name in busy.items():
            if set(worker.ends) & set(ready):
                kind, content = worker.receive()
                if kind == "died":
                    self.workers.remove(worker)
                yield name, kind, content
            elif self.timeout is not None and time.monotonic() - worker.heard > self.timeout:
                worker.end()
                self.workers.remove(worker)
                yield name, "error", RunError(f"{name}: no progress for {self.timeout:g} seconds; was ended")

    def _ask_to_stop(self) -> None:
        self.stop.value = True


@contextmanager
def _main_file() -> Iterator[None]:
    """Workers import the file of ``__main__``; a program that was read from a pipe has none."""
    main = vars(sys.modules["__main__"])
    file = main.get("__file__")
    gone = file is not None and not Path(file).exists()
    if gone:
        del main["__file__"]
    try:
        yield
    finally:
        if gone:
            main["__file__"] = file


class _Worker:
    def __init__(self, context: Any, stop: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, stop), daemon=True)
        added = [name for name in THREAD_VARIABLES if name not in os.environ]
        os.environ.update(dict.fromkeys(added, "1"))
        try:
            with _main_file():
                self.process.start()
        finally:
            for name in added:
                del os.environ[name]
        theirs.close()
        self.ends = (self.pipe, self.process.sentinel)
        self.unit: str | None = None
        self.heard = 0.0  # when its unit was started or told of progress
        self.function = b""  # the one that it has

    def start(self, name: str, function: bytes, arguments: Sequence[Any]) -> None:
        self.unit, self.heard = name, time.monotonic()
        new = None if function is self.function else function
        self.function = function
        with suppress(ConnectionError):  # it has died, which the next event tells
            self.pipe.send((new, arguments))

    def receive(self) -> tuple[str, Any]:
        """("progress" | "result" | "error" | "died", content)."""
        with suppress(EOFError, OSError):  # it may have died in the middle of a message
            if self.pipe.poll():
                self.heard = time.monotonic()
                kind, content = self.pipe.recv()
                if kind != "progress":
                    self.unit = None
                return kind, content
        self.process.join()
        code = self.process.exitcode or 0
        if code < 0:
            return "died", f"signal {-code}, {signal.Signals(-code).name}: killed? out of memory?"
        if code == 0:
            return "died", "exit code 0 without an error: does its code call os._exit?"
        return "died", f"exit code {code}; a script must start work under if __name__ == '__main__'"

    def dismiss(self) -> None:
        if self.unit is None:
            self.pipe.close()  # an idle worker ends when its pipe does

    def end(self) -> None:
        self.dismiss()
        if self.unit is None:
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe: Connection, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    last, function = 0.0, b""

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.2 or done == total:
            last = now
            pipe.send(("progress", (done, total, text)))

    @lru_cache(maxsize=1)
    def load(function: bytes) -> Any:
        with users_code("a worker process cannot load the work", UsageError, advice=_MOVE):
            return pickle.loads(function)

    def run(function: bytes, arguments: Sequence[Any]) -> Any:
        return load(function)(*arguments, report=report, should_stop=lambda: bool(stop.value))

    with suppress(EOFError, ConnectionError):  # the parent has closed the pipe
        while True:
            new, arguments = pipe.recv()
            function = function if new is None else new
            pipe.send(_outcome(run, function, arguments))


# ---------------------------------------------------------------- a Ray cluster


class RayPool(Pool):
    """The cluster at ``address`` ("auto": the one of this machine; "local": one that lives for this pool).

    A unit whose machine dies is started again, up to 3 times, with or without ``retry``; it continues from
    what it saved. Relative paths mean the same as here, where the machines share this folder.
    """

    elsewhere = True

    def __init__(self, address: str, n_process: int) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise MissingExtraError("--ray", "ray") from None
        self.n_process = n_process
        local = address == "local"
        try:
            self.ray.init(
                address=None if local else address,
                runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, "1")},
                log_to_driver=False,
                include_dashboard=False if local else None,
                num_cpus=n_process if local else None,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--ray {address}: no such cluster ({one_line(error)})") from None
        self.task = self.ray.remote(num_cpus=1, max_retries=3)(_call)

    def __exit__(self, *exception: object) -> None:
        self.ray.shutdown()

    def _begin(self, function: Callable[..., Any], n_unit: int) -> None:
        if self.timeout is not None:
            raise UsageError("a timeout works on this machine only; leave out --ray or the timeout")
        try:
            self.function = self.ray.put(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(f"cannot be sent to a cluster ({one_line(error)})") from error
        self.board = self.ray.remote(num_cpus=0)(_Board).remote()
        self.running: dict[Any, str] = {}

    def _start(self, name: str, arguments: Sequence[Any]) -> None:
        reference = self.task.remote(name, self.function, arguments, self.board, Path.cwd())
        self.running[reference] = name

    def _events(self) -> Iterator[Event]:
        latest = self.ray.get(self.board.latest.remote())
        for name in set(self.running.values()) & set(latest):
            yield name, "progress", latest[name]
        for reference in self.ray.wait(list(self.running), timeout=_RAY_POLL_S)[0]:
            name = self.running.pop(reference)
            try:
                kind, content = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                kind, content = "error", RunError(f"{name} was lost: {one_line(cause)}")
            yield name, kind, content

    def _ask_to_stop(self) -> None:
        self.board.stop.remote()


class _Board:
    """Lives on the cluster: units tell it how far they are, and hear whether to stop."""

    def __init__(self) -> None:
        self.progress: dict[str, tuple[int, int, str]] = {}
        self.stopping = False

    def tell(self, name: str, progress: tuple[int, int, str] | None) -> bool:
        if progress is not None:
            self.progress[name] = progress
        return self.stopping

    def latest(self) -> dict[str, tuple[int, int, str]]:
        return self.progress

    def stop(self) -> None:
        self.stopping = True


def _call(
    name: str, function: Callable[..., Any], arguments: Sequence[Any], board: Any, folder: Path
) -> tuple[str, Any]:
    import ray

    try:
        os.chdir(folder)
    except OSError as error:
        where = f"machine {os.uname().nodename} of the Ray cluster"
        return "error", RunError(f"{name}: {where} does not share the folder {folder} ({error.strerror})")
    progress: Any = None
    last, stopping = 0.0, False

    def report(*latest: Any) -> None:
        nonlocal progress
        progress = latest
        should_stop()

    def should_stop() -> bool:
        nonlocal last, stopping
        if not stopping and time.monotonic() - last >= _RAY_POLL_S:
            last, stopping = time.monotonic(), ray.get(board.tell.remote(name, progress))
        return stopping

    return _outcome(partial(function, report=report, should_stop=should_stop), *arguments)
