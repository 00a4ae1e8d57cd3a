"""The configuration that a command line asks for, validated: every mistake of all its layers at once.

Types and ranges are the settings' own; names, parameters and splits are checked here. Each mistake is told
with the place where it was written. Imports no torch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from compressed_ad.errors import ConfigError, SpaceError, UnknownNameError, UsageError
from compressed_ad.learners.base import Checks
from compressed_ad.learners.select import make_learner
from compressed_ad.learners.settings import AlgorithmSettings
from compressed_ad.marking.apply import REQUIRED, find_marker, marker_faults, marker_parameters
from compressed_ad.marking.markers import MARKER
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.models import MODEL
from compressed_ad.models.settings import ModelConfig
from compressed_ad.runs.layers import NOWHERE, SECTIONS, Request, nested, origin, request_leaves
from compressed_ad.runs.settings import ComparisonSettings, Config
from compressed_ad.runs.yaml_file import Leaves
from compressed_ad.settings import S, problems
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.tasks.select import make_family
from compressed_ad.tasks.settings import EnvSettings
from compressed_ad.tasks.split import choose_tasks, split_family
from compressed_ad.training.transforms import check_transforms
from compressed_ad.types import Split

GUIDE_SETTINGS = ("on_policy_threshold", "compression_window")
"""Parameters of a marker that are settings of their own, because they are in the guide."""


def load_config(request: Request) -> Config:
    """The validated configuration; ``ConfigError`` lists every mistake with its place."""
    leaves = request_leaves(request)
    config, found = validate(leaves)
    found += semantic_problems(leaves)
    if config is None or found:
        raise ConfigError(dict.fromkeys(found))
    return with_marker_defaults(config)


def explicit_keys(request: Request) -> set[str]:
    """Dotted keys that the request sets itself, beyond the preset."""
    bare = request_leaves(Request(preset=request.preset))
    return {".".join(path) for path, leaf in request_leaves(request).items() if bare.get(path) != leaf}


def validate(leaves: Leaves) -> tuple[Config | None, list[str]]:
    """The configuration, or None and what is wrong with it: types, ranges, unknown keys."""
    try:
        config, found = Config.model_validate(nested(leaves)), list[str]()
    except ValidationError as error:
        config, found = (
            None,
            [
                f"{origin(leaves, p.path) if p.path in leaves else _place(leaves, p.path, p)}: {p}"
                for p in problems(Config, error)
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
    there = attempt(("env", "kwargs"), lambda: family_specs(make_family(env.family, env.kwargs)))
    if there:
        seed = tree.get("seed")
        seed = seed if isinstance(seed, int) and seed >= 0 else 0
        attempt(("env", "n_task" if env.n_task else "family"), lambda: planned_split(env, seed, seed))
    learner, kwargs = algorithm.learner, algorithm.learner_kwargs
    if attempt(("algorithm", "learner_kwargs"), lambda: make_learner(learner, kwargs)) and there:
        attempt(("algorithm", "learner"), lambda: _check_learner(env, algorithm))
    attempt(("marker", "params"), lambda: _check_marker(marker))
    attempt(("marker", "marker"), lambda: _check_guide_settings(marker, leaves))
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


def _check_guide_settings(settings: MarkerSettings, leaves: Leaves) -> None:
    """What the command line sets must be used; what a preset sets for another marker may be left out."""
    if settings.marker not in MARKER:
        return
    known = marker_parameters(settings.marker)
    for key in GUIDE_SETTINGS:
        value, where = leaves.get(("marker", key), (None, ""))
        if value is not None and key not in known and where.startswith("--"):
            raise ConfigError(f"marker {settings.marker!r} has no {key}; it has {', '.join(known) or 'none'}")


def check_model_name(name: str) -> None:
    """Raise ``UsageError`` for a model that is neither registered nor a class at ``module:attribute``."""
    if name not in MODEL and not isinstance(MODEL[name], type):
        raise UsageError(f"model {name!r} is not a class")


def marker_params(settings: MarkerSettings) -> dict[str, Any]:
    """Keyword arguments for the marker: the guide's two where set and known, then ``params``."""
    known = marker_parameters(settings.marker)
    guide = {key: getattr(settings, key) for key in GUIDE_SETTINGS if key in known}
    return {**{key: value for key, value in guide.items() if value is not None}, **settings.params}


def with_marker_defaults(config: Config) -> Config:
    """``config`` stating the marker's call: its own defaults for what is not set, None for what it lacks."""
    settings, known = config.marker, marker_parameters(config.marker.marker)
    stated = settings.model_dump()
    for key in GUIDE_SETTINGS:
        if key not in known:
            stated[key] = None
        elif stated[key] is None and known[key] is not REQUIRED:
            stated[key] = known[key]
    try:
        return config.model_copy(update={"marker": MarkerSettings.model_validate(stated)})
    except ValidationError:  # a marker of the user's own that gives these names another meaning
        return config


def build_family(config: Config) -> TaskFamily:
    """The task family of ``config``."""
    return make_family(config.env.family, config.env.kwargs)


def transform_pairs(model: ModelConfig) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of ``model`` as ``apply_transforms`` takes them."""
    return [(spec.name, spec.params) for spec in model.transforms]
