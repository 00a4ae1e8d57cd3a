"""Bandits: K arms that pay independently from unknown distributions; observations are always 0.

A task is a row (K,) of arm means, drawn once from ``task_seed``. An episode is ``horizon`` pulls, by default
one: then every in-context episode is a pull, and regret adds up over them. Episodes terminate: after the last
pull nothing has value. A slot's rewards depend on its own seed alone, and each pull uses the slot's next
random number whatever the arm, so different agents meet the same luck.

``gaussian_bandit`` is by default the bandit of Lee et al. 2023, "Supervised Pretraining Can Learn In-Context
Reinforcement Learning": means uniform in [0, 1], noise of standard deviation 0.3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge
from gymnasium import spaces

from compressed_ad.errors import SpaceError, UsageError
from compressed_ad.registry import checked
from compressed_ad.seeding import SlotDraws, rng
from compressed_ad.settings import Count, Positive, Seed
from compressed_ad.tasks.bandit_rules import (
    UCB1,
    BetaPosterior,
    Floats,
    Generators,
    NormalPosterior,
    Posterior,
    Thompson,
    seeded,
)
from compressed_ad.tasks.base import OneLineRepr
from compressed_ad.types import Agent, AnyArray, FloatArray, IntArray, Step


@dataclass(frozen=True, repr=False)
class Bandit(OneLineRepr, ABC):
    """``n_arm`` arms, and ``n_task`` tasks drawn with ``task_seed``."""

    name: ClassVar[str]
    n_arm: Annotated[int, Ge(2)] = 10
    n_task: Count = 500
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

    def thompson(self, generators: Generators, prior: tuple[float, float] | None = None) -> Thompson:
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
            raise UsageError(
                f"{self.name}: expected finite arm means (N, {self.n_arm}), got {np.shape(tasks)}"
            )
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
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise SpaceError(
                f"{self._family.name}: expected ({self.num_envs},) integer actions, "
                f"got {actions.dtype} {actions.shape}"
            )
        if self.num_envs and (actions.min() < 0 or actions.max() >= self._family.n_arm):
            raise SpaceError(f"{self._family.name}: actions must lie in 0..{self._family.n_arm - 1}")
        reward = self._pay(self._means[self._slot, actions]).astype(np.float32)
        self._pulls = (self._pulls + 1) % self._family.horizon
        ended = np.full(self.num_envs, self._pulls == 0)
        nothing = np.zeros(self.num_envs, np.int64)
        return Step(nothing, reward, ended, np.zeros(self.num_envs, bool), nothing.copy())


def _streams(seeds: IntArray) -> list[np.random.Generator]:
    return [rng(int(seed), "bandit") for seed in seeds]


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
        uniform = SlotDraws(_streams(seeds))
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
        noise = SlotDraws(_streams(seeds), "standard_normal")
        return BanditEnv(self, self.check(tasks), lambda mean: mean + self.sigma * noise())

    def posterior(self, prior: tuple[float, float] | None = None) -> NormalPosterior:
        """``prior`` is (mean, standard deviation); by default those of the arm means."""
        deviation = 1 / math.sqrt(3) if self.distribution == "uniform" else 1.0
        mean, spread = (self.mean, self.width * deviation) if prior is None else prior
        if spread <= 0:
            raise UsageError(
                f"{self.name}: the prior is (mean, standard deviation), the latter above 0; got {prior}"
            )
        return NormalPosterior(self.n_arm, self.sigma, mean, spread)

    @property
    def ucb_scale(self) -> float:
        return 2 * self.sigma
