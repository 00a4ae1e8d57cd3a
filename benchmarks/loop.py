"""The whole loop, from nothing to a report, stage by stage: wall seconds as ``cad run`` reports them.

python -m benchmarks.loop            # the smoke preset, twice: fresh, then with everything done
python -m benchmarks.loop --preset default
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measuring import write


def run(quick: bool = False, preset: str = "smoke") -> dict[str, Any]:
    """Seconds of each stage, and of a second call that finds everything done."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "compressed_ad.cli.main",
            "run",
            "--preset",
            preset,
            "--out",
            str(out),
        ]
        walls = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            walls.append(time.perf_counter() - start)
        seconds = json.loads((out / "report" / "summary.json").read_text())["seconds"]
    result = {"preset": preset, **{f"{stage}_s": value for stage, value in seconds.items()}}
    result |= {"wall_s": walls[0], "wall_again_s": walls[1]}
    write("loop", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="smoke")
    run(preset=parser.parse_args().preset)
