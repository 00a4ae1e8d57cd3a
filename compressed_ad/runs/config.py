"""The configuration that a command line asks for, validated, and what it collects from.

Types and ranges are checked by the settings; names, parameters and splits are tried here. All mistakes of
all layers are told at once, each with the place where it was written. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from compressed_ad.errors import ConfigError, SpaceError, UnknownNameError, UsageError
from compressed_ad.learners.base import Checks, SourceLearner
from compressed_ad.learners.select import make_learner
from compressed_ad.marking.apply import (
    GUIDE_SETTINGS,
    marker_parameters,
    marker_params,
    validated_params,
    with_marker_defaults,
)
from compressed_ad.marking.conformance import marker_faults
from compressed_ad.marking.markers import MARKER
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.models import MODEL
from compressed_ad.models.settings import ModelConfig
from compressed_ad.runs.layers import NOWHERE, Request, nested, origin, request_leaves
from compressed_ad.runs.settings import Config
from compressed_ad.runs.yaml_file import Leaves
from compressed_ad.settings import Problem, problems
from compressed_ad.tasks.base import TaskFamily, family_specs
from compressed_ad.tasks.select import make_family
from compressed_ad.tasks.split import choose_tasks, split_family
from compressed_ad.training.transforms import check_transforms
from compressed_ad.types import IntArray, Split

T = TypeVar("T")


def load_config(request: Request) -> Config:
    """The validated configuration; ``ConfigError`` lists every mistake with its place."""
    return validated_config(request_leaves(request))


def explicit_keys(request: Request) -> set[str]:
    """Dotted keys that the request itself sets, beyond the preset."""
    bare = request_leaves(Request(preset=request.preset))
    return {".".join(path) for path, leaf in request_leaves(request).items() if bare.get(path) != leaf}


def validated_config(leaves: Leaves) -> Config:
    """The configuration that ``leaves`` make, stating the marker's call; ``ConfigError`` as ``load_config``.

    What is valid of it is built and tried even if something else is not, so that all mistakes are told.
    """
    config, invalid = _valid_part(nested(leaves))
    found = [f"{_written(leaves, problem.paths)}: {problem}" for problem in invalid]
    found += _trial(leaves, config)
    if found:
        raise ConfigError(dict.fromkeys(found))
    return config.model_copy(update={"marker": with_marker_defaults(config.marker)})


def _valid_part(tree: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """The configuration without its invalid settings, and what is wrong with those. Empties ``tree``."""
    try:
        return Config.model_validate(tree), []
    except ValidationError as error:
        found = problems(Config, error)
    for section, *keys in (path for problem in found for path in problem.paths):
        if keys and isinstance(tree.get(section), dict):
            tree[section].pop(keys[0], None)
        else:
            tree.pop(section, None)
    return _valid_part(tree)[0], found


def _written(leaves: Leaves, paths: Iterable[tuple[str, ...]]) -> str:
    """Where the first of ``paths``, or a key below it, was written; the command line goes before files."""
    places = []
    for path in paths:
        below = [where for known, (_, where) in leaves.items() if known[: len(path)] == path]
        places += below or [origin(leaves, path)]
    places = [place for place in places if place != NOWHERE]
    return next((place for place in places if place.startswith("--")), (*places, NOWHERE)[0])


@dataclass(frozen=True)
class Plan:
    """What a configuration collects histories from."""

    family: TaskFamily
    learner: SourceLearner
    task_ids: IntArray  # (N,) ids into ``family.tasks()``
    split: Split  # of 0 ... N - 1, the places in ``task_ids``


_last_plan: tuple[str, Plan] | None = None


def plan(config: Config) -> Plan:
    """Built once: for the configuration that was validated last, these are the objects that were tried.

    ``UsageError`` if the family, the learner or the split cannot be made.
    """
    if _last_plan and _last_plan[0] == _plan_key(config):
        return _last_plan[1]
    family = build_family(config)
    return _keep_plan(config, Plan(family, _learner(config), *_split(config, family)))


def _keep_plan(config: Config, made: Plan) -> Plan:
    global _last_plan
    _last_plan = _plan_key(config), made
    return made


def _plan_key(config: Config) -> str:
    # As text, because 1, 1.0 and True are equal, but not as parameters.
    return repr((config.env, config.algorithm, config.seed))


def build_family(config: Config) -> TaskFamily:
    """The task family of ``config``; ``plan`` has one already."""
    family = make_family(config.env.family, config.env.kwargs)
    family_specs(family)
    return family


def _learner(config: Config) -> SourceLearner:
    return make_learner(config.algorithm.learner, config.algorithm.learner_kwargs)


def _split(config: Config, family: TaskFamily) -> tuple[IntArray, Split]:
    """Ids of the tasks to collect, and their split; ``UsageError`` if the family has not enough tasks."""
    env, n_task = config.env, len(family.tasks())
    if n_task == 1:
        raise UsageError(
            f"{family.name} has one task; learning in context needs some to train on and others to be judged"
            " on. For a gymnasium environment, say what tasks differ in with --task-param KEY=LOW:HIGH"
        )
    task_ids = choose_tasks(n_task, config.seed, env.n_task)
    sizes = {"train": env.train, "validation": env.validation, "heldout": env.heldout}
    return task_ids, split_family(family, task_ids, config.split_seed, **sizes)


def _trial(leaves: Leaves, config: Config) -> list[str]:
    """Mistakes that types cannot tell: unknown names, parameters that do not fit, impossible splits."""
    algorithm, marker = config.algorithm, config.marker
    found: list[str] = []

    def attempt(section: str, check: Callable[[], T], *keys: str) -> T | None:
        """The result of ``check``, or None if it fails; the mistake is about ``keys``, or in the first."""
        try:
            return check()
        except (UsageError, SpaceError) as error:
            if isinstance(error, UnknownNameError):
                keys = keys[-1:]
            for problem in getattr(error, "problems", str(error).splitlines()):
                parameters = [(section, keys[0], *path) for path in getattr(problem, "paths", ())]
                where = _written(leaves, parameters)
                if where == NOWHERE:
                    where = _written(leaves, [(section, key) for key in keys])
                found.append(f"{where}: {section}: {problem}")
        return None

    family = attempt("env", lambda: build_family(config), "kwargs", "family")
    sizes = ("n_task", "heldout", "validation", "train", "family")
    split = family and attempt("env", lambda: _split(config, family), *sizes)
    learner = attempt("algorithm", lambda: _learner(config), "learner_kwargs", "learner")
    if family and isinstance(learner, Checks):
        steps = {"n_timesteps": algorithm.n_timesteps, "n_stream": algorithm.n_stream}
        attempt("algorithm", partial(learner.check, family, **steps), "learner", *steps, "learner_kwargs")
    if family and learner and split:
        _keep_plan(config, Plan(family, learner, *split))
    attempt("marker", lambda: _check_marker(marker), "params", "marker")
    attempt("model", lambda: check_model_name(config.model.model), "model")
    for pair in transform_pairs(config.model):
        attempt("model", partial(check_transforms, [pair]), "transforms")
    for name in config.comparison.methods:
        attempt("comparison", partial(check_model_name, name), "methods")
    # What the command line sets must be used; what a preset sets for another marker may be left out.
    known = marker_parameters(marker.marker) if marker.marker in MARKER else GUIDE_SETTINGS
    for key in GUIDE_SETTINGS:
        value, where = leaves.get(("marker", key), (None, ""))
        if value is not None and key not in known and where.startswith("--"):
            has = ", ".join(known) or "none"
            found.append(f"{where}: marker: marker {marker.marker!r} has no {key}; it has {has}")
    return found


def _check_marker(settings: MarkerSettings) -> None:
    params = marker_params(settings)
    validated_params(settings.marker, params)
    faults = marker_faults(settings.marker, **params)
    if faults:
        raise ConfigError(faults[0].removeprefix("It cannot mark an ordinary history: "))


def check_model_name(name: str) -> None:
    """Raise ``UsageError`` for a model that is neither registered nor a class at ``module:attribute``."""
    if name not in MODEL and not isinstance(MODEL[name], type):
        raise UsageError(f"model {name!r} is not a class")


def transform_pairs(model: ModelConfig) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of ``model`` as ``apply_transforms`` takes them."""
    return [(spec.name, spec.params) for spec in model.transforms]
