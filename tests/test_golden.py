"""Files of an earlier version: every later one reads them, and finds in them exactly what was there."""

import json
import shutil

import numpy as np
import pytest

from compressed_ad.cli.main import main
from tests.golden import contents
from tests.golden.contents import CHECKPOINT, GOLDEN, HISTORY, RUNS, STUDY, TABLE

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def runs(tmp_path):
    """Copies of the runs, which commands may write to."""
    return [shutil.copytree(path, tmp_path / path.name) for path in RUNS.values()]


@pytest.fixture
def said(capfd):
    """What a command prints that ends with 0."""

    def call(*words):
        assert main([str(word) for word in words]) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    return call


def test_a_history_file_is_what_it_was():
    assert contents.history() == EXPECTED["history"]


@pytest.mark.parametrize("name", RUNS)
def test_a_model_has_its_weights_and_gives_its_logits(name):
    found, expected = contents.model(RUNS[name] / "best_model.pt"), EXPECTED[name]["model"]
    assert (found["step"], found["seed"]) == (expected["step"], expected["seed"])
    assert found["weights"] == expected["weights"]
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_was(name):
    found = contents.run(RUNS[name])
    assert found == {key: EXPECTED[name][key] for key in found}


def test_the_tables_of_a_study_are_what_they_were(said):
    assert contents.json_value(contents.study()) == EXPECTED["study"]
    assert "CompressedAD" in said("study", STUDY, "--tables", TABLE)


def test_inspect_shows_a_history_file(said):
    assert EXPECTED["history"]["digest"] in said("inspect", HISTORY)


def test_runs_are_compared(runs, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    shutil.copy(HISTORY, tmp_path / "datasets" / "history.hdf5")
    assert "CompressedAD" in said("compare", *runs)


def test_a_run_is_evaluated_again_with_the_same_returns(runs, said):
    for path in runs:
        (path / "evaluation.npz").unlink()
    said("evaluate", *runs, "--history", HISTORY, "--device", "cpu")
    for name, path in zip(RUNS, runs, strict=True):
        assert contents.run(path)["evaluation"] == EXPECTED[name]["evaluation"]


def test_a_training_goes_on_from_a_checkpoint(tmp_path, said):
    name = RUNS["CompressedAD"].name
    run = shutil.copytree(RUNS["CompressedAD"], tmp_path / name)
    for model in run.glob("*.pt"):
        model.unlink()
    (run / "checkpoints").mkdir()
    step = EXPECTED["checkpoint"]["step"]
    shutil.copy(CHECKPOINT, run / "checkpoints" / f"step-{step:08d}.pt")
    small = ["--preset", "smoke", "--device", "cpu", "--env.n_task", "5", "--env.validation", "1"]
    small += ["--env.heldout", "1", "--model.steps", "12", "--model.validations", "3"]
    small += ["--model.checkpoint_every", "6", "--model", "CompressedAD"]
    said("train", *small, "--history", HISTORY, "--out", tmp_path, "--resume")
    logits = contents.model(run / "best_model.pt")[
        "logits"
    ]  # weights may differ by a bit on another processor
    np.testing.assert_allclose(logits, EXPECTED["CompressedAD"]["model"]["logits"], rtol=0, atol=1e-4)
