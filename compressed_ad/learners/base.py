"""What a source algorithm must offer so that its learning can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from compressed_ad.registry import Registry
from compressed_ad.tasks.base import TaskFamily
from compressed_ad.types import AnyArray, History, IntArray

Progress = Callable[[int], None]
"""Called with the number of environment steps done since the last call (all streams together)."""


class SourceLearner(Protocol):
    """Learns tasks from scratch and records everything it did."""

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
        """One history per task, each of S = n_learner * n_stream streams of T = n_timesteps transitions.

        ``n_learner`` independent learners train on each task, each with ``n_stream`` parallel
        environments. Streams are ordered by learner, and ``History.learner`` says which is whose.
        Everything random derives from (seed, task id, learner index), so that the history of a task does
        not depend on which tasks are learned beside it.
        """


@runtime_checkable
class Checks(Protocol):
    """What a learner offers that can tell beforehand whether it fits, so that nothing is started in vain."""

    def check(self, family: TaskFamily, *, n_timesteps: int, n_stream: int) -> None:
        """Raise ``SpaceError``, ``ConfigError`` or ``UsageError`` if ``learn`` would."""


LEARNER: Registry[Callable[..., SourceLearner]] = Registry(
    "learner",
    {
        "ppo": "compressed_ad.learners.ppo:BatchedPPO",
        "thompson": "compressed_ad.learners.bandits:ThompsonSampling",
        "ucb1": "compressed_ad.learners.bandits:UCB",
        "noise": "compressed_ad.learners.noise:NoiseDistillation",
    },
)
