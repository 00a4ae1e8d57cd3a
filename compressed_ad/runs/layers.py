"""Layers of a configuration: presets, YAML files with ``include:``, sections by name, dotted overrides.

Each goes over the one before. What comes of them are leaves: a value for each dotted key, with the place
where it was written. Nothing is validated here but that files and keys can be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
"""The sections; for each the key that names what it is about, and the free-form parameters of that."""

NOWHERE = "configuration"

PRESETS = ("smoke", "default", "full", "study")


def config_folder() -> Path:
    """Where the shipped YAML files are: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parents[1] / "config_files"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "config"


@dataclass(frozen=True)
class Request:
    """What a command line asks for, before anything is read."""

    preset: str = "default"
    files: tuple[Path, ...] = ()
    sections: Mapping[str, str] | None = None  # section -> file, shipped name, or name of its main thing
    overrides: Sequence[tuple[str, str]] = ()  # (dotted key, YAML text)


def request_leaves(request: Request) -> Leaves:
    """All layers of ``request`` merged; ``ConfigError`` for what cannot be read."""
    folder = config_folder()
    if request.preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"unknown preset {request.preset!r}{nearest(request.preset, PRESETS)}; one of {known}"
        )
    leaves = read_file(folder / f"{request.preset}.yaml")
    problems: list[str] = []

    def attempt(put: Callable[[], object]) -> None:
        try:
            put()
        except ConfigError as error:
            problems.extend(error.problems)

    for path in request.files:
        attempt(functools.partial(_put_file, leaves, path))
    for section, name in (request.sections or {}).items():
        attempt(lambda section=section, name=name: merge(leaves, _section(leaves, section, name)))  # type: ignore[misc]
    attempt(lambda: merge(leaves, override_leaves(request.overrides)))
    if problems:
        raise ConfigError(problems)
    return leaves


def override_leaves(overrides: Sequence[tuple[str, str]]) -> Leaves:
    """The layer of (dotted key, YAML text) pairs; ``ConfigError`` lists those that are not YAML."""
    leaves: Leaves = {}
    problems: list[str] = []
    for key, text in overrides:
        try:
            _put(leaves, _override(key, text))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return leaves


def resolve_sections(leaves: Leaves, layer: Leaves) -> Leaves:
    """``layer`` with every ``section: name`` spelled out, as ``--section name`` would be over ``leaves``."""
    named = {p[0]: leaf for p, leaf in layer.items() if len(p) == 1 and p[0] in SECTIONS}
    resolved: Leaves = {}
    for section, (name, where) in named.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {section} must be a name or settings, got {name!r}")
        resolved |= _section(leaves, section, name)
    return resolved | {p: leaf for p, leaf in layer.items() if p[:1] not in {(key,) for key in named}}


def _override(key: str, text: str) -> Leaves:
    where, path = f"--{key}", tuple(key.split("."))
    found = yaml_file.value(text, where)
    if isinstance(found, dict) and found:
        return {(*path, *inner): (value, where) for inner, value in _flat(found).items()}
    return {path: (found, where)}


def _flat(mapping: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat |= {(key, *inner): leaf for inner, leaf in _flat(value).items()}
        else:
            flat[key,] = value
    return flat


def merge(leaves: Leaves, layer: Leaves) -> None:
    """Put ``layer`` over ``leaves``, in place.

    Where a layer names another family, learner or marker, or the same one together with parameters, the
    parameters below are dropped.
    """
    for section, (main, free) in SECTIONS.items():
        if main is None or free is None or (section, main) not in layer:
            continue
        old, new = leaves.get((section, main)), layer[section, main]
        together = any(path[:2] == (section, free) for path in layer)
        if together or old is None or old[0] != new[0]:
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
    """The leaves of a configuration file with what it includes.

    ``include: {env: env/darkroom.yaml, ...}`` names a file for each section, relative to the including file
    or to the shipped folder; ``include: other.yaml``, or a list, names whole configurations. What the file
    says itself goes over what it includes. A section for which a file is included begins anew with it, as
    with ``--env FILE``: nothing of it remains from files before, or from the preset.
    """
    leaves: Leaves = {}
    _put_file(leaves, path)
    return leaves


def _put_file(leaves: Leaves, path: Path, including: tuple[Path, ...] = ()) -> set[str]:
    """Put a file over ``leaves``, in place, not at all if it is wrong; the sections that it begins anew."""
    layer, anew = _read_layer(path, including)
    for section in anew:
        _drop(leaves, (section,))
    merge(leaves, layer)
    return anew


def _read_layer(path: Path, including: tuple[Path, ...]) -> tuple[Leaves, set[str]]:
    """The leaves of a file with what it includes, and the sections that begin anew with it."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself")
    own = yaml_file.read(path)
    _check_top(path, own)
    leaves: Leaves = {}
    anew = set[str]()
    for key in [p for p in own if p[0] == "include"]:
        value, where = own.pop(key)
        if len(key) == 2 and key[1] in SECTIONS and isinstance(value, str):
            file = _find(path.parent, value, where)
            anew.add(key[1])
            merge(leaves, {(key[1], *inner): leaf for inner, leaf in yaml_file.read(file).items()})
        elif len(key) == 1 and isinstance(value, str | list) and value:
            for name in [value] if isinstance(value, str) else value:
                whole = _find(path.parent, str(name), where)
                anew |= _put_file(leaves, whole, (*including, path.resolve()))
        else:
            raise ConfigError(
                f"{where}: include must be a file, a list of files, or a file for each of "
                f"{', '.join(SECTIONS)}; got {'.'.join(key[1:]) or 'nothing'}: {value!r}"
            )
    merge(leaves, own)
    return leaves, anew


def _check_top(path: Path, leaves: Leaves) -> None:
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


def _section(leaves: Leaves, section: str, name: str) -> Leaves:
    """The layer that ``--<section> <name>`` stands for."""
    where = f"--{section}"
    shipped = config_folder() / section
    if name.endswith((".yaml", ".yml")):
        file: Path | None = _find(Path(), name, where, shipped)
    else:
        file = shipped / f"{name}.yaml"
    if file is not None and file.is_file():
        _drop(leaves, (section,))
        return {(section, *inner): leaf for inner, leaf in yaml_file.read(file).items()}
    main, _ = SECTIONS[section]
    if main is None:
        raise ConfigError(f"{where}: no such file: {name}")
    return {(section, main): (name, where)}


# ---------------------------------------------------------------- validation


def section_kinds() -> dict[str, type[Settings]]:
    """The settings class of each section."""
    return {name: _kind(Config.model_fields[name].annotation) for name in SECTIONS}


def _kind(annotation: Any) -> type[Settings]:
    assert isinstance(annotation, type)
    assert issubclass(annotation, Settings)
    return annotation


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
    """Where the value at ``path`` was written, or the nearest thing above or below it."""
    for n in range(len(path), 0, -1):
        if path[:n] in leaves:
            return leaves[path[:n]][1]
    for known, (_, where) in leaves.items():
        if known[: len(path)] == path:
            return where
    return NOWHERE
