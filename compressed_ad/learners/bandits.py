"""Thompson sampling and UCB1 as source algorithms: they record the rules of ``tasks.bandit``.

They learn bandits only. Every stream is an independent run.
"""

from __future__ import annotations

from abc import abstractmethod

from compressed_ad.errors import UsageError
from compressed_ad.learners.scripted import MakeAgent, ScriptedLearner
from compressed_ad.registry import checked
from compressed_ad.settings import NonNegative
from compressed_ad.tasks.bandit import Bandit, Generators, Rule
from compressed_ad.tasks.base import TASK_FAMILY, TaskFamily


class BanditLearner(ScriptedLearner):
    """Plays ``rule`` in every stream."""

    @abstractmethod
    def rule(self, family: Bandit, generators: Generators) -> Rule: ...

    def agents(self, family: TaskFamily, n_timesteps: int) -> MakeAgent:
        if not isinstance(family, Bandit):
            bandits = [n for n, f in TASK_FAMILY.items() if isinstance(f, type) and issubclass(f, Bandit)]
            known = ", ".join(bandits)
            raise UsageError(f"{self.name} learns bandits ({known}), not {family.name}; try ppo or noise")
        return lambda tasks, generators: self.rule(family, generators)


@checked
class ThompsonSampling(BanditLearner):
    """Thompson sampling with conjugate posteriors.

    ``prior`` is (alpha, beta) of the chances of ``bernoulli_bandit``, or (mean, standard deviation) of the
    means of ``gaussian_bandit``, whose noise is known. By default it is what the family draws its tasks from.
    """

    name = "Thompson"

    def __init__(self, prior: tuple[float, float] | None = None) -> None:
        self.prior = prior

    def rule(self, family: Bandit, generators: Generators) -> Rule:
        return family.thompson(generators, self.prior)


@checked
class UCB(BanditLearner):
    """UCB1 (Auer, Cesa-Bianchi & Fischer 2002).

    ``scale`` multiplies the width of its bounds; by default what its guarantee asks for: 1 for
    ``bernoulli_bandit``, twice the noise for ``gaussian_bandit``.
    """

    name = "UCB1"

    def __init__(self, scale: NonNegative | None = None) -> None:
        self.scale = scale

    def rule(self, family: Bandit, generators: Generators) -> Rule:
        return family.ucb1(generators, self.scale)
