"""The types that rooms exchange: arrays whose shapes are checked, and spaces as plain data.

Letters used in shapes everywhere: N tasks or environment slots, S streams, T steps, B batch, L context,
E episodes, R runs; ``...`` is the shape of one observation or action.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from compressed_ad.errors import HistoryError, NumericalError, SpaceError, SplitError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]
AnyArray = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """What one call of ``BatchedEnv.step`` returns for N slots.

    ``next_obs`` is what the action led to, ``obs`` is what to act on next. They differ only in slots whose
    episode ended: these were reset, and their ``obs`` begins the next episode.
    """

    next_obs: AnyArray  # (N, ...)
    reward: NDArray[np.float32]  # (N,)
    terminated: BoolArray  # (N,) the MDP ended: no value beyond this step
    truncated: BoolArray  # (N,) the time limit ended the episode: there is value beyond this step
    obs: AnyArray  # (N, ...)
    played: BoolArray | None = None  # (N,) False where the slot was only reset: no transition; None: all True

    @property
    def ended(self) -> BoolArray:
        """(N,) True where the step was the last one of its episode."""
        return self.terminated | self.truncated


class Agent(Protocol):
    """Acts in N environment slots at once, whose episodes may end at different times."""

    def reset(self, n_env: int) -> None:
        """Forget everything and start in ``n_env`` slots."""

    def act(self, obs: AnyArray) -> AnyArray:
        """Actions (N, ...) for observations (N, ...)."""

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Take in what ``actions`` (N, ...) led to."""


@dataclass(frozen=True)
class Split:
    """Task indices by purpose; no task is in two parts."""

    train: IntArray
    validation: IntArray  # for choosing a checkpoint
    heldout: IntArray  # for evaluation

    def __post_init__(self) -> None:
        for field in fields(self):
            ids = np.asarray(getattr(self, field.name), dtype=np.int64)
            if ids.ndim != 1:
                raise SplitError(f"{field.name} must list task indices (N,), not have shape {ids.shape}")
            object.__setattr__(self, field.name, np.unique(ids))
        tasks, counts = np.unique(np.concatenate(list(vars(self).values())), return_counts=True)
        if (counts > 1).any():
            raise SplitError(f"tasks {tasks[counts > 1].tolist()} are in more than one part of the split")
        if len(self.train) == 0:
            raise SplitError("the split has no training task")

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} training, {len(self.validation)} validation, {len(self.heldout)} held-out"
        return f"<Split of {len(self.train) + len(self.validation) + len(self.heldout)} tasks: {sizes}>"

    def check_training(self, tasks: IntArray) -> None:
        """Raise ``SplitError`` unless all of ``tasks`` are training tasks."""
        others = np.setdiff1d(tasks, self.train)
        if len(others):
            parts = {name: np.intersect1d(others, ids).tolist() for name, ids in vars(self).items()}
            named = ", ".join(f"{name} tasks {ids}" for name, ids in parts.items() if ids)
            raise SplitError(f"only training tasks may be trained on; asked for {named or others.tolist()}")

    def shared_task(self, tasks: AnyArray) -> str | None:
        """In words, two tasks of different parts with equal rows of ``tasks`` (N, P); None if all differ."""
        ids = np.concatenate(list(vars(self).values()))
        part = np.repeat(list(vars(self)), [len(some) for some in vars(self).values()])
        rows = as_compared(tasks[ids].reshape(len(ids), -1))
        _, row = np.unique(rows, axis=0, return_inverse=True)
        order = np.argsort(row.ravel(), kind="stable")
        row, part, ids = row.ravel()[order], part[order], ids[order]
        twice = np.flatnonzero((row[1:] == row[:-1]) & (part[1:] != part[:-1]))
        if not len(twice):
            return None
        one, other = (f"{ids[k]} ({part[k]})" for k in (twice[0], twice[0] + 1))
        return (
            f"tasks {one} and {other} have equal parameters, so one task would be in two parts of the split"
        )


def as_compared(tasks: AnyArray) -> AnyArray:
    """Rows of ``tasks`` (N, P) as they are compared: whole numbers exactly, others in float32."""
    tasks = np.asarray(tasks)
    return tasks if tasks.dtype.kind != "f" else np.where(tasks % 1 == 0, tasks, tasks.astype(np.float32))


@dataclass(frozen=True)
class History:
    """The learning histories of one task: S streams of T transitions in time order, across episodes.

    Streams with the same ``learner`` number shared one policy, so they are not independent samples.
    """

    states: AnyArray  # (S, T, ...)
    actions: AnyArray  # (S, T, ...)
    rewards: NDArray[np.float32]  # (S, T)
    next_states: AnyArray  # (S, T, ...) what the action led to, never the state after a reset
    terminated: BoolArray  # (S, T)
    truncated: BoolArray  # (S, T)
    action_probs: NDArray[np.float32]  # (S, T) in (0, 1]; NaN where unknown
    update: NDArray[np.int32]  # (S, T) version of the policy that acted
    learner: NDArray[np.int32]  # (S,)
    entropy: NDArray[np.float32] | None = None  # (S, T) nats, of the acting policy
    log_prob_next: NDArray[np.float32] | None = None  # (S, T) log-prob. after the update that used the step
    optimal_actions: AnyArray | None = None  # (S, T, ...) what an optimal policy, or an expert, does there
    compression_mask: BoolArray | None = None  # (S, T)

    def __post_init__(self) -> None:
        shape = self.rewards.shape
        if len(shape) != 2:
            raise HistoryError(f"rewards: expected (stream, time), got shape {shape}")
        for name, array in self.per_step():
            if array.shape[:2] != shape:
                raise HistoryError(f"{name}: expected {shape} as rewards have, got {array.shape[:2]}")
        if self.learner.shape != shape[:1]:
            raise HistoryError(f"learner: expected ({shape[0]},), got {self.learner.shape}")

    def __repr__(self) -> str:
        mask = self.compression_mask
        marked = "not marked" if mask is None else f"{mask.mean():.1%} marked"
        return f"<History of {self.n_stream} streams x {self.n_step} steps, {marked}>"

    @property
    def n_stream(self) -> int:
        """Number of streams S."""
        return int(self.rewards.shape[0])

    @property
    def n_step(self) -> int:
        """Number of transitions T of each stream."""
        return int(self.rewards.shape[1])

    @property
    def episode_end(self) -> BoolArray:
        """(S, T) True on the last transition of an episode."""
        return self.terminated | self.truncated

    def per_step(self) -> Iterator[tuple[str, AnyArray]]:
        """The (S, T, ...) arrays that are present, by name."""
        for field in fields(self):
            array = getattr(self, field.name)
            if array is not None and field.name != "learner":
                yield field.name, array

    def with_mask(self, mask: BoolArray) -> History:
        """This history with another ``compression_mask``."""
        return replace(self, compression_mask=mask)

    def check_finite(self, where: str) -> None:
        """Raise ``NumericalError`` with the first array and index that holds NaN or infinity.

        Probabilities and entropies may be NaN (unknown); markers that need them check this.
        """
        for name, array in self.per_step():
            if name in ("action_probs", "log_prob_next") or array.dtype.kind != "f":
                continue
            bad = np.argwhere(np.isinf(array) if name == "entropy" else ~np.isfinite(array))
            if len(bad):
                raise NumericalError(f"{where}: {name}{bad[0].tolist()} is {array[tuple(bad[0])]}")


# ---------------------------------------------------------------- spaces as plain data

SpaceSpec = dict[str, Any]

LARGEST = 10_000_000
"""Values of a discrete space, or components of a Box, at most."""
LONGEST = 1_000_000
"""Steps of an episode, at most."""


def to_spec(space: gymnasium.Space[Any]) -> SpaceSpec:
    """A Discrete, MultiDiscrete or Box space as JSON values; ``SpaceError`` for any other.

    ``start`` is left out where the values begin at 0. ``low`` and ``high`` of a Box list one number per
    component, None for a component without a bound. In place of the list stands None if no component has a
    bound, or one number if the Box has several dimensions and all its components have the same bound.
    """
    if isinstance(space, spaces.Discrete):
        start = {"start": int(space.start)} if space.start else {}
        return {"kind": "discrete", "n": int(space.n), **start}
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = {"start": space.start.tolist()} if space.start.any() else {}
        return {"kind": "multidiscrete", "nvec": space.nvec.tolist(), **start}
    if isinstance(space, spaces.Box) and space.dtype == np.bool_:
        raise SpaceError(
            f"Box of dtype bool {space.shape} is not supported; make it Box(0, 1, dtype=np.uint8)"
        )
    if isinstance(space, spaces.Box):
        spec: SpaceSpec = {"kind": "box", "shape": list(space.shape), "dtype": str(space.dtype)}
        for name, values in (("low", space.low), ("high", space.high)):
            known = [None if math.isinf(value) else value for value in values.ravel().tolist()]
            same = values.ndim > 1 and len(set(known)) == 1
            spec[name] = None if set(known) <= {None} else known[0] if same else known
        return spec
    shown = " ".join(str(space).split())
    raise SpaceError(f"{shown} is not supported; supported: Discrete, MultiDiscrete (flat), Box")


def from_spec(spec: SpaceSpec) -> gymnasium.Space[Any]:
    """The space that ``to_spec`` described."""
    if spec["kind"] == "discrete":
        return spaces.Discrete(spec["n"], start=spec.get("start", 0))
    if spec["kind"] == "multidiscrete":
        return spaces.MultiDiscrete(spec["nvec"], start=spec.get("start"))
    if spec["kind"] == "box":
        dtype, shape = np.dtype(spec["dtype"]), tuple(spec["shape"])
        low, high = (limit.reshape(shape).astype(dtype) for limit in bounds(spec))
        return spaces.Box(low, high, shape, dtype.type)
    raise SpaceError(f"unknown space description {spec!r}")


def cast(array: AnyArray, dtype: Any) -> AnyArray | None:
    """``array`` in the ``dtype`` of a space; None if it is of another kind, or values would change."""
    if array.dtype.kind not in ("b" if np.dtype(dtype).kind == "b" else "biuf"):
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        result = array.astype(dtype, copy=False)
    return result if dtype.kind == "f" or np.array_equal(result, array) else None


def outside(space: gymnasium.Space[Any], array: AnyArray) -> BoolArray:
    """(N,) whether elements (N, ...) lie beyond the limits of a Discrete, MultiDiscrete or Box space."""
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        low, high = np.asarray(space.start), np.asarray(space.start + sizes - 1)
    else:
        return np.zeros(len(array), bool)
    return np.asarray(((array < low) | (array > high)).reshape(len(array), -1).any(axis=1))


def check_spec(spec: SpaceSpec) -> None:
    """Raise ``SpaceError`` unless ``spec`` describes a space, of at most ``LARGEST`` values or components."""
    try:
        counts = spec["shape"] if spec["kind"] == "box" else sizes(spec)
        total = math.prod(counts) if spec["kind"] == "box" else sum(counts)
        whole = all(isinstance(count, int) and count >= 1 for count in counts)
        if not whole or total > LARGEST or not isinstance(spec["kind"], str):
            raise ValueError(f"its sizes must be whole numbers from 1 to {LARGEST:,}")
        from_spec(spec)
    except (LookupError, TypeError, ValueError, OverflowError, AssertionError) as error:
        shown = reprlib.repr(spec)
        raise SpaceError(f"{shown} describes no space ({type(error).__name__}: {error})") from error


def shape_of(spec: SpaceSpec) -> tuple[int, ...]:
    """Shape of one element of the space."""
    if spec["kind"] == "box":
        return tuple(spec["shape"])
    return () if spec["kind"] == "discrete" else (len(spec["nvec"]),)


def sizes(spec: SpaceSpec) -> list[int]:
    """Number of values of each component of a Discrete or MultiDiscrete space."""
    return [spec["n"]] if spec["kind"] == "discrete" else list(spec["nvec"])


def starts(spec: SpaceSpec) -> list[int]:
    """Smallest value of each component of a Discrete or MultiDiscrete space."""
    found: list[int] = np.broadcast_to(spec.get("start", 0), len(sizes(spec))).tolist()
    return found


def bounds(spec: SpaceSpec) -> tuple[FloatArray, FloatArray]:
    """Flat bounds (D,) of a Box; infinite for components without a bound."""
    size = math.prod(spec["shape"])

    def flat(limit: Any, unbounded: float) -> FloatArray:
        values = np.broadcast_to(np.asarray(limit, np.float64), (size,))  # None becomes NaN
        return np.where(np.isnan(values), unbounded, values)

    return flat(spec["low"], -np.inf), flat(spec["high"], np.inf)


def is_image(spec: SpaceSpec) -> bool:
    """Whether the space is a Box of three dimensions: height, width and channels."""
    return spec["kind"] == "box" and len(spec["shape"]) == 3


def channels_first(spec: SpaceSpec) -> bool:
    """Whether images are (C, H, W), which is assumed if the first dimension is smaller than the last one.

    All others are (H, W, C), as in gymnasium's environments.
    """
    first, _, last = spec["shape"]
    return bool(first < last)


def features(spec: SpaceSpec, array: AnyArray) -> AnyArray:
    """Elements (..., *shape) of a Box as rows: (M, D) of its components, or (M, C) of an image's channels."""
    if not is_image(spec):
        return array.reshape(-1, math.prod(spec["shape"]))
    first = channels_first(spec)
    return (np.moveaxis(array, -3, -1) if first else array).reshape(-1, spec["shape"][0 if first else -1])


def check_same(where: str, expected: SpaceSpec, got: SpaceSpec) -> None:
    """Raise ``SpaceError``, which begins with ``where``, unless the two descriptions are equal."""
    if expected != got:
        raise SpaceError(f"{where}: expected {expected}, got {got}")
