"""Import and export: what other programs wrote comes in without loss, and ours goes out and comes back."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compressed_ad.cli.main import main
from compressed_ad.errors import ConfigError, HistoryError, MissingExtraError, install_command
from compressed_ad.histories.exchange.formats import EXPORT, LAYOUT, Recorded
from compressed_ad.histories.exchange.importing import Findings, file_provenance, import_histories
from compressed_ad.histories.exchange.minari import dataset_id, episodes
from compressed_ad.histories.exchange.task_ids import MATCH, named_split
from compressed_ad.histories.file import HistoryFile, HistoryInfo, remark
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.tasks.gridworld import Darkroom, DarkroomHard
from compressed_ad.tasks.replay import episode_step, play
from compressed_ad.types import History, Split
from tests.cli.test_main import errors, run, tree
from tests.learners.test_conformance import Line

__all__ = ["run"]  # the fixture

FAMILY = Darkroom(3, 5)
KWARGS = {"size": 3, "horizon": 5}
SPLIT = Split(np.arange(6), np.array([6]), np.array([7, 8]))
FAMILY_WORDS = ["--family", "darkroom", "--env.kwargs", "{size: 3, horizon: 5}"]
ENDS_WORDS = ["--heldout", "7,8", "--validation", "6"]

NEEDED = ("states", "actions", "rewards", "next_states")
STEPS = 23  # the last episode is open


def recorded(task: int, family: Any = FAMILY, n_stream: int = 2, steps: int = STEPS) -> Recorded:
    """Random actions on a task, written as the ancestors do: at an episode's end the reset observation."""
    draw = np.random.default_rng(task)
    actions = draw.integers(0, 5, (n_stream, steps))
    played = play(family, np.repeat(family.tasks()[task][None], n_stream, axis=0), actions, 0)
    next_states = played.next_states.copy()
    end = played.episode_end[:, :-1]
    next_states[:, :-1][end] = played.states[:, 1:][end]
    return Recorded(
        played.states, actions, played.rewards.astype(np.int64), next_states,
        dones=played.episode_end, action_probs=draw.uniform(0.1, 1, actions.shape).astype(np.float32),
    )  # fmt: skip


def write_ancestor(path: Path, tasks: dict[int, Recorded], without: tuple[str, ...] = ()) -> Path:
    with h5py.File(path, "w") as file:
        for task, one in tasks.items():
            for name in (*NEEDED, "dones", "action_probs", "optimal_actions"):
                if name not in without and getattr(one, name) is not None:
                    file[f"{task}/{name}"] = getattr(one, name).swapaxes(0, 1)
    return path


def imported(tasks: dict[int, Recorded], path: Path, **options: Any) -> tuple[HistoryFile, Findings]:
    given: dict[str, Any] = {
        "family": FAMILY, "family_name": "darkroom", "family_kwargs": KWARGS, "split": SPLIT, **options
    }  # fmt: skip
    findings = import_histories(tasks, path, **given)
    return HistoryFile(path), findings


def truth(task: int, one: Recorded, family: Any = FAMILY) -> Any:
    slots = np.repeat(family.tasks()[task][None], len(one.rewards), axis=0)
    return play(family, slots, one.actions, 0)


@pytest.fixture(scope="module")
def nine() -> dict[int, Recorded]:
    return {task: recorded(task) for task in range(9)}


# ---------------------------------------------------------------- import


@pytest.mark.parametrize("without", [(), ("dones",), ("dones", "action_probs")])
def test_the_family_repairs_what_ancestors_write_wrong(run, tmp_path, nine, without):
    write_ancestor(tmp_path / "old.hdf5", nine, without)
    code, out, lines = run("import", "old.hdf5", *FAMILY_WORDS, *ENDS_WORDS, "--source", "PPO", "--out", "d")
    assert (code, errors(lines)) == (0, [])
    path = tmp_path / "d" / "history_darkroom_PPO_alg-seed0_compressed.hdf5"
    assert out.startswith(f"d/{path.name}: 9 tasks (6 train, 1 validation, 2 heldout)")
    file = HistoryFile(path)
    assert [ids.tolist() for ids in vars(file.split).values()] == [[0, 1, 2, 3, 4, 5], [6], [7, 8]]
    assert (file.info.family, file.info.family_kwargs, file.info.learner) == ("darkroom", KWARGS, "PPO")
    assert file.info.config["imported_from"] == "old.hdf5"
    assert np.array_equal(file.tasks, FAMILY.tasks())
    assert np.array_equal(file.optimal_return, FAMILY.optimal_return(FAMILY.tasks()))
    repaired = 0
    for task, history in file.load().items():
        true = truth(task, nine[task])
        for name in ("states", "next_states", "rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(history, name), getattr(true, name)), name
        repaired += int((nine[task].next_states != true.next_states).any(-1).sum())
        assert history.states.dtype == np.uint8
        assert history.learner.tolist() == [0, 0]
        if "action_probs" in without:
            assert np.isnan(history.action_probs).all()
        else:
            assert np.array_equal(history.action_probs, nine[task].action_probs)
    assert repaired > 20
    notes = [line for line in lines if line.startswith("note: ")]
    assert any(f"{repaired} next_states" in note and "9 task(s)" in note for note in notes)
    assert any("action_probs are unknown" in note for note in notes) == ("action_probs" in without)
    assert run("mark", path, "--marker", "none")[0] == 0
    code, _, lines = run("mark", path, "--marker", "threshold")
    assert code == (1 if "action_probs" in without else 0)
    assert not list(tmp_path.rglob("*.shards"))


def test_what_the_family_does_not_play_is_kept_and_said(tmp_path, nine):
    moved = nine | {task: nine[(task + 1) % 6] for task in range(6)}  # another order of the training tasks
    file, findings = imported(moved, tmp_path / "h.hdf5")
    assert sorted(findings.disagree) == list(range(6))
    assert "rewards differ first in stream" in findings.disagree[0]
    ends = {t: int(one.dones[:, :-1].sum()) for t, one in moved.items() if t < 6}
    assert findings.kept == ends
    assert sorted(findings.repaired) == [6, 7, 8]
    assert any("could not be repaired, in 6 task(s)" in line for line in findings.lines())
    assert any("--task-ids" in line for line in findings.lines())
    history = file.load([3])[3]
    assert np.array_equal(history.next_states, moved[3].next_states)
    assert np.array_equal(history.truncated, moved[3].dones)
    assert not history.terminated.any()


def test_tasks_in_another_order_are_found_by_their_rewards(tmp_path):
    # Long enough that every goal cell is met.
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    tasks = {k: recorded(task, n_stream=6, steps=60) for k, task in enumerate(order)}
    file, findings = imported(tasks, tmp_path / "h.hdf5", task_ids=MATCH)
    assert file.info.config["task_ids"] == order
    assert np.array_equal(file.tasks, FAMILY.tasks()[order])
    assert not findings.disagree
    with_ids, _ = imported(tasks, tmp_path / "i.hdf5", task_ids=order)
    assert all(
        np.array_equal(a.next_states, b.next_states)
        for a, b in zip(file.load().values(), with_ids.load().values(), strict=True)
    )


def test_a_match_that_is_not_unique_is_refused(tmp_path):
    still = recorded(0, steps=5)
    still = Recorded(**{**vars(still), "actions": np.zeros_like(still.actions)})
    true = truth(0, still)
    still = Recorded(true.states, still.actions, true.rewards, true.next_states)
    with pytest.raises(HistoryError, match=r"task 0: no single task of darkroom.*all do\); give --task-ids"):
        imported({0: still}, tmp_path / "h", split=Split(*map(np.array, ([0], [], []))), task_ids=MATCH)


def test_episodes_that_terminate(tmp_path):
    family = DarkroomHard(3, 5)
    tasks = {task: recorded(task, family) for task in range(9)}
    file, findings = imported(tasks, tmp_path / "h.hdf5", family=family, family_name="darkroom_hard")
    assert not findings.disagree
    some = 0
    for task, history in file.load().items():
        true = truth(task, tasks[task], family)
        assert np.array_equal(history.terminated, true.terminated)
        assert np.array_equal(history.truncated, true.truncated)
        some += int(history.terminated.sum())
    assert some > 0
    # The same without the family's help: shorter episodes terminated, the others were cut off.
    strange = {t: Recorded(**{**vars(one), "rewards": one.rewards + 1}) for t, one in tasks.items()}
    file, findings = imported(strange, tmp_path / "s.hdf5", family=family, family_name="darkroom_hard")
    assert len(findings.disagree) == 9
    for task, history in file.load().items():
        late = episode_step(tasks[task].dones) == 5
        assert np.array_equal(history.truncated, tasks[task].dones & late)
        assert np.array_equal(history.terminated, tasks[task].dones & ~late)


def test_without_dones_the_horizon_tells(tmp_path, nine):
    strange = {
        t: Recorded(**{**vars(one), "rewards": one.rewards + 1, "dones": None}) for t, one in nine.items()
    }
    with pytest.raises(HistoryError, match=r"task 0: has no dones.*--horizon N"):
        imported(strange, tmp_path / "h.hdf5")
    assert not list(tmp_path.iterdir())
    file, _ = imported(strange, tmp_path / "h.hdf5", horizon=4)
    assert np.flatnonzero(file.load([0])[0].truncated[0]).tolist() == [3, 7, 11, 15, 19]
    with pytest.raises(ConfigError, match=r"--horizon 6 does not lie in 1\.\.5"):
        imported(strange, tmp_path / "i.hdf5", horizon=6)


def test_learners_and_updates_that_the_user_knows(tmp_path, nine):
    file, _ = imported(nine, tmp_path / "h.hdf5", n_learner=2, steps_per_update=10)
    history = file.load([0])[0]
    assert history.learner.tolist() == [0, 1]
    assert history.update[1].tolist() == [0] * 10 + [1] * 10 + [2] * 3
    assert file.info.config["n_stream"] == 1
    with pytest.raises(ConfigError, match="3 learners cannot share 2 streams"):
        imported(nine, tmp_path / "i.hdf5", n_learner=3)


def test_only_tasks_of_the_split_are_imported_and_numbered_anew(tmp_path, nine):
    split = Split(np.array([2, 5]), np.array([], int), np.array([8]))
    file, _ = imported(nine, tmp_path / "h.hdf5", split=split)
    assert file.info.config["task_ids"] == [2, 5, 8]
    assert [ids.tolist() for ids in vars(file.split).values()] == [[0, 1], [], [2]]
    assert np.array_equal(file.load([2])[2].actions, nine[8].actions)


def test_columns_and_whole_floats_are_understood(tmp_path, nine):
    with h5py.File(tmp_path / "old.hdf5", "w") as file:
        for task, one in nine.items():
            for name in ("states", "next_states"):
                file[f"{task}/{name}"] = getattr(one, name).swapaxes(0, 1).astype(np.float64)
            for name in ("actions", "rewards", "dones"):
                file[f"{task}/{name}"] = getattr(one, name).swapaxes(0, 1)[..., None]
    history = imported(dict(LAYOUT["ancestor"](tmp_path / "old.hdf5")), tmp_path / "h.hdf5")[0].load([4])[4]
    assert np.array_equal(history.actions, nine[4].actions)
    assert np.array_equal(history.states, nine[4].states)


def test_the_split_is_named_or_drawn_never_invented(run, tmp_path, nine):
    write_ancestor(tmp_path / "old.hdf5", nine)
    words = ["import", "old.hdf5", *FAMILY_WORDS, "--out", "h.hdf5"]
    before = tree(tmp_path)
    for more, cause in (
        ([], "the file has no split: name its parts (--heldout K,K,..."),
        (["--validation", "1"], "--validation without --heldout"),
        (["--heldout", "1,2", "--validation", "2"], "tasks [2] are in more than one part"),
        (["--heldout", "1,x"], "argument --heldout: expected task numbers like 3,5,9, got '1,x'"),
        (["--heldout", "1", "--horizon", "0"], "argument --horizon"),
        (["--heldout", "1", "--task-ids", "1,2"], "9 tasks are imported, but 2 ids are given"),
        (["--heldout", "1", "--task-ids", "0,1,2,3,4,5,6,7,7"], "tasks [7] of darkroom are given twice"),
        (["--heldout", "1", "--task-ids", "0,1,2,3,4,5,6,7,9"], "has tasks 0..8, not [9]"),
        (["--heldout", "1", "--layout", "anzestor"], "unknown layout 'anzestor'"),
    ):
        code, out, lines = run(*words, *more)
        assert (code, out) == (2, "")
        (line,) = errors(lines)
        assert cause in line
    code, _, lines = run("import", "old.hdf5", *ENDS_WORDS)
    assert code == 2
    assert "name the task family" in errors(lines)[0]
    code, _, lines = run(*words, "--heldout", "11")
    assert (code, errors(lines)) == (
        1,
        ["old.hdf5: has no task [11] (heldout); it has [0, 1, 2, 3, 4, 5, 6, 7, 8]"],
    )
    assert run(*words, "--split-seed", "3", "--dry-run")[1].startswith("Would import 9 tasks of old.hdf5")
    assert tree(tmp_path) == before
    assert run(*words, "--split-seed", "3", "--env.heldout", "2", "--env.validation", "1")[0] == 0
    parts = [len(ids) for ids in vars(HistoryFile(tmp_path / "h.hdf5").split).values()]
    assert parts == [6, 1, 2]
    code, _, lines = run(*words, "--split-seed", "3")
    assert code == 1
    assert "h.hdf5 exists" in errors(lines)[0]
    assert run(*words, "--split-seed", "3", "--overwrite")[0] == 0


def test_a_named_split_leaves_the_rest_to_training():
    split = named_split([0, 2, 4, 6], [6], [0], None)
    assert [ids.tolist() for ids in vars(split).values()] == [[2, 4], [0], [6]]


def damage(edit: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            edit(file)

    return change


def replace(name: str, value: Any) -> Callable[[Path], None]:
    def edit(file: h5py.File) -> None:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value

    return damage(edit)


BROKEN = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("states, actions\n" * 50), "is not an HDF5 file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cannot be read as an HDF5 file"),
    "names": (replace("first/states", np.zeros(3)), "'first' is not the index of a task"),
    "leading zero": (replace("00/states", np.zeros(3)), "'00' is not the index of a task"),
    "other digits": (replace("٣/states", np.zeros(3)), "'٣' is not the index of a task"),
    "sign": (replace("-1/states", np.zeros(3)), "'-1' is not the index of a task"),
    "fraction": (replace("1.0/states", np.zeros(3)), "'1.0' is not the index of a task"),
    "huge": (replace("9" * 20 + "/states", np.zeros(3)), "is not the index of a task"),
    "hard link": (
        damage(lambda file: (file.pop("3"), file.update({"3": file["2"]}))),
        "task 3 (heldout) holds the histories of task 2",
    ),
    "copy": (
        damage(lambda file: (file.pop("3"), file.copy("2", "3"))),
        "task 3 (heldout) holds the histories of task 2",
    ),
    "another length": (
        damage(lambda file: [file.update({f"3/{n}": file.pop(f"3/{n}")[:20]}) for n in list(file["3"])]),
        "task 3 has (streams, steps) (2, 20), task 0 (2, 23)",
    ),
    "exchanged axes": (
        damage(lambda file: [
            file.update({f"{k}/{n}": file.pop(f"{k}/{n}")[()].swapaxes(0, 1)})
            for k in list(file) for n in list(file[k])
        ]),
        "task 0: streams and time are exchanged: what was read as 23 streams of 2 steps is 2 streams of 23",
    ),
    "no states": (replace("3/states", None), "/3: 'states' is missing"),
    "one dimension": (replace("3/rewards", np.zeros(23)), "/3/rewards: expected (time, stream, ...)"),
    "other lengths": (replace("3/actions", np.zeros((22, 2), int)), "task 3: actions have (2, 22)"),
    "strings": (replace("3/actions", np.full((23, 2), b"up")), "/3/actions: dtype"),
    "outside": (replace("3/actions", np.full((23, 2), 7)), "actions[0, 0] is 7, outside"),
    "half cells": (replace("3/states", np.full((23, 2, 2), 0.5)), "states of dtype float64 are not whole"),
    "nan": (replace("3/rewards", np.full((23, 2), np.nan)), "rewards[0, 0] is nan"),
    "other space": (replace("3/states", np.zeros((23, 2, 3), int)), "states has elements of shape (3,)"),
    "probabilities": (replace("3/action_probs", np.full((23, 2), 1.5)), "action_probs reach from 1.5"),
    "link": (replace("3", h5py.ExternalLink("/etc/passwd", "x")), "'3' is missing or a link"),
    "no task": (replace("3", None), "has no task [3] (heldout)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_one_line_and_leave_nothing(run, tmp_path, nine, kind):
    change, cause = BROKEN[kind]
    write_ancestor(tmp_path / "old.hdf5", nine)
    change(tmp_path / "old.hdf5")
    before = tree(tmp_path)
    code, out, lines = run("import", "old.hdf5", *FAMILY_WORDS, "--heldout", "3", "--out", "h.hdf5")
    assert (code, out) == (1, "")
    (line,) = errors(lines)
    assert "old.hdf5" in line
    assert cause in line
    assert tree(tmp_path) == before


def test_a_history_file_is_not_imported_again(run, tmp_path, nine):
    imported(nine, tmp_path / "h.hdf5")
    code, _, lines = run("import", "h.hdf5", *FAMILY_WORDS, "--heldout", "1", "--out", "i.hdf5")
    assert (code, errors(lines)) == (1, ["h.hdf5: is a history file of compressed_ad already"])


def own_layout(path: Path) -> dict[int, Recorded]:
    """A layout of a user: actions as digits, a line per stream, on task 4."""
    actions = np.array([[int(digit) for digit in line] for line in path.read_text().split()])
    played = play(FAMILY, np.repeat(FAMILY.tasks()[[4]], len(actions), axis=0), actions, 0)
    return {4: Recorded(played.states, actions, played.rewards, played.next_states)}


def own_format(file: HistoryFile, path: Path, overwrite: bool, progress: Any) -> Path:
    """A format of a user: the same digits."""
    lines = ("".join(map(str, row)) for row in file.load([0])[0].actions)
    path.write_text("\n".join(lines))
    return path


def test_own_layouts_and_formats(run, tmp_path):
    (tmp_path / "moves.txt").write_text("0123401234\n4321043210")
    words = ["--layout", "tests.histories.test_exchange:own_layout", *FAMILY_WORDS, "--out", "h.hdf5"]
    code, _, lines = run("import", "moves.txt", *words, "--heldout", "", "--split-seed", "0")
    assert (code, errors(lines)) == (0, [])
    assert HistoryFile(tmp_path / "h.hdf5").info.config["task_ids"] == [4]
    assert (
        run("export", "h.hdf5", "--to", "tests.histories.test_exchange:own_format", "--out", "m.txt")[0] == 0
    )
    assert (tmp_path / "m.txt").read_text() == (tmp_path / "moves.txt").read_text()


def test_continuous_observations_and_actions(tmp_path):
    family, draw = Line(), np.random.default_rng(0)
    actions = draw.uniform(-1, 1, (2, 20, 2)).astype(np.float32)
    tasks = {}
    for task in range(3):
        played = play(family, np.repeat(family.tasks()[task][None], 2, axis=0), actions, 0)
        next_states = played.next_states.astype(np.float64)
        next_states[:, 5::6] = 0  # the reset observation
        # In double precision, and rounded by whoever wrote it.
        states = played.states.astype(np.float64) * (1 + 1e-7)
        tasks[task] = Recorded(states, actions.astype(np.float64), played.rewards, next_states)
    split = Split(np.array([0]), np.array([1]), np.array([2]))
    file, findings = imported(tasks, tmp_path / "h.hdf5", family=family, family_name="x:Line", split=split)
    assert findings.repaired == {0: 6, 1: 6, 2: 6}
    assert file.optimal_return is None
    for task, history in file.load().items():
        true = truth(task, tasks[task], family)
        assert history.states.dtype == history.actions.dtype == np.float32
        assert np.array_equal(history.truncated, true.truncated)
        assert np.allclose(history.next_states, true.next_states, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 not a zip"), "is not an npz file"),
        (lambda path: np.savez(path, rewards=np.zeros(3)), "has no arrays '<task>/states'"),
        (lambda path: np.savez(path, **{"x/states": np.zeros(3)}), "'x' is not the index of a task"),
        (
            lambda path: np.savez(path, **{"0/states": np.zeros(3)}),
            "task 0 lacks actions, rewards",
        ),
        (
            lambda path: np.savez(path, **{f"0/{n}": np.array([{}]) for n in NEEDED}),
            "states holds pickled Python objects",
        ),
        (
            lambda path: np.savez(path, **{f"0/{n}": np.zeros((2, 3)) for n in (*NEEDED, "terminated")}),
            "task 0: has one of terminated and truncated without the other",
        ),
        (lambda path: np.savez(path, **{f"0/{n}": np.zeros(3) for n in NEEDED}), "task 0: states have (3,)"),
        (lambda path: path.unlink(), "No such file or directory"),
    ],
)
def test_broken_npz_files_are_one_line(run, tmp_path, make, cause):
    path = tmp_path / "old.npz"
    path.write_bytes(b"")
    make(path)
    before = tree(tmp_path)
    words = ["import", path, "--layout", "npz", *FAMILY_WORDS, "--split-seed", "0", "--out", "h.hdf5"]
    code, out, lines = run(*words)
    assert (code, out) == (1, "")
    (line,) = errors(lines)
    assert "old.npz" in line
    assert cause in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("steps", [20, 23], ids=["whole episodes", "an open episode"])
@pytest.mark.parametrize("given", ["none", "shifted"])
def test_missing_successors_are_those_of_the_family(tmp_path, steps, given):
    """``shifted``: the states of the next steps, as most programs that record no successors write them."""
    tasks, made_up = {}, 0
    for task in range(9):
        one = recorded(task, steps=steps)
        shifted = np.concatenate([one.states[:, 1:], one.states[:, -1:]], axis=1)
        made_up += int((shifted != truth(task, one).next_states).any(-1).sum())
        tasks[task] = Recorded(**{**vars(one), "next_states": None if given == "none" else shifted})
    file, findings = imported(tasks, tmp_path / "h.hdf5")
    assert findings.disagree == {} == findings.kept and made_up > 20
    assert sum(findings.repaired.values()) == (0 if given == "none" else made_up)
    assert findings.without == (list(range(9)) if given == "none" else [])
    said = [line for line in findings.lines() if "next_states are not recorded" in line]
    assert len(said) == (given == "none") and all("in 9 task(s): [0, 1, 2" in line for line in said)
    for task, history in file.load().items():
        true = truth(task, tasks[task])
        assert np.array_equal(history.next_states, true.next_states)
        assert np.array_equal(history.truncated, true.truncated)


def test_missing_successors_that_no_replay_supplies_are_said(tmp_path, nine):
    strange = {
        t: Recorded(**{**vars(one), "rewards": one.rewards + 1, "next_states": None})
        for t, one in nine.items()
    }
    file, findings = imported(strange, tmp_path / "h.hdf5")
    assert findings.kept == dict.fromkeys(
        nine, 2 * (4 + 1)
    )  # four episodes end in each stream, and the record
    assert any("90 next_states at the ends of episodes are wrong" in line for line in findings.lines())
    history = file.load([0])[0]
    assert np.array_equal(history.next_states[:, :-1], history.states[:, 1:])


@pytest.mark.parametrize("layout", ["ancestor", "npz"])
def test_files_without_successors_are_imported(run, tmp_path, nine, layout):
    if layout == "ancestor":
        write_ancestor(tmp_path / "old", nine, ("next_states",))
    else:
        named = {f"{t}/{n}": getattr(one, n) for t, one in nine.items() for n in (*NEEDED[:3], "dones")}
        np.savez(tmp_path / "old.npz", **named)
        (tmp_path / "old.npz").rename(tmp_path / "old")
    words = ["old", "--layout", layout, *FAMILY_WORDS, *ENDS_WORDS, "--out", "h.hdf5"]
    assert run("import", *words)[0] == 0
    history = HistoryFile(tmp_path / "h.hdf5").load([4])[4]
    assert np.array_equal(history.next_states, truth(4, nine[4]).next_states)


@pytest.mark.parametrize("key", [0.0, 1.5, True, -1, 10**20, "0"])
def test_numbers_of_tasks_are_whole_and_not_absurd(tmp_path, nine, key):
    with pytest.raises(HistoryError, match="is not the index of a task"):
        imported({**{t: one for t, one in nine.items() if t > 1}, key: nine[0]}, tmp_path / "h.hdf5")
    with pytest.raises(HistoryError, match="is not the index of a task"):
        named_split([2, key], [2], None, None)


def folder_layout(path: Path) -> dict[int, Recorded]:
    """A layout of a user: a JSON list of npz files."""
    files = json.loads((path / "runs.json").read_text())
    return {k: Recorded(**np.load(path / name)) for k, name in enumerate(files)}


def test_a_folder_of_files_is_imported_and_identified(run, tmp_path, nine):
    def write(folder: str, order: list[int]) -> str:
        (tmp_path / folder / "sub").mkdir(parents=True)
        for task in order:
            arrays = {name: array for name, array in vars(nine[task]).items() if array is not None}
            np.savez(tmp_path / folder / "sub" / f"{task}.npz", **arrays)
        (tmp_path / folder / "runs.json").write_text(json.dumps([f"sub/{k}.npz" for k in range(9)]))
        return folder

    found = []
    for folder, order in (("a", list(range(9))), ("b", list(range(8, -1, -1)))):
        words = ["--layout", f"{__name__}:folder_layout", *FAMILY_WORDS, *ENDS_WORDS]
        code, _, lines = run("import", write(folder, order), *words, "--out", f"{folder}.hdf5")
        assert (code, errors(lines)) == (0, [])
        found.append(HistoryFile(tmp_path / f"{folder}.hdf5").info.config)
    one, other = found
    assert (one["imported_from"], other["imported_from"]) == ("a", "b")
    assert one["sha256"] == other["sha256"] == file_provenance(tmp_path / "b", "x")["sha256"]
    (tmp_path / "b" / "runs.json").rename(tmp_path / "b" / "other.json")
    assert file_provenance(tmp_path / "b", "x")["sha256"] != one["sha256"]


@pytest.mark.parametrize(("more", "marker"), [([], "none"), (["--steps-per-update", "10"], "rollout")])
def test_the_last_line_of_an_import_is_a_command_that_works(run, tmp_path, nine, more, marker):
    for without, ending in ((("action_probs",), f" --marker {marker}"), ((), "")):
        write_ancestor(tmp_path / "old.hdf5", nine, without)
        out = tmp_path / "a folder" / f"{len(without)}.hdf5"
        code, said, _ = run("import", "old.hdf5", *FAMILY_WORDS, *ENDS_WORDS, *more, "--out", out)
        command = shlex.split(said.rpartition("mark it with: cad ")[2])
        assert code == 0 and command == ["mark", str(out), *ending.split()]
        assert run(*command)[0] == 0


def test_a_source_that_is_no_name_cannot_leave_the_folder(run, tmp_path, nine):
    write_ancestor(tmp_path / "old.hdf5", nine)
    before = tree(tmp_path)
    code, _, lines = run(
        "import", "old.hdf5", *FAMILY_WORDS, *ENDS_WORDS, "--source", "../../x", "--out", "d"
    )
    assert (code, errors(lines)) == (
        2,
        ["the learner's name must fit a file name (1 to 100 letters, no /), not '../../x'"],
    )
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- round trips


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Streams with episodes of different lengths, the last ones mostly open, of a made-up environment."""
    n_stream, n_step = draw(st.integers(1, 3)), draw(st.integers(1, 25))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n_stream, n_step)
    chance = draw(st.sampled_from([0.0, 0.2, 1.0]))
    end, kind = random.random(shape) < chance, random.random(shape) < 0.5
    states = random.integers(0, 9, (*shape, 2))
    next_states = random.integers(0, 9, (*shape, 2))
    inner = ~end[:, :-1]
    next_states[:, :-1][inner] = states[:, 1:][inner]
    known = draw(st.booleans())
    return History(
        states=states,
        actions=random.integers(0, 5, shape),
        rewards=random.normal(size=shape).astype(np.float32),
        next_states=next_states,
        terminated=end & kind,
        truncated=end & ~kind,
        action_probs=(random.random(shape) if known else np.full(shape, np.nan)).astype(np.float32),
        update=np.sort(random.integers(0, 9, shape)).astype(np.int32),
        learner=np.arange(n_stream, dtype=np.int32),
        entropy=random.random(shape).astype(np.float32) if known else None,
        optimal_actions=random.integers(0, 5, shape) if known else None,
        compression_mask=random.random(shape) < 0.5 if draw(st.booleans()) else None,
    )


INFO = HistoryInfo(
    "darkroom", {"size": 9, "horizon": 25},
    {"observation": {"kind": "multidiscrete", "nvec": [9, 9]}, "action": {"kind": "discrete", "n": 5}},
    25, "PPO", {}, 0,
)  # fmt: skip


def stored(folder: Path, one: History, name: str = "h.hdf5") -> HistoryFile:
    """``one`` as two tasks of a file, the second with its streams in another order, and other actions."""
    arrays = {n: a[::-1] for n, a in one.per_step()}
    other = History(**{**arrays, "actions": (arrays["actions"] + 1) % 5}, learner=one.learner)
    family = Darkroom(9, 25)
    tasks = family.tasks()[:2]
    writer = HistoryWriter(
        folder / name, INFO, Split(*map(np.array, ([0], [], [1]))), tasks,
        family.optimal_return(tasks), family.random_return(tasks), overwrite=True,
    )  # fmt: skip
    writer.append(0, one)
    writer.append(1, other)
    writer.finish()
    return HistoryFile(folder / name)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    assert np.shape(a) == np.shape(b), where
    assert np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f"), where


def silent(tasks: int) -> None:
    """Progress that nobody watches."""


ROUND = settings(max_examples=15, deadline=None)


@ROUND
@given(histories())
def test_ours_to_npz_holds_everything(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("npz")
    file = stored(folder, one)
    EXPORT["npz"](file, folder / "h.npz", False, silent)
    with np.load(folder / "h.npz", allow_pickle=False) as found:
        for task, history in file.load().items():
            for name, array in [*history.per_step(), ("learner", history.learner)]:
                assert_equal(found[f"{task}/{name}"], array, name)
                assert found[f"{task}/{name}"].dtype == array.dtype
        assert found["split/heldout"].tolist() == [1]
        assert_equal(found["tasks"], file.tasks)
        info = json.loads(str(found["info"]))
        assert (info["family"], info["spaces"]) == ("darkroom", INFO.spaces)
        assert len(found.files) == 2 * (1 + len(dict(one.per_step()))) + 7
    assert_comes_back(file, LAYOUT["npz"](folder / "h.npz"), folder / "back.hdf5")


def assert_comes_back(file: HistoryFile, tasks: Any, path: Path) -> None:
    """``tasks``, an export of ``file``, are the same histories but for the marks, which are made anew."""
    assert {name: ids.tolist() for name, ids in vars(tasks.split).items()} == {
        name: ids.tolist() for name, ids in vars(file.split).items()
    }
    back, _ = imported(tasks, path, family=Darkroom(9, 25), split=tasks.split)
    assert_equal(back.tasks[back.task_ids], file.tasks[file.task_ids])
    for task, history in file.load().items():
        again = back.load([task])[task]
        for name, array in history.with_mask(None).per_step():
            assert_equal(getattr(again, name), array, name)
            assert getattr(again, name).dtype == array.dtype
        assert_equal(again.learner, history.learner)
        assert dict(again.per_step()).keys() == dict(history.with_mask(None).per_step()).keys()


@ROUND
@given(histories())
def test_ancestor_to_ours_to_ancestor(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("ancestor")
    record = Recorded(
        one.states, one.actions, np.round(one.rewards).astype(np.int64), one.next_states,
        dones=one.episode_end, action_probs=one.action_probs, optimal_actions=one.optimal_actions,
    )  # fmt: skip
    other = Recorded(**{**vars(record), "actions": (one.actions + 1) % 5})
    old = write_ancestor(folder / "old.hdf5", {0: record, 1: other})
    family, split = Darkroom(9, 25), Split(*map(np.array, ([0, 1], [], [])))
    file, _ = imported(dict(LAYOUT["ancestor"](old)), folder / "h.hdf5", family=family, split=split)
    for history in file.load().values():
        assert_equal(history.episode_end, one.episode_end)
        late = episode_step(one.episode_end) == 25
        assert_equal(history.truncated, one.episode_end & late)
    EXPORT["ancestor"](file, folder / "new.hdf5", False, silent)
    with h5py.File(old) as a, h5py.File(folder / "new.hdf5") as b:
        assert set(a) == set(b)
        for task in a:
            assert set(a[task]) == set(b[task])
            for name in a[task]:
                assert_equal(a[task][name][()], b[task][name][()], name)


@settings(max_examples=8, deadline=None)
@given(histories())
def test_ours_to_minari_and_back(tmp_path_factory, one):
    minari = pytest.importorskip("minari")
    folder = tmp_path_factory.mktemp("minari")
    file = stored(folder, one)
    assert EXPORT["minari"](file, folder / "sets", False, silent) == folder / "sets" / dataset_id(file)
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "sets")
    try:
        dataset = minari.load_dataset("darkroom-PPO-seed0-v0")
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
    assert dataset.total_steps == 2 * one.rewards.size
    assert dataset.storage.metadata["algorithm_name"] == "PPO"
    about = list(dataset.storage.get_episode_metadata(range(dataset.total_episodes)))
    pieces: dict[tuple[int, int], list[Any]] = {}
    for episode, words in zip(dataset.iterate_episodes(), about, strict=True):
        assert words["part"] == {0: "train", 1: "heldout"}[int(words["task"])]
        key = int(words["task"]), int(words["stream"])
        assert int(words["first_step"]) == sum(len(e) for e in pieces.get(key, []))
        assert not (episode.terminations[:-1] | episode.truncations[:-1]).any()
        pieces.setdefault(key, []).append(episode)
    for task, history in file.load().items():
        for stream in range(history.n_stream):
            found = pieces.pop((task, stream))

            def joined(part: Callable[[Any], Any], found: list[Any] = found) -> Any:
                return np.concatenate([part(episode) for episode in found])

            assert_equal(joined(lambda e: e.observations[:-1]), history.states[stream])
            assert_equal(joined(lambda e: e.observations[1:]), history.next_states[stream])
            assert_equal(joined(lambda e: e.actions), history.actions[stream])
            assert_equal(joined(lambda e: e.rewards), history.rewards[stream])
            assert_equal(joined(lambda e: e.terminations), history.terminated[stream])
            assert_equal(joined(lambda e: e.truncations), history.truncated[stream])
            for name in ("action_probs", "update", "compression_mask", "entropy", "optimal_actions"):
                array = getattr(history, name)
                if array is None:
                    assert all(name not in episode.infos for episode in found)
                else:
                    assert_equal(joined(lambda e, name=name: e.infos[name][1:]), array[stream], name)
    assert not pieces
    assert_comes_back(file, LAYOUT["minari"](folder / "sets" / dataset_id(file)), folder / "back.hdf5")


def test_minari_gets_whole_datasets_only(run, tmp_path, nine, monkeypatch):
    pytest.importorskip("minari")
    file, _ = imported(nine, tmp_path / "h.hdf5")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "the user's")
    code, out, _ = run("export", "h.hdf5", "--to", "minari", "--out", "mine")
    assert (code, out) == (0, "mine/darkroom-imported-seed0-v0: 9 tasks as minari\n")
    assert os.environ["MINARI_DATASETS_PATH"] == "the user's"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["darkroom-imported-seed0-v0"]
    (tmp_path / "file").write_text("")
    for out, cause in (
        (tmp_path / "file", "must be a folder"),
        (tmp_path / "sets", "exists; replace a dataset"),
    ):
        if out.name == "sets":
            EXPORT["minari"](file, out, False, silent)
        with pytest.raises(HistoryError, match=cause):
            EXPORT["minari"](file, out, False, silent)
    before = sorted(path.name for path in (tmp_path / "sets").rglob("*"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "sets" / f".partial-{gone.pid}" / "half").mkdir(parents=True)
    other = tmp_path / "sets" / f".partial-{os.getppid()}"  # of an export that is at work
    other.mkdir()
    EXPORT["minari"](file, tmp_path / "sets", True, silent)
    other.rmdir()
    assert sorted(path.name for path in (tmp_path / "sets").rglob("*")) == before


def test_episodes_are_cut_where_they_end_and_the_last_may_be_open(nine, tmp_path):
    history = imported(nine, tmp_path / "h.hdf5")[0].load([0])[0]
    cut = [(0, 5 * k, min(5 * k + 5, STEPS)) for k in range(5)]
    assert list(episodes("x", history)) == [*cut, *((1, a, b) for _, a, b in cut)]
    broken = History(**{**vars(history), "states": np.roll(history.states, 1, axis=0) * 0})
    with pytest.raises(HistoryError, match=r"x: next_states\[\d, \d+\] is not the state of the next step"):
        list(episodes("x", broken))


# ---------------------------------------------------------------- cad export


def test_export_refuses_what_is_there(run, tmp_path, nine):
    imported(nine, tmp_path / "h.hdf5")
    remark(tmp_path / "h.hdf5", "threshold")
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").write_text("words")
    before = tree(tmp_path)
    for to, out, code, cause in (
        ("npz", "h.hdf5", 1, "is the file that is exported"),
        ("npz", "folder/../h.hdf5", 1, "is the file that is exported"),
        ("ancestor", "there", 1, "there exists; replace it with --overwrite"),
        ("npz", "folder", 1, "folder is a folder"),
        ("csv", "x", 2, "unknown export format 'csv'; known: ancestor, minari, npz, or module:attribute"),
    ):
        got, out_text, lines = run("export", "h.hdf5", "--to", to, "--out", out)
        assert (got, out_text) == (code, "")
        (line,) = errors(lines)
        assert cause in line
    assert run("export", "h.hdf5", "--to", "npz", "--out", "x", "--dry-run")[0] == 0
    assert run("export", "h.hdf5", "--to", "npz")[0] == 2
    assert run("export", "none.hdf5", "--to", "npz", "--out", "x")[0] == 1
    assert tree(tmp_path) == before
    code, out_text, _ = run("export", "h.hdf5", "--to", "ancestor", "--out", "there", "--overwrite")
    assert (code, out_text) == (0, "there: 9 tasks as ancestor\n")
    with h5py.File(tmp_path / "there") as file:
        assert file["0/states"].shape == (STEPS, 2, 2)


def test_without_minari_one_line_says_what_to_install(tmp_path, nine, monkeypatch, capsys):
    file, _ = imported(nine, tmp_path / "h.hdf5")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MissingExtraError):
        EXPORT["minari"](file, tmp_path / "sets", False, silent)
    assert main(["export", str(file.path), "--to", "minari", "--out", str(tmp_path / "sets")]) == 2
    line = f"cad: error: the export to minari needs an optional dependency: {install_command('minari')}"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not (tmp_path / "sets").exists()
