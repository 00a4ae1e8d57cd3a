"""The page on own environments: the code is the example's, commands run, mistakes are said as it says."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest

from compressed_ad.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_environment.md").read_text("utf-8")
EXAMPLE = (ROOT / "examples" / "own_family.py").read_text("utf-8")
COLLECT = ["--algorithm.n_timesteps", "200", "--algorithm.n_process", "1"]
TRAIN = ["--model.steps", "4", "--model.validations", "1"]
SMALLER = {
    "collect": COLLECT,
    "train": TRAIN,
    "run": [*COLLECT, *TRAIN, "--comparison.methods", "[AD]", "--comparison.runs", "1"],
}
"""What makes the page's commands as quick as a test should be."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the reader is: the example, and the module that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file that is changed at once is read again
    (tmp_path / "own_family.py").write_text(EXAMPLE)
    (named,) = [block for block in blocks("python") if block.startswith("# own_gym.py\n")]
    (tmp_path / "own_gym.py").write_text(named)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for name in ("own_family", "own_gym"):
        sys.modules.pop(name, None)
    gymnasium.registry.pop("Ring-v0", None)


def test_the_code_is_that_of_the_example_and_is_at_most_50_lines() -> None:
    code = blocks("python")[0]
    assert code in EXAMPLE
    assert EXAMPLE[EXAMPLE.index(code) + len(code) :].lstrip().startswith("if __name__")
    strings = [
        node.body[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    docstrings = {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    written = [
        line
        for number, line in enumerate(code.splitlines(), start=1)
        if number not in docstrings and line.strip() and not line.strip().startswith("#")
    ]
    assert len(written) <= 50


def test_its_commands_run_and_say_what_it_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^(?=(?:\$ )?cad )", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            words = shlex.split(command.removeprefix("$ "))[1:]
            # The family's stages have run one by one by then, so that its run need not do them all again.
            dry = ["--dry-run"] if "runs/ring" in words else []
            code = main([*words, *SMALLER.get(words[0], []), *dry])
            out, err = capsys.readouterr()
            assert (code == 0) == ("cad: error" not in shown), (command, err)
            if shown:
                assert (out + err).splitlines() == shown.splitlines()
    assert (folder / "runs" / "AD-ring-seed0" / "evaluation.npz").exists()
    assert (folder / "runs" / "ring-gym" / "report" / "index.html").exists()


MISTAKES = re.findall(
    r"^```diff\n-([^\n]*)\n\+([^\n]*)\n```\n\n```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)


def test_every_mistake_is_tried() -> None:
    assert len(MISTAKES) == len(blocks("diff")) >= 5


@pytest.mark.parametrize(("right", "wrong", "said"), MISTAKES)
def test_a_mistake_is_said(
    right: str, wrong: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert EXAMPLE.count(right) == 1
    (folder / "own_family.py").write_text(EXAMPLE.replace(right, wrong))
    assert main(["check", "family", "own_family:WindyRing"]) == 1
    assert capsys.readouterr().err == said
