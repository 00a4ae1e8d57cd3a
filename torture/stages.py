"""The stages under torture, with tiny settings, and what each leaves when nothing disturbs it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torture.same import Contents, contents, said
from torture.trials import Command, Ended, cad

ENV = ["--preset", "smoke", "--device", "cpu"]
ENV += ["--env.n_task", "10", "--env.validation", "2", "--env.heldout", "2"]
COLLECT = [*ENV, "--algorithm.n_timesteps", "200"]
MODEL = ["--model.steps", "40", "--model.checkpoint_every", "5", "--model.validations", "4"]
QUICK = [*ENV, "--model.steps", "4", "--model.validations", "0"]
HISTORY = "datasets/history_darkroom_PPO_alg-seed0_compressed.hdf5"
RUNS = ("runs/AD-darkroom-seed0", "runs/CompressedAD-darkroom-seed0")
STUDY = """question: does it survive?
preset: smoke
baseline: AD
runs: 1
settings:
  algorithm: {n_timesteps: 200}
  model: {steps: 20, checkpoint_every: 5, validations: 2}
  evaluation: {episodes: 3, rollouts: 1, imitation_windows: 16}
families:
  darkroom: {env: {n_task: 10, validation: 2, heldout: 2}}
variants:
  AD: {model: {model: AD}}
  CompressedAD: {}
  prompted: {weights: CompressedAD, evaluation: {marks: prompt}}
"""

Words = Sequence[object]


class Base:
    """Sound results, made when they are first asked for and kept in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> Path:
        """The folder of a piece, see ``PIECES``; nobody writes to it."""
        made = self.folder / name
        if not (made / ".done").exists():
            piece = PIECES[name]
            shutil.rmtree(made, ignore_errors=True)
            self.copy(piece.start, made)
            for words in piece.words(self, made):
                began = time.monotonic()
                ended = Command(words, made, fault="count", before=piece.before).ended(300)
                if ended.code != piece.code:
                    raise RuntimeError(f"{name}: cad {words[0]} ended with {ended.code}: {ended.text[-800:]}")
                (made / ".seconds").write_text(str(time.monotonic() - began))
            for log in made.glob(".log-*"):
                log.unlink()
            (made / ".done").touch()
        return made

    def copy(self, name: str, folder: Path) -> Path:
        """A copy to work on, in ``folder``; of no piece, an empty folder."""
        if name:
            passing = shutil.ignore_patterns(".compressed_ad-*")  # what a process maps while it trains
            shutil.copytree(self(name), folder, dirs_exist_ok=True, ignore=passing)
            (folder / ".done").unlink()
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def contents(self, name: str) -> Contents:
        return contents(self(name))

    def seconds(self, name: str) -> float:
        """How long the last command that made the piece took."""
        return float((self(name) / ".seconds").read_text())

    def counts(self, name: str) -> dict[str, int]:
        """How often that command made each of ``faults.CALLS``."""
        pairs = (pair.split("=") for pair in (self(name) / ".counts").read_text().split())
        return {call: int(number) for call, number in pairs}

    @property
    def history(self) -> Path:
        return self("collected") / HISTORY

    @property
    def study(self) -> Path:
        path = self.folder / "torture.yaml"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STUDY)
        return path


@dataclass(frozen=True)
class Piece:
    """``words`` turn a copy of ``start`` into this piece; each ends with ``code``, after ``before``."""

    start: str
    words: Callable[[Base, Path], list[Words]]
    code: int = 0
    before: Callable[[], object] = bool


def train(base: Base, folder: Path, model: str = "CompressedAD") -> Words:
    return ["train", *ENV, *MODEL, "--model", model, "--history", base.history, "--out", folder / "runs"]


def reports(folder: Path) -> Words:
    return ["report", *(folder / run for run in RUNS), "--out", folder / "report"]


@dataclass(frozen=True)
class Stage:
    """A command that is killed: ``start`` is the piece it works on, ``result`` the piece that it leaves."""

    name: str
    start: str
    result: str
    words: Callable[[Base, Path], Words]
    again: tuple[str, ...] = ()  # added to go on with it


STAGES = {
    stage.name: stage
    for stage in [
        Stage(
            "collect",
            "",
            "collected",
            lambda base, d: ["collect", *COLLECT, "--algorithm.n_process", "2", "--out", d / "datasets"],
            ("--resume",),
        ),
        Stage(
            "collect --overwrite",
            "collected otherwise",
            "collected",
            lambda base, d: [*STAGES["collect"].words(base, d), "--overwrite"],
        ),
        Stage(
            "mark",
            "collected",
            "marked",
            lambda base, d: ["mark", d / HISTORY, *("--marker.on_policy_threshold", "0.3")],
        ),
        Stage("train", "", "trained", lambda base, d: train(base, d), ("--resume",)),
        Stage(
            "evaluate",
            "trained",
            "evaluated one",
            lambda base, d: ["evaluate", d / RUNS[1], "--device", "cpu"],
        ),
        Stage("report", "evaluated", "reported", lambda base, d: reports(d)),
        Stage(
            "study",
            "",
            "studied",
            lambda base, d: ["study", base.study, "--out", d / "study", "--process", "2"],
        ),
        Stage(
            "run",
            "",
            "ran",
            lambda base, d: ["run", *COLLECT, *MODEL, "--comparison.runs", "1", "--out", d / "run"],
        ),
    ]
}

PIECES = {
    "collected": Piece("", lambda base, d: [STAGES["collect"].words(base, d)]),
    "collected otherwise": Piece(
        "",
        lambda base, d: [[*STAGES["collect"].words(base, d), "--algorithm.n_timesteps", "100"]],
    ),
    "marked": Piece("collected", lambda base, d: [STAGES["mark"].words(base, d)]),
    "trained": Piece("", lambda base, d: [train(base, d)]),
    "trained both": Piece("trained", lambda base, d: [train(base, d, "AD")]),
    "evaluated one": Piece("trained", lambda base, d: [STAGES["evaluate"].words(base, d)]),
    "evaluated": Piece(
        "trained both", lambda base, d: [["evaluate", *(d / run for run in RUNS), "--device", "cpu"]]
    ),
    "reported": Piece("evaluated", lambda base, d: [reports(d)]),
    "studied": Piece("", lambda base, d: [STAGES["study"].words(base, d)]),
    "ran": Piece("", lambda base, d: [STAGES["run"].words(base, d)]),
}
"""What can be made, by name."""


@dataclass(frozen=True)
class Reader:
    """A command that reads a history file or a run; what it gives is compared with what a sound one gives."""

    words: Callable[[Base, Path], Words]
    gives: Callable[[Path, Ended], object]
    fine: str = ""  # why it may give something else


def _found(pattern: str) -> Callable[[Path, Ended], object]:
    def give(folder: Path, ended: Ended) -> object:
        return {k: v for k, v in contents(folder).items() if Path(k).match(pattern)}

    return give


def _masks(folder: Path, ended: Ended) -> object:
    told = contents(folder).get("marked.hdf5", {})
    return {key: value for key, value in told.items() if key.endswith("compression_mask")}


def _printed(folder: Path, ended: Ended) -> object:
    return said(ended.text)


READERS = {
    "inspect": Reader(lambda base, d: ["inspect", d / HISTORY], _printed, "it shows what the file says"),
    "mark": Reader(lambda base, d: ["mark", d / HISTORY, "--output", d / "marked.hdf5"], _masks),
    "train": Reader(
        lambda base, d: ["train", *QUICK, "--history", d / HISTORY, "--out", d / "new"],
        _found("new/*/best_model.pt"),
    ),
    "export": Reader(
        lambda base, d: ["export", d / HISTORY, "--to", "npz", "--out", d / "x.npz"], lambda d, ended: None
    ),
    "evaluate": Reader(
        lambda base, d: [
            "evaluate", d / RUNS[0], "--history", d / HISTORY, "--overwrite", "--device", "cpu",
            "--evaluation.episodes", "3",
        ],
        _found("*/evaluation.npz"),
    ),
    "evaluate stored": Reader(
        lambda base, d: ["evaluate", d / RUNS[0], "--overwrite", "--device", "cpu"],
        _found("*/evaluation.npz"),
    ),
    "compare": Reader(lambda base, d: ["compare", *(d / run for run in RUNS)], _printed),
    "report": Reader(lambda base, d: reports(d), _found("report/*")),
}  # fmt: skip


def sound(base: Base, name: str) -> object:
    """What a reader gives on sound files, as JSON holds it."""
    kept = base.folder / f"reader {name}.json"
    if not kept.exists():
        folder = laid(base, base.folder / f".reader {name}")
        ended = cad(*READERS[name].words(base, folder), cwd=folder, limit=120)
        if ended.code != 0:
            raise RuntimeError(f"{name}, sound files: {ended.text[-500:]}")
        kept.write_text(json.dumps(READERS[name].gives(folder, ended)))
        shutil.rmtree(folder)
    return json.loads(kept.read_text())


def laid(base: Base, folder: Path) -> Path:
    """Evaluated runs and their history file."""
    shutil.rmtree(folder, ignore_errors=True)
    base.copy("evaluated", folder)
    return base.copy("collected", folder)
