"""A trial injects a fault in a folder and a process of its own, and says what came of it."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torture import faults

GOOD = ("same", "named", "fine", "recovered")
"""Kinds of verdicts that are no fault. "same": nothing changed. "named": refused with a sentence.
"recovered": lost work was done again, with the same result. "fine": accepted, for the reason in the case."""


@dataclass(frozen=True)
class Verdict:
    kind: str
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.kind in GOOD


@dataclass(frozen=True)
class Trial:
    """``run`` gets an empty folder and gives one verdict for each injection."""

    row: str  # the line of the table that it counts in
    name: str
    run: Callable[[Path], list[Verdict]]
    limit: float = 240.0  # seconds


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``code`` is minus a signal's number, or None if it did not end."""

    code: int | None
    text: str

    def verdict(self) -> Verdict:
        """What can be said without knowing the case; the kind "accepted" is left to the case."""
        if self.code is None:
            return Verdict("hang", self.last())
        if self.code < 0:
            return Verdict("crash", f"signal {-self.code}: {self.last()}")
        if "Traceback (most recent" in self.text:
            return Verdict("traceback", self.text[-300:])
        if "internal error" in self.text:
            return Verdict("internal error", self.error())
        if self.code == 0:
            return Verdict("accepted", self.last())
        if self.code in (1, 2) and "cad: error: " in self.text:
            return Verdict("named", self.error())
        return Verdict("no word", f"exit {self.code}: {self.last()}")

    def last(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1][:200]

    def error(self) -> str:
        return next((line for line in self.text.splitlines() if "cad: error" in line), self.last())[:300]


# ---------------------------------------------------------------- commands


@dataclass
class Command:
    """``cad WORDS`` in a forked child of this process: a session of its own, and no imports to wait for."""

    words: Sequence[object]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""  # see ``faults.arm``
    stdout: Path | None = None  # instead of the log, where the error output stays
    encoding: str = "utf-8"  # of the output
    before: Callable[[], object] = bool  # called in the child first

    def __post_init__(self) -> None:
        self.log = self.cwd / f".log-{time.monotonic_ns()}"
        self.log.touch()  # before the child can be killed
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._child())

    def _child(self) -> int:
        code = 99
        try:
            os.setsid()
            _die_with_parent()
            err = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            out = err if self.stdout is None else os.open(self.stdout, os.O_WRONLY)
            for number, target in ((1, out), (2, err)):
                os.dup2(target, number)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(
                    os.fdopen(number, "wb", 0, closefd=False), self.encoding, errors, write_through=True
                )
                for number, errors in ((1, "strict"), (2, "backslashreplace"))
            )
            os.chdir(self.cwd)
            os.environ.update(self.env)
            from compressed_ad.cli.main import main

            # Spawned workers import the main module: that of the library, not that of the torture.
            sys.modules["__main__"].__spec__ = find_spec("compressed_ad.__main__")
            self.before()
            faults.arm(self.fault)
            code = main([str(word) for word in self.words])
        except BaseException:
            traceback.print_exc()
        with suppress(Exception):
            faults.disarm()
            sys.stdout.flush()
        return code

    def wait(self, limit: float = 60.0) -> int | None:
        """Its exit code; None if it still runs after ``limit`` seconds."""
        end = time.monotonic() + limit
        while self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return None
            else:
                time.sleep(0.003)
        return self.code

    def processes(self) -> list[int]:
        """Those of its session that live, workers included."""
        return session(self.pid)

    def kill(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ended(self, limit: float = 60.0) -> Ended:
        """How it ended; killed if it did not end within ``limit`` seconds."""
        code = self.wait(limit)
        if code is None:
            self.kill()
            self.wait()
        return Ended(code, self.log.read_text(errors="replace"))


def cad(*words: object, cwd: Path, limit: float = 60.0, **options: Any) -> Ended:
    return Command(words, cwd, **options).ended(limit)


def done(*words: object, cwd: Path) -> str:
    """What a command prints that must end with 0: the trial needs it."""
    ended = cad(*words, cwd=cwd, limit=200)
    if ended.code != 0:
        raise RuntimeError(f"cad {' '.join(map(str, words))} ended with {ended.code}: {ended.text[-500:]}")
    return ended.text


def session(sid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, IndexError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdecimal() and int(fields[3]) == sid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------- trials


def run(trials: Iterable[Trial], folder: Path, at_once: int) -> Iterator[tuple[Trial, list[Verdict]]]:
    """Each trial in a forked child, ``at_once`` at a time; a folder whose trial met a fault is kept."""
    waiting, active = deque(trials), dict[int, tuple[Trial, float, Path]]()
    count = 0
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                trial, path = waiting.popleft(), folder / f"{count}"
                count += 1
                active[_start(trial, path)] = (trial, time.monotonic(), path)
            for pid, (trial, began, path) in list(active.items()):
                ended, late = os.waitpid(pid, os.WNOHANG)[0], time.monotonic() - began > trial.limit
                if not ended and late:
                    _end(pid)
                if ended or late:
                    del active[pid]
                    verdicts = _verdicts(path, trial.limit if late else None)
                    if all(verdict.good for verdict in verdicts):
                        shutil.rmtree(path, ignore_errors=True)
                        path.with_suffix(".json").unlink(missing_ok=True)
                    yield trial, verdicts
            time.sleep(0.005)
    finally:
        for pid in active:
            _end(pid)


def _start(trial: Trial, path: Path) -> int:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    path.with_suffix(".json").unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        _die_with_parent()
        try:
            verdicts = trial.run(path)
        except Exception as error:  # a trial that fails is a fault to show, and the others go on
            where = " < ".join(
                f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__))
            )
            verdicts = [Verdict("the trial failed", f"{type(error).__name__}: {error} ({where})")]
        told = json.dumps([[v.kind, v.detail.replace(str(path), ".")] for v in verdicts])
        path.with_suffix(".json").write_text(told)
    finally:
        os._exit(0)


def _verdicts(path: Path, limit: float | None) -> list[Verdict]:
    if limit is not None:
        return [Verdict("hang", f"not done after {limit:.0f} s")]
    try:
        return [Verdict(*told) for told in json.loads(path.with_suffix(".json").read_text())]
    except (OSError, ValueError):
        return [Verdict("crash", "the trial's process died")]


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
