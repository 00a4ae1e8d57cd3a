"""Exports histories as a dataset of Minari, the Farama Foundation's format for offline RL.

One dataset holds the episodes of all tasks: streams in order, each in time order, so that learning histories
can be reassembled. The metadata of an episode hold its ``task``, ``part`` of the split, ``stream``,
``learner`` and ``first_step``; an episode that the collection cut off has neither ``terminations`` nor
``truncations`` at its end. ``infos`` hold what Minari has no place for: ``action_probs``, ``update``, and
``compression_mask``, ``entropy`` and ``log_prob_next`` where they are known. As everywhere in Minari, entry 0
of ``infos`` belongs to the reset and entry t + 1 to step t.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compressed_ad.errors import HistoryError, MissingExtraError
from compressed_ad.files import lives
from compressed_ad.histories.exchange.formats import Progress
from compressed_ad.histories.file import HistoryFile
from compressed_ad.histories.hdf5 import json_text
from compressed_ad.types import History, from_spec


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
                     "learner": int(history.learner[s])}
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
    at_reset = {"b": False, "i": -1, "f": np.nan}  # entry of ``infos``, by kind of dtype
    return {
        "observations": np.concatenate(states).astype(spaces["observation"]),
        "actions": columns.pop("actions").astype(spaces["action"]),
        "rewards": columns.pop("rewards"),
        "terminations": columns.pop("terminated"),
        "truncations": columns.pop("truncated"),
        "infos": {
            name: np.concatenate([np.array([at_reset[array.dtype.kind]], array.dtype), array])
            for name, array in columns.items()
        },
    }
