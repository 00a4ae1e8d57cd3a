"""Tries to get held-out tasks into training or the choice of a model, or results shown as those of others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from compressed_ad.tasks.split import choose_tasks, split_tasks
from torture.hostile.histories import link, put, reseal
from torture.hostile.imports import recorded
from torture.stages import COLLECT, ENV, HISTORY, QUICK, Base
from torture.trials import Ended, Trial, Verdict, cad, done

NAME = "CompressedAD-darkroom-seed0"
RUN = f"runs/{NAME}"
NEW = f"new/{NAME}"
ONE = ["collect", *COLLECT, "--algorithm.n_process", "1"]
IMPORT = ["import", "foreign.h5", "--family", "darkroom", "--env.kwargs", "{size: 9, horizon: 20}"]
IMPORT += ["--validation", "1", "--out", "imported"]
SPOKEN = r"note: .*(held|train|copy|copies|same|equal|weights|split|reproduce|scale)"
"""A note that says what the matter is."""

Path_ = Callable[[Path], Ended]
PATHS: dict[str, Path_] = {}


def path(function: Path_) -> Path_:
    PATHS[function.__name__.replace("_", " ")] = function
    return function


def trial(base: Base, name: str) -> Trial:
    """One of ``PATHS``, from a history file and a run that was trained and evaluated on it."""

    def run(folder: Path) -> list[Verdict]:
        base.copy("collected", folder)
        done("train", *QUICK, "--model", "CompressedAD", "--history", HISTORY, "--out", "runs", cwd=folder)
        done("evaluate", RUN, "--device", "cpu", "--evaluation.episodes", "2", cwd=folder)
        ended = PATHS[name](folder)
        verdict = ended.verdict()
        if verdict.kind == "accepted":
            note = re.search(SPOKEN, ended.text)
            verdict = Verdict("fine", note[0]) if note else Verdict("leak", verdict.detail)
        return [verdict]

    return Trial("leaks", name, run)


def tasks_of(file: Path, *parts: str) -> set[tuple[float, ...]]:
    with h5py.File(file, "r") as f:
        ids = np.concatenate([f[f"split/{part}"][()] for part in parts])
        return {tuple(row) for row in f["tasks"][()][ids].tolist()}


def evaluate(d: Path, *more: object, run: str = RUN) -> Ended:
    return cad("evaluate", run, "--device", "cpu", "--overwrite", "--evaluation.episodes", "2", *more, cwd=d)


def train(d: Path, *more: object) -> Ended:
    return cad("train", *QUICK, "--model", "CompressedAD", "--history", HISTORY, "--out", "new", *more, cwd=d)


def split(d: Path, **parts: Callable[[dict[str, Any]], Any]) -> Callable[[h5py.File], None]:
    """An edit: parts of the split made of the old parts."""

    def edit(file: h5py.File) -> None:
        old = {name: file[f"split/{name}"][()] for name in ("train", "validation", "heldout")}
        for name, make in parts.items():
            put(f"split/{name}", np.asarray(make(old)))(file, d)

    return edit


def exchanged(d: Path) -> Callable[[h5py.File], None]:
    """Held-out and training tasks exchanged."""
    return split(
        d,
        heldout=lambda old: old["train"][:2],
        train=lambda old: np.concatenate([old["heldout"], old["train"][2:]]),
    )


def overlapping(d: Path, out: str, *words: object) -> Path:
    """A collection with another split, some of whose held-out tasks the run was trained on."""
    seen = tasks_of(d / HISTORY, "train", "validation")
    for seed in range(1, 30):
        done(*ONE, "--env.split_seed", seed, *words, "--out", out, cwd=d)
        (file,) = (d / out).glob("*.hdf5")
        if tasks_of(file, "heldout") & seen:
            return file
    raise RuntimeError("no such split")


@path
def the_file_collected_anew_with_another_split(d: Path) -> Ended:
    overlapping(d, "datasets", "--overwrite")
    return evaluate(d)


@path
def the_split_edited_in_place(d: Path) -> Ended:
    reseal(d / HISTORY, exchanged(d))
    return evaluate(d)


@path
def the_split_edited_in_a_copy(d: Path) -> Ended:
    shutil.copy(d / HISTORY, d / "copy.hdf5")
    reseal(d / "copy.hdf5", exchanged(d))
    return evaluate(d, "--history", "copy.hdf5")


@path
def the_same_family_by_another_name(d: Path) -> Ended:
    shutil.copy(d / HISTORY, d / "copy.hdf5")
    reseal(d / "copy.hdf5", exchanged(d))
    reseal(d / "copy.hdf5", lambda f: f.attrs.update(family="compressed_ad.tasks.gridworld:Darkroom"))
    return evaluate(d, "--history", "copy.hdf5")


@path
def the_same_family_collected_by_another_name(d: Path) -> Ended:
    family = ["--env.family", "compressed_ad.tasks.gridworld:Darkroom", "--env.name", "darkroom"]
    file = overlapping(d, "other", *family, "--overwrite")
    return evaluate(d, "--history", file)


@path
def another_file_at_the_same_path_while_resuming(d: Path) -> Ended:
    done(*ONE, "--overwrite", "--env.split_seed", "3", "--out", "datasets", cwd=d)
    more = ["--model", "CompressedAD", "--history", HISTORY, "--out", "runs", "--resume"]
    return cad("train", *QUICK, *more, cwd=d)


@path
def a_collection_resumed_with_another_split(d: Path) -> Ended:
    return cad(*ONE, "--resume", "--env.split_seed", "5", "--out", "datasets", cwd=d)


@path
def held_out_tasks_asked_for_in_training(d: Path) -> Ended:
    with h5py.File(d / HISTORY) as file:
        held = file["split/heldout"][()].tolist()
    return train(d, "--env.training_tasks", json.dumps(held))


@path
def a_family_with_equal_tasks(d: Path) -> Ended:
    (d / "twins.py").write_text(
        "import numpy as np\nfrom compressed_ad.tasks.gridworld import Darkroom\n\n\n"
        "class Twins(Darkroom):\n    def tasks(self):\n"
        "        return np.repeat(super().tasks()[:5], 2, axis=0)\n"
    )
    family = ["--env.family", "twins:Twins", "--env.kwargs", "{size: 9, horizon: 20}"]
    return cad(*ONE, *family, "--out", "twins", cwd=d)


@path
def equal_tasks_drawn(d: Path) -> Ended:
    family = ["--family", "gymnasium:CartPole-v1", "--task-param", "gravity=5,10"]
    family += ["--task-param", "masspole=0.1,0.2", "--tasks", "10"]
    return cad(*ONE, *family, "--out", "cart", cwd=d)


@path
def equal_tasks_in_a_file(d: Path) -> Ended:
    def twin(file: h5py.File) -> None:
        tasks = file["tasks"][()]
        tasks[file["split/heldout"][()]] = tasks[file["split/train"][0]]
        put("tasks", tasks)(file, d)

    reseal(d / HISTORY, twin)
    return train(d)


@path
def a_training_group_is_a_held_out_one(d: Path) -> Ended:
    reseal(d / HISTORY, lambda f: link(str(f["split/train"][0]), str(f["split/heldout"][0]))(f, d))
    return train(d)


def foreign(d: Path, change: Callable[[h5py.File], object] = bool) -> None:
    with h5py.File(d / "foreign.h5", "w") as file:
        recorded()(file)
        change(file)


@path
def an_import_whose_parts_overlap(d: Path) -> Ended:
    foreign(d)
    return cad(*IMPORT, "--heldout", "1,2", cwd=d)


@path
def an_import_with_histories_exchanged(d: Path) -> Ended:
    def swap(file: h5py.File) -> None:
        for old, new in (("0", "t"), ("2", "0"), ("t", "2")):
            file.move(old, new)

    foreign(d, swap)
    return cad(*IMPORT, "--heldout", "2", cwd=d)


@path
def an_import_with_rewarded_histories_exchanged(d: Path) -> Ended:
    with h5py.File(d / "foreign.h5", "w") as file:
        recorded({"0": 2, "1": 1, "2": 0}, optimal=True)(file)
    return cad(*IMPORT, "--heldout", "2", cwd=d)


@path
def an_import_with_a_copy(d: Path) -> Ended:
    foreign(d, lambda file: (file.__delitem__("2"), file.copy("0", "2")))
    return cad(*IMPORT, "--heldout", "2", cwd=d)


@path
def an_import_of_one_task_twice(d: Path) -> Ended:
    foreign(d)
    return cad(*IMPORT, "--heldout", "2", "--task-ids", "0,1,0", cwd=d)


@path
def a_transform_that_looks(d: Path) -> Ended:
    (d / "peek.py").write_text(
        "def peek(sequences, context):\n"
        "    assert len(context.tasks) <= len(set(sequences.task.tolist())), 'held-out tasks'\n"
        "    return sequences\n"
    )
    ended = train(d, "--model.transforms", "[{name: 'peek:peek'}]")
    return Ended(2, "cad: error: saw training tasks alone") if ended.code == 0 else Ended(0, ended.text)


@path
def scales_of_all_tasks(d: Path) -> Ended:
    import torch

    reseal(d / HISTORY, lambda file: put("scales/reward", 7.5)(file, d))
    ended = train(d)
    if ended.code == 0:
        scale = torch.load(d / NEW / "best_model.pt", weights_only=True)["config"].get("reward_scale")
        if scale == 1.0:
            return Ended(2, "cad: error: the scale is that of the training tasks")
    return ended


@path
def validation_tasks_judge(d: Path) -> Ended:
    parts = split(d, heldout=lambda old: old["validation"], validation=lambda old: old["heldout"])
    reseal(d / HISTORY, parts)
    return evaluate(d)


@path
def runs_of_two_splits_compared(d: Path) -> Ended:
    done(*ONE, "--env.split_seed", "5", "--out", "o", cwd=d)
    (file,) = (d / "o").glob("*.hdf5")
    words = ["--model", "AD", "--history", file, "--out", "new"]
    done("train", *QUICK, *words, cwd=d)
    done("evaluate", "new/AD-darkroom-seed0", "--device", "cpu", "--evaluation.episodes", "2", cwd=d)
    return cad("compare", RUN, "new/AD-darkroom-seed0", cwd=d)


@path
def the_same_numbers_of_other_tasks(d: Path) -> Ended:
    parts = split_tasks(10, 3, validation=2, heldout=2)
    known = set(choose_tasks(81, 0, 10)[np.concatenate([parts.train, parts.validation])].tolist())
    other = next(s for s in range(1, 500) if set(choose_tasks(81, s, 10)[parts.heldout].tolist()) <= known)
    files = {}
    for seed in (0, other):
        done(*ONE, "--env.split_seed", "3", "--seed", seed, "--out", f"of {seed}", cwd=d)
        (files[seed],) = (d / f"of {seed}").glob("*.hdf5")
    done("train", *QUICK, "--model", "CompressedAD", "--history", files[0], "--out", "new", cwd=d)
    return evaluate(d, "--history", files[other], run=NEW)


@path
def a_report_after_collecting_anew(d: Path) -> Ended:
    evaluated = tasks_of(d / HISTORY, "heldout")
    done(*ONE, "--overwrite", "--env.split_seed", "5", "--out", "datasets", cwd=d)
    ended = cad("report", RUN, "--out", "report", cwd=d)
    if ended.code == 0:
        told = json.loads((d / "report/summary.json").read_text())["protocol"]["split"]["heldout"]
        with h5py.File(d / HISTORY) as file:
            shown = {tuple(row) for row in file["tasks"][()][told].tolist()}
        if shown == evaluated:
            return Ended(2, "cad: error: the report shows the split that was judged")
    return ended


@path
def weights_replaced_after_the_evaluation(d: Path) -> Ended:
    words = ["--model", "AD", "--history", HISTORY, "--out", "runs"]
    done("train", *QUICK, *words, cwd=d)
    done("evaluate", "runs/AD-darkroom-seed0", "--device", "cpu", "--evaluation.episodes", "2", cwd=d)
    done("train", *ENV, "--model.steps", "6", *words[:-1], "longer", cwd=d)
    shutil.copy(d / "longer/AD-darkroom-seed0/best_model.pt", d / "runs/AD-darkroom-seed0/best_model.pt")
    return cad("compare", RUN, "runs/AD-darkroom-seed0", cwd=d)


def trials(base: Base, long: bool, seed: int) -> Iterator[Trial]:
    base("collected")
    for number, name in enumerate(PATHS):
        if long or number % 3 == seed % 3:
            yield trial(base, name)
