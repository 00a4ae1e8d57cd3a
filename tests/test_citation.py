"""CITATION.cff as the Citation File Format 1.2.0 asks for it, whose schema is not installed."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
KEYS = {"cff-version", "message", "title", "authors", "type", "abstract", "license", "keywords", "references"}


def test_the_citation_is_valid_and_cites_algorithm_distillation() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert set(found) <= KEYS and found["cff-version"] == "1.2.0" and found["type"] == "software"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["license"] == project["license"]
    assert found["authors"] == [{"name": "The compressed-ad authors"}]
    (paper,) = found["references"]
    assert paper["type"] == "article" and paper["year"] == 2022
    assert paper["authors"][0] == {"given-names": "Michael", "family-names": "Laskin"}
    for text in (found["message"], found["title"], found["abstract"], *found["keywords"], paper["title"]):
        assert isinstance(text, str) and text
