import html
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressed_ad.cli.call import Command, Stop
from compressed_ad.cli.main import COMMANDS, load_command, main
from compressed_ad.histories.file import HistoryFile
from compressed_ad.learners.ppo import BatchedPPO
from compressed_ad.report.figures import histories, style
from compressed_ad.report.source import summarise_source
from compressed_ad.runs.directory import KERNELS, is_compiled
from compressed_ad.runs.layers import SECTIONS, config_folder
from compressed_ad.types import History
from tests.conftest import SmokeRun, cad
from tests.histories.test_file import tamper

SMALL = [
    "--preset", "smoke",
    "--env.kwargs", "{size: 3, horizon: 5}", "--env.validation", "1", "--env.heldout", "2",
    "--algorithm.n_learner", "1", "--algorithm.n_timesteps=60", "--algorithm.n_process", "1",
    "--algorithm.learner_kwargs", "{n_steps: 20, batch_size: 20, n_epochs: 2}",
]  # fmt: skip
MODEL = [
    "--preset", "smoke",
    "--model.steps", "4", "--model.n_transit", "20", "--model.validation_episodes", "2",
    "--evaluation.episodes", "3",
]  # fmt: skip
NAME = "history_darkroom_PPO_alg-seed0_compressed.hdf5"


class Blind(BatchedPPO):
    """A learner that does not know its own probabilities."""

    name = "Blind"

    def learn(self, *args: object, **kwargs: object) -> list[History]:
        histories = super().learn(*args, **kwargs)  # type: ignore[arg-type]
        return [replace(h, action_probs=np.full_like(h.action_probs, np.nan)) for h in histories]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """``cad`` in an empty folder: (exit code, standard output, lines of the standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err.splitlines()

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a small history file, a training run of AD, and its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["collect", *SMALL, "--out", str(folder)]) == 0
    assert (
        main(["train", *MODEL, "--model", "AD", "--history", str(folder / NAME), "--out", str(folder)]) == 0
    )
    assert main(["evaluate", str(folder / "AD-darkroom-seed0")]) == 0
    return folder


def errors(lines: list[str]) -> list[str]:
    """Error lines, which are all there may be besides progress."""
    assert not any(line.startswith("Traceback") for line in lines)
    return [line.removeprefix("cad: error: ") for line in lines if line.startswith("cad: error: ")]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_and_setting_with_its_default(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    sections = load_command(command).sections
    for section in sections:
        assert f"--{section}." in out
    if "model" in sections:
        assert "--model.tf_n_embd [96]\n        embedding dimension" in out
    if sections:
        assert "--print-config" in out


def test_help_lists_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(re.search(rf"^    {name}\b", out, re.MULTILINE) for name in COMMANDS)
    assert {"attention", "rollouts", "study"} <= set(COMMANDS)
    assert run()[0] == 2
    assert run("--version")[1].startswith("cad ")


def test_help_and_what_is_found_before_work_starts_import_nothing_heavy(tmp_path):
    wrong = """
        nosuch|run --nosuch|run --model.lr -1|run --env nosuch|run --config nosuch.yaml|run --marker.nosuch 3
        run --algorithm.learner_kwargs.n_epochs -1|collect --preset nosuch|mark nosuch|inspect nosuch|train
        train --history nosuch|evaluate nosuch|compare nosuch|report nosuch|rollouts nosuch|attention nosuch
        study nosuch.yaml|import nosuch|import nosuch --family darkroom|import nosuch --layout nosuch
        export nosuch --to nosuch --out x|export nosuch --to minari --out x|check nosuch x|list nosuch
        check family nosuch|check marker nosuch|check learner nosuch|check family darkroom --kwargs {nosuch:3}
    """
    lines = [line.strip() for text in wrong.splitlines() for line in text.split("|") if line.strip()]
    code = """
import sys
from compressed_ad.cli.main import COMMANDS, main
heavy = {"torch", "numba", "matplotlib", "scipy.stats", "scipy.special", "jinja2", "pandas"}
right = [f"{name} --help" for name in COMMANDS] + ["run --dry-run", "list markers"]
for line in [*right, *sys.argv[1:]]:
    assert (main(line.split()) == 0) == (line in right), line
    assert not heavy & set(sys.modules), (line, heavy & set(sys.modules))
"""
    subprocess.run([sys.executable, "-c", code, *lines], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)


# ---------------------------------------------------------------- usage: exit code 2, nothing started


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["run", "--env", "darkrom"], "unknown task family 'darkrom' (did you mean 'darkroom'?)"),
        (["collect", "--marker", "treshold"], "unknown marker 'treshold' (did you mean 'threshold'?)"),
        (["train", "--model", "CompresedAD"], "unknown model 'CompresedAD' (did you mean 'CompressedAD'?)"),
        (["train", "--model.tf_n_emb", "3"], "unknown key 'model.tf_n_emb' (did you mean 'tf_n_embd'?)"),
        (["run", "--modle.lr", "3"], "unknown key 'modle' (did you mean 'model'?)"),
        (["run", "--lr", "3"], "unknown option --lr (did you mean --model.lr?)"),
        (["run", "--presett", "smoke"], "unknown option --presett"),
        (["run", "--preset", "tiny"], "unknown preset 'tiny'"),
        (["run", "--model.lr"], "--model.lr needs a value"),
        (["run", "--model.lr", "fast"], "model.lr must be a number above 0, got 'fast'"),
        (["run", "--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
        (["run", "--seed", "one"], "seed must be a whole number of at least 0, got 'one'"),
        (["run", "--device", "gpu"], "device must be one of auto, cpu, cuda, got 'gpu'"),
        (["run", "extra"], "unexpected argument 'extra'"),
        (["run", "smoke"], "unexpected argument 'smoke' (did you mean --preset smoke?)"),
        (["run", "benchmark/darkroom"], "(did you mean --config benchmark/darkroom?)"),
        (["train", "h.hdf5"], "unexpected argument 'h.hdf5' (did you mean --history h.hdf5?)"),
        (["run", "--env.kwargs", "{size:", "5}"], "'5}'; a value with spaces needs quotes"),
        (["run", "--smoke"], "unknown option --smoke (did you mean --preset smoke?)"),
        (["run", "--runs", "3"], "unknown option --runs (did you mean --comparison.runs?)"),
        (["collect", "--model", "AD"], "cad collect does not take --model"),
        (["study", "guide", "--model", "AD"], "unknown option --model (did you mean --model.model?)"),
        (["--preset", "smoke", "run"], "the command comes first: cad COMMAND --preset (see cad --help)"),
        (["help"], "unknown command 'help' (did you mean --help?)"),
        (["run", "--env", "CartPole-v1"], "switching_bandit, xland:ID, or module:attribute"),
        (["run", "--learner", "sac"], "unknown learner 'sac' (did you mean 'sb3:SAC'?)"),
        (["run", "--learner", "PPO"], "unknown learner 'PPO' (did you mean 'ppo'?)"),
        (["run", "--comparison.methods", "AD,GistAD"], "got 'AD,GistAD'; a list is written [AD,GistAD]"),
        (["study", "studies/guide.yaml"], "no such file; the shipped study goes by the name guide"),
        (["run", "--config", "darkrom"], "(did you mean 'darkroom'?)"),
        (["run", "--config", "none.yaml"], "none.yaml: no such file"),
        (["mark", "x.hdf5", "--model.lr", "1"], "cad mark does not use the section model"),
        (
            ["inspect", "x.hdf5", "--seed.x", "1"],
            "cad inspect does not use the section seed (it uses no settings)",
        ),
        (["inspect"], "the following arguments are required: FILE"),
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["list", "marker"], "unknown list 'marker' (did you mean 'markers'?)"),
        (["collect", "--env.heldout", "90"], "cannot be made of 81 tasks"),
        (["check", "famly", "x"], "unknown kind 'famly' (did you mean 'family'?)"),
        (["attention", "x", "--part", "test"], "unknown part 'test'; one of heldout, validation, train"),
        (["run", "--task-param", "length"], "--task-param takes KEY=LOW:HIGH or KEY=A,B,C, not 'length'"),
        (["run", "--tasks", "0"], "--tasks: expected a whole number of at least 1, got '0'"),
        (["collect", "--algorithm", "sb3:PPOO"], "PPOO"),
        (["run", "--model.transforms", "[subsampel]"], "unknown history transform 'subsampel'"),
        (["run", "--model.transforms", "[{name: subsample, every: -3}]"], "every must be a whole number"),
        (["run", "--marker.params", "{within_episode: maybe}"], "within_episode must be true or false"),
        (
            ["mark", "x", "--marker", "low_entropy", "--marker.params.max_entropy", "nan"],
            "max_entropy must be a number",
        ),
        (["mark", "x", "--marker", "low_entropy", "--marker.params.max_entropy", ".nan"], "must be finite"),
        (["run", "--evaluation.episodes", "true"], "episodes must be a whole number of at least 1, got True"),
        (["run", "--model.steps", "99999999999999999999"], "must be at most 2147483647"),
        (["run", "--seed", "99999999999999999999"], "must be at most 9223372036854775807"),
        (["run", "--env.training_tasks", "[]"], "must be a list of one or more values"),
        (["run", "--env.training_tasks", "[500]"], "only training tasks may be trained on; asked for [500]"),
        (["run", "--comparison.methods", "[AD, 'os:path']"], "model 'os:path' is a module, not a class"),
        (
            ["run", "--comparison.methods", "[AD, RecurrentAD]", "--model.segments", "episode"],
            "leave segments and recent_steps alone",
        ),
        (["run", "--model.model", "RecurrentAD", "--model.memory_steps", "500"], "no window is that long"),
        (["run", "--model.memory_steps", "5"], "memory_steps is a setting of RecurrentAD alone"),
        (["run", "--model.recent_steps", "200"], "with recent_steps 200 and n_transit 200, nothing leaves"),
        (["run", "--model.kept_tokens", "5"], "kept_tokens has no effect without segments; set segments, or"),
        (
            ["run", "--comparison.methods", "[AD, RecurrentAD]", "--model.kept_tokens", "5"],
            "kept_tokens is no setting of RecurrentAD",
        ),
        (
            ["run", "--comparison.methods", "[AD, GistAD]", "--model.segments", "episode"],
            "with segments episode, AD is what GistAD is",
        ),
        (
            ["train", "--history", "x", "--model", "AD", "--model.kept_tokens", "5"],
            "kept_tokens has no effect",
        ),
        (["run", "--model.segments", "marks"], "segments marks close nothing while playing"),
        (["study", "guide", "--smal"], "unknown option --smal (did you mean --small?)"),
        (["study", "guide", "--processes", "2"], "(did you mean --process?)"),
        (["report", "--figure", "png"], "(did you mean --figures?)"),
        (["run", "--env", "os:path"], "task family 'os:path' is a module, not a class or function"),
        (
            ["run", "--algorithm", "os:getcwd"],
            "learner 'os:getcwd' is a builtin_function",
        ),
        (["run", "--model", ":"], "cannot import ''"),
        (["mark", "x.hdf5", "--device", "cpu"], "cad mark does not take --device"),
    ],
)
def test_usage_errors_are_one_line_and_start_nothing(run, tmp_path, words, cause):
    code, out, lines = run(*words)
    assert (code, out) == (2, "")
    (line,) = errors(lines)
    assert cause in line
    assert len(lines) == 1
    assert not list(tmp_path.iterdir())


def test_several_mistakes_are_reported_together(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  tf_n_layers: 2\n  dropout: 1.5\nenvironment: {}\n")
    code, _, lines = run(
        "run", "--config", "mine.yaml", "--marker.compression_window", "0", "--env", "drakroom"
    )
    assert code == 2
    assert len(errors(lines)) == len(lines) == 5
    for part in (
        "mine.yaml:2: unknown key 'model.tf_n_layers' (did you mean 'tf_n_layer'?)",
        "mine.yaml:3: model.dropout must be a number of at least 0 and below 1, got 1.5",
        "mine.yaml:4: unknown key 'environment'",
        "--marker.compression_window: ",
        "--env: env: unknown task family 'drakroom'",
    ):
        assert any(part in line for line in lines), part


def test_hostile_yaml_runs_nothing(run, tmp_path):
    (tmp_path / "x.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    code, _, lines = run("run", "--config", "x.yaml")
    assert code == 2
    assert "x.yaml:1: the tag" in errors(lines)[0]
    assert not (tmp_path / "made").exists()


def test_cuda_without_cuda_is_refused_before_anything_starts(run, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for dry in ([], ["--dry-run"]):
        code, _, lines = run("run", "--preset", "smoke", "--device", "cuda", *dry)
        assert (code, errors(lines)) == (2, ["device cuda: no CUDA device was found; use --device cpu"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- showing without doing


def test_print_config_reads_back(run, tmp_path):
    code, out, _ = run("run", "--preset", "smoke", "--model.lr", "3e-5", "--print-config")
    assert code == 0
    (tmp_path / "c.yaml").write_text(out)
    assert "lr: 3.0e-05" in out
    assert run("run", "--config", "c.yaml", "--print-config")[1] == out


def test_dry_runs_do_nothing(run, tmp_path, made):
    code, out, _ = run("run", "--preset", "smoke", "--dry-run")
    assert code == 0
    assert "Would make runs/smoke" in out
    assert "64,800 steps of ppo on darkroom" in out
    assert "roughly" in out
    for learner in ("rmax", "tabular"):
        out = run("collect", "--preset", "smoke", "--algorithm.learner", learner, "--dry-run")[1]
        assert re.search(f"64,800 steps of {learner} into .* \\(roughly", out)
    assert "Would collect" in run("collect", "--dry-run")[1]
    assert "Would train" in run("train", "--dry-run", *MODEL, "--history", made / NAME)[1]
    assert "Would mark 9 tasks" in run("mark", made / NAME, "--dry-run")[1]
    assert "already evaluated" in run("evaluate", made / "AD-darkroom-seed0", "--dry-run")[1]
    assert "Would write" in run("report", made / "AD-darkroom-seed0", "--dry-run")[1]
    assert not list(tmp_path.iterdir())


def test_list_and_doctor(run):
    code, out, _ = run("list")
    assert code == 0
    for word in (
        "darkroom_permuted",
        "sb3:RecurrentPPO",
        "on_policy_threshold=0.7",
        "CompressedADv2",
        "stitch",
        "benchmark/key_to_door",
        "algorithm/ppo_dr",
        "sample_efficiency",
    ):
        assert word in out
    assert re.search(r"CompressedADv2 +Another name of CompressedAD, from the guide\.", out)
    assert out.count("docs/from_the_guide.md") == 3  # once among markers, models and studies each
    code, out, _ = run("list", "presets")
    assert code == 0 and "smoke" in out and "benchmark" not in out
    code, out, _ = run("list", "families")
    assert "key_to_door" in out
    assert "threshold" not in out and "guide" not in out
    code, out, _ = run("doctor")
    assert code == 0
    assert "all well" in out
    for word in ("torch", "core(s)", "kernels", "sb3", "writable"):
        assert word in out


# ---------------------------------------------------------------- the single commands


def test_collect_prints_the_statistics_and_refuses_to_overwrite(run, tmp_path):
    code, out, lines = run("collect", *SMALL)
    assert code == 0
    assert f"note: {NAME}: the last tenth of the source's histories earns " in "\n".join(lines)
    assert out.startswith(f"datasets/{NAME}\nCompression Statistics:\n  Total steps: 540\n")
    before = tree(tmp_path)
    code, _, lines = run("collect", *SMALL)
    assert code == 1
    assert "exists; resume it, overwrite it" in errors(lines)[0]
    code, _, lines = run("collect", *SMALL, "--resume", "--algorithm.n_timesteps", "80")
    assert code == 1
    assert "config.n_timesteps: 60 there, 80 asked for" in errors(lines)[0]
    assert run("collect", *SMALL, "--resume")[0] == 0
    assert tree(tmp_path) == before
    assert run("collect", *SMALL, "--overwrite", "--algorithm.n_timesteps", "80")[0] == 0
    assert HistoryFile(tmp_path / "datasets" / NAME).n_step == 80


def test_it_is_told_when_kernels_are_compiled_first(run, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    code, _, lines = run("collect", *SMALL)
    assert code == 0 and lines[0].startswith("note: kernels are compiled first, once after installing")
    index = cache / "folder" / "kernels.update-1.py311.nbi"
    index.parent.mkdir(parents=True)
    index.touch()
    assert is_compiled(KERNELS["ppo"]) and not is_compiled(KERNELS["rmax"])
    os.utime(index, (0, 0))
    assert not is_compiled(KERNELS["ppo"])


def test_the_learner_must_fit_the_family_only_where_it_learns(run):
    code, _, (err,) = run("collect", "--env", "point_mass", "--dry-run")
    assert code == 2 and "ppo learns Discrete actions" in err
    code, _, (err,) = run("import", "--family", "point_mass", "nothing.hdf5")
    assert code == 1 and "nothing.hdf5" in err and "ppo" not in err


def test_mark_prints_the_statistics_of_the_guide(run, tmp_path, made):
    shutil.copy(made / NAME, "h.hdf5")
    code, out, _ = run("mark", "h.hdf5", "--marker", "all")
    assert code == 0
    assert "  Compressed steps: 540\n  Compression ratio: 100.0%" in out
    assert "What helps" not in out  # this marker has no threshold to raise
    assert HistoryFile("h.hdf5").marking["marker"] == "all"
    code, out, _ = run("mark", "h.hdf5", "--marker.on_policy_threshold", "0.001", "--output", "most.hdf5")
    assert code == 0 and "raise on_policy_threshold (try 0.8-0.9)" in out
    code, _, _ = run("mark", "h.hdf5", "--on", "x")
    assert code == 2
    code, out, _ = run("mark", "h.hdf5", "--marker.on_policy_threshold", "0.99", "--output", "copy.hdf5")
    assert (code, HistoryFile("h.hdf5").marking["marker"]) == (0, "all")
    assert "  Compressed steps: 0\n" in out
    assert HistoryFile("copy.hdf5").marking["parameters"]["on_policy_threshold"] == 0.99
    before = tree(tmp_path)
    code, _, lines = run("mark", "h.hdf5", "--output", "copy.hdf5")
    assert (code, errors(lines)) == (1, ["copy.hdf5 exists; choose another path"])
    assert tree(tmp_path) == before


def test_a_history_without_probabilities(run, tmp_path):
    learner = ["--algorithm.learner", "tests.cli.test_main:Blind"]
    code, _, lines = run("collect", *SMALL, *learner)
    assert code == 1
    assert "NaN" in errors(lines)[0]
    assert run("collect", *SMALL, *learner, "--marker", "none", "--out", "ok")[0] == 0
    file = next((tmp_path / "ok").glob("*.hdf5"))
    before = file.read_bytes()
    code, _, lines = run("mark", file, "--marker", "threshold")
    assert code == 1
    assert "marker 'threshold'" in errors(lines)[0]
    assert "NaN" in errors(lines)[0]
    assert file.read_bytes() == before


def test_inspect_and_its_plot(run, tmp_path, made, monkeypatch):
    wrong = cad("inspect", made / NAME, "--plot", "p.png", env={**os.environ, "MPLBACKEND": "nonsense"})
    assert wrong.returncode == 2
    assert re.search(r"error: matplotlib cannot be used: .*is the variable MPLBACKEND right", wrong.stderr)
    code, out, _ = run("inspect", made / NAME, "--plot", "figures/p.png", "--task", "3", "--steps", "30")
    assert code == 0
    assert "Tasks: 9 (6 train, 1 validation, 2 heldout)" in out
    assert (tmp_path / "figures" / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert run("inspect", made / NAME, "--plot", "p.pdf", "--task", "3")[0] == 0
    assert (tmp_path / "p.pdf").read_bytes()[:4] == b"%PDF"
    drawn = []
    trace = summarise_source(HistoryFile(made / NAME)).trace
    with monkeypatch.context() as patch:
        patch.setattr(
            histories, "probability_trace", lambda *_, **k: drawn.append((k["title"], k["first_step"]))
        )
        patch.setitem(style.FORMATS, "png", lambda figure: b"")
        assert run("inspect", made / NAME, "--plot", "r.png")[0] == 0
    ((title, first),) = drawn  # what the report shows
    assert title.split(", ", 1)[1] == trace.label.split(", ", 1)[1] and first == trace.first_step
    for words, cause in (
        (["--task", "99"], "has no task"),
        (["--stream", "4"], "--stream must lie in 0..0"),
        (["--first", "60"], "--first must lie in 0..59"),
        (["--plot", "p.txt"], "must end with .png, .svg, .pdf"),
    ):
        code, out, lines = run("inspect", made / NAME, "--plot", "q.png", *words)
        assert code in (1, 2)
        assert out == ""
        assert cause in errors(lines)[0]
    assert not (tmp_path / "q.png").exists()


@pytest.mark.parametrize("damage", ["foreign", "empty", "truncated", "flipped", "missing", "folder"])
def test_damaged_histories_are_named(run, tmp_path, made, damage):
    content = (made / NAME).read_bytes()
    middle = len(content) // 2
    path = tmp_path / "h.hdf5"
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {
                "foreign": b"PK\x03\x04 not a history",
                "empty": b"",
                "truncated": content[:middle],
                "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            }[damage]
        )
    before = tree(tmp_path)
    for words in (["inspect", path], ["mark", path], ["train", *MODEL, "--history", path]):
        code, out, lines = run(*words)
        assert (code, out) == (1, "")
        (line,) = errors(lines)
        assert "h.hdf5" in line
    assert tree(tmp_path) == before


def test_train_evaluate_compare_report(run, tmp_path, made):
    one = made / "AD-darkroom-seed0"
    code, out, _ = run("evaluate", one)
    assert code == 0
    assert out.startswith(f"{one}: final normalised return ")
    code, _, lines = run("evaluate", one, "--evaluation.temperature", "0.5")
    assert code == 1
    assert "was made with other settings; replace it with --overwrite" in errors(lines)[0]
    code, out, _ = run("compare", one)
    assert code == 0
    assert "Only one method was evaluated" in out
    code, out, _ = run("compare", one, "--format", "latex")
    assert code == 0 and r"\toprule" in out and r"Final return & " in out
    assert "did you mean 'latex'" in errors(run("compare", one, "--format", "latx")[2])[0]
    code, out, _ = run("report", one, "--figures", "pdf,svg")
    assert code == 0
    assert "Report: report/index.html" in out
    assert {p.suffix for p in (tmp_path / "report" / "figures").iterdir()} == {".pdf", ".svg"}
    assert {p.suffix for p in (tmp_path / "report" / "tables").iterdir()} == {".csv", ".md", ".tex"}
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["protocol"]["episodes"] == 3
    (tmp_path / "report" / "index.html").unlink()  # as if killed before the page
    assert run("report", one, "--dry-run")[0] == 0
    (tmp_path / "report" / "letter.txt").touch()
    code, _, lines = run("report", one)
    assert (code, errors(lines)) == (1, ["report: exists and is not a report; choose another --out"])


@pytest.mark.parametrize(
    ("scaled", "words"),
    [
        (0, ("final return ", "(2 held-out tasks; random play is as good as the optimum in all)")),
        (1, ("final normalised return ", "(1 of 2 held-out tasks; random play is as good as the optimum in")),
    ],
)
def test_tasks_without_a_scale_are_said(run, tmp_path, made, scaled, words):
    path = tmp_path / "AD-darkroom-seed0"
    shutil.copytree(made / path.name, path)
    with np.load(path / "evaluation.npz") as file:
        arrays = dict(file)
    del arrays["digest"]
    arrays["random"] = np.where(np.arange(2) < scaled, arrays["random"], arrays["optimal"])
    np.savez(path / "evaluation.npz", **arrays)
    code, out, _ = run("evaluate", path)
    assert code == 0 and all(word in out for word in words) and "nan" not in out
    code, out, _ = run("compare", path)
    assert code == 0 and "nan" not in out


def test_validation_tasks_without_a_scale_are_said(run, tmp_path, made):
    shutil.copy(made / NAME, tmp_path / "h.hdf5")

    def edit(file):
        file["random_return"][...] = file["optimal_return"][...]

    tamper(tmp_path / "h.hdf5", edit)
    code, _, lines = run("train", *MODEL, "--model", "AD", "--history", "h.hdf5", "--out", "o")
    assert code == 0 and any("cannot choose the best weights" in line for line in lines)
    assert len(HistoryFile(tmp_path / "h.hdf5").split.validation)


def test_nothing_held_out_is_said_instead_of_an_impossible_command(run, made):
    assert run("export", made / NAME, "--to", "npz", "--out", "all.npz")[0] == 0
    kwargs = json.dumps(HistoryFile(made / NAME).info.family_kwargs)
    words = ["--layout", "npz", "--family", "darkroom", "--env.kwargs", kwargs]
    assert run("import", "all.npz", *words, "--heldout", "", "--out", "none.hdf5")[0] == 0
    Path("own.yaml").write_text(f"family: darkroom\nkwargs: {kwargs}\nheldout: 3\nvalidation: 2\n")
    own = ["--layout", "npz", "--env", "own.yaml", "--split-seed", "0", "--out", "own.hdf5"]
    assert run("import", "all.npz", *own)[0] == 0
    split = HistoryFile("own.hdf5").split  # a file of one's own means the tasks that one has
    assert (len(split.heldout), len(split.validation)) == (3, 2)
    code, out, _ = run("train", *MODEL, "--history", "none.hdf5", "--model", "AD", "--out", "o")
    assert (code, out) == (0, "o/AD-darkroom-seed0: trained; none.hdf5 holds no held-out task\n")
    code, _, lines = run("evaluate", "o/AD-darkroom-seed0")
    (line,) = errors(lines)
    assert code == 2 and "none.hdf5: holds no held-out task" in line
    sizes = [f"--env.{key}" for key in ("heldout", "validation", "train")]
    two = [word for size in sizes for word in (size, "null")]
    code, _, lines = run("run", *SMALL, "--env.n_task", "2", *two, "--out", "two", "--dry-run")
    assert code == 2 and "too few tasks to hold one out" in errors(lines)[0]


def test_train_refuses_what_is_there(run, tmp_path, made):
    words = ["train", *MODEL, "--history", made / NAME, "--model", "AD", "--out", "out"]
    assert run(*words)[0] == 0
    before = tree(tmp_path)
    code, _, lines = run(*words)
    assert code == 1
    assert "exists; continue it with --resume" in errors(lines)[0]
    code, _, lines = run(*words, "--resume", "--model.lr", "0.25")
    assert code == 1
    assert (
        "belongs to another configuration and is left alone (model.lr: 0.003 there, 0.25" in errors(lines)[0]
    )
    assert run(*words, "--resume")[0] == 0
    assert tree(tmp_path) == before
    heldout = HistoryFile(made / NAME).split.heldout.tolist()
    code, _, lines = run(*words, "--seed", "1", "--env.training_tasks", heldout)
    assert (code, errors(lines)) == (
        2, [f"only training tasks may be trained on; asked for heldout tasks {heldout}"]
    )  # fmt: skip
    code, _, lines = run(*words, "--seed", "1", "--env.family", "key_to_door")
    assert code == 2
    assert "was collected on darkroom, not on key_to_door" in errors(lines)[0]
    code, _, lines = run(*words, "--seed", "1", "--env.kwargs.size", "7")
    assert code == 2
    assert "env.kwargs.size: " in errors(lines)[0] and ", not with 7" in errors(lines)[0]
    assert tree(tmp_path) == before


def test_train_says_which_histories_there_are(run, tmp_path, made):
    code, _, lines = run("train", *MODEL)
    assert code == 1
    assert errors(lines) == [f"datasets/{NAME}: no such history file; collect one with: cad collect"]
    (tmp_path / "datasets").mkdir()
    shutil.copy(made / NAME, tmp_path / "datasets" / NAME)
    code, _, lines = run("train", *MODEL, "--seed", "7")
    assert code == 1
    assert f"there is --history datasets/{NAME}" in errors(lines)[0]


def test_a_history_shorter_than_the_context_is_told_and_works(run, made):
    code, _, lines = run("train", *MODEL, "--model.n_transit", "90", "--history", made / NAME, "--out", "o")
    assert code == 0
    assert any(
        line.startswith("note: ") and "60 steps after its transforms, fewer than n_transit 90" in line
        for line in lines
    )


def test_a_model_on_a_family_with_other_spaces(run, made):
    assert run("collect", *SMALL, "--env.kwargs.size", "4", "--out", "other")[0] == 0
    before = tree(made)
    code, _, lines = run("evaluate", made / "AD-darkroom-seed0", "--history", f"other/{NAME}", "--overwrite")
    assert code == 1
    assert "observation space of darkroom: expected" in errors(lines)[0]
    assert tree(made) == before


def test_what_is_not_a_run_directory(run, tmp_path, made):
    (tmp_path / "x").mkdir()
    for command in ("evaluate", "compare", "report"):
        for path in (tmp_path / "x", made / NAME, tmp_path / "none"):
            code, _, lines = run(command, path)
            assert code == 1
            assert re.search("not a run directory|no such run directory", errors(lines)[0])
    code, _, lines = run("inspect", made)
    assert code == 1
    assert errors(lines)[0].endswith(f"is a folder, not a history file; in it lies {made / NAME}")


def test_damaged_checkpoints_are_named(run, tmp_path, made):
    path = tmp_path / "AD-darkroom-seed0"
    shutil.copytree(made / path.name, path)
    (path / "evaluation.npz").unlink()
    content = (path / "best_model.pt").read_bytes()
    (path / "best_model.pt").write_bytes(content[: len(content) // 2])
    code, _, lines = run("evaluate", path)
    assert code == 1
    assert "best_model.pt: damaged" in errors(lines)[0]
    assert not (path / "evaluation.npz").exists()


def test_a_damaged_evaluation_is_told_and_made_again(run, tmp_path, made):
    path = tmp_path / "AD-darkroom-seed0"
    shutil.copytree(made / path.name, path)
    evaluation = path / "evaluation.npz"
    whole = evaluation.read_bytes()
    evaluation.write_bytes(whole[: len(whole) // 2])
    code, out, lines = run("evaluate", path)
    assert code == 0 and "final normalised return" in out
    assert f"note: {evaluation} is damaged; it will be made again" in lines
    assert evaluation.read_bytes() == whole
    code, _, lines = run("evaluate", path)
    assert code == 0 and not any("damaged" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        ("train --history HISTORY --out file", 1, "-seed0: cannot be written to (Not a directory)"),
        ("collect --out file", 1, "_compressed.hdf5: cannot be written to (File exists)"),
        ("collect --out LONG", 1, "_compressed.hdf5: cannot be written to (File name too long)"),
        ("run --out file", 1, "file: is a file; choose another output folder"),
        ("run --model bad:M", 2, "bad:M"),
        (
            "run --model CompressedADv2",
            2,
            "model.model: cad run does not train CompressedADv2; it trains AD, Comp",
        ),
        ("compare RUNS --dry-run", 2, "cad compare does not take --dry-run"),
        (
            "compare RUNS",
            1,
            "RUNS: is not a run directory (no config.yaml); runs lie in it: RUNS/AD-darkroom-seed0",
        ),
        ("attention RUNS", 1, "runs lie in it: RUNS/AD-darkroom-seed0"),
        ("study file --tables .", 2, "file"),
        ("study STUDY --tables .", 2, "--tables .: no such file; name a study's table.csv"),
        ("report RUN --out file", 1, "file: exists and is not a report"),
    ],
)
def test_odd_paths_and_names_are_one_line(run, tmp_path, made, words, code, cause):
    (tmp_path / "file").write_text("words")
    one, study = made / "AD-darkroom-seed0", config_folder().parent / "studies" / "context.yaml"
    names = {"HISTORY": made / NAME, "RUNS": made, "RUN": one, "LONG": "x" * 300, "STUDY": study}
    for name, path in names.items():
        words, cause = (re.sub(rf"\b{name}\b", str(path), text) for text in (words, cause))
    small = ["--preset", "smoke"] if words.split()[0] in ("train", "collect", "run") else []
    found, _, lines = run(*words.split(), *small)
    assert found == code, lines
    assert cause in errors(lines)[0]
    assert not any("internal error" in line for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


# ---------------------------------------------------------------- the main job


def test_run_again_says_the_same_and_changes_nothing_that_took_time(run, smoke: SmokeRun):
    watched = [p for p in smoke.out.rglob("*") if p.suffix in (".hdf5", ".pt", ".npz", ".jsonl", ".yaml")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    code, out, _ = run("run", "--preset", "smoke", "--out", smoke.out)
    assert (code, out) == (0, smoke.stdout)
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    assert "4 of 4 finished" in run("run", "--preset", "smoke", "--out", smoke.out, "--dry-run")[1]


def test_a_damaged_evaluation_of_a_run_is_told_and_made_again(run, tmp_path, smoke: SmokeRun):
    words = ["run", "--preset", "smoke", "--out", tmp_path / "run"]
    shutil.copytree(smoke.out, tmp_path / "run")
    evaluation = tmp_path / "run" / "AD-darkroom-seed0" / "evaluation.npz"
    whole = evaluation.read_bytes()
    evaluation.write_bytes(whole[: len(whole) // 2])
    out = run(*words, "--dry-run")[1]
    assert "3 of 4 finished" in out and "4 of 4 finished" in out  # evaluated, trained
    code, _, lines = run(*words)
    assert code == 0 and f"note: {evaluation} is damaged; it will be made again" in lines
    assert evaluation.read_bytes() == whole


def test_an_own_marker_must_not_change_under_its_runs(run, tmp_path, monkeypatch):
    def write(rule: str) -> None:
        Path("changing.py").write_text(f"def rule(rewards):\n    return rewards {rule}\n")
        monkeypatch.delitem(sys.modules, "changing", raising=False)
        shutil.rmtree("__pycache__", ignore_errors=True)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    write("> 0")
    small = ["--comparison.runs", 1, "--model.steps", 3, "--evaluation.episodes", 2]
    words = ["run", "--preset", "smoke", *small, "--marker", "changing:rule", "--out", "o"]
    code, _, lines = run(*words)
    assert code == 0 and not errors(lines)
    (history,) = Path("o").glob("*.hdf5")
    write(">= 0")
    before = tree(tmp_path / "o")
    code, _, lines = run(*words)
    assert code == 1 and "was begun with other marks than changing:rule gives now" in errors(lines)[0]
    assert {**tree(tmp_path / "o"), "seconds.json": b""} == {**before, "seconds.json": b""}
    assert run("mark", history, "--marker", "changing:rule")[0] == 0
    code, _, lines = run(*words)
    assert code == 1 and "it was marked anew by changing:rule, whose code may be another" in errors(lines)[0]


def test_histories_without_an_episodes_end_are_refused_before_they_are_collected(run, tmp_path):
    words = [
        *SMALL,
        "--env.kwargs",
        "{size: 3, horizon: 500}",
        "--model.transforms",
        "[{name: subsample, every: 3}]",
    ]
    code, _, lines = run("run", *words, "--out", "r")
    assert code == 2 and "subsample keeps complete episodes, but none of darkroom ends" in errors(lines)[0]
    assert not list(tmp_path.glob("r/*.hdf5*"))


def test_run_in_a_folder_of_another_configuration(run, tmp_path, smoke: SmokeRun):
    before = tree(smoke.out)
    code, out, lines = run(
        "run", "--preset", "smoke", "--out", smoke.out, "--model.lr", "1", "--env", "key_to_door"
    )
    assert (code, out) == (1, "")
    (line,) = errors(lines)
    assert "env.family: 'darkroom' there, 'key_to_door' asked for" in line
    assert "model.lr: 0.003 there, 1.0 asked for" in line
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    code, _, lines = run("run", "--preset", "smoke", "--out", "thesis")
    assert code == 1
    assert "is not a run directory (it has chapter.tex, but no config.yaml)" in errors(lines)[0]
    assert tree(smoke.out) == before
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_comparing_and_reporting_the_runs_of_a_job(run, smoke: SmokeRun):
    paths = sorted(smoke.out.glob("*-darkroom-seed*"))
    code, out, _ = run("compare", *paths)
    assert code == 0
    assert "Too few runs to compare CompressedAD with AD" in out
    out_of_compare = out
    code, out, _ = run("report", *paths, "--out", "mine")
    assert code == 0
    theirs = json.loads((smoke.out / "report" / "summary.json").read_text())
    ours = json.loads(Path("mine/summary.json").read_text())
    assert ours["methods"] == theirs["methods"]
    for command in ("evaluate", "compare", "report", "attention"):
        code, _, lines = run(command, smoke.out)
        assert code == 1
        assert f"is a folder of runs, not one; runs lie in it: {paths[0]}, " in errors(lines)[0]
    assert "Judged on held-out tasks" in out_of_compare
    assert out_of_compare.splitlines()[-1] in html.unescape(Path("mine/index.html").read_text())


# ---------------------------------------------------------------- the process


def test_internal_errors_are_one_line_unless_asked(run, monkeypatch):
    monkeypatch.setattr("compressed_ad.cli.listing.DOCTOR", Command(float))  # type: ignore[arg-type]
    code, _, (line,) = run("doctor")
    assert code == 1
    assert line.startswith("cad: error: internal error: TypeError: float() argument must be")
    code, _, lines = run("doctor", "--debug")
    assert code == 1
    assert lines[0].startswith("Traceback")


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 7 PiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_one_line(run, monkeypatch, error):
    def greedy(call: object) -> None:
        raise error

    monkeypatch.setattr("compressed_ad.cli.listing.DOCTOR", Command(greedy))
    code, _, (line,) = run("doctor")
    assert code == 1
    assert line.startswith("cad: error: not enough memory, choose something smaller: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("words", "target", "cause"),
    [("list markers", "/dev/full", "cannot be written"), ("--help", "/dev/full", "cannot be written"),
     ("list markers", "&-", "is closed")],
)  # fmt: skip
def test_an_unusable_standard_output_is_one_line(words, target, cause):
    done = subprocess.run(
        f"{sys.executable} -m compressed_ad {words} >{target}",
        shell=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("cad: error: the standard output ")
    assert cause in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_have_their_exit_codes(run, monkeypatch, number, code):
    def stopped(call: object) -> None:
        os.kill(os.getpid(), number)

    again = "the same command continues"
    monkeypatch.setattr("compressed_ad.cli.listing.DOCTOR", Command(stopped, continued=again))
    before = signal.getsignal(number)
    found, _, lines = run("doctor")
    assert (found, lines) == (code, [f"cad: stopped; what was finished is kept, and {again}"])
    assert signal.getsignal(number) is before


def test_a_polite_stop_waits_for_the_work_and_a_second_signal_does_not():
    stop, done = Stop(), []
    with stop.listening():
        with pytest.raises(KeyboardInterrupt), stop.politely():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("saved")
            assert stop()
        assert done == ["saved"]
        with pytest.raises(KeyboardInterrupt), stop.politely():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("not reached")
    assert done == ["saved"]


def test_a_signal_during_a_finaliser_still_stops(run, monkeypatch, capsys):
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(call: object) -> None:
        Dying()
        time.sleep(20)

    monkeypatch.setattr("compressed_ad.cli.listing.DOCTOR", Command(stopped))
    code, _, lines = run("doctor")
    assert (code, lines) == (143, ["cad: stopped; what was finished is kept"])


def test_a_closed_pipe_is_said_by_the_exit_code_alone():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "compressed_ad", "run", "--print-config"],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (process.returncode, process.stderr) == (1, "")


def test_the_real_command_line_fails_with_the_right_code():
    done = cad("run", "--model.lr", "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cad: error: --model.lr: model.lr must be a number above 0, got -1\n"


def test_every_section_is_used_by_some_command():
    assert {section for name in COMMANDS for section in load_command(name).sections} == set(SECTIONS)
