"""The guide, executed: its two commands as scripts, then its code word for word, only its imports changed."""

from __future__ import annotations

import hashlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from compressed_ad import (
    CompressedADDataset,
    Darkroom,
    HistoryFile,
    TaskEnv,
    apply_marker,
    borders,
    from_histories,
    threshold,
)
from compressed_ad.cli.main import main
from tests.conftest import guide_snippet as snippet

ROOT = Path(__file__).parents[1]
NAME = "history_darkroom_PPO_alg-seed0_compressed.hdf5"
SCRIPTS = {name: ROOT / "examples" / "guide" / f"{name}_with_compression.py" for name in ("collect", "train")}
SMALL = {
    "collect": ["--preset", "smoke", "--algorithm.n_process", "2"],
    "train": ["--preset", "smoke", "--model.steps", "20"],
}
# A run of the smoke preset is too short to become confident.
EASY = ["--marker.on_policy_threshold", "0.2", "--marker.compression_window", "3"]

DIGEST = "968a5de97d01384a6b8cf6be35e5aa65a3601767e7c43833c5c64030797690c3"
"""SHA-256 of the guide."""


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def envs() -> list[Callable[[], TaskEnv]]:
    family = Darkroom(9, 20)
    return [lambda task=task: TaskEnv(family, task) for task in (0, 13, 40, 80)]


def dummy_vec_env() -> Any:
    return pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv(envs())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's two commands were given."""
    folder = tmp_path_factory.mktemp("guide")
    for name, more in (("collect", EASY), ("train", [])):
        command = [sys.executable, SCRIPTS[name], *SMALL[name], *more]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> Path:
    """A copy of it, in which the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_is_kept_word_for_word() -> None:
    note, _, text = (ROOT / "docs" / "guide.md").read_text("utf-8").partition("\n\n")
    assert note.startswith("> ") and "\n" not in note
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


# ---------------------------------------------------------------- its two commands


def given_again(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a script that is run once more, in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), *SMALL[name], *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    return int(end.value.code or 0)


def test_the_scripts_have_the_guides_settings_and_leave_its_files(made: Path) -> None:
    kept = [str(path.relative_to(made)) for path in made.rglob("*") if path.suffix in (".hdf5", ".pt")]
    for file in (snippet("Output:").strip(), "runs/CompressedAD-darkroom-seed0/best_model.pt"):
        assert file in kept
    lines = [*snippet("Configuration:").splitlines(), snippet("Multi-Environment Training").splitlines()[1]]
    script = SCRIPTS["collect"].read_text("utf-8").splitlines()
    assert len(lines) == 3
    for line in lines:
        setting, _, comment = line.partition("#")
        assert any(setting in own and comment in own for own in script), line


def test_a_script_that_is_given_again_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves what is finished alone, except for marks if others are asked for."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert given_again("collect", *EASY, monkeypatch=monkeypatch) == 0
    assert given_again("train", monkeypatch=monkeypatch) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    easily = HistoryFile(f"datasets/{NAME}").statistics()
    capsys.readouterr()
    assert given_again("collect", monkeypatch=monkeypatch) == 0
    marked = HistoryFile(f"datasets/{NAME}")
    assert marked.threshold == 0.7 and marked.marking["parameters"]["compression_window"] == 10
    assert marked.statistics().text() in capsys.readouterr().out
    assert marked.statistics().compressed_steps < easily.compressed_steps
    assert given_again("train", monkeypatch=monkeypatch) == 1  # its model learned from other marks
    assert "on_policy_threshold: 0.2 there, 0.7 asked for" in capsys.readouterr().err


# ---------------------------------------------------------------- step 1: marking


def test_the_worked_example() -> None:
    """Its runs of 6 and 4 steps need a ``compression_window`` of at most 4; the default 10 marks nothing."""
    rows = [line.partition(":") for line in snippet("Example segment detection").splitlines()[:3]]
    given = {name: np.array(values.split(), float) for name, _, values in rows}
    mask = threshold(given["Probs"], 0.7, 4)
    np.testing.assert_array_equal(mask, given["Mask"].astype(bool))
    start, end = borders(mask)
    assert (np.flatnonzero(start).tolist(), np.flatnonzero(end).tolist()) == ([1, 10], [7, 14])
    assert not threshold(given["Probs"], 0.7, 10).any()


def test_compression_parameters_more_and_less_aggressive(folder: Path) -> None:
    aggressive, conservative = snippet("Compression Parameters").split("\n\n")
    ratios = []
    for text in (aggressive, conservative):
        config: dict[str, Any] = {}
        exec(text, {"config": config})
        # A run of the smoke preset is too short to become confident: its thresholds are scaled down.
        config["on_policy_threshold"] /= 3
        words = [word for key, value in config.items() for word in (f"--marker.{key}", str(value))]
        assert main(["mark", f"datasets/{NAME}", *words]) == 0
        file = HistoryFile(f"datasets/{NAME}")
        assert {key: file.marking["parameters"][key] for key in config} == config
        ratios.append(file.statistics().compression_ratio)
    assert ratios[0] > ratios[1]


def test_custom_compression_strategy_as_a_marker(folder: Path) -> None:
    """The guide's method marks one stream; a marker gets all (stream, time)."""
    (folder / "my_strategy.py").write_text(
        f"import numpy as np\n\n\n{snippet('Custom Compression Strategy')}\n\n"
        "def mark(action_probs):\n"
        "    return np.stack([_identify_compression_segments(None, stream) for stream in action_probs])\n"
    )
    assert main(["mark", f"datasets/{NAME}", "--marker", "my_strategy:mark"]) == 0
    file = HistoryFile(f"datasets/{NAME}")
    assert file.marking["marker"] == "my_strategy:mark"
    for history in file.load().values():
        np.testing.assert_array_equal(history.compression_mask, apply_marker("rising_confidence", history))


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_plot(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scope: dict[str, Any] = {}
    exec(snippet("Visualize Compression"), scope)
    history = HistoryFile(f"datasets/{NAME}").load([0])[0]
    assert history.compression_mask is not None
    np.testing.assert_array_equal(scope["action_probs"], history.action_probs)
    np.testing.assert_array_equal(scope["compression_mask"], history.compression_mask)
    (axes,) = plt.gcf().axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), history.action_probs[0, :200])
    assert len(axes.collections) == 1 and history.compression_mask[0, :200].any()
    plt.close("all")


def test_the_callback_in_a_plain_learn() -> None:
    ppo = pytest.importorskip("stable_baselines3").PPO
    from compressed_ad import CompressedHistoryCallback

    callback = CompressedHistoryCallback(on_policy_threshold=0.2, compression_window=3)
    ppo("MlpPolicy", dummy_vec_env(), n_steps=25, batch_size=50, seed=0, device="cpu").learn(
        100, callback=callback
    )
    history = callback.history()
    assert (history.n_stream, history.n_step) == (4, 25)
    assert history.episode_end.sum(axis=1).tolist() == [1] * 4
    assert (history.next_states[:, 19] != Darkroom().start_cell).any()
    np.testing.assert_array_equal(history.compression_mask, threshold(history.action_probs, 0.2, 3))


# ---------------------------------------------------------------- step 2: training


def test_the_training_data_is_large_and_has_marks(folder: Path) -> None:
    train_dataset = CompressedADDataset.from_file(f"datasets/{NAME}", n_transit=60)
    file = HistoryFile(f"datasets/{NAME}")
    # 400 steps are 20 episodes of 20; windows of three episodes start at the first 18.
    assert len(train_dataset) == len(file.split.train) * file.n_stream * 18
    assert any(train_dataset[i]["n_segments"] for i in range(len(train_dataset)))
    expected = CompressedADDataset(from_histories(file.load(file.split.train)), 60)
    for i in (0, len(expected) - 1):
        torch.testing.assert_close(train_dataset[i]["states"], expected[i]["states"])
    thin = CompressedADDataset.from_file(f"datasets/{NAME}", 60, [("subsample", {"every": 4})])
    assert 0 < len(thin) < len(train_dataset) / 4


def test_the_model_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guide's ``config/model/ad_dr.yaml`` is a model file."""
    (folder / "ad_dr.yaml").write_text(snippet("Model Parameters"))
    assert main(["train", "--model", "ad_dr.yaml", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    given = yaml.safe_load(snippet("Model Parameters"))
    assert given == {key: shown[key] for key in given} and shown["model"] == "CompressedAD"


# ---------------------------------------------------------------- step 3: evaluation


def evaluate(vec_env: Any, config: str) -> dict[str, Any]:
    text = snippet("Step 3: Evaluate")
    text = replaced(text, "from model import MODEL", "from compressed_ad import MODEL")
    text = replaced(text, "{...}  # Your config", config)
    scope: dict[str, Any] = {"vec_env": vec_env}
    exec(text, scope)
    return scope


VEC_ENVS = {
    "sb3": dummy_vec_env,
    "same-step": lambda: SyncVectorEnv(envs(), autoreset_mode=AutoresetMode.SAME_STEP),
    "next-step": lambda: SyncVectorEnv(envs()),
}


@pytest.mark.parametrize("make", VEC_ENVS.values(), ids=VEC_ENVS)
def test_evaluate(folder: Path, make: Callable[[], Any]) -> None:
    scope = evaluate(make(), "torch.load('runs/CompressedAD-darkroom-seed0/best_model.pt')['config']")
    returns = scope["results"]["reward_episode"]
    assert returns.shape == (50, 4)  # 1000 steps, episodes of 20
    assert ((returns >= 0) & (returns <= 20)).all()
    assert not scope["model"].training
    for vector in (scope["model"].embed_compress_start, scope["model"].embed_compress_end):
        assert vector.shape == (16,) and torch.isfinite(vector).all()


def test_evaluate_with_the_config_of_a_run_directory(folder: Path) -> None:
    """``config.yaml`` holds what the user chose; the spaces are the environment's."""
    config = {
        **yaml.safe_load(Path("runs/CompressedAD-darkroom-seed0/config.yaml").read_text())["model"],
        "observation_space": {"kind": "multidiscrete", "nvec": [9, 9]},
        "action_space": {"kind": "discrete", "n": 5},
    }
    by_file = evaluate(dummy_vec_env(), repr(config))
    by_checkpoint = evaluate(
        dummy_vec_env(), "torch.load('runs/CompressedAD-darkroom-seed0/best_model.pt')['config']"
    )
    np.testing.assert_array_equal(by_file["results"].reward_episode, by_checkpoint["results"].reward_episode)
