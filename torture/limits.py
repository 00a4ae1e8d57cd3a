"""Read-only and full disks, few descriptors, small files, and outputs that are closed, full or not UTF-8."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torture.same import contents, differences
from torture.stages import COLLECT, ENV, HISTORY, QUICK, RUNS, STAGES, Base, Words, reports
from torture.trials import Trial, Verdict, cad

Run = Callable[[Path], list[Verdict]]


# ---------------------------------------------------------------- file systems


def may_mount() -> bool:
    return (
        os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


def own_mounts() -> None:
    """What this process mounts is seen by its children alone and ends with them."""
    if ctypes.CDLL(None).unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError("unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def settled(words: Words, folder: Path, what: str = "", fine: bool = False) -> Verdict:
    """The verdict on a command that may be refused; one that ends with 0 must be allowed to."""
    verdict = cad(*words, cwd=folder).verdict()
    kind = "same" if verdict.kind == "accepted" and fine else verdict.kind
    return Verdict(kind, f"{what} cad {words[0]}: {verdict.detail}")


def read_only(base: Base, name: str) -> Run:
    def run(folder: Path) -> list[Verdict]:
        work = folder / "work"
        base.copy("evaluated", work)
        base.copy("collected", work)
        own_mounts()
        mount("--bind", work, work)
        mount("-o", "remount,bind,ro", work)
        words, fine = READ_ONLY[name]
        return [settled([str(w).replace("WORK", str(work)) for w in words(base)], folder, fine=fine)]

    return run


RUN = f"WORK/{RUNS[0]}"
READ_ONLY: dict[str, tuple[Callable[[Base], Words], bool]] = {
    "inspect": (lambda base: ["inspect", f"WORK/{HISTORY}"], True),
    "mark": (lambda base: ["mark", f"WORK/{HISTORY}"], False),
    "mark --output": (lambda base: ["mark", f"WORK/{HISTORY}", "--output", "marked.hdf5"], True),
    "collect": (lambda base: ["collect", *COLLECT, "--out", "WORK/new"], False),
    "train": (lambda base: ["train", *QUICK, "--history", f"WORK/{HISTORY}", "--out", "WORK/new"], False),
    "train --resume": (
        lambda base: ["train", *QUICK, "--history", f"WORK/{HISTORY}", "--out", "WORK/runs", "--resume"],
        False,
    ),
    "evaluate": (lambda base: ["evaluate", RUN, "--device", "cpu"], True),
    "evaluate --overwrite": (
        lambda base: ["evaluate", RUN, "--device", "cpu", "--overwrite", "--evaluation.episodes", "2"],
        False,
    ),
    "compare": (lambda base: ["compare", RUN, f"WORK/{RUNS[1]}"], True),
    "report": (lambda base: ["report", RUN, "--out", "WORK/report"], False),
    "run": (lambda base: ["run", *COLLECT, "--out", "WORK/run"], False),
    "study": (lambda base: ["study", base.study, "--out", "WORK/study"], False),
    "rollouts": (lambda base: ["rollouts", RUN], False),
    "attention": (lambda base: ["attention", RUN], False),
    "export": (lambda base: ["export", f"WORK/{HISTORY}", "--to", "npz", "--out", "WORK/x.npz"], False),
}
"""Commands on a read-only folder WORK, and whether they need not write there."""


def full(base: Base, stage: str, room: int) -> Run:
    """A stage on a disk with so many kB of room, and again with more."""
    expected = base.contents(STAGES[stage].result)

    def run(folder: Path) -> list[Verdict]:
        own_mounts()
        disk = folder / "disk"
        disk.mkdir()
        mount("-t", "tmpfs", "-o", "size=200m", "tmpfs", disk)
        base.copy(STAGES[stage].start, disk)
        system = os.statvfs(disk)
        used = (system.f_blocks - system.f_bfree) * system.f_frsize
        mount("-o", f"remount,size={used + room * 1024}", disk)
        words = STAGES[stage].words(base, disk)
        first = settled(words, folder, f"{room} kB:", fine=True)
        mount("-o", "remount,size=200m", disk)
        again = cad(*words, *STAGES[stage].again, cwd=folder)
        wrong = differences(expected, contents(disk))
        if again.code != 0 or wrong:
            return [first, Verdict("lost", f"after {room} kB: {again.error()} {'; '.join(wrong[:3])}")]
        return [first, Verdict("recovered")]

    return run


FULL = {
    "collect": (20, 120, 300, 500),
    "train": (20, 60, 120, 200, 400),
    "mark": (20, 200),
    "evaluate": (2, 8),
    "report": (4, 40, 200, 400),
    "study": (100, 500, 700),
    "run": (100, 500, 900, 1400),
}
"""Kilobytes of room that are too little, or nearly, by stage."""


# ---------------------------------------------------------------- limits of a process


def limited(base: Base, what: int, value: int, words: Words) -> Run:
    def run(folder: Path) -> list[Verdict]:
        ended = cad(*words, cwd=folder, before=lambda: resource.setrlimit(what, (value, value)))
        verdict = ended.verdict()
        return [Verdict("same" if verdict.kind == "accepted" else verdict.kind, verdict.detail)]

    return run


# ---------------------------------------------------------------- outputs


def written_to(base: Base, words: Words, code: int | None, **options: object) -> Run:
    """``code``: what it must end with; None: 0, or 1 with a word."""

    def run(folder: Path) -> list[Verdict]:
        ended = cad(*words, cwd=folder, **options)
        verdict = ended.verdict()
        if verdict.kind == "accepted" and code in (0, None):
            verdict = Verdict("same")
        elif ended.code == 1 and code == 1 and verdict.kind == "no word":
            verdict = Verdict("same")  # nobody listens
        return [verdict]

    return run


def closed(number: int) -> Callable[[], None]:
    return lambda: os.close(number)


def broken_pipe(number: int) -> Callable[[], None]:
    """The reader of an output has gone."""

    def close() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)

    return close


def nowhere(number: int) -> Callable[[], None]:
    return lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), number) and None


def outputs(base: Base) -> Iterator[Trial]:
    compare: Words = ["compare", *(base("evaluated") / run for run in RUNS)]
    tables: Words = ["study", base.study, "--tables", base("studied") / "study/torture/table.csv"]
    collect: Words = ["collect", *COLLECT, "--algorithm.n_process", "1", "--out", "out"]
    for name, words in {"compare": compare, "study --tables": tables}.items():
        for encoding in ("ascii", "latin-1", "cp1252"):
            yield Trial("outputs", f"{name} in {encoding}", written_to(base, words, 0, encoding=encoding))
        yield Trial("outputs", f"{name} to a full disk", written_to(base, words, 1, before=nowhere(1)))
        yield Trial("outputs", f"{name}, closed", written_to(base, words, None, before=closed(1)))
        yield Trial("outputs", f"{name}, nobody reads", written_to(base, words, 1, before=broken_pipe(1)))
    for what, make in {"closed": closed, "full": nowhere, "nobody reads": broken_pipe}.items():
        yield Trial("outputs", f"collect, progress {what}", _progress(base, collect, make(2)))
    for name, value in {
        "TERM": "dumb",
        "COLUMNS": "1",
        "NO_COLOR": "1",
        "FORCE_COLOR": "1",
        "LANG": "C",
    }.items():
        yield Trial(
            "outputs", f"compare with {name}={value}", written_to(base, compare, 0, env={name: value})
        )


def _progress(base: Base, words: Words, before: Callable[[], None]) -> Run:
    """Work goes on where its progress cannot be shown."""
    expected = base.contents("collected")["datasets/" + Path(HISTORY).name]

    def run(folder: Path) -> list[Verdict]:
        ended = cad(*words, cwd=folder, before=before)
        (found,) = list(contents(folder / "out").values()) or [None]
        right = ended.code == 0 and found == expected
        return [Verdict("same") if right else Verdict("lost", f"exit {ended.code}; {ended.last()}")]

    return run


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    if may_mount():
        for name in READ_ONLY if long else list(READ_ONLY)[seed % 2 :: 2]:
            yield Trial("read-only file system", f"{name}, read-only", read_only(base, name))
        for stage, rooms in FULL.items() if long else {"collect": FULL["collect"][1:2]}.items():
            for room in rooms:
                yield Trial("full disk", f"{stage} with {room} kB", full(base, stage, room))
    train: Words = ["train", *QUICK, "--history", base.history, "--out", "runs"]
    collect: Words = ["collect", *COLLECT, "--algorithm.n_process", "2", "--out", "out"]
    commands = {"collect": collect, "train": train, "report": [*reports(base("evaluated"))[:-1], "report"]}
    for name, words in commands.items() if long else {"train": train}.items():
        for number in (64, 20, 12, 8):
            run = limited(base, resource.RLIMIT_NOFILE, number, words)
            yield Trial("few descriptors", f"{name} with {number}", run)
        run = limited(base, resource.RLIMIT_FSIZE, 20_000, words)
        yield Trial("small files", f"{name} with files of 20 kB", run)
    huge = [*train, "--model.tf_n_embd", "4096", "--model.tf_n_layer", "8"]
    if long:
        run = limited(base, resource.RLIMIT_AS, 4 << 30, [*huge, *ENV[:2]])
        yield Trial("little memory", "a model that is too large", run)
    every = list(outputs(base)) if long else []
    yield from every
