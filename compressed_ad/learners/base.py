"""The protocols of source algorithms, and the learners by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compressed_ad.errors import RunError, users_code
from compressed_ad.registry import Registry, makes
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, History, IntArray

Progress = Callable[[int], None]
"""Called with the number of environment steps since the last call, summed over all streams."""


class SourceLearner(Protocol):
    """Learns tasks from scratch and records every step."""

    name: str  # as in file names, e.g. "PPO"

    def learn(
        self,
        family: TaskFamily,
        task_ids: IntArray,
        tasks: AnyArray,
        *,
        n_timesteps: int,
        n_learner: int,
        n_stream: int,
        seed: int,
        progress: Progress = lambda steps: None,
    ) -> list[History]:
        """One history for each task, with S = n_learner * n_stream streams of T = n_timesteps transitions.

        ``n_learner`` independent learners train on each task, each in ``n_stream`` parallel environments.
        Streams are ordered by learner; ``History.learner`` gives the learner of each. All random numbers
        derive from (seed, task id, learner index), so that the history of a task does not depend on the
        other tasks of the call.
        """


@runtime_checkable
class Checks(Protocol):
    """Optional for a learner: it can tell whether ``learn`` will succeed, before any work starts."""

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """Raise ``SpaceError``, ``ConfigError`` or ``UsageError`` if ``learn`` would."""


@runtime_checkable
class Blocks(Protocol):
    """Optional for a learner: how many tasks it wants to learn together."""

    def block_size(self, family: TaskFamily, *, n_timesteps: int, n_learner: int, n_stream: int) -> int:
        """The largest number of tasks in a call of ``learn``."""


@runtime_checkable
class Told(Protocol):
    """Optional for a learner: what it knows before it learns, which history files keep for reports."""

    told: str


@runtime_checkable
class Timed(Protocol):
    """Optional for a learner: roughly how long it takes, for what ``--dry-run`` says."""

    step_seconds: float
    """Of a core with AVX-512 for an environment step, learning and recording included."""


@runtime_checkable
class Prepares(Protocol):
    """Optional for a learner: it gets to know the training tasks before anything is recorded."""

    name: str

    def prepared(self, family: TaskFamily, tasks: AnyArray, seed: int) -> SourceLearner:
        """The learner that learns the histories; ``tasks`` (N, P) are all training tasks of a collection."""


def prepared(learner: SourceLearner, family: TaskFamily, tasks: AnyArray, seed: int) -> SourceLearner:
    """The learner that is to learn, after ``Prepares.prepared`` if it has that; ``RunError`` if it fails."""
    if not isinstance(learner, Prepares):
        return learner
    with users_code(f"learner {learner.name!r}: prepared() fails"):
        found = learner.prepared(family, tasks, seed)
    if not (hasattr(found, "name") and hasattr(found, "learn")):
        raise RunError(
            f"learner {learner.name!r}: prepared() must return the learner that learns, not {found!r}"
        )
    return found


def histories_of_tasks(arrays: Mapping[str, AnyArray], learner: NDArray[np.int32]) -> list[History]:
    """One history for each task, from ``arrays`` (N * S, T, ...) of all tasks in order.

    ``learner`` (S,) numbers the learners of the streams, the same for every task.
    """
    n_stream = len(learner)
    return [
        History(learner=learner, **{name: array[i : i + n_stream] for name, array in arrays.items()})
        for i in range(0, len(arrays["rewards"]), n_stream)
    ]


LEARNER: Registry[Callable[..., SourceLearner]] = Registry(
    "learner",
    {
        "ppo": "compressed_ad.learners.ppo:BatchedPPO",
        "thompson": "compressed_ad.learners.scripted:ThompsonSampling",
        "ucb1": "compressed_ad.learners.scripted:UCB",
        "noise": "compressed_ad.learners.scripted:NoiseDistillation",
        "tabular": "compressed_ad.learners.tabular:TabularQ",
        "rmax": "compressed_ad.learners.rmax:RMax",
        "revisit": "compressed_ad.learners.revisit:Revisit",
        "homing": "compressed_ad.learners.homing:Homing",
    },
    makes("SourceLearner", "learn"),
)
