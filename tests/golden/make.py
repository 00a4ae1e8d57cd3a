"""How the golden files were made: ``python -m tests.golden.make`` in a clean checkout.

They are of the formats of the revision in ``expected.json``, and every later version must read them. Never
make them again because a test fails: a new format gets a folder of its own beside them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from compressed_ad.cli.main import main
from compressed_ad.files import write_json
from compressed_ad.runs.directory import revision
from tests.golden.contents import CHECKPOINT, CURVES, GOLDEN, HISTORY, RUNS, STUDY, TABLE, everything

SMALL = ["--preset", "smoke", "--device", "cpu"]
ENV = ["--env.n_task", "5", "--env.validation", "1", "--env.heldout", "1"]
COLLECT = ["--algorithm.n_timesteps", "100", "--algorithm.n_process", "1"]
KEPT = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "evaluation.npz",
    "best_model.pt",
    "last_model.pt",
)


def cad(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


def anonymous(environment: Path) -> None:
    """Without the names of this machine."""
    facts = json.loads(environment.read_text())
    facts |= {"platform": "Linux", "hardware": {"processor": "x86_64", "cores": 2, "memory_gib": 8.0}}
    facts["command"] = "train"
    facts["history"]["path"] = "datasets/history.hdf5"
    environment.write_text(json.dumps(facts, indent=2) + "\n")


def make() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cad("collect", *SMALL, *ENV, *COLLECT, "--out", folder)
        (history,) = folder.glob("*.hdf5")
        shutil.copy(history, HISTORY)
        for model, kept in RUNS.items():
            words = ["--model.steps", "12", "--model.validations", "3", "--model.checkpoint_every", "6"]
            cad("train", *SMALL, *ENV, *words, "--model", model, "--history", history, "--out", folder)
            cad("evaluate", folder / kept.name, "--device", "cpu")
            kept.mkdir(parents=True)
            for file in KEPT:
                shutil.copy(folder / kept.name / file, kept / file)
            anonymous(kept / "environment.json")
        shutil.copy(min((folder / RUNS["CompressedAD"].name / "checkpoints").glob("*.pt")), CHECKPOINT)
        cad("study", STUDY, "--out", folder / "study", "--process", "1")
        for table in (TABLE, CURVES):
            shutil.copy(folder / "study" / STUDY.stem / table.name, table)
    write_json(GOLDEN / "expected.json", {"revision": revision(), **everything()})


if __name__ == "__main__":
    make()
