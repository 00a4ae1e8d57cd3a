"""Users' families, learners and markers that misbehave: named, or the work is what it was."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torture import misbehaving
from torture.same import Contents, contents, differences
from torture.stages import ENV, HISTORY, Base, Words
from torture.trials import Command, Trial, Verdict, done

SMALL = [
    *ENV[:4],
    "--env.n_task",
    "8",
    "--env.validation",
    "1",
    "--env.heldout",
    "1",
    "--algorithm.n_learner",
    "1",
]
SMALL += ["--algorithm.n_stream", "2", "--algorithm.n_timesteps", "100", "--algorithm.n_process", "1"]
PPO = ["--algorithm.learner_kwargs", "{n_steps: 50, batch_size: 50}"]
MODULE = "torture.misbehaving"
FAMILY = ["--env.family", f"{MODULE}:Family", "--env.kwargs", "{size: 5, horizon: 10}", "--env.name", "own"]
LEARNER = ["--algorithm.learner", f"{MODULE}:Learner", "--algorithm.learner_kwargs", "{}"]
PARTS: dict[str, tuple[list[str], Words, str]] = {
    "family": (misbehaving.FAMILY, ["collect", *SMALL, *PPO, *FAMILY, "--out", "out"], "Family"),
    "learner": (misbehaving.LEARNER, ["collect", *SMALL, *LEARNER, "--out", "out"], "Learner"),
    "marker": (misbehaving.MARKER, ["mark", HISTORY, "--marker.marker", f"{MODULE}:marker"], "marker"),
}
"""The modes of each part, the command that uses it, and its name."""

DIES = ("segfault", "kill", "os._exit")
"""Modes that end their process: a worker, which is noticed, or in ``cad mark`` the command itself."""

FINE = {
    "family reward 3e38": "finite rewards are a family's own affair",
    "family always ends": "episodes of one step are episodes",
    "family tasks at random": "the tasks are stored as they came; cad check family finds it",
    "family optimal 1000 less": "cad check family finds it",
    "family random 1000 less": "cad check family finds it",
    "family optimal none": "an unknown optimum is allowed",
    "learner probabilities 0": "a probability of 0 is a number between 0 and 1",
    "learner rewards of others": "rewards are the learner's record; cad check learner finds it",
    "marker at random": "a marker may draw",
    "marker later at random": "a marker may draw",
}
"""What may give other work with exit code 0, and why."""


def trial(base: Base, part: str, mode: str) -> Trial:
    words, own = PARTS[part][1], part == "marker"
    dies = mode.removeprefix("later ") in DIES
    if dies and not own:
        words = [*words, "--algorithm.n_process", "2"]
    expected = _undisturbed(base, part)
    hangs = mode.endswith("hang")

    def run(folder: Path) -> list[Verdict]:
        if own:
            base.copy("collected", folder)
        before = contents(folder)
        command = Command(words, folder, env={"MODE": mode})
        if hangs:
            return [_hanging(command)]
        ended = command.ended(30)
        verdict = ended.verdict()
        if own and dies and contents(folder) == before:
            verdict = Verdict("fine", "it ends the process of the command; the file is what it was")
        elif verdict.kind == "accepted":
            wrong = differences(expected, contents(folder))
            reason = FINE.get(f"{part} {mode}", "")
            other = Verdict("fine", reason) if reason else Verdict("silent", "; ".join(wrong[:3]))
            verdict = other if wrong else Verdict("same")
        elif own and verdict.good and contents(folder) != before:
            verdict = Verdict("lost", "refused, but the history file is not what it was")
        elif mode.endswith("interrupt") and ended.code == 130:
            verdict = Verdict("fine", "an interrupt is Ctrl-C")
        return [verdict]

    return Trial(f"own {part}", f"{part} {mode}", run, limit=120)


def _hanging(command: Command) -> Verdict:
    """A part that hangs: SIGTERM must end it."""
    if command.wait(3) is not None:
        return Verdict("named" if command.code in (1, 2) else "silent", command.ended().error())
    os.kill(command.pid, signal.SIGTERM)
    ended = command.ended(10)
    if ended.code in (143, -15):
        return Verdict("fine", "nothing is timed unless asked for; SIGTERM ends it")
    return Verdict("hang", f"SIGTERM: {ended.code}")


@cache
def _undisturbed(base: Base, part: str) -> Contents:
    """What comes of the part if it behaves."""
    folder = base.folder / f"own {part}"
    if not folder.exists():
        folder.mkdir(parents=True)
        if part == "marker":
            base.copy("collected", folder)
        done(*PARTS[part][1], cwd=folder)
    return contents(folder)


def checked(base: Base, mode: str) -> Trial:
    """``cad check family`` says what is wrong, or nothing, but does not fall over."""
    words = ["check", "family", f"{MODULE}:Family", "--kwargs", "{size: 5, horizon: 10}"]

    def run(folder: Path) -> list[Verdict]:
        command = Command(words, folder, env={"MODE": mode})
        if mode == "hang":
            return [_hanging(command)]
        ended = command.ended(30)
        verdict = ended.verdict()
        if mode in DIES:
            verdict = Verdict("fine", "it ends the process of the command")
        elif verdict.kind == "accepted" or (ended.code == 1 and re.search(r": \d+ found|found", ended.text)):
            verdict = Verdict("same" if verdict.kind == "accepted" else "named", ended.last())
        elif mode.endswith("interrupt") and ended.code == 130:
            verdict = Verdict("fine", "an interrupt is Ctrl-C")
        return [verdict]

    return Trial("own family, checked", f"check family {mode}", run, limit=120)


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    number = 0
    for part, (modes, _, _) in PARTS.items():
        for mode in modes:
            number += 1
            if long or number % 6 == seed % 6:
                yield trial(base, part, mode)
    for mode in misbehaving.FAMILY if long else misbehaving.FAMILY[seed % 12 :: 12]:
        yield checked(base, mode)
