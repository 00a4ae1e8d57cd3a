"""Kills every stage at random moments and at chosen system calls, goes on, and compares bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torture.faults import CALLS
from torture.same import Contents, contents, differences
from torture.stages import STAGES, Base, Stage
from torture.trials import Command, Trial, Verdict, cad

Draw = random.Random


def _workers(command: Command) -> list[int]:
    """Spawned workers, not the process that counts shared resources."""
    found = []
    for pid in command.processes():
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _tree(command: Command, draw: Draw) -> None:
    command.kill()


def _parent(command: Command, draw: Draw) -> None:
    os.kill(command.pid, signal.SIGKILL)


def _worker(command: Command, draw: Draw) -> None:
    if workers := _workers(command):
        os.kill(draw.choice(workers), signal.SIGKILL)


def _group(number: int, times: int = 1) -> Callable[[Command, Draw], None]:
    def send(command: Command, draw: Draw) -> None:
        for again in range(times):
            time.sleep(draw.uniform(0, 0.3) if again else 0)
            with suppress(ProcessLookupError):
                os.killpg(command.pid, number)

    return send


@dataclass(frozen=True)
class How:
    """A way to disturb a stage, and the exit codes that are right after it; 0 always is."""

    send: Callable[[Command, Draw], None]
    codes: tuple[int, ...]


HOW = {
    "SIGKILL": How(_tree, (-9,)),
    "SIGKILL of the parent": How(_parent, (-9,)),
    "SIGKILL of a worker": How(_worker, ()),
    "SIGTERM": How(_group(signal.SIGTERM), (143, -15)),  # -15: before it listens
    "SIGINT": How(_group(signal.SIGINT), (130, -2)),
    "SIGINT twice": How(_group(signal.SIGINT, 2), (130, -2)),
}


def at_random(base: Base, stage: Stage, how: str, name: str, kills: int = 3) -> Trial:
    """Disturbs a stage up to ``kills`` times at moments drawn from its own duration, then lets it end."""
    seconds, expected = _prepared(base, stage)

    def run(folder: Path) -> list[Verdict]:
        draw, injected, faults = Draw(name), 0, list[Verdict]()
        base.copy(stage.start, folder)
        first = stage.words(base, folder)
        words = first
        for _ in range(kills):
            command = Command(words, folder)
            if command.wait(draw.uniform(0, seconds)) is not None:
                break
            HOW[how].send(command, draw)
            injected += 1
            faults += _after(command, HOW[how])
            words = [*first, *stage.again]
        return judged(base, stage, expected, folder, injected, faults)

    return Trial(f"{how}: {stage.name}", name, run)


def at_call(base: Base, stage: Stage, call: str, name: str) -> Trial:
    """SIGKILL before or after a call of the operating system, drawn from those that the stage makes."""
    _, expected = _prepared(base, stage)

    def run(folder: Path) -> list[Verdict]:
        draw = Draw(name)
        base.copy(stage.start, folder)
        number = draw.randint(1, max(base.counts(stage.result)[call], 1))
        fault = f"{call} {number} {draw.choice(('before', 'after'))}"
        command = Command(stage.words(base, folder), folder, fault=fault)
        command.wait(120)
        killed = command.code == -signal.SIGKILL
        faults = _after(command, HOW["SIGKILL"])
        return judged(base, stage, expected, folder, int(killed), faults, fault)

    return Trial(f"SIGKILL at a system call: {stage.name}", name, run)


def _prepared(base: Base, stage: Stage) -> tuple[float, Contents]:
    """How long the stage takes and what it leaves; made now, since trials run side by side."""
    base(stage.start) if stage.start else None
    return base.seconds(stage.result), _expected(base, stage.result)


@cache
def _expected(base: Base, piece: str) -> Contents:
    return base.contents(piece)


def _after(command: Command, how: How) -> list[Verdict]:
    """Faults of a command that was disturbed: its exit code, what it printed, processes that outlive it."""
    ended, found = command.ended(30), list[Verdict]()
    if ended.code not in (0, *how.codes) and not (not how.codes and ended.code == 1):
        found.append(Verdict("exit code", f"{ended.code}: {ended.last()}"))
    if "Traceback" in ended.text or "internal error" in ended.text:
        found.append(Verdict("traceback", ended.text[-300:]))
    end = time.monotonic() + 4
    while (left := command.processes()) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        found.append(Verdict("orphans", f"{len(left)} processes live on"))
        command.kill()
    return found


def judged(
    base: Base,
    stage: Stage,
    expected: Contents,
    folder: Path,
    injected: int,
    faults: list[Verdict],
    what: str = "",
) -> list[Verdict]:
    """Goes on with a disturbed stage; a verdict for each injection."""
    ended = cad(*stage.words(base, folder), *stage.again, cwd=folder, limit=120)
    wrong = differences(expected, contents(folder))
    left = [path.name for path in folder.rglob("*.partial")]
    if ended.code != 0:
        faults.append(Verdict("lost", f"{what} the rerun ended with {ended.code}: {ended.error()}"))
    elif wrong:
        faults.append(Verdict("lost", f"{what} {'; '.join(wrong[:3])}"))
    elif left:
        faults.append(Verdict("left behind", f"{what} {', '.join(left)}"))
    if not faults:
        return [Verdict("recovered")] * injected
    return [*faults, *[Verdict("recovered")] * (injected - len(faults))]


SHORT = {"collect": 1, "mark": 1, "train": 1, "evaluate": 1, "report": 1, "study": 0, "run": 0}
LONG = {"collect": 24, "mark": 24, "train": 24, "evaluate": 24, "report": 14, "study": 16, "run": 10}
"""Trials of three SIGKILLs each, by stage."""


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    for stage, count in (LONG if long else SHORT).items():
        for k in range(count):
            yield at_random(base, STAGES[stage], "SIGKILL", f"{seed} {stage} SIGKILL {k}")
    for how in HOW:
        stages = (
            ("collect",) if how == "SIGKILL of a worker" else ("collect", "train") if long else ("train",)
        )
        for stage in stages if how != "SIGKILL" else ():
            for k in range(4 if long else 1):
                yield at_random(base, STAGES[stage], how, f"{seed} {stage} {how} {k}", 1)
    for stage in STAGES if long else ("collect --overwrite", "mark", "train", "report"):
        few = stage in ("study", "run", "report")
        for call in CALLS if long else ("replace",):
            for k in range(2 if few else 6) if long else range(2):
                yield at_call(base, STAGES[stage], call, f"{seed} {stage} {call} {k}")
