"""The validated configuration of a command line, and the plan of its collection.

The settings check types and ranges; names, parameters and splits are tried here. All mistakes are reported
together, each with the place where it was written. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from compressed_ad.errors import ConfigError, SpaceError, UnknownNameError, UsageError, users_code
from compressed_ad.histories.thinning import kept_steps
from compressed_ad.learners.base import Checks, SourceLearner
from compressed_ad.learners.select import learner_code, make_learner
from compressed_ad.marking import apply
from compressed_ad.marking.conformance import marker_faults
from compressed_ad.marking.markers import MARKER
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.models import MODEL, SEGMENTS
from compressed_ad.models.settings import ModelConfig
from compressed_ad.registry import own_names, search_current_folder
from compressed_ad.runs.layers import Request, nested, request_leaves
from compressed_ad.runs.settings import Config, without_effect
from compressed_ad.runs.yaml_file import Leaves
from compressed_ad.settings import Problem, S, problems, validated
from compressed_ad.tasks.base import TaskFamily, family_specs, has_successors, successors_of
from compressed_ad.tasks.select import family_code, make_family
from compressed_ad.tasks.split import choose_tasks, split_family
from compressed_ad.training.transforms import check_transforms
from compressed_ad.types import IntArray, Split

T = TypeVar("T")
NOWHERE = "configuration"


def load_config(
    request: Request, *, own: bool = True, collects: bool = True, compares: bool = True
) -> Config:
    """The validated configuration; ``ConfigError`` lists every mistake with its place.

    Names are tried, but without ``own`` not those of the user's own code, which is then not imported. Unless
    histories are collected (``collects``), the learner need not fit the task family. Unless methods are
    compared (``compares``), the settings need only fit the model.
    """
    leaves = request_leaves(request)
    config = validated_config(leaves, own=own, collects=collects, compares=compares)
    if found := without_effect(config if compares else _alone(config)):
        raise ConfigError([f"{origin(leaves, problem.paths)}: {problem}" for problem in found])
    return config


def own_code(config: Config) -> dict[str, frozenset[str]]:
    """By section: the names of code from outside this library in ``config``."""
    model = config.model.model_dump(include={"model", "segments", "transforms"})
    return {
        "env": family_code(config.env.family, config.env.kwargs),
        "algorithm": learner_code(config.algorithm.learner, config.algorithm.learner_kwargs),
        "marker": own_names(config.marker.marker),
        "model": own_names(model),
        "comparison": own_names(config.comparison.methods),
    }


def explicit_keys(request: Request) -> set[str]:
    """Dotted keys that the request itself sets, beyond the preset."""
    bare = request_leaves(Request(preset=request.preset))
    return {".".join(path) for path, leaf in request_leaves(request).items() if bare.get(path) != leaf}


def _alone(config: Config) -> Config:
    """``config`` with its model as the only method."""
    comparison = config.comparison.model_copy(update={"methods": (config.model.model,)})
    return config.model_copy(update={"comparison": comparison})


def validated_config(
    leaves: Leaves, *, own: bool = True, collects: bool = True, compares: bool = True
) -> Config:
    """The configuration that ``leaves`` make, with the marker's defaults; ``ConfigError`` as ``load_config``.

    The valid settings are tried even if others are invalid, so that all mistakes are reported together.
    """
    config, invalid = valid_part(Config, nested(leaves))
    found = [f"{origin(leaves, problem.paths)}: {problem}" for problem in invalid]
    found += _trial_problems(leaves, config if compares else _alone(config), own, collects)
    if found:
        raise ConfigError(dict.fromkeys(found))
    if own_code(config)["marker"] and not own:
        return config
    return config.model_copy(update={"marker": apply.with_marker_defaults(config.marker)})


def valid_part(kind: type[S], tree: dict[str, Any]) -> tuple[S, list[Problem]]:
    """``tree`` as a ``kind`` without its invalid settings, which are removed; and their problems."""
    try:
        return kind.model_validate(tree), []
    except ValidationError as error:
        found = problems(kind, error)
    for path in (path for problem in found for path in problem.paths):
        _remove(tree, path)
    return valid_part(kind, tree)[0], found


def _remove(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove what stands at ``path``, or the value that contains it; else its whole section."""
    at = tree
    for key in path:
        inner = at.get(key)
        if not isinstance(inner, dict) or key == path[-1]:
            at.pop(key) if key in at else tree.pop(path[0], None)
            return
        at = inner


def origin(leaves: Leaves, paths: Iterable[tuple[str, ...]], nowhere: str = NOWHERE) -> str:
    """Where a key at, below or else above one of ``paths`` was written; the command line has precedence."""
    places: list[str] = []
    for path in paths:
        below = [where for known, (_, where) in leaves.items() if known[: len(path)] == path]
        above = [leaves[path[:n]][1] for n in range(len(path) - 1, 0, -1) if path[:n] in leaves]
        places += below or above[:1]
    return next((place for place in places if place.startswith("--")), (*places, nowhere)[0])


@dataclass(frozen=True)
class Plan:
    """What the histories of a configuration are collected from."""

    family: TaskFamily
    learner: SourceLearner
    task_ids: IntArray  # (N,) ids into ``family.tasks()``
    split: Split  # of 0 ... N - 1, positions in ``task_ids``


_PLANNED: dict[str, Plan] = {}
"""The last plan, by ``_plan_key``."""


def plan(config: Config) -> Plan:
    """The plan of ``config``: what its validation has built, if it was the last to be validated.

    ``UsageError`` if the family, the learner or the split cannot be made.
    """
    if _plan_key(config) not in _PLANNED:
        family = build_family(config)
        _keep_plan(config, Plan(family, _build_learner(config), *_choose_and_split(config, family)))
    return _PLANNED[_plan_key(config)]


def _keep_plan(config: Config, made: Plan) -> None:
    _PLANNED.clear()
    _PLANNED[_plan_key(config)] = made


def _plan_key(config: Config) -> str:
    # A text, because 1, 1.0 and True are equal, but differ as parameters.
    return repr((config.env, config.algorithm, config.seed))


def build_family(config: Config) -> TaskFamily:
    """A task family of ``config``; ``SpaceError`` if its spaces are not supported."""
    family = make_family(config.env.family, config.env.kwargs)
    family_specs(family)
    return family


def _build_learner(config: Config) -> SourceLearner:
    return make_learner(config.algorithm.learner, config.algorithm.learner_kwargs)


def _choose_and_split(config: Config, family: TaskFamily) -> tuple[IntArray, Split]:
    env, n_task = config.env, len(family.tasks())
    if n_task == 1:
        raise UsageError(
            f"{family.name} has one task; in-context learning needs several, to train on and to evaluate on."
            " For a gymnasium environment, say what tasks differ in with --task-param KEY=LOW:HIGH"
        )
    task_ids = choose_tasks(n_task, config.seed, env.n_task)
    sizes = {"train": env.train, "validation": env.validation, "heldout": env.heldout}
    return task_ids, split_family(family, task_ids, config.split_seed, **sizes)


def _trial_problems(leaves: Leaves, config: Config, own: bool, collects: bool) -> list[str]:
    """Problems that types cannot show: unknown names, parameters that do not fit, impossible splits.

    Without ``own``, what needs the user's own code is not tried. The learner must fit the family only where
    it ``collects``.
    """
    found: list[str] = []

    def attempt(section: str, check: Callable[[], T], *keys: str, code: Collection[str] = ()) -> T | None:
        """The result of ``check``, or None if it fails. Its parameters stand in the first of ``keys``."""
        if code and not own:
            return None
        try:
            with users_code(lambda: what.get(section, section), UsageError):
                return check()
        except (UsageError, SpaceError) as error:
            if isinstance(error, UnknownNameError):
                keys = keys[-1:]
            for problem in getattr(error, "problems", str(error).splitlines()):
                place = origin(leaves, [(section, keys[0], *path) for path in getattr(problem, "paths", ())])
                if place == NOWHERE:
                    place = origin(leaves, [(section, key) for key in keys])
                found.append(f"{place}: {section}: {problem}")
        return None

    what = {
        "env": f"task family {config.env.family!r}",
        "algorithm": f"learner {config.algorithm.learner!r}",
        "marker": f"marker {config.marker.marker!r}",
        "model": f"model {config.model.model!r}",
    }
    code = own_code(config)
    search_current_folder(frozenset().union(*code.values()) if own else ())
    family = attempt("env", lambda: build_family(config), "kwargs", "family", code=code["env"])
    keys = ("learner_kwargs", "learner")
    learner = attempt("algorithm", lambda: _build_learner(config), *keys, code=code["algorithm"])
    if family is not None:
        sizes = ("n_task", "heldout", "validation", "train", "family")
        chosen = attempt("env", lambda: _choose_and_split(config, family), *sizes)
        if chosen is not None:  # else what makes the tasks is to blame, and was told
            attempt("env", partial(_check_successors, family), "kwargs", "family")
        if collects:
            kept = (config.algorithm.n_timesteps, config.algorithm.keep_every)
            attempt("algorithm", partial(kept_steps, family, *kept), "keep_every", "n_timesteps")
        if collects and isinstance(learner, Checks):
            steps = {key: getattr(config.algorithm, key) for key in ("n_timesteps", "n_stream")}
            attempt("algorithm", partial(learner.check, family, **steps), "learner", *steps, "learner_kwargs")
        if learner is not None and chosen is not None:
            _keep_plan(config, Plan(family, learner, *chosen))
    attempt("marker", lambda: _check_marker(config.marker), "params", "marker", code=code["marker"])
    # The command line must not set what the marker lacks; a preset may, for the marker that it names.
    marker = config.marker.marker
    has = apply.marker_parameters(marker) if marker in MARKER else dict.fromkeys(apply.GUIDE_SETTINGS)
    for key in apply.GUIDE_SETTINGS:
        value, where = leaves.get(("marker", key), (None, ""))
        if key not in has and value is not None and where.startswith("--"):
            listed = ", ".join(has) or "none"
            found.append(f"{where}: marker: marker {marker!r} has no {key}; it has {listed}")
    name = config.model.model
    attempt("model", lambda: _check_model_name(name), "model", code=own_names(name))
    rule = config.model.segments
    if rule != "none":
        attempt("model", lambda: SEGMENTS[rule], "segments", code=own_names(rule))
    for pair in transform_pairs(config.model):
        attempt("model", partial(check_transforms, [pair]), "transforms", code=own_names(pair))
    others = [name for name in config.comparison.methods if name != config.model.model]
    for name in others:
        attempt("comparison", partial(_check_method, name, config.model), "methods", code=own_names(name))
    return found


def _check_successors(family: TaskFamily) -> None:
    """A wrong table shall not come to light after training, when directed search plays."""
    if has_successors(family):
        successors_of(family, family.tasks()[:1])


def _check_marker(settings: MarkerSettings) -> None:
    params = apply.marker_params(settings)
    apply.validated_params(settings.marker, params)  # these problems know their places
    faults = marker_faults(settings.marker, **params)
    if faults:
        raise ConfigError(faults[0].removeprefix("It cannot mark an ordinary history: "))


def _check_model_name(name: str) -> None:
    if name not in MODEL:
        MODEL[name]  # raises


def _check_method(name: str, settings: ModelConfig) -> None:
    """A method must exist, and be possible with the settings that all methods share."""
    _check_model_name(name)
    validated(ModelConfig, {**settings.model_dump(), "model": name}, "with the section model")


def transform_pairs(model: ModelConfig) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of ``model`` as ``apply_transforms`` takes them."""
    return [(spec.name, spec.params) for spec in model.transforms]
