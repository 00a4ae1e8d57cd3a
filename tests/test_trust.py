"""Files from others run nothing: they name code, but only what the user named as well is imported."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from compressed_ad import TASK_FAMILY, CompressedADDataset, HistoryFile, make_family
from compressed_ad.cli.main import main
from compressed_ad.errors import CheckpointError, ConfigError, HistoryError, UsageError
from compressed_ad.histories import hdf5
from compressed_ad.registry import own_names
from compressed_ad.runs import layers, yaml_file
from compressed_ad.runs.job import trained_job
from compressed_ad.runs.judge import load_model
from compressed_ad.runs.study import load_study
from compressed_ad.runs.study_run import groups
from compressed_ad.tasks.gridworld import Darkroom
from compressed_ad.tasks.select import ADAPTER
from compressed_ad.training import checkpoints
from tests.cli.test_main import MODEL, NAME, SMALL, errors, run

__all__ = ["run"]  # the fixture

PAYLOAD = """
open("PWNED", "w").close()
from compressed_ad import CompressedAD as Model, Darkroom

class Family(Darkroom):
    name = "mine"

def transform(sequences, context):
    return sequences

def marker(rewards):
    return rewards > 0
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a small history file, a training run of AD, and its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    words = ["--history", str(folder / NAME), "--out", str(folder), "--model.validations", "0"]
    assert main(["collect", *SMALL, "--out", str(folder)]) == 0
    assert main(["train", *MODEL, "--model", "AD", *words]) == 0
    assert main(["evaluate", str(folder / "AD-darkroom-seed0")]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Iterator[Path]:
    """The current folder: a copy of ``made`` beside a module that leaves the file ``PWNED`` if imported."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "payload.py").write_text(PAYLOAD)
    environment = tmp_path / "AD-darkroom-seed0" / "environment.json"
    environment.write_text(environment.read_text().replace(str(made), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("payload", None)


RUN = Path("AD-darkroom-seed0")


def reseal(path: Path, edit: Callable[[h5py.File], object]) -> None:
    """Change a history file as somebody would who knows the format."""
    with h5py.File(path, "r+") as file:
        edit(file)
    data = path.read_bytes()[512:]
    path.write_bytes(hdf5._block(hashlib.sha256(data).hexdigest()) + data)


def name_family(name: str, **kwargs: Any) -> None:
    reseal(Path(NAME), lambda f: f.attrs.update({"family": name, "family_kwargs": json.dumps(kwargs)}))


# ---------------------------------------------------------------- names in files

FAMILIES = [
    ("os:system", {"command": "touch PWNED"}, "os:system"),
    ("subprocess:run", {"args": ["touch", "PWNED"]}, "subprocess:run"),
    ("builtins:exec", {"source": "open('PWNED', 'w')"}, "builtins:exec"),
    ("payload:Family", {}, "payload:Family"),
    ("gymnasium:payload:Env-v0", {}, "gymnasium:payload:Env-v0"),
    ("minigrid:payload:Env-v0", {}, "minigrid:payload:Env-v0"),
    ("gymnasium:CartPole-v1", {"env_id": "payload:CartPole-v1"}, "payload:CartPole-v1"),
    ("gymnasium:CartPole-v1", {"setup": "payload:marker"}, "payload:marker"),
    ("gymnasium:CartPole-v1", {"kwargs": {"inner": ["payload:Env"]}}, "payload:Env"),
]


@pytest.mark.parametrize(("name", "kwargs", "code"), FAMILIES, ids=[name for *_, name in FAMILIES])
def test_a_history_file_names_a_family_and_nothing_runs(run, folder, name, kwargs, code):
    name_family(name, **kwargs)
    small, evaluate = ["train", *MODEL, "--history", NAME, "--out", "new"], ["evaluate", RUN, "--overwrite"]
    readers = [["mark", NAME, "--output", "marked.hdf5"], ["export", NAME, "--to", "npz", "--out", "x.npz"]]
    readers += [["inspect", NAME], ["compare", RUN], ["report", RUN, "--dry-run"]]
    for words in (*readers, [*small, "--dry-run"], [*evaluate, "--dry-run"]):
        assert run(*words)[0] == 0, words
    for words in (small, evaluate, ["rollouts", RUN], ["attention", RUN]):
        status, _, lines = run(*words)
        (line,) = errors(lines)
        assert (status, line.partition(": ")[0].endswith(NAME)) == (2, True)
        assert f"names {code!r}" in line
        assert f"--trust {code!r}" in line
    with pytest.raises(UsageError, match="trust="):
        CompressedADDataset.from_file(NAME, 10, [("subsample", {"every": 2})])
    assert not Path("PWNED").exists()
    assert "payload" not in sys.modules


def test_a_file_brings_no_module_in_place_of_one_that_is_not_installed(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the program cad has it
    monkeypatch.delitem(sys.modules, "compressed_ad.tasks.xland", raising=False)
    monkeypatch.setitem(ADAPTER, "later", "extension:Family")  # type: ignore[index]
    Path("extension.py").write_text(PAYLOAD)
    name_family("later:Env-v0")
    small = ["train", *MODEL, "--history", NAME, "--out", "new", "--model.validations", "0"]
    for words in (small, ["evaluate", RUN, "--overwrite"], ["rollouts", RUN], ["attention", RUN]):
        status, _, lines = run(*words)
        assert (status, len(errors(lines)), Path("PWNED").exists()) == (2, 1, False), lines
    assert "" not in sys.path
    name_family("darkroom", size=3, horizon=5)
    Path("own.yaml").write_text("marker: {marker: 'payload:marker'}\n")
    code, _, lines = run("mark", NAME, "--config", "own.yaml", "--output", "marked.hdf5")
    assert (code, Path("PWNED").exists(), "" in sys.path) == (0, True, False), lines


def test_a_report_leaves_out_what_would_need_the_code(run, folder):
    trusted = ["--trust", "payload:Family"]
    assert run("collect", *SMALL, "--family", "payload:Family", "--out", "own")[0] == 0
    (history,) = Path("own").glob("*.hdf5")
    words = ["--history", history, "--out", "own", "--model.validations", "0", *trusted]
    assert run("train", *MODEL, "--model", "AD", *words)[0] == 0
    (own,) = Path("own").glob("AD-*")
    assert run("evaluate", own, *trusted)[0] == 0
    sys.modules.pop("payload")
    Path("PWNED").unlink()
    status, _, _ = run("report", own, "--out", "report")
    assert status == 0
    assert "What needs the code payload:Family is not drawn" in Path("report/index.html").read_text()
    assert not Path("PWNED").exists()


def test_trusted_code_is_imported_here_and_in_worker_processes(run, folder, monkeypatch):
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", str(folder))  # of the command line
    name_family("payload:Family", size=3, horizon=5)
    small = ["train", *MODEL, "--model", "AD", "--model.validations", "0", "--history", NAME, "--out"]
    assert run(*small, "typed", "--family", "payload:Family")[0] == 0
    Path("own.yaml").write_text("env: {family: 'payload:Family'}\n")
    assert run(*small, "file", "--config", "own.yaml")[0] == 0
    assert run(*small, "both", "--trust", "other:name", "--trust", "payload:Family")[0] == 0
    assert Path("PWNED").exists()
    runs = [next(Path(name).iterdir()) for name in ("typed", "both")]
    code, _, lines = run("evaluate", *runs, "--evaluation.episodes", "1", "--trust", "payload:Family")
    assert (code, errors(lines)) == (0, [])
    chosen = [("subsample", {"every": 2})]
    for trust in ("payload:Family", ["a:b", "payload:Family"]):
        assert len(CompressedADDataset.from_file(NAME, 10, chosen, trust=trust))


def test_trust_does_not_lift_the_protocol(run, folder):
    name_family("os:system", command="touch PWNED")
    status, _, lines = run("evaluate", RUN, "--overwrite", "--trust", "os:system")
    assert (status, len(errors(lines))) == (2, 1)
    assert "'os:system' is a builtin_function_or_method, not a class or function" in errors(lines)[0]
    assert not Path("PWNED").exists()


def test_what_the_program_has_registered_needs_no_trust(folder, monkeypatch):
    monkeypatch.setitem(TASK_FAMILY._items, "my_own_room", Darkroom)  # type: ignore[attr-defined]
    name_family("my_own_room", size=3, horizon=5)
    assert len(CompressedADDataset.from_file(NAME, 10, [("subsample", {"every": 2})]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("transforms: []", "transforms: [{name: 'payload:transform'}]"),
        ("transforms: []", "transforms: [{name: subsample, inner: 'payload:transform'}]"),
        ("model: AD", "model: 'payload:Model'"),
    ],
)
def test_a_run_directory_names_code(run, folder, old, new):
    config = RUN / "config.yaml"
    text = config.read_text()
    assert old in text
    (RUN / "evaluation.npz").unlink()
    config.write_text(text.replace(old, new, 1))
    facts = json.loads((RUN / "environment.json").read_text())
    del facts["config"]  # the copy that would show the change
    (RUN / "environment.json").write_text(json.dumps(facts))
    for words in (["evaluate", RUN, "--overwrite"], ["rollouts", RUN], ["attention", RUN]):
        status, _, lines = run(*words)
        assert (status, len(errors(lines))) == (2, 1)
        assert f"{config}: names 'payload:" in errors(lines)[0]
    assert not Path("PWNED").exists()


def test_a_run_directory_names_a_marker_that_marks_when_histories_are_read(run, folder):
    config, facts = RUN / "config.yaml", json.loads((RUN / "environment.json").read_text())
    text = config.read_text()
    assert text.count("marker: threshold\n") == 1
    config.write_text(text.replace("marker: threshold\n", "marker: 'payload:marker'\n"))
    del facts["config"]  # the copy that would show the change
    facts["history"]["marked_at"] = None  # as in a study
    (RUN / "environment.json").write_text(json.dumps(facts))
    status, _, lines = run("attention", RUN)
    assert (status, len(errors(lines))) == (2, 1)
    assert f"{config}: names 'payload:marker'" in errors(lines)[0]
    assert not Path("PWNED").exists()


def _int8(content: dict[str, Any]) -> None:
    weights = content["model_state_dict"]
    content["model_state_dict"] = {name: value.char() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "status", "cause"),
    [
        (lambda c: c["config"].update(model="payload:Model"), 2, "names 'payload:Model'"),
        (lambda c: c["config"].update(model="os:system"), 2, "names 'os:system'"),
        (lambda c: c["config"].update(tf_n_embd=32), 1, "is not of the run that config.yaml and"),
        (lambda c: c["config"].update(tf_n_embd="many"), 1, "does not hold a model"),
        (lambda c: c.pop("config"), 1, "does not hold a model"),
        (lambda c: c.pop("model_state_dict"), 1, "does not hold a model"),
        (lambda c: c.update(model_state_dict=[1]), 1, "its weights are not those of a AD"),
        (lambda c: c.update(step="many"), 1, "its step is 'many'"),
        (_int8, 1, "is torch.int8"),
    ],
)
def test_a_checkpoint_that_holds_something_else(run, folder, change, status, cause):
    content = checkpoints.load(RUN / "best_model.pt")
    change(content)
    checkpoints.save(RUN / "best_model.pt", content)
    code, _, lines = run("evaluate", RUN, "--overwrite")
    (line,) = errors(lines)
    assert code == status
    assert cause in line
    assert str(RUN / "best_model.pt") in line
    assert not Path("PWNED").exists()


# ---------------------------------------------------------------- what the user names

CALLS = {
    "env": "{family: NAME, kwargs: {command: touch PWNED, args: [touch, PWNED]}}",
    "algorithm": "{learner: NAME, learner_kwargs: {command: touch PWNED}}",
    "marker": "{marker: NAME, params: {command: touch PWNED}}",
    "model": "{transforms: [{name: NAME, command: touch PWNED}]}",
    "comparison": "{methods: [AD, NAME]}",
}


@pytest.mark.parametrize("section", CALLS)
@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "payload:nothing"])
def test_a_configuration_is_checked_before_anything_in_it_is_called(run, folder, section, name):
    text = CALLS[section].replace("NAME", f"'{name}'")
    Path("evil.yaml").write_text(f"{section}: {text}\n")
    for option in ("--print-config", "--dry-run"):
        code, out, lines = run("run", "--config", "evil.yaml", option)
        assert (code, errors(lines), name in out) == (0, [], True)
        assert "payload" not in sys.modules
    assert "Not tried, because a dry run imports no code of yours:" in out
    assert not Path("PWNED").exists()
    if name != "payload:nothing":
        code, _, lines = run("run", "--config", "evil.yaml", "--out", "new")
        assert (code, len(errors(lines)), name in errors(lines)[0]) == (2, 1, True)
        assert not Path("PWNED").exists()


def test_a_dry_run_still_tries_what_is_built_in(run, folder):
    Path("own.yaml").write_text(
        "env: {family: 'payload:Family'}\nmarker: {params: {compression_window: x}}\n"
    )
    code, _, lines = run("run", "--config", "own.yaml", "--dry-run")
    assert code == 2
    assert "compression_window must be a whole number" in errors(lines)[0]


def test_a_study_of_own_code(run, folder):
    Path("own.yaml").write_text("families: {mine: {env: {family: 'payload:Family'}}}\nvariants: {AD: {}}\n")
    code, out, _ = run("study", "own.yaml", "--dry-run")
    assert (code, "payload:Family" in out, Path("PWNED").exists()) == (0, True, False)
    Path("own.yaml").write_text(
        "families: {room: {}}\nvariants:\n"
        "  {AD: {}, own: {model: {transforms: [{name: 'payload:transform'}]}}}\n"
    )
    for group in groups(load_study(Path("own.yaml"), runs=1, own=False), Path("out")):
        (cell, player, _), *_ = group.plays
        named = {"payload:transform"} if cell.variant == "own" else set()
        assert group.job.trust == player.trust == named  # what the user gave is trusted, in workers too


@pytest.mark.parametrize(
    "words",
    [
        ["import", NAME, "--layout", "os:system", "--family", "darkroom"],
        ["import", NAME, "--layout", "payload:transform", "--family", "darkroom"],
        ["export", NAME, "--to", "os:system", "--out", "x"],
        ["check", "family", "os:system", "--kwargs", "{command: touch PWNED}"],
        ["check", "family", "subprocess:run", "--kwargs", "{args: [touch, PWNED]}"],
        ["check", "learner", "subprocess:getoutput", "--kwargs", "{cmd: touch PWNED}"],
        ["check", "marker", "os:system", "--kwargs", "{command: touch PWNED}"],
        ["check", "marker", "subprocess:getoutput", "--kwargs", "{cmd: touch PWNED}"],
        ["check", "learner", "noise", "--kwargs", "{policy: 'os:system'}"],
        ["check", "family", "gymnasium:CartPole-v1", "--kwargs", "{setup: 'os:system'}"],
        ["check", "family", "x-y:Z"],
    ],
)
def test_other_protocols_are_checked_before_the_call(run, folder, words):
    code, _, lines = run(*words)
    assert (code, len(errors(lines))) == (2, 1)
    if "payload:transform" in words:
        Path("PWNED").unlink()  # imported, because it was typed
    assert not Path("PWNED").exists()


def factory(size: int = 3) -> Darkroom:
    return Darkroom(size, 5)


def unannotated(size: int = 3):
    return Darkroom(size, 5)


def test_a_function_that_makes_a_family_says_so():
    assert make_family("tests.test_trust:factory", {"size": 4}).size == 4  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="annotate what the function returns, -> TaskFamily"):
        make_family("tests.test_trust:unannotated", {})


def test_texts_that_may_stand_for_code():
    plain = ["0.25:1.0", "-1:1", "1e-3:2", "1E-1:1", "darkroom", "", 3, None, True, b"a:b", {"k": [("x",)]}]
    assert own_names(plain) == frozenset()
    assert own_names({"a": ["mine:F", {"b": ("x-y:Z",)}], "c:d": 1}) == {"mine:F", "x-y:Z"}


# ---------------------------------------------------------------- absurd sizes


def lines(n: int, text: str) -> str:
    return "".join(f"{text}{k}: 1\n" for k in range(n))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("env:\n  kwargs:\n" + lines(20_000, "    k"), "more than"),
        ("env: {kwargs: {a: [{" + ", ".join(f"k{i}: 1" for i in range(60_000)) + "}]}}", "more than"),
        ("env:\n" + lines(5000, "  k"), "more than"),
        ("include: [i0.yaml, i0.yaml]", "includes more than 30 files"),
        ("include: c0.yaml", "includes more than 30 files"),
        ("env: {kwargs: {horizon: 1000000000000}}", "horizon must be at most"),
        (
            "env: {kwargs: {horizon: 2000000000}}",
            "horizon must be a whole number from 1",
        ),
        ("env: {kwargs: {size: 100000}}", "size must be a whole number between 2 and 1000"),
        ("env: {family: point_mass, kwargs: {n_task: 2000000000}}", "n_task must be"),
    ],
)
def test_absurd_configurations_are_refused_at_once(run, tmp_path, text, cause):
    for k in range(21):
        (tmp_path / f"i{k}.yaml").write_text(f"include: [i{k + 1}.yaml, i{k + 1}.yaml]\n")
    (tmp_path / "i21.yaml").write_text("seed: 1\n")
    for k in range(100):
        (tmp_path / f"c{k}.yaml").write_text(f"include: c{k + 1}.yaml\n")
    (tmp_path / "evil.yaml").write_text(text)
    started = time.process_time()
    code, _, shown = run("collect", "--config", "evil.yaml")
    assert time.process_time() - started < 3
    (line,) = errors(shown)
    assert code == 2
    assert cause in line
    assert len(line) < 400


def test_merging_is_linear():
    leaves = {("env", "kwargs", f"k{i}"): (1, "") for i in range(50_000)}
    started = time.process_time()
    layers.merge(leaves, {("marker", "params", f"k{i}"): (1, "") for i in range(50_000)})
    assert (len(leaves), time.process_time() - started < 2) == (100_000, True)


def test_no_error_quotes_a_file_that_is_no_configuration(run, tmp_path):
    (tmp_path / "shadow").write_text("root:SECRET:1:0\n")
    for include in ("{env: ../shadow}", "../shadow", "[../shadow]"):
        (tmp_path / "inner").mkdir(exist_ok=True)
        (tmp_path / "inner" / "evil.yaml").write_text(f"include: {include}\n")
        code, out, shown = run("collect", "--config", "inner/evil.yaml", "--print-config")
        assert (code, len(shown)) == (2, 1)
        assert "SECRET" not in out + shown[0]
        assert "ends with .yaml or .yml" in shown[0]


def test_small_limits_of_the_reader(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("env: {training_tasks: [" + ",".join(map(str, range(9000))) + "]}\n")
    assert len(yaml_file.read(path)["env", "training_tasks"][0]) == 9000
    path.write_text("".join(f"s{k}: {{{', '.join(f'k{i}: 1' for i in range(100))}}}\n" for k in range(6)))
    with pytest.raises(ConfigError, match="more than 500 settings"):
        yaml_file.read(path)


def _replace(name: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit


def _attribute(name: str, value: Any) -> Callable[[h5py.File], object]:
    return lambda file: file.attrs.update({name: value})


def _space(text: str) -> Callable[[h5py.File], object]:
    discrete = '{"kind": "discrete", "n": 5}'
    return _attribute("spaces", f'{{"observation": {text}, "action": {discrete}}}')


def _box(shape: str, dtype: str = "float32", low: str = "0") -> Callable[[h5py.File], object]:
    return _space(f'{{"kind": "box", "low": {low}, "high": 1, "shape": {shape}, "dtype": "{dtype}"}}')


def _empty(file: h5py.File) -> None:
    for name in list(file["0"]):
        _replace(f"0/{name}", file["0"][name][:0])(file)


@pytest.mark.parametrize(
    "edit",
    [
        _attribute("horizon", 0),
        _attribute("horizon", 10**9),
        _attribute("seed", -1),
        _attribute("family", "x" * 60_000),
        _attribute("family_kwargs", json.dumps({"size": "x" * 2_000_000})),
        _space('{"kind": "discrete", "n": -5}'),
        _space('{"kind": "discrete", "n": 1000000000000}'),
        _space('{"kind": "discrete", "n": "5"}'),
        _space('{"kind": "discrete", "n": 5, "start": "x"}'),
        _space('{"kind": "multidiscrete", "nvec": [5, 10000000]}'),
        _space('{"kind": "x"}'),
        _space("{}"),
        _space("3"),
        _space("[]"),
        _box("[1000000, 1000000]"),
        _box("[0]"),
        _box("[3]", dtype="object"),
        _box("[3]", dtype="nonsense"),
        _box("[3]", low="[0, 0]"),
        _box("[3]", low='"x"'),
        lambda f: _replace("tasks", f["tasks"][:, 0])(f),
        lambda f: _replace("tasks", np.full(f["tasks"].shape, np.nan))(f),
        _empty,
    ],
)
def test_headers_that_make_no_sense_are_named(folder, edit):
    reseal(Path(NAME), edit)
    started = time.process_time()
    with pytest.raises(HistoryError, match=NAME) as caught:
        HistoryFile(NAME)
    assert time.process_time() - started < 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "value"), [("rewards", 1e300), ("update", -5), ("learner", -3), ("action_probs", np.inf)]
)
def test_arrays_that_make_no_sense_are_named(folder, name, value):
    def edit(file: h5py.File) -> None:
        old = file["0"][name]
        _replace(f"0/{name}", np.full(old.shape, value, "f8" if name == "rewards" else old.dtype))(file)

    reseal(Path(NAME), edit)
    with np.errstate(over="ignore"), pytest.raises(Exception, match="task 0") as caught:
        HistoryFile(NAME).load()
    assert type(caught.value).__module__ == "compressed_ad.errors"


def test_weights_are_those_of_the_history(folder):
    job = trained_job(RUN, Path(NAME))
    from compressed_ad.runs.data import RunData

    data = RunData(job)
    assert load_model(RUN / "best_model.pt", data, "cpu")[0].config.model == "AD"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(RUN / "none.pt", data, "cpu")
