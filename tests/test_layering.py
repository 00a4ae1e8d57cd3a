"""Rooms import one way, optional libraries in one file each, and the command line starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import compressed_ad

PACKAGE = Path(__file__).parents[1] / "compressed_ad"

GROUND = ["errors", "types", "seeding", "files", "settings", "registry", "workers"]
ROOMS = [
    *("tasks", "marking", "models", "learners", "histories"),
    *("training", "evaluation", "report", "runs", "cli"),
]
"""Reading order is import order: a room imports from the ground and from rooms before it."""

STANDALONE = {"models": {"tasks", "histories", "marking"}, "marking": {"tasks"}}
"""Rooms that must not import from some of the rooms before them."""

# The one import against the order: a method of the models calls the evaluation, imported when it is called.
UPWARD = {("models.ad", "evaluation.evaluate")}

ONLY_IN = {
    "h5py": {"histories.hdf5"},
    "stable_baselines3": {f"learners.sb3.{n}" for n in ("learner", "callback", "probability")},
    "matplotlib": {"report.figures"},
    "jinja2": {"report.pages"},
    "ray": {"workers.on_ray"},
    "pandas": {"evaluation.data_frames"},
    "minari": {"histories.exchange.minari"},
    "minigrid": {"tasks.minigrid"},
    "metaworld": {"tasks.metaworld"},
    "xminigrid": {"tasks.xland"},
    "jax": {"tasks.xland"},
    "numba": {
        *("learners.ppo.kernels", "learners.ppo.vector_code"),
        *("learners.finite_kernels", "tasks.bandit_kernels"),
        *("models.training_kernels", "models.playing_kernels", "models.vector_code"),
    },
    "rich": {"cli", "report"},
}
"""Files, or whole rooms, that may import a library."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


NAMES = dict(modules())


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """What a file imports, except for type checkers; without ``lazy``, also not what its functions import."""
    tree = ast.parse(path.read_text())
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name)
        if for_types and node.test.id == "TYPE_CHECKING":  # type: ignore[attr-defined]
            left_out.update(ast.walk(node))
        if isinstance(node, ast.FunctionDef) and not lazy:
            left_out.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(path: Path, *, lazy: bool = True) -> set[str]:
    """The files of the package among a file's imports."""
    return {
        name.removeprefix("compressed_ad.")
        for name in imports(path, lazy=lazy)
        if name.startswith("compressed_ad.") and name.removeprefix("compressed_ad.") in NAMES
    }


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_file_is_in_a_room_or_on_the_ground() -> None:
    assert {room(name) for name in NAMES if name} == {*GROUND, *ROOMS, "__main__"}
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= 20


def test_rooms_import_one_way() -> None:
    place = {name: k for k, name in enumerate([*GROUND, *ROOMS, "__main__"])}
    for name, path in NAMES.items():
        for other in inner(path) if name else ():
            if room(name) == room(other) or (name, other) in UPWARD:
                continue
            assert place[room(other)] < place[room(name)], f"{name} imports {other}, which comes after it"
            assert room(other) not in STANDALONE.get(room(name), ()), f"{name} imports {other}"


def test_imports_have_no_circle_and_at_most_twelve_levels() -> None:
    graph = {name: inner(path, lazy=False) - {name} for name, path in NAMES.items() if name}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    level: dict[str, int] = {}
    for name in order:
        level[name] = 1 + max((level[other] for other in graph.get(name, ())), default=0)
    deepest = max(level, key=lambda name: level[name])
    assert level[deepest] <= 12, f"{deepest} imports through {level[deepest]} levels"


def test_optional_libraries_live_in_one_file_each() -> None:
    imported = {name: {module.split(".")[0] for module in imports(path)} for name, path in NAMES.items()}
    for library, allowed in ONLY_IN.items():
        users = {name for name, libraries in imported.items() if library in libraries}
        others = {n for n in users if not any(n == a or n.startswith(f"{a}.") for a in allowed)}
        assert not others, f"{library} is imported by {sorted(others)}"


def test_help_and_config_errors_import_nothing_heavy() -> None:
    code = """
import contextlib
import sys
from compressed_ad.cli.main import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
heavy = {"torch", "numba", "matplotlib", "scipy.stats", "scipy.special", "jinja2"}
print(sorted(heavy & set(sys.modules)))
"""
    for args in (["--help"], ["train", "--help"], ["run", "--model.lrr", "3"], ["mark", "no-such-file"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stdout.splitlines()[-1] == "[]", args


def test_no_file_has_the_name_of_a_public_name() -> None:
    """Importing a file ``x`` sets the attribute ``x`` of its package, which would hide a function ``x``."""
    assert compressed_ad.__all__ == sorted(compressed_ad._HOME) == dir(compressed_ad)
    files = {part for name in NAMES for part in name.split(".")}
    assert not files & set(compressed_ad.__all__)
    for name in compressed_ad.__all__:
        assert getattr(compressed_ad, name).__module__.startswith("compressed_ad") or name.isupper()
