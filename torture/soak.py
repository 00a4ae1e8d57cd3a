"""Every stage again and again in one process: memory, files, threads and processes do not grow."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from torture.stages import COLLECT, ENV, HISTORY, RUNS, Base
from torture.trials import Trial, Verdict, session

GROWTH_MB = 40.0
"""Of the resident memory, from the third time on: allocators keep some."""


def used() -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    return {
        "memory, MB": int(status.split("VmRSS:")[1].split()[0]) / 1024,
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "processes": len(session(os.getsid(0))),
        "shared memory": len(list(Path("/dev/shm").glob("*"))),
    }


def again(base: Base, folder: Path, times: int, small: bool) -> list[Verdict]:
    from compressed_ad.cli.main import main

    os.chdir(folder)
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    temporary = folder / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    verdicts, before = list[Verdict](), dict[str, float]()
    for k in range(times):
        one = ["--algorithm.n_process", "1", "--out"]
        short = [*ENV, "--model.steps", "10", "--model.validations", "1"]
        if small:
            jobs: list[list[object]] = [
                ["collect", *COLLECT, *one, "out/datasets"],
                [
                    "train",
                    *short,
                    "--model",
                    "CompressedAD",
                    "--history",
                    f"out/{HISTORY}",
                    "--out",
                    "out/runs",
                ],
                ["evaluate", f"out/{RUNS[1]}"],
            ]
        else:
            jobs = [["run", *COLLECT, *short[len(ENV) :], "--comparison.runs", "1", *one, "out"]]
        codes = [main([str(word) for word in job]) for job in jobs]
        if any(codes):
            return [*verdicts, Verdict("lost", f"time {k}: exit codes {codes}")]
        left = [path.name for path in Path("out").rglob("*.partial")] + [
            path.name
            for path in temporary.iterdir()
            if not path.name.startswith("torchinductor_")  # PyTorch's cache of compiled code
        ]
        shutil.rmtree("out")
        now = used()
        if k == 2:
            before = now
        more = {name: now[name] - was for name, was in before.items()}
        grown = {n: round(v, 1) for n, v in more.items() if v > (GROWTH_MB if n == "memory, MB" else 0)}
        verdicts.append(Verdict("grows", f"{grown}, left {left}") if grown or left else Verdict("same"))
    return verdicts


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    times, small = (12, False) if long else (4, True)
    name = "every stage" if long else "collect, train, evaluate"
    yield Trial("soak", f"{name}, {times} times", lambda folder: again(base, folder, times, small), 900)
