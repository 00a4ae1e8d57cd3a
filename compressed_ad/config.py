"""Configuration: presets, YAML files with ``include:``, overrides from the command line, one validation.

Values come in layers, each over the one before: a preset, the files of ``--config``, sections chosen by
name (``--env key_to_door``), dotted overrides (``--model.lr 3e-4``). Every mistake of all layers is reported
at once, each with the place where it was written. Imports no torch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from compressed_ad import tasks as tasks  # registers the built-in families
from compressed_ad import yaml_file
from compressed_ad.collect import choose_tasks, split_family
from compressed_ad.errors import ConfigError, SpaceError, UnknownNameError, UsageError, nearest
from compressed_ad.learners.base import Checks
from compressed_ad.learners.select import make_learner
from compressed_ad.marking import find_marker, marker_faults, marker_parameters
from compressed_ad.registry import import_attribute
from compressed_ad.settings import (
    FROM_HISTORY,
    MODEL_NAMES,
    AlgorithmSettings,
    ComparisonSettings,
    Config,
    EnvSettings,
    MarkerSettings,
    ModelConfig,
    S,
    Settings,
    located_problems,
)
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.tasks.select import make_family
from compressed_ad.transforms import check_transforms
from compressed_ad.types import Split
from compressed_ad.yaml_file import Leaves

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
    inside = Path(__file__).parent / "config_files"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "config"


@dataclass(frozen=True)
class Request:
    """What a command line asks for, before anything is read."""

    preset: str = "default"
    files: tuple[Path, ...] = ()
    sections: Mapping[str, str] | None = None  # section -> file, shipped name, or name of its main thing
    overrides: Sequence[tuple[str, str]] = ()  # (dotted key, YAML text)


def load_config(request: Request) -> Config:
    """The validated configuration; ``ConfigError`` lists every mistake with its place."""
    leaves = request_leaves(request)
    config, found = validate(leaves)
    found += semantic_problems(leaves)
    if config is None or found:
        raise ConfigError(dict.fromkeys(found))
    return config


def explicit_keys(request: Request) -> set[str]:
    """Dotted keys that the request sets itself, beyond the preset."""
    bare = request_leaves(Request(preset=request.preset))
    return {".".join(path) for path, leaf in request_leaves(request).items() if bare.get(path) != leaf}


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


def validate(leaves: Leaves) -> tuple[Config | None, list[str]]:
    """The configuration, or None and what is wrong with it: types, ranges, unknown keys."""
    try:
        config, found = Config.model_validate(nested(leaves)), list[str]()
    except ValidationError as error:
        config, found = (
            None,
            [
                f"{origin(leaves, path) if path in leaves else _place(leaves, path, text)}: {text}"
                for path, text in located_problems(Config, error)
            ],
        )
    for path, (value, where) in leaves.items():
        free = path[0] in SECTIONS and path[1:2] in [(SECTIONS[path[0]][1],), ("transforms",)]
        if free and not all_finite(value):
            found.append(f"{where}: {'.'.join(path)}: numbers must be finite, got {value!r}")
    return config, found


def all_finite(value: Any) -> bool:
    """Whether no number in plain nested data is NaN or infinite."""
    if isinstance(value, Mapping):
        return all(all_finite(part) for part in value.values())
    if isinstance(value, list):
        return all(all_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def semantic_problems(leaves: Leaves) -> list[str]:
    """What types cannot tell: names that do not exist, parameters that do not fit, splits that do not add up.

    Each section is checked as far as it is valid itself, so that these come together with ``validate``'s.
    """
    tree, found = nested(leaves), list[str]()

    def attempt(path: tuple[str, ...], check: Callable[[], object]) -> bool:
        try:
            check()
        except (UsageError, SpaceError) as error:
            at = _main_key(path) if isinstance(error, UnknownNameError) else path
            for line in str(error).splitlines():
                found.append(f"{_place(leaves, at, line)}: {path[0]}: {line}")
            return False
        return True

    env = _valid(EnvSettings, tree.get("env"))
    algorithm = _valid(AlgorithmSettings, tree.get("algorithm"))
    marker = _valid(MarkerSettings, tree.get("marker"))
    model = _valid(ModelConfig, tree.get("model"))
    comparison = _valid(ComparisonSettings, tree.get("comparison"))
    there = attempt(("env", "kwargs"), lambda: make_family(env.family, env.kwargs))
    if there:
        seed = tree.get("seed")
        seed = seed if isinstance(seed, int) and seed >= 0 else 0
        attempt(("env", "n_task" if env.n_task else "family"), lambda: planned_split(env, seed, seed))
    learner, kwargs = algorithm.learner, algorithm.learner_kwargs
    if attempt(("algorithm", "learner_kwargs"), lambda: make_learner(learner, kwargs)) and there:
        attempt(("algorithm", "learner"), lambda: _check_learner(env, algorithm))
    attempt(("marker", "params"), lambda: _check_marker(marker))
    attempt(("model", "model"), lambda: check_model_name(model.model))
    for transform in model.transforms:
        pair = (transform.name, transform.params)
        attempt(("model", "transforms"), functools.partial(check_transforms, [pair]))
    for name in comparison.methods:
        attempt(("comparison", "methods"), functools.partial(check_model_name, name))
    return found


def _check_learner(env: EnvSettings, algorithm: AlgorithmSettings) -> None:
    """Whether the learner can learn these tasks, as far as it can tell."""
    learner = make_learner(algorithm.learner, algorithm.learner_kwargs)
    if isinstance(learner, Checks):
        family = make_family(env.family, env.kwargs)
        learner.check(family, n_timesteps=algorithm.n_timesteps, n_stream=algorithm.n_stream)


def _valid(kind: type[S], values: Any) -> S:
    """``values`` without those that are invalid."""
    values = values if isinstance(values, dict) else {}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        bad = {mistake["loc"][0] for mistake in error.errors() if mistake["loc"]}
        sound = {key: value for key, value in values.items() if key not in bad}
        return _valid(kind, sound) if bad & set(values) else kind()


def _place(leaves: Leaves, path: tuple[str, ...], line: str) -> str:
    """Where the key of the section that ``line`` speaks of was written; the command line goes first."""
    said = line.partition("(did you mean")[0].replace("-", "")
    mentioned = [
        where
        for known, (_, where) in leaves.items()
        if known[0] == path[0] and re.search(rf"\b{re.escape(known[-1])}\b", said)
    ]
    there = [where for where in mentioned if where.startswith("--")] or mentioned
    if there:
        return there[0]
    found = origin(leaves, path)
    return origin(leaves, _main_key(path)) if found == NOWHERE else found


def planned_split(env: EnvSettings, seed: int, split_seed: int) -> Split:
    """The split that a collection gets; ``UsageError`` unless the family has as many tasks as it asks for."""
    family = make_family(env.family, env.kwargs)
    there = len(family.tasks())
    if there == 1:
        raise UsageError(
            f"{family.name} has one task; learning in context needs some to train on and others to be judged"
            " on. For a gymnasium environment, say what tasks differ in with --task-param KEY=LOW:HIGH"
        )
    chosen = choose_tasks(there, seed, env.n_task)
    return split_family(
        family, chosen, split_seed, train=env.train, validation=env.validation, heldout=env.heldout
    )


def _main_key(path: tuple[str, ...]) -> tuple[str, ...]:
    main = SECTIONS.get(path[0], (None, None))[0]
    return path if main is None or path[-1] == "transforms" else (path[0], main)


def _check_marker(settings: MarkerSettings) -> None:
    find_marker(settings.marker)
    problems = marker_faults(settings.marker, **marker_params(settings))
    if problems:
        raise ConfigError(problems[0].removeprefix("It cannot mark an ordinary history: "))


def check_model_name(name: str) -> None:
    """Raise ``UsageError`` for a model that is neither registered nor a class at ``module:attribute``."""
    if name in MODEL_NAMES:
        return
    if ":" not in name:
        raise UnknownNameError("model", name, MODEL_NAMES)
    if not isinstance(import_attribute("model", name), type):
        raise UsageError(f"model {name!r} is not a class")


def marker_params(settings: MarkerSettings) -> dict[str, Any]:
    """Keyword arguments for the marker: the guide's two where it has them, then ``params``."""
    known = marker_parameters(settings.marker)
    guide = ("on_policy_threshold", "compression_window")
    # A marker with its own idea of a threshold keeps it unless the threshold was set to something else.
    default = {key: MarkerSettings.model_fields[key].default for key in guide}
    chosen = {key: getattr(settings, key) for key in guide if key in known}
    kept = [key for key in chosen if chosen[key] == default[key] != known[key]]
    return {**{key: value for key, value in chosen.items() if key not in kept}, **settings.params}


def build_family(config: Config) -> TaskFamily:
    """The task family of ``config``."""
    return make_family(config.env.family, config.env.kwargs)


def transform_pairs(model: ModelConfig) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of ``model`` as ``apply_transforms`` takes them."""
    return [(spec.name, spec.params) for spec in model.transforms]


# ---------------------------------------------------------------- showing


def dump(config: Config) -> str:
    """``config`` as YAML that ``--config`` reads back, every value spelled out."""
    return dump_plain(config.model_dump(mode="json"))


def dump_plain(values: Mapping[str, Any]) -> str:
    """Plain nested data as YAML, strings quoted wherever they would read as something else."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(yaml_file.scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def describe(section: str) -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every setting of ``section``, "" for those of no section."""
    if not section:
        fields = {k: f for k, f in Config.model_fields.items() if k not in SECTIONS}
    else:
        fields = section_kinds()[section].model_fields
    prefix = f"{section}." if section else ""
    return [
        (prefix + name, show_value(field.get_default(call_default_factory=True)), _words(field))
        for name, field in fields.items()
        if not (section == "model" and name in FROM_HISTORY)
    ]


def _words(field: Any) -> str:
    text = field.description or ""
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        text = f"{' | '.join(choices)}{': ' if text else ''}{text}"
    return text


def show_value(value: Any) -> str:
    """A default in a help text, as one would write it in YAML."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    return str(value)


def differences(stored: Any, wanted: Any, prefix: str = "") -> list[str]:
    """``key: old there, new asked for`` for every key in which two nested values differ."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        lines: list[str] = []
        for key in dict.fromkeys([*stored, *wanted]):
            inner = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(stored.get(key), wanted.get(key), inner)
        return lines
    if stored == wanted:
        return []
    return [f"{prefix}: {_short(stored)} there, {_short(wanted)} asked for"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def suggest(flag: str) -> str:
    """For an unknown option ``flag`` (without dashes): the setting that was probably meant, or nothing."""
    keys = [key for section in ("", *SECTIONS) for key, _, _ in describe(section)]
    by_end = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = get_close_matches(flag, [*keys, *by_end], n=1, cutoff=0.6)
    return f" (did you mean --{by_end.get(close[0], close[0])}?)" if close else ""
