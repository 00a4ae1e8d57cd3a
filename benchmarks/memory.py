"""Memory that a history takes: in a process that trains on it, and while it is written and marked.

    python -m benchmarks.memory

Every command runs in a process of its own, on histories of two sizes; what differs between them is the cost
of a transition. *Private* memory (RssAnon) belongs to one process. *Mapped* memory (RssFile) shows files:
processes share it, and the operating system takes it back when it is needed. Both are sampled, so that a
peak of less than a hundredth of a second can be missed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import quick_from_command_line, write
from compressed_ad import Darkroom, History, Split, to_spec
from compressed_ad.histories.file import HistoryInfo
from compressed_ad.histories.writer import HistoryWriter

FAMILY = Darkroom()
N_STREAM, N_STEP, HORIZON = 25, 2000, 20  # of each task
TRAIN = ["--model.steps", "100", "--model.validations", "0", "--device", "cpu"]


def random_history(n_stream: int, n_step: int, seed: int) -> History:
    """Random transitions in the shape of Darkroom's, marked in part."""
    random, shape = np.random.default_rng(seed), (n_stream, n_step)
    probs = random.random(shape, np.float32)
    return History(
        states=random.integers(0, 9, (*shape, 2), np.uint8),
        actions=random.integers(0, 5, shape, np.uint8),
        rewards=(random.random(shape) < 0.1).astype(np.float32),
        next_states=random.integers(0, 9, (*shape, 2), np.uint8),
        terminated=np.zeros(shape, bool),
        truncated=np.broadcast_to(np.arange(n_step) % HORIZON == HORIZON - 1, shape),
        action_probs=probs,
        update=np.broadcast_to(np.arange(n_step, dtype=np.int32) // HORIZON, shape),
        learner=np.arange(n_stream, dtype=np.int32),
        entropy=1 - probs,
        compression_mask=probs > 0.7,
    )


def write_history(path: Path, n_transition: int) -> None:
    """A history file of ``n_transition`` transitions, all of training tasks but a task's."""
    ids = np.arange(n_transition // (N_STREAM * N_STEP))
    spaces = {"observation": to_spec(FAMILY.observation_space), "action": to_spec(FAMILY.action_space)}
    info = HistoryInfo("darkroom", {}, spaces, HORIZON, "none", {}, 0)
    tasks = FAMILY.tasks()[ids]
    returns = FAMILY.optimal_return(tasks), FAMILY.random_return(tasks)
    writer = HistoryWriter(path, info, Split(ids[:-1], ids[:0], ids[-1:]), tasks, *returns)
    for task in ids.tolist():
        writer.append(task, random_history(N_STREAM, N_STEP, task))
    made = {"marker": "threshold", "parameters": {}, "seed": 0, "time": "now"}
    writer.finish(made)


def cad_command(*words: object) -> list[str]:
    return [sys.executable, "-m", "compressed_ad", *map(str, words)]


def write_command(path: Path, n_transition: int) -> list[str]:
    """Writes a history file in a process of its own."""
    code = "import sys, benchmarks.memory as m; m.write_history(m.Path(sys.argv[1]), int(sys.argv[2]))"
    return [sys.executable, "-c", code, str(path), str(n_transition)]


def status(process: int) -> dict[str, int]:
    """Resident bytes of a process, by kind; empty once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        k: 1024 * int(v.split()[0]) for k, _, v in (x.partition(":") for x in lines) if k.startswith("Rss")
    }


def children(process: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield process
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return
    for child in found:
        yield from children(int(child))


def peaks(command: list[str]) -> list[dict[str, int]]:
    """Runs ``command``: most private and mapped bytes of each of its processes, the first one first."""
    most: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said) as running:
        while running.poll() is None:
            for process in children(running.pid):
                now, known = status(process), most.setdefault(process, {"RssAnon": 0, "RssFile": 0})
                for kind in known:
                    known[kind] = max(known[kind], now.get(kind, 0))
            time.sleep(0.005)
        if running.returncode:
            said.seek(0)
            raise RuntimeError(f"{command}: {said.read().decode()[-2000:]}")
    return list(most.values())


def run(quick: bool = False) -> dict[str, Any]:
    """Bytes of memory for each transition of the file."""
    sizes = (200_000, 1_000_000) if quick else (500_000, 2_500_000)
    found: dict[str, list[dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"history_{size}.hdf5"
            commands = {
                "write": write_command(path, size),
                "mark": cad_command("mark", path, "--marker.on_policy_threshold", "0.5"),
                "train": cad_command("train", *TRAIN, "--history", path, "--out", f"{folder}/{size}"),
            }
            for name, command in commands.items():
                one, *_ = peaks(command)  # training asks git for the revision
                found.setdefault(name, []).append(one)
            found.setdefault("file", []).append({"bytes": path.stat().st_size})
    result = {
        f"{name}_{kind}_bytes_per_transition": (large[kind] - small[kind]) / (sizes[1] - sizes[0])
        for name, (small, large) in found.items()
        for kind in small
    }
    write("memory", result)
    return result


if __name__ == "__main__":
    run(quick_from_command_line(__doc__))
