"""Cuts files and flips their bits: a command names the damage, repairs it, or gives what it gave."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressed_ad.errors import CompressedADError
from compressed_ad.histories import hdf5
from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.results import load_evaluation
from compressed_ad.training.checkpoints import load
from torture import same
from torture.kills import Stage
from torture.same import contents, differences, digest, said
from torture.stages import HISTORY, PIECES, RUNS, STAGES, Base, Piece, Words, reports
from torture.trials import Trial, Verdict, cad, done

BATCH = 20
CUTS = 16
AD = RUNS[0]
SHARD = f"{HISTORY}.shards/3.h5"
CHECKPOINT = f"{RUNS[1]}/checkpoints/step-00000020.pt"


@dataclass(frozen=True)
class Kind:
    """A file (the first that the pattern finds) of a piece, the commands that read it, and how many flips.

    ``restored``: the commands make the file, and all that follows from it, as it was.
    """

    piece: str
    file: str
    commands: Callable[[Base, Path], list[Words]]
    flips: int
    restored: bool = False


def _evaluate(base: Base, d: Path) -> Words:
    return ["evaluate", d / AD, "--device", "cpu", "--overwrite"]


def _compare(base: Base, d: Path) -> Words:
    return ["compare", *(d / run for run in RUNS)]


def _tables(base: Base, d: Path) -> Words:
    return ["study", base.study, "--tables", d / "study/torture/table.csv"]


def _again(stage: Stage) -> Callable[[Base, Path], list[Words]]:
    return lambda base, d: [[*stage.words(base, d), *stage.again]]


KINDS = {
    "history": Kind(
        "collected",
        HISTORY,
        lambda base, d: [["inspect", d / HISTORY], ["mark", d / HISTORY, "--preset", "smoke"]],
        300,
    ),
    "shard": Kind("half collected", SHARD, _again(STAGES["collect"]), 60, restored=True),
    "training checkpoint": Kind("half trained", CHECKPOINT, _again(STAGES["train"]), 80, restored=True),
    "best_model.pt": Kind("trained both", f"{AD}/best_model.pt", lambda base, d: [_evaluate(base, d)], 200),
    "last_model.pt": Kind("trained both", f"{AD}/last_model.pt", lambda base, d: [_evaluate(base, d)], 200),
    "config.yaml": Kind(
        "evaluated", f"{AD}/config.yaml", lambda base, d: [_compare(base, d), _evaluate(base, d)], 300
    ),
    "environment.json": Kind(
        "evaluated", f"{AD}/environment.json", lambda base, d: [_compare(base, d), _evaluate(base, d)], 150
    ),
    "metrics.jsonl": Kind("evaluated", f"{AD}/metrics.jsonl", lambda base, d: [_compare(base, d)], 200),
    "metrics.jsonl, in a report": Kind("evaluated", f"{AD}/metrics.jsonl", lambda base, d: [reports(d)], 24),
    "metrics.jsonl, resumed": Kind(
        "half trained", f"{RUNS[1]}/metrics.jsonl", _again(STAGES["train"]), 60, restored=True
    ),
    "evaluation.npz": Kind("evaluated", f"{AD}/evaluation.npz", lambda base, d: [_compare(base, d)], 300),
    "evaluation.npz, evaluated again": Kind(
        "evaluated",
        f"{AD}/evaluation.npz",
        lambda base, d: [["evaluate", d / AD, "--device", "cpu"]],
        100,
        restored=True,
    ),
    "study's table.csv": Kind(
        "studied", "study/torture/table.csv", lambda base, d: [_tables(base, d)], 300
    ),
    "study's curves.csv": Kind(
        "studied", "study/torture/curves.csv", lambda base, d: [_tables(base, d)], 300
    ),
    "study's evaluation": Kind(
        "studied", "study/runs/*/evaluation*.npz", _again(STAGES["study"]), 24, restored=True
    ),
    "study's metrics": Kind("studied", "study/runs/*/metrics.jsonl", _again(STAGES["study"]), 24),
    "config.yaml of cad run": Kind(
        "ran", "run/config.yaml", lambda base, d: [[*STAGES["run"].words(base, d), "--dry-run"]], 200
    ),
}  # fmt: skip


def _no_end() -> None:
    """Stops a collection before its last step."""
    from compressed_ad.histories.writer import HistoryWriter

    def finish(self: HistoryWriter, *rest: Any) -> None:
        raise KeyboardInterrupt

    HistoryWriter.finish = finish  # type: ignore[method-assign]


def _half_way() -> None:
    """Stops a training once it has the checkpoint of step 20."""
    from compressed_ad.training.checkpoints import CheckpointDirectory

    save = CheckpointDirectory.save

    def then_stop(self: CheckpointDirectory, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 20:
            raise KeyboardInterrupt

    CheckpointDirectory.save = then_stop  # type: ignore[method-assign]


PIECES["half collected"] = Piece("", lambda base, d: [STAGES["collect"].words(base, d)], 130, _no_end)
PIECES["half trained"] = Piece("", lambda base, d: [STAGES["train"].words(base, d)], 130, _half_way)


@dataclass(frozen=True)
class Loader:
    """A function that reads the file of a kind, without a command around it; ``flips`` are cheap here."""

    kind: str
    load: Callable[[Path], Any]
    flips: int


def _history(path: Path) -> Any:
    file = HistoryFile(path)
    arrays = {f"{task}{k}": v for task, h in file.load().items() for k, v in vars(h).items()}
    return {"info": repr(file.info), **{k: digest(v) for k, v in arrays.items() if v is not None}}


def _whole(path: Path) -> None:
    """Verifies the checksum of an HDF5 file."""
    with hdf5.opened(path) as file:
        assert file.id.valid


LOADERS = {
    "HistoryFile": Loader("history", _history, 700),
    "hdf5.opened": Loader("shard", _whole, 400),
    "checkpoints.load": Loader("training checkpoint", lambda path: repr(load(path)), 900),
    "load_evaluation": Loader(
        "evaluation.npz", lambda path: {k: digest(v) for k, v in load_evaluation(path).items()}, 800
    ),
}


def mutations(data: bytes, flips: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Cuts at each sixteenth, then single flipped bits."""
    for k in range(CUTS):
        yield f"cut at {k}/{CUTS}", data[: len(data) * k // CUTS]
    for _ in range(flips):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(damaged)


def _damaged(name: str, kind: Kind, base: Base, part: list[tuple[str, bytes]], number: int) -> Trial:
    """A batch of damaged copies, each read by the kind's commands."""
    expected, texts = _sound(base, kind)
    file = _file(base, kind)

    def judge(folder: Path, what: str, data: bytes) -> Verdict:
        shutil.rmtree(folder, ignore_errors=True)
        base.copy(kind.piece, folder)
        (folder / file).write_bytes(data)
        told = []
        for words, text in zip(kind.commands(base, folder), texts, strict=True):
            ended = cad(*words, cwd=folder)
            verdict = ended.verdict()
            if verdict.kind == "accepted":
                found = contents(folder)
                wrong = differences(*(c if kind.restored else _without(file, c) for c in (expected, found)))
                if not kind.restored and said(ended.text) != text:
                    wrong.append(_first_difference(text, said(ended.text)))
                verdict = Verdict("silent", "; ".join(wrong[:2])) if wrong else Verdict("same")
                if kind.restored and not wrong:
                    verdict = Verdict("recovered")
            told.append(verdict)
        worst = min(told, key=lambda v: ("named", "recovered", "same").index(v.kind) if v.good else -1)
        return Verdict(worst.kind, f"{what}: {worst.detail}")

    def run(folder: Path) -> list[Verdict]:
        return [judge(folder / "d", what, data) for what, data in part]

    return Trial(f"damage: {name}", f"{name}, batch {number}", run, limit=600)


def _sound(base: Base, kind: Kind) -> tuple[same.Contents, list[str]]:
    """What is there, and what commands print, if nothing is damaged."""
    folder = base.folder / "sound"
    shutil.rmtree(folder, ignore_errors=True)
    base.copy(kind.piece, folder)
    texts = [said(done(*words, cwd=folder)) for words in kind.commands(base, folder)]
    return contents(folder), texts


def _file(base: Base, kind: Kind) -> str:
    folder = base(kind.piece)
    return str(min(folder.glob(kind.file)).relative_to(folder))


def _without(file: str, found: same.Contents) -> same.Contents:
    return {name: value for name, value in found.items() if name != file}


def _first_difference(a: str, b: str) -> str:
    pairs = zip([*a.splitlines(), ""], [*b.splitlines(), ""], strict=False)
    return next((f"{x!r} became {y!r}" for x, y in pairs if x != y), "more lines")


def _loaded(name: str, loader: Loader, base: Base, part: list[tuple[str, bytes]], number: int) -> Trial:
    """A batch of damaged copies, each read by a function."""
    kind = KINDS[loader.kind]
    file = Path(_file(base, kind)).name

    def judge(path: Path, what: str, data: bytes, right: Any) -> Verdict:
        path.write_bytes(data)
        try:
            found = loader.load(path)
        except CompressedADError as error:
            return Verdict("named", str(error))
        except Exception as error:  # what the library lets through is the finding
            return Verdict("foreign exception", f"{what}: {type(error).__name__}: {error}")
        return Verdict("same" if found == right else "silent", what)

    def run(folder: Path) -> list[Verdict]:
        path = folder / file
        path.write_bytes((base(kind.piece) / _file(base, kind)).read_bytes())
        right = loader.load(path)
        return [judge(path, what, data, right) for what, data in part]

    return Trial(f"damage: {name}", f"{name}, batch {number}", run, limit=600)


SHORT = (
    "history",
    "training checkpoint",
    "best_model.pt",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
)
SHORT += ("evaluation.npz", "evaluation.npz, evaluated again", "study's table.csv", "study's curves.csv")


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    jobs: list[tuple[str, Kind, Callable[..., Trial], Any, int]] = []
    for name in KINDS if long else SHORT:
        jobs.append((name, KINDS[name], _damaged, KINDS[name], KINDS[name].flips if long else 5))
    for name, loader in LOADERS.items():
        if long or loader.kind in SHORT:
            jobs.append((name, KINDS[loader.kind], _loaded, loader, loader.flips if long else 24))
    for name, kind, make, what, flips in jobs:
        data = (base(kind.piece) / _file(base, kind)).read_bytes()
        every = list(mutations(data, flips, random.Random(f"{seed} {name}")))
        every = every if long else every[1:CUTS:5] + every[CUTS:]
        for number, start in enumerate(range(0, len(every), BATCH)):
            yield make(name, what, base, every[start : start + BATCH], number)
