"""Converts recordings of other programs to a history file.

Other programs record less than we need: no split, no task parameters, at most ``dones`` without their cause,
and as the successor at an episode's end the state after the reset. The task family has all of it, so the
actions of every stream are *replayed* in it. Where the replay reproduces the recorded states and rewards, its
successors and episode ends are taken as the true ones. Where it does not (another task, other dynamics,
chance), the recorded arrays are kept, and the findings say so.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import ConfigError, HistoryError, users_code
from compressed_ad.files import file_digest, locked
from compressed_ad.histories.columns import COLUMNS, OPTIONAL
from compressed_ad.histories.exchange.formats import Progress, Recorded, check_tasks
from compressed_ad.histories.exchange.replaying import fitted, outer, replayed, turned
from compressed_ad.histories.exchange.task_ids import ids_in_family, playing
from compressed_ad.histories.file import HistoryInfo
from compressed_ad.histories.header import same_steps, short
from compressed_ad.histories.writer import HistoryWriter
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.tasks.replay import Played, differ, episode_step
from compressed_ad.types import (
    AnyArray,
    BoolArray,
    History,
    SpaceSpec,
    Split,
)


@dataclass
class Findings:
    """What an import found, by the task's index in the imported file."""

    repaired: dict[int, int] = field(default_factory=dict)  # successors that were replaced
    kept: dict[int, int] = field(default_factory=dict)  # successors that are those after a reset
    without: list[int] = field(default_factory=list)  # tasks without recorded successors
    disagree: dict[int, str] = field(default_factory=dict)  # where replay and recording first differ
    unknown_probs: list[int] = field(default_factory=list)
    untold: list[int] = field(default_factory=list)  # no reward tells which task was played

    def lines(self) -> list[str]:
        """The findings as sentences for the user."""
        task, first = next(iter(self.disagree.items()), (0, ""))
        texts = {
            f"{sum(self.repaired.values())} next_states at the ends of episodes or of the record were not "
            "the states that the actions led to (usually they are the states after the reset). They were "
            "replaced by the family's, in": self.repaired,
            "next_states are not recorded, but taken from the states of the next steps and, at the ends of "
            "episodes, from the family where it reproduces the recording, in": self.without,
            "the family does not reproduce the recording; the arrays were kept, and the ends of episodes "
            f"taken from the file (task {task}: {first}). If the family is right, its tasks may have another "
            "order (--task-ids), or its actions other numbers (--actions). This concerns": self.disagree,
            f"{sum(self.kept.values())} next_states at the ends of episodes are wrong (they are the first "
            "state of the next episode, or the last recorded one) and could not be repaired, in": self.kept,
            "no step is rewarded, so that nothing shows whether these histories are of these tasks or of "
            "held-out ones, in": self.untold,
            "action_probs are unknown, so that only markers that do not need them can mark these histories "
            "(none, all, random, rollout, ...), in": self.unknown_probs,
        }
        return [f"{text} {_tasks(tasks)}" for text, tasks in texts.items() if tasks]


def _tasks(tasks: Collection[int]) -> str:
    return f"{len(tasks)} task(s): {short(list(tasks))}"


def import_histories(
    tasks: Mapping[int, Recorded],
    path: str | Path,
    *,
    family: TaskFamily,
    family_name: str,
    family_kwargs: Mapping[str, Any] | None = None,
    split: Split,
    task_ids: Sequence[int] | str | None = None,
    actions: Sequence[int] | None = None,
    horizon: int | None = None,
    n_learner: int = 1,
    steps_per_update: int | None = None,
    learner: str = "imported",
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda tasks: None,
) -> Findings:
    """Write the recorded ``tasks`` to the history file ``path`` as histories of ``family``.

    ``split`` holds keys of ``tasks``; tasks in no part are left out. The file numbers its tasks from 0 in
    ascending order of these keys. ``task_ids`` are the ids of the same tasks in the family, in the same
    order: by default those whose parameters the recording names, else the keys themselves; with ``"match"``,
    the task in which the actions earn the rewards. Recorded action k is the family's action ``actions[k]``.
    One number for each state where the family observes several counts the last of them fastest.

    ``horizon`` is the length of all episodes where neither recording nor replay has their ends. The streams
    are divided among ``n_learner`` learners, in order; ``steps_per_update`` steps are made with one policy
    (None: unknown, ``update`` is 0 throughout). Raises ``HistoryError`` or ``ConfigError`` naming the task.
    """
    check_tasks(tasks, vars(split))
    numbers = sorted(int(task) for ids in vars(split).values() for task in ids)
    place = {number: k for k, number in enumerate(numbers)}
    spaces = family_specs(family)
    if horizon is not None and not 1 <= horizon <= family.horizon:
        raise ConfigError(
            f"--horizon {horizon} does not lie in 1..{family.horizon}, the horizon of {family_name}; "
            "set that of the family (--env.kwargs)"
        )
    rows = family.tasks()
    if actions is not None:
        _check_actions(actions, spaces["action"], family_name)
    first, named, learners = _one_shape(tasks, numbers)
    n_learner = n_learner if learners is None else len(np.unique(learners))
    ids = ids_in_family(tasks, numbers, family, task_ids, named, actions, seed)
    facts = {"n_timesteps": first[1], "n_learner": n_learner, "n_stream": first[0] // n_learner}
    with locked(Path(path), file=True, error=HistoryError):
        writer = HistoryWriter(
            path,
            HistoryInfo(
                family_name, dict(family_kwargs or {}), spaces, int(family.horizon), learner,
                {**(config or {}), **facts, "task_ids": ids}, seed,
            ),
            Split(*(np.array([place[int(i)] for i in part], np.int64) for part in vars(split).values())),
            rows[ids], family.optimal_return(rows[ids]), family.random_return(rows[ids]), overwrite=overwrite,
        )  # fmt: skip
        findings = Findings()
        part = {int(number): name for name, of in vars(split).items() for number in of}
        try:
            for number, task_id in zip(numbers, ids, strict=True):
                recorded = fitted(f"task {number}", tasks[number], spaces, actions)
                row, sizes = rows[task_id], (horizon, n_learner, steps_per_update)
                history = _history(number, recorded, family, row, *sizes, seed, findings)
                writer.append(place[number], history)
                others: list[int] = []
                if number in findings.disagree:
                    with suppress(HistoryError):  # they cannot be played at all
                        others += [numbers[k] for k in playing(recorded, family, rows[ids], seed)]
                elif not recorded.rewards.any():
                    findings.untold.append(number)
                for other in others:
                    if part[other] != part[number]:
                        raise HistoryError(
                            f"task {number} ({part[number]}) holds the histories of task {other}"
                            f" ({part[other]}); give each task its own, or the right --task-ids"
                        )
                progress(1)
        except BaseException:
            shutil.rmtree(writer.shards, ignore_errors=True)  # an import is repeated, not resumed
            raise
        writer.finish()
        return findings


_LONG_TO_READ = 20 << 30
"""Bytes of a file whose hash would take minutes."""


def file_provenance(path: Path, layout: str) -> dict[str, Any]:
    """The imported file, or folder of files, for the config of the history file.

    The hash of a folder is that of the lines ``<hash>  <relative path>`` of its files, sorted by path. From
    20 GiB on, the number of bytes stands for the hash.
    """
    files = [path]
    if path.is_dir():
        files = sorted(
            (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix()
        )
    about = {"imported_from": path.resolve().name, "layout": layout}
    if (total := sum(file.stat().st_size for file in files)) >= _LONG_TO_READ:
        return {**about, "bytes": total}
    if not path.is_dir():
        return {**about, "sha256": file_digest(path)}
    lines = "".join(f"{file_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return {**about, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def read_task(tasks: Mapping[int, Recorded], number: int) -> Recorded:
    """``tasks[number]``; ``HistoryError`` that names it if it cannot be read, or is something else."""
    with users_code(f"task {number} cannot be read", HistoryError):
        one = tasks[number]
    if not isinstance(one, Recorded):
        raise HistoryError(f"task {number} is a {type(one).__name__}, not Recorded")
    return one


def most_bytes(one: Recorded, n_task: int) -> int:
    """Bytes that a history file of ``n_task`` tasks such as ``one`` takes before compression, at most."""
    arrays: list[AnyArray | None] = [one.states, one.states, one.actions, one.optimal_actions]
    others = 22 * one.rewards.size  # five columns, and entropy and log_prob_next
    return n_task * (sum(array.nbytes for array in arrays if array is not None) + others)


def _one_shape(
    tasks: Mapping[int, Recorded], numbers: Sequence[int]
) -> tuple[tuple[int, ...], list[AnyArray | None], AnyArray | None]:
    """(streams, steps) of all tasks, the parameters that they name, and the learners (S,) of the first.

    ``HistoryError`` if the tasks differ in the first, or if two are one recording.
    """
    shapes, named, seen = list[tuple[int, ...]](), list[AnyArray | None](), dict[bytes, int]()
    learner = None
    for number in numbers:
        one = read_task(tasks, number)
        if not one.rewards.size:
            raise HistoryError(f"task {number} has no steps")
        learner = learner if shapes else one.learner
        shapes.append(one.rewards.shape)
        named.append(one.task)
        content = same_steps(one.actions, one.rewards, one.states)
        if content is not None and (same := seen.setdefault(content, number)) != number:
            problem = f"tasks {same} and {number} hold the same recording"
            raise HistoryError(f"{problem}; leave one of them out of the split")
    first = shapes[0]
    if other := next((k for k, shape in enumerate(shapes) if shape != first), None):
        sizes = f"{shapes[other]}, task {numbers[0]} {first}"
        streams, steps = np.min(shapes, axis=0)
        raise HistoryError(
            f"task {numbers[other]} has (streams, steps) {sizes}; all must have as many, so cut them:"
            f" --streams 0-{streams - 1} --steps {steps}"
        )
    return first, named, learner


# ---------------------------------------------------------------- one task


def _check_actions(actions: Sequence[int], spec: SpaceSpec, family: str) -> None:
    numbers = range(spec["n"]) if spec["kind"] == "discrete" and "start" not in spec else range(0)
    if wrong := [action for action in actions if action not in numbers]:
        has = f"has the actions 0..{len(numbers) - 1}" if numbers else "has no actions that count from 0"
        raise ConfigError(f"--actions: {family} {has}, not {short(wrong)}")


def _history(
    number: int, recorded: Recorded, family: TaskFamily, task: AnyArray, horizon: int | None, n_learner: int,
    steps_per_update: int | None, seed: int, findings: Findings,
) -> History:  # fmt: skip
    where, shape = f"task {number}", recorded.rewards.shape
    if shape[0] % n_learner:
        raise ConfigError(f"{where}: {n_learner} learners cannot share {shape[0]} streams equally")
    next_states = recorded.next_states
    if next_states is None:
        findings.without.append(number)
        next_states = np.concatenate([recorded.states[:, 1:], recorded.states[:, -1:]], axis=1)
    played = replayed(recorded, family, task, seed)
    if isinstance(played, Played):
        terminated, truncated = played.terminated, played.truncated
        wrong = outer(played.episode_end) & differ(next_states, played.next_states)
        if wrong.any():
            if recorded.next_states is not None:
                findings.repaired[number] = int(wrong.sum())
            next_states = next_states.copy()
            next_states[wrong] = played.next_states[wrong]
    else:
        if isinstance(replayed(turned(recorded), family, task, seed), Played):
            raise HistoryError(
                f"{where}: streams and time are exchanged: what was read as {shape[0]} streams of {shape[1]} "
                f"steps is {shape[1]} streams of {shape[0]} steps, which {family.name} reproduces. Exchange "
                "the first two axes of all arrays"
            )
        findings.disagree[number] = played
        terminated, truncated = _ends(where, recorded, int(family.horizon), horizon)
        ended = terminated | truncated
        after_reset = np.zeros_like(ended)
        after_reset[:, :-1] = ended[:, :-1] & ~differ(next_states[:, :-1], recorded.states[:, 1:])
        after_reset[:, -1] = recorded.next_states is None
        if after_reset.any():
            findings.kept[number] = int(after_reset.sum())
    update, learner, probs = recorded.update, recorded.learner, recorded.action_probs
    if probs is None or np.isnan(probs).any():
        findings.unknown_probs.append(number)
    if update is None:
        steps = np.arange(shape[1])
        update = np.broadcast_to(steps * 0 if steps_per_update is None else steps // steps_per_update, shape)
    if learner is None:
        learner = np.repeat(np.arange(n_learner), shape[0] // n_learner)
    optional = {name: getattr(recorded, name, None) for name in OPTIONAL if name != "optimal_actions"}
    return History(
        recorded.states, recorded.actions, recorded.rewards, next_states, terminated, truncated,
        action_probs=np.full(shape, np.nan, np.float32) if probs is None else probs.astype(np.float32),
        update=update.astype(np.int32),
        learner=learner.astype(np.int32),
        optimal_actions=recorded.optimal_actions,
        **{name: array.astype(COLUMNS[name]) for name, array in optional.items() if array is not None},
    )  # fmt: skip


def _ends(
    where: str, recorded: Recorded, family_horizon: int, horizon: int | None
) -> tuple[BoolArray, BoolArray]:
    """``terminated`` and ``truncated`` (S, T): as recorded, or where an episode reaches the horizon."""
    if recorded.terminated is not None and recorded.truncated is not None:
        return recorded.terminated, recorded.truncated
    shape = recorded.rewards.shape
    limit = horizon or family_horizon
    if recorded.dones is None:
        if horizon is None:
            raise HistoryError(
                f"{where}: has no dones, and the family does not reproduce the recording; set the length of "
                "episodes (--horizon N), or the family's settings and tasks (--env.kwargs, --task-ids)"
            )
        return np.zeros(shape, bool), np.broadcast_to((np.arange(shape[1]) + 1) % horizon == 0, shape)
    length = episode_step(recorded.dones)
    if (length > limit).any():
        stream, step = np.argwhere(length > limit)[0]
        raise HistoryError(
            f"{where}: the episode at stream {stream}, step {step} is longer than the horizon {limit}; "
            "set --env.kwargs or --horizon"
        )
    late = length == limit
    return recorded.dones & ~late, recorded.dones & late
