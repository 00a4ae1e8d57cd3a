"""Bandits, and Thompson sampling and UCB1 that learn them.

A bandit's K arms pay independently from unknown distributions; observations are always 0.

A task is a row (K,) of arm means, drawn once from ``task_seed``. An episode is ``horizon`` pulls, by default
one: then every in-context episode is a pull, and regret adds up over them. Episodes terminate: after the last
pull nothing has value. A slot's rewards depend on its own seed alone, and each pull uses the slot's next
random number whatever the arm, so different agents meet the same luck.

``gaussian_bandit`` is by default the bandit of Lee et al. 2023, "Supervised Pretraining Can Learn In-Context
Reinforcement Learning": means uniform in [0, 1], noise of standard deviation 0.3.

Thompson sampling and UCB1 play N bandits at once, as source learners and as references. Both compute the
probability of each arm (N, K), then draw with one random number per pull and slot. For Thompson sampling that
is the probability that the arm is the best one given the rewards so far (Thompson 1933), an integral that
``bandit_kernels`` computes on a grid. Its error is below 1e-3 for Beta posteriors of up to 300 pulls, 2e-3 at
1,000, and below 5e-3 for normal ones. The recorded probability of a choice is exactly the one that it was
drawn with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import scipy
from annotated_types import Ge
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from compressed_ad.errors import UsageError
from compressed_ad.registry import checked
from compressed_ad.seeding import SlotDraws, rng
from compressed_ad.settings import Count, Positive, Seed, TaskCount
from compressed_ad.tasks.base import OneLineRepr, discrete_actions
from compressed_ad.types import Agent, AnyArray, FloatArray, IntArray, Step

Floats = NDArray[np.float64]
Generators = Callable[[int], Sequence[np.random.Generator]]
"""Makes one generator for each of the given number of slots."""


class BetaPosterior:
    """The belief about the arms of N bandits: rewards 0 or 1, whose chance has the prior Beta(alpha, beta).

    The grid is uniform in arcsin(sqrt(chance)), where every posterior after n pulls has a spread near
    1 / (2 sqrt(n)): its 256 cells are narrower up to 6,000 pulls. One pull changes one
    distribution function by a known term, I_x(a + 1, b) = I_x(a, b) - x^a (1 - x)^b / (a B(a, b)), and
    likewise for b.
    """

    def __init__(self, n_arm: int, alpha: float = 1.0, beta: float = 1.0) -> None:
        self.n_arm, self.prior = n_arm, (alpha, beta)
        self._x = np.sin(np.linspace(0, np.pi / 2, 257)) ** 2
        with np.errstate(divide="ignore"):
            self._log = np.log(np.stack([self._x, 1 - self._x]))

    def reset(self, n_env: int) -> None:
        """Return to the prior, in ``n_env`` bandits."""
        self.counts = np.tile(self.prior, (n_env, self.n_arm, 1))  # (N, K, 2) alpha and beta
        start = scipy.special.betainc(*self.prior, self._x)
        self._cdf = np.tile(start, (n_env, self.n_arm, 1))

    def best(self) -> Floats:
        """(N, K) chance of each arm to be the best."""
        from compressed_ad.tasks.bandit_kernels import best_arm  # Numba takes a second to import

        return np.asarray(best_arm(self._cdf))

    def update(self, actions: IntArray, rewards: AnyArray) -> None:
        """Learn that the arms ``actions`` (N,) paid ``rewards`` (N,)."""
        slot, won = np.arange(len(actions)), np.asarray(rewards) > 0
        alpha, beta = self.counts[slot, actions].T
        log = alpha[:, None] * self._log[0] + beta[:, None] * self._log[1]
        term = (
            np.exp(log - scipy.special.betaln(alpha, beta)[:, None])
            * np.where(won, -1 / alpha, 1 / beta)[:, None]
        )
        self._cdf[slot, actions] = np.clip(self._cdf[slot, actions] + term, 0.0, 1.0)
        self.counts[slot, actions, np.where(won, 0, 1)] += 1


class NormalPosterior:
    """The same for normal rewards of known ``sigma`` whose mean has the prior N(mean, spread**2).

    The grid has 192 points, divided between the arms, within 5 standard deviations of each posterior's mean.
    """

    def __init__(self, n_arm: int, sigma: float, mean: float = 0.0, spread: float = 1.0) -> None:
        self.n_arm, self.sigma, self.prior = n_arm, sigma, (mean, spread)
        self._z = np.linspace(-5.0, 5.0, max(8, -(-192 // n_arm)))

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
        from compressed_ad.tasks.bandit_kernels import best_normal  # Numba takes a second to import

        return np.asarray(best_normal(self.mean, self.spread, self._z))

    def update(self, actions: IntArray, rewards: AnyArray, share: ArrayLike = 1.0) -> None:
        """As above; a pull counts only by its ``share``, one number or (N,)."""
        slot, precision = np.arange(len(actions)), np.asarray(share) * self.sigma**-2.0
        self._precision[slot, actions] += precision
        self._weighted[slot, actions] += np.asarray(rewards, np.float64) * precision


Posterior = BetaPosterior | NormalPosterior


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


@dataclass(frozen=True, repr=False)
class Bandit(OneLineRepr, ABC):
    """``n_arm`` arms, and ``n_task`` tasks drawn with ``task_seed``."""

    name: ClassVar[str]
    n_arm: Annotated[int, Ge(2)] = 10
    n_task: TaskCount = 500
    task_seed: Seed = 0
    horizon: Count = 1

    @cached_property
    def observation_space(self) -> spaces.Discrete:
        return spaces.Discrete(1)

    @cached_property
    def action_space(self) -> spaces.Discrete:
        return spaces.Discrete(self.n_arm)

    @cached_property
    def _means(self) -> Floats:
        return self.draw(rng(self.task_seed, self.name))

    def tasks(self) -> Floats:
        """(n_task, n_arm) arm means. With the same seed, a larger ``n_task`` only appends tasks."""
        return self._means.copy()

    @abstractmethod
    def draw(self, random: np.random.Generator) -> Floats:
        """(n_task, n_arm) arm means."""

    @abstractmethod
    def make(self, tasks: AnyArray, seeds: IntArray) -> BanditEnv:
        """One slot for each row of ``tasks`` (N, n_arm), with the random numbers of its own seed."""

    @abstractmethod
    def posterior(self, prior: tuple[float, float] | None = None) -> Posterior:
        """The belief that Thompson sampling starts from, by default the distribution of the arm means."""

    @property
    @abstractmethod
    def ucb_scale(self) -> float:
        """The scale of UCB1's bound that its guarantee needs."""

    def thompson(self, generators: Generators, prior: tuple[float, float] | None = None) -> Rule:
        """Thompson sampling with a draw of its own in each slot; ``prior`` None: the arms' distribution."""
        return Thompson(self.posterior(prior), generators)

    def ucb1(self, generators: Generators, scale: float | None = None) -> UCB1:
        """UCB1 with random ties in each slot; ``scale`` None: that of its guarantee."""
        return UCB1(self.n_arm, generators, self.ucb_scale if scale is None else scale)

    def references(self, tasks: AnyArray) -> Mapping[str, Callable[[int], Agent]]:
        """Thompson sampling and UCB1, which know nothing of ``tasks``."""
        return {
            "Thompson sampling": lambda seed: self.thompson(seeded(seed, "reference", "thompson")),
            "UCB1": lambda seed: self.ucb1(seeded(seed, "reference", "ucb1")),
        }

    def optimal_return(self, tasks: AnyArray) -> Floats:
        return np.asarray(self.horizon * self.check(tasks).max(axis=1))

    def random_return(self, tasks: AnyArray) -> Floats:
        return np.asarray(self.horizon * self.check(tasks).mean(axis=1))

    def optimal_action(self, tasks: AnyArray, obs: AnyArray, episode_return: FloatArray) -> IntArray:
        return np.asarray(self.check(tasks).argmax(axis=1))

    def check(self, tasks: AnyArray) -> Floats:
        """``tasks`` (N, n_arm) as float64; ``UsageError`` unless they are arm means."""
        means = np.asarray(tasks, np.float64)
        if means.ndim != 2 or means.shape[1] != self.n_arm or not np.isfinite(means).all():
            wanted = f"finite arm means (N, {self.n_arm})"
            raise UsageError(f"{self.name}: expected {wanted}, got {np.shape(tasks)}")
        return means


class BanditEnv:
    """N bandits that step together; ``pay`` draws the rewards (N,) of arms with given means (N,)."""

    def __init__(self, family: Bandit, means: Floats, pay: Callable[[Floats], Floats]) -> None:
        self._family, self._means, self._pay, self.num_envs = family, means, pay, len(means)
        self._slot = np.arange(len(means))
        self._pulls = 0

    def reset(self) -> IntArray:
        self._pulls = 0
        return np.zeros(self.num_envs, np.int64)

    def step(self, actions: AnyArray) -> Step:
        """Pull one arm (N,) in every slot. All episodes end together."""
        actions = discrete_actions(self._family.name, actions, self.num_envs, self._family.n_arm)
        reward = self._pay(self._means[self._slot, actions]).astype(np.float32)
        self._pulls = (self._pulls + 1) % self._family.horizon
        ended = np.full(self.num_envs, self._pulls == 0)
        nothing = np.zeros(self.num_envs, np.int64)
        return Step(nothing, reward, ended, np.zeros(self.num_envs, bool), nothing.copy())


@checked
@dataclass(frozen=True, repr=False)
class BernoulliBandit(Bandit):
    """Arms that pay 1 with a chance drawn from Beta(``alpha``, ``beta``), by default uniform, and else 0."""

    name: ClassVar[str] = "bernoulli_bandit"
    alpha: Positive = 1.0
    beta: Positive = 1.0

    def draw(self, random: np.random.Generator) -> Floats:
        return random.beta(self.alpha, self.beta, size=(self.n_task, self.n_arm))

    def make(self, tasks: AnyArray, seeds: IntArray) -> BanditEnv:
        uniform = SlotDraws([rng(int(seed), "bandit") for seed in seeds])
        return BanditEnv(self, self.check(tasks), lambda chance: (uniform() < chance).astype(np.float64))

    def posterior(self, prior: tuple[float, float] | None = None) -> BetaPosterior:
        """``prior`` is (alpha, beta)."""
        alpha, beta = (self.alpha, self.beta) if prior is None else prior
        if min(alpha, beta) <= 0:
            raise UsageError(f"{self.name}: the prior is (alpha, beta), both above 0; got {prior}")
        return BetaPosterior(self.n_arm, alpha, beta)

    @property
    def ucb_scale(self) -> float:
        return 1.0  # rewards lie in [0, 1]

    def check(self, tasks: AnyArray) -> Floats:
        chances = super().check(tasks)
        if ((chances < 0) | (chances > 1)).any():
            raise UsageError(f"{self.name}: tasks must be chances in [0, 1]")
        return chances


@checked
@dataclass(frozen=True, repr=False)
class GaussianBandit(Bandit):
    """Arms that pay their mean plus normal noise of standard deviation ``sigma``.

    Means are drawn around ``mean``: ``uniform`` within ``width`` of it, or ``normal`` with that standard
    deviation.
    """

    name: ClassVar[str] = "gaussian_bandit"
    sigma: Positive = 0.3
    distribution: Literal["uniform", "normal"] = "uniform"
    mean: float = 0.5
    width: Positive = 0.5

    def draw(self, random: np.random.Generator) -> Floats:
        shape = (self.n_task, self.n_arm)
        uniform = self.distribution == "uniform"
        return self.mean + self.width * (
            random.uniform(-1.0, 1.0, shape) if uniform else random.standard_normal(shape)
        )

    def make(self, tasks: AnyArray, seeds: IntArray) -> BanditEnv:
        noise = SlotDraws([rng(int(seed), "bandit") for seed in seeds], "standard_normal")
        return BanditEnv(self, self.check(tasks), lambda mean: mean + self.sigma * noise())

    def posterior(self, prior: tuple[float, float] | None = None) -> NormalPosterior:
        """``prior`` is (mean, standard deviation); by default those of the arm means."""
        deviation = 1 / math.sqrt(3) if self.distribution == "uniform" else 1.0
        mean, spread = (self.mean, self.width * deviation) if prior is None else prior
        if spread <= 0:
            wanted = "(mean, standard deviation), the latter above 0"
            raise UsageError(f"{self.name}: the prior is {wanted}; got {prior}")
        return NormalPosterior(self.n_arm, self.sigma, mean, spread)

    @property
    def ucb_scale(self) -> float:
        return 2 * self.sigma
