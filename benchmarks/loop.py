"""The whole loop, from nothing to a report: seconds of each stage, and how many cores it keeps busy.

    python -m benchmarks.loop                     # the smoke preset, twice: fresh, then with everything done
    python -m benchmarks.loop --preset default --comparison.runs 2    # further settings go to cad run

CPU seconds are those of the command and of its workers. Cores count as busy for which a process computes, or
waits because other work of the machine has them. A stage begins where the one before it ends.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.measuring import write

STAGES = ("collect", "mark", "train", "evaluate", "report")


def tree_seconds(root: int) -> tuple[float, float]:
    """CPU seconds so far of a process and its descendants, and those that they waited for a core.

    Linux only, else 0. Processes that have ended count in the first.
    """
    parent, found = dict[int, int](), dict[int, tuple[float, float]]()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            waited = [int(path.read_text().split()[1]) for path in place.glob("task/*/schedstat")]
            parent[int(place.name)] = int(fields[1])
            cpu = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            found[int(place.name)] = cpu, sum(waited) / 1e9

    def belongs(pid: int) -> bool:
        return pid == root or (pid in parent and belongs(parent[pid]))

    ours = [times for pid, times in found.items() if belongs(pid)]
    return sum(cpu for cpu, _ in ours), sum(waited for _, waited in ours)


def traced(command: Sequence[str]) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """Wall seconds of ``cad run``, and of each stage: wall, CPU, and waiting for a core."""
    found: dict[str, tuple[float, float, float]] = {}
    last = start = (time.perf_counter(), 0.0, 0.0)
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **quiet) as process:
        for line in process.stderr or ():
            stage, _, rest = line.partition(" ")
            if stage in STAGES and rest.lstrip().startswith("done in"):
                now = time.perf_counter(), *tree_seconds(process.pid)
                found[stage] = (now[0] - last[0], now[1] - last[1], now[2] - last[2])
                last = now
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start[0], found


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
        (wall, stages), (again, _) = traced(command), traced(command)
    result: dict[str, Any] = {"preset": " ".join([preset, *further])}
    for stage, (seconds, cpu, waited) in stages.items():
        busy = (cpu + waited) / max(seconds, 1e-9)
        result |= {f"{stage}_s": seconds, f"{stage}_cpu_s": cpu, f"{stage}_cores_busy": busy}
    result |= {"wall_s": wall, "wall_again_s": again}
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
