"""Checks of a user's own marker on a made-up history."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from compressed_ad.errors import CompressedADError
from compressed_ad.marking.apply import apply_marker, find_marker
from compressed_ad.marking.markers import Marker
from compressed_ad.seeding import rng
from compressed_ad.types import BoolArray, History

_ONE_STEP = "histories of one step"


def check_marker(marker: str | Marker, **params: Any) -> list[str]:
    """What is wrong with a user's marker, in plain sentences; an empty list if nothing is.

    The marker is tried on a made-up history that has every array. It must return a mask, leave its input
    unchanged, give the same result twice, work on one step, mark each stream by itself (unless it takes
    ``seed`` or ``learner``, as controls do), and with ``causal=True``, if it has that, the marking of a
    prefix must be a prefix of the marking.
    """
    problems: list[str] = []

    def attempt(what: str, history: History, **more: Any) -> BoolArray | None:
        try:
            return apply_marker(marker, history, **{**params, **more})
        except CompressedADError as error:
            if "read-only" in str(error):
                problems.append("It modifies the arrays it is given; work on a copy.")
            else:
                problems.append(f"It cannot mark {what}: {error}")
        return None

    history = _example(4, 120)
    mask = attempt("an ordinary history", history)
    again = None if mask is None else attempt("the same history again", history)
    if mask is None or again is None:
        return problems
    if not np.array_equal(mask, again):
        problems.append("Two calls on the same history give different masks; draw from the seed argument.")
    if any(np.shares_memory(mask, array) for _, array in history.per_step()):
        problems.append("Its result shares memory with the history; return a new array.")
    attempt(_ONE_STEP, _cut(history, 4, 1))
    arguments = inspect.signature(find_marker(marker)).parameters.keys()
    if not arguments & {"seed", "learner"}:
        alone = attempt("a single stream", _cut(history, 1, 120))
        if alone is not None and not np.array_equal(alone[0], mask[0]):
            problems.append("The mask of a stream depends on the other streams.")
    if "causal" in arguments and "seed" not in arguments:
        whole = attempt("a history with causal=True", history, causal=True)
        for n_step in range(1, 120) if whole is not None else ():
            first = f"the first {n_step} steps with causal=True"
            part = attempt(first, _cut(history, 4, n_step), causal=True)
            if part is None:
                break
            if whole is not None and not np.array_equal(part, whole[:, :n_step]):
                problems.append("With causal=True the marking of a prefix is not a prefix of the marking.")
                break
    return problems


def marker_faults(marker: str | Marker, **params: Any) -> list[str]:
    """Why a marker must not be used: what ``check_marker`` finds, except on histories of one step.

    A marker may need two steps, as the guide's own example does; real histories have them.
    """
    return [problem for problem in check_marker(marker, **params) if _ONE_STEP not in problem]


def _example(n_stream: int, n_step: int) -> History:
    """A made-up history of a policy of growing confidence, with every optional array but no mask."""
    draw = rng(0, "check_marker")
    shape = (n_stream, n_step)
    confidence = np.linspace(np.linspace(0.2, 0.7, n_stream), 1, n_step).T  # streams differ in level
    probs = np.clip(confidence + draw.normal(0, 0.15, shape), 0.05, 1).astype(np.float32)
    end = np.zeros(shape, dtype=bool)
    end[:, 14::15] = True
    return History(
        states=draw.integers(0, 9, shape),
        actions=draw.integers(0, 5, shape),
        rewards=(draw.random(shape) < confidence - 0.2).astype(np.float32),
        next_states=draw.integers(0, 9, shape),
        terminated=np.zeros(shape, dtype=bool),
        truncated=end,
        action_probs=probs,
        update=np.broadcast_to(np.arange(n_step, dtype=np.int32) // 20, shape).copy(),
        learner=np.zeros(n_stream, dtype=np.int32),
        entropy=(1.5 * (1 - probs)).astype(np.float32),
        log_prob_next=np.minimum(np.log(probs) + draw.normal(0, 0.1, shape), 0).astype(np.float32),
        optimal_actions=draw.integers(0, 5, shape),
    )


def _cut(history: History, n_stream: int, n_step: int) -> History:
    arrays = {name: array[:n_stream, :n_step] for name, array in history.per_step()}
    return History(**arrays, learner=history.learner[:n_stream])
