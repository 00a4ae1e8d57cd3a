"""One thread: the tests' tensors are tiny, and idle threads that spin cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed_ad.cli.main import main
from compressed_ad.errors import UsageError
from compressed_ad.histories.file import HistoryFile
from compressed_ad.report.results import load_evaluation
from compressed_ad.tasks.select import make_family
from compressed_ad.types import AnyArray

torch.set_num_threads(1)


@dataclass(frozen=True)
class SmokeRun:
    """The smoke preset from nothing to the report, done once by the real command line."""

    out: Path
    stdout: str
    stderr: str


def cad(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    command = [sys.executable, "-m", "compressed_ad", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def guide_snippet(title: str) -> str:
    """The first code block of the guide after the line that says ``title``."""
    text = (Path(__file__).parents[1] / "docs" / "guide.md").read_text("utf-8")
    found = re.search(
        rf"^[^\w\n]*{re.escape(title)}\W*?$.*?^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    assert found, title
    return found[1]


def refused_in_one_line(family: str, kwargs: Mapping[str, Any], message: str) -> None:
    """``family`` with ``kwargs``, or drawing its tasks, is refused in one line that has ``message``."""
    with pytest.raises(UsageError, match=message) as caught:
        make_family(family, kwargs).tasks()
    assert "\n" not in str(caught.value)


def collected_trained_evaluated(folder: Path, *words: str) -> tuple[HistoryFile, AnyArray]:
    """The history file and the returns (task, 1, 2) of one small run of CompressedAD, by the command line.

    ``words`` say what is collected; the rest is the smoke preset's, and smaller.
    """
    out = ["--out", str(folder)]
    single = ["--algorithm.n_learner", "1", "--algorithm.n_process", "1"]
    assert main(["collect", "--preset", "smoke", *single, *words, *out]) == 0
    (history,) = folder.glob("history_*.hdf5")
    train = ["--model", "CompressedAD", "--model.steps", "3", "--model.n_transit", "20"]
    train += ["--model.validation_episodes", "1", "--evaluation.episodes", "2", "--evaluation.rollouts", "1"]
    assert main(["train", "--preset", "smoke", *train, "--history", str(history), *out]) == 0
    (run,) = folder.glob("CompressedAD-*")
    assert main(["evaluate", str(run)]) == 0
    return HistoryFile(history), load_evaluation(run / "evaluation.npz")["returns"]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    out = tmp_path_factory.mktemp("smoke") / "run"
    done = cad("run", "--preset", "smoke", "--out", out, "--algorithm.n_process", "2")
    assert done.returncode == 0, done.stderr
    assert not list(out.rglob("*.arrays*")), "the last process that trains removes what they share"
    return SmokeRun(out, done.stdout, done.stderr)
