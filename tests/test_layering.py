"""Imports run one way, exotic libraries live in one file each, and the command line starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import compressed_ad

PACKAGE = Path(__file__).parents[1] / "compressed_ad"

# Reading order is import order: a file imports only from files before it.
LAYERS = """
errors types spaces seeding files registry settings flops
tasks.base tasks.replay tasks.bandit_kernels tasks.bandit_rules tasks.bandit tasks.grid tasks.gridworld
tasks.point_mass tasks tasks.gymnasium tasks.vector tasks.gymnasium_family
tasks.minigrid tasks.metaworld tasks.xland tasks.select tasks.conformance
markers marking hdf5 history_header scales histories overview layouts importing minari_export
learners learners.base learners.ppo_kernels learners.ppo_batch learners.ppo
learners.scripted learners.bandits learners.noise
learners.sb3_algorithms learners.sb3_probability learners.sb3_callback learners.sb3_policy learners.sb3
learners.select learners.conformance
collect sequences stitching transforms windows
models.transformer models.encoders models.heads models.ad models.compressed_ad models
checkpoints train agents evaluate rollouts attention border_tokens
stats results analysis plots plots_rollouts plots_regret page report
yaml_file config_layers config_text config run_directory workers ray_pool runs
run_data train_run judge_run inside plots_attention played sights pipeline
estimates study_file study_rows study study_tables plots_study study_page
progress commands study_command rollouts_command attention_command exchange_command check_command about
stopping command_options cli
"""
ORDER = LAYERS.split()

# A model's thin method plays through the evaluation, imported when called: the one reference that looks up.
UPWARD = {("models.ad", "evaluate")}

ONLY_IN = {
    "h5py": {"hdf5"},
    "stable_baselines3": {
        "learners.sb3",
        "learners.sb3_callback",
        "learners.sb3_policy",
        "learners.sb3_probability",
    },
    "matplotlib": {"plots", "plots_attention", "plots_regret", "plots_rollouts", "plots_study"},
    "jinja2": {"page"},
    "ray": {"ray_pool"},
    "minari": {"minari_export"},
    "minigrid": {"tasks.minigrid"},
    "metaworld": {"tasks.metaworld"},
    "xminigrid": {"tasks.xland"},
    "jax": {"tasks.xland"},
    "rich": {"progress", "report", "commands"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


def imports(path: Path) -> Iterator[str]:
    """What a file imports, anywhere but for types only."""
    tree = ast.parse(path.read_text())
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_stands_in_the_reading_order() -> None:
    assert sorted(ORDER) == sorted(name for name, _ in modules() if name)


def test_imports_run_one_way() -> None:
    place = {name: k for k, name in enumerate(ORDER)}
    for name, path in modules():
        if not name:
            continue
        for imported in imports(path):
            inner = imported.removeprefix("compressed_ad.")
            if inner != imported and inner in place and inner != name:
                upward = place[inner] >= place[name]
                assert not upward or (name, inner) in UPWARD, f"{name} imports {inner}, which stands after it"


def test_exotic_libraries_live_in_one_file_each() -> None:
    for library, allowed in ONLY_IN.items():
        users = {n for n, path in modules() if any(i.split(".")[0] == library for i in imports(path))}
        assert users <= allowed, f"{library} is imported by {sorted(users - allowed)}"


def test_help_and_config_errors_import_no_torch() -> None:
    code = """
import contextlib
import sys
from compressed_ad.cli import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print("torch" in sys.modules)
"""
    for args in (["--help"], ["train", "--help"], ["run", "--model.lrr", "3"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stdout.splitlines()[-1] == "False"


def test_the_public_surface() -> None:
    assert set(compressed_ad.__all__) == set(compressed_ad._HOME)
    # Once a module is imported, its package's attribute of that name is the module.
    assert not {name.split(".")[0] for name in ORDER} & set(compressed_ad.__all__)
    for name in compressed_ad.__all__:
        assert getattr(compressed_ad, name).__module__.startswith("compressed_ad") or name.isupper()
