"""How every benchmark measures: side by side in one process, CPU seconds, medians of interleaved repeats."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this process for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def side_by_side(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call, in turns, after one warm-up each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_peak(size: int = 768, repeats: int = 7) -> float:
    """GFLOP/s of a square float32 product on one thread: the best of several, as a ceiling."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    return 2 * size**3 / min(cpu_seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def quick_from_command_line(doc: str | None) -> bool:
    """Whether the command line has ``--quick``; its help shows the first line of ``doc``."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    what = "fewer repeats: a check that it runs, not a figure"
    parser.add_argument("--quick", action="store_true", help=what)
    return bool(parser.parse_args().quick)


def write(name: str, result: dict[str, Any]) -> None:
    """Print a result and keep it as ``results/<name>.json``."""
    result = {"machine": f"{platform.machine()} {platform.processor()}".strip(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"== {name}")
    for key, value in result.items():
        print(f"{key:34} {value:.4g}" if isinstance(value, float) else f"{key:34} {value}")
