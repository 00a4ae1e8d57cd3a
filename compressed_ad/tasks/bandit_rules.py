"""Thompson sampling and UCB1 for N bandits at once, as source learners and as references.

Both compute the probability of each arm (N, K), then draw with one random number per pull and slot. For
Thompson sampling that is the probability that the arm is the best one given the rewards so far (Thompson
1933), an integral that ``bandit_kernels`` computes on a grid. Its error is below 1e-3 for Beta posteriors of
up to 300 pulls, 2e-3 at 1,000, and below 5e-3 for normal ones. The recorded probability of a choice is
exactly the one that it was drawn with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import scipy
from numpy.typing import NDArray

from compressed_ad.seeding import SlotDraws, rng
from compressed_ad.types import AnyArray, IntArray, Step

Floats = NDArray[np.float64]
Generators = Callable[[int], Sequence[np.random.Generator]]
"""Makes one generator for each of the given number of slots."""

_CELLS = 256
"""Cells of the grid of Beta posteriors, narrower than a posterior's spread up to 6,000 pulls of its arm."""
_NODES = 192
"""Points of the grid of normal posteriors, divided between the arms."""
_REACH = 5.0
"""The points of a normal posterior reach this many standard deviations from its mean."""


class Posterior(Protocol):
    """The belief about the arms of N bandits."""

    n_arm: int

    def reset(self, n_env: int) -> None:
        """Return to the prior, in ``n_env`` bandits."""

    def best(self) -> Floats:
        """(N, K) chance of each arm to be the best."""

    def update(self, actions: IntArray, rewards: AnyArray) -> None:
        """Learn that the arms ``actions`` (N,) paid ``rewards`` (N,)."""


class BetaPosterior:
    """Rewards 0 or 1 with an unknown chance whose prior is Beta(alpha, beta).

    The grid is uniform in arcsin(sqrt(chance)), where every posterior after n pulls has a spread near
    1 / (2 sqrt(n)). One pull changes one distribution function by a known term:
    I_x(a + 1, b) = I_x(a, b) - x^a (1 - x)^b / (a B(a, b)), and likewise for b.
    """

    def __init__(self, n_arm: int, alpha: float = 1.0, beta: float = 1.0) -> None:
        self.n_arm, self.prior = n_arm, (alpha, beta)
        self._x = np.sin(np.linspace(0, np.pi / 2, _CELLS + 1)) ** 2
        with np.errstate(divide="ignore"):
            self._log = np.log(np.stack([self._x, 1 - self._x]))

    def reset(self, n_env: int) -> None:
        self.counts = np.tile(self.prior, (n_env, self.n_arm, 1))  # (N, K, 2) alpha and beta
        start = scipy.special.betainc(*self.prior, self._x)
        self._cdf = np.tile(start, (n_env, self.n_arm, 1))

    def best(self) -> Floats:
        from compressed_ad.tasks.bandit_kernels import best_arm  # Numba takes a second to import

        return np.asarray(best_arm(self._cdf))

    def update(self, actions: IntArray, rewards: AnyArray) -> None:
        slot, won = np.arange(len(actions)), np.asarray(rewards) > 0
        alpha, beta = self.counts[slot, actions].T
        log = (
            alpha[:, None] * self._log[0]
            + beta[:, None] * self._log[1]
            - scipy.special.betaln(alpha, beta)[:, None]
        )
        term = np.exp(log) * np.where(won, -1 / alpha, 1 / beta)[:, None]
        self._cdf[slot, actions] = np.clip(self._cdf[slot, actions] + term, 0.0, 1.0)
        self.counts[slot, actions, np.where(won, 0, 1)] += 1


class NormalPosterior:
    """Normal rewards of known ``sigma`` whose unknown mean has the prior N(mean, spread**2)."""

    def __init__(self, n_arm: int, sigma: float, mean: float = 0.0, spread: float = 1.0) -> None:
        self.n_arm, self.sigma, self.prior = n_arm, sigma, (mean, spread)
        self._z = np.linspace(-_REACH, _REACH, max(8, -(-_NODES // n_arm)))

    def reset(self, n_env: int) -> None:
        mean, spread = self.prior
        self._precision = np.full((n_env, self.n_arm), spread**-2.0)
        self._weighted = self._precision * mean

    @property
    def mean(self) -> Floats:
        """(N, K) posterior means."""
        return np.asarray(self._weighted / self._precision)

    @property
    def spread(self) -> Floats:
        """(N, K) posterior standard deviations."""
        return np.asarray(self._precision**-0.5)

    def best(self) -> Floats:
        # Each arm has points where its own posterior has mass.
        from compressed_ad.tasks.bandit_kernels import best_normal  # Numba takes a second to import

        return np.asarray(best_normal(self.mean, self.spread, self._z))

    def update(self, actions: IntArray, rewards: AnyArray) -> None:
        slot = np.arange(len(actions))
        self._precision[slot, actions] += self.sigma**-2.0
        self._weighted[slot, actions] += np.asarray(rewards, np.float64) * self.sigma**-2.0


class Rule(ABC):
    """An agent that keeps the probabilities of its last choices."""

    probability: Floats  # (N,) of the chosen arm
    entropy: Floats  # (N,) nats, of the distribution over the arms

    def __init__(self, generators: Generators) -> None:
        self._generators = generators

    @abstractmethod
    def policy(self) -> Floats:
        """(N, K) probability of each arm."""

    def reset(self, n_env: int) -> None:
        self._uniform = SlotDraws(self._generators(n_env))

    def act(self, obs: AnyArray) -> IntArray:
        chances = self.policy()
        passed = chances.cumsum(axis=1) <= self._uniform()[:, None]
        actions = np.minimum(passed.sum(axis=1), chances.shape[1] - 1)
        # Rounding may lead to an arm that has no chance.
        actions = np.where(chances[np.arange(len(actions)), actions] > 0, actions, chances.argmax(axis=1))
        self.probability = chances[np.arange(len(actions)), actions]
        self.entropy = scipy.special.entr(chances).sum(axis=1)
        return np.asarray(actions, np.int64)

    @abstractmethod
    def observe(self, actions: IntArray, step: Step) -> None: ...


class Thompson(Rule):
    """Thompson sampling (Thompson 1933) from ``posterior``."""

    def __init__(self, posterior: Posterior, generators: Generators) -> None:
        super().__init__(generators)
        self.posterior = posterior

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        self.posterior.reset(n_env)

    def policy(self) -> Floats:
        return self.posterior.best()

    def observe(self, actions: IntArray, step: Step) -> None:
        self.posterior.update(actions, step.reward)


class UCB1(Rule):
    """The arm with the highest mean + scale sqrt(2 ln t / n); untried arms first, ties at random.

    t counts all pulls so far and n those of the arm (Auer, Cesa-Bianchi & Fischer 2002, figure 1). For
    rewards in [0, 1] ``scale`` is 1. For normal rewards of standard deviation sigma, 2 sigma gives the same
    guarantee: the proof only uses that rewards in [0, 1] are sub-Gaussian with 1/2.
    """

    def __init__(self, n_arm: int, generators: Generators, scale: float = 1.0) -> None:
        super().__init__(generators)
        self.n_arm, self.scale = n_arm, scale

    def reset(self, n_env: int) -> None:
        super().reset(n_env)
        self._count, self._total = np.zeros((n_env, self.n_arm)), np.zeros((n_env, self.n_arm))

    def index(self) -> Floats:
        """(N, K) upper confidence bounds; infinite for an untried arm."""
        pulls = np.maximum(self._count.sum(axis=1, keepdims=True), 1)
        tried = np.maximum(self._count, 1)
        bound = self._total / tried + self.scale * np.sqrt(2 * np.log(pulls) / tried)
        return np.asarray(np.where(self._count > 0, bound, np.inf))

    def policy(self) -> Floats:
        """(N, K): 1 for the highest bound, shared equally between ties."""
        index = self.index()
        best = index == index.max(axis=1, keepdims=True)
        return np.asarray(best / best.sum(axis=1, keepdims=True))

    def observe(self, actions: IntArray, step: Step) -> None:
        slot = np.arange(len(actions))
        self._count[slot, actions] += 1
        self._total[slot, actions] += step.reward


def seeded(seed: int, *purpose: Any) -> Generators:
    """One generator for each slot, named by ``seed``, ``purpose`` and the slot's number."""
    return lambda n_env: [rng(seed, *purpose, slot) for slot in range(n_env)]
