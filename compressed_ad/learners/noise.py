"""Histories without learning: a policy whose random actions become rarer.

AD-epsilon of Zisman et al. 2024, "Emergence of In-Context Reinforcement Learning from Noise Distillation":
actions of a good policy, replaced by uniformly random ones at a rate that falls from 1 over the history. A
model cannot tell such a history from one of learning, and distils the improvement all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy
from gymnasium import spaces

from compressed_ad.errors import ConfigError, SpaceError, UsageError, nearest
from compressed_ad.learners.base import Progress
from compressed_ad.learners.scripted import Generators, record
from compressed_ad.registry import import_attribute
from compressed_ad.seeding import SlotDraws
from compressed_ad.tasks.base import OptimalPolicy, TaskFamily
from compressed_ad.types import AnyArray, FloatArray, History, IntArray, Step

Policy = Callable[[AnyArray, AnyArray, FloatArray], AnyArray]
"""As ``OptimalPolicy.optimal_action``: of tasks (N, P), obs (N, ...) and episode_return (N,) the actions."""

SCHEDULE: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "quadratic": lambda x: (1 - x) ** 2,
}
"""How the noise falls from 1 to 0 while x, the share of the history that is over, rises from 0 to 1."""


class NoiseDistillation:
    """``SourceLearner`` that plays a policy with fading noise.

    Args:
        policy: ``module:attribute`` of a callable (tasks, obs, episode_return) -> actions, or the callable;
            by default the optimal policy of families that know one.
        final: share of random actions at the end of the history.
        schedule: how it falls from 1 to that: linear, cosine or quadratic.
    """

    name = "Noise"

    def __init__(
        self, policy: str | Policy | None = None, final: float = 0.0, schedule: str = "linear"
    ) -> None:
        if isinstance(final, bool) or not isinstance(final, int | float) or not 0 <= final <= 1:
            raise ConfigError(f"noise: final must be a number in [0, 1], got {final!r}")
        if schedule not in SCHEDULE:
            raise ConfigError(
                f"noise: unknown schedule {schedule!r}{nearest(str(schedule), SCHEDULE)}; "
                f"one of {', '.join(SCHEDULE)}"
            )
        self.policy = import_attribute("policy", policy) if isinstance(policy, str) else policy
        if self.policy is not None and not callable(self.policy):
            raise ConfigError(f"noise: policy {policy!r} is a {type(self.policy).__name__}, not a function")
        self.final, self.schedule = float(final), schedule

    def rate(self, n_timesteps: int) -> FloatArray:
        """(T,) share of random actions at each step."""
        left = SCHEDULE[self.schedule](np.arange(n_timesteps) / max(n_timesteps - 1, 1))
        return np.asarray(self.final + (1 - self.final) * left)

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
        """See ``SourceLearner.learn``. ``update`` counts steps: the noise changes with each.

        Raises ``UsageError`` if neither the family nor the configuration has a policy, ``SpaceError`` for
        actions that cannot be drawn uniformly.
        """
        policy = self.policy
        if policy is None:
            if not isinstance(family, OptimalPolicy):
                raise UsageError(
                    f"noise: {family.name} offers no optimal policy (optimal_action); name one with "
                    "learner_kwargs.policy, module:attribute"
                )
            policy = family.optimal_action
        actions, rate = UniformActions(family), self.rate(n_timesteps)
        return record(
            family, task_ids, tasks, lambda slots, made: NoisyAgent(policy, slots, actions, rate, made),
            source=self.name, update=np.arange(n_timesteps), n_stream=n_learner * n_stream, seed=seed,
            progress=progress,
        )  # fmt: skip


class UniformActions:
    """Uniformly random actions of a Discrete, MultiDiscrete or bounded Box space, made of numbers in [0, 1).

    ``count`` is the number of actions, None for a Box; ``n_part`` the components of one.
    """

    def __init__(self, family: TaskFamily) -> None:
        space: Any = family.action_space
        self.shape, self.dtype = tuple(space.shape), space.dtype
        self.count: float | None = None
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
            self._low, self._size = np.asarray(space.start), np.asarray(sizes)
            self.count = float(np.prod(self._size.astype(np.float64)))
        elif isinstance(space, spaces.Box) and space.is_bounded():
            self._low, self._size = space.low, space.high - space.low
        else:
            raise SpaceError(
                f"noise: {family.name}: actions {space} cannot be drawn uniformly; they must be Discrete, "
                "MultiDiscrete or a bounded Box"
            )
        self.n_part = math.prod(self.shape)

    def __call__(self, uniform: FloatArray) -> AnyArray:
        """Actions (N, ...) from ``uniform`` (N, n_part)."""
        scaled = uniform.reshape(-1, *self.shape) * self._size
        return np.asarray(self._low + (scaled if self.count is None else np.floor(scaled)), self.dtype)


class NoisyAgent:
    """The policy's actions, each replaced as a whole by a random one with the rate (T,) of its step.

    Of K actions the policy's has the probability 1 - rate + rate / K, every other one rate / K; with C
    components, ``probability`` is its C-th root, their geometric mean. In a Box the policy is a point mass,
    whose density no other action comes near: relative probability 1 for its actions, 0 for random ones.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: AnyArray,
        actions: UniformActions,
        rate: FloatArray,
        generators: Generators,
    ) -> None:
        self.policy, self.tasks, self.actions, self.rate = policy, tasks, actions, rate
        self._generators = generators
        self.entropy: FloatArray | None = None

    def reset(self, n_env: int) -> None:
        """Start anew, at the highest rate."""
        self._draws = SlotDraws(self._generators(n_env), shape=(1 + self.actions.n_part,))
        self._time, self._return = 0, np.zeros(n_env)

    def act(self, obs: AnyArray) -> AnyArray:
        """Actions (N, ...)."""
        rate, numbers = float(self.rate[self._time]), self._draws()
        best = np.asarray(self.policy(self.tasks, obs, self._return))
        if best.shape != (len(numbers), *self.actions.shape):
            raise UsageError(
                f"noise: the policy gave actions of shape {best.shape}, "
                f"expected {(len(numbers), *self.actions.shape)}"
            )
        best = best.astype(self.actions.dtype)
        noisy = numbers[:, 0] < rate
        chosen = np.where(
            noisy.reshape(-1, *(1 for _ in self.actions.shape)), self.actions(numbers[:, 1:]), best
        )
        if self.actions.count is None:
            self.probability = 1.0 - noisy
        else:
            other = rate / self.actions.count
            same = (chosen == best).reshape(len(best), -1).all(axis=1)
            self.probability = np.where(same, 1 - rate + other, other) ** (1 / self.actions.n_part)
            likely, n_other = 1 - rate + other, self.actions.count - 1
            entropy = -scipy.special.xlogy(likely, likely) - n_other * scipy.special.xlogy(other, other)
            self.entropy = np.full(len(best), entropy)
        self._time += 1
        return chosen

    def observe(self, actions: AnyArray, step: Step) -> None:
        """Keep the return of the episode so far, which tells what an observation may not."""
        ended = step.terminated | step.truncated
        self._return = np.where(ended, 0.0, self._return + step.reward)
