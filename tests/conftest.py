"""One thread: the tests' tensors are tiny, and idle threads that spin cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@dataclass(frozen=True)
class SmokeRun:
    """The smoke preset from nothing to the report, done once by the real command line."""

    out: Path
    stdout: str
    stderr: str


def cad(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    command = [sys.executable, "-m", "compressed_ad.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    out = tmp_path_factory.mktemp("smoke") / "run"
    done = cad("run", "--preset", "smoke", "--out", out, "--algorithm.n_process", "2")
    assert done.returncode == 0, done.stderr
    return SmokeRun(out, done.stdout, done.stderr)
