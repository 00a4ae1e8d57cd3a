"""Workers in processes of this machine.

They live for several runs, so that each pays for its imports once. They ignore Ctrl-C and SIGTERM, which
reach the whole process group: the parent decides. They end at once when the parent is gone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from compressed_ad.errors import RunError, UsageError, users_code
from compressed_ad.workers.pool import MOVE, THREAD_VARIABLES, Event, Pool, outcome


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
        with users_code("a worker process cannot load the work", UsageError, advice=MOVE):
            return pickle.loads(function)

    def run(function: bytes, arguments: Sequence[Any]) -> Any:
        return load(function)(*arguments, report=report, should_stop=lambda: bool(stop.value))

    with suppress(EOFError, ConnectionError):  # the parent has closed the pipe
        while True:
            new, arguments = pipe.recv()
            function = function if new is None else new
            pipe.send(outcome(run, function, arguments))
