"""What a hostile case is, and how it is tried."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture.stages import READERS, Base, Words, laid, sound
from torture.trials import Trial, Verdict, cad

CANARY = "PWNED"
LIMIT = 30.0
UNTRIED = "nothing is imported, and the command says so"


@dataclass(frozen=True)
class Case:
    """``make`` changes files in a folder with two evaluated runs, ``readers`` then read them.

    A reader must refuse what it reads, or give what it gives on sound files. ``commands`` instead of readers
    must refuse. ``fine`` says why something else is right.
    """

    kind: str
    name: str
    make: Callable[[Path], object]
    readers: tuple[str, ...] = ()
    commands: Callable[[Path], list[Words]] = lambda d: []
    fine: str = ""


CASES: list[Case] = []


def trial(base: Base, case: Case) -> Trial:
    right = {reader: sound(base, reader) for reader in case.readers}

    def run(folder: Path) -> list[Verdict]:
        d, verdicts = laid(base, folder / "d"), list[Verdict]()
        case.make(d)
        for reader in case.readers:
            ended = cad(*READERS[reader].words(base, d), cwd=d, limit=LIMIT)
            verdict = ended.verdict()
            if verdict.kind == "accepted":
                gives = json.loads(json.dumps(READERS[reader].gives(d, ended)))
                fine = READERS[reader].fine
                kind = "same" if gives == right[reader] else "fine" if fine else "accepted"
                verdict = Verdict(kind, fine or verdict.detail)
            verdicts.append(_canaries(d, verdict, case, f"cad {reader}"))
        for words in case.commands(d):
            verdict = cad(*words, cwd=d, limit=LIMIT).verdict()
            verdicts.append(_canaries(d, verdict, case, f"cad {words[0]}"))
        page = next(d.rglob("index.html"), None)
        if page is not None and any(tag in page.read_text() for tag in ("<script>alert", "<img src=x")):
            verdicts.append(Verdict("ran code", "the page has foreign HTML"))
        if any(folder.glob("*escape*")):
            verdicts.append(Verdict("escaped", "a file outside --out"))
        return verdicts

    return Trial(f"hostile: {case.kind}", f"{case.kind}: {case.name}", run, limit=8 * LIMIT)


def _canaries(d: Path, verdict: Verdict, case: Case, what: str) -> Verdict:
    if (d / CANARY).exists():
        (d / CANARY).unlink()
        return Verdict("ran code", what)
    if verdict.kind == "accepted" and case.fine:
        return Verdict("fine", case.fine)
    return Verdict(verdict.kind, f"{what}: {verdict.detail}")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)
