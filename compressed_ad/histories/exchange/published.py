"""Reads the data sets of published research codes in the layouts in which they are written.

- ``ad_eps``, also named ``headless_ad``: folders of npz files that ``metadata.metadata`` (JSON) names.
  github.com/corl-team/ad-eps, ``dark_room/generate_trajectories.py``: one folder, a file for each goal,
  arrays (episode, step) with ``eps``, the chance of a random action. github.com/corl-team/headless-ad,
  ``src/*/common/generate.py``: a folder for each run, whose files are stretches of one history, arrays
  (T, 1).
- ``ra_dt``: a folder of npz files, one for each task, with ``observations``, ``next_observations``,
  ``actions``, ``rewards`` and ``dones``; time first, then the one environment. github.com/ml-jku/RA-DT:
  ``src/algos/ppo_with_buffer.py`` records them, ``extract_trajectories_from_npz`` in
  ``src/buffers/trajectory_buffer.py`` reads them. Names of files are as in the cards of the data sets
  ``ml-jku/dark_room``, ``ml-jku/dark_keydoor`` and ``ml-jku/mazerunner``.
- ``xland_100b``: HDF5, a group for each task, arrays (stream, T, ...): XLand-100B and XLand-Trivial-20B,
  written by github.com/dunnolab/xland-minigrid-datasets, ``collection/training/train.py`` and
  ``collection/combine.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compressed_ad.errors import HistoryError
from compressed_ad.files import json_object
from compressed_ad.histories.exchange.formats import NEEDED, NPZ, Part, Recorded, Tasks, cut, task_number
from compressed_ad.histories.hdf5 import Group, attribute, child, foreign, read
from compressed_ad.histories.header import short
from compressed_ad.types import AnyArray

Run = Sequence[Path]
"""The files of one history, in order."""


def read_ad_eps(path: Path) -> Mapping[int, Recorded]:
    """Folders of AD-eps and of Headless-AD: npz files that metadata.metadata names, in order.

    Runs with the same goal are the streams of one task, in the order of their folders; runs without a goal
    are tasks of their own. Tasks are in the order of their goals. A goal names the task: a cell, or two
    cells, the door and the key. Cells and actions keep the numbers of the file.
    """
    about = sorted(path.rglob("*.metadata")) if path.is_dir() else []
    if not about:
        raise HistoryError(f"{path}: is no folder with a file metadata.metadata in it or below")
    named: dict[tuple[int, ...], list[Run]] = {}
    unnamed: list[Run] = []
    for goal, files in (run for file in about for run in _runs(file)):
        if goal is None:
            unnamed.append(files)
        else:
            named.setdefault(goal, []).append(files)
    goals = sorted(named)
    runs = [named[goal] for goal in goals] + [[run] for run in unnamed]
    of: dict[Path, set[int]] = {}
    for task, streams in enumerate(runs):
        for file in (file for run in streams for file in run):
            of.setdefault(file, set()).add(task)

    def read_task(task: int, part: Part) -> dict[str, AnyArray]:
        goal = goals[task] if task < len(goals) else None
        for file in (file for run in runs[task] for file in run):
            if len(of[file]) > 1:  # three random letters tell the files of AD-eps apart
                raise HistoryError(
                    f"{file}: is named for the tasks {sorted(of[file])}: one recording has overwritten the"
                    " other; leave them out with --only"
                )
        streams = [_one_history(run, goal) for run in runs[task][part[0]]]
        streams = [{name: array[part[1]] for name, array in one.items()} for one in streams]
        if not streams:
            raise HistoryError(f"{path}: task {task} has {len(runs[task])} streams, none of those asked for")
        if len({len(one["rewards"]) for one in streams}) > 1:
            shortest = min(_length(run) for streams in runs for run in streams)
            raise HistoryError(
                f"{path}: task {task}: its {len(streams)} streams have different numbers of steps, the"
                f" shortest of all tasks {shortest}; cut them: --steps {shortest}"
            )
        common = set.intersection(*(set(one) for one in streams))
        arrays = {name: np.stack([one[name] for one in streams]) for name in streams[0] if name in common}
        arrays["learner"] = np.arange(len(runs[task]))[part[0]]
        return arrays if goal is None else {**arrays, "task": np.array(goal)}

    return Tasks(path, range(len(runs)), read_task)


def _runs(about: Path) -> list[tuple[tuple[int, ...] | None, Run]]:
    """Goal and files of each history that the file ``about`` names."""
    try:
        said = json_object(about.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HistoryError(f"{about}: is not a JSON object ({error})") from error
    names, goal = said.get("ordered_trajectories"), said.get("goal")
    listed = names if isinstance(names, list) else []
    if not listed or not all(isinstance(name, str) and Path(name).name == name for name in listed):
        what = "must list the names of files in the same folder"
        raise HistoryError(f"{about}: 'ordered_trajectories' {what}, not {short(names)}")
    files = [about.parent / name for name in listed]
    if goal is None:
        return [(None, files)]
    try:
        cells = np.array(goal)
        if cells.dtype.kind not in "iu" or cells.shape not in ((2,), (len(files), 2), (len(files), 2, 2)):
            raise ValueError
    except ValueError:
        text = f"'goal' must be a cell, or a cell or two for each of {len(files)} files, not {short(goal)}"
        raise HistoryError(f"{about}: {text}") from None
    if cells.shape == (2,):
        return [((int(cells[0]), int(cells[1])), files)]
    rows = cells[:, ::-1] if cells.ndim == 3 else cells  # the door stands before the key
    return [(tuple(row.ravel().tolist()), [file]) for row, file in zip(rows, files, strict=True)]


def _one_history(files: Run, goal: tuple[int, ...] | None) -> dict[str, AnyArray]:
    """Arrays (T, ...) of one history."""
    stretches = [_stretch(file) for file in files]
    common = set.intersection(*(set(stretch) for stretch in stretches))
    whole = {name: np.concatenate([stretch[name] for stretch in stretches]) for name in common}
    eps = whole.pop("eps", None)
    if eps is not None and goal is not None and len(goal) == 2 and len(eps):
        whole |= _demonstrated(whole, eps, goal)
    return whole


def _length(files: Run) -> int:
    """The number of steps of one history."""
    total = 0
    for path in files:
        with NPZ(path) as file:
            total += file["rewards"].size
    return total


def _stretch(path: Path) -> dict[str, AnyArray]:
    """Arrays (T, ...) of one file, in which they are (T, 1), (T, D) or (episode, step)."""
    with NPZ(path) as file:
        optional = {name: "biuf" for name in ("dones", "eps") if name in file.keys}
        arrays = {name: (file[name], kinds) for name, kinds in {**NEEDED, **optional}.items()}
    count, flat = arrays["rewards"][0].size, {}
    for name, (array, kinds) in arrays.items():
        if array.dtype.kind not in kinds:
            raise HistoryError(f"{path}: {name} of dtype {array.dtype}; expected numbers")
        wide = name == "states" and array.shape[:1] == (count,)  # several numbers describe a state
        if array.size != count and not wide:
            shape = arrays["rewards"][0].shape
            raise HistoryError(f"{path}: {name} have shape {array.shape}; expected {shape} as rewards have")
        flat[name] = array if wide and array.size != count else array.reshape(count)
    shape = arrays["rewards"][0].shape
    if "dones" not in flat and len(shape) == 2 and shape[1] > 1:
        flat["dones"] = np.arange(count) % shape[1] == shape[1] - 1
    return flat


def _demonstrated(whole: Mapping[str, AnyArray], eps: AnyArray, goal: tuple[int, ...]) -> dict[str, AnyArray]:
    """Optimal actions (T,) and the probabilities (T,) of the executed ones; nothing if they cannot be right.

    The demonstrator of AD-eps acts uniformly at random with chance ``eps``; otherwise it goes up (1) or down
    (3) to the row of the goal, then right (2) or left (4), then stays (0): ``OptimalAgent`` in
    ``dark_room/algorithms/optimal_agent.py``. Its episodes begin in the centre, which tells the room's size.
    """
    states, first = whole["states"], whole["states"].flat[0]
    size = next((n for n in range(2, 1001) if n // 2 * (n + 1) == first), 0)
    if states.ndim > 1 or not size or states.max() >= size**2 or max(goal) >= size:
        return {}
    x, y = np.divmod(states, size)
    way = [goal[0] > x, goal[0] < x, goal[1] > y, goal[1] < y]
    optimal = np.select(way, [3, 1, 2, 4], default=0)
    probs = eps / 5 + (1 - eps) * (whole["actions"] == optimal)
    possible = bool(((probs > 0) & (probs <= 1)).all())
    return {"optimal_actions": optimal, "action_probs": probs.astype(np.float32)} if possible else {}


_CELLS = re.compile(r"\[(\d+),(\d+)\]_\[(\d+),(\d+)\]")
_RA_DT = {"states": "observations", "next_states": "next_observations"}


def read_ra_dt(path: Path) -> Mapping[int, Recorded]:
    """A folder of RA-DT's data sets, such as dark_room/10x10: an npz file for each task, time first.

    Files named by a number are the tasks of these numbers, others are counted in the order of their names.
    The name ``[x,y]_[x,y].npz`` of a dark room, start and goal, names the task: observations are (row,
    column), so it is (y, x) of the goal.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else []
    if not files:
        text = "is no folder of npz files, one for each task"
        if path.is_dir() and any(path.glob("*.pkl")):
            text += "; pickles can run code and are never loaded (the published files are npz)"
        raise HistoryError(f"{path}: {text}")
    numbered = all(file.stem.isdecimal() for file in files)
    of = {task_number(path, file.stem) if numbered else k: file for k, file in enumerate(files)}

    def read_task(task: int, part: Part) -> dict[str, AnyArray]:
        with NPZ(of[task]) as file:
            names = [*NEEDED, "dones", *(["next_states"] if "next_observations" in file.keys else [])]
            arrays = {name: file[_RA_DT.get(name, name)] for name in names}
        rewards, states = arrays["rewards"], arrays["states"]
        envs = rewards.ndim == 2 and rewards.shape == states.shape[:2]
        if not envs:  # of one environment, rewards (T,) or (T, 1)
            arrays = {name: array[:, None] for name, array in arrays.items() if array.ndim}
        for name, array in arrays.items():
            if array.ndim < 2 or len(array) != len(rewards):
                raise HistoryError(f"{of[task]}: {_RA_DT.get(name, name)} have shape {array.shape}")
            if array.dtype.kind not in NEEDED.get(name, "biuf"):
                raise HistoryError(f"{of[task]}: {_RA_DT.get(name, name)} of dtype {array.dtype}")
            if name in ("rewards", "dones"):
                arrays[name] = array.reshape(len(rewards), -1)
        arrays = cut({name: array.swapaxes(0, 1) for name, array in arrays.items()}, part)
        if cells := _CELLS.fullmatch(of[task].stem):
            arrays["task"] = np.array([int(cells[4]), int(cells[3])])
        return arrays

    return Tasks(path, of, read_task)


N_TILE, N_COLOR = 13, 12
"""Kinds of tiles and colours of XLand-MiniGrid from version 0.7 on, with which the data sets were made."""
_XLAND = {"states": "u", "actions": "u", "rewards": "f", "dones": "b", "expert_actions": "u"}


def read_xland_100b(path: Path) -> Mapping[int, Recorded]:
    """HDF5 of XLand-100B and XLand-Trivial-20B: a group per task, streams first, read part by part.

    States are (5, 5) tiles and colours, coded as tile * 12 + colour. The ruleset's number names the task.
    ``expert_actions`` are the most probable ones of the final policy, and become ``optimal_actions``.
    """
    with foreign(path) as file:
        tasks = [task_number(path, name) for name in file]
        if not tasks or "ruleset-id" not in child(file, str(min(tasks)), Group).attrs:
            raise HistoryError(f"{path}: has no groups '0', '1', ... with the attribute 'ruleset-id'")

    def read_task(task: int, part: Part) -> dict[str, AnyArray]:
        with foreign(path) as file:
            group = child(file, str(task), Group)
            arrays = {name: read(group, name, kinds, part) for name, kinds in _XLAND.items()}
            ruleset = int(attribute(group, "ruleset-id", int))
            codes = arrays["states"]
            if codes.size and codes.max() >= N_TILE * N_COLOR:
                raise HistoryError(f"{group.name}/states: {codes.max()} is no tile and colour")
        states = np.empty((*codes.shape, 2), np.uint8)
        np.floor_divide(codes, N_COLOR, out=states[..., 0], casting="unsafe")
        np.remainder(codes, N_COLOR, out=states[..., 1], casting="unsafe")
        expert = arrays.pop("expert_actions")
        return {**arrays, "states": states, "optimal_actions": expert, "task": np.array([ruleset])}

    return Tasks(path, tasks, read_task)
