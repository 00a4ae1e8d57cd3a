"""Histories as a dataset of Minari, the Farama Foundation's format for offline RL, written and read.

One dataset holds the episodes of all tasks: streams in order, each in time order, so that learning histories
can be reassembled. The metadata of an episode hold its ``task`` and the ``parameters`` of it, its ``part`` of
the split, ``stream``, ``learner`` and ``first_step``; an episode that the collection cut off has neither
``terminations`` nor ``truncations`` at its end. ``infos`` hold what Minari has no place for:
``action_probs``, ``update``, and ``compression_mask``, ``entropy``, ``log_prob_next`` and
``optimal_actions`` where they are known. As everywhere in Minari, entry 0 of ``infos`` belongs to the reset
and entry t + 1 to step t.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, MissingExtraError
from compressed_ad.files import json_object, lives
from compressed_ad.histories.exchange.formats import Part, Progress, Recorded, Tasks, cut
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.hdf5 import Group, child, foreign, json_text, read
from compressed_ad.types import AnyArray, History, Split, from_spec


def dataset_id(file: HistoryFile) -> str:
    """Minari's id of the histories of ``file``, e.g. ``darkroom-PPO-seed0-v0``."""
    words = (file.info.family, file.info.learner, f"seed{file.info.seed}", "v0")
    return "-".join(re.sub(r"[^A-Za-z0-9_]+", "_", word) for word in words)


def write_minari(file: HistoryFile, path: str | Path, overwrite: bool, progress: Progress) -> Path:
    """A Minari dataset of all tasks; the output is the folder of datasets (MINARI_DATASETS_PATH)."""
    try:
        import minari
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise MissingExtraError("the export to minari", "minari") from error
    path, name = Path(path), dataset_id(file)
    aside = path / f".partial-{os.getpid()}"
    target = path / name
    if path.is_file():
        raise HistoryError(f"{path} is a file; --out must be a folder here")
    if target.exists() and not (overwrite and (target / "data" / "metadata.json").exists()):
        raise HistoryError(f"{target} exists; replace a dataset with --overwrite, or choose another --out")
    parts = {int(task): part for part, ids in vars(file.split).items() for task in ids}
    family = f"{file.info.family} {json_text('family_kwargs', file.info.family_kwargs)}"
    root = "MINARI_DATASETS_PATH"
    before = os.environ.get(root)
    dataset = None
    try:
        aside.mkdir(parents=True)
        for left in path.glob(".partial-*"):  # by exports that were killed
            if left.name[9:].isdecimal() and not lives(int(left.name[9:])):
                shutil.rmtree(left)
        os.environ[root] = str(aside.resolve())  # Minari doubles relative paths
        with warnings.catch_warnings(action="ignore"):  # its advice about authors and environments
            for task in file.task_ids.tolist():
                history = file.load([task])[task]
                pieces = list(episodes(f"{file.path}: task {task}", history))
                buffers = [EpisodeBuffer(**_buffer(history, file, *piece)) for piece in pieces]
                about = [
                    {"task": task, "part": parts[task], "stream": s, "first_step": a,
                     "learner": int(history.learner[s]), "parameters": file.tasks[task]}
                    for s, a, _ in pieces
                ]  # fmt: skip
                count = 0 if dataset is None else dataset.storage.total_episodes
                if dataset is None:
                    dataset = minari.create_dataset_from_buffers(
                        name,
                        buffers,
                        **{f"{key}_space": from_spec(spec) for key, spec in file.info.spaces.items()},
                        algorithm_name=file.info.learner,
                        description=f"Learning histories of {file.info.learner} on the tasks of {family}.",
                        requirements=[f"compressed-ad=={metadata.version('compressed-ad')}"],
                        data_format="hdf5",
                        jpeg_encoding=False,  # lossy
                    )
                else:
                    dataset.storage.update_episodes(buffers)
                dataset.storage.update_episode_metadata(about, range(count, count + len(pieces)))
                progress(1)
        if target.exists():
            target.rename(aside / "old")
        (aside / name).rename(target)
    except OSError as error:
        raise HistoryError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.environ.pop(root, None)
        if before is not None:
            os.environ[root] = before
    return target


def episodes(where: str, history: History) -> Iterator[tuple[int, int, int]]:
    """(stream, first step, step after the last) of every episode, including unfinished last ones.

    Raises ``HistoryError`` if within an episode a state is not the successor before it: Minari stores both
    as one.
    """
    inner = ~history.episode_end[:, :-1]
    unequal = history.next_states[:, :-1] != history.states[:, 1:]
    broken = np.argwhere(unequal.any(axis=tuple(range(2, unequal.ndim))) & inner)
    if len(broken):
        raise HistoryError(f"{where}: next_states{broken[0].tolist()} is not the state of the next step")
    for stream, ends in enumerate(history.episode_end):
        stops = [*(np.flatnonzero(ends) + 1).tolist(), history.n_step]
        for first, stop in zip([0, *stops[:-1]], stops, strict=True):
            if first < stop:
                yield stream, first, stop


def _buffer(history: History, file: HistoryFile, stream: int, first: int, stop: int) -> dict[str, Any]:
    """One episode of ``stream`` as Minari wants it."""
    columns = {name: array[stream, first:stop] for name, array in history.per_step()}
    states = [columns.pop("states"), columns.pop("next_states")[-1:]]
    spaces = {name: from_spec(spec).dtype for name, spec in file.info.spaces.items()}
    at_reset = {"b": False, "i": -1, "u": 0, "f": np.nan}  # entry of ``infos``, by kind of dtype
    return {
        "observations": np.concatenate(states).astype(spaces["observation"]),
        "actions": columns.pop("actions").astype(spaces["action"]),
        "rewards": columns.pop("rewards"),
        "terminations": columns.pop("terminated"),
        "truncations": columns.pop("truncated"),
        "infos": {
            name: np.concatenate([np.full_like(array[:1], at_reset[array.dtype.kind]), array])
            for name, array in columns.items()
        },
    }


# ---------------------------------------------------------------- reading

_DATA = "main_data.hdf5"
_INFOS = {"action_probs": "f", "update": "i", "entropy": "f", "log_prob_next": "f", "optimal_actions": "iuf"}
_ENDS = {"terminated": "terminations", "truncated": "truncations"}
_PLACE = ("task", "stream", "first_step")


def read_minari(path: Path) -> Mapping[int, Recorded]:
    """A Minari dataset in HDF5 whose episodes say their task, stream and first step, as those of cad export.

    ``path`` is the folder of the dataset. Minari is not needed. Marks are not read: they are made anew.
    """
    main = next((at for at in (path / "data" / _DATA, path / _DATA) if at.is_file()), path)
    about = main.parent / "metadata.json"
    if main.name != _DATA or not about.is_file():
        inside = sorted(at.parent.parent.name for at in path.glob(f"*/data/{_DATA}"))
        text = f"; it holds the datasets {', '.join(inside)}: name one of them" if inside else ""
        raise HistoryError(f"{path}: is not the folder of a Minari dataset in HDF5 ({_DATA}){text}")
    try:
        stored_as = json_object(about.read_text("utf-8")).get("data_format")
    except (OSError, ValueError) as error:
        raise HistoryError(f"{about}: is not a JSON object ({error})") from error
    if stored_as != "hdf5":
        raise HistoryError(f"{about}: 'data_format' is {stored_as!r}; only 'hdf5' is read")
    episodes: dict[int, dict[int, dict[int, str]]] = {}  # task, stream, first step -> name
    parts: dict[str, list[int]] = {field.name: [] for field in fields(Split)}
    with foreign(main) as file:
        for name in file:
            group = child(file, name, Group)
            if lacking := [key for key in _PLACE if not isinstance(group.attrs.get(key), int | np.integer)]:
                raise HistoryError(
                    f"{name}: has no number {lacking[0]!r} in its metadata; episodes must say where in which"
                    f" history they belong ({', '.join(_PLACE)}), as those that cad export writes do"
                )
            task, stream, first = (int(group.attrs[key]) for key in _PLACE)
            if task not in episodes and (part := group.attrs.get("part")) in parts:
                parts[part].append(task)
            episodes.setdefault(task, {}).setdefault(stream, {})[first] = name
    split = None
    if parts["train"] and sum(map(len, parts.values())) == len(episodes):
        split = Split(*(np.array(tasks, np.int64) for tasks in parts.values()))

    def read_task(task: int, part: Part) -> dict[str, AnyArray]:
        with foreign(main) as file:
            streams = [
                _stream(file, f"task {task}, stream {stream}", episodes[task][stream])
                for stream in sorted(episodes[task])[part[0]]
            ]
        if len({len(one["rewards"]) for one in streams}) > 1:
            raise HistoryError(f"{main}: task {task}: its streams have different numbers of steps")
        common = set.intersection(*(set(one) for one in streams)) if streams else set()
        arrays = {name: np.stack([one[name] for one in streams]) for name in common}
        rows = {name: arrays.pop(name)[0] for name in ("task",) if name in arrays}
        return {**cut(arrays, (slice(None), part[1])), **rows}

    return Tasks(main, episodes, read_task, split)


def _stream(file: Group, where: str, names: Mapping[int, str]) -> dict[str, AnyArray]:
    """Arrays (T, ...) of the stream whose episodes are the groups ``names``, by their first steps."""
    pieces: list[dict[str, AnyArray]] = []
    for first in sorted(names):
        if first != sum(len(piece["rewards"]) for piece in pieces):
            raise HistoryError(f"{where}: the episodes before {names[first]} do not make {first} steps")
        group = child(file, names[first], Group)
        infos = child(group, "infos", Group) if "infos" in group else {}
        observations = read(group, "observations", "iuf")
        arrays = {"states": observations[:-1], "next_states": observations[1:]}
        arrays |= {
            name: read(group, name, kinds) for name, kinds in (("actions", "iuf"), ("rewards", "biuf"))
        }
        arrays |= {name: read(group, theirs, "b") for name, theirs in _ENDS.items()}
        arrays |= {name: read(infos, name, kinds)[1:] for name, kinds in _INFOS.items() if name in infos}
        if any(len(array) != len(arrays["rewards"]) for array in arrays.values()):
            lengths = {name: len(array) for name, array in arrays.items()}
            raise HistoryError(f"{where}: {names[first]} has arrays of different lengths: {lengths}")
        pieces.append(arrays)
    common = set.intersection(*(set(piece) for piece in pieces))
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in common}
    attrs = child(file, names[0], Group).attrs
    told = {"learner": "learner", "task": "parameters"}
    return {**whole, **{name: np.asarray(attrs[key]) for name, key in told.items() if key in attrs}}
