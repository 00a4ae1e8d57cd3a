"""What a user imports: every name is documented and typed, takes paths as strings, and prints as one line."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from mypy import api as mypy

import compressed_ad
from compressed_ad import (
    EXPORT,
    MODEL,
    CompressedADDataset,
    Darkroom,
    History,
    HistoryFile,
    HistoryWriter,
    ModelConfig,
    Recorded,
    Split,
    TaskEnv,
    WindowSampler,
    collect,
    from_histories,
    import_histories,
    load_runs,
    make_family,
    make_learner,
    to_spec,
    train,
)
from compressed_ad.tasks import base
from tests.conftest import SmokeRun

ROOT = Path(__file__).parents[1]
NAME = "history_darkroom_PPO_alg-seed0_compressed.hdf5"
TINY = {"tf_n_embd": 8, "tf_n_head": 1, "tf_n_layer": 1, "n_transit": 20}


def public_methods(cls: type) -> list[str]:
    """Methods and properties that ``cls`` has from this package, not from a library's base class."""
    return [
        name
        for name in dir(cls)
        if not name.startswith("_")
        and any(
            name in vars(base) and base.__module__.startswith("compressed_ad") for base in inspect.getmro(cls)
        )
        and (callable(getattr(cls, name)) or isinstance(inspect.getattr_static(cls, name), property))
    ]


@pytest.mark.parametrize("name", compressed_ad.__all__)
def test_every_public_name_and_method_has_a_docstring(name: str) -> None:
    """A method that a protocol of ``tasks.base`` describes need not say it again."""
    found = getattr(compressed_ad, name)
    assert inspect.getdoc(found), name
    if inspect.isclass(found):
        protocols = [member for member in vars(base).values() if getattr(member, "_is_protocol", False)]
        described = {n for p in protocols for n, m in vars(p).items() if inspect.isfunction(m) and m.__doc__}
        missing = [
            method
            for method in public_methods(found)
            if not inspect.getdoc(getattr(found, method)) and method not in described
        ]
        assert not missing, f"{name} has methods without a docstring: {missing}"


def test_names_are_declared_as_they_are_loaded() -> None:
    """The imports for type checkers and the table that is used when the program runs say the same."""
    declared: dict[str, str] = {}
    for node in ast.walk(ast.parse(Path(compressed_ad.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compressed_ad"):
            home = str(node.module).removeprefix("compressed_ad.")
            declared |= {alias.name: home for alias in node.names if alias.asname == alias.name}
    assert declared == compressed_ad._HOME
    homes = list(compressed_ad._NAMES)
    assert homes == sorted(homes)
    for names in compressed_ad._NAMES.values():
        assert names.split() == sorted(names.split(), key=lambda name: (not name.isupper(), name))


def test_completion_and_help_show_the_public_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert dir(compressed_ad) == compressed_ad.__all__ == sorted(set(compressed_ad.__all__))
    help(compressed_ad)
    shown = capsys.readouterr().out
    assert [name for name in compressed_ad.__all__ if not re.search(rf"\b{name}\b", shown)] == []
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        compressed_ad.colect  # noqa: B018


def test_a_users_file_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mypy --strict`` knows every name, and takes strings for paths."""
    user = tmp_path / "user.py"
    names = compressed_ad.__all__
    user.write_text(
        f"from compressed_ad import {', '.join(names)}\n\n"
        + "".join(f"reveal_type({name})\n" for name in names)
        + "\ndef use(sampler: WindowSampler, split: Split, info: HistoryInfo, history: History) -> None:\n"
        '    file = HistoryFile("file.hdf5")\n'
        '    CompressedADDataset.from_file("file.hdf5", 20)\n'
        "    HistoryWriter("
        '"file.hdf5", info, split, file.tasks, file.optimal_return, file.random_return)\n'
        '    collect(Darkroom(), BatchedPPO(), "file.hdf5", family_name="darkroom", n_timesteps=10)\n'
        '    import_histories({}, "file.hdf5", family=Darkroom(), family_name="darkroom", split=split)\n'
        '    EXPORT["npz"](file, "file.npz", False, lambda tasks: None)\n'
        '    train(ModelConfig(), sampler, "runs/mine")\n'
        '    load_runs(["runs/mine"])\n'
        "    apply_marker(threshold, history, on_policy_threshold=0.5)\n"
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # The options are those of the project (strict), so that a cache that ``make lint`` left is used.
    out, err, _ = mypy.run(["--no-color-output", str(user)])
    assert not err and "error:" not in out, out + err
    types = re.findall(r'Revealed type is "(.*)"', out)
    assert len(types) == len(names)
    assert [name for name, kind in zip(names, types, strict=True) if kind == "Any"] == []


# ---------------------------------------------------------------- paths as strings


@pytest.fixture
def file(smoke: SmokeRun) -> HistoryFile:
    return HistoryFile(str(smoke.out / NAME))


def sampler_and_config(file: HistoryFile, **settings: Any) -> tuple[ModelConfig, WindowSampler]:
    sampler = WindowSampler(from_histories(file.load(file.split.train)), 20, 4, seed=0)
    given = {f"{name}_space": spec for name, spec in file.info.spaces.items()}
    return ModelConfig(**TINY, **given, steps=2, batch_size=4, **settings), sampler


def test_training_takes_the_folder_as_a_string(
    file: HistoryFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, sampler = sampler_and_config(file)
    trained = train(config, sampler, "runs/mine")
    assert Path("runs/mine/best_model.pt").exists() and Path("runs/mine/metrics.jsonl").exists()
    assert repr(trained.model).startswith("<CompressedAD")


def test_history_files_take_their_path_as_a_string(
    file: HistoryFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family = make_family("darkroom", {"size": 3, "horizon": 5})
    learner = make_learner("noise", {})
    path = collect(family, learner, "own.hdf5", family_name="darkroom", n_timesteps=30, n_stream=2)
    assert path == Path("own.hdf5") and HistoryFile("own.hdf5").n_step == 30
    windows = CompressedADDataset.from_file("own.hdf5", 10)
    assert len(windows) > 0

    histories = file.load([0, 1])
    recorded = {
        task: Recorded(history.states, history.actions, history.rewards, history.next_states)
        for task, history in histories.items()
    }
    split = Split(train=np.array([0]), validation=np.array([], int), heldout=np.array([1]))
    import_histories(
        recorded, "imported.hdf5",
        family=make_family(file.info.family, file.info.family_kwargs), family_name="darkroom",
        split=split, horizon=20,
    )  # fmt: skip
    assert HistoryFile("imported.hdf5").info.learner == "imported"

    writer = HistoryWriter("written.hdf5", file.info, split, file.tasks[:2], None, np.zeros(2))
    assert repr(writer) == "<HistoryWriter written.hdf5: 0 of 2 tasks of darkroom stored>"
    for task in (0, 1):
        writer.append(task, histories[task])
    writer.finish()
    assert HistoryFile("written.hdf5").task_ids.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["ancestor", "npz"])
def test_exports_take_their_path_as_a_string(
    name: str, file: HistoryFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert EXPORT[name](file, "written", False, lambda tasks: None) == Path("written")
    assert Path("written").stat().st_size > 0


def test_runs_are_loaded_by_strings(smoke: SmokeRun) -> None:
    runs = load_runs([str(smoke.out / f"AD-darkroom-seed{seed}") for seed in (0, 1)])
    assert runs.name == "AD" and runs.seeds == (0, 1)


# ---------------------------------------------------------------- one line each


def test_what_is_looked_at_most_prints_as_one_line(file: HistoryFile) -> None:
    assert re.fullmatch(
        rf"<HistoryFile {NAME}: 81 tasks of darkroom, \d+ streams x 400 steps of PPO, marked by threshold>",
        repr(file),
    )
    history = file.load([0])[0]
    assert re.fullmatch(r"<History of \d+ streams x 400 steps, \d+\.\d% marked>", repr(history))
    bare = History(**{**vars(history), "compression_mask": None})
    assert repr(bare).endswith("steps, not marked>")
    assert repr(Split(np.arange(65), np.arange(65, 73), np.arange(73, 81))) == (
        "<Split of 81 tasks: 65 training, 8 validation, 8 held-out>"
    )
    for name in ("AD", "CompressedAD", "MarkedAttentionAD"):
        model = MODEL[name](sampler_and_config(file)[0])
        assert re.fullmatch(rf"<{name}: [\d,]+ parameters, context of 20 steps>", repr(model))


def test_spaces_of_an_environment_are_what_a_first_training_needs(file: HistoryFile) -> None:
    env = TaskEnv(Darkroom(9, 20), 3)
    found = {"observation": to_spec(env.observation_space), "action": to_spec(env.action_space)}
    assert found == file.info.spaces
    assert to_spec(spaces.Discrete(5)) == {"kind": "discrete", "n": 5}
