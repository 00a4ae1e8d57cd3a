"""Marking histories: any marker, by name or as a callable, on a ``History``; checks and statistics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from compressed_ad.errors import CompressedADError, ConfigError, MarkerError, UsageError, nearest
from compressed_ad.marking.markers import MARKER, Marker, known
from compressed_ad.marking.statistics import N_PHASE, MarkingStatistics, marking_statistics
from compressed_ad.seeding import rng, seed64
from compressed_ad.types import AnyArray, BoolArray, History

__all__ = ["N_PHASE", "MarkingStatistics", "marking_statistics"]

FIELD_OF = {
    "probs": "action_probs",
    "action_probs": "action_probs",
    "log_prob": "action_probs",
    "log_prob_next": "log_prob_next",
    "entropy": "entropy",
    "update": "update",
    "rewards": "rewards",
    "terminated": "terminated",
    "truncated": "truncated",
    "episode_end": "episode_end",
    "states": "states",
    "actions": "actions",
    "next_states": "next_states",
    "learner": "learner",
}
"""What a marker may ask for by the name of an argument, and where in a ``History`` it comes from."""

REQUIRED = inspect.Parameter.empty
"""Stands in ``marker_parameters`` for a parameter without a default."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def find_marker(marker: str | Marker) -> Marker:
    """The marker of a registered name or ``module:attribute``; a callable is returned as it is."""
    found = MARKER[marker] if isinstance(marker, str) else marker
    if not callable(found):
        raise UsageError(f"marker {marker!r} is a {type(found).__name__}, not a function")
    return found


def marker_name(marker: str | Marker) -> str:
    """What to call ``marker`` in messages and files: its registered name, else ``module:name``."""
    if isinstance(marker, str):
        return marker
    for name, registered in MARKER.items():
        if registered is marker:
            return name
    return f"{marker.__module__}:{getattr(marker, '__qualname__', type(marker).__name__)}"


def marker_parameters(marker: str | Marker) -> dict[str, Any]:
    """The parameters that a user may set for ``marker``, with their defaults (or ``REQUIRED``)."""
    return {
        name: parameter.default
        for name, parameter in _signature(marker).items()
        if name not in FIELD_OF and name != "seed" and parameter.kind not in _VARIADIC
    }


def apply_marker(marker: str | Marker, history: History, *, seed: int = 0, **params: Any) -> BoolArray:
    """The mask (S, T) of ``history`` by ``marker``: a registered name, ``module:attribute`` or a callable.

    The marker is handed, by the names of its arguments, read-only arrays of the history (the keys of
    ``FIELD_OF``), ``seed``, and ``params``.

    Raises ``UnknownNameError`` or ``ConfigError`` for a wrong name or parameter; ``MarkerError`` if the
    history lacks what is asked for, or has NaN in it, or the result is not a bool array (S, T).
    """
    function, label = find_marker(marker), marker_name(marker)
    try:
        positional, named = _arguments(function, history, seed, params)
        mask = function(*positional, **named)
    except MarkerError as error:
        raise MarkerError(f"marker {label!r}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"marker {label!r}: {problem}" for problem in error.problems) from error
    problem = _result_problem(mask, history.rewards.shape)
    if problem:
        raise MarkerError(f"marker {label!r}: {problem}")
    return mask


def mark_all(
    marker: str | Marker, histories: Mapping[int, History], *, seed: int = 0, **params: Any
) -> dict[int, History]:
    """``histories`` by task index with new masks; a task's mask does not depend on the tasks beside it."""
    return {
        task: history.with_mask(apply_marker(marker, history, seed=task_seed(seed, task), **params))
        for task, history in histories.items()
    }


def task_seed(seed: int, task: int) -> int:
    """The seed that a marker gets for one task."""
    return seed64(seed, "marker", "task", task)


def _signature(marker: str | Marker) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(find_marker(marker)).parameters
    except ValueError as error:
        name = marker_name(marker)
        raise UsageError(f"marker {name!r}: its arguments cannot be read; wrap it in a function") from error


def _arguments(
    function: Marker, history: History, seed: int, params: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    signature = _signature(function)
    settable = marker_parameters(function)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    extra = {name: value for name, value in params.items() if name not in settable}
    problems = [
        f"unknown parameter {name!r}{nearest(name, settable)}; it has {', '.join(settable) or 'none'}"
        for name in extra
        if not takes_any or name in signature
    ]
    problems += [
        f"{name}: expected true or false, got {params[name]!r}"
        for name, default in settable.items()
        if isinstance(default, bool) and not isinstance(params.get(name, default), bool)
    ]
    problems += [
        f"{name}: expected a number, got {params[name]!r}"
        for name, default in settable.items()
        if isinstance(default, int | float)
        and not isinstance(default, bool)
        and isinstance(params.get(name, default), str)
    ]
    problems += [
        f"needs {name!r}, which is neither given as a parameter nor something a history has"
        f"{nearest(name, FIELD_OF)}; a history has {', '.join(FIELD_OF)}"
        for name, default in settable.items()
        if default is REQUIRED and name not in params
    ]
    if problems:
        raise ConfigError(problems)
    positional: list[Any] = []
    named: dict[str, Any] = dict(extra)
    for name, parameter in signature.items():
        if parameter.kind in _VARIADIC or (name in settable and name not in params):
            continue
        value = params.get(name, seed) if name not in FIELD_OF else _read(history, name)
        if value is None and name in FIELD_OF:
            if parameter.default is not REQUIRED:
                continue
            raise MarkerError(
                f"needs {name}, which this history does not have; collect with a source algorithm that "
                "records it, or choose a marker that does not need it"
            )
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[name] = value
    return positional, named


def _read(history: History, name: str) -> AnyArray | None:
    found: AnyArray | None = getattr(history, FIELD_OF[name])
    if found is None:
        return None
    if found.dtype.kind == "f":
        known(name, found)
    if name == "log_prob":
        found = _log_prob(history)
        if found is None:
            return None
    view = found.view()
    view.flags.writeable = False
    return view


def _log_prob(history: History) -> AnyArray | None:
    """(S, T) log-probabilities of whole actions; None where ``action_probs`` are relative to a density's top.

    Of actions with K components ``action_probs`` is the geometric mean.
    """
    actions = history.actions
    if actions.dtype.kind == "f":
        return None
    n_component = int(np.prod(actions.shape[2:], dtype=np.int64))
    with np.errstate(divide="ignore"):
        return np.asarray(n_component * np.log(history.action_probs))


def _result_problem(mask: object, shape: tuple[int, ...]) -> str | None:
    wanted = f"must return a bool array {shape} as rewards have"
    if not isinstance(mask, np.ndarray):
        return f"{wanted}, but returns a {type(mask).__name__}"
    if mask.shape != shape:
        return f"{wanted}, but the shape of its result is {mask.shape}"
    if mask.dtype != np.bool_:
        return f"{wanted}, but the dtype of its result is {mask.dtype}"
    return None


# ---------------------------------------------------------------- a user's own marker


_ONE_STEP = "histories of one step"


def check_marker(marker: str | Marker, **params: Any) -> list[str]:
    """What is wrong with a user's marker, in plain sentences; an empty list if nothing is.

    It is tried on a made-up history with every array that a history can have: result, input left unchanged,
    same result twice, one step, each stream marked by itself (unless the marker asks for ``seed`` or
    ``learner``, as controls do), and with ``causal=True``, if it has that, the prefix property.
    """
    problems: list[str] = []

    def attempt(what: str, history: History, **more: Any) -> BoolArray | None:
        try:
            return apply_marker(marker, history, **{**params, **more})
        except CompressedADError as error:
            problems.append(f"It cannot mark {what}: {error}")
        except Exception as error:  # whatever a user's function raises is the finding
            if "read-only" in str(error):
                problems.append("It modifies the arrays it is given; work on a copy.")
            else:
                problems.append(f"It raises {type(error).__name__} on {what}: {error}")
        return None

    history = _example(4, 120)
    mask, again = attempt("an ordinary history", history), None
    if mask is not None:
        again = attempt("the same history again", history)
    if mask is None or again is None:
        return problems
    if not np.array_equal(mask, again):
        problems.append("Two calls on the same history give different masks; draw from the seed argument.")
    if any(np.shares_memory(mask, array) for _, array in history.per_step()):
        problems.append("Its result shares memory with the history; return a new array.")
    attempt(_ONE_STEP, _cut(history, 4, 1))
    asks = set(_signature(marker))
    if not asks & {"seed", "learner"}:
        alone = attempt("a single stream", _cut(history, 1, 120))
        if alone is not None and not np.array_equal(alone[0], mask[0]):
            problems.append("The mask of a stream depends on the other streams.")
    if "causal" in asks and "seed" not in asks:
        whole = attempt("a history with causal=True", history, causal=True)
        for n_step in range(1, 120) if whole is not None else ():
            part = attempt(
                f"the first {n_step} steps with causal=True", _cut(history, 4, n_step), causal=True
            )
            if part is None:
                break
            if whole is not None and not np.array_equal(part, whole[:, :n_step]):
                problems.append("With causal=True the marking of a prefix is not a prefix of the marking.")
                break
    return problems


def marker_faults(marker: str | Marker, **params: Any) -> list[str]:
    """What forbids the use of a marker: whatever ``check_marker`` finds, except on histories of one step.

    The guide's own example needs two steps, and so may any other; real histories have them.
    """
    return [problem for problem in check_marker(marker, **params) if _ONE_STEP not in problem]


def _example(n_stream: int, n_step: int) -> History:
    """A made-up history of a policy that gets surer, with every optional array but no mask."""
    draw = rng(0, "check_marker")
    shape = (n_stream, n_step)
    sure = np.linspace(np.linspace(0.2, 0.7, n_stream), 1, n_step).T  # streams differ in level
    probs = np.clip(sure + draw.normal(0, 0.15, shape), 0.05, 1).astype(np.float32)
    end = np.zeros(shape, dtype=bool)
    end[:, 14::15] = True
    return History(
        states=draw.integers(0, 9, shape),
        actions=draw.integers(0, 5, shape),
        rewards=(draw.random(shape) < sure - 0.2).astype(np.float32),
        next_states=draw.integers(0, 9, shape),
        terminated=np.zeros(shape, dtype=bool),
        truncated=end,
        action_probs=probs,
        update=np.broadcast_to(np.arange(n_step, dtype=np.int32) // 20, shape).copy(),
        learner=np.zeros(n_stream, dtype=np.int32),
        entropy=(1.5 * (1 - probs)).astype(np.float32),
        log_prob_next=np.minimum(np.log(probs) + draw.normal(0, 0.1, shape), 0).astype(np.float32),
    )


def _cut(history: History, n_stream: int, n_step: int) -> History:
    arrays = {name: array[:n_stream, :n_step] for name, array in history.per_step()}
    return History(**arrays, learner=history.learner[:n_stream])
