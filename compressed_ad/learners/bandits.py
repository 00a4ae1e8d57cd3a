"""Thompson sampling and UCB1 as source algorithms: the rules of ``tasks.bandit_rules``, recorded.

They learn bandits only. Every stream is a run of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from compressed_ad.errors import ConfigError, UsageError
from compressed_ad.learners.base import Progress
from compressed_ad.learners.scripted import record
from compressed_ad.tasks.bandit import Bandit
from compressed_ad.tasks.bandit_rules import Generators, Rule
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily
from compressed_ad.types import AnyArray, History, IntArray


class BanditLearner(ABC):
    """``SourceLearner`` that plays ``rule`` in every stream; ``update`` is the number of pulls before."""

    name: str

    @abstractmethod
    def rule(self, family: Bandit, generators: Generators) -> Rule:
        """The rule on ``family``."""

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
        """See ``SourceLearner.learn``; ``UsageError`` for a family that is no bandit."""
        if not isinstance(family, Bandit):
            raise UsageError(
                f"{self.name} learns bandits ({', '.join(_bandits())}), not {family.name}; try ppo or noise"
            )
        return record(
            family, task_ids, tasks, lambda slots, generators: self.rule(family, generators),
            source=self.name, update=np.arange(n_timesteps), n_stream=n_learner * n_stream, seed=seed,
            progress=progress,
        )  # fmt: skip


def _bandits() -> list[str]:
    return [
        name for name, maker in TASK_FAMILY.items() if isinstance(maker, type) and issubclass(maker, Bandit)
    ]


class ThompsonSampling(BanditLearner):
    """Thompson sampling with conjugate posteriors.

    ``prior`` is (alpha, beta) of the chances of ``bernoulli_bandit``, or (mean, standard deviation) of the
    means of ``gaussian_bandit``, whose noise is known. By default it is what the family draws its tasks from.
    """

    name = "Thompson"

    def __init__(self, prior: list[float] | tuple[float, float] | None = None) -> None:
        if prior is not None and (
            not isinstance(prior, list | tuple) or len(prior) != 2 or not all(map(_is_number, prior))
        ):
            raise ConfigError(f"thompson: prior must be two numbers, got {prior!r}")
        self.prior = None if prior is None else (float(prior[0]), float(prior[1]))

    def rule(self, family: Bandit, generators: Generators) -> Rule:
        """See ``BanditLearner.rule``."""
        return family.thompson(generators, self.prior)


class UCB(BanditLearner):
    """UCB1 (Auer, Cesa-Bianchi & Fischer 2002).

    ``scale`` multiplies the width of its bounds; by default what its guarantee asks for: 1 for
    ``bernoulli_bandit``, twice the noise for ``gaussian_bandit``.
    """

    name = "UCB1"

    def __init__(self, scale: float | None = None) -> None:
        if scale is not None and (not _is_number(scale) or scale < 0):
            raise ConfigError(f"ucb1: scale must be a number >= 0, got {scale!r}")
        self.scale = scale

    def rule(self, family: Bandit, generators: Generators) -> Rule:
        """See ``BanditLearner.rule``."""
        return family.ucb1(generators, self.scale)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
