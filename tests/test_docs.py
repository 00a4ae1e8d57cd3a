"""README and docs: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import gymnasium
import pytest

from compressed_ad.cli.call import Stop
from compressed_ad.cli.main import main, parse
from compressed_ad.histories.exchange.formats import write_ancestor
from compressed_ad.histories.file import HistoryFile
from compressed_ad.runs.directory import extras
from tests.conftest import SmokeRun
from tests.histories.published_data import write_all
from tests.test_layering import ROOMS

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
GUIDES += [ROOT / "benchmarks" / "README.md", ROOT / "torture" / "README.md"]
NAME = "history_darkroom_PPO_alg-seed0_compressed.hdf5"


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a page; those inside a list are moved to the left margin."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def commands(page: Path) -> list[list[str]]:
    """The words after ``cad`` of every command line, without comments and what follows a pipe."""
    found = []
    for block in blocks(page, r"(?:bash|sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words and Path(words[0]).name == "cad":
                stop = [k for k, word in enumerate(words) if word in ("&&", "|", ";", ">", "2>&1")]
                found.append(words[1 : min(stop, default=len(words))])
    return found


COMMANDS = [
    pytest.param(page, c, id=f"{page.name}: {' '.join(c)[:70]}")
    for page in PAGES
    for c in commands(page)
    if page.name != "own_environment.md"  # whose commands really run: see test_own_environment
]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, smoke: SmokeRun, published: Path) -> Path:
    """Where a reader could be: the examples, the modules that pages name, a finished ``runs/smoke``, data."""
    place = tmp_path_factory.mktemp("reader")
    shutil.copytree(smoke.out, place / "runs" / "smoke")
    for run in ("AD-darkroom-seed0", "CompressedAD-darkroom-seed0"):
        shutil.copytree(smoke.out / run, place / "runs" / run)
    (place / "data").symlink_to(published)
    (place / "datasets").mkdir()
    for copy in (f"datasets/{NAME}", f"runs/{NAME}", "FILE.hdf5"):
        shutil.copy(smoke.out / NAME, place / copy)
    old = place / "old" / "histories.hdf5"
    write_ancestor(HistoryFile(smoke.out / NAME), old, False, lambda tasks: None)
    for example in EXAMPLES:
        shutil.copy(example, place)
    for name in ("studies", "results"):
        shutil.copytree(ROOT / name, place / name)
    for page in PAGES:
        for block in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", block):
                (place / named[1]).write_text(block)
    return place


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Path) -> Iterator[Path]:
    """A place of its own like that of the ``reader``. Files are links: nothing here writes into one."""
    shutil.copytree(reader, tmp_path, copy_function=os.link, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)
    for own in ("Ring-v0", "Machine-v0"):
        gymnasium.registry.pop(own, None)


@pytest.fixture
def after_make_run(folder: Path) -> Path:
    """The same, and a finished ``runs/default``, though of the smoke preset."""
    shutil.copytree(folder / "runs" / "smoke", folder / "runs" / "default", copy_function=os.link)
    return folder


PYTHON = [
    page for page in PAGES if blocks(page, "python") and page.name != "guide.md"
]  # test_guide runs that


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page: Path, after_make_run: Path) -> None:
    scope: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec", dont_inherit=True), scope)


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_commands_are_understood(page: Path, words: list[str], folder: Path) -> None:
    """Every option exists and every value is valid; what can be tried cheaply in docs/ is tried."""
    missing = [name for name, there in extras().items() if not there and f"--env {name}" in " ".join(words)]
    if missing:
        pytest.skip(f"the extra {missing[0]} is not installed")
    for file in words:
        if file.endswith((".yaml", ".yml")) and not (folder / file).exists() and "--" not in file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}\n")
    try:
        call = parse(words, Stop())
    except SystemExit as error:  # --help, --version
        assert not error.code
        return
    if "print_config" in call.options:  # a command with settings
        with suppress(SystemExit):  # where a dry run would need code of one's own
            call.config()
    if page == ROOT / "README.md":
        return
    quick = call.name in ("list", "inspect", "compare", "doctor", "check")
    assert main(words if quick or call.options.dry_run else [*words, "--dry-run"]) == 0


def test_the_commands_of_the_readme_run_from_top_to_bottom(after_make_run: Path) -> None:
    """What takes long is reduced to the smoke preset, or to a dry run."""
    for words in commands(ROOT / "README.md"):
        dry = ["--dry-run"] if words[0] in ("run", "collect", "study") else []
        smaller = ["--preset", "smoke"] if words[0] == "train" else []
        assert main([*words, *dry, *smaller]) == 0, words
    assert (after_make_run / "marks.png").exists()


INNER = re.compile(r"\bcompressed_ad\.(?!py\b)\w+")
"""A module inside the package, imported or named; links to its files are fine."""


SHOWN = [*PAGES, *sorted((ROOT / "examples").rglob("*.py"))]


@pytest.mark.parametrize("file", SHOWN, ids=lambda file: file.name)
def test_users_are_shown_no_inner_modules(file: Path) -> None:
    """Everything that pages and examples use is imported ``from compressed_ad``."""
    assert INNER.findall(file.read_text("utf-8")) == []


def test_inner_modules_are_recognised() -> None:
    inner = [
        "from compressed_ad.types import Split",
        "import compressed_ad.models.ad",
        "`compressed_ad.tasks.conformance.family_problems` returns those",
        "--learner compressed_ad.learners.ppo:BatchedPPO",
    ]
    fine = [
        "from compressed_ad import Split",
        "import compressed_ad",
        "python -m compressed_ad",
        "[tasks/base.py](../compressed_ad/tasks/base.py)",
        "[models/compressed_ad.py](../compressed_ad/models/compressed_ad.py)",
        "--env own_family:WindyRing",
    ]
    assert [text for text in inner if not INNER.search(text)] == []
    assert [text for text in fine if INNER.search(text)] == []


PACKAGE = ROOT / "compressed_ad"


def spine() -> list[Path]:
    """The files that CONTRIBUTING names for reading, in order."""
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## The code")[2]
    files = []
    for line in section.split("```")[1].strip("\n").splitlines():
        room, names = line[:12].strip(), re.split(r" {2,}", line[12:])[0]
        files += [PACKAGE / room / f"{name}.py" for name in names.split()]
    return files


def test_the_files_to_read_in_one_evening_exist_and_are_as_long_as_said() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    said = re.search(r"read these (\d+) files in this order, about ([\d,]+) lines", text)
    assert said is not None
    assert [str(file) for file in spine() if not file.is_file()] == []
    assert len(set(spine())) == len(spine()) == int(said[1])
    lines, about = sum(len(file.read_text().splitlines()) for file in spine()), int(said[2].replace(",", ""))
    assert 0.85 * about < lines < 1.15 * about, f"CONTRIBUTING says about {about}; it is {lines}"


def test_contributing_names_every_room_in_import_order() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## The code")[2]
    assert re.findall(r"^\| `(\w+)/` \|", section, re.MULTILINE) == ROOMS
    assert [file.parent.relative_to(PACKAGE).parts[:1] for file in spine()] == sorted(
        (file.parent.relative_to(PACKAGE).parts[:1] for file in spine()),
        key=lambda room: ROOMS.index(room[0]) if room else -1,
    )


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`([\w/.-]+(?:\.(?:py|toml|md)|/))`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"


def test_tables_of_results_are_those_of_the_kept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page shows what the kept rows say today."""
    monkeypatch.syspath_prepend(str(ROOT / "results"))  # as if its scripts were called
    experiments = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    assert runpy.run_path(str(ROOT / "results" / "experiments.py"))["filled"](experiments) == experiments
    for page, filled in runpy.run_path(str(ROOT / "results" / "update.py"))["filled"]().items():
        assert page.read_text("utf-8") == filled, page


def test_code_shown_from_an_example_is_that_of_the_example() -> None:
    shown = next(
        block for block in blocks(ROOT / "docs" / "extending.md", "python") if "def after_reward" in block
    )
    function = shown[shown.index("def after_reward") :]
    assert function in (ROOT / "examples" / "own_marker.py").read_text("utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, folder: Path) -> None:
    arguments = [f"runs/smoke/{NAME}"] if "FILE" in example.read_text("utf-8") else []
    done = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
