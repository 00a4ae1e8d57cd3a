"""Jobs in worker processes: progress comes home, a polite stop lets them save, a death is told apart.

Workers live for several jobs, so that each pays for its imports once. They ignore Ctrl-C and SIGTERM, which
reach the whole process group: the parent decides. They end at once when the parent is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from compressed_ad.errors import RunError, UsageError

Report = Callable[[int, int, str], None]
"""Called with units done, units expected, and a short text."""

Stop = Callable[[], bool]
"""True once work should stop."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_POLL_S = 0.2
_RAY_POLL_S = 0.5
_REPORT_S = 0.2
_PATIENCE_S = 120.0


class WorkerPool:
    """At most ``n_process`` workers; a context manager that leaves no process behind."""

    def __init__(self, n_process: int) -> None:
        self.n_process = n_process
        self.context = multiprocessing.get_context("spawn")
        self.stop = self.context.RawValue(ctypes.c_bool, False)
        self.workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.end()

    def run(
        self,
        jobs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
        progress: Callable[[str, int, int, str], None],
        should_stop: Stop,
        finished: Callable[[str, Any], None] = lambda name, result: None,
    ) -> dict[str, Any]:
        """Results of ``function(*arguments, report=..., should_stop=...)`` for every named job.

        ``finished`` is told each result as it comes.

        Once ``should_stop()`` is true, workers are given time to save, then ``KeyboardInterrupt`` is raised.
        The first error of a job stops the others in the same way and is raised; a worker that dies without
        an error is a ``RunError``.
        """
        waiting, results = list(jobs), dict[str, Any]()
        failure: BaseException | None = None
        deadline = float("inf")
        while len(self.workers) < min(self.n_process, len(jobs)):
            self.workers.append(_Worker(self.context, self.stop))
        while True:
            if should_stop() and failure is None:
                failure = KeyboardInterrupt()
            if failure is not None and not self.stop.value:
                self.stop.value = True
                deadline = time.monotonic() + _PATIENCE_S
            for worker in self.workers:
                if worker.job is None and waiting and failure is None:
                    name = waiting.pop(0)
                    worker.start(name, *jobs[name])
            busy = [worker for worker in self.workers if worker.job is not None]
            if not busy or time.monotonic() > deadline:
                break
            ready = wait([end for worker in busy for end in (worker.pipe, worker.process.sentinel)], _POLL_S)
            for worker in busy:
                if not {worker.pipe, worker.process.sentinel} & set(ready):
                    continue
                name = worker.job or ""
                kind, content = worker.receive()
                if kind == "progress":
                    progress(name, *content)
                    continue
                worker.job = None
                if kind == "result":
                    results[name] = content
                    finished(name, content)
                elif kind == "error":
                    failure = failure or content
                else:
                    self.workers.remove(worker)
                    failure = failure or RunError(
                        f"the process of {name} died ({content}); what it had saved is kept:"
                        " the same command again continues"
                    )
        if failure is not None:
            raise failure
        return results


class _Worker:
    def __init__(self, context: Any, stop: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, stop), daemon=True)
        added = [name for name in THREAD_VARIABLES if name not in os.environ]
        os.environ.update(dict.fromkeys(added, "1"))
        try:
            self.process.start()
        finally:
            for name in added:
                del os.environ[name]
        theirs.close()
        self.job: str | None = None

    def start(self, name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self.job = name
        self.pipe.send((function, tuple(arguments)))

    def receive(self) -> tuple[str, Any]:
        """("progress" | "result" | "error" | "died", content)."""
        with suppress(EOFError, ConnectionError):
            if self.pipe.poll():
                kind, content = self.pipe.recv()
                return str(kind), content
        self.process.join()
        code = self.process.exitcode or 0
        if code < 0:
            return "died", f"signal {-code}, {signal.Signals(-code).name}: killed? out of memory?"
        return "died", f"exit code {code}"

    def end(self) -> None:
        if self.job is None:
            self.pipe.close()  # an idle worker ends when its pipe does
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe: Connection, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last = 0.0

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_S or done == total:
            last = now
            pipe.send(("progress", (done, total, text)))

    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            message = ("result", function(*arguments, report=report, should_stop=lambda: bool(stop.value)))
        except BaseException as error:
            message = ("error", _portable(error))
        try:
            pipe.send(message)
        except ConnectionError:
            return


def _portable(error: BaseException) -> BaseException:
    """``error`` as it can travel between processes, with its traceback as a note."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt()
    text = "".join(traceback.format_exception(error))
    try:
        copy: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception does when it is pickled
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(text)
    return copy


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# ---------------------------------------------------------------- a Ray cluster


class RayPool:
    """At most ``n_process`` jobs at once on the cluster at ``address`` ("auto": the one of this machine).

    A job whose machine dies is started again, up to 3 times; it continues from what it saved.
    """

    def __init__(self, address: str, n_process: int) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UsageError("--ray needs Ray: pip install 'compressed-ad[ray]'") from None
        self.n_process = n_process
        variables = dict.fromkeys(THREAD_VARIABLES, "1")
        try:
            self.ray.init(
                address=None if address == "local" else address,
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
                num_cpus=n_process if address == "local" else None,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--ray {address}: no such cluster ({str(error).splitlines()[0]})") from None
        self.board = self.ray.remote(num_cpus=0)(_Board).remote()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ray.shutdown()

    def run(
        self,
        jobs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
        progress: Callable[[str, int, int, str], None],
        should_stop: Stop,
        finished: Callable[[str, Any], None] = lambda name, result: None,
    ) -> dict[str, Any]:
        """As ``WorkerPool.run``."""
        remote = self.ray.remote(num_cpus=1, max_retries=3)(_call)
        waiting, running, results = list(jobs), dict[Any, str](), dict[str, Any]()
        failure: BaseException | None = None
        deadline = float("inf")
        while (waiting and failure is None) or running:
            while waiting and failure is None and len(running) < self.n_process:
                name = waiting.pop(0)
                running[remote.remote(name, *jobs[name], self.board)] = name
            if should_stop() and failure is None:
                failure = KeyboardInterrupt()
            if failure is not None and deadline == float("inf"):
                deadline = time.monotonic() + _PATIENCE_S
                self.board.stop.remote()
            if time.monotonic() > deadline:
                break
            for name, latest in self.ray.get(self.board.latest.remote()).items():
                progress(name, *latest)
            for reference in self.ray.wait(list(running), timeout=_RAY_POLL_S)[0]:
                name = running.pop(reference)
                try:
                    results[name] = self.ray.get(reference)
                    finished(name, results[name])
                except self.ray.exceptions.RayTaskError as error:
                    failure = failure or error.as_instanceof_cause()
                except self.ray.exceptions.RayError as error:
                    failure = failure or RunError(f"{name} was lost: {str(error).splitlines()[0]}")
        if failure is not None:
            raise failure
        return results


class _Board:
    """Where jobs tell how far they are and ask whether to stop; lives on the cluster."""

    def __init__(self) -> None:
        self.progress: dict[str, tuple[int, int, str]] = {}
        self.stopping = False

    def tell(self, name: str, done: int, total: int, text: str) -> bool:
        self.progress[name] = (done, total, text)
        return self.stopping

    def asked(self) -> bool:
        return self.stopping

    def latest(self) -> dict[str, tuple[int, int, str]]:
        return self.progress

    def stop(self) -> None:
        self.stopping = True


def _call(name: str, function: Callable[..., Any], arguments: Sequence[Any], board: Any) -> Any:
    import ray

    last, stopping = 0.0, False

    def hear(answer: Callable[[], Any]) -> None:
        nonlocal last, stopping
        if not stopping:
            last, stopping = time.monotonic(), ray.get(answer())

    def report(done: int, total: int, text: str) -> None:
        if time.monotonic() - last >= _RAY_POLL_S or done == total:
            hear(lambda: board.tell.remote(name, done, total, text))

    def should_stop() -> bool:
        if time.monotonic() - last >= _RAY_POLL_S:
            hear(board.asked.remote)
        return stopping

    try:
        return function(*arguments, report=report, should_stop=should_stop)
    except KeyboardInterrupt:
        raise RuntimeError("stopped") from None
