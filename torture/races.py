"""Two at once on one folder: what ends with 0 has done its own work; the other is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from compressed_ad.histories.file import HistoryFile
from torture import same
from torture.same import contents, differences
from torture.stages import COLLECT, HISTORY, MODEL, QUICK, STAGES, STUDY, Base, Words
from torture.trials import Command, Trial, Verdict, cad, done

ONE = ["collect", *COLLECT, "--algorithm.n_process", "1", "--algorithm.n_timesteps", "1000"]
RATES = ("1.0e-3", "3.0e-2")
LIMIT = 120.0


def both(folder: Path, first: Words, second: Words, gap: float) -> tuple[list[int | None], list[Verdict]]:
    """Exit codes of two commands, the second a moment after the first, and what is wrong with their ends."""
    commands = [Command(first, folder)]
    time.sleep(gap)
    commands.append(Command(second, folder))
    ended = [command.ended(LIMIT) for command in commands]
    faults = [v for v in (e.verdict() for e in ended) if not v.good and v.kind != "accepted"]
    if not any(e.code == 0 for e in ended):
        faults.append(Verdict("lost", "neither did its work"))
    return [e.code for e in ended], faults


def _kwargs(rate: str) -> str:
    return f"{{n_steps: 100, batch_size: 50, n_epochs: 2, learning_rate: {rate}}}"


def other_settings(base: Base, folder: Path, gap: float, more: tuple[str, ...]) -> list[Verdict]:
    """Two collections with other learning rates: the file is of the one that it says it is of."""
    words = {rate: [*ONE, "--algorithm.learner_kwargs", _kwargs(rate)] for rate in RATES}
    for rate in RATES:
        done(*words[rate], "--out", rate, cwd=folder)
    first, second = ([*words[rate], "--out", "both", *more] for rate in RATES)
    _, faults = both(folder, first, second, gap)
    path = next((folder / "both").glob("*.hdf5"), None)
    if path is None:
        return faults or [Verdict("lost", "no file")]
    got = same.history(path)
    stated = json.loads(got["@config"])["learning_rate"]
    (alone,) = (same.history(next((folder / r).glob("*.hdf5"))) for r in RATES if float(r) == stated)
    mixed = [key for key in got if got[key] != alone[key]]
    return [*faults, *([Verdict("mixed", f"says learning rate {stated}, but: {mixed[:4]}")] if mixed else [])]


def same_settings(base: Base, folder: Path, gap: float, more: tuple[str, ...]) -> list[Verdict]:
    words = [*STAGES["collect"].words(base, folder), *more]
    _, faults = both(folder, words, words, gap)
    wrong = differences(base.contents("collected"), contents(folder))
    return [*faults, *([Verdict("lost", "; ".join(wrong))] if wrong else [])]


def trainings(base: Base, folder: Path, gap: float, more: tuple[str, ...]) -> list[Verdict]:
    words = [*STAGES["train"].words(base, folder), "--resume"]
    _, faults = both(folder, words, words, gap)
    wrong = differences(base.contents("trained"), contents(folder))
    return [*faults, *([Verdict("lost", "; ".join(wrong))] if wrong else [])]


def studies(base: Base, folder: Path, gap: float, more: tuple[str, ...]) -> list[Verdict]:
    """Two studies that share histories and runs; the one that is refused goes on afterwards."""
    for name in ("torture", "other"):
        (folder / f"{name}.yaml").write_text(STUDY)
    one, two = (
        ["study", f"{name}.yaml", "--out", "study", "--process", "1"] for name in ("torture", "other")
    )
    _, faults = both(folder, one, two, gap)
    for words in (one, two):
        verdict = cad(*words, cwd=folder, limit=LIMIT).verdict()
        if verdict.kind != "accepted":
            faults.append(Verdict("lost", f"{words[1]} does not go on: {verdict.detail}"))
    found = {k: v for k, v in contents(folder).items() if not k.startswith("study/other/")}
    wrong = differences(base.contents("studied"), found)
    return [*faults, *([Verdict("lost", "; ".join(wrong))] if wrong else [])]


def runs(base: Base, folder: Path, gap: float, more: tuple[str, ...]) -> list[Verdict]:
    words = ["run", *COLLECT, *MODEL, "--comparison.runs", "1", "--out", "run"]
    _, faults = both(folder, words, words, gap)
    wrong = differences(base.contents("ran"), contents(folder))
    return [*faults, *([Verdict("lost", "; ".join(wrong))] if wrong else [])]


def mark_while_training(base: Base, folder: Path, gap: float, more: tuple[str, ...]) -> list[Verdict]:
    """The file is marked anew between the moment a run notes its marks and the moment it reads them."""
    base.copy("collected", folder)

    def hook() -> None:
        from compressed_ad.histories.file import remark
        from compressed_ad.runs import trainer

        real = trainer.history_provenance

        def late(file: HistoryFile, *rest: object) -> object:
            found = real(file, *rest)  # type: ignore[arg-type]
            remark(file.path, "all", {})
            return found

        trainer.history_provenance = late  # type: ignore[assignment]

    words = ["train", *QUICK, "--history", folder / HISTORY, "--out", folder / "runs"]
    ended = Command(words, folder, before=hook).ended(LIMIT)
    if ended.code != 0:
        return [ended.verdict()]
    (environment,) = (folder / "runs").glob("*/environment.json")
    recorded = json.loads(environment.read_text())["history"]["marker"]
    wrong = Verdict("mixed", f"recorded marker {recorded}, trained on marks of 'all'")
    return [Verdict("same") if recorded == "all" else wrong]


Race = Callable[[Base, Path, float, tuple[str, ...]], list[Verdict]]
RACES: dict[str, tuple[Race, tuple[float, ...], tuple[str, ...], tuple[str, ...]]] = {
    "collect, other settings": (other_settings, (0.05, 0.1, 0.4), (), ("collected",)),
    "collect --overwrite, other settings": (other_settings, (0.1, 0.4), ("--overwrite",), ("collected",)),
    "collect, same settings": (same_settings, (0.0, 0.2, 0.6), (), ("collected",)),
    "collect --resume, same settings": (same_settings, (0.0, 0.2, 0.6), ("--resume",), ("collected",)),
    "collect --overwrite, same settings": (same_settings, (0.1, 0.4), ("--overwrite",), ("collected",)),
    "train": (trainings, (0.0, 0.3), (), ("trained",)),
    "two studies of one folder": (studies, (0.0, 0.5), (), ("studied",)),
    "run": (runs, (0.2,), (), ("ran",)),
    "mark while training": (mark_while_training, (0.0,), (), ("collected",)),
}
"""Each with the gaps between its two commands, options of both, and the pieces that it compares with."""


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    for name, (race, gaps, more, pieces) in RACES.items():
        if not long and name in ("run", "two studies of one folder", "collect --overwrite, other settings"):
            continue
        for piece in pieces:
            base(piece)
        for gap in gaps if long else gaps[:1]:

            def run(
                folder: Path, race: Race = race, gap: float = gap, more: tuple[str, ...] = more
            ) -> list[Verdict]:
                return race(base, folder, gap, more) or [Verdict("named")]

            yield Trial("two at once", f"{name}, {gap} s apart", run, limit=4 * LIMIT)
