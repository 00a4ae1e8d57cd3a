"""Layers of a configuration: presets, YAML files with ``include:``, sections by name, dotted overrides.

Later layers override earlier ones. A layer is a set of leaves: for each path of keys a value, and the place
where it was written. Only syntax is checked here; the values are checked in ``runs.config``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compressed_ad.errors import ConfigError, nearest
from compressed_ad.runs import yaml_file
from compressed_ad.runs.settings import Config
from compressed_ad.runs.yaml_file import Leaves
from compressed_ad.settings import Settings

SECTIONS = {
    "env": ("family", "kwargs"),
    "algorithm": ("learner", "learner_kwargs"),
    "marker": ("marker", "params"),
    "model": ("model", None),
    "evaluation": (None, None),
    "comparison": (None, None),
}
"""Section -> (the key that names its object, the key of that object's free parameters)."""

NOWHERE = "configuration"

PRESETS = ("smoke", "default", "full", "study")


def config_folder() -> Path:
    """The shipped YAML files: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parents[1] / "config_files"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "config"


@dataclass(frozen=True)
class Request:
    """What a command line asks for, before any file is read."""

    preset: str = "default"
    files: tuple[Path, ...] = ()
    sections: Mapping[str, str] | None = None  # section -> file, shipped name, or object's name
    overrides: Sequence[tuple[str, str]] = ()  # (dotted key, YAML text)


def request_leaves(request: Request) -> Leaves:
    """All layers of ``request`` merged; ``ConfigError`` lists everything that cannot be read."""
    if request.preset not in PRESETS:
        hint = f"{nearest(request.preset, PRESETS)}; one of {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {request.preset!r}{hint}")
    leaves = read_file(config_folder() / f"{request.preset}.yaml")
    problems: list[str] = []
    for path in request.files:
        with _gathering(problems):
            _merge_file(leaves, path)
    for section, name in (request.sections or {}).items():
        with _gathering(problems):
            merge(leaves, _section_layer(leaves, section, name))
    with _gathering(problems):
        merge(leaves, override_leaves(request.overrides))
    if problems:
        raise ConfigError(problems)
    return leaves


@contextmanager
def _gathering(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)


def override_leaves(overrides: Sequence[tuple[str, str]]) -> Leaves:
    """The layer of (dotted key, YAML text) pairs; ``ConfigError`` lists the texts that are not YAML."""
    leaves: Leaves = {}
    problems: list[str] = []
    for key, text in overrides:
        with _gathering(problems):
            _put(leaves, yaml_file.parse(text, f"--{key}", tuple(key.split("."))))
    if problems:
        raise ConfigError(problems)
    return leaves


def resolve_sections(leaves: Leaves, layer: Leaves) -> Leaves:
    """``layer`` with every ``section: name`` replaced by what ``--section name`` means over ``leaves``."""
    named = {p: leaf for p, leaf in layer.items() if len(p) == 1 and p[0] in SECTIONS}
    resolved: Leaves = {}
    for (section,), (name, where) in named.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {section} must be a name or settings, got {name!r}")
        resolved |= _section_layer(leaves, section, name)
    return resolved | {p: leaf for p, leaf in layer.items() if p[:1] not in named}


def merge(leaves: Leaves, layer: Leaves) -> None:
    """Put ``layer`` over ``leaves``, in place.

    A layer that names another family, learner or marker drops the parameters of the earlier one. So does a
    layer that names the same one and gives parameters.
    """
    for section, (main, free) in SECTIONS.items():
        if main is None or free is None or (section, main) not in layer:
            continue
        old, new = leaves.get((section, main)), layer[section, main]
        gives_parameters = any(path[:2] == (section, free) for path in layer)
        if gives_parameters or old is None or old[0] != new[0]:
            _drop(leaves, (section, free))
    _put(leaves, layer)


def _put(leaves: Leaves, layer: Leaves) -> None:
    for path, leaf in layer.items():
        _drop(leaves, path)
        for n in range(1, len(path)):
            leaves.pop(path[:n], None)
        leaves[path] = leaf


def _drop(leaves: Leaves, path: tuple[str, ...]) -> None:
    for known in [p for p in leaves if p[: len(path)] == path]:
        del leaves[known]


def read_file(path: Path) -> Leaves:
    """The leaves of a configuration file and of what it includes.

    ``include: {env: env/darkroom.yaml, ...}`` names a file for each section, relative to the including file
    or to the shipped folder; ``include: other.yaml``, or a list, names whole configurations. The file itself
    overrides what it includes. An included section replaces the whole section, as ``--env FILE`` does:
    nothing of it remains from earlier files or from the preset.
    """
    leaves: Leaves = {}
    _merge_file(leaves, path)
    return leaves


def _merge_file(leaves: Leaves, path: Path, including: tuple[Path, ...] = ()) -> set[str]:
    """Merge a file into ``leaves``, or nothing if it is wrong; return the sections that it replaces."""
    layer, replaced = _file_layer(path, including)
    for section in replaced:
        _drop(leaves, (section,))
    merge(leaves, layer)
    return replaced


def _file_layer(path: Path, including: tuple[Path, ...]) -> tuple[Leaves, set[str]]:
    """The leaves of a file and of what it includes, and the sections that it replaces."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself")
    file = yaml_file.read(path)
    _refuse_bare_section(path, file)
    leaves: Leaves = {}
    replaced = set[str]()
    for key in [p for p in file if p[0] == "include"]:
        value, where = file.pop(key)
        if len(key) == 2 and key[1] in SECTIONS and isinstance(value, str):
            replaced.add(key[1])
            merge(leaves, _section_file(key[1], _find(path.parent, value, where)))
        elif len(key) == 1 and isinstance(value, str | list) and value:
            for name in [value] if isinstance(value, str) else value:
                whole = _find(path.parent, str(name), where)
                replaced |= _merge_file(leaves, whole, (*including, path.resolve()))
        else:
            raise ConfigError(
                f"{where}: include must be a file, a list of files, or a file for each of "
                f"{', '.join(SECTIONS)}; got {'.'.join(key[1:]) or 'nothing'}: {value!r}"
            )
    merge(leaves, file)
    return leaves, replaced


def _refuse_bare_section(path: Path, leaves: Leaves) -> None:
    """A section's file given as a whole configuration deserves a better message than its unknown keys."""
    keys = {p[0] for p in leaves}
    if not keys or keys & {*Config.model_fields, "include"}:
        return
    for section, kind in section_kinds().items():
        if keys <= set(kind.model_fields):
            raise ConfigError(f"{path}: holds only the section {section!r}; give it as --{section} {path}")


def _find(beside: Path, name: str, where: str, shipped: Path | None = None) -> Path:
    folders = [beside, shipped or config_folder()]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{where}: no such file: {name} (looked in {folders[0]} and {folders[1]})")


def _section_layer(leaves: Leaves, section: str, name: str) -> Leaves:
    """The layer that ``--SECTION NAME`` means; a file replaces the whole section in ``leaves``."""
    where = f"--{section}"
    shipped = config_folder() / section
    if name.endswith((".yaml", ".yml")):
        file = _find(Path(), name, where, shipped)
    else:
        file = shipped / f"{name}.yaml"
    if file.is_file():
        _drop(leaves, (section,))
        return _section_file(section, file)
    main, _ = SECTIONS[section]
    if main is None:
        raise ConfigError(f"{where}: no such file: {name}")
    return {(section, main): (name, where)}


def _section_file(section: str, path: Path) -> Leaves:
    return {(section, *inner): leaf for inner, leaf in yaml_file.read(path).items()}


# ---------------------------------------------------------------- validation


def section_kinds() -> dict[str, type[Settings]]:
    """The settings class of each section."""
    return {name: cast(type[Settings], Config.model_fields[name].annotation) for name in SECTIONS}


def nested(leaves: Leaves) -> dict[str, Any]:
    """Leaves as nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, (value, _) in leaves.items():
        at = tree
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = value
    return tree


def origin(leaves: Leaves, path: tuple[str, ...]) -> str:
    """Where the value at ``path`` was written; if it was not, the nearest key above it, or one below it."""
    for n in range(len(path), 0, -1):
        if path[:n] in leaves:
            return leaves[path[:n]][1]
    return next((where for known, (_, where) in leaves.items() if known[: len(path)] == path), NOWHERE)
