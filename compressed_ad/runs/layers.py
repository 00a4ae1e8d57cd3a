"""Layers of a configuration: presets, YAML files with ``include:``, sections by name, dotted overrides.

Later layers override earlier ones. A layer is a set of leaves: for each path of keys a value, and the place
where it was written. Only syntax is checked here; the values are checked in ``runs.config``. At the end:
what help texts say of the settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

from compressed_ad.errors import ConfigError, nearest
from compressed_ad.models.settings import FROM_HISTORY
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

_FILES = 30
YAML = (".yaml", ".yml")
PRESETS = ("smoke", "default", "full", "study")


def config_folder(kind: str = "config") -> Path:
    """The shipped YAML files of a kind: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parents[1] / f"{kind}_files"
    return inside if inside.is_dir() else Path(__file__).parents[2] / kind


def _by_name(top: Path, *patterns: str) -> dict[str, Path]:
    files = sorted(file for pattern in patterns for file in top.glob(pattern))
    return {file.relative_to(top).with_suffix("").as_posix(): file for file in files}


def shipped_configs() -> dict[str, Path]:
    """The shipped whole configurations by name: ``default``, ``benchmark/darkroom``, ..."""
    return _by_name(config_folder(), "*.yaml", "benchmark/*.yaml")


def shipped_sections() -> dict[str, Path]:
    """The shipped sections by name: ``algorithm/ppo_dr`` is what ``--algorithm ppo_dr`` means."""
    return _by_name(config_folder(), *(f"{section}/*.yaml" for section in SECTIONS))


def shipped_studies() -> dict[str, Path]:
    """The shipped study files by name."""
    return _by_name(config_folder("studies"), "*.yaml")


def config_file(name: Path, where: str = "--config") -> Path:
    """The file that ``--config NAME`` means: one of that path, or else a shipped one of that name.

    ``bandit`` also means ``benchmark/bandit``, as no other name ends with it.
    """
    return _shipped_file(name, shipped_configs(), f"{where} ", "configuration")


def study_file(name: Path) -> Path:
    """The file that ``cad study NAME`` means: one of that path, or else a shipped one of that name."""
    return _shipped_file(name, shipped_studies(), "", "study")


def _shipped_file(name: Path, shipped: Mapping[str, Path], where: str, kind: str) -> Path:
    key = name.as_posix().removesuffix(".yaml").removesuffix(".yml")
    short = [one for one in shipped if one.rpartition("/")[2] == key]
    key = short[0] if key not in shipped and len(short) == 1 else key
    if name.is_file():
        return name
    if key not in shipped:
        if meant := [one for one in shipped if key.endswith(f"/{one}")]:
            raise ConfigError(f"{where}{name}: no such file; the shipped {kind} goes by the name {meant[0]}")
        if name.suffix:
            return name
        ends = dict.fromkeys(one.rpartition("/")[2] for one in shipped)
        hint = f"{nearest(key, [*shipped, *ends])}; shipped are {', '.join(shipped)}"
        raise ConfigError(f"{where}{name}: no such file or shipped {kind}{hint}")
    return shipped[key]


@dataclass(frozen=True)
class Request:
    """What a command line asks for, before any file is read."""

    preset: str = "default"
    files: tuple[Path, ...] = ()
    sections: Mapping[str, str] | None = None  # section -> file, shipped name, or object's name
    overrides: Sequence[tuple[str, str]] = ()  # (dotted key, YAML text)

    @property
    def name(self) -> str:
        """Of the last shipped configuration that is given by its name, or else of the preset."""
        named = {path: name for name, path in shipped_configs().items()}
        found = [config_file(file) for file in self.files if not file.is_file()]
        return named[found[-1]] if found and found[-1] in named else self.preset


def request_leaves(request: Request) -> Leaves:
    """All layers of ``request`` merged; ``ConfigError`` lists everything that cannot be read."""
    if request.preset not in PRESETS:
        hint = f"{nearest(request.preset, PRESETS)}; one of {', '.join(PRESETS)}"
        if any(request.preset in (name, name.rpartition("/")[2]) for name in shipped_configs()):
            hint = f"; it is a configuration: give it as --config {request.preset}"
        raise ConfigError(f"unknown preset {request.preset!r}{hint}")
    leaves = read_file(config_folder() / f"{request.preset}.yaml")
    problems: list[str] = []
    for path in request.files:
        with gathering(problems):
            merge_config(leaves, path)
    for section, name in (request.sections or {}).items():
        with gathering(problems):
            merge(leaves, _section_layer(leaves, section, name, f"--{section}"))
    with gathering(problems):
        merge(leaves, override_leaves(request.overrides))
    if problems:
        raise ConfigError(problems)
    return leaves


def merge_config(leaves: Leaves, name: Path, where: str = "--config") -> None:
    """Put what ``--config NAME`` means over ``leaves``, in place."""
    _merge_file(leaves, config_file(name, where))


@contextmanager
def gathering(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a ``ConfigError`` raised inside."""
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)


def override_leaves(overrides: Sequence[tuple[str, str]]) -> Leaves:
    """The layer of (dotted key, YAML text) pairs; ``ConfigError`` lists the texts that are not YAML."""
    leaves: Leaves = {}
    problems: list[str] = []
    for key, text in overrides:
        with gathering(problems):
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
        resolved |= _section_layer(leaves, section, name, where)
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
    above = {path[:n] for path in layer for n in range(1, len(path))}
    for known in list(leaves):
        if known in above or any(known[:n] in layer for n in range(1, len(known) + 1)):
            del leaves[known]
    leaves.update(layer)


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


def _merge_file(
    leaves: Leaves, path: Path, including: tuple[Path, ...] = (), opened: list[Path] | None = None
) -> set[str]:
    """Merge a file into ``leaves``, or nothing if it is wrong; return the sections that it replaces.

    ``including`` are the files that led here, and ``opened`` all that were read before.
    """
    opened = [] if opened is None else opened
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself")
    file = yaml_file.read(path)
    opened.append(path)
    if len(opened) > _FILES or sum(one.stat().st_size for one in opened) > yaml_file.MAX_BYTES:
        raise ConfigError(
            f"{opened[0]}: includes more than {_FILES} files, or {yaml_file.MAX_BYTES >> 10} KiB of them"
        )
    keys = {p[0] for p in file}
    if keys and not keys & {*Config.model_fields, "include"}:
        for section, kind in section_kinds().items():
            if keys <= set(kind.model_fields):
                raise ConfigError(
                    f"{path}: holds only the section {section!r}; give it as --{section} {path}"
                )
    layer: Leaves = {}
    replaced = set[str]()
    for key in [p for p in file if p[0] == "include"]:
        value, where = file.pop(key)
        if len(key) == 2 and key[1] in SECTIONS and isinstance(value, str):
            replaced.add(key[1])
            merge(layer, _section_file(key[1], _find(path.parent, value, where)))
        elif len(key) == 1 and isinstance(value, str | list) and value:
            for name in [value] if isinstance(value, str) else value:
                whole = _find(path.parent, str(name), where)
                replaced |= _merge_file(layer, whole, (*including, path.resolve()), opened)
        else:
            raise ConfigError(
                f"{where}: include must be a file, a list of files, or a file for each of "
                f"{', '.join(SECTIONS)}; got {'.'.join(key[1:]) or 'nothing'}: {value!r}"
            )
    merge(layer, file)
    for section in replaced:
        _drop(leaves, (section,))
    merge(leaves, layer)
    return replaced


def _find(beside: Path, name: str, where: str, shipped: Path | None = None) -> Path:
    folders = (beside, shipped or config_folder())
    if not name.endswith(YAML):  # messages about a file may quote it
        raise ConfigError(f"{where}: a configuration file ends with {' or '.join(YAML)}, not so {name}")
    for file in (folder / name for folder in folders):
        if file.is_file():
            return file
    raise ConfigError(f"{where}: no such file: {name} (looked in {folders[0]} and {folders[1]})")


def _section_layer(leaves: Leaves, section: str, name: str, where: str) -> Leaves:
    """The layer that ``--SECTION NAME`` means, said at ``where``; a file replaces the whole in ``leaves``."""
    shipped = config_folder() / section
    is_file = name.endswith(YAML)
    file = _find(Path(), name, where, shipped) if is_file else shipped / f"{name}.yaml"
    if file.is_file():
        _drop(leaves, (section,))
        return _section_file(section, file)
    main, _ = SECTIONS[section]
    if main is None:
        raise ConfigError(f"{where}: no such file: {name}")
    return {(section, main): (name, where)}


def _section_file(section: str, path: Path) -> Leaves:
    return {(section, *inner): leaf for inner, leaf in yaml_file.read(path).items()}


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


# ---------------------------------------------------------------- help texts


def describe(section: str) -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every setting of ``section``, "" for those of no section."""
    fields = section_kinds()[section].model_fields if section else Config.model_fields
    left_out = {"": tuple(SECTIONS), "model": FROM_HISTORY}.get(section, ())
    described = []
    for name, field in fields.items():
        if name not in left_out:
            key = f"{section}.{name}" if section else name
            choices = " | ".join(item for item in get_args(field.annotation) if isinstance(item, str))
            words = ": ".join(part for part in (choices, field.description) if part)
            described.append((key, show_value(field.get_default(call_default_factory=True)), words))
    return described


def show_value(value: Any) -> str:
    """``value`` as help texts show a default: as it is written in YAML."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    return str(value)


def suggest(flag: str, own: Sequence[str] = (), sections: Iterable[str] = SECTIONS) -> str:
    """The option that an unknown ``flag`` (without dashes) probably means, or nothing.

    A setting of that very name comes first, then the command's ``own`` options, then settings of its
    ``sections`` with another name.
    """
    keys = [key for section in ("", *sections) for key, _, _ in describe(section)]
    by_end = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = [f"--{by_end[flag]}"] if flag in by_end else get_close_matches(f"--{flag}", own, n=1, cutoff=0.75)
    if not close and flag in PRESETS and "--preset" in own:
        close = [f"--preset {flag}"]
    if not close:
        settings = get_close_matches(flag, [*keys, *by_end], n=1, cutoff=0.6)
        close = [f"--{by_end.get(key, key)}" for key in settings]
    return close[0] if close else ""
