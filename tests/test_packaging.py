"""One version, pinned packages, and files for a code host that say what is there."""

from __future__ import annotations

import re
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import compressed_ad
from compressed_ad.errors import MissingExtraError, install_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_is_that_of_the_newest_release_in_the_changelog() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    releases = [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", heading) for heading in headings[1:]]
    assert all(releases) and releases[0] is not None
    assert releases[0][1] == PROJECT["version"]
    dates = [release[2] for release in releases if release is not None]
    assert dates == sorted(dates, reverse=True)
    assert compressed_ad.__version__ == metadata.version("compressed-ad")


def test_every_package_that_an_extra_needs_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in pins}
    lines = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    needed = {re.split(r"[\[<>=; ]", line)[0].lower().replace("_", "-") for line in lines} - {"compressed-ad"}
    assert needed - pinned == set()
    assert len(pins) == len(pinned)


def test_the_readme_of_a_release_has_links_that_work_outside_the_repository() -> None:
    """The substitutions that CONTRIBUTING gives rewrite every relative link, and nothing in a code block."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    recipe = textwrap.dedent(re.findall(r"^ +```toml\n(.*?)^ +```", text, re.DOTALL | re.MULTILINE)[0])
    hook = tomllib.loads(recipe)["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    readme = released = (ROOT / "README.md").read_text("utf-8")
    for one in hook["substitutions"]:
        released = re.sub(one["pattern"], one["replacement"], released)
    code = re.compile(r"```.*?```|^    .*?$", re.DOTALL | re.MULTILINE)
    assert code.findall(released) == code.findall(readme)
    links = re.findall(r"\]\(([^)]+)\)", code.sub("", released))
    assert len(links) > 30
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_the_workflow_and_the_templates_name_what_exists() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert (
        {run.split()[1] for run in runs if run.startswith("make ")}
        == {"install", "lint", "test", "docs"}
        <= targets
    )
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    assert set(tested) == set(named) - {"3"}
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(template.read_text("utf-8"))


def test_a_missing_extra_is_installed_through_the_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("minigrid") == "pip install -e '.[minigrid]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("minigrid") == f"pip install -e '{ROOT}[minigrid]'"
    assert str(MissingExtraError("minigrid:ID", "minigrid")).endswith(install_command("minigrid"))


def test_or_by_name_where_there_is_no_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("compressed_ad.errors.__file__", str(tmp_path / "compressed_ad" / "errors.py"))
    needs = [
        "torch>=2.13",
        "minigrid>=3.2; extra == 'minigrid'",
        'jax>=0.10; extra == "xland"',
        "x; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    assert install_command("minigrid") == "pip install 'minigrid>=3.2'"
    assert install_command("xland") == "pip install 'jax>=0.10'"
