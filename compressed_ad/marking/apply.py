"""Applies a marker, given by name or as a callable, to histories."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from compressed_ad.errors import ConfigError, MarkerError, UsageError, nearest, users_code
from compressed_ad.marking.markers import FIELD_OF, MARKER, Marker, without_nan
from compressed_ad.marking.settings import MarkerSettings
from compressed_ad.registry import Parameters
from compressed_ad.seeding import seed64
from compressed_ad.types import AnyArray, BoolArray, History

REQUIRED = inspect.Parameter.empty
"""The default of a parameter that has none, in ``marker_parameters``."""


def find_marker(marker: str | Marker) -> Marker:
    """The marker that a registered name or ``module:attribute`` stands for; a callable stands for itself."""
    found = MARKER[marker] if isinstance(marker, str) else marker
    if not callable(found):
        raise UsageError(f"marker {marker!r} is a {type(found).__name__}, not a function")
    return found


def marker_name(marker: str | Marker) -> str:
    """What to call ``marker`` in messages and files: its registered name, else ``module:name``."""
    if isinstance(marker, str):
        return marker
    path = f"{marker.__module__}:{getattr(marker, '__qualname__', type(marker).__name__)}"
    return next((name for name, registered in MARKER.items() if registered is marker), path)


def marker_parameters(marker: str | Marker) -> dict[str, Any]:
    """The parameters that a user may set for ``marker``, with their defaults (or ``REQUIRED``)."""
    return {name: parameter.default for name, parameter in _parameters(marker).settable.items()}


def validated_params(marker: str | Marker, params: Mapping[str, Any]) -> dict[str, Any]:
    """``params`` for ``marker``; ``ConfigError`` lists wrong, unknown and missing ones."""

    def missing(name: str) -> str:
        text = f"needs {name!r}, which is neither a given parameter nor in a history{nearest(name, FIELD_OF)}"
        return f"{text}; a history has {', '.join(FIELD_OF)}"

    values, found = _parameters(marker).complete(params, missing)
    if found:
        raise ConfigError([problem.within(f"marker {marker_name(marker)!r}") for problem in found])
    return values


def _parameters(marker: str | Marker) -> Parameters:
    try:
        return Parameters(find_marker(marker), handed=(*FIELD_OF, "seed"), guess=True)
    except ValueError as error:
        name = marker_name(marker)
        raise UsageError(f"marker {name!r}: its arguments cannot be read; wrap it in a function") from error


def apply_marker(marker: str | Marker, history: History, *, seed: int = 0, **params: Any) -> BoolArray:
    """The mask (S, T) of ``history`` by ``marker``: a registered name, ``module:attribute`` or a callable.

    By the names of its arguments, the marker gets read-only arrays of the history (the keys of
    ``FIELD_OF``), ``seed`` and ``params``.

    Raises ``UnknownNameError`` or ``ConfigError`` for a wrong name or parameter; ``MarkerError`` if the
    history lacks an array that the marker needs, if that array has NaN in it, or if the result is not a
    bool array (S, T).
    """
    function, label = find_marker(marker), f"marker {marker_name(marker)!r}"
    ours = getattr(function, "__module__", "") == without_nan.__module__  # these look for NaN themselves
    named, positional = validated_params(marker, params), []
    try:
        for name, parameter in inspect.signature(function).parameters.items():
            if name in FIELD_OF:
                array = _array(history, name, needed=parameter.default is REQUIRED)
                if array is not None:
                    named[name] = array if ours or array.dtype.kind != "f" else without_nan(name, array)
            elif name == "seed":
                named[name] = seed
            if parameter.kind is parameter.POSITIONAL_ONLY and name in named:
                positional.append(named.pop(name))
        with users_code(label, MarkerError):
            mask = function(*positional, **named)
    except MarkerError as error:
        text = str(error).removeprefix(f"{label}: ")
        raise MarkerError(f"{label}: {text}") from error
    except ConfigError as error:
        raise ConfigError(f"{label}: {problem}" for problem in error.problems) from error
    wanted = f"{label}: must return a bool array {history.rewards.shape} as rewards have"
    if not isinstance(mask, np.ndarray):
        raise MarkerError(f"{wanted}, but returns a {type(mask).__name__}")
    if mask.shape != history.rewards.shape:
        raise MarkerError(f"{wanted}, but the shape of its result is {mask.shape}")
    if mask.dtype != np.bool_:
        raise MarkerError(f"{wanted}, but the dtype of its result is {mask.dtype}")
    return mask


def mark_all(
    marker: str | Marker, histories: Mapping[int, History], *, seed: int = 0, **params: Any
) -> dict[int, History]:
    """``histories`` by task index with new masks; the mask of a task does not depend on other tasks."""
    return {
        task: history.with_mask(mark_task(marker, history, task, seed=seed, **params))
        for task, history in histories.items()
    }


def mark_task(marker: str | Marker, history: History, task: int, *, seed: int, **params: Any) -> BoolArray:
    """``apply_marker`` for the history of ``task``, which errors name."""
    try:
        return apply_marker(marker, history, seed=seed64(seed, "marker", "task", task), **params)
    except MarkerError as error:
        raise MarkerError(f"task {task}: {error}") from error


def _array(history: History, name: str, *, needed: bool) -> AnyArray | None:
    """A read-only array of the history; None if it lacks one that is not ``needed``.

    ``log_prob`` (S, T) is of whole actions, while ``action_probs`` of actions with K components are geometric
    means over the components. Continuous actions have none: their ``action_probs`` are relative.
    """
    found: AnyArray | None = getattr(history, FIELD_OF[name])
    if name == "log_prob":
        discrete = history.actions.dtype.kind != "f"
        with np.errstate(divide="ignore"):
            n_component = int(np.prod(history.actions.shape[2:], dtype=np.int64))
            found = np.asarray(n_component * np.log(history.action_probs)) if discrete else None
    if found is None:
        if needed:
            raise MarkerError(
                f"needs {name}, which this history does not have; collect with a source algorithm that "
                "records it, or choose a marker that does not need it"
            )
        return None
    view = found.view()
    view.flags.writeable = False
    return view


GUIDE_SETTINGS = ("on_policy_threshold", "compression_window")
"""Parameters of markers that have their own settings, because the guide names them."""


def marker_params(settings: MarkerSettings) -> dict[str, Any]:
    """Keyword arguments for the marker: the guide's two if set and known to the marker, and ``params``."""
    known, guide = marker_parameters(settings.marker), settings.model_dump(include=set(GUIDE_SETTINGS))
    used = {key: value for key, value in guide.items() if key in known and value is not None}
    return {**used, **settings.params}


def with_marker_defaults(settings: MarkerSettings) -> MarkerSettings:
    """``settings`` with the marker's own defaults for what is not set, and None for what it does not have."""
    known, stated = marker_parameters(settings.marker), settings.model_dump()
    for key in GUIDE_SETTINGS:
        if key not in known or (stated[key] is None and known[key] is not REQUIRED):
            stated[key] = known.get(key)
    try:
        return MarkerSettings(**stated)
    except ConfigError:  # a user's marker that gives these names another meaning
        return settings
