"""The arrays that the parts of this library hand to each other, with their shapes checked.

Letters used in shapes everywhere: N tasks or environment slots, S streams, T steps, B batch, L context,
E episodes, R runs; ``...`` is the shape of one observation or action.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import HistoryError, NumericalError, SplitError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]
AnyArray = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """What one call of ``BatchedEnv.step`` returns, for N slots.

    ``next_obs`` is the true successor of the action; ``obs`` is what to act on next, which differs from
    ``next_obs`` exactly in the slots whose episode ended (they were reset).
    """

    next_obs: AnyArray  # (N, ...)
    reward: NDArray[np.float32]  # (N,)
    terminated: BoolArray  # (N,) the MDP ended: no future value
    truncated: BoolArray  # (N,) the time limit ended the episode: the future has value
    obs: AnyArray  # (N, ...)


@dataclass(frozen=True)
class Split:
    """Which tasks train, choose (validation) and judge (heldout): disjoint index arrays into the family."""

    train: IntArray
    validation: IntArray
    heldout: IntArray

    def __post_init__(self) -> None:
        for field in fields(self):
            ids = np.unique(np.asarray(getattr(self, field.name), dtype=np.int64))
            object.__setattr__(self, field.name, ids)
        together = np.concatenate([self.train, self.validation, self.heldout])
        values, counts = np.unique(together, return_counts=True)
        if (counts > 1).any():
            raise SplitError(f"tasks {values[counts > 1].tolist()} stand in more than one part of the split")
        if len(self.train) == 0:
            raise SplitError("the split has no training task")

    def check_training(self, tasks: IntArray) -> None:
        """Raise ``SplitError`` unless every one of ``tasks`` is a training task."""
        foreign = np.setdiff1d(tasks, self.train)
        if len(foreign):
            kinds = {
                name: np.intersect1d(foreign, getattr(self, name)).tolist()
                for name in ("validation", "heldout")
            }
            named = ", ".join(f"{name} tasks {ids}" for name, ids in kinds.items() if ids)
            raise SplitError(f"only training tasks may be trained on; asked for {named or foreign.tolist()}")


@dataclass(frozen=True)
class History:
    """The learning histories of one task: S streams of T transitions in time order, across episodes.

    Streams with the same ``learner`` shared one policy, so they are not independent samples.
    """

    states: AnyArray  # (S, T, ...)
    actions: AnyArray  # (S, T, ...)
    rewards: NDArray[np.float32]  # (S, T)
    next_states: AnyArray  # (S, T, ...) the true successor, never the state after a reset
    terminated: BoolArray  # (S, T)
    truncated: BoolArray  # (S, T)
    action_probs: NDArray[np.float32]  # (S, T) in (0, 1]; NaN where unknown
    update: NDArray[np.int32]  # (S, T) version of the policy that acted
    learner: NDArray[np.int32]  # (S,)
    entropy: NDArray[np.float32] | None = None  # (S, T) nats, of the acting policy
    log_prob_next: NDArray[np.float32] | None = None  # (S, T) log-prob. after the update that used the step
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
        """Raise ``NumericalError`` naming the first array and place with NaN or infinity.

        Probabilities may be NaN (unknown); markers refuse those themselves.
        """
        for name, array in self.per_step():
            if name in ("action_probs", "entropy", "log_prob_next") or array.dtype.kind != "f":
                continue
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                raise NumericalError(f"{where}: {name}{bad[0].tolist()} is {array[tuple(bad[0])]}")
