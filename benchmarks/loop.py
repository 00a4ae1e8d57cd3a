"""The whole loop, from nothing to a report: seconds of each stage, and how many cores it keeps busy.

    python -m benchmarks.loop                     # the smoke preset, twice: fresh, then with everything done
    python -m benchmarks.loop --preset default --comparison.runs 2    # further settings go to cad run

CPU seconds are those of the command and of its workers. A stage begins where the one before it ends.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import write

STAGES = ("collect", "mark", "train", "evaluate", "report")


def tree_seconds(root: int) -> float:
    """CPU seconds so far of a process and its descendants, ended ones included; Linux only, else NaN."""
    parent, seconds = dict[int, int](), dict[int, float]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parent[int(place.name)] = int(fields[1])
        seconds[int(place.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def belongs(pid: int) -> bool:
        return pid == root or (pid in parent and belongs(parent[pid]))

    found = [value for pid, value in seconds.items() if belongs(pid)]
    return sum(found) if found else float("nan")


def traced(command: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each stage of ``cad run``, and of the whole command as ``"wall"``."""
    found: dict[str, tuple[float, float]] = {}
    start = time.perf_counter()
    wall, cpu = start, 0.0
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **quiet) as process:
        for line in process.stderr or ():
            stage, _, rest = line.partition(" ")
            if stage in STAGES and rest.lstrip().startswith("done in"):
                now = time.perf_counter(), tree_seconds(process.pid)
                found[stage] = now[0] - wall, now[1] - cpu
                wall, cpu = now
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found | {"wall": (time.perf_counter() - start, used.ru_utime + used.ru_stime)}


def start_seconds(*words: str) -> float:
    """CPU seconds of Python with ``words``: the fewest of three calls."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def run(quick: bool = False, preset: str = "smoke", further: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of each stage, and of a second call that finds everything done."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "compressed_ad", "run", "--preset", preset, *further]
        command += ["--out", str(Path(folder) / "run")]
        first, again = traced(command), traced(command)
    result: dict[str, Any] = {"preset": " ".join([preset, *further])}
    for stage in STAGES:
        wall, cpu = first[stage]
        result |= {f"{stage}_s": wall, f"{stage}_cpu_s": cpu, f"{stage}_cores_busy": cpu / max(wall, 1e-9)}
    result |= {"wall_s": first["wall"][0], "wall_again_s": again["wall"][0]}
    result |= {
        "help_cpu_s": start_seconds("-m", "compressed_ad", "--help"),
        "bare_python_cpu_s": start_seconds("-c", "pass"),
    }
    write("loop", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="smoke")
    options, further = parser.parse_known_args()
    run(preset=options.preset, further=further)
